"""A plan of a recipe: what it needs, how long a step takes, and which other layouts the same devices allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_rl.config.precision import Gpu, fp8_problems
from megatron_rl.config.schema import RunConfig, TrainerConfig, fake_quantization_problems
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims
from megatron_rl.planner.memory import Cell, device_bytes, engine_cells, trainer_cells
from megatron_rl.planner.states import DTYPE_BYTES, total_parameters
from megatron_rl.planner.times import Machine, Work, pass_time, push_time, rollout_time, update_time
from megatron_rl.weights.rules import Head


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean tokens of a prompt and of a response."""

    prompt: float
    response: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One layout of one model: bytes on the fullest device, seconds of its part of a step, and why it cannot be."""

    layout: ParallelLayout
    bytes: float
    seconds: float
    problem: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe needs and how long a step takes.

    Attributes:
        memory: what the fullest device of each role holds.
        times: seconds of each phase; those that run side by side stand in ``step`` once.
        problems: why ``train`` refuses the recipe, or what does not fit; empty when it can run.
        devices: that it takes.
    """

    memory: tuple[Cell, ...]
    times: tuple[Cell, ...]
    problems: tuple[str, ...]
    devices: int

    @property
    def step_seconds(self) -> float:
        """Of one step."""
        return next(cell.value for cell in self.times if cell.name == "time.step")


def head_of(role: str) -> Head:
    """What sits on top of a role's model."""
    return Head.VALUE if role == "critic" else Head.TOKEN


def plan(config: RunConfig, dims: ModelDims, machine: Machine, lengths: Lengths) -> Plan:
    """Plan the recipe as it stands; one that ``train`` would refuse has problems and nothing else.

    Files may be missing, and the CUDA version is not known here.
    """
    dtype, engine = config.model.dtype, config.engine
    problems = list(config.contradictions(dims, _gpu(machine)))
    if not machine.device.is_gpu:
        problems += engine.cpu_problems()
    if problems:
        return Plan(memory=(), times=(), problems=tuple(problems), devices=config.devices)
    memory = list(engine_cells(dims, engine, dtype))
    for role, trainer in config.trainers.items():
        memory += _cells(config, dims, machine, role, trainer)
    room = machine.device.memory - machine.device.reserved
    for who, held in together(config, memory):
        if held > room:
            problems.append(f"{who}: needs {held / 1e9:.1f} GB of a device's {room / 1e9:.1f} GB")
    return Plan(
        memory=tuple(memory),
        times=tuple(_times(config, dims, machine, lengths)),
        problems=tuple(problems),
        devices=config.devices,
    )


def together(config: RunConfig, memory: Sequence[Cell]) -> Iterator[tuple[str, float]]:
    """Who is on a device at the same time, and their bytes: each role alone, or with ``cluster.colocate`` policy and
    critic, and in turn with them the engine; at the parity gate all weights lie beside it.
    """

    def held(*names: str) -> float:
        return device_bytes(cell for cell in memory if cell.name.startswith(names))

    if not config.cluster.colocate:
        yield from ((role, held(f"{role}.")) for role in [*config.trainers, "engine"])
        return
    yield " with ".join(config.trainers), held(*(f"{role}." for role in config.trainers))
    yield "engine", held("engine.")
    if config.parity.enabled:
        weights = [f"{role}.weights" for role in config.trainers]
        yield f"parity.enabled: engine with {', '.join(weights)}", held("engine.", *weights)
    else:
        yield "push: policy.weights with engine.weights", held("policy.weights", "engine.weights")


def legal_minibatches(config: RunConfig) -> list[int]:
    """Sizes of an optimizer step that divide the samples of a step and give each replica at least one."""
    least = max(1, *(trainer.layout.data for trainer in config.trainers.values()))
    samples = config.samples_per_step
    return [n for n in range(least, samples + 1) if samples % n == 0]


def _gpu(machine: Machine) -> Gpu:
    return Gpu(capability=machine.device.capability, cuda=None)


def _keeps(config: RunConfig, role: str) -> bool:
    return role == "policy" and config.ppo.kl_coef > 0


