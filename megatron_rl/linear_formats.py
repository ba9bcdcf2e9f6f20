"""How the linears of a model multiply, said alike for trainer and engine, so that the two can be compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LinearFormat:
    """One linear: the name of its weight, and what its multiplication reads.

    ``weight`` is the Hugging Face name. ``dtype`` is torch's name of the number format (``bfloat16``,
    ``float8_e4m3fn``). ``block`` is how many output rows x input columns of the weight share one scale (a size of 0
    stands for all of them), ``scale`` the dtype of these scales; both are ``None`` where there is no scale.
    """

    weight: str
    dtype: str
    block: tuple[int, int] | None = None
    scale: str | None = None
