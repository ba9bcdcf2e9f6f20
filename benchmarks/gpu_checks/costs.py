"""Sizes of the models that are measured, and what their work cannot cost less than. Pure."""

from __future__ import annotations

from dataclasses import dataclass

H100_BF16_TFLOPS = 989.0
"""NVIDIA's figure for dense bfloat16 products on an H100 or H200 SXM; MFU is a share of it."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Layers of a Qwen2.5 model."""

    name: str
    hidden: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    head_dim: int


SHAPES = (
    Shape(name="0.5B", hidden=896, ffn_hidden=4864, heads=14, kv_heads=2, head_dim=64),
    Shape(name="1.5B", hidden=1536, ffn_hidden=8960, heads=12, kv_heads=2, head_dim=128),
    Shape(name="7B", hidden=3584, ffn_hidden=18944, heads=28, kv_heads=4, head_dim=128),
)
TINY_SHAPE = Shape(name="tiny", hidden=64, ffn_hidden=192, heads=2, kv_heads=2, head_dim=32)
VOCABULARY = 152064


def product_flops(rows: int, inner: int, columns: int) -> float:
    """Of one matrix product; a multiply and an add are two."""
    return 2.0 * rows * inner * columns


def logprob_flops(tokens: int, hidden: int, vocabulary: int, *, backward: bool) -> float:
    """Of log-probs from hidden states: one product, and with the backward three more (logits again, two gradients)."""
    return (4 if backward else 1) * product_flops(tokens, hidden, vocabulary)


def attention_flops(lengths: tuple[int, ...], heads: int, head_dim: int) -> float:
    """Of the forward of causal attention: scores and values, each over half of the square of every row."""
    return sum(2.0 * length * length * heads * head_dim for length in lengths)


def floor_seconds(flops: float, tflops: float) -> float:
    """At a rate that was measured on the same device."""
    return flops / (tflops * 1e12)


def mfu(flops: float, seconds: float) -> float:
    """Share of :data:`H100_BF16_TFLOPS`; work done again for lack of memory does not count as work."""
    return flops / seconds / (H100_BF16_TFLOPS * 1e12)
