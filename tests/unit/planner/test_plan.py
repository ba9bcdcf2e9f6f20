"""Plans of the recipes, and the formulas by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from matplotlib.figure import Figure

from megatron_rl.__main__ import main
from megatron_rl.config.load import parse
from megatron_rl.config.precision import FP8Config
from megatron_rl.config.schema import (
    ClusterConfig,
    EngineConfig,
    EvaluationConfig,
    OptimizerConfig,
    ParityConfig,
    RunConfig,
    SFTConfig,
    TrainerConfig,
)
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import read_model_dims
from megatron_rl.planner.devices import DEVICES
from megatron_rl.planner.lengths import Lengths, Responses
from megatron_rl.planner.memory import (
    TORCH_CHUNK_BYTES,
    TRITON_CHUNK_BYTES,
    device_bytes,
    engine_cells,
    kv_bytes_per_token,
    layer_activation_bytes,
    pieces_in_flight,
    start_bytes,
    trainer_cells,
)
from megatron_rl.planner.report import report
from megatron_rl.planner.search import choices, legal_minibatches, plan, role_seconds, together
from megatron_rl.planner.states import total_parameters
from megatron_rl.planner.times import Machine, Work, decode_step_time, pass_time, rollout_time, update_time
from megatron_rl.weights.rules import Head

ROOT = Path(__file__).parents[3]
FP8 = ROOT / "examples" / "beyond_7b" / "fp8.toml"
SEEDS = ROOT / "examples" / "qwen2.5_math_7b" / "simplerl_zero.toml"
RECIPES = sorted(set((ROOT / "examples" / "beyond_7b").glob("*.toml")) - {FP8})
H100 = Machine(device=DEVICES["h100"], per_node=8)
B200 = Machine(device=DEVICES["b200"], per_node=8)
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


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_over_the_seeds_recipe_a_larger_one_gets_what_it_does_not_set_and_keeps_the_rest(file):
    alone, seeds = parse(RunConfig, [file]), parse(RunConfig, [SEEDS])
    assert parse(RunConfig, [SEEDS, file]) == replace(
        alone,
        seed=seeds.seed,
        data=replace(alone.data, template=seeds.data.template),
        rollout=replace(alone.rollout, stop=seeds.rollout.stop),
        reward=seeds.reward,
        policy=replace(alone.policy, optimizer=seeds.policy.optimizer),
        critic=replace(alone.critic, optimizer=seeds.critic.optimizer),
        evaluation=seeds.evaluation,
        checkpoint=seeds.checkpoint,
    )


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_with_experts_drop_tokens_that_trainer_and_engine_rate_too_differently(file):
    _, dims = recipe(file.stem)
    icepop, none = ("icepop", 0.5, 5.0), (None, 0.0, 2.0)
    for files, wanted in (
        ([file], none if dims.experts is None else icepop),
        ([SEEDS, file], none if dims.experts is None else icepop),
        ([file, FP8], icepop),
    ):
        ppo = parse(RunConfig, files).ppo
        assert (ppo.engine_correction, ppo.engine_ratio_low, ppo.engine_ratio_high) == wanted
        assert list(ppo.problems()) == []


@pytest.mark.parametrize("file", RECIPES, ids=[file.stem for file in RECIPES])
def test_every_recipe_fits_the_devices_it_asks_for(file):
    config, dims = recipe(file.stem)
    machine = B200 if file.stem == "deepseek_v3" else H100
    found = plan(config, dims, machine, LENGTHS)
    assert found.problems == ()
    assert found.step_seconds > 0
    assert found.calls[0].longest <= config.cluster.call_deadline_s / 2
    in_fp8 = parse(RunConfig, [file, FP8])
    assert plan(in_fp8, dims, machine, LENGTHS).problems == ()
    a100 = replace(H100, device=DEVICES["a100-80g"])
    assert any("needs a GPU of" in problem for problem in plan(in_fp8, dims, a100, LENGTHS).problems)
    variants = [f"{config.cluster.device} | BF16", f"{config.cluster.device} | FP8"]
    if machine == H100:
        assert plan(config, dims, a100, LENGTHS).problems == ()
        variants.append("a100-80g | BF16")
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert all(f"\n| {file.stem} | {variant} | {config.devices} | " in page for variant in variants)


def test_the_readme_predicts_the_days_of_the_seeds_recipes_that_the_page_does():
    page, readme = ((ROOT / name).read_text() for name in ("docs/scaling.md", "README.md"))
    found = re.findall(r"^\| (\w+)_(a100|h100) \| (\d+) \|.* ([\d.]+) \| ([\d.]+) \| yes \|$", page, re.MULTILINE)
    assert [(place, gpu) for place, gpu, *_ in found] == [
        (place, gpu) for place in ("4_nodes", "1_node") for gpu in ("a100", "h100")
    ]
    for _, gpu, count, sixty, all_steps in found:
        kind = "A100, BF16" if gpu == "a100" else "H100, FP8"
        assert f"| predicted | {count} {kind} | {sixty} days | {all_steps} days |\n" in readme


def test_an_engine_of_more_gpus_than_a_node_has_is_refused():
    config, dims = recipe("deepseek_v3")
    assert plan(config, dims, B200, LENGTHS).problems == ()
    assert plan(config, dims, replace(B200, per_node=4), LENGTHS).problems == (
        "engine.tensor: at most the 4 GPUs of a node: an engine lies on one host, got 8",
    )


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


def start(chosen, dims, *, reference=False):
    cells = trainer_cells("critic", dims, chosen, Head.VALUE, "bfloat16", reference=reference, on_gpu=True)
    return start_bytes(cells) / total_parameters(dims, Head.VALUE)


def test_weights_lie_beside_the_distributed_optimizers_buffer_until_they_have_moved_there():
    dims = model("llama3_8b")
    many = replace(trainer(data=1024), distributed_optimizer=True)
    # 2 B of weights, 2 B and 4 B of buffers, or in the end 2 B + 4 B, and 12 B of Adam's that replicas share
    assert start(many, dims) == pytest.approx(8, rel=1e-4)
    assert start(replace(many, layout=ParallelLayout()), dims) == pytest.approx(18, rel=1e-4)
    assert start(replace(many, layout=ParallelLayout(), optimizer_on_host=True), dims) == pytest.approx(8, rel=1e-4)
    assert start(many, dims, reference=True) == pytest.approx(8 + 12 / 1024, rel=1e-4)
    # eight pieces of four layers move one after the other; the first, with the embedding, has moved by then
    folded = replace(many, layout=ParallelLayout(pipeline=2, virtual_pipeline=8, data=512))
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    cells = trainer_cells("critic", dims, folded, Head.VALUE, "bfloat16", reference=False, on_gpu=True)
    assert start_bytes(cells) == pytest.approx(6 * (16 * layer + 128256 * 4096) + 2 * 2 * layer, rel=1e-3)


def test_what_fits_in_training_and_not_at_the_start_cannot_run():
    config, dims = recipe("qwen2.5_14b")
    layout = ParallelLayout(pipeline=2, data=32)
    config = replace(config, critic=replace(config.critic, layout=layout, tokens_per_microbatch=4096))
    at = dict(together(config, plan(config, dims, H100, LENGTHS).memory))
    room = at["critic at the start"] - 1
    assert at["critic"] < room
    tight = replace(H100, device=replace(H100.device, memory=room + H100.device.reserved))
    [problem] = plan(config, dims, tight, LENGTHS).problems
    assert problem.startswith("critic at the start: needs ")
    [laid] = [c for c in choices(config, dims, tight, LENGTHS, "critic", layout.world_size) if c.layout == layout]
    assert laid.problem.startswith("needs ")
    assert laid.bytes == room + 1


def test_models_that_share_devices_start_at_once():
    config, dims = shared()
    memory = plan(config, dims, H100, LENGTHS).memory
    at = {cell.name: cell.value for cell in memory}
    said = dict(together(config, memory))
    assert said["policy with critic at the start"] == at["policy.start"] + at["critic.start"]


def test_a_pipeline_holds_micro_batches_as_its_schedule_says():
    assert [pieces_in_flight(4, 1, stage) for stage in range(4)] == [4, 3, 2, 1]
    # warm-up of 2 (4 - 0 - 1) + (2 - 1) 4 = 10 pieces and one more, of two to a model
    assert pieces_in_flight(4, 2, 0) == 5.5


@pytest.mark.parametrize(
    ("axes", "budget", "flying"),
    [
        # 16 rows make 4 of each replica, and a row of 4,024 tokens fills more than half of 5,000
        ({"pipeline": 16, "data": 4}, 5000, 4),
        ({"pipeline": 16, "data": 4}, 8192, 2),
        ({"pipeline": 16, "data": 3, "first_stage_layers": 6, "last_stage_layers": 4}, 5000, 6),
        ({"pipeline": 2, "data": 4}, 5000, 2),  # what a full pipeline holds
        ({"pipeline": 16, "data": 2, "context": 2}, 5000, 4),  # 10,000 tokens of context ranks take two rows
        # interleaved, 4 become 16, and (2 x 15 + 4 x 16 + 1) / 5 = 19 would be held of more; 4 by 4 stay 4
        ({"pipeline": 16, "data": 4, "virtual_pipeline": 5}, 5000, 16),
        ({"pipeline": 4, "data": 4, "virtual_pipeline": 5}, 5000, 4),
    ],
)
def test_no_more_micro_batches_are_held_than_an_optimizer_step_has(axes, budget, flying):
    config, dims = recipe("qwen2.5_72b")
    layout = ParallelLayout(**axes)
    policy = replace(config.policy, layout=layout, tokens_per_microbatch=budget, recompute="none")
    config = replace(config, policy=policy, ppo=replace(config.ppo, minibatch_samples=16, kl_coef=0))
    roomy = replace(H100, device=replace(H100.device, memory=1e15))
    cells = {cell.name: cell for cell in plan(config, dims, roomy, LENGTHS).memory}
    assert f" x ({flying:g} micro-batches in flight x " in cells["policy.activations"].formula


def test_keys_and_values_by_hand():
    # 80 layers x (key + value) x 8 heads / 8 workers x 128 x 2 B
    assert kv_bytes_per_token(model("llama3_70b"), 8, "bfloat16") == 80 * 2 * 128 * 2
    # DeepSeek-V3: 61 layers x (512 + 64) x 2 B on every worker
    assert kv_bytes_per_token(model("deepseek_v3"), 8, "bfloat16") == 61 * 576 * 2


def alone(**changes):
    """A machine without what the others tell each other, unless given."""
    return replace(H100, device=replace(H100.device, **({"link": 1e30, "network": 1e30} | changes)))


def test_a_bubble_is_the_published_share_of_a_pipelines_time(monkeypatch):
    monkeypatch.setattr("megatron_rl.planner.times.LAUNCH_S", 0.0)
    work = Work(rows=64, row_tokens=1024)
    flat = trainer(pipeline=4, data=1)
    folded = trainer(pipeline=4, virtual_pipeline=2, data=1)
    batches = 64 * 1024 / 8192
    for chosen, virtual in ((flat, 1), (folded, 2)):
        found = pass_time(model("llama3_8b"), chosen, alone(), work, "bfloat16", backward=True)
        assert found.bubble == pytest.approx(found.arithmetic * 3 / virtual / batches)


def test_pieces_of_stages_wait_for_whole_groups_of_micro_batches(monkeypatch):
    monkeypatch.setattr("megatron_rl.planner.times.LAUNCH_S", 0.0)
    # two micro-batches on four stages of two pieces: the last one leaves after 4 x 2 + 1 turns of half a stage's time
    found = pass_time(
        model("llama3_8b"),
        trainer(pipeline=4, virtual_pipeline=2, data=1),
        alone(),
        Work(rows=16, row_tokens=1024),
        "bfloat16",
        backward=True,
    )
    assert found.total == pytest.approx(found.arithmetic / 2 * (4 * 2 + 1) / 2)


def test_stages_send_hidden_states_and_pieces_send_them_beside_arithmetic():
    # 8,192 tokens x 4,096 x 2 B, forward and back, over 0.75 x 450 GB/s
    hop = 8192 * 4096 * 2 / (0.75 * 450e9) + 12e-6
    work, dims = Work(rows=64, row_tokens=1024), model("llama3_8b")
    flat = pass_time(dims, trainer(pipeline=4), H100, work, "bfloat16", backward=True)
    folded = pass_time(dims, trainer(pipeline=4, virtual_pipeline=2), H100, work, "bfloat16", backward=True)
    assert flat.tensor == pytest.approx(8 * 2 * hop)
    assert flat.bubble == pytest.approx(3 * (flat.arithmetic / 8 + 2 * hop))
    assert folded.tensor == pytest.approx(8 * 2 * 2 * 12e-6)  # twice as many, of which the launch alone is left
    assert folded.bubble == pytest.approx(3 * (folded.arithmetic / 8 / 2 + 2 * hop))
    slow = pass_time(dims, trainer(pipeline=4, virtual_pipeline=2), alone(link=1e8), work, "bfloat16", backward=True)
    sent = 2 * 2 * 8192 * 4096 * 2 / (0.75 * 1e8)
    assert slow.tensor == pytest.approx(8 * 4 * 12e-6 + 8 * sent - slow.arithmetic)  # what arithmetic cannot hide


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


def test_tensor_ranks_gather_queries_keys_and_values_where_they_outnumber_key_and_value_heads():
    def seconds(heads):
        dims = replace(model("llama3_8b"), kv_heads=heads)
        chosen, work = trainer(tensor=8, sequence_parallel=True), Work(rows=8, row_tokens=1024)
        return pass_time(dims, chosen, H100, work, "bfloat16", backward=False).tensor

    # 8,192 tokens x (32 + 2 x 4) heads x 128 x 2 B, of which seven eighths come from others, in each of 32 layers
    assert seconds(4) - seconds(8) == pytest.approx(32 * (8192 * 40 * 128 * 2 * 7 / 8 / (0.75 * 450e9) + 12e-6))


def test_context_ranks_pass_keys_and_values_around_beside_the_scores():
    dims, chosen, work = model("llama3_8b"), trainer(context=2), Work(rows=8, row_tokens=8192)
    passed = 2 * 8192 * 2 * 8 * 128 / (0.75 * 450e9)  # of a micro-batch of 8,192 tokens a rank, in each of 32 layers
    scores = 8192 * 8192 * 2 * 4096 / (0.7 * 989e12)
    assert scores > passed

    def exchanged(device):
        found = pass_time(dims, chosen, Machine(device=device, per_node=8), work, "bfloat16", backward=False)
        return found.tensor / 4  # micro-batches

    assert exchanged(H100.device) == pytest.approx(32 * 12e-6)
    assert exchanged(replace(H100.device, link=45e9)) == pytest.approx(32 * (10 * passed - scores + 12e-6))
    elsewhere = replace(H100.device, capability=(0, 0))
    assert exchanged(elsewhere) == pytest.approx(32 * (passed + 12e-6))


def test_what_experts_are_sent_stays_in_a_node_in_part():
    h100 = replace(H100, device=replace(H100.device, link=400e9, network=100e9))
    assert h100.shuffle_time(8e9, 8) == pytest.approx(7e9 / (0.75 * 400e9))
    # of 32 ranks 7 others are in the node and 24 outside
    assert h100.shuffle_time(8e9, 32) == pytest.approx(6e9 / (0.75 * 100e9))


def test_each_stage_keeps_the_activations_of_its_own_layers():
    dims = model("llama3_8b")
    even, uneven = trainer(pipeline=4), trainer(pipeline=4, first_stage_layers=14)
    kept = {}
    for name, chosen in (("even", even), ("uneven", uneven)):
        cells = trainer_cells("policy", dims, chosen, Head.TOKEN, "bfloat16", reference=False, on_gpu=True)
        kept[name] = next(cell for cell in cells if cell.name == "policy.activations")
    each = layer_activation_bytes(dims, even, "bfloat16", sparse=False)
    # the first of four stages holds four micro-batches of its layers: 14 of them instead of 8
    assert kept["uneven"].value - kept["even"].value == pytest.approx(8192 * (14 - 8) * 4 * each)
    assert "4 micro-batches in flight x (14 layers x " in kept["uneven"].formula


@pytest.mark.parametrize(
    ("family", "elements"),
    [
        ("llama3_8b", 4 * 32 / 2 * 2 * 128),  # of 32 heads of 128, not of 8
        ("deepseek_v3", 4 * 128 / 2 * (128 + 64 + 128)),  # without positions, with, and values
    ],
)
def test_a_context_rank_keeps_keys_and_values_of_whole_rows_with_a_head_for_each_of_the_queries(family, elements):
    alone, shared = (
        layer_activation_bytes(model(family), trainer(tensor=2, context=ranks), "bfloat16", sparse=False)
        for ranks in (1, 4)
    )
    assert shared - alone == 2 * elements


@pytest.mark.parametrize(
    ("family", "elements"),
    [
        ("llama3_8b", 8 / 2 * 2 * 128),  # of 8 heads, as they are
        ("deepseek_v3", 128 / 2 * (128 + 64 + 128)),
    ],
)
def test_in_transformer_engines_ring_a_context_rank_keeps_keys_and_values_of_one_share(family, elements):
    alone, shared = (
        layer_activation_bytes(model(family), trainer(tensor=2, context=ranks), "bfloat16", sparse=False, ring=True)
        for ranks in (1, 4)
    )
    assert shared - alone == 2 * elements


@pytest.mark.parametrize(
    ("device", "dtype", "layers", "ring"),
    [
        ("h100", "bfloat16", "auto", True),
        ("b200", "bfloat16", "transformer_engine", True),
        ("h100", "bfloat16", "local", False),
        ("h100", "float32", "auto", False),
        ("a100-80g", "bfloat16", "auto", False),  # where flash-attn 2 may be missing
        ("cpu", "bfloat16", "auto", False),
    ],
)
def test_context_ranks_are_planned_in_a_ring_where_transformer_engines_attention_takes_packed_rows(
    device, dtype, layers, ring
):
    config, dims = recipe("qwen2.5_14b")
    policy = replace(config.policy, layout=ParallelLayout(context=8), recompute="none")
    roomy = replace(H100, device=replace(DEVICES[device], memory=1e15, host_memory=1e15))
    config = replace(config, policy=policy, model=replace(config.model, dtype=dtype, layers=layers))
    [found] = [c.value for c in plan(config, dims, roomy, LENGTHS).memory if c.name == "policy.activations"]
    said = {
        on: next(
            cell.value
            for cell in trainer_cells(
                "policy", dims, policy, Head.TOKEN, dtype, reference=True, on_gpu=True, ring=on, longest_row=4024
            )
            if cell.name == "policy.activations"
        )
        for on in (True, False)
    }
    assert said[True] < said[False]
    assert found == said[ring]


def test_the_stage_with_the_most_layers_sets_the_pace():
    work, dims = Work(rows=64, row_tokens=1024), model("llama3_8b")
    even, uneven = (
        pass_time(dims, chosen, H100, work, "bfloat16", backward=True, head=Head.VALUE)
        for chosen in (trainer(pipeline=4), trainer(pipeline=4, first_stage_layers=14))
    )
    assert uneven.arithmetic == pytest.approx(even.arithmetic * 14 / 8)


def test_a_policys_last_stage_has_the_output_layer_besides():
    work, dims = Work(rows=64, row_tokens=1024), model("llama3_8b")
    policy, critic = (
        pass_time(dims, trainer(pipeline=4), H100, work, "bfloat16", backward=False, head=head).arithmetic
        for head in (Head.TOKEN, Head.VALUE)
    )
    assert policy - critic == pytest.approx(64 * 1024 * 2 * 4096 * 128256 / (0.7 * 989e12))


def test_the_stage_that_holds_most_is_found_where_dense_layers_reach_into_the_second(monkeypatch):
    dims = model("deepseek_v3")
    ends = {"first_stage_layers": 2, "last_stage_layers": 1}
    chosen = trainer(tensor=8, sequence_parallel=True, expert=64, data=8, pipeline=31, **ends)

    def held():
        return device_bytes(trainer_cells("policy", dims, chosen, Head.TOKEN, "bfloat16", reference=False, on_gpu=True))

    found = held()
    monkeypatch.setattr("megatron_rl.planner.memory.unlike_stages", lambda dims, layout: range(layout.pipeline))
    assert found == held()


def test_of_stages_with_as_many_layers_the_one_with_experts_sets_the_pace():
    # the first three of 61 layers have no experts; each of DeepSeek-V3's other layers computes more and exchanges
    dims, work = model("deepseek_v3"), Work(rows=64, row_tokens=1024)
    ends = {"first_stage_layers": 3, "last_stage_layers": 2}
    chosen = trainer(pipeline=16, expert=8, data=8, **ends)
    free = alone(bandwidth=1e30)
    found = pass_time(dims, chosen, free, work, "bfloat16", backward=False, head=Head.VALUE)
    rows = 64 / 8
    assert found.arithmetic == pytest.approx(rows * 4 * dims.layer_flops(1024, sparse=True) / (0.7 * 989e12))
    dense = replace(dims, experts=replace(dims.experts, layers=tuple(range(7, 61))))  # the second stage has none either
    same = pass_time(dense, chosen, free, work, "bfloat16", backward=False, head=Head.VALUE)
    assert same.arithmetic == pytest.approx(found.arithmetic)


def test_products_of_linears_in_fp8_are_as_much_faster_as_published():
    dims, work = model("llama3_8b"), Work(rows=8, row_tokens=1024)
    free = alone(bandwidth=1e30)

    def seconds(machine=free, backward=True, **fields):
        chosen = replace(trainer(), fp8=FP8Config(**fields) if fields else None)
        return pass_time(dims, chosen, machine, work, "bfloat16", backward=backward).arithmetic

    linear = 8 * dims.linear_flops(1024, sparse=False) / (0.7 * 989e12)
    plain = seconds()
    assert plain - seconds(recipe="blockwise") == pytest.approx(3 * 32 * linear * (1 - 1 / 1.41))
    # the first and the last layer stay in bfloat16
    assert plain - seconds(recipe="tensorwise") == pytest.approx(3 * 30 * linear * (1 - 1 / 1.57))
    assert seconds(backward=False, recipe="blockwise", logprobs=False) == pytest.approx(seconds(backward=False))
    b200 = replace(free, device=replace(free.device, fp8=DEVICES["b200"].fp8))
    assert plain - seconds(machine=b200, recipe="mxfp8") == pytest.approx(3 * 32 * linear * (1 - 1 / 1.44))


def test_fp8_keeps_its_copies_of_the_weights_beside_them():
    dims = model("qwen2.5_14b")
    layout = ParallelLayout(tensor=2, sequence_parallel=True)
    linears = (5120 + 2 * 1024) * 5120 + 5120 * 5120 + 3 * 5120 * 13824

    def copies(**fields):
        chosen = replace(trainer(), layout=layout, fp8=FP8Config(**fields))
        cells = trainer_cells("policy", dims, chosen, Head.TOKEN, "bfloat16", reference=False, on_gpu=True)
        return [cell.value for cell in cells if cell.name == "policy.fp8_weights"]

    assert copies(recipe="blockwise") == [2 * 48 * linears / 2]
    assert copies(recipe="tensorwise") == [2 * 46 * linears / 2]
    assert copies(parameters=True) == []


def test_a_reference_that_scores_in_fp8_keeps_its_weights_as_rows():
    dims, layout = model("qwen2.5_14b"), ParallelLayout(tensor=2, sequence_parallel=True)
    linears = (5120 + 2 * 1024) * 5120 + 5120 * 5120 + 3 * 5120 * 13824

    def copies(*, reference=True, **fields):
        chosen = replace(trainer(), layout=layout, fp8=FP8Config(**fields))
        cells = trainer_cells("policy", dims, chosen, Head.TOKEN, "bfloat16", reference=reference, on_gpu=True)
        return [cell.value for cell in cells if cell.name == "policy.reference_fp8_weights"]

    assert copies() == [48 * linears / 2]
    assert copies(reference=False) == copies(logprobs=False) == copies(parameters=True) == []


@pytest.mark.parametrize("on_host", [False, True])
def test_an_optimizers_formula_gives_its_number_where_experts_are_shared_out(on_host):
    chosen = replace(trainer(data=8, expert=4), distributed_optimizer=True, optimizer_on_host=on_host)
    cells = trainer_cells(
        "policy", model("qwen3_30b_a3b"), chosen, Head.TOKEN, "bfloat16", reference=False, on_gpu=True
    )
    cell = next(c for c in cells if c.name == ("policy.host_optimizer" if on_host else "policy.optimizer"))
    found = re.match(
        r"\(([\d,]+) parameters / 8 replicas \+ ([\d,]+) of experts / 2 replicas\) .* x 12 B$", cell.formula
    )
    assert found, cell.formula
    dense, experts = (int(number.replace(",", "")) for number in found.groups())
    assert 12 * (dense / 8 + experts / 2) == pytest.approx(cell.value, rel=1e-4)


def test_products_take_their_flops_at_the_devices_share():
    work, dims = Work(rows=8, row_tokens=1024), model("llama3_8b")
    slow = replace(H100, device=replace(H100.device, bandwidth=1e30))
    found = pass_time(dims, trainer(), slow, work, "bfloat16", backward=False)
    assert found.total == pytest.approx(8 * dims.row_flops(1024) / (0.7 * 989e12))


def test_products_in_float32_take_the_devices_rate_of_float32():
    work, dims = Work(rows=8, row_tokens=1024), model("llama3_8b")
    free = alone(bandwidth=1e30)
    found = pass_time(dims, trainer(), free, work, "float32", backward=False)
    assert found.total == pytest.approx(8 * dims.row_flops(1024) / (0.7 * 67e12))
    step = decode_step_time(dims, EngineConfig(), free, "float32", sequences=8, context=1)
    assert step == pytest.approx(8 * dims.row_flops(1) / (0.7 * 67e12) + 3e-3)
    quantised = EngineConfig(quantization="fp8_per_channel")  # whose other products are of bfloat16
    steps = [
        decode_step_time(dims, quantised, free, dtype, sequences=8, context=1) for dtype in ("float32", "bfloat16")
    ]
    assert steps[0] == steps[1]
    assert DEVICES["cpu"].product_flops("float32") == DEVICES["cpu"].product_flops("bfloat16")


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


@pytest.mark.parametrize("ranks", [4, 16])
def test_adam_on_the_host_shares_the_nodes_memory_among_its_ranks(ranks):
    dims, work = model("llama3_8b"), Work(rows=128, row_tokens=1024)
    chosen = replace(trainer(data=ranks), distributed_optimizer=True, optimizer_on_host=True)
    found = update_time(dims, chosen, Head.TOKEN, H100, work, "bfloat16").optimizer
    # gradients down and weights up over 0.75 x 63 GB/s; 28 B an element at the rank's part of 0.8 x 614.4 GB/s
    mine = total_parameters(dims, Head.TOKEN) / ranks
    assert found == pytest.approx(mine * (6 / (0.75 * 63e9) + 28 * min(ranks, 8) / (0.8 * 614.4e9)))


def test_on_a_cpu_adam_takes_as_long_on_the_host_as_on_the_device():
    dims, work = model("llama3_8b"), Work(rows=8, row_tokens=1024)
    device, host = (replace(trainer(), distributed_optimizer=True, optimizer_on_host=on) for on in (False, True))
    cpu = replace(H100, device=DEVICES["cpu"])
    one, two = (update_time(dims, t, Head.TOKEN, cpu, work, "float32").optimizer for t in (device, host))
    assert one == two > 0


def test_a_step_of_an_engine_reads_all_weights_once():
    dims = model("llama3_8b")
    free = replace(H100, device=replace(H100.device, flops=1e30))
    engine = EngineConfig(count=1, tensor=1, max_concurrent=1)
    responses = Responses(mean=100, longest=100)
    found = rollout_time(dims, engine, free, "bfloat16", samples=1, prompt_tokens=1, responses=responses)
    weights, cache = 8.0303e9 * 2, 51 * 2 * 32 * 8 * 128 * 2
    assert found.full == 0
    assert found.tail == pytest.approx(100 * ((weights + cache) / (0.8 * 3.35e12) + 3e-3), rel=1e-3)


@pytest.mark.parametrize(
    ("quantization", "scales"),
    [
        # of q with k and v, attention's output, gate with up, down, as one of two workers has them
        ("fp8_per_channel", 3072 + 4096 + 14336 + 4096),
        ("fp8_per_tensor", 4),
        ("fp8_per_block", 24 * 32 + 32 * 16 + 112 * 32 + 32 * 56),
    ],
)
def test_a_quantised_engine_holds_a_byte_for_each_weight_of_its_linears_and_their_scales(quantization, scales):
    dims = model("llama3_8b")
    linears, norms = 6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336, (2 * 32 + 1) * 4096
    rest = total_parameters(dims, Head.TOKEN) - 32 * linears - norms
    engine = EngineConfig(quantization=quantization, tensor=2)
    for dtype in ("bfloat16", "float32"):  # what is not quantised is bfloat16 in either case
        weights = next(cell for cell in engine_cells(dims, engine, dtype) if cell.name == "engine.weights")
        assert weights.value == 2 * (rest / 2 + norms) + 32 * (linears / 2 + 4 * scales)


def test_each_worker_of_an_engine_has_the_whole_of_what_vllm_does_not_cut():
    def held(name, workers):
        dims = model(name)
        cells = engine_cells(dims, EngineConfig(tensor=workers), "bfloat16")
        weights = next(cell.value for cell in cells if cell.name == "engine.weights")
        return weights, total_parameters(dims, Head.TOKEN)

    # latents, keys' rotary part, routers; norms of inputs, feed-forward blocks and latents, and the last one
    weights, count = held("deepseek_v3", 8)
    whole = 61 * 7168 * (1536 + 512 + 64) + 58 * 7168 * 256 + 61 * (2 * 7168 + 1536 + 512) + 7168
    assert weights == 2 * (whole + (count - whole) / 8)
    # each of 16 workers has one of 8 key/value heads
    weights, count = held("llama3_70b", 16)
    norms, head = (2 * 80 + 1) * 8192, 80 * 2 * 128 * 8192
    assert weights == pytest.approx(2 * (norms + (count - norms - 8 * head) / 16 + head))


@pytest.mark.parametrize(
    ("device", "least"),
    [
        # 4,024 tokens are 252 blocks of 16 and one that stays empty: 4,048 x 48 layers x 2 x 4 heads x 128 x 2 B
        ("h100", 380),
        # 32 blocks of 128 and one
        ("cpu", 396),
    ],
)
def test_a_cache_that_cannot_hold_one_sequence_is_a_contradiction(device, least):
    config, dims = recipe("qwen2.5_14b")
    config = replace(config, cluster=replace(config.cluster, device=device))

    def problems(cache):
        return list(replace(config, engine=replace(config.engine, tensor=2, kv_cache_mib=cache)).contradictions(dims))

    assert problems(least) == []
    said = f"engine.kv_cache_mib: must hold one sequence of 4,024 tokens, at least {least}, got {least - 1}"
    assert problems(least - 1) == [said]


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
    responses = Responses(mean=100, longest=100)
    found = rollout_time(dims, engine, free, "bfloat16", samples=1, prompt_tokens=1, responses=responses)
    linears = 32 * (6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336)
    weights, cache = 8.0303e9 * 2 - linears, 51 * 2 * 32 * 8 * 128
    assert found.tail == pytest.approx(100 * ((weights + cache) / (0.8 * 3.35e12) + 3e-3), rel=1e-3)


def test_products_of_a_quantised_engine_are_faster():
    dims = model("llama3_8b")
    free = replace(H100, device=replace(H100.device, bandwidth=1e30))

    def prefill(quantization):
        engine, responses = EngineConfig(quantization=quantization), Responses(mean=1, longest=1)
        return rollout_time(dims, engine, free, "bfloat16", samples=8, prompt_tokens=1024, responses=responses).prefill

    linear = 8 * 32 * dims.linear_flops(1024, sparse=False) / (0.7 * 989e12)
    # the output layer is computed for the last token of a prompt alone
    assert prefill("none") == pytest.approx(
        8 * (dims.row_flops(1024) - dims.output_flops(1024) + dims.output_flops(1)) / (0.7 * 989e12)
    )
    assert prefill("none") - prefill("fp8_per_channel") == pytest.approx(linear * (1 - 1 / 1.57))
    assert prefill("none") - prefill("fp8_per_block") == pytest.approx(linear * (1 - 1 / 1.41))


def test_samples_of_a_prompt_share_it_in_the_cache_and_are_read_one_by_one():
    dims, responses = model("llama3_8b"), Responses(mean=100, longest=100)
    each = 32 * 2 * 8 * 128 * 2
    # of 8 prompts of 8,000 tokens once, and of 64 responses 50 tokens at a time
    engine = EngineConfig(kv_cache_mib=math.ceil((8 * 8000 + 64 * 50) * each / 2**20), max_concurrent=64)

    def seconds(shared, samples=64):
        return rollout_time(
            dims,
            engine,
            H100,
            "bfloat16",
            samples=samples,
            prompt_tokens=8000,
            responses=responses,
            samples_per_prompt=shared,
        )

    alone, together = seconds(1), seconds(8)
    last = 64 * dims.output_flops(1) / (0.7 * 989e12)
    assert together.prefill - last == pytest.approx((alone.prefill - last) / 8)
    assert together.full == 0 < alone.full
    step = decode_step_time(dims, engine, H100, "bfloat16", sequences=64, context=8050)
    assert together.tail == pytest.approx(100 * step, rel=1e-3)


def test_lengths_of_responses_by_hand():
    free = Responses(mean=100, longest=100_000)  # exponential: the limit is never met
    assert free.alive(100) == pytest.approx(math.exp(-1), rel=1e-3)
    assert free.running == pytest.approx(100, rel=1e-3)  # without memory: what is over is as long as what is to come
    assert free.longest_of(8, steps=20_000) == pytest.approx(100 * sum(1 / n for n in range(1, 9)), rel=1e-3)
    cut = Responses(mean=100 * (1 - math.exp(-2)), longest=200)
    assert cut.alive(100) == pytest.approx(math.exp(-1))
    assert cut.alive(200) == 0
    # of min(l, 200): E[l^2] = 2 x 100^2 (1 - 3 exp(-2)), E[l] = 100 (1 - exp(-2))
    assert cut.running == pytest.approx(100 * (1 - 3 * math.exp(-2)) / (1 - math.exp(-2)))
    assert cut.longest_of(10_000) == pytest.approx(200, rel=1e-3)
    fixed = Responses(mean=50, longest=50)
    assert (fixed.alive(49), fixed.alive(50), fixed.running) == (1, 0, 25)


def test_scores_go_by_the_square_of_each_rows_length_in_training():
    # exponential: E[l^2] = 2 x 1000^2, so E[(50 + l)^2] / E[50 + l] = (50^2 + 2 x 50 x 1000 + 2 x 1000^2) / 1050
    met = Responses(mean=1000, longest=1e6).token_row(50)
    assert met == pytest.approx((2500 + 100_000 + 2_000_000) / 1050)
    assert Responses(mean=1000, longest=1000).token_row(50) == pytest.approx(1050)
    # of many rows drawn so, one by one
    dims, free = model("llama3_8b"), alone(bandwidth=1e30)
    rows = [50 - 1000 * math.log1p(-(place + 0.5) / 20_000) for place in range(20_000)]
    mean = sum(rows) / len(rows)
    flops = sum(dims.row_flops(1) * row + 32 * dims.score_flops(1) * (row**2 - row) for row in rows)
    work = Work(rows=len(rows), row_tokens=mean, token_row=met)
    found = pass_time(dims, trainer(), free, work, "bfloat16", backward=False)
    assert found.total == pytest.approx(flops / (0.7 * 989e12), rel=1e-3)


def test_a_recipes_rows_vary_in_its_updates_and_passes():
    config, dims = recipe("qwen3_30b_a3b")
    config = replace(config, rollout=replace(config.rollout, max_response_tokens=32768))
    long, free = Lengths(prompt=100, response=8000), alone(bandwidth=1e30, link=1e30)
    passes, update = role_seconds(config, dims, free, long, "critic", config.critic)
    met = Responses(mean=8000, longest=32768).token_row(100)
    assert met > 1.5 * 8100
    work = Work(rows=config.samples_per_step, row_tokens=8100, token_row=met)
    said = pass_time(dims, config.critic, free, work, "bfloat16", backward=False, head=Head.VALUE)
    assert passes.value == pytest.approx(said.total)
    part = replace(work, rows=config.ppo.minibatch_samples)
    each = update_time(dims, config.critic, Head.VALUE, free, part, "bfloat16")
    assert update.value == pytest.approx(config.updates_per_step * each.total)


def test_a_rollout_waits_for_its_longest_response():
    dims, engine = model("llama3_8b"), EngineConfig(count=4, max_concurrent=64, kv_cache_mib=32768)

    def seconds(samples, **lengths):
        return rollout_time(
            dims, engine, H100, "bfloat16", samples=samples, prompt_tokens=100, responses=Responses(**lengths)
        )

    few = seconds(4, mean=200, longest=4000)
    one = seconds(4, mean=200, longest=200)
    assert few.tail > 2 * one.tail  # the longest of four is 2.08 times the mean, and reads more
    many = seconds(1024, mean=200, longest=4000)
    # 256 samples on each engine: 192 wait for 64 places, which turn over every 200 steps
    step = decode_step_time(dims, engine, H100, "bfloat16", sequences=64, context=300)
    assert many.full == pytest.approx(192 * 200 / 64 * step, rel=1e-3)
    assert many.tail > few.tail


def test_weights_that_the_trainer_quantised_travel_to_the_engines_in_a_byte_each():
    config, dims = recipe("qwen2.5_14b")
    engine = replace(config.engine, quantization="fp8_per_channel")

    def seconds(by):
        changed = replace(config, engine=engine, sync=replace(config.sync, quantised_by=by))
        return next(c.value for c in plan(changed, dims, H100, LENGTHS).times if c.name == "time.push")

    # query with key and value, output, gate with up, down: widths of 5,120 and 13,824, keys of 1,024
    elements = 48 * 5120 * (5120 + 2 * 1024 + 5120 + 3 * 13824)
    scales = 48 * 4 * (5120 + 2 * 1024 + 5120 + 2 * 13824 + 5120)
    assert seconds("engine") - seconds("trainer") == pytest.approx((elements - scales) / H100.link(32))
    assert seconds("engine") == pytest.approx(2 * 2 * total_parameters(dims, Head.TOKEN) / H100.link(32))


def test_a_row_longer_than_a_micro_batch_is_one_and_context_ranks_share_it():
    dims = model("llama3_8b")

    def activations(longest, **axes):
        cells = trainer_cells(
            "policy", dims, trainer(**axes), Head.VALUE, "bfloat16", reference=False, on_gpu=True, longest_row=longest
        )
        return next(cell.value for cell in cells if cell.name == "policy.activations")

    assert activations(8192) == activations(0)
    assert activations(32768) == 4 * activations(0)
    for context in (2, 4):
        tokens = 32768 // context
        gathered = 2 * context * 32 * 2 * 128 * 32  # keys and values of whole rows, 32 heads of 128, 32 layers
        assert activations(32768, context=context) == tokens / 8192 * activations(0) + tokens * gathered


REFUSED = {
    "a contradiction": (lambda c: replace(c, critic=None), "h100", "critic: required with ppo.advantage='gae'"),
    "too long": (
        lambda c: replace(c, rollout=replace(c.rollout, max_response_tokens=200_000)),
        "h100",
        "rollout.max_response_tokens: prompt (",
    ),
    "a cache of less than a sequence": (
        lambda c: replace(c, engine=replace(c.engine, tensor=1, kv_cache_mib=700)),
        "h100",
        "engine.kv_cache_mib: must hold one sequence of 4,024 tokens, at least 759, got 700",
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
    "an FP8 engine on an old GPU": (
        lambda c: replace(c, engine=replace(c.engine, quantization="fp8_per_channel")),
        "a100-80g",
        "engine.quantization: 'fp8_per_channel' needs a GPU of compute capability 8.9 or higher",
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
    text = report(
        replace(config, critic=None), dims, device="h100", per_node=8, nodes=None, lengths=LENGTHS, explain=None
    ).text
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


def test_element_wise_work_that_no_kernel_fuses_moves_as_many_times_the_bytes():
    work, dims = Work(rows=64, row_tokens=2048), model("llama3_8b")

    def taken(**changed):
        return pass_time(dims, trainer(), alone(flops=1e30, **changed), work, "bfloat16", backward=True).arithmetic

    assert taken(unfused=5.0) == pytest.approx(5 * taken())


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
        device = replace(H100.device, memory=room + 3 * H100.device.reserved)  # of policy, critic and engine
        return [text.partition(":")[0] for text in plan(config, dims, replace(H100, device=device), LENGTHS).problems]

    assert problems(both) == []
    assert problems(both - 1) == ["policy with critic"]
    assert problems(held["engine"] - 1) == ["policy with critic", "policy with critic at the start", "engine"]


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
    room = H100.device.memory - 3 * H100.device.reserved
    fits = [c for c in choices(config, dims, H100, LENGTHS, "policy", 16) if not c.problem]
    assert fits
    assert all(choice.bytes + critic <= room for choice in fits)
    alone = [c for c in choices(recipe("qwen2.5_14b")[0], dims, H100, LENGTHS, "policy", 16) if not c.problem]
    assert len(alone) > len(fits)


@pytest.mark.parametrize("parity", [True, False])
@pytest.mark.parametrize("role", ["policy", "critic"])
def test_layouts_that_can_be_can_be_planned(role, parity):
    """With the engine on the same devices, whose cache leaves little to the weights beside it."""
    config, dims = shared(parity=ParityConfig(enabled=parity))

    def judged(cache):
        tight = replace(config, engine=replace(config.engine, count=16, kv_cache_mib=cache))
        for choice in choices(tight, dims, H100, LENGTHS, role, 16):
            laid = replace(tight, **{role: replace(tight.trainers[role], layout=choice.layout)})
            yield choice.problem, plan(laid, dims, H100, LENGTHS).problems

    tight, loose = list(judged(41728)), list(judged(39680))
    assert all(not planned for problem, planned in tight + loose if not problem)
    assert any(not problem for problem, _ in loose)
    if parity:  # 73.6 GB of an engine leave 5.3 GB to the weights of both models
        said = "parity.enabled: engine with policy.weights, critic.weights: needs "
        assert all(problem for problem, _ in tight)
        assert any(problem.startswith(said) for problem, _ in tight)


def test_what_does_not_fit_says_how_much_is_missing():
    config, dims = recipe("qwen2.5_14b")
    found = choices(config, dims, H100, LENGTHS, "policy", 16)
    assert [c.problem == "" for c in found] == sorted((c.problem == "" for c in found), reverse=True)
    refused = {str(c.layout): c.problem for c in found if c.problem}
    assert "GB of a device's 82.9 GB" in refused["TP1 PP1 DP16"]


def test_layouts_are_searched_over_context_ranks_pieces_and_experts():
    config, dims = recipe("qwen2.5_72b")
    dense = choices(config, dims, H100, LENGTHS, "policy", 64)
    assert {c.layout.context for c in dense} == {1, 2, 4, 8}
    assert all(c.layout.world_size == 64 for c in dense)
    folded = [c for c in dense if c.layout.virtual_pipeline > 1]
    assert folded
    for choice in folded:  # more pieces hold more and wait less
        flat = replace(config.policy, layout=replace(choice.layout, virtual_pipeline=1))
        cells = trainer_cells("policy", dims, flat, Head.TOKEN, "bfloat16", reference=True, on_gpu=True)
        assert device_bytes(cells) < choice.bytes
        assert sum(c.value for c in role_seconds(config, dims, H100, LENGTHS, "policy", flat)) > choice.seconds
    assert not any(dims.layout_problems(c.layout) for c in dense if not c.problem)
    config, dims = recipe("qwen3_30b_a3b")
    sparse = {c.layout for c in choices(config, dims, H100, LENGTHS, "policy", 32)}
    assert {(layout.expert, layout.expert_tensor) for layout in sparse if layout.tensor == 2} == {
        (1, 2), (2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (2, 2), (4, 2), (8, 2), (16, 2)
    }  # fmt: skip


def test_stages_that_cannot_have_equal_layers_give_fewer_to_the_ends():
    config, dims = recipe("deepseek_v3")
    found = {str(c.layout) for c in choices(config, dims, H100, LENGTHS, "policy", 512)}
    assert str(config.policy.layout) in found  # 3, fourteen times 4, 2 of 61 layers
    assert "TP8+SP PP2(31..30) DP32 EP128" in found


def test_long_rows_fit_with_context_ranks_alone():
    config, dims = recipe("qwen2.5_14b")
    rollout = replace(config.rollout, max_response_tokens=130_000)
    config = replace(config, rollout=rollout, policy=replace(config.policy, recompute="none"))
    found = choices(config, dims, H100, Lengths(prompt=100, response=8000), "policy", 64)
    fits = {c.layout.context for c in found if not c.problem}
    assert fits
    assert 1 not in fits


def test_the_layouts_shown_are_the_fastest_of_their_kind_and_the_smallest_and_the_reasons_few():
    config, dims = recipe("deepseek_v3")
    text = report(config, dims, device="h100", per_node=8, nodes=None, lengths=LENGTHS, explain=None).text
    lines = text.partition("policy on 512 devices")[2].partition("critic on")[0].splitlines()
    shown = [re.fullmatch(r"  TP(\d+)\S* PP(\d+).* (\S+) s +(\S+) GB", line) for line in lines]
    found = [(line[1], line[2], float(line[3]), float(line[4])) for line in shown if line]
    every = [c for c in choices(config, dims, H100, LENGTHS, "policy", 512) if not c.problem]
    assert len(found) == 6
    assert found[0][2] == pytest.approx(every[0].seconds, abs=0.01)
    assert [line[2] for line in found[:5]] == sorted(line[2] for line in found[:5])
    assert len({line[:2] for line in found[:5]}) == 5
    assert found[5][3] == pytest.approx(min(c.bytes for c in every) / 1e9, abs=0.1)
    assert f"  {len(every) - 6} more can be" in lines
    reasons = [line for line in lines if line.startswith("  no: ")]
    assert 1 <= len(reasons) <= 6
    assert any("GB of a device's 82.9 GB" in line for line in reasons)


def test_options_out_of_range_are_refused_together(capsys):
    recipe = str(ROOT / "examples" / "beyond_7b" / "qwen2.5_14b.toml")
    path = f"model.path={ROOT / 'examples' / 'beyond_7b' / 'models' / 'qwen2.5_14b'}"
    wrong = [
        "--gpus-per-node",
        "0",
        "--nodes",
        "0",
        "--device",
        "tpu",
        "--prompt-tokens",
        "0",
        "--response-tokens=5000",
    ]
    assert main(["plan", recipe, path, *wrong]) == 2
    said = capsys.readouterr().err
    assert "--gpus-per-node must be at least 1, got 0" in said
    assert "--nodes must be at least 1, got 0" in said
    assert "--device must be one of a100-80g, h100, h200, b200, cpu, got tpu" in said
    assert "--prompt-tokens must be above 0 and at most data.max_prompt_tokens=1024, got 0" in said
    assert "--response-tokens must be above 0 and at most rollout.max_response_tokens=3000, got 5000" in said


def test_a_recipe_names_the_machine_that_it_is_planned_for_and_options_another(capsys):
    recipe = str(ROOT / "examples" / "beyond_7b" / "qwen2.5_14b.toml")
    path = f"model.path={ROOT / 'examples' / 'beyond_7b' / 'models' / 'qwen2.5_14b'}"

    def first_line(*more):
        assert main(["plan", recipe, path, *more]) == 0
        return capsys.readouterr().out.partition(";")[0]

    assert first_line() == "48 x h100 (6 nodes of 8)"
    named = ("cluster.device=a100-80g", "cluster.gpus_per_node=16")
    assert first_line(*named) == "48 x a100-80g (3 nodes of 16)"
    assert first_line(*named, "--device", "h200", "--gpus-per-node", "4") == "48 x h200 (12 nodes of 4)"


def test_a_recipe_may_name_every_device_of_the_table_and_no_other():
    (named, _) = get_args(get_type_hints(ClusterConfig)["device"])
    assert get_args(named) == tuple(DEVICES)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name, device):
    assert [key for key, known in DEVICES.items() if known.is_named(name)] == ([device] if device else [])


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ((), 0, "48 x h100"),
        (("--nodes", "5"), 1, "DOES NOT FIT: the recipe's layouts take 48 devices, 5 nodes have 40"),
        (("engine.kv_cache_mib=81920",), 1, "CANNOT RUN: engine: needs "),
        (("ppo.minibatch_samples=100",), 1, "CANNOT RUN: ppo.minibatch_samples: must divide"),
        (("engine.kv_cache_mib=81920", "--explain", "engine.kv_cache"), 0, "engine.kv_cache = 85.899 GB"),
    ],
)
def test_the_exit_status_says_whether_the_recipe_can_run(more, status, said, capsys):
    recipe = str(ROOT / "examples" / "beyond_7b" / "qwen2.5_14b.toml")
    path = f"model.path={ROOT / 'examples' / 'beyond_7b' / 'models' / 'qwen2.5_14b'}"
    assert main(["plan", recipe, path, *more]) == status
    assert said in capsys.readouterr().out


def test_the_hours_of_a_run_say_what_they_leave_out():
    def told(config, dims):
        text = report(config, dims, device="h100", per_node=8, nodes=None, lengths=LENGTHS, explain=None).text
        return next(line for line in text.splitlines() if "device-hours" in line).partition(", without ")[2]

    config, dims = recipe("qwen2.5_14b")
    assert told(config, dims) == "starting, evaluations, saves"
    config, dims = shared()
    sampled = replace(config, rollout=replace(config.rollout, sampling_rounds=3))
    assert told(sampled, dims) == (
        "starting, evaluations, saves, moves to the host and back, rollout rounds 2 to 3 of dynamic sampling"
    )


def timed(config, dims, seconds):
    """The plan's text with this ``cluster.call_deadline_s``, and whether it can run."""
    limited = replace(config, cluster=replace(config.cluster, call_deadline_s=seconds))
    found = report(limited, dims, device="h100", per_node=8, nodes=None, lengths=LENGTHS, explain=None)
    return found.text.splitlines(), found.can_run


