"""A push of weights to the CPU engine: GB/s and CPU seconds per GiB, beside a plain copy in memory of the same bytes.

``python benchmarks/sync.py [--tensor 1 2] [--transport shared_memory gloo] [--pushes N]``. The model is a Llama of
126M parameters with random weights in float32, 480 MiB, made on the spot. Sender and engine are processes of their own;
the best of the pushes counts, after one that warms up. Where the machine does other work as well, compare the CPU
seconds; those of a tensor-parallel engine are the sum over its workers.

*Reload alone* is what vLLM needs to take up the same tensors from its own memory: cutting, fusing and packing them for
the CPU's kernels. What a push costs above that is ours: two copies and two hashes of every byte.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.interfaces import PushPhase
from megatron_rl.vllm_engine.engine import EngineSpec, start_engine
from megatron_rl.weights.messages import listen
from megatron_rl.weights.transfer import Channel
from megatron_rl.weights.transports import Transport

GOAL_CPU_S_PER_GIB = 2.0
DEADLINE_S = 120.0
VOCABULARY = 49152


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of moving the whole model once."""

    wall_s: float
    sender_cpu_s: float
    engine_cpu_s: float


def build_model(folder: Path) -> Path:
    """About SmolLM-135M, with a number of heads that two workers can share: many small layers, tied embeddings."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=32,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0")).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def loaded(folder: Path) -> dict[str, Tensor]:
    """The tensors, in memory of this process."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def reload_alone(worker: Any, folder: Path, rounds: int) -> float:
    """Least CPU seconds that one worker of the engine needs to take up tensors that it has; runs in the worker."""
    tensors, receiver, spent = loaded(folder), worker.weight_transfer_engine, []
    receiver._channel = receiver._channel or object()  # it asks for a channel before it lets go of the old weights
    for _ in range(rounds):
        started = time.process_time()
        receiver.start_weight_update()
        receiver.model.load_weights(iter(tensors.items()))
        receiver.finish_weight_update()
        spent.append(time.process_time() - started)
    return min(spent)


def serve(connection: Connection, spec: EngineSpec) -> None:
    """The engine's process: calls of functions of it."""
    engine = start_engine(spec)
    connection.send(engine._worker_pids)
    while (call := connection.recv()) is not None:
        function, args = call
        connection.send(function(engine, *args))
    engine.close()
    connection.send(None)


def call_join(engine: Any, port: int, world_size: int) -> None:
    engine.join("127.0.0.1", port, 1, world_size, DEADLINE_S)


def call_phases(engine: Any, version: int, phases: list[PushPhase]) -> None:
    for phase in phases:
        engine.advance(phase, version, DEADLINE_S)


def call_reload(engine: Any, folder: Path, rounds: int) -> list[float]:
    found: list[float] = engine._engine.collective_rpc(reload_alone, args=(folder, rounds))
    return found


class EngineProcess:
    """An engine in a process of its own."""

    def __init__(self, spec: EngineSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=serve, args=(there, spec))
        self._process.start()
        self._pids = {self._process.pid, *self.answer()}

    def ask(self, function: Callable[..., Any], *args: Any) -> None:
        self._connection.send((function, args))

    def answer(self) -> Any:
        if not self._connection.poll(DEADLINE_S):
            raise TimeoutError(f"no answer within {DEADLINE_S:g} s")
        return self._connection.recv()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        self.ask(function, *args)
        return self.answer()

    def cpu_s(self) -> float:
        times = [psutil.Process(pid).cpu_times() for pid in self._pids]
        return sum(time.user + time.system for time in times)

    def close(self) -> None:
        self._connection.send(None)
        self._process.join(DEADLINE_S)
        self._process.kill()


@contextmanager
def running(spec: EngineSpec) -> Iterator[EngineProcess]:
    """The engine, for the length of the block."""
    engine = EngineProcess(spec)
    try:
        yield engine
    finally:
        engine.close()


