"""Converted checkpoints are what megatron-core itself reads and writes, at any layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_rl.convert import to_megatron
from megatron_rl.convert.console import size_bytes
from megatron_rl.convert.sources import HfSource
from megatron_rl.convert.target import Target
from megatron_rl.convert.to_hf import plan_export, run_export
from megatron_rl.convert.to_megatron import plan_import, run_import
from megatron_rl.layout import ParallelLayout
from megatron_rl.mcore.sharded_names import extra_states, sharded_name, stacks_layers
from tests.distributed.cases import CRITIC, POLICY, Setup
from tests.distributed.convert_cases import kept_names, loaded, saved_and_exported
from tests.distributed.ranks import Ranks
from tests.distributed.test_update import tensors
from tests.unit.convert.folders import engine_name, llama_135m

TP2 = ParallelLayout(tensor=2)
PP2 = ParallelLayout(pipeline=2)
TP2PP2 = ParallelLayout(tensor=2, pipeline=2)
MOE_TP2PP2 = ParallelLayout(tensor=2, pipeline=2, expert_tensor=2, sequence_parallel=True)
MOE_EP2 = ParallelLayout(data=2, expert=2)
VPP2 = ParallelLayout(pipeline=2, virtual_pipeline=2)


def ignore(_: int) -> None: ...


@pytest.fixture(scope="session")
def critic(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Path:
    """A critic of the tied Qwen2, as transformers saves it, with a head that is not zero."""
    from transformers import AutoModelForTokenClassification

    folder = tmp_path_factory.mktemp("critic")
    torch.manual_seed(1)
    AutoModelForTokenClassification.from_pretrained(models["qwen2-tied"], num_labels=1).save_pretrained(folder)
    return folder


def imported(source: Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    plan = plan_import(source, dtype=dtype, processes=2)
    run_import(plan, Target(target), resume=False, processes=2, progress=ignore)
    return target


def exported(source: Path, target: Path, like: Path | None = None, size: str = "20KB") -> Path:
    plan = plan_export(source, like=like, shard_bytes=size_bytes(size))
    run_export(plan, Target(target), resume=False, processes=2, progress=ignore)
    return target


def equal(found: Path, expected: Path) -> None:
    mine, theirs = tensors(found), tensors(expected)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen2",
        "qwen2-tied",
        "qwen3",
        "qwen2-moe",
        "qwen3-moe",
        "deepseek",
        "deepseek-v2",  # with a rank of queries
        "deepseek-v2-grouped",  # without
        CRITIC,
    ],
)
def test_the_names_are_those_of_megatron_core(ranks: Ranks, models: dict[str, Path], critic: Path, name: str) -> None:
    folder = critic if name == CRITIC else models[name]
    ((kept, objects),) = ranks.run(1, kept_names, folder, CRITIC if name == CRITIC else POLICY)
    source = HfSource(folder)
    assert named(source) == kept
    assert set(extra_states(source.weights)) == objects


def test_the_names_of_stacked_layers_with_experts_are_those_of_megatron_core(
    ranks: Ranks, models: dict[str, Path]
) -> None:
    ((kept, _),) = ranks.run(1, kept_names, models["qwen3-moe"], POLICY, 1)
    keys = {key for key, _, _ in kept}
    assert "decoder.layers.mlp.router.weight" in keys
    assert stacks_layers(keys)
    assert named(HfSource(models["qwen3-moe"]), stacked=True) == kept


def named(source: HfSource, *, stacked: bool | None = None) -> set[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Key, index in it and shape of it of each tensor, by our rules."""
    mine = set()
    for entry in source.weights.entries:
        place = sharded_name(entry, source.dims, stacked=stacked)
        mine.add((place.key, place.index, place.axes + source.info(entry).shape))
    return mine


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama-odd", TP2PP2),
        ("qwen2-tied", TP2PP2),
        (CRITIC, TP2PP2),
        ("qwen3-moe", MOE_TP2PP2),
        pytest.param("qwen2-moe", MOE_EP2, marks=pytest.mark.slow),
        pytest.param("deepseek", MOE_TP2PP2, marks=pytest.mark.slow),
        pytest.param("deepseek-v2", MOE_EP2, marks=pytest.mark.slow),
        pytest.param("deepseek-v2-grouped", MOE_TP2PP2, marks=pytest.mark.slow),
        pytest.param("qwen3", VPP2, marks=pytest.mark.slow),
        pytest.param("qwen2", TP2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_megatron_core_loads_an_imported_model_and_an_export_gives_it_back(
    ranks: Ranks, models: dict[str, Path], critic: Path, tmp_path: Path, name: str, layout: ParallelLayout
) -> None:
    folder, role = (critic, CRITIC) if name == CRITIC else (models[name], POLICY)
    checkpoint = imported(folder, tmp_path / "megatron")
    ranks.run(layout.world_size, loaded, checkpoint, Setup(layout=layout), role, tmp_path / "loaded", timeout_s=90)
    equal(tmp_path / "loaded", folder)
    equal(exported(checkpoint, tmp_path / "exported"), folder)


@pytest.mark.parametrize(
    ("name", "layout"),
    [("qwen3-moe", MOE_EP2), pytest.param("deepseek", MOE_TP2PP2, marks=pytest.mark.slow)],
    ids=str,
)
def test_ranks_load_a_checkpoint_of_transformer_engines_layers(
    ranks: Ranks,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    layout: ParallelLayout,
) -> None:
    """With its names of norms, which differ from ours in layers with experts or latent attention."""
    monkeypatch.setattr(to_megatron, "sharded_name", engine_name)
    checkpoint = imported(models[name], tmp_path / "megatron")
    ranks.run(layout.world_size, loaded, checkpoint, Setup(layout=layout), POLICY, tmp_path / "loaded", timeout_s=90)
    equal(tmp_path / "loaded", models[name])


@pytest.mark.parametrize(
    ("role", "name", "layout", "dtype"),
    [
        (POLICY, "qwen2-tied", TP2PP2, "bfloat16"),
        (CRITIC, "qwen2", PP2, "float32"),
        (POLICY, "qwen2-moe", MOE_EP2, "float32"),
    ],
    ids=str,
)
def test_a_training_checkpoint_is_exported(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, role: str, name: str, layout: ParallelLayout, dtype: str
) -> None:
    step = tmp_path / "step_000001"
    setup = Setup(layout=layout, dtype=dtype)
    # as a run lays it out: the policy as a Hugging Face folder, in hf
    ranks.run(layout.world_size, saved_and_exported, models[name], setup, role, step / role, step / "hf")
    equal(exported(step / role, tmp_path / "exported"), step / "hf")
    architecture = json.loads((tmp_path / "exported" / "config.json").read_text())["architectures"][0]
    assert architecture.endswith("ForTokenClassification" if role == CRITIC else "ForCausalLM")


def test_a_model_of_135m_parameters_goes_through_two_pipeline_stages_unchanged(ranks: Ranks, tmp_path: Path) -> None:
    llama_135m(tmp_path / "hf")
    imported(tmp_path / "hf", tmp_path / "megatron")
    setup = Setup(layout=PP2, dtype="bfloat16")
    ranks.run(2, loaded, tmp_path / "megatron", setup, POLICY, tmp_path / "loaded", timeout_s=200)
    equal(tmp_path / "loaded", tmp_path / "hf")
    equal(exported(tmp_path / "megatron", tmp_path / "exported", size="100MB"), tmp_path / "hf")
