"""Comparing and locating, on models that are a few numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from megatron_rl.batches import TokenRows, merge_activations
from megatron_rl.config.schema import ParityConfig
from megatron_rl.parity import (
    Pair,
    ParityFailed,
    Tolerance,
    check_parity,
    distance,
    first_divergence,
    parity_rows,
    place_distances,
    tensor_difference,
)
from tests.fakes import Ready

ROWS = TokenRows(
    tokens=torch.tensor([[1, 2, 3], [4, 5, 0]]),
    lengths=torch.tensor([3, 2]),
    response_mask=torch.tensor([[False, True, True], [False, True, False]]),
)
TOLERANCE = Tolerance(mean=0.1, largest=0.25, eps=1e-7)
PLACES = ["model.embed_tokens", "model.layers.0.self_attn", "model.layers.0", "model.layers.1.self_attn"]
PLACES += ["model.layers.1", "model.norm"]


@dataclass
class Model:
    """Scores, places of ones, and one weight in each part; it notes what it was asked."""

    name: str
    scores: list[float]
    wrong_from: str | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    compiled: bool = False
    asked: list[str] = field(default_factory=list)

    def score(self, rows: TokenRows) -> Ready:
        self.asked.append("score")
        found = torch.zeros(rows.tokens.shape)
        found[rows.response_mask] = torch.tensor(self.scores)
        return Ready(found)

    def activations(self, rows: TokenRows) -> Ready:
        self.asked.append("activations")
        bad = PLACES[PLACES.index(self.wrong_from) :] if self.wrong_from else []
        return Ready({} if self.compiled else {p: torch.ones(3, 2) * (2 if p in bad else 1) for p in reversed(PLACES)})

    def tensors(self, prefixes: Sequence[str]) -> Ready:
        self.asked.append(f"tensors {' '.join(prefixes)}")
        return Ready({name: t for name, t in self.weights.items() if name.startswith(tuple(prefixes))})


def weights(**changes: Tensor) -> dict[str, Tensor]:
    names = [
        "model.rotary_emb.inv_freq",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    return {name: torch.ones(2, 2) for name in names} | {name.replace("__", "."): t for name, t in changes.items()}


def failure(tested: Model, against: Model) -> str:
    with pytest.raises(ParityFailed) as caught:
        check_parity([Pair(tested, against)], ROWS, TOLERANCE, print)
    return str(caught.value)


RIGHT = Model("hf", [-1.0, -2.0, -3.0], weights=weights())
WRONG = [-1.0, -2.0, -4.0]


def test_differences_within_bounds_are_told_and_returned() -> None:
    told: list[str] = []
    one, other = Model("policy", [-1.0, -2.0, -3.0]), Model("the engine", [-1.0, -2.06, -3.21])
    metrics = check_parity([Pair(other, one)], ROWS, TOLERANCE, told.append)
    assert metrics == pytest.approx({"the_engine_against_policy/mean": 0.09, "the_engine_against_policy/max": 0.21})
    assert told == [
        "parity on 3 tokens; allowed: mean 0.1, max 0.25\n  the engine against policy  mean 9.00e-02  max 2.10e-01  ok"
    ]
    assert (one.asked, other.asked) == (["score"], ["score"])


@pytest.mark.parametrize(
    "scores",
    [[-1.0, -2.0, -3.26], [-1.12, -2.12, -3.12], [math.nan, -2.0, -3.0]],
    ids=["one token", "the mean", "not a number"],
)
def test_one_token_the_mean_or_no_number_fails(scores: list[float]) -> None:
    told: list[str] = []
    with pytest.raises(ParityFailed, match=r"1 of 2 comparisons failed\nparity on 3 tokens.*\n.* ok\n.* FAILED\n"):
        check_parity(
            [Pair(Model("same", [-1.0, -2.0, -3.0]), RIGHT), Pair(Model("policy", scores), RIGHT)],
            ROWS,
            TOLERANCE,
            told.append,
        )
    assert told == []


def test_each_model_is_asked_once_however_many_it_is_compared_with() -> None:
    models = [Model(name, [-1.0, -2.0, -3.0]) for name in "abc"]
    pairs = [Pair(models[0], models[1]), Pair(models[2], models[0]), Pair(models[2], models[1])]
    assert len(check_parity(pairs, ROWS, TOLERANCE, print)) == 6
    assert [model.asked for model in models] == [["score"]] * 3


def test_the_first_place_and_the_first_tensor_in_it_are_named() -> None:
    changed = weights(model__layers__1__self_attn__q_proj__weight=torch.tensor([[1.0, 1.0], [1.0, 1.5]]))
    tested = Model("policy", WRONG, wrong_from="model.layers.1.self_attn", weights=changed)
    assert failure(tested, RIGHT).endswith(
        "policy against hf: the first place that differs is model.layers.1.self_attn, by 0.5 of its norm "
        "(before it: 0); the first tensor that differs there is model.layers.1.self_attn.q_proj.weight: "
        "1 of 4 elements, the first at [1, 1] (1.5, must be 1)"
    )
    assert tested.asked[-1] == (
        "tensors model.rotary_emb.inv_freq model.layers.1.input_layernorm. model.layers.1.self_attn."
    )


def test_a_tensor_that_one_side_lacks_is_named() -> None:
    fewer = weights()
    del fewer["model.layers.1.self_attn.q_proj.bias"]
    told = failure(Model("policy", WRONG, wrong_from="model.layers.1.self_attn", weights=fewer), RIGHT)
    assert told.endswith("model.layers.1.self_attn.q_proj.bias is in hf and policy has or shows no such tensor")
    less = dataclasses.replace(RIGHT, weights=fewer)
    told = failure(Model("policy", WRONG, wrong_from="model.layers.1.self_attn", weights=weights()), less)
    assert told.endswith("model.layers.1.self_attn.q_proj.bias is in policy and hf has or shows no such tensor")


def test_equal_tensors_leave_the_computation() -> None:
    told = failure(Model("policy", WRONG, wrong_from="model.norm", weights=weights()), RIGHT)
    assert "the first place that differs is model.norm" in told
    assert told.endswith("its 1 tensors are equal, so what is computed with them differs")


def test_equal_hidden_states_leave_the_head() -> None:
    changed = weights(lm_head__weight=torch.ones(3, 2))
    told = failure(Model("policy", WRONG, weights=changed), RIGHT)
    assert "the first place that differs is output" in told
    assert told.endswith("lm_head.weight: shape (3, 2), must be (2, 2)")


def test_a_model_that_cannot_be_watched_says_so() -> None:
    told = failure(Model("engine", WRONG, compiled=True), RIGHT)
    assert told.endswith(
        "where is not known: engine runs compiled, so that its layers cannot be watched; check again with "
        "engine.eager=true"
    )


def test_a_failure_to_locate_keeps_the_table_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(rows: TokenRows) -> Ready:
        raise OSError("the worker is gone")

    policy = Model("policy", WRONG)
    monkeypatch.setattr(policy, "activations", gone)
    with pytest.raises(ParityFailed, match=r"1 of 1 comparisons failed\nparity on 3 tokens.*\n.* FAILED\n") as caught:
        check_parity([Pair(policy, RIGHT)], ROWS, TOLERANCE, print)
    assert caught.value.cause == "policy against hf: where is not known: OSError: the worker is gone"
    assert isinstance(caught.value.__cause__, OSError)


def test_the_first_failing_pair_is_located() -> None:
    policy = Model("policy", WRONG, wrong_from="model.norm", weights=weights())
    engine = Model("engine", WRONG)
    with pytest.raises(ParityFailed, match="2 of 2 comparisons failed") as caught:
        check_parity([Pair(policy, RIGHT), Pair(engine, RIGHT)], ROWS, TOLERANCE, print)
    assert "policy against hf: the first place" in str(caught.value)
    assert engine.asked == ["score"]


@pytest.mark.parametrize(
    ("distances", "place"),
    [
        ([0.0, 2e-7, 3e-7, 5e-7], None),
        ([0.0, 2e-7, 0.3, 0.9], "c"),
        ([0.4, 0.9, 0.9, 1.0], "a"),
        ([0.0, 1e-7, 5e-5, 4e-5], "c"),  # a small fault that later layers do not amplify
        ([0.0, 0.5, 0.9, 1e-6], "b"),
        ([0.0, math.inf, math.inf, 0.0], "b"),
        ([1e-6, 2e-6, 3e-6, 2e-3], "d"),
    ],
)
def test_growth_and_not_size_tells_the_first_divergence(distances: list[float], place: str | None) -> None:
    assert first_divergence(dict(zip("abcd", distances, strict=True)), noise=1e-6) == place


def test_places_are_ordered_as_a_forward_pass_comes_by_them() -> None:
    names = ["model.norm", "model.layers.10", "model.layers.2", "model.layers.10.self_attn", "model.embed_tokens"]
    places = {name: torch.ones(1, 1) for name in names}
    assert list(place_distances(places, places | {"model.layers.3": torch.ones(1, 1)})) == [
        "model.embed_tokens",
        "model.layers.2",
        "model.layers.10.self_attn",
        "model.layers.10",
        "model.norm",
    ]


def test_distance_is_relative_to_the_larger_norm() -> None:
    assert distance(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])) == 1
    assert distance(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(0.8)
    assert distance(torch.zeros(2), torch.zeros(2)) == 0
    assert distance(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert distance(torch.ones(2), torch.ones(3)) == math.inf


def test_tensors_are_compared_in_the_coarser_type() -> None:
    exact = torch.tensor([1.0, 1 / 3])
    assert tensor_difference(exact.bfloat16(), exact) is None
    assert tensor_difference(exact * (1 + 2e-7), exact) is None
    assert tensor_difference(exact.bfloat16().float(), exact) == (
        "1 of 2 elements, the first at [1] (0.333984, must be 0.333333)"
    )
    assert tensor_difference(torch.tensor([math.nan]), torch.ones(1)) == (
        "1 of 1 elements, the first at [0] (nan, must be 1)"
    )


def test_rows_have_many_lengths_and_the_last_one_goes_over_the_vocabulary() -> None:
    rows = parity_rows([(7, 8, 9), (), (10, 11)], vocabulary=100, rows=4, longest=12, pad_id=3)
    assert rows.lengths.tolist() == [3, 6, 9, 12]
    assert rows.tokens[0].tolist() == [7, 8, 9] + [3] * 9
    assert rows.tokens[1, :6].tolist() == [10, 11, 7, 8, 9, 10]
    assert rows.tokens[3].tolist() == [99, 90, 81, 72, 63, 54, 45, 36, 27, 18, 9, 0]
    assert rows.response_mask.sum(1).tolist() == [2, 5, 8, 11]
    assert not rows.response_mask[:, 0].any()


def test_rows_without_texts_are_drawn_and_always_the_same() -> None:
    rows, again = (parity_rows([], vocabulary=50, rows=9, longest=6, pad_id=0) for _ in range(2))
    assert torch.equal(rows.tokens, again.tokens)
    assert rows.lengths.tolist() == [2, 2, 2, 3, 4, 4, 5, 6, 6]
    assert len(rows.tokens[7].unique()) > 3


def test_hidden_states_of_several_workers_are_put_in_the_order_of_the_rows() -> None:
    # row 0 reads tokens 0 and 1, row 1 reads token 3
    one = {"model.norm": (torch.tensor([3, 1]), torch.tensor([[30.0], [10.0]]))}
    two = {"model.norm": (torch.tensor([0]), torch.tensor([[1.0]])), "a": (torch.arange(4)[[0, 1, 3]], torch.eye(3))}
    merged = merge_activations([one, two], ROWS)
    assert merged["model.norm"].tolist() == [[1.0], [10.0], [30.0]]
    assert merged["a"].shape == (3, 3)
    with pytest.raises(ValueError, match=r"model.norm: every token must be computed once, got 2 \(2 different\) for 3"):
        merge_activations([one], ROWS)


def test_the_tolerance_follows_the_type_unless_it_is_set() -> None:
    assert ParityConfig().tolerance("float32") == (1e-4, 2e-3)
    assert ParityConfig().tolerance("bfloat16") == (0.05, 1.5)
    assert ParityConfig(mean_tolerance=0.5, max_tolerance=2.5).tolerance("float32") == (0.5, 2.5)


def test_a_pair_may_have_bounds_of_its_own_and_weights_that_were_rounded() -> None:
    exact = torch.tensor([1.0, 0.5, 1e-7])
    rounded = torch.tensor([1.06, 0.48, 0.0])
    assert tensor_difference(rounded, exact, relative=0.065) is None
    told = tensor_difference(rounded, exact, relative=0.05)
    assert told is not None
    assert told.startswith("1 of 3 elements, the first at [0]")
