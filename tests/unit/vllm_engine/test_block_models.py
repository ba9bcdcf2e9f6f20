"""Models that are written in blocks of 8 bits, as vLLM reads their configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.weights.safetensors_io import HfFolder, TensorInfo
from tests.unit.convert.folders import exported, imported, write_model

QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
GATE_UP = {"gate_up_proj": ["gate_proj", "up_proj"]}
LATENT = {"fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"]}
MERGED = QKV | GATE_UP | LATENT
FP8 = torch.float8_e4m3fn


def in_blocks(folder: Path, family: str, *, tied: bool = False, **sizes: Any) -> tuple[Any, dict[str, TensorInfo]]:
    """What vLLM makes of the configuration of a model in blocks, and the model's tensors."""
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config

    source = write_model(folder / "hf", family, dtype=torch.bfloat16, sizes=sizes, tie_word_embeddings=tied)
    if tied:
        weights = load_file(source / "model.safetensors")
        save_file({name: weights[name] for name in weights if name != "lm_head.weight"}, source / "model.safetensors")
    written = exported(imported(source, folder / "megatron"), folder / "fp8", fp8_blocks=True)
    config = json.loads((written / "config.json").read_text())
    return Fp8Config.from_config(config["quantization_config"]), HfFolder(written).infos()


def layers_of(infos: Mapping[str, TensorInfo]) -> dict[str, list[TensorInfo]]:
    """vLLM's linear layers by their names, each with what it is made of, in order."""
    fused = {part: (whole, place) for whole, parts in MERGED.items() for place, part in enumerate(parts)}
    layers: dict[str, dict[int, TensorInfo]] = {}
    for name, info in infos.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and len(info.shape) == 2 and name.startswith("model.layers."):
            before, _, last = module.rpartition(".")
            merged, place = (last, 0) if ".mlp.experts." in name else fused.get(last, (last, 0))
            layers.setdefault(f"{before}.{merged}", {})[place] = info
    return {name: [parts[place] for place in sorted(parts)] for name, parts in layers.items()}


@pytest.mark.parametrize(
    ("family", "sizes", "whole"),
    [
        (
            "Qwen3Moe",
            {"hidden_size": 128, "head_dim": 64, "moe_intermediate_size": 128},
            {"mlp.gate"},
        ),
        (
            "Qwen2Moe",
            {"hidden_size": 256, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 192},
            {"mlp.gate", "mlp.shared_expert_gate", "mlp.shared_expert.gate_up_proj", "mlp.shared_expert.down_proj"}
            | {"mlp.gate_up_proj", "mlp.down_proj"},
        ),
        (
            "Llama",
            {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 256},
            {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj"},
        ),
        (
            "DeepseekV3",
            {"hidden_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 128},
            {"mlp.gate", "mlp.gate_up_proj", "mlp.down_proj", "self_attn.kv_b_proj", "self_attn.o_proj"},
        ),
    ],
)
def test_vllm_takes_for_blocks_what_is_written_so_and_can_hold_and_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, sizes: dict[str, Any], whole: set[str]
) -> None:
    from vllm import distributed
    from vllm.model_executor.layers.quantization.utils.fp8_utils import validate_fp8_block_shape
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    monkeypatch.setattr(distributed, "get_tensor_model_parallel_world_size", lambda: 1)
    config, infos = in_blocks(tmp_path, family, **{"intermediate_size": 200} | sizes)
    left: set[str] = set()
    for name, parts in layers_of(infos).items():
        if is_layer_skipped(name, config.ignored_layers, fused_mapping=MERGED):
            assert {part.dtype for part in parts} == {torch.bfloat16}, name
            left.add(name.split(".", 3)[3])
        else:
            assert {part.dtype for part in parts} == {FP8}, name
            rows, width = [part.shape[0] for part in parts], parts[0].shape[1]
            assert width % 128 == 0, name  # per_token_group_quant_fp8 of the same file, which needs Triton
            validate_fp8_block_shape(torch.nn.Module(), width, sum(rows), width, rows, [128, 128])
    assert left == whole
    assert "lm_head" in config.ignored_layers
    assert not is_layer_skipped("model.layers.1.mlp.experts", config.ignored_layers, fused_mapping=MERGED)


def test_transformers_leaves_the_same_modules_of_a_tied_model(tmp_path: Path) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    config, infos = in_blocks(tmp_path, "Qwen2", intermediate_size=200, hidden_size=512, tied=True)
    assert "lm_head.weight" not in infos
    assert not should_convert_module("lm_head", config.ignored_layers)
    for name, info in infos.items():
        if len(info.shape) == 2 and name.startswith("model.layers.") and name.endswith(".weight"):
            module = name.removesuffix(".weight")
            assert should_convert_module(module, config.ignored_layers) == (info.dtype is FP8), name
