"""From sizes and settings to megatron-core GPTModels: the pieces of one model that this rank holds."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megatron_rl.batches import PackedTokens, TokenOutputs, ValueOutputs
from megatron_rl.config.schema import TrainerConfig
from megatron_rl.device import device
from megatron_rl.layout import padded_vocabulary
from megatron_rl.mcore.attention import LatentRotary, PackedAttention, PackedRotary, PackedRows
from megatron_rl.mcore.capabilities import fuses_packed_rows
from megatron_rl.mcore.fake_quant import quantise_linears
from megatron_rl.mcore.fp8 import model_fields
from megatron_rl.mcore.fused_attention import packed_attention
from megatron_rl.mcore.logprobs import Kernels, choose_kernels, linear_logprobs
from megatron_rl.mcore.output_layer import TokenHead, logprob_kernels, output_weight, real_vocabulary
from megatron_rl.mcore.rotary import inverse_frequencies
from megatron_rl.mcore.value_head import ValueHead
from megatron_rl.model_dims import ModelDims
from megatron_rl.rope_scaling import YarnScaling
from megatron_rl.weights.weight_map import Head

_Classes = dict[Any, Any]
_Fields = dict[type, dict[str, Callable[[Any], Any]]]


def transformer_config(
    dims: ModelDims, trainer: TrainerConfig, dtype: torch.dtype, *, transformer_engine: bool = False
) -> TransformerConfig:
    """Megatron-core's configuration of a model; weights are left unset for :mod:`.export` to fill."""
    layout = trainer.layout
    interleaved = layout.virtual_pipeline > 1
    kind = TransformerConfig if dims.latent is None else MLATransformerConfig
    return kind(
        **_experts(dims),
        **_latent(dims),
        num_layers=dims.layers,
        hidden_size=dims.hidden,
        ffn_hidden_size=dims.ffn_hidden,
        num_attention_heads=dims.heads,
        num_query_groups=dims.kv_heads,
        kv_channels=dims.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=dims.norm_eps,
        qk_layernorm=dims.qk_norm or dims.latent is not None,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=dims.qkv_bias,
        softmax_scale=_softmax_scale(dims),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # not perform_initialization=False: initialising is also what marks weights as split over tensor ranks, without
        # which the gradient norm leaves the other ranks' parts out
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        # batched sends of an interleaved schedule get mixed up between two stages over gloo
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        **_RECOMPUTE[trainer.recompute],
        **model_fields(trainer.fp8),
        transformer_impl="transformer_engine" if transformer_engine else "local",
        # micro-batches are cut by tokens, so their lengths differ and pipeline stages must tell each other
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # with experts or without: the default is refused with variable lengths
        # the loss is a sum, divided once by the tokens of the whole step
        calculate_per_token_loss=True,
        # fusions that need kernels of Apex or Transformer Engine
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )


def _experts(dims: ModelDims) -> dict[str, Any]:
    experts = dims.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_layer_freq": [int(layer in experts.layers) for layer in range(dims.layers)],
        "moe_ffn_hidden_size": experts.ffn_hidden,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden or None,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_router_topk": experts.per_token,
        "moe_router_score_function": "sigmoid" if experts.sigmoid else "softmax",
        # a softmax over the chosen experts is that over all of them, normalised
        "moe_router_pre_softmax": not experts.sigmoid and not experts.normalise,
        "moe_router_topk_scaling_factor": experts.scale,
        "moe_router_num_groups": experts.groups if experts.groups > 1 else None,
        "moe_router_group_topk": experts.groups_per_token if experts.groups > 1 else None,
        "moe_router_enable_expert_bias": experts.bias,
        "moe_router_bias_update_rate": 0.0,  # balances pre-training; here it would move the policy on its own
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
    }


def _latent(dims: ModelDims) -> dict[str, Any]:
    latent, scaling = dims.latent, _yarn(dims)
    if latent is None:
        return {}
    return {
        "multi_latent_attention": True,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.plain_head_dim,
        "qk_pos_emb_head_dim": latent.rotary_head_dim,
        "v_head_dim": latent.value_head_dim,
        # the scores' scale; angles and their factor come from LatentRotary, which answers as megatron-core's yarn does
        "rope_type": "yarn",
        "rotary_scaling_factor": scaling.factor if scaling else 1.0,
        "mscale_all_dim": scaling.mscale_all_dim if scaling else 0.0,
    }


def _yarn(dims: ModelDims) -> YarnScaling | None:
    return dims.rope_scaling if isinstance(dims.rope_scaling, YarnScaling) else None


