"""A plan of a recipe: what it needs, how long a step takes, and which other layouts the same devices allow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from megatron_rl.config.precision import Gpu, fp8_problems
from megatron_rl.config.schema import RunConfig, SFTConfig, TrainerConfig, fake_quantization_problems
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims
from megatron_rl.planner.host import HostUse, host_problem, host_uses
from megatron_rl.planner.lengths import Lengths, Responses
from megatron_rl.planner.memory import Cell, device_bytes, engine_cells, start_bytes, trainer_cells, unlike_stages
from megatron_rl.planner.states import least_bytes
from megatron_rl.planner.times import (
    Machine,
    PassTime,
    RolloutTime,
    Work,
    pass_time,
    push_time,
    rollout_time,
    update_time,
)
from megatron_rl.weights.rules import Head

Recipe = RunConfig | SFTConfig


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One layout of one model: bytes on the fullest device, seconds of its part of a step, and why it cannot be."""

    layout: ParallelLayout
    bytes: float
    seconds: float
    problem: str


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call to a role's ranks, which ``cluster.call_deadline_s`` bounds.

    Attributes:
        name: what they do.
        seconds: that it takes.
        longest: the same where each response is as long as it may be.
    """

    name: str
    seconds: float
    longest: float

    @property
    def roomy_limit(self) -> int:
        """Seconds of a limit that leaves it twice the longest time, since all times are rough."""
        return math.ceil(2 * self.longest / 100) * 100


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe needs and how long a step takes.

    Attributes:
        memory: what the fullest device of each role holds.
        host: what the fullest node's own memory holds; None where it is the devices', and where nothing is planned.
        times: seconds of each phase; those that run side by side stand in ``step`` once.
        calls: single calls of a step or an evaluation, the longest first.
        problems: why ``train`` refuses the recipe, or what does not fit; empty when it can run.
        late: the call that by the times, which are rough, takes longer than its limit, if one does.
        devices: that it takes.
    """

    memory: tuple[Cell, ...]
    times: tuple[Cell, ...]
    problems: tuple[str, ...]
    devices: int
    host: HostUse | None = None
    calls: tuple[Call, ...] = ()
    late: str = ""

    @property
    def step_seconds(self) -> float:
        """Of one step."""
        return next(cell.value for cell in self.times if cell.name == "time.step")


def head_of(role: str) -> Head:
    """What sits on top of a role's model."""
    return Head.VALUE if role == "critic" else Head.TOKEN


def plan(config: Recipe, dims: ModelDims, machine: Machine, lengths: Lengths) -> Plan:
    """Plan the recipe as it stands; one that ``train`` would refuse has problems and nothing else.

    Files may be missing, and the CUDA version is not known here.
    """
    problems = list(config.contradictions(dims, _gpu(machine)))
    if isinstance(config, RunConfig) and config.engine.tensor > machine.per_node:
        problems.append(
            f"engine.tensor: at most the {machine.per_node} GPUs of a node: an engine lies on one host, "
            f"got {config.engine.tensor}"
        )
    if problems:
        return Plan(memory=(), times=(), problems=tuple(problems), devices=config.devices)
    memory = _engine_cells(config, dims)
    for role, trainer in config.trainers.items():
        memory += _cells(config, dims, machine, role, trainer)
    room = _room(config, machine)
    problems += [f"{who}: {_lack(held, room)}" for who, held in together(config, memory) if held > room]
    nodes = host_uses(config, dims, machine)
    if problem := host_problem(nodes, machine):
        problems.append(problem)
    calls = longest_calls(config, dims, machine, lengths)
    return Plan(
        memory=tuple(memory),
        times=tuple(_times(config, dims, machine, lengths)),
        problems=tuple(problems),
        devices=config.devices,
        host=nodes[0] if nodes else None,
        calls=calls,
        late=_late(calls, config.cluster.call_deadline_s),
    )


