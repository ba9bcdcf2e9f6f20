"""How one model is laid over its ranks: sizes, divisibility, and the coordinates of a rank. Pure arithmetic."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where one rank sits on each axis of its layout (0-based)."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True, kw_only=True)
class ExpertCoordinates:
    """Where one rank sits among those that share the experts of its stage (0-based)."""

    expert_tensor: int
    expert: int


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Sizes of the parallel axes of one model.

    Ranks are numbered as megatron-core numbers them (order ``tp-cp-dp-pp``): tensor varies fastest, pipeline slowest.
    The experts of a stage are laid anew over its tensor x context x data ranks: expert tensor varies fastest, then
    expert; what is left over holds copies.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - a class attribute that pydantic reads, not a field

    tensor: int = 1
    """Ranks that share each weight matrix."""
    pipeline: int = 1
    """Stages that share the layers."""
    virtual_pipeline: int = 1
    """Pieces of the model on each stage, which take turns (interleaved schedule); 1: one piece."""
    first_stage_layers: int | None = None
    """Layers of the first stage, which also has the embedding; none: as many as the other stages have."""
    last_stage_layers: int | None = None
    """Layers of the last stage, which also has the output layer; none: as many as the other stages have."""
    context: int = 1
    """Ranks that share the positions of each row."""
    data: int = 1
    """Replicas that share the rows."""
    expert: int = 1
    """Ranks that share the experts of each layer."""
    expert_tensor: int = 1
    """Ranks that share the weight matrices of each expert."""
    sequence_parallel: bool = False
    """Share the positions between tensor ranks where nothing else is shared: norms, residuals."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def row_multiple(self) -> int:
        """Each row is padded to a multiple of this: context ranks take its positions in pairs of pieces."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def batch_multiple(self) -> int:
        """Each micro-batch is padded to a multiple of this: tensor ranks share what a context rank holds."""
        return self.row_multiple * (self.tensor if self.sequence_parallel else 1)

    @property
    def _uneven(self) -> dict[str, int]:
        """The stages that have a number of layers of their own."""
        ends = {"first_stage_layers": self.first_stage_layers, "last_stage_layers": self.last_stage_layers}
        return {end: size for end, size in ends.items() if size is not None}

    @property
    def _sizes(self) -> dict[str, int]:
        return {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "virtual_pipeline": self.virtual_pipeline,
            "context": self.context,
            "data": self.data,
            "expert": self.expert,
            "expert_tensor": self.expert_tensor,
            **self._uneven,
        }

    @property
    def positive(self) -> bool:
        """Whether every size is at least 1, so that something can be divided by it."""
        return min(self._sizes.values()) >= 1

    def problems(self) -> list[str]:
        """What is wrong with the sizes by themselves, one sentence each; empty when nothing is."""
        if not self.positive:
            return [f"{axis} must be at least 1, got {size}" for axis, size in self._sizes.items() if size < 1]
        found = []
        if self.sequence_parallel and self.tensor == 1:
            found.append("sequence_parallel needs tensor > 1, got tensor=1")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            found.append(f"virtual_pipeline={self.virtual_pipeline} needs pipeline > 1, got pipeline=1")
        if self.pipeline == 1:
            found += [f"{end}={size} needs pipeline > 1, got pipeline=1" for end, size in self._uneven.items()]
        stage = self.tensor * self.context * self.data
        if stage % (self.expert * self.expert_tensor):
            found.append(
                f"expert x expert_tensor = {self.expert * self.expert_tensor} must divide tensor x context x data = "
                f"{stage}"
            )
        if self.expert > 1 and self.tensor > 1 and not self.sequence_parallel:
            found.append("expert > 1 together with tensor > 1 needs sequence_parallel=true")
        return found

    def layer_problems(self, layers: int) -> list[str]:
        """Why stages of legal sizes cannot share ``layers``, one sentence each; empty when they can."""
        if not self._uneven and layers % self.pipeline:
            legal = [n for n in range(1, layers + 1) if layers % n == 0]
            return [
                f"pipeline={self.pipeline} does not divide the model's {layers} layers; possible: {legal} "
                "(or set first_stage_layers, last_stage_layers)"
            ]
        others, left = self.pipeline - len(self._uneven), layers - sum(self._uneven.values())
        if left < others or (left % others if others else left):
            ends = " and ".join(f"{end}={size}" for end, size in self._uneven.items())
            return [
                f"{ends} leave {left} of the model's {layers} layers to the other {others} stages; "
                + (f"must be a multiple of {others}, at least {others}" if others else "must be 0")
            ]
        return [
            f"virtual_pipeline={self.virtual_pipeline} does not divide the {size} layers of a stage; "
            f"possible: {[n for n in range(1, size + 1) if size % n == 0]}"
            for size in sorted(set(self._stage_layers(layers)))
            if size % self.virtual_pipeline
        ]

    def _stage_layers(self, layers: int) -> list[int]:
        others = self.pipeline - len(self._uneven)
        each = (layers - sum(self._uneven.values())) // others if others else 0
        stages = [each] * self.pipeline
        stages[0] = self.first_stage_layers or stages[0]
        stages[-1] = self.last_stage_layers or stages[-1]
        return stages

    def stage_of_layer(self, layer: int, layers: int) -> int:
        """The pipeline stage that holds a layer: each stage in turn takes one of its equal pieces, until all are dealt.

        Args:
            layer: 0-based.
            layers: of the whole model.

        Raises:
            ValueError: there is no such layer, or the layers cannot be shared so.
        """
        if not 0 <= layer < layers:
            raise ValueError(f"the layer must be in [0, {layers}), got {layer}")
        return _stages(self, layers)[layer]

    def layers_of_stage(self, stage: int, layers: int) -> tuple[int, ...]:
        """The layers that a pipeline stage holds (the inverse of :meth:`stage_of_layer`, and errors as that).

        Args:
            stage: 0-based.
            layers: of the whole model.
        """
        return _held(self, layers)[stage]

    def coordinates(self, rank: int) -> Coordinates:
        """The place of ``rank`` on each axis.

        Raises:
            ValueError: the rank is outside ``range(world_size)``.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must be in [0, {self.world_size}), got {rank}")
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(tensor=tensor, context=context, data=data, pipeline=pipeline)

    def rank_of(self, *, tensor: int = 0, context: int = 0, data: int = 0, pipeline: int = 0) -> int:
        """The rank at these coordinates (the inverse of :meth:`coordinates`)."""
        return ((pipeline * self.data + data) * self.context + context) * self.tensor + tensor

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """The place of ``rank`` among the experts of its stage.

        Raises:
            ValueError: the rank is outside ``range(world_size)``.
        """
        self.coordinates(rank)
        rest, expert_tensor = divmod(rank, self.expert_tensor)
        return ExpertCoordinates(expert_tensor=expert_tensor, expert=rest % self.expert)

    def expert_rank_of(self, *, expert_tensor: int = 0, expert: int = 0, pipeline: int = 0) -> int:
        """The first rank of a stage that holds part ``expert_tensor`` of the expert group ``expert``."""
        return pipeline * self.tensor * self.context * self.data + expert * self.expert_tensor + expert_tensor

    def reporting_ranks(self) -> Iterator[int]:
        """One rank per data-parallel replica that holds the model's output: last stage, first of the others."""
        return (self.rank_of(data=replica, pipeline=self.pipeline - 1) for replica in range(self.data))

    def __str__(self) -> str:
        """Short form for messages, such as ``TP2 PP1 DP1``; axes that are rarely used are left out at size 1."""
        virtual = f"xVPP{self.virtual_pipeline}" if self.virtual_pipeline > 1 else ""
        ends = f"({self.first_stage_layers or ''}..{self.last_stage_layers or ''})" if self._uneven else ""
        rare = {"CP": self.context, "EP": self.expert, "ETP": self.expert_tensor}
        rest = "".join(f" {name}{size}" for name, size in rare.items() if size > 1)
        return f"TP{self.tensor}{'+SP' * self.sequence_parallel} PP{self.pipeline}{virtual}{ends} DP{self.data}{rest}"


@cache  # a plan asks once per tensor
def _stages(layout: ParallelLayout, layers: int) -> tuple[int, ...]:
    if problems := layout.layer_problems(layers):
        raise ValueError("; ".join(problems))
    bounds = list(accumulate(size // layout.virtual_pipeline for size in layout._stage_layers(layers)))
    return tuple(bisect(bounds, layer % bounds[-1]) for layer in range(layers))


@cache
def _held(layout: ParallelLayout, layers: int) -> tuple[tuple[int, ...], ...]:
    held: list[list[int]] = [[] for _ in range(layout.pipeline)]
    for layer, stage in enumerate(_stages(layout, layers)):
        held[stage].append(layer)
    return tuple(map(tuple, held))


def padded_vocabulary(vocabulary: int, tensor: int) -> int:
    """Rows of an embedding that ``tensor`` ranks share equally: the vocabulary itself, if they divide it.

    Else the next multiple of 128 x ``tensor``, so that each rank's matrix has a width that GPUs multiply fast. What is
    beyond the vocabulary is padding: zero, of no probability, and in no file.
    """
    return vocabulary if vocabulary % tensor == 0 else -(-vocabulary // (128 * tensor)) * 128 * tensor
