from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint

from megatron_rl.layout import ParallelLayout
from tests.distributed.cases import (
    CRITIC,
    POLICY,
    Setup,
    kept_on_host,
    loss_metrics,
    resaved,
    resumed,
    saved,
    spoilt,
    three_updates,
    unwritable,
)
from tests.distributed.ranks import RankFailed, Ranks
from tests.distributed.test_update import tensors


def setup(
    *, sharded: bool = False, on_host: bool = False, dtype: str = "float32", buckets: int | None = None, **axes: Any
) -> Setup:
    """With ``buckets`` communication is overlapped, bucket by bucket of so many numbers and their padding. A critic's
    head begins with noise: of zeros it would give the layers no gradients, and moments of zero.
    """
    return Setup(
        layout=ParallelLayout(**axes),
        distributed_optimizer=sharded,
        overlap_communication=buckets is not None,
        bucket_size=buckets,
        on_host=on_host,
        dtype=dtype,
        value_head_std=0.5,
    )


@pytest.mark.parametrize(
    ("role", "name", "before", "after"),
    [
        (POLICY, "qwen2", setup(tensor=2), setup(pipeline=2)),
        (POLICY, "qwen2-tied", setup(tensor=2, data=2, sharded=True), setup(pipeline=2, sharded=True)),
        (CRITIC, "qwen2-tied", setup(pipeline=2, sharded=True), setup(tensor=2, sequence_parallel=True, sharded=True)),
        (POLICY, "qwen3", setup(), setup()),
        (POLICY, "qwen2", setup(pipeline=2, virtual_pipeline=2, sharded=True), setup(context=2, sharded=True)),
        (POLICY, "qwen2-moe", setup(data=2, expert=2), setup(tensor=2, expert=2, sequence_parallel=True)),
        (
            POLICY,
            "deepseek",
            setup(tensor=2, expert_tensor=2, sequence_parallel=True, sharded=True),
            setup(sharded=True),
        ),
        # the vocabulary has padding at the one and not at the other
        (POLICY, "qwen2-odd", setup(tensor=2), setup(pipeline=2)),
        (POLICY, "llama-odd", setup(pipeline=2), setup(tensor=2)),
        (POLICY, "qwen2-odd", setup(tensor=2, data=2, sharded=True), setup(pipeline=2, sharded=True)),
        (POLICY, "llama-odd", setup(pipeline=2, sharded=True), setup(tensor=2, data=2, sharded=True)),
        # experts that were shared out and are not any more, and the other way: another number of optimizers
        (POLICY, "qwen2-moe", setup(data=2, expert=2, sharded=True), setup(pipeline=2, sharded=True)),
        (POLICY, "qwen2-moe", setup(pipeline=2), setup(data=2, expert=2)),
        # another optimizer
        (CRITIC, "qwen2-tied", setup(data=2), setup(data=2, sharded=True)),
        (POLICY, "qwen2", setup(pipeline=2, sharded=True), setup(data=2)),
        (POLICY, "qwen2", setup(tensor=2, sharded=True, on_host=True), setup(data=2, sharded=True, on_host=True)),
        (CRITIC, "qwen2-tied", setup(tensor=2), setup(data=2, sharded=True, on_host=True)),
        (POLICY, "qwen2-moe", setup(data=2, expert=2, sharded=True, on_host=True), setup(pipeline=2)),
        # buffers of several buckets that end in padding: the embedding that two stages share has one of its own
        (POLICY, "qwen2-odd", setup(pipeline=2, sharded=True), setup(tensor=2, data=2, sharded=True)),
        (POLICY, "qwen2", setup(data=3, sharded=True, buckets=2000), setup(data=2, sharded=True, buckets=3000)),
        (CRITIC, "qwen2-tied", setup(pipeline=2, sharded=True, buckets=1000), setup(tensor=2)),
        (POLICY, "qwen2-moe", setup(data=2, expert=2, sharded=True, buckets=1000), setup(pipeline=2)),
    ],
    ids=str,
)
def test_a_run_goes_on_from_a_checkpoint_at_another_layout(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, role: str, name: str, before: Setup, after: Setup
) -> None:
    folder = tmp_path / "state"
    was, now = before.layout, after.layout
    unbroken = ranks.run(was.world_size, saved, models[name], before, role, folder, tmp_path / "unbroken")
    broken = ranks.run(now.world_size, resumed, models[name], after, role, folder, tmp_path / "resumed")
    expected = unbroken[was.rank_of(pipeline=was.pipeline - 1)]
    found = broken[now.rank_of(pipeline=now.pipeline - 1)]
    for mine, reference in zip(found, expected, strict=True):
        assert mine.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
        assert mine.learning_rate == reference.learning_rate
        assert loss_metrics(mine) == pytest.approx(loss_metrics(reference), rel=1e-5)
    weights, goes_on = tensors(tmp_path / "unbroken"), tensors(tmp_path / "resumed")
    assert goes_on.keys() == weights.keys()
    for key, tensor in goes_on.items():
        torch.testing.assert_close(tensor, weights[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("role", [POLICY, CRITIC])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (setup(dtype="bfloat16"), setup(dtype="bfloat16")),
        (setup(dtype="bfloat16"), setup(dtype="bfloat16", sharded=True)),
        (setup(dtype="bfloat16", sharded=True), setup(dtype="bfloat16", sharded=True, on_host=True)),
        (setup(dtype="bfloat16", sharded=True, on_host=True), setup(dtype="bfloat16")),
        (setup(sharded=True), setup(sharded=True, on_host=True)),
        (setup(sharded=True, on_host=True), setup(sharded=True, on_host=True)),
        # a critic's first bucket ends in padding
        (setup(dtype="bfloat16", sharded=True, buckets=1000), setup(dtype="bfloat16")),
        (setup(dtype="bfloat16", sharded=True, on_host=True, buckets=1000), setup(dtype="bfloat16", sharded=True)),
        (setup(sharded=True, buckets=1000), setup(sharded=True, buckets=1000)),
    ],
    ids=str,
)
def test_a_run_goes_on_to_the_same_bits_with_whichever_optimizer(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, role: str, before: Setup, after: Setup
) -> None:
    """Main weights of a bfloat16 model included: its weights alone would not do."""
    folder = tmp_path / "state"
    # the norm is added up in another order where states are sharded, and clipping would put that into the weights
    before, after = replace(before, clip_grad=1e9), replace(after, clip_grad=1e9)
    (unbroken,) = ranks.run(1, saved, models["qwen2-tied"], before, role, folder, tmp_path / "unbroken")
    (broken,) = ranks.run(1, resumed, models["qwen2-tied"], after, role, folder, tmp_path / "resumed")
    for mine, reference in zip(broken, unbroken, strict=True):
        assert mine.metrics == reference.metrics
        assert mine.grad_norm == pytest.approx(reference.grad_norm, rel=1e-6)
    weights, goes_on = tensors(tmp_path / "unbroken"), tensors(tmp_path / "resumed")
    assert goes_on.keys() == weights.keys()
    for key, tensor in goes_on.items():
        torch.testing.assert_close(tensor, weights[key], atol=0, rtol=0)


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "dist-opt"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_main_weights_of_rows_that_are_padding_at_one_layout_alone_are_those_of_the_weights(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, sharded: bool, before: int, after: int
) -> None:
    its = setup(dtype="bfloat16", tensor=before)
    mine = setup(dtype="bfloat16", tensor=after, sharded=sharded)
    ranks.run(before, saved, models["llama-odd"], its, POLICY, tmp_path / "its", tmp_path / "export")
    found = ranks.run(after, resaved, models["llama-odd"], mine, tmp_path / "its", tmp_path / "mine")
    assert found == [True] * after  # neither the load nor the save was refused


