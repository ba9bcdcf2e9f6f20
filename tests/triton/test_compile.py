"""The kernels are compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is in an environment of its own: make test-triton")
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that one block may have, by compute capability


@pytest.mark.parametrize("capability", sorted(SHARED_BYTES))
def test_every_choice_compiles_to_pipelined_tensor_core_products_that_fit(capability: int) -> None:
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, program, str(capability)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": "."},
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    made = [json.loads(line) for line in done.stdout.splitlines()]
    products = [kernel for kernel in made if kernel["kernel"] == "statistics"]
    assert (len(products), len(made)) == (6, 8)
    for kernel in made:
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability]
    for kernel in products:
        sizes = kernel["constants"]
        assert kernel["tensor_cores"]
        assert kernel["asynchronous"]
        assert kernel["shared_bytes"] >= 2 * 2 * sizes["BLOCK_H"] * (sizes["BLOCK_T"] + sizes["BLOCK_V"])  # two stages
