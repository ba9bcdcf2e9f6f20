from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rl.weights.coverage import check_coverage, further_layers
from megatron_rl.weights.weight_map import Head, WeightMap, weight_map
from tests.unit.weights.models import dims

FOLDER = Path("model")


def names_of(weights: WeightMap) -> set[str]:
    return {name for entry in weights.entries for name in entry.hf}


POLICY = weight_map(dims(), Head.TOKEN)
CRITIC = weight_map(dims(), Head.VALUE)
TIED = weight_map(dims(tie_word_embeddings=True), Head.TOKEN)


@pytest.mark.parametrize(
    ("weights", "more"),
    [
        (POLICY, set()),
        (POLICY, {"score.weight", "score.bias"}),
        (CRITIC, {"lm_head.weight"}),
        (TIED, {"lm_head.weight"}),
        (POLICY, {"model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"}),
    ],
    ids=["whole", "value head", "language head", "copy of the embedding", "frequencies"],
)
def test_a_folder_may_hold_what_the_model_leaves(weights: WeightMap, more: set[str]) -> None:
    assert check_coverage(FOLDER, names_of(weights) | more, weights) == more


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
    assert check_coverage(FOLDER, names_of(POLICY), CRITIC, new_head=True) == {"lm_head.weight"}


def test_layers_beyond_the_last_are_left_only_where_the_configuration_has_them() -> None:
    more = {"model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight"}
    weights = weight_map(dims(num_nextn_predict_layers=1), Head.TOKEN)
    left = check_coverage(FOLDER, names_of(weights) | more | {"score.weight"}, weights)
    assert further_layers(left, weights) == sorted(more)
    with pytest.raises(ValueError, match=r"has a tensor model\.layers\.3\.eh_proj"):
        check_coverage(FOLDER, names_of(weights) | {"model.layers.3.eh_proj.weight"}, weights)
