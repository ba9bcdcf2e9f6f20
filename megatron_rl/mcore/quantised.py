"""Parameters that Transformer Engine keeps in FP8: they look like bfloat16 tensors, but views of them are copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def by_transformer_engine(thing: object) -> bool:
    """Whether a module or tensor is of a class of Transformer Engine's, or one derived from it."""
    return any(kind.__module__.split(".")[0] == "transformer_engine" for kind in type(thing).__mro__)


def store(parameter: Any, values: Tensor) -> None:
    """Fill an FP8 parameter. The optimizer's main weight, which is made later, starts from ``values`` and not from what
    is left of them in FP8.
    """
    kept = values.detach().cpu()

    def clear() -> None:
        parameter.get_high_precision_init_val = lambda: None

    if hasattr(parameter, "clear_high_precision_init_val"):
        parameter.clear_high_precision_init_val()  # of the values that the layer was made with, in host memory too
    with torch.no_grad():
        parameter.copy_(values)
    parameter.get_high_precision_init_val = lambda: kept
    parameter.clear_high_precision_init_val = clear


def forget_values(chunks: Sequence[Any]) -> None:
    """Drop what :func:`store` keeps in host memory, where no optimizer is made that would."""
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        if by_transformer_engine(parameter):
            parameter.clear_high_precision_init_val()


def plain_values(parameter: Any) -> Tensor:
    """The same tensor; an FP8 parameter as a copy in its nominal type, twice as large."""
    plain: Tensor = parameter.dequantize() if by_transformer_engine(parameter) else parameter
    return plain
