"""Quantise a Hugging Face policy after training, with modelopt, into another Hugging Face folder.

It tells first which formats the engine loads on which hardware. Runs in an environment of its own: make env-modelopt.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_rl.convert.console import run
from megatron_rl.convert.quantize import (
    FORMATS,
    calibration_prompts,
    check_this_machine,
    engine_here,
    quantise_folder,
    serving_table,
)
from megatron_rl.convert.target import Target
from megatron_rl.device import compute_capability
from megatron_rl.model_dims import read_model_dims
from megatron_rl.version_matrix import installed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    formats = "; ".join(f"{name}: {form.text}" for name, form in FORMATS.items())
    parser = argparse.ArgumentParser(prog="quantize.py", description=__doc__, epilog=formats)
    parser.add_argument("source", type=Path, help="model folder of a policy")
    parser.add_argument("target", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--format", choices=list(FORMATS), required=True)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSON lines with question, to calibrate with")
    parser.add_argument("--template", default="{question}", help="of a prompt; default: the question alone")
    parser.add_argument("--count", type=int, default=256, metavar="N", help="prompts that are read; default: 256")
    parser.add_argument(
        "--for-this-machine", action="store_true", help="refuse a format that the engine cannot load on this machine"
    )
    asked = parser.parse_args(arguments)
    return run(lambda: _quantise(asked))


def _quantise(asked: argparse.Namespace) -> None:
    print(serving_table())
    print(engine_here(installed()))
    if asked.for_this_machine:
        check_this_machine(asked.format, read_model_dims(asked.source), capability=compute_capability())
    prompts = calibration_prompts(asked.prompts, asked.template, asked.count) if asked.prompts else []
    began = time.monotonic()
    quantise_folder(asked.source, Target(asked.target), asked.format, prompts, print)
    print(f"wrote {asked.target} as {asked.format} in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
