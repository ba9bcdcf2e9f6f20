"""Plans of the recipes, and the formulas by hand."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config.load import parse
from megatron_rl.config.precision import FP8Config
from megatron_rl.config.schema import EngineConfig, OptimizerConfig, ParityConfig, RunConfig, TrainerConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import read_model_dims
from megatron_rl.planner.devices import DEVICES
from megatron_rl.planner.lengths import Lengths
from megatron_rl.planner.memory import (
    TORCH_CHUNK_BYTES,
    TRITON_CHUNK_BYTES,
    activation_bytes_per_token,
    device_bytes,
    engine_cells,
    kv_bytes_per_token,
    pieces_in_flight,
    trainer_cells,
)
from megatron_rl.planner.report import plan_text
from megatron_rl.planner.search import choices, legal_minibatches, plan, together
from megatron_rl.planner.states import total_parameters
from megatron_rl.planner.times import Machine, Work, pass_time, rollout_time, update_time
from megatron_rl.weights.rules import Head

ROOT = Path(__file__).parents[3]
FP8 = ROOT / "examples" / "beyond_7b" / "fp8.toml"
RECIPES = sorted(set((ROOT / "examples" / "beyond_7b").glob("*.toml")) - {FP8})
H100 = Machine(device=DEVICES["h100"], per_node=8)
LENGTHS = Lengths(prompt=100, response=800)


def recipe(name):
    config = parse(RunConfig, [ROOT / "examples" / "beyond_7b" / f"{name}.toml"])
    return config, read_model_dims(ROOT / config.model.path)


def model(name):
    return read_model_dims(ROOT / "examples" / "beyond_7b" / "models" / name)


def trainer(**changes):
    return TrainerConfig(optimizer=OptimizerConfig(lr=1e-6), layout=ParallelLayout(**changes))


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama3_8b", 8.03),
        ("llama3_70b", 70.55),
        ("llama3.1_405b", 405.85),
        ("qwen2.5_14b", 14.77),
        ("qwen2.5_32b", 32.76),
        ("qwen2.5_72b", 72.71),
        ("qwen3_30b_a3b", 30.53),
        ("qwen3_235b_a22b", 235.09),
        ("deepseek_v3", 671.03),
    ],
)
def test_models_have_as_many_parameters_as_published(name, billions):
    assert total_parameters(model(name), Head.TOKEN) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("file", RECIPES, ids=[file.stem for file in RECIPES])
def test_every_recipe_fits_the_devices_it_asks_for(file):
    config, dims = recipe(file.stem)
    found = plan(config, dims, H100, LENGTHS)
    assert found.problems == ()
    assert found.step_seconds > 0
    in_fp8 = parse(RunConfig, [file, FP8])
    assert plan(in_fp8, dims, H100, LENGTHS).problems == ()
    refused = plan(in_fp8, dims, replace(H100, device=DEVICES["a100-80g"]), LENGTHS).problems
    assert any("needs a GPU of" in problem for problem in refused)


def test_there_are_recipes():
    assert len(RECIPES) == 6


def test_the_plan_needs_no_torch_and_takes_seconds():
    script = (
        "import sys; from megatron_rl.__main__ import main; "
        "status = main(['plan', 'examples/beyond_7b/qwen3_235b_a22b.toml']); "
        "sys.exit(status or ('torch' in sys.modules))"
    )
    started = time.process_time(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started[1] < 30  # 5 s where the machine is not shared
    assert "time.step" in done.stdout


@pytest.mark.parametrize(
    ("module", "ours", "theirs", "written"),
    [
        ("logprobs", TORCH_CHUNK_BYTES, 256 * 2**20, "256 * 2**20"),
        ("logprobs_triton", TRITON_CHUNK_BYTES, 2**31, "2**31"),
    ],
)
def test_the_chunks_of_logits_are_those_of_the_trainer(module, ours, theirs, written):
    source = (ROOT / "megatron_rl" / "mcore" / f"{module}.py").read_text()  # Triton's cannot be imported anywhere
    assert f"\nCHUNK_BYTES = {written}\n" in source
    assert ours == theirs


@pytest.mark.parametrize(
    ("kernel", "on_gpu", "chunk"),
    [
        # 2^31 B / (2 B x 128,256 logits) = 8,371 tokens: the whole micro-batch of 8,192, in the weights' type
        ("auto", True, 8192 * 128256 * 2),
        # 2^28 B / (4 B x 128,256 logits) = 523 tokens, twice in float32 and once in the weights' type
        ("torch", True, 523 * 128256 * 10),
        ("auto", False, 523 * 128256 * 10),
    ],
)
def test_logits_are_held_as_the_kernel_of_the_device_does(kernel, on_gpu, chunk):
    chosen = replace(trainer(), logprob_kernel=kernel)
    cells = trainer_cells("policy", model("llama3_8b"), chosen, Head.TOKEN, "bfloat16", reference=False, on_gpu=on_gpu)
    logits = next(cell for cell in cells if cell.name == "policy.logits")
    assert logits.value == chunk + (4 + 2) * 128256 * 4096


def test_a_pipeline_holds_micro_batches_as_its_schedule_says():
    assert [pieces_in_flight(4, 1, stage) for stage in range(4)] == [4, 3, 2, 1]
    # warm-up of 2 (4 - 0 - 1) + (2 - 1) 4 = 10 pieces and one more, of two to a model
    assert pieces_in_flight(4, 2, 0) == 5.5


def test_keys_and_values_by_hand():
    # 80 layers x (key + value) x 8 heads / 8 workers x 128 x 2 B
    assert kv_bytes_per_token(model("llama3_70b"), 8, "bfloat16") == 80 * 2 * 128 * 2
    # DeepSeek-V3: 61 layers x (512 + 64) x 2 B on every worker
    assert kv_bytes_per_token(model("deepseek_v3"), 8, "bfloat16") == 61 * 576 * 2


def test_a_bubble_is_the_published_share_of_a_pipelines_time():
    work = Work(rows=64, row_tokens=1024)
    flat = trainer(pipeline=4, data=1)
    folded = trainer(pipeline=4, virtual_pipeline=2, data=1)
    batches = 64 * 1024 / 8192
    for chosen, virtual in ((flat, 1), (folded, 2)):
        found = pass_time(model("llama3_8b"), chosen, H100, work, "bfloat16", backward=True)
        assert found.bubble == pytest.approx(found.arithmetic * 3 / virtual / batches)


def test_full_recompute_costs_one_more_forward_pass():
    work, dims = Work(rows=64, row_tokens=1024), model("llama3_8b")
    kept = pass_time(dims, trainer(), H100, work, "bfloat16", backward=True)
    again = pass_time(dims, replace(trainer(), recompute="full"), H100, work, "bfloat16", backward=True)
    assert again.arithmetic == pytest.approx(kept.arithmetic * 4 / 3)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("llama3_8b", {"tensor": 4, "sequence_parallel": True}),
        ("llama3_8b", {"context": 2}),
        ("qwen3_30b_a3b", {"expert": 8, "data": 8}),
    ],
    ids=["tensor", "context", "expert"],
)
def test_an_exchange_is_done_once_each_way_and_again_with_full_recompute(name, axes):
    work, dims, chosen = Work(rows=64, row_tokens=1024), model(name), trainer(**axes)

    def exchanged(recompute, *, backward):
        asked = replace(chosen, recompute=recompute)
        return pass_time(dims, asked, H100, work, "bfloat16", backward=backward).tensor

    forward = exchanged("none", backward=False)
    assert forward > 0
    assert exchanged("none", backward=True) == pytest.approx(2 * forward)
    assert exchanged("selective", backward=True) == pytest.approx(2 * forward)
    assert exchanged("full", backward=True) == pytest.approx(3 * forward)


def test_tensor_ranks_exchange_four_shares_of_the_hidden_states_a_layer():
    # 8,192 tokens x 4,096 x 2 B, of which three quarters come from others, 4 times in each of 32 layers
    found = pass_time(
        model("llama3_8b"),
        trainer(tensor=4, sequence_parallel=True),
        H100,
        Work(rows=8, row_tokens=1024),
        "bfloat16",
        backward=False,
    )
    assert found.tensor == pytest.approx(4 * 32 * (2 * 8192 * 4096 * 0.75 / (0.75 * 450e9) + 12e-6))


def test_each_stage_keeps_the_activations_of_its_own_layers():
    dims = model("llama3_8b")
    even, uneven = trainer(pipeline=4), trainer(pipeline=4, first_stage_layers=14)
    kept = {}
    for name, chosen in (("even", even), ("uneven", uneven)):
        cells = trainer_cells("policy", dims, chosen, Head.TOKEN, "bfloat16", reference=False, on_gpu=True)
        kept[name] = next(cell for cell in cells if cell.name == "policy.activations")
    each = activation_bytes_per_token(dims, even, "bfloat16")
    # the first of four stages holds four micro-batches of its layers: 14 of them instead of 8
    assert kept["uneven"].value - kept["even"].value == pytest.approx(8192 * (14 - 8) * 4 * each)
    assert "14 layers x 4 micro-batches" in kept["uneven"].formula


def test_the_stage_with_the_most_layers_sets_the_pace():
    work, dims = Work(rows=64, row_tokens=1024), model("llama3_8b")
    even = pass_time(dims, trainer(pipeline=4), H100, work, "bfloat16", backward=True)
    uneven = pass_time(dims, trainer(pipeline=4, first_stage_layers=14), H100, work, "bfloat16", backward=True)
    assert uneven.arithmetic == pytest.approx(even.arithmetic * 14 / 8)


def test_products_take_their_flops_at_the_devices_share():
    work, dims = Work(rows=8, row_tokens=1024), model("llama3_8b")
    slow = replace(H100, device=replace(H100.device, bandwidth=1e30))
    found = pass_time(dims, trainer(), slow, work, "bfloat16", backward=False)
    assert found.total == pytest.approx(8 * dims.row_flops(1024) / (0.7 * 989e12))


def test_more_replicas_shorten_an_update_and_pay_for_the_exchange():
    work, dims = Work(rows=128, row_tokens=1024), model("llama3_8b")
    one = update_time(dims, trainer(tensor=4, data=1), Head.TOKEN, H100, work, "bfloat16")
    two = update_time(dims, trainer(tensor=4, data=2), Head.TOKEN, H100, work, "bfloat16")
    assert two.arithmetic == pytest.approx(one.arithmetic / 2)
    assert one.replicas == 0
    # float32 both ways without a distributed optimizer: 8 B x parameters / 4 x 1/2 over 0.75 x 450 GB/s
    assert two.replicas == pytest.approx(8 * 2.0080e9 / 2 / (0.75 * 450e9), rel=1e-3)


def test_experts_are_exchanged_between_those_that_hold_the_same_ones():
    work, dims = Work(rows=128, row_tokens=1024), model("qwen3_30b_a3b")
    spread = update_time(dims, trainer(data=8, expert=8), Head.TOKEN, H100, work, "bfloat16")
    copied = update_time(dims, trainer(data=8, expert=4), Head.TOKEN, H100, work, "bfloat16")
    experts = 48 * 128 * 3 * 2048 * 768
    dense = total_parameters(dims, Head.TOKEN) - experts
    # with 8 groups of experts on 8 ranks nobody has the same ones; with 4 two have
    seconds = 8 / (0.75 * 450e9)
    assert spread.replicas == pytest.approx(seconds * dense * 7 / 8)
    assert copied.replicas == pytest.approx(seconds * (dense * 7 / 8 + experts / 4 / 2))


def test_an_update_waits_for_the_stage_with_the_most_parameters():
    # the last stage has the output layer; the first of a critic the embedding, and the last one number per width
    dims, work = model("llama3_8b"), Work(rows=128, row_tokens=1024)
    ends = {
        head: update_time(dims, trainer(pipeline=2, first_stage_layers=15, data=2), head, H100, work, "bfloat16")
        for head in Head
    }
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    table = 128256 * 4096
    assert ends[Head.TOKEN].replicas == pytest.approx(8 * (17 * layer + table + 4096) / 2 / (0.75 * 450e9))
    assert ends[Head.VALUE].replicas == pytest.approx(8 * (15 * layer + table) / 2 / (0.75 * 450e9))


def test_a_step_of_an_engine_reads_all_weights_once():
    dims = model("llama3_8b")
    free = replace(H100, device=replace(H100.device, flops=1e30))
    engine = EngineConfig(count=1, tensor=1, max_concurrent=1)
    found = rollout_time(dims, engine, free, "bfloat16", samples=1, prompt_tokens=1, response_tokens=100, longest=100)
    weights, cache = 8.0303e9 * 2, 51 * 2 * 32 * 8 * 128 * 2
    assert found.decode == pytest.approx(100 * ((weights + cache) / (0.8 * 3.35e12) + 3e-3), rel=1e-3)


@pytest.mark.parametrize(
    ("quantization", "scales"),
    [
        # of q with k and v, attention's output, gate with up, down
        ("fp8_per_channel", 6144 + 4096 + 28672 + 4096),
        ("fp8_per_tensor", 4),
        ("fp8_per_block", 48 * 32 + 32 * 32 + 224 * 32 + 32 * 112),
    ],
)
def test_a_quantised_engine_holds_a_byte_for_each_weight_of_its_linears_and_their_scales(quantization, scales):
    dims = model("llama3_8b")
    linears = 6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336
    rest = total_parameters(dims, Head.TOKEN) - 32 * linears
    engine = EngineConfig(quantization=quantization, tensor=2)
    for dtype in ("bfloat16", "float32"):  # what is not quantised is bfloat16 in either case
        weights = next(cell for cell in engine_cells(dims, engine, dtype) if cell.name == "engine.weights")
        assert weights.value == (2 * rest + 32 * (linears + 4 * scales)) / 2


def test_an_fp8_cache_holds_twice_the_tokens():
    dims = model("llama3_8b")
    formulas = [
        next(cell.formula for cell in engine_cells(dims, engine, "bfloat16") if cell.name == "engine.kv_cache")
        for engine in (EngineConfig(), EngineConfig(kv_cache_dtype="fp8"))
    ]
    # 4 GiB by 32 layers x 2 x 8 heads x 128 x 2 B or 1 B
    assert [text.partition(": ")[2] for text in formulas] == ["32,768 tokens of 131,072 B", "65,536 tokens of 65,536 B"]


def test_a_step_of_a_quantised_engine_reads_fewer_bytes():
    dims = model("llama3_8b")
    free = replace(H100, device=replace(H100.device, flops=1e30))
    engine = EngineConfig(max_concurrent=1, quantization="fp8_per_tensor", kv_cache_dtype="fp8")
    found = rollout_time(dims, engine, free, "bfloat16", samples=1, prompt_tokens=1, response_tokens=100, longest=100)
    linears = 32 * (6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336)
    weights, cache = 8.0303e9 * 2 - linears, 51 * 2 * 32 * 8 * 128
    assert found.decode == pytest.approx(100 * ((weights + cache) / (0.8 * 3.35e12) + 3e-3), rel=1e-3)


def test_a_plan_says_that_fp8_training_is_planned_as_bfloat16():
    config, dims = recipe("qwen2.5_14b")
    config = replace(config, policy=replace(config.policy, fp8=FP8Config()))
    text = plan_text(config, dims, device="h100", per_node=8, nodes=None, lengths=LENGTHS, explain=None)
    assert [line for line in text.splitlines() if ".fp8" in line] == [
        "policy.fp8: planned as bfloat16: neither the time of its products nor its bytes are taken as smaller"
    ]


REFUSED = {
    "a contradiction": (lambda c: replace(c, critic=None), "h100", "critic: required with ppo.advantage='gae'"),
    "too long": (
        lambda c: replace(c, rollout=replace(c.rollout, max_response_tokens=200_000)),
        "h100",
        "rollout.max_response_tokens: prompt (",
    ),
    "a layout": (
        lambda c: replace(c, policy=replace(c.policy, layout=ParallelLayout(pipeline=5))),
        "h100",
        "policy.layout: pipeline=5 does not divide the model's 48 layers",
    ),
    "FP8 on an old GPU": (
        lambda c: replace(c, policy=replace(c.policy, fp8=FP8Config())),
        "a100-80g",
        "policy.fp8: recipe='blockwise' needs a GPU of compute capability 9.x (Hopper; on Blackwell take mxfp8), "
        "found 8.0",
    ),
    "FP8 blocks on a CPU": (
        lambda c: replace(c, engine=replace(c.engine, quantization="fp8_per_block")),
        "cpu",
        "engine.quantization: without a GPU vLLM has no kernel for 'fp8_per_block'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_train_refuses_is_not_planned(case):
    change, device, said = REFUSED[case]
    config, dims = recipe("qwen2.5_14b")
    found = plan(change(config), dims, replace(H100, device=DEVICES[device]), LENGTHS)
    assert [text[: len(said)] for text in found.problems] == [said]
    assert found.memory == found.times == ()


def test_layouts_that_fp8_cannot_have_are_no_choice():
    config, dims = recipe("qwen2.5_14b")
    config = replace(config, policy=replace(config.policy, fp8=FP8Config()))
    found = {str(c.layout): c.problem for c in choices(config, dims, H100, LENGTHS, "policy", 16)}
    # 13,824 feed-forward columns by 8 ranks are no multiple of 128
    assert found["TP8+SP PP1 DP2"].startswith(
        "recipe='blockwise' needs widths that are multiples of 128 on each tensor"
    )
    assert found["TP4+SP PP1 DP4"] == ""


def test_what_cannot_run_is_said_without_a_table():
    config, dims = recipe("qwen2.5_14b")
    text = plan_text(
        replace(config, critic=None), dims, device="h100", per_node=8, nodes=None, lengths=LENGTHS, explain=None
    )
    assert "CANNOT RUN: critic: required with ppo.advantage='gae'" in text
    assert "seconds\n" not in text
    assert "policy on 16 devices" in text


def test_a_plan_needs_neither_data_nor_a_tokenizer():
    config, dims = recipe("qwen2.5_14b")
    assert [text.partition(":")[0] for text in config.problems()] == ["data", "data", "model.path"]
    assert plan(config, dims, H100, LENGTHS).problems == ()


def shared(**changes):
    config, dims = recipe("qwen2.5_14b")
    engine = replace(config.engine, tensor=1, restarts=0)
    return replace(config, cluster=replace(config.cluster, colocate=True), engine=engine, **changes), dims


def test_models_that_share_devices_take_as_many_as_the_largest_and_their_times_add_up():
    config, dims = shared()
    apart = replace(config, cluster=replace(config.cluster, colocate=False))
    alone, found = plan(apart, dims, H100, LENGTHS), plan(config, dims, H100, LENGTHS)
    assert apart.critic is not None
    each = (apart.policy.layout.world_size, apart.critic.layout.world_size, apart.engine.count)
    assert (alone.devices, found.devices) == (sum(each), max(each))
    at = {cell.name: cell.value for cell in found.times}
    parts = ("rollout", "policy.scoring", "critic.scoring", "policy.updates", "critic.updates", "push")
    assert found.step_seconds == pytest.approx(sum(at[f"time.{part}"] for part in parts))
    assert alone.step_seconds < found.step_seconds


def test_policy_and_critic_must_fit_a_shared_device_together_and_the_engine_alone():
    config, dims = shared(parity=ParityConfig(enabled=False))
    memory = plan(config, dims, H100, LENGTHS).memory
    held = {role: device_bytes(c for c in memory if c.name.startswith(role)) for role in ("policy", "critic", "engine")}
    both = held["policy"] + held["critic"]
    assert max(held.values()) < both

    def problems(room):
        device = replace(H100.device, memory=room + H100.device.reserved)
        return [text.partition(":")[0] for text in plan(config, dims, replace(H100, device=device), LENGTHS).problems]

    assert problems(both) == []
    assert problems(both - 1) == ["policy with critic"]
    assert problems(held["engine"] - 1) == ["policy with critic", "engine"]


def test_at_the_parity_gate_all_weights_lie_beside_the_engine():
    config, dims = shared()
    memory = plan(config, dims, H100, LENGTHS).memory
    at = {cell.name: cell.value for cell in memory}
    engine = at["engine.weights"] + at["engine.kv_cache"] + at["engine.logits"]
    said = dict(together(config, memory))
    assert said["parity.enabled: engine with policy.weights, critic.weights"] == pytest.approx(
        engine + at["policy.weights"] + at["critic.weights"]
    )


def test_layouts_of_a_model_that_shares_devices_leave_room_for_the_other():
    config, dims = shared()
    memory = plan(config, dims, H100, LENGTHS).memory
    critic = device_bytes(c for c in memory if c.name.startswith("critic"))
    room = H100.device.memory - H100.device.reserved
    fits = [c for c in choices(config, dims, H100, LENGTHS, "policy", 16) if not c.problem]
    assert fits
    assert all(choice.bytes + critic <= room for choice in fits)
    alone = [c for c in choices(recipe("qwen2.5_14b")[0], dims, H100, LENGTHS, "policy", 16) if not c.problem]
    assert len(alone) > len(fits)


def test_what_does_not_fit_says_how_much_is_missing():
    config, dims = recipe("qwen2.5_14b")
    found = choices(config, dims, H100, LENGTHS, "policy", 16)
    assert [c.problem == "" for c in found] == sorted((c.problem == "" for c in found), reverse=True)
    refused = {str(c.layout): c.problem for c in found if c.problem}
    assert "GB of a device's 78.0 GB" in refused["TP1 PP1 DP16"]


def test_legal_minibatches_divide_the_samples_and_feed_every_replica():
    config, _ = recipe("qwen3_30b_a3b")
    assert legal_minibatches(config) == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]


def test_sizes_below_one_are_a_problem_and_no_crash():
    config, dims = recipe("qwen2.5_14b")
    none = replace(config.policy, layout=ParallelLayout(data=0))
    text = plan_text(
        replace(config, policy=none, critic=none),
        dims,
        device="h100",
        per_node=8,
        nodes=None,
        lengths=LENGTHS,
        explain=None,
    )
    assert "CANNOT RUN: policy.layout: data must be at least 1, got 0" in text


def explained(cell, device="h100"):
    config, dims = recipe("qwen2.5_14b")
    return plan_text(config, dims, device=device, per_node=8, nodes=None, lengths=LENGTHS, explain=cell)


def test_any_cell_explains_itself_with_its_numbers():
    assert explained("engine.kv_cache").startswith("engine.kv_cache = 17.180 GB = engine.kv_cache_mib=16384: ")
    with pytest.raises(ValueError, match=r"--explain must name one of engine\.weights, .*, got policy\.x"):
        explained("policy.x")
    with pytest.raises(ValueError, match="--device must be one of a100-80g, h100, h200, b200, cpu, got tpu"):
        explained("policy.weights", device="tpu")


def test_the_page_on_scaling_is_what_the_planner_says():
    script = ROOT / "docs" / "make_scaling.py"
    done = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, "run python docs/make_scaling.py"
