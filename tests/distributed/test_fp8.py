from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rl.config.precision import FP8Config
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import read_model_dims
from megatron_rl.weights.formats import expected_formats
from megatron_rl.weights.weight_map import Head, weight_map
from tests.distributed import fp8_cases as cases
from tests.distributed.cases import CRITIC, POLICY, Setup
from tests.distributed.ranks import Ranks

NO_CLIP = 1e9
TP2 = ParallelLayout(tensor=2, sequence_parallel=True)


def _gap(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    assert len(a) > 10
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


def _scores(answers: list[Any], index: int = 0) -> torch.Tensor:
    """In the order of the rows, from whoever answered."""
    rows, values = next(answer[index] for answer in answers if answer[index] is not None)
    return values[rows.argsort()]


@pytest.mark.parametrize("role", [POLICY, CRITIC])
@pytest.mark.parametrize(
    ("layout", "multiple"),
    [(TP2, 128 * 2), (ParallelLayout(context=2), 128 * 4), (ParallelLayout(), 128)],
    ids=str,
)
def test_padding_to_blocks_changes_neither_scores_nor_loss_nor_gradients(
    ranks: Ranks, models: dict[str, Path], layout: ParallelLayout, multiple: int, role: str
) -> None:
    setup = Setup(layout=layout, budget=100, clip_grad=NO_CLIP)
    run = (layout.world_size, cases.padded_step, models["qwen2"], setup, role)
    plain, padded = ranks.run(*run, layout.batch_multiple), ranks.run(*run, multiple)
    assert padded[0][3] % multiple == 0
    assert padded[0][3] > plain[0][3]
    torch.testing.assert_close(_scores(padded), _scores(plain), rtol=1e-5, atol=1e-6)
    after, before = padded[0][1], plain[0][1]
    assert after.metrics["loss"] == pytest.approx(before.metrics["loss"], rel=1e-5)
    assert after.grad_norm == pytest.approx(before.grad_norm, rel=1e-5)
    assert after.metrics["padding"] > before.metrics["padding"]
    assert _gap(padded[0][2], plain[0][2]) < 1e-5


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("qwen2", ParallelLayout()),
        ("qwen2", TP2),
        ("qwen3", ParallelLayout(pipeline=2)),
        ("llama-biases", ParallelLayout()),
        ("qwen2-moe", ParallelLayout()),
        ("deepseek", ParallelLayout()),
    ],
    ids=str,
)
def test_layers_under_the_names_of_transformer_engine_are_the_same_model(
    ranks: Ranks, models: dict[str, Path], model: str, layout: ParallelLayout
) -> None:
    run = (layout.world_size, cases.one_step, models[model], Setup(layout=layout, budget=100, clip_grad=NO_CLIP))
    local, engine = ranks.run(*run, False), ranks.run(*run, True)
    torch.testing.assert_close(_scores(engine), _scores(local), rtol=1e-5, atol=2e-6)
    assert _gap(engine[0][2], local[0][2]) < 1e-5
    assert _gap(engine[0][3], local[0][3]) < 1e-4


@pytest.mark.parametrize(
    ("model", "layout"), [("qwen2", ParallelLayout(context=2)), ("deepseek", ParallelLayout())], ids=str
)
def test_linears_of_transformer_engine_go_with_the_attention_of_other_gpus(
    ranks: Ranks, models: dict[str, Path], model: str, layout: ParallelLayout
) -> None:
    run = (layout.world_size, cases.one_step, models[model], Setup(layout=layout, budget=100, clip_grad=NO_CLIP))
    local, engine = ranks.run(*run, False), ranks.run(*run, True, False)
    torch.testing.assert_close(_scores(engine), _scores(local), rtol=1e-5, atol=2e-6)
    assert _gap(engine[0][2], local[0][2]) < 1e-5


@pytest.mark.parametrize("model", ["qwen2", "qwen2-moe", "deepseek"])
@pytest.mark.parametrize("saves", [True, False], ids=["from-engine", "to-engine"])
def test_a_checkpoint_of_one_kind_of_layers_loads_into_the_other(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path, model: str, saves: bool
) -> None:
    folder, setup = tmp_path / "saved", Setup(budget=100, clip_grad=NO_CLIP)
    wrote = ranks.run(1, cases.saved, models[model], setup, saves, folder)[0]
    other = ranks.run(1, cases.loaded, models[model], setup, not saves, folder)[0]
    same = ranks.run(1, cases.loaded, models[model], setup, saves, folder)[0]
    assert all(torch.equal(other[0][name], value) for name, value in wrote.items())
    assert _gap(other[1], same[1]) < 1e-5