@pytest.mark.parametrize(
    "after",
    [
        setup(dtype="bfloat16"),
        setup(dtype="bfloat16", sharded=True),
        setup(dtype="bfloat16", sharded=True, on_host=True),
    ],
    ids=str,
)
def test_states_that_are_another_parameters_are_refused_by_save_and_load(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, after: Setup
) -> None:
    before = replace(after, distributed_optimizer=True)
    [(saving, loading)] = ranks.run(1, spoilt, models["qwen2"], before, after, tmp_path / "state")
    layer = r"those of 2 parameter\(s\) do not, \S*norm\S* first"
    assert re.search(f"main weights to be saved must round to the weights, {layer}", saving)
    assert re.search(f"state: main weights must round to the weights, {layer}.* model.path at the hf folder", loading)


def test_states_of_a_float32_model_that_are_another_parameters_are_not_saved(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path
) -> None:
    [(saving, _)] = ranks.run(1, spoilt, models["qwen2"], setup(sharded=True), setup(), tmp_path / "state")
    assert re.search(r"those of 2 parameter\(s\) do not, \S*norm\S* first", saving)


@pytest.mark.parametrize("case", [setup(), setup(sharded=True), setup(sharded=True, on_host=True)], ids=str)
def test_a_model_that_was_never_updated_is_saved_and_goes_on_as_a_new_one(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, case: Setup
) -> None:
    """The policy, while the critic warms up."""
    (unbroken,) = ranks.run(1, saved, models["qwen2"], case, POLICY, tmp_path / "state", tmp_path / "unbroken", 0)
    (broken,) = ranks.run(1, resumed, models["qwen2"], case, POLICY, tmp_path / "state", tmp_path / "resumed")
    assert broken == unbroken


