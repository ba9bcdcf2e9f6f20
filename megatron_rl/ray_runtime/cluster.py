"""Starting or joining Ray, placing workers, waiting for them, and leaving nothing behind."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import psutil
import ray
from ray._common.tls_utils import load_certs_from_env
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._raylet import AuthenticationMode, get_authentication_mode  # type: ignore[attr-defined] # compiled
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_rl.config.schema import ClusterConfig
from megatron_rl.ray_runtime.guardian import Guardian
from megatron_rl.ray_runtime.object_store import free_shared_memory, object_store_bytes, small_store
from megatron_rl.ray_runtime.room import missing_room
from megatron_rl.ray_runtime.sockets import long_folder, temporary_folder
from megatron_rl.ray_runtime.supervisor import Supervisor
from megatron_rl.ray_runtime.workers import Watch, WorkerGroup

_LOOPBACK = "127.0.0.1"
_KNOCK_DEADLINE_S = 10.0
_STOP_DEADLINE_S = 10.0
_LOOK_S = 10.0
_ANSWER_S = 30.0
_ANY_QUESTION = "/ray.rpc.NodeInfoGcsService/GetClusterId"
_LOG = logging.getLogger(__name__)


class ClusterProblem(RuntimeError):
    """The machine or the Ray cluster cannot run this; the message says what is asked, what is there, what to change."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """How many worker processes a role needs, and what may be shared with them once; ``devices``: GPUs of each, or
    shares of the CPU; ``restartable``: a death need not end the run, see :meth:`Cluster.restart`; ``spread``: on any
    node, spread over them, without a device or a share of its own; ``on_host``: computes on the host too, at the same
    time as all others that do.
    """

    name: str
    workers: int
    held_types: tuple[type[Any], ...] = ()
    devices: int = 1
    restartable: bool = False
    spread: bool = False
    on_host: bool = False


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which workers share a bundle of resources, that is a device.

    Attributes:
        bundles: what each reserves, by kind of resource.
        bundle_of: index of the bundle of each (role, rank).
        asked: what each worker of a role takes of its bundle.
    """

    bundles: tuple[Mapping[str, float], ...]
    bundle_of: Mapping[tuple[str, int], int]
    asked: Mapping[str, Mapping[str, float]]


def place(roles: Sequence[Role], device: Mapping[str, float], *, shared: bool) -> Placement:
    """A bundle for each worker; ``shared``: one for rank 0 of all roles, one for their ranks 1, and so on.

    Where workers share a bundle of one GPU, each asks for a fraction of it: Ray then shows all of them that GPU.

    Args:
        roles: who is to be placed.
        device: what one device reserves, by kind of resource.
        shared: whether ranks of different roles share.
    """
    workers = [(role, rank) for role in roles for rank in range(role.workers)]
    if not shared:
        asked = {role.name: {kind: size * role.devices for kind, size in device.items()} for role in roles}
        return Placement(
            bundles=tuple(asked[role.name] for role, _ in workers),
            bundle_of={(role.name, rank): index for index, (role, rank) in enumerate(workers)},
            asked=asked,
        )
    # rounded down to what Ray resolves, so that they never add up to more than there is
    share = {kind: math.floor(size / len(roles) * 1e4) / 1e4 for kind, size in device.items()}
    return Placement(
        bundles=(device,) * max(role.workers for role in roles),
        bundle_of={(role.name, rank): rank for role, rank in workers},
        asked={role.name: share for role in roles},
    )


