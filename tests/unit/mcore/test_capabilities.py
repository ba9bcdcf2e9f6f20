from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.mcore import capabilities as module
from megatron_rl.mcore.capabilities import BrokenLibrary, capabilities, uses_transformer_engine

Installed = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """Pretend that libraries are there, or fail in some way, and that there is a GPU."""
    load = importlib.import_module

    def pretend(*, engine: Any = None, apex: bool = False, cuda: bool = False) -> None:
        def found(name: str) -> Any:
            top = name.partition(".")[0]
            if top == "transformer_engine":
                if isinstance(engine, Exception):
                    raise engine
                if engine is None:
                    raise ModuleNotFoundError("No module named 'transformer_engine'", name="transformer_engine")
                return SimpleNamespace(__version__=engine)
            if top == "apex":
                if not apex:
                    raise ModuleNotFoundError("No module named 'apex'", name="apex")
                return SimpleNamespace()
            return load(name)

        monkeypatch.setattr(module, "importlib", SimpleNamespace(import_module=found))
        monkeypatch.setattr(module, "has_cuda", lambda: cuda)
        _forget()

    yield pretend
    _forget()


def _forget() -> None:
    module.transformer_engine_version.cache_clear()
    module._has_apex.cache_clear()


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
    ],
)
def test_a_half_installed_transformer_engine_is_one_clear_error(machine: Installed, error: Exception) -> None:
    machine(engine=error)
    with pytest.raises(BrokenLibrary, match=r"must import or be absent, found it in part: \w+: .*uninstall"):
        uses_transformer_engine("auto", "bfloat16")
