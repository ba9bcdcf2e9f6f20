"""Write docs/scaling.md and its picture from the planner: ``python docs/make_scaling.py``; ``--check`` only compares
the page.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.config.load import parse
from megatron_rl.config.precision import FP8Config
from megatron_rl.config.schema import EngineConfig, OptimizerConfig, RunConfig, TrainerConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims, read_model_dims
from megatron_rl.planner.devices import DEVICES, LINK_SHARE
from megatron_rl.planner.lengths import Lengths, Responses
from megatron_rl.planner.memory import device_bytes, start_bytes
from megatron_rl.planner.search import Plan, plan
from megatron_rl.planner.states import total_parameters
from megatron_rl.planner.times import Machine, Work, decode_step_time, pass_time, rollout_time, update_time
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

HEAD = """# Scaling

Written by `docs/make_scaling.py` from the planner (`megatron-rl plan`): every figure below is a **prediction**, unless
its column says measured or published. No GPU was used for it. Constants (`megatron_rl/planner/devices.py`) are the same
for all rows: none was fitted to any point.

`megatron-rl plan FILE.toml` (`--device h200`) prints the same for any recipe: memory of the fullest device of each role
and of the fullest node, seconds of each phase, other layouts of the same devices, and why the others cannot be.
`--explain policy.gradients` prints how a number came about. What `train` refuses is not planned; the exit status is 1
where a recipe cannot run or does not fit. `megatron-rl dry-run FILE.toml --rank R` builds the real model of that rank,
of any world, without memory, and reads its bytes off; tests hold the prediction against it.

`plan` also holds `cluster.call_deadline_s`, which ends a run, against the longest single call: an engine's share of a
rollout or of an evaluation, a pass over a rollout, an update. `plan` ends with status 1 where one takes longer, and
`scale` tries such a run all the same. Where one could take more than half of the limit if all responses were as long as
they may be, `plan` says what to raise it to.

## Against measurement on a CPU

`python benchmarks/planner.py` (5 rounds) on two shared cores without AVX-512, one thread a rank: an update of the
policy, hidden width 256, 4 layers, 8 rows of 512 tokens, unless the row says otherwise. The first row calibrates the
others: one number for memory beyond the plan (340 MiB), one factor for time (0.90). Memory is the largest resident set
of a rank, with freed blocks given back at once; time is CPU-seconds of all ranks. Two of the CPU's figures were
measured apart: how element-wise work compares with products, by a profile of the calibration's update, and what gloo
exchanges a CPU-second.

| setting | MiB predicted | measured | error | CPU-s predicted | measured | error |
| --- | --- | --- | --- | --- | --- | --- |
| calibration | 883 | 883 | | 4.12 | 4.12 | |
| hidden 384 | 1180 | 1179 | +0 % | 7.79 | 7.30 | +7 % |
| 8 layers | 1376 | 1376 | -0 % | 8.18 | 8.38 | -2 % |
| 16 rows | 883 | 884 | -0 % | 8.23 | 7.33 | +12 % |
| micro-batches of 1,024 | 518 | 531 | -2 % | 4.12 | 4.46 | -8 % |
| 4 rows of 1,024 | 883 | 884 | -0 % | 4.45 | 4.59 | -3 % |
| full recompute | 568 | 568 | +0 % | 5.49 | 6.23 | -12 % |
| TP2 SP | 620 | 631 | -2 % | 4.80 | 5.78 | -17 % |
| PP2, micro-batches of 1,024 | 485 | 503 | -4 % | 4.27 | 4.83 | -12 % |
| DP2 | 640 | 647 | -1 % | 4.27 | 4.34 | -2 % |

With `--device h100` (`h200`, `a100-80g`) it does the same on GPUs: larger models in bfloat16, the most that a rank has
allocated, wall seconds. That has not been run yet; `benchmarks/gpu.py` has it as the check `plans` ([gpu.md](gpu.md)).

## What to trust

What is exact: bytes of weights, gradients and optimizer states (with `fp8.parameters` those of bfloat16 are said, which
are as many: Transformer Engine keeps rows and columns), and the most of them at the start, when with
`distributed_optimizer` weights lie beside the buffer that they move to. What is near: activations of whole models,
dense, with experts or latent attention, with fewer key/value heads than tensor ranks too, against passes of the real
ones on a CPU (5 %, where experts are chosen alike); on a GPU Transformer Engine's norms keep less, and in FP8 its
linears do. From Hopper on context ranks are taken to pass keys and values around, as Transformer Engine does in
bfloat16, elsewhere to gather them. What is rough: every time.

