"""How Adam on the host keeps its tensors; that it trains as other optimizers do is tested with whole models."""

from __future__ import annotations

from typing import Any

import torch

from megatron_rl.device import prepare_megatron

prepare_megatron()

from megatron_rl.mcore.host_optimizer import HostOptimizer, start_moments  # noqa: E402

SHAPES = [(5, 3), (7,), (2, 2)]
ADAM: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}


def test_main_weights_and_gradients_are_one_exact_buffer_each() -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in SHAPES]
    plain = [torch.nn.Parameter(param.detach().float()) for param in params]
    adam = HostOptimizer(
        [{"params": params[:2]}, {"params": params[2:]}],
        offload_fraction=1.0,
        cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=torch.optim.AdamW,
        param_update_in_fp32=True,
        **ADAM,
    )
    start_moments(adam)
    expected = torch.optim.AdamW(plain, **ADAM)
    for _ in range(2):
        for param, other in zip(params, plain, strict=True):
            param.grad = torch.randn(param.shape, generator=generator).bfloat16()
            other.grad = param.grad.float()
        adam.step()
        expected.step()
    mains = [adam.param_to_inner_param[param] for param in params]
    for main, param, other in zip(mains, params, plain, strict=True):
        assert torch.equal(main, other)
        assert torch.equal(param, main.bfloat16())
    for tensors in (mains, [main.grad for main in mains]):
        (storage,) = {tensor.untyped_storage()._cdata for tensor in tensors}
        assert tensors[0].untyped_storage().nbytes() == 4 * sum(tensor.numel() for tensor in tensors), storage