def _late(calls: Sequence[Call], limit: float) -> str:
    slowest = max(calls, key=lambda call: call.seconds)
    if slowest.seconds <= limit:
        return ""
    return (
        f"cluster.call_deadline_s: must be longer than {slowest.name}, which is one call of about "
        f"{slowest.seconds:,.0f} s, got {limit:g}: raise it to {calls[0].roomy_limit}"
    )


def together(config: Recipe, memory: Sequence[Cell]) -> Iterator[tuple[str, float]]:
    """Who is on a device at the same time, and their bytes: each role alone, or with ``cluster.colocate`` policy and
    critic, and in turn with them the engine; at the parity gate all weights lie beside it. Trainers besides while they
    start, which they do at once.
    """

    def held(*names: str) -> float:
        return device_bytes(cell for cell in memory if cell.name.startswith(names))

    if isinstance(config, SFTConfig) or not config.cluster.colocate:
        yield from ((role, held(f"{role}.")) for role in roles_of(config))
        for role in config.trainers:
            yield f"{role} at the start", start_bytes(cell for cell in memory if cell.name.startswith(f"{role}."))
        return
    trainers = " with ".join(config.trainers)
    yield trainers, held(*(f"{role}." for role in config.trainers))
    yield f"{trainers} at the start", start_bytes(memory)
    yield "engine", held("engine.")
    if config.parity.enabled:
        weights = [f"{role}.weights" for role in config.trainers]
        yield f"parity.enabled: engine with {', '.join(weights)}", held("engine.", *weights)
    else:
        yield "push: policy.weights with engine.weights", held("policy.weights", "engine.weights")


def roles_of(config: Recipe) -> list[str]:
    """Who has devices."""
    return [*config.trainers, *(["engine"] if isinstance(config, RunConfig) else [])]


def limits(config: Recipe, dims: ModelDims) -> Lengths:
    """The longest prompt and the longest response. Nothing but the data says how long those of the supervised stage
    are: as if a row filled a micro-batch, or the model's positions.
    """
    if isinstance(config, SFTConfig):
        row = min(dims.max_positions, config.trainer.tokens_per_microbatch * config.trainer.layout.context)
        return Lengths(prompt=row, response=row)
    return Lengths(prompt=config.data.max_prompt_tokens, response=config.rollout.max_response_tokens)


def legal_minibatches(config: RunConfig) -> list[int]:
    """Sizes of an optimizer step that divide the samples of a step and give each replica at least one."""
    least = max(1, *(trainer.layout.data for trainer in config.trainers.values()))
    samples = config.samples_per_step
    return [n for n in range(least, samples + 1) if samples % n == 0]


def _gpu(machine: Machine) -> Gpu:
    return Gpu(capability=machine.device.capability, cuda=None)


def _room(config: Recipe, machine: Machine) -> float:
    """Bytes of a device that may be used: each process there takes what libraries do."""
    processes = len(roles_of(config)) if config.cluster.colocate else 1
    return machine.device.memory - processes * machine.device.reserved


def _keeps(config: Recipe, role: str) -> bool:
    return isinstance(config, RunConfig) and role == "policy" and config.ppo.kl_coef > 0


def _samples_per_update(config: Recipe) -> int:
    return config.samples_per_step if isinstance(config, SFTConfig) else config.ppo.minibatch_samples


def _engine_cells(config: Recipe, dims: ModelDims) -> list[Cell]:
    return engine_cells(dims, config.engine, config.model.dtype) if isinstance(config, RunConfig) else []


def _times(config: Recipe, dims: ModelDims, machine: Machine, lengths: Lengths) -> Iterator[Cell]:
    if isinstance(config, RunConfig):
        yield from _run_times(config, dims, machine, lengths)
        return
    update = _update_seconds(config, dims, machine, lengths, "trainer", config.trainer)
    yield update
    yield Cell(name="time.step", value=update.value, unit="s", formula="an update")


