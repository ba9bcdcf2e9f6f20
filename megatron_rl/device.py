"""The only hardware-specific file: CUDA or CPU, types, threads, and what megatron-core needs to run without CUDA."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.utils._device
from torch import Tensor

_CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def has_cuda() -> bool:
    """Whether tensors live on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where this process keeps its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


def gpu_count() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count() if has_cuda() else 0


def compute_capability() -> tuple[int, int]:
    """Of this process's GPU, such as (9, 0); (0, 0) where there is none."""
    return torch.cuda.get_device_capability() if has_cuda() else (0, 0)


def cuda_version() -> tuple[int, int]:
    """That torch was built with; (0, 0) where it was built without."""
    major, _, minor = (torch.version.cuda or "0.0").partition(".")
    return int(major), int(minor)


def has_wide_vectors() -> bool:
    """Whether the CPU computes with AVX-512 or AMX."""
    return bool(torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported())


def worker_environment() -> dict[str, str]:
    """Environment of every worker process: on a CPU one thread each, unless OMP_NUM_THREADS says otherwise. On GPUs the
    supervisor of a rank whose optimizer is on the host says how many.
    """
    return {} if has_cuda() else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def host_buffer(size: int) -> Tensor:
    """[size] bytes of host memory, pinned where there is a GPU to copy from, and given back when the last view of them
    goes. Torch's own pinned memory is rounded up to a power of two and kept for the life of the process.

    Raises:
        MemoryError: they cannot be pinned.
    """
    buffer = torch.empty(size, dtype=torch.uint8)
    if not size or not has_cuda() or type(buffer) is not Tensor:  # a dry run's have no bytes
        return buffer
    return torch.frombuffer(_PinnedPages(size), dtype=torch.uint8)


class _PinnedPages(mmap.mmap):
    """Pages of their own, so that no two registrations meet in one, which CUDA refuses."""

    _unregister: Callable[[], object] | None = None

    def __new__(cls, size: int) -> _PinnedPages:
        return super().__new__(cls, -1, size)

    def __init__(self, size: int) -> None:
        runtime = torch.cuda.cudart()
        address = ctypes.addressof(ctypes.c_char.from_buffer(self))
        if fault := int(runtime.cudaHostRegister(address, size, 0)):
            raise MemoryError(
                f"{size:,} bytes of host memory must be pinned, CUDA refuses with error {fault}: leave more memory "
                "free, or allow more to be locked (ulimit -l)"
            )
        self._unregister = functools.partial(runtime.cudaHostUnregister, address)

    def __del__(self) -> None:
        if self._unregister is not None:
            self._unregister()


def release_cached() -> None:
    """Give device memory that torch keeps for itself to other processes."""
    if has_cuda():
        torch.cuda.empty_cache()


def memory_used() -> int:
    """Bytes in use: of the GPU, by all processes together; where there is none, the resident set of this process."""
    if has_cuda():
        free, total = torch.cuda.mem_get_info()
        return total - free
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def select_device(index: int) -> None:
    """Make GPU ``index`` (modulo those visible) this process's device; nothing where there is none."""
    if has_cuda():
        torch.cuda.set_device(index % torch.cuda.device_count())


def collective_backend() -> str:
    """The torch.distributed backend for tensors on :func:`device`."""
    return "nccl" if has_cuda() else "gloo"


def dtype(name: str) -> torch.dtype:
    """The torch type of a ``model.dtype`` setting.

    Raises:
        ValueError: the name is none of the settings.
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def keep_freed_memory() -> None:
    """Let this process use freed memory of the host again instead of giving each large piece back to the system, which
    clears every page before it hands it out again: slower by several times than to copy what is written there.

    Pieces above 256 MiB still go back when they are freed, and so does the end of the heap above 1 GiB: a process keeps
    a few times its largest piece. Where the C library is not glibc nothing changes.
    """
    if (tune := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        tune(_M_MMAP_THRESHOLD, 256 << 20)
        tune(_M_TRIM_THRESHOLD, 1 << 30)


def limit_threads() -> None:
    """Compute with OMP_NUM_THREADS threads, one where it is unset.

    Several ranks share the cores of one machine; torch's default, all cores for each, makes them wait for one another.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def threads() -> int:
    """That an operation on the host is shared out to."""
    return torch.get_num_threads()


