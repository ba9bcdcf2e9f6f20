"""Adam whose moments and main weights live in host memory, and whose step is computed there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer, optimizer_config
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.utils import get_te_version
from torch import Tensor

from megatron_rl.device import host_buffer


class HostOptimizer(HybridDeviceOptimizer):  # type: ignore[misc]
    """megatron-core's hybrid optimizer with every parameter on the host.

    megatron-core chooses parameters by ``is_cuda``, which on a CPU finds none, and makes main weights of bfloat16
    parameters alone, which it then expects of every parameter that it loads (a KeyError on GPUs as well). Here every
    parameter gets a float32 main weight on the host, whatever its type and device, and main weights and gradients are
    two buffers, not one for each parameter; the rest is megatron-core's.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group, shards of float32 parameters included: they are views, which torch refuses but with this."""
        for param in param_group["params"]:
            if not param.is_leaf:
                param.retain_grad()
        super().add_param_group(param_group)

    def _init_sub_optimizers(self) -> None:
        """Not yet: where replicas share the optimizer, megatron-core makes a first one, of whole parameters, and throws
        it away; in circles that Python's collector alone would find, with main weights of the whole model.
        """

    def take_parameters(self) -> None:
        """Make the main weights; called once, of the optimizer that stays."""
        super()._init_sub_optimizers()

    def _get_sub_optimizer_param_groups(self, offload_fraction: float) -> tuple[Any, ...]:
        """Groups on the host, groups on the device (none), parameter -> main weight, and back, and parameter -> float32
        main weight (the same).
        """
        params = [param for group in self.param_groups for param in group["params"]]
        mains = dict(zip(params, _on_host(params), strict=True))
        for param, main in mains.items():
            main.copy_(param.detach())
        groups = [
            {**group, "params": [mains[param] for param in group["params"]]}
            for group in self.param_groups
            if group["params"]
        ]
        return groups, [], mains, {main: param for param, main in mains.items()}, mains

    def _set_sub_optimizer_grads(self) -> None:
        if not self.cpu_copy_map_grad:  # at the first step, as megatron-core, which would make one by one
            mains = list(self.cpu_copys_map_gpu_param)
            for main, gradient in zip(mains, _on_host(mains), strict=True):
                self.cpu_copy_map_grad[main] = main.grad = gradient
        super()._set_sub_optimizer_grads()

    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        """Take up a state that was loaded: this replica's share of it, of which megatron-core makes views into whole
        tensors, and would so keep those of all replicas.
        """
        super()._sync_hdo_state_to_sub_optimizers()
        for param, state in self.state.items():
            state["master_param"] = self.param_to_inner_param[param]
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].untyped_storage().nbytes() > state[name].nbytes:
                    state[name] = state[name].clone()


def _on_host(like: Sequence[Tensor]) -> list[Tensor]:
    """Float32 tensors of the same shapes in one buffer on the host, uninitialised."""
    parts = host_buffer(4 * sum(tensor.numel() for tensor in like)).view(torch.float32)
    sizes = [tensor.numel() for tensor in like]
    return [part.view(tensor.shape) for part, tensor in zip(parts.split(sizes), like, strict=True)]


def start_moments(adam: torch.optim.Optimizer) -> None:
    """Give every parameter moments of zero, as before the first step (and its count of steps where the optimizer is
    torch's, which has one for each parameter).
    """
    if isinstance(adam, HostOptimizer):
        adam.take_parameters()
        for host in adam.cpu_optimizers:
            start_moments(host)
        adam._sync_sub_optimizers_state_to_hdo()
        return
    for param in (param for group in adam.param_groups for param in group["params"]):
        counted = {"step": torch.zeros(())} if isinstance(adam, torch.optim.AdamW) else {}
        adam.state[param] = {**counted, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}


# megatron-core makes its hybrid optimizer by these names, first of whole parameters, then of a replica's shards
optimizer.HybridDeviceOptimizer = HostOptimizer
distrib_optimizer.HybridDeviceOptimizer = HostOptimizer
if get_te_version() is None:  # it compares versions without asking whether there is one
    optimizer_config.is_te_min_version = lambda version, check_equality=True: False