def longest_calls(config: Recipe, dims: ModelDims, machine: Machine, lengths: Lengths) -> tuple[Call, ...]:
    """What ``cluster.call_deadline_s`` bounds, but for saves; the longest first. An engine draws its share of a
    rollout, or of an evaluation, in one call; policy, reference and critic score a rollout in one call each.
    """
    full = lengths
    if isinstance(config, RunConfig):
        full = replace(lengths, response=config.rollout.max_response_tokens)
    found, longest = (_call_seconds(config, dims, machine, each) for each in (lengths, full))
    calls = (Call(name=name, seconds=seconds, longest=longest[name]) for name, seconds in found.items())
    return tuple(sorted(calls, key=lambda call: -call.longest))


def _call_seconds(config: Recipe, dims: ModelDims, machine: Machine, lengths: Lengths) -> dict[str, float]:
    found = {}
    for role, trainer in config.trainers.items():
        found[f"an update of the {role}"] = _update_time(config, dims, machine, lengths, role, trainer).total
        if isinstance(config, RunConfig):
            scoring = _scoring_time(config, dims, machine, lengths, role, trainer)
            found[f"a pass of the {role} over a rollout"] = scoring.total
    if isinstance(config, RunConfig):
        rollout, evaluation = config.rollout.samples_per_prompt, config.evaluation
        for name, prompts, each in (
            ("an engine's share of a rollout", config.prompts_per_step, rollout),
            ("an engine's share of an evaluation", _evaluated_prompts(config), evaluation.samples),
        ):
            found[name] = _drawing_time(config, dims, machine, lengths, prompts, each).total
    return found


def _evaluated_prompts(config: RunConfig) -> int:
    """As many as asked for, or the lines of a file that is there and has fewer."""
    most, file = config.evaluation.prompts, config.data.heldout
    if not file.is_file():
        return most
    with file.open("rb") as lines:
        return max(1, sum(1 for _ in islice(lines, most)))


def _drawing_time(
    config: RunConfig, dims: ModelDims, machine: Machine, lengths: Lengths, prompts: int, samples_per_prompt: int
) -> RolloutTime:
    return rollout_time(
        dims,
        config.engine,
        machine,
        config.model.dtype,
        samples=prompts * samples_per_prompt,
        prompt_tokens=lengths.prompt,
        responses=_responses(config, lengths),
        samples_per_prompt=samples_per_prompt,
    )


def _run_times(config: RunConfig, dims: ModelDims, machine: Machine, lengths: Lengths) -> Iterator[Cell]:
    dtype, engine = config.model.dtype, config.engine
    responses = _responses(config, lengths)
    rollout = _drawing_time(config, dims, machine, lengths, config.prompts_per_step, config.rollout.samples_per_prompt)
    yield Cell(
        name="time.rollout",
        value=rollout.total,
        unit="s",
        formula=f"prefill {rollout.prefill:.2f} s + decode {rollout.full:.2f} s while samples wait + "
        f"{rollout.tail:.2f} s until the longest is done: {config.samples_per_step} samples of {lengths.prompt:g} + "
        f"{lengths.response:g} tokens (longest: {responses.longest_of(config.samples_per_step):,.0f}) on "
        f"{engine.count} engines",
    )
    scored, updated = [], []
    for role, trainer in config.trainers.items():
        passes, update = role_seconds(config, dims, machine, lengths, role, trainer)
        scored.append(passes.value)
        updated.append(update.value)
        yield passes
        yield update
    form = config.pushed_format
    push = push_time(dims, config.policy, engine, machine, dtype, quantised=form is not None)
    stream = "in one stream" if form is None else f"in one stream, quantised to {form}"
    yield Cell(name="time.push", value=push, unit="s", formula=f"all weights to rank 0, then to the engines {stream}")
    if config.cluster.colocate:
        scoring, updates = sum(scored), sum(updated)
        order = "one after the other; moving them to the host and back is not counted"
    else:
        scoring, updates, order = max(scored), max(updated), "side by side"
    step = rollout.total + scoring + updates + push
    yield Cell(
        name="time.step",
        value=step,
        unit="s",
        formula=f"rollout {rollout.total:.2f} + scoring {scoring:.2f} + updates {updates:.2f} + push "
        f"{push:.2f}; policy and critic {order}",
    )


