"""A plan as text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rl.config.load import ConfigError
from megatron_rl.config.schema import RunConfig, SFTConfig
from megatron_rl.model_dims import ModelDims
from megatron_rl.planner.devices import DEVICES
from megatron_rl.planner.host import HostUse
from megatron_rl.planner.lengths import Lengths
from megatron_rl.planner.memory import Cell, device_bytes, start_bytes
from megatron_rl.planner.search import (
    Choice,
    Plan,
    Recipe,
    choices,
    legal_minibatches,
    limits,
    plan,
    roles_of,
    together,
)
from megatron_rl.planner.times import Machine

_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Report:
    """What ``megatron-rl plan`` prints, and whether the recipe can run; a number alone is never a failure."""

    text: str
    can_run: bool


def report(
    config: Recipe,
    dims: ModelDims,
    *,
    device: str | None,
    per_node: int | None,
    nodes: int | None,
    lengths: Lengths,
    explain: str | None,
    host_gib: float | None = None,
) -> Report:
    """A recipe's plan, or one number of it.

    Args:
        config: the recipe.
        dims: of its model.
        device: a key of :data:`DEVICES`; None: the recipe's own, or an H100.
        per_node: GPUs of a node; None: the recipe's own.
        nodes: as many as there are; None: as many as the recipe takes.
        lengths: mean tokens.
        explain: the name of a cell, to print its formula alone.
        host_gib: of a node's own memory; None: as much as the table of devices says.

    Raises:
        ConfigError: there is no such device or cell, or a number is out of its range.
    """
    device = device or config.cluster.planned_device
    per_node = config.cluster.gpus_per_node if per_node is None else per_node
    if problems := list(_option_problems(config, dims, device, per_node, nodes, lengths, host_gib)):
        raise ConfigError(problems)
    host_memory = None if host_gib is None else host_gib * 2**30
    machine = Machine(device=DEVICES[device], per_node=per_node, host_memory=host_memory)
    found = plan(config, dims, machine, lengths)
    if explain is not None:
        return Report(text=_explained(found, explain), can_run=True)
    needed = -(-found.devices // per_node)
    lines = [f"{found.devices} x {device} ({needed} nodes of {per_node}); {machine.device.source}"]
    if too_few := nodes is not None and nodes < needed:
        lines.append(
            f"DOES NOT FIT: the recipe's layouts take {found.devices} devices, {nodes} nodes have {nodes * per_node}"
        )
    problems = [*found.problems, *([found.late] if found.late else ())]
    lines += [f"CANNOT RUN: {problem}" for problem in problems]
    lines += _may_be_late(found, config)
    lines += _memory(found, roles_of(config))
    if found.memory and isinstance(config, RunConfig) and config.cluster.colocate:
        lines += ["", f"{'at once on a shared device':60}{'GB':>8}"]
        lines += [f"  {who:58}{held / 1e9:8.2f}" for who, held in together(config, found.memory)]
    if found.host is not None:
        lines += _host(found.host, machine)
    if found.times:
        lines += ["", f"{'phase':24}{'seconds':>12}", *(f"{c.name:24}{c.value:12.2f}" for c in found.times)]
        hours = found.step_seconds * config.steps / 3600
        spent = f"{config.steps} steps: {hours:.1f} h, {hours * found.devices:,.0f} device-hours"
        lines.append(f"{spent}, without {_left_out(config)}")
        lines.append(_longest_call(found, config))
    lines.append(_legal_sizes(config))
    spare = 0 if nodes is None else max(0, nodes * per_node - found.devices)
    for role, trainer in config.trainers.items():
        ranks = trainer.layout.world_size
        lines += ["", f"{role} on {ranks} devices (recipe: {trainer.layout})"]
        lines += _ranked(choices(config, dims, machine, lengths, role, ranks))
    if spare:
        wider = "a role's layout.data" if isinstance(config, SFTConfig) else "engine.count or a role's layout.data"
        lines.append(f"{spare} devices are left over: give them to {wider}")
    return Report(text="\n".join(lines) + "\n", can_run=not (problems or too_few))


def _longest_call(found: Plan, config: Recipe) -> str:
    call, limit = found.calls[0], config.cluster.call_deadline_s
    longer = f" ({call.longest:,.0f} s with the longest responses)" if call.longest > call.seconds else ""
    return f"longest call: {call.name}, {call.seconds:,.0f} s{longer}; its limit: cluster.call_deadline_s={limit:g}"


def _may_be_late(found: Plan, config: Recipe) -> Iterator[str]:
    """A limit that is less than twice what a call may take: times are rough, and responses grow."""
    if not found.calls or found.late:
        return
    call, limit = found.calls[0], config.cluster.call_deadline_s
    if limit < 2 * call.longest:
        yield (
            f"MAY BE LATE: cluster.call_deadline_s: should be twice the longest call or more, {call.name} of "
            f"{call.longest:,.0f} s with the longest responses, got {limit:g}: raise it to {call.roomy_limit}"
        )


def _legal_sizes(config: Recipe) -> str:
    if isinstance(config, SFTConfig):
        return f"legal samples_per_step: {config.trainer.layout.data} or more, one for each replica"
    return f"legal ppo.minibatch_samples: {', '.join(map(str, legal_minibatches(config)))}"


def _option_problems(
    config: Recipe,
    dims: ModelDims,
    device: str,
    per_node: int,
    nodes: int | None,
    lengths: Lengths,
    host_gib: float | None,
) -> Iterator[str]:
    if device not in DEVICES:
        yield f"--device must be one of {', '.join(DEVICES)}, got {device}"
    if per_node < 1:
        yield f"--gpus-per-node must be at least 1, got {per_node}"
    if nodes is not None and nodes < 1:
        yield f"--nodes must be at least 1, got {nodes}"
    if host_gib is not None and host_gib <= 0:
        yield f"--host-gib must be above 0, got {host_gib:g}"
    if host_gib is not None and device == "cpu":
        yield "--host-gib is of a node beside its GPUs; on cpu host and device are the same memory: remove it"
    longest, keys = limits(config, dims), ("data.max_prompt_tokens", "rollout.max_response_tokens")
    if isinstance(config, SFTConfig):
        keys = ("the tokens of a micro-batch and of the model's positions",) * 2
    for name, mean, key, limit in (
        ("prompt", lengths.prompt, keys[0], longest.prompt),
        ("response", lengths.response, keys[1], longest.response),
    ):
        if not 0 < mean <= limit:
            yield f"--{name}-tokens must be above 0 and at most {key}={limit}, got {mean:g}"


def _explained(found: Plan, name: str) -> str:
    cells = {cell.name: cell for cell in (*found.memory, *(found.host.cells if found.host else ()), *found.times)}
    if name not in cells:
        reason = "; ".join(found.problems)
        raise ConfigError([f"--explain must name one of {', '.join(cells) or 'no cell: ' + reason}, got {name}"])
    return f"{name} = {_amount(cells[name])} = {cells[name].formula}\n"


def _amount(cell: Cell) -> str:
    return f"{cell.value / 1e9:.3f} GB" if cell.unit == "B" else f"{cell.value:.3f} s"


def _left_out(config: Recipe) -> str:
    """What takes time and stands in no phase of the plan."""
    if isinstance(config, SFTConfig):
        return "starting, saves"
    parts = ["starting", "evaluations", "saves"]
    if config.cluster.colocate:
        parts.append("moves to the host and back")
    if config.rollout.sampling_rounds > 1:
        parts.append(f"rollout rounds 2 to {config.rollout.sampling_rounds} of dynamic sampling")
    return ", ".join(parts)


def _memory(found: Plan, roles: list[str]) -> Iterator[str]:
    for role in roles:
        cells = [c for c in found.memory if c.name.startswith(f"{role}.") and c.value]
        if not cells:
            continue
        yield ""
        yield f"{role + ', fullest device':32}{'GB':>8}"
        parts = (c for c in cells if not c.name.endswith(".start"))
        yield from (f"  {c.name.split('.')[1]:30}{c.value / 1e9:8.2f}" for c in parts)
        yield f"  {'all on the device':30}{device_bytes(cells) / 1e9:8.2f}"
        if start := start_bytes(cells):
            yield f"  {'at the start':30}{start / 1e9:8.2f}"


def _host(use: HostUse, machine: Machine) -> Iterator[str]:
    yield ""
    yield f"{'host, fullest node':32}{'GB':>8}  of {machine.host_room / 1e9:,.0f} GB that may be used"
    yield from (f"  {c.name.removeprefix('host.'):30}{c.value / 1e9:8.2f}" for c in use.cells if c.value)
    yield from (f"  {'all ' + moment:30}{held / 1e9:8.2f}" for moment, held in use.peaks)


def _ranked(found: list[Choice]) -> Iterator[str]:
    """Layouts that can be, the fastest first and of each number of tensor ranks and stages one; the smallest; then why
    others cannot.
    """
    fits = [choice for choice in found if not choice.problem]
    fastest = {(choice.layout.tensor, choice.layout.pipeline): choice for choice in reversed(fits)}
    shown = sorted(fastest.values(), key=lambda choice: choice.seconds)[:_SHOWN]
    if fits and (smallest := min(fits, key=lambda choice: choice.bytes)) not in shown:
        shown.append(smallest)
    for choice in shown:
        yield f"  {choice.layout!s:36}{choice.seconds:10.2f} s{choice.bytes / 1e9:8.1f} GB"
    if len(fits) > len(shown):
        yield f"  {len(fits) - len(shown)} more can be"
    if not fits and any(choice.bytes for choice in found):
        yield "  none fits: more devices, recompute, optimizer_on_host or a smaller tokens_per_microbatch may help"
    refused: dict[str, list[Choice]] = {}
    for choice in found:
        if choice.problem:
            refused.setdefault(_NUMBERS.sub("", choice.problem), []).append(choice)
    for alike in sorted(refused.values(), key=len, reverse=True):
        nearest = min(alike, key=lambda choice: choice.bytes)
        others = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        yield f"  no: {nearest.layout}{others}: {nearest.problem}"


_NUMBERS = re.compile(r"\[[^]]*\]|[\d.,]+")
"""What layouts that cannot be for the same reason differ in."""
