from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_rl.weights.fp8_blocks import ENGINE_SCALINGS, FP8, PER_BLOCK, dequantise, quantise
from megatron_rl.weights.fp8_push import quantised
from megatron_rl.weights.weight_map import Head, weight_map
from tests.unit.weights.models import dims

WEIGHTS = weight_map(
    dims(
        num_hidden_layers=1,
        hidden_size=256,
        intermediate_size=384,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        vocab_size=24,
    ),
    Head.TOKEN,
)
INSIDE = "model.layers.0."
JOINED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
SHAPES = {
    "model.embed_tokens.weight": (24, 256),
    f"{INSIDE}self_attn.q_proj.weight": (256, 256),
    f"{INSIDE}self_attn.k_proj.weight": (128, 256),
    f"{INSIDE}self_attn.v_proj.weight": (128, 256),
    f"{INSIDE}self_attn.q_proj.bias": (256,),
    f"{INSIDE}self_attn.o_proj.weight": (256, 256),
    f"{INSIDE}mlp.gate_proj.weight": (384, 256),
    f"{INSIDE}mlp.up_proj.weight": (384, 256),
    f"{INSIDE}mlp.down_proj.weight": (256, 384),
    f"{INSIDE}input_layernorm.weight": (256,),
    "lm_head.weight": (24, 256),
}


def whole() -> dict[str, Tensor]:
    """In float32, as a trainer may have them; the later, the larger."""
    random = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=random) * 0.02 * (1 + index)
        for index, (name, shape) in enumerate(SHAPES.items())
    }


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("fp8_per_channel", {"self_attn.q_proj": (256, 1), "mlp.down_proj": (256, 1)}),
        ("fp8_per_tensor", {"self_attn.q_proj": (1,), "mlp.down_proj": (1,)}),
        ("fp8_per_block", {"self_attn.q_proj": (2, 2), "mlp.down_proj": (2, 3)}),
    ],
)
def test_linears_travel_in_a_byte_beside_their_scales_and_the_rest_in_bfloat16(
    name: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    sent, given = dict(quantised(whole().items(), WEIGHTS, name)), whole()
    linears = {f"{INSIDE}{part}.weight" for group in JOINED for part in group}
    assert sent.keys() == given.keys() | {f"{linear}_scale" for linear in linears}
    for part, tensor in given.items():
        if part not in linears:
            assert torch.equal(sent[part], tensor.bfloat16()), part
        else:
            assert sent[part].dtype == FP8
            assert sent[f"{part}_scale"].dtype == torch.float32
    for part, shape in shapes.items():
        assert tuple(sent[f"{INSIDE}{part}.weight_scale"].shape) == shape


def test_what_travels_is_the_rounded_weight() -> None:
    """Each number within half a step of e4m3, whose largest is that of all that the engine joins."""
    given = whole()
    for name in ENGINE_SCALINGS:
        sent = dict(quantised(given.items(), WEIGHTS, name))
        for group in JOINED:
            top = max(float(given[f"{INSIDE}{part}.weight"].abs().max()) for part in group)
            for part in group:
                weight = given[f"{INSIDE}{part}.weight"].bfloat16().float()
                scale = sent[f"{INSIDE}{part}.weight_scale"]
                if name == "fp8_per_block":
                    scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
                back = sent[f"{INSIDE}{part}.weight"].float() * scale
                step = torch.maximum(weight.abs() / 16, torch.tensor(top / 448 * 2.0**-10))
                assert ((back - weight).abs() <= step * 1.0001).all(), (name, part)


def test_weights_that_the_engine_joins_to_one_share_a_scale_per_tensor_alone() -> None:
    given = whole()
    sent = dict(quantised(given.items(), WEIGHTS, "fp8_per_tensor"))
    for group in JOINED:
        wanted = torch.cat([given[f"{INSIDE}{part}.weight"].bfloat16() for part in group]).abs().max().float() / 448
        for part in group:
            assert float(sent[f"{INSIDE}{part}.weight_scale"]) == pytest.approx(float(wanted), rel=1e-7)
    largest = {part: float(sent[f"{INSIDE}{part}.weight"].float().abs().max()) for part in JOINED[0]}
    assert largest["self_attn.v_proj"] == 448 > largest["self_attn.q_proj"]


def test_a_part_that_comes_without_the_others_is_named() -> None:
    lacking = {name: tensor for name, tensor in whole().items() if "up_proj" not in name}
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight must be sent with all of .*up_proj\.weight, which"):
        dict(quantised(lacking.items(), WEIGHTS, "fp8_per_channel"))


def test_weights_that_were_trained_in_blocks_keep_their_numbers() -> None:
    """Transformer Engine gives FP8 parameters as bfloat16: of them come the same e4m3 numbers, with scales that
    bfloat16 has rounded to 8 bits of mantissa.
    """
    given, trained = whole(), {}
    for name, tensor in given.items():
        if name.endswith("_proj.weight"):
            trained[name] = quantise(tensor, PER_BLOCK)
            given[name] = dequantise(*trained[name], torch.bfloat16, PER_BLOCK)
    sent = dict(quantised(given.items(), WEIGHTS, "fp8_per_block"))
    for name, (small, scales) in trained.items():
        assert torch.equal(sent[name].view(torch.uint8), small.view(torch.uint8)), name
        torch.testing.assert_close(sent[f"{name}_scale"], scales, rtol=2.0**-8, atol=0)
        assert not torch.equal(sent[f"{name}_scale"], scales)
