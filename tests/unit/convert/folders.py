"""Model folders to convert, and what tests do with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file

from megatron_rl.convert.target import Target
from megatron_rl.convert.to_hf import ExportPlan, plan_export, run_export
from megatron_rl.convert.to_megatron import plan_import, run_import
from megatron_rl.mcore.sharded_names import ShardedName, sharded_name
from megatron_rl.model_dims import ModelDims
from megatron_rl.weights.weight_map import WeightEntry
from tests.unit.weights.models import CONFIG, EXTRA, hf_tensors


def ignore(_: int) -> None: ...


def write_model(
    folder: Path,
    family: str = "Qwen2",
    kind: str = "CausalLM",
    dtype: torch.dtype = torch.float32,
    *,
    sizes: Mapping[str, Any] = {},
    **changes: Any,
) -> Path:
    """A small random model with a tokenizer, in one file; ``changes`` to its configuration make no other tensors."""
    folder.mkdir()
    config = CONFIG | EXTRA.get(family, {}) | dict(sizes)
    config |= {"architectures": [f"{family}For{kind}"], "model_type": family.lower()}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")} | changes))
    (folder / "tokenizer.json").write_text("{}")
    tensors = {name: tensor.to(dtype) for name, tensor in hf_tensors(family, kind, False, **sizes).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def wide_model(folder: Path) -> Path:
    """A Llama in bfloat16 of which no tensor is a large part: 106 MB, the largest 8 MB."""
    hidden, layers, vocabulary, kv = 512, 12, 8192, 128
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        ffn = {"gate": (4 * hidden, hidden), "up": (4 * hidden, hidden), "down": (hidden, 4 * hidden)}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": shape for name, shape in ffn.items()}
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    folder.mkdir()
    config = CONFIG | sizes | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def llama_135m(folder: Path) -> Path:
    """With a tokenizer; 30 layers, 9 heads, 3 key/value heads: sizes that two tensor ranks do not divide."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(WordLevel({str(number): number for number in range(config.vocab_size)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def imported(
    source: Path, target: Path, *, dtype: torch.dtype | None = None, processes: int = 2, resume: bool = False
) -> Path:
    plan = plan_import(source, dtype=dtype, processes=processes)
    run_import(plan, Target(target), resume=resume, processes=processes, progress=ignore)
    return target


def engine_name(entry: WeightEntry, dims: ModelDims) -> ShardedName:
    """Where megatron-core's stock layers of Transformer Engine keep a tensor, as its ``gpt_layer_specs.py`` has them;
    in place of ``sharded_name`` in an import, it makes such a checkpoint.
    """
    found = sharded_name(entry, dims)
    if entry.layer is None:
        return found
    norms = {"mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}
    if entry.layer not in dims.sparse_layers:
        norms = {fused: plain for plain, fused in norms.items()}
    if dims.latent is not None:
        for latent in ("q", "kv"):
            fused = f"self_attention.linear_{latent}_up_proj.layer_norm_weight"
            norms[f"self_attention.{latent}_layernorm.weight"] = fused
    for ours, theirs in norms.items():
        if found.key.endswith(f".{ours}"):
            return replace(found, key=found.key.removesuffix(ours) + theirs)
    return found


def export_plan(source: Path, *, shard_bytes: int = 9 << 20, **options: Any) -> ExportPlan:
    return plan_export(source, shard_bytes=shard_bytes, **options)


def exported(source: Path, target: Path, *, resume: bool = False, **plan: Any) -> Path:
    run_export(export_plan(source, **plan), Target(target), resume=resume, processes=2, progress=ignore)
    return target


def folder_sums(folder: Path) -> dict[str, str]:
    return {path.name: xxhash.xxh3_128(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
