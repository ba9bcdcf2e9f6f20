"""What is found on a node, without an opinion. :func:`look` also runs on the other nodes, so it loads little."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

import psutil

import megatron_rl
from megatron_rl.ray_runtime.object_store import free_shared_memory
from megatron_rl.ray_runtime.sockets import temporary_folder

_IMPORT_DEADLINE_S = 120
_ANSWER_DEADLINE_S = 5.0
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS_FRAME = 4


@dataclass(frozen=True, kw_only=True)
class Apex:
    """A package that ``import apex`` would find.

    Attributes:
        place: where it lies.
        summary: of the installed distribution; None where it is only a folder.
        has_optimizers: whether there is an ``apex.optimizers``, as NVIDIA's has.
    """

    place: str
    summary: str | None
    has_optimizers: bool


@dataclass(frozen=True, kw_only=True)
class Token:
    """The secret with which Ray's processes know each other.

    Attributes:
        path: of its file; None where it stands in the environment.
        mode: permission bits of the file; None where there is no file.
    """

    path: str | None
    mode: int | None


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """One node.

    Attributes:
        host: its name.
        python: release, such as ``3.11.7``.
        packages: release by normalised name of every installed distribution.
        code: SHA-256 of this package's Python files.
        files: SHA-256 by path of files that all nodes should have alike; None for a file that is not there.
        sizes: bytes by path of files that all nodes should have alike, and that are too large to be read.
        apex: what is installed under that name.
        engine_fault: why Transformer Engine cannot be imported; None where it can, or is not there at all.
        shared_memory: bytes free in ``/dev/shm``; None where there is none.
        temporary: where a Ray that starts there puts its files.
        memory: bytes available.
        disk: bytes free where the run writes, those of its own checkpoints counted as free; None without a run.
        open_files: how many a process may open at most.
        resolves: addresses that its own name leads to.
        addresses: of its interfaces.
        gloo_addresses: of the interfaces that GLOO_SOCKET_IFNAME names; None where it is unset.
        gpus: names.
        driver: of the GPUs, such as ``580.82``.
        capabilities: compute capability of each GPU, such as (9, 0), as far as the driver tells it.
        wide_vectors: whether its CPU computes with AVX-512 or AMX.
        token: Ray's.
    """

    host: str
    python: str
    packages: Mapping[str, str]
    code: str
    files: Mapping[str, str | None]
    sizes: Mapping[str, int | None]
    apex: Apex | None
    engine_fault: str | None
    shared_memory: int | None
    temporary: str
    memory: int
    disk: int | None
    open_files: int
    resolves: tuple[str, ...]
    addresses: tuple[str, ...]
    gloo_addresses: tuple[str, ...] | None
    gpus: tuple[str, ...]
    driver: str | None
    capabilities: tuple[tuple[int, int], ...]
    wide_vectors: bool
    token: Token


class Listener(Enum):
    """Who answers at a port."""

    NOBODY = "nobody"
    GRPC = "a gRPC server, as Ray's is"
    OTHER = "something else"


@dataclass(frozen=True, kw_only=True)
class Port:
    """One port of a cluster.

    Attributes:
        address: host name or address.
        number: of the port.
        option: of ray_head.sh that sets it.
        listener: who answers.
        leads_to: addresses that ``address`` stands for.
        ours: whether one of them is this machine's.
    """

    address: str
    number: int
    option: str
    listener: Listener
    leads_to: tuple[str, ...]
    ours: bool


def look(run_dir: Path | None, files: Sequence[Path], large: Sequence[Path] = ()) -> NodeFacts:
    """Everything about the node that this process runs on."""
    packages = _packages()
    gpus, driver, capabilities = _gpus()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    host = socket.gethostname()
    return NodeFacts(
        host=host,
        python=platform.python_version(),
        packages=packages,
        code=hash_of_code(Path(megatron_rl.__file__).parent),
        files={str(file): _hash(file) for file in files},
        sizes={str(file): file.stat().st_size if file.is_file() else None for file in large},
        apex=_apex(),
        engine_fault=_engine_fault(packages),
        shared_memory=free_shared_memory(),
        temporary=temporary_folder(),
        memory=psutil.virtual_memory().available,
        disk=None if run_dir is None else room(run_dir),
        open_files=sys.maxsize if hard == resource.RLIM_INFINITY else hard,
        resolves=_resolved(host),
        addresses=_own_addresses(),
        gloo_addresses=_gloo_addresses(),
        gpus=gpus,
        driver=driver,
        capabilities=capabilities,
        wide_vectors=_wide_vectors(Path("/proc/cpuinfo").read_text()),
        token=_token(),
    )


def hash_of_code(folder: Path) -> str:
    """SHA-256 over names and contents of the Python files below ``folder``."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)} {_hash(file)}\n".encode())
    return digest.hexdigest()


