"""The embedded task: chains of additions and subtractions, a byte-level BPE tokenizer and a tiny Qwen2 model.

``python examples/arithmetic_cpu/task.py FOLDER`` writes all that the quick start needs, made from this file alone:

* ``model/``: tokenizer, config.json and random weights of a Qwen2 model of about 156,000 parameters;
* ``warmup.jsonl``: responses in three styles for the supervised warm-up, which leaves a base model that mostly answers
  at once (and is mostly wrong), seldom reasons step by step (and is then mostly right), and at times forgets the box;
* ``train.jsonl`` and ``heldout.jsonl``: questions with final answers only, which is all that PPO sees. One expression
  in eight is held out, by hash, from everything that is trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = "Question:\n{question}\nAnswer:\n"
EOS, PAD = "<|endoftext|>", "<|pad|>"
_WRITTEN = {"model", "warmup.jsonl", "train.jsonl", "heldout.jsonl"}
# Digits stand alone; words, punctuation and line breaks stay together (the pattern of Qwen's tokenizers).
PRETOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS_TAIL = (
    "Please reason step by step, and put your final answer within \\boxed{}. Let's think step by step. "
    "User: Assistant: The total sum is therefore so first then next"
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The tiny model."""

    hidden: int = 64
    layers: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    ffn_hidden: int = 192
    vocabulary: int = 384
    max_positions: int = 512
    init_std: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An expression such as ``7-1+5+9``, its value, and the running results on the way."""

    expression: str
    steps: tuple[str, ...]
    answer: int

    @property
    def held_out(self) -> bool:
        """Whether the expression belongs to the held-out eighth."""
        return hashlib.sha256(self.expression.encode()).digest()[0] % 8 == 0

    @property
    def question(self) -> str:
        """What is asked."""
        return f"What is {self.expression}? Put the final answer in \\boxed{{}}."

    def reasoned(self) -> str:
        """Every step, then the box."""
        return "\n".join(self.steps) + f"\n\\boxed{{{self.answer}}}"

    def direct(self) -> str:
        """The box alone."""
        return f"\\boxed{{{self.answer}}}"

    def unboxed(self) -> str:
        """The answer without a box."""
        return f"The answer is {self.answer}."


def draw(rng: random.Random) -> Problem:
    """A problem of 3 or 4 terms between 1 and 9 whose running results never fall below 0."""
    while True:
        terms = [rng.randint(1, 9) for _ in range(rng.randint(3, 4))]
        signs = [rng.choice("+-") if rng.random() < 0.6 else "+" for _ in terms[1:]]
        total, steps = terms[0], []
        for sign, term in zip(signs, terms[1:], strict=True):
            result = total + term if sign == "+" else total - term
            steps.append(f"{total}{sign}{term}={result}")
            total = result
            if total < 0:
                break
        else:
            expression = str(terms[0]) + "".join(f"{s}{t}" for s, t in zip(signs, terms[1:], strict=True))
            return Problem(expression=expression, steps=tuple(steps), answer=total)


def problems(rng: random.Random, *, held_out: bool) -> Iterator[Problem]:
    """Problems of one side of the split, without end."""
    while True:
        problem = draw(rng)
        if problem.held_out == held_out:
            yield problem


def take(source: Iterator[Problem], count: int, *, distinct: bool = False) -> list[Problem]:
    """The next ``count`` of ``source``."""
    taken: dict[str | int, Problem] = {}
    while len(taken) < count:
        problem = next(source)
        taken[problem.expression if distinct else len(taken)] = problem
    return list(taken.values())


def warmup_rows(seed: int, steps: int, samples_per_step: int, mixed_steps: int) -> Iterator[dict[str, str]]:
    """Reasoned responses at first, then ``mixed_steps`` steps of 28 % reasoned, 46 % direct and 26 % unboxed ones."""
    rng = random.Random(seed)
    source = problems(rng, held_out=False)
    for step in range(steps):
        for problem in take(source, samples_per_step):
            style = rng.random() if step >= steps - mixed_steps else 0.0
            response = problem.reasoned() if style < 0.28 else problem.direct() if style < 0.74 else problem.unboxed()
            yield {"prompt": TEMPLATE.replace("{question}", problem.question), "response": response}


def build_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE trained on the task's own texts."""
    corpus = [CORPUS_TAIL] * 50
    for problem in take(problems(random.Random(seed), held_out=False), 400):
        prompt = TEMPLATE.replace("{question}", problem.question)
        corpus += [prompt + response for response in (problem.reasoned(), problem.direct(), problem.unboxed())]
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=Sizes().vocabulary,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def random_weights(sizes: Sizes, seed: int) -> dict[str, torch.Tensor]:
    """Initial weights under the names of transformers' Qwen2ForCausalLM, float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * sizes.init_std

    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    weights = {"model.embed_tokens.weight": normal(sizes.vocabulary, sizes.hidden)}
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}."
        for name, width in (("q", queries), ("k", keys), ("v", keys)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = normal(width, sizes.hidden)
            weights[f"{prefix}self_attn.{name}_proj.bias"] = torch.zeros(width)
        weights[f"{prefix}self_attn.o_proj.weight"] = normal(sizes.hidden, queries)
        weights[f"{prefix}mlp.gate_proj.weight"] = normal(sizes.ffn_hidden, sizes.hidden)
        weights[f"{prefix}mlp.up_proj.weight"] = normal(sizes.ffn_hidden, sizes.hidden)
        weights[f"{prefix}mlp.down_proj.weight"] = normal(sizes.hidden, sizes.ffn_hidden)
        weights[f"{prefix}input_layernorm.weight"] = torch.ones(sizes.hidden)
        weights[f"{prefix}post_attention_layernorm.weight"] = torch.ones(sizes.hidden)
    weights["model.norm.weight"] = torch.ones(sizes.hidden)
    weights["lm_head.weight"] = normal(sizes.vocabulary, sizes.hidden)
    return weights


def write_model(folder: Path, sizes: Sizes, seed: int) -> None:
    """Write tokenizer, configuration and random weights as a Hugging Face folder."""
    folder.mkdir(parents=True)
    tokenizer = build_tokenizer(seed)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn_hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": sizes.max_positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "initializer_range": sizes.init_std,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(EOS),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens, indent=2) + "\n")
    save_file(random_weights(sizes, seed), folder / "model.safetensors", metadata={"format": "pt"})


def write_rows(file: Path, rows: Iterable[dict[str, str]]) -> None:
    """One JSON object per line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(folder: Path, sizes: Sizes, *, seed: int, steps: int = 480, samples_per_step: int = 64) -> None:
    """Write the whole task to ``folder``, in place of one that was there.

    Raises:
        FileExistsError: the folder holds something else.
    """
    if folder.exists():
        if others := sorted({path.name for path in folder.iterdir()} - _WRITTEN):
            raise FileExistsError(f"{folder} must be new, or hold an earlier task alone; found {', '.join(others)}")
        shutil.rmtree(folder)
    write_model(folder / "model", sizes, seed)
    write_rows(folder / "warmup.jsonl", warmup_rows(seed, steps, samples_per_step, mixed_steps=100))
    for name, held_out, count in (("train", False, 4096), ("heldout", True, 512)):
        chosen = take(problems(random.Random(f"{name}"), held_out=held_out), count, distinct=True)
        write_rows(
            folder / f"{name}.jsonl",
            ({"id": p.expression, "question": p.question, "answer": str(p.answer)} for p in chosen),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the arithmetic task: tiny model, warm-up data, questions.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1234, help="of the weights, the tokenizer and the warm-up data")
    for name, default in (("hidden", 64), ("heads", 2), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    chosen = Sizes(
        hidden=asked.hidden,
        heads=asked.heads,
        kv_heads=asked.heads,
        head_dim=asked.hidden // asked.heads,
        ffn_hidden=3 * asked.hidden,
        layers=asked.layers,
    )
    try:
        prepare(asked.folder, chosen, seed=asked.seed)
    except OSError as error:
        parser.error(str(error))
