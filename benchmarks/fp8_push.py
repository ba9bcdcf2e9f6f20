"""A push to a CPU engine in FP8 (per channel), quantised by the engine and by the sender: bytes and seconds.

``python benchmarks/fp8_push.py [--transport shared_memory gloo] [--pushes N]``. The model is that of
``benchmarks/sync.py``, in bfloat16. The best of the pushes counts, after one that warms up; the sender's CPU seconds
hold its rounding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for benchmarks.sync, wherever this is started

from benchmarks.sync import build_model, cheapest_push, loaded, running, with_pushes
from megatron_rl.model_dims import read_model_dims
from megatron_rl.vllm_engine.engine import EngineSpec
from megatron_rl.weights.fp8_push import quantised
from megatron_rl.weights.transports import Transport
from megatron_rl.weights.weight_map import Head, weight_map

FORMAT = "fp8_per_channel"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = with_pushes(parser)
    with tempfile.TemporaryDirectory() as name:
        folder = build_model(Path(name))
        names_of = weight_map(read_model_dims(folder), Head.TOKEN)
        plain = {name: tensor.bfloat16() for name, tensor in loaded(folder).items()}

        def sent(by_trainer: bool) -> Iterator[tuple[str, Tensor]]:
            return quantised(plain.items(), names_of, FORMAT) if by_trainer else iter(plain.items())

        print("| quantised by | transport | MB | s | CPU s | sender | engine |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for by_trainer in (False, True):
            size = sum(tensor.nbytes for _, tensor in sent(by_trainer))
            spec = EngineSpec(
                model=folder,
                dtype="bfloat16",
                max_model_len=64,
                kv_cache_mib=64,
                max_concurrent=8,
                on_cpu=True,
                quantization=FORMAT,
                pushed_quantised=by_trainer,
            )
            with running(spec) as engine:
                for transport in (Transport[name.upper()] for name in options.transport):
                    best = cheapest_push(engine, transport, 1, partial(sent, by_trainer), options.pushes)
                    print(
                        f"| {'trainer' if by_trainer else 'engine'} | {transport.value} | {size / 1e6:.0f} "
                        f"| {best.wall_s:.2f} | {best.sender_cpu_s + best.engine_cpu_s:.2f} "
                        f"| {best.sender_cpu_s:.2f} | {best.engine_cpu_s:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
