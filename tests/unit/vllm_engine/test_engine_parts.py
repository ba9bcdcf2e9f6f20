from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rl.assemble.roles import engine_spec
from megatron_rl.config.schema import EngineConfig
from megatron_rl.dataflow import Sampling
from megatron_rl.model_dims import EndingTokens, read_ending_tokens, read_model_dims
from megatron_rl.rope_scaling import read_theta
from megatron_rl.vllm_engine import engine
from megatron_rl.vllm_engine.engine import Engine, EngineSpec, _chosen
from tests.unit.convert.folders import write_model


@dataclass
class Listed:
    logprob: float


def test_importing_the_module_loads_no_vllm() -> None:
    program = "import sys, megatron_rl.vllm_engine.engine; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


ASKED = {  # abstract methods of vLLM's WeightTransferEngine
    "0.26": {"init_transfer_engine", "start_weight_update", "finish_weight_update", "receive_weights", "shutdown"}
    | {"trainer_send_weights"},
    "0.32": {"init_transfer_engine", "start_weight_update", "finish_weight_update", "receive_weights", "shutdown"},
}


@pytest.mark.parametrize("release", ASKED)
def test_the_receiver_has_what_each_release_of_vllm_asks_of_one(release: str) -> None:
    """It is read, not loaded: only one of the releases can be installed."""
    tree = ast.parse((Path(engine.__file__).with_name("receiver.py")).read_text())
    (receiver,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ChannelReceiver"]
    defined = {node.name for node in receiver.body if isinstance(node, ast.FunctionDef)}
    assert ASKED[release] - defined == set()


def test_each_token_gets_its_own_log_prob() -> None:
    assert _chosen([3, 4], [{3: Listed(-1.0), 7: Listed(-0.5)}, {4: Listed(-2.0)}]) == [-1.0, -2.0]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_log_prob_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(RuntimeError, match=r"1 of 2 are not, first at token 1 \(-?(nan|inf)\)"):
        _chosen([3, 4], [{3: Listed(-1.0)}, {4: Listed(bad)}])


def test_a_missing_log_prob_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"1 of 1 are not, first at token 0 \(nan\)"):
        _chosen([3], [{4: Listed(-1.0)}])
    with pytest.raises(RuntimeError, match="2 tokens need as many log-probs, got 1"):
        _chosen([3, 4], [{3: Listed(-1.0)}])
    with pytest.raises(RuntimeError, match="1 tokens need as many log-probs, got 0"):
        _chosen([3], None)