def _times(config: RunConfig, dims: ModelDims, machine: Machine, lengths: Lengths) -> Iterator[Cell]:
    dtype, engine = config.model.dtype, config.engine
    rollout = rollout_time(
        dims,
        engine,
        machine,
        dtype,
        samples=config.samples_per_step,
        prompt_tokens=lengths.prompt,
        response_tokens=lengths.response,
        longest=config.rollout.max_response_tokens,
    )
    yield Cell(
        name="time.rollout",
        value=rollout.total,
        unit="s",
        formula=f"prefill {rollout.prefill:.2f} s + decode {rollout.decode:.2f} s of {config.samples_per_step} samples "
        f"of {lengths.prompt:g} + {lengths.response:g} tokens on {engine.count} engines",
    )
    scored, updated = [], []
    for role, trainer in config.trainers.items():
        passes, update = role_seconds(config, dims, machine, lengths, role, trainer)
        scored.append(passes.value)
        updated.append(update.value)
        yield passes
        yield update
    push = push_time(dims, config.policy, engine, machine, dtype)
    yield Cell(
        name="time.push", value=push, unit="s", formula="all weights to rank 0, then to the engines in one stream"
    )
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
    dtype = config.model.dtype
    row = lengths.prompt + lengths.response
    whole = Work(rows=config.samples_per_step, row_tokens=row)
    part = Work(rows=config.ppo.minibatch_samples, row_tokens=row)
    forward = pass_time(dims, trainer, machine, whole, dtype, backward=False)
    times = 2 if _keeps(config, role) else 1
    update = update_time(dims, trainer, head_of(role), machine, part, dtype)
    count = config.updates_per_step
    return (
        Cell(
            name=f"time.{role}.scoring",
            value=times * forward.total,
            unit="s",
            formula=f"{times} passes x (arithmetic {forward.arithmetic:.2f} + exchanges {forward.tensor:.2f} + bubble "
            f"{forward.bubble:.2f} s) over {whole.tokens:,.0f} tokens",
        ),
        Cell(
            name=f"time.{role}.updates",
            value=count * update.total,
            unit="s",
            formula=f"{count} updates x (arithmetic {update.arithmetic:.3f} + exchanges {update.tensor:.3f} + bubble "
            f"{update.bubble:.3f} + replicas {update.replicas:.3f} + optimizer {update.optimizer:.3f} s) of "
            f"{part.tokens:,.0f} tokens",
        ),
    )


def choices(
    config: RunConfig, dims: ModelDims, machine: Machine, lengths: Lengths, role: str, ranks: int
) -> list[Choice]:
    """Every layout of a role on ``ranks`` devices: those that can be, fastest first, then those that cannot."""
    beside = _beside(config, dims, machine, role)
    found = [
        _judged(config, dims, machine, lengths, role, layout, beside)
        for layout in _layouts(dims, ranks, machine.per_node)
    ]
    return sorted(found, key=lambda c: (bool(c.problem), c.seconds, c.layout.pipeline, c.layout.tensor))


def _beside(config: RunConfig, dims: ModelDims, machine: Machine, role: str) -> float:
    """Bytes of the models that share the role's devices while it trains."""
    if not config.cluster.colocate:
        return 0.0
    return sum(
        device_bytes(_cells(config, dims, machine, other, trainer))
        for other, trainer in config.trainers.items()
        if other != role and not dims.layout_problems(trainer.layout)
    )


def _cells(config: RunConfig, dims: ModelDims, machine: Machine, role: str, trainer: TrainerConfig) -> list[Cell]:
    return trainer_cells(
        role,
        dims,
        trainer,
        head_of(role),
        config.model.dtype,
        reference=_keeps(config, role),
        on_gpu=machine.device.is_gpu,
    )


def _layouts(dims: ModelDims, ranks: int, per_node: int) -> Iterator[ParallelLayout]:
    for tensor in (n for n in (1, 2, 4, 8) if n <= per_node and ranks % n == 0):
        for pipeline in (n for n in range(1, min(32, dims.layers) + 1) if ranks % (tensor * n) == 0):
            data = ranks // (tensor * pipeline)
            shares = [1] if dims.experts is None else [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= tensor * data]
            for expert in shares:
                yield ParallelLayout(
                    tensor=tensor,
                    pipeline=pipeline,
                    data=data,
                    expert=expert,
                    expert_tensor=tensor if dims.experts is not None and expert == 1 else 1,
                    sequence_parallel=tensor > 1,
                )


def _judged(
    config: RunConfig,
    dims: ModelDims,
    machine: Machine,
    lengths: Lengths,
    role: str,
    layout: ParallelLayout,
    beside: float,
) -> Choice:
    trainer = replace(config.trainers[role], layout=layout)
    case = trainer.fp8_case(config.model, dims, _gpu(machine))
    problems = dims.layout_problems(layout) or (fp8_problems(case) if case is not None else [])
    if problems := problems or list(fake_quantization_problems(dims, {role: trainer})):
        return Choice(layout=layout, bytes=0, seconds=0, problem=problems[0])
    if config.ppo.minibatch_samples < layout.data:
        problem = f"{layout.data} replicas need as many samples in a minibatch, got {config.ppo.minibatch_samples}"
        return Choice(layout=layout, bytes=0, seconds=0, problem=problem)
    room = machine.device.memory - machine.device.reserved - beside
    there = f"the {room / 1e9:.1f} GB that the other model leaves" if beside else f"a device's {room / 1e9:.1f} GB"
    least = _least_bytes(dims, layout, head_of(role), config.model.dtype)
    if least > room:
        problem = f"needs at least {least / 1e9:.0f} GB of {there}"
        return Choice(layout=layout, bytes=least, seconds=0, problem=problem)
    held = device_bytes(_cells(config, dims, machine, role, trainer))
    seconds = sum(c.value for c in role_seconds(config, dims, machine, lengths, role, trainer))
    problem = f"needs {held / 1e9:.1f} GB of {there}" if held > room else ""
    return Choice(layout=layout, bytes=held, seconds=seconds, problem=problem)


def _least_bytes(dims: ModelDims, layout: ParallelLayout, head: Head, dtype: str) -> float:
    """Weights and gradients if all were shared as far as the experts are: which spares counting them one by one."""
    most = max(layout.tensor, layout.expert * layout.expert_tensor) * layout.pipeline
    return total_parameters(dims, head) * (4 + DTYPE_BYTES[dtype]) / most
