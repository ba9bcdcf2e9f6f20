"""Look at this machine and, where there is a cluster, at each of its nodes, and judge what is found."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from tokenizers import Tokenizer

from megatron_rl.config.load import ConfigError
from megatron_rl.config.schema import ClusterConfig, ModelConfig, RunConfig, SFTConfig
from megatron_rl.doctor.checks import (
    Needs,
    check_clock,
    check_configuration,
    check_devices,
    check_driver_node,
    check_joined_store,
    check_node,
    check_own_ray,
    check_port,
    check_same,
    fitting_set,
    needs_of,
)
from megatron_rl.doctor.facts import Listener, NodeFacts, look, look_at_port
from megatron_rl.doctor.findings import Finding, Report, Severity, merged
from megatron_rl.experience.prompts import PromptSet, load_prompts, load_tokenizer
from megatron_rl.experience.references import check_answers
from megatron_rl.model_dims import ModelDims, read_model_dims

_DASHBOARD = ("127.0.0.1", 8265, "--dashboard-port")
"""As examples/launch/ray_head.sh starts it."""
_OTHER_FILE = "correct the file, or name another"
_OTHER_ANSWERS = "correct the file, or choose another reward.rule"


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """What came of looking at a cluster; ``joins``: whether this machine needs its token; ``reached``: whether other
    nodes must find this one by its name; ``resources``: of all nodes together, None where not all are known.
    """

    findings: Sequence[Finding] = ()
    hosts: Sequence[str] = ()
    not_checked: Sequence[str] = ()
    joins: bool = False
    reached: bool = False
    resources: Mapping[str, float] | None = None


def examine(config: RunConfig | SFTConfig | None, files: Sequence[Path], cluster: ClusterConfig) -> Report:
    """Everything that can be told before a run; starts nothing but a worker that tries some reference answers.

    Args:
        config: of the run, its types checked alone (:func:`megatron_rl.config.load.parse`); None: no recipe is given.
        files: that the configuration was read from.
        cluster: where its address is set, the cluster that runs there is asked, or it is seen whether one could be
            started.

    Raises:
        ConfigError: the address of the cluster has not the form HOST:PORT.
    """
    dims = None if config is None else _dims(config)
    problems = [] if config is None else list(config.problems())
    needs = needs_of(config, dims)
    run_dir = None if config is None else config.run_dir.resolve()
    question = partial(look, run_dir, _shared_files(config, files), _weight_files(config))
    here = question()
    survey = _survey(cluster, here, question, needs)
    used, unusable, without_torch = _used(config, here)
    not_checked = [*survey.not_checked]
    if config is None:
        not_checked.append("batches, layouts, devices, model, data, disk: no FILE.toml is given")
    else:
        if without_torch is None:
            unusable += _devices(config, cluster, survey)
        else:
            not_checked.append(f"devices: need torch, {without_torch}")
        if dims is None:
            not_checked.append(f"weights, data, disk: the model's sizes cannot be read from {config.model.path}")
        else:
            unread, left_out = _contents(config, dims, without_torch)
            unusable += unread
            not_checked += left_out
        if cluster.address is not None and survey.resources is None:
            not_checked.append("devices: not all nodes of a cluster are known")
    return Report(
        findings=merged(
            [
                *check_configuration(problems),
                *check_node(here, needs, joins=survey.joins, reached=survey.reached),
                *(check_own_ray(here, needs) if cluster.address is None else ()),
                *survey.findings,
                *unusable,
            ]
        ),
        used=tuple(used),
        not_checked=tuple(not_checked),
        hosts=tuple(dict.fromkeys([here.host, *survey.hosts])),
        misconfigured=bool(problems),
    )


def _dims(config: RunConfig | SFTConfig) -> ModelDims | None:
    """None: what is wrong with the model is among the configuration's own problems."""
    try:
        return read_model_dims(config.model.path)
    except (OSError, ValueError):
        return None


def _shared_files(config: RunConfig | SFTConfig | None, files: Sequence[Path]) -> tuple[Path, ...]:
    """What every node must have alike: the configuration, the model but for its weights, a reward rule of the user's
    own.
    """
    shared = [*files]
    if config is not None:
        names = ("config.json", "tokenizer.json", "model.safetensors.index.json")
        shared += [config.model.path / name for name in names]
    if isinstance(config, RunConfig):
        rule, of_file, _ = config.reward.rule.rpartition(":")
        shared += [Path(rule)] if of_file else []
    return tuple(file.resolve() for file in shared)


