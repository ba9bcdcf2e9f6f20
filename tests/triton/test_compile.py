"""The kernels are compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is in an environment of its own: make test-triton")
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""That one block may have, by compute capability (NVIDIA, CUDA programming guide, "Technical specifications")."""


def compiled(capability: int) -> list[dict[str, Any]]:
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, program, str(capability), str(SHARED_KIB[capability] * 1024)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": "."},
        check=True,
        capture_output=True,
        text=True,
        timeout=400,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", sorted(SHARED_KIB))
def test_every_choice_compiles_to_pipelined_products_that_fit(capability: int) -> None:
    made = compiled(capability)
    products = [kernel for kernel in made if kernel["kernel"] == "statistics"]
    assert (len(products), len(made)) == (6, 8)  # three choices for each of two types
    for kernel in made:
        assert kernel["shared_bytes"] <= SHARED_KIB[capability] * 1024
    for kernel in products:
        sizes, number_bytes = kernel["constants"], 2 if "*bf16" in kernel["types"] else 4
        assert kernel["tensor_cores"] == (number_bytes == 2)
        assert kernel["asynchronous"]
        tile = number_bytes * sizes["BLOCK_H"] * (sizes["BLOCK_T"] + sizes["BLOCK_V"])
        assert kernel["shared_bytes"] >= 2 * tile  # two stages


def test_a_gpu_with_more_shared_memory_gets_larger_blocks_and_one_with_too_little_is_refused() -> None:
    from megatron_rl.mcore.logprobs_triton import fitting

    def largest(kib: int) -> dict[str, int]:
        blocks: dict[str, int] = fitting(2, kib * 1024)[0].kwargs
        return blocks

    assert largest(227) == {"BLOCK_T": 128, "BLOCK_V": 256, "BLOCK_H": 64}
    assert largest(99) == {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_H": 64}
    with pytest.raises(
        ValueError, match=r"needs 73 KiB .* of 2 bytes, this GPU has 64 KiB: set logprob_kernel='torch'"
    ):
        fitting(2, 64 * 1024)