def test_single_calls_are_those_that_the_driver_waits_for():
    config, dims = recipe("qwen2.5_14b")
    found = plan(config, dims, H100, LENGTHS)
    at = {cell.name: cell.value for cell in found.times}
    calls = {call.name: call.seconds for call in found.calls}
    assert calls["an engine's share of a rollout"] == pytest.approx(at["time.rollout"])
    assert calls["a pass of the policy over a rollout"] == pytest.approx(at["time.policy.scoring"] / 2)  # and reference
    assert calls["a pass of the critic over a rollout"] == pytest.approx(at["time.critic.scoring"])
    for role in ("policy", "critic"):
        assert calls[f"an update of the {role}"] == pytest.approx(at[f"time.{role}.updates"] / config.updates_per_step)
    rollout = replace(config.rollout, samples_per_prompt=4)
    evaluation = EvaluationConfig(prompts=512, samples=4, temperature=1.0)
    half = replace(config, prompts_per_step=512, rollout=rollout, evaluation=evaluation)
    calls = {call.name: call.seconds for call in plan(half, dims, H100, LENGTHS).calls}
    assert calls["an engine's share of an evaluation"] == calls["an engine's share of a rollout"]
    full = replace(LENGTHS, response=config.rollout.max_response_tokens)
    longest = {call.name: call.seconds for call in plan(config, dims, H100, full).calls}
    assert {call.name: call.longest for call in found.calls} == longest
    assert found.calls[0].longest == max(longest.values()) > found.calls[0].seconds


