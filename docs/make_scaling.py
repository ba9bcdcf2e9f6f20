"""Write docs/scaling.md and its picture from the planner: ``python docs/make_scaling.py``; ``--check`` only compares
the page.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.config.load import parse
from megatron_rl.config.schema import EngineConfig, OptimizerConfig, RunConfig, TrainerConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims, read_model_dims
from megatron_rl.planner.devices import DEVICES
from megatron_rl.planner.lengths import Lengths
from megatron_rl.planner.memory import device_bytes
from megatron_rl.planner.search import Plan, plan
from megatron_rl.planner.times import Machine, Work, pass_time, rollout_time, update_time
from megatron_rl.weights.rules import Head

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples" / "beyond_7b"
SEED = ROOT / "examples" / "qwen2.5_math_7b"
FILE = ROOT / "docs" / "scaling.md"
PICTURE = FILE.with_suffix(".png")
LENGTHS = Lengths(prompt=92, response=770)
"""Of the seed's first rollout, by a user's log."""
FP8_GAIN = 1.57
"""Of products with one current scale per tensor, casts included, as Transformer Engine's documentation measures it."""

HEAD = """# Scaling

Written by `docs/make_scaling.py` from the planner (`megatron-rl plan`): every figure below is a **prediction**, unless
its column says measured or published. No GPU was used for it. Constants (`megatron_rl/planner/devices.py`) are the same
for all rows: none was fitted to any point.

`megatron-rl plan FILE.toml --device h100` prints the same for any recipe: memory of the fullest device of each role,
seconds of each phase, other layouts of the same devices, and why the others cannot be. `--explain policy.gradients`
prints how a number came about. What `train` refuses is not planned. `megatron-rl dry-run FILE.toml --rank R` builds the
real model of that rank, of any world, without memory, and reads its bytes off; tests hold the prediction against it.

## Against measurement on a CPU

`python benchmarks/planner.py` (3 rounds) on two shared cores, one thread a rank: an update of the policy, hidden width
256, 4 layers, 8 rows of 512 tokens, unless the row says otherwise. The first row calibrates the others: one number for
memory beyond the plan (307 MiB), one factor for time. Memory is the largest resident set of a rank, with freed blocks
given back at once; time is CPU-seconds of all ranks.

| setting | MiB predicted | measured | error | CPU-s predicted | measured | error |
| --- | --- | --- | --- | --- | --- | --- |
| calibration | 849 | 849 | | 1.66 | 1.66 | |
| hidden 384 | 1146 | 1145 | +0 % | 3.43 | 3.05 | +12 % |
| 8 layers | 1342 | 1342 | +0 % | 3.29 | 3.20 | +3 % |
| 16 rows | 849 | 850 | -0 % | 3.32 | 3.33 | -0 % |
| micro-batches of 1,024 | 484 | 497 | -3 % | 1.66 | 1.61 | +3 % |
| 4 rows of 1,024 | 849 | 850 | -0 % | 1.85 | 1.85 | +0 % |
| full recompute | 535 | 534 | +0 % | 2.21 | 2.23 | -1 % |
| TP2 SP | 582 | 597 | -3 % | 1.71 | 1.91 | -10 % |
| PP2, micro-batches of 1,024 | 451 | 469 | -4 % | 1.66 | 1.68 | -1 % |
| DP2 | 606 | 614 | -1 % | 1.68 | 1.63 | +3 % |

## What to trust

What is exact: bytes of weights, gradients and optimizer states. What is near: activations of dense models (5 %, against
a pass of the real model over fake tensors). What is rough: activations of experts and of latent attention, and every
time. Quantised engines hold and read bytes; their products, and FP8 in training, are taken as bfloat16 where the text
beside a table does not say otherwise.

![What devices hold, what a step's seconds go to, and how recipes scale](scaling.png)
"""


def dims_of(name: str) -> ModelDims:
    return read_model_dims(RECIPES / "models" / name)


def machine(device: str) -> Machine:
    return Machine(device=DEVICES[device], per_node=8)


def recipes() -> dict[str, RunConfig]:
    whole = set(RECIPES.glob("*.toml")) - {RECIPES / "fp8.toml"}
    return {file.stem: parse(RunConfig, [file]) for file in sorted(whole)}


