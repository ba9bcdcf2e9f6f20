"""The matrix: loss, gradients and parameters after a step do not depend on how a model is laid out, fed or recomputed.

``pytest tests/distributed -k layouts -m ''`` runs all of it. Each case is held against one rank that computes the whole
minibatch at once. With ``MEGATRON_RL_NUMERICS=write`` in the environment the largest differences replace the table in
``docs/numerics.md``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_rl.interfaces import TokenLoss
from megatron_rl.layout import ParallelLayout
from megatron_rl.maths.losses import CorrectedLoss, EngineCorrection, SequencePolicyLoss
from tests.distributed.cases import CRITIC, POLICY, Setup, one_step
from tests.distributed.ranks import Ranks

GRADIENTS, PARAMETERS = 1e-5, 1e-4
"""Largest relative difference of a tensor, ||a - b|| / ||b||; elementwise ratios mean nothing near zero."""
NUMERICS = Path(__file__).parents[2] / "docs" / "numerics.md"
BEGIN, END = "<!-- layouts -->\n", "\n<!-- end of layouts -->"
NO_CLIP = 1e9  # clipping scales gradients in place where the optimizer is not distributed


def setup(*, micro: int = 100, **axes: Any) -> Setup:
    switches = {
        name: axes.pop(name)
        for name in ("distributed_optimizer", "overlap_communication", "on_host", "recompute", "padded")
        if name in axes
    }
    return Setup(layout=ParallelLayout(**axes), budget=micro, clip_grad=NO_CLIP, **switches)


CORE = [
    setup(micro=60),
    setup(tensor=2),
    setup(tensor=2, sequence_parallel=True),
    setup(pipeline=2),
    setup(pipeline=2, virtual_pipeline=2),
    setup(context=2),
    setup(data=2),
    setup(data=2, distributed_optimizer=True, overlap_communication=True),
    setup(data=2, distributed_optimizer=True, on_host=True),
]
REST = [
    setup(micro=1),
    setup(tensor=2, pipeline=2),
    setup(tensor=2, pipeline=2, sequence_parallel=True, micro=4096),
    setup(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True, micro=60),
    setup(pipeline=4),
    setup(pipeline=3, first_stage_layers=1, last_stage_layers=1),
    setup(tensor=4),
    setup(tensor=4, sequence_parallel=True),
    setup(context=4),
    setup(tensor=2, context=2, sequence_parallel=True),
    setup(pipeline=2, context=2),
    setup(pipeline=2, virtual_pipeline=2, context=2),
    setup(data=4, micro=1),
    setup(data=2, distributed_optimizer=True),
    setup(data=2, overlap_communication=True, micro=40),
    setup(data=2, tensor=2, sequence_parallel=True, distributed_optimizer=True, overlap_communication=True),
    setup(data=2, pipeline=2, virtual_pipeline=2, distributed_optimizer=True, overlap_communication=True, micro=40),
    setup(data=2, context=2, distributed_optimizer=True),
    setup(distributed_optimizer=True, on_host=True),
    setup(tensor=2, distributed_optimizer=True, on_host=True),
    setup(
        pipeline=2,
        virtual_pipeline=2,
        data=2,
        distributed_optimizer=True,
        overlap_communication=True,
        on_host=True,
    ),
    setup(padded=True),
    setup(padded=True, tensor=2, sequence_parallel=True, micro=1),
    setup(recompute="selective"),
    setup(recompute="full"),
    setup(tensor=2, sequence_parallel=True, recompute="selective"),
    setup(tensor=2, sequence_parallel=True, recompute="full"),
    setup(pipeline=2, virtual_pipeline=2, recompute="full"),
    setup(context=2, recompute="full"),
]
CASES = [
    *[(name, role, case) for case in CORE for name, role in (("qwen2", POLICY), ("qwen2-tied", CRITIC))],
    *[
        pytest.param(name, role, case, marks=pytest.mark.slow)
        for case in REST
        for name, role in (("qwen2", POLICY), ("qwen2-tied", CRITIC))
    ],
    *[
        pytest.param(name, POLICY, case, marks=pytest.mark.slow)
        for case in (*CORE[1:6], *REST[1:12])
        for name in ("qwen2-tied", "qwen3", "llama")
    ],
    # of a vocabulary that is padded where tensor > 1
    ("qwen2-odd", POLICY, setup(tensor=2)),
    *[
        pytest.param(name, POLICY, case, marks=pytest.mark.slow)
        for case in (CORE[2], *REST[1:3])
        for name in ("qwen2-odd", "llama-odd")
    ],
]
EXPERTS_CORE = [
    setup(data=2, expert=2, micro=40),
    setup(tensor=2, sequence_parallel=True, expert=2),
]
EXPERTS_REST = [
    setup(micro=60),
    setup(pipeline=2),
    setup(context=2),
    setup(context=2, expert=2),
    setup(tensor=2, sequence_parallel=True, expert_tensor=2),
    setup(tensor=2, sequence_parallel=True, data=2, expert=2, expert_tensor=2),
    setup(tensor=2, sequence_parallel=True, data=2, expert=4),
    setup(pipeline=2, data=2, expert=2, distributed_optimizer=True),
    setup(pipeline=2, virtual_pipeline=2, data=2, expert=2, micro=40),
    setup(data=2, expert=2, distributed_optimizer=True, overlap_communication=True),
    setup(data=4, expert=2, distributed_optimizer=True),
    setup(data=2, expert=2, distributed_optimizer=True, on_host=True),
    setup(tensor=2, pipeline=2, sequence_parallel=True, expert=2),
    setup(data=2, expert=2, recompute="full"),
    setup(padded=True),
]
CASES += [
    *[("qwen2-moe", POLICY, case) for case in EXPERTS_CORE],
    *[
        pytest.param(name, role, case, marks=pytest.mark.slow)
        for case in (*EXPERTS_CORE, *EXPERTS_REST)
        for name, role in (
            ("qwen2-moe", POLICY),
            ("qwen2-moe", CRITIC),
            ("qwen3-moe", POLICY),
            ("deepseek", POLICY),
            ("deepseek", CRITIC),
        )
    ],
]
PER_RESPONSE = CorrectedLoss(
    loss=SequencePolicyLoss(clip_low=0.05, clip_high=0.05, entropy_coef=0.1),
    correction=EngineCorrection(outside="truncate", level="sequence", high=1.5),
)
"""GSPO with truncated importance sampling: a ratio of a response is told from all of its tokens, in both."""
PER_RESPONSE_CASES = [
    setup(micro=60),
    setup(context=2),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            setup(micro=1),
            setup(data=2, micro=40),
            setup(data=4, distributed_optimizer=True),
            setup(tensor=2, pipeline=2),
            setup(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True, micro=60),
            setup(context=4, micro=60),
            setup(context=2, data=2),
            setup(tensor=2, context=2, sequence_parallel=True),
            setup(pipeline=2, context=2, micro=60),
        )
    ),
]
_references: dict[tuple[Path, str, TokenLoss | None], Any] = {}


def distance(mine: Tensor, reference: Tensor) -> float:
    """||a - b|| / ||b||; 0 where both are zero."""
    size = float(reference.norm())
    difference = float((mine - reference).norm())
    return difference / size if size else difference


def compare(ranks: Ranks, model: Path, role: str, case: Setup, loss: TokenLoss | None = None) -> dict[str, float]:
    """Relative differences from one rank: of the loss, the gradient norm, the worst gradient, the worst parameter."""
    if (model, role, loss) not in _references:
        alone = replace(case, layout=ParallelLayout(), budget=4096, recompute="none")
        alone = replace(alone, distributed_optimizer=False, overlap_communication=False, on_host=False, padded=False)
        [_references[model, role, loss]] = ranks.run(1, one_step, model, alone, role, loss)
    result, gradients, after = _references[model, role, loss]
    answers = ranks.run(case.layout.world_size, one_step, model, case, role, loss)
    mine = answers[case.layout.rank_of(pipeline=case.layout.pipeline - 1)][0]
    _, my_gradients, my_parameters = answers[0]
    assert my_gradients.keys() == gradients.keys()
    assert my_parameters.keys() == after.keys()
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 0
    for share in ("clip_fraction", "engine_cut"):
        assert loss is None or 0.1 < result.metrics[share] < 0.9
        assert loss is None or mine.metrics[share] == pytest.approx(result.metrics[share], rel=1e-6)
    return {
        "loss": abs(mine.metrics["loss"] / result.metrics["loss"] - 1),
        "gradient norm": abs(mine.grad_norm / result.grad_norm - 1),
        "gradients": max(distance(my_gradients[key], gradients[key]) for key in gradients),
        "parameters": max(distance(my_parameters[key], after[key]) for key in after),
    }


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, list[tuple[str, dict[str, float]]]]]:
    """What each layout gave: (model, differences) of every case."""
    found: dict[str, list[tuple[str, dict[str, float]]]] = {}
    yield found
    if os.environ.get("MEGATRON_RL_NUMERICS") == "write":
        before, rest = NUMERICS.read_text().split(BEGIN)
        NUMERICS.write_text(before + BEGIN + table(found) + END + rest.split(END)[1])


def table(found: dict[str, list[tuple[str, dict[str, float]]]]) -> str:
    """Markdown: for each layout the models and the largest difference of all of them."""
    columns = ["loss", "gradient norm", "gradients", "parameters"]
    lines = [f"| layout | models | {' | '.join(columns)} |", "| --- | --- |" + " --- |" * len(columns)]
    for layout, cases in found.items():
        worst = (f"{max(differences[column] for _, differences in cases):.0e}" for column in columns)
        lines.append(f"| {layout} | {', '.join(model for model, _ in cases)} | {' | '.join(worst)} |")
    return "\n" + "\n".join(lines) + "\n"


@pytest.mark.parametrize(("name", "role", "case"), CASES, ids=str)
def test_a_step_is_the_same_in_all_layouts(
    ranks: Ranks, models: dict[str, Path], measured: dict[str, Any], name: str, role: str, case: Setup
) -> None:
    found = compare(ranks, models[name], role, case)
    record(measured, case, name if role == POLICY else f"{name} critic", found)


@pytest.mark.parametrize("case", PER_RESPONSE_CASES, ids=str)
def test_a_step_with_a_ratio_per_response_is_the_same_in_all_layouts(
    ranks: Ranks, models: dict[str, Path], measured: dict[str, Any], case: Setup
) -> None:
    record(measured, case, "qwen2 GSPO", compare(ranks, models["qwen2"], POLICY, case, PER_RESPONSE))


def record(measured: dict[str, Any], case: Setup, model: str, found: dict[str, float]) -> None:
    """Keep what was found for the table, and hold it to the bounds."""
    measured.setdefault(str(case).removesuffix(" float32"), []).append((model, found))
    assert found["loss"] < GRADIENTS
    assert found["gradient norm"] < GRADIENTS
    assert found["gradients"] < GRADIENTS
    assert found["parameters"] < PARAMETERS
