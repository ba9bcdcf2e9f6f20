"""Whether a cluster asks for a token, told by what its head answers to a client without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from megatron_rl.config.schema import ClusterConfig
from megatron_rl.ray_runtime import cluster
from megatron_rl.ray_runtime.cluster import Cluster, ClusterProblem

Answer = Callable[[bytes, grpc.ServicerContext], bytes]


@contextmanager
def head(answer: Answer) -> Iterator[str]:
    """Something that answers as ``answer`` does to every question; its address."""

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1), [Handler()])
    address = f"127.0.0.1:{server.add_insecure_port('0.0.0.0:0')}"  # Ray takes another address for 127.0.0.1
    server.start()
    yield address
    server.stop(None)


def refused(address: str, tmp_path: Path) -> str:
    with (
        pytest.raises(ClusterProblem) as problem,
        Cluster(ClusterConfig(address=address), gpus=0, run_dir=tmp_path),
    ):
        pass
    return str(problem.value)


def after(seconds: float) -> Answer:
    def answer(question: bytes, context: grpc.ServicerContext) -> bytes:
        time.sleep(seconds)
        return b""

    return answer


def broken(question: bytes, context: grpc.ServicerContext) -> bytes:
    context.abort(grpc.StatusCode.INTERNAL, "out of order")
    raise AssertionError


def test_an_open_cluster_is_refused_however_slow_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # which is for the web
    for seconds in (0.0, 3.0):
        with head(after(seconds)) as address:
            assert refused(address, tmp_path).startswith(f"the Ray cluster at {address} asks for no token")


def test_a_cluster_that_says_nothing_of_tokens_is_not_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with head(broken) as address:
        assert "whether it asks for a token, INTERNAL: out of order;" in refused(address, tmp_path)
    monkeypatch.setattr(cluster, "_ANSWER_S", 1.0)
    with head(after(3.0)) as address:
        assert "did not say within 1 s whether it asks for a token, DEADLINE_EXCEEDED" in refused(address, tmp_path)
    assert refused("nowhere", tmp_path).startswith("cannot find the Ray cluster at nowhere: ")
