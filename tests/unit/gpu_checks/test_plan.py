"""Which checks run where, floors, and the page that is written: all that needs no GPU."""

from __future__ import annotations

import pytest

from benchmarks.gpu import _MINUTES, _MINUTES_OF_SEVERAL, measures
from benchmarks.gpu_checks.costs import SHAPES, attention_flops, floor_seconds, logprob_flops, mfu
from benchmarks.gpu_checks.plan import CHECKS, Result, Row, deadline_s, measured, refusal
from benchmarks.gpu_checks.table import document
from megatron_rl.model_dims import dims_from_config

ALL = {"parts": {"megatron", "transformer_engine", "triton", "vllm"}, "features": {"fp8", "engine_fp8", "colocation"}}
BY_NAME = {check.name: check for check in CHECKS}


def refused(name: str, **changes: object) -> tuple[str, str] | None:
    found = refusal(BY_NAME[name], **{"gpus": 1, "asked_gpus": 1, **ALL, **changes})
    return None if found is None else (found.status, found.reason)


def test_checks_are_planned_within_the_time_that_the_command_has() -> None:
    assert sum(check.planned_s for check in CHECKS if check.gpus == 1) <= 60 * _MINUTES
    assert sum(check.planned_s for check in CHECKS) <= 60 * _MINUTES_OF_SEVERAL


def test_the_time_that_is_left_is_divided_as_it_is_planned() -> None:
    ceilings, ppo, fp8 = BY_NAME["ceilings"], BY_NAME["ppo"], BY_NAME["ppo_fp8"]  # 25, 130 and 130 s
    assert deadline_s(ceilings, [ppo, fp8], 570.0) == pytest.approx(50)
    assert deadline_s(ppo, [fp8], 570.0 - 10) == pytest.approx(280)  # 40 s that nobody took are shared
    assert deadline_s(fp8, [], 270.0) == pytest.approx(270)


def test_every_check_has_its_measurement() -> None:
    assert list(measures()) == [check.name for check in CHECKS]


def test_where_everything_is_there_everything_runs() -> None:
    assert {name: refused(name, gpus=4, asked_gpus=4) for name in BY_NAME} == dict.fromkeys(BY_NAME)


def test_a_missing_part_is_named_and_left_out() -> None:
    assert refused("training_fp8", parts={"megatron"}) == ("skipped", "not installed: Transformer Engine")
    assert refused("ppo_fp8", parts=set()) == ("skipped", "not installed: megatron-core, Transformer Engine, vLLM")
    assert refused("logprobs", parts={"megatron"}) == ("skipped", "not installed: Triton")
    assert refused("training", parts={"megatron"}) is None


def test_a_feature_that_this_version_lacks_fails_loudly() -> None:
    assert refused("training_fp8", features=set()) == ("failed", "not in this build: TrainerConfig.fp8")
    lacking = "not in this build: ClusterConfig.colocate"
    assert refused("ppo", features=set()) == ("failed", lacking)
    assert refused("ppo", features=set(), gpus=2) == ("failed", lacking)
    assert refused("ppo", features=set(), gpus=3) is None  # a GPU for each role


def test_parallel_layouts_want_gpus() -> None:
    assert refused("layouts") == ("skipped", "needs --gpus 2 or more")
    assert refused("layouts", asked_gpus=2) is None


def test_a_cpu_runs_what_needs_no_gpu_no_triton_and_no_transformer_engine() -> None:
    on_cpu = {
        name: refused(name, gpus=0, asked_gpus=2, parts={"megatron", "vllm"}, features={"fp8"}) for name in BY_NAME
    }
    assert {name for name, found in on_cpu.items() if found is None} == {
        "ceilings",
        "logprobs",
        "attention",
        "training",
        "training_fp8",
        "plans",
        "ppo",
        "layouts",
    }
    assert on_cpu["ppo_fp8"] == ("skipped", "needs a GPU")


def test_a_check_fails_that_measured_nothing() -> None:
    assert measured("ceilings", [], 1.0).status == "failed"


def test_a_goal_that_is_not_met_is_told() -> None:
    rows = [
        Row(what="speed", value=1.1, unit="", goal="at least 1.2", met=False),
        Row(what="gap", value=0.0, unit="", goal="at most 1", met=True),
        Row(what="time", value=2.0, unit="s"),
    ]
    found = measured("training", rows, 3.0)
    assert (found.status, found.reason) == ("missed", "goal not met: speed")
    assert measured("training", rows[1:], 3.0).status == "passed"


def test_floors_are_worked_out_by_hand() -> None:
    assert logprob_flops(10, 20, 30, backward=False) == 12_000
    assert logprob_flops(10, 20, 30, backward=True) == 48_000
    assert attention_flops((4, 6), heads=2, head_dim=8) == 2 * 16 * (16 + 36)
    assert floor_seconds(5e12, 500.0) == pytest.approx(0.01)
    assert mfu(989e12, 2.0) == pytest.approx(0.5)


def test_the_work_of_the_7b_layers_is_worked_out_by_hand() -> None:
    shape = next(shape for shape in SHAPES if shape.name == "7B")
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn_hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": 4,
        "vocab_size": 16384,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "eos_token_id": 3,
    }
    dims = dims_from_config(config)
    # weights of a layer: queries and output 2 x 3584 x 3584, keys and values 2 x 3584 x 512, MLP 3 x 3584 x 18944
    layer, head = 25_690_112 + 3_670_016 + 203_685_888, 3584 * 16384
    # a query of 28 heads x 128 meets half of 4096 keys: 2 x 2 x 4096 x 2048 x 3584
    assert dims.row_flops(4096) == 2 * 4096 * (4 * layer + head) + 4 * 120_259_084_288
    # 32,768 tokens, forward and backward, at 45 % of 989 TFLOP/s
    assert mfu(3 * 8 * dims.row_flops(4096), 0.46368) == pytest.approx(0.45, rel=1e-3)


def test_the_page_has_date_device_versions_command_and_every_result() -> None:
    results = [
        Result(check="ceilings", status="passed", seconds=12.4, rows=(Row(what="copy", value=3012.3, unit="GB/s"),)),
        Result(check="ppo", status="failed", reason="a | b\nc"),
    ]
    page = document(results, date="2026-01-02", device="H100", versions={"torch": "2.11.0"}, command="python x.py")
    assert "2026-01-02, H100; torch 2.11.0." in page
    assert "```sh\npython x.py\n```" in page
    assert "| ceilings | products, copies: what the floors are made of | passed | 12 |" in page
    assert "failed: a \\| b c |" in page
    assert "| copy | 3012 GB/s |  |  |" in page


def test_a_missed_goal_stands_out_on_the_page() -> None:
    row = Row(what="speed", value=1.1, unit="", goal="at least 1.2", met=False)
    page = document([measured("training", [row], 1.0)], date="d", device="H100", versions={}, command="python x.py")
    assert "| speed | 1.1  | at least 1.2 | **no** |" in page
