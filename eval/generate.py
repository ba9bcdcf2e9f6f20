"""Questions to responses: prompts that fit the model, dealt out to engines, some at a time."""

from __future__ import annotations

import queue
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from eval.samples import Response
from eval.tasks import ProblemSet
from megatron_rl.dataflow import Finish, Prompt, Rollout, Sampling
from megatron_rl.experience.collect import sample_seed
from megatron_rl.interfaces import RolloutEngine

_TOKENS_IN_A_ROW = 16_384  # of one of an engine's places, in a part


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The samples of one problem that are still to be drawn.

    Attributes:
        prompt: templated and tokenised.
        question, text: the question, and the prompt as text.
        numbers: of the samples.
        max_tokens: of each response: what was asked for, less where the model has no room for it; 0 where the prompt
            alone fills it.
    """

    prompt: Prompt
    question: str
    text: str
    numbers: tuple[int, ...]
    max_tokens: int


def plan_draws(
    problems: ProblemSet,
    done: set[tuple[str, int]],
    tokenizer: Tokenizer,
    *,
    template: str,
    samples: int,
    max_tokens: int,
    max_positions: int,
) -> list[Draws]:
    """What is left to draw for a task.

    Args:
        problems: the task.
        done: ``(problem id, sample number)`` of the samples that are there.
        tokenizer: adds no special tokens; a template that needs them has them.
        template: ``{question}`` is replaced.
        samples: per problem.
        max_tokens: of a response.
        max_positions: of the model.
    """
    left = []
    for problem in problems.problems:
        numbers = tuple(number for number in range(samples) if (problem.id, number) not in done)
        if not numbers:
            continue
        text = template.replace("{question}", problem.question)
        ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        prompt = Prompt(id=problem.id, token_ids=ids, answer=problem.gold, source=problems.name)
        room = max(0, min(max_tokens, max_positions - len(ids)))
        left.append(
            Draws(prompt=prompt, question=problem.question, text=text, numbers=numbers, max_tokens=room if ids else 0)
        )
    return left


def part_size(max_concurrent: int, max_tokens: int) -> int:
    """Samples that an engine gets at a time: up to four times as many as it draws at once, so that it is seldom idle
    while the last ones end; fewer where responses may be long, so that they reach the disk within a call's deadline.

    Args:
        max_concurrent: sequences that the engine draws at once.
        max_tokens: of a response.
    """
    return max_concurrent * max(1, min(4, _TOKENS_IN_A_ROW // max_tokens))


def batches(draws: Sequence[Draws], samples: int) -> list[list[Draws]]:
    """Parts of ``draws`` with about ``samples`` samples each (below twice as many), alike in task and room; an engine
    gets one at a time.
    """
    draws = [
        replace(item, numbers=item.numbers[first : first + samples])
        for item in draws
        for first in range(0, len(item.numbers), samples)
    ]
    parts: list[list[Draws]] = []
    filled = 0
    for item in sorted(draws, key=lambda item: (item.prompt.source, -item.max_tokens)):  # stable: the task's order
        last = parts[-1][-1] if parts else None
        alike = last is not None and (last.prompt.source, last.max_tokens) == (item.prompt.source, item.max_tokens)
        if not alike or filled >= samples:
            parts.append([])
            filled = 0
        parts[-1].append(item)
        filled += len(item.numbers)
    return parts


def responses(
    engines: Sequence[RolloutEngine], parts: Sequence[Sequence[Draws]], sampling: Sampling, seed: int
) -> Generator[list[Response], None, None]:
    """The responses of each part, as they come: every engine has one part under way.

    Close the generator before the engines: it then asks for no more, and does not wait for what is under way.

    A sample's seed is made of ``seed``, task, problem and number alone, so that neither the order nor a resumption
    changes it.

    Args:
        engines: hold the same weights; none are needed where no part has room for a response.
        parts: see :func:`batches`.
        sampling: its ``max_tokens`` is replaced by that of the part.
        seed: of the evaluation.
    """
    idle: queue.SimpleQueue[RolloutEngine] = queue.SimpleQueue()
    for engine in engines:
        idle.put(engine)

    def draw(part: Sequence[Draws]) -> list[Response]:
        if part[0].max_tokens == 0:
            return [_unasked(item, number) for item in part for number in item.numbers]
        engine = idle.get()
        try:
            seeds = [
                [sample_seed(seed, 0, f"{item.prompt.source}/{item.prompt.id}", number) for number in item.numbers]
                for item in part
            ]
            asked = Sampling(
                temperature=sampling.temperature,
                max_tokens=part[0].max_tokens,
                top_p=sampling.top_p,
                stop=sampling.stop,
            )
            rollouts = engine.generate([item.prompt for item in part], asked, seeds)
        finally:
            idle.put(engine)
        return [
            response for item, rollout in zip(part, rollouts, strict=True) for response in _responses(item, rollout)
        ]

    pool = ThreadPoolExecutor(max(1, len(engines)))
    try:
        for future in as_completed([pool.submit(draw, part) for part in parts]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what is under way ends when its engine is closed


def _responses(item: Draws, rollout: Rollout) -> Iterator[Response]:
    for number, sample in zip(item.numbers, rollout.samples, strict=True):
        yield _response(item, number, sample.text, sample.finish, len(sample.token_ids))


def _unasked(item: Draws, number: int) -> Response:
    """A prompt that leaves no room is answered by nothing."""
    return _response(item, number, "", Finish.LENGTH, 0)


def _response(item: Draws, number: int, text: str, finish: Finish, tokens: int) -> Response:
    return Response(
        task=item.prompt.source,
        id=item.prompt.id,
        sample=number,
        question=item.question,
        prompt=item.text,
        response=text,
        gold=item.prompt.answer,
        finish=finish,
        tokens=tokens,
    )
