"""Who is on shared devices when: order, refusals, and that peaks never add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest

from megatron_rl.interfaces import MemoryUse, TrainerPart
from megatron_rl.phases import ENGINE, RESIDENT, TRAINERS, Phase, PhaseOrder, Resident, TakingTurns, moves
from tests.fakes import Ready

SIZES = {
    "policy weights": 2,
    "policy state": 12,
    "critic weights": 3,
    "critic state": 18,
    "engine weights": 2,
    "engine cache": 20,
}


class Machine:
    """One device of which everybody takes a share; remembers what was done and the most that was in use."""

    def __init__(self) -> None:
        self.there = {name for name in SIZES if "engine" not in name}
        self.peak = self.used
        self.done: list[str] = []

    @property
    def used(self) -> int:
        return sum(SIZES[name] for name in self.there)

    def go(self, what: str, names: set[str]) -> Ready:
        assert names <= self.there, f"{names - self.there} is not there"
        self.there -= names
        return self._did(what)

    def come(self, what: str, names: set[str]) -> Ready:
        assert not names & self.there, f"{names & self.there} is there already"
        self.there |= names
        self.peak = max(self.peak, self.used)
        return self._did(what)

    def _did(self, what: str) -> Ready:
        self.done.append(what)
        role = "engine" if what.startswith("wake") else what.split(" ", 1)[0]
        kept = sum(SIZES[name] for name in self.there if name.startswith(role))
        return Ready(MemoryUse(planned_bytes=kept << 30, measured_bytes=(self.used + 1) << 30))


@dataclass
class Trainer:
    role: str
    machine: Machine

    def offload(self, parts: Sequence[TrainerPart]) -> Any:
        return self.machine.go(f"{self.role} out", {f"{self.role} {part.value}" for part in parts})

    def onload(self, parts: Sequence[TrainerPart]) -> Any:
        return self.machine.come(f"{self.role} back", {f"{self.role} {part.value}" for part in parts})


@dataclass
class Engine:
    machine: Machine

    def sleep(self, keep_weights: bool) -> Any:
        awake = {name for name in self.machine.there if "engine" in name}
        return self.machine.go(f"engine sleeps {'with' if keep_weights else 'without'} weights", awake)

    def wake(self, weights: bool, cache: bool) -> Any:
        names = {name for name, asked in (("engine weights", weights), ("engine cache", cache)) if asked}
        return self.machine.come(f"wake {' and '.join(sorted(names))}", names)


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def turns(machine: Machine) -> TakingTurns:
    return TakingTurns({"policy": Trainer("policy", machine), "critic": Trainer("critic", machine)}, Engine(machine))


def a_push(turns: TakingTurns) -> None:
    with turns.pushing():
        turns.verifying()


def test_a_step_changes_what_it_must_and_in_this_order(machine: Machine, turns: TakingTurns) -> None:
    a_push(turns)
    machine.done.clear()
    with turns.generating():
        assert machine.there == {"engine weights", "engine cache"}
    assert machine.done == [], "the push has left it like this"
    for _ in range(2):
        with turns.training():
            assert machine.used == 35
    assert machine.done == ["engine sleeps without weights", "policy back", "critic back"]
    machine.done.clear()
    with turns.pushing():
        assert machine.there == {"policy weights", "engine weights"}
        assert machine.done == ["policy out", "critic out", "wake engine weights"]
        turns.verifying()
        assert machine.there == {"engine weights", "engine cache"}
        assert machine.done[3:] == ["policy out", "wake engine cache"]


def test_the_peak_is_that_of_the_largest_phase(machine: Machine, turns: TakingTurns) -> None:
    a_push(turns)
    for _ in range(2):
        with turns.generating():
            pass
        with turns.training():
            pass
        a_push(turns)
        with turns.comparing():
            assert machine.used == 2 + 3 + 2 + 20
        with turns.saving():
            pass
    assert machine.peak == 35 == SIZES["policy state"] + SIZES["critic state"] + 2 + 3


@pytest.mark.parametrize(("now", "then"), [*product(RESIDENT.values(), repeat=2)])
def test_between_two_phases_nothing_is_there_that_neither_needs(
    now: frozenset[Resident], then: frozenset[Resident]
) -> None:
    gone, come = moves(now, then)
    assert gone <= now
    assert not come & (now - gone)
    assert (now - gone) | come == then
    assert now - gone <= then, "what is not needed goes before anything comes"
    assert not gone & ENGINE or gone >= now & ENGINE, "an engine sleeps whole"


def test_after_training_nothing_is_generated_without_a_push(turns: TakingTurns) -> None:
    for begin in (turns.generating, turns.comparing):
        with pytest.raises(PhaseOrder, match="must follow a push"), begin():
            pass
    a_push(turns)
    with turns.training():
        pass
    with turns.saving():
        pass
    with pytest.raises(PhaseOrder, match="generate must follow a push: the engine has thrown"), turns.generating():
        pass


def test_after_a_save_the_engine_has_its_weights(machine: Machine, turns: TakingTurns) -> None:
    a_push(turns)
    with turns.saving():
        assert machine.done[-3:] == ["engine sleeps with weights", "policy back", "critic back"]
    with turns.generating():
        assert machine.there == {"engine weights", "engine cache"}


def test_a_push_that_failed_leaves_an_engine_without_weights(turns: TakingTurns) -> None:
    def fails() -> None:
        with turns.pushing():
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        fails()
    with pytest.raises(PhaseOrder), turns.generating():
        pass


def test_phases_do_not_nest_and_are_verified_in_a_push(turns: TakingTurns) -> None:
    with pytest.raises(PhaseOrder, match="train must not begin within push"), turns.pushing(), turns.training():
        pass
    with pytest.raises(PhaseOrder, match="not outside of any phase"):
        turns.verifying()


def test_the_ledger_says_what_each_role_keeps_in_each_phase(turns: TakingTurns) -> None:
    a_push(turns)
    with turns.training():
        pass
    ledger = turns.take_ledger({})
    assert ledger["memory/push/engine/planned"] == 2
    assert ledger["memory/train/critic/planned"] == 21
    assert ledger["memory/train/critic/measured"] == 36
    assert {name.split("/")[1] for name in ledger} == {"push", "generate", "train"}
    assert turns.take_ledger({}) == {}


def test_the_ledger_adds_up_what_is_planned_and_measures_the_device_once(turns: TakingTurns) -> None:
    a_push(turns)
    with turns.training():
        pass
    a_push(turns)
    device = {name: value for name, value in turns.take_ledger({}).items() if "/device/" in name}
    assert device == {
        "memory/push/device/planned": 4,  # weights of policy and engine
        "memory/push/device/measured": 5,  # one more than what is there, by this machine
        "memory/generate/device/planned": 22,  # the critic, which did not move, has been away since
        "memory/generate/device/measured": 23,
        "memory/train/device/planned": 35,
        "memory/train/device/measured": 36,
    }
    with turns.comparing():
        pass
    with turns.generating():  # policy and critic go side by side: the last one finds 22 left
        pass
    ledger = turns.take_ledger({})
    assert (ledger["memory/compare/device/planned"], ledger["memory/compare/device/measured"]) == (27, 28)
    assert (ledger["memory/generate/policy/measured"], ledger["memory/generate/device/measured"]) == (26, 23)


def test_a_run_without_a_critic_moves_none(machine: Machine) -> None:
    machine.there -= {"critic weights", "critic state"}
    turns = TakingTurns({"policy": Trainer("policy", machine)}, Engine(machine))
    a_push(turns)
    with turns.training():
        assert machine.there == {"policy weights", "policy state"}
    assert RESIDENT[Phase.TRAIN] == TRAINERS
