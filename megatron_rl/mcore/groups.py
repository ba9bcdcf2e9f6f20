"""torch.distributed and megatron-core's process groups of one rank: started together, closed together."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_rl.device import collective_backend, select_device
from megatron_rl.layout import Coordinates, ParallelLayout


def start_groups(
    layout: ParallelLayout, *, rank: int, host: str, port: int, timeout_s: float, seed: int
) -> Coordinates:
    """Join the other ranks of ``layout`` and build its groups.

    Args:
        layout: of the model.
        rank: of this process, in ``range(layout.world_size)``.
        host: of rank 0.
        port: where rank 0 listens, with SO_REUSEPORT: somebody may keep the port for it.
        timeout_s: bound on joining and on every collective, so that a rank that died ends the others.
        seed: of the random states (nothing here draws from them unless dropout is added).

    Returns:
        the place of this rank.

    Raises:
        OSError: rank 0 cannot listen there.
        RuntimeError: megatron-core numbers the ranks differently than :class:`ParallelLayout`.
    """
    if host in ("127.0.0.1", "localhost"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    select_device(rank)
    timeout = timedelta(seconds=timeout_s)
    store = _meet(host, port, layout.world_size, rank, timeout)
    dist.init_process_group(collective_backend(), store=store, rank=rank, world_size=layout.world_size, timeout=timeout)
    build_parallel_groups(layout, timeout_s)
    at = layout.coordinates(rank)
    found = Coordinates(
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        context=parallel_state.get_context_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
    )
    if found != at:
        raise RuntimeError(f"rank {rank} of {layout} must be at {at}, but megatron-core placed it at {found}")
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return at


def build_parallel_groups(layout: ParallelLayout, timeout_s: float | None = None) -> None:
    """megatron-core's groups of a layout, within the process group of all its ranks; ``timeout_s`` bounds each
    collective, None leaves it as torch has it.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        order="tp-cp-ep-dp-pp",
        distributed_timeout_minutes=30 if timeout_s is None else timeout_s / 60,
        create_gloo_process_groups=needs_host_groups(),
    )
    if timeout_s is not None and needs_host_groups():  # megatron-core gives this one no limit
        experts = parallel_state.get_expert_data_parallel_group_gloo()
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), experts)


def needs_host_groups() -> bool:
    """Whether replicas need groups over gloo beside their own, for what a save gathers on the host."""
    return bool(dist.get_backend() == "nccl")


def _meet(host: str, port: int, world_size: int, rank: int, timeout: timedelta) -> dist.TCPStore:
    """The store through which the ranks find each other; rank 0 holds it, on no other address than ``host``."""
    if rank > 0:
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    with socket.create_server((host, port), family=family, reuse_port=True) as server:
        return dist.TCPStore(
            host,
            port,
            world_size,
            is_master=True,
            timeout=timeout,
            master_listen_fd=server.detach(),
            use_libuv=True,  # the other kind knows no listening socket of its user's
        )


def stop_groups() -> None:
    """Close every group. ``destroy_model_parallel`` alone would drop them and leave their threads polling."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
