"""The levels of verification that start ranks and an engine, as a user types them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.conftest import ROOT
from tests.unit.convert.folders import exported, imported, llama_135m

FOUR_RANKS = ("--tensor", "2", "--pipeline", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, tied, with biases and a vocabulary that ranks must pad."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=True,
        eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    torch.manual_seed(0)
    built = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "bias" in name:
                parameter.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp("qwen2") / "hf"
    built.save_pretrained(folder)
    return folder


def verified(*arguments: Any, timeout_s: float = 200) -> tuple[int, list[str], str]:
    """Status, lines of standard output, standard error."""
    command = [sys.executable, "tools/convert_hf/verify.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT)
    return done.returncode, done.stdout.splitlines(), done.stderr


def worst(lines: list[str], pair: str) -> float:
    """The largest difference of a pair in the table."""
    [line] = [line for line in lines if line.startswith(f"  {pair} ")]
    return float(line.split("max")[1].split()[0])


def test_ranks_that_load_the_converted_folder_and_an_engine_say_what_transformers_says(
    model: Path, tmp_path: Path
) -> None:
    megatron = imported(model, tmp_path / "megatron")
    status, lines, err = verified(megatron, "--level", "engine", "--against", model, *FOUR_RANKS)
    assert status == 0, err
    assert [line.split(",")[0] for line in lines if not line.startswith(("parity", "  "))] == [
        "files: ok",
        "files: ok",
        "values: ok",
        "logits: ok",
        "engine: ok",
    ]
    assert f"logits: ok, 4 rank(s) with {megatron} say what transformers says with {model}" in lines
    for pair in ("policy against Hugging Face", "policy unpacked against policy", "engine against Hugging Face"):
        assert 0 < worst(lines, pair) < 1e-4


def test_a_megatron_folder_alone_is_held_against_its_own_export(model: Path, tmp_path: Path) -> None:
    """Its configuration says bfloat16; a critic's."""
    from transformers import AutoModelForTokenClassification

    critic = AutoModelForTokenClassification.from_pretrained(model, num_labels=1)
    torch.nn.init.normal_(critic.score.weight, std=0.2)
    critic.save_pretrained(tmp_path / "critic")
    megatron = imported(tmp_path / "critic", tmp_path / "megatron")
    status, lines, err = verified(megatron, "--level", "logits", "--pipeline", "2")
    assert status == 0, err
    assert f"logits: ok, 2 rank(s) with {megatron} say what transformers says with {megatron}" in lines
    assert 0 < worst(lines, "critic against Hugging Face critic") < 1e-4


@pytest.mark.slow
def test_a_llama_of_135m_parameters_is_imported_exported_and_verified_in_the_engine(tmp_path: Path) -> None:
    model = llama_135m(tmp_path / "hf")
    megatron = imported(model, tmp_path / "megatron")
    back = exported(megatron, tmp_path / "back", shard_bytes=100 << 20)
    status, lines, err = verified(back, "--level", "values", "--against", model)
    assert (status, lines[-1]) == (0, f"values: ok, 272 tensors are the same in {back} and {model}"), err
    status, lines, err = verified(megatron, "--level", "engine", "--against", back, "--pipeline", "2", timeout_s=600)
    assert status == 0, err
    assert lines[-1] == f"engine: ok, vLLM with {back} says the same"