def fullest(found: Plan, role: str) -> float:
    return device_bytes(c for c in found.memory if c.name.startswith(f"{role}.")) / 1e9


def recipe_rows() -> Iterator[str]:
    yield "\n## Recipes beyond 7B\n"
    yield (
        f"1,024 prompts x 8 samples a step, {LENGTHS.prompt:g} + {LENGTHS.response:g} tokens on the average, on H100. "
        "GB of the fullest device; the last column is GPU-hours of 120 steps.\n"
    )
    columns = "recipe, GPUs, policy, critic, engine, rollout s, scoring s, updates s, push s, step s, GPU-h 120"
    yield f"| {columns.replace(', ', ' | ')} |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, config in recipes().items():
        found = plan(config, dims_of(name), machine("h100"), LENGTHS)
        at = {cell.name: cell.value for cell in found.times}
        memory = " | ".join(f"{fullest(found, role):.0f}" for role in ("policy", "critic", "engine"))
        yield (
            f"| {name} | {found.devices} | {memory} | {at['time.rollout']:.0f} | {at['time.policy.scoring']:.0f} | "
            f"{at['time.policy.updates']:.0f} | {at['time.push']:.0f} | {found.step_seconds:.0f} | "
            f"{found.step_seconds * 120 / 3600 * found.devices:,.0f} |"
        )


def grown(config: RunConfig, times: int, *, weak: bool) -> RunConfig:
    def wider(trainer: TrainerConfig) -> TrainerConfig:
        return replace(trainer, layout=replace(trainer.layout, data=trainer.layout.data * times))

    assert config.critic is not None
    return replace(
        config,
        policy=wider(config.policy),
        critic=wider(config.critic),
        engine=replace(config.engine, count=config.engine.count * times),
        prompts_per_step=config.prompts_per_step * (times if weak else 1),
        ppo=replace(config.ppo, minibatch_samples=config.ppo.minibatch_samples * (times if weak else 1)),
    )


TIMES = (1, 2, 4, 8)


def growth(name: str, config: RunConfig, *, weak: bool) -> list[tuple[Plan, float]]:
    """Plans of the recipe on so many times its devices, each with its efficiency against the first one."""
    steps = [plan(grown(config, n, weak=weak), dims_of(name), machine("h100"), LENGTHS) for n in TIMES]
    base = steps[0].step_seconds
    return [
        (found, math.nan if found.problems else base / found.step_seconds / (1 if weak else n))
        for n, found in zip(TIMES, steps, strict=True)
    ]


def scaling_rows() -> Iterator[str]:
    yield "\n## Strong and weak scaling\n"
    yield (
        "The recipe on 1, 2, 4 and 8 times its devices: more replicas and engines, the same step (strong) or a step, "
        "and a minibatch, as many times larger (weak). Efficiency against the recipe.\n"
    )
    yield "| recipe | | x1 | x2 | x4 | x8 |\n| --- | --- | --- | --- | --- | --- |"
    for name, config in recipes().items():
        for weak in (False, True):
            cells = [
                "cannot be" if found.problems else f"{found.step_seconds:.0f} s, {100 * efficiency:.0f} %"
                for found, efficiency in growth(name, config, weak=weak)
            ]
            yield f"| {name} | {'weak' if weak else 'strong'} | " + " | ".join(cells) + " |"


def trainer(layout: ParallelLayout, **changes: object) -> TrainerConfig:
    base = TrainerConfig(optimizer=OptimizerConfig(lr=5e-7), layout=layout, distributed_optimizer=True)
    return replace(base, **changes)  # type: ignore[arg-type]


def seed_recipes() -> dict[str, tuple[RunConfig, str]]:
    """The shipped recipes of the seed, and the device that each names."""
    model = f"model.path={RECIPES / 'models' / 'qwen2.5_math_7b'}"
    return {
        place: (parse(RunConfig, [SEED / "simplerl_zero.toml", SEED / f"{place}.toml"], [model]), device)
        for place, device in (
            ("4_nodes_a100", "a100-80g"),
            ("4_nodes_h100", "h100"),
            ("1_node_a100", "a100-80g"),
            ("1_node_h100", "h100"),
        )
    }