def _softmax_scale(dims: ModelDims) -> float | None:
    """A factor on cosine and sine of queries and keys is its square on their products; latent attention has its own."""
    scaling = _yarn(dims)
    if scaling is None or dims.latent is not None:
        return None
    return scaling.magnitude**2 / math.sqrt(dims.head_dim)


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def _leave(weight: Tensor) -> Tensor:
    return weight


def build_chunks(
    dims: ModelDims, trainer: TrainerConfig, dtype: torch.dtype, head: Head, *, transformer_engine: bool = False
) -> list[GPTModel]:
    """This rank's pieces of the model: uninitialised weights, a new value head; one, but for virtual pipelines.

    A critic never ties its embeddings: it has no output projection to tie them to.

    Raises:
        ValueError: Transformer Engine's layers are to quantise in fake.
    """
    if trainer.fake_quantization != "none" and transformer_engine:
        raise ValueError(
            "fake_quantization rounds in megatron-core's own linear layers, these are Transformer Engine's: set "
            "model.layers='local'"
        )
    config = transformer_config(dims, trainer, dtype, transformer_engine=transformer_engine)
    pieces = trainer.layout.virtual_pipeline
    kernels = choose_kernels(trainer.logprob_kernel)
    chunks = [_build(config, dims, trainer, head, kernels, piece if pieces > 1 else None) for piece in range(pieces)]
    if trainer.fake_quantization != "none":
        for chunk in chunks:
            quantise_linears(chunk, trainer.fake_quantization, dims)
    return chunks


def _build(
    config: TransformerConfig, dims: ModelDims, trainer: TrainerConfig, head: Head, kernels: Kernels, piece: int | None
) -> GPTModel:
    virtual = {"ignore_virtual": False, "vp_stage": piece}
    model = GPTModel(
        config,
        layer_spec(config, dims, piece),
        vocab_size=padded_vocabulary(dims.vocabulary, config.tensor_model_parallel_size),
        max_sequence_length=dims.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(**virtual),
        post_process=parallel_state.is_pipeline_last_stage(**virtual),
        position_embedding_type="rope",
        rotary_base=dims.rope_theta,
        share_embeddings_and_output_weights=dims.tied_embeddings and head is Head.TOKEN,
        vp_stage=piece,
    )
    width = dims.head_dim if dims.latent is None else dims.latent.rotary_head_dim
    frequencies = inverse_frequencies(dims.rope_theta, width, dims.rope_scaling).to(device())
    if dims.latent is None:
        model.rotary_pos_emb = PackedRotary(frequencies)
    else:
        scaling = _yarn(dims)
        rotary = LatentRotary(frequencies, scaling.magnitude if scaling else 1.0)
        for layer in model.decoder.layers:
            layer.self_attention.rotary_pos_emb = rotary
    if model.post_process:
        model.output_layer = (
            ValueHead(dims.hidden, config.sequence_parallel, config.params_dtype, trainer.value_head_std)
            if head is Head.VALUE
            else TokenHead(model.output_layer, dims.vocabulary, kernels)
        )
    _gather_on(model, device())
    return model


def _gather_on(model: torch.nn.Module, where: torch.device) -> None:
    """Move what lies elsewhere: norms, routers and plain linears, which megatron-core makes on the host. It expects
    ``model.cuda()`` of its caller, which takes no fake tensors, and exchanges FP8 parameters that are there already.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device != where:
                moved = torch.nn.Parameter(parameter.detach().to(where), parameter.requires_grad)
                # how it is split and summed, as megatron-core has noted on it
                vars(moved).update(vars(parameter) | vars(moved))
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != where:
                module._buffers[name] = buffer.to(where)


def layer_spec(config: TransformerConfig, dims: ModelDims, piece: int | None = None) -> Any:
    """The modules that a piece's layers are made of: Transformer Engine's or megatron-core's local ones, as the
    configuration says, with a few exchanges.
    """
    engine = config.transformer_impl == "transformer_engine"
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=engine, normalization=config.normalization, vp_stage=piece
    )
    by_field: _Fields = {}
    if engine:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        attention = packed_attention(TEDotProductAttention) if fuses_packed_rows() else PackedAttention
        exchange = {TEDotProductAttention: attention, MLASelfAttention: _LatentAttention}
        names = _FUSED_KEYS if dims.latent is None else _LATENT_FUSED_KEYS
        by_field[TransformerLayerSubmodules] = {"sharded_state_dict_keys_map": lambda _: names}
    else:
        # Apex's, where it is installed, whatever the configuration says of the final norm
        exchange = {**_LOCAL, gpt_layer_specs.LNImpl: _Norm}
        # split over tensor ranks and gathered again, as the local spec has them, these lose the other ranks' heads in
        # the gradient of the keys' rotary part; replicated, as Transformer Engine's spec has them, they do not
        down = {"linear_q_down_proj": lambda _: Linear, "linear_kv_down_proj": lambda _: Linear}
        by_field[MLASelfAttentionSubmodules] = down
        multi_latent_attention.Linear = Linear  # which newer releases bind only where Transformer Engine is installed
    if dims.projection_bias:
        by_field[SelfAttentionSubmodules] = {"linear_proj": _biased}
    if dims.mlp_bias:
        by_field[MLPSubmodules] = {"linear_fc1": _biased, "linear_fc2": _biased}
    return _exchange(spec, exchange, by_field)


_FUSED_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""From the names of a layer's norms to those in checkpoints, which are the same whatever made the layers."""
_LATENT_FUSED_KEYS = {
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
}


