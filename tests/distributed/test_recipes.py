"""Every recipe of the examples can be planned, and one rank of each of its models is built as planned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.arithmetic_cpu.task import Sizes, write_model
from megatron_rl.config.load import parse_any
from megatron_rl.model_dims import ModelDims, read_model_dims
from megatron_rl.planner.devices import DEVICES
from megatron_rl.planner.lengths import Lengths
from megatron_rl.planner.report import report
from megatron_rl.planner.search import head_of, plan
from megatron_rl.planner.states import state_bytes
from megatron_rl.planner.times import Machine
from tests.distributed.ranks import Ranks
from tests.distributed.test_dry_run import dry_runs
from tests.recipes import EXAMPLES, recipes, schema_of

RECIPES = recipes()
MATH_7B = EXAMPLES / "beyond_7b/models/qwen2.5_math_7b"


@pytest.fixture(scope="module")
def process() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of arithmetic_cpu, which its task writes."""
    folder = tmp_path_factory.mktemp("arithmetic") / "model"
    write_model(folder, Sizes(), seed=0)
    return folder


def dims_of(name: str, path: Path, arithmetic: Path) -> ModelDims:
    """The sizes of a recipe's model, which need not be here."""
    if name.startswith("beyond_7b"):
        return read_model_dims(EXAMPLES.parent / path)
    return read_model_dims(arithmetic if name.startswith("arithmetic_cpu") else MATH_7B)


def test_the_kinds_of_recipes_are_all_there() -> None:
    kinds = {schema_of(files).__name__ for files in RECIPES.values()}
    assert kinds == {"RunConfig", "SFTConfig"}
    assert len(RECIPES) >= 20


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_planned_and_a_rank_of_each_of_its_models_built_as_planned(
    name: str, process: Ranks, arithmetic: Path
) -> None:
    config = parse_any(RECIPES[name])
    dims = dims_of(name, config.model.path, arithmetic)
    assert config.cluster.device is not None
    machine = Machine(device=DEVICES[config.cluster.device], per_node=config.cluster.gpus_per_node)
    found = plan(config, dims, machine, Lengths(prompt=30, response=30))
    assert (found.problems, found.devices) == ((), config.devices)
    asked = [
        (dims, trainer, head_of(role), trainer.layout.world_size - 1, config.model.dtype)
        for role, trainer in config.trainers.items()
    ]
    for role, case, built in zip(config.trainers, asked, dry_runs(process, asked), strict=True):
        said = state_bytes(*case)
        assert vars(said) == {part: getattr(built, part) for part in vars(said)}, role


@pytest.mark.parametrize("name", ["qwen2.5_math_7b/sft_math_8k.toml", "qwen2.5_math_7b/sft_h100.toml"])
def test_the_plan_of_a_supervised_stage_has_one_model_and_no_engine(name: str) -> None:
    config = parse_any(RECIPES[name])
    device = config.cluster.device
    dims = read_model_dims(MATH_7B)
    lengths = Lengths(prompt=100, response=400)

    def told(explain: str | None = None, nodes: int | None = None) -> str:
        asked = {"device": device, "per_node": 8, "nodes": nodes, "lengths": lengths, "explain": explain}
        return report(config, dims, **asked).text

    text = told()
    assert f"8 x {device} (1 nodes of 8)" in text
    assert "CANNOT RUN" not in text
    assert "legal samples_per_step: 4 or more" in text
    assert [role for role in ("policy", "critic", "engine") if role in text] == []
    assert "trainer on 8 devices (recipe: TP2+SP PP1 DP4)" in text
    assert "8 devices are left over: give them to a role's layout.data" in told(nodes=2)
    # an update is all that a step does: 64 rows of 500 tokens
    assert "of 32,000 tokens" in told("time.trainer.updates")
    machine = Machine(device=DEVICES[device], per_node=8)
    times = {cell.name: cell.value for cell in plan(config, dims, machine, lengths).times}
    assert times == {"time.trainer.updates": times["time.step"], "time.step": times["time.step"]}
