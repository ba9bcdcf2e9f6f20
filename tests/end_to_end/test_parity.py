"""The gate on real ranks, engine and transformers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.config.schema import ClusterConfig, EngineConfig, ModelConfig, ParityConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.weights.rules import Head


def test_a_failing_check_prints_every_pair_names_the_place_and_ends_with_status_1(
    train_command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """At a tolerance that no two implementations meet."""
    command = train_command("parity.max_tolerance=1e-9")
    command[command.index("train")] = "check-parity"
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
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


def test_a_folder_is_verified_at_a_layout_and_in_an_engine(task: Path, tmp_path: Path) -> None:
    program = (
        "import json, sys\n"
        "from tests.end_to_end.test_parity import verified\n"
        "from pathlib import Path\n"
        "print(json.dumps(verified(Path(sys.argv[1]), Path(sys.argv[2]))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(task / "model"), str(tmp_path / "verify")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    import json

    metrics = json.loads(done.stdout.splitlines()[-1])
    assert set(metrics) == {
        f"{pair}/{figure}"
        for pair in (
            "policy_against_Hugging_Face",
            "policy_unpacked_against_policy",
            "engine_against_Hugging_Face",
        )
        for figure in ("mean", "max")
    }
    assert 0 < metrics["engine_against_Hugging_Face/mean"] < 1e-4


def verified(model: Path, run_dir: Path) -> dict[str, float]:
    """In a process of its own, as a tool does it: Ray fixes its settings once for each."""
    from megatron_rl.assemble import verify_folder

    return verify_folder(
        ModelConfig(path=model, dtype="float32"),
        head=Head.TOKEN,
        layout=ParallelLayout(pipeline=2),
        engine=EngineConfig(kv_cache_mib=64),
        parity=ParityConfig(),
        cluster=ClusterConfig(),
        run_dir=run_dir,
        tell=print,
    )


def test_an_engine_for_a_critic_is_refused(task: Path, tmp_path: Path) -> None:
    from megatron_rl.assemble import verify_folder

    with pytest.raises(ValueError, match="an engine scores tokens, which a critic does not"):
        verify_folder(
            ModelConfig(path=task / "model"),
            head=Head.VALUE,
            layout=ParallelLayout(),
            engine=EngineConfig(),
            parity=ParityConfig(),
            cluster=ClusterConfig(),
            run_dir=tmp_path,
            tell=print,
        )
