"""Log-probs, entropies and attention: the same numbers as plain torch and Hugging Face, in any layout."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.layout import ParallelLayout
from tests.distributed.cases import TEMPERATURE, Setup, attention_groups, gather, scores, token_rows
from tests.distributed.ranks import Ranks

LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2),
    ParallelLayout(tensor=2, sequence_parallel=True),
    ParallelLayout(pipeline=2),
    ParallelLayout(data=2),
    ParallelLayout(tensor=2, pipeline=2, sequence_parallel=True),
    ParallelLayout(pipeline=2, virtual_pipeline=2),
    ParallelLayout(context=2),
    ParallelLayout(tensor=2, context=2, sequence_parallel=True),
    ParallelLayout(pipeline=2, context=2),
]
SCALED = ("llama-linear", "llama-llama3", "qwen2-yarn", "deepseek-yarn", "deepseek-v2-yarn")


@cache
def _hugging_face(folder: Path) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of each response token, row by row."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows = token_rows()
    logprobs, entropies = torch.zeros(rows.tokens.shape), torch.zeros(rows.tokens.shape)
    for row in range(rows.rows):
        tokens = rows.tokens[row, : rows.lengths[row]]
        with torch.no_grad():
            log = (model(tokens[None]).logits[0, :-1].float() / TEMPERATURE).log_softmax(-1)
        logprobs[row, 1 : len(tokens)] = log.gather(-1, tokens[1:, None])[:, 0]
        entropies[row, 1 : len(tokens)] = -(log.exp() * log).sum(-1)
    return logprobs * rows.response_mask, entropies * rows.response_mask


def _check(ranks: Ranks, folder: Path, name: str, layout: ParallelLayout, tolerance: float) -> None:
    if ("moe" in name or "deepseek" in name) and layout.tensor > 1:
        layout = replace(layout, sequence_parallel=True, expert_tensor=layout.tensor)
    answers = ranks.run(layout.world_size, scores, folder, Setup(layout=layout, budget=100))
    reporting = set(layout.reporting_ranks())
    assert {rank for rank, (logprobs, _) in enumerate(answers) if logprobs is not None} == reporting
    logprobs, entropies = _hugging_face(folder)
    torch.testing.assert_close(gather([answer[0] for answer in answers]), logprobs, atol=tolerance, rtol=0)
    torch.testing.assert_close(gather([answer[1] for answer in answers]), entropies, atol=tolerance, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied", "qwen3", "llama", "qwen2-moe", "qwen3-moe", "deepseek"])
def test_logprobs_and_entropies_are_those_of_hugging_face(
    ranks: Ranks, models: dict[str, Path], name: str, layout: ParallelLayout
) -> None:
    _check(ranks, models[name], name, layout, tolerance=1e-4)


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tensor=2, pipeline=2)], ids=str)
@pytest.mark.parametrize(
    "name", ["mistral", "llama-biases", "llama-attention-bias", "deepseek-v2", "deepseek-v2-grouped", *SCALED]
)
def test_variants_of_a_family_are_those_of_hugging_face(
    ranks: Ranks, models: dict[str, Path], name: str, layout: ParallelLayout
) -> None:
    _check(ranks, models[name], name, layout, tolerance=1e-5)


@pytest.mark.parametrize("name", SCALED)
def test_scaled_positions_are_told_from_plain_ones(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    shutil.copytree(models[name], tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    scaled, plain = _hugging_face(models[name])[0], _hugging_face(tmp_path / "plain")[0]
    assert float((scaled - plain).abs().max()) > 1e-3, "the models of these tests would not notice plain positions"


@pytest.mark.parametrize("name", ["qwen2-odd", "llama-odd"])
@pytest.mark.parametrize(
    "layout",
    [ParallelLayout(tensor=2), ParallelLayout(tensor=4, sequence_parallel=True), ParallelLayout(tensor=2, pipeline=2)],
    ids=str,
)
def test_padding_of_the_vocabulary_has_no_probability(
    ranks: Ranks, models: dict[str, Path], name: str, layout: ParallelLayout
) -> None:
    answers = ranks.run(layout.world_size, scores, models[name], Setup(layout=layout, budget=100))
    logprobs, entropies = _hugging_face(models[name])
    torch.testing.assert_close(gather([answer[0] for answer in answers]), logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(gather([answer[1] for answer in answers]), entropies, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [([7, 7, 7], 1), ([9, 8, 7, 1], 1), ([40, 6, 5, 5], 2), ([5], 1), ([3, 0, 3], 1), ([1, 30, 1, 30], 4)],
)
def test_attention_of_grouped_rows_is_that_of_each_row_alone(ranks: Ranks, lengths: list[int], groups: int) -> None:
    [(found, difference)] = ranks.run(1, attention_groups, lengths)
    assert found == groups
    assert difference < 1e-5
