"""Trainer and engine on the same devices: who is in device memory when.

What is not needed goes before what is needed comes, so that what two phases need never adds up. The parts of a phase
are in :data:`RESIDENT`; a change of phase is the difference of two sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Protocol

from megatron_rl.interfaces import MemoryUse, Pending, TrainerPart, results

_GIB = 2**30


class PhaseOrder(RuntimeError):
    """A phase came when it must not."""


class Phase(Enum):
    """What the devices are used for."""

    GENERATE = "generate"
    TRAIN = "train"
    PUSH = "push"
    SAVE = "save"
    COMPARE = "compare"


class Resident(Enum):
    """What takes device memory, in the order in which it comes back; cache: the engine's keys and values."""

    POLICY_WEIGHTS = "policy weights"
    POLICY_STATE = "policy state"
    CRITIC_WEIGHTS = "critic weights"
    CRITIC_STATE = "critic state"
    ENGINE_WEIGHTS = "engine weights"
    ENGINE_CACHE = "engine cache"


ENGINE = frozenset({Resident.ENGINE_WEIGHTS, Resident.ENGINE_CACHE})
TRAINERS = frozenset(Resident) - ENGINE
RESIDENT: Mapping[Phase, frozenset[Resident]] = {
    Phase.GENERATE: ENGINE,
    Phase.TRAIN: TRAINERS,
    Phase.PUSH: frozenset({Resident.POLICY_WEIGHTS, Resident.ENGINE_WEIGHTS}),
    Phase.SAVE: TRAINERS,
    Phase.COMPARE: ENGINE | {Resident.POLICY_WEIGHTS, Resident.CRITIC_WEIGHTS},
}
_TRAINER_PARTS = {
    "policy": {TrainerPart.WEIGHTS: Resident.POLICY_WEIGHTS, TrainerPart.STATE: Resident.POLICY_STATE},
    "critic": {TrainerPart.WEIGHTS: Resident.CRITIC_WEIGHTS, TrainerPart.STATE: Resident.CRITIC_STATE},
}


def moves(now: frozenset[Resident], then: frozenset[Resident]) -> tuple[frozenset[Resident], frozenset[Resident]]:
    """What must go first, and what must come after that. An engine sleeps whole: where a part of it goes, all goes, and
    what is needed of it comes back.
    """
    gone = now - then
    if gone & ENGINE:
        gone |= now & ENGINE
    return gone, then - (now - gone)


class SharesDevice(Protocol):
    """A model that is trained."""

    def offload(self, parts: Sequence[TrainerPart]) -> Pending[MemoryUse]:
        """Move parts to host memory."""

    def onload(self, parts: Sequence[TrainerPart]) -> Pending[MemoryUse]:
        """Bring parts back."""


class Sleeps(Protocol):
    """The engines."""

    def sleep(self, keep_weights: bool) -> Pending[MemoryUse]:
        """Free weights and cache."""

    def wake(self, weights: bool, cache: bool) -> Pending[MemoryUse]:
        """Get memory for them back, and the weights where they were kept."""


class OwnDevices:
    """Nobody shares: every phase is as good as any other; see :class:`~megatron_rl.interfaces.Phases`."""

    def generating(self) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    training = pushing = saving = comparing = generating


