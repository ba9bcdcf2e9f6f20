"""Rotary positions stretched beyond the window that a model was first trained on, read from a ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every position is divided by ``factor`` (Chen et al. 2023, "Position Interpolation", eq. 4)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Slow rotations are slowed down by ``factor``, fast ones are left, those between are mixed (Llama 3.1).

    A rotation is slow when it turns less than ``low_freq_factor`` times in the first window, fast when it turns more
    than ``high_freq_factor`` times.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int
    """The first window, in tokens."""


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Slow rotations are slowed down by ``factor``, fast ones are left, with a ramp over the dims between; attention
    scores are scaled as well (Peng et al. 2023, "YaRN", sections 3.2 and 3.4).
    """

    factor: float
    original_positions: int
    """The first window, in tokens."""
    beta_fast: float
    """Turns in the first window above which a rotation is left."""
    beta_slow: float
    """Turns below which it is slowed down in full."""
    truncate: bool
    """Whether the ramp starts and ends at whole dims."""
    magnitude: float
    """Factor on cosine and sine, of queries and keys alike."""
    mscale_all_dim: float
    """Latent attention scales its scores by the square of ``yarn_mscale(factor, mscale_all_dim)`` besides; 0: not."""


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """``0.1 mscale ln(factor) + 1`` (YaRN, section 3.4), 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies; ``config`` as :func:`read_rope` has it."""
    return float(_given(config).get("rope_theta") or config.get("rope_theta") or 10000.0)


def _given(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies, and how they are scaled, if they are.

    Args:
        config: content of a ``config.json``, of transformers 5 (``rope_parameters``) or older (``rope_scaling``).

    Raises:
        ValueError: a kind of scaling, or a setting of it, that is not supported.
    """
    rope = {key: value for key, value in _given(config).items() if value is not None and key != "rope_theta"}
    kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", kind)
    rotated = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if rotated != 1.0:
        raise ValueError(f"partial_rotary_factor must be 1, got {rotated}: heads that rotate in part are not supported")
    if kind not in _READERS:
        raise ValueError(f"rope scaling {kind!r} is not supported; known: {', '.join(sorted(_READERS))}")
    needed, optional, read = _READERS[kind]
    if kind in ("llama3", "yarn"):
        window = config.get("original_max_position_embeddings")
        window = window or rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        rope["original_max_position_embeddings"] = window
    missing, unknown = sorted(needed - rope.keys()), sorted(rope.keys() - needed - optional)
    if missing or unknown:
        raise ValueError(
            f"rope scaling {kind!r} must have {sorted(needed)} and may have {sorted(optional)}; "
            f"missing: {missing}, not understood: {unknown}"
        )
    return read_theta(config), read(rope)


def latent_rope_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Why vLLM scales the positions of latent attention otherwise than the model does, one sentence each.

    Args:
        config: as :func:`read_rope` has it, which reads it.

    Source: ``DeepseekV2MLAAttention`` in vLLM's ``deepseek_v2.py``, and its ``DeepseekScalingRotaryEmbedding``.
    """
    rope, (_, scaling) = _given(config), read_rope(config)
    if scaling is None:
        return
    if not isinstance(scaling, YarnScaling):
        yield f"latent attention is scaled by yarn alone, got {scaling}: vLLM takes any scaling for yarn"
        return
    if not scaling.truncate:
        yield "latent attention's yarn must not have truncate=false: vLLM leaves it out"
    if (factor := rope.get("attention_factor")) is not None:
        yield f"latent attention's yarn must have no attention_factor, got {factor}: vLLM leaves it out"
        return
    mscale = rope.get("mscale")
    theirs = yarn_mscale(scaling.factor, 1.0 if mscale is None else mscale)
    if not math.isclose(theirs / yarn_mscale(scaling.factor, scaling.mscale_all_dim), scaling.magnitude):
        yield (
            "latent attention's yarn must have both mscale and mscale_all_dim or neither, got "
            f"{mscale} and {rope.get('mscale_all_dim')}: of one alone vLLM makes another factor than transformers"
        )


def _llama3(rope: Mapping[str, Any]) -> Llama3Scaling:
    return Llama3Scaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_positions=int(rope["original_max_position_embeddings"]),
    )


def _yarn(rope: Mapping[str, Any]) -> YarnScaling:
    factor, all_dim = float(rope["factor"]), float(rope.get("mscale_all_dim", 0.0))
    both = rope.get("mscale") and all_dim
    magnitude = yarn_mscale(factor, rope["mscale"]) / yarn_mscale(factor, all_dim) if both else yarn_mscale(factor)
    return YarnScaling(
        factor=factor,
        original_positions=int(rope["original_max_position_embeddings"]),
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
        magnitude=float(rope.get("attention_factor", magnitude)),
        mscale_all_dim=all_dim,
    )


_Reader = Callable[[Mapping[str, Any]], RopeScaling | None]

_WINDOW = "original_max_position_embeddings"
_NONE: frozenset[str] = frozenset()
_READERS: dict[str, tuple[frozenset[str], frozenset[str], _Reader]] = {  # keys that must be there, that may; reader
    "default": (_NONE, _NONE, lambda _: None),
    "linear": (frozenset({"factor"}), _NONE, lambda rope: LinearScaling(factor=float(rope["factor"]))),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor", _WINDOW}), _NONE, _llama3),
    "yarn": (
        frozenset({"factor", _WINDOW}),
        frozenset({"beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"}),
        _yarn,
    ),
}
