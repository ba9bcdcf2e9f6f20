"""What the linears of a model's layers are to multiply in, by Hugging Face name, and where that is not so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_rl.config.precision import FP8Config
from megatron_rl.linear_formats import LinearFormat
from megatron_rl.weights.weight_map import WeightEntry, WeightMap

FP8_FORMATS: dict[str, tuple[tuple[int, int], str]] = {
    "tensorwise": ((0, 0), "float32"),
    "blockwise": ((128, 128), "float32"),
    "mxfp8": ((1, 32), "float8_e8m0fnu"),
}
"""By recipe: rows x columns of a weight that share a scale, and what the scale is. ``float8_e8m0fnu`` is a power of 2,
also where it is stored as float32."""


def is_linear(entry: WeightEntry) -> bool:
    """Whether a tensor is the weight of a linear layer inside the layers. Embedding, heads, norms and the router of
    experts are none: they never multiply in FP8.
    """
    return entry.layer is not None and ".linear_" in entry.megatron and entry.megatron.endswith(".weight")


def formats_of(entry: WeightEntry, dtype: str, fp8_recipe: str | None) -> Iterator[LinearFormat]:
    """Of the Hugging Face weights that one linear is made of: of ``dtype``, or in FP8 by a recipe."""
    for name in entry.hf:
        if fp8_recipe is None:
            yield LinearFormat(weight=name, dtype=dtype)
        else:
            block, scale = FP8_FORMATS[fp8_recipe]
            yield LinearFormat(weight=name, dtype="float8_e4m3fn", block=block, scale=scale)


def expected_formats(weights: WeightMap, fp8: FP8Config | None, dtype: str) -> list[LinearFormat]:
    """What the settings ask for, in the order of the layers.

    Args:
        weights: of the model.
        fp8: its settings; None: all in ``dtype``.
        dtype: of the weights that are not in FP8, as torch names it.
    """
    kept = 0 if fp8 is None else fp8.layers_kept
    inside = range(kept, weights.dims.layers - kept)
    return [
        found
        for entry in weights.entries
        if is_linear(entry)
        for found in formats_of(entry, dtype, fp8.recipe if fp8 is not None and entry.layer in inside else None)
    ]


def check_formats(owner: str, expected: Sequence[LinearFormat], found: Sequence[LinearFormat]) -> None:
    """Compare the linears that were found with what is expected of them; ``expected`` may hold more.

    Raises:
        ValueError: one of them multiplies otherwise; the message names the first, in the order of ``expected``.
    """
    there = {linear.weight: linear for linear in found}
    if unknown := there.keys() - {linear.weight for linear in expected}:
        raise ValueError(f"{owner}: nothing is expected of {min(unknown)}, which is a linear here")
    differ = [wanted for wanted in expected if there.get(wanted.weight, wanted) != wanted]
    if differ:
        first = differ[0]
        raise ValueError(
            f"{owner}: {first.weight} must multiply in {_described(first)}, but multiplies in "
            f"{_described(there[first.weight])} ({len(differ)} of {len(there)} weights differ); check that Transformer "
            "Engine makes this layer (model.layers) and that nothing imported it before this run set its environment"
        )


def _described(linear: LinearFormat) -> str:
    if linear.block is None:
        return linear.dtype
    rows, columns = linear.block
    each = f"{rows}x{columns} weights" if rows else "tensor"
    return f"{linear.dtype} with one {linear.scale} scale per {each}"
