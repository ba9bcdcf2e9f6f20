"""Compile the kernels for a GPU that need not be here, of a compute capability (90) and so many bytes of shared memory
per block, and print what each asks of it as JSON lines.

A program of its own: where Triton interprets, it does not compile.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_rl.mcore import logprobs_triton as module

NUMBERS = {"bf16": 2, "fp32": 4}
PRODUCTS = ("wgmma", "mma.sync", "tcgen05.mma")


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
    found = {"kernel": name, "types": types, "shared_bytes": made.metadata.shared, "constants": constants}
    found |= {"tensor_cores": any(each in ptx for each in PRODUCTS), "asynchronous": "cp.async" in ptx}
    print(json.dumps(found))


capability, limit = map(int, sys.argv[1:])
for name, size in NUMBERS.items():
    for config in module.fitting(size, limit):
        report(
            "statistics",
            module._statistics.fn,
            f"*{name} *{name} *i64 *fp32 i32 i32 i32 fp32 i32",
            {"WITH_ENTROPY": True, **config.kwargs},  # which asks for more than without
            capability,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    report(
        "gradients",
        module._gradients,
        f"*{name} *i64 *fp32 *fp32 *fp32 *fp32 i32 i32 fp32",
        {"WITH_ENTROPY": True, "BLOCK_V": 4096},
        capability,
        num_warps=8,
    )