def role_seconds(
    config: RunConfig, dims: ModelDims, machine: Machine, lengths: Lengths, role: str, trainer: TrainerConfig
) -> tuple[Cell, Cell]:
    """A model's part of a step: passes over the rollout (twice where a reference is kept), and its updates."""
    forward = _scoring_time(config, dims, machine, lengths, role, trainer)
    times = 2 if _keeps(config, role) else 1
    return (
        Cell(
            name=f"time.{role}.scoring",
            value=times * forward.total,
            unit="s",
            formula=f"{times} passes x (arithmetic {forward.arithmetic:.2f} + exchanges {forward.tensor:.2f} + bubble "
            f"{forward.bubble:.2f} s) over {config.samples_per_step * lengths.row:,.0f} tokens",
        ),
        _update_seconds(config, dims, machine, lengths, role, trainer),
    )


def _scoring_time(
    config: RunConfig, dims: ModelDims, machine: Machine, lengths: Lengths, role: str, trainer: TrainerConfig
) -> PassTime:
    """Of one pass over the rollout."""
    whole = _work(config, lengths, config.samples_per_step)
    return pass_time(dims, trainer, machine, whole, config.model.dtype, backward=False, head=head_of(role))


def _update_time(
    config: Recipe, dims: ModelDims, machine: Machine, lengths: Lengths, role: str, trainer: TrainerConfig
) -> PassTime:
    """Of one update."""
    part = _work(config, lengths, _samples_per_update(config))
    return update_time(dims, trainer, head_of(role), machine, part, config.model.dtype)


def _update_seconds(
    config: Recipe, dims: ModelDims, machine: Machine, lengths: Lengths, role: str, trainer: TrainerConfig
) -> Cell:
    update = _update_time(config, dims, machine, lengths, role, trainer)
    count = config.updates_per_step if isinstance(config, RunConfig) else 1
    return Cell(
        name=f"time.{role}.updates",
        value=count * update.total,
        unit="s",
        formula=f"{count} updates x (arithmetic {update.arithmetic:.3f} + exchanges {update.tensor:.3f} + bubble "
        f"{update.bubble:.3f} + replicas {update.replicas:.3f} + optimizer {update.optimizer:.3f} s) of "
        f"{_samples_per_update(config) * lengths.row:,.0f} tokens",
    )


def _work(config: Recipe, lengths: Lengths, rows: int) -> Work:
    """Nothing says how lengths of a supervised stage vary."""
    met = None if isinstance(config, SFTConfig) else _responses(config, lengths).token_row(lengths.prompt)
    return Work(rows=rows, row_tokens=lengths.row, token_row=met)


def _responses(config: RunConfig, lengths: Lengths) -> Responses:
    return Responses(mean=lengths.response, longest=config.rollout.max_response_tokens)


def choices(config: Recipe, dims: ModelDims, machine: Machine, lengths: Lengths, role: str, ranks: int) -> list[Choice]:
    """Layouts of a role on ``ranks`` devices: those that can be, fastest first, then those that cannot. Of those that
    differ in ``virtual_pipeline`` alone the fastest that fits.
    """
    beside = _beside(config, dims, machine, role)
    found = []
    for layout in _layouts(dims, ranks, machine.per_node):
        one = _judged(config, dims, machine, lengths, role, layout, beside)
        if not one.problem:  # more pieces hold more: where one does not fit, none does
            one = _folded(config, dims, machine, lengths, role, one, beside)
        found.append(one)
    return sorted(found, key=lambda c: (bool(c.problem), c.seconds, c.bytes))


