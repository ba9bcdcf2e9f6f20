"""A reward worker: the process that runs a rule on model text and may be killed at any time.

Started by :class:`megatron_rl.rewards.service.RewardService` as ``python -m megatron_rl.rewards.worker``. Its standard
input brings one start message with the rule, then batches; its standard output carries ``{"ready": true}`` and one
answer per sample, in order (see :mod:`megatron_rl.rewards.wire`). A worker that runs out of memory ends: what filled it
may still be there, and it would fail the next samples too, sooner than others score theirs.
"""

from __future__ import annotations

import argparse
import base64
import math
import os
import pickle
import resource
import signal
import time
from typing import Any, BinaryIO

from megatron_rl.dataflow import Finish
from megatron_rl.lifetime import die_with_parent
from megatron_rl.rewards import wire
from megatron_rl.rewards.rules import RewardRule
from megatron_rl.rewards.second_opinion import preload


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(description="internal: a worker of megatron_rl's reward service")
    parser.add_argument("--parent", type=int, required=True, help="process id of the service")
    parser.add_argument("--memory-bytes", type=int, help="limit of the address space")
    options = parser.parse_args()
    die_with_parent(options.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the service's business: it closes its workers
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if options.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (options.memory_bytes, options.memory_bytes))
    incoming, outgoing = _private_streams()
    start = wire.read(incoming)
    if start is None:
        return
    try:
        # Pickled by the service from its own rule, never from model text.
        rule: RewardRule = pickle.loads(base64.b64decode(start["rule"]))
        _ = rule.failure_value  # loads the file of a user's rule
        preload()  # before any sample's clock runs
    except BaseException as error:
        _send(outgoing, {"failed": f"{type(error).__name__}: {error}"})
        return
    _send(outgoing, {"ready": True})
    try:
        while (batch := wire.read(incoming)) is not None:
            for index, text, answer, finish in batch["samples"]:
                _send(outgoing, {"index": index, **_score(rule, text, answer, Finish(finish))})
    except MemoryError:
        os._exit(wire.MEMORY_FULL)
    os._exit(0)


def _score(rule: RewardRule, text: str, answer: str, finish: Finish) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        score = rule(text, answer, finish)
        value = float(score.value)
        parts = {str(key): float(part) for key, part in score.parts.items()}
        for name, number in {"value": value, **{f"part {key!r}": part for key, part in parts.items()}}.items():
            if not math.isfinite(number):
                raise ValueError(f"a score must be finite, the rule returned {number} as its {name}")
        said = None if score.answer is None else str(score.answer)
        result: dict[str, Any] = {"value": value, "parts": parts, "outcome": score.outcome.value, "answer": said}
    except MemoryError:
        raise
    except BaseException as error:  # a rule that calls sys.exit() must not end the worker
        result = {"error": f"{type(error).__name__}: {error}"[:500]}
    result["seconds"] = time.perf_counter() - begin
    return result


def _send(stream: BinaryIO, message: dict[str, Any]) -> None:
    stream.write(wire.encode({**message, "cpu_seconds": time.process_time()}))
    stream.flush()


def _private_streams() -> tuple[BinaryIO, BinaryIO]:
    """Move the pipes to other descriptors, so that a rule's ``print`` or ``input`` cannot break the protocol."""
    incoming, outgoing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb")


if __name__ == "__main__":
    main()
