"""The supervised stage: its loss is transformers', and a stage that was stopped goes on to the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rl.batches import TokenRows
from megatron_rl.checkpoints import check_whole, find_checkpoint
from megatron_rl.experience.supervised import SupervisedRows
from megatron_rl.layout import ParallelLayout
from tests.distributed.cases import Setup
from tests.distributed.ranks import Ranks
from tests.distributed.supervised_cases import PAIRS, STEPS, loss_of, staged
from tests.distributed.test_update import tensors

TWO = [ParallelLayout(tensor=2), ParallelLayout(data=2)]


@pytest.mark.parametrize("layout", TWO, ids=str)
def test_a_stage_that_was_asked_to_stop_goes_on_to_the_same_numbers(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, layout: ParallelLayout
) -> None:
    setup, source = Setup(layout=layout, distributed_optimizer=layout.data > 1), models["qwen2"]

    def run(folder: Path, stop_after: int | None) -> tuple[int, list[dict[str, float]]]:
        folder.mkdir(exist_ok=True)
        done: tuple[int, list[dict[str, float]]] = ranks.run(2, staged, source, folder, setup, stop_after)[0]
        return done

    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done, expected = run(whole, None)
    assert (done, [row["step"] for row in expected]) == (STEPS, list(range(STEPS)))
    assert sorted(path.name for path in (whole / "checkpoints").glob("step_*")) == ["step_000004", "step_000005"]

    assert run(parted, 3)[0] == 3  # not a step that would be saved by itself
    saved = find_checkpoint(parted / "checkpoints")
    assert saved is not None
    assert (saved.step, saved.parts) == (3, {"rows": {"taken": 9}})
    assert not (parted / "model").exists()
    assert run(parted, None) == (STEPS, expected)
    mine, theirs = tensors(parted / "model"), tensors(whole / "model")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(not torch.equal(mine[name], tensor) for name, tensor in tensors(source).items())

    last = find_checkpoint(parted / "checkpoints")
    assert last is not None
    check_whole(last)
    exported = tensors(last.folder / "hf")
    assert all(torch.equal(mine[name], exported[name]) for name in mine)


@pytest.mark.parametrize("layout", TWO, ids=str)
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_the_masked_loss_of_packed_rows_is_that_of_transformers(
    ranks: Ranks, models: dict[str, Path], name: str, layout: ParallelLayout
) -> None:
    rows = SupervisedRows(PAIRS).take(len(PAIRS))
    # of 64 tokens, so that rows share a micro-batch and there are several
    setup = Setup(layout=layout, budget=64, temperature=1.0)
    result = next(answer for answer in ranks.run(2, loss_of, models[name], setup, rows) if answer is not None)
    assert result.metrics["loss"] == pytest.approx(_transformers(models[name], rows), abs=1e-5)


def _transformers(folder: Path, rows: TokenRows) -> float:
    """The mean over the responses' tokens that ``labels`` of -100 at prompts and padding give."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    columns = torch.arange(rows.tokens.shape[1])
    attended = (columns < rows.lengths[:, None]).long()
    labels = torch.where(rows.response_mask, rows.tokens, -100)
    with torch.no_grad():
        return float(model(input_ids=rows.tokens, attention_mask=attended, labels=labels).loss)
