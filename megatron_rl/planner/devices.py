"""Devices and links: the only place with figures of hardware."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU and its share of its machine. Rates are peaks, per second and direction.

    Attributes:
        memory: bytes, as CUDA reports them: less than the card has, and the least that was found reported.
        flops: dense bfloat16.
        float32_flops: of float32 as it is, without TF32, which nothing turns on.
        bandwidth: of its memory, in bytes.
        link: to the other GPUs of its node, in bytes.
        network: to GPUs of other nodes, in bytes.
        host_link: to the memory of its host, in bytes.
        capability: CUDA's compute capability; (0, 0): not a GPU.
        reserved: bytes that CUDA, NCCL and libraries take in each process before anything is loaded (an assumption).
        host_memory: of a node, in bytes; a machine with another one is said (``--host-gib``).
        host_bandwidth: of a node's own memory, in bytes, all channels together.
        host_process: bytes of it that a process takes for torch, CUDA and the libraries (an assumption).
        source: of these figures.
        words: that are in the name by which nvidia-smi knows it, in lower case; none: not a GPU.
        fp8: by recipe of ``policy.fp8``, how many times as fast as in bfloat16 the products of linear layers are, with
            the casts that they need: :data:`HOPPER_FP8`, :data:`BLACKWELL_FP8`; empty where there is no FP8.
        unfused: how many times as many bytes as with fused kernels element-wise work reads and writes.
    """

    memory: float
    flops: float
    float32_flops: float
    bandwidth: float
    link: float
    network: float
    host_link: float
    capability: tuple[int, int]
    reserved: float
    host_memory: float
    host_bandwidth: float
    host_process: float
    source: str
    words: tuple[str, ...] = ()
    fp8: Mapping[str, float] = field(default_factory=dict, hash=False)
    unfused: float = 1.0

    def is_named(self, name: str) -> bool:
        """Whether a GPU that nvidia-smi calls ``name`` is one."""
        return bool(self.words) and set(self.words) <= set(re.split(r"[^a-z0-9]+", name.lower()))

    @property
    def is_gpu(self) -> bool:
        """Whether it runs CUDA."""
        return self.capability != (0, 0)

    def product_flops(self, dtype: str) -> float:
        """Peak of products in this type."""
        return self.float32_flops if dtype == "float32" else self.flops

    def rings(self, dtype: str) -> bool:
        """Whether Transformer Engine's fused attention serves packed rows of this type whatever else is installed
        (``mcore.capabilities``): its context ranks pass keys and values around.
        """
        return self.capability >= (9, 0) and dtype == "bfloat16"

    def engine_gain(self, quantization: str) -> float:
        """The same of a quantised engine's linears, with the training recipe whose scales are the most like: one for
        a weight (also where each row has its own), or one for a block.
        """
        if quantization == "none":
            return 1.0
        block = self.fp8.get("blockwise", self.fp8.get("mxfp8", 1.0))
        return block if quantization == "fp8_per_block" else self.fp8.get("tensorwise", 1.0)


HOPPER_FP8: Mapping[str, float] = {"tensorwise": 1.57, "blockwise": 1.41}
"""Transformer Engine's documentation, "GEMM Speedups Across Precisions": all products of a layer of a 5B model on an
H200, with casts."""
BLACKWELL_FP8: Mapping[str, float] = {"tensorwise": 1.41, "mxfp8": 1.44}
"""The same on a B300."""

GIB = 2**30
TWO_TB = 2048 * 2**30
"""Of 32 modules of 64 GiB, as DGX have them."""