def _folded(
    config: Recipe,
    dims: ModelDims,
    machine: Machine,
    lengths: Lengths,
    role: str,
    one: Choice,
    beside: Sequence[Cell],
) -> Choice:
    """The fastest that fits of ``one`` and the same with more pieces on each stage."""
    faster = []
    for pieces in _pieces(dims.layers, one.layout):
        layout = replace(one.layout, virtual_pipeline=pieces)
        seconds = _seconds(config, dims, machine, lengths, role, layout)
        if seconds < one.seconds:
            faster.append((seconds, pieces, layout))
    for _, _, layout in sorted(faster, key=lambda each: each[:2]):
        choice = _judged(config, dims, machine, lengths, role, layout, beside)
        if not choice.problem:
            return choice
    return one


def _seconds(
    config: Recipe, dims: ModelDims, machine: Machine, lengths: Lengths, role: str, layout: ParallelLayout
) -> float:
    trainer = replace(config.trainers[role], layout=layout)
    if isinstance(config, SFTConfig):
        return _update_seconds(config, dims, machine, lengths, role, trainer).value
    return sum(cell.value for cell in role_seconds(config, dims, machine, lengths, role, trainer))


def _beside(config: Recipe, dims: ModelDims, machine: Machine, role: str) -> list[Cell]:
    """What the other models and the engine hold."""
    found = _engine_cells(config, dims)
    for other, trainer in config.trainers.items():
        if other != role and not dims.layout_problems(trainer.layout):
            found += _cells(config, dims, machine, other, trainer)
    return found


def _cells(config: Recipe, dims: ModelDims, machine: Machine, role: str, trainer: TrainerConfig) -> list[Cell]:
    longest = limits(config, dims)
    row = longest.prompt if isinstance(config, SFTConfig) else longest.prompt + longest.response
    return trainer_cells(
        role,
        dims,
        trainer,
        head_of(role),
        config.model.dtype,
        reference=_keeps(config, role),
        on_gpu=machine.device.is_gpu,
        ring=config.model.layers != "local" and machine.device.rings(config.model.dtype),
        longest_row=int(row),
        rows=_samples_per_update(config),
    )


def _layouts(dims: ModelDims, ranks: int, per_node: int) -> Iterator[ParallelLayout]:
    """Ways to share a model over ``ranks``: tensor ranks in a node, any number of stages, powers of two else. Whether a
    model can be laid out so is not looked at.
    """
    sizes = [2**n for n in range(8)]
    for tensor in (n for n in sizes[:4] if n <= per_node and ranks % n == 0):
        for pipeline in (n for n in range(1, min(32, dims.layers) + 1) if ranks % (tensor * n) == 0):
            for context in (n for n in sizes[:4] if ranks % (tensor * pipeline * n) == 0):
                base = ParallelLayout(
                    tensor=tensor,
                    pipeline=pipeline,
                    context=context,
                    data=ranks // (tensor * pipeline * context),
                    sequence_parallel=tensor > 1,
                    **_ends(dims.layers, pipeline),
                )
                for expert, expert_tensor in _expert_shares(dims, base, sizes):
                    yield replace(base, expert=expert, expert_tensor=expert_tensor)


