"""Long chains of thought for the supervised stage of SimpleRL: a teacher's responses that are right, ended and long.

The teacher answers through the same engine and grader as every evaluation, and this program then chooses; distil.sh has
both commands.

Of every problem the longest response is kept that the grader calls right, that has a box, that ended by itself, that
does not go round in circles and whose length is within the bounds. How many were left out, and why, is printed. The
seed published neither its choice nor its settings: these are ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # Python then looks beside this file, not in the checkout that it belongs to
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from eval.behaviour import repeats_itself
from eval.samples import GradedSample, read_samples
from eval.tasks import TEMPLATES, BadInput
from megatron_rl.dataflow import Finish, Outcome
from megatron_rl.durable import replace_text


def fault(sample: GradedSample, min_tokens: int, max_tokens: int) -> str | None:
    """Why a response is not taught, None where it is good."""
    if sample.outcome is not Outcome.SCORED:
        return "not graded"
    if not sample.correct:
        return "wrong"
    if not sample.boxed:
        return "no box"
    if sample.finish is not Finish.STOP:
        return "cut off"
    if not min_tokens <= sample.tokens <= max_tokens:
        return "too short" if sample.tokens < min_tokens else "too long"
    return "goes round in circles" if repeats_itself(sample.response) else None


def distil(
    samples: Sequence[GradedSample], template: str, *, min_tokens: int, max_tokens: int
) -> tuple[list[dict[str, str]], Counter[str]]:
    """Pairs for the supervised stage, one of a problem and in the order of the problems, and what was left out."""
    left_out: Counter[str] = Counter()
    longest: dict[str, GradedSample] = {}
    for sample in samples:
        why = fault(sample, min_tokens, max_tokens)
        if why is not None:
            left_out[why] += 1
            continue
        rival = longest.get(sample.id)
        if rival is not None:
            left_out["a longer one of the same problem is kept"] += 1
        if rival is None or sample.tokens > rival.tokens:
            longest[sample.id] = sample
    pairs = [
        {"prompt": template.replace("{question}", sample.question), "response": sample.response}
        for sample in longest.values()
    ]
    return pairs, left_out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 where pairs were written, 2 with the reason where not."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("samples", type=Path, help="samples_TASK.jsonl of an evaluation of the teacher")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines with prompt and response")
    parser.add_argument("--template", choices=sorted(TEMPLATES), default="qwen25-math-cot", help="of the student")
    parser.add_argument("--min-tokens", type=int, default=300, help="shorter chains teach no reflection")
    parser.add_argument(
        "--max-tokens", type=int, default=3000, help="the student's responses in the stage that follows"
    )
    asked = parser.parse_args(arguments)
    try:
        if not asked.samples.is_file():
            raise BadInput(f"{asked.samples}: no such file; eval/run.py makes it")
        samples = read_samples(asked.samples)
        template = TEMPLATES[asked.template]
        pairs, left_out = distil(samples, template, min_tokens=asked.min_tokens, max_tokens=asked.max_tokens)
        reasons = "".join(f"\n  {count:7,} {why}" for why, count in left_out.most_common())
        if not pairs:
            raise BadInput(f"{asked.samples}: none of its {len(samples):,} responses can be taught:{reasons}")
    except BadInput as error:
        sys.stderr.write(f"distil: {error}\n")
        return 2
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(asked.output, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    sys.stdout.write(
        f"{len(samples):,} responses, {len(pairs):,} kept in {asked.output}; left out:{reasons or ' none'}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
