"""megatron-bridge's tables in our rules, from objects with the attributes of its classes."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.mcore.bridge import bridged_dims, bridged_rules, weight_changes
from megatron_rl.model_dims import ModelDims, UnknownArchitecture, dims_from_config, read_model_dims
from megatron_rl.weights.entries import weight_entries
from megatron_rl.weights.families import FAMILIES
from megatron_rl.weights.rules import Head
from tests.unit.weights.models import CONFIG, EXTRA, dims, saved_model
from tools.convert_hf import hf_to_megatron, megatron_to_hf, verify

MEGATRON, HF = "decoder.layers.*.", "model.layers.*."


@dataclasses.dataclass
class AutoMapping:
    megatron_param: str
    hf_param: Any
    permute_dims: tuple[int, ...] | None = None


class QKVMapping(AutoMapping):
    def __init__(self, megatron: str, hf: str) -> None:
        super().__init__(megatron, {part: hf.format(part) for part in "qkv"})


class GatedMLPMapping(AutoMapping):
    def __init__(self, megatron: str, hf: str) -> None:
        super().__init__(megatron, {part: hf.format(part) for part in ("gate", "up")})


class MambaInProjMapping(AutoMapping):
    """A kind that no rule has."""


class MegatronModelBridge:
    CONFIG_MAPPING: tuple[str, ...] = ()

    def mapping_registry(self) -> list[AutoMapping]:
        raise NotImplementedError

    def maybe_modify_loaded_hf_weight(self) -> None: ...


def dense() -> list[AutoMapping]:
    """As megatron-bridge lists a Qwen2: norms under Transformer Engine's names and under the plain ones."""
    return [
        AutoMapping("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        AutoMapping("output_layer.weight", "lm_head.weight"),
        AutoMapping("decoder.final_layernorm.weight", "model.norm.weight"),
        AutoMapping(f"{MEGATRON}self_attention.linear_qkv.layer_norm_weight", f"{HF}input_layernorm.weight"),
        AutoMapping(f"{MEGATRON}mlp.linear_fc1.layer_norm_weight", f"{HF}post_attention_layernorm.weight"),
        AutoMapping(f"{MEGATRON}input_layernorm.weight", f"{HF}input_layernorm.weight"),
        AutoMapping(f"{MEGATRON}self_attention.linear_proj.weight", f"{HF}self_attn.o_proj.weight"),
        AutoMapping(f"{MEGATRON}mlp.linear_fc2.weight", f"{HF}mlp.down_proj.weight"),
        QKVMapping(f"{MEGATRON}self_attention.linear_qkv.weight", f"{HF}self_attn.{{}}_proj.weight"),
        QKVMapping(f"{MEGATRON}self_attention.linear_qkv.bias", f"{HF}self_attn.{{}}_proj.bias"),
        GatedMLPMapping(f"{MEGATRON}mlp.linear_fc1.weight", f"{HF}mlp.{{}}_proj.weight"),
    ]


def sparse() -> list[AutoMapping]:
    """As it lists a GLM-4.5: experts both in one module and in one each, a shared one, and layers behind the last."""
    experts = f"{MEGATRON}mlp.experts."
    return [
        *dense(),
        AutoMapping(f"{MEGATRON}pre_mlp_layernorm.weight", f"{HF}post_attention_layernorm.weight"),
        AutoMapping(f"{MEGATRON}self_attention.q_layernorm.weight", f"{HF}self_attn.q_norm.weight"),
        AutoMapping(f"{MEGATRON}self_attention.k_layernorm.weight", f"{HF}self_attn.k_norm.weight"),
        AutoMapping(f"{MEGATRON}mlp.router.weight", f"{HF}mlp.gate.weight"),
        AutoMapping(f"{MEGATRON}mlp.router.expert_bias", f"{HF}mlp.gate.e_score_correction_bias"),
        GatedMLPMapping(f"{experts}linear_fc1.weight*", f"{HF}mlp.experts.*.{{}}_proj.weight"),
        AutoMapping(f"{experts}linear_fc2.weight*", f"{HF}mlp.experts.*.down_proj.weight"),
        GatedMLPMapping(f"{experts}local_experts.*.linear_fc1.weight", f"{HF}mlp.experts.*.{{}}_proj.weight"),
        AutoMapping(f"{experts}local_experts.*.linear_fc2.weight", f"{HF}mlp.experts.*.down_proj.weight"),
        GatedMLPMapping(f"{MEGATRON}mlp.shared_experts.linear_fc1.weight", f"{HF}mlp.shared_experts.{{}}_proj.weight"),
        AutoMapping(f"{MEGATRON}mlp.shared_experts.linear_fc2.weight", f"{HF}mlp.shared_experts.down_proj.weight"),
        AutoMapping(f"{MEGATRON}mlp.shared_experts.router.weight", f"{HF}mlp.shared_experts.gate.weight"),
        AutoMapping("mtp.layers.0.enorm.weight", "model.layers.2.enorm.weight"),
    ]


def provider(of: ModelDims, **changes: Any) -> SimpleNamespace:
    """megatron-core's ``TransformerConfig`` with a provider's further fields, of these sizes."""
    experts, latent = of.experts, of.latent
    return SimpleNamespace(
        **{
            "num_layers": of.layers,
            "hidden_size": of.hidden,
            "ffn_hidden_size": of.ffn_hidden,
            "num_attention_heads": of.heads,
            "num_query_groups": of.kv_heads,
            "kv_channels": of.head_dim,
            "vocab_size": of.vocabulary,
            "seq_length": of.max_positions,
            "share_embeddings_and_output_weights": of.tied_embeddings,
            "add_qkv_bias": of.qkv_bias,
            "add_bias_linear": of.mlp_bias,
            "qk_layernorm": of.qk_norm or latent is not None,
            "layernorm_epsilon": of.norm_eps,
            "rotary_base": of.rope_theta,
            "multi_latent_attention": latent is not None,
            "q_lora_rank": latent and latent.query_rank,
            "kv_lora_rank": latent and latent.kv_rank,
            "qk_head_dim": latent and latent.plain_head_dim,
            "qk_pos_emb_head_dim": latent and latent.rotary_head_dim,
            "v_head_dim": latent and latent.value_head_dim,
            "num_moe_experts": experts and experts.count,
            "moe_router_topk": experts and experts.per_token,
            "moe_ffn_hidden_size": experts and experts.ffn_hidden,
            "moe_shared_expert_intermediate_size": experts and (experts.shared_ffn_hidden or None),
            "moe_shared_expert_gate": bool(experts and experts.shared_gate),
            "moe_router_pre_softmax": bool(experts and not experts.normalise),
            "moe_router_score_function": "sigmoid" if experts and experts.sigmoid else "softmax",
            "moe_router_enable_expert_bias": bool(experts and experts.bias),
            "moe_router_topk_scaling_factor": experts and experts.scale,
            "moe_router_num_groups": experts and experts.groups,
            "moe_router_group_topk": experts and experts.groups_per_token,
            "moe_layer_freq": experts and [int(layer in experts.layers) for layer in range(of.layers)],
        }
        | changes
    )


def test_a_dense_table_is_ours() -> None:
    rules, refused = bridged_rules(dense(), dims())
    assert weight_entries(dims(), Head.TOKEN, rules) == weight_entries(dims(), Head.TOKEN)
    assert refused == {}


def test_norms_and_experts_under_two_names_are_one_rule_each() -> None:
    sizes = dims("Qwen3MoeForCausalLM", **EXTRA["Qwen3Moe"])
    rules, refused = bridged_rules(sparse(), sizes)
    assert weight_entries(sizes, Head.TOKEN, rules) == weight_entries(sizes, Head.TOKEN)
    left = {"mlp.shared_experts.down_proj.weight", "mlp.gate.e_score_correction_bias", "self_attn.q_proj.bias"}
    assert {HF + name for name in left} < refused.keys()  # this model has none


def test_families_agree_on_what_megatron_calls_by_one_name() -> None:
    kinds: dict[str, set[object]] = {}
    for table in FAMILIES.values():
        for rule in table:
            kinds.setdefault(rule.megatron, set()).add((rule.op, rule.split, rule.layers, rule.ffn))
    assert [name for name, kind in kinds.items() if len(kind) > 1] == []


@pytest.mark.parametrize(
    ("mapping", "why"),
    [
        (MambaInProjMapping(f"{MEGATRON}mlp.linear_fc2.weight", f"{HF}mlp.down_proj.weight"), "MambaInProjMapping"),
        (AutoMapping(f"{MEGATRON}mlp.linear_fc2.weight", f"{HF}mlp.down_proj.weight", (1, 0)), "AutoMapping"),
        (AutoMapping(f"{MEGATRON}mlp.linear_fc1.weight", f"{HF}mlp.down_proj.weight"), "AutoMapping"),
        (AutoMapping(f"{MEGATRON}mixer.dt_bias", f"{HF}mlp.down_proj.weight"), "AutoMapping"),
    ],
    ids=["kind", "permuted", "other operation", "unknown tensor"],
)
def test_what_no_rule_does_is_refused_by_its_kind(mapping: AutoMapping, why: str) -> None:
    others = [one for one in dense() if one.hf_param != mapping.hf_param]
    rules, refused = bridged_rules([*others, mapping], dims())
    assert f"{HF}mlp.down_proj.weight".replace("*", "{layer}") not in {name for rule in rules for name in rule.hf}
    assert refused[f"{HF}mlp.down_proj.weight"] == (
        f"megatron-bridge makes {mapping.megatron_param} of it ({why}), no rule here does"
    )


def test_other_names_of_embedding_and_head_and_two_ways_to_make_a_tensor_are_refused() -> None:
    table = dense()
    table[0] = AutoMapping("embedding.word_embeddings.weight", "model.word_embeddings.weight")
    with pytest.raises(ValueError, match=r"must be model.embed_tokens.weight, .* of model.word_embeddings.weight"):
        bridged_rules(table, dims())
    with pytest.raises(ValueError, match=r"output_layer.weight must be lm_head.weight, .* of nothing"):
        bridged_rules([dense()[0], *dense()[2:]], dims())
    bridged_rules([dense()[0], *dense()[2:]], dims(tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"input_layernorm.weight must be made in one way, .*input_.*ln_1.weight"):
        bridged_rules([*dense(), AutoMapping(f"{MEGATRON}input_layernorm.weight", f"{HF}ln_1.weight")], dims())


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "DeepseekV2", "DeepseekV3"])
def test_sizes_are_those_that_we_read(family: str) -> None:
    architecture, extra = f"{family}ForCausalLM", EXTRA.get(family, {}) | {"pad_token_id": 5}
    ours = dims(architecture, **extra)
    assert bridged_dims(architecture, provider(ours), CONFIG | extra) == ours