def dealt(placement: Placement, node_of: Mapping[int, str]) -> Placement:
    """The same, with bundles of equal shape dealt out node by node: neighbours in rank exchange the most.

    Which node a bundle lies on is Ray's choice, and not in the order of the bundles. Whoever shared a bundle still
    does. Nodes with more bundles of a shape come first, so that a node which is not whole splits the last ranks.

    Args:
        placement: who shares a bundle, and of which shape.
        node_of: the node of each bundle.
    """
    shapes = [tuple(sorted(bundle.items())) for bundle in placement.bundles]
    nodes: dict[tuple[object, str], list[int]] = {}
    for index, shape in enumerate(shapes):
        nodes.setdefault((shape, node_of[index]), []).append(index)
    moved: dict[int, int] = {}
    for shape in dict.fromkeys(shapes):
        alike = [bundles for (of, _), bundles in nodes.items() if of == shape]
        order = [index for bundles in sorted(alike, key=len, reverse=True) for index in bundles]
        moved |= zip(sorted(order), order, strict=True)
    return replace(placement, bundle_of={who: moved[bundle] for who, bundle in placement.bundle_of.items()})


def neighbours(roles: Sequence[Role], placement: Placement, node_of: Mapping[int, str]) -> dict[tuple[str, int], int]:
    """Of each (role, rank) that computes on the host: how many of a node do, itself included.

    Args:
        roles: all of a run.
        placement: theirs.
        node_of: the node of each bundle.
    """
    on_host = {role.name for role in roles if role.on_host}
    node = {who: node_of[bundle] for who, bundle in placement.bundle_of.items() if who[0] in on_host}
    there = Counter(node.values())
    return {who: there[of] for who, of in node.items()}


def check_machine(workers: int, gpus: int, config: ClusterConfig) -> None:
    """Refuse, before anything starts, what this machine cannot hold. A joined cluster is asked once it is joined.

    Raises:
        ClusterProblem: too few GPUs, or too few CPUs where there is no GPU; a temporary folder too long for Ray; nobody
            answers at the cluster's address.
    """
    if config.address is not None:
        _knock(config.address)
        return
    cpus = len(os.sched_getaffinity(0))
    missing = missing_room(workers, gpus=gpus, cpus=cpus, cpus_per_worker=config.cpus_per_worker, where="this machine")
    for problem in (missing, long_folder(temporary_folder())):
        if problem is not None:
            raise ClusterProblem("; ".join(problem))