def _weight_files(config: RunConfig | SFTConfig | None) -> tuple[Path, ...]:
    return () if config is None else tuple(sorted(file.resolve() for file in config.model.path.glob("*.safetensors")))


def _devices(config: RunConfig | SFTConfig, cluster: ClusterConfig, survey: _Survey) -> list[Finding]:
    """Whether there are as many as the layouts take, on this machine or on the cluster that was asked."""
    from megatron_rl.device import gpu_count  # loads torch; as a run counts: nvidia-smi tells of hidden ones

    here = gpu_count()
    if cluster.address is None:
        cpus = len(os.sched_getaffinity(0))
        return [*check_devices(config, gpus=here, cpus=cpus, where="this machine")]
    if survey.resources is None:
        return []
    gpus, total = (survey.resources.get(kind, 0.0) for kind in ("GPU", "CPU"))
    if not here and config.cluster.device == "cpu":
        gpus = 0.0
    return [*check_devices(config, gpus=gpus, cpus=total, where="the cluster")]


def _contents(
    config: RunConfig | SFTConfig, dims: ModelDims, without_torch: str | None
) -> tuple[list[Finding], list[str]]:
    """What is wrong with the files that a run reads on this machine at its start, read as it does, and what was left
    out, for one because there is no torch (see :func:`_used`).
    """
    folder, found, left_out = config.model.path, list[Finding](), list[str]()
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        found.append(_unusable("tokenizer", str(error), "copy the model's folder anew"))
        left_out.append("data: there is no tokenizer for it")
    else:
        if isinstance(config, RunConfig):
            found += _prompts(config, tokenizer)
            if config.reward.rule_may_be_elsewhere:
                left_out.append("answers: reward.rule is a file that the nodes of reward.pools alone may have")
        elif without_torch is None:
            found += _pairs(config, tokenizer, dims)
        else:
            left_out.append(f"data: needs torch, {without_torch}")
    if without_torch is not None:
        return found, [*left_out, f"weights: need torch, {without_torch}"]
    from megatron_rl.mcore.torch_dist import METADATA  # loads torch, as the next
    from megatron_rl.weights.safetensors_io import HfFolder

    if (folder / METADATA).is_file():
        return found, [*left_out, "weights: they are in megatron-core's own format"]
    try:
        HfFolder(folder).infos()
    except (OSError, ValueError) as error:
        found.append(_unusable("weights", str(error), "copy the model's folder anew, or correct model.path"))
    return found, left_out


def _prompts(config: RunConfig, tokenizer: Tokenizer) -> Iterator[Finding]:
    sets = dict[str, PromptSet]()
    for name, file in (("train", config.data.train), ("heldout", config.data.heldout)):
        if not file.is_file():
            continue  # among the configuration's own problems
        try:
            sets[name] = load_prompts(file, tokenizer, config.data)
        except (OSError, ValueError) as error:
            yield _unusable("data", str(error), _OTHER_FILE)
    try:
        told = check_answers(config, sets) if sets else []
    except (RuntimeError, ValueError) as error:
        yield _unusable("answers", str(error), _OTHER_ANSWERS)
    else:
        for found in told:
            yield Finding(severity=Severity.WARNING, what="answers", found=found, do=_OTHER_ANSWERS)


def _pairs(config: SFTConfig, tokenizer: Tokenizer, dims: ModelDims) -> Iterator[Finding]:
    from megatron_rl.experience.supervised import load_pairs  # loads torch

    if not config.data.is_file():
        return  # as above
    try:
        load_pairs(config.data, tokenizer, dims.eos_ids[0], dims.max_positions)
    except (OSError, ValueError) as error:
        yield _unusable("data", str(error), _OTHER_FILE)


def _survey(cluster: ClusterConfig, here: NodeFacts, question: Callable[[], NodeFacts], needs: Needs) -> _Survey:
    if cluster.address is None:
        return _Survey(not_checked=["ports, host names, clocks, other nodes: no --cluster is given"])
    if cluster.address == "auto":
        return _ask(cluster, here, question, needs)
    address, _, number = cluster.address.rpartition(":")
    if not address or not number.isdecimal() or "/" in address:
        raise ConfigError([f"cluster.address: must be HOST:PORT (or auto, on a node of it), got {cluster.address!r}"])
    port = look_at_port(address, int(number), "--port")
    if port.listener is Listener.GRPC:
        return _ask(cluster, here, question, needs)
    ports = [port, look_at_port(*_DASHBOARD)] if port.ours else [port]
    return _Survey(
        findings=[finding for each in ports for finding in check_port(each)],
        not_checked=[f"clocks, other nodes: no cluster runs at {cluster.address}"],
        reached=port.ours and not all(ip_address(each).is_loopback for each in port.leads_to),
    )