def test_sizes_that_the_provider_leaves_to_megatron_core_are_filled_in() -> None:
    ours = dims("Qwen3MoeForCausalLM", **EXTRA["Qwen3Moe"] | {"head_dim": 4, "num_hidden_layers": 4})
    says = provider(ours, num_query_groups=None, kv_channels=None, moe_layer_freq=2, moe_ffn_hidden_size=None)
    found = bridged_dims("Qwen3MoeForCausalLM", says, CONFIG)
    assert (found.kv_heads, found.head_dim) == (4, 4)
    assert found.experts is not None
    assert found.experts.layers == (0, 2)
    assert found.experts.ffn_hidden == 24
    with pytest.raises(ValueError, match=r"takes tie_word_embeddings for False, config\.json says True"):
        bridged_dims("Qwen3MoeForCausalLM", provider(ours), CONFIG | {"tie_word_embeddings": True})


def test_a_bridge_that_does_more_than_its_table_says_is_told() -> None:
    class Plain(MegatronModelBridge):
        CONFIG_MAPPING = ("more",)

        def mapping_registry(self) -> list[AutoMapping]:
            return dense()

        def of_its_own(self) -> None: ...

    class Swaps(Plain):
        def maybe_modify_loaded_hf_weight(self) -> None: ...

    assert weight_changes(Plain()) == []
    assert weight_changes(Swaps()) == ["maybe_modify_loaded_hf_weight"]


