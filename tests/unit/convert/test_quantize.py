"""What the command says and refuses before it needs modelopt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rl.convert.quantize import FORMATS, calibration_prompts, check_this_machine, serving_table
from tools.convert_hf import quantize


def folder(path: Path, architecture: str = "Qwen2ForCausalLM") -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    return path


def test_the_table_has_every_format_and_where_it_runs() -> None:
    table = serving_table().splitlines()[1:]
    assert [line.split()[0] for line in table] == list(FORMATS)
    assert [line.split()[0] for line in table if " CPU;" in line and "no CPU" not in line] == ["fp8_per_channel"]


def test_a_machine_refuses_what_its_engine_cannot_load_and_names_what_it_can() -> None:
    check_this_machine("fp8_per_channel", has_gpu=False)
    check_this_machine("nvfp4", has_gpu=True)
    with pytest.raises(ValueError, match=r"load nvfp4 on a CPU, and cannot; choose fp8_per_channel, or leave"):
        check_this_machine("nvfp4", has_gpu=False)
    with pytest.raises(ValueError, match=r"load int8 on a GPU, and cannot; choose fp8_per_tensor or fp8_per_channel"):
        check_this_machine("int8", has_gpu=True)


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


def test_an_existing_target_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = folder(tmp_path / "model"), folder(tmp_path / "out")
    assert quantize.main([str(source), str(target), "--format", "fp8_per_channel"]) == 1
    assert "is never written over" in capsys.readouterr().err
