"""The sizes of a model, read from a Hugging Face ``config.json`` without loading torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rl.layout import ParallelLayout
from megatron_rl.rope_scaling import RopeScaling, latent_rope_problems, read_rope, read_theta


class UnknownArchitecture(ValueError):
    """The model's architecture has no weight map here."""


@dataclass(frozen=True, kw_only=True)
class ExpertDims:
    """Sizes and switches of the layers with experts."""

    count: int
    """Routed experts of a layer."""
    per_token: int
    ffn_hidden: int
    """Of each routed expert."""
    shared_ffn_hidden: int
    """Of the expert that sees every token; 0: none."""
    shared_gate: bool
    """Whether a sigmoid of the hidden state scales the shared expert."""
    normalise: bool
    """Whether the weights of a token's experts add up to 1 (before ``scale``)."""
    sigmoid: bool
    """Scores are sigmoids; else a softmax."""
    bias: bool
    """Whether a bias per expert takes part in choosing experts, not in weighing them."""
    scale: float
    """Factor on the weights."""
    groups: int
    """Experts are chosen from the best ``groups_per_token`` of so many groups; 1: from all."""
    groups_per_token: int
    layers: tuple[int, ...]
    """Those that have experts; the others have one feed-forward block."""


@dataclass(frozen=True, kw_only=True)
class LatentDims:
    """Sizes of multi-head latent attention (DeepSeek-V2, 2024, section 2.1); widths in elements."""

    query_rank: int | None
    """None: queries are projected straight."""
    kv_rank: int
    plain_head_dim: int
    """Part of queries and keys without positions."""
    rotary_head_dim: int
    value_head_dim: int


