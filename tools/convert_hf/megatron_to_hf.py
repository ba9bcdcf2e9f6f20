"""Write a Megatron checkpoint (torch_dist) as a Hugging Face model folder, with a manifest of checksums.

The checkpoint is what hf_to_megatron.py wrote, or the policy or critic folder of a training checkpoint. An export that
was interrupted goes on with --resume, and gives the same files as one that was not.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # imports leave no garbage; to look for it in what they make takes 0.2 s

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_rl.convert.console import (
    DTYPES,
    add_drop_padding_rows,
    add_dtype,
    add_processes,
    print_written,
    progress_bar,
    run,
    size_bytes,
)
from megatron_rl.convert.target import Target
from megatron_rl.convert.to_hf import plan_export, run_export


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="megatron_to_hf.py", description=__doc__)
    parser.add_argument("source", type=Path, help="Megatron checkpoint folder")
    parser.add_argument("target", type=Path, help="folder to write; it must not exist")
    parser.add_argument(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="with config.json and tokenizer; default: SOURCE, or the hf folder of a training checkpoint",
    )
    add_dtype(parser, "of the weights; default: what they are")
    parser.add_argument(
        "--fp8-blocks", action="store_true", help="linear layers in 8 bits, a scale per 128 x 128 block"
    )
    parser.add_argument("--shard-size", type=size_bytes, default="1GB", metavar="SIZE", help="of a file; default: 1GB")
    add_drop_padding_rows(parser)
    add_processes(parser)
    parser.add_argument("--resume", action="store_true", help="go on with an export that was interrupted")
    parser.add_argument("--dry-run", action="store_true", help="print the plan's size and stop")
    asked = parser.parse_args(arguments)
    return run(lambda: _convert(asked))


def _convert(asked: argparse.Namespace) -> None:
    began = time.monotonic()
    target = Target(asked.target)
    if not asked.resume:
        target.refuse_existing()
    plan = plan_export(
        asked.source,
        like=asked.like,
        dtype=DTYPES.get(asked.dtype),
        fp8_blocks=asked.fp8_blocks,
        shard_bytes=asked.shard_size,
        drop_padding_rows=asked.drop_padding_rows,
    )
    summary = plan.summary()
    print(summary)
    if asked.dry_run:
        return
    with progress_bar("export", summary.moved_bytes) as progress:
        written = run_export(plan, target, resume=asked.resume, processes=asked.processes, progress=progress)
    print_written(asked.target, summary, began, written=written)


if __name__ == "__main__":
    gc.freeze()  # nor is it looked for there later on: 0.3 s at the end of the process
    gc.enable()
    sys.exit(main())
