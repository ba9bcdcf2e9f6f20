"""The tables that megatron-bridge itself gives, against ours, and against what its own loader makes of a model.

Where it is not installed nothing of this can run; where Transformer Engine alone is missing, names stand for it
(``benchmarks/te_standin.py``), since tables and loader need none of it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import te_standin
from megatron_rl.convert.sources import HfSource
from megatron_rl.device import prepare_megatron
from megatron_rl.mcore.bridge import bridged_dims, bridged_rules
from megatron_rl.model_dims import dims_from_config
from megatron_rl.weights.entries import weight_entries
from megatron_rl.weights.rules import Head
from megatron_rl.weights.shapes import full_shape
from tests.unit.weights.models import CONFIG, EXTRA, saved_model
from tools.convert_hf import hf_to_megatron, megatron_to_hf, verify

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("megatron.bridge") is None, reason="megatron-bridge is not installed"),
    pytest.mark.slow,  # its import alone takes half a minute
]

GLM = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,  # megatron-bridge takes it for one, whatever is said
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "use_qk_norm": True,
    "attention_bias": True,
    "pad_token_id": 0,
}
HUNYUAN = {
    "num_experts": 4,
    "num_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "expert_hidden_dim": 6,
    "first_k_dense_replace": 1,
    "head_dim": 4,
    "pad_token_id": 0,
}
NEW = {"Glm4Moe": GLM, "HYV3": HUNYUAN, "Gemma": {"head_dim": 4, "tie_word_embeddings": True}}


@pytest.fixture(scope="module")
def auto_bridge() -> Any:
    prepare_megatron()
    te_standin.install()
    return importlib.import_module("megatron.bridge").AutoBridge


def written(folder: Path, family: str, extra: dict[str, Any]) -> tuple[Path, dict[str, Tensor]]:
    sizes = {key: value for key, value in CONFIG.items() if key != "architectures"} | extra
    config, tensors = saved_model(family, "CausalLM", sizes)
    hf = folder / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(config))
    save_file(tensors, hf / "model.safetensors")
    return hf, tensors


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe", "DeepseekV2", "DeepseekV3"])
def test_the_tables_of_families_that_we_have_are_ours(auto_bridge: Any, tmp_path: Path, family: str) -> None:
    hf, _ = written(tmp_path, family, EXTRA.get(family, {}))
    opened = auto_bridge.from_hf_pretrained(str(hf))
    says = opened.to_megatron_provider(load_weights=False)
    theirs = bridged_dims(f"{family}ForCausalLM", says, opened.hf_pretrained.config.to_dict())
    rules, _ = bridged_rules(opened._model_bridge.mapping_registry(), theirs)
    ours = dims_from_config(json.loads((hf / "config.json").read_text()))
    found = {entry.megatron: entry for entry in weight_entries(theirs, Head.TOKEN, rules)}
    assert found == {entry.megatron: entry for entry in weight_entries(ours, Head.TOKEN)}
    assert all(full_shape(entry, theirs) == full_shape(entry, ours) for entry in found.values())


@pytest.mark.parametrize("family", NEW)
def test_other_families_go_there_and_back_to_the_bit(auto_bridge: Any, tmp_path: Path, family: str) -> None:
    hf, tensors = written(tmp_path, family, NEW[family])
    there, back = tmp_path / "there", tmp_path / "back"
    assert hf_to_megatron.main([str(hf), str(there)]) == 0
    assert megatron_to_hf.main([str(there), str(back)]) == 0
    assert verify.main([str(there), "--level", "values", "--against", str(hf)]) == 0
    found = load_file(back / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_bias_of_routers_stays_in_float32_whatever_its_family_calls_it(auto_bridge: Any, tmp_path: Path) -> None:
    hf, tensors = written(tmp_path, "HYV3", HUNYUAN)
    there, back, narrow = tmp_path / "there", tmp_path / "back", tmp_path / "narrow"
    assert hf_to_megatron.main([str(hf), str(there), "--dtype", "bfloat16"]) == 0
    assert megatron_to_hf.main([str(there), str(back)]) == 0
    assert verify.main([str(back), "--level", "values", "--against", str(hf), "--dtype", "bfloat16"]) == 0
    assert hf_to_megatron.main([str(hf), str(tmp_path / "wide")]) == 0
    assert megatron_to_hf.main([str(tmp_path / "wide"), str(narrow), "--dtype", "bfloat16"]) == 0
    for folder in (back, narrow):
        found = load_file(folder / "model.safetensors")
        wide = {name for name, tensor in found.items() if tensor.dtype is torch.float32}
        assert wide == {name for name in tensors if name.endswith("mlp.expert_bias")} != set()
        assert all(torch.equal(found[name], tensors[name]) for name in wide)


@pytest.fixture
def one_rank() -> Iterator[None]:
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    with temporary_distributed_context("gloo"):
        yield


def loaded(opened: Any) -> torch.nn.Module:
    """The model with its weights, as megatron-bridge fills it, of megatron-core's own layers."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.enums import AttnBackend

    provider = opened.to_megatron_provider()
    provider.transformer_layer_spec = partial(get_gpt_decoder_block_spec, use_transformer_engine=False)
    provider.apply_rope_fusion = provider.gradient_accumulation_fusion = provider.moe_grouped_gemm = False
    provider.moe_permute_fusion = provider.persist_layer_norm = False
    provider.attention_backend = AttnBackend.auto
    provider.bf16, provider.params_dtype = False, torch.float32
    provider.finalize()
    [model] = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    return model


@pytest.mark.parametrize(
    ("family", "extra"), [("Qwen3", EXTRA["Qwen3"]), ("Qwen3Moe", EXTRA["Qwen3Moe"]), ("HYV3", HUNYUAN)]
)
def test_its_own_loader_makes_the_same_tensors(
    auto_bridge: Any, one_rank: None, tmp_path: Path, family: str, extra: dict[str, Any]
) -> None:
    hf, _ = written(tmp_path, family, extra)
    model = loaded(auto_bridge.from_hf_pretrained(str(hf), dtype=torch.float32))
    source = HfSource(hf)
    made = {entry.megatron: source.tensor(entry) for entry in source.weights.entries}
    found = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")
    }
    rows = made["embedding.word_embeddings.weight"].shape[0]
    assert found.keys() == made.keys()
    for name, tensor in made.items():
        vocabulary = name.startswith(("embedding.", "output_layer."))
        assert torch.equal(found[name][:rows] if vocabulary else found[name], tensor), name