@pytest.fixture
def glm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random GLM-4.5 that transformers saved, and a module that knows its family as megatron-bridge does."""
    extra = {
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 6,
        "first_k_dense_replace": 1,
        "head_dim": 8,
        "use_qk_norm": True,
        "attention_bias": True,
        "pad_token_id": 0,
    }
    sizes = {key: value for key, value in CONFIG.items() if key != "architectures"} | extra
    config, tensors = saved_model("Glm4Moe", "CausalLM", sizes)
    folder = tmp_path / "glm"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    alike = dims("DeepseekV3ForCausalLM", **EXTRA["DeepseekV3"])
    assert alike.experts is not None
    says = provider(
        dataclasses.replace(alike, latent=None, kv_heads=2, head_dim=8, qkv_bias=True, qk_norm=True),
        moe_shared_expert_intermediate_size=12,
    )

    class Glm45Bridge(MegatronModelBridge):
        def mapping_registry(self) -> list[AutoMapping]:
            return sparse()

    class AutoBridge:
        _model_bridge = Glm45Bridge()

        def __init__(self, path: str) -> None:
            assert path == str(folder) or (Path(path) / "manifest.json").is_file()
            self.hf_pretrained = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: config))

        def to_megatron_provider(self, *, load_weights: bool) -> SimpleNamespace:
            assert not load_weights
            return says

        from_hf_pretrained = classmethod(lambda kind, path: kind(path))
        list_supported_models = staticmethod(lambda: ["Glm4MoeForCausalLM"])

    module = ModuleType("megatron.bridge")
    module.__spec__ = ModuleSpec("megatron.bridge", None)
    module.AutoBridge = AutoBridge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.bridge", module)
    return folder


def test_a_model_of_a_family_without_a_table_goes_there_and_back_to_the_bit(glm: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert hf_to_megatron.main([str(glm), str(there)]) == 0
    assert megatron_to_hf.main([str(there), str(back)]) == 0
    assert verify.main([str(there), "--level", "values", "--against", str(glm)]) == 0
    mine, theirs = load_file(glm / "model.safetensors"), load_file(back / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_bias_of_routers_stays_in_float32_whatever_its_family_calls_it(
    glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = "mlp.gate.e_score_correction_bias", "mlp.expert_bias"  # as Hunyuan V3 calls it
    table = [one for one in sparse() if one.hf_param != HF + ours]
    named = [*table, AutoMapping(f"{MEGATRON}mlp.router.expert_bias", HF + theirs)]
    auto_bridge = sys.modules["megatron.bridge"].AutoBridge
    monkeypatch.setattr(auto_bridge._model_bridge, "mapping_registry", lambda: named)
    wide = {name.replace(ours, theirs): t for name, t in load_file(glm / "model.safetensors").items()}
    save_file(wide, glm / "model.safetensors")
    assert hf_to_megatron.main([str(glm), str(tmp_path / "there"), "--dtype", "bfloat16"]) == 0
    assert megatron_to_hf.main([str(tmp_path / "there"), str(tmp_path / "back")]) == 0
    assert hf_to_megatron.main([str(glm), str(tmp_path / "wide")]) == 0
    assert megatron_to_hf.main([str(tmp_path / "wide"), str(tmp_path / "narrow"), "--dtype", "bfloat16"]) == 0
    for folder in ("back", "narrow"):
        found = load_file(tmp_path / folder / "model.safetensors")
        kept = {name for name, tensor in found.items() if tensor.dtype is torch.float32}
        assert kept == {f"model.layers.1.{theirs}"}
        assert all(torch.equal(found[name], wide[name]) for name in kept)
    asked = ["--level", "values", "--against", str(glm), "--dtype", "bfloat16"]
    assert verify.main([str(tmp_path / "back"), *asked]) == 0


def test_such_a_model_is_neither_scored_nor_quantised_nor_trained(
    glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hf_to_megatron.main([str(glm), str(tmp_path / "there")]) == 0
    assert verify.main([str(glm), "--level", "logits"]) == 1
    assert "--level values is the last one for it" in capsys.readouterr().err
    assert megatron_to_hf.main([str(tmp_path / "there"), str(tmp_path / "back"), "--fp8-blocks"]) == 1
    assert "--fp8-blocks needs a family that has a table here" in capsys.readouterr().err
    with pytest.raises(UnknownArchitecture, match="unknown architecture Glm4MoeForCausalLM; known: Deep"):
        read_model_dims(glm)


def test_a_tensor_without_a_rule_is_named_with_megatron_bridges_kind(
    glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = [one for one in sparse() if "o_proj" not in one.hf_param]
    odd = MambaInProjMapping(f"{MEGATRON}self_attention.linear_proj.weight", f"{HF}self_attn.o_proj.weight")
    auto_bridge = sys.modules["megatron.bridge"].AutoBridge
    monkeypatch.setattr(auto_bridge._model_bridge, "mapping_registry", lambda: [*table, odd])
    assert hf_to_megatron.main([str(glm), str(tmp_path / "there")]) == 1
    assert (
        "no Glm4MoeForCausalLM has a tensor model.layers.0.self_attn.o_proj.weight (2 are unknown); megatron-bridge "
        "makes decoder.layers.*.self_attention.linear_proj.weight of it (MambaInProjMapping)"
    ) in capsys.readouterr().err


def test_a_tensor_of_another_shape_than_the_sizes_give_is_named(
    glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(glm / "model.safetensors")
    tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(32)  # over all heads, as in OLMoE
    save_file(tensors, glm / "model.safetensors")
    assert hf_to_megatron.main([str(glm), str(tmp_path / "there")]) == 1
    assert "q_norm.weight must have shape [8] in this Glm4MoeForCausalLM, got [32]" in capsys.readouterr().err


def test_without_megatron_bridge_an_unknown_family_is_refused_with_the_known_ones(
    glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal() -> str:
        assert hf_to_megatron.main([str(glm), str(tmp_path / "there")]) == 1
        return capsys.readouterr().err

    module = sys.modules["megatron.bridge"]
    monkeypatch.setattr(module.AutoBridge, "list_supported_models", staticmethod(list))
    assert "Glm4MoeForCausalLM; known: DeepseekV2" in refusal()
    assert "; megatron-bridge does not know it either" in refusal()
    monkeypatch.delattr(module, "AutoBridge")
    assert "megatron-bridge, which may know it, cannot be imported: AttributeError" in refusal()
    monkeypatch.setattr("megatron_rl.mcore.bridge.importlib.util.find_spec", lambda name: None)
    assert "; megatron-bridge, where it is installed, adds others, for files" in refusal()
    assert dims_from_config(CONFIG) == dims()