def test_an_evaluation_draws_no_more_prompts_than_the_file_has(tmp_path):
    config, dims = recipe("qwen2.5_14b")
    file = tmp_path / "heldout.jsonl"
    file.write_text("{}\n" * 50)
    fifty = replace(config, evaluation=replace(config.evaluation, prompts=50))
    there = replace(config, data=replace(config.data, heldout=file))
    one, two, more = (
        next(call.seconds for call in plan(each, dims, H100, LENGTHS).calls if "evaluation" in call.name)
        for each in (fifty, there, config)
    )
    assert one == two < more


def test_a_study_runs_what_may_only_be_late():
    config, dims = recipe("qwen2.5_14b")
    found = plan(replace(config, cluster=replace(config.cluster, call_deadline_s=1.0)), dims, H100, LENGTHS)
    assert found.problems == ()
    assert found.late.startswith("cluster.call_deadline_s: must be longer than an engine's share of a rollout")


def test_a_recipe_whose_longest_call_takes_longer_than_its_limit_cannot_run_and_is_told_what_to_raise():
    config, dims = recipe("qwen2.5_14b")
    call = plan(config, dims, H100, LENGTHS).calls[0]
    lines, can_run = timed(config, dims, call.seconds - 1)
    assert not can_run
    assert lines[1] == (
        "CANNOT RUN: cluster.call_deadline_s: must be longer than an engine's share of a rollout, which is one call of "
        f"about {call.seconds:,.0f} s, got {call.seconds - 1:g}: raise it to {call.roomy_limit}"
    )
    assert not any("MAY BE LATE" in line for line in lines)
    for limit in (call.seconds + 1, 2 * call.longest - 1):
        lines, can_run = timed(config, dims, limit)
        assert can_run
        assert lines[1] == (
            "MAY BE LATE: cluster.call_deadline_s: should be twice the longest call or more, an engine's share of a "
            f"rollout of {call.longest:,.0f} s with the longest responses, got {limit:g}: raise it to "
            f"{call.roomy_limit}"
        )
    lines, can_run = timed(config, dims, call.roomy_limit)
    assert can_run
    assert not any("MAY BE LATE" in line or "CANNOT RUN" in line for line in lines)
    assert (
        f"longest call: an engine's share of a rollout, {call.seconds:,.0f} s ({call.longest:,.0f} s with the longest "
        f"responses); its limit: cluster.call_deadline_s={call.roomy_limit}"
    ) in lines


