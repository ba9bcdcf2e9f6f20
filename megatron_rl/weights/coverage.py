"""Whether a model folder holds the tensors of its model: none is missing, and none is dropped that nobody knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from megatron_rl.weights.families import HEADS
from megatron_rl.weights.rules import Head
from megatron_rl.weights.weight_map import WeightMap

_CRITIC = "ForTokenClassification"
_HEAD_NAMES = {head: frozenset(name for rule in rules for name in rule.hf) for head, rules in HEADS.items()}
_ANY_HEAD = frozenset[str]().union(*_HEAD_NAMES.values())


def head_of(config: Mapping[str, Any]) -> Head:
    """A critic is a ``*ForTokenClassification``."""
    return Head.VALUE if (config.get("architectures") or [""])[0].endswith(_CRITIC) else Head.TOKEN


def check_coverage(
    folder: Path,
    names: Set[str],
    weights: WeightMap,
    *,
    new_head: bool = False,
    hint: Callable[[str], str] | None = None,
) -> frozenset[str]:
    """Hold the tensors of a Hugging Face folder against those of a model.

    A folder may hold more than the model is made of: the other head, since a critic starts from a policy's folder and
    the other way round; a copy of the embedding as the head of a tied model; the frequencies of rotary positions, which
    are computed; layers that predict further tokens.

    Args:
        folder: for messages.
        names: of its tensors.
        weights: of the model.
        new_head: whether a value head may be missing, since training begins with one of zeros.
        hint: what is the cause of a tensor that is not known, which is then told first; None: another architecture.

    Returns:
        the names that the model leaves.

    Raises:
        ValueError: the folder lacks a tensor, or has one that no such model knows; the message names the first.
    """
    wanted = {name for entry in weights.entries for name in entry.hf}
    what = f"{weights.dims.architecture}{' critic' if wanted & _HEAD_NAMES[Head.VALUE] else ''}"
    missing = sorted(wanted - names - (_HEAD_NAMES[Head.VALUE] if new_head else set()))
    beyond = frozenset(names - wanted)
    unknown = sorted(name for name in beyond if not _may_be_left(name, weights))
    if missing and not (unknown and hint):
        raise ValueError(
            f"{folder} must hold {missing[0]}, a tensor of every {what}, and does not ({len(missing)} are missing); "
            "the shards are incomplete, or config.json is another model's"
        )
    if unknown:
        cause = "check the architecture in config.json" if hint is None else hint(unknown[0])
        raise ValueError(f"{folder}: no {what} has a tensor {unknown[0]} ({len(unknown)} are unknown); {cause}")
    return beyond


def further_layers(left: Set[str], weights: WeightMap) -> list[str]:
    """Those of the names that :func:`check_coverage` gave that belong to layers which predict further tokens."""
    return sorted(name for name in left if _is_further(name, weights))


def _may_be_left(name: str, weights: WeightMap) -> bool:
    return name in _ANY_HEAD or name.endswith("rotary_emb.inv_freq") or _is_further(name, weights)


def _is_further(name: str, weights: WeightMap) -> bool:
    dims, parts = weights.dims, name.split(".")
    if parts[:2] != ["model", "layers"] or not parts[2].isdigit():
        return False
    return dims.layers <= int(parts[2]) < dims.layers + dims.further_layers