@pytest.mark.parametrize("case", [setup(), setup(sharded=True), setup(sharded=True, on_host=True)], ids=str)
@pytest.mark.parametrize(
    "other",
    [{"lr": 3e-3}, {"weight_decay": 0.3}, {"betas": (0.5, 0.7)}, {"eps": 1e-2}, {"clip_grad": 0.01}],
    ids=lambda other: next(iter(other)),
)
def test_the_optimizers_settings_are_those_of_the_run_that_loads(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, case: Setup, other: dict[str, Any]
) -> None:
    """From a checkpoint without updates, whose moments say nothing of the settings that they were made with."""
    mine, its = replace(case, **other), tmp_path / "its"
    ranks.run(1, saved, models["qwen2"], case, POLICY, its, tmp_path / "as_before", 0)
    (unbroken,) = ranks.run(1, saved, models["qwen2"], mine, POLICY, tmp_path / "new", tmp_path / "unbroken", 0)
    (broken,) = ranks.run(1, resumed, models["qwen2"], mine, POLICY, its, tmp_path / "resumed")
    assert broken == unbroken
    before, expected = tensors(tmp_path / "as_before"), tensors(tmp_path / "unbroken")
    for key, tensor in tensors(tmp_path / "resumed").items():
        torch.testing.assert_close(tensor, expected[key], atol=0, rtol=0)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in expected.items()), "or nothing is tested"


def test_a_replica_keeps_its_share_of_states_on_the_host_and_no_more_after_loading(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path
) -> None:
    alone, two = setup(sharded=True, on_host=True), setup(data=2, sharded=True, on_host=True)
    ranks.run(1, saved, models["qwen2"], alone, POLICY, tmp_path / "state", tmp_path / "export")
    [(_, whole)] = ranks.run(1, kept_on_host, models["qwen2"], alone, tmp_path / "state")
    shares = ranks.run(2, kept_on_host, models["qwen2"], two, tmp_path / "state")
    assert [kept for kept, _ in shares] == [needed for _, needed in shares]
    assert sum(kept for kept, _ in shares) == pytest.approx(whole, rel=0.01)


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model's checkpoint, whole, whatever layout wrote it."""
    reader = torch_checkpoint.FileSystemReader(folder)
    listed = reader.read_metadata().state_dict_metadata.items()
    tensors = {name: torch.full(kind.size, float("nan")) for name, kind in listed if hasattr(kind, "size")}
    torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def test_weights_and_moments_are_the_same_to_the_bit_at_another_layout_and_nothing_draws_random_numbers(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    ranks.run(2, saved, models["qwen2"], setup(tensor=2), POLICY, first, tmp_path / "export")
    assert ranks.run(2, resaved, models["qwen2"], setup(pipeline=2), first, again) == [True, True]
    expected, found = saved_tensors(first), saved_tensors(again)
    weights = [name for name in expected if not name.startswith("optimizer.")]
    moments = [name for name in expected if "exp_avg" in name]
    assert (len(weights), len(moments)) == (10, 20)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert all(float(expected[name].abs().max()) > 0 for name in moments)


def test_moments_are_the_same_to_1e_6_three_updates_after_the_layout_changed(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path
) -> None:
    begin, unbroken, broken = (tmp_path / name for name in ("begin", "unbroken", "broken"))
    ranks.run(2, three_updates, models["qwen2"], setup(tensor=2), None, begin)
    ranks.run(2, three_updates, models["qwen2"], setup(tensor=2), begin, unbroken)
    ranks.run(2, three_updates, models["qwen2"], setup(pipeline=2), begin, broken)
    expected, found = saved_tensors(unbroken), saved_tensors(broken)
    moments = [name for name in expected if "exp_avg" in name]
    gaps = {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in moments}
    assert len(gaps) == 20
    assert 0 < max(gaps.values()) < 1e-6  # tensor ranks add up in another order; measured 6.6e-7, biases of q and k


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs; a full disk is also injected in tests/unit/test_checkpoints.py")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_by_the_writer_and_training_goes_on_until_then(
    ranks: Ranks, models: dict[str, Path], small_disk: Path
) -> None:
    (said,) = ranks.run(1, unwritable, models["qwen2"], small_disk / "policy")
    assert said == "[Errno 28] No space left on device"


def test_a_folder_that_is_no_checkpoint_is_named(ranks: Ranks, models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"needs a metadata\.json, found none in"):
        ranks.run(1, resumed, models["qwen2"], Setup(), POLICY, tmp_path, tmp_path / "out")