def _ask(cluster: ClusterConfig, here: NodeFacts, question: Callable[[], NodeFacts], needs: Needs) -> _Survey:
    joins = not cluster.allow_open_cluster
    if joins and here.token.path is not None and here.token.mode is None:
        return _Survey(not_checked=["clocks, other nodes: the cluster is not asked without a token"], joins=True)
    from megatron_rl.ray_runtime.cluster import ClusterProblem  # loads Ray
    from megatron_rl.ray_runtime.survey import NoAnswer, ask_nodes

    try:
        answers = ask_nodes(cluster, question)
    except ClusterProblem as problem:
        do = "see examples/launch: head, workers and this command need the same Python, Ray and token"
        found = Finding(severity=Severity.ERROR, what="cluster", found=str(problem), do=do)
        return _Survey(findings=[found], not_checked=["clocks, other nodes: the cluster could not be asked"])
    nodes = [answer.value for answer in answers if not isinstance(answer, NoAnswer)]
    findings = [*check_driver_node(here, nodes, needs)]
    for answer in answers:
        if isinstance(answer, NoAnswer):
            findings.append(_silent(answer.host, answer.reason))
            continue
        findings += check_node(answer.value, needs, joins=joins, reached=len(answers) > 1)
        findings += check_same(here, answer.value)
        findings += check_joined_store(answer.host, answer.resources.get("object_store_memory", 0.0), needs)
        findings += check_clock(answer.host, answer.asked, answer.clock, answer.answered)
    given = [answer.resources for answer in answers if not isinstance(answer, NoAnswer)]
    together = {kind: sum(each.get(kind, 0.0) for each in given) for kind in ("GPU", "CPU")}
    return _Survey(
        findings=findings,
        hosts=[answer.host for answer in answers],
        resources=together if len(given) == len(answers) else None,
    )


def _silent(host: str, reason: str) -> Finding:
    return Finding(
        severity=Severity.ERROR,
        what="node",
        found=f"does not say what it has: {reason}",
        do="install this package there at the same place for the same Python, and see that it is not overloaded",
        hosts=(host,),
    )


def _used(config: RunConfig | SFTConfig | None, here: NodeFacts) -> tuple[list[str], list[Finding], str | None]:
    """What each part of training is done with on this machine, why it cannot be, and why there is no torch; None where
    it has been imported.
    """
    releases = fitting_set(here)
    told = ", ".join(f"{name} {release}" for name, release in releases.packages.items())
    rows = [f"nearest set     python {releases.python}, {told} ({releases.state.value})"]
    if find_spec("torch") is None:
        rows.append("torch is not installed: plan, show-config and doctor do without, training does not")
        return rows, [], "which is not installed"
    if here.engine_fault is not None:
        rows.append("Transformer Engine cannot be imported, and so training cannot start")
        return rows, [], "which is not tried while Transformer Engine cannot be imported"
    try:
        importlib.import_module("torch")
    except (ImportError, OSError) as error:
        found = _unusable("torch", f"is installed and cannot be imported: {error}", "install it anew")
        return rows, [found], "which cannot be imported"
    from megatron_rl.mcore.capabilities import capabilities
    from megatron_rl.mcore.logprobs import choose_kernels

    layers, dtype = ("auto", ModelConfig.dtype) if config is None else (config.model.layers, config.model.dtype)
    try:
        rows += [f"{row.part:15} {row.used} ({row.why})" for row in capabilities(layers, dtype)]
    except ValueError as error:
        return rows, [_unusable("layers", str(error), "change model.layers, or what it lacks")], None
    kernels = choose_kernels("auto" if config is None else next(iter(config.trainers.values())).logprob_kernel)
    return [*rows, f"{'log-probs':15} {kernels.name}"], [], None


def _unusable(what: str, found: str, do: str) -> Finding:
    return Finding(severity=Severity.ERROR, what=what, found=found, do=do)
