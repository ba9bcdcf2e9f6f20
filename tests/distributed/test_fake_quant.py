"""Linear layers that compute as in FP8 do so alike in any layout, as Hugging Face's would, and learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.layout import ParallelLayout
from tests.distributed.cases import CRITIC, POLICY, TEMPERATURE, Setup, gather, scores, supervised, token_rows, trained
from tests.distributed.conftest import SIZES
from tests.distributed.ranks import Ranks
from tests.distributed.test_update import tensors

FORMATS = ["fp8_per_channel", "fp8_per_tensor", "fp8_per_block"]
SPLITS = {
    "tensor": Setup(layout=ParallelLayout(tensor=2)),
    "sequence": Setup(layout=ParallelLayout(tensor=2, sequence_parallel=True), recompute="full"),
    "pipeline": Setup(layout=ParallelLayout(pipeline=2), budget=60),
}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose heads and shards are whole blocks of 128 on two tensor ranks."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(5)
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("aligned")
    Qwen2ForCausalLM(Qwen2Config(**sizes, initializer_range=0.08)).save_pretrained(folder)
    return folder


def logprobs(ranks: Ranks, model: Path, setup: Setup) -> Tensor:
    answers = ranks.run(setup.layout.world_size, scores, model, setup)
    return gather([answer[0] for answer in answers])


def gap(one: Tensor, other: Tensor) -> float:
    """Mean over response tokens."""
    mask = token_rows().response_mask
    return float((one - other)[mask].abs().mean())


def faked(setup: Setup, name: str) -> Setup:
    return Setup(**{**vars(setup), "fake_quantization": name})


def by_hugging_face(folder: Path, name: str) -> Tensor:
    """Log-probs with each linear layer's factors rounded, the fused ones' weights as the engine fuses them."""
    from transformers import AutoModelForCausalLM

    from megatron_rl.mcore.fake_quant import FORMATS as OURS
    from megatron_rl.mcore.fake_quant import quantise_dequantise

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    form = OURS[name]

    def rounded(module: Any, given: tuple[Tensor]) -> tuple[Tensor]:
        return (quantise_dequantise(given[0].flatten(0, -2), form.activation).view_as(given[0]),)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        fused = [[attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]]
        for linears in (*fused, [attention.o_proj], [mlp.down_proj]):
            whole = quantise_dequantise(torch.cat([linear.weight.detach() for linear in linears]), form.weight)
            for linear, weight in zip(linears, whole.split([linear.out_features for linear in linears]), strict=True):
                linear.weight.data = weight.clone()
                linear.register_forward_pre_hook(rounded)
    rows = token_rows()
    found = torch.zeros(rows.tokens.shape)
    with torch.no_grad():
        logits = model(rows.tokens).logits[:, :-1] / TEMPERATURE
    found[:, 1:] = logits.log_softmax(-1).gather(-1, rows.tokens[:, 1:, None])[..., 0]
    return found * rows.response_mask


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_that_of_hugging_faces_layout(ranks: Ranks, aligned: Path, models: Any, name: str) -> None:
    for model in (aligned, models["qwen2"]):
        mine, exact = logprobs(ranks, model, faked(Setup(), name)), logprobs(ranks, model, Setup())
        # a number at the edge of a step falls to either side by the rounding of a sum, hence not equal
        assert gap(mine, by_hugging_face(model, name)) < 0.1 * gap(mine, exact)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", FORMATS)
def test_log_probs_are_the_same_in_any_layout(ranks: Ranks, aligned: Path, name: str, split: str) -> None:
    one, exact = logprobs(ranks, aligned, faked(Setup(), name)), logprobs(ranks, aligned, Setup())
    assert gap(one, exact) > 1e-3
    assert gap(one, logprobs(ranks, aligned, faked(SPLITS[split], name))) < 0.1 * gap(one, exact)


@pytest.mark.parametrize("role", [POLICY, CRITIC])
def test_an_update_learns_through_the_rounding_and_moves_the_unrounded_weights(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, role: str
) -> None:
    setup = Setup(layout=ParallelLayout(tensor=2), fake_quantization="fp8_per_channel", lr=1e-3)
    [(results, _, _), _] = ranks.run(2, trained, models["qwen2"], setup, role, tmp_path / "learned")
    assert results[1].metrics["loss"] < results[0].metrics["loss"]
    still = Setup(**{**vars(setup), "lr": 0.0})
    ranks.run(2, trained, models["qwen2"], still, role, tmp_path / "still")
    before, same, after = (tensors(f) for f in (models["qwen2"], tmp_path / "still", tmp_path / "learned"))
    for weight in (name for name in before if name.endswith("proj.weight")):
        assert torch.equal(before[weight], same[weight])
        assert not torch.equal(before[weight], after[weight])


@pytest.mark.parametrize("name", FORMATS)
def test_the_supervised_stage_learns_through_the_rounding(ranks: Ranks, aligned: Path, name: str) -> None:
    setup = Setup(layout=ParallelLayout(tensor=2), lr=1e-3)
    [exact], [mine, later] = (
        [result.metrics["loss"] for result in ranks.run(2, supervised, aligned, each, updates)[0]]
        for each, updates in ((setup, 1), (faked(setup, name), 2))
    )
    tokens = token_rows().response_mask.sum()
    rounded = -float(by_hugging_face(aligned, name).sum() / tokens)
    assert abs(mine - rounded) < 0.1 * abs(mine - exact)
    assert later < mine