@dataclass(frozen=True, kw_only=True)
class ModelDims:
    """Sizes and switches of a decoder-only transformer. Lengths in tokens, widths in elements."""

    architecture: str
    """The Hugging Face class name, such as ``Qwen2ForCausalLM``: the key of the weight map's family."""
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    """The longest row: a sliding window ends it, since attention here sees all of a row."""
    tied_embeddings: bool
    qkv_bias: bool
    projection_bias: bool
    """Of attention's output."""
    mlp_bias: bool
    qk_norm: bool
    norm_eps: float
    rope_theta: float
    eos_ids: tuple[int, ...]
    pad_id: int
    rope_scaling: RopeScaling | None = None
    experts: ExpertDims | None = None
    latent: LatentDims | None = None
    further_layers: int = 0
    """Behind the last layer, to predict more than the next token: in files alone, nobody here computes them."""

    @property
    def group_rows(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values in one query group of the fused matrix."""
        return self.heads // self.kv_heads * self.head_dim, self.head_dim, self.head_dim

    def layout_problems(self, layout: ParallelLayout) -> list[str]:
        """Why this model cannot be laid out so, one sentence each with the nearest legal values; empty when it can."""
        found = layout.problems()
        if not layout.positive:
            return found
        if not self._shares_heads(layout.tensor):
            legal = [n for n in range(1, self.heads + 1) if self._shares_heads(n)]
            found.append(
                f"tensor={layout.tensor} does not divide the model's {self.heads} attention heads and {self.kv_heads} "
                f"key/value heads; possible: {legal}"
            )
        if self.ffn_hidden % layout.tensor:
            found.append(f"tensor={layout.tensor} does not divide the model's ffn width of {self.ffn_hidden}")
        found += layout.layer_problems(self.layers)
        found += self._expert_problems(layout)
        return found

    def engine_problems(self, workers: int) -> Iterator[str]:
        """Why vLLM cannot cut this model over so many tensor-parallel workers, one sentence each; nothing when it can.

        Source: ``divide`` in ``vllm/model_executor/layers/linear.py``, and ``fused_moe/config.py``.
        """
        if self.heads % workers:
            yield f"must divide the model's {self.heads} attention heads, got {workers}"
        if self.latent is None and self.kv_heads % workers and workers % self.kv_heads:
            yield f"must divide the model's {self.kv_heads} key/value heads or be a multiple of them, got {workers}"
        widths = {"ffn width": self.ffn_hidden} if len(self.sparse_layers) < self.layers else {}
        if self.experts is not None:
            widths |= {"experts' ffn width": self.experts.ffn_hidden}
            widths |= {"shared expert's ffn width": self.experts.shared_ffn_hidden}
        for what, width in widths.items():
            if width % workers:
                yield f"must divide the model's {what} of {width}, got {workers}"

    def cached_width(self, workers: int) -> int:
        """Elements that an engine's worker keeps of one token, in all layers.

        Pope et al., "Efficiently Scaling Transformer Inference" (2022), section 3.3; a latent is kept once per layer
        and not shared over workers (DeepSeek-V2, 2024, section 2.1.4).
        """
        if self.latent is not None:
            return self.layers * (self.latent.kv_rank + self.latent.rotary_head_dim)
        return 2 * self.layers * max(1, self.kv_heads // workers) * self.head_dim

    def _shares_heads(self, ranks: int) -> bool:
        """Whether each rank has as many query heads, with whole query groups or an equal part of one.

        In the latter case megatron-core cuts the group's matrix into equal parts and gathers what they compute, so that
        the rows of keys and values need not fall on any one rank.
        """
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        groups = self.kv_heads % ranks == 0 or (ranks % self.kv_heads == 0 and rows % ranks == 0)
        return self.heads % ranks == 0 and (groups or self.latent is not None)

    def _expert_problems(self, layout: ParallelLayout) -> Iterator[str]:
        experts = self.experts
        if experts is None:
            if layout.expert > 1 or layout.expert_tensor > 1:
                yield f"expert and expert_tensor must be 1: {self.architecture} has no experts"
            return
        if layout.tensor > 1 and not layout.sequence_parallel:
            yield "a model with experts needs sequence_parallel=true where tensor > 1"
        if layout.expert == 1 and layout.expert_tensor != layout.tensor:
            # megatron-core takes the experts for ordinary weights then, and never adds up what each tensor rank's part
            # of the sequence says of its copy
            yield (
                f"expert_tensor must equal tensor={layout.tensor} where expert = 1, got {layout.expert_tensor}: "
                "copies of experts on tensor ranks would drift apart"
            )
        if experts.count % layout.expert:
            legal = [n for n in range(1, experts.count + 1) if experts.count % n == 0]
            yield f"expert={layout.expert} does not divide the model's {experts.count} experts; possible: {legal}"
        if experts.ffn_hidden % layout.expert_tensor:
            yield f"expert_tensor={layout.expert_tensor} does not divide the experts' ffn width of {experts.ffn_hidden}"
        if experts.shared_ffn_hidden % layout.tensor:
            yield f"tensor={layout.tensor} does not divide the shared expert's ffn width of {experts.shared_ffn_hidden}"

    @property
    def sparse_layers(self) -> frozenset[int]:
        """Those that have experts."""
        return frozenset(() if self.experts is None else self.experts.layers)

    def row_flops(self, length: int) -> float:
        """FLOPs of a forward pass over a row of ``length`` tokens (a multiply and an add are two)."""
        sparse = len(self.sparse_layers)
        layers = (self.layers - sparse) * self.layer_flops(length, sparse=False)
        if sparse:
            layers += sparse * self.layer_flops(length, sparse=True)
        return layers + self.output_flops(length)

    def layer_flops(self, length: int, *, sparse: bool) -> float:
        """The same of one layer, with experts or without."""
        return self.linear_flops(length, sparse=sparse) + self.score_flops(length) + self._router_flops(length, sparse)

    def linear_flops(self, length: int, *, sparse: bool) -> float:
        """The same of a layer's linears, which FP8 makes faster: all but the scores of attention and the router."""
        hidden, experts, latent = self.hidden, self.experts, self.latent
        width = self.ffn_hidden
        if sparse:
            assert experts is not None, "only a model with experts has sparse layers"
            width = experts.per_token * experts.ffn_hidden + experts.shared_ffn_hidden
        if latent is None:
            attention = hidden * 2 * (self.heads + self.kv_heads) * self.head_dim
        else:
            queries = self.heads * (latent.plain_head_dim + latent.rotary_head_dim)
            rank = latent.query_rank
            attention = hidden * queries if rank is None else rank * (hidden + queries)
            attention += hidden * (latent.kv_rank + latent.rotary_head_dim + self.heads * latent.value_head_dim)
            attention += latent.kv_rank * self.heads * (latent.plain_head_dim + latent.value_head_dim)
        return 2.0 * length * (attention + 3 * hidden * width)

    def _router_flops(self, length: int, sparse: bool) -> float:
        return 2.0 * length * self.hidden * self.experts.count if sparse and self.experts is not None else 0.0

    def score_flops(self, length: int) -> float:
        """The same of a layer's scores and of what they weigh: a query meets half of the row's keys, on average."""
        latent = self.latent
        width = 2 * self.head_dim
        if latent is not None:
            width = latent.plain_head_dim + latent.rotary_head_dim + latent.value_head_dim
        return length**2 * float(self.heads * width)

    def output_flops(self, length: int) -> float:
        """The same of the output layer of a policy."""
        return 2.0 * length * self.hidden * self.vocabulary


def read_model_dims(model: Path) -> ModelDims:
    """Read the sizes of the model in folder ``model``.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        UnknownArchitecture: the architecture is not one this project has a weight map for.
        ValueError: a setting is missing or no size, or would change the numbers and is not supported (a kind of rope
            scaling, a bias).
    """
    return dims_from_config(_read_config(model))


def weight_problems(model: Path) -> list[str]:
    """Why training cannot start from the weights in folder ``model``, whatever their sizes; errors as
    :func:`read_model_dims`.
    """
    if not _read_config(model).get("quantization_config"):
        return []
    return [
        "config.json must have no quantization_config, training starts from no such weights; convert weights in 8-bit "
        "blocks first, with hf_to_megatron.py and then megatron_to_hf.py without --fp8-blocks (both in "
        "tools/convert_hf)"
    ]


def _read_config(model: Path) -> dict[str, Any]:
    file = model / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"a model folder needs a config.json, found none in {model}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must be a JSON object, got {str(config)[:80]}")
    return config


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What an architecture has whatever its configuration says, or the key of the configuration that says it."""

    qkv_bias: bool | str = False
    projection_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    slides: bool = False
    """Whether ``sliding_window`` counts where there is no ``use_sliding_window``."""
    experts: Callable[[Mapping[str, Any]], ExpertDims] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes where the configuration does not name a setting, and we neither ask for it nor do the
    same without.
    """
    problems: Callable[[Mapping[str, Any]], Iterator[str]] = lambda _: iter(())
    """Why experts are not computed as the configuration says, one sentence each."""