@pytest.mark.parametrize("logprobs", [True, False])
@pytest.mark.parametrize(("role", "layout"), [(POLICY, ParallelLayout()), (CRITIC, TP2)], ids=str)
def test_fp8_computes_what_the_settings_say_and_never_with_stale_weights(
    ranks: Ranks, models: dict[str, Path], role: str, layout: ParallelLayout, logprobs: bool
) -> None:
    fp8 = FP8Config(logprobs=logprobs, first_last_layers_bf16=1)
    setup = Setup(layout=layout, budget=100, dtype="bfloat16")
    answers = ranks.run(layout.world_size, cases.fp8_trained, models["qwen2"], setup, role, fp8)
    weights = weight_map(read_model_dims(models["qwen2"]), Head.TOKEN)
    for formats, seen, dropped in answers:
        assert formats == expected_formats(weights, fp8, "bfloat16")
        assert {f.dtype for f in formats if ".0." in f.weight or ".3." in f.weight} == {"bfloat16"}
        assert {f.dtype for f in formats if ".1." in f.weight or ".2." in f.weight} == {"float8_e4m3fn"}
        assert seen == {(True, "e4m3"), (False, "e4m3" if logprobs else None)}
        assert dropped == [4 * 4, 0]


def test_the_start_names_the_layer_that_was_left_in_bfloat16(ranks: Ranks, models: dict[str, Path]) -> None:
    said = ranks.run(1, cases.left_in_bfloat16, models["qwen2"], 2)[0]
    assert said.startswith("policy at rank 0: model.layers.2.mlp.down_proj.weight must multiply in float8_e4m3fn")
    assert "but multiplies in bfloat16 (1 of 28 weights differ)" in said


def test_the_start_notices_scales_of_another_kind(ranks: Ranks, models: dict[str, Path]) -> None:
    said = ranks.run(1, cases.wrong_scales, models["qwen2"])[0]
    assert "but multiplies in float8_e4m3fn with one float8_e8m0fnu scale per 128x128 weights (28 of 28" in said


def test_fp8_without_a_gpu_is_refused_before_anything_is_built(ranks: Ranks, models: dict[str, Path]) -> None:
    said = ranks.run(1, cases.without_gpu, models["qwen2"])[0]
    assert "fp8: recipe='blockwise' needs a GPU of compute capability 9.x" in said
    assert "found no GPU" in said


def test_megatron_core_takes_the_fields_of_every_recipe(ranks: Ranks, models: dict[str, Path]) -> None:
    assert ranks.run(1, cases.accepted_fields, models["qwen2"])[0] == {
        "none": (None, None, False, False, "local", False, None),
        "blockwise": ("e4m3", "blockwise", False, False, "transformer_engine", False, None),
        "tensorwise": ("hybrid", "tensorwise", True, (1, 1), "transformer_engine", True, "tensorwise"),
        "mxfp8": ("e4m3", "mxfp8", False, (2, 2), "transformer_engine", False, None),
    }


def test_an_fp8_parameter_is_loaded_whole_and_exported_as_plain_numbers(ranks: Ranks, models: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    found = ranks.run(1, cases.fp8_parameter, models["qwen2"])[0]
    name = "model.layers.0.self_attn.o_proj.weight"
    values = load_file(models["qwen2"] / "model.safetensors")[name]
    assert torch.equal(found["exported"], values)
    assert torch.equal(found["quantised"], values)
    assert found["forgotten"]


def test_a_checkpoint_holds_the_plain_numbers_of_an_fp8_parameter(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path
) -> None:
    assert torch.equal(ranks.run(1, cases.fp8_parameter_saved, models["qwen2"], tmp_path)[0], torch.ones(4, 2))


def test_the_main_weight_of_an_fp8_parameter_starts_from_the_checkpoint(
    ranks: Ranks, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    wrote = ranks.run(1, cases.saved, models["qwen2"], Setup(), False, folder)[0]
    values = ranks.run(1, cases.fp8_parameter_from_checkpoint, models["qwen2"], folder)[0]
    assert torch.equal(values, wrote["model.layers.0.self_attn.o_proj.weight"])


def test_stages_and_experts_answer_for_their_own_linears(ranks: Ranks, models: dict[str, Path]) -> None:
    layout = ParallelLayout(pipeline=2)
    answers = ranks.run(2, cases.formats_here, models["qwen2-moe"], Setup(layout=layout))
    expected = expected_formats(weight_map(read_model_dims(models["qwen2-moe"]), Head.TOKEN), None, "float32")
    assert [f for answer in answers for f in answer] == expected
    assert all(answers)
    assert replace(expected[0], dtype="bfloat16") not in expected