@functools.cache
def prepare_megatron() -> None:
    """Make ``import megatron.core`` work here; call it before the first one. Where there is CUDA, it only does what
    megatron-core lacks without Transformer Engine: an Adam whose states load again, and experts and latent attention
    that do not ask for it; and leaves cuDNN out of torch's attention, which keeps a graph for every new shape: packed
    rows make hundreds of them at each step.

    No tensor operation is intercepted and no file of megatron-core is touched: calls that ask torch for CUDA itself
    (placement, streams, random state, type names) get the CPU's answer, and the optimizer gets an Adam with the
    interface it knows from GPUs. The cost at run time is a dictionary look-up per tensor created by a factory.
    """
    if has_cuda():
        torch.backends.cuda.enable_cudnn_sdp(False)
        _use_fused_adam()
        _do_without_transformer_engine()
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("prepare_megatron() must run before megatron.core is imported, it is loaded already")
    _place_on_cpu()
    _drop_streams()
    _drop_compile()
    _share_random_state()
    _name_types_as_cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each import says again that Apex and Transformer Engine are not there
        _keep_random_states_on_cpu()
        _use_fused_adam()
        _do_without_transformer_engine()
        _route_experts_on_cpu()
    _exchange_unequal_pieces()


def _set(owner: Any, names: Iterable[str], value: Any) -> None:
    for name in names:
        setattr(owner, name, value)


def _nothing() -> Callable[..., None]:
    """A new stand-in for calls that have no meaning on a CPU (new, because dynamo knows each function by identity)."""

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    return nothing


def _place_on_cpu() -> None:
    """Why: about 90 places put a tensor on ``torch.cuda.current_device()``, on ``"cuda"``, or call ``.cuda()``."""
    # ``with torch.device(...)`` knows the factories by identity and looks them up once: let it find torch's own, else
    # it leaves them out, and transformers fills the buffers of a model that it loads with garbage
    torch.utils._device._device_constructors()

    def on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(factory)
        def create(*args: Any, **kwargs: Any) -> Tensor:
            if kwargs:
                where = kwargs.get("device")
                if where is not None and str(where).startswith("cuda"):
                    kwargs["device"] = _CPU
                kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return create

    for name in ("zeros", "ones", "empty", "full", "tensor", "as_tensor", "arange", "rand", "randn", "randint", "eye"):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    for name in ("zeros", "ones", "empty", "full", "rand", "randn"):
        setattr(torch, f"{name}_like", on_cpu(getattr(torch, f"{name}_like")))
    _set(torch.Tensor, ["cuda"], lambda self, *args, **kwargs: self)
    _set(torch.nn.Module, ["cuda"], lambda self, *args, **kwargs: self)
    _set(torch.cuda, ["current_device"], lambda: _CPU)
    _set(torch.cuda, ["set_device"], _nothing())


class _Stream:
    """A CUDA stream or event where work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: object) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0

    def record_event(self, event: _Stream | None = None) -> _Stream:
        return event or self

    wait_stream = wait_event = synchronize = record = wait = _nothing()


def _drop_streams() -> None:
    """Why: the schedules order their work with streams and events; a CPU has one order, the program's."""
    stream = _Stream()
    _set(torch.cuda, ["Stream", "Event"], _Stream)
    _set(torch.cuda, ["current_stream", "default_stream"], lambda *args, **kwargs: stream)
    _set(torch.cuda, ["stream"], lambda stream=None: contextlib.nullcontext())
    _set(torch.cuda, ["synchronize"], _nothing())
    _set(torch.cuda, ["is_current_stream_capturing"], lambda: False)
    _set(torch.cuda.nvtx, ["range_push", "range_pop"], _nothing())
    _set(torch.Tensor, ["record_stream"], _nothing())


