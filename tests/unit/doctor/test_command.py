"""The command as it is typed, on the machine that runs the tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.unit.doctor.test_checks import SIZES

ROOT = Path(__file__).parents[3]
RECIPE = str(ROOT / "examples" / "arithmetic_cpu" / "ppo.toml")
SMALL = ("policy.layout.tensor=1", "critic.layout.pipeline=1")
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # cannot be imported, and is not found
from megatron_rl.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def doctor(
    *arguments: str, program: tuple[str, ...] = ("-m", "megatron_rl"), **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, *program, "doctor", *arguments],
        env=kept | {"PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN": "0" * 64} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_this_machine_passes_and_is_told_what_it_computes_with() -> None:
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "  Adam            torch fused AdamW" in done.stdout
    assert "  log-probs       torch\n" in done.stdout
    assert "not checked: batches, layouts, devices, model, data, disk: no FILE.toml is given" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(f"looked at {socket.gethostname()}")


def test_without_torch_the_rest_is_still_told() -> None:
    done = doctor(program=("-c", WITHOUT_TORCH))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch is not installed: plan, show-config and doctor do without" in done.stdout


def test_a_long_folder_for_temporary_files_is_told_where_a_run_starts_ray() -> None:
    long = {"TMPDIR": "/" + "a" * 48}
    said = "error    temporary folder on "
    done = doctor(**long)
    assert done.returncode == 1, done.stdout + done.stderr
    assert said in done.stdout
    with socket.create_server(("127.0.0.1", 0)) as listening:  # where a cluster is named its own head counts
        assert said not in doctor("--cluster", f"127.0.0.1:{listening.getsockname()[1]}", **long).stdout


def test_a_batch_that_does_not_divide_ends_with_status_2() -> None:
    done = doctor(RECIPE, "ppo.minibatch_samples=7")
    assert done.returncode == 2
    assert "error    configuration: ppo.minibatch_samples: must divide the 256 samples of a step" in done.stdout


def settings_of(model: Path, *more: str) -> list[str]:
    question = '{"question": "1+1=", "answer": "2"}\n'
    (model / "train.jsonl").write_text(question)
    (model / "heldout.jsonl").write_text(question)
    files = [f"data.{name}={model / name}.jsonl" for name in ("train", "heldout")]
    return [RECIPE, f"model.path={model}", f"run_dir={model / 'run'}", *files, *more]


def model_folder(folder: Path) -> Path:
    """Without weights."""
    (folder / "config.json").write_text(json.dumps(SIZES | {"max_position_embeddings": 4096}))
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "1": 1}, unk_token="[UNK]"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_run_whose_files_cannot_be_read_or_that_has_no_room_is_told(tmp_path: Path) -> None:
    asked = settings_of(model_folder(tmp_path), *SMALL, "cluster.cpus_per_worker=1000")
    (tmp_path / "train.jsonl").write_bytes(b"\x80\x81")
    done = doctor(*asked)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error    weights: a model folder needs model.safetensors or model.safetensors.index.json" in done.stdout
    assert f"error    data: {tmp_path / 'train.jsonl'}:1: must be UTF-8" in done.stdout
    assert "error    devices: the layouts need 3 workers x cluster.cpus_per_worker=1000.0 = 3000 CPUs" in done.stdout
    (tmp_path / "tokenizer.json").write_text("{}")
    asked[-1] = "cluster.cpus_per_worker=0.01"
    unread = doctor(*asked, program=("-c", WITHOUT_TORCH)).stdout
    assert f"error    tokenizer: {tmp_path / 'tokenizer.json'} must be a tokenizer" in unread
    assert "error    devices" not in unread
    assert "not checked: data: there is no tokenizer for it" in unread
    assert "not checked: weights: need torch, which is not installed" in unread


def test_answers_that_no_response_can_give_are_told(tmp_path: Path) -> None:
    asked = settings_of(model_folder(tmp_path), *SMALL, "cluster.cpus_per_worker=0.01")
    rows = [{"question": "1+1=", "answer": f"It is {number}.\n#### {number}"} for number in (2, 3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "heldout.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (rows[0], {**rows[1], "answer": 3}))
    )
    done = doctor(*asked, program=("-c", WITHOUT_TORCH))
    assert done.returncode == 1, done.stdout + done.stderr
    told = f"error    answers: data.train: {tmp_path / 'train.jsonl'}: an answer must be what a right response gives"
    assert told in done.stdout
    assert "keep only what stands behind #### -> correct the file, or choose another reward.rule" in done.stdout
    rows[0]["answer"] = "2"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = doctor(*asked, program=("-c", WITHOUT_TORCH)).stdout
    assert f"warning  answers: data.train: {tmp_path / 'train.jsonl'}: of 2 different answers that were tried" in told
    assert "error    answers" not in told
    told = doctor(*asked, "reward.rule=absent.py:f", "reward.pools=1", program=("-c", WITHOUT_TORCH)).stdout
    assert "not checked: answers: reward.rule is a file that the nodes of reward.pools alone may have" in told


def test_gpus_that_a_run_does_not_see_are_not_counted(tmp_path: Path) -> None:
    tell = tmp_path / "nvidia-smi"
    tell.write_text('#!/bin/sh\ncase "$1" in *name) echo NVIDIA A100;; *driver*) echo 580.82;; *) echo 8.0;; esac\n')
    tell.chmod(0o755)
    asked = settings_of(model_folder(tmp_path), *SMALL, "cluster.cpus_per_worker=0.01")
    done = doctor(*asked, PATH=f"{tmp_path}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="")
    assert "needs a torch built for CUDA" in done.stdout  # so it was asked
    assert "error    devices" not in done.stdout, done.stdout


def test_a_transformer_engine_that_cannot_be_imported_is_told_as_the_cause(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('libtransformer_engine.so')\n")
    done = doctor(*settings_of(model_folder(tmp_path), *SMALL), PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 1, done.stdout + done.stderr
    for part in ("devices", "weights"):
        why = "need torch, which is not tried while Transformer Engine cannot be imported"
        assert f"not checked: {part}: {why}" in done.stdout


def test_a_misspelt_setting_and_an_address_without_a_port_end_with_status_2() -> None:
    assert "unknown key; did you mean ppo.gamma?" in doctor(RECIPE, "ppo.gama=1").stderr
    done = doctor("--cluster", "somewhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert "cluster.address: must be HOST:PORT" in done.stderr


def test_an_occupied_port_ends_with_status_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        done = doctor("--cluster", address)
    assert done.returncode == 1
    assert f"error    port: {address} must be free for Ray, something else listens there" in done.stdout
    assert f"not checked: clocks, other nodes: no cluster runs at {address}" in done.stdout
