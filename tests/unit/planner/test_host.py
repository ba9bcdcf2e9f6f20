"""A node's own memory: sums over its ranks by hand, and what is said where they do not fit."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.__main__ import main
from megatron_rl.config.load import parse
from megatron_rl.config.schema import RunConfig, SFTConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import read_model_dims
from megatron_rl.planner.devices import DEVICES
from megatron_rl.planner.host import host_uses
from megatron_rl.planner.lengths import Lengths
from megatron_rl.planner.search import choices, plan
from megatron_rl.planner.states import stage_elements, total_parameters
from megatron_rl.planner.times import Machine
from megatron_rl.weights.rules import Head

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "beyond_7b"
RECIPE = [str(FOLDER / "qwen2.5_14b.toml"), f"model.path={FOLDER / 'models' / 'qwen2.5_14b'}"]
H100 = Machine(device=DEVICES["h100"], per_node=8)
LENGTHS = Lengths(prompt=100, response=800)
PARAMETERS, CRITIC = 14_770_033_664, 14_770_033_664 - 152_064 * 5120 + 5121
"""Of Qwen2.5-14B; a critic has one row of 5,120 and a bias in place of the output layer."""
EACH_NODE = 2 * 32 * 2**20 + 8 * 4e9
"""Two buckets of 32 MiB, and 4 GB for each of 8 processes."""


def recipe(name="qwen2.5_14b", **axes):
    """A recipe; with ``axes``: both models so, and 8 engines of one GPU."""
    config, dims = parse(RunConfig, [FOLDER / f"{name}.toml"]), read_model_dims(FOLDER / "models" / name)
    if not axes:
        return config, dims
    policy, critic = (replace(t, layout=ParallelLayout(**axes)) for t in (config.policy, config.critic))
    return replace(config, policy=policy, critic=critic, engine=replace(config.engine, count=8, tensor=1)), dims


def told(use):
    return {cell.name: cell.value for cell in use.cells}


def test_a_save_gathers_the_states_on_one_replica_which_serialises_them():
    config, dims = recipe(data=8)
    assert total_parameters(dims, Head.TOKEN) == PARAMETERS
    policy, critic, engines = host_uses(config, dims, H100)
    assert told(policy) == {
        "host.policy.gathered": 12 * PARAMETERS,
        "host.policy.gathering": (2 * 4 + 12) * PARAMETERS,  # each of 8 replicas sends an eighth
        "host.policy.save": 14 * PARAMETERS,
        "host.buckets": 2 * 32 * 2**20,
        "host.processes": 8 * 4e9,
    }
    assert policy.peaks == (
        ("while a save is gathered", (12 + 20) * PARAMETERS + EACH_NODE),
        ("while a save is staged", (12 + 14) * PARAMETERS + EACH_NODE),
    )
    assert critic.most == (12 + 20) * CRITIC + EACH_NODE
    assert engines.most == EACH_NODE


def test_without_a_distributed_optimizer_nothing_is_gathered():
    config, dims = recipe(data=8)
    plain = replace(config, policy=replace(config.policy, distributed_optimizer=False))
    assert host_uses(plain, dims, H100)[1].most == 14 * PARAMETERS + EACH_NODE


def test_states_on_the_host_are_there_for_each_rank_besides():
    config, dims = recipe(tensor=8)
    on_host = replace(config, policy=replace(config.policy, optimizer_on_host=True))
    ranks = 8 * sum(stage_elements(dims, config.policy.layout, Head.TOKEN, 0).values())
    use = host_uses(on_host, dims, H100)[0]
    assert told(use)["host.policy.optimizer"] == (12 + 4) * ranks
    assert use.most == (12 + 4 + 12 + 20) * ranks + EACH_NODE  # each rank of a tensor group saves its own part


def test_roles_that_share_a_node_add_up():
    config, dims = recipe(data=2)
    (use,) = host_uses(replace(config, engine=replace(config.engine, count=2)), dims, H100)
    both = 12 + 20
    assert use.most == both * (PARAMETERS + CRITIC) + 2 * 32 * 2**20 + 6 * 4e9


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_shares_devices_lies_on_the_host_while_others_compute(asynchronous):
    config, dims = recipe(tensor=8)
    shared = replace(
        config,
        cluster=replace(config.cluster, colocate=True),
        checkpoint=replace(config.checkpoint, asynchronous=asynchronous),
    )
    policy, critic = (
        8 * sum(stage_elements(dims, config.policy.layout, head, 0).values()) for head in (Head.TOKEN, Head.VALUE)
    )
    (use,) = host_uses(shared, dims, H100)
    every = 2 * 32 * 2**20 + 24 * 4e9
    away = 2 * policy + (2 + 12) * policy + (2 + 12) * critic  # the reference is with the policy
    saved = 14 * (policy + critic)
    asleep = 8 * 2 * PARAMETERS
    assert dict(use.peaks) == {
        "while a save is gathered": (12 + 20) * (policy + critic) + asleep + every,
        "while a save is staged": 12 * (policy + critic) + saved + asleep + every,
        "while engines generate": away + (saved if asynchronous else 0) + every,
    }


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "qwen2.5_72b", "deepseek_v3", "qwen3_235b_a22b"])
def test_no_node_saves_more_than_is_said(name):
    config, dims = recipe(name)
    layout = config.policy.layout

    def saved(rank):
        at, experts = layout.coordinates(rank), layout.expert * layout.expert_tensor
        parts = stage_elements(dims, layout, Head.TOKEN, at.pipeline)
        block = layout.tensor * layout.context * layout.data
        writes = {False: at.data == at.context == 0, True: rank % block < experts}
        return sum(14 * count for kind, count in parts.items() if writes[kind])

    ranks = range(layout.world_size)
    most = max(sum(saved(rank) for rank in ranks[first : first + 8]) for first in range(0, len(ranks), 8))
    cell = max(told(use).get("host.policy.save", 0) for use in host_uses(config, dims, H100))
    assert most <= cell <= 1.3 * most


def test_what_does_not_fit_a_node_is_a_problem_of_the_plan_and_of_layouts():
    config, dims = recipe(data=8)
    needed = max(use.most for use in host_uses(config, dims, H100))

    def problems(host):
        return [p for p in plan(config, dims, replace(H100, host_memory=host / 0.95), LENGTHS).problems if "host" in p]

    assert problems(needed + 1) == []
    (problem,) = problems(needed - 1)
    assert problem.startswith(f"host memory: while a save is gathered a node needs {math.ceil(needed / 1e9):,} GB of ")
    small = replace(H100, host_memory=100 * 2**30)
    refused = [c for c in choices(recipe()[0], dims, small, LENGTHS, "policy", 16) if c.problem.startswith("host mem")]
    assert refused
    assert not any(
        c.problem.startswith("host mem") for c in choices(recipe()[0], dims, H100, LENGTHS, "policy", 16) if c.seconds
    )


def test_a_supervised_stage_has_one_model_and_neither_engines_nor_buckets(capsys):
    file, folder = ROOT / "examples" / "qwen2.5_math_7b" / "sft_math_8k.toml", FOLDER / "models" / "qwen2.5_math_7b"
    config, dims = parse(SFTConfig, [file]), read_model_dims(folder)
    on_one = replace(config, trainer=replace(config.trainer, layout=ParallelLayout(data=8), distributed_optimizer=True))
    count = total_parameters(dims, Head.TOKEN)
    (use,) = host_uses(on_one, dims, H100)
    assert told(use) == {
        "host.trainer.gathered": 12 * count,
        "host.trainer.gathering": (2 * 4 + 12) * count,
        "host.trainer.save": 14 * count,
        "host.processes": 8 * 4e9,
    }
    assert plan(on_one, dims, H100, Lengths(prompt=100, response=100)).host == use
    small = replace(H100, host_memory=64e9)
    refused = [
        c.problem for c in choices(config, dims, small, Lengths(prompt=100, response=100), "trainer", 8) if c.problem
    ]
    assert any(problem.startswith("host memory: ") for problem in refused)
    command = ["plan", str(file), f"model.path={folder}", "--device", "h100", "--host-gib", "64"]
    assert main(command) == 1
    assert "CANNOT RUN: host memory: while a save is gathered a node needs " in capsys.readouterr().out


def test_a_cpu_has_no_memory_beside_that_of_its_ranks():
    config, dims = recipe(data=8)
    assert host_uses(config, dims, replace(H100, device=DEVICES["cpu"])) == []


def test_the_command_says_what_a_node_holds_and_takes_another_size(capsys):
    assert main(["plan", *RECIPE]) == 0
    assert "host, fullest node                    GB  of 2,089 GB that may be used" in capsys.readouterr().out
    assert main(["plan", *RECIPE, "--host-gib", "128"]) == 1
    assert "CANNOT RUN: host memory: while a save is gathered a node needs " in capsys.readouterr().out
    assert main(["plan", *RECIPE, "--explain", "host.policy.gathered"]) == 0
    assert "x 12 B, gathered from all replicas" in capsys.readouterr().out
    assert main(["plan", *RECIPE, "--host-gib", "0"]) == 2
    assert "--host-gib must be above 0, got 0" in capsys.readouterr().err
    assert main(["plan", *RECIPE, "--host-gib", "64", "--device", "cpu"]) == 2
    assert "on cpu host and device are the same memory" in capsys.readouterr().err


def test_as_many_buckets_lie_in_shared_memory_as_a_transfer_makes():
    source = {}
    for file, name in (("planner/host.py", "_UNDER_WAY"), ("weights/transports.py", "AHEAD")):
        tree = ast.parse((ROOT / "megatron_rl" / file).read_text())
        source[name] = next(
            node.value.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == name
        )
    assert source["_UNDER_WAY"] == source["AHEAD"]
