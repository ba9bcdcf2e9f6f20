"""How one model is laid over its ranks: sizes, divisibility, and the coordinates of a rank. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where one rank sits on each axis of its layout (0-based)."""

    tensor: int
    data: int
    pipeline: int


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Sizes of the parallel axes of one model.

    Ranks are numbered as megatron-core numbers them (order ``tp-dp-pp``): tensor varies fastest, pipeline slowest.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - a class attribute that pydantic reads, not a field

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data

    def problems(self) -> list[str]:
        """What is wrong with the sizes by themselves, one sentence each; empty when nothing is."""
        found = [
            f"{axis} must be at least 1, got {size}"
            for axis, size in (("tensor", self.tensor), ("pipeline", self.pipeline), ("data", self.data))
            if size < 1
        ]
        if self.sequence_parallel and self.tensor == 1:
            found.append("sequence_parallel needs tensor > 1, got tensor=1")
        return found

    def coordinates(self, rank: int) -> Coordinates:
        """The place of ``rank`` on each axis.

        Raises:
            ValueError: the rank is outside ``range(world_size)``.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {rank}")
        return Coordinates(
            tensor=rank % self.tensor,
            data=rank // self.tensor % self.data,
            pipeline=rank // (self.tensor * self.data),
        )

    def rank_of(self, *, tensor: int = 0, data: int = 0, pipeline: int = 0) -> int:
        """The rank at these coordinates (the inverse of :meth:`coordinates`)."""
        return (pipeline * self.data + data) * self.tensor + tensor

    def reporting_ranks(self) -> Iterator[int]:
        """One rank per data-parallel replica that holds the model's output: last stage, first tensor rank."""
        return (self.rank_of(data=replica, pipeline=self.pipeline - 1) for replica in range(self.data))

    def __str__(self) -> str:
        """Short form for messages, such as ``TP2 PP1 DP1``."""
        return f"TP{self.tensor}{'+SP' if self.sequence_parallel else ''} PP{self.pipeline} DP{self.data}"
