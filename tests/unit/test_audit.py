from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl.assemble.audit import AuditFailed, audit_engines
from megatron_rl.config.schema import EngineConfig
from megatron_rl.linear_formats import LinearFormat
from tests.fakes import Ready
from tests.unit.test_config import MODEL

LINEARS = [
    LinearFormat(weight=f"model.layers.0.mlp.{name}_proj.weight", dtype="float8_e4m3fn", block=(1, 0), scale="float32")
    for name in ("down", "up")
]
HEAD = LinearFormat(weight="lm_head.weight", dtype="bfloat16")


@pytest.fixture
def config(tmp_path: Path) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"tie_word_embeddings": False}))
    save_file({linear.weight: torch.zeros(2, 2) for linear in [*LINEARS, HEAD]}, tmp_path / "model.safetensors")
    return SimpleNamespace(
        engine=EngineConfig(quantization="fp8_per_channel"),
        model=SimpleNamespace(path=tmp_path, dtype="float32"),
        run_dir=tmp_path / "run",
    )


def engines(*formats: list[LinearFormat]) -> Any:
    return SimpleNamespace(linear_formats=lambda: Ready(list(formats)))


def test_the_table_of_engines_that_are_as_asked_is_kept(config: Any) -> None:
    told = audit_engines(engines([*LINEARS, HEAD], [HEAD, *LINEARS]), config, config.model.path, config.run_dir)
    table = config.run_dir / "engine_linears.tsv"
    assert told == (
        "engine: 2 linears in float8_e4m3fn with a float32 scale per 1 x all, 1 linears in bfloat16; "
        f"keys and values: auto; {table}"
    )
    assert len(table.read_text().splitlines()) == 3


def test_a_layer_left_unquantised_in_one_of_the_engines_ends_the_start(config: Any) -> None:
    left = replace(LINEARS[1], dtype="bfloat16", block=None, scale=None)
    with pytest.raises(AuditFailed, match=r"engine 1: model\.layers\.0\.mlp\.up_proj\.weight must be float8_e4m3fn .*"):
        audit_engines(engines([*LINEARS, HEAD], [LINEARS[0], left, HEAD]), config, config.model.path, config.run_dir)
    assert not config.run_dir.exists()
