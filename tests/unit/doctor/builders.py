"""A node on which nothing is wrong; each test breaks one thing of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_rl.doctor.facts import NodeFacts, Token
from megatron_rl.version_matrix import SETS, Hardware

MIB, GIB = 1 << 20, 1 << 30
GPU_SET = next(each for each in SETS if each.hardware is Hardware.CUDA)
_HEALTHY = NodeFacts(
    host="first",
    python="3.11.7",
    packages=SETS[0].packages,
    code="c0de" * 16,
    files={"/recipe.toml": "abc", "/model/config.json": "def"},
    sizes={"/model/model.safetensors": 100},
    apex=None,
    engine_fault=None,
    shared_memory=16 * GIB,
    temporary="/tmp",
    memory=64 * GIB,
    disk=100 * GIB,
    open_files=65536,
    resolves=("10.0.0.1",),
    addresses=("10.0.0.1", "127.0.0.1"),
    gloo_addresses=None,
    gpus=(),
    driver=None,
    capabilities=(),
    wide_vectors=True,
    token=Token(path="/home/me/token", mode=0o600),
)


def healthy(**changes: Any) -> NodeFacts:
    return replace(_HEALTHY, **changes)


def gpu_node(**changes: Any) -> NodeFacts:
    packages = {**GPU_SET.packages, "nvidia-cuda-runtime": "13.0.96"}
    found = {"python": "3.12.3", "packages": packages, "gpus": ("NVIDIA H100",), "driver": "580.82.07"}
    found |= {"capabilities": ((9, 0),)}
    return healthy(**{**found, **changes})
