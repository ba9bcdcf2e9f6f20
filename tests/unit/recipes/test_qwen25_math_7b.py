"""The recipes of Qwen2.5-Math-7B load, and the seed's values are the seed's."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from eval.samples import GradedSample
from eval.settings import parse as parse_evaluation
from eval.tasks import TEMPLATES
from examples.data import prepare_math
from megatron_rl.config.load import dotted, load, parse
from megatron_rl.config.precision import FP8Config
from megatron_rl.config.schema import RunConfig, SFTConfig
from megatron_rl.dataflow import Finish, Outcome
from megatron_rl.doctor.checks import checkpoint_bytes, disk_bytes
from megatron_rl.model_dims import read_model_dims
from megatron_rl.planner.devices import DEVICES
from megatron_rl.planner.lengths import Lengths
from megatron_rl.planner.search import plan
from megatron_rl.planner.times import Machine

FOLDER = Path(__file__).parents[3] / "examples/qwen2.5_math_7b"
MODEL = FOLDER.parent / "beyond_7b/models/qwen2.5_math_7b/config.json"
PLACES = ["4_nodes_a100.toml", "4_nodes_h100.toml", "1_node_a100.toml", "1_node_h100.toml"]
LENGTHS = Lengths(prompt=130, response=800)
SEED = {  # train_ppo_qwen_base_math_lv35_new.sh at 17fef38, and the defaults of train_ppo_ray_box.py where it is silent
    "seed": 42,
    "prompts_per_step": 1024,  # rollout_batch_size
    "rollout.samples_per_prompt": 8,
    "rollout.temperature": 0.6,
    "rollout.trainer_temperature": 1.0,  # logits are divided by nothing
    "rollout.max_response_tokens": 3000,  # generate_max_len
    "rollout.stop": ["</s>", "<|im_end|>", "<|endoftext|>"],
    "rollout.force_eos": True,
    "rollout.sampling_rounds": 0,
    "data.max_prompt_tokens": 1024,
    "data.template": prepare_math.TEMPLATE,  # stripped: no line break at its end
    "reward.rule": "seed_exact",
    "reward.timeout_s": 10.0,
    "reward.overlong_buffer": 0,
    "ppo.advantage": "gae",
    "ppo.gamma": 1.0,
    "ppo.lam": 0.95,
    "ppo.critic_lam": None,
    "ppo.whiten_advantages": None,  # gae: over the whole rollout
    "ppo.kl_coef": 0.01,  # init_kl_coef
    "ppo.kl_kind": "k1",
    "ppo.kl_in": "reward",
    "ppo.kl_target": None,  # FixedKLController
    "ppo.loss": "ppo",
    "ppo.clip_low": 0.2,  # eps_clip
    "ppo.clip_high": 0.2,
    "ppo.dual_clip": None,
    "ppo.value_clip": 0.2,
    "ppo.entropy_coef": 0.0,
    "ppo.loss_mean": "sequence",
    "ppo.engine_correction": None,
    "ppo.minibatch_samples": 128,  # train_batch_size
    "ppo.epochs": 1,  # max_epochs
    "ppo.critic_warmup_steps": 0,  # freezing_actor_steps -1
    "policy.optimizer.lr": 5e-7,
    "critic.optimizer.lr": 9e-6,
    "critic.value_head_std": pytest.approx((3584 + 1) ** -0.5),
    **{
        f"{role}.optimizer.{name}": value
        for role in ("policy", "critic")
        for name, value in {
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.0,  # l2
            "clip_grad": 1.0,  # max_norm
            "warmup_fraction": 0.03,  # of 10,640: 320 updates
            "min_lr_fraction": 0.1,
            "warmup_from_zero": True,  # transformers' cosine_with_min_lr
            "schedule_updates": 10_640,  # 20 episodes x (8523 x 8 // 128) updates
        }.items()
    },
    "model.dtype": "bfloat16",
    "checkpoint.every": 4,  # save_steps
    "engine.tensor": 1,
}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the sizes of the model, a name for its tokenizer, and names for the data."""
    monkeypatch.chdir(tmp_path)
    for file in ("models/Qwen2.5-Math-7B/tokenizer.json", "data/math_lv3to5.jsonl", "data/math500.jsonl"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("{}")
    for file in ("data/math_lv3to5_sft.jsonl", "data/long_cot.jsonl"):
        Path(file).write_text("")
    Path("models/Qwen2.5-Math-7B/config.json").write_text(MODEL.read_text())
    return tmp_path


def test_the_disk_that_checkpoints_take_is_told() -> None:
    told = " ".join((FOLDER / "README.md").read_text().split())
    dims = read_model_dims(MODEL.parent)
    disks, sizes = [], []
    for files in (["simplerl_zero.toml", PLACES[0]], ["zoo_grpo.toml"]):
        config = parse(RunConfig, [FOLDER / name for name in files])
        disks.append(f"{disk_bytes(config, dims) / 1e12:.2f} TB")
        sizes.append(round(checkpoint_bytes(config, dims) / 1e9))
    assert f"take up to {disks[0]} of disk, those of `zoo_grpo.toml` {disks[1]}" in told
    assert f"the last two ({sizes[0]} and {sizes[1]} GB each)" in told


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("exact", [False, True])
def test_simplerl_zero_loads_wherever_it_runs(inputs: Path, place: str, exact: bool) -> None:
    overlays = [FOLDER / "simplerl_zero.toml", FOLDER / place, *([FOLDER / "seed_exact.toml"] if exact else [])]
    config = load(RunConfig, overlays, [])
    assert config.samples_per_step == 8192
    assert config.updates_per_step == 64
    gpus = sum(trainer.layout.world_size for trainer in config.trainers.values())
    gpus += config.engine.count * config.engine.tensor
    assert gpus == (32 if place.startswith("4_nodes") else 6)
    assert (config.policy.layout.world_size, config.engine.count) == ((8, 16) if gpus == 32 else (2, 2))
    assert config.policy.optimizer_on_host == (gpus == 6)  # adam_offload


@pytest.mark.parametrize("place", PLACES)
def test_seed_exact_sets_what_the_seed_set(inputs: Path, place: str) -> None:
    names = ["simplerl_zero.toml", place, "seed_exact.toml"]
    found = dotted(load(RunConfig, [FOLDER / name for name in names], []))
    # FP8 has a gap between trainer and engine that the seed had not, and corrects it
    expected = SEED | ({"ppo.engine_correction": "tis"} if "h100" in place else {})
    assert {key: found[key] for key in SEED} == expected


@pytest.mark.parametrize("place", PLACES)
def test_the_recipe_fits_the_gpus_it_is_for(place: str) -> None:
    config = parse(RunConfig, [FOLDER / "simplerl_zero.toml", FOLDER / place])
    assert config.cluster.device == ("h100" if "h100" in place else "a100-80g")
    machine = Machine(device=DEVICES[config.cluster.device], per_node=config.cluster.gpus_per_node)
    found = plan(config, read_model_dims(MODEL.parent), machine, LENGTHS)
    assert found.problems == ()
    assert 0 < 120 * found.step_seconds < 5 * 86_400
    assert found.calls[0].longest <= config.cluster.call_deadline_s / 2


def test_without_the_overlay_the_seeds_accidents_are_mended(inputs: Path) -> None:
    config = load(RunConfig, [FOLDER / "simplerl_zero.toml", FOLDER / PLACES[0]], [])
    assert config.trainer_temperature == config.rollout.temperature == 1.0
    assert not config.rollout.force_eos
    assert config.data.template == TEMPLATES["qwen25-math-cot"]
    assert config.ppo.loss_mean == "token"


def test_the_zoo_recipe_and_the_supervised_stages_load(inputs: Path) -> None:
    zoo = load(RunConfig, [FOLDER / "zoo_grpo.toml"], [])
    assert zoo.critic is None
    assert zoo.updates_per_step == 4
    assert zoo.data.template == TEMPLATES["qwen-boxed"]
    for name, pairs in (("sft_math_8k.toml", 8521), ("sft_long_cot.toml", 8521)):
        assert load(SFTConfig, [FOLDER / name, FOLDER / "sft_h100.toml"], []).trainer.fp8 == FP8Config()
        config = load(SFTConfig, [FOLDER / name], [])
        assert config.steps * config.samples_per_step // pairs in {1, 2}
        assert config.trainer.layout.world_size == 8


def graded(number: int, **changes: Any) -> GradedSample:
    fields: dict[str, Any] = {
        "task": "math",
        "id": str(number),
        "sample": 0,
        "question": f"question {number}",
        "prompt": "of the teacher",
        "response": f"so the answer is \\boxed{{{number}}}",
        "gold": str(number),
        "finish": Finish.STOP,
        "tokens": 400,
        "extracted": str(number),
        "correct": True,
        "boxed": True,
        "score": 1.0,
        "outcome": Outcome.SCORED,
    }
    return GradedSample(**(fields | changes))


@pytest.fixture(scope="module")
def distil() -> Any:
    spec = importlib.util.spec_from_file_location("distil", FOLDER / "distil.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_of_each_problem_the_longest_good_response_is_taught(distil: Any) -> None:
    samples = [
        graded(1, tokens=500),
        graded(1, sample=1, tokens=900, response="the long one"),
        graded(1, sample=2, tokens=700),
        graded(2, correct=False),
        graded(3, finish=Finish.LENGTH),
        graded(4, tokens=299),
        graded(5, tokens=3001),
        graded(6, response="wait, let me think about this one once more, " * 50),
        graded(7, outcome=Outcome.TIMEOUT),
        graded(8, boxed=False),
        graded(9),
    ]
    pairs, left_out = distil.distil(samples, "Q: {question}\n", min_tokens=300, max_tokens=3000)
    assert pairs == [
        {"prompt": "Q: question 1\n", "response": "the long one"},
        {"prompt": "Q: question 9\n", "response": "so the answer is \\boxed{9}"},
    ]
    assert left_out == {
        "a longer one of the same problem is kept": 2,
        "wrong": 1,
        "cut off": 1,
        "too short": 1,
        "too long": 1,
        "goes round in circles": 1,
        "not graded": 1,
        "no box": 1,
    }


def test_a_teacher_is_asked_as_the_evaluation_reads_it_and_the_filter_finds_its_samples() -> None:
    def told(*arguments: str) -> subprocess.CompletedProcess[str]:
        command, environment = [FOLDER / "distil.sh", *arguments], os.environ | {"DRY_RUN": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert (told().returncode, told().stderr) == (
        2,
        "distil.sh: no teacher; usage: distil.sh TEACHER [option of eval/run.py...]\n",
    )
    draw, choose = (line.split(" ") for line in told("models/QwQ", "--engines", "8").stdout.splitlines())
    assert draw[:2] == ["python", "eval/run.py"]
    asked = parse_evaluation(draw[2:])
    assert (asked.model, asked.engines, asked.samples, asked.template) == (Path("models/QwQ"), 8, 4, "chat")
    assert asked.stop == ()  # the teacher's own end of sequence alone
    assert asked.output is not None
    assert choose[1:] == [
        str(FOLDER / "distil.py"),
        str(asked.output / "samples_math_lv3to5.jsonl"),
        "--output",
        str(parse(SFTConfig, [FOLDER / "sft_long_cot.toml"]).data),
    ]


def test_the_command_writes_pairs_or_says_why_not(
    distil: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, output = tmp_path / "samples.jsonl", tmp_path / "data/pairs.jsonl"
    assert distil.main([str(samples), "--output", str(output)]) == 2
    assert "no such file" in capsys.readouterr().err
    rows = [asdict(graded(number, correct=number > 1)) for number in (1, 2)]
    for row in rows:
        row |= {"finish": row["finish"].value, "outcome": row["outcome"].value}
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert distil.main([str(samples), "--output", str(output)]) == 0
    assert "2 responses, 1 kept" in capsys.readouterr().out
    [pair] = map(json.loads, output.read_text().splitlines())
    assert pair["prompt"] == TEMPLATES["qwen25-math-cot"].replace("{question}", "question 2")
    assert distil.main([str(samples), "--output", str(output), "--min-tokens", "500"]) == 2
    assert "none of its 2 responses can be taught" in capsys.readouterr().err
