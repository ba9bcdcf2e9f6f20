"""The Triton kernels against torch and float64, through Triton's interpreter or on a GPU (``make test-triton``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("triton", reason="Triton is in an environment of its own: make test-triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

from megatron_rl.mcore import logprobs as module
from megatron_rl.mcore.logprobs import TorchKernels, TritonKernels, choose_kernels, linear_logprobs, merge


@dataclass(frozen=True, kw_only=True)
class Case:
    """``real`` of ``width`` rows of the weight stand for tokens."""

    tokens: int = 70
    hidden: int = 48
    width: int = 300
    real: int = 300
    temperature: float = 1.0
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return " ".join(str(value) for value in vars(self).values())

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits spread by about 3."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(self.tokens, self.hidden, generator=generator)
        weight = 3 * self.hidden**-0.5 * torch.randn(self.width, self.hidden, generator=generator)
        targets = torch.randint(0, self.real, (self.tokens,), generator=generator)
        return hidden.to(DEVICE, self.dtype), weight.to(DEVICE, self.dtype), targets.to(DEVICE)


CASES = [
    Case(),
    Case(tokens=1, hidden=16, width=5, real=5),
    Case(tokens=129, temperature=0.6),
    Case(width=384, real=257, temperature=1.7),  # the last rows and a whole tile are padding
    Case(hidden=200, dtype=torch.float32),
]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_float64(case: Case, *, rounded: bool) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of the same inputs, with logits rounded as an output layer rounds them, or not."""
    hidden, weight, targets = (tensor.cpu() for tensor in case.inputs())
    logits = hidden.double() @ weight[: case.real].double().T
    if rounded:
        logits = logits.float().to(case.dtype).double()
    log_p = (logits / case.temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def run(kernels: object, case: Case, *, with_entropy: bool = True, weight_of_entropy: float = 0.3) -> list[Tensor]:
    """Log-probs, entropy, and the gradients of hidden states and weight of a random sum of them."""
    hidden, weight, targets = case.inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    logprobs, entropy = linear_logprobs(
        hidden,
        weight,
        targets,
        temperature=case.temperature,
        group=dist.group.WORLD,
        with_entropy=with_entropy,
        kernels=kernels,
        chunk_tokens=50,
        vocabulary=case.real,
    )
    sums = torch.randn(2, case.tokens, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    total = (sums[0] * logprobs).sum()
    if entropy is not None:
        total = total + weight_of_entropy * (sums[1] * entropy).sum()
    total.backward()
    found = [logprobs.detach(), *([] if entropy is None else [entropy.detach()]), hidden.grad, weight.grad]
    return [tensor.float().cpu() for tensor in found]


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_log_probs_and_entropies_are_those_of_float64(case: Case) -> None:
    found = run(TritonKernels(), case)
    for mine, exact in zip(found, in_float64(case, rounded=True), strict=False):
        torch.testing.assert_close(mine.double(), exact, atol=2e-2 if case.dtype == torch.bfloat16 else 1e-5, rtol=0)
        assert distance(mine, exact) < (2e-3 if case.dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_and_gradients_are_those_of_torch(case: Case, with_entropy: bool) -> None:
    # a product that lies between two 16-bit numbers is rounded to one here and to the other there
    bound = 5e-3 if case.dtype == torch.bfloat16 else 2e-6
    mine = run(TritonKernels(), case, with_entropy=with_entropy)
    torchs = run(TorchKernels(), case, with_entropy=with_entropy)
    assert len(mine) == len(torchs) == 3 + with_entropy
    for found, wanted in zip(mine, torchs, strict=True):
        assert distance(found, wanted) < bound


def test_padding_gets_no_gradient() -> None:
    case = CASES[3]
    *_, grad_weight = run(TritonKernels(), case)
    assert grad_weight[: case.real].abs().amax(-1).min() > 0
    assert grad_weight[case.real :].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_of_tensor_ranks_merge_to_the_whole(dtype: torch.dtype) -> None:
    case = Case(width=384, real=300, dtype=dtype)
    hidden, weight, targets = case.inputs()
    settings = {"temperature": 0.7, "with_entropy": True, "chunk": 50}
    whole = merge(TorchKernels().statistics(hidden, weight, targets, real=case.real, **settings))
    parts = []
    for rank, part in enumerate(weight.split(96)):  # the last of four has padding alone but for 12 rows
        local = targets - 96 * rank
        local = local.where((local >= 0) & (local < 96), -1)
        real = max(0, min(96, case.real - 96 * rank))
        parts.append(merge(TritonKernels().statistics(hidden, part, local, real=real, **settings)))
    found = merge(torch.stack(parts))
    for mine, wanted in zip(found, whole, strict=True):
        assert distance(mine, wanted) < (5e-3 if dtype == torch.bfloat16 else 1e-6)


def test_a_part_that_is_padding_alone_adds_nothing() -> None:
    hidden, weight, targets = Case(dtype=torch.float32).inputs()
    settings = {"temperature": 1.0, "with_entropy": True, "chunk": 50}
    whole = merge(TritonKernels().statistics(hidden, weight, targets, real=300, **settings))
    nothing = merge(TritonKernels().statistics(hidden, weight, targets - 10_000, real=0, **settings))
    torch.testing.assert_close(merge(torch.stack([whole, nothing])), whole, atol=0, rtol=0)


def test_large_logits_cost_no_digits() -> None:
    even, pair, sure = torch.full((300,), -3e4), torch.full((300,), 1e4), torch.zeros(300)
    pair[[0, -1]] = 2e4
    sure[0] = 1e4
    weight = torch.zeros(300, 16, device=DEVICE)
    weight[:, :3] = torch.stack([even, pair, sure], 1)
    logprobs, entropy = linear_logprobs(
        torch.eye(3, 16, device=DEVICE),
        weight,
        torch.zeros(3, dtype=torch.int64, device=DEVICE),
        temperature=1.0,
        group=dist.group.WORLD,
        with_entropy=True,
        kernels=TritonKernels(),
    )
    assert entropy is not None
    wanted = torch.tensor([300.0, 2.0, 1.0]).log()
    torch.testing.assert_close(entropy.cpu(), wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logprobs.cpu(), -wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("asked", "cuda", "chosen"), [("auto", True, "triton"), ("auto", False, "torch"), ("torch", True, "torch")]
)
def test_triton_is_chosen_on_a_gpu_unless_torch_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str, cuda: bool, chosen: str
) -> None:
    monkeypatch.setattr(module, "has_cuda", lambda: cuda)
    assert choose_kernels(asked).name == chosen
