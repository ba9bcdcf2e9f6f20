"""Each format is written from a tiny policy, and holds what its name says."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.convert.quantize import FORMATS, calibration_prompts
from megatron_rl.weights.manifest import MANIFEST, check_shard, read_manifest
from tools.convert_hf import quantize

ROOT = Path(__file__).parents[2]
E4M3, E2M1 = torch.float8_e4m3fn, torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def per_row(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[name].float() * tensors[f"{name}_scale"][:, None]


def per_tensor(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[name].float() * tensors[f"{name}_scale"]


def per_block(tensors: dict[str, Tensor], name: str) -> Tensor:
    rows, columns = tensors[name].shape
    scales = tensors[f"{name}_scale"].reshape(rows // 128, columns // 128)
    return tensors[name].float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)


def per_sixteen(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Two numbers a byte, the first one in its lower half; the highest bit of a half is the sign."""
    packed = tensors[name].int()
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    numbers = E2M1[halves & 7] * (1 - 2 * (halves >> 3))
    scales = tensors[f"{name}_scale"].float() * tensors[f"{name}_scale_2"]
    return numbers * scales.repeat_interleave(16, 1)


# Half a step at the top of the range, relative to the largest number of a scale: E4M3 has 3 bits of mantissa (steps of
# 32 below 448), INT8 127 steps, E2M1 a step of 2 below 6. modelopt divides by a scale per weight in bfloat16, and
# rounds NVFP4's scales to E4M3.
EXPECTED: dict[str, tuple[torch.dtype, torch.Size, Callable[..., Tensor], float]] = {
    "fp8_per_tensor": (E4M3, torch.Size([]), per_tensor, 16 / 448 + 2**-8),
    "fp8_per_channel": (E4M3, torch.Size([128]), per_row, 16 / 448),
    "fp8_per_block": (E4M3, torch.Size([1, 1, 3, 1]), per_block, 16 / 448),
    "int8": (torch.int8, torch.Size([128]), per_row, 0.5001 / 127),
    "nvfp4": (torch.uint8, torch.Size([128, 24]), per_sixteen, 1 / 6 + 1 / 16),
}
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"question": f"{n} + {n % 7} =", "answer": "1"}) + "\n" for n in range(9)))
    return file


@pytest.fixture(scope="session")
def written(policy: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("quantised")

    def write(name: str) -> Path:
        target = folder / name
        if not target.exists():
            asked = [str(policy), str(target), "--format", name, "--template", "Question {question} Answer"]
            assert quantize.main([*asked, "--prompts", str(prompts)]) == 0
        return target

    return write


def test_every_format_is_tested() -> None:
    assert EXPECTED.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_has_the_types_scales_and_numbers_of_its_format(
    written: Callable[[str], Path], policy: Path, name: str
) -> None:
    dtype, scales, dequantised, bound = EXPECTED[name]
    tensors, original = load_file(written(name) / "model.safetensors"), load_file(policy / "model.safetensors")
    assert tensors[DOWN].dtype == dtype
    assert tensors[f"{DOWN}_scale"].shape == scales
    found, expected = dequantised(tensors, DOWN), original[DOWN].float()
    assert float((found - expected).abs().max()) <= bound * float(expected.abs().max())
    assert float((found - expected).abs().max()) > 0
    assert (f"{DOWN.removesuffix('weight')}input_scale" in tensors) == FORMATS[name].calibrated
    for kept in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(tensors[kept], original[kept])


def test_an_export_that_lacks_a_tensor_of_the_model_is_refused(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import modelopt.torch.export

    write = modelopt.torch.export.export_hf_checkpoint

    def short(model: object, export_dir: Path) -> None:
        write(model, export_dir=export_dir)
        tensors = load_file(export_dir / "model.safetensors")
        del tensors[DOWN]
        save_file(tensors, export_dir / "model.safetensors")

    monkeypatch.setattr(modelopt.torch.export, "export_hf_checkpoint", short)
    assert quantize.main([str(policy), str(tmp_path / "out"), "--format", "fp8_per_channel"]) == 1
    assert f"modelopt wrote no {DOWN} (1 are missing)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_export_is_a_folder_with_tokenizer_and_manifest(written: Callable[[str], Path], policy: Path) -> None:
    folder = written("fp8_per_channel")
    assert (folder / "tokenizer.json").read_bytes() == (policy / "tokenizer.json").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    assert (config["hidden_size"], config["architectures"]) == (128, ["Qwen2ForCausalLM"])
    manifest = read_manifest(folder)
    assert {*manifest.files, *manifest.shards, MANIFEST} == {path.name for path in folder.iterdir()}
    check_shard(folder, "model.safetensors", manifest.shards["model.safetensors"], lambda _: None)
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_a_failure_leaves_nothing(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import modelopt.torch.export

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(modelopt.torch.export, "export_hf_checkpoint", full)
    assert quantize.main([str(policy), str(tmp_path / "out"), "--format", "fp8_per_channel"]) == 1
    assert capsys.readouterr().err.endswith("error: no space left\n")
    assert list(tmp_path.iterdir()) == []


def test_the_engine_loads_and_runs_what_the_table_says_a_cpu_runs(
    written: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    [name] = [name for name, form in FORMATS.items() if form.cpu]
    template = tmp_path / "template.txt"
    template.write_text("Question {question} Answer")
    command = [".venv/bin/python", "eval/run.py", "--model", str(written(name)), "--tasks", str(prompts)]
    command += ["--template", str(template), "--temperature", "0", "--max-tokens", "4", "--kv-cache-mib", "64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    samples = [line for file in (tmp_path / "out").rglob("*samples*.jsonl") for line in file.read_text().splitlines()]
    assert len(samples) == len(calibration_prompts(prompts, "{question}", 100))
