"""The gate on real ranks, engine and transformers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_rl.config.load import load
from megatron_rl.config.schema import ClusterConfig, EngineConfig, ModelConfig, ParityConfig, RunConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import read_model_dims
from megatron_rl.weights.rules import Head
from tests.end_to_end.conftest import ROOT


def test_a_failing_check_prints_every_pair_names_the_place_and_ends_with_status_1(
    train_command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """At a tolerance that no two implementations meet."""
    command = train_command("parity.max_tolerance=1e-9")
    command[command.index("train")] = "check-parity"
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("waiting for room")]
    assert lines[0] == "megatron-rl: ParityFailed: 6 of 6 comparisons failed"
    assert [line.split("  ")[1] for line in lines[2:8]] == [
        "policy against Hugging Face",
        "policy unpacked against policy",
        "critic against Hugging Face critic",
        "critic unpacked against critic",
        "engine against policy",
        "engine against Hugging Face",
    ]
    means = [float(line.split("mean")[1].split()[0]) for line in lines[2:8]]
    assert max(means) < 1e-4
    assert lines[8].startswith("policy against Hugging Face: no place stands out, distances grow to ")
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "run-parity" / "logs" / "hugging_face.log").exists()


def figures(*pairs: str) -> set[str]:
    return {
        f"{pair}_against_{other}/{figure}"
        for pair, other in (p.split(":") for p in pairs)
        for figure in ("mean", "max")
    }


def verified(model: Path, run_dir: Path, head: str, layout: str, engine: str) -> dict[str, float]:
    """In a process of its own, as a tool does it: Ray fixes its settings once for each."""
    program = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from megatron_rl.assemble import verify_folder\n"
        "from megatron_rl.config.schema import ClusterConfig, EngineConfig, ModelConfig, ParityConfig\n"
        "from megatron_rl.layout import ParallelLayout\n"
        "from megatron_rl.model_dims import read_model_dims\n"
        "from megatron_rl.weights.rules import Head\n"
        "model = Path(sys.argv[1])\n"
        "found = verify_folder(\n"
        "    ModelConfig(path=model, dtype='float32'), dims=read_model_dims(model), reference=model,\n"
        "    run_dir=Path(sys.argv[2]), head=Head(sys.argv[3]),\n"
        f"    layout={layout}, engine={engine}, parity=ParityConfig(), cluster=ClusterConfig(), tell=print,\n"
        ")\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(model), str(run_dir), head],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow  # tests/end_to_end/test_verify.py has the command that does the same
def test_a_folder_is_verified_at_a_layout_and_in_an_engine(task: Path, tmp_path: Path) -> None:
    engine = "EngineConfig(kv_cache_mib=64)"
    found = verified(task / "model", tmp_path / "verify", "token", "ParallelLayout(pipeline=2)", engine)
    assert found.keys() == figures("policy:Hugging_Face", "policy_unpacked:policy", "engine:Hugging_Face")
    assert 0 < found["engine_against_Hugging_Face/mean"] < 1e-4


@pytest.mark.slow
def test_a_folder_with_a_value_head_is_verified_as_a_critic(task: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(task / "model", num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.2)
    model.save_pretrained(tmp_path / "critic")
    found = verified(tmp_path / "critic", tmp_path / "verify", "value", "ParallelLayout(tensor=2)", "None")
    assert found.keys() == figures("critic:Hugging_Face_critic", "critic_unpacked:critic")
    assert 0 < found["critic_against_Hugging_Face_critic/mean"] < 1e-4


def test_an_engine_for_a_critic_is_refused(task: Path, tmp_path: Path) -> None:
    from megatron_rl.assemble import verify_folder

    with pytest.raises(ValueError, match="an engine scores tokens, which a critic does not"):
        verify_folder(
            ModelConfig(path=task / "model"),
            dims=read_model_dims(task / "model"),
            reference=task / "model",
            head=Head.VALUE,
            layout=ParallelLayout(),
            engine=EngineConfig(),
            parity=ParityConfig(),
            cluster=ClusterConfig(),
            run_dir=tmp_path,
            tell=print,
        )


def test_a_model_above_the_bound_is_not_compared_with_hugging_face_and_that_is_told(
    train_command: Callable[..., list[str]], tmp_path: Path
) -> None:
    from megatron_rl.assemble.gate import start_references

    _, _, _, _, file, *settings = train_command("parity.reference_max_parameters=1000")
    config = load(RunConfig, [Path(file)], settings)
    with ExitStack() as stack:
        references = start_references(stack, config, tmp_path)
    assert (references.policy, references.critic) == (None, None)
    assert references.through is not None
    assert references.through.norm().item() == pytest.approx(1)
    assert references.skipped is not None
    assert re.fullmatch(
        r"parity: not compared with Hugging Face: the model has 1\.56e\+05 parameters, more than "
        r"parity.reference_max_parameters=1e\+03",
        references.skipped,
    )
