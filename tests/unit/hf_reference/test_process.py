"""The reference in its process: what it answers, and how it fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

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
def running(folder: Path, run_dir: Path) -> Iterator[HfProcess]:
    with HfProcess(
        folder,
        Head.TOKEN,
        environment={"OMP_NUM_THREADS": "1"},
        scratch=run_dir / "scratch",
        log=run_dir / "logs" / "hugging_face.log",
        deadline_s=60,
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