def connected(engine: EngineProcess, transport: Transport, tensor: int) -> Channel:
    """A channel to all workers of the engine."""
    listener = listen("127.0.0.1")
    engine.ask(call_join, listener.port, 1 + tensor)
    channel = Channel.open(listener, world_size=1 + tensor, timeout_s=DEADLINE_S, transport=transport, lanes=tensor)
    engine.answer()
    return channel


def push(engine: EngineProcess, channel: Channel, version: int, tensors: Iterable[tuple[str, Tensor]]) -> Cost:
    """One push, from the first phase to the last."""
    engine_before, sender_before, started = engine.cpu_s(), time.process_time(), time.perf_counter()
    engine.ask(call_phases, version, list(PushPhase))
    channel.send(version, tensors)
    engine.answer()
    wall_s, sender = time.perf_counter() - started, time.process_time() - sender_before
    return Cost(wall_s=wall_s, sender_cpu_s=sender, engine_cpu_s=engine.cpu_s() - engine_before)


def copy_cpu_s(size: int, rounds: int) -> float:
    """Least CPU seconds to copy as many bytes within memory that is there already, with one thread."""
    source, target, spent = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8), []
    for _ in range(rounds):
        started = time.process_time()
        target.copy_(source)
        spent.append(time.process_time() - started)
    return min(spent)


def cheapest_push(
    engine: EngineProcess,
    transport: Transport,
    tensor: int,
    tensors: Callable[[], Iterable[tuple[str, Tensor]]],
    pushes: int,
) -> Cost:
    """The processor seconds of the push that took the fewest, and the least seconds of any, after one that warms up."""
    channel = connected(engine, transport, tensor)
    costs = [push(engine, channel, version, tensors()) for version in range(1 + pushes)][1:]
    channel.close()
    best = min(costs, key=lambda cost: cost.sender_cpu_s + cost.engine_cpu_s)
    return replace(best, wall_s=min(cost.wall_s for cost in costs))


def with_pushes(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command's options, with ``--transport`` and ``--pushes``; this process sends with one thread."""
    names = [transport.name.lower() for transport in (Transport.SHARED_MEMORY, Transport.GLOO)]
    parser.add_argument("--transport", nargs="+", choices=names, default=names)
    parser.add_argument("--pushes", type=int, default=4)
    options = parser.parse_args()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    return options


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor", type=int, nargs="+", default=[1, 2], help="workers of the engine; must divide 8")
    options = with_pushes(parser)
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = build_model(Path(name))
        tensors = loaded(folder)
        size = sum(tensor.nbytes for tensor in tensors.values())
        gib = size / 2**30
        copy_s = copy_cpu_s(size, options.pushes)
        print(
            f"{len(tensors)} tensors, {size / 1e6:.0f} MB; a copy in memory: {size / 1e9 / copy_s:.1f} GB/s,", end=" "
        )
        print(f"{copy_s / gib:.2f} CPU s/GiB")
        print("| engine | transport | GB/s | CPU s/GiB | sender | engine | vLLM's reload alone | ours |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for tensor in options.tensor:
            spec = EngineSpec(
                model=folder,
                dtype="float32",
                max_model_len=64,
                kv_cache_mib=64,
                max_concurrent=8,
                on_cpu=True,
                tensor=tensor,
            )
            with running(spec) as engine:
                for transport in (Transport[name.upper()] for name in options.transport):
                    best = cheapest_push(engine, transport, tensor, tensors.items, options.pushes)
                    reload_s = sum(engine.call(call_reload, folder, options.pushes))
                    total = (best.sender_cpu_s + best.engine_cpu_s) / gib
                    print(
                        f"| TP{tensor} | {transport.value} | {size / 1e9 / best.wall_s:.2f} "
                        f"| {total:.2f} | {best.sender_cpu_s / gib:.2f} | {best.engine_cpu_s / gib:.2f} "
                        f"| {reload_s / gib:.2f} | {total - reload_s / gib:.2f} |",
                        flush=True,
                    )
                    failed |= tensor == 1 and total > GOAL_CPU_S_PER_GIB
    if failed:
        sys.exit(f"a push to an engine of one worker must take at most {GOAL_CPU_S_PER_GIB} CPU seconds per GiB")


if __name__ == "__main__":
    main()