def look_at_port(address: str, number: int, option: str) -> Port:
    """Who listens there."""
    leads_to = _resolved(address)
    return Port(
        address=address,
        number=number,
        option=option,
        listener=_listener(address, number),
        leads_to=leads_to,
        ours=not set(leads_to).isdisjoint(_own_addresses()),
    )


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    # what Ray brings along stands on the path only where it is loaded
    for each in metadata.distributions(path=[place for place in sys.path if "thirdparty_files" not in place]):
        if name := each.metadata["Name"]:  # what an interrupted installation left has none
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), each.version)
    return found


def _hash(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _apex() -> Apex | None:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or [str(spec.origin)])
    try:
        summary = metadata.metadata("apex")["Summary"]
    except metadata.PackageNotFoundError:
        summary = None
    has_optimizers = any((Path(place) / "optimizers").is_dir() for place in places)
    return Apex(place=places[0], summary=summary, has_optimizers=has_optimizers)


def _engine_fault(packages: Mapping[str, str]) -> str | None:
    """Tried in a process of its own: it loads torch, and may end the process that does."""
    there = any(name.startswith("transformer-engine") for name in packages)
    if not there and importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import transformer_engine.pytorch"],
            capture_output=True,
            text=True,
            timeout=_IMPORT_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"its import took longer than {_IMPORT_DEADLINE_S} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"its import ended with status {done.returncode}"])[-1]


def room(run_dir: Path) -> int:
    """Bytes that a run may fill: what is free, and what its own checkpoints hold."""
    there = next(folder for folder in (run_dir, *run_dir.parents) if folder.is_dir())
    held = 0
    for folder, _, names in os.walk(run_dir / "checkpoints"):
        for name in names:
            with suppress(OSError):  # a run that is ending there may still remove old checkpoints
                held += Path(folder, name).stat().st_size
    return shutil.disk_usage(there).free + held


def _resolved(name: str) -> tuple[str, ...]:
    try:
        return tuple(sorted({str(answer[4][0]) for answer in socket.getaddrinfo(name, None)}))
    except OSError:
        return ()


def _own_addresses() -> tuple[str, ...]:
    found = {each.address.partition("%")[0] for some in psutil.net_if_addrs().values() for each in some}
    return tuple(sorted(found))


def _gloo_addresses() -> tuple[str, ...] | None:
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    if not named:
        return None
    internet = (socket.AF_INET, socket.AF_INET6)
    there = [each for name in named.split(",") for each in psutil.net_if_addrs().get(name, ())]
    return tuple(each.address.partition("%")[0] for each in there if each.family in internet)


def _gpus() -> tuple[tuple[str, ...], str | None, tuple[tuple[int, int], ...]]:
    """Names, driver and compute capabilities."""
    if shutil.which("nvidia-smi") is None:
        return (), None, ()
    # one by one: an old driver, which is to be told, does not know them all
    names, drivers, capabilities = (_asked_of_gpus(field) for field in ("name", "driver_version", "compute_cap"))
    numbers = (re.fullmatch(r"(\d+)\.(\d+)", capability) for capability in capabilities)
    found = tuple((int(number[1]), int(number[2])) for number in numbers if number is not None)
    return names, drivers[0] if drivers else None, found


def _wide_vectors(cpuinfo: str) -> bool:
    """As torch tells it, which need not be here."""
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    return {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= {*flags} or "amx_tile" in flags


def _asked_of_gpus(field: str) -> tuple[str, ...]:
    """What nvidia-smi says of each GPU; nothing where it fails."""
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return ()
    return tuple(done.stdout.split("\n")[:-1]) if done.returncode == 0 else ()


def _token() -> Token:
    """Where Ray looks: the secret itself, then the file that is named, then its own."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Token(path=None, mode=None)
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return Token(path=str(path), mode=stat.S_IMODE(path.stat().st_mode) if path.is_file() else None)


def _listener(address: str, number: int) -> Listener:
    try:
        connection = socket.create_connection((address, number), timeout=_ANSWER_DEADLINE_S)
    except OSError:
        return Listener.NOBODY
    with connection:
        try:
            connection.sendall(_HTTP2_HELLO)
            frame = connection.recv(9)
        except OSError:
            return Listener.OTHER
    return Listener.GRPC if len(frame) == 9 and frame[3] == _SETTINGS_FRAME else Listener.OTHER
