"""Engines in FP8, keys and values too where the CPU can: one that quantises what is pushed, one that is pushed FP8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.assemble.audit import engine_formats
from megatron_rl.assemble.gate import fp8_tolerance
from megatron_rl.config.schema import EngineConfig, ParityConfig
from megatron_rl.device import has_wide_vectors
from megatron_rl.linear_formats import first_difference
from megatron_rl.model_dims import read_model_dims
from megatron_rl.parity import Pair, ParityFailed, check_parity
from megatron_rl.vllm_engine.engine import EngineSpec
from megatron_rl.weights.fp8_blocks import ENGINE_SCALINGS, PER_CHANNEL, quantise
from megatron_rl.weights.fp8_push import quantised
from megatron_rl.weights.safetensors_io import HfFolder
from megatron_rl.weights.weight_map import Head, weight_map
from tests.distributed.parity_cases import hugging_face
from tests.end_to_end.fp8_layers import FFN, HEAD, HIDDEN, PREFIX, SHAPES, loaded_both_ways
from tests.end_to_end.test_engine import (
    GREEDY,
    PARITY,
    PARITY_ROWS,
    PROMPTS,
    EngineError,
    RemoteEngine,
    build_model,
    inside,
    loaded,
    named_weights,
)

# where vLLM has no attention for keys and values in FP8, the weights are tested alone
FP8 = EngineConfig(quantization="fp8_per_channel", kv_cache_dtype="fp8" if has_wide_vectors() else "auto")
ROWS = [tuple(range(5 + index, 45 + index)) for index in range(4)]


def quantised_tensors(worker: Any) -> dict[str, Tensor]:
    """Every parameter as the model computes with it: in FP8, nothing is packed."""
    return {name: parameter.detach().clone() for name, parameter in worker.get_model().named_parameters()}


def leave_one_unquantised(worker: Any) -> None:
    """The fault that the audit is for: one linear goes back to bfloat16."""
    layer = worker.get_model().model.layers[1].mlp.down_proj
    layer.was = (layer.weight, layer.weight_scale)
    whole = (layer.weight.float() * layer.weight_scale.T).T.bfloat16()
    layer.weight = torch.nn.Parameter(whole, requires_grad=False)
    layer.weight_scale = None


def quantise_it_again(worker: Any) -> None:
    layer = worker.get_model().model.layers[1].mlp.down_proj
    layer.weight, layer.weight_scale = layer.was
    del layer.was


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        f"{name}{kind}": build_model(root / f"{name}{kind}", seed, bool(kind))
        for kind in ("", "-tied")
        for seed, name in enumerate("AB")
    }


@contextmanager
def running(model: Path, version: int | None = None, *, pushed_quantised: bool = False) -> Iterator[RemoteEngine]:
    spec = EngineSpec(
        model=model,
        dtype="bfloat16",
        max_model_len=64,
        kv_cache_mib=16,
        max_concurrent=8,
        on_cpu=True,
        version=version,
        quantization=FP8.quantization,
        pushed_quantised=pushed_quantised,
        kv_cache_dtype=FP8.kv_cache_dtype,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        engine = RemoteEngine(spec)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def pushed(folders: dict[str, Path]) -> Iterator[RemoteEngine]:
    """Started on A, then given B in float32, twice, with use in between."""
    with running(folders["A"]) as engine:
        engine.push(1, iter(named_weights(loaded(folders["A"]))))
        engine.call("generate", PROMPTS, GREEDY, [[0]] * 4)
        for version in (2, 3):
            engine.push(version, iter(named_weights(loaded(folders["B"]))))
        yield engine


@pytest.fixture(scope="module")
def fresh(folders: dict[str, Path]) -> Iterator[RemoteEngine]:
    """Started on B."""
    with running(folders["B"], version=3) as engine:
        yield engine


def in_fp8(folder: Path) -> list[tuple[str, Tensor]]:
    """The weights of a folder as the trainer's rank 0 sends them when it quantises."""
    names = weight_map(read_model_dims(folder), Head.TOKEN)
    return list(quantised(named_weights(loaded(folder)), names, FP8.quantization))