DEVICES: Mapping[str, Device] = {
    "a100-80g": Device(
        memory=79.15 * GIB,
        flops=312e12,
        float32_flops=19.5e12,
        bandwidth=2.039e12,
        link=300e9,
        network=25e9,
        host_link=31.5e9,
        capability=(8, 0),
        reserved=2e9,
        host_memory=TWO_TB,
        host_bandwidth=409.6e9,
        host_process=4e9,
        source="NVIDIA A100 80GB SXM data sheet (2021): NVLink 3, PCIe 4; HDR 200 Gb/s a GPU, 2 TB in 2 x 8 channels "
        "of DDR4-3200 (DGX A100); memory as torch's errors tell it of the 80 GB card",
        words=("a100", "80gb"),
    ),
    "h100": Device(
        memory=79.11 * GIB,
        flops=989e12,
        float32_flops=67e12,
        bandwidth=3.35e12,
        link=450e9,
        network=50e9,
        host_link=63e9,
        capability=(9, 0),
        reserved=2e9,
        host_memory=TWO_TB,
        host_bandwidth=614.4e9,
        host_process=4e9,
        source="NVIDIA H100 SXM data sheet (2023): NVLink 4, PCIe 5; NDR InfiniBand 400 Gb/s per GPU, 2 TB in "
        "2 x 8 channels of DDR5-4800 (DGX H100); memory as torch tells it in vllm-project/vllm issue 27508",
        words=("h100",),
        fp8=HOPPER_FP8,
    ),
    "h200": Device(
        memory=139.72 * GIB,
        flops=989e12,
        float32_flops=67e12,
        bandwidth=4.8e12,
        link=450e9,
        network=50e9,
        host_link=63e9,
        capability=(9, 0),
        reserved=2e9,
        host_memory=TWO_TB,
        host_bandwidth=614.4e9,
        host_process=4e9,
        source="NVIDIA H200 SXM data sheet (2024): NVLink 4, PCIe 5; NDR InfiniBand 400 Gb/s per GPU, 2 TB in "
        "2 x 8 channels of DDR5-4800 (DGX H200); memory as torch's errors tell it of H200",
        words=("h200",),
        fp8=HOPPER_FP8,
    ),
    "b200": Device(
        memory=178.35 * GIB,
        flops=2250e12,
        float32_flops=75e12,
        bandwidth=8e12,
        link=900e9,
        network=50e9,
        host_link=63e9,
        capability=(10, 0),
        reserved=2e9,
        host_memory=TWO_TB,
        host_bandwidth=716.8e9,
        host_process=4e9,
        source="NVIDIA DGX B200 data sheet (2024): NVLink 5, PCIe 5; NDR InfiniBand 400 Gb/s a GPU, 2 TB (4 at most) "
        "in 2 x 8 channels of DDR5-5600; memory as CUDA tells it in pytorch/ao pull request 4002",
        words=("b200",),
        fp8=BLACKWELL_FP8,
    ),
    "cpu": Device(
        memory=4e9,
        flops=50e9,
        float32_flops=50e9,
        bandwidth=10e9,
        link=0.25e9,
        network=0.1e9,
        host_link=10e9,
        capability=(0, 0),
        reserved=0.4e9,
        host_memory=4e9,
        host_bandwidth=10e9,
        host_process=0.4e9,
        unfused=5.0,
        source="one core of a small machine; an order of magnitude, but for what was measured on one with AVX2: "
        "how element-wise work compares with products, by torch's profiler of an update at hidden 256 (1.4 GB/s and "
        "33 GFLOP/s), and gathers and scattered sums over gloo (0.15 to 0.18 GB a CPU-second)",
    ),
}

MATMUL_SHARE = 0.7
"""Of the peak that the products of a transformer reach. 0.81 was measured for one of 8,192^3 on an H100; smaller ones
reach less. One figure for all devices, models and layouts."""
MEMORY_SHARE = 0.8
"""Of the bandwidth of memory that element-wise work reaches (3.0 of 3.35 TB/s was measured for a copy)."""
LINK_SHARE = 0.75
"""Of the bandwidth of links that collectives of large messages reach."""
HOST_SHARE = 0.95
"""Of a node's memory; where more is in use, Ray ends workers (its documentation, "Out-Of-Memory Prevention")."""
LAUNCH_S = 12e-6
"""For one all-reduce of a few bytes inside a node."""
DECODE_STEP_S = 3e-3
"""What one step of an engine takes besides its arithmetic: scheduling, sampling, launching."""