def _biased(linear: type) -> type:
    """The same with a bias whatever ``add_bias_linear`` says, which switches those of attention and MLP together."""

    class Biased(linear):  # type: ignore[misc]
        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=True, **kwargs)

    return Biased


class _Norm:
    """RMSNorm for ``WrappedTorchNorm``, which refuses sequence parallelism."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **ignored: Any) -> Any:
        norm = torch.nn.RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            # finalize_model_grads sums over tensor ranks what each computed from its part of the sequence
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


class _LatentAttention(MLASelfAttention):  # type: ignore[misc]
    """Made of the modules that its spec names."""

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """Newer releases ask here, and want Transformer Engine's fused norm where queries have no latent to norm."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


_LOCAL: _Classes = {
    WrappedTorchNorm: _Norm,
    DotProductAttention: PackedAttention,
    MLASelfAttention: _LatentAttention,
}


def _exchange(spec: Any, classes: _Classes, by_field: _Fields) -> Any:
    """Replace classes everywhere in a nested layer spec (ModuleSpec, dataclasses; ``partial`` from 0.18 on).

    Args:
        spec: of a layer, or a part of it.
        classes: by the class that they replace.
        by_field: what depends on its place, by the dataclass and field that hold it: from what is there to what shall
            be.
    """
    if isinstance(spec, type) or spec is None:
        return classes.get(spec, spec)
    if isinstance(spec, functools.partial):
        keywords = {key: _exchange(value, classes, by_field) for key, value in spec.keywords.items()}
        return functools.partial(_exchange(spec.func, classes, by_field), *spec.args, **keywords)
    if isinstance(spec, list):
        return [_exchange(item, classes, by_field) for item in spec]
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        fields = [f.name for f in dataclasses.fields(spec) if f.init]
        found = {name: _exchange(getattr(spec, name), classes, by_field) for name in fields}
        placed = {name: change(found[name]) for name, change in by_field.get(type(spec), {}).items()}
        return dataclasses.replace(spec, **found | placed)
    return spec


def run_model(model: Any, batch: PackedTokens, rows: PackedRows) -> Tensor:
    """Forward of this stage: hidden states [N(/tensor), 1, h] for the next one; from the last one what its head gives:
    hidden states [1, N, h] of a policy, values [1, N, 1] of a critic.
    """
    output: Tensor = model(
        input_ids=batch.inputs[None],
        position_ids=batch.positions[None],
        attention_mask=None,
        packed_seq_params=rows,
    )
    return output


def read_tokens(model: Any, output: Tensor, batch: PackedTokens, temperature: float) -> TokenOutputs:
    """Log-prob and entropy of each target from what the last stage gave, by the weight of that stage."""
    logprobs, entropy = _read(model, output, batch, temperature, with_entropy=True)
    assert entropy is not None
    return TokenOutputs(logprobs=logprobs, entropy=entropy)


def read_logprobs(model: Any, output: Tensor, batch: PackedTokens, temperature: float) -> Tensor:
    """The same without the entropy: [N] f32."""
    return _read(model, output, batch, temperature, with_entropy=False)[0]


def _read(
    model: Any, output: Tensor, batch: PackedTokens, temperature: float, *, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    return linear_logprobs(
        output[0],
        output_weight(model),
        batch.targets,
        temperature=temperature,
        group=parallel_state.get_tensor_model_parallel_group(),
        with_entropy=with_entropy,
        kernels=logprob_kernels(model),
        vocabulary=real_vocabulary(model),
    )


def read_values(output: Tensor, batch: PackedTokens) -> ValueOutputs:
    """Values from the last stage's [1, N, 1]."""
    return ValueOutputs(values=output[0, :, 0])
