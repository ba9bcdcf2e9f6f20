"""The shape of every Megatron tensor, from the sizes of the model alone."""

from __future__ import annotations

from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.entries import WeightEntry
from megatron_rl.weights.rules import Split


def full_shape(entry: WeightEntry, dims: ModelDims) -> tuple[int, ...]:
    """The shape of the whole tensor in Megatron's form, without padding.

    megatron-core calls the same thing by the same name in every family, so this is one table and not one per family.

    Raises:
        ValueError: no shape is known under this name.
    """
    name = ".".join(entry.megatron.split(".")[-2:])
    shape = _shapes(entry, dims).get(name)
    if shape is None:
        raise ValueError(f"{entry.megatron}: the shape of {name} must be in megatron_rl/weights/shapes.py, found none")
    return shape


def is_float32(entry: WeightEntry) -> bool:
    """Whether the tensor stays in float32 whatever the type of the model: the bias of a router."""
    return entry.megatron.endswith("router.expert_bias")


def is_vocabulary(entry: WeightEntry) -> bool:
    """Whether the rows are tokens, and so may be followed by padding: embedding and language head."""
    return entry.layer is None and entry.split is Split.ROWS


def _shapes(entry: WeightEntry, dims: ModelDims) -> dict[str, tuple[int, ...]]:
    hidden, heads, experts = dims.hidden, dims.heads, dims.experts
    qkv = (heads + 2 * dims.kv_heads) * dims.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (dims.vocabulary, hidden),
        "input_layernorm.weight": (hidden,),
        "linear_qkv.weight": (qkv, hidden),
        "linear_qkv.bias": (qkv,),
        "q_layernorm.weight": (dims.head_dim,),
        "k_layernorm.weight": (dims.head_dim,),
        "linear_proj.weight": (hidden, heads * dims.head_dim),
        "linear_proj.bias": (hidden,),
        "pre_mlp_layernorm.weight": (hidden,),
        "linear_fc1.weight": (2 * entry.ffn_hidden(dims), hidden),
        "linear_fc1.bias": (2 * entry.ffn_hidden(dims),),
        "linear_fc2.weight": (hidden, entry.ffn_hidden(dims)),
        "linear_fc2.bias": (hidden,),
        "final_layernorm.weight": (hidden,),
        "output_layer.weight": (dims.vocabulary if is_vocabulary(entry) else 1, hidden),
        "output_layer.bias": (1,),
    }
    if experts is not None:
        shapes |= {
            "router.weight": (experts.count, hidden),
            "router.expert_bias": (experts.count,),
            "shared_experts.gate_weight": (1, hidden),
        }
    latent = dims.latent
    if latent is not None:
        query_width = heads * (latent.plain_head_dim + latent.rotary_head_dim)
        key_value_width = heads * (latent.plain_head_dim + latent.value_head_dim)
        shapes |= {
            "linear_q_proj.weight": (query_width, hidden),
            "linear_kv_down_proj.weight": (latent.kv_rank + latent.rotary_head_dim, hidden),
            "kv_layernorm.weight": (latent.kv_rank,),
            "linear_kv_up_proj.weight": (key_value_width, latent.kv_rank),
            "linear_proj.weight": (hidden, heads * latent.value_head_dim),
        }
        if latent.query_rank is not None:
            shapes |= {
                "linear_q_down_proj.weight": (latent.query_rank, hidden),
                "q_layernorm.weight": (latent.query_rank,),
                "linear_q_up_proj.weight": (query_width, latent.query_rank),
            }
    return shapes
