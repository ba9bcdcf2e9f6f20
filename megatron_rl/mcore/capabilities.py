"""Which libraries the trainer computes with here: Transformer Engine, Apex, torch. Light: loads no megatron-core."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass

from megatron_rl.device import compute_capability, has_cuda

_ENGINE = "transformer_engine"
_FUSED_ROWS = (9, 0)
_OWN_ATTENTION = "torch SDPA, rows of like length"


class BrokenLibrary(RuntimeError):
    """A library is installed and cannot be imported, which would end the import of megatron-core too."""


@dataclass(frozen=True)
class Capability:
    """One part of training: what it is done with, and why."""

    part: str
    used: str
    why: str


@functools.cache
def transformer_engine_version() -> str | None:
    """Of the Transformer Engine that can be imported; None where there is none.

    Raises:
        BrokenLibrary: it is there in part, or its shared libraries do not load.
    """
    try:
        importlib.import_module(f"{_ENGINE}.pytorch")
        return str(getattr(importlib.import_module(_ENGINE), "__version__", "unknown"))
    except ModuleNotFoundError as error:
        if error.name == _ENGINE:
            return None
        raise BrokenLibrary(_half(error)) from error
    except (ImportError, OSError, RuntimeError, AssertionError) as error:  # the last where only some of its wheels are
        raise BrokenLibrary(_half(error)) from error


def _half(error: Exception) -> str:
    return (
        f"Transformer Engine must import or be absent, found it in part: {type(error).__name__}: {error}; install "
        "transformer_engine with its torch extension for this torch and CUDA (docs/fp8.md), or uninstall "
        "transformer_engine, transformer_engine_torch and transformer_engine_cu*"
    )


def uses_transformer_engine(layers: str, dtype: str) -> bool:
    """Whether the layers are made of Transformer Engine's modules under these ``model.layers`` and ``model.dtype``; its
    fused attention takes no float32.

    Raises:
        BrokenLibrary: see :func:`transformer_engine_version`.
        ValueError: they are to be, and cannot.
    """
    lacks = lacking(dtype)
    if layers == "transformer_engine" and lacks:
        raise ValueError(f"model.layers='transformer_engine' cannot be: {lacks}; take 'auto'")
    return layers != "local" and lacks is None


def lacking(dtype: str) -> str | None:
    """What Transformer Engine's layers want of this machine and do not get; None: nothing. Errors as
    :func:`transformer_engine_version`.
    """
    if transformer_engine_version() is None:
        return "Transformer Engine is not installed"
    if not has_cuda():
        return "there is no GPU"
    return "model.dtype is not bfloat16" if dtype != "bfloat16" else None


@functools.cache
def fuses_packed_rows() -> bool:
    """Whether Transformer Engine, which must be there, has a fused attention for packed rows on this GPU: cuDNN's asks
    for compute capability 9.0 (``fused_attn.cpp``), below that flash-attn 2 serves where it is installed. Without
    either, it would hold the products of all pairs of tokens, and refuse context ranks.
    """
    if compute_capability() >= _FUSED_ROWS:
        return True
    asked = importlib.import_module(f"{_ENGINE}.pytorch.attention.dot_product_attention.utils")
    return bool(asked.FlashAttentionUtils.is_installed)  # of a version that it supports


@functools.cache
def _has_apex() -> bool:
    try:
        importlib.import_module("apex.optimizers")
    except ImportError:
        return False
    return True


def capabilities(layers: str = "auto", dtype: str = "bfloat16") -> list[Capability]:
    """What each part of training is done with, in the order in which a layer meets them; errors as
    :func:`uses_transformer_engine`.
    """
    engine, version = uses_transformer_engine(layers, dtype), transformer_engine_version()
    named = f"Transformer Engine {version}"
    why = "it is installed and there is a GPU" if engine else lacking(dtype) or f"model.layers={layers!r}"
    return [
        Capability("linear layers", f"{named}, FP8 possible" if engine else "megatron-core, no FP8", why),
        Capability("norm", f"{named}, fused with the linear after it" if engine else "torch RMSNorm", why),
        _attention(version, why) if engine else Capability("attention", _OWN_ATTENTION, why),
        _optimizer(version),
    ]


def _attention(version: str | None, why: str) -> Capability:
    """With the layers of Transformer Engine."""
    if fuses_packed_rows():
        return Capability("attention", f"Transformer Engine {version}, fused, packed rows", why)
    needs, has = (".".join(map(str, number)) for number in (_FUSED_ROWS, compute_capability()))
    lacks = f"Transformer Engine's needs compute capability {needs} or flash-attn 2, this GPU has {has}"
    return Capability("attention", _OWN_ATTENTION, lacks)


def _optimizer(version: str | None) -> Capability:
    """As megatron-core chooses, whatever the layers are made of."""
    if version is not None:
        return Capability("Adam", f"Transformer Engine {version} FusedAdam", "megatron-core takes it first")
    if _has_apex():
        return Capability("Adam", "Apex FusedAdam", "Transformer Engine is not installed, Apex is")
    return Capability("Adam", "torch fused AdamW", "neither Transformer Engine nor Apex is installed")
