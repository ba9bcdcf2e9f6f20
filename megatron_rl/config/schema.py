"""Every setting, its type, its default and its meaning: the only place where a default lives.

Plain frozen dataclasses; :mod:`megatron_rl.config.load` fills and validates them. A section that lacks
``__pydantic_config__`` would accept misspelt keys in silence, which a test forbids. Each section's ``problems()`` says
what its own values contradict; what needs several sections or the files on disk stands in the root's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from megatron_rl.config.limit import Limit
from megatron_rl.config.precision import FP8Case, FP8Config, Gpu, fp8_problems, uneven_inputs
from megatron_rl.layout import ParallelLayout
from megatron_rl.model_dims import ModelDims, read_model_dims, weight_problems

Positive = Annotated[int, Gt(0)]
Count = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
FORBID_UNKNOWN = {"extra": "forbid"}
LOWEST_TEMPERATURE = 0.01
"""That the engine samples at: vLLM raises a lower one that is above 0 to it, and says so in its log alone."""


def nearest_multiple(value: int, of: int) -> int:
    """The multiple of ``of`` nearest to ``value``, at least ``of``."""
    return max(of, round(value / of) * of)


def due(step: int, every: int, steps: int) -> bool:
    """Whether what happens every ``every`` steps (0: only at the end) happens after step number ``step``."""
    return step + 1 == steps or (every > 0 and (step + 1) % every == 0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that training starts from."""

    __pydantic_config__ = FORBID_UNKNOWN

    path: Path
    """A Hugging Face folder: config.json, safetensors, tokenizer.json."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights in training and in the engine; bfloat16 keeps float32 main weights in the optimizer."""
    layers: Literal["auto", "local", "transformer_engine"] = "auto"
    """Whose modules the trainer's layers are made of; ``auto``: Transformer Engine's where it is installed and there is
    a GPU, megatron-core's own elsewhere. Names of weights and checkpoints are the same."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Questions and how they become prompts."""

    __pydantic_config__ = FORBID_UNKNOWN

    train: Path
    """JSON lines with ``question`` and ``answer``; ``id``, where given, is unlike any other; other keys are ignored.
    An answer is what a right response gives and nothing more (docs/rewards.md); one that is not text reaches the reward
    rule as JSON."""
    heldout: Path
    """The same, for evaluation."""
    template: str = "{question}"
    """The prompt; ``{question}`` is replaced. It gets no special tokens but those that are written in it: for a model
    that was pretrained with one before each text, begin with it (of Llama 3 ``<|begin_of_text|>``)."""
    max_prompt_tokens: Positive = 1024
    """Longer prompts are dropped and counted."""

    def problems(self) -> Iterator[str]:
        """What contradicts itself."""
        if "{question}" not in self.template:
            yield f"template must contain {{question}}, got {self.template!r}"

    def missing_files(self) -> Iterator[str]:
        """What is not there."""
        for name, path in (("train", self.train), ("heldout", self.heldout)):
            if not path.is_file():
                yield f"{name}: no such file: {path}"


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How samples are drawn."""

    __pydantic_config__ = FORBID_UNKNOWN

    samples_per_prompt: Positive = 8
    """Responses to each prompt of a step."""
    temperature: PositiveFloat = 1.0
    """At least 0.01. The trainer divides its logits by the same, unless ``trainer_temperature`` says otherwise."""
    trainer_temperature: PositiveFloat | None = None
    """Log-probs in the loss and in the KL are taken at this temperature instead of that of sampling, which makes them
    those of another policy than the one that sampled (the seed recipe samples at 0.6 and trains at 1)."""
    max_response_tokens: Positive = 3000
    """Where a response is cut. Prompt and response together must fit the model's positions."""
    stop: tuple[str, ...] = ()
    """Strings that end a response, besides the model's end-of-sequence tokens; a special token of the tokenizer may be
    one of them. Reward rules do not see the one that ended a response: it is cut off its text."""
    force_eos: bool = False
    """Put an end-of-sequence token where a response has none, and train on it (as the seed recipe does)."""
    sampling_rounds: Count = 0
    """Dynamic sampling (DAPO): prompts whose samples all score the same are dropped and others drawn in their place, in
    at most this many rounds a step; finding too few stops the run. 0 keeps every prompt."""

    def problems(self) -> Iterator[str]:
        """What contradicts itself."""
        if self.temperature < LOWEST_TEMPERATURE:
            yield f"temperature must be at least {LOWEST_TEMPERATURE}, the engine's lowest, got {self.temperature}"
        if "" in self.stop:
            yield f"stop must have no empty string, which no response could end with, got {list(self.stop)}"


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The rule that scores a response."""

    __pydantic_config__ = FORBID_UNKNOWN

    rule: str = "seed"
    """A name from megatron_rl.rewards.rules.RULES, or ``path/to/file.py:callable`` for a rule of your own."""
    workers: Positive = 1
    """Processes of a pool that score at the same time."""
    pools: Count = 0
    """Pools of ``workers`` processes each, spread over the nodes of the cluster; 0: one, beside the driver."""
    timeout_s: PositiveFloat = 5.0
    """CPU seconds per sample; a sample that takes longer is killed and counted as a time-out."""
    wall_timeout_s: PositiveFloat = 60.0
    """Wall seconds per sample, for a rule that waits or a worker that was stopped."""
    start_timeout_s: PositiveFloat = 60.0
    """Wall seconds for a worker to start and to load the rule."""
    memory_gib: NonNegative = 4.0
    """Limit of each worker's address space, in GiB: a sample whose rule fills it is counted as an error. A rule that
    loads a large library may need more. 0: none."""
    max_error_rate: Fraction = 0.25
    """The run stops where the rule fails on a larger share of the samples of one step, all rounds of dynamic sampling
    together, or of one evaluation; time-outs do not count."""
    overlong_buffer: Count = 0
    """Soft over-long penalty (DAPO): over the last so many tokens below ``rollout.max_response_tokens`` the score falls
    by up to 1; evaluation scores without it. 0: none."""

    @property
    def rule_may_be_elsewhere(self) -> bool:
        """Whether the rule is a file which this machine need not have: it runs in pools on nodes that may have it."""
        return self.pools > 0 and ":" in self.rule


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """The algorithm. Formulas and sources stand with the functions in :mod:`megatron_rl.maths`; docs/algorithms.md says
    which settings make which published algorithm.
    """

    __pydantic_config__ = FORBID_UNKNOWN

    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"] = "gae"
    """Where advantages come from. Only ``gae`` has a critic; with the others leave the ``[critic]`` table out."""
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """GAE's lambda."""
    critic_lam: Fraction | None = None
    """Lambda of the critic's targets (VC-PPO); unset: ``lam``."""
    lam_alpha: PositiveFloat | None = None
    """Length-adaptive (VAPO): the policy's lambda is 1 - 1 / (``lam_alpha`` x tokens of the response) in place of
    ``lam``; needs ``critic_lam``. Unset: ``lam``."""
    whiten_advantages: bool | None = None
    """Over all response tokens of the rollout, before it is cut into minibatches. Unset: as published, which is yes for
    ``gae``, ``reinforce_pp`` and ``reinforce_pp_baseline``."""
    kl_coef: NonNegative = 0.01
    """0 keeps no reference at all."""
    kl_kind: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL to the reference (Schulman's k1, k2 and k3); in the loss k2 or k3."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL is charged: each token's reward, or a term of the loss."""
    kl_target: PositiveFloat | None = None
    """Mean KL per response (nats) that an adaptive coefficient aims at; unset keeps ``kl_coef`` fixed."""
    kl_horizon: Positive = 10_000
    """Samples over which the adaptive coefficient moves."""
    loss: Literal["ppo", "gspo", "cispo"] = "ppo"
    """The policy's objective: a ratio per token, one per response, or a bounded weight on the log-prob. Clips do not
    follow from it: set ``gspo``'s."""
    clip_low: PositiveFloat = 0.2
    """How far the ratio may go below 1; 1 sets no bound. GSPO's ratios are far closer to 1, so that the default bounds
    next to nothing there: its paper uses 3e-4."""
    clip_high: PositiveFloat = 0.2
    """How far the ratio may go above 1; GSPO's paper uses 4e-4 (see ``clip_low``)."""
    dual_clip: PositiveFloat | None = None
    """Bound c > 1 on the loss of tokens with a negative advantage; unset: none."""
    value_clip: PositiveFloat = 0.2
    """How far a value may move from what it was before the update; ``inf``: as far as it likes."""
    entropy_coef: NonNegative = 0.0
    """Of the entropy bonus in the loss."""
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens of an optimizer step; or over the tokens of each sample and then over samples; or the same
    with ``rollout.max_response_tokens`` in place of each sample's tokens (Dr. GRPO)."""
    mask_truncated: bool = False
    """Samples that ``rollout.max_response_tokens`` cut are in no loss, policy's or critic's, and in none of its means
    (DAPO's overlong filtering). Their scores count as before in group baselines and whitening. A step of which all
    samples are cut ends the run."""
    engine_correction: Literal["tis", "mis", "icepop"] | None = None
    """What a token counts where trainer and engine differ in its probability: their ratio truncated, or dropped out of
    bounds by one bound or by two. Unset: 1."""
    engine_ratio_level: Literal["token", "sequence"] = "token"
    """One ratio per token, or their product over the response."""
    engine_ratio_low: NonNegative = 0.0
    """``mis`` and ``icepop`` drop ratios below; IcePop's is 0.5."""
    engine_ratio_high: PositiveFloat = 2.0
    """``tis`` truncates ratios above, ``mis`` and ``icepop`` drop them; IcePop's is 5."""
    minibatch_samples: Positive = 128
    """Samples of one optimizer step, before ``mask_truncated``."""
    epochs: Positive = 1
    """Passes over a rollout."""
    critic_warmup_steps: Count = 0
    """First steps in which only the critic learns."""

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained."""
        return self.advantage == "gae"

    @property
    def compares_samples(self) -> bool:
        """Whether a sample's advantage depends on the other samples of its prompt."""
        return self.advantage in {"grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"}

    def policy_learns(self, step: int) -> bool:
        """Whether the policy is updated in a step, counted from 0."""
        return step >= self.critic_warmup_steps

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened."""
        published = self.advantage in {"gae", "reinforce_pp", "reinforce_pp_baseline"}
        return published if self.whiten_advantages is None else self.whiten_advantages

    def problems(self) -> Iterator[str]:
        """What contradicts itself."""
        if self.dual_clip is not None and self.dual_clip <= 1:
            yield f"dual_clip must be above 1, got {self.dual_clip}"
        if self.clip_low > 1:
            yield f"clip_low must be at most 1, got {self.clip_low}"
        yield from self._kl_problems()
        yield from self._advantage_problems()
        yield from self._loss_problems()
        yield from self._correction_problems()

    def _kl_problems(self) -> Iterator[str]:
        if self.kl_coef == 0:
            why = "has no effect with kl_coef=0, which keeps no reference"
            yield from self._idle(why, "kl_kind", "kl_in", "kl_target", "kl_horizon")
            return
        if self.kl_target is None:
            yield from (
                f"{name} has no effect without kl_target: set that or remove this"
                for name in self._changed("kl_horizon")
            )
        if self.kl_in == "loss" and self.kl_kind == "k1":
            yield (
                "kl_kind must be 'k2' or 'k3' with kl_in='loss': the gradient of k1 does not depend on the "
                "reference; got 'k1'"
            )
        if self.kl_in == "loss" and self.kl_target is not None:
            yield "kl_target adapts the KL in the reward; with kl_in='loss' leave it unset"

    def _advantage_problems(self) -> Iterator[str]:
        if self.lam_alpha is not None and self.critic_lam is None:
            yield "lam_alpha replaces lam for the policy alone: set critic_lam as well (VAPO's is 1.0)"
        if self.lam_alpha is not None and self.critic_lam is not None:
            yield from self._idle("has no effect with lam_alpha, the policy's, and critic_lam, the critic's", "lam")
        if not self.has_critic:
            why = f"speaks of a critic, which advantage={self.advantage!r} has not"
            yield from self._idle(why, "lam", "critic_lam", "lam_alpha", "value_clip", "critic_warmup_steps")
        if self.compares_samples and self.gamma != 1:
            yield f"gamma must be 1 with advantage={self.advantage!r}, which scores whole responses, got {self.gamma}"
        if self.advantage.startswith("reinforce_pp") and not self.whitens:
            yield f"whiten_advantages must not be false with advantage={self.advantage!r}: remove it"

    def _loss_problems(self) -> Iterator[str]:
        if self.loss != "ppo" and self.dual_clip is not None:
            yield f"dual_clip bounds loss='ppo' alone: remove it with loss={self.loss!r}"
        if self.loss == "gspo" and self.loss_mean != "sequence":
            yield (
                f"loss_mean must be 'sequence' with loss='gspo', whose objective is a mean over responses, "
                f"got {self.loss_mean!r}"
            )
        if self.advantage == "dr_grpo" and self.loss_mean == "sequence" and self.loss != "gspo":
            yield (
                "loss_mean='sequence' divides by each response's length, the bias that advantage='dr_grpo' is to "
                "remove: set loss_mean='constant', or advantage='grpo'"
            )

    def _correction_problems(self) -> Iterator[str]:
        kind, low, high = self.engine_correction, self.engine_ratio_low, self.engine_ratio_high
        if kind is None:
            yield from (
                f"{name} has no effect without engine_correction: set that or remove this"
                for name in self._changed("engine_ratio_level", "engine_ratio_low", "engine_ratio_high")
            )
        elif not low < 1 < high:
            yield f"engine_ratio_low < 1 < engine_ratio_high must hold (1: no gap), got {low} and {high}"
        if kind == "tis" and low > 0:
            yield f"engine_ratio_low has no effect with engine_correction='tis': remove it, or take 'mis', got {low}"
        if kind == "icepop" and low == 0:
            yield "engine_ratio_low must be above 0 with engine_correction='icepop', which drops on both sides, got 0.0"
        if kind == "icepop" and self.engine_ratio_level == "sequence":
            yield "engine_ratio_level must be 'token' with engine_correction='icepop'; 'mis' has both, got 'sequence'"

    def _idle(self, why: str, *names: str) -> Iterator[str]:
        """A problem for each of the settings that differ from their default; over a file that sets one, only setting
        it again helps.
        """
        defaults = {f.name: "none" if f.default is None else f.default for f in fields(self)}
        return (f"{name} {why}: remove it, or set {name}={defaults[name]}" for name in self._changed(*names))

    def _changed(self, *names: str) -> Iterator[str]:
        """Those of the settings that differ from their default."""
        return (f.name for f in fields(self) if f.name in names and getattr(self, f.name) != f.default)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam with a warm-up and a cosine to a floor."""

    __pydantic_config__ = FORBID_UNKNOWN

    lr: NonNegative
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegative = 0.0
    clip_grad: PositiveFloat = 1.0
    """Bound on the global L2 norm of the gradient."""
    warmup_fraction: Fraction = 0.03
    """Share of all updates with a linear warm-up (at least one update when above 0)."""
    min_lr_fraction: Fraction = 0.1
    """The cosine ends at this share of ``lr``; 1 keeps it constant."""
    warmup_from_zero: bool = False
    """The schedule begins one update later, a warm-up with a rate of 0: that of transformers, which the seed has."""
    schedule_updates: Positive | None = None
    """Updates over which warm-up and cosine are spread, where a run is meant to end before its schedule does. Unset:
    all updates of the run."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How one model is trained: its layout, its optimizer, its memory."""

    __pydantic_config__ = FORBID_UNKNOWN

    optimizer: OptimizerConfig
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    tokens_per_microbatch: Positive = 8192
    """Rows are packed up to this many tokens; a longer row makes a micro-batch of its own."""
    distributed_optimizer: bool = False
    """Shard optimizer states over data-parallel ranks."""
    overlap_communication: bool = False
    """Reduce gradients (and gather parameters, with the distributed optimizer) while other layers compute."""
    optimizer_on_host: bool = False
    """Keep optimizer states (main weights and both moments) in host memory and compute Adam's step there: slower, and
    saves 12 bytes of GPU memory per parameter, shared by the replicas. Needs ``distributed_optimizer``."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of kept: those of attention, or of whole layers."""
    fp8: FP8Config | None = None
    """Train in FP8, where there is a table ``fp8``; without one in ``model.dtype``."""
    fake_quantization: Literal["none", "fp8_per_channel", "fp8_per_tensor", "fp8_per_block"] = "none"
    """Linear layers compute with what 8 bits keep of weights and inputs, as the engine's quantisation of this name
    does, and learn through it (docs/quantization.md); weights are saved and pushed unrounded."""
    value_head_std: NonNegative = 0.0
    """Standard deviation of a new value head's weights, of a critic alone: its first values are noise, as the seed's
    are with ``1 / sqrt(hidden + 1)``. 0: its first values are 0."""
    logprob_kernel: Literal["auto", "torch"] = "auto"
    """What log-probs and entropies are computed with, from hidden states: Triton kernels where there are a GPU and
    Triton (``auto``), or torch in any case. The numbers are the same but for rounding."""

    @property
    def rounds(self) -> bool:
        """Whether linears score in FP8, or as if."""
        in_fp8 = self.fp8 is not None and (self.fp8.logprobs or self.fp8.parameters)
        return in_fp8 or self.fake_quantization != "none"

    def fp8_case(self, model: ModelConfig, dims: ModelDims | None, gpu: Gpu | None = None) -> FP8Case | None:
        """What the rules of FP8 look at; None without FP8."""
        if self.fp8 is None:
            return None
        return FP8Case(
            fp8=self.fp8,
            layout=self.layout,
            dtype=model.dtype,
            layers=model.layers,
            distributed_optimizer=self.distributed_optimizer,
            optimizer_on_host=self.optimizer_on_host,
            tokens_per_microbatch=self.tokens_per_microbatch,
            dims=dims,
            gpu=gpu,
        )

    def problems(self) -> Iterator[str]:
        """What contradicts itself."""
        if self.optimizer_on_host and not self.distributed_optimizer:
            yield (
                "optimizer_on_host needs distributed_optimizer=true (also with one replica): megatron-core takes no "
                "other optimizer's states to the host; got distributed_optimizer=false"
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The vLLM engines."""

    __pydantic_config__ = FORBID_UNKNOWN

    count: Positive = 1
    """Engines that share the prompts of a step; one push serves all."""
    tensor: Positive = 1
    """Tensor-parallel workers of each engine: a GPU each, or on a CPU a process."""
    kv_cache_mib: Positive = 4096
    """Memory for keys and values, in MiB; fixed, so that it never depends on what else runs."""
    max_concurrent: Positive = 256
    """Sequences generated at the same time."""
    quantization: Literal["none", "fp8_per_channel", "fp8_per_tensor", "fp8_per_block"] = "none"
    """FP8 (e4m3) for the layers' linears, with a scale per output row, tensor or 128 x 128 block; ``sync.quantised_by``
    says who quantises. The rest is bfloat16 then, whatever ``model.dtype`` says. A CPU has ``fp8_per_channel``."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Of keys and values: that of the engine's weights, or FP8 (e4m3, unscaled), half of bfloat16's memory."""
    eager: bool = False
    """Run the model as it is written, not compiled: slower, but its layers can be watched, so that the parity gate can
    say where an engine differs. On a CPU it always runs so."""
    restarts: Count = 0
    """How often each engine that died is started anew, given the weights and has its unfinished prompts drawn again
    with the same seeds; 0: its death ends the run."""

    @property
    def quantised(self) -> bool:
        """Whether linears are in FP8."""
        return self.quantization != "none"

    @property
    def rounds(self) -> bool:
        """Whether the engine computes in fewer bits than the trainer."""
        return self.quantised or self.kv_cache_dtype != "auto"

    def dtype(self, model_dtype: str) -> str:
        """Type of what is not quantised, for a model of this type."""
        return "bfloat16" if self.quantised else model_dtype

    def cache_dtype(self, model_dtype: str) -> str:
        """Type of keys and values, for a model of this type."""
        return self.kv_cache_dtype if self.kv_cache_dtype != "auto" else self.dtype(model_dtype)

    def cache_problems(self, dims: ModelDims, model_dtype: str, tokens: int, *, on_cpu: bool) -> Iterator[str]:
        """Whether the cache holds one sequence of so many tokens, without which vLLM does not start.

        Source: ``get_kv_cache_configs`` in ``vllm/v1/core/kv_cache_utils.py``: whole blocks, and one that stays empty.
        Blocks have 128 tokens on a CPU but for latent attention, else 16 or more.
        """
        block = 128 if on_cpu and dims.latent is None else 16
        size = {"float32": 4, "bfloat16": 2, "fp8": 1}[self.cache_dtype(model_dtype)]
        needed = (-(-tokens // block) + 1) * block * dims.cached_width(self.tensor) * size
        if needed > self.kv_cache_mib << 20:
            yield (
                f"engine.kv_cache_mib: must hold one sequence of {tokens:,} tokens, at least {-(-needed >> 20)}, "
                f"got {self.kv_cache_mib}"
            )

    def machine_problems(self, gpu: Gpu, *, wide_vectors: bool = True) -> Iterator[str]:
        """What an engine cannot do with this GPU, or without one, on a CPU with AVX-512 or AMX or without."""
        return self.cpu_problems(wide_vectors) if gpu.capability == (0, 0) else self.gpu_problems(gpu)

    def cpu_problems(self, wide_vectors: bool) -> Iterator[str]:
        """What an engine without a GPU cannot do, on a CPU with AVX-512 or AMX or without."""
        if self.kv_cache_dtype == "fp8" and not wide_vectors:
            yield (
                "engine.kv_cache_dtype: without a GPU vLLM keeps keys and values in 'fp8' on CPUs with AVX-512 or AMX "
                "alone; this one has neither: set 'auto'"
            )
        if self.quantization not in {"none", "fp8_per_channel"}:
            yield (
                f"engine.quantization: without a GPU vLLM has no kernel for {self.quantization!r}: "
                "choose 'fp8_per_channel' or 'none'"
            )

    def block_problems(self, dims: ModelDims) -> Iterator[str]:
        """Whether 128 divides the inputs of each linear on an engine's worker, as blocks need it.

        Source: ``per_token_group_quant_fp8`` in ``vllm/model_executor/layers/quantization/utils/fp8_utils.py``.
        """
        if self.quantization != "fp8_per_block":
            return
        if odd := uneven_inputs(dims, ParallelLayout(tensor=self.tensor), 128):
            yield (
                "engine.quantization: 'fp8_per_block' needs inputs of linears that are multiples of 128 on each engine "
                f"worker, got {', '.join(odd)} at engine.tensor={self.tensor}; lower engine.tensor, or set "
                "'fp8_per_channel'"
            )

    def gpu_problems(self, gpu: Gpu) -> Iterator[str]:
        """What an engine on such a GPU cannot do."""
        lowest, which = (8, 9), "8.9 or higher (Ada, Hopper, Blackwell)"
        if self.quantization == "fp8_per_block":  # on Ada vLLM takes Marlin, which leaves inputs as they are
            lowest, which = (9, 0), "9.0 or higher (Hopper, Blackwell)"
        if self.quantised and gpu.capability < lowest:
            found, other = "{}.{}".format(*gpu.capability), "'fp8_per_channel' or " if gpu.capability >= (8, 9) else ""
            yield (
                f"engine.quantization: {self.quantization!r} needs a GPU of compute capability {which}, found {found}: "
                f"set {other}'none'"
            )
        if self.kv_cache_dtype == "fp8" and gpu.capability < (8, 0):
            yield (
                "engine.kv_cache_dtype: 'fp8' needs a GPU of compute capability 8.0 or higher (below 8.9 vLLM reads it "
                f"with FlashInfer alone), found {gpu.capability[0]}.{gpu.capability[1]}: set 'auto'"
            )


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """Trainer -> engine."""

    __pydantic_config__ = FORBID_UNKNOWN

    probe_tolerance: PositiveFloat | None = None
    """In a push, trainer and engine score the same fixed tokens; a larger mean log-prob difference (nats) fails. Unset:
    1e-3 with ``model.dtype="float32"``, 0.05 with ``"bfloat16"``, 0.45 where policy or engine computes in FP8."""
    quantised_by: Literal["engine", "trainer"] = "engine"
    """Who quantises, where ``engine.quantization`` asks for it: the engine what it is sent, or the policy's rank 0 what
    it sends, which is half of bfloat16's bytes then. What the engine computes with is the same."""
    bucket_mib: Positive = 32
    """Weights travel in buckets of this size, in MiB; two are under way at a time. On one host they lie in /dev/shm."""
    bucket_deadline_s: PositiveFloat = 120.0
    """For one worker to give or take a bucket; which worker and tensor it was is told."""
    phase_deadline_s: PositiveFloat = 600.0
    """For each phase of a push (drain, start, transfer, finish, reset_cache, commit); longer than that of a bucket."""

    def problems(self) -> Iterator[str]:
        """What contradicts itself."""
        if self.phase_deadline_s <= self.bucket_deadline_s:
            yield (
                f"phase_deadline_s must be longer than bucket_deadline_s={self.bucket_deadline_s:g}, which tells more, "
                f"got {self.phase_deadline_s:g}"
            )

    def tolerance(self, dtype: str, *, rounded: bool) -> float:
        """The mean difference allowed at the probe with weights of this type; ``rounded``: one side computes in FP8."""
        return self.probe_tolerance or (0.45 if rounded else {"float32": 1e-3, "bfloat16": 0.05}[dtype])


@dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """Hugging Face, the trainer and the engine score the same tokens, and must agree (docs/parity.md)."""

    __pydantic_config__ = FORBID_UNKNOWN

    enabled: bool = True
    """Check before the first step of ``train``; a failure ends the run. ``check-parity`` checks in any case."""
    on_resume: bool = False
    """Check also where a run goes on from a checkpoint, whose ``hf/`` is then the reference."""
    reference_max_parameters: Count = 2_000_000_000
    """Larger models are not compared with Hugging Face, which is told: its float32 copy on the CPU of the driver's
    machine takes 4 bytes for each."""
    rows: Positive = 8
    """Rows that are scored: pieces of the held-out prompts, and one over the whole vocabulary."""
    row_tokens: Annotated[int, Ge(2)] = 64
    """Tokens of the longest row; the others are shorter."""
    mean_tolerance: PositiveFloat | None = None
    """Largest mean absolute difference per token that is allowed, in nats (of values: in their unit). Unset: 1e-4 with
    ``model.dtype="float32"``, 0.05 with ``"bfloat16"``."""
    max_tolerance: PositiveFloat | None = None
    """The same at the worst token. Unset: 2e-3 and 1.5."""
    fp8_mean_tolerance: PositiveFloat = 0.45
    """In place of ``mean_tolerance`` where one of the two computes in FP8 (a trainer with ``fp8`` or
    ``fake_quantization``, an engine with ``quantization`` or an FP8 cache)."""
    fp8_max_tolerance: PositiveFloat = 4.0
    """The same at the worst token."""

    def tolerance(self, dtype: str) -> tuple[float, float]:
        """The mean and the largest difference allowed with weights of this type."""
        mean, largest = {"float32": (1e-4, 2e-3), "bfloat16": (0.05, 1.5)}[dtype]
        return self.mean_tolerance or mean, self.max_tolerance or largest


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Answers to held-out prompts, at the start, after the last step and in between."""

    __pydantic_config__ = FORBID_UNKNOWN

    every: Count = 0
    """Steps between evaluations; 0: none between the first and the last."""
    at_start: bool = True
    """Before the first step, of a run that goes on from a checkpoint as well."""
    prompts: Positive = 512
    """The first so many of ``data.heldout``."""
    samples: Positive = 1
    """Responses to each; accuracy and score are means over all of them (avg@n)."""
    temperature: NonNegative = 0.0
    """0: greedy; else at least 0.01."""

    def problems(self) -> Iterator[str]:
        """What contradicts itself."""
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            yield (
                f"temperature must be 0 (greedy) or at least {LOWEST_TEMPERATURE}, the engine's lowest, got "
                f"{self.temperature}"
            )
        if self.samples > 1 and self.temperature == 0:
            yield f"samples must be 1 with temperature=0, whose answers are all alike, got {self.samples}"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run."""

    __pydantic_config__ = FORBID_UNKNOWN

    every: Count = 0
    """Steps between checkpoints; 0: only after the last step."""
    keep: Positive = 2
    """Newest checkpoints that are kept; of older ones, what ``keep_weights`` says, and no more."""
    keep_weights: Count = 0
    """Of so many older ones the Hugging Face folder stays, for evaluation; no run goes on from there. The one with the
    best held-out accuracy is among them, where it was evaluated in the step that saved it; the others are the newest.
    In bfloat16 a folder is an eighth of a checkpoint, or with a critic a fifteenth. 0: none."""
    asynchronous: bool = True
    """Training goes on while files are written, at the price of a copy of the training state in host memory."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Ray and the machine."""

    __pydantic_config__ = FORBID_UNKNOWN

    address: str | None = None
    """Of a running Ray cluster; unset starts one on this machine, on loopback, with a token of its own."""
    allow_open_cluster: bool = False
    """Join a cluster that asks for no token (anyone who reaches it can run code on it)."""
    device: Literal["a100-80g", "h100", "h200", "b200", "cpu"] | None = None
    """What the recipe is laid out for: ``plan`` and ``scale`` take its figures unless told otherwise, ``doctor`` says
    where a node has another GPU; training does not ask. Unset: they take ``h100``."""
    gpus_per_node: Positive = 8
    """The same of how many a node has, for ``plan`` and ``scale``."""
    cpus_per_worker: PositiveFloat = 0.4
    """CPUs reserved for each training rank and engine where there is no GPU."""
    colocate: bool = False
    """Rank i of policy and critic and engine i share a device and take turns: what does not compute lies in host
    memory. False: each has a device of its own. The reference is always with the policy."""
    start_deadline_s: PositiveFloat = 600.0
    """For nodes to join, and for a worker to start and load its model."""
    call_deadline_s: PositiveFloat = 1800.0
    """For any single piece of work: generating a rollout, log-probs, one update, a save. It counts from the end of the
    work before it. ``plan`` holds it against what is predicted; one that takes more than half of it is told."""

    @property
    def start_limit(self) -> Limit:
        """On starting."""
        return Limit(self.start_deadline_s, "cluster.start_deadline_s")

    @property
    def call_limit(self) -> Limit:
        """On a piece of work."""
        return Limit(self.call_deadline_s, "cluster.call_deadline_s")

    @property
    def planned_device(self) -> str:
        """What a plan takes unless told otherwise."""
        return self.device or "h100"


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where metrics go besides the console and ``metrics.jsonl``, and what there is to read."""

    __pydantic_config__ = FORBID_UNKNOWN

    tensorboard: bool = True
    """Event files in ``run_dir/tensorboard``."""
    samples: Positive = 4
    """Prompts of each step of which the first response is put into ``samples.jsonl``."""
    wandb_project: str | None = None
    """A W&B project to send metrics and settings to (needs the package wandb); W&B's own environment variables say the
    rest."""

    def missing_packages(self) -> Iterator[str]:
        """What is not installed here."""
        if self.wandb_project is not None and find_spec("wandb") is None:
            yield f"wandb_project: needs the package wandb, which is not installed, got {self.wandb_project!r}"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A reinforcement-learning run."""

    __pydantic_config__ = FORBID_UNKNOWN

    run_dir: Path
    """Everything that the run writes goes here."""
    steps: Positive
    """Of the loop: a rollout, its updates, a push."""
    prompts_per_step: Positive
    """Prompts of a rollout, each with ``rollout.samples_per_prompt`` samples."""
    model: ModelConfig
    data: DataConfig
    policy: TrainerConfig
    critic: TrainerConfig | None = None
    """Required by ``ppo.advantage = "gae"``, refused by the others."""
    seed: Count = 0
    """Of the order of prompts and minibatches and of every sample; the same numbers on the same machine."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def trainer_temperature(self) -> float:
        """What the policy's logits are divided by in training."""
        chosen = self.rollout.trainer_temperature
        return self.rollout.temperature if chosen is None else chosen

    @property
    def samples_per_step(self) -> int:
        """Samples of one rollout."""
        return self.prompts_per_step * self.rollout.samples_per_prompt

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of one step of the loop, for each model."""
        return self.samples_per_step // self.ppo.minibatch_samples * self.ppo.epochs

    @property
    def trainers(self) -> dict[str, TrainerConfig]:
        """The models that are trained, by role."""
        return {"policy": self.policy} if self.critic is None else {"policy": self.policy, "critic": self.critic}

    @property
    def devices(self) -> int:
        """That the models take: all of each, or as many as the largest where they share them."""
        of_roles = [trainer.layout.world_size for trainer in self.trainers.values()]
        of_roles.append(self.engine.count * self.engine.tensor)
        return max(of_roles) if self.cluster.colocate else sum(of_roles)

    def _algorithm_problems(self) -> Iterator[str]:
        advantage, samples = self.ppo.advantage, self.rollout.samples_per_prompt
        if self.ppo.kl_target is not None and self.samples_per_step >= 5 * self.ppo.kl_horizon:
            yield (
                "ppo.kl_horizon: must be above a fifth of the samples of a step, else one step can turn the "
                f"coefficient to 0 or below; got {self.ppo.kl_horizon} for {self.samples_per_step} samples"
            )
        if self.ppo.has_critic and self.critic is None:
            yield (
                f"critic: required with ppo.advantage={advantage!r}, not set; add a [critic] table, "
                "or choose an advantage without a critic"
            )
        if not self.ppo.has_critic and self.critic is not None:
            yield f"critic: ppo.advantage={advantage!r} trains no critic: remove the [critic] table, or set critic=none"
        if samples < 2 and self.ppo.compares_samples:
            yield (
                f"rollout.samples_per_prompt: ppo.advantage={advantage!r} compares the samples of a prompt and needs "
                f"at least 2, got {samples}"
            )
        if samples < 2 and self.rollout.sampling_rounds:
            yield (
                "rollout.sampling_rounds: dynamic sampling keeps prompts whose samples differ in score and needs "
                f"rollout.samples_per_prompt of at least 2, got {samples}"
            )
        if self.reward.overlong_buffer > self.rollout.max_response_tokens:
            yield (
                f"reward.overlong_buffer: must be at most rollout.max_response_tokens="
                f"{self.rollout.max_response_tokens}, got {self.reward.overlong_buffer}"
            )

    def _colocation_problems(self) -> Iterator[str]:
        for role, trainer in self.trainers.items():
            if self.cluster.colocate and trainer.fp8 is not None and trainer.fp8.parameters:
                yield (
                    f"{role}.fp8.parameters: must be false with cluster.colocate=true: weights in FP8 cannot be moved "
                    "to host memory, got true"
                )
        if self.cluster.colocate and self.engine.tensor > 1:
            yield (
                "engine.tensor: must be 1 with cluster.colocate=true, where an engine shares the one GPU of a rank, "
                f"got {self.engine.tensor}; set engine.count instead"
            )
        if self.cluster.colocate and self.engine.restarts:
            yield (
                "engine.restarts: must be 0 with cluster.colocate=true: a new engine needs the weights of a policy "
                f"that is in host memory then, got {self.engine.restarts}"
            )

    @property
    def pushed_format(self) -> str | None:
        """What the trainer quantises the weights of linears to before it pushes them; None: nothing."""
        by_trainer = self.sync.quantised_by == "trainer" and self.engine.quantised
        return self.engine.quantization if by_trainer else None

    def _quantised_push_problems(self, dims: ModelDims | None) -> Iterator[str]:
        if self.sync.quantised_by == "trainer" and not self.engine.quantised:
            yield (
                "sync.quantised_by: 'trainer' needs engine.quantization, the format to quantise to, got "
                f"{self.engine.quantization!r}"
            )
        if dims is None or dims.latent is not None or self.pushed_format != "fp8_per_block":
            return
        # queries and the feed-forward block have as many rows as others have inputs, see EngineConfig.block_problems
        workers = self.engine.tensor
        if (rows := max(1, dims.kv_heads // workers) * dims.head_dim) % 128:
            yield (
                "sync.quantised_by: with 'trainer' vLLM takes 'fp8_per_block' only where 128 divides the rows of keys "
                f"that each engine worker has, got {rows} at engine.tensor={workers}; set 'engine', or lower "
                "engine.tensor"
            )

    def problems(self) -> Iterator[str]:
        """What the sections contradict in each other, in the model and on the disk; each line starts with its key."""
        yield from _folder_problems(self.run_dir)
        yield from (f"logging: {problem}" for problem in self.logging.missing_packages())
        yield from (f"data: {problem}" for problem in self.data.missing_files())
        dims, found = model_problems(self.model.path, {})
        yield from found
        yield from self.contradictions(dims)

    def contradictions(self, dims: ModelDims | None, gpu: Gpu | None = None) -> Iterator[str]:
        """The same without the disk.

        Args:
            dims: of the model; None: not known, what needs it is not looked at.
            gpu: that trains and rolls out; None: not known.
        """
        yield from (f"data: {problem}" for problem in self.data.problems())
        yield from (f"rollout: {problem}" for problem in self.rollout.problems())
        yield from (f"ppo: {problem}" for problem in self.ppo.problems())
        yield from (f"sync: {problem}" for problem in self.sync.problems())
        yield from (f"evaluation: {problem}" for problem in self.evaluation.problems())
        samples, minibatch = self.samples_per_step, self.ppo.minibatch_samples
        if samples % minibatch:
            nearest = min((d for d in range(1, samples + 1) if samples % d == 0), key=lambda d: abs(d - minibatch))
            yield (
                f"ppo.minibatch_samples: must divide the {samples} samples of a step "
                f"({self.prompts_per_step} prompts x {self.rollout.samples_per_prompt}), got {minibatch}; "
                f"nearest: {nearest}"
            )
        yield from self._algorithm_problems()
        yield from self._colocation_problems()
        for role, trainer in self.trainers.items():
            yield from (f"{role}: {problem}" for problem in trainer.problems())
            data = trainer.layout.data
            if minibatch < data:
                yield (
                    f"{role}.layout.data: {data} replicas need at least as many samples in a minibatch, got {minibatch}"
                )
            if dims is not None:
                yield from (f"{role}.layout: {problem}" for problem in dims.layout_problems(trainer.layout))
            yield from _fp8_problems(role, trainer.fp8_case(self.model, dims, gpu))
        yield from fake_quantization_problems(dims, self.trainers)
        yield from _value_head_problems(self.trainers)
        if dims is not None:
            yield from (f"engine.tensor: {problem}" for problem in dims.engine_problems(self.engine.tensor))
        if dims is not None and self.engine.quantised and (dims.experts or dims.latent) is not None:
            yield (
                f"engine.quantization: FP8 engines are for models without experts and latent attention, which "
                f"{dims.architecture} has: set 'none', got {self.engine.quantization!r}"
            )
        elif dims is not None:
            yield from self.engine.block_problems(dims)
        if gpu is not None:
            yield from self.engine.machine_problems(gpu)
        yield from self._quantised_push_problems(dims)
        asked = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        if dims is not None and asked > dims.max_positions:
            yield (
                f"rollout.max_response_tokens: prompt ({self.data.max_prompt_tokens}) plus response "
                f"({self.rollout.max_response_tokens}) must fit the model's {dims.max_positions} positions, "
                f"got {asked}; largest: {max(1, dims.max_positions - self.data.max_prompt_tokens)}"
            )
        elif dims is not None:
            on_cpu = self.cluster.device == "cpu" if gpu is None else gpu.capability == (0, 0)
            yield from self.engine.cache_problems(dims, self.model.dtype, asked, on_cpu=on_cpu)


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """A supervised stage: next-token loss on the responses of (prompt, response) pairs."""

    __pydantic_config__ = FORBID_UNKNOWN

    run_dir: Path
    output: Path
    """Folder of the resulting Hugging Face model."""
    model: ModelConfig
    data: Path
    """JSON lines with ``prompt`` and ``response``; the model's end-of-sequence token is added, and no other special
    token: one that the model wants before a text stands in the prompt. Read in file order."""
    steps: Positive
    samples_per_step: Positive
    trainer: TrainerConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def trainers(self) -> dict[str, TrainerConfig]:
        """The one model that is trained, by role."""
        return {"trainer": self.trainer}

    @property
    def devices(self) -> int:
        """That the model takes."""
        return self.trainer.layout.world_size

    def problems(self) -> Iterator[str]:
        """What the sections contradict in each other, in the model and on the disk; each line starts with its key."""
        yield from _folder_problems(self.run_dir)
        yield from (f"logging: {problem}" for problem in self.logging.missing_packages())
        if not self.data.is_file():
            yield f"data: no such file: {self.data}"
        dims, found = model_problems(self.model.path, {})
        yield from found
        yield from self.contradictions(dims)

    def contradictions(self, dims: ModelDims | None, gpu: Gpu | None = None) -> Iterator[str]:
        """The same without the disk; arguments as :meth:`RunConfig.contradictions`."""
        yield from (f"trainer: {problem}" for problem in self.trainer.problems())
        if self.samples_per_step < self.trainer.layout.data:
            yield (
                f"trainer.layout.data: {self.trainer.layout.data} replicas need at least as many samples a step, got "
                f"samples_per_step={self.samples_per_step}"
            )
        if dims is not None:
            yield from (f"trainer.layout: {problem}" for problem in dims.layout_problems(self.trainer.layout))
        yield from _fp8_problems("trainer", self.trainer.fp8_case(self.model, dims, gpu))
        yield from fake_quantization_problems(dims, self.trainers)
        yield from _value_head_problems(self.trainers)
        if self.cluster.colocate:
            yield "cluster.colocate: must be false, a supervised stage has one model and nothing to share a device with"
        if self.trainer.fp8 is not None and not self.trainer.fp8.logprobs:
            yield "trainer.fp8.logprobs: must be true, a supervised stage scores nothing but what it learns, got false"
        if self.logging.samples != LoggingConfig().samples:
            yield f"logging.samples: a supervised stage draws none, remove it, got {self.logging.samples}"


def _folder_problems(run_dir: Path) -> Iterator[str]:
    there = next((place for place in (run_dir, *run_dir.parents) if place.exists()), None)
    if there is not None and not there.is_dir():
        yield f"run_dir: must be a folder, {there} is a file"


def _value_head_problems(trainers: dict[str, TrainerConfig]) -> Iterator[str]:
    for role, trainer in trainers.items():
        if role != "critic" and trainer.value_head_std:
            yield f"{role}.value_head_std: must be 0, only a critic has a value head, got {trainer.value_head_std:g}"


def _fp8_problems(role: str, case: FP8Case | None) -> list[str]:
    return [] if case is None else [f"{role}.fp8: {problem}" for problem in fp8_problems(case)]


def fake_quantization_problems(dims: ModelDims | None, trainers: dict[str, TrainerConfig]) -> Iterator[str]:
    """Why models cannot be trained as asked by ``fake_quantization``; each line starts with its key."""
    for role, trainer in trainers.items():
        kind, ranks = trainer.fake_quantization, trainer.layout.tensor
        if kind != "none" and trainer.fp8 is not None:
            yield f"{role}.fake_quantization: must be 'none' with {role}.fp8, which is FP8 itself, got {kind!r}"
        if dims is None or kind == "none":
            continue
        if dims.experts is not None or dims.latent is not None:
            yield f"{role}.fake_quantization: must be 'none' with experts or latent attention, got {kind!r}"
        elif kind == "fp8_per_block" and ranks > 1 and (dims.head_dim % 128 or dims.ffn_hidden // ranks % 128):
            yield (
                f"{role}.fake_quantization: 'fp8_per_block' with layout.tensor={ranks} needs blocks of 128 within "
                f"heads and ranks, got head_dim={dims.head_dim} and {dims.ffn_hidden // ranks} feed-forward columns a "
                "rank; use layout.tensor=1 or 'fp8_per_channel'"
            )


def model_problems(path: Path, layouts: dict[str, ParallelLayout]) -> tuple[ModelDims | None, list[str]]:
    """The model's sizes, if they can be read, and why it cannot be used or laid out as asked."""
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            hint = "" if path.is_dir() else "; a model of the Hub is fetched first: hf download NAME --local-dir FOLDER"
            return None, [f"model.path: no {name} in {path}{hint}"]
    try:
        dims = read_model_dims(path)
    except ValueError as error:
        return None, [f"model.path: {error}"]
    found = [f"model.path: {problem}" for problem in weight_problems(path)]
    found += [f"{role}.layout: {p}" for role, layout in layouts.items() for p in dims.layout_problems(layout)]
    return dims, found
