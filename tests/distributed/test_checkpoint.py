from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rl.layout import ParallelLayout
from tests.distributed.cases import CRITIC, POLICY, Setup, loss_metrics, resumed, saved
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


def test_a_folder_that_is_no_checkpoint_is_named(ranks: Ranks, models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"needs a metadata\.json, found none in"):
        ranks.run(1, resumed, models["qwen2"], Setup(), POLICY, tmp_path, tmp_path / "out")