def seed_rows() -> Iterator[str]:
    yield "\n## The seed's recipes\n"
    yield (
        "`examples/qwen2.5_math_7b/simplerl_zero.toml` with each file of its places: Qwen2.5-Math-7B, 1,024 prompts x "
        f"8 samples, 64 updates of 128 a step, {LENGTHS.prompt:g} + {LENGTHS.response:g} tokens on the average. H100 "
        "trains and generates in FP8; training is planned as in BF16, the engines' weights as bytes. The seed reports "
        "less than one day for 60 steps and 1.5 days for 120 on 32 GPUs, and calls 6 GPUs untested. Its figure is of "
        "another program, which scores answers one after the other.\n"
    )
    yield (
        "| place | GPUs | policy GB | critic GB | engine GB | rollout s | scoring s | updates s | step s | 60 steps, "
        "days | 120 steps, days | fits |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for place, (config, device) in seed_recipes().items():
        found = plan(config, dims_of("qwen2.5_math_7b"), machine(device), LENGTHS)
        at = {cell.name: cell.value for cell in found.times}
        memory = " | ".join(f"{fullest(found, role):.0f}" for role in ("policy", "critic", "engine"))
        phases = (at["time.rollout"], at["time.policy.scoring"], at["time.policy.updates"], found.step_seconds)
        days = " | ".join(f"{found.step_seconds * steps / 86400:.2f}" for steps in (60, 120))
        fits = "yes" if not found.problems else "; ".join(found.problems)
        yield (f"| {place} | {found.devices} | {memory} | {' | '.join(f'{s:.0f}' for s in phases)} | {days} | {fits} |")


def aligner_rows() -> Iterator[str]:
    yield "\n## Against what others published\n"
    yield (
        "**NeMo-Aligner** (docs/user-guide/rlhf.rst): Llama-3 70B policy and 70B critic, 1,024 samples, minibatches of "
        "128, about 330 tokens generated. Policy nodes generate and then train, critic nodes train beside them. "
        "Assumed here, since we have no source for it: TP8 PP8, engines TP8 on the policy's GPUs, 400 tokens a "
        "prompt, at most 1,024 a response, no recompute. The prediction misses these points by far: it says what the "
        "devices would allow, of which that program used a fraction; where a step is short, the tail of the longest "
        "response, which does not scale, weighs more than it did there.\n"
    )
    yield "| nodes | predicted s | published s | error | predicted speed-up | published |"
    yield "| --- | --- | --- | --- | --- | --- |"
    dims, h100 = dims_of("llama3_70b"), machine("h100")
    first = 0.0
    for nodes, published in ((8, 366.7), (16, 190.4), (32, 108.0), (64, 56.9)):
        layout = ParallelLayout(tensor=8, pipeline=8, data=nodes // 8, sequence_parallel=True)
        model = trainer(layout)
        rollout = rollout_time(
            dims,
            EngineConfig(count=nodes, tensor=8, kv_cache_mib=32768),
            h100,
            "bfloat16",
            samples=1024,
            prompt_tokens=400,
            response_tokens=330,
            longest=1024,
        ).total
        score = pass_time(dims, model, h100, Work(rows=1024, row_tokens=730), "bfloat16", backward=False).total
        update = update_time(dims, model, Head.TOKEN, h100, Work(rows=128, row_tokens=730), "bfloat16").total
        said = rollout + 2 * score + 8 * update
        first = first or said
        yield (
            f"| {nodes} + {nodes // 2} | {said:.1f} | {published} | {100 * (said / published - 1):+.0f} % | "
            f"{first / said:.2f} | {366.7 / published:.2f} |"
        )


def bridge_rows() -> Iterator[str]:
    yield (
        "\n**Megatron-Bridge** pre-training on H100 in FP8 (docs/performance-summary-archive.md), tokens per second "
        f"and GPU. Products are taken {FP8_GAIN} times as fast as in BF16. We know the layout of 70B alone; the "
        "others, rows of 8,192 tokens (Qwen3: 4,096) and steps of 128 rows (405B 1,024, Qwen3 512 and 2,048) are "
        "assumed. Experts miss in both directions: nothing here knows that products of many small experts are slower, "
        "or that dispatchers send a token to a node once.\n"
    )
    yield "| model | GPUs | layout | predicted | published | error |\n| --- | --- | --- | --- | --- | --- |"
    moe = {"expert": 8}
    points = (
        ("llama3_8b", 8, ParallelLayout(data=8), 8192, 128, 14451),
        ("llama3_70b", 64, ParallelLayout(tensor=4, pipeline=8, data=2, sequence_parallel=True), 8192, 128, 1664),
        (
            "llama3.1_405b",
            1024,
            ParallelLayout(tensor=8, pipeline=9, virtual_pipeline=7, context=2, data=7, sequence_parallel=True),
            8192,
            1024,
            328,
        ),
        ("qwen3_30b_a3b", 16, ParallelLayout(data=16, **moe), 4096, 512, 8960),
        (
            "qwen3_235b_a22b",
            256,
            ParallelLayout(tensor=2, pipeline=2, data=64, expert=32, sequence_parallel=True),
            4096,
            2048,
            1712,
        ),
    )
    base = DEVICES["h100"]
    fast = Machine(device=replace(base, flops=base.flops * FP8_GAIN), per_node=8)
    for name, gpus, layout, row, rows, published in points:
        dims = dims_of(name)
        assert not dims.layout_problems(layout), dims.layout_problems(layout)
        model = trainer(layout, tokens_per_microbatch=row, overlap_communication=True)
        seconds = update_time(dims, model, Head.TOKEN, fast, Work(rows=rows, row_tokens=row), "bfloat16").total
        said = rows * row / seconds / layout.world_size
        yield f"| {name} | {gpus} | {layout} | {said:,.0f} | {published:,} | {100 * (said / published - 1):+.0f} % |"


def draw(png: Path) -> None:
    """What the fullest devices hold and what a step's seconds go to, of all recipes, and how the larger ones scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to load, and --check draws nothing
    from matplotlib.figure import Figure

    planned = {name: plan(config, dims_of(name), machine("h100"), LENGTHS) for name, config in recipes().items()} | {
        place: plan(config, dims_of("qwen2.5_math_7b"), machine(device), LENGTHS)
        for place, (config, device) in seed_recipes().items()
    }
    figure = Figure(figsize=(9, 11), layout="constrained")
    FigureCanvasAgg(figure)
    memory, seconds, scaling = figure.subplots(3, 1)
    held = {
        f"{name}, {role}": {
            cell.name.partition(".")[2]: cell.value / 1e9
            for cell in found.memory
            if cell.name.startswith(f"{role}.") and "host" not in cell.name
        }
        for name, found in planned.items()
        for role in ("policy", "engine")
    }
    stacked(memory, held)
    memory.set(title="Fullest device: policy in training, engine in generation", xlabel="GB")
    spent = {
        name: {
            "rollout": at["time.rollout"],
            "scoring": max(at["time.policy.scoring"], at["time.critic.scoring"]),
            "updates": max(at["time.policy.updates"], at["time.critic.updates"]),
            "push": at["time.push"],
        }
        for name, found in planned.items()
        for at in [{cell.name: cell.value for cell in found.times}]
    }
    stacked(seconds, spent)
    seconds.set(title="A step", xlabel="seconds")
    for index, (name, config) in enumerate(recipes().items()):
        for weak, line in ((False, "-"), (True, "--")):
            shares = [100 * efficiency for _, efficiency in growth(name, config, weak=weak)]
            scaling.plot(TIMES, shares, f"o{line}C{index}", markersize=3, label=None if weak else name)
    scaling.set(
        title="Efficiency: strong (-), weak (--)", xlabel="times the recipe's devices", ylabel="%", ylim=(0, 105)
    )
    scaling.legend(frameon=False, fontsize=7)
    figure.savefig(png, dpi=80)


def stacked(axes: Axes, bars: Mapping[str, Mapping[str, float]]) -> None:
    """A bar for each name, of its parts."""
    parts = dict.fromkeys(part for bar in bars.values() for part in bar)
    left = [0.0] * len(bars)
    for part in parts:
        widths = [bar.get(part, 0.0) for bar in bars.values()]
        axes.barh(list(bars), widths, left=left, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(frameon=False, fontsize=7)


def page() -> str:
    parts = (recipe_rows, scaling_rows, seed_rows, aligner_rows, bridge_rows)
    return HEAD + "\n".join(line for part in parts for line in part()) + "\n"


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(FILE.read_text() != text)
    FILE.write_text(text)
    draw(PICTURE)
