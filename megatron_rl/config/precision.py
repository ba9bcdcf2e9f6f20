"""FP8 in training: its settings, and the rules by which a model, a layout and a GPU may use it. No torch.

:data:`RULES` has one row for each precondition; a planner asks it with nothing but numbers. What the words mean
(E4M3, scales, recipes) explains :mod:`megatron_rl.mcore.fp8`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge

from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims


@dataclass(frozen=True, kw_only=True)
class FP8Config:
    """Linear layers multiply in FP8 (docs/fp8.md); everything else stays in bfloat16. Needs Transformer Engine."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - a class attribute that pydantic reads, not a field

    recipe: Literal["blockwise", "tensorwise", "mxfp8", "delayed"] = "blockwise"
    """How scales are found. ``delayed`` is refused: it scales by the past, and passes without an update spoil that."""
    parameters: bool = False
    """Keep the weights of the layers in FP8 and gather them so: half the bytes. Needs ``distributed_optimizer``."""
    first_last_layers_bf16: Annotated[int, Ge(0)] | None = None
    """So many first and so many last layers stay in bfloat16. Unset: 1 with ``tensorwise``, else 0."""
    logprobs: bool = True
    """Use FP8 also where nothing is learnt: old and reference log-probs, values."""
    allow_wide_blockwise_parameters: bool = False
    """Allow ``parameters`` with ``blockwise`` and ``tensor`` > 2, from which others report NaN at the second step."""

    @property
    def layers_kept(self) -> int:
        """Layers at each end that stay in bfloat16."""
        if self.first_last_layers_bf16 is not None:
            return self.first_last_layers_bf16
        return 1 if self.recipe == "tensorwise" else 0

    @property
    def alignment(self) -> int:
        """Widths of a linear, and tokens on a rank, must be a multiple of this: of a block, or of what a GEMM takes."""
        return {"blockwise": 128, "mxfp8": 32, "tensorwise": 16, "delayed": 16}[self.recipe]

    @property
    def environment(self) -> dict[str, str]:
        """What a process must have in its environment before it imports Transformer Engine, which reads it only then.

        Scales of blocks are plain float32 numbers, as the engine's, instead of powers of two.
        """
        return {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"} if self.recipe == "blockwise" else {}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a recipe may ask of a GPU: its compute capability, and the CUDA version torch was built with; (0, 0) is
    none, and a version of None not known.
    """

    capability: tuple[int, int]
    cuda: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class FP8Case:
    """All that the rules look at.

    Attributes:
        fp8: the settings.
        layout: of the model.
        dtype: of its weights.
        layers: the setting ``model.layers``.
        distributed_optimizer, optimizer_on_host, tokens_per_microbatch: settings of the trainer.
        dims: of the model; None: not known, rules that need it say nothing.
        gpu: that trains it; None: not known.
    """

    fp8: FP8Config
    layout: ParallelLayout
    dtype: str
    layers: str
    distributed_optimizer: bool
    optimizer_on_host: bool
    tokens_per_microbatch: int
    dims: ModelDims | None = None
    gpu: Gpu | None = None


class Severity(Enum):
    """Whether a case that breaks a rule can run."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class Rule:
    """One precondition: ``problem`` answers what is wrong with a case, or None."""

    name: str
    problem: Callable[[FP8Case], str | None]
    severity: Severity = Severity.ERROR


def fp8_problems(case: FP8Case, severity: Severity = Severity.ERROR) -> list[str]:
    """What the rules of one severity say of a case, in the table's order."""
    if not case.layout.positive:  # says so itself
        return []
    found = (rule.problem(case) for rule in RULES if rule.severity is severity)
    return [problem for problem in found if problem is not None]


def token_multiple(layout: ParallelLayout, fp8: FP8Config | None) -> int:
    """Each packed micro-batch is padded to a multiple of so many tokens.

    Context ranks share them in pairs of pieces, tensor ranks share what a context rank holds under sequence
    parallelism, and each share must be a multiple of the recipe's alignment: 128 x tensor x 2 context for ``blockwise``
    with all of these.
    """
    return layout.batch_multiple * (1 if fp8 is None else fp8.alignment)


class Width(NamedTuple):
    """Of a linear layer on one tensor rank; ``read``: as its input, else as its output alone."""

    name: str
    elements: int
    read: bool = True


def linear_widths(dims: ModelDims, layout: ParallelLayout) -> Iterator[Width]:
    """What linear layers read or write on one tensor rank."""
    tensor = layout.tensor
    yield Width("hidden", dims.hidden)
    if dims.latent is None:
        yield Width("q, k and v", (dims.heads + 2 * dims.kv_heads) * dims.head_dim // tensor, read=False)
        yield Width("attention's output", dims.heads * dims.head_dim // tensor)
    else:
        latent = dims.latent
        if latent.query_rank is not None:
            yield Width("latent q", latent.query_rank)
        yield Width("latent k and v", latent.kv_rank)
        yield Width("latent k and v with rotary", latent.kv_rank + latent.rotary_head_dim, read=False)
        yield Width("q", dims.heads * (latent.plain_head_dim + latent.rotary_head_dim) // tensor, read=False)
        yield Width("k and v", dims.heads * (latent.plain_head_dim + latent.value_head_dim) // tensor, read=False)
        yield Width("attention's output", dims.heads * latent.value_head_dim // tensor)
    if dims.experts is None or len(dims.experts.layers) < dims.layers:
        yield Width("ffn", dims.ffn_hidden // tensor)
    if dims.experts is not None:
        yield Width("expert ffn", dims.experts.ffn_hidden // layout.expert_tensor)
        if dims.experts.shared_ffn_hidden:
            yield Width("shared expert ffn", dims.experts.shared_ffn_hidden // tensor)


def uneven(widths: Iterable[Width], multiple: int) -> list[str]:
    """Those that ``multiple`` does not divide, for people."""
    return [f"{width.name} {width.elements}" for width in widths if width.elements % multiple]


def uneven_inputs(dims: ModelDims, layout: ParallelLayout, multiple: int) -> list[str]:
    """The same of what linear layers read on one tensor rank."""
    return uneven((width for width in linear_widths(dims, layout) if width.read), multiple)


def _delayed(case: FP8Case) -> str | None:
    if case.fp8.recipe != "delayed":
        return None
    return (
        "recipe='delayed' is refused: it scales a tensor by its largest values of past passes, and the passes that "
        "only score (log-probs, values) push theirs into that history; take 'blockwise' or 'tensorwise'"
    )


def _dtype(case: FP8Case) -> str | None:
    if case.dtype == "bfloat16":
        return None
    return f"needs model.dtype='bfloat16', which what is not in FP8 stays in, got {case.dtype!r}"


def _layers(case: FP8Case) -> str | None:
    if case.layers != "local":
        return None
    return "needs Transformer Engine's layers: remove model.layers='local'"


def _capability(case: FP8Case) -> str | None:
    if case.gpu is None or case.fp8.recipe == "delayed":
        return None
    found = "no GPU" if case.gpu.capability == (0, 0) else "{}.{}".format(*case.gpu.capability)
    lowest, above, which = _CAPABILITY[case.fp8.recipe]
    if lowest <= case.gpu.capability < above:
        return None
    return f"recipe={case.fp8.recipe!r} needs a GPU of {which}, found {found}; docs/fp8.md says what fits which GPU"


_CAPABILITY = {
    "tensorwise": ((8, 9), (99, 0), "compute capability 8.9 or higher (Ada, Hopper, Blackwell)"),
    # Blackwell emulates it with scales that are powers of two, which engines do not use
    "blockwise": ((9, 0), (10, 0), "compute capability 9.x (Hopper; on Blackwell take mxfp8)"),
    "mxfp8": ((10, 0), (12, 0), "compute capability 10.x or 11.x (data-centre Blackwell)"),
}


def _cuda(case: FP8Case) -> str | None:
    if case.gpu is None or case.gpu.cuda is None or case.gpu.capability == (0, 0):
        return None
    needed = {"blockwise": (12, 9), "mxfp8": (12, 8)}.get(case.fp8.recipe, (12, 1))
    if case.gpu.cuda >= needed:
        return None
    return (
        f"recipe={case.fp8.recipe!r} needs a torch built with CUDA {needed[0]}.{needed[1]} or newer, "
        f"got {case.gpu.cuda[0]}.{case.gpu.cuda[1]}"
    )


def _widths(case: FP8Case) -> str | None:
    if case.dims is None:
        return None
    odd = uneven(linear_widths(case.dims, case.layout), case.fp8.alignment)
    if not odd:
        return None
    return (
        f"recipe={case.fp8.recipe!r} needs widths that are multiples of {case.fp8.alignment} on each tensor rank, got "
        f"{', '.join(odd)} at tensor={case.layout.tensor}; lower layout.tensor, or take a recipe with a smaller "
        "multiple (tensorwise 16, mxfp8 32, blockwise 128)"
    )


def _budget(case: FP8Case) -> str | None:
    multiple, budget = token_multiple(case.layout, case.fp8), case.tokens_per_microbatch * case.layout.context
    if budget % multiple == 0:
        return None
    step = multiple // case.layout.context if multiple % case.layout.context == 0 else multiple
    nearest = max(step, round(case.tokens_per_microbatch / step) * step)
    return (
        f"tokens_per_microbatch must be a multiple of {step}, to which micro-batches are padded, got "
        f"{case.tokens_per_microbatch}; nearest: {nearest}"
    )


def _ends(case: FP8Case) -> str | None:
    kept = case.fp8.layers_kept
    if case.dims is None or kept == 0:
        return None
    most = min(case.dims.layers // case.layout.pipeline, (case.dims.layers - 1) // 2)
    if kept <= most:
        return None
    return (
        f"first_last_layers_bf16 must be at most {most} (a stage's layers, and some must be left to FP8), got {kept} "
        f"of {case.dims.layers} layers on {case.layout.pipeline} stages"
    )


def _sharded(case: FP8Case) -> str | None:
    if not case.fp8.parameters or case.distributed_optimizer:
        return None
    return (
        "parameters=true needs distributed_optimizer=true, which keeps the float32 main weights; got "
        "distributed_optimizer=false"
    )


def _host(case: FP8Case) -> str | None:
    if not case.fp8.parameters or not case.optimizer_on_host:
        return None
    return "parameters=true needs the optimizer on the GPU, which writes FP8 weights: remove optimizer_on_host"


def _mx_parameters(case: FP8Case) -> str | None:
    if not case.fp8.parameters or case.fp8.recipe != "mxfp8":
        return None
    return (
        "parameters=true is not supported with recipe='mxfp8': megatron-core gathers such weights through the buffer "
        "of the gradients, between steps of its own loop; remove parameters"
    )


def _wide(case: FP8Case) -> str | None:
    risky = case.fp8.parameters and case.fp8.recipe == "blockwise" and case.layout.tensor > 2
    if not risky or case.fp8.allow_wide_blockwise_parameters:
        return None
    return (
        f"parameters=true with recipe='blockwise' gives NaN from the second step at tensor > 2 (NeMo-RL issue 1164), "
        f"got tensor={case.layout.tensor}; remove parameters, or set allow_wide_blockwise_parameters=true to try"
    )


def _straddle(case: FP8Case) -> str | None:
    dims = case.dims
    if case.fp8.recipe != "blockwise" or dims is None or dims.latent is not None or dims.head_dim % 128 == 0:
        return None
    return (
        "blocks of 128 rows straddle queries, keys and values, which Megatron interleaves by groups of heads "
        f"{dims.head_dim} wide: the engine, which stacks them, quantises these matrices otherwise, and log-probs "
        "differ more; recipe='tensorwise' has no blocks"
    )


RULES: tuple[Rule, ...] = (
    Rule("delayed", _delayed),
    Rule("dtype", _dtype),
    Rule("layers", _layers),
    Rule("capability", _capability),
    Rule("cuda", _cuda),
    Rule("widths", _widths),
    Rule("tokens", _budget),
    Rule("ends", _ends),
    Rule("parameters are sharded", _sharded),
    Rule("parameters stay on the GPU", _host),
    Rule("no MXFP8 parameters", _mx_parameters),
    Rule("blockwise parameters are narrow", _wide),
    Rule("blocks and heads", _straddle, Severity.WARNING),
)
"""The preconditions of FP8, each with its message; a test has a case for each."""
