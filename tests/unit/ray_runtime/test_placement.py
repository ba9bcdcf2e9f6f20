"""Which workers get which devices, and whether there is a cluster at all."""

from __future__ import annotations

import socket
import time

import pytest

from megatron_rl.config.schema import ClusterConfig
from megatron_rl.ray_runtime.cluster import ClusterProblem, Role, check_machine, place

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