def test_a_supervised_stage_waits_for_updates_alone():
    file = SEEDS.with_name("sft_math_8k.toml")
    found = plan(parse(SFTConfig, [file]), model("qwen2.5_math_7b"), H100, LENGTHS)
    assert [(call.name, call.seconds, call.longest) for call in found.calls] == [
        ("an update of the trainer", found.step_seconds, found.step_seconds)
    ]


@pytest.mark.parametrize("tokens", ["0", "-5"])
def test_rows_of_a_dry_run_have_at_least_one_token(tokens, capsys):
    recipe = str(ROOT / "examples" / "beyond_7b" / "qwen2.5_14b.toml")
    path = f"model.path={ROOT / 'examples' / 'beyond_7b' / 'models' / 'qwen2.5_14b'}"
    assert main(["dry-run", recipe, path, f"--row-tokens={tokens}"]) == 2
    assert f"--row-tokens must be at least 1, got {tokens}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "dry-run"])
def test_a_model_that_is_not_there_is_named_by_its_key(command, capsys):
    recipe = str(ROOT / "examples" / "beyond_7b" / "qwen2.5_14b.toml")
    assert main([command, recipe, "model.path=/nowhere"]) == 2
    assert "model.path: a model folder needs a config.json, found none in /nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "dry-run"])
