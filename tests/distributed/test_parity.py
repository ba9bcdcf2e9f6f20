"""Megatron's ranks against Hugging Face, place by place; and faults that the gate must catch and name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_rl.batches import merge_rows
from megatron_rl.hf_reference.model import HfReference
from megatron_rl.layout import ParallelLayout
from megatron_rl.parity import Pair, ParityFailed, Tolerance, check_parity, parity_rows, place_distances
from megatron_rl.weights.rules import Head
from tests.distributed.cases import CRITIC, POLICY, Setup
from tests.distributed.parity_cases import (
    bias_missing,
    head_missing,
    hugging_face,
    inspected,
    padding_read_as_token,
    q_and_k_swapped,
    read_through_and_back,
    recorded,
)
from tests.distributed.ranks import Ranks

ROWS = parity_rows([], vocabulary=96, rows=6, longest=40, pad_id=0)
TOLERANCE = Tolerance(mean=1e-4, largest=2e-3, eps=torch.finfo(torch.float32).eps)
SETUP = Setup(layout=ParallelLayout(tensor=2, pipeline=2), budget=60)
LAYOUTS = [
    ParallelLayout(tensor=2, pipeline=2, sequence_parallel=True),
    ParallelLayout(pipeline=2, virtual_pipeline=2),
    ParallelLayout(tensor=2, context=2, sequence_parallel=True),
    ParallelLayout(data=2),
]
reference = cache(hugging_face)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["qwen2", "llama-biases", "deepseek"])
def test_every_place_of_a_model_is_that_of_hugging_face(
    ranks: Ranks, models: dict[str, Path], name: str, layout: ParallelLayout
) -> None:
    if name == "deepseek" and layout.tensor > 1:
        layout = replace(layout, expert_tensor=layout.tensor)
    answers = ranks.run(
        layout.world_size, inspected, models[name], Setup(layout=layout, budget=60), POLICY, ROWS, [None]
    )
    policy = recorded("policy", [answer[0] for answer in answers], ROWS)
    wanted = reference(models[name], Head.TOKEN, ROWS)
    distances = place_distances(policy.places, wanted.places)
    layers = [place for n in range(4) for place in (f"model.layers.{n}.self_attn", f"model.layers.{n}")]
    assert list(distances) == ["model.embed_tokens", *layers, "model.norm"]
    assert max(distances.values()) < 1e-5, distances
    assert wanted.places["model.norm"].shape == (int(ROWS.lengths.sum()) - ROWS.rows, 32)
    missing = {key for key in wanted.weights if "experts" not in key} - policy.weights.keys()
    assert missing == set()
    told: list[str] = []
    metrics = check_parity([Pair(policy, wanted)], ROWS, TOLERANCE, told.append)
    assert 0 < metrics["policy_against_Hugging_Face/mean"] < 1e-5
    assert told[0].splitlines()[1].endswith("ok")


def failure(ranks: Ranks, folder: Path, fault: object, *, source: Path | None = None) -> str:
    answers = ranks.run(4, inspected, source or folder, SETUP, POLICY, ROWS, [fault])
    policy = recorded("policy", [answer[0] for answer in answers], ROWS)
    with pytest.raises(ParityFailed) as caught:
        check_parity([Pair(policy, reference(folder, Head.TOKEN, ROWS))], ROWS, TOLERANCE, print)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fault", "place", "tensor"),
    [
        (q_and_k_swapped, "model.layers.2.self_attn", "model.layers.2.self_attn.q_proj.weight"),
        (bias_missing, "model.layers.1.self_attn", "model.layers.1.self_attn.q_proj.bias"),
        (padding_read_as_token, "model.embed_tokens", "model.embed_tokens.weight"),
    ],
)
def test_a_seeded_fault_is_caught_and_its_tensor_named(
    ranks: Ranks, models: dict[str, Path], fault: object, place: str, tensor: str
) -> None:
    told = failure(ranks, models["qwen2"], fault)
    assert "1 of 1 comparisons failed" in told
    assert f"the first place that differs is {place}, by" in told
    assert f"the first tensor that differs there is {tensor}: " in told


def test_a_wrong_rope_theta_is_caught_and_the_frequencies_named(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(models["qwen2"], wrong)
    config = json.loads((wrong / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 1e6
    config["rope_parameters"]["rope_theta"] = 1e4
    (wrong / "config.json").write_text(json.dumps(config))
    told = failure(ranks, models["qwen2"], None, source=wrong)
    assert "the first place that differs is model.layers.0.self_attn" in told
    assert "the first tensor that differs there is model.rotary_emb.inv_freq: 3 of 4 elements, the first at [1]" in told


@pytest.fixture(scope="module")
def critic(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A critic that already says something."""
    from transformers import AutoModelForTokenClassification

    torch.manual_seed(1)
    model = AutoModelForTokenClassification.from_pretrained(models["qwen2"], num_labels=1)
    with torch.no_grad():
        model.score.weight.normal_(0, 0.2)
        model.score.bias.fill_(0.1)
    folder = tmp_path_factory.mktemp("critic")
    model.save_pretrained(folder)
    return folder


def test_a_critic_is_that_of_hugging_face_and_a_missing_head_is_named(ranks: Ranks, critic: Path) -> None:
    answers = ranks.run(4, inspected, critic, SETUP, CRITIC, ROWS, [None, head_missing])
    wanted = reference(critic, Head.VALUE, ROWS)
    whole, headless = (recorded("critic", list(column), ROWS) for column in zip(*answers, strict=True))
    assert check_parity([Pair(whole, wanted)], ROWS, TOLERANCE, print)["critic_against_Hugging_Face/max"] < 1e-5
    with pytest.raises(ParityFailed, match=r"place that differs is output, .* differs there is score\.weight"):
        check_parity([Pair(headless, wanted)], ROWS, TOLERANCE, print)


def test_a_critic_without_a_head_of_its_own_is_read_through_a_vector_which_leaves_no_trace(
    ranks: Ranks, models: dict[str, Path]
) -> None:
    through = torch.nn.functional.normalize(torch.arange(1.0, 33).cos(), dim=0)
    answers = ranks.run(4, read_through_and_back, models["qwen2"], SETUP, CRITIC, ROWS, through)
    packed, unpacked, own = (
        merge_rows([found for found in column if found is not None], ROWS) for column in zip(*answers, strict=True)
    )
    wanted = HfReference(models["qwen2"], Head.TOKEN).values(ROWS, through)
    assert wanted[ROWS.response_mask].std() > 0.1
    torch.testing.assert_close(packed, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(unpacked, wanted, atol=1e-5, rtol=0)
    assert not own.any()
