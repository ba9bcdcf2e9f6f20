from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.weights.safetensors_io import HfFolder, save_hf_folder
from megatron_rl.weights.weight_map import Head, weight_map
from tests.unit.weights.models import CONFIG, dims, hf_tensors


@pytest.fixture
def like(tmp_path: Path) -> Path:
    folder = tmp_path / "like"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "qwen2", "dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    (folder / "README.md").write_text("not copied")
    return folder


def some_tensors() -> list[tuple[str, Tensor]]:
    return [(f"t{index}", torch.randn(index + 1, 4)) for index in range(5)]


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 1 << 20])
def test_what_was_written_is_read_again(tmp_path: Path, like: Path, max_shard_bytes: int) -> None:
    tensors = some_tensors()
    save_hf_folder(tmp_path / "out", iter(tensors), like=like, max_shard_bytes=max_shard_bytes)

    folder = HfFolder(tmp_path / "out")
    assert folder.names == {name for name, _ in tensors}
    for name, tensor in tensors:
        assert torch.equal(folder.tensor(name), tensor)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    expected = {
        1: [f"model-{n:05d}-of-00005.safetensors" for n in range(1, 6)],
        100: [f"model-{n:05d}-of-00003.safetensors" for n in range(1, 4)],  # 16+32+48, 64, 80 bytes
        1 << 20: ["model.safetensors"],
    }[max_shard_bytes]
    assert files == expected
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (len(files) > 1)


def test_configuration_and_tokenizer_come_along(tmp_path: Path, like: Path) -> None:
    save_hf_folder(tmp_path / "out", some_tensors(), like=like)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == CONFIG | {"model_type": "qwen2", "dtype": "float32"}  # the type that was written


def test_a_configuration_names_no_code_or_layers_that_are_not_written(tmp_path: Path, like: Path) -> None:
    config = CONFIG | {"dtype": "float32", "num_nextn_predict_layers": 1, "auto_map": {"AutoModel": "modeling_x.X"}}
    (like / "config.json").write_text(json.dumps(config))
    save_hf_folder(tmp_path / "without", some_tensors(), like=like)
    (like / "modeling_x.py").write_text("class X: ...")
    save_hf_folder(tmp_path / "with", some_tensors(), like=like)
    written = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("without", "with")}
    assert written["with"] == config | {"num_nextn_predict_layers": 0}
    assert written["without"] == {key: value for key, value in written["with"].items() if key != "auto_map"}
    assert (tmp_path / "with" / "modeling_x.py").read_text() == "class X: ..."


@pytest.mark.parametrize("keys", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"]])
def test_a_configuration_names_the_type_that_was_written_under_each_key_that_it_has(
    tmp_path: Path, like: Path, keys: list[str]
) -> None:
    (like / "config.json").write_text(json.dumps(CONFIG | dict.fromkeys(keys, "float16")))
    save_hf_folder(tmp_path / "out", some_tensors(), like=like)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == CONFIG | dict.fromkeys(keys, "float32")


def test_a_critic_is_loaded_by_transformers(tmp_path: Path, like: Path) -> None:
    from transformers import AutoModelForTokenClassification

    source = hf_tensors("Qwen2", "TokenClassification", False)
    weights = weight_map(dims(), Head.VALUE)
    tensors = (
        part
        for entry in weights.entries
        for part in weights.to_hf(entry, weights.to_megatron(entry, [source[name] for name in entry.hf]))
    )
    save_hf_folder(tmp_path / "out", tensors, like=like, architecture="Qwen2ForTokenClassification")

    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        n: t.shape for n, t in source.items()
    }
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.state_dict().items())


def test_an_existing_folder_is_never_written_over(tmp_path: Path, like: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists and is never written over; remove it"):
        save_hf_folder(tmp_path / "out", some_tensors(), like=like)


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, like: Path) -> None:
    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from some_tensors()
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        save_hf_folder(tmp_path / "out", failing(), like=like, max_shard_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["like"]


def test_no_tensors_and_tensors_twice_are_refused(tmp_path: Path, like: Path) -> None:
    with pytest.raises(ValueError, match="at least one tensor"):
        save_hf_folder(tmp_path / "out", [], like=like)
    with pytest.raises(ValueError, match="written once, got t0 twice"):
        save_hf_folder(tmp_path / "out", [*some_tensors(), ("t0", torch.zeros(1))], like=like, max_shard_bytes=1)


def test_missing_weights_files_and_tensors_are_named(tmp_path: Path, like: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found neither in"):
        HfFolder(like)
    save_hf_folder(tmp_path / "out", some_tensors(), like=like, max_shard_bytes=1)
    with pytest.raises(KeyError, match="has no tensor lm_head"):
        HfFolder(tmp_path / "out").tensor("lm_head.weight")
    (tmp_path / "out" / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names files that are not there: model-00002-of-00005"):
        HfFolder(tmp_path / "out")


def test_a_truncated_file_is_refused(tmp_path: Path, like: Path) -> None:
    save_hf_folder(tmp_path / "out", some_tensors(), like=like)
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        HfFolder(tmp_path / "out")


def test_a_part_of_a_tensor_is_read_without_the_rest(tmp_path: Path, like: Path) -> None:
    tensor = torch.arange(12.0).view(3, 4)
    save_hf_folder(tmp_path / "out", [("t", tensor)], like=like)
    folder = HfFolder(tmp_path / "out")
    assert folder.slice("t", (slice(1, 3),), shape=(3, 4)).tolist() == tensor[1:].tolist()
    assert folder.slice("t", (slice(None), slice(1, 2)), shape=(3, 4)).tolist() == [[1.0], [5.0], [9.0]]
    with pytest.raises(ValueError, match=r"t must have shape \(3, 5\), .*out gives \(3, 4\); check that config\.json"):
        folder.slice("t", (slice(1, 3),), shape=(3, 5))
    with pytest.raises(KeyError, match="has no tensor u; it has 1 others"):
        folder.slice("u", (slice(1, 3),), shape=(3, 4))
