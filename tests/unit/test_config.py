from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from megatron_rl import device
from megatron_rl.assemble.audit import check_engine
from megatron_rl.assemble.runs import _leave_settings
from megatron_rl.config.load import ConfigError, annotated, dump, load, load_any, origins
from megatron_rl.config.precision import FP8Config
from megatron_rl.config.schema import EngineConfig, OptimizerConfig, RunConfig, SFTConfig, SyncConfig, TrainerConfig
from megatron_rl.ray_runtime.cluster import ClusterProblem

MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 384,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 3,
}
BLOCKS = {"hidden_size": 128, "intermediate_size": 256}
"""With these, 128 divides what its linears read."""

PPO = """
run_dir = "runs/test"
steps = 4
prompts_per_step = 8

[model]
path = "model"

[data]
train = "train.jsonl"
heldout = "heldout.jsonl"
max_prompt_tokens = 64

[rollout]
samples_per_prompt = 4
max_response_tokens = 48

[ppo]
minibatch_samples = 16

[policy]
layout = { tensor = 2 }
[policy.optimizer]
lr = 1e-4

[critic]
[critic.optimizer]
lr = 1e-3
"""

SFT = """
run_dir = "runs/warmup"
output = "runs/base"
data = "train.jsonl"
steps = 3
samples_per_step = 4
[model]
path = "model"
[trainer.optimizer]
lr = 1e-3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a model, data and both configurations."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(MODEL))
    Path("model/tokenizer.json").write_text("{}")
    Path("train.jsonl").touch()
    Path("heldout.jsonl").touch()
    Path("ppo.toml").write_text(PPO)
    Path("sft.toml").write_text(SFT)
    return tmp_path


def problems(*overrides, root=RunConfig, files=("ppo.toml",)):
    with pytest.raises(ConfigError) as failure:
        load(root, [Path(file) for file in files], overrides)
    first, *lines = str(failure.value).splitlines()
    assert first == f"{len(lines)} problem(s) in the configuration:"
    return [line.strip() for line in lines]


def test_a_file_becomes_a_configuration(folder):
    config = load(RunConfig, [Path("ppo.toml")])
    assert (config.steps, config.samples_per_step, config.updates_per_step) == (4, 32, 2)
    assert config.policy.layout.tensor == 2
    assert config.critic.optimizer.lr == 1e-3
    assert config.ppo.clip_high == 0.2
    assert load(SFTConfig, [Path("sft.toml")]).trainer.optimizer.lr == 1e-3


def test_later_files_and_overrides_win(folder):
    Path("more.toml").write_text("steps = 5\n[ppo]\nclip_high = 0.28\n")
    overrides = ["ppo.clip_low=0.1", "model.dtype=float32", "rollout.stop=['a', 'b']", "policy.layout.tensor=1"]
    config = load(RunConfig, [Path("ppo.toml"), Path("more.toml")], overrides)
    assert (config.steps, config.ppo.clip_high, config.ppo.clip_low) == (5, 0.28, 0.1)
    assert config.ppo.minibatch_samples == 16
    assert (config.model.dtype, config.rollout.stop, config.policy.layout.tensor) == ("float32", ("a", "b"), 1)


def test_the_resolved_configuration_is_json_and_loads_again(folder):
    config = load(RunConfig, [Path("ppo.toml")])
    written = json.loads(dump(config))
    assert written["ppo"]["lam"] == 0.95
    axes = ("pipeline", "virtual_pipeline", "context", "data", "expert", "expert_tensor")
    ends = dict.fromkeys(("first_stage_layers", "last_stage_layers"))
    assert written["policy"]["layout"] == {"tensor": 2, **dict.fromkeys(axes, 1), "sequence_parallel": False, **ends}


def test_deadlines_of_a_push_that_hide_one_another_are_refused(folder):
    assert problems("sync.phase_deadline_s=60", "sync.bucket_deadline_s=60") == [
        "sync: phase_deadline_s must be longer than bucket_deadline_s=60, which tells more, got 60"
    ]


def test_an_engine_whose_workers_cannot_share_the_heads_is_refused(folder):
    assert problems("engine.tensor=3") == [
        "engine.tensor: must divide the model's 8 attention heads, got 3",
        "engine.tensor: must divide the model's 4 key/value heads or be a multiple of them, got 3",
    ]
    load(RunConfig, [Path("ppo.toml")], ["engine.tensor=8"])  # two workers share a key/value head


def test_log_probs_are_taken_at_the_temperature_of_sampling_unless_another_is_set(folder):
    assert load(RunConfig, [Path("ppo.toml")], ["rollout.temperature=0.6"]).trainer_temperature == 0.6
    apart = ["rollout.temperature=0.6", "rollout.trainer_temperature=1.0"]
    assert load(RunConfig, [Path("ppo.toml")], apart).trainer_temperature == 1.0


def test_what_does_not_go_with_shared_devices_is_refused(folder):
    moved = "policy.fp8.parameters: must be false with cluster.colocate=true"
    asked = ("cluster.colocate=true", "policy.fp8.parameters=true", "policy.distributed_optimizer=true")
    assert any(problem.startswith(moved) for problem in problems(*asked))
    assert problems("cluster.colocate=true", "engine.tensor=2") == [
        "engine.tensor: must be 1 with cluster.colocate=true, where an engine shares the one GPU of a rank, got 2; "
        "set engine.count instead"
    ]
    assert problems("cluster.colocate=true", "engine.restarts=3") == [
        "engine.restarts: must be 0 with cluster.colocate=true: a new engine needs the weights of a policy that is in "
        "host memory then, got 3"
    ]


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_an_fp8_engine_is_refused_for_experts(folder, architecture):
    sizes = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    Path("model/config.json").write_text(json.dumps(MODEL | sizes | {"architectures": [architecture]}))
    told = f"FP8 engines are for models without experts and latent attention, which {architecture} has: set 'none'"
    assert any(told in problem for problem in problems("engine.quantization=fp8_per_channel"))
    assert not any("FP8" in problem for problem in problems("ppo.gama=1"))


@pytest.mark.parametrize("asked", ["fp8_per_tensor", "fp8_per_block"])
def test_without_a_gpu_only_scales_per_channel_are_possible(asked, monkeypatch):
    with pytest.raises(ClusterProblem, match=f"no kernel for '{asked}': choose 'fp8_per_channel' or 'none'"):
        check_engine(EngineConfig(quantization=asked), gpus=0)
    monkeypatch.setattr(device, "compute_capability", lambda: (9, 0))
    check_engine(EngineConfig(quantization=asked), gpus=1)
    monkeypatch.setattr(device, "has_wide_vectors", lambda: True)
    both = EngineConfig(quantization="fp8_per_channel", kv_cache_dtype="fp8")
    check_engine(both, gpus=0)
    monkeypatch.setattr(device, "has_wide_vectors", lambda: False)
    with pytest.raises(ClusterProblem, match=r"kv_cache_dtype: .* on CPUs with AVX-512 or AMX alone; .*: set 'auto'"):
        check_engine(both, gpus=0)
    check_engine(dataclasses.replace(both, kv_cache_dtype="auto"), gpus=0)


@pytest.mark.parametrize("asked", ["fp8_per_channel", "fp8_per_tensor", "fp8_per_block"])
def test_an_engine_whose_gpu_knows_no_fp8_is_refused_at_the_start(asked, monkeypatch):
    monkeypatch.setattr(device, "compute_capability", lambda: (8, 0))
    lowest = "9.0" if asked == "fp8_per_block" else "8.9"
    told = f"engine.quantization: '{asked}' needs a GPU of compute capability {lowest} or .*, found 8.0: set 'none'"
    with pytest.raises(ClusterProblem, match=told):
        check_engine(EngineConfig(quantization=asked), gpus=8)
    check_engine(EngineConfig(kv_cache_dtype="fp8"), gpus=8)


def test_blocks_are_refused_on_a_gpu_whose_engine_would_leave_inputs_as_they_are(monkeypatch):
    monkeypatch.setattr(device, "compute_capability", lambda: (8, 9))
    told = r"'fp8_per_block' needs a GPU of compute capability 9.0 or higher .*: set 'fp8_per_channel' or 'none'"
    with pytest.raises(ClusterProblem, match=told):
        check_engine(EngineConfig(quantization="fp8_per_block"), gpus=1)
    for other in ("fp8_per_channel", "fp8_per_tensor"):
        check_engine(EngineConfig(quantization=other), gpus=1)


def test_an_fp8_cache_is_refused_where_no_attention_of_the_engine_reads_it(monkeypatch):
    monkeypatch.setattr(device, "compute_capability", lambda: (7, 5))
    with pytest.raises(ClusterProblem, match=r"engine.kv_cache_dtype: 'fp8' needs .* 8.0 or higher .*, found 7.5"):
        check_engine(EngineConfig(kv_cache_dtype="fp8"), gpus=1)
    check_engine(EngineConfig(), gpus=1)


def test_the_trainer_quantises_what_it_pushes_only_to_a_format_that_the_engine_takes(folder):
    by_trainer, block = "sync.quantised_by=trainer", "engine.quantization=fp8_per_block"
    assert problems(by_trainer) == [
        "sync.quantised_by: 'trainer' needs engine.quantization, the format to quantise to, got 'none'"
    ]
    Path("model/config.json").write_text(json.dumps(MODEL | BLOCKS))
    assert problems(by_trainer, block) == [
        "sync.quantised_by: with 'trainer' vLLM takes 'fp8_per_block' only where 128 divides the rows of keys that "
        "each engine worker has, got 64 at engine.tensor=1; set 'engine', or lower engine.tensor"
    ]
    assert load(RunConfig, [Path("ppo.toml")], [block]).pushed_format is None
    for asked in ("fp8_per_channel", "fp8_per_tensor"):
        taken = load(RunConfig, [Path("ppo.toml")], [by_trainer, f"engine.quantization={asked}"])
        assert taken.pushed_format == asked


def test_blocks_must_lie_within_what_each_engine_worker_has_of_a_weight(folder):
    sizes = {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1024}
    Path("model/config.json").write_text(json.dumps(MODEL | BLOCKS | sizes))
    asked = ("sync.quantised_by=trainer", "engine.quantization=fp8_per_block")
    for workers in (1, 2, 4):  # with 4, two share a key/value head
        assert load(RunConfig, [Path("ppo.toml")], [*asked, f"engine.tensor={workers}"]).pushed_format is not None


@pytest.mark.parametrize("by", ["engine", "trainer"])
def test_blocks_want_inputs_that_128_divides_whoever_quantises(folder, by):
    asked = ("engine.quantization=fp8_per_block", f"sync.quantised_by={by}")
    told = (
        "engine.quantization: 'fp8_per_block' needs inputs of linears that are multiples of 128 on each engine worker, "
        "got hidden 64, attention's output 64, ffn 192 at engine.tensor=1; lower engine.tensor, or set "
        "'fp8_per_channel'"
    )
    assert told in problems(*asked)
    sizes = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864}
    Path("model/config.json").write_text(json.dumps(MODEL | sizes))  # Qwen2.5-0.5B
    assert load(RunConfig, [Path("ppo.toml")], [*asked, "engine.tensor=1"]).engine.quantization == "fp8_per_block"
    assert any("got attention's output 448 at engine.tensor=2" in line for line in problems(*asked, "engine.tensor=2"))


def test_an_engine_in_fp8_has_a_tolerance_of_its_own_unless_it_is_set():
    quantised, cached = EngineConfig(quantization="fp8_per_channel"), EngineConfig(kv_cache_dtype="fp8")
    assert [engine.rounds for engine in (EngineConfig(), quantised, cached)] == [False, True, True]
    assert [SyncConfig().tolerance("float32", rounded=rounded) for rounded in (False, True)] == [1e-3, 0.45]
    assert SyncConfig(probe_tolerance=0.1).tolerance("bfloat16", rounded=True) == 0.1
    assert [engine.dtype("float32") for engine in (quantised, cached)] == ["bfloat16", "float32"]


def test_a_misspelt_key_names_the_nearest(folder):
    assert problems("ppo.clip_lo=0.1") == ["ppo.clip_lo: unknown key; did you mean ppo.clip_low?"]
    assert problems("policy.layout.tensr=1") == ["policy.layout.tensr: unknown key; did you mean policy.layout.tensor?"]
    assert problems("zzz=1") == ["zzz: unknown key"]


def test_a_misspelt_key_hides_no_other_problem(folder):
    found = problems("ppo.clip_hgh=0.3", "zzz={a=1}", "data.train=nowhere.jsonl", "ppo.minibatch_samples=15")
    assert [line.partition(":")[0] for line in found] == ["ppo.clip_hgh", "zzz", "data", "ppo.minibatch_samples"]
    assert problems("ppo.clip_hgh=0.3", "steps=abc") == [
        "steps: Input should be a valid integer, unable to parse string as an integer, got 'abc'",
        "ppo.clip_hgh: unknown key; did you mean ppo.clip_high?",
    ]


def test_what_may_be_unset_is_unset_by_none(folder):
    without = load(RunConfig, [Path("ppo.toml")], ["ppo.advantage=grpo", "critic=none"])
    assert without.critic is None
    Path("later.toml").write_text('critic = "none"\n[ppo]\nadvantage = "grpo"\n')
    files = [Path("ppo.toml"), Path("later.toml")]
    assert load(RunConfig, files) == without
    assert "# critic is not set" in annotated(without, origins(files))
    assert load(RunConfig, files, ["ppo.advantage=gae", "critic.optimizer.lr=1e-3"]).critic.optimizer.lr == 1e-3
    more = ["policy.fp8.parameters=true", "policy.fp8=none", "ppo.dual_clip=3.0", "ppo.dual_clip=none"]
    config = load(RunConfig, [Path("ppo.toml")], [*more, "engine.quantization=none"])
    assert (config.policy.fp8, config.ppo.dual_clip, config.engine.quantization) == (None, None, "none")
    assert problems("critic.optimiser.lr=1", "critic.optimizer=none", "steps=0")[-1].endswith("optimizer?")
    assert problems("critic=null") == ["critic: must be a table of settings, or none, got 'null'"]
    assert problems("data=none")[0].startswith("data: must be a table of settings, got 'none'")


def test_a_bare_text_with_a_backslash_is_refused(folder):
    assert problems(r"data.template=Q: {question}\nA:") == [
        r"""data.template: a text with a backslash must be quoted, as 'data.template="..."', got Q: {question}\nA:"""
    ]
    config = load(RunConfig, [Path("ppo.toml")], [r'data.template="Q: {question}\nA:"'])
    assert config.data.template == "Q: {question}\nA:"


def test_a_path_may_begin_with_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    Path("home.toml").write_text('[data]\ntrain = "~/train.jsonl"\n')
    config = load(RunConfig, [Path("ppo.toml"), Path("home.toml")], ["run_dir=~/runs/x", 'model.path="~/model"'])
    assert (config.run_dir, config.model.path, config.data.train) == (
        folder / "runs" / "x",
        folder / "model",
        folder / "train.jsonl",
    )


def test_a_name_may_look_like_a_number_or_a_date(folder):
    names = ["run_dir=2026-11-30", "cluster.address=10.5", "reward.rule=007"]
    config = load(RunConfig, [Path("ppo.toml")], names)
    assert (config.run_dir, config.cluster.address, config.reward.rule) == (Path("2026-11-30"), "10.5", "007")
    assert load(SFTConfig, [Path("sft.toml")], ["output=42"]).output == Path("42")
    Path("number.toml").write_text("run_dir = 42\n")
    assert problems(files=("ppo.toml", "number.toml")) == ["run_dir: must be a path, in quotes, got 42"]


def test_a_key_in_the_wrong_section_names_the_right_ones_and_a_strange_one_what_its_section_has(folder):
    assert problems("rollout.clip_low=0.1") == ["rollout.clip_low: unknown key; did you mean ppo.clip_low?"]
    assert problems("lr=1") == ["lr: unknown key; did you mean policy.optimizer.lr or critic.optimizer.lr?"]
    (line,) = problems("policy.optimizer.learning_rate=1")
    assert line.startswith("policy.optimizer.learning_rate: unknown key; policy.optimizer has lr, beta1, beta2,")


def test_settings_of_the_other_command_are_told_in_one_line(folder):
    assert problems(files=("sft.toml",)) == [
        "these are the settings of a supervised stage (sft): take that command, or another file"
    ]
    assert problems(root=SFTConfig, files=("ppo.toml",)) == [
        "these are the settings of a run (train): take that command, or another file"
    ]
    assert problems("sampels=1", root=SFTConfig, files=("sft.toml",)) == ["sampels: unknown key"]


@pytest.mark.parametrize("name", ["ppo.toml", "sft.toml"])
def test_the_resolved_settings_are_shown_with_their_origin_and_load_again(folder, name):
    Path("more.toml").write_text("steps = 7\n[model]\ndtype = 'float32'\n")
    overrides = ["model.dtype=bfloat16", "cluster.address='say \"a\\tb\"'"]
    if name == "ppo.toml":
        overrides += ["ppo.value_clip=inf", "rollout.stop=['\\n', 'é']"]
    files = [Path(name), Path("more.toml")]
    config = load_any(files, overrides)
    text = annotated(config, origins(files, overrides))
    lines = dict(line.rsplit("  # ", 1) for line in text.splitlines())
    shown = {line.strip(): origin for line, origin in lines.items()}
    assert shown["steps = 7"] == "more.toml"
    assert shown['model.dtype = "bfloat16"'] == "command line"
    assert shown['model.path = "model"'] == name
    assert shown['model.layers = "auto"'] == "default"
    assert shown["# logging.wandb_project is not set"] == "default"
    Path("shown.toml").write_text(text, encoding="utf-8")
    Path("shown.json").write_text(dump(config))
    assert load_any([Path("shown.toml")]) == config
    assert load_any([Path("shown.json")]) == config


def test_a_start_that_cannot_write_its_settings_leaves_those_of_before(folder, monkeypatch):
    config = load_any([Path("sft.toml")])
    config.run_dir.mkdir(parents=True)
    _leave_settings(config)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        _leave_settings(dataclasses.replace(config, steps=7))
    assert load_any([config.run_dir / "config.json"]) == config


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("odd.toml", b"seed = \xff", "odd.toml: not valid TOML: "),
        ("odd.json", b"{", "odd.json: not valid JSON: "),
        ("odd.json", b"[1]", "odd.json: not valid JSON: "),
        ("absent", None, "absent: cannot be read: No such file or directory; a setting has the form key.path=value"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(folder, name, content, says):
    if content is not None:
        Path(name).write_bytes(content)
    (line,) = problems(files=(name,))
    assert line.startswith(says)


def test_a_wrong_type_says_what_was_found(folder):
    (line,) = problems("ppo.clip_low=wide")
    assert line.startswith("ppo.clip_low: Input should be a valid number")
    assert line.endswith("got 'wide'")


def test_numbers_out_of_range_are_refused(folder):
    assert problems("steps=0") == ["steps: Input should be greater than 0, got 0"]
    assert problems("rollout.temperature=0.005", "evaluation.temperature=0.009") == [
        "rollout: temperature must be at least 0.01, the engine's lowest, got 0.005",
        "evaluation: temperature must be 0 (greedy) or at least 0.01, the engine's lowest, got 0.009",
    ]
    load(RunConfig, [Path("ppo.toml")], ["rollout.temperature=0.01", "evaluation.temperature=0.01"])
    assert problems("ppo.dual_clip=0.5") == ["ppo: dual_clip must be above 1, got 0.5"]


GRPO = PPO[: PPO.index("[critic]")].replace("[ppo]", '[ppo]\nadvantage = "grpo"')


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_moments_that_would_never_move_are_refused(folder, name):
    load(RunConfig, [Path("ppo.toml")], [f"policy.optimizer.{name}=0.0"])
    (said,) = problems(f"policy.optimizer.{name}=1.0")
    assert said == f"policy.optimizer.{name}: Input should be less than 1, got 1.0"


def test_an_empty_stop_string_is_refused(folder):
    assert problems('rollout.stop=["END", ""]') == [
        "rollout: stop must have no empty string, which no response could end with, got ['END', '']"
    ]


def test_a_supervised_stage_has_no_seed_since_it_draws_nothing(folder):
    assert problems("seed=1", root=SFTConfig, files=("sft.toml",)) == ["seed: unknown key"]


def test_gspo_goes_with_the_advantages_of_dr_grpo(grpo):
    gspo = ["ppo.loss=gspo", "ppo.clip_low=3e-4", "ppo.clip_high=4e-4", "ppo.advantage=dr_grpo"]
    load(RunConfig, [Path(*grpo)], [*gspo, "ppo.loss_mean=sequence"])
    (said,) = problems(*gspo, "ppo.loss_mean=constant", files=grpo)
    assert "loss_mean must be 'sequence' with loss='gspo'" in said


@pytest.fixture
def grpo(folder):
    Path("grpo.toml").write_text(GRPO)
    return ("grpo.toml",)


def test_a_critic_may_be_left_out_where_none_is_trained(grpo):
    config = load(RunConfig, [Path(*grpo)])
    assert config.critic is None
    assert list(config.trainers) == ["policy"]
    assert not config.ppo.whitens
    assert load(RunConfig, [Path(*grpo)], ["ppo.whiten_advantages=true"]).ppo.whitens


def test_a_critic_that_the_advantage_does_not_fit_is_refused(grpo):
    assert problems("ppo.advantage=rloo") == [
        "critic: ppo.advantage='rloo' trains no critic: remove the [critic] table, or set critic=none"
    ]
    assert problems("ppo.advantage=gae", files=grpo) == [
        "critic: required with ppo.advantage='gae', not set; add a [critic] table, "
        "or choose an advantage without a critic"
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("rollout.samples_per_prompt=1", "ppo.minibatch_samples=8"),
            "rollout.samples_per_prompt: ppo.advantage='grpo' compares the samples of a prompt and needs at least 2, "
            "got 1",
        ),
        (("ppo.lam=1.0",), "ppo: lam speaks of a critic, which advantage='grpo' has not: remove it, or set lam=0.95"),
        (
            ("ppo.critic_warmup_steps=2",),
            "ppo: critic_warmup_steps speaks of a critic, which advantage='grpo' has not: remove it, or set "
            "critic_warmup_steps=0",
        ),
        (
            ("ppo.gamma=0.9",),
            "ppo: gamma must be 1 with advantage='grpo', which scores whole responses, got 0.9",
        ),
        (
            ("ppo.advantage=reinforce_pp", "ppo.whiten_advantages=false"),
            "ppo: whiten_advantages must not be false with advantage='reinforce_pp': remove it",
        ),
        (
            ("ppo.advantage=dr_grpo", "ppo.loss_mean=sequence"),
            "ppo: loss_mean='sequence' divides by each response's length, the bias that advantage='dr_grpo' is to "
            "remove: set loss_mean='constant', or advantage='grpo'",
        ),
        (
            ("ppo.loss=gspo",),
            "ppo: loss_mean must be 'sequence' with loss='gspo', whose objective is a mean over responses, got 'token'",
        ),
        *(
            (
                ("ppo.kl_coef=0.0", f"ppo.{name}={value}"),
                f"ppo: {name} has no effect with kl_coef=0, which keeps no reference: remove it, or set "
                f"{name}={default}",
            )
            for name, value, default in (
                ("kl_in", "loss", "reward"),
                ("kl_kind", "k3", "k1"),
                ("kl_target", 6.0, "none"),
                ("kl_horizon", 100, 10000),
            )
        ),
        (
            ("ppo.kl_target=6.0", "ppo.kl_horizon=6"),
            "ppo.kl_horizon: must be above a fifth of the samples of a step, else one step can turn the coefficient to "
            "0 or below; got 6 for 32 samples",
        ),
        (
            ("ppo.kl_horizon=100",),
            "ppo: kl_horizon has no effect without kl_target: set that or remove this",
        ),
        (
            ("ppo.kl_in=loss",),
            "ppo: kl_kind must be 'k2' or 'k3' with kl_in='loss': the gradient of k1 does not depend on the "
            "reference; got 'k1'",
        ),
        (
            ("ppo.kl_in=loss", "ppo.kl_kind=k2", "ppo.kl_target=6.0"),
            "ppo: kl_target adapts the KL in the reward; with kl_in='loss' leave it unset",
        ),
        (
            ("ppo.loss=cispo", "ppo.dual_clip=3.0"),
            "ppo: dual_clip bounds loss='ppo' alone: remove it with loss='cispo'",
        ),
        (
            ("ppo.engine_ratio_high=3.0",),
            "ppo: engine_ratio_high has no effect without engine_correction: set that or remove this",
        ),
        (
            ("ppo.engine_correction=mis", "ppo.engine_ratio_high=0.9"),
            "ppo: engine_ratio_low < 1 < engine_ratio_high must hold (1: no gap), got 0.0 and 0.9",
        ),
        (
            ("ppo.engine_correction=tis", "ppo.engine_ratio_low=0.5"),
            "ppo: engine_ratio_low has no effect with engine_correction='tis': remove it, or take 'mis', got 0.5",
        ),
        (
            ("ppo.engine_correction=icepop",),
            "ppo: engine_ratio_low must be above 0 with engine_correction='icepop', which drops on both sides, got 0.0",
        ),
        (
            ("ppo.engine_correction=icepop", "ppo.engine_ratio_low=0.5", "ppo.engine_ratio_level=sequence"),
            "ppo: engine_ratio_level must be 'token' with engine_correction='icepop'; 'mis' has both, got 'sequence'",
        ),
        (
            ("evaluation.samples=4",),
            "evaluation: samples must be 1 with temperature=0, whose answers are all alike, got 4",
        ),
        (
            ("reward.overlong_buffer=49",),
            "reward.overlong_buffer: must be at most rollout.max_response_tokens=48, got 49",
        ),
    ],
)
def test_contradictions_of_an_algorithm_say_what_to_do(grpo, overrides, expected):
    assert problems(*overrides, files=grpo) == [expected]


def test_settings_that_need_a_critic_or_several_samples_are_checked_with_one_too(folder):
    assert problems("ppo.lam_alpha=0.05") == [
        "ppo: lam_alpha replaces lam for the policy alone: set critic_lam as well (VAPO's is 1.0)"
    ]
    assert problems("ppo.lam_alpha=0.05", "ppo.critic_lam=1.0", "ppo.lam=0.9") == [
        "ppo: lam has no effect with lam_alpha, the policy's, and critic_lam, the critic's: remove it, or set lam=0.95"
    ]
    load(RunConfig, [Path("ppo.toml")], ["ppo.critic_warmup_steps=3", "ppo.lam_alpha=0.05", "ppo.critic_lam=1.0"])
    load(
        RunConfig, [Path("ppo.toml")], ["ppo.kl_target=6.0", "ppo.kl_horizon=100", "ppo.lam=0.9", "ppo.critic_lam=1.0"]
    )
    assert problems("rollout.sampling_rounds=3", "rollout.samples_per_prompt=1", "ppo.minibatch_samples=8") == [
        "rollout.sampling_rounds: dynamic sampling keeps prompts whose samples differ in score and needs "
        "rollout.samples_per_prompt of at least 2, got 1"
    ]


def test_contradictions_of_an_algorithm_come_together(grpo):
    found = problems("ppo.loss=gspo", "ppo.lam=1.0", "ppo.gamma=0.5", "rollout.samples_per_prompt=1", files=grpo)
    assert len(found) == 5  # and eight samples a step are fewer than a minibatch


def test_what_is_required_must_be_set(folder):
    Path("empty.toml").touch()
    assert problems(files=("empty.toml",)) == [
        f"{key}: required, not set" for key in ("run_dir", "steps", "prompts_per_step", "model", "data", "policy")
    ]


def test_all_problems_come_together(folder):
    found = problems("ppo.clip_lo=0.1", "steps=many", "engine.kv_cache=1")
    assert [line.partition(":")[0] for line in sorted(found)] == ["engine.kv_cache", "ppo.clip_lo", "steps"]
    Path("train.jsonl").unlink()
    found = problems("ppo.minibatch_samples=5", "policy.layout.tensor=3", "rollout.max_response_tokens=1000")
    assert [line.partition(":")[0] for line in found] == [
        "data",
        "ppo.minibatch_samples",
        "policy.layout",
        "rollout.max_response_tokens",
    ]


def test_a_minibatch_that_does_not_divide_names_the_nearest_size(folder):
    assert problems("ppo.minibatch_samples=15") == [
        "ppo.minibatch_samples: must divide the 32 samples of a step (8 prompts x 4), got 15; nearest: 16"
    ]


def test_missing_files_are_named(folder):
    assert problems("data.heldout=nowhere.jsonl") == ["data: heldout: no such file: nowhere.jsonl"]
    hub = "a model of the Hub is fetched first: hf download NAME --local-dir FOLDER"
    assert problems("model.path=nowhere") == [f"model.path: no config.json in nowhere; {hub}"]
    Path("model/tokenizer.json").unlink()
    assert problems() == ["model.path: no tokenizer.json in model"]
    Path("model/tokenizer.json").touch()
    assert problems("data=nowhere.jsonl", root=SFTConfig, files=("sft.toml",)) == ["data: no such file: nowhere.jsonl"]
    assert problems(files=("nowhere.toml",)) == ["nowhere.toml: cannot be read: No such file or directory"]


def test_a_package_that_a_setting_needs_is_looked_for_before_anything_starts(folder, monkeypatch):
    monkeypatch.setattr("megatron_rl.config.schema.find_spec", lambda name: None)
    says = "logging: wandb_project: needs the package wandb, which is not installed, got 'x'"
    assert problems("logging.wandb_project=x") == [says]
    assert problems("logging.wandb_project=x", root=SFTConfig, files=("sft.toml",)) == [says]
    monkeypatch.setattr("megatron_rl.config.schema.find_spec", lambda name: object())
    assert load(RunConfig, [Path("ppo.toml")], ["logging.wandb_project=x"]).logging.wandb_project == "x"


@pytest.mark.parametrize(("root", "file"), [(RunConfig, "ppo.toml"), (SFTConfig, "sft.toml")])
def test_a_run_needs_a_folder(folder, root, file):
    for run_dir in (file, f"{file}/runs/mine"):
        said = [f"run_dir: must be a folder, {file} is a file"]
        assert problems(f"run_dir={run_dir}", root=root, files=(file,)) == said


def test_prompt_and_response_must_fit_the_model(folder):
    assert problems("rollout.max_response_tokens=449") == [
        "rollout.max_response_tokens: prompt (64) plus response (449) must fit the model's 512 positions, got 513; "
        "largest: 448"
    ]


def test_prompt_and_response_must_fit_the_window_of_attention(folder):
    Path("model/config.json").write_text(
        json.dumps(MODEL | {"architectures": ["MistralForCausalLM"], "sliding_window": 112})
    )
    load(RunConfig, [Path("ppo.toml")])
    assert problems("rollout.max_response_tokens=49") == [
        "rollout.max_response_tokens: prompt (64) plus response (49) must fit the model's 112 positions, got 113; "
        "largest: 48"
    ]


@pytest.mark.parametrize(("root", "file"), [(RunConfig, "ppo.toml"), (SFTConfig, "sft.toml")])
def test_a_model_that_is_not_known_is_refused_by_name(folder, root, file):
    Path("model/config.json").write_text(json.dumps(MODEL | {"architectures": ["GPT2LMHeadModel"]}))
    assert problems(root=root, files=(file,)) == [
        "model.path: unknown architecture GPT2LMHeadModel; known: DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, "
        "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen2MoeForCausalLM, Qwen3ForCausalLM, "
        "Qwen3MoeForCausalLM"
    ]
    Path("model/config.json").write_text(json.dumps(MODEL | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}))
    assert problems(root=root, files=(file,)) == [
        "model.path: Qwen2ForCausalLM: rope scaling 'dynamic' is not supported; known: default, linear, llama3, yarn; "
        "got {'type': 'dynamic', 'factor': 2.0}"
    ]


def test_optimizer_states_go_to_the_host_only_where_they_are_sharded(folder):
    assert problems("critic.optimizer_on_host=true") == [
        "critic: optimizer_on_host needs distributed_optimizer=true (also with one replica): megatron-core takes no "
        "other optimizer's states to the host; got distributed_optimizer=false"
    ]
    assert load(RunConfig, [Path("ppo.toml")], ["critic.optimizer_on_host=true", "critic.distributed_optimizer=true"])
    assert problems("trainer.optimizer_on_host=true", root=SFTConfig, files=["sft.toml"])[0].startswith("trainer: ")


def test_what_means_nothing_to_a_supervised_stage_is_refused_together(folder):
    settings = [
        "cluster.colocate=true",
        "logging.samples=8",
        "trainer.value_head_std=0.1",
        "trainer.fp8.logprobs=false",
    ]
    said = problems(*settings, root=SFTConfig, files=["sft.toml"])
    assert [line for line in said if not line.startswith("trainer.fp8: ")] == [  # whose other rules are not met either
        "trainer.value_head_std: must be 0, only a critic has a value head, got 0.1",
        "cluster.colocate: must be false, a supervised stage has one model and nothing to share a device with",
        "trainer.fp8.logprobs: must be true, a supervised stage scores nothing but what it learns, got false",
        "logging.samples: a supervised stage draws none, remove it, got 8",
    ]


def test_only_a_critic_has_a_value_head(folder):
    assert load(RunConfig, [Path("ppo.toml")], ["critic.value_head_std=0.1"]).critic.value_head_std == 0.1
    assert problems("policy.value_head_std=0.1") == [
        "policy.value_head_std: must be 0, only a critic has a value head, got 0.1"
    ]


def test_a_layout_that_does_not_divide_is_refused(folder):
    assert problems("critic.layout.pipeline=4") == [
        "critic.layout: pipeline=4 does not divide the model's 6 layers; possible: [1, 2, 3, 6] "
        "(or set first_stage_layers, last_stage_layers)"
    ]
    uneven = ["critic.layout.pipeline=2", "critic.layout.last_stage_layers=2"]
    assert load(RunConfig, [Path("ppo.toml")], uneven).critic.layout.last_stage_layers == 2
    assert problems("critic.layout.sequence_parallel=true") == [
        "critic.layout: sequence_parallel needs tensor > 1, got tensor=1"
    ]
    assert problems("policy.layout.data=32") == [
        "policy.layout.data: 32 replicas need at least as many samples in a minibatch, got 16"
    ]


def test_an_unreadable_file_or_override_is_a_problem_too(folder):
    Path("broken.toml").write_text("steps = = 3\n")
    (line,) = problems(files=("broken.toml",))
    assert line.startswith("broken.toml: not valid TOML: ")
    assert problems("steps") == ["steps: an override has the form key.path=value"]


def sections(kind, path=""):
    """Every dataclass of a schema, with the dotted path to it."""
    yield path or kind.__name__, kind
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        for inner in (hints[item.name], *get_args(hints[item.name])):  # a section may be optional
            if dataclasses.is_dataclass(inner):
                yield from sections(inner, f"{path}.{item.name}".lstrip("."))


@pytest.mark.parametrize("root", [RunConfig, SFTConfig])
def test_every_section_forbids_unknown_keys_and_is_frozen(root):
    found = dict(sections(root))
    assert {RunConfig: 18, SFTConfig: 7}[root] <= len(found)
    for path, kind in found.items():
        assert getattr(kind, "__pydantic_config__", {}).get("extra") == "forbid", path
        assert kind.__dataclass_params__.frozen, path


@pytest.mark.parametrize("root", [RunConfig, SFTConfig])
def test_a_misspelt_key_is_found_in_every_section(folder, root):
    file = "ppo.toml" if root is RunConfig else "sft.toml"
    for path, kind in sections(root):
        key = "misspelt_key" if kind is root else f"{path}.misspelt_key"
        assert any(line.startswith(f"{key}: unknown key") for line in problems(f"{key}=1", root=root, files=(file,)))


def test_a_bad_configuration_is_refused_in_seconds_and_without_torch(folder):
    program = textwrap.dedent("""
        import sys
        from megatron_rl.__main__ import main
        status = main(["train", "ppo.toml", "ppo.minibatch_samples=5"])
        sys.exit(status if "torch" not in sys.modules and "ray" not in sys.modules else 99)
    """)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "ppo.minibatch_samples: must divide the 32 samples" in done.stderr
    assert time.monotonic() - started < 20


def test_a_trainer_that_rounds_says_so_and_rounds_in_one_way(folder):
    plain, channel = "policy.fake_quantization=none", "policy.fake_quantization=fp8_per_channel"
    assert [load(RunConfig, [Path("ppo.toml")], [asked]).policy.rounds for asked in (plain, channel)] == [False, True]
    tables = [FP8Config(), FP8Config(logprobs=False), FP8Config(logprobs=False, parameters=True)]
    trainers = [TrainerConfig(optimizer=OptimizerConfig(lr=1e-6), fp8=table) for table in tables]
    assert [trainer.rounds for trainer in trainers] == [True, False, True]
    assert (
        "policy.fake_quantization: must be 'none' with policy.fp8, which is FP8 itself, got 'fp8_per_channel'"
        in problems(channel, "policy.fp8.recipe=tensorwise")
    )


def test_blocks_that_cross_tensor_ranks_or_heads_cannot_be_simulated(folder):
    asked = ("policy.fake_quantization=fp8_per_block",)
    assert problems(*asked) == [
        "policy.fake_quantization: 'fp8_per_block' with layout.tensor=2 needs blocks of 128 within heads and ranks, "
        "got head_dim=8 and 96 feed-forward columns a rank; use layout.tensor=1 or 'fp8_per_channel'"
    ]
    whole = load(RunConfig, [Path("ppo.toml")], [*asked, "policy.layout.tensor=1"])
    assert whole.policy.fake_quantization == "fp8_per_block"