def dims_from_config(config: Mapping[str, Any]) -> ModelDims:
    """Read the sizes from the content of a Hugging Face ``config.json``; errors as :func:`read_model_dims`."""
    dims, problems = sizes_from_config(config)
    if problems:
        raise ValueError(f"{dims.architecture}: {'; '.join(problems)}")
    return dims


def sizes_from_config(config: Mapping[str, Any]) -> tuple[ModelDims, tuple[str, ...]]:
    """Read the sizes of a model whose files alone are of interest: it need not be one that can be computed here.

    Returns:
        the sizes, and why such a model is not computed here, one sentence each; where there are any, ``rope_scaling``,
        ``eos_ids`` and ``pad_id`` may be missing from the sizes.

    Raises:
        UnknownArchitecture, ValueError: as :func:`read_model_dims`, of what tensors depend on.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config.json must hold the settings of a model by name, got a {type(config).__name__}")
    named = config.get("architectures") or [config.get("model_type", "?")]
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise ValueError(f"architectures of config.json must be a list of names, got {named!r}")
    architecture = named[0].replace("ForTokenClassification", "ForCausalLM")  # a critic of the same family
    if architecture not in _FAMILIES:
        raise UnknownArchitecture(f"unknown architecture {architecture}; known: {', '.join(sorted(_FAMILIES))}")
    try:
        return _dims(architecture, _FAMILIES[architecture], config)
    except KeyError as error:
        raise ValueError(f"{architecture}: config.json must name {error.args[0]}, found none") from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{architecture}: {error}") from error


def _dims(architecture: str, family: _Family, config: Mapping[str, Any]) -> tuple[ModelDims, tuple[str, ...]]:
    config = {**family.defaults, **config}
    problems = [*family.problems(config)]
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act must be silu, got {config['hidden_act']}")
    eos_ids, pad_id = tuple[int, ...](), 0
    try:
        eos_ids, pad_id = token_ids(config)
    except ValueError as error:
        problems.append(str(error))
    latent, scaling = _latent(config), None
    if latent is not None and config["rms_norm_eps"] != 1e-6:
        problems.append(f"rms_norm_eps must be 1e-6, got {config['rms_norm_eps']}: that of transformers' latent norms")
    try:
        scaling = read_rope(config)[1]
        if latent is not None:
            problems += latent_rope_problems(config)
    except ValueError as error:
        problems.append(f"{error}; got {config.get('rope_scaling') or config.get('rope_parameters')}")
    heads = int(config["num_attention_heads"])
    if latent is None:
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    else:  # it has sizes of its own: what is said of these, as transformers does, makes no other model
        kv_heads, head_dim = heads, latent.rotary_head_dim
    dims = ModelDims(
        architecture=architecture,
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        ffn_hidden=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=int(config["vocab_size"]),
        max_positions=_longest_row(family, config),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        **_biases(family, config),
        qk_norm=family.qk_norm,
        norm_eps=float(config["rms_norm_eps"]),
        rope_theta=read_theta(config),
        rope_scaling=scaling,
        eos_ids=eos_ids,
        pad_id=pad_id,
        experts=None if family.experts is None else family.experts(config),
        latent=latent,
        further_layers=int(config.get("num_nextn_predict_layers") or 0),
    )
    return dims, tuple(problems)


def token_ids(config: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """The tokens that end a text, of which there must be one, and the one that fills rows up."""
    eos_ids = _eos_ids(config)
    if not eos_ids:
        raise ValueError("config.json must name eos_token_id, found none")
    pad = config.get("pad_token_id")
    return eos_ids, eos_ids[0] if pad is None else int(pad)


@dataclass(frozen=True, kw_only=True)
class EndingTokens:
    """The tokens that can end a sample of a model.

    Attributes:
        ids: those of config.json, and then of generation_config.json, which often differ in chat models.
        special: ids, by their text, of the tokens that tokenizer.json calls special: no text of a sample shows them.
    """

    ids: tuple[int, ...]
    special: Mapping[str, int]

    def with_stops(self, stop: Sequence[str]) -> list[int]:
        """Those that end a sample drawn with these stop strings, each once, the model's own first."""
        return [*dict.fromkeys([*self.ids, *(self.special[each] for each in stop if each in self.special)])]


