"""Bytes of a node's own memory, beside its devices: what is kept there, and what a save takes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_rl.config.schema import RunConfig, SFTConfig, TrainerConfig
from megatron_rl.model_dims import ModelDims
from megatron_rl.planner.memory import Cell, unlike_stages, worker_weight_bytes
from megatron_rl.planner.states import DTYPE_BYTES, optimized_elements, stage_elements
from megatron_rl.planner.times import Machine
from megatron_rl.weights.rules import Head

_UNDER_WAY = 2
"""``weights.transports.AHEAD``, which cannot be imported without torch; a test compares them."""
_FLOAT32_STATES = 12
"""Main weight and both moments of an element."""
_HOST_GRADIENT = 4
"""From which Adam computes on the host."""


@dataclass(frozen=True, kw_only=True)
class HostUse:
    """What one node's memory holds.

    Attributes:
        cells: ``host.ROLE.WHAT`` and what the node has once.
        peaks: bytes at the moments that take most, by name.
    """

    cells: tuple[Cell, ...]
    peaks: tuple[tuple[str, float], ...]

    @property
    def most(self) -> float:
        """Bytes at the worst moment."""
        return max(held for _, held in self.peaks)

    def of(self, role: str) -> float:
        """Bytes of a role, those of all moments together."""
        return sum(cell.value for cell in self.cells if cell.name.startswith(f"host.{role}."))


def host_uses(config: RunConfig | SFTConfig, dims: ModelDims, machine: Machine) -> list[HostUse]:
    """What nodes hold, the fullest first; of nodes with as many ranks of each role one. Empty on a CPU, where host and
    device are the same memory.

    Devices are numbered as :func:`ray_runtime.cluster.place` numbers bundles: role after role, or with
    ``cluster.colocate`` rank i of all roles on device i. All ranks of a role on a node count as those of its fullest
    stage, so no node holds more. Not counted: files in the page cache, and what a reward rule of the user's takes.
    """
    if not machine.device.is_gpu:
        return []
    ranks = {role: trainer.layout.world_size for role, trainer in config.trainers.items()}
    if isinstance(config, RunConfig):
        ranks["engine"] = config.engine.count * config.engine.tensor
    uses = [_host_use(config, dims, machine, counts) for counts in _nodes(ranks, machine.per_node, config)]
    return sorted(uses, key=lambda use: -use.most)


def _nodes(ranks: dict[str, int], per_node: int, config: RunConfig | SFTConfig) -> list[dict[str, int]]:
    """Ranks of each role on a node, of unlike nodes."""
    spans, start = {}, 0
    for role, count in ranks.items():
        spans[role] = (start, start + count)
        start += 0 if config.cluster.colocate else count
    found = {}
    for first in range(0, config.devices, per_node):
        counts = {
            role: max(0, min(stop, first + per_node) - max(begin, first)) for role, (begin, stop) in spans.items()
        }
        found[tuple(counts.values())] = counts
    return list(found.values())


def _host_use(config: RunConfig | SFTConfig, dims: ModelDims, machine: Machine, counts: dict[str, int]) -> HostUse:
    shared, processes = config.cluster.colocate, sum(counts.values())
    cells = [cell for role in config.trainers if counts[role] for cell in _role(config, dims, role, counts[role])]
    if isinstance(config, RunConfig):
        if shared and counts["engine"]:
            each = worker_weight_bytes(dims, config.engine, config.model.dtype)
            cells.append(_cell("host.engine.asleep", counts["engine"], each, "weights of an engine that sleeps"))
        bucket = config.sync.bucket_mib * 2**20
        cells.append(_cell("host.buckets", _UNDER_WAY, bucket, f"sync.bucket_mib={config.sync.bucket_mib}"))
    each = machine.device.host_process
    cells.append(_cell("host.processes", processes, each, "libraries of a process (assumed)"))

    def held(*left_out: str) -> float:
        return sum(cell.value for cell in cells if not cell.name.endswith(left_out))

    peaks = [
        ("while a save is gathered", held(".away", ".save")),
        ("while a save is staged", held(".away", ".gathering")),
    ]
    if shared:
        written = () if config.checkpoint.asynchronous else (".save",)
        peaks.append(("while engines generate", held(".gathering", ".gathered", ".asleep", *written)))
    return HostUse(cells=tuple(cells), peaks=tuple(peaks))


def _role(config: RunConfig | SFTConfig, dims: ModelDims, role: str, ranks: int) -> Iterator[Cell]:
    """Of ``ranks`` ranks of a model on one node.

    A save (``mcore.checkpoint``) has megatron-core's distributed optimizer gather main weights and moments of all
    replicas on the first one, each as a list that it puts together; that one then serialises them and the weights. What
    it wrote into memory stays until it is on the disk, with ``checkpoint.asynchronous`` beside what comes next.
    """
    trainer, size = config.trainers[role], DTYPE_BYTES[config.model.dtype]
    head = Head.VALUE if role == "critic" else Head.TOKEN
    stages = unlike_stages(dims, trainer.layout)
    of_stages = [stage_elements(dims, trainer.layout, head, stage) for stage in stages]
    elements = max(sum(parts.values()) for parts in of_stages)
    states = max(optimized_elements(dims, trainer, head, stage) for stage in stages)
    kept = _FLOAT32_STATES if size == 2 or trainer.optimizer_on_host else _FLOAT32_STATES - 4
    if trainer.optimizer_on_host:
        held = kept + _HOST_GRADIENT
        yield _cell(f"host.{role}.optimizer", ranks, held * states, f"{states:,.0f} elements x {held} B")
    saved = []
    for shared_out, what in ((False, "elements"), (True, "elements of experts")):
        most, writers = max(parts[shared_out] for parts in of_stages), _writers(trainer, ranks, shared_out=shared_out)
        if most:
            saved.append((writers * most, f"{writers} ranks x {most:,} {what}"))
    first, told = sum(count for count, _ in saved), " + ".join(told for _, told in saved)
    if trainer.distributed_optimizer:
        yield Cell(
            name=f"host.{role}.gathered",
            value=_FLOAT32_STATES * first,
            unit="B",
            formula=f"({told}) x {_FLOAT32_STATES} B, gathered from all replicas",
        )
        yield Cell(
            name=f"host.{role}.gathering",
            value=2 * 4 * first + ranks * _FLOAT32_STATES * states,
            unit="B",
            formula=f"({told}) x 2 x 4 B of one state, {ranks} x {states:,.0f} elements x {_FLOAT32_STATES} B to send",
        )
    each = size + _FLOAT32_STATES - (0 if size == 2 else 4)
    yield Cell(name=f"host.{role}.save", value=each * first, unit="B", formula=f"({told}) x {each} B")
    if isinstance(config, RunConfig) and config.cluster.colocate:
        copies = 2 if role == "policy" and config.ppo.kl_coef > 0 else 1
        away = copies * size * elements + (0 if trainer.optimizer_on_host else kept * states)
        told = f"{copies} x {elements:,} weights x {size} B, and its optimizer's states where they are not on the host"
        yield _cell(f"host.{role}.away", ranks, away, told)


def _writers(trainer: TrainerConfig, ranks: int, *, shared_out: bool) -> int:
    """At most so many of ``ranks`` neighbours are the replica that saves: in each stage the first ones."""
    layout = trainer.layout
    stage = layout.world_size // layout.pipeline
    first = layout.expert * layout.expert_tensor if shared_out else layout.tensor
    return min(ranks, first * -(-ranks // stage))


def _cell(name: str, count: int, each: float, told: str) -> Cell:
    return Cell(name=name, value=count * each, unit="B", formula=f"{count} x {each:,.0f} B: {told}")


def host_problem(uses: Sequence[HostUse], machine: Machine, role: str | None = None) -> str:
    """Why some node's memory is too small; empty where it is not. ``role``: say only what would fit without it."""
    for use in uses:
        others = 0.0 if role is None else use.most - use.of(role)
        if others <= machine.host_room < use.most:
            moment = max(use.peaks, key=lambda peak: peak[1])[0]
            return (
                f"host memory: {moment} a node needs {math.ceil(use.most / 1e9):,} GB of "
                f"{math.floor(machine.host_room / 1e9):,} GB: "
                "more nodes, more tensor or pipeline ranks, or another --host-gib"
            )
    return ""