class Cluster:
    """A Ray cluster for the length of a ``with`` block; leaving it ends every worker, whatever happened inside."""

    def __init__(self, config: ClusterConfig, *, gpus: int, run_dir: Path, objects: int = 0) -> None:
        """Take note; nothing starts yet.

        Args:
            config: which cluster, and the deadlines.
            gpus: on this machine, by which workers get GPUs or CPUs.
            run_dir: gets ``logs/`` and ``scratch/``, what the workers' libraries cache.
            objects: most bytes that will be in Ray's object store at a time, see :func:`.step_bytes`.
        """
        self._config = config
        self._gpus = gpus
        self._objects = objects
        self.log_dir = run_dir.resolve() / "logs"
        self._scratch = run_dir.resolve() / "scratch"
        self._group: PlacementGroup | None = None
        self._guardian: Guardian | None = None
        self._groups: list[WorkerGroup] = []
        self._children: dict[str, psutil.Process] = {}
        self._processes: dict[str, dict[str, Any]] = {}
        self.watch = Watch()

    @property
    def local(self) -> bool:
        """Whether this process started Ray itself, on this machine alone."""
        return self._config.address is None

    def __enter__(self) -> Self:
        """Start Ray, or join a cluster.

        Raises:
            ClusterProblem: the cluster cannot be reached, or asks for no token, or Ray in this process uses none; or it
                has GPUs and this machine has not; or Ray fails.
        """
        terminate = signal.getsignal(signal.SIGTERM)
        if self.local:
            self._guardian = Guardian()
        try:
            self._join()
        except BaseException as error:
            self._dismiss()
            if isinstance(error, RayError):
                raise _problem_of(error) from error
            raise
        signal.signal(signal.SIGTERM, terminate)  # Ray's own handler aborts the process, and leaves the rest to luck
        return self

    def _join(self) -> None:
        common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
        if not self._config.allow_open_cluster and get_authentication_mode() != AuthenticationMode.TOKEN:
            raise ClusterProblem(
                "Ray must ask for a token, but it is set not to: either RAY_AUTH_MODE says so (unset it), or this "
                "process imported ray before megatron_rl.ray_runtime, when it fixed the mode (import it later, or set "
                "RAY_AUTH_MODE=token); cluster.allow_open_cluster=true does without"
            )
        if self.local:
            # in no file, since the cluster ends with this process; the same for the next one, since Ray reads it once
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray.init(
                address="local",  # else a cluster that somebody else has on this machine, or RAY_ADDRESS, is joined
                num_cpus=len(os.sched_getaffinity(0)),
                num_gpus=self._gpus,
                _node_ip_address=_LOOPBACK,
                object_store_memory=object_store_bytes(
                    self._objects, psutil.virtual_memory().available, free_shared_memory() or 0
                ),
                **common,
            )
        else:
            if not self._config.allow_open_cluster and _is_open(str(self._config.address)):
                raise ClusterProblem(
                    f"the Ray cluster at {self._config.address} asks for no token: anyone who reaches it can run code "
                    "on it; start it with RAY_AUTH_MODE=token, or set cluster.allow_open_cluster=true"
                )
            common.pop("include_dashboard")
            try:
                ray.init(address=self._config.address, **common)
            except (ConnectionError, RuntimeError, RayError) as error:
                raise ClusterProblem(f"cannot join the Ray cluster at {self._config.address}: {error}") from error
            there = ray.cluster_resources().get("GPU", 0)
            if there and not self._gpus and self._config.device != "cpu":
                raise ClusterProblem(
                    f"the Ray cluster at {self._config.address} has {there:g} GPU(s), but the driver sees none and "
                    "would lay everything out on CPUs: run it on a node that has one, or set cluster.device='cpu'"
                )

    def start(self, roles: Sequence[Role], environment: Mapping[str, str]) -> dict[str, WorkerGroup]:
        """Place every role's workers and start their processes, which wait for what to build.

        Who runs where is left in ``logs/processes.json``.

        Raises:
            ClusterProblem: the cluster has not the resources, at all or within the deadline.
        """
        device = {"GPU": 1.0, "CPU": 1.0} if self._gpus else {"CPU": self._config.cpus_per_worker}
        placement = place([role for role in roles if not role.spread], device, shared=self._config.colocate)
        node_of = self._place([dict(bundle) for bundle in placement.bundles])
        self._tell_small_store()
        placement = dealt(placement, node_of)
        sharing = neighbours(roles, placement, node_of) if self._gpus else {}
        environment = {**self._loopback(), **self._hidden(), **environment}
        groups = {}
        for role in roles:
            groups[role.name] = WorkerGroup(
                role.name,
                partial(self._spawn, role, placement, environment, sharing),
                role.workers,
                watch=self.watch,
                start_limit=self._config.start_limit,
                call_limit=self._config.call_limit,
                held_types=role.held_types,
                restartable=role.restartable,
            )
            self._groups.append(groups[role.name])
        for group in self._groups:
            self._note_births(group, range(len(group.names)))
        return groups

    def _loopback(self) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": _LOOPBACK} if self.local else {}

    def _hidden(self) -> dict[str, str]:
        """Why: Ray leaves the GPUs of a node in sight of a worker that asked for none."""
        return {} if self._gpus else {"CUDA_VISIBLE_DEVICES": ""}

    def _spawn(
        self,
        role: Role,
        placement: Placement,
        environment: Mapping[str, str],
        sharing: Mapping[tuple[str, int], int],
        rank: int,
    ) -> Any:
        """The supervisor of one rank."""
        log = self.log_dir / (f"{role.name}.log" if role.workers == 1 else f"{role.name}-{rank}.log")
        if role.spread:
            options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        else:
            asked = placement.asked[role.name]
            bundle = PlacementGroupSchedulingStrategy(self._group, placement.bundle_of[role.name, rank])
            options = {"num_cpus": asked["CPU"], "num_gpus": asked.get("GPU", 0.0), "scheduling_strategy": bundle}
        options |= {"max_concurrency": 8, "max_restarts": 0}
        worker = role.name if role.workers == 1 else f"{role.name} rank {rank}"
        start = ray.remote(Supervisor).options(**options).remote
        return start(worker, str(log), str(self._scratch), dict(environment), sharing.get((role.name, rank)))

    def restart(
        self,
        group: WorkerGroup,
        ranks: Sequence[int],
        factory: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
    ) -> None:
        """Start new processes in the places of dead ones, on the same devices, and build their objects, see
        :meth:`.WorkerGroup.build`.

        Raises:
            WorkerDied: one of them died, or another worker of the run; the others are there or on their way.
            WorkerFailed: one of them raised.
        """
        for rank in ranks:
            group.restart(rank)
        building = group.build(factory, arguments, ranks)  # before any is waited for, which may raise for one of them
        self._note_births(group, ranks)
        building.result()

    def _note_births(self, group: WorkerGroup, ranks: Sequence[int]) -> None:
        for rank, birth in zip(ranks, group.births(ranks), strict=True):
            name = group.names[rank]
            self._processes[name] = {"worker": name, **asdict(birth)}
            self._children.pop(name, None)
            if self.local:
                with suppress(psutil.Error):  # gone already
                    self._children[name] = psutil.Process(birth.pid)
        self.log_dir.mkdir(parents=True, exist_ok=True)  # workers made theirs, on their nodes
        (self.log_dir / "processes.json").write_text(json.dumps([*self._processes.values()], indent=2) + "\n")

    def _place(self, bundles: list[dict[str, float]]) -> Mapping[int, str]:
        """Reserve the bundles; the node that each lies on."""
        asked = {kind: sum(bundle[kind] for bundle in bundles) for kind in bundles[0]}
        started = time.monotonic()
        while any(asked[kind] > ray.cluster_resources().get(kind, 0.0) + 1e-6 for kind in asked):
            there = {kind: ray.cluster_resources().get(kind, 0.0) for kind in asked}
            if self.local:
                raise ClusterProblem(f"the layouts ask for {asked}, the Ray cluster has {there}; use smaller layouts")
            self._wait_for_nodes(started, f"nodes to join: asked for {asked}, the Ray cluster has {there}")
        while lacking := _lacking_node(bundles):
            if self.local:
                raise ClusterProblem(lacking)
            self._wait_for_nodes(started, f"a larger node to join: {lacking}")
        self._group = placement_group(bundles, strategy="PACK")
        ready = self._group.ready()
        while not ray.wait([ready], timeout=_LOOK_S)[0]:
            free = {kind: ray.available_resources().get(kind, 0.0) for kind in asked}
            self._waited(started, f"room: asked for {asked}, free on the cluster: {free}")
        node_of: Mapping[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        return node_of

    def _tell_small_store(self) -> None:
        stores = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
        if small := small_store(self._objects, int(min(stores)), joined=not self.local):
            _LOG.warning("; ".join(small))

    def _wait_for_nodes(self, started: float, what: str) -> None:
        waited = self._waited(started, what)
        time.sleep(min(_LOOK_S, max(0.1, self._config.start_deadline_s - waited)))

    def _waited(self, started: float, what: str) -> float:
        """Say what is waited for, and return for how long; the deadline ends it."""
        waited, limit = time.monotonic() - started, self._config.start_deadline_s
        if waited > limit:
            raise ClusterProblem(
                f"waited {waited:.0f} s for {what}; start more nodes, use smaller layouts, or raise "
                "cluster.start_deadline_s"
            )
        _LOG.warning("waiting for %s (%.0f s of at most %.0f s)", what, waited, limit)
        return waited

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every worker (politely where nothing went wrong), the placement group, and Ray if it was started here.

        Raises:
            ClusterProblem: in place of what Ray itself raised in the block.
        """
        try:
            self.watch.clear()
            stopping = [reference for group in self._groups for reference in group.stop()] if kind is None else []
            if stopping:
                ray.wait(stopping, num_returns=len(stopping), timeout=_STOP_DEADLINE_S)
            for group in self._groups:
                group.kill()
            if self._group is not None:
                remove_placement_group(self._group)
            if self.local:
                _end([*self._children.values()])
        finally:
            ray.shutdown()
            self._dismiss()
        if isinstance(error, RayError):
            raise _problem_of(error) from error

    def _dismiss(self) -> None:
        if self._guardian is not None:
            self._guardian.dismiss()


def _problem_of(error: RayError) -> ClusterProblem:
    """The same as an error of ours, which commands tell in a few lines; Ray's are known to this package alone."""
    text = f"Ray failed with {type(error).__name__}: {str(error).strip()}"
    if isinstance(error, ObjectStoreFullError | OutOfDiskError):
        text += (
            "\nboth Ray's object store and the disk that it goes on to were full: free some in Ray's temporary folder "
            "(RAY_TMPDIR names another), or give the store more memory; megatron-rl doctor says how much a step needs"
        )
    problem = ClusterProblem(text)
    for note in getattr(error, "__notes__", ()):
        problem.add_note(note)
    return problem


def _lacking_node(bundles: Sequence[Mapping[str, float]]) -> str:
    """Which bundle no node holds, so that Ray would wait for such a node without end; empty where each has one."""
    nodes: list[Mapping[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for bundle in {tuple(bundle.items()): bundle for bundle in bundles}.values():
        if not any(all(size <= node.get(kind, 0.0) + 1e-6 for kind, size in bundle.items()) for node in nodes):
            there = [{kind: node.get(kind, 0.0) for kind in bundle} for node in nodes]
            largest = max(there, key=lambda node: tuple(node.values()), default={})
            return (
                f"a worker, or an engine of engine.tensor workers, lies on one node and needs {dict(bundle)} there, "
                f"the largest node of the Ray cluster has {largest}; use a smaller engine.tensor or larger nodes"
                + ("" if "GPU" in bundle else ", or a smaller cluster.cpus_per_worker")
            )
    return ""


def _end(processes: Sequence[psutil.Process]) -> None:
    """Wait for them, and kill what is left; not whoever has the number of one that is gone: psutil knows them apart."""
    end = time.monotonic() + _STOP_DEADLINE_S
    while (left := [process for process in processes if process.is_running()]) and time.monotonic() < end:
        time.sleep(0.05)
    for process in left:
        with suppress(psutil.Error):
            process.kill()


def _knock(address: str) -> None:
    """Connect to ``host:port`` once: a wrong address is told at once, where Ray tries for a minute."""
    host, _, port = address.rpartition(":")
    if "/" in host or not port.isdigit():
        return  # another form, which is Ray's to read
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_DEADLINE_S).close()
    except (OSError, UnicodeError) as error:  # the second of a name that none can have
        raise ClusterProblem(
            f"nobody answers at cluster.address={address} ({error}): start the cluster's head there, or correct it"
        ) from error


def _is_open(address: str) -> bool:
    """Whether a client without a token gets an answer.

    One bare call: Ray itself would send the token of this process, and without one asks twenty times in as many
    seconds.

    Raises:
        ClusterProblem: nobody answers at ``address``, or not what Ray does.
    """
    try:
        where = canonicalize_bootstrap_address_or_die(address)
    except (ConnectionError, ValueError) as error:
        raise ClusterProblem(f"cannot find the Ray cluster at {address}: {error}") from error
    with _channel(where) as channel:
        try:
            channel.unary_unary(_ANY_QUESTION)(b"", timeout=_ANSWER_S, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise ClusterProblem(
                f"the Ray cluster at {address} did not say within {_ANSWER_S:.0f} s whether it asks for a token, "
                f"{error.code().name}: {error.details()}; look at the address and at its head, or set "
                "cluster.allow_open_cluster=true"
            ) from None
    return True


def _channel(where: str) -> Any:
    """As Ray opens one, without its token."""
    options = [("grpc.enable_http_proxy", 0)]
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(where, options)
    chain, key, roots = load_certs_from_env()
    return grpc.secure_channel(where, grpc.ssl_channel_credentials(roots, key, chain), options)
