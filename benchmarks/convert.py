"""Seconds, GB/s and memory of import and export, beside cp + fsync of the same bytes and beside other converters.

``python benchmarks/convert.py --model llama-1b --against megatron-bridge mbridge`` makes a random model on the spot.
Each other converter runs with the Python of an environment of its own (docs/weights.md says how to make one); one that
cannot run here is shown with its error.

Seconds are those of the whole command, its start and imports included, and in brackets those of the conversion alone;
the median of the repetitions. Copy, import and export take turns, and before each the machine rests: the host of a
virtual machine takes back memory that was freed, and giving it again costs whoever comes next about as long as writing
a file into it. Files are in the system's cache when they are read, for all alike. Memory is the largest
that a process, and that all processes of a command together held, anonymous and shared, sampled.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from te_standin import NOTE

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools" / "convert_hf"
PEERS = ("megatron-bridge", "mbridge")
PYTHON_OF = "envs/{peer}/bin/python"
LIMIT_S = 600
REST_S = 4

MODELS = {
    "llama-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
MAKE = """
import sys, tokenizers, torch, transformers
torch.set_default_dtype(torch.bfloat16)
config = transformers.LlamaConfig(**eval(sys.argv[1]), tie_word_embeddings=True, eos_token_id=1)
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[2], max_shard_size="1GB")
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(sys.argv[2])
"""


@dataclass(frozen=True)
class Measured:
    """One run of a command; ``inside_s`` is what it says of itself, bytes are the largest of one and of all, ``note``
    is what it says of how it ran.
    """

    seconds: float
    inside_s: float | None
    one_bytes: int
    all_bytes: int
    error: str = ""
    note: str = ""


def held_bytes(process: psutil.Process) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def measure(command: list[object]) -> Measured:
    rest()
    peaks = [0, 0]
    began = time.monotonic()
    run = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ended = threading.Event()

    def sample() -> None:
        top = psutil.Process(run.pid)
        while not ended.wait(0.005):
            try:
                held = [held_bytes(process) for process in (top, *top.children(recursive=True))]
            except psutil.NoSuchProcess:
                continue
            peaks[:] = max(peaks[0], *held), max(peaks[1], sum(held))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        output = run.communicate(timeout=LIMIT_S)[0]
    except subprocess.TimeoutExpired:
        run.kill()
        output = f"did not end within {LIMIT_S} s"
    took = time.monotonic() - began
    ended.set()
    sampler.join()
    said = re.findall(r"in (\d+\.\d+) s", output)
    lines = output.strip().splitlines() or ["no output"]
    error = "" if run.returncode == 0 else lines[-1]
    note = NOTE if NOTE in output else ""
    return Measured(took, float(said[-1]) if said else None, peaks[0], peaks[1], error, note)


def rest() -> None:
    """Let the disk write what it has been given, and the host take back what is free."""
    os.sync()
    time.sleep(REST_S)


def copied_s(source: Path, target: Path) -> float:
    """cp of a folder, and fsync of every file."""
    rest()
    began = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *target.iterdir()], check=True)
    took = time.monotonic() - began
    shutil.rmtree(target)
    return took


def into(target: Path, command: list[object]) -> Measured:
    """One run that writes ``target`` anew."""
    shutil.rmtree(target, ignore_errors=True)
    return measure(command)


def middle(runs: list[Measured]) -> Measured:
    """The first that failed, or the one of median seconds."""
    failed = [run for run in runs if run.error]
    return failed[0] if failed else sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]


def repeated(command: list[object], target: Path, repeat: int) -> Measured:
    """The median of several runs, or the first if it fails."""
    runs = [into(target, command)]
    while len(runs) < repeat and not runs[0].error:
        runs.append(into(target, command))
    return middle(runs)


def row(name: str, run: Measured, size: int, copy_s: float) -> str:
    told = f"\n{'':<28} ({run.note})" if run.note else ""
    if run.error:
        return f"{name:<28} cannot run: {run.error}{told}"
    inside_s = run.seconds if run.inside_s is None else run.inside_s
    return (
        f"{name:<28} {run.seconds:7.2f} ({inside_s:8.2f}) {size / inside_s / 1e9:6.2f} {run.seconds / copy_s:7.2f} "
        f"({inside_s / copy_s:8.2f}) {run.one_bytes / 2**20:9.0f} {run.all_bytes / 2**20:9.0f}{told}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-135m")
    parser.add_argument("--against", nargs="*", choices=PEERS, default=[])
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[f"{peer}={path}" for peer in PEERS if Path(path := PYTHON_OF.format(peer=peer)).is_file()],
        metavar="NAME=PATH",
        help=f"default: {PYTHON_OF.format(peer='NAME')}, where it is",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    asked = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in asked.peer_python)
    with tempfile.TemporaryDirectory(dir=asked.folder) as temporary:
        folder = Path(temporary)
        hf, megatron, back = folder / "hf", folder / "megatron", folder / "back"
        subprocess.run([sys.executable, "-c", MAKE, repr(MODELS[asked.model]), hf], check=True, capture_output=True)
        size = sum(file.stat().st_size for file in hf.iterdir())
        for file in hf.iterdir():
            file.read_bytes()  # into the system's cache
        processes = ["--processes", asked.processes]
        imported: list[object] = [sys.executable, TOOLS / "hf_to_megatron.py", hf, megatron, *processes]
        exported: list[object] = [sys.executable, TOOLS / "megatron_to_hf.py", megatron, back, *processes]
        copies, imports, exports = [], [], []
        for _ in range(asked.repeat):
            copies.append(copied_s(hf, folder / "copy"))
            imports.append(into(megatron, imported))
            exports.append(into(back, exported))
        own = {"import": middle(imports), "export": middle(exports)}
        same = [sys.executable, TOOLS / "verify.py", back, "--level", "values", "--against", hf, *processes]
        subprocess.run([str(word) for word in same], check=True, capture_output=True)
        copy_s = median(copies)
        print(f"{asked.model}: {size / 1e9:.3f} GB in bfloat16, {asked.processes} processes, {os.cpu_count()} cores")
        print(f"{'':<28} seconds (  inside)   GB/s    x cp (  inside)  MiB of 1    MiB all")
        print(f"{'cp + fsync':<28} {copy_s:7.2f} {'':10} {size / copy_s / 1e9:6.2f} {1:7.2f}")
        for action, run in own.items():
            print(row(f"megatron_rl {action}", run, size, copy_s))
        for peer in asked.against:
            peer_python = pythons.get(peer)
            checkpoint = folder / f"{peer}-megatron"
            for action, source, target in (
                ("import", hf, checkpoint),
                ("export", checkpoint, folder / f"{peer}-back"),
            ):
                if peer_python is None:
                    run = Measured(0, None, 0, 0, f"no environment; name one with --peer-python {peer}=PATH")
                else:
                    command = [peer_python, ROOT / "benchmarks" / "convert_peers.py", peer, action, source, target, hf]
                    run = repeated(command, target, asked.repeat)
                print(row(f"{peer} {action}", run, size, copy_s))


if __name__ == "__main__":
    main()
