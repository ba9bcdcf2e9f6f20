"""Whether a model folder holds the tensors of its model: none is missing, and none is dropped that nobody knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.weights.families import HEADS
from megatron_rl.weights.rules import Head
from megatron_rl.weights.weight_map import WeightMap

_POLICY, _CRITIC = "ForCausalLM", "ForTokenClassification"
_WITHOUT_CRITIC = frozenset({"DeepseekV2ForCausalLM"})
_HEAD_NAMES = {head: frozenset(name for rule in rules for name in rule.hf) for head, rules in HEADS.items()}
FURTHER = "of layers that predict further tokens"
_OTHER_HEAD, _COPY, _FREQUENCIES = "of another head", "that copies the tied embedding", "of rotary frequencies"


def critic_architecture(architecture: str) -> str:
    """The class that transformers has for the critics of a family, whose language models are ``architecture``.

    Raises:
        ValueError: it has none.
    """
    if architecture in _WITHOUT_CRITIC:
        raise ValueError(
            f"a critic of {architecture} cannot be a Hugging Face folder: transformers has no "
            f"{architecture.replace(_POLICY, _CRITIC)}; it stays in Megatron's format, in which it is trained"
        )
    return architecture.replace(_POLICY, _CRITIC)


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
) -> dict[str, str]:
    """Hold the tensors of a Hugging Face folder against those of a model.

    A folder may hold more than the model is made of: the other head, since a critic starts from a policy's folder and
    the other way round; a copy of the embedding as the head of a tied model (:func:`check_copy`); the frequencies of
    rotary positions, which are computed; layers that predict further tokens.

    Args:
        folder: for messages.
        names: of its tensors.
        weights: of the model.
        new_head: whether a value head may be missing, since training begins with one of zeros.
        hint: what is the cause of a tensor that is not known, which is then told first; None: another architecture.

    Returns:
        the names that the model leaves, each with what sort of tensor it is.

    Raises:
        ValueError: the folder lacks a tensor, or has one that no such model knows; the message names the first.
    """
    wanted = weights.hf_names
    what = f"{weights.dims.architecture}{' critic' if wanted & _HEAD_NAMES[Head.VALUE] else ''}"
    missing = sorted(wanted - names - (_HEAD_NAMES[Head.VALUE] if new_head else set()))
    beyond = {name: _sort(name, weights) for name in sorted(names - wanted)}
    unknown = [name for name, sort in beyond.items() if sort is None]
    if missing and not (unknown and hint):
        raise ValueError(
            f"{folder} must hold {missing[0]}, a tensor of every {what}, and does not ({len(missing)} are missing); "
            "the shards are incomplete, or config.json is another model's"
        )
    if unknown:
        cause = "check the architecture in config.json" if hint is None else hint(unknown[0])
        raise ValueError(f"{folder}: no {what} has a tensor {unknown[0]} ({len(unknown)} are unknown); {cause}")
    return {name: sort for name, sort in beyond.items() if sort is not None}


def check_copy(folder: Path, left: Mapping[str, str], weights: WeightMap, tensor: Callable[[str], Tensor]) -> None:
    """Refuse the head of a tied model that is no copy of its embedding: transformers would score with that head.

    Args:
        folder: for messages.
        left: as :func:`check_coverage` gives it.
        weights: of the model.
        tensor: reads one of the folder's, by name.

    Raises:
        ValueError: they differ.
    """
    embedding = weights.entries[0].hf[0]
    for name in (name for name, sort in left.items() if sort == _COPY):
        mine, theirs = tensor(embedding), tensor(name)
        if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
            raise ValueError(
                f"{folder}: {name} must be a copy of {embedding}, since config.json ties them, and differs; if it is a "
                "head of its own, set tie_word_embeddings to false, or else remove it"
            )


def told_left(left: Mapping[str, str]) -> str:
    """For people: what :func:`check_coverage` gave, counted by sort, with the first name of each; "" of nothing."""
    groups = groupby(sorted(left, key=lambda name: (left[name], name)), key=lambda name: left[name])
    sorts = {sort: list(names) for sort, names in groups}
    return ", ".join(
        f"1 tensor {sort} ({names[0]})" if len(names) == 1 else f"{len(names)} tensors {sort} ({names[0]} ...)"
        for sort, names in sorts.items()
    )


def _sort(name: str, weights: WeightMap) -> str | None:
    """Why a tensor may be left; None: nobody knows it."""
    if name in _HEAD_NAMES[Head.TOKEN] | _HEAD_NAMES[Head.VALUE]:
        is_critic = _HEAD_NAMES[Head.VALUE] & weights.hf_names
        return _OTHER_HEAD if is_critic or name in _HEAD_NAMES[Head.VALUE] else _COPY
    if name.endswith("rotary_emb.inv_freq"):
        return _FREQUENCIES
    return FURTHER if _is_further(name, weights) else None


def _is_further(name: str, weights: WeightMap) -> bool:
    dims, parts = weights.dims, name.split(".")
    if parts[:2] != ["model", "layers"] or not parts[2].isdigit():
        return False
    return dims.layers <= int(parts[2]) < dims.layers + dims.further_layers