A device has the memory that CUDA reports of it, less 2 GB for the libraries of each process on it (with
`cluster.colocate` three), which is assumed. A node's own memory (2 TB in a DGX; `--host-gib` says another), for a
supervised stage too, is the sum over its ranks, each counted as one of the fullest stage: optimizer states kept there,
what a save stages (with `distributed_optimizer` megatron-core gathers the 12 bytes an element of all replicas on the
first one, which serialises them and the weights), with `cluster.colocate` what is away, two buckets, and 4 GB a
process, which is assumed. Ray ends workers where more than 95 % is in use, so that is the limit. None of it has been
measured on a node with GPUs.

Products of linears in FP8 are as many times faster as Transformer Engine's documentation measured for one model of 5B
(Hopper: `tensorwise` 1.57, `blockwise` 1.41; Blackwell: 1.41, `mxfp8` 1.44), in training as in a quantised engine;
scores, output layer and all else are not. Lengths of responses are taken as if each token were the last one with the
same chance and the limit cut the rest: then the longest of a step is the limit or near, long responses read most of the
keys and values and have most of the scores, in training too, and an engine that has no more samples to start waits for
its last ones. Samples of a prompt share its place in the cache and are read in once (vLLM's prefix cache).

![Memory, seconds and GPU-hours of recipes, how they scale, and predictions beside published figures](scaling.png)
"""


def dims_of(name: str) -> ModelDims:
    return read_model_dims(RECIPES / "models" / name)


def machine(device: str) -> Machine:
    return Machine(device=DEVICES[device], per_node=8)


def own_machine(config: RunConfig) -> Machine:
    """That the recipe is laid out for."""
    return Machine(device=DEVICES[config.cluster.planned_device], per_node=config.cluster.gpus_per_node)


def recipes() -> dict[str, RunConfig]:
    whole = set(RECIPES.glob("*.toml")) - {RECIPES / "fp8.toml"}
    return {file.stem: parse(RunConfig, [file]) for file in sorted(whole)}


def fullest(found: Plan, role: str) -> float:
    cells = [c for c in found.memory if c.name.startswith(f"{role}.")]
    return max(device_bytes(cells), start_bytes(cells)) / 1e9


def host(found: Plan) -> float:
    assert found.host is not None
    return found.host.most / 1e9


def gpu_hours(found: Plan) -> float:
    """Of the seed's 120 steps."""
    return found.step_seconds * 120 / 3600 * found.devices


def variants() -> Iterator[tuple[str, str, RunConfig, str]]:
    """Recipe, numbers, settings and device: as they stand on their own, in FP8 there, and those for H100 on A100."""
    for name, config in recipes().items():
        device = config.cluster.device
        assert device is not None
        yield name, "BF16", config, device
        yield name, "FP8", parse(RunConfig, [RECIPES / f"{name}.toml", RECIPES / "fp8.toml"]), device
        if device == "h100":
            yield name, "BF16", config, "a100-80g"


def recipe_rows() -> Iterator[str]:
    yield "\n## Recipes beyond 7B\n"
    yield (
        f"1,024 prompts x 8 samples a step, {LENGTHS.prompt:g} + {LENGTHS.response:g} tokens on the average: each "
        "recipe on the GPU that it names (deepseek_v3: B200, since its engine lies on one node of 8, whose GPUs hold "
        "170 GB of weights each), with `fp8.toml` there (training alone; engines in BF16), and those for H100 on A100. "
        "GB of the fullest device, and of the memory of the fullest node beside its devices; the last column is "
        "GPU-hours of 120 steps. `plan` "
        "names layouts of the same devices that are faster still, mostly with more pieces to a stage. "
        "deepseek_v3 as TP8 PP2(31..30) DP32 EP128 would score and train 1.4 times as fast by the same account, which "
        "counts neither replicas that wait for each other (4 rows a minibatch) nor experts that are chosen unevenly.\n"
    )
    columns = (
        "recipe, device, training in, GPUs, policy, critic, engine, node, rollout s, scoring s, updates s, push s, "
        "step s, GPU-h 120"
    )
    yield f"| {columns.replace(', ', ' | ')} |"
    yield "|" + " --- |" * len(columns.split(", "))
    for name, numbers, config, device in variants():
        found = plan(config, dims_of(name), machine(device), LENGTHS)
        start = f"| {name} | {device} | {numbers} | {found.devices} |"
        if not found.times:
            yield f"{start} cannot be: {'; '.join(found.problems)} |"
            continue
        at = {cell.name: cell.value for cell in found.times}
        memory = " | ".join(f"{fullest(found, role):.0f}" for role in ("policy", "critic", "engine"))
        yield (
            f"{start} {memory} | {host(found):.0f} | {at['time.rollout']:.0f} | "
            f"{at['time.policy.scoring']:.0f} | {at['time.policy.updates']:.0f} | {at['time.push']:.0f} | "
            f"{found.step_seconds:.0f} | {gpu_hours(found):,.0f} |"
            + "".join(f" does not fit: {problem}" for problem in found.problems)
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
    steps = [plan(grown(config, n, weak=weak), dims_of(name), own_machine(config), LENGTHS) for n in TIMES]
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


def seed_recipes() -> dict[str, RunConfig]:
    """The shipped recipes of the seed."""
    model = f"model.path={RECIPES / 'models' / 'qwen2.5_math_7b'}"
    return {
        place: parse(RunConfig, [SEED / "simplerl_zero.toml", SEED / f"{place}.toml"], [model])
        for place in ("4_nodes_a100", "4_nodes_h100", "1_node_a100", "1_node_h100")
    }


def seed_rows() -> Iterator[str]:
    yield "\n## The seed's recipes\n"
    yield (
        "`examples/qwen2.5_math_7b/simplerl_zero.toml` with each file of its places: Qwen2.5-Math-7B, 1,024 prompts x "
        f"8 samples, 64 updates of 128 a step, {LENGTHS.prompt:g} + {LENGTHS.response:g} tokens on the average. H100 "
        "trains and generates in FP8. The seed published less than one day for 60 steps and 1.5 days for 120 on 32 "
        "GPUs, and calls 6 GPUs untested. Its figure is of another program, which scores answers one after the other.\n"
    )
    yield (
        "| place | GPUs | policy GB | critic GB | engine GB | node GB | rollout s | scoring s | updates s | step s | "
        "60 steps, days | 120 steps, days | fits |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for place, config in seed_recipes().items():
        found = plan(config, dims_of("qwen2.5_math_7b"), own_machine(config), LENGTHS)
        at = {cell.name: cell.value for cell in found.times}
        memory = " | ".join(f"{fullest(found, role):.0f}" for role in ("policy", "critic", "engine"))
        phases = (at["time.rollout"], at["time.policy.scoring"], at["time.policy.updates"], found.step_seconds)
        days = " | ".join(f"{found.step_seconds * steps / 86400:.2f}" for steps in (60, 120))
        fits = "yes" if not found.problems else "; ".join(found.problems)
        yield (
            f"| {place} | {found.devices} | {memory} | {host(found):.0f} | "
            f"{' | '.join(f'{s:.0f}' for s in phases)} | {days} | {fits} |"
        )


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure of others, in ``unit``, and ours for the same settings."""

    name: str
    unit: str
    predicted: float
    published: float

    @property
    def error(self) -> str:
        return f"{100 * (self.predicted / self.published - 1):+.0f} %"


@dataclass(frozen=True, kw_only=True)
class Aligner:
    """A published step of NeMo-Aligner.

    Attributes:
        model: of policy and critic.
        nodes: of the policy; the critic has half as many.
        tokens: generated for a sample, on the average.
        samples: of a step.
        together: of a round of generation.
        pipeline: stages in training.
        resharded: whether a node holds the whole policy to generate; else the stages of training do.
        seconds: published.
    """

    model: str = "llama3_70b"
    nodes: int
    tokens: float
    samples: int = 1024
    together: int = 8
    pipeline: int = 4
    resharded: bool = True
    seconds: float

    @property
    def generating(self) -> int:
        """Copies of the policy that generate side by side, of 8 GPUs a stage."""
        return self.nodes // (1 if self.resharded else self.pipeline)

    @property
    def name(self) -> str:
        size = self.model.rpartition("_")[2].upper()
        return f"{size}, {self.nodes} + {self.nodes // 2}"


ALIGNER = (
    Aligner(nodes=8, tokens=350.7, seconds=366.7),
    Aligner(nodes=16, tokens=323.3, seconds=190.4),
    Aligner(nodes=32, tokens=331.7, seconds=108.0),
    Aligner(nodes=64, tokens=334.0, together=16, seconds=56.9),
    Aligner(model="llama3.1_405b", nodes=84, tokens=915.6, samples=128, pipeline=21, resharded=False, seconds=164.6),
)


def aligner_seconds(case: Aligner) -> tuple[float, float, float]:
    """Generation, all that policy nodes do in a step, and all that critic nodes do, in seconds."""
    dims, h100, engine = dims_of(case.model), machine("h100"), EngineConfig(tensor=8)
    responses = Responses(mean=case.tokens, longest=1024)
    longest, prompt, padded, update = responses.longest_of(case.together), 400, 2048, 128
    # stages read their weights one after the other: a token takes as long as where one has them all
    step = decode_step_time(dims, engine, h100, "bfloat16", sequences=case.together, context=prompt + longest / 2)
    rollout = case.samples / case.generating / case.together * longest * step

    def model(gpus: int) -> TrainerConfig:
        ranks = 8 * case.pipeline
        layout = ParallelLayout(tensor=8, sequence_parallel=True, pipeline=case.pipeline, data=gpus // ranks)
        assert not dims.layout_problems(layout), dims.layout_problems(layout)
        return trainer(layout, tokens_per_microbatch=padded, recompute="selective")

    def phases(gpus: int, head: Head) -> tuple[float, float]:
        rows = [Work(rows=n, row_tokens=padded) for n in (case.samples, update)]
        scored = pass_time(dims, model(gpus), h100, rows[0], "bfloat16", backward=False, head=head).total
        updated = update_time(dims, model(gpus), head, h100, rows[1], "bfloat16").total
        return 2 * scored, case.samples / update * updated

    weights = 2 * total_parameters(dims, Head.TOKEN)
    refit = weights / 8 / h100.link(case.nodes * 8) if case.resharded else 0.0  # else they are where they are needed
    # Adam's states and the initial policy
    moved = (12 / 2 + 1) * weights * 2 / (case.nodes * 8) / (LINK_SHARE * h100.device.host_link)
    policy = rollout + refit + moved + sum(phases(case.nodes * 8, Head.TOKEN))
    return rollout, policy, sum(phases(case.nodes * 4, Head.VALUE))


def aligner_points() -> Iterator[Published]:
    for case in ALIGNER:
        _, policy, critic = aligner_seconds(case)
        yield Published(
            name=f"NeMo-Aligner {case.name} nodes", unit="s", predicted=max(policy, critic), published=case.seconds
        )


def aligner_rows() -> Iterator[str]:
    yield "\n## Against what others published\n"
    yield (
        "**NeMo-Aligner** (docs/user-guide/rlhf.rst): PPO of a Llama-3 70B policy and a 70B critic, 1,024 samples a "
        "step, minibatches of 128, about 330 tokens generated. Its source says how a step goes: each node of the "
        "policy generates with TensorRT-LLM in rounds of 8 samples (16 on 64 nodes), and a round lasts as long as its "
        "longest; then all rows are padded to one length and scored twice (policy, initial policy), weights and Adam's "
        "states come from the host and go back, and the policy trains. Half as many nodes score with the critic "
        "(reward, values) and train it beside; a step is the longer of both. From its example: at most 1,024 tokens a "
        "response, rows of 2,048, micro-batches of one row. Assumed: 400 tokens a prompt, TP8 PP4 for both models, "
        "responses that end by chance (above). No layout and no split of a step is published. What remains is what "
        "that program took beyond what devices and links allow (its Python around each round and micro-batch, requests "
        "to the critic, memory that is emptied and filled in each step), most of it where a step is short.\n"
    )
    yield (
        "Llama-3.1 405B with a critic of as much: 128 samples a step in one minibatch, 915.6 tokens generated, by the "
        "stages of training in turn; of its step 140 s are generation (arXiv 2405.01481). Assumed besides: TP8 PP21, "
        "since 84 and 42 nodes are 4 and 2 times 21, and rounds of 8 samples, one after the other; where a round "
        "enters the stages behind another one it takes less.\n"
    )
    columns = (
        "model, nodes; generation s; policy s; critic s; predicted s; published s; error; predicted speed-up; published"
    )
    yield f"| {columns.replace('; ', ' | ')} |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    points = list(aligner_points())
    for case, point in zip(ALIGNER, points, strict=True):
        rollout, policy, critic = aligner_seconds(case)
        faster = (
            f"{points[0].predicted / point.predicted:.2f} | {ALIGNER[0].seconds / case.seconds:.2f}"
            if case.model == ALIGNER[0].model
            else " | "
        )
        yield (
            f"| {case.name} | {rollout:.1f} | {policy:.1f} | {critic:.1f} | {point.predicted:.1f} | "
            f"{case.seconds} | {point.error} | {faster} |"
        )


DEEPSEEK_V3 = ParallelLayout(pipeline=16, data=16, expert=16, first_stage_layers=3, last_stage_layers=2)
QWEN3_235B = ParallelLayout(
    tensor=2,
    sequence_parallel=True,
    context=2,
    pipeline=8,
    data=4,
    expert=16,
    first_stage_layers=11,
    last_stage_layers=11,
)
NEMO_RL = (
    # model, layout, workers of an engine, samples of a step, longest row, published tokens per second and GPU, seconds
    ("deepseek_v3", DEEPSEEK_V3, 32, 512, 1536, 12.1, 134),
    ("deepseek_v3", replace(DEEPSEEK_V3, data=32), 32, 512, 1536, 7.24, 111),
    ("qwen3_235b_a22b", QWEN3_235B, 16, 512, 8192, 58.9, 395),
    ("qwen3_235b_a22b", replace(QWEN3_235B, data=8), 16, 512, 8192, 37.4, 312),
    ("qwen3_30b_a3b", ParallelLayout(data=32, expert=8), 2, 2048, 4096, 1102, 192),
)
NEMO_RL_PROMPT, NEMO_RL_UPDATE = 100, 512


def nemo_rl_tokens(layout: ParallelLayout, samples: int, rate: float, seconds: float) -> float:
    """Of a row on the average: what a second and a GPU had of them, times both."""
    return rate * seconds * layout.world_size / samples


def nemo_rl_seconds(
    name: str, layout: ParallelLayout, workers: int, samples: int, longest: int, row: float
) -> tuple[float, float, float, float]:
    """Generation, both passes of log-probs, updates, and weights with what moves to the host and back."""
    dims, h100, gpus = dims_of(name), machine("h100"), layout.world_size
    assert not dims.layout_problems(layout), dims.layout_problems(layout)
    weights = 2 * total_parameters(dims, Head.TOKEN)
    cache = round((0.6 * h100.device.memory - weights / workers) / 2**20)
    responses = Responses(mean=row - NEMO_RL_PROMPT, longest=longest - NEMO_RL_PROMPT)
    rollout = rollout_time(
        dims,
        EngineConfig(count=gpus // workers, tensor=workers, kv_cache_mib=cache),
        h100,
        "bfloat16",
        samples=samples,
        prompt_tokens=NEMO_RL_PROMPT,
        responses=responses,
    ).total
    model = trainer(
        layout,
        tokens_per_microbatch=longest // layout.context,
        recompute="none" if name == "qwen3_30b_a3b" else "full",
    )
    met = responses.token_row(NEMO_RL_PROMPT)
    whole, part = (Work(rows=rows, row_tokens=row, token_row=met) for rows in (samples, NEMO_RL_UPDATE))
    scored = 2 * pass_time(dims, model, h100, whole, "bfloat16", backward=False).total
    updated = samples / NEMO_RL_UPDATE * update_time(dims, model, Head.TOKEN, h100, part, "bfloat16").total
    moved = (12 / 2 + 1) * weights * 2 / gpus / (LINK_SHARE * h100.device.host_link)
    return rollout, scored, updated, weights / workers / h100.link(gpus) + moved


def nemo_rl_points() -> Iterator[Published]:
    for name, layout, workers, samples, longest, rate, seconds in NEMO_RL:
        row = nemo_rl_tokens(layout, samples, rate, seconds)
        yield Published(
            name=f"NeMo-RL {name}, {layout.world_size} GPUs",
            unit="s",
            predicted=sum(nemo_rl_seconds(name, layout, workers, samples, longest, row)),
            published=seconds,
        )


def nemo_rl_rows() -> Iterator[str]:
    yield (
        "\n**NeMo-RL** v0.6 (docs/about/performance-summary.md): GRPO on H100 in BF16, on policy, trainer and engines "
        "on the same GPUs in turn, seconds of a step. Published besides: tokens per second and GPU, from which the "
        "tokens of a row on the average follow. From the recipes of its repository "
        "(examples/configs/recipes/llm/performance, as they stand there, which need not be the release's): layouts, "
        "workers of an engine, samples, the longest row, recompute (of whole layers, but for the 30B). "
        f"Assumed: {NEMO_RL_UPDATE} samples an update, {NEMO_RL_PROMPT} tokens a prompt; responses that end by chance "
        "(above); engines with 60 % of a GPU's memory; two passes of log-probs (policy, reference); rows packed into "
        "micro-batches of the longest row's tokens; each GPU gets its share of an engine's weights over the network; "
        "weights and Adam's states go to the host and back once. Not counted is what that program takes beside (its "
        "Python, memory that is emptied and filled), experts that are chosen unevenly, and replicas that wait for each "
        "other.\n"
    )
    columns = (
        "model, GPUs, layout, tokens of a row, generation s, log-probs s, updates s, weights s, predicted s, "
        "published s, error"
    )
    yield f"| {columns.replace(', ', ' | ')} |"
    yield "|" + " --- |" * len(columns.split(", "))
    for (name, layout, workers, samples, longest, rate, seconds), point in zip(NEMO_RL, nemo_rl_points(), strict=True):
        row = nemo_rl_tokens(layout, samples, rate, seconds)
        parts = nemo_rl_seconds(name, layout, workers, samples, longest, row)
        yield (
            f"| {name} | {layout.world_size} | {layout}, engines TP{workers} | {row:,.0f} | "
            f"{' | '.join(f'{part:.1f}' for part in parts)} | {point.predicted:.1f} | {seconds} | {point.error} |"
        )


BRIDGE = (
    # model, layout, tokens of a row, rows of a step, published tokens per second and GPU
    ("llama3_8b", ParallelLayout(data=8), 8192, 128, 14451),
    (
        "llama3_70b",
        ParallelLayout(tensor=4, pipeline=8, virtual_pipeline=5, data=2, sequence_parallel=True),
        8192,
        256,
        1664,
    ),
    (
        "llama3.1_405b",
        ParallelLayout(tensor=8, pipeline=8, virtual_pipeline=8, context=2, data=8, sequence_parallel=True),
        8192,
        1536,
        328,
    ),
    ("qwen3_30b_a3b", ParallelLayout(data=16, expert=16), 4096, 1024, 8960),
    (
        "qwen3_235b_a22b",
        ParallelLayout(tensor=2, pipeline=8, virtual_pipeline=4, data=16, expert=32, sequence_parallel=True),
        4096,
        8192,
        1712,
    ),
)


def even_layers(dims: ModelDims, layout: ParallelLayout) -> ModelDims:
    """With as many more layers as the pieces of the layout share equally: that program deals out embedding and output
    layer as if each were one.
    """
    layers = -(-dims.layers // (layout.pipeline * layout.virtual_pipeline)) * layout.pipeline * layout.virtual_pipeline
    experts = None if dims.experts is None else replace(dims.experts, layers=tuple(range(layers)))
    return replace(dims, layers=layers, experts=experts)


def bridge_points() -> Iterator[Published]:
    for name, layout, row, rows, published in BRIDGE:
        dims = even_layers(dims_of(name), layout)
        assert not dims.layout_problems(layout), dims.layout_problems(layout)
        model = trainer(
            layout,
            tokens_per_microbatch=row // layout.context,
            overlap_communication=True,
            fp8=FP8Config(recipe="tensorwise"),
        )
        work = Work(rows=rows, row_tokens=row)
        seconds = update_time(dims, model, Head.TOKEN, machine("h100"), work, "bfloat16").total
        yield Published(
            name=f"Megatron-Bridge {name}, {layout.world_size} GPUs",
            unit="tokens/s/GPU",
            predicted=rows * row / seconds / layout.world_size,
            published=published,
        )


def bridge_rows() -> Iterator[str]:
    yield (
        "\n**Megatron-Bridge** pre-training on H100 in FP8 (docs/performance-summary-archive.md, which has layouts, "
        "rows and steps as well), tokens per second and GPU; micro-batches of one row, one scale per tensor, first and "
        "last layer in BF16, exchanges between replicas beside arithmetic. 405B and 235B are planned with two layers "
        "more, since their layouts deal out embedding and output layer as layers. Experts miss: their dispatchers send "
        "a token to a node once, and beside arithmetic; here it is sent to each expert, and waited for.\n"
    )
    yield "| model | GPUs | layout | predicted | published | error |\n| --- | --- | --- | --- | --- | --- |"
    for (name, layout, *_), point in zip(BRIDGE, bridge_points(), strict=True):
        yield (
            f"| {name} | {layout.world_size} | {layout} | {point.predicted:,.0f} | {point.published:,} | "
            f"{point.error} |"
        )


def draw(png: Path) -> None:
    """What the fullest devices hold, what a step's seconds go to and what a run costs, of all recipes, how the larger
    ones scale, and what is predicted beside what others published.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to load, and --check draws nothing
    from matplotlib.figure import Figure

    planned = {
        name: plan(config, dims_of(name), own_machine(config), LENGTHS) for name, config in recipes().items()
    } | {
        place: plan(config, dims_of("qwen2.5_math_7b"), own_machine(config), LENGTHS)
        for place, config in seed_recipes().items()
    }
    figure = Figure(figsize=(9, 21), layout="constrained")
    FigureCanvasAgg(figure)
    memory, seconds, cost, scaling, beside = figure.subplots(5, 1, height_ratios=(6, 3, 3, 4, 5))
    held = {
        f"{name}, {role}": {
            cell.name.partition(".")[2]: cell.value / 1e9
            for cell in found.memory
            if cell.name.startswith(f"{role}.") and device_bytes([cell])
        }
        for name, found in planned.items()
        for role in ("policy", "critic", "engine")
    }
    stacked(memory, held)
    memory.set(title="Fullest device: policy and critic in training, engine in generation", xlabel="GB")
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
    hours = {name: gpu_hours(found) for name, found in planned.items()}
    labelled(cost, {name: ({"": spent}, f"{spent:,.0f}") for name, spent in hours.items()})
    cost.set(title="120 steps", xlabel="GPU-hours", xscale="log")
    for index, (name, config) in enumerate(recipes().items()):
        for weak, line in ((False, "-"), (True, "--")):
            shares = [100 * efficiency for _, efficiency in growth(name, config, weak=weak)]
            scaling.plot(TIMES, shares, f"o{line}C{index}", markersize=3, label=None if weak else name)
    scaling.set(
        title="Efficiency: strong (-), weak (--)", xlabel="times the recipe's devices", ylabel="%", ylim=(0, 105)
    )
    scaling.legend(frameon=False, fontsize=7)
    labelled(
        beside,
        {
            f"{point.name}, {point.unit}": ({"predicted": point.predicted, "published": point.published}, point.error)
            for point in published_points()
        },
    )
    beside.set(title="Predicted beside published, and the error", xscale="log")
    beside.legend(frameon=False, fontsize=7)
    figure.savefig(png, dpi=80)


def labelled(axes: Axes, bars: Mapping[str, tuple[Mapping[str, float], str]]) -> None:
    """Bars beside each other for each name, with a text at the end of the longest."""
    for index, (values, text) in enumerate(bars.values()):
        height = 0.8 / len(values)
        for part, (label, value) in enumerate(values.items()):
            at = index - 0.4 + (part + 0.5) * height
            axes.barh(at, value, height, color=f"C{part}", label=label if label and not index else None)
        axes.text(1.05 * max(values.values()), index, text, va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=7)
    axes.margins(x=0.15)
    axes.invert_yaxis()


def published_points() -> list[Published]:
    return [*aligner_points(), *nemo_rl_points(), *bridge_points()]


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
    parts = (recipe_rows, scaling_rows, seed_rows, aligner_rows, nemo_rl_rows, bridge_rows)
    return HEAD + "\n".join(line for part in parts for line in part()) + "\n"


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(FILE.read_text() != text)
    FILE.write_text(text)
    draw(PICTURE)