def read_ending_tokens(folder: Path) -> EndingTokens:
    """Of the model in a folder.

    Raises:
        ValueError: it names none.
    """
    ids: list[int] = []
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            ids += _eos_ids(json.loads((folder / name).read_text()))
    if not ids:
        raise ValueError(f"{folder}: config.json must name eos_token_id, else no sample ends by itself")
    tokenizer = folder / "tokenizer.json"
    added = json.loads(tokenizer.read_text()).get("added_tokens") or [] if tokenizer.is_file() else []
    return EndingTokens(
        ids=tuple(dict.fromkeys(ids)),
        special={token["content"]: token["id"] for token in added if token.get("special")},
    )


def _eos_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    eos = config.get("eos_token_id")
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),)


def _biases(family: _Family, config: Mapping[str, Any]) -> dict[str, bool]:
    switches = {"qkv_bias": family.qkv_bias, "projection_bias": family.projection_bias, "mlp_bias": family.mlp_bias}
    for key in ("attention_bias", "attention_out_bias", "mlp_bias"):
        if config.get(key) and key not in switches.values():
            raise ValueError(f"{key}=true puts biases where the weight map has none; not supported")
    if config.get("qkv_bias") is False and family.qkv_bias is True:
        raise ValueError("qkv_bias=false leaves out biases that the weight map has; not supported")
    return {name: bool(config.get(says)) if isinstance(says, str) else says for name, says in switches.items()}