def test_both_configurations_name_tokens_that_end_a_sample(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert read_ending_tokens(tmp_path).ids == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert read_ending_tokens(tmp_path).ids == (7, 5)


def test_special_tokens_are_those_that_no_text_shows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert read_ending_tokens(tmp_path).special == {}
    added = [{"id": 3, "content": "<|im_end|>", "special": True}, {"id": 4, "content": "<think>", "special": False}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    found = read_ending_tokens(tmp_path)
    assert found == EndingTokens(ids=(7,), special={"<|im_end|>": 3})
    assert found.with_stops(("never", "<|im_end|>", "<think>")) == [7, 3]


def test_a_model_without_end_of_sequence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must name eos_token_id"):
        read_ending_tokens(tmp_path)


@pytest.mark.parametrize(("quantization", "version"), [(None, None), ("fp8_per_channel", 0)])
def test_an_engine_that_is_pushed_fp8_names_the_format_and_has_nothing_to_sample_from_before(
    tmp_path: Path, quantization: str | None, version: int | None
) -> None:
    asked: dict[str, Any] = {
        "max_model_len": 64,
        "kv_cache_mib": 16,
        "max_concurrent": 8,
        "on_cpu": True,
        "pushed_quantised": True,
    }
    with pytest.raises(ValueError, match="pushed_quantised needs a quantization, and no version"):
        EngineSpec(model=tmp_path, dtype="bfloat16", quantization=quantization, version=version, **asked)


def test_an_engine_reads_what_trainers_read_of_a_folder_that_has_mistrals_own_files_too(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from vllm import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.tokenizers import cached_tokenizer_from_config

    folder = write_model(tmp_path / "mistral", "Mistral", rope_theta=5e6)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors").keys()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    sizes = {"dim": 16, "n_layers": 2, "head_dim": 4, "hidden_dim": 24, "n_heads": 4, "n_kv_heads": 2}
    theirs = sizes | {"norm_eps": 1e-6, "vocab_size": 32, "rope_theta": 1e6}
    (folder / "params.json").write_text(json.dumps(theirs))
    (folder / "tekken.json").write_text("{}")
    save_file({"norm.weight": torch.ones(16)}, folder / "consolidated.safetensors")
    spec = EngineSpec(model=folder, dtype="float32", max_model_len=64, kv_cache_mib=16, max_concurrent=8, on_cpu=True)

    arguments = EngineArgs(**engine._model_arguments(spec))
    model = arguments.create_model_config()
    assert read_theta(model.hf_config.to_dict()) == read_model_dims(folder).rope_theta == 5e6
    assert cached_tokenizer_from_config(model).convert_ids_to_tokens([0, 1]) == ["a", "b"]
    loader = get_model_loader(arguments.create_load_config())
    read = loader._get_weights_iterator(loader.Source(str(folder), revision=None))
    assert {name for name, _ in read} == {*names}


@pytest.mark.parametrize(
    ("on_cpu", "eager", "compiled"), [(False, False, True), (False, True, False), (True, False, False)]
)
def test_an_engine_runs_compiled_on_a_gpu_unless_it_is_asked_to_run_eagerly(
    tmp_path: Path, on_cpu: bool, eager: bool, compiled: bool
) -> None:
    sizes = {"max_model_len": 64, "kv_cache_mib": 16, "max_concurrent": 8}
    assert EngineSpec(model=tmp_path, dtype="bfloat16", on_cpu=on_cpu, eager=eager, **sizes).compiled is compiled


@pytest.mark.parametrize(
    ("on_cpu", "length", "concurrent", "expected"),
    [(False, 4096, 256, 2048), (False, 64, 4096, 4096), (True, 64, 256, 8192), (True, 9000, 256, 9000)],
)
def test_as_many_tokens_go_through_the_model_as_sequences_run_at_the_same_time(
    tmp_path: Path, on_cpu: bool, length: int, concurrent: int, expected: int
) -> None:
    spec = EngineSpec(
        model=tmp_path, dtype="float32", max_model_len=length, kv_cache_mib=16, max_concurrent=concurrent, on_cpu=on_cpu
    )
    assert spec.batched_tokens == expected


@pytest.mark.parametrize("eager", [False, True])
def test_a_run_asks_its_engines_to_run_eagerly_where_its_settings_do(tmp_path: Path, eager: bool) -> None:
    config: Any = SimpleNamespace(
        engine=EngineConfig(eager=eager),
        model=SimpleNamespace(dtype="bfloat16"),
        data=SimpleNamespace(max_prompt_tokens=8),
        rollout=SimpleNamespace(max_response_tokens=8),
        cluster=SimpleNamespace(colocate=False),
        pushed_format=None,
    )
    assert engine_spec(config, tmp_path).eager is eager


@dataclass
class Idle:
    """vLLM's engine with nothing to do."""

    emptied: bool
    asked: int = 0

    def reset_prefix_cache(self) -> bool:
        self.asked += 1
        return self.emptied

    def has_unfinished_requests(self) -> bool:
        return False


def test_a_rollout_begins_without_what_was_scored_or_drawn_before() -> None:
    engine = Engine.__new__(Engine)
    engine._asleep, engine._version, engine._engine = frozenset(), 0, Idle(emptied=True)
    for calls in (1, 2):
        assert engine.generate([], Sampling(temperature=1.0, max_tokens=1), []) == []
        assert engine._engine.asked == calls
    engine._engine = Idle(emptied=False)
    with pytest.raises(RuntimeError, match="the cache of prefixes must be emptied, it is still in use"):
        engine.generate([], Sampling(temperature=1.0, max_tokens=1), [])


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments:False"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "roundup_power2_divisions:[256:1,512:2], expandable_segments: true ,a:1"},
            "roundup_power2_divisions:[256:1,512:2], expandable_segments:False ,a:1",
        ),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512,expandable_segments:1"},
            "max_split_size_mb:512,expandable_segments:False",
        ),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, None),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, None),
    ],
)
def test_an_engine_goes_without_expandable_segments_and_says_so(
    asked: dict[str, str],
    kept: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ((name, before),) = asked.items()
    monkeypatch.setattr(os, "environ", {name: before})
    monkeypatch.setattr(engine, "compute_capability", lambda: (9, 0))
    engine._prepare_process(
        EngineSpec(model=tmp_path, dtype="bfloat16", max_model_len=8, kv_cache_mib=1, max_concurrent=1, on_cpu=False)
    )
    assert os.environ[name] == (before if kept is None else kept)
    told = [] if kept is None else [f"an engine goes without expandable segments: {name}={kept}"]
    assert caplog.messages == told
