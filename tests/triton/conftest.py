"""Where there is no GPU, kernels run in Triton's interpreter, whose bfloat16 is put right first."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch


def _mend_bfloat16() -> None:
    """Why: the interpreter holds bfloat16 as uint16, cuts digits off where a GPU rounds to the nearest, and multiplies
    the integers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data).to(torch.bfloat16).view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return multiply(self, *wide, *rest)

    interpreter._convert_float, builder.create_dot = rounded, create_dot


if find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    _mend_bfloat16()
