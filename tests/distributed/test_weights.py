"""Weights: Hugging Face folder to Megatron's ranks and back, bit for bit, and no more on the way than the plan says."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import read_model_dims
from megatron_rl.weights.plan import HfFiles, transfer_plan
from megatron_rl.weights.weight_map import Head, weight_map
from tests.distributed.cases import Setup
from tests.distributed.ranks import Ranks
from tests.distributed.weight_cases import (
    Traffic,
    Trip,
    assembled_without,
    load_another,
    pushed_without,
    round_trips,
    slices_over_channels,
    vocabularies_after_update,
)

DENSE = ("qwen2", "qwen2-tied", "qwen3", "llama", "mistral", "llama-biases")
ODD = ("qwen2-odd", "llama-odd")
"""Of a vocabulary that only one tensor rank divides; tied and untied."""
SPARSE = ("qwen2-moe", "qwen3-moe", "deepseek", "deepseek-v2")
TP2, TP2_PP2 = ParallelLayout(tensor=2), ParallelLayout(tensor=2, pipeline=2)
TP4 = ParallelLayout(tensor=4)
"""Two ranks to a key/value head."""
UNEVEN = ParallelLayout(pipeline=3, first_stage_layers=1, last_stage_layers=1)
LAYOUTS = [TP2, ParallelLayout(pipeline=2), TP2_PP2, ParallelLayout(pipeline=2, virtual_pipeline=2)]
COPIES = [ParallelLayout(), ParallelLayout(tensor=2, data=2), ParallelLayout(context=2, data=2)]
EXPERTS = [ParallelLayout(data=2, expert=2), ParallelLayout(tensor=2, sequence_parallel=True, expert=2)]
MORE_EXPERTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2, sequence_parallel=True, data=2, expert=2, expert_tensor=2),
    ParallelLayout(tensor=2, pipeline=2, sequence_parallel=True, expert=2),
    ParallelLayout(data=4, expert=2),
]


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def prepared(folder: Path, like: Path, head: Head, dtype: torch.dtype) -> None:
    """A folder of ``like``'s weights in ``dtype``; a critic's has a random score in place of the language head."""
    folder.mkdir()
    tensors = {name: t if name.endswith("correction_bias") else t.to(dtype) for name, t in stored(like).items()}
    config = json.loads((like / "config.json").read_text())
    if head is Head.VALUE:
        tensors.pop("lm_head.weight", None)
        score = {"score.weight": torch.randn(1, config["hidden_size"]), "score.bias": torch.randn(1)}
        tensors |= {name: t.to(dtype) for name, t in score.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def check(ranks: Ranks, layout: ParallelLayout, models: Iterable[Path], folder: Path) -> list[list[Traffic]]:
    """As policies and as critics, in both types; what each rank did on each trip."""
    trips = []
    for number, (model, head, dtype) in enumerate(itertools.product(models, Head, (torch.float32, torch.bfloat16))):
        prepared(folder / f"{number}", model, head, dtype)
        trips.append(Trip(folder=folder / f"{number}", back=folder / f"{number} back", head=head, dtype=dtype))
    traffic = ranks.run(layout.world_size, round_trips, layout, trips)
    for number, trip in enumerate(trips):
        before, after = stored(trip.folder), stored(trip.back)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype, name
            assert torch.equal(after[name], tensor), name
        planned = transfer_plan(
            weight_map(read_model_dims(trip.folder), trip.head), layout, HfFiles(), element_bytes=trip.dtype.itemsize
        ).bytes_by_pair()
        for rank in range(1, layout.world_size):
            assert traffic[rank][number].sent == planned.get((rank, None), 0)
        assert traffic[0][number].sent == 0
    return traffic


def slow(layouts: Iterable[ParallelLayout]) -> Iterable[Any]:
    return [pytest.param(layout, marks=pytest.mark.slow) for layout in layouts]


@pytest.mark.parametrize("layout", [*LAYOUTS, UNEVEN, TP4, *slow(COPIES)], ids=str)
def test_weights_of_dense_models_and_critics_come_back_from_any_layout(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, layout: ParallelLayout
) -> None:
    traffic = check(ranks, layout, [models[name] for name in DENSE], tmp_path)
    assert all(done.read == done.held for here in traffic for done in here)  # not an element more than a rank holds


@pytest.mark.parametrize("layout", [TP2, *slow([TP2_PP2, TP4])], ids=str)
def test_weights_of_a_padded_vocabulary_come_back_without_the_padding(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, layout: ParallelLayout
) -> None:
    check(ranks, layout, [models[name] for name in ODD], tmp_path)


@pytest.mark.parametrize("layout", [*LAYOUTS, *EXPERTS, *slow([UNEVEN, *MORE_EXPERTS])], ids=str)
def test_weights_of_models_with_experts_come_back_from_any_layout(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, layout: ParallelLayout
) -> None:
    if layout.tensor > 1 and layout.expert == 1:
        layout = replace(layout, sequence_parallel=True, expert_tensor=layout.tensor)
    traffic = check(ranks, layout, [models[name] for name in SPARSE], tmp_path)
    assert all(done.read == done.held for here in traffic for done in here)


@pytest.mark.parametrize("name", ODD)
def test_padding_of_a_trained_vocabulary_stays_zero(ranks: Ranks, models: dict[str, Path], name: str) -> None:
    first, second = ranks.run(2, vocabularies_after_update, models[name], Setup(layout=TP2))
    for full, padding in zip(first, second, strict=True):  # 97 tokens on two ranks of 128 rows each
        assert (len(full), len(padding)) == (128, 128)
        assert full[:97].abs().sum(1).min() > 0
        assert full[97:].abs().max() == padding.abs().max() == 0


def test_weights_of_another_size_are_refused_by_name(ranks: Ranks, models: dict[str, Path]) -> None:
    [said] = ranks.run(1, load_another, models["llama"], models["llama-odd"])
    assert said.startswith("model.embed_tokens.weight must have shape (97, 32), ")
    assert said.endswith("gives (96, 32); check that config.json belongs to its weights")


def test_tensors_that_the_model_would_drop_are_refused_by_name(ranks: Ranks, models: dict[str, Path]) -> None:
    [said] = ranks.run(1, load_another, models["llama-attention-bias"], models["llama"])
    assert "no LlamaForCausalLM has a tensor model.layers.0.self_attn.k_proj.bias (16 are unknown)" in said


def test_a_damaged_critic_is_refused_and_a_policy_becomes_one(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path
) -> None:
    policy, critic = models["qwen2"], tmp_path / "critic"
    assert ranks.run(1, load_another, policy, policy, Head.VALUE) == [""]
    changed(policy, critic, {"architectures": ["Qwen2ForTokenClassification"]}, {})
    [said] = ranks.run(1, load_another, critic, critic, Head.VALUE)
    assert "must hold score.bias, a tensor of every Qwen2ForCausalLM critic, and does not (2 are missing)" in said


def test_layers_that_predict_further_tokens_are_left_out_and_logged(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "further"
    more = {"model.layers.4.eh_proj.weight": torch.ones(2, 2), "model.layers.4.enorm.weight": torch.ones(2)}
    changed(models["deepseek"], folder, {"num_nextn_predict_layers": 1}, more)
    assert ranks.run(1, load_another, folder, folder) == [
        f"{folder}: left out: 2 tensors of layers that predict further tokens (model.layers.4.eh_proj.weight ...)\n"
    ]


def test_a_head_of_a_tied_model_that_is_no_copy_is_refused(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "untied"
    changed(models["qwen2-tied"], folder, {}, {"lm_head.weight": torch.ones(2, 2)})
    [said] = ranks.run(1, load_another, folder, folder)
    assert "lm_head.weight must be a copy of model.embed_tokens.weight, since config.json ties them" in said


def changed(model: Path, folder: Path, settings: dict[str, Any], more: dict[str, Tensor]) -> None:
    """The same model with other settings and more tensors."""
    folder.mkdir()
    save_file(stored(model) | more, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


SECOND = r"decoder\.layers\.2\.mlp\.linear_fc2\.weight \(model\.layers\.2\.mlp\.down_proj\.weight\)"


@pytest.mark.parametrize("how", ["is stopped", "leaves"])
def test_a_rank_that_gives_no_shard_is_named_with_the_tensor(ranks: Ranks, models: dict[str, Path], how: str) -> None:
    (told, after, when), _, (other, _, later) = ranks.run(
        3, assembled_without, models["llama"], "decoder.layers.2.mlp.linear_fc2.weight", how
    )
    bound = 20 if how == "leaves" else 2
    late = rf"ShardLate: version 7: {SECOND} from rank 1 did not arrive within {bound} s: after \d+\.\d s, "
    assert re.match(late, told), told
    assert after < 15.0 if how == "leaves" else 2.0 <= after < 20.0
    # the last stage waits for rank 0, which goes; rank 0 knows why, and is to be the first to say it
    assert re.match(r"ShardLate: version 7: rank 0 did not take .* of rank 2 within", other), other
    assert later > when + 1.0


def test_rank_0_that_takes_no_shard_is_named_with_the_tensor(ranks: Ranks, models: dict[str, Path]) -> None:
    _, (told, after, _), _ = ranks.run(3, assembled_without, models["llama"], "rank 0", "is stopped")
    first = r"decoder\.layers\.1\.\S+ \(model\.layers\.1\..*\)"
    assert re.match(rf"ShardLate: version 7: rank 0 did not take {first} of rank 1 within \S+ s: ", told), told
    assert 1.9 <= after < 20.0


def test_receivers_are_told_which_rank_of_the_trainer_is_late(ranks: Ranks, models: dict[str, Path]) -> None:
    (told, heard, after), _ = ranks.run(2, pushed_without, models["llama"])
    late = r"ShardLate: version 5: .* from rank 1 did not arrive within 1\.8 s: after \d+\.\d s"
    assert re.match(late, told), told
    assert re.search(rf"^version 5: the sender gave up: {late}", heard), heard
    assert 1.8 <= after < 20.0


def test_slices_are_remembered_over_channels_while_what_is_sent_is_of_one_form(
    ranks: Ranks, models: dict[str, Path]
) -> None:
    forms = [None, None, "fp8_per_channel", "fp8_per_channel"]
    [[first, again, other, last]] = ranks.run(1, slices_over_channels, models["llama"], forms)
    # embedding, head and final norm, and of each of four layers seven linears and two norms; then the linears' scales
    assert (first, again, other, last) == (0, 3 + 4 * 9, 0, 3 + 4 * (9 + 7))
