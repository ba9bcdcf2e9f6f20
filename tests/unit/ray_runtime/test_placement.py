"""Which workers get which devices, and whether there is a cluster at all."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config.schema import ClusterConfig
from megatron_rl.ray_runtime import cluster
from megatron_rl.ray_runtime.cluster import Cluster, ClusterProblem, Placement, Role, check_machine, dealt, place
from megatron_rl.ray_runtime.supervisor import Birth

GPU = {"GPU": 1.0, "CPU": 1.0}


def test_each_worker_has_a_bundle_of_its_own() -> None:
    roles = [Role(name="policy", workers=2), Role(name="engine", workers=1, devices=4)]
    placed = place(roles, GPU, shared=False)
    assert placed.bundles == (GPU, GPU, {"GPU": 4.0, "CPU": 4.0})
    assert placed.bundle_of == {("policy", 0): 0, ("policy", 1): 1, ("engine", 0): 2}
    assert placed.asked == {"policy": GPU, "engine": {"GPU": 4.0, "CPU": 4.0}}


def test_equal_ranks_of_all_roles_share_one_gpu_and_ask_for_no_more_than_there_is() -> None:
    roles = [Role(name="policy", workers=2), Role(name="critic", workers=2), Role(name="engine", workers=3)]
    placed = place(roles, GPU, shared=True)
    assert placed.bundles == (GPU, GPU, GPU)
    for rank in range(2):
        assert {placed.bundle_of[role, rank] for role in ("policy", "critic", "engine")} == {rank}
    assert placed.bundle_of["engine", 2] == 2
    assert placed.asked["critic"] == {"GPU": 0.3333, "CPU": 0.3333}
    for bundle in range(3):
        sharing = [role for (role, _), at in placed.bundle_of.items() if at == bundle]
        assert sum(placed.asked[role]["GPU"] for role in sharing) <= 1


def nodes_by_rank(placed: Placement, node_of: dict[int, str], role: str) -> str:
    return "".join(node_of[bundle] for (name, _), bundle in sorted(placed.bundle_of.items()) if name == role)


def test_neighbours_in_rank_share_a_node_however_ray_dealt_out_the_bundles() -> None:
    roles = [Role(name="policy", workers=8), Role(name="critic", workers=4), Role(name="engine", workers=3, devices=4)]
    scrambled = dict(enumerate("abacbaacbbca" + "cdd"))
    placed = place(roles, GPU, shared=False)
    assert nodes_by_rank(placed, scrambled, "policy") == "abacbaac"
    found = dealt(placed, scrambled)
    assert nodes_by_rank(found, scrambled, "policy") == "aaaaabbb"
    assert nodes_by_rank(found, scrambled, "critic") == "bccc"
    assert nodes_by_rank(found, scrambled, "engine") == "ddc"
    assert sorted(found.bundle_of.values()) == list(range(15)), "each worker has a bundle, and nobody else has it"
    for (role, _), bundle in found.bundle_of.items():
        assert found.bundles[bundle] == found.asked[role]


def test_a_node_that_is_not_whole_splits_the_last_ranks() -> None:
    node_of = dict(enumerate("aabbbbcc"))
    found = dealt(place([Role(name="policy", workers=8)], GPU, shared=False), node_of)
    assert nodes_by_rank(found, node_of, "policy") == "bbbbaacc"


def test_roles_that_share_a_device_share_it_after_dealing_too() -> None:
    roles = [Role(name="policy", workers=4), Role(name="critic", workers=4), Role(name="engine", workers=6)]
    node_of = dict(enumerate("xyxyxy"))
    found = dealt(place(roles, GPU, shared=True), node_of)
    for rank in range(4):
        assert len({found.bundle_of[role.name, rank] for role in roles}) == 1
    assert nodes_by_rank(found, node_of, "policy") == "xxxy"
    assert nodes_by_rank(found, node_of, "engine") == "xxxyyy"


class FakeRay:
    """A cluster of nodes with these resources that puts bundle i on the node that ``where`` names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nodes: Sequence[dict[str, float]], where: str = "") -> None:
        self.nodes_there = nodes
        self.bundle_of: dict[str, int] = {}
        self.sharing_of: dict[str, int | None] = {}
        monkeypatch.setattr(cluster, "ray", self)
        monkeypatch.setattr(cluster, "placement_group", lambda bundles, strategy: self)
        monkeypatch.setattr(cluster, "remove_placement_group", lambda group: None)
        monkeypatch.setattr(
            cluster, "placement_group_table", lambda group: {"bundles_to_node_id": dict(enumerate(where))}
        )
        monkeypatch.setattr(cluster, "WorkerGroup", self.group)

    def cluster_resources(self) -> dict[str, float]:
        return {kind: sum(node.get(kind, 0.0) for node in self.nodes_there) for kind in ("CPU", "GPU")}

    def nodes(self) -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": node} for node in self.nodes_there] + [
            {"Alive": False, "Resources": {"GPU": 64.0, "CPU": 640.0}}
        ]

    def ready(self) -> FakeRay:
        return self

    def wait(self, references: list[object], timeout: float) -> tuple[list[object], list[object]]:
        return references, []

    def remote(self, *arguments: Any) -> FakeRay:
        if len(arguments) == 5:  # of a supervisor: name, log, scratch, environment, who shares its node's cores
            self.sharing_of[arguments[0]] = arguments[4]
        return self

    def options(self, scheduling_strategy: object, **rest: object) -> FakeRay:
        self.chosen = scheduling_strategy.placement_group_bundle_index  # type: ignore[attr-defined]
        return self

    def group(self, name: str, spawn: Callable[[int], object], workers: int, **rest: object) -> SimpleNamespace:
        for rank in range(workers):
            spawn(rank)
            self.bundle_of[f"{name} {rank}"] = self.chosen
        return SimpleNamespace(names=[], births=lambda ranks: [])


