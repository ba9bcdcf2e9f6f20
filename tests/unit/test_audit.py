from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl.assemble.audit import AuditFailed, audit_engines, keep_formats
from megatron_rl.config.schema import EngineConfig
from megatron_rl.linear_formats import LinearFormat
from megatron_rl.ray_runtime.roles import RemoteTrainer
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


def trainer(*by_rank: list[LinearFormat]) -> RemoteTrainer:
    """One whose ranks hold these linears."""
    group: Any = SimpleNamespace(call=lambda verb, finish: Ready(finish({"formats": list(by_rank)}[verb])))
    return RemoteTrainer(group)


def test_the_table_has_what_trainers_and_engines_were_found_to_have(config: Any) -> None:
    engine = audit_engines(engines([*LINEARS, HEAD], [HEAD, *LINEARS]), config, config.model.path)
    assert engine == [*LINEARS, HEAD]
    down, up = (replace(linear, dtype="bfloat16", block=None, scale=None) for linear in LINEARS)
    by_block = replace(down, dtype="float8_e4m3fn", block=(128, 128), scale="float32")
    trainers = {"policy": trainer([by_block], [up]), "critic": trainer([down, up], [down, up])}
    table = config.run_dir / "linears.tsv"
    assert keep_formats(trainers, engine, config, config.run_dir) == (
        "policy: 1 linears in float8_e4m3fn with a float32 scale per 128 x 128, 1 linears in bfloat16; "
        "critic: 2 linears in bfloat16; "
        "engine: 2 linears in float8_e4m3fn with a float32 scale per 1 x all, 1 linears in bfloat16; "
        f"keys and values: auto; {table}"
    )
    assert [line.split("\t") for line in table.read_text().splitlines()] == [
        ["weight", "policy", "critic", "engine"],
        [
            down.weight,
            "float8_e4m3fn with a float32 scale per 128 x 128",
            "bfloat16",
            "float8_e4m3fn with a float32 scale per 1 x all",
        ],
        [up.weight, "bfloat16", "bfloat16", "float8_e4m3fn with a float32 scale per 1 x all"],
        [HEAD.weight, "no linear", "no linear", "bfloat16"],
    ]


def test_engines_that_are_not_looked_at_have_no_column(config: Any) -> None:
    assert "engine" not in keep_formats({"policy": trainer(LINEARS)}, None, config, config.run_dir).split(";")[0]
    assert (config.run_dir / "linears.tsv").read_text().splitlines()[0] == "weight\tpolicy"


def test_ranks_that_multiply_a_linear_differently_are_told() -> None:
    other = replace(LINEARS[0], dtype="bfloat16", block=None, scale=None)
    with pytest.raises(RuntimeError, match=r"ranks must agree on model.layers.0.mlp.down_proj.weight: rank 1 has"):
        trainer(LINEARS, [other]).linear_formats().result()


def test_a_layer_left_unquantised_in_one_of_the_engines_ends_the_start(config: Any) -> None:
    left = replace(LINEARS[1], dtype="bfloat16", block=None, scale=None)
    with pytest.raises(AuditFailed, match=r"engine 1: model\.layers\.0\.mlp\.up_proj\.weight must be float8_e4m3fn .*"):
        audit_engines(engines([*LINEARS, HEAD], [LINEARS[0], left, HEAD]), config, config.model.path)