@pytest.fixture(scope="module")
def filled(folders: dict[str, Path]) -> Iterator[RemoteEngine]:
    """Started on nothing, then given B, A with use in between, and B again, quantised by us."""
    with running(folders["A"], pushed_quantised=True) as engine:
        for version, name in enumerate("BAB", 1):
            engine.push(version, iter(in_fp8(folders[name])))
            engine.call("generate", PROMPTS, GREEDY, [[0]] * 4)
        yield engine


def test_a_push_quantises_to_the_bits_of_a_fresh_load(pushed: RemoteEngine, fresh: RemoteEngine) -> None:
    ours, theirs = (engine.call("_on_workers", quantised_tensors)[0] for engine in (pushed, fresh))
    assert ours.keys() == theirs.keys()
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in ours.values()) == 8  # four fused linears a layer
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    assert pushed.call("generate", PROMPTS, GREEDY, [[0]] * 4) == fresh.call("generate", PROMPTS, GREEDY, [[0]] * 4)
    assert pushed.call("score", ROWS) == fresh.call("score", ROWS)


def test_a_push_in_fp8_leaves_the_bits_that_the_engine_makes_of_the_same_weights(
    filled: RemoteEngine, fresh: RemoteEngine, folders: dict[str, Path]
) -> None:
    ours, theirs = (engine.call("_on_workers", quantised_tensors)[0] for engine in (filled, fresh))
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in ours.values()) == 8
    assert theirs.keys() <= ours.keys()
    assert {name.rpartition(".")[2] for name in ours.keys() - theirs.keys()} <= {"q_scale", "k_scale", "v_scale"}
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    assert filled.call("generate", PROMPTS, GREEDY, [[0]] * 4) == fresh.call("generate", PROMPTS, GREEDY, [[0]] * 4)
    assert filled.call("score", ROWS) == fresh.call("score", ROWS)
    wanted = engine_formats(HfFolder(folders["B"]).infos(), FP8, "float32", tied=False)
    assert first_difference(wanted, filled.call("linear_formats")) is None


@pytest.mark.parametrize(
    "left_out",
    [
        "model.layers.1.mlp.down_proj.weight_scale",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.v_proj.weight_scale",
    ],
)
def test_a_push_in_fp8_that_leaves_a_tensor_out_is_refused_by_name_and_the_next_one_heals_it(
    filled: RemoteEngine, fresh: RemoteEngine, folders: dict[str, Path], left_out: str
) -> None:
    whole = in_fp8(folders["B"])
    filled.start_push(4)
    filled.channel.send(4, (item for item in whole if item[0] != left_out))
    with pytest.raises(EngineError, match=rf"1 of .* stay as they were, the first is {left_out}"):
        filled.answer()
    assert filled.call("version") is None
    filled.push(5, iter(whole))
    assert filled.call("score", ROWS) == fresh.call("score", ROWS)


@pytest.mark.parametrize("name", ENGINE_SCALINGS)
def test_vllms_layers_make_the_same_of_what_we_push_as_of_the_weights_that_they_quantise(
    filled: RemoteEngine, folders: dict[str, Path], name: str
) -> None:
    random = torch.Generator().manual_seed(0)
    plain = [  # of different sizes, so that it matters what shares a scale
        (f"{PREFIX}{part}.weight", (torch.randn(shape, generator=random) * 0.02 * (1 + index)).bfloat16())
        for index, (part, shape) in enumerate(SHAPES.items())
    ]
    dims = replace(
        read_model_dims(folders["A"]), heads=2, kv_heads=1, head_dim=HEAD, hidden=HIDDEN, ffn_hidden=FFN, layers=1
    )
    pushed = list(quantised(plain, weight_map(dims, Head.TOKEN), name))
    assert sum(tensor.nbytes for _, tensor in pushed) < 0.51 * sum(tensor.nbytes for _, tensor in plain)
    [(own, ours)] = filled.call("_on_workers", loaded_both_ways, name, plain, pushed)
    assert own.keys() == ours.keys()
    assert len(own) == 2 * 4
    for place, wanted in own.items():
        assert ours[place].dtype == wanted.dtype, place
        assert torch.equal(ours[place].view(wanted.shape).float(), wanted.float()), place


