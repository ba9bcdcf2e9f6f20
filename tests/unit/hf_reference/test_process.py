"""The reference in its process: what it answers, and how it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import megatron_rl.hf_reference.process
from megatron_rl.batches import TokenRows
from megatron_rl.config.schema import ClusterConfig
from megatron_rl.hf_reference.model import HfReference
from megatron_rl.hf_reference.process import HfProcess, HfScorer, ReferenceFailed
from megatron_rl.parity import parity_rows
from megatron_rl.weights.rules import Head

ROWS = parity_rows([], vocabulary=32, rows=3, longest=9, pad_id=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen2")
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@contextmanager
def running(folder: Path, run_dir: Path, start: float = 60, call: float = 60) -> Iterator[HfProcess]:
    limits = ClusterConfig(start_deadline_s=start, call_deadline_s=call)
    with HfProcess(
        folder,
        Head.TOKEN,
        environment={"OMP_NUM_THREADS": "1"},
        scratch=run_dir / "scratch",
        log=run_dir / "logs" / "hugging_face.log",
        start_limit=limits.start_limit,
        call_limit=limits.call_limit,
    ) as process:
        yield process


def test_it_answers_in_order_survives_an_error_and_its_death_is_told(model: Path, tmp_path: Path) -> None:
    here = HfReference(model, Head.TOKEN)
    through = torch.arange(16.0)
    with running(model, tmp_path) as process:
        policy = HfScorer(process=process, head=Head.TOKEN)
        critic = HfScorer(process=process, head=Head.VALUE, through=through)
        assert (policy.name, critic.name) == ("Hugging Face", "Hugging Face critic")
        logprobs, values = policy.score(ROWS), critic.score(ROWS)
        places, wrong = policy.activations(ROWS), process.call("logprobs", None)
        # the last one first: each finds its own answer
        with pytest.raises(ReferenceFailed, match=r"failed in logprobs:\n(.|\n)*AttributeError"):
            wrong.result()
        assert places.result()["model.layers.1"].shape == (int(ROWS.lengths.sum()) - 3, 16)
        torch.testing.assert_close(values.result(), here.values(ROWS, through))
        torch.testing.assert_close(logprobs.result(), here.logprobs(ROWS))
        assert set(policy.tensors(["lm_head."]).result()) == {"lm_head.weight"}
        (child,) = [p for p in psutil.Process().children() if "hf_reference" in " ".join(p.cmdline())]
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(
            ReferenceFailed, match=r"was killed by signal 9 \(SIGKILL\); .*hugging_face.log may say why"
        ):
            policy.score(ROWS).result()
    process.close()
    assert not child.is_running()


def test_a_folder_that_lacks_a_tensor_is_refused_instead_of_filled_with_random_numbers(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "incomplete"
    folder.mkdir()
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((model / "config.json").read_text())
    with (
        running(folder, tmp_path) as process,
        pytest.raises(ReferenceFailed, match=r"it lacks \['model.layers.1.self_attn.q_proj.bias'\]"),
    ):
        process.call("logprobs", ROWS).result()


def test_calls_and_answers_larger_than_the_socket_pass_each_other(model: Path, tmp_path: Path) -> None:
    mask = torch.zeros(128, 1024, dtype=torch.bool)
    mask[:, 1:4] = True
    rows = TokenRows(  # 1 MiB there, 0.5 MiB back
        tokens=torch.ones(128, 1024, dtype=torch.int64), lengths=torch.full((128,), 4), response_mask=mask
    )
    with running(model, tmp_path) as process:
        scorer = HfScorer(process=process, head=Head.TOKEN)
        answers = [scorer.score(rows) for _ in range(3)]
        first, *others = [answer.result() for answer in answers]
    assert first.shape == (128, 1024)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("program", "told", "limit"),
    [
        ("time.sleep(60)", r"did not finish start within 2 s \(cluster\.start_deadline_s, ", 2),
        ("pipe.send(4096 .to_bytes(4) + b'half'); time.sleep(60)", r"did not finish start within 2 s \(", 2),
        ("pipe.close(); time.sleep(60)", "hung up, did not end within 0.5 s and was killed", 30),
        ("sys.exit(3)", "ended with 3; ", 30),
    ],
    ids=["takes no call", "half an answer", "hangs up", "ends"],
)
def test_a_process_that_stops_anywhere_is_told_within_the_deadline(
    program: str, told: str, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = "import socket, sys, time; pipe = socket.socket(fileno=int(sys.argv[1])); "
    monkeypatch.setattr(megatron_rl.hf_reference.process, "_PROGRAM", begin + program)
    monkeypatch.setattr(megatron_rl.hf_reference.process, "_END_S", 0.5)
    started = time.monotonic()
    with running(tmp_path, tmp_path, start=limit) as process:
        answers = [process.call("logprobs", torch.zeros(1 << 20)) for _ in range(2)]
        for answer in answers:
            with pytest.raises(ReferenceFailed, match=told):
                answer.result()
    assert time.monotonic() - started < 30


def test_loading_and_each_call_have_deadlines_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import pickle, sys, time; from multiprocessing.connection import Connection\n"
        "pipe = Connection(int(sys.argv[1]))\n"
        "def after(seconds): time.sleep(seconds); pipe.send_bytes(pickle.dumps((True, seconds)))\n"
        "after(3)\nfor seconds in (1.5, 1.5, 1.5, 60): after(seconds)"
    )
    monkeypatch.setattr(megatron_rl.hf_reference.process, "_PROGRAM", program)
    with running(tmp_path, tmp_path, start=30, call=4) as process:
        answers = [process.call("logprobs", None) for _ in range(4)]
        assert [answer.result() for answer in answers[:3]] == [1.5] * 3, "loading and those before are not counted"
        started = time.monotonic()
        with pytest.raises(ReferenceFailed, match=r"did not finish logprobs within 4 s \(cluster\.call_deadline_s, "):
            answers[3].result()
    assert time.monotonic() - started < 20


def test_it_dies_with_its_driver_even_while_it_computes(model: Path, tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import drive; drive()", str(model), str(tmp_path)],
        stdout=subprocess.PIPE,
    )
    with driver:
        assert driver.stdout is not None
        child = psutil.Process(int(driver.stdout.readline()))
        child.suspend()  # it does not see that its driver hung up
        driver.kill()
    try:
        child.wait(timeout=10)
    finally:
        if child.is_running():
            child.kill()


def drive() -> None:
    """What the driver of the test above does."""
    with running(Path(sys.argv[1]), Path(sys.argv[2])) as process:
        process.call("tensors", ["lm_head."]).result()
        sys.stdout.write(f"{process._process.pid}\n")
        sys.stdout.flush()
        time.sleep(60)