def test_weights_that_training_refuses_are_refused(command, tmp_path, capsys):
    recipe = str(ROOT / "examples" / "beyond_7b" / "qwen2.5_14b.toml")
    model = ROOT / "examples" / "beyond_7b" / "models" / "qwen2.5_14b"
    sizes = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"quantization_config": {"quant_method": "fp8"}}))
    assert main([command, recipe, f"model.path={tmp_path}"]) == 2
    assert "model.path: config.json must have no quantization_config" in capsys.readouterr().err


def test_legal_minibatches_divide_the_samples_and_feed_every_replica():
    config, _ = recipe("qwen3_30b_a3b")
    assert legal_minibatches(config) == [4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]


def test_sizes_below_one_are_a_problem_and_no_crash():
    config, dims = recipe("qwen2.5_14b")
    none = replace(config.policy, layout=ParallelLayout(data=0))
    text = report(
        replace(config, policy=none, critic=none),
        dims,
        device="h100",
        per_node=8,
        nodes=None,
        lengths=LENGTHS,
        explain=None,
    ).text
    assert "CANNOT RUN: policy.layout: data must be at least 1, got 0" in text


def explained(cell, device="h100"):
    config, dims = recipe("qwen2.5_14b")
    return report(config, dims, device=device, per_node=8, nodes=None, lengths=LENGTHS, explain=cell).text


