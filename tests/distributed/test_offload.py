"""A rank that goes to host memory and back is the same to the bit, and is away in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rl.layout import ParallelLayout
from tests.distributed.cases import Setup
from tests.distributed.offload_cases import held_and_said, refusals, trained_with_breaks
from tests.distributed.ranks import Ranks

TWO = ParallelLayout(data=2)
SETUPS = [
    Setup(keep_reference=True),
    Setup(keep_reference=True, dtype="bfloat16"),
    Setup(keep_reference=True, layout=ParallelLayout(tensor=2)),
    Setup(keep_reference=True, layout=TWO, distributed_optimizer=True),
    Setup(keep_reference=True, layout=TWO, distributed_optimizer=True, dtype="bfloat16", overlap_communication=True),
    Setup(keep_reference=True, layout=TWO, distributed_optimizer=True, on_host=True),
]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_training_with_breaks_is_training_without(ranks: Ranks, models: dict[str, Path], setup: Setup) -> None:
    world = setup.layout.world_size
    whole = ranks.run(world, trained_with_breaks, models["qwen2"], setup, False)
    broken = ranks.run(world, trained_with_breaks, models["qwen2"], setup, True)
    for one, other in zip(whole, broken, strict=True):
        assert one["updates"] == other["updates"]
        for name, weight in one["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name
        assert len(one["states"]) == len(other["states"]) > 0
        for state, same in zip(one["states"], other["states"], strict=True):
            assert torch.equal(state, same)
        if one["reference"] is not None:
            assert torch.equal(one["reference"][1], other["reference"][1])
        whole_bytes, *pauses = other["resident"]
        assert whole_bytes == one["resident"][0]
        for without_state, without_all, back in zip(pauses[0::3], pauses[1::3], pauses[2::3], strict=True):
            assert without_all == 0
            assert 0 < without_state < back / 2, "weights stay, and are less than their gradients, states and reference"
            assert back == whole_bytes


def test_a_verb_that_needs_what_is_away_is_refused(ranks: Ranks, models: dict[str, Path]) -> None:
    [said] = ranks.run(1, refusals, models["qwen2"])
    on_host = "must be on the device, they are in host memory: onload them first"
    assert said == [
        f"state {on_host}",
        f"state {on_host}",
        "it went through",
        f"state {on_host}",
        f"weights {on_host}",
        f"weights {on_host}",
        "weights must be in host memory to come back, they are on the device",
        "it went through",
    ]


@pytest.mark.parametrize("layout", [TWO, ParallelLayout(pipeline=2, virtual_pipeline=2)], ids=str)
def test_ranks_that_only_score_hold_their_weights_alone_and_say_the_same(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, layout: ParallelLayout
) -> None:
    setup = Setup(layout=layout, distributed_optimizer=layout.data > 1, overlap_communication=layout.data > 1)
    training = ranks.run(2, held_and_said, models["qwen2"], setup, tmp_path / "one")
    scoring = ranks.run(2, held_and_said, models["qwen2"], replace(setup, updates=None), tmp_path / "other")
    for one, other in zip(training, scoring, strict=True):
        weights = other["parameters"]
        assert weights == one["parameters"]
        random = 4 * torch.get_rng_state().nbytes
        assert weights <= other["all"] < 1.01 * weights + random, "rotary frequencies and states of random numbers"
        assert one["all"] > 2.9 * weights, "gradients and half the moments, at the least"
        for mine, theirs in zip(one["scores"], other["scores"], strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine[1], theirs[1])
        assert (one["activations"] is None) == (other["activations"] is None)
        for name, (_, states) in (one["activations"] or {}).items():
            assert torch.equal(states, other["activations"][name][1]), name
        assert len(other["said"]) == 5
        assert {said.split(";")[0] for said in other["said"]} == {
            "policy: these ranks only score, they have no gradients and no optimizer"
        }
    mine, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert mine == theirs