def test_workers_are_bound_to_bundles_by_the_nodes_that_ray_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = FakeRay(monkeypatch, [{"GPU": 2.0, "CPU": 8.0}] * 2, where="abab")
    started = Cluster(ClusterConfig(), gpus=4, run_dir=tmp_path)
    started.start([Role(name="policy", workers=2), Role(name="engine", workers=2)], {})
    assert found.bundle_of == {"policy 0": 0, "policy 1": 2, "engine 0": 1, "engine 1": 3}


@pytest.mark.parametrize(("gpus", "five", "two"), [(8, 5, 2), (0, None, None)])
def test_a_rank_that_computes_on_the_host_is_told_who_else_does_on_its_node(
    gpus: int, five: int | None, two: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nobody is: one thread each."""
    found = FakeRay(monkeypatch, [{"GPU": 8.0, "CPU": 8.0}] * 2, where="aabaaabb")
    (tmp_path / "logs").mkdir()
    roles = [Role(name="policy", workers=5, on_host=True), Role(name="critic", workers=2, on_host=True)]
    roles.append(Role(name="engine", workers=1))
    Cluster(ClusterConfig(cpus_per_worker=1.0), gpus=gpus, run_dir=tmp_path).start(roles, {})
    assert found.sharing_of == {
        **{f"policy rank {rank}": five for rank in range(5)},
        **{"critic rank 0": two, "critic rank 1": two, "engine": None},
    }


@pytest.mark.parametrize(
    "role", [Role(name="engine", workers=1, devices=32), Role(name="engine", workers=2, devices=3)]
)
def test_an_engine_larger_than_any_node_is_told_when_no_larger_node_has_joined_in_time(
    role: Role, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"GPU": 8.0, "CPU": 2.0}, *[{"GPU": 8.0, "CPU": 64.0 if role.devices > 8 else 2.0}] * 4, {"CPU": 256.0}]
    FakeRay(monkeypatch, nodes)
    asked, largest = nodes[1] | {"GPU": float(role.devices), "CPU": float(role.devices)}, nodes[1]
    config = ClusterConfig(address="10.0.0.1:6379", start_deadline_s=0.2)
    started = Cluster(config, gpus=8, run_dir=tmp_path)
    said = f"needs {asked} there, the largest node of the Ray cluster has {largest}; use a smaller engine.tensor or "
    with pytest.raises(ClusterProblem, match=r"waited 0 s for a larger node to join: .*" + re.escape(said)):
        started.start([Role(name="policy", workers=2), role], {})


def test_a_node_that_is_still_joining_is_waited_for_though_there_are_devices_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = {"GPU": 2.0, "CPU": 8.0}, {"GPU": 4.0, "CPU": 8.0}
    ray = FakeRay(monkeypatch, [small] * 2, where="a")
    monkeypatch.setattr(
        cluster, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: setattr(ray, "nodes_there", [large]))
    )
    started = Cluster(ClusterConfig(address="10.0.0.1:6379"), gpus=4, run_dir=tmp_path)
    started.start([Role(name="engine", workers=1, devices=4)], {})
    assert ray.bundle_of == {"engine 0": 0}


def test_a_run_leaves_its_processes_in_a_folder_that_only_other_nodes_have_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeRay(monkeypatch, [{"GPU": 2.0, "CPU": 8.0}], where="a")
    Cluster(ClusterConfig(address="10.0.0.1:6379"), gpus=2, run_dir=tmp_path).start(
        [Role(name="policy", workers=1)], {}
    )
    assert (tmp_path / "logs" / "processes.json").read_text() == "[]\n"


def birth_of(process: subprocess.Popen[bytes]) -> Birth:
    return Birth(host="here", address="127.0.0.1", pid=process.pid)


def test_the_end_of_a_run_kills_its_own_processes_and_not_who_has_the_number_of_a_dead_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_STOP_DEADLINE_S", 0.2)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    own, stranger = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    try:
        ended = Cluster(ClusterConfig(), gpus=0, run_dir=tmp_path)
        births = iter([birth_of(stranger), birth_of(own)])
        group: Any = SimpleNamespace(names=["engine", "policy"], births=lambda ranks: [next(births) for _ in ranks])
        ended._note_births(group, [0, 1])
        # the engine has died, and the system has given its number to another process
        ended._children["engine"]._ident = (stranger.pid, 0.0)
        ended.__exit__(ValueError, None, None)
        assert own.wait(timeout=10) == -signal.SIGKILL
        assert stranger.poll() is None
    finally:
        for process in (own, stranger):
            process.kill()
            process.wait()


def test_a_worker_with_a_larger_share_than_any_node_has_cpus_is_told_when_none_has_joined_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeRay(monkeypatch, [{"CPU": 2.0}, {"CPU": 1.0}])
    started = Cluster(
        ClusterConfig(address="10.0.0.1:6379", start_deadline_s=0.2, cpus_per_worker=2.5), gpus=0, run_dir=tmp_path
    )
    with pytest.raises(ClusterProblem, match=r"needs \{'CPU': 2.5\} there, .* has \{'CPU': 2.0\}; .*cpus_per_worker"):
        started.start([Role(name="policy", workers=1)], {})


def test_an_address_where_nobody_listens_is_told_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ClusterProblem, match=rf"nobody answers at cluster\.address={address} .*refused"):
            check_machine(2, 0, ClusterConfig(address=address))
        with pytest.raises(ClusterProblem, match=r"nobody answers at cluster\.address=a\.\.b:1 "):
            check_machine(2, 0, ClusterConfig(address="a..b:1"))
    assert time.monotonic() - started < 10