def test_any_cell_explains_itself_with_its_numbers():
    assert explained("engine.kv_cache").startswith("engine.kv_cache = 17.180 GB = engine.kv_cache_mib=16384: ")
    with pytest.raises(ValueError, match=r"--explain must name one of engine\.weights, .*, got policy\.x"):
        explained("policy.x")
    with pytest.raises(ValueError, match="--device must be one of a100-80g, h100, h200, b200, cpu, got tpu"):
        explained("policy.weights", device="tpu")


def test_what_others_published_is_drawn_beside_the_predictions_of_the_page():
    spec = importlib.util.spec_from_file_location("make_scaling", ROOT / "docs" / "make_scaling.py")
    make_scaling = importlib.util.module_from_spec(spec)
    sys.modules["make_scaling"] = make_scaling  # where dataclasses look
    spec.loader.exec_module(make_scaling)
    points, page = make_scaling.published_points(), (ROOT / "docs" / "scaling.md").read_text()
    assert {point.name.partition(" ")[0] for point in points} == {"NeMo-Aligner", "NeMo-RL", "Megatron-Bridge"}
    for point in points:
        assert f"| {point.error} |" in page
        shown = f"{point.predicted:,.0f}" if "token" in point.unit else f"{point.predicted:.1f}"
        assert f"| {shown} | {point.published:,} |" in page
    axes = Figure().subplots()
    make_scaling.labelled(axes, {p.name: ({"ours": p.predicted, "theirs": p.published}, p.error) for p in points})
    assert [bar.get_width() for bar in axes.patches] == [w for p in points for w in (p.predicted, p.published)]
    assert [text.get_text() for text in axes.texts] == [point.error for point in points]
    assert [label.get_text() for label in axes.get_yticklabels()] == [point.name for point in points]


def test_the_page_on_scaling_is_what_the_planner_says():
    script = ROOT / "docs" / "make_scaling.py"
    done = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, "run python docs/make_scaling.py"