def _longest_row(family: _Family, config: Mapping[str, Any]) -> int:
    """A row no longer than the window of attention is seen whole by its last token, as without a window."""
    positions, window = int(config["max_position_embeddings"]), config.get("sliding_window")
    if window is None or not config.get("use_sliding_window", family.slides):
        return positions
    return min(positions, int(window))


def _qwen2_experts(config: Mapping[str, Any]) -> ExpertDims:
    return _qwen_experts(config, shared=int(config.get("shared_expert_intermediate_size") or 0))


def _qwen_experts(config: Mapping[str, Any], shared: int = 0) -> ExpertDims:
    layers = range(int(config["num_hidden_layers"]))
    every, dense = int(config.get("decoder_sparse_step", 1)), set(config.get("mlp_only_layers") or ())
    return ExpertDims(
        count=int(config.get("num_experts") or config["num_local_experts"]),  # transformers 5 renamed it in some
        per_token=int(config["num_experts_per_tok"]),
        ffn_hidden=int(config["moe_intermediate_size"]),
        shared_ffn_hidden=shared,
        shared_gate=shared > 0,
        normalise=bool(config.get("norm_topk_prob", False)),
        sigmoid=False,
        bias=False,
        scale=1.0,
        groups=1,
        groups_per_token=1,
        layers=tuple(layer for layer in layers if layer not in dense and (layer + 1) % every == 0),
    )


def _deepseek_v2_experts(config: Mapping[str, Any]) -> ExpertDims:
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"topk_method must be greedy or group_limited_greedy, got {method}")
    groups, best = _deepseek_v2_groups(config)
    return _deepseek_experts(config, sigmoid=False, groups=groups, groups_per_token=best)


def _deepseek_v2_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("norm_topk_prob"):
        yield "norm_topk_prob=true is not supported with softmax scores: transformers leaves it out and vLLM does not"
    groups, best = _deepseek_v2_groups(config)
    if _expert_groups(config)[0] > groups:
        yield (
            f"n_group must be 1 with topk_method=greedy, got {config['n_group']}: vLLM chooses from groups all the same"
        )
    if groups > 1 and int(config["num_experts_per_tok"]) // best != 1:
        yield (
            f"num_experts_per_tok must be less than 2 x topk_group, got {config['num_experts_per_tok']} and {best}: "
            "megatron-core ranks a group by as many of its experts as are chosen from it, this model by its best"
        )


def _deepseek_v2_groups(config: Mapping[str, Any]) -> tuple[int, int]:
    return _expert_groups(config) if config.get("topk_method") == "group_limited_greedy" else (1, 1)


def _deepseek_v3_experts(config: Mapping[str, Any]) -> ExpertDims:
    groups, best = _expert_groups(config)
    return _deepseek_experts(config, sigmoid=True, groups=groups, groups_per_token=best)


