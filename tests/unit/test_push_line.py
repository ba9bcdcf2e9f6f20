from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.assemble.roles import push_line
from megatron_rl.config.schema import EngineConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.weights.plan import HfFiles, transfer_plan
from megatron_rl.weights.transports import Transport
from megatron_rl.weights.weight_map import Head, weight_map
from tests.unit.weights.models import dims

SIZES = dims("LlamaForCausalLM", hidden_size=1000, head_dim=250, intermediate_size=2000, vocab_size=3000)
# 3 M each of embedding and head; a layer: queries, projection 1 M, keys, values 0.5 M, gate, up, down 2 M, 2 norms


@pytest.mark.parametrize(
    ("layout", "dtype", "told"),
    [
        (ParallelLayout(), "bfloat16", "48.0 MB of bfloat16; 0 other rank(s) give it 0.0 MB first"),
        (ParallelLayout(pipeline=2), "bfloat16", "48.0 MB of bfloat16; 1 other rank(s) give it 24.0 MB first"),
        (ParallelLayout(pipeline=2, data=2), "float32", "96.0 MB of float32; 1 other rank(s) give it 48.0 MB first"),
    ],
    ids=str,
)
def test_a_run_says_what_each_push_moves(layout: ParallelLayout, dtype: str, told: str) -> None:
    config: Any = SimpleNamespace(
        engine=EngineConfig(count=2),
        model=SimpleNamespace(dtype=dtype),
        policy=SimpleNamespace(layout=layout),
        pushed_format=None,
    )
    size = {"bfloat16": 2, "float32": 4}[dtype]
    moved = transfer_plan(weight_map(SIZES, Head.TOKEN), layout, HfFiles(), element_bytes=size).bytes_by_pair()
    line = push_line(config, moved, Transport.SHARED_MEMORY)
    assert line == f"weights go from the policy's rank 0 to 2 engine worker(s) by shared memory: {told}"
    config.pushed_format = "fp8_per_block"
    assert f" of {dtype}, which it quantises to fp8_per_block; " in push_line(config, moved, Transport.SHARED_MEMORY)
