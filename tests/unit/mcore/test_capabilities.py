from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config.precision import FP8Config
from megatron_rl.config.schema import ModelConfig, OptimizerConfig, TrainerConfig
from megatron_rl.mcore import capabilities as module
from megatron_rl.mcore import spec as spec_module
from megatron_rl.mcore.capabilities import BrokenLibrary, capabilities, uses_transformer_engine
from megatron_rl.mcore.spec import WorkerSpec, fp8_faults
from megatron_rl.model_dims import dims_from_config
from megatron_rl.weights.weight_map import Head

SIZES = {
    "architectures": ["Qwen2ForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 3,
}
Installed = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """Pretend that libraries are there, or fail in some way, and that there is a GPU."""
    load = importlib.import_module

    def pretend(
        *,
        engine: Any = None,
        apex: bool = False,
        cuda: bool = False,
        capability: tuple[int, int] = (9, 0),
        flash: bool = False,
    ) -> None:
        def found(name: str) -> Any:
            top = name.partition(".")[0]
            if top == "transformer_engine":
                if isinstance(engine, Exception):
                    raise engine
                if engine is None:
                    raise ModuleNotFoundError("No module named 'transformer_engine'", name="transformer_engine")
                return SimpleNamespace(__version__=engine, FlashAttentionUtils=SimpleNamespace(is_installed=flash))
            if top == "apex":
                if not apex:
                    raise ModuleNotFoundError("No module named 'apex'", name="apex")
                return SimpleNamespace()
            return load(name)

        monkeypatch.setattr(module, "importlib", SimpleNamespace(import_module=found))
        monkeypatch.setattr(module, "has_cuda", lambda: cuda)
        monkeypatch.setattr(module, "compute_capability", lambda: capability)
        _forget()

    yield pretend
    _forget()


def _forget() -> None:
    module.transformer_engine_version.cache_clear()
    module._has_apex.cache_clear()
    module.fuses_packed_rows.cache_clear()


def used(layers: str = "auto") -> dict[str, str]:
    return {row.part: row.used for row in capabilities(layers)}


def test_without_transformer_engine_and_apex_all_is_torch_and_megatron_core(machine: Installed) -> None:
    machine()
    assert used() == {
        "linear layers": "megatron-core, no FP8",
        "norm": "torch RMSNorm",
        "attention": "torch SDPA, rows of like length",
        "Adam": "torch fused AdamW",
    }


def test_transformer_engine_is_used_where_there_is_a_gpu(machine: Installed) -> None:
    machine(engine="2.20.2", cuda=True)
    assert {part: name.split(",")[0] for part, name in used().items()} == {
        "linear layers": "Transformer Engine 2.20.2",
        "norm": "Transformer Engine 2.20.2",
        "attention": "Transformer Engine 2.20.2",
        "Adam": "Transformer Engine 2.20.2 FusedAdam",
    }
    assert used("local")["linear layers"] == "megatron-core, no FP8"
    assert not uses_transformer_engine("local", "bfloat16")


@pytest.mark.parametrize(
    ("capability", "flash", "attention"),
    [
        ((8, 0), False, "torch SDPA, rows of like length"),
        ((8, 9), False, "torch SDPA, rows of like length"),
        ((8, 0), True, "Transformer Engine 2.20.2, fused, packed rows"),
        ((9, 0), False, "Transformer Engine 2.20.2, fused, packed rows"),
    ],
)
def test_packed_rows_are_fused_from_hopper_on_or_by_flash_attention(
    machine: Installed, capability: tuple[int, int], flash: bool, attention: str
) -> None:
    machine(engine="2.20.2", cuda=True, capability=capability, flash=flash)
    row = next(row for row in capabilities() if row.part == "attention")
    assert row.used == attention
    if attention.startswith("torch"):
        named = ".".join(map(str, capability))
        assert row.why == f"Transformer Engine's needs compute capability 9.0 or flash-attn 2, this GPU has {named}"
    assert used()["linear layers"] == "Transformer Engine 2.20.2, FP8 possible"


def test_apex_serves_the_optimizer_alone(machine: Installed) -> None:
    machine(apex=True, cuda=True)
    assert used()["Adam"] == "Apex FusedAdam"
    assert used()["norm"] == "torch RMSNorm"


@pytest.mark.parametrize(
    ("engine", "cuda", "dtype", "lacks"),
    [
        (None, True, "bfloat16", "Transformer Engine is not installed"),
        ("2.20.2", False, "bfloat16", "there is no GPU"),
        ("2.20.2", True, "float32", "model.dtype is not bfloat16"),
    ],
)
def test_asking_for_what_is_not_there_is_an_error(
    machine: Installed, engine: Any, cuda: bool, dtype: str, lacks: str
) -> None:
    machine(engine=engine, cuda=cuda)
    assert not uses_transformer_engine("auto", dtype)
    assert capabilities("auto", dtype)[0].why == lacks
    with pytest.raises(ValueError, match=f"model.layers='transformer_engine' cannot be: {lacks}"):
        uses_transformer_engine("transformer_engine", dtype)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("libtransformer_engine.so"),
        OSError("undefined symbol: cublasLtGroupedMatrixLayoutInit_internal"),
        ModuleNotFoundError("No module named 'transformer_engine_torch'", name="transformer_engine_torch"),
        AssertionError("Could not find `transformer_engine_torch`"),
    ],
)
def test_a_half_installed_transformer_engine_is_one_clear_error(machine: Installed, error: Exception) -> None:
    machine(engine=error)
    with pytest.raises(BrokenLibrary, match=r"must import or be absent, found it in part: \w+: .*uninstall"):
        uses_transformer_engine("auto", "bfloat16")


@pytest.mark.parametrize(("engine", "says"), [(None, ["fp8: needs Transformer Engine's layers"]), ("2.20.2", [])])
def test_fp8_on_the_right_gpu_still_needs_transformer_engine(
    machine: Installed, monkeypatch: pytest.MonkeyPatch, engine: Any, says: list[str]
) -> None:
    machine(engine=engine, cuda=True)
    monkeypatch.setattr(spec_module, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(spec_module, "cuda_version", lambda: (13, 0))
    trainer = TrainerConfig(optimizer=OptimizerConfig(lr=1.0), fp8=FP8Config())
    spec = WorkerSpec(
        role="policy",
        head=Head.TOKEN,
        model=ModelConfig(path=Path("model")),
        dims=dims_from_config(SIZES),
        trainer=trainer,
        temperature=1.0,
        total_updates=1,
        seed=0,
        keep_reference=False,
    )
    assert [fault.partition(": Transformer")[0] for fault in fp8_faults(spec)] == says
