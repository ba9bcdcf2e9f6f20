from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest

from megatron_rl.config.load import ConfigError, load
from megatron_rl.config.precision import RULES, FP8Case, FP8Config, Gpu, Severity, fp8_problems, token_multiple
from megatron_rl.config.schema import SFTConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims, dims_from_config

H100, A100, L40S = Gpu(capability=(9, 0), cuda=(13, 0)), Gpu(capability=(8, 0), cuda=(13, 0)), (8, 9)
B200, RTX5090 = Gpu(capability=(10, 0), cuda=(13, 0)), Gpu(capability=(12, 0), cuda=(13, 0))
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
}
QWEN_05B = QWEN_7B | {
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


def dims(config: dict[str, Any] | None = None, **changes: Any) -> ModelDims:
    return dims_from_config((config or QWEN_7B) | changes)


def case(recipe: Any = "blockwise", **changes: Any) -> FP8Case:
    """A case that breaks no rule, with changes to it or to its FP8 settings."""
    names = {field.name for field in dataclasses.fields(FP8Config)}
    fp8 = {name: changes.pop(name) for name in names & changes.keys()}
    good: dict[str, Any] = {
        "fp8": FP8Config(recipe=recipe, **fp8),
        "layout": ParallelLayout(),
        "dtype": "bfloat16",
        "layers": "auto",
        "distributed_optimizer": True,
        "optimizer_on_host": False,
        "tokens_per_microbatch": 8192,
        "dims": dims(),
        "gpu": H100,
    }
    return FP8Case(**good | changes)


BROKEN: dict[str, tuple[FP8Case, str]] = {
    "delayed": (case("delayed"), "only score (log-probs, values) push theirs into that history"),
    "dtype": (case(dtype="float32"), "model.dtype='bfloat16', which what is not in FP8 stays in, got 'float32'"),
    "layers": (case(layers="local"), "needs Transformer Engine's layers: remove model.layers='local'"),
    "capability": (case(gpu=A100), "capability 9.x (Hopper; on Blackwell take mxfp8), found 8.0"),
    "cuda": (case(gpu=Gpu(capability=(9, 0), cuda=(12, 6))), "CUDA 12.9 or newer, got 12.6"),
    "widths": (
        case(dims=dims(intermediate_size=18900)),
        "multiples of 128 on each tensor rank, got ffn 18900 at tensor=1; lower layout.tensor",
    ),
    "tokens": (
        case(tokens_per_microbatch=8200),
        "must be a multiple of 128, to which micro-batches are padded, got 8200",
    ),
    "ends": (case(first_last_layers_bf16=14), "at most 13 (a stage's layers, and some must be left to FP8), got 14"),
    "parameters are sharded": (
        case(parameters=True, distributed_optimizer=False),
        "parameters=true needs distributed_optimizer=true",
    ),
    "parameters stay on the GPU": (case(parameters=True, optimizer_on_host=True), "remove optimizer_on_host"),
    "no MXFP8 parameters": (case("mxfp8", parameters=True, gpu=B200), "not supported with recipe='mxfp8'"),
    "blockwise parameters are narrow": (
        case(parameters=True, layout=ParallelLayout(tensor=4), dims=dims(intermediate_size=18432)),
        "NaN from the second step at tensor > 2 (NeMo-RL issue 1164), got tensor=4",
    ),
    "blocks and heads": (case(dims=dims(QWEN_05B)), "straddle queries, keys and values"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_says_what_must_hold_and_what_was_found(rule: Any) -> None:
    broken, message = BROKEN[rule.name]
    found = fp8_problems(broken, rule.severity)
    assert len(found) == 1
    assert message in found[0]
    assert all(not fp8_problems(case(), severity) for severity in Severity)


@pytest.mark.parametrize(
    ("recipe", "gpu", "fits"),
    [
        ("tensorwise", Gpu(capability=L40S, cuda=(12, 1)), True),
        ("tensorwise", A100, False),
        ("tensorwise", B200, True),
        ("blockwise", Gpu(capability=L40S, cuda=(13, 0)), False),
        ("blockwise", Gpu(capability=(0, 0), cuda=(0, 0)), False),
        ("blockwise", B200, False),
        ("mxfp8", H100, False),
        ("mxfp8", B200, True),
        ("mxfp8", RTX5090, False),
    ],
)
def test_each_recipe_knows_the_gpus_that_compute_it(recipe: Any, gpu: Gpu, fits: bool) -> None:
    assert (not fp8_problems(case(recipe, gpu=gpu))) is fits


def test_what_is_not_known_breaks_no_rule() -> None:
    assert fp8_problems(case("mxfp8", dims=None, gpu=None)) == []


def test_wide_blockwise_parameters_can_be_allowed() -> None:
    broken = BROKEN["blockwise parameters are narrow"][0]
    allowed = dataclasses.replace(broken.fp8, allow_wide_blockwise_parameters=True)
    assert fp8_problems(dataclasses.replace(broken, fp8=allowed)) == []


def test_the_widths_of_each_rank_count() -> None:
    half = dims(QWEN_05B)
    assert fp8_problems(case(dims=half)) == []
    assert "q, k and v 576, attention's output 448" in fp8_problems(case(dims=half, layout=ParallelLayout(tensor=2)))[0]
    assert fp8_problems(case("tensorwise", dims=half, layout=ParallelLayout(tensor=2))) == []


def test_the_first_and_last_layers_stay_out_of_tensorwise_scaling_unless_told() -> None:
    assert [FP8Config(recipe=recipe).layers_kept for recipe in ("blockwise", "tensorwise", "mxfp8")] == [0, 1, 0]
    assert FP8Config(recipe="tensorwise", first_last_layers_bf16=0).layers_kept == 0


def test_micro_batches_are_padded_for_every_share_of_every_rank() -> None:
    all_axes = ParallelLayout(tensor=2, context=2, sequence_parallel=True)
    assert token_multiple(all_axes, FP8Config()) == 128 * 2 * 4
    assert token_multiple(all_axes, FP8Config(recipe="mxfp8")) == 32 * 2 * 4
    assert token_multiple(ParallelLayout(tensor=2), FP8Config(recipe="tensorwise")) == 16
    assert token_multiple(all_axes, None) == all_axes.batch_multiple == 8


def test_blockwise_alone_needs_an_environment() -> None:
    assert FP8Config().environment == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}
    assert FP8Config(recipe="tensorwise").environment == {}


def test_a_configuration_is_refused_with_the_key_of_its_model(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    for name in ("tokenizer.json", "data.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "sft.toml").write_text(
        f"""
        run_dir = "{tmp_path}/run"
        output = "{tmp_path}/out"
        data = "{tmp_path}/data.jsonl"
        steps = 1
        samples_per_step = 2
        model = {{ path = "{tmp_path}" }}
        trainer = {{ optimizer = {{ lr = 1e-5 }}, fp8 = {{ }} }}
        """
    )
    assert load(SFTConfig, [tmp_path / "sft.toml"]).trainer.fp8 == FP8Config()
    with pytest.raises(ConfigError, match=r"trainer\.fp8: recipe='delayed' is refused"):
        load(SFTConfig, [tmp_path / "sft.toml"], ["trainer.fp8.recipe=delayed"])
    with pytest.raises(ConfigError, match=r"trainer\.fp8\.recipes: unknown key; did you mean trainer\.fp8\.recipe\?"):
        load(SFTConfig, [tmp_path / "sft.toml"], ["trainer.fp8.recipes=mxfp8"])


def test_the_rules_need_no_torch() -> None:
    code = "import sys, megatron_rl.config.precision; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