def _drop_compile() -> None:
    """Why: ``megatron.core.jit`` binds torch.compile at import, which loads inductor (1.7 s) and compiles C++; and the
    first call of an optimizer loads dynamo (1.1 s) only to keep it out of methods that nothing compiles here.
    """

    def identity(function: Any = None, **kwargs: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function

    _set(torch, ["compile"], identity)
    for name in ("add_param_group", "load_state_dict", "zero_grad"):
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None:
            _set(method, ["__dynamo_disable"], method)


def _share_random_state() -> None:
    """Why: seeds of tensor-parallel dropout are kept as CUDA random states; the CPU generator takes their place."""
    _set(torch.cuda, ["manual_seed"], torch.manual_seed)
    for module in (torch.cuda, torch.cuda.random):
        _set(module, ["get_rng_state"], lambda *args, **kwargs: torch.get_rng_state())
        _set(module, ["set_rng_state"], lambda state, *args, **kwargs: torch.set_rng_state(state))


def _keep_random_states_on_cpu() -> None:
    """Why: the tracker of random states reaches past torch.cuda's functions, into its default generators."""
    import megatron.core.tensor_parallel.random as tracker

    _set(tracker, ["_get_cuda_rng_state"], lambda *args, **kwargs: torch.get_rng_state())
    _set(tracker, ["_set_cuda_rng_state"], lambda state, *args, **kwargs: torch.set_rng_state(state))
    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _name_types_as_cuda() -> None:
    """Why: the optimizers sort parameters by comparing ``param.type()`` with the text ``torch.cuda.FloatTensor``."""
    type_of = torch.Tensor.type

    def name(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = type_of(self, *args, **kwargs)
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        if not args and not kwargs and asked_by.startswith("megatron.core.optimizer"):
            return found.replace("torch.", "torch.cuda.")
        return found

    _set(torch.Tensor, ["type"], name)


def _use_fused_adam() -> None:
    """Why: without Apex it takes torch.optim.Adam; its per-parameter ``step`` does not load again when distributed."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    _set(optimizer, ["Adam"], FusedAdam)
    _set(optimizer, ["USING_PYTORCH_OPTIMIZER"], False)
    _set(distributed, ["Adam"], FusedAdam)
    _set(distributed, ["HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER"], True)


def _do_without_transformer_engine() -> None:
    """Why: these use names of Transformer Engine's that are bound only where it is installed, on a GPU as well."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.multi_latent_attention as latent

    if not hasattr(moe_utils, "te_general_gemm"):
        _set(moe_utils, ["te_general_gemm"], None)
    if not isinstance(getattr(latent, "TELinear", type), type):
        _set(latent, ["HAVE_TE"], False)


def _route_experts_on_cpu() -> None:
    """Why: this takes "not on CUDA" for a tensor that is on the host already."""
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def counts(values: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return values.numpy() if as_numpy and torch.is_tensor(values) else values

    _set(dispatcher, ["maybe_move_tensor_to_cpu"], counts)


def _exchange_unequal_pieces() -> None:
    """Why: experts that are shared over tensor ranks gather and reduce pieces of unequal length, which gloo cannot."""
    import torch.distributed as dist

    gather, reduce = dist.all_gather, dist.reduce_scatter

    def all_gather(pieces: list[Tensor], mine: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({piece.shape for piece in pieces}) == 1:
            return gather(pieces, mine, group=group, async_op=async_op)
        for rank, piece in enumerate(pieces):
            if rank == dist.get_rank(group):
                piece.copy_(mine)
            dist.broadcast(piece, group_src=rank, group=group)
        return None

    def reduce_scatter(
        mine: Tensor, pieces: list[Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if len({piece.shape for piece in pieces}) == 1:
            return reduce(mine, pieces, op=op, group=group, async_op=async_op)
        for rank, piece in enumerate(pieces):
            total = piece.contiguous().clone()
            dist.reduce(total, group_dst=rank, op=op, group=group)
            if rank == dist.get_rank(group):
                mine.copy_(total)
        return None

    _set(dist, ["all_gather"], all_gather)
    _set(dist, ["reduce_scatter"], reduce_scatter)


class FusedAdam(torch.optim.Optimizer):
    """Adam or AdamW with the interface of ``apex.optimizers.FusedAdam`` (``step`` lives in the parameter group) on
    torch's fused kernel.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **ignored: Any,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        )
        self._update = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            if params:
                self._update(
                    params,
                    [p.grad for p in params],
                    [self.state[p]["exp_avg"] for p in params],
                    [self.state[p]["exp_avg_sq"] for p in params],
                    [],
                    [torch.tensor(float(group["step"]), device=params[0].device)] * len(params),
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )
