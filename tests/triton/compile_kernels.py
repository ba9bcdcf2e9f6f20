"""Compile the kernels for GPUs that need not be here, and print what each asks of them as JSON lines.

A program of its own: where Triton interprets, it does not compile.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_rl.mcore import logprobs_triton as module


def report(
    name: str, kernel: object, types: str, constants: dict[str, object], capability: int, **options: int
) -> None:
    arguments = [argument for argument in kernel.arg_names if argument not in constants]
    signature = dict(zip(arguments, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
    # what Triton finds out at a call: pointers and sizes of models are multiples of 16
    even = [i for i, name in enumerate(arguments) if name.endswith("_ptr") or name in ("hidden_size", "width", "real")]
    whole = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(kernel, signature, constants, whole)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = made.asm["ptx"]
    found = {"kernel": name, "capability": capability, "shared_bytes": made.metadata.shared, "constants": constants}
    found |= {"tensor_cores": "wgmma" in ptx or "mma.sync" in ptx, "asynchronous": "cp.async" in ptx}
    print(json.dumps(found))


for entropy in (True, False):
    for capability in map(int, sys.argv[1:]):
        for config in module._statistics.configs:
            report(
                "statistics",
                module._statistics.fn,
                "*bf16 *bf16 *i64 *fp32 i32 i32 i32 fp32 i32",
                {"WITH_ENTROPY": entropy, **config.kwargs},
                capability,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
        report(
            "gradients",
            module._gradients,
            "*bf16 *i64 *fp32 *fp32 *fp32 *fp32 i32 i32 fp32",
            {"WITH_ENTROPY": entropy, "BLOCK_V": 4096},
            capability,
            num_warps=8,
        )
