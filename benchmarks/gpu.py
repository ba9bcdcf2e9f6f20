"""Everything that is claimed of GPUs, measured: ``python benchmarks/gpu.py [--gpus N] [--only CHECK ...]``.

At most ten minutes on one H100 or H200, with whatever is installed: what is missing is named and its checks are left
out. Each check is a process with a deadline; after each, the results so far are written to ``--json``, and at the end
to ``--table``. ``--device cpu`` runs the small form of those checks that need no GPU, and writes no table unless asked.
Exit status: 0, or 1 where a check failed or missed a goal.
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
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_checks.plan import (
    CHECKS,
    Check,
    Result,
    Row,
    measured,
    present_features,
    present_parts,
    refusal,
)
from benchmarks.gpu_checks.table import document
from megatron_rl.version_matrix import installed, python_release


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """What was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpus", type=int, default=1, help="to use; two or more also check parallel layouts")
    parser.add_argument("--only", nargs="+", choices=[check.name for check in CHECKS], metavar="CHECK")
    parser.add_argument("--json", type=Path, default=Path("gpu_results.json"))
    parser.add_argument("--table", type=Path, help="default: docs/gpu_results.md on a GPU")
    parser.add_argument("--one", nargs=3, metavar=("CHECK", "GPUS", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args(given)


def run_one(name: str, gpus: int, asked_gpus: int, file: Path) -> None:
    """Measure in this process; leave the rows in ``file``."""
    from benchmarks.gpu_checks import measure

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        case = measure.Case(gpus=gpus, asked_gpus=asked_gpus, scratch=Path(scratch))
        rows = getattr(measure, name)(case)
    file.write_text(json.dumps([vars(row) for row in rows]))


def run_check(check: Check, gpus: int, asked_gpus: int) -> Result:
    """In a process of its own, which is ended at its deadline with all that it started."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "rows.json", Path(folder) / "log"
        command = [sys.executable, __file__, "--gpus", str(asked_gpus), "--one", check.name, str(gpus), str(file)]
        with log.open("w") as output:
            environment = os.environ if gpus else os.environ | {"CUDA_VISIBLE_DEVICES": ""}
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True, env=environment
            )
            try:
                status = process.wait(check.deadline_s)
                reason = "" if status == 0 else f"exit status {status}: {log.read_text()[-600:]}"
            except subprocess.TimeoutExpired:
                reason = f"not done within {check.deadline_s:g} s: {log.read_text()[-300:]}"
            finally:
                _end(process)
        taken = time.monotonic() - started
        if reason:
            return Result(check=check.name, status="failed", reason=reason, seconds=taken)
        return measured(check.name, [Row(**row) for row in json.loads(file.read_text())], taken)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of a check's session, also after Ctrl-C."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(given: Sequence[str]) -> int:
    """Run the checks and write what came of them."""
    asked = arguments(given)
    if asked.one is not None:
        name, gpus, file = asked.one
        run_one(name, int(gpus), asked.gpus, Path(file))
        return 0
    import torch

    from megatron_rl.device import gpu_count

    gpus = gpu_count() if asked.device == "cuda" else 0
    if asked.device == "cuda" and gpus < asked.gpus:
        print(f"benchmarks/gpu.py: --gpus {asked.gpus}, but torch sees {gpus} GPUs; --device cpu runs the small form")
        return 1
    table = asked.table or (ROOT / "docs" / "gpu_results.md" if gpus else None)
    results: list[Result] = []
    for check in CHECKS:
        if asked.only and check.name not in asked.only:
            continue
        known = {"parts": present_parts(), "features": present_features()}
        refused = refusal(check, gpus=gpus, asked_gpus=asked.gpus, **known)
        results.append(refused or run_check(check, gpus, asked.gpus))
        print(f"{check.name}: {results[-1].status} {results[-1].reason} ({results[-1].seconds:.0f} s)", flush=True)
        asked.json.write_text(json.dumps([result.as_json() for result in results], indent=2) + "\n")
    if table is not None:
        page = document(
            results,
            date=datetime.now(UTC).isoformat(timespec="minutes"),
            device=torch.cuda.get_device_name(0) if gpus else "CPU (small form; the figures mean nothing)",
            versions={"python": python_release(), **installed()},
            command=shlex.join(["python", "benchmarks/gpu.py", *given]),
        )
        table.write_text(page)
        print(page)
    return int(any(result.status in ("failed", "missed") for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
