"""The sizes of a model, read from a Hugging Face ``config.json`` without loading torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.layout import ParallelLayout


class UnknownArchitecture(ValueError):
    """The model's architecture has no weight map here."""


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """Sizes and switches of a dense decoder-only transformer. Lengths in tokens, widths in elements."""

    architecture: str
    """The Hugging Face class name, such as ``Qwen2ForCausalLM``: the key of the weight map's family."""
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    rope_theta: float
    eos_ids: tuple[int, ...]
    pad_id: int

    def layout_problems(self, layout: ParallelLayout) -> list[str]:
        """Why this model cannot be laid out so, one sentence each with the nearest legal values; empty when it can."""
        found = layout.problems()
        for what, size in (("attention heads", self.heads), ("key/value heads", self.kv_heads)):
            if layout.tensor > 0 and size % layout.tensor:
                legal = [n for n in range(1, size + 1) if self.heads % n == 0 and self.kv_heads % n == 0]
                found.append(f"tensor={layout.tensor} does not divide the model's {size} {what}; possible: {legal}")
        for what, size in (("ffn width", self.ffn_hidden), ("vocabulary", self.vocabulary)):
            if layout.tensor > 0 and size % layout.tensor:
                found.append(f"tensor={layout.tensor} does not divide the model's {what} of {size}")
        if layout.pipeline > 0 and self.layers % layout.pipeline:
            legal = [n for n in range(1, self.layers + 1) if self.layers % n == 0]
            found.append(
                f"pipeline={layout.pipeline} does not divide the model's {self.layers} layers; possible: {legal}"
            )
        elif layout.chunks > 0 and self.layers % layout.chunks:
            per_stage = self.layers // layout.pipeline
            legal = [n for n in range(1, per_stage + 1) if per_stage % n == 0]
            found.append(
                f"virtual_pipeline={layout.virtual_pipeline} does not divide the {per_stage} layers of a stage; "
                f"possible: {legal}"
            )
        if layout.expert > 1 or layout.expert_tensor > 1:
            found.append(f"expert and expert_tensor must be 1: {self.architecture} has no experts")
        return found

    def row_flops(self, length: int) -> float:
        """FLOPs of a forward pass over a row of ``length`` tokens (a multiply and an add are two).

        Matrices cost the same for each token; each query meets, on the average, half of the row's keys.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = self.layers * self.hidden * (2 * queries + 2 * keys + 3 * self.ffn_hidden)
        matrices = 2.0 * length * (weights + self.hidden * self.vocabulary)
        return matrices + 2.0 * length**2 * self.layers * queries


def read_model_dims(model: Path) -> ModelDims:
    """Read the sizes of the model in folder ``model``.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        UnknownArchitecture: the architecture is not one this project has a weight map for.
        ValueError: a setting that would change the numbers is not supported (rope scaling, sliding window).
    """
    file = model / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"a model folder needs a config.json, found none in {model}")
    return dims_from_config(json.loads(file.read_text()))


_DENSE = {  # architecture -> (bias of q, k, v; norm of q and k)
    "LlamaForCausalLM": (False, False),
    "MistralForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}


def dims_from_config(config: Mapping[str, Any]) -> ModelDims:
    """Read the sizes from the content of a Hugging Face ``config.json``; errors as :func:`read_model_dims`."""
    architecture = (config.get("architectures") or [config.get("model_type", "?")])[0]
    architecture = architecture.replace("ForTokenClassification", "ForCausalLM")  # a critic of the same family
    if architecture not in _DENSE:
        raise UnknownArchitecture(f"unknown architecture {architecture}; known: {', '.join(sorted(_DENSE))}")
    qkv_bias, qk_norm = _DENSE[architecture]
    rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{architecture}: rope scaling is not supported, got {dict(rope)}")
    if config.get("use_sliding_window"):
        raise ValueError(f"{architecture}: sliding-window attention is not supported, set use_sliding_window to false")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{architecture}: hidden_act must be silu, got {config['hidden_act']}")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):  # on the output projection or the MLP, where no family here has one
            raise ValueError(f"{architecture}: {key}=true puts biases where the weight map has none; not supported")
    eos = config.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)
    if not eos_ids:
        raise ValueError("config.json must name eos_token_id, found none")
    heads = int(config["num_attention_heads"])
    return ModelDims(
        architecture=architecture,
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        ffn_hidden=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
        vocabulary=int(config["vocab_size"]),
        max_positions=int(config["max_position_embeddings"]),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        norm_eps=float(config["rms_norm_eps"]),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        eos_ids=eos_ids,
        pad_id=eos_ids[0] if config.get("pad_token_id") is None else int(config["pad_token_id"]),
    )
