"""Check a converted folder, of either kind; each level includes the ones before it.

files: manifest, index, names, shapes and types. values: every element against the folder that --against names.
The exit status is 1, and the first tensor that differs is named, if anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_rl.convert.console import DTYPES, add_dtype, add_processes, progress_bar, run
from megatron_rl.convert.verify import check_folder, check_values

LEVELS = ("files", "values")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="verify.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument("--level", choices=LEVELS, default=LEVELS[0], help="default: files")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="of the same model, of either kind")
    add_dtype(parser, "compare after converting to this type")
    add_processes(parser)
    asked = parser.parse_args(arguments)
    if asked.level != "files" and asked.against is None:
        parser.error(f"--level {asked.level} needs --against FOLDER")
    return run(lambda: _verify(asked))


def _verify(asked: argparse.Namespace) -> None:
    for folder in filter(None, (asked.folder, asked.against)):
        _check_files(folder, asked.processes)
    if LEVELS.index(asked.level) >= LEVELS.index("values"):
        with progress_bar("values", _size(asked.folder)) as progress:
            count = check_values(
                asked.folder,
                asked.against,
                dtype=DTYPES.get(asked.dtype),
                processes=asked.processes,
                progress=progress,
            )
        print(f"values: ok, {count} tensors are the same in {asked.folder} and {asked.against}")


def _check_files(folder: Path, processes: int) -> None:
    with progress_bar("files", _size(folder)) as progress:
        summed = check_folder(folder, processes=processes, progress=progress)
    print(f"files: ok, {folder}" + ("" if summed else " (it has no manifest: names, shapes and sizes alone)"))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0


if __name__ == "__main__":
    sys.exit(main())
