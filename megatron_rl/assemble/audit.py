"""The audit: what linears multiply with, the engines' against what the configuration asks for, and all in a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_rl import device
from megatron_rl.config.precision import Gpu
from megatron_rl.config.schema import EngineConfig, RunConfig
from megatron_rl.interfaces import results
from megatron_rl.linear_formats import LinearFormat, first_difference, summary, write_table
from megatron_rl.model_dims import read_model_dims
from megatron_rl.ray_runtime.cluster import ClusterProblem
from megatron_rl.ray_runtime.roles import RemoteEngine, RemoteTrainer
from megatron_rl.weights.fp8_blocks import ENGINE_SCALINGS
from megatron_rl.weights.safetensors_io import HfFolder


class AuditFailed(RuntimeError):
    """A linear is not in the format that the configuration asks for."""


def check_engine(engine: EngineConfig, gpus: int) -> None:
    """Check that the engine can do on this machine, or on its GPUs if it has some, what is asked of it.

    Raises:
        ClusterProblem: it cannot; the message says what it can.
    """
    gpu = Gpu(capability=device.compute_capability() if gpus else (0, 0), cuda=device.cuda_version())
    if problems := list(engine.machine_problems(gpu, wide_vectors=device.has_wide_vectors())):
        raise ClusterProblem("; ".join(problems))


def audit_engines(engine: RemoteEngine, config: RunConfig, model: Path) -> list[LinearFormat] | None:
    """Hold every linear of every engine against the configuration; they must be awake.

    Args:
        engine: all of them.
        config: what it asks.
        model: the folder that they loaded.

    Returns:
        what was found, in all engines alike. None: models with experts or latent attention, which are never quantised,
        are not looked at.

    Raises:
        AuditFailed: one differs; the message names the first.
    """
    dims = read_model_dims(model)
    if dims.experts is not None or dims.latent is not None:
        return None
    wanted = engine_formats(HfFolder(model).infos(), config.engine, config.model.dtype, tied=dims.tied_embeddings)
    by_engine = engine.linear_formats().result()
    for index, found in enumerate(by_engine):
        if (difference := first_difference(wanted, found)) is not None:
            raise AuditFailed(
                f"engine {index}: {difference}; the linears must be as engine.quantization="
                f"{config.engine.quantization!r} asks"
            )
    return by_engine[0]


def keep_formats(
    trainers: Mapping[str, RemoteTrainer], engine: Sequence[LinearFormat] | None, config: RunConfig, folder: Path
) -> str:
    """Write what every linear multiplies in, of trainers and engine side by side, to ``folder``.

    Args:
        trainers: by role; each rank has held its own against the configuration when it was built.
        engine: what :func:`audit_engines` found.
        config: of the run.
        folder: of its logs.

    Returns:
        the sum for the console.
    """
    asked = {role: trainer.linear_formats() for role, trainer in trainers.items()}
    found: dict[str, Sequence[LinearFormat]] = {**results(asked)}
    if engine is not None:
        found |= {"engine": engine}
    table = folder / "linears.tsv"
    write_table(table, found)
    sums = [f"{role}: {summary(formats)}" for role, formats in found.items()]
    return "; ".join([*sums, f"keys and values: {config.engine.kv_cache_dtype}", str(table)])


def engine_formats(names: Iterable[str], engine: EngineConfig, model_dtype: str, *, tied: bool) -> list[LinearFormat]:
    """What the configuration asks of the linears of a model without experts.

    Args:
        names: of the tensors in its Hugging Face folder.
        engine: what it asks.
        model_dtype: type of the weights in training.
        tied: whether the output layer is the embedding.
    """
    plain = engine.dtype(model_dtype)
    heads = [] if tied else [LinearFormat(weight="lm_head.weight", dtype=plain)]
    layers = (name for name in sorted(names) if name.startswith("model.layers.") and name.endswith("_proj.weight"))
    if not engine.quantised:
        return [*(LinearFormat(weight=name, dtype=plain) for name in layers), *heads]
    block = ENGINE_SCALINGS[engine.quantization].block
    scaled = (LinearFormat(weight=name, dtype="float8_e4m3fn", block=block, scale="float32") for name in layers)
    return [*scaled, *heads]