def test_weights_that_nobody_quantised_are_refused_where_they_should_have_been(
    filled: RemoteEngine, folders: dict[str, Path]
) -> None:
    filled.start_push(6)
    filled.channel.send(6, iter(named_weights(loaded(folders["B"]))))
    with pytest.raises(EngineError, match=r"8 of .* stay as they were, the first is .*weight_scale"):
        filled.answer()
    assert filled.call("version") is None


def test_our_quantiser_gives_the_bits_of_the_engine(fresh: RemoteEngine, folders: dict[str, Path]) -> None:
    engine = fresh.call("_on_workers", quantised_tensors)[0]
    weights = dict(named_weights(loaded(folders["B"])))
    for layer in range(2):
        inside = f"model.layers.{layer}."
        small, scale = quantise(weights[f"{inside}mlp.down_proj.weight"].bfloat16(), PER_CHANNEL)
        assert torch.equal(engine[f"{inside}mlp.down_proj.weight"].T.float(), small.float())
        assert torch.equal(engine[f"{inside}mlp.down_proj.weight_scale"], scale)


def test_the_audit_finds_every_linear_as_asked_and_names_one_that_is_not(
    pushed: RemoteEngine, folders: dict[str, Path]
) -> None:
    wanted = engine_formats(HfFolder(folders["B"]).infos(), FP8, "float32", tied=False)
    assert len(wanted) == 2 * 7 + 1
    assert first_difference(wanted, pushed.call("linear_formats")) is None
    pushed.call("_on_workers", leave_one_unquantised)
    try:
        assert first_difference(wanted, pushed.call("linear_formats")) == (
            "model.layers.1.mlp.down_proj.weight must be float8_e4m3fn with a float32 scale per 1 x all, found bfloat16"
        )
    finally:
        pushed.call("_on_workers", quantise_it_again)
    assert first_difference(wanted, pushed.call("linear_formats")) is None


def test_a_head_that_is_tied_stays_in_bfloat16_and_is_pushed_with_its_embedding(folders: dict[str, Path]) -> None:
    with running(folders["B-tied"], version=2) as fresh:
        wanted = fresh.call("score", ROWS)
    with running(folders["A-tied"]) as engine:
        for version in (1, 2):
            engine.push(version, iter(named_weights(loaded(folders["B-tied"]))))
            assert engine.call("score", ROWS) == wanted
        formats = engine_formats(HfFolder(folders["B-tied"]).infos(), FP8, "float32", tied=True)
        assert first_difference(formats, engine.call("linear_formats")) is None


def test_the_gate_lets_rounding_pass_and_names_a_layer_that_is_stale(
    pushed: RemoteEngine, folders: dict[str, Path]
) -> None:
    whole, old = named_weights(loaded(folders["B"])), dict(named_weights(loaded(folders["A"])))
    wanted = hugging_face(folders["B"], Head.TOKEN, PARITY_ROWS)
    bounds = fp8_tolerance(ParityConfig())
    pushed.push(6, iter(whole))
    told = check_parity([Pair(inside(pushed), wanted, bounds)], PARITY_ROWS, PARITY, print)
    assert 0.01 < told["engine_against_Hugging_Face/mean"] < 0.3
    pushed.push(7, ((name, old[name] if "layers.1." in name else tensor) for name, tensor in whole))
    with pytest.raises(ParityFailed) as caught:
        check_parity([Pair(inside(pushed), wanted, bounds)], PARITY_ROWS, PARITY, print)
    assert "the first place that differs is model.layers.1.self_attn, by" in str(caught.value)
    assert "the first tensor that differs there is model.layers.1.self_attn.q_proj.weight: " in str(caught.value)


def test_a_push_that_leaves_a_tensor_out_is_refused_by_name_and_the_next_one_heals_it(
    pushed: RemoteEngine, fresh: RemoteEngine, folders: dict[str, Path]
) -> None:
    whole = named_weights(loaded(folders["B"]))
    pushed.start_push(4)
    pushed.channel.send(4, (item for item in whole if item[0] != "model.layers.1.mlp.down_proj.weight"))
    with pytest.raises(EngineError, match=r"1 of .* stay as they were, the first is model\.layers\.1\.mlp\.down_proj"):
        pushed.answer()
    assert pushed.call("version") is None
    pushed.push(5, iter(whole))
    assert pushed.call("score", ROWS) == fresh.call("score", ROWS)
