"""The commands as a user types them: there and back, what verify finds, and one clear error for each bad input."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import pickle
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.config.schema import ModelConfig
from megatron_rl.convert import to_megatron
from megatron_rl.convert.console import progress_bar, size_bytes
from megatron_rl.convert.sources import MegatronSource
from megatron_rl.convert.verify import check_folder
from megatron_rl.durable import FileRecord, read_record
from megatron_rl.layout import ParallelLayout
from megatron_rl.mcore.torch_dist import TorchDistFolder
from megatron_rl.model_dims import read_model_dims
from megatron_rl.parity import ParityFailed
from megatron_rl.weights.manifest import check_file
from tests.unit.convert.folders import engine_name, folder_sums, imported, write_model
from tools.convert_hf import hf_to_megatron, megatron_to_hf, verify

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with two processes; its status, standard output, standard error."""

    def command(program: Any, *arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()  # of what made the folders
        status = program.main([*map(str, arguments), "--processes", "2"])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return command


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(found: Path, expected: Path) -> bool:
    mine, theirs = tensors(found), tensors(expected)
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == tensor.dtype and torch.equal(mine[name], tensor) for name, tensor in theirs.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(
            (family, "CausalLM")
            for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen2Moe", "Qwen3Moe", "DeepseekV2", "DeepseekV3")
        ),
        *((family, "TokenClassification") for family in ("Llama", "Mistral", "Qwen2", "Qwen3")),
    ],
)
def test_a_model_goes_there_and_back_to_the_bit(
    run: Run, tmp_path: Path, family: str, kind: str, dtype: torch.dtype
) -> None:
    source = write_model(tmp_path / "hf", family, kind, dtype)
    status, out, _ = run(hf_to_megatron, source, tmp_path / "megatron")
    assert status == 0
    assert "tensors: reads" in out
    assert "GB/s" in out
    assert run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back", "--shard-size", "4KB")[0] == 0
    assert same(tmp_path / "back", source)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == [f"{family}For{kind}"]
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    for folder in ("megatron", "back"):
        status, out, _ = run(verify, tmp_path / folder, "--level", "values", "--against", source)
        assert status == 0
        assert f"values: ok, {len(tensors(source))} tensors are the same" in out


@pytest.mark.parametrize("query_rank", [6, None])
def test_a_model_that_cannot_be_trained_here_is_converted(run: Run, tmp_path: Path, query_rank: int | None) -> None:
    """DeepSeek-V2 itself: how it chooses experts, with its numbers of groups and choices."""
    choice = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "num_experts_per_tok": 6}
    sizes = {"n_routed_experts": 16, "q_lora_rank": query_rank}
    source = write_model(tmp_path / "hf", "DeepseekV2", sizes=sizes, **choice)
    assert ("model.layers.0.self_attn.q_a_proj.weight" in tensors(source)) == (query_rank is not None)
    assert run(hf_to_megatron, source, tmp_path / "megatron")[0] == 0
    assert run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back")[0] == 0
    assert same(tmp_path / "back", source)
    against = ("--against", source, "--level")
    assert run(verify, tmp_path / "megatron", *against, "values")[0] == 0
    status, _, err = run(verify, tmp_path / "megatron", *against, "logits")
    assert status == 1
    assert "--level values is the last one for it: num_experts_per_tok must be less than 2 x topk_group, got 6" in err
    changed_config(topk_group=2)(source)
    status, _, err = run(verify, tmp_path / "megatron", *against, "values")
    assert status == 1
    assert "their configurations differ: experts is" in err
    with pytest.raises(ValueError, match=r"^DeepseekV2ForCausalLM: num_experts_per_tok must be less than"):
        read_model_dims(source)


def test_settings_that_only_computing_needs_do_not_keep_files_from_being_converted(run: Run, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0}
    source = write_model(tmp_path / "hf", eos_token_id=None, hidden_act="gelu", rope_scaling=rope, rope_theta=1e6)
    assert run(hf_to_megatron, source, tmp_path / "megatron")[0] == 0
    against = ("--level", "values", "--against", source)
    assert run(verify, tmp_path / "megatron", *against)[0] == 0
    changed_config(rope_scaling=rope | {"factor": 4.0})(source)
    status, _, err = run(verify, tmp_path / "megatron", *against)
    assert status == 1
    assert "their configurations differ: of one alone, rope scaling 'dynamic' is not supported" in err
    with pytest.raises(ValueError, match=r"hidden_act must be silu.*; config.json must name eos_.*; rope scaling"):
        read_model_dims(source)


@pytest.mark.parametrize(("family", "stacked"), [("Qwen3Moe", True), ("Qwen3", False)])
def test_a_model_comes_back_whose_layers_another_program_keeps_otherwise(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, stacked: bool
) -> None:
    """Stacked layers with experts, layers without experts that have keys of their own."""
    source = write_model(tmp_path / "hf", family)
    name = partial(to_megatron.sharded_name, stacked=stacked)
    with monkeypatch.context() as patch:
        patch.setattr(to_megatron, "sharded_name", name)
        assert run(hf_to_megatron, source, tmp_path / "megatron")[0] == 0
    keys = TorchDistFolder(tmp_path / "megatron").keys
    assert ("decoder.layers.self_attention.linear_qkv.weight" in keys) == stacked
    assert run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back")[0] == 0
    assert same(tmp_path / "back", source)


TE_MOE = {"mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}
TE_LATENT = {
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
}
TE_DENSE = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}


@pytest.mark.parametrize(
    ("family", "norms"),
    [
        ("Qwen3Moe", {0: TE_MOE, 1: TE_MOE}),
        ("DeepseekV3", {0: TE_LATENT | TE_DENSE, 1: TE_LATENT}),  # experts from layer 1 on
    ],
)
def test_a_checkpoint_of_transformer_engines_layers_is_exported(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, norms: dict[int, dict[str, str]]
) -> None:
    """With the names that megatron-core's stock specification of them gives to norms."""
    source = write_model(tmp_path / "hf", family)
    with monkeypatch.context() as patch:
        patch.setattr(to_megatron, "sharded_name", engine_name)
        assert run(hf_to_megatron, source, tmp_path / "megatron")[0] == 0
    keys = TorchDistFolder(tmp_path / "megatron").keys
    for layer, renamed in norms.items():
        for ours, theirs in renamed.items():
            assert f"decoder.layers.{layer}.{theirs}" in keys
            assert f"decoder.layers.{layer}.{ours}" not in keys
    assert run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back")[0] == 0
    assert same(tmp_path / "back", source)
    keep_away(tmp_path / "megatron", "decoder.layers.1." + next(iter(norms[1].values())))
    status, _, err = run(verify, tmp_path / "megatron")
    assert status == 1
    assert f"has no tensor decoder.layers.1.{next(iter(norms[1]))}; " in err


