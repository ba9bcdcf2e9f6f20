"""Everything that is claimed of GPUs, measured: ``python benchmarks/gpu.py [--gpus N] [--only CHECK ...]``.

At most ten minutes on one H100 or H200, with whatever is installed: what is missing is named and its checks are left
out. Each check is a process with a deadline, its part of ``--minutes``; one that overruns it is ended and keeps what it
had. Every figure is in ``--json`` a second after it was measured, so that nothing is lost whoever ends the command; at
the end of each check the page is written to ``--table``. ``--device cpu`` runs the small form of those checks that need
no GPU, and writes no table unless asked. Exit status: 0, or 1 where a check failed, overran or missed a goal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_checks.plan import (
    CHECKS,
    Check,
    Result,
    Row,
    deadline_s,
    measured,
    present_features,
    present_parts,
    refusal,
)
from benchmarks.gpu_checks.table import document
from megatron_rl.durable import replace_text
from megatron_rl.version_matrix import installed, python_release

if TYPE_CHECKING:
    from benchmarks.gpu_checks.case import Case

_LOOK_S = 1.0
_MINUTES, _MINUTES_OF_SEVERAL = 10.0, 16.0
"""For one GPU, and with parallel layouts."""


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """What was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", type=int, default=1, help="to use; two or more also check parallel layouts")
    parser.add_argument(
        "--minutes", type=float, help=f"for all checks: {_MINUTES:g}, {_MINUTES_OF_SEVERAL:g} with parallel layouts"
    )
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS], metavar="CHECK")
    parser.add_argument("--json", type=Path, default=Path("gpu_results.json"))
    parser.add_argument("--table", type=Path, help="default: docs/gpu_results.md on a GPU")
    parser.add_argument("--one", nargs=4, metavar=("CHECK", "GPUS", "FILE", "SCRATCH"), help=argparse.SUPPRESS)
    return parser.parse_args(given)


def measures() -> dict[str, Callable[[Case], Iterator[Row]]]:
    """What measures, by the name of the check."""
    from benchmarks.gpu_checks import measure, planned, steps, trainings

    functions = (
        measure.ceilings,
        measure.logprobs,
        measure.attention,
        trainings.training,
        trainings.training_fp8,
        planned.plans,
        steps.ppo,
        steps.ppo_fp8,
        trainings.layouts,
        trainings.layouts_fp8,
    )
    return {function.__name__: function for function in functions}


def run_one(name: str, gpus: int, asked_gpus: int, file: Path, scratch: Path) -> None:
    """Measure in this process; ``file`` has the figures so far, the last one of each name."""
    from benchmarks.gpu_checks.case import Case

    rows: dict[str, Row] = {}
    for row in measures()[name](Case(gpus=gpus, asked_gpus=asked_gpus, scratch=scratch)):
        rows[row.what] = row
        replace_text(file, json.dumps([vars(row) for row in rows.values()]))


def run_check(
    check: Check,
    gpus: int,
    asked_gpus: int,
    *,
    limit_s: float,
    scratch: Path,
    tell: Callable[[Result], None] = lambda result: None,
    program: Path = Path(__file__),
) -> Result:
    """In a process of its own, which is ended at its deadline with all that it started.

    Args:
        check: which.
        gpus: on this machine; 0 is the small form on a CPU.
        asked_gpus: of ``--gpus``.
        limit_s: its deadline.
        scratch: a folder that all checks share.
        tell: gets the result so far whenever there are new figures.
        program: this one.
    """
    started = time.monotonic()
    rows: tuple[Row, ...] = ()
    file, log = scratch / f"{check.name}.json", scratch / f"{check.name}.out"
    command = [sys.executable, program, "--gpus", str(asked_gpus), "--one", check.name, str(gpus), file, scratch]
    with log.open("w") as output:
        environment = os.environ if gpus else os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True, env=environment
        )
        try:
            status = None
            while status is None and (left := started + limit_s - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(min(left, _LOOK_S))
                if (found := _rows(file)) != rows:
                    rows = found
                    tell(_result(check, "running", "", started, rows))
        finally:
            _end(process)
    rows = _rows(file)
    if status is None:
        reason = f"not done within {limit_s:.3g} s, {len(rows)} figures until then: {log.read_text()[-300:]}"
        return _result(check, "overrun", reason, started, rows)
    if status:
        return _result(check, "failed", f"exit status {status}: {log.read_text()[-1500:]}", started, rows)
    return measured(check.name, rows, time.monotonic() - started)


def _result(check: Check, status: str, reason: str, started: float, rows: tuple[Row, ...]) -> Result:
    return Result(check=check.name, status=status, reason=reason, seconds=time.monotonic() - started, rows=rows)


def _rows(file: Path) -> tuple[Row, ...]:
    return tuple(Row(**row) for row in json.loads(file.read_text())) if file.exists() else ()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of a check's session, also after Ctrl-C."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(given: Sequence[str]) -> int:
    """Run the checks and write what came of them."""
    asked = arguments(given)
    if asked.one is not None:
        name, gpus, file, scratch = asked.one
        run_one(name, int(gpus), asked.gpus, Path(file), Path(scratch))
        return 0
    import torch

    from megatron_rl.device import gpu_count

    end = time.monotonic() + 60 * (asked.minutes or (_MINUTES if asked.gpus == 1 else _MINUTES_OF_SEVERAL))
    gpus = gpu_count() if asked.device == "cuda" else 0
    if asked.device == "cuda" and gpus < asked.gpus:
        print(f"benchmarks/gpu.py: --gpus {asked.gpus}, but torch sees {gpus} GPUs; --device cpu runs the small form")
        return 1
    table = asked.table or (ROOT / "docs" / "gpu_results.md" if gpus else None)
    head = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name(0) if gpus else "CPU (small form; the figures mean nothing)",
        "versions": {"python": python_release(), **installed()},
        "command": shlex.join(["python", "benchmarks/gpu.py", *given]),
    }
    results: list[Result] = []

    def write(*running: Result) -> None:
        so_far = [*results, *running]
        replace_text(asked.json, json.dumps([result.as_json() for result in so_far], indent=2) + "\n")

    chosen = [check for check in CHECKS if not asked.only or check.name in asked.only]
    known = {"parts": present_parts(), "features": present_features()}
    refused = {check.name: refusal(check, gpus=gpus, asked_gpus=asked.gpus, **known) for check in chosen}
    waiting = [check for check in chosen if refused[check.name] is None]
    left = end - time.monotonic()
    parts = {check.name: deadline_s(check, [other for other in waiting if other != check], left) for check in waiting}
    print(f"{left:.0f} s:", ", ".join(f"{name} {part:.0f}" for name, part in parts.items()) or "no check", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-checks-") as folder:
        for check in chosen:
            result = refused[check.name]
            if result is None:
                waiting.remove(check)
                limit = deadline_s(check, waiting, end - time.monotonic())
                result = run_check(check, gpus, asked.gpus, limit_s=limit, scratch=Path(folder), tell=write)
            results.append(result)
            print(f"{check.name}: {result.status} {result.reason} ({result.seconds:.0f} s)", flush=True)
            write()
            if table is not None:
                replace_text(table, document(results, **head))
    if table is not None:
        print(table.read_text())
    return int(any(result.status in ("failed", "overrun", "missed") for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
