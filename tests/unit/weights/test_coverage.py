from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rl.weights.coverage import FURTHER, check_copy, check_coverage, told_left
from megatron_rl.weights.weight_map import Head, WeightMap, weight_map
from tests.unit.weights.models import dims

FOLDER = Path("model")


def names_of(weights: WeightMap) -> set[str]:
    return {name for entry in weights.entries for name in entry.hf}


POLICY = weight_map(dims(), Head.TOKEN)
CRITIC = weight_map(dims(), Head.VALUE)
TIED = weight_map(dims(tie_word_embeddings=True), Head.TOKEN)


@pytest.mark.parametrize(
    ("weights", "more", "told"),
    [
        (POLICY, set(), ""),
        (POLICY, {"score.weight", "score.bias"}, "2 tensors of another head (score.bias ...)"),
        (CRITIC, {"lm_head.weight"}, "1 tensor of another head (lm_head.weight)"),
        (TIED, {"lm_head.weight"}, "1 tensor that copies the tied embedding (lm_head.weight)"),
        (
            POLICY,
            {"model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"},
            "2 tensors of rotary frequencies (model.layers.0.self_attn.rotary_emb.inv_freq ...)",
        ),
        (
            TIED,
            {"score.weight", "model.rotary_emb.inv_freq"},
            "1 tensor of another head (score.weight), 1 tensor of rotary frequencies (model.rotary_emb.inv_freq)",
        ),
    ],
    ids=["whole", "value head", "language head", "copy of the embedding", "frequencies", "two sorts"],
)
def test_a_folder_may_hold_what_the_model_leaves_which_is_told(weights: WeightMap, more: set[str], told: str) -> None:
    left = check_coverage(FOLDER, names_of(weights) | more, weights)
    assert left.keys() == more
    assert told_left(left) == told


@pytest.mark.parametrize(
    "name",
    [
        "mtp.fc.weight",
        "mtp.layers.0.input_layernorm.weight",
        "model.mtp_layers.0.input_proj.weight",
        "visual.patch_embed.proj.weight",
        "model.layers.0.self_attn.rotary_emb.scale",
        "lm_head.bias",
        "transformer.wte.weight",
    ],
)
def test_a_tensor_from_elsewhere_is_refused_whatever_it_is(name: str) -> None:
    with pytest.raises(ValueError, match=rf"has a tensor {name} \(1 are unknown\)"):
        check_coverage(FOLDER, names_of(TIED) | {name}, TIED)


@pytest.mark.parametrize(
    ("head", "refused"),
    [
        (torch.arange(6.0).reshape(3, 2), False),
        (torch.arange(6.0).reshape(3, 2).bfloat16(), True),
        (torch.arange(6.0).reshape(3, 2) + torch.eye(3, 2) * 1e-6, True),
        (torch.arange(4.0).reshape(2, 2), True),
    ],
    ids=["a copy", "another type", "another number", "another shape"],
)
def test_the_head_of_a_tied_model_must_be_a_copy(head: torch.Tensor, refused: bool) -> None:
    left = check_coverage(FOLDER, names_of(TIED) | {"lm_head.weight", "score.weight"}, TIED)
    tensors = {"model.embed_tokens.weight": torch.arange(6.0).reshape(3, 2), "lm_head.weight": head}
    if refused:
        with pytest.raises(ValueError, match=r"^model: lm_head.weight must be a copy of model.embed_tokens.weight, .*"):
            check_copy(FOLDER, left, TIED, tensors.__getitem__)
    else:
        check_copy(FOLDER, left, TIED, tensors.__getitem__)


def test_a_policys_head_beside_a_critics_is_not_compared_with_the_embedding() -> None:
    tied = weight_map(dims(tie_word_embeddings=True), Head.VALUE)
    left = check_coverage(FOLDER, names_of(tied) | {"lm_head.weight"}, tied)
    check_copy(FOLDER, left, tied, {}.__getitem__)


def test_a_tensor_that_no_such_model_knows_is_named() -> None:
    found = names_of(POLICY) | {"model.layers.1.self_attn.o_proj.bias", "model.layers.2.mlp.up_proj.weight"}
    with pytest.raises(
        ValueError, match=r"^model: no Qwen2ForCausalLM has a tensor model\.layers\.1\.self_attn\.o_proj"
    ) as e:
        check_coverage(FOLDER, found, POLICY)
    assert "(2 are unknown)" in str(e.value)


def test_a_missing_tensor_is_named_and_a_value_head_may_be_new() -> None:
    with pytest.raises(
        ValueError, match=r"must hold model\.norm\.weight, a tensor of every Qwen2ForCausalLM, .*\(1 are"
    ):
        check_coverage(FOLDER, names_of(POLICY) - {"model.norm.weight"}, POLICY, new_head=True)
    with pytest.raises(
        ValueError, match=r"must hold score\.bias, a tensor of every Qwen2ForCausalLM critic, .*\(2 are"
    ):
        check_coverage(FOLDER, names_of(POLICY), CRITIC)
    assert check_coverage(FOLDER, names_of(POLICY), CRITIC, new_head=True).keys() == {"lm_head.weight"}


def test_layers_beyond_the_last_are_left_only_where_the_configuration_has_them() -> None:
    more = {"model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight"}
    weights = weight_map(dims(num_nextn_predict_layers=1), Head.TOKEN)
    left = check_coverage(FOLDER, names_of(weights) | more | {"score.weight"}, weights)
    assert {name for name, sort in left.items() if sort == FURTHER} == more
    assert told_left(left) == (
        "1 tensor of another head (score.weight), 2 tensors of layers that predict further tokens "
        "(model.layers.2.eh_proj.weight ...)"
    )
    with pytest.raises(ValueError, match=r"has a tensor model\.layers\.3\.eh_proj"):
        check_coverage(FOLDER, names_of(weights) | {"model.layers.3.eh_proj.weight"}, weights)
