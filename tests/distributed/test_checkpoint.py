from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint

from megatron_rl.layout import ParallelLayout
from tests.distributed.cases import CRITIC, POLICY, Setup, loss_metrics, resaved, resumed, saved, unwritable
from tests.distributed.ranks import RankFailed, Ranks
from tests.distributed.test_update import tensors

TP2 = ParallelLayout(tensor=2)
PP2 = ParallelLayout(pipeline=2)


@pytest.mark.parametrize(
    ("role", "name", "distributed_optimizer", "before", "after"),
    [
        (POLICY, "qwen2", False, TP2, PP2),
        (POLICY, "qwen2-tied", True, ParallelLayout(tensor=2, data=2), PP2),
        (CRITIC, "qwen2-tied", True, PP2, ParallelLayout(tensor=2, sequence_parallel=True)),
        (POLICY, "qwen3", False, ParallelLayout(), ParallelLayout()),
        (POLICY, "qwen2", True, ParallelLayout(pipeline=2, virtual_pipeline=2), ParallelLayout(context=2)),
        (
            POLICY,
            "qwen2-moe",
            True,
            ParallelLayout(data=2, expert=2),
            ParallelLayout(tensor=2, expert=2, sequence_parallel=True),
        ),
        (POLICY, "qwen2-odd", False, TP2, PP2),  # the vocabulary has padding at the one and not at the other
        (POLICY, "llama-odd", False, PP2, TP2),
        (POLICY, "qwen2-odd", True, ParallelLayout(tensor=2, data=2), PP2),
        (POLICY, "llama-odd", True, PP2, ParallelLayout(tensor=2, data=2)),
        (POLICY, "deepseek", True, ParallelLayout(tensor=2, expert_tensor=2, sequence_parallel=True), PP2),
    ],
    ids=str,
)
def test_a_run_goes_on_from_a_checkpoint_at_another_layout(
    ranks: Ranks,
    models: dict[str, Path],
    tmp_path: Path,
    role: str,
    name: str,
    distributed_optimizer: bool,
    before: ParallelLayout,
    after: ParallelLayout,
) -> None:
    def setup(layout: ParallelLayout) -> Setup:
        return Setup(layout=layout, distributed_optimizer=distributed_optimizer)

    folder = tmp_path / "state"
    unbroken = ranks.run(before.world_size, saved, models[name], setup(before), role, folder, tmp_path / "unbroken")
    broken = ranks.run(after.world_size, resumed, models[name], setup(after), role, folder, tmp_path / "resumed")
    expected = unbroken[before.rank_of(pipeline=before.pipeline - 1)]
    found = broken[after.rank_of(pipeline=after.pipeline - 1)]
    for mine, reference in zip(found, expected, strict=True):
        assert mine.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
        assert mine.learning_rate == reference.learning_rate
        assert loss_metrics(mine) == pytest.approx(loss_metrics(reference), rel=1e-5)
    weights = tensors(tmp_path / "unbroken")
    for key, tensor in tensors(tmp_path / "resumed").items():
        torch.testing.assert_close(tensor, weights[key], atol=1e-5, rtol=0)


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
    ranks.run(2, saved, models["qwen2"], Setup(layout=TP2), POLICY, first, tmp_path / "export")
    assert ranks.run(2, resaved, models["qwen2"], Setup(layout=PP2), first, again) == [True, True]
    expected, found = saved_tensors(first), saved_tensors(again)
    weights = [name for name in expected if not name.startswith("optimizer.")]
    moments = [name for name in expected if "exp_avg" in name]
    assert (len(weights), len(moments)) == (10, 20)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert all(float(expected[name].abs().max()) > 0 for name in moments)


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