def _deepseek_v3_problems(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")):
        if config.get(key) != value:
            yield f"config.json must say {key}={value}, got {config.get(key)}: else vLLM chooses experts in another way"
    groups, best = _expert_groups(config)
    if groups > 1 and int(config["num_experts_per_tok"]) != 2 * best:
        yield (
            f"num_experts_per_tok must be 2 x topk_group, got {config['num_experts_per_tok']} and {best}: "
            "megatron-core ranks a group by as many of its experts as are chosen from it, this model by two"
        )
    if not config.get("norm_topk_prob", True):
        yield "norm_topk_prob=false is not supported with sigmoid scores: megatron-core normalises them"


def _expert_groups(config: Mapping[str, Any]) -> tuple[int, int]:
    return int(config.get("n_group") or 1), int(config.get("topk_group") or 1)


def _deepseek_experts(config: Mapping[str, Any], *, sigmoid: bool, groups: int, groups_per_token: int) -> ExpertDims:
    scoring = "sigmoid" if sigmoid else "softmax"
    if config.get("scoring_func", scoring) != scoring:
        raise ValueError(f"scoring_func must be {scoring}, got {config['scoring_func']}")
    if config.get("moe_layer_freq", 1) != 1:
        raise ValueError(f"moe_layer_freq must be 1, got {config['moe_layer_freq']}: transformers leaves it out")
    layers, width = range(int(config["num_hidden_layers"])), int(config["moe_intermediate_size"])
    return ExpertDims(
        count=int(config.get("n_routed_experts") or config["num_local_experts"]),
        per_token=int(config["num_experts_per_tok"]),
        ffn_hidden=width,
        shared_ffn_hidden=width * int(config.get("n_shared_experts") or 0),
        shared_gate=False,
        normalise=sigmoid,
        sigmoid=sigmoid,
        bias=sigmoid,
        scale=float(config.get("routed_scaling_factor", 1.0)),
        groups=groups,
        groups_per_token=groups_per_token,
        layers=tuple(layers[int(config.get("first_k_dense_replace") or 0) :]),
    )


def _latent(config: Mapping[str, Any]) -> LatentDims | None:
    if config.get("kv_lora_rank") is None:
        return None
    if not config.get("rope_interleave", True):
        raise ValueError("rope_interleave=false is not supported: megatron-core's latent attention interleaves")
    rank = config.get("q_lora_rank")
    return LatentDims(
        query_rank=None if rank is None else int(rank),
        kv_rank=int(config["kv_lora_rank"]),
        plain_head_dim=int(config["qk_nope_head_dim"]),
        rotary_head_dim=int(config["qk_rope_head_dim"]),
        value_head_dim=int(config["v_head_dim"]),
    )


_WINDOW = {"sliding_window": 4096}
_LATENT_RANKS = {"kv_lora_rank": 512, "q_lora_rank": 1536}
_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(qkv_bias="attention_bias", projection_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": _Family(slides=True, defaults=_WINDOW | {"num_key_value_heads": 8}),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, defaults=_WINDOW | {"num_key_value_heads": 32}),
    "Qwen2MoeForCausalLM": _Family(
        qkv_bias=True,
        experts=_qwen2_experts,
        defaults=_WINDOW | {"num_key_value_heads": 16, "shared_expert_intermediate_size": 5632},
    ),
    "Qwen3ForCausalLM": _Family(qk_norm=True, defaults=_WINDOW | {"num_key_value_heads": 32, "head_dim": 128}),
    "Qwen3MoeForCausalLM": _Family(qk_norm=True, experts=_qwen_experts, defaults=_WINDOW | {"num_key_value_heads": 4}),
    "DeepseekV2ForCausalLM": _Family(
        experts=_deepseek_v2_experts,
        problems=_deepseek_v2_problems,
        defaults=_LATENT_RANKS | {"n_shared_experts": 2},
    ),
    "DeepseekV3ForCausalLM": _Family(
        experts=_deepseek_v3_experts,
        problems=_deepseek_v3_problems,
        defaults=_LATENT_RANKS
        | {"n_shared_experts": 1, "n_group": 8, "topk_group": 4}
        | {"routed_scaling_factor": 2.5, "first_k_dense_replace": 3},
    ),
}
"""By architecture: the sizes' part of a family, whose tensors :mod:`megatron_rl.weights.families` has."""
