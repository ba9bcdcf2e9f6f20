from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.assemble.audit import engine_formats
from megatron_rl.config.schema import EngineConfig
from megatron_rl.linear_formats import LinearFormat, first_difference, summary, write_table

A = LinearFormat(weight="a.weight", dtype="float8_e4m3fn", block=(1, 0), scale="float32")
B = LinearFormat(weight="b.weight", dtype="bfloat16")


def test_equal_formats_have_no_difference_in_any_order() -> None:
    assert first_difference([A, B], [B, A]) is None


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            [replace(A, block=None, scale=None, dtype="bfloat16"), replace(B, dtype="float32")],
            "a.weight must be float8_e4m3fn with a float32 scale per 1 x all, found bfloat16",
        ),
        (
            [replace(A, block=(128, 128)), B],
            "a.weight must be float8_e4m3fn with a float32 scale per 1 x all, found float8_e4m3fn with a float32 scale "
            "per 128 x 128",
        ),
        ([A], "b.weight must be bfloat16, found no linear"),
        ([A, B, replace(B, weight="c.weight")], "c.weight must be no linear, found bfloat16"),
    ],
)
def test_the_first_linear_that_differs_is_named(found: list[LinearFormat], told: str) -> None:
    assert first_difference([A, B], found) == told


def test_the_table_has_a_line_per_linear(tmp_path: Path) -> None:
    write_table(
        tmp_path / "logs" / "linears.tsv", {"policy": [replace(A, dtype="bfloat16", block=None)], "engine": [B, A]}
    )
    assert (tmp_path / "logs" / "linears.tsv").read_text().splitlines() == [
        "weight\tpolicy\tengine",
        "a.weight\tbfloat16\tfloat8_e4m3fn with a float32 scale per 1 x all",
        "b.weight\tno linear\tbfloat16",
    ]
    assert summary([A, B, replace(A, weight="c.weight")]) == (
        "2 linears in float8_e4m3fn with a float32 scale per 1 x all, 1 linears in bfloat16"
    )


NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"]


@pytest.mark.parametrize(
    ("quantization", "block"), [("fp8_per_tensor", (0, 0)), ("fp8_per_channel", (1, 0)), ("fp8_per_block", (128, 128))]
)
def test_a_configuration_asks_for_the_linears_of_the_layers_and_leaves_the_head(
    quantization: str, block: tuple[int, int]
) -> None:
    engine = EngineConfig(quantization=quantization)  # type: ignore[arg-type]
    up = LinearFormat(weight=NAMES[1], dtype="float8_e4m3fn", block=block, scale="float32")
    head = LinearFormat(weight="lm_head.weight", dtype="bfloat16")
    assert engine_formats(NAMES, engine, "float32", tied=False) == [up, head]
    assert engine_formats(NAMES, engine, "float32", tied=True) == [up]
    assert engine_formats(NAMES, EngineConfig(), "float32", tied=True) == [
        LinearFormat(weight=NAMES[1], dtype="float32")
    ]