class TakingTurns:
    """Everybody shares; see :class:`~megatron_rl.interfaces.Phases`. Starts with the trainers on the devices and the
    engine asleep.

    A phase lasts until the next one begins, so two blocks of one phase cost one change. Before training the engine
    throws its weights away, since a push follows; before a save it keeps them.
    """

    def __init__(self, trainers: Mapping[str, SharesDevice], engine: Sleeps) -> None:
        """Take note of who shares; ``trainers`` by role, ``policy`` and perhaps ``critic``."""
        self._trainers = trainers
        self._engine = engine
        self._mine = frozenset(Resident)
        if "critic" not in trainers:
            self._mine -= {Resident.CRITIC_WEIGHTS, Resident.CRITIC_STATE}
        self._resident = self._mine & TRAINERS
        self._engine_has_weights = False
        self._block: Phase | None = None
        self._ledger: dict[str, float] = {}
        self._planned: dict[str, int] = {}

    def generating(self) -> AbstractContextManager[None]:
        """The engine is awake.

        Raises:
            PhaseOrder: it has no weights: it threw them away before training, and was not given any since.
        """
        return self._in(Phase.GENERATE)

    def training(self) -> AbstractContextManager[None]:
        """Policy and critic are on the device."""
        return self._in(Phase.TRAIN)

    def saving(self) -> AbstractContextManager[None]:
        """The same; the engine will generate again without a push."""
        return self._in(Phase.SAVE)

    def comparing(self) -> AbstractContextManager[None]:
        """All weights are there, and no optimizer; errors as :meth:`generating`."""
        return self._in(Phase.COMPARE)

    @contextmanager
    def pushing(self) -> Iterator[None]:
        """The weights of policy and engine are there; the block calls :meth:`verifying` when they have arrived."""
        with self._in(Phase.PUSH):
            yield
            self._engine_has_weights = True

    def verifying(self) -> None:
        """Within a push: the engine is to compute with what it got, and the trainer has no more to do.

        Raises:
            PhaseOrder: there is no push.
        """
        if self._block is not Phase.PUSH:
            raise PhaseOrder(f"weights are verified within a push, not {self._where()}")
        self._change(Phase.GENERATE)

    def take_ledger(self, step: Mapping[str, float]) -> dict[str, float]:
        """GiB after each change of phase since the last call, of the rank with the most: ``memory/<phase>/<role>/``
        ``planned``, what is kept there on purpose, and ``measured``, see :func:`megatron_rl.device.memory_used`. Of the
        role ``device``: what all roles plan together, also those that the change did not move, and what is measured
        when it is done (without a GPU the largest resident set).
        """
        taken, self._ledger = self._ledger, {}
        return taken

    @contextmanager
    def _in(self, phase: Phase) -> Iterator[None]:
        if self._block is not None:
            raise PhaseOrder(f"{phase.value} must not begin {self._where()}: end that block first")
        if phase in (Phase.GENERATE, Phase.COMPARE) and not self._engine_has_weights:
            raise PhaseOrder(
                f"{phase.value} must follow a push: the engine has thrown its weights away, or never had any"
            )
        self._change(phase)
        self._block = phase
        try:
            yield
        finally:
            self._block = None

    def _where(self) -> str:
        return "outside of any phase" if self._block is None else f"within {self._block.value}"

    def _change(self, phase: Phase) -> None:
        gone, come = moves(self._resident, RESIDENT[phase] & self._mine)
        went = self._go(gone, keep_weights=phase is not Phase.TRAIN)
        came = self._come(come)
        used = went | came
        if not used:
            return
        self._planned |= {role: use.planned_bytes for role, use in used.items()}
        # roles move side by side: whoever comes last finds the most in use, whoever goes last the least
        last = (max if came else min)(use.measured_bytes for use in (came or went).values())
        used["device"] = MemoryUse(planned_bytes=sum(self._planned.values()), measured_bytes=last)
        for role, use in used.items():
            self._ledger[f"memory/{phase.value}/{role}/planned"] = use.planned_bytes / _GIB
            self._ledger[f"memory/{phase.value}/{role}/measured"] = use.measured_bytes / _GIB

    def _go(self, gone: frozenset[Resident], *, keep_weights: bool) -> dict[str, MemoryUse]:
        going: dict[str, Pending[MemoryUse]] = {
            role: self._trainers[role].offload(parts) for role, parts in _by_trainer(gone).items()
        }
        if gone & ENGINE:
            self._engine_has_weights = self._engine_has_weights and keep_weights
            going["engine"] = self._engine.sleep(keep_weights)
        used = results(going)
        self._resident -= gone
        return used

    def _come(self, come: frozenset[Resident]) -> dict[str, MemoryUse]:
        coming: dict[str, Pending[MemoryUse]] = {
            role: self._trainers[role].onload(parts) for role, parts in _by_trainer(come).items()
        }
        if come & ENGINE:
            coming["engine"] = self._engine.wake(Resident.ENGINE_WEIGHTS in come, Resident.ENGINE_CACHE in come)
        used = results(coming)
        self._resident |= come
        return used


def _by_trainer(parts: frozenset[Resident]) -> dict[str, list[TrainerPart]]:
    asked = {
        role: [part for part, resident in of_role.items() if resident in parts]
        for role, of_role in _TRAINER_PARTS.items()
    }
    return {role: found for role, found in asked.items() if found}