def _ends(layers: int, pipeline: int) -> dict[str, int]:
    """Layers of the first and the last stage where the others cannot all have as many: fewer than they, since these
    have the vocabulary besides.
    """
    if layers % pipeline == 0:
        return {}
    left = layers - (pipeline - 2) * -(-layers // pipeline)
    return {"first_stage_layers": left - left // 2, "last_stage_layers": left // 2} if left >= 2 else {}


def _pieces(layers: int, layout: ParallelLayout) -> list[int]:
    """Numbers above 1 that divide the layers of every stage."""
    if layout.pipeline == 1:
        return []
    common = math.gcd(*(len(layout.layers_of_stage(stage, layers)) for stage in range(layout.pipeline)))
    return [n for n in range(2, common + 1) if common % n == 0]


def _expert_shares(dims: ModelDims, layout: ParallelLayout, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    if dims.experts is None:
        yield 1, 1
        return
    stage = layout.tensor * layout.context * layout.data
    for expert_tensor in sorted({1, layout.tensor}):
        shares = (n for n in sizes if stage % (n * expert_tensor) == 0)
        # copies of experts on tensor ranks would drift apart
        yield from ((n, expert_tensor) for n in shares if n > 1 or expert_tensor == layout.tensor)


def _judged(
    config: Recipe,
    dims: ModelDims,
    machine: Machine,
    lengths: Lengths,
    role: str,
    layout: ParallelLayout,
    beside: Sequence[Cell],
) -> Choice:
    trainer = replace(config.trainers[role], layout=layout)
    case = trainer.fp8_case(config.model, dims, _gpu(machine))
    problems = dims.layout_problems(layout) or (fp8_problems(case) if case is not None else [])
    if problems := problems or list(fake_quantization_problems(dims, {role: trainer})):
        return Choice(layout=layout, bytes=0, seconds=0, problem=problems[0])
    if (samples := _samples_per_update(config)) < layout.data:
        problem = f"{layout.data} replicas need as many samples in a minibatch, got {samples}"
        return Choice(layout=layout, bytes=0, seconds=0, problem=problem)
    stages = unlike_stages(dims, layout)
    least = max(least_bytes(dims, trainer, head_of(role), stage, config.model.dtype) for stage in stages)
    states = Cell(name=f"{role}.states", value=least, unit="B", formula="weights, gradients and optimizer")
    if problem := _too_much(config, machine, beside, [states]):  # which spares laying out one by one what cannot be
        problem = f"weights, gradients and optimizer alone: {problem}"
        return Choice(layout=layout, bytes=least, seconds=0, problem=problem)
    cells = _cells(config, dims, machine, role, trainer)
    held = max(device_bytes(cells), start_bytes(cells))
    if problem := _too_much(config, machine, beside, cells):
        return Choice(layout=layout, bytes=held, seconds=0, problem=problem)
    if problem := _host_lacks(config, dims, machine, role, trainer):
        return Choice(layout=layout, bytes=held, seconds=0, problem=problem)
    seconds = _seconds(config, dims, machine, lengths, role, layout)
    return Choice(layout=layout, bytes=held, seconds=seconds, problem="")


def _too_much(config: Recipe, machine: Machine, beside: Sequence[Cell], mine: Sequence[Cell]) -> str:
    """Why ``mine`` does not fit where it lies, by the rule that :func:`plan` goes by; empty where it does. What does
    not fit without it either is not held against it.
    """
    without, room = together(config, beside), _room(config, machine)
    for (who, held), (_, others) in zip(together(config, [*beside, *mine]), without, strict=True):
        if others < held > room:
            return f"{who}: {_lack(held, room)}" if config.cluster.colocate else _lack(held, room)
    return ""


def _host_lacks(config: Recipe, dims: ModelDims, machine: Machine, role: str, trainer: TrainerConfig) -> str:
    """Why nodes have too little memory of their own for the role, beside what else lies there."""
    if any(dims.layout_problems(mine.layout) for other, mine in config.trainers.items() if other != role):
        return ""  # which is told by itself
    if isinstance(config, SFTConfig):
        laid: Recipe = replace(config, trainer=trainer)
    else:
        laid = replace(config, policy=trainer) if role == "policy" else replace(config, critic=trainer)
    return host_problem(host_uses(laid, dims, machine), machine, role)


def _lack(held: float, room: float) -> str:
    return f"needs {_up(held)} GB of a device's {room / 1e9:.1f} GB"


def _up(held: float) -> str:
    """GB, rounded up: what does not fit shall not look as if it did."""
    return f"{math.ceil(held / 1e8) / 10:.1f}"