def test_what_is_complete_is_told_as_such(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf")
    for command, name, target in ((hf_to_megatron, "hf", "megatron"), (megatron_to_hf, "megatron", "back")):
        assert f"wrote {tmp_path / target} in " in run(command, source.parent / name, tmp_path / target)[1]
        status, out, _ = run(command, source.parent / name, tmp_path / target, "--resume")
        assert (status, out.splitlines()[-1]) == (0, f"{tmp_path / target} is complete already")


def test_a_type_can_be_asked_for_both_ways(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", kind="TokenClassification")
    assert run(hf_to_megatron, source, tmp_path / "megatron", "--dtype", "bfloat16")[0] == 0
    assert run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back", "--dtype", "float32")[0] == 0
    found = tensors(tmp_path / "back")
    for name, tensor in tensors(source).items():
        kept = tensor if name.startswith("score.") else tensor.bfloat16().float()  # the value head stays in float32
        assert torch.equal(found[name], kept), name
    assert run(verify, tmp_path / "back", "--level", "values", "--against", source)[0] == 1
    assert run(verify, tmp_path / "megatron", "--level", "values", "--against", source, "--dtype", "bfloat16")[0] == 0


@pytest.mark.parametrize(("family", "kind"), [("Qwen2", "TokenClassification"), ("DeepseekV3", "CausalLM")])
def test_no_tensor_keeps_bfloat16_where_float32_is_asked_for(run: Run, tmp_path: Path, family: str, kind: str) -> None:
    """Neither a value head nor a router's bias: only their float32 is kept."""
    source = write_model(tmp_path / "hf", family, kind, torch.bfloat16)
    assert run(hf_to_megatron, source, tmp_path / "megatron")[0] == 0
    assert run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back", "--dtype", "float32")[0] == 0
    found = tensors(tmp_path / "back")
    for name, tensor in tensors(source).items():
        assert found[name].dtype == torch.float32, name
        assert torch.equal(found[name], tensor.float()), name
    against = ("--level", "values", "--against", source, "--dtype", "float32")
    assert run(verify, tmp_path / "back", *against)[0] == 0


def test_values_are_compared_after_both_sides_are_converted_to_the_type_that_is_asked_for(
    run: Run, tmp_path: Path
) -> None:
    wide, narrow = write_model(tmp_path / "wide"), write_model(tmp_path / "narrow", dtype=torch.bfloat16)
    for folder in (wide, narrow):
        assert run(hf_to_megatron, folder, tmp_path / f"{folder.name}-megatron")[0] == 0
    for mine in (wide, tmp_path / "wide-megatron"):
        for theirs in (narrow, tmp_path / "narrow-megatron"):
            status, _, err = run(verify, mine, "--level", "values", "--against", theirs)
            assert status == 1
            assert "embed_tokens.weight: type torch.float32 against torch.bfloat16; give --dtype to compare" in err
            assert run(verify, mine, "--level", "values", "--against", theirs, "--dtype", "bfloat16")[0] == 0
            status, _, err = run(verify, mine, "--level", "values", "--against", theirs, "--dtype", "float32")
            assert status == 1
            assert "elements differ" in err


def test_a_folder_of_another_type_is_verified_in_the_type_that_is_asked_for(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many older models are published: in float16."""
    source = write_model(tmp_path / "hf", dtype=torch.float16)
    assert run(hf_to_megatron, source, tmp_path / "megatron", "--dtype", "bfloat16")[0] == 0
    taken: list[ModelConfig] = []
    monkeypatch.setattr("megatron_rl.assemble.verify_folder", lambda model, **_: taken.append(model))
    status, _, err = run(verify, source)
    assert status == 1
    assert "must be float32 or bfloat16, is torch.float16; give --dtype" in err
    asked = ("--dtype", "bfloat16")
    for options in ((source, *asked), (source, "--level", "logits", *asked)):
        assert run(verify, *options)[0] == 0
    against = (tmp_path / "megatron", "--against", source, *asked, "--level")
    assert f"values: ok, {len(tensors(source))} tensors are the same" in run(verify, *against, "values")[1]
    assert run(verify, *against, "logits")[0] == 0
    assert taken == [ModelConfig(path=folder, dtype="bfloat16") for folder in (source, tmp_path / "megatron")]


def test_code_that_a_model_folder_names_goes_with_it_or_is_not_named(run: Run, tmp_path: Path) -> None:
    code = {"AutoConfig": "configuration_mine.MyConfig", "AutoModel": "modeling_mine.MyModel"}
    source = write_model(tmp_path / "hf", auto_map=code)
    files = {
        "configuration_mine.py": "class MyConfig: ...",
        "modeling_mine.py": "class MyModel: ...",
        "tokenization_mine.py": "class MyTokenizer: ...",
        "tokenizer_config.json": json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]}}),
        "chat_template.json": "{}",
        "tekken.json": "{}",
    }
    for name, content in files.items():
        (source / name).write_text(content)
    (source / "imported_by_mine.py").write_text("")
    (tmp_path / "outside.py").write_text("")
    assert run(hf_to_megatron, source, tmp_path / "megatron")[0] == 0
    assert run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back")[0] == 0
    for folder in (tmp_path / "megatron", tmp_path / "back"):
        assert {name: (folder / name).read_text() for name in files} == files
        assert (folder / "imported_by_mine.py").is_file()
        assert json.loads((folder / "config.json").read_text())["auto_map"] == code
        assert "modeling_mine.py" in json.loads((folder / "manifest.json").read_text())["files"]
    for number, elsewhere in enumerate(("another/repository--modeling_mine.MyModel", "../outside.MyModel", "gone.A")):
        changed_config(auto_map=code | {"AutoModel": elsewhere})(source)
        assert run(hf_to_megatron, source, tmp_path / f"megatron{number}")[0] == 0
        assert "auto_map" not in json.loads((tmp_path / f"megatron{number}" / "config.json").read_text())
        assert not (tmp_path / f"megatron{number}" / "outside.py").exists()
    (source / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json must be JSON" in run(hf_to_megatron, source, tmp_path / "again")[2]


def test_code_that_nothing_names_stays_behind(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf")
    (source / "train.py").write_text("")
    assert run(hf_to_megatron, source, tmp_path / "megatron")[0] == 0
    assert not (tmp_path / "megatron" / "train.py").exists()


def test_templates_in_a_folder_of_their_own_go_along_and_are_summed(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf")
    (source / "additional_chat_templates").mkdir()
    for name in ("tiktoken.model", "additional_chat_templates/tools.jinja", "additional_chat_templates/notes.txt"):
        (source / name).write_text(name)
    assert run(hf_to_megatron, source, tmp_path / "megatron")[0] == 0
    assert run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back")[0] == 0
    for folder in (tmp_path / "megatron", tmp_path / "back"):
        template = folder / "additional_chat_templates" / "tools.jinja"
        assert template.read_text() == "additional_chat_templates/tools.jinja"
        assert not (folder / "additional_chat_templates" / "notes.txt").exists()
        assert (folder / "tiktoken.model").is_file()
        assert run(verify, folder)[0] == 0
        template.write_text("changed")
        assert f"{template}: it must have" in run(verify, folder)[2]


def test_a_folder_that_ends_without_a_tokenizer_is_told(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf")
    told = "\nno tokenizer goes along: there is no tokenizer.json, "
    assert told not in run(hf_to_megatron, source, tmp_path / "with", "--dry-run")[1]
    (source / "tokenizer.json").rename(source / "vocabulary.txt")
    assert told in run(hf_to_megatron, source, tmp_path / "megatron")[1]
    assert told in run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back")[1]


def flip(file: Path, at: int = -1) -> None:
    """Another byte at one place."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_a_damaged_source_is_not_exported(run: Run, folders: tuple[Path, Path, Path]) -> None:
    """A flipped bit of a weight, which no format notices, would be certified by the target's own manifest."""
    _, megatron, back = folders
    file = megatron / "__0_0.distcp"
    weight = MegatronSource(megatron)
    places = weight.folder._places.values()
    flip(file, next(place.offset + place.length // 2 for place in places if place.length > 2000))
    status, out, err = run(megatron_to_hf, megatron, back.parent / "out")
    assert status == 1
    assert "of the source's files with their sums first\n" in out
    (line,) = err.splitlines()
    assert line.startswith(f"error: {file}: it must have")
    assert f"restore it, or if it was changed on purpose remove {megatron / 'manifest.json'}" in line
    assert sorted(path.name for path in back.parent.iterdir()) == ["back", "hf", "megatron"]
    (megatron / "manifest.json").unlink()
    status, out, _ = run(megatron_to_hf, megatron, back.parent / "out")
    assert (status, "with their sums" in out) == (0, False)


def test_a_damaged_folder_with_sums_is_not_imported(run: Run, folders: tuple[Path, Path, Path]) -> None:
    _, _, back = folders
    names = tensors(back)
    for file in back.glob("*.safetensors"):
        flip(file)
    status, _, err = run(hf_to_megatron, back, back.parent / "out")
    assert status == 1
    (line,) = err.splitlines()
    named = re.match(
        f"error: {back}: the bytes of (.*) are not those that were written; restore it, or if it was", line
    )
    assert named
    assert named[1] in names
    assert not (back.parent / "out").exists()


def test_another_tensor_than_the_manifest_names_is_refused(run: Run, folders: tuple[Path, Path, Path]) -> None:
    source, _, back = folders
    for file in back.glob("model*"):
        file.unlink()
    narrow = {name: tensor.bfloat16() for name, tensor in tensors(source).items()}
    save_file(narrow, back / "model.safetensors")
    status, _, err = run(hf_to_megatron, back, back.parent / "out")
    assert status == 1
    assert "is not the tensor that was written; restore it, or if it was changed on purpose remove" in err


def test_a_manifest_that_names_weights_alone_is_still_one(run: Run, folders: tuple[Path, Path, Path]) -> None:
    _, _, back = folders
    manifest = json.loads((back / "manifest.json").read_text())
    (back / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    flip(min(back.glob("*.safetensors")))
    status, _, err = run(verify, back)
    assert status == 1
    assert "model-00001-of-" in err


def in_a_training_checkpoint(megatron: Path, step: Path) -> Path:
    """As a run's checkpoint has a model: the manifest is the checkpoint's."""
    policy = step / "policy"
    step.mkdir()
    megatron.rename(policy)
    (policy / "manifest.json").unlink()
    hf = step / "hf"
    hf.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (policy / name).rename(hf / name)
    (step / "state.json").write_text("{}")
    records = {
        path.relative_to(step).as_posix(): read_record(path) for path in sorted(step.rglob("*")) if path.is_file()
    }
    (step / "manifest.json").write_text(json.dumps({name: asdict(record) for name, record in records.items()}))
    return policy


def test_the_manifest_of_a_training_checkpoint_counts_for_its_models(
    run: Run, folders: tuple[Path, Path, Path]
) -> None:
    source, megatron, _ = folders
    policy = in_a_training_checkpoint(megatron, source.parent / "step_000001")
    assert run(verify, policy)[1] == f"files: ok, {policy}\n"
    assert run(megatron_to_hf, policy, source.parent / "out")[0] == 0
    assert same(source.parent / "out", source)
    for name in ("__0_0.distcp", ".metadata"):
        flip(policy / name, 100)
        for command in ((verify, policy), (megatron_to_hf, policy, source.parent / "again")):
            status, _, err = run(*command)
            assert status == 1
            assert f"{policy / name}: it must have" in err
            assert "remove" not in err
        assert not (source.parent / "again").exists()
        flip(policy / name, 100)


def test_the_manifest_of_a_training_checkpoint_counts_for_its_hugging_face_folder(
    run: Run, folders: tuple[Path, Path, Path]
) -> None:
    source, megatron, _ = folders
    step = source.parent / "step_000001"
    shutil.copyfile(source / "model.safetensors", megatron / "model.safetensors")
    policy = in_a_training_checkpoint(megatron, step)
    hf = step / "hf"
    (policy / "model.safetensors").rename(hf / "model.safetensors")
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["hf/model.safetensors"] = manifest.pop("policy/model.safetensors")
    (step / "manifest.json").write_text(json.dumps(manifest))
    status, out, _ = run(hf_to_megatron, hf, source.parent / "whole")
    assert status == 0
    assert "of the source's files with their sums first\n" in out
    flip(hf / "model.safetensors", (hf / "model.safetensors").stat().st_size - 1)
    status, _, err = run(hf_to_megatron, hf, source.parent / "out")
    assert status == 1
    assert f"{hf / 'model.safetensors'}: it must have" in err
    assert not (source.parent / "out").exists()


def test_a_critic_that_transformers_has_no_class_for_stays_in_megatrons_format(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "DeepseekV2")
    with_tensors(
        lambda t: t.update({"score.weight": t.pop("lm_head.weight")[:1].clone(), "score.bias": torch.zeros(1)})
    )(source)
    changed_config(architectures=["DeepseekV2ForTokenClassification"])(source)
    assert run(hf_to_megatron, source, tmp_path / "megatron")[0] == 0
    status, _, err = run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back", "--dry-run")
    assert status == 1
    assert "transformers has no DeepseekV2ForTokenClassification" in err


def test_a_dry_run_prints_sizes_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf")
    size = sum(tensor.nbytes for tensor in tensors(source).values()) / (1 << 20)
    status, out, _ = run(hf_to_megatron, source, tmp_path / "megatron", "--dry-run")
    assert status == 0
    assert out.startswith(f"17 Megatron tensors: reads {size:.1f} MiB, writes {size:.1f} MiB into 2 file(s)\n")
    assert not (tmp_path / "megatron").exists()
    run(hf_to_megatron, source, tmp_path / "megatron")
    assert "into 1 file(s)" in run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back", "--dry-run")[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_block_quantised_weights_come_in_and_go_out(run: Run, tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4, "vocab_size": 512}
    source = write_model(tmp_path / "hf", sizes=sizes)
    run(hf_to_megatron, source, tmp_path / "megatron")
    assert run(megatron_to_hf, tmp_path / "megatron", tmp_path / "fp8", "--fp8-blocks")[0] == 0
    small = tensors(tmp_path / "fp8")
    linear = [name for name in small if name.endswith("_proj.weight")]
    assert len(linear) == 14
    for name in linear:
        assert small[name].dtype == torch.float8_e4m3fn
        assert small[f"{name}_scale_inv"].shape == (1, 1)
    assert small["lm_head.weight"].dtype == torch.float32
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    # there and back again: what was quantised once stays what it is
    assert run(hf_to_megatron, tmp_path / "fp8", tmp_path / "again", "--dtype", "float32")[0] == 0
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    status, _, err = run(
        verify, tmp_path / "fp8", "--level", "values", "--against", tmp_path / "again", "--dtype", "float32"
    )
    assert (status, err) == (0, "")
    assert run(megatron_to_hf, tmp_path / "again", tmp_path / "fp8-again", "--fp8-blocks")[0] == 0
    for name, tensor in tensors(tmp_path / "fp8-again").items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(tensor.view(torch.uint8), small[name].view(torch.uint8)), name
        else:
            torch.testing.assert_close(tensor, small[name], rtol=1e-6, atol=0)
    assert run(hf_to_megatron, tmp_path / "fp8", tmp_path / "bf16")[0] == 0
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "float32"  # of the largest tensor


@pytest.mark.parametrize(
    ("family", "sizes", "told"),
    [
        (
            "Qwen3Moe",
            {"hidden_size": 128, "moe_intermediate_size": 192},
            "a moe_intermediate_size that is a multiple of 128, Qwen3Moe.* 192:",
        ),
        (
            "Qwen3Moe",
            {"hidden_size": 192, "moe_intermediate_size": 128},
            "a hidden_size that is a multiple of 128, Qwen3Moe.* 192:",
        ),
        (
            "DeepseekV3",
            {"hidden_size": 128, "moe_intermediate_size": 128, "q_lora_rank": 96},
            "a q_lora_rank that is a multiple of 128, DeepseekV3.* 96:",
        ),
    ],
)
def test_blocks_that_engines_can_load_in_no_layout_are_refused(
    run: Run, tmp_path: Path, family: str, sizes: dict[str, int], told: str
) -> None:
    run(hf_to_megatron, write_model(tmp_path / "hf", family, sizes=sizes), tmp_path / "megatron")
    status, _, err = run(megatron_to_hf, tmp_path / "megatron", tmp_path / "fp8", "--fp8-blocks", "--dry-run")
    assert status == 1
    assert re.search(f"^error: --fp8-blocks needs {told} vLLM runs such a model in no layout", err)


def test_blocks_in_which_no_layer_could_be_are_refused(run: Run, tmp_path: Path) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 200}
    run(hf_to_megatron, write_model(tmp_path / "hf", sizes=sizes), tmp_path / "megatron")
    status, _, err = run(megatron_to_hf, tmp_path / "megatron", tmp_path / "fp8", "--fp8-blocks", "--dry-run")
    assert status == 1
    assert "this Qwen2ForCausalLM has none: nothing would be in 8 bits" in err


WIDE = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 256,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 8,
    "v_head_dim": 64,
}
"""Every linear layer has several blocks each way, the last rows cut off where engines hold nothing behind them."""


def blocks_spread(scales: Tensor, shape: torch.Size) -> Tensor:
    """The scale of each element."""
    return scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]


def test_a_deepseek_in_blocks_comes_in_and_goes_out_block_by_block(run: Run, tmp_path: Path) -> None:
    """As DeepSeek-V3 is published: linear layers in blocks, a router's bias in float32, a layer that is left out."""
    source = write_model(
        tmp_path / "hf",
        "DeepseekV3",
        dtype=torch.bfloat16,
        sizes=WIDE,
        num_nextn_predict_layers=1,
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    linear = [name for name in tensors(source) if re.search(r"_proj(_with_mqa)?\.weight$", name)]
    assert {name.split(".")[-2] for name in linear} == {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    draw = torch.Generator().manual_seed(0)
    expected = {}

    def quantised(held: dict[str, Tensor]) -> None:
        held["model.layers.2.mlp.down_proj.weight"] = held["model.layers.0.mlp.down_proj.weight"].clone()
        for name in (*linear, "model.layers.2.mlp.down_proj.weight"):
            small = (100 * torch.randn(held[name].shape, generator=draw)).to(torch.float8_e4m3fn)
            blocks = [-(-side // 128) for side in small.shape]
            assert min(blocks) > 1, name
            scales = 2 ** (8 * torch.rand(blocks, generator=draw) - 12)  # far apart: another block's would show
            held |= {name: small, f"{name}_scale_inv": scales}
            expected[name] = small.float() * blocks_spread(scales, small.shape)
        for name in [name for name in held if name.endswith("e_score_correction_bias")]:
            held[name] = held[name].float()

    with_tensors(quantised)(source)
    others = {name: tensor for name, tensor in tensors(source).items() if name not in expected}
    wanted = {name: tensor for name, tensor in (others | expected).items() if ".layers.2." not in name}
    wanted = {name: tensor for name, tensor in wanted.items() if not name.endswith("_scale_inv")}

    for dtype in (torch.float32, torch.bfloat16):
        into = str(dtype).removeprefix("torch.")
        options = ("--dtype", into) if dtype is torch.float32 else ()  # bfloat16 unless something else is asked for
        status, out, _ = run(hf_to_megatron, source, tmp_path / into, *options)
        assert status == 0
        left = "2 tensors of layers that predict further tokens (model.layers.2.mlp.down_proj.weight ...)"
        assert f"\nleft out: {left}\n" in out
        assert run(megatron_to_hf, tmp_path / into, tmp_path / f"{into}-hf")[0] == 0
        found = tensors(tmp_path / f"{into}-hf")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            kept = torch.float32 if name.endswith("e_score_correction_bias") else dtype
            assert found[name].dtype == kept, name
            assert torch.equal(found[name], tensor.to(kept)), name

    assert run(megatron_to_hf, tmp_path / "float32", tmp_path / "fp8", "--fp8-blocks")[0] == 0
    found = tensors(tmp_path / "fp8")
    assert found.keys() == wanted.keys() | {f"{name}_scale_inv" for name in linear}
    assert {name for name, tensor in found.items() if tensor.dtype is torch.float8_e4m3fn} == {*linear}
    for name in linear:
        scales, whole = found[f"{name}_scale_inv"], wanted[name]
        for down, across in itertools.product(*map(range, scales.shape)):
            block = whole[128 * down : 128 * down + 128, 128 * across : 128 * across + 128]
            assert scales[down, across] == block.abs().amax() / torch.tensor(448.0), name
        spread = blocks_spread(scales, whole.shape)
        # e4m3 has three bits behind the first one, down to a step of 2^-9
        bound = torch.maximum(whole.abs() / 16, spread * 2**-10)
        assert ((found[name].float() * spread - whole).abs() <= bound * (1 + 1e-5)).all(), name
    against = ("--level", "values", "--against", tmp_path / "fp8", "--dtype", "float32")
    assert run(hf_to_megatron, tmp_path / "fp8", tmp_path / "again", "--dtype", "float32")[0] == 0
    assert run(verify, tmp_path / "again", *against)[0] == 0


@pytest.fixture
def folders(run: Run, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model, the same imported, and exported in several files."""
    source = write_model(tmp_path / "hf", "Llama")
    run(hf_to_megatron, source, tmp_path / "megatron")
    run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back", "--shard-size", "4KB")
    return source, tmp_path / "megatron", tmp_path / "back"


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    held = load_file(file)
    change(held)
    save_file({name: tensor.clone() for name, tensor in held.items()}, file, metadata={"format": "pt"})


def test_verify_finds_a_flipped_byte_by_the_name_of_its_tensor(run: Run, folders: tuple[Path, Path, Path]) -> None:
    _, megatron, back = folders
    record = json.loads((back / "manifest.json").read_text())["tensors"]["model.layers.1.mlp.up_proj.weight"]
    flip(back / record["file"], record["begin"] + 5)
    status, _, err = run(verify, back)
    assert status == 1
    assert err.startswith("error: model.layers.1.mlp.up_proj.weight: its bytes in")
    flip(megatron / "__1_0.distcp", -900)
    status, _, err = run(verify, megatron)
    assert status == 1
    assert "__1_0.distcp: it must have" in err


def test_verify_reads_the_files_of_a_megatron_folder_side_by_side_and_tells_how_far_it_is(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, megatron, _ = folders
    sizes = {file.name: file.stat().st_size for file in megatron.glob("*.distcp")}
    assert len(sizes) == 2
    monkeypatch.setattr("megatron_rl.durable.CHUNK_BYTES", 1000)
    both, told = multiprocessing.get_context("fork").Barrier(2), multiprocessing.get_context("fork").Queue()

    def check(folder: Path, name: str, expected: FileRecord, read: Callable[[int], None]) -> None:
        if name in sizes:
            both.wait(30)  # breaks unless the two are read by two processes at one time

        def reading(count: int) -> None:
            told.put((name, count))
            read(count)

        check_file(folder, name, expected, reading)

    monkeypatch.setattr("megatron_rl.convert.verify.check_file", check)
    total = 0

    def progress(done: int) -> None:
        nonlocal total
        total = done

    assert check_folder(megatron, processes=2, progress=progress).summed
    manifest = json.loads((megatron / "manifest.json").read_text())
    assert total == sum(record["size_bytes"] for record in manifest["files"].values())
    found: dict[str, list[int]] = {}
    while sum(map(sum, found.values())) < total:
        name, count = told.get(timeout=30)
        found.setdefault(name, []).append(count)
    for name, size in sizes.items():
        assert found[name] == [1000] * (size // 1000) + [size % 1000] * (size % 1000 > 0)


def test_verify_finds_a_flipped_byte_of_a_header(run: Run, folders: tuple[Path, Path, Path]) -> None:
    file = sorted(folders[2].glob("*.safetensors"))[0]
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"pt"', b'"pu"'))
    status, _, err = run(verify, folders[2])
    assert status == 1
    assert "its header has changed" in err


def test_verify_finds_a_truncated_shard(run: Run, folders: tuple[Path, Path, Path]) -> None:
    _, megatron, back = folders
    content = json.loads((back / "manifest.json").read_text())
    file = sorted(content["shards"])[-1]
    last = max((t["end"], name) for name, t in content["tensors"].items() if t["file"] == file)[1]
    (back / file).write_bytes((back / file).read_bytes()[:-1])
    status, _, err = run(verify, back)
    assert status == 1
    assert f"first tensor beyond its end: {last}" in err
    (megatron / "manifest.json").unlink()
    file = "__1_0.distcp"
    (megatron / file).write_bytes((megatron / file).read_bytes()[:-1])
    status, _, err = run(verify, megatron)
    assert status == 1
    assert "__1_0.distcp is cut short" in err


def test_verify_finds_an_index_that_names_an_absent_tensor(run: Run, folders: tuple[Path, Path, Path]) -> None:
    back = folders[2]
    file = back / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.9.x"] = next(iter(index["weight_map"].values()))
    file.write_text(json.dumps(index))
    assert run(verify, back)[0] == 1
    (back / "manifest.json").unlink()
    status, _, err = run(verify, back)
    assert status == 1
    assert "holds model.layers.9.x, which it does not" in err


def test_verify_finds_a_missing_value_head(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", kind="TokenClassification")
    rewrite(source / "model.safetensors", lambda held: held.pop("score.weight"))
    status, _, err = run(verify, source)
    assert status == 1
    assert "must hold score.weight, a tensor of every Qwen2ForCausalLM critic" in err


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (
            lambda t: t["model.layers.1.mlp.down_proj.weight"].view(-1)[37].add_(1),
            "model.layers.1.mlp.down_proj.weight",
        ),
        (
            lambda t: t.update(
                {
                    "model.layers.0.self_attn.q_proj.weight": t["model.layers.0.self_attn.q_proj.weight"].flip(0),
                    "model.norm.weight": t["model.norm.weight"] + 1,
                }
            ),
            "model.layers.0.self_attn.q_proj.weight",
        ),
        (
            lambda t: t.update({"model.layers.1.input_layernorm.weight": t["model.layers.0.input_layernorm.weight"]}),
            "model.layers.1.input_layernorm.weight",
        ),
    ],
)
def test_verify_names_the_first_tensor_that_differs(
    run: Run, folders: tuple[Path, Path, Path], change: Callable[[dict[str, Tensor]], None], first: str
) -> None:
    source, megatron, back = folders
    rewrite(source / "model.safetensors", change)
    for folder in (megatron, back):
        status, out, err = run(verify, folder, "--level", "values", "--against", source)
        assert status == 1
        assert "files: ok" in out
        assert err.startswith(f"error: {first}: ")


def keep_away(megatron: Path, prefix: str) -> None:
    """As a converter that forgot some tensors leaves the folder; nobody has summed its files."""
    metadata = pickle.loads((megatron / ".metadata").read_bytes())
    held = metadata.state_dict_metadata
    for key in [key for key in held if key.startswith(prefix) and not key.endswith("_extra_state")]:
        del held[key]
    (megatron / ".metadata").write_bytes(pickle.dumps(metadata))
    (megatron / "manifest.json").unlink()


def q_and_k_swapped(held: dict[str, Tensor]) -> None:
    """The keys and as many rows of the queries have changed places."""
    q, k = (held[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qk")
    kept = q[: len(k)].clone()
    q[: len(k)] = k
    k.copy_(kept)


def padding_read_as_token(held: dict[str, Tensor]) -> None:
    """A row of padding before the second half of the vocabulary, whose tokens all move by one."""
    table = held["model.embed_tokens.weight"]
    table[16:] = torch.roll(table[16:], 1, 0)
    table[16] = 0


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (q_and_k_swapped, "model.layers.1.self_attn.q_proj.weight: 128 of 256 elements differ, the first at [0, 0]"),
        (
            padding_read_as_token,
            "model.embed_tokens.weight: 256 of 512 elements differ, the first at [16, 0]: 0 against",
        ),
    ],
)
def test_verify_names_what_a_wrong_converter_did(
    run: Run, tmp_path: Path, fault: Callable[[dict[str, Tensor]], None], told: str
) -> None:
    source, spoiled = write_model(tmp_path / "hf"), write_model(tmp_path / "spoiled")
    rewrite(spoiled / "model.safetensors", fault)
    run(hf_to_megatron, spoiled, tmp_path / "megatron")
    status, out, err = run(verify, tmp_path / "megatron", "--level", "logits", "--against", source)
    assert status == 1
    assert "files: ok" in out
    (line,) = err.splitlines()
    assert line.startswith(f"error: {told}")


@pytest.mark.parametrize(
    ("kind", "prefix", "told"),
    [
        ("CausalLM", "decoder.layers.self_attention.linear_qkv.bias", "decoder.layers.self_attention.linear_qkv.bias"),
        ("TokenClassification", "output_layer.", "output_layer.weight"),
    ],
    ids=["bias", "value head"],
)
def test_verify_names_a_tensor_that_a_converted_folder_lacks(
    run: Run, tmp_path: Path, kind: str, prefix: str, told: str
) -> None:
    source = write_model(tmp_path / "hf", kind=kind)
    run(hf_to_megatron, source, tmp_path / "megatron")
    keep_away(tmp_path / "megatron", prefix)
    status, _, err = run(verify, tmp_path / "megatron", "--level", "logits", "--against", source)
    assert status == 1
    (line,) = err.splitlines()
    assert f"has no tensor {told}; " in line


def test_verify_names_a_tensor_of_a_converted_folder_that_the_model_has_not(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf")
    run(hf_to_megatron, source, tmp_path / "megatron")
    (tmp_path / "megatron" / "manifest.json").unlink()
    changed_config(architectures=["LlamaForCausalLM"])(tmp_path / "megatron")
    status, _, err = run(verify, tmp_path / "megatron")
    assert status == 1
    assert "no LlamaForCausalLM has a tensor decoder.layers.self_attention.linear_qkv.bias (1 are unknown)" in err


NO_MANIFEST = "(it has no manifest: names, shapes and sizes alone)"


@pytest.fixture
def with_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a Megatron folder that has other tensors as well, by megatron-core's keys."""

    def make(*keys: str) -> Path:
        held = TorchDistFolder.keys.fget
        assert held is not None
        monkeypatch.setattr(TorchDistFolder, "keys", property(lambda folder: held(folder) | {*keys}))
        return imported(write_model(tmp_path / "hf"), tmp_path / "megatron")

    return make


def test_an_export_leaves_the_optimizer_and_says_that_it_leaves_layers_that_predict_further_tokens(
    run: Run, tmp_path: Path, with_keys: Callable[..., Path]
) -> None:
    moment = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
    megatron = with_keys(moment, f"chained_1.{moment}", "mtp.layers.0.eh_proj.weight", "mtp.layers.0.hnorm.weight")
    left = "2 tensors of layers that predict further tokens (mtp.layers.0.eh_proj.weight ...)"
    status, out, _ = run(megatron_to_hf, megatron, tmp_path / "back")
    assert status == 0
    assert f"\nleft out: {left}\n" in out
    assert out.endswith(f" GB/s; left out: {left}\n")
    assert run(verify, megatron)[1] == f"files: ok, {megatron}\nfiles: nothing here reads {left}\n"


@pytest.mark.parametrize("key", ["vision_model.patch.weight", "decoder.layers.new.weight", "scale"])
def test_an_export_refuses_a_tensor_from_elsewhere(
    run: Run, tmp_path: Path, with_keys: Callable[..., Path], key: str
) -> None:
    status, _, err = run(megatron_to_hf, with_keys(key), tmp_path / "back")
    assert status == 1
    assert f"no Qwen2ForCausalLM has a tensor {key} (1 are unknown); " in err
    assert not (tmp_path / "back").exists()


def test_the_head_of_a_tied_model_that_is_no_copy_is_refused_and_nothing_is_left(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", tie_word_embeddings=True)
    status, _, err = run(hf_to_megatron, source, tmp_path / "megatron")
    assert status == 1
    assert "hf: lm_head.weight must be a copy of model.embed_tokens.weight, since config.json ties them, and" in err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    with_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(source)
    status, out, _ = run(hf_to_megatron, source, tmp_path / "megatron")
    assert status == 0
    assert out.endswith("; left out: 1 tensor that copies the tied embedding (lm_head.weight)\n")


def test_verify_names_a_setting_that_differs(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", rope_theta=1e6)
    run(hf_to_megatron, source, tmp_path / "megatron")
    changed_config(rope_theta=1e4)(tmp_path / "megatron")
    against = ("--level", "logits", "--against", source)
    assert "config.json: it must have" in run(verify, tmp_path / "megatron", *against)[2]
    (tmp_path / "megatron" / "manifest.json").unlink()
    status, _, err = run(verify, tmp_path / "megatron", *against)
    assert status == 1
    (line,) = err.splitlines()
    assert line.endswith("their configurations differ: rope_theta is 10000.0 against 1000000.0")


def test_verify_names_the_head_that_one_of_two_folders_has(run: Run, tmp_path: Path) -> None:
    policy, critic = write_model(tmp_path / "policy"), write_model(tmp_path / "critic", kind="TokenClassification")
    status, _, err = run(verify, critic, "--level", "values", "--against", policy)
    assert status == 1
    assert "their configurations differ: lm_head.weight is in one alone" in err


@pytest.mark.parametrize(
    ("spoil", "options", "told"),
    [
        (None, ["--level", "engine"], "is a critic, which scores no tokens: --level logits is the last one for it"),
        (None, ["--level", "logits", "--tensor", "3"], "tensor=3 does not divide the model's 4 attention heads"),
        ("fp8", ["--level", "logits"], "has 8-bit weights, which transformers and vLLM run on GPUs alone"),
    ],
    ids=["critic", "layout", "fp8"],
)
def test_what_cannot_be_scored_gets_one_clear_error(
    run: Run, tmp_path: Path, spoil: str | None, options: list[str], told: str
) -> None:
    sizes = {"hidden_size": 128}
    folder = write_model(tmp_path / "hf", kind="CausalLM" if spoil else "TokenClassification", sizes=sizes)
    if spoil:
        run(hf_to_megatron, folder, tmp_path / "megatron")
        run(megatron_to_hf, tmp_path / "megatron", tmp_path / "fp8", "--fp8-blocks")
        folder = tmp_path / "fp8"
    status, _, err = run(verify, folder, *options)
    assert status == 1
    (line,) = err.splitlines()
    assert told in line


def test_a_critic_that_transformers_cannot_score_is_refused_before_it_is_read(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "DeepseekV2")
    named = changed_config(architectures=["DeepseekV2ForTokenClassification"], num_labels=1)
    with_tensors(lambda held: held.update({"score.weight": torch.ones(1, 16), "score.bias": torch.ones(1)}))(source)
    with_tensors(lambda held: held.pop("lm_head.weight"))(source)
    named(source)
    assert run(hf_to_megatron, source, tmp_path / "megatron")[0] == 0
    assert run(verify, tmp_path / "megatron")[0] == 0
    status, out, err = run(verify, tmp_path / "megatron", "--level", "logits")
    assert (status, out) == (1, "")
    assert "a critic of DeepseekV2ForCausalLM cannot be a Hugging Face folder" in err


@pytest.mark.parametrize(
    ("folder", "against", "ranks", "reference"),
    [
        ("hf", None, "hf", "hf"),
        ("hf", "back", "hf", "back"),
        ("megatron", "back", "megatron", "back"),
        ("back", "megatron", "megatron", "back"),
        ("megatron", None, "megatron", "an export"),
    ],
)
def test_ranks_take_megatrons_side_and_transformers_the_other_one(
    run: Run,
    folders: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    against: str | None,
    ranks: str,
    reference: str,
) -> None:
    """And what differs is told in one line, behind the table."""
    source = folders[0]
    taken: list[dict[str, Any]] = []

    def verify_folder(model: ModelConfig, **settings: Any) -> None:
        taken.append(settings | {"model": model, "same": same(settings["reference"], source)})
        raise ParityFailed("1 of 3 comparisons failed", "the table", "policy against Hugging Face: model.norm.weight")

    monkeypatch.setattr("megatron_rl.assemble.verify_folder", verify_folder)
    options = ["--level", "logits", "--tensor", "2", "--sequence-parallel"]
    options += [] if against is None else ["--against", str(source.parent / against)]
    status, out, err = run(verify, source.parent / folder, *options)
    assert (status, err) == (1, "error: policy against Hugging Face: model.norm.weight\n")
    assert out.splitlines()[-1] == "the table"
    assert ("values: ok" in out) == (against is not None)
    [found] = taken
    assert found["model"] == ModelConfig(path=source.parent / ranks, dtype="float32")
    assert found["layout"] == ParallelLayout(tensor=2, sequence_parallel=True)
    assert found["same"]
    if reference == "an export":
        assert not found["reference"].exists()  # it is gone by now
    else:
        assert found["reference"] == source.parent / reference
    assert not found["run_dir"].exists()


def test_an_engine_of_verify_runs_eagerly_so_that_a_difference_can_be_located(
    run: Run, folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[dict[str, Any]] = []
    monkeypatch.setattr("megatron_rl.assemble.verify_folder", lambda model, **settings: taken.append(settings))
    status, out, err = run(verify, folders[0], "--level", "engine")
    assert (status, err) == (0, "")
    assert "engine: ok" in out
    assert taken[0]["engine"].eager


def test_values_need_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        verify.main([str(tmp_path), "--level", "values"])
    assert ended.value.code == 2
    assert "--level values needs --against FOLDER" in capsys.readouterr().err


def test_an_export_of_damaged_weights_ends_and_leaves_nothing(run: Run, folders: tuple[Path, Path, Path]) -> None:
    _, megatron, _ = folders
    (megatron / "__0_0.distcp").write_bytes(b"\0" * (megatron / "__0_0.distcp").stat().st_size)
    (megatron / "manifest.json").unlink()  # as other programs write none
    status, _, err = run(megatron_to_hf, megatron, megatron.parent / "out")
    assert status == 1
    assert "__0_0.distcp must hold" in err
    assert "is damaged" in err
    assert sorted(path.name for path in megatron.parent.iterdir()) == ["back", "hf", "megatron"]


def changed_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def without_setting(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config[name]
        (folder / "config.json").write_text(json.dumps(config))

    return change


def with_index(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(content)


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "model.safetensors", change)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def half_written(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file_of = dict.fromkeys(held, "model-00001-of-00002.safetensors") | {
        "lm_head.weight": "model-00002-of-00002.safetensors"
    }
    save_file(held, folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "config.json").unlink(), "needs a config.json, found none"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json must be JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b'{"\xff": 1}'), "hf/config.json must be JSON"),
        (
            lambda folder: (folder / "config.json").write_text("[]"),
            "hf/config.json: config.json must hold the settings",
        ),
        (changed_config(architectures="Qwen2ForCausalLM"), "must be a list of names, got 'Qwen2ForCausalLM'"),
        (changed_config(num_attention_heads=0), "hf/config.json: Qwen2ForCausalLM: .*zero"),
        (changed_config(num_hidden_layers=None), "hf/config.json: Qwen2ForCausalLM: .*NoneType"),
        (without_setting("hidden_size"), "hf/config.json: Qwen2ForCausalLM: config.json must name hidden_size, found"),
        (with_index("{"), "model.safetensors.index.json is not an index of weight files"),
        (with_index('{"metadata": {}}'), "model.safetensors.index.json is not an index of weight files: .*weight_map"),
        (with_index('{"weight_map": {"model.norm.weight": 1}}'), "must name a file for each tensor"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "found neither in .*; pytorch_model.bin is a pickle, .*: save the model as safetensors",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "found neither in"),
        (
            with_index('{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'),
            "names other files than model.safetensors, which is there as well; remove whichever is stale",
        ),
        (changed_config(architectures=["GPT2LMHeadModel"]), "unknown architecture GPT2LMHeadModel; known: Deepseek"),
        (changed_config(architectures=["Qwen3ForCausalLM"]), "must hold model.layers.0.self_attn.k_norm.weight"),
        (changed_config(num_hidden_layers=1), "has a tensor model.layers.1."),
        (
            changed_config(intermediate_size=32),
            r"gate_proj.weight must have shape \[32, 16\] in this .*, got \[24, 16\]",
        ),
        (changed_config(vocab_size=40), r"embed_tokens.weight must have shape \[40, 16\] .*, got \[32, 16\]"),
        (
            with_tensors(lambda t: t.update({"model.norm.weight": torch.ones(15)})),
            r"hf: model.norm.weight must have shape \[16\] in this Qwen2ForCausalLM, got \[15\]; check that config",
        ),
        (
            with_tensors(
                lambda t: t.update(
                    {f"model.layers.1.self_attn.{name}_proj.weight": torch.ones(16, 17) for name in "oq"}
                )
            ),
            r"1.self_attn.q_proj.weight must have shape \[16, 16\] in this Qwen2ForCausalLM, got \[16, 17\]",
        ),
        (changed_config(quantization_config={"quant_method": "awq"}), "config.json says {.quant_method.: .awq.}"),
        *(
            (
                with_tensors(lambda t, to=to: t.update({"model.norm.weight": t["model.norm.weight"].to(to)})),
                rf"model.norm.weight has type {name}; must be one of F32, BF16, ",
            )
            for to, name in [
                (torch.float64, "F64"),
                (torch.bool, "BOOL"),
                (torch.int16, "I16"),
                (torch.float8_e5m2, "F8_E5M2"),
            ]
        ),
        (cut, "not a complete safetensors file"),
        (half_written, "names files that are not there: model-00002-of-00002"),
        (with_tensors(lambda t: t.pop("model.norm.weight")), r"must hold model.norm.weight.*\(1 are missing\)"),
        (
            with_tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()})),
            "model.norm.weight must be float32 or bfloat16, is torch.float16; give --dtype",
        ),
        (
            with_tensors(
                lambda t: t.update(
                    {"model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].bfloat16()}
                )
            ),
            r"must have one type, got \['torch.bfloat16', 'torch.float32'\]; give --dtype",
        ),
        (
            with_tensors(
                lambda t: t.update(
                    {
                        "model.layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"].to(
                            torch.float8_e4m3fn
                        )
                    }
                )
            ),
            "has 8 bits, so config.json must say weight_block_size",
        ),
        (
            with_tensors(lambda t: t.update({"model.layers.1.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)})),
            r"hf: model.layers.1.mlp.up_proj.weight_scale_inv must stand beside a model.layers.1.mlp.up_proj.weight of "
            r"type torch.float8_e4m3fn, which is of torch.float32 \(1 scales are so\)",
        ),
        (
            with_tensors(lambda t: t.update({"model.norm.weight_scale_inv": t.pop("model.norm.weight")})),
            "norm.weight_scale_inv must stand beside a model.norm.weight of .*, which is not there",
        ),
    ],
)
def test_a_folder_that_cannot_be_imported_gets_one_clear_error(
    run: Run, tmp_path: Path, spoil: Callable[[Path], None], told: str
) -> None:
    source = write_model(tmp_path / "hf")
    spoil(source)
    status, _, err = run(hf_to_megatron, source, tmp_path / "out")
    assert status == 1
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert re.search(told, line)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_wrong_paths_and_targets_get_one_clear_error(run: Run, folders: tuple[Path, Path, Path]) -> None:
    source, megatron, back = folders
    nowhere = source.parent / "nowhere"
    thinned = source.parent / "step_000002"
    thinned.mkdir()
    (thinned / "manifest.json").write_text('{"state.json": {}, "hf/model.safetensors": {}}')
    for arguments, told in [
        ((megatron_to_hf, thinned / "policy", nowhere), f"only the weights were kept, take {thinned / 'hf'}"),
        ((verify, thinned / "policy"), f"only the weights were kept, take {thinned / 'hf'}"),
        ((hf_to_megatron, nowhere, nowhere / "out"), f"a model is a folder, there is none at {nowhere}"),
        ((hf_to_megatron, megatron, source.parent / "out"), "found neither in"),
        ((hf_to_megatron, source, back), "exists and is never written over"),
        ((hf_to_megatron, source, nowhere / "out"), f"must go into a folder that exists, {nowhere} does not"),
        ((hf_to_megatron, source, Path("/sys/out")), "/sys must be a folder that can be written to"),
        ((megatron_to_hf, nowhere, nowhere / "out"), f"a Megatron checkpoint is a folder, there is none at {nowhere}"),
        ((megatron_to_hf, source, source.parent / "out"), "needs .metadata, found none in"),
        ((megatron_to_hf, megatron, back), "exists and is never written over"),
        ((megatron_to_hf, megatron, Path("/sys/out")), "/sys must be a folder that can be written to"),
        ((verify, nowhere), f"a model is a folder, there is none at {nowhere}"),
    ]:
        status, _, err = run(*arguments)
        assert status == 1, arguments
        assert err.startswith("error: ")
        assert told in err
        assert len(err.splitlines()) == 1


def test_a_target_without_a_name_or_behind_a_link_to_nowhere_is_refused(
    run: Run, folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, megatron, _ = folders
    monkeypatch.chdir(source.parent)
    Path("link").symlink_to("nowhere")
    for target, told in (
        (".", "a target must have a name of its own, got '.'"),
        ("link", "link exists and is never written over"),
    ):
        for command in ((hf_to_megatron, source, target), (megatron_to_hf, megatron, target)):
            status, _, err = run(*command)
            assert (status, err.count("\n")) == (1, 1)
            assert told in err
    assert sorted(path.name for path in source.parent.iterdir()) == ["back", "hf", "link", "megatron"]


def test_metadata_of_which_a_byte_has_changed_are_told_in_one_line_or_make_no_difference(
    folders: tuple[Path, Path, Path],
) -> None:
    _, megatron, _ = folders
    content = (megatron / ".metadata").read_bytes()
    draw, told = random.Random(0), []
    for _ in range(150):
        at = draw.randrange(len(content))
        (megatron / ".metadata").write_bytes(content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :])
        try:
            source = MegatronSource(megatron)
            for entry in source.weights.entries:
                source.tensor(entry)
        except (ValueError, OSError) as error:
            told.append(str(error))
    assert len(told) > 50
    assert all(str(megatron) in text for text in told)


def test_a_checkpoint_that_is_not_of_the_configuration_is_refused(run: Run, folders: tuple[Path, Path, Path]) -> None:
    _, megatron, _ = folders
    (megatron / "manifest.json").unlink()
    changed_config(num_hidden_layers=3)(megatron)
    status, _, err = run(megatron_to_hf, megatron, megatron.parent / "out")
    assert status == 1
    assert "must stack (3,) layers or experts, its shape is (2, " in err
    changed_config(num_hidden_layers=2, architectures=["Qwen2ForCausalLM"])(megatron)
    status, _, err = run(megatron_to_hf, megatron, megatron.parent / "out")
    assert status == 1
    assert "has no tensor decoder.layers.self_attention.linear_qkv.bias" in err
    (megatron / ".metadata").write_bytes(pickle.dumps({})[:-1])
    status, _, err = run(verify, megatron)
    assert status == 1
    assert ".metadata is damaged" in err


def test_the_padding_of_a_vocabulary_stays_behind(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "Llama")
    padded = write_model(tmp_path / "padded", "Llama", vocab_size=40)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    with_tensors(lambda t: t.update({name: torch.cat((t[name], torch.zeros(8, 16))) for name in names}))(padded)
    run(hf_to_megatron, padded, tmp_path / "megatron")
    changed_config(vocab_size=32)(tmp_path / "megatron")
    assert run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back")[0] == 0
    assert same(tmp_path / "back", source)


def test_tokens_behind_the_vocabulary_of_the_configuration_are_not_taken_for_padding(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "Llama")
    run(hf_to_megatron, source, tmp_path / "megatron")
    changed_config(vocab_size=24)(tmp_path / "megatron")
    status, _, err = run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back")
    assert status == 1
    assert "the 8 rows of embedding.word_embeddings.weight behind the 24 of the vocabulary must be padding" in err
    assert "leave these rows behind with --drop-padding-rows (process 0 of 1, at model.embed_tokens.weight)\n" in err
    assert not (tmp_path / "back").exists()


def test_padding_that_another_program_trained_is_left_behind_if_asked(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "Llama")
    padded = write_model(tmp_path / "padded", "Llama", vocab_size=40)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    with_tensors(lambda t: t.update({name: torch.cat((t[name], torch.ones(8, 16))) for name in names}))(padded)
    run(hf_to_megatron, padded, tmp_path / "megatron")
    (tmp_path / "megatron" / "manifest.json").unlink()
    changed_config(vocab_size=32)(tmp_path / "megatron")
    against = ("--level", "values", "--against", source)
    for command in ((megatron_to_hf, tmp_path / "megatron", tmp_path / "b"), (verify, tmp_path / "megatron", *against)):
        status, _, err = run(*command)
        assert status == 1
        assert "leave these rows behind with --drop-padding-rows" in err
    status, out, _ = run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back", "--drop-padding-rows")
    assert status == 0
    assert "left out: 8 rows behind the vocabulary\n" in out
    assert same(tmp_path / "back", source)
    assert run(verify, tmp_path / "megatron", *against, "--drop-padding-rows")[0] == 0


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        (
            "Qwen2",
            {"vocab_size": 40},
            r"word_embeddings.weight must have shape \[40, 16\], or more rows, .* \[32, 16\]",
        ),
        (
            "Qwen2",
            {"hidden_size": 32},
            r"word_embeddings.weight must have shape \[32, 32\], or more rows, .* \[32, 16\]",
        ),
        ("Qwen2", {"intermediate_size": 32}, r"mlp.linear_fc1.weight must have shape \[64, 16\], .* \[48, 16\]"),
        (
            "Qwen3",
            {"num_attention_heads": 6, "num_key_value_heads": 1},
            r"linear_proj.weight must have shape \[16, 48\], .* \[16, 32\]",
        ),
    ],
)
def test_a_tensor_of_another_size_than_the_configuration_says_is_named(
    run: Run, tmp_path: Path, family: str, changes: dict[str, int], told: str
) -> None:
    run(hf_to_megatron, write_model(tmp_path / "hf", family), tmp_path / "megatron")
    (tmp_path / "megatron" / "manifest.json").unlink()
    changed_config(**changes)(tmp_path / "megatron")
    for command in ((megatron_to_hf, tmp_path / "megatron", tmp_path / "back"), (verify, tmp_path / "megatron")):
        status, _, err = run(*command)
        assert status == 1
        assert re.search(told, err)
        assert f"{tmp_path / 'megatron' / 'config.json'} (--like names its folder) must belong to the checkpoint" in err


def test_the_same_export_gives_the_same_files(run: Run, folders: tuple[Path, Path, Path]) -> None:
    _, megatron, back = folders
    run(megatron_to_hf, megatron, back.parent / "again", "--shard-size", "4KB")
    assert folder_sums(back.parent / "again") == folder_sums(back)


@pytest.mark.parametrize(("text", "size"), [("4KB", 4000), ("2GiB", 2 << 30), ("1.5MB", 1_500_000), ("7", 7)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert size_bytes(text) == size


@pytest.mark.parametrize("arguments", [["--shard-size", "big"], ["--shard-size", "0"], ["--processes", "0"]])
def test_options_that_mean_nothing_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        megatron_to_hf.main(["a", "b", *arguments])
    assert ended.value.code == 2
    assert "must be" in capsys.readouterr().err


def test_layers_that_predict_further_tokens_are_left_out_and_said(run: Run, tmp_path: Path) -> None:
    source = write_model(tmp_path / "hf", "DeepseekV3", num_nextn_predict_layers=1)
    with_tensors(lambda t: t.update({"model.layers.2.eh_proj.weight": torch.ones(2, 2)}))(source)
    status, out, _ = run(hf_to_megatron, source, tmp_path / "megatron")
    assert status == 0
    left = "1 tensor of layers that predict further tokens (model.layers.2.eh_proj.weight)"
    assert f"\nleft out: {left}\n" in out  # before the work begins
    assert out.endswith(f" GB/s; left out: {left}\n")
    assert run(megatron_to_hf, tmp_path / "megatron", tmp_path / "back")[0] == 0
    for folder in ("megatron", "back"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["num_nextn_predict_layers"] == 0  # else a program looks for them
        status, out, _ = run(verify, tmp_path / folder, "--level", "values", "--against", source)
        assert status == 0
        assert out.splitlines()[1:3] == [f"files: ok, {source} {NO_MANIFEST}", f"files: nothing here reads {left}"]
    changed_config(num_nextn_predict_layers=0)(source)
    assert "has a tensor model.layers.2.eh_proj.weight" in run(hf_to_megatron, source, tmp_path / "again")[2]


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 102.0, 106.0, 110.0])
    monkeypatch.setattr("megatron_rl.convert.console.time.monotonic", lambda: next(clock))
    with progress_bar("export", 10 * 10**9) as progress:
        progress(10**9)  # too early for a line
        progress(3 * 10**9)
        progress(4 * 10**9)
    assert capsys.readouterr().err == "export: 30%, 0.50 GB/s, 14 s left\n"
