"""What vLLM's own layers read of a tensor, each made as the one of a tensor-parallel worker; slices load them alike."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_rl.weights.fp8_blocks import BLOCK, FP8
from megatron_rl.weights.fp8_push import quantization_config
from megatron_rl.weights.plan import Region
from megatron_rl.weights.slices import Kept, Reads, Window

HIDDEN, HEAD, HEADS, FFN = 8, 4, 4, 12


@contextmanager
def tensor_rank(rank: int, size: int) -> Iterator[None]:
    """Layers made here are those of one worker of ``size``; nothing packs them."""
    from vllm import distributed
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    with ExitStack() as stack:
        for module in (linear, parameter, vocab_parallel_embedding):
            stack.enter_context(mock.patch.object(module, "get_tensor_model_parallel_rank", return_value=rank))
            stack.enter_context(mock.patch.object(module, "get_tensor_model_parallel_world_size", return_value=size))
        stack.enter_context(mock.patch.object(distributed, "get_tensor_model_parallel_world_size", return_value=size))
        stack.enter_context(set_current_vllm_config(VllmConfig()))
        yield


def attention(kv_heads: int) -> Callable[[], Any]:
    def make() -> Any:
        from vllm.model_executor.layers.linear import QKVParallelLinear

        return QKVParallelLinear(HIDDEN, HEAD, HEADS, kv_heads, bias=True, params_dtype=torch.float32)

    return make


def gate_up() -> Any:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    return MergedColumnParallelLinear(HIDDEN, [FFN, FFN], bias=False, params_dtype=torch.float32)


def down() -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    return RowParallelLinear(FFN, HIDDEN, bias=True, params_dtype=torch.float32)


def embedding() -> Any:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return VocabParallelEmbedding(130, HIDDEN, params_dtype=torch.float32)


def quantised(name: str, make: Callable[[Any], Any]) -> Callable[[], Any]:
    """A layer that loads weights which the trainer quantised; no kernel multiplies with them here."""

    def made() -> Any:
        from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
            CompressedTensorsConfig,
        )
        from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w8a8_fp8

        of = CompressedTensorsConfig.from_config(quantization_config(name))
        of.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
        with (
            mock.patch.object(compressed_tensors_w8a8_fp8, "init_fp8_linear_kernel"),
            mock.patch.object(compressed_tensors_w8a8_fp8, "expose_input_quant_key"),
            mock.patch.object(compressed_tensors_w8a8_fp8, "get_current_vllm_config"),
        ):
            return make(of)

    return made


def wide_attention(quant_config: Any) -> Any:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    common = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": quant_config}
    return QKVParallelLinear(BLOCK, BLOCK, HEADS, 2, prefix="model.layers.0.self_attn.qkv_proj", **common)


def wide_down(quant_config: Any) -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    common = {"bias": False, "params_dtype": torch.bfloat16, "quant_config": quant_config}
    return RowParallelLinear(4 * BLOCK, BLOCK, prefix="model.layers.0.mlp.down_proj", **common)


Source = tuple[str, str, tuple[int, ...], tuple[Any, ...]]
"""Name of a Hugging Face tensor, the layer's parameter, its whole shape, and what the model's loader adds to a call."""


def qkv_sources(kv_heads: int) -> list[Source]:
    rows = {"q": HEADS * HEAD, "k": kv_heads * HEAD, "v": kv_heads * HEAD}
    weights: list[Source] = [(part, "weight", (count, HIDDEN), (part,)) for part, count in rows.items()]
    return [*weights, *((f"{part} bias", "bias", (count,), (part,)) for part, count in rows.items())]


def load(layer: Any, sources: list[Source], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layer's parameters, after the loaders have had what is given."""
    for parameter in layer.parameters():
        parameter.data.fill_(torch.nan)
    for name, of, _, further in sources:
        parameter = getattr(layer, of)
        parameter.weight_loader(parameter, tensors[name], *further)
    return {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}


Bounds = tuple[int, int, int]
"""Dim, first index and the one behind the last."""


def of_four(kv: list[tuple[int, int]]) -> list[dict[str, Bounds]]:
    """Of four workers, each with a head of queries."""
    found = []
    for rank in range(4):
        bounds = {"q": (0, 4 * rank, 4 * rank + 4), "k": (0, *kv[rank]), "v": (0, *kv[rank])}
        found.append(bounds | {f"{part} bias": of_part for part, of_part in bounds.items()})
    return found


CASES: dict[str, tuple[Callable[[], Any], list[Source], list[dict[str, Bounds]]]] = {
    "a key/value head each": (attention(4), qkv_sources(4), of_four([(0, 4), (4, 8), (8, 12), (12, 16)])),
    "two workers share a key/value head": (attention(2), qkv_sources(2), of_four([(0, 4), (0, 4), (4, 8), (4, 8)])),
    "all share it": (attention(1), qkv_sources(1), of_four([(0, 4)] * 4)),
    "gate and up": (
        gate_up,
        [("gate", "weight", (FFN, HIDDEN), (0,)), ("up", "weight", (FFN, HIDDEN), (1,))],
        [dict.fromkeys(["gate", "up"], (0, 3 * rank, 3 * rank + 3)) for rank in range(4)],
    ),
    "columns": (
        down,
        [("down", "weight", (HIDDEN, FFN), ()), ("down bias", "bias", (HIDDEN,), ())],
        [{"down": (1, 3 * rank, 3 * rank + 3), "down bias": (0, 0, HIDDEN)} for rank in range(4)],
    ),
    # 130 tokens are padded to 192: the fourth worker has padding alone
    "a vocabulary": (
        embedding,
        [("embedding", "weight", (130, HIDDEN), ())],
        [{"embedding": (0, *bounds)} for bounds in ((0, 48), (48, 96), (96, 130), (130, 130))],
    ),
}


def of_blocks(scales: int) -> list[dict[str, Bounds]]:
    """Of four workers, two to a key/value head; each head has 128 rows, and ``scales`` scales."""
    found = []
    for rank in range(4):
        heads = {"q": rank, "k": rank // 2, "v": rank // 2}
        found.append(
            {part: (0, BLOCK * head, BLOCK * head + BLOCK) for part, head in heads.items()}
            | {f"{part} scale": (0, scales * head, scales * head + scales) for part, head in heads.items()}
        )
    return found


def fp8_cases(name: str, scales: int, columns: int) -> dict[str, Any]:
    """With ``scales`` scales down 128 rows; whether 512 columns have ``columns`` scales across, which are cut, or 1."""
    heads = {"q": 4, "k": 2, "v": 2}
    qkv: list[Source] = [(part, "weight", (count * BLOCK, BLOCK), (part,)) for part, count in heads.items()]
    qkv += [(f"{part} scale", "weight_scale", (count * scales, 1), (part,)) for part, count in heads.items()]
    down: list[Source] = [
        ("down", "weight", (BLOCK, 4 * BLOCK), ()),
        ("down scale", "weight_scale", (scales, columns), ()),
    ]
    cut = [(1, rank, rank + 1) if columns == 4 else (0, 0, scales) for rank in range(4)]
    return {
        f"{name}, attention": (quantised(name, wide_attention), qkv, of_blocks(scales)),
        f"{name}, columns": (
            quantised(name, wide_down),
            down,
            [{"down": (1, BLOCK * rank, BLOCK * rank + BLOCK), "down scale": cut[rank]} for rank in range(4)],
        ),
    }


CASES |= fp8_cases("fp8_per_channel", BLOCK, 1) | fp8_cases("fp8_per_block", 1, 4)


@dataclass(frozen=True)
class Loaded:
    """What one worker's layer read, and its parameters after it was given whole tensors, watched ones and slices."""

    kept: dict[str, Kept]
    plain: dict[str, Tensor]
    watched: dict[str, Tensor]
    sliced: dict[str, Tensor]


def load_three_times(case: str) -> list[Loaded]:
    """By each of four workers; runs in a process that may import vLLM."""
    make, sources, _ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    small = case.startswith("fp8")
    whole = {
        name: torch.randn(shape, generator=generator).to(FP8 if small and of == "weight" else torch.float32)
        for name, of, shape, _ in sources
    }
    found = []
    for rank in range(4):
        with tensor_rank(rank, 4):
            layer, reads = make(), Reads()
            plain = load(layer, sources, whole)
            watched = load(layer, sources, {name: reads.watch(name, tensor) for name, tensor in whole.items()})
            kept = reads.kept()
            windows = {
                name: Window(kept[name].region, tensor[kept[name].region.index].clone())
                for name, tensor in whole.items()
            }
            found.append(Loaded(kept, plain, watched, load(layer, sources, windows)))
    return found


@pytest.fixture(scope="module")
def vllm_process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("case", CASES)
def test_a_layer_loads_the_slices_that_it_was_seen_to_read_as_the_whole_tensors(
    vllm_process: ProcessPoolExecutor, case: str
) -> None:
    _, sources, expected = CASES[case]
    for rank, found in enumerate(vllm_process.submit(load_three_times, case).result(timeout=200)):
        for name, _, shape, _ in sources:
            dim, start, stop = expected[rank][name]
            region = Region(rank=None, name=name, shape=shape, dim=dim, start=start, stop=stop)
            assert found.kept[name] == Kept(region=region)
        for name, parameter in found.plain.items():
            assert not torch.isnan(parameter.float()).any()
            assert torch.equal(found.watched[name].float(), parameter.float())
            assert torch.equal(found.sliced[name].float(), parameter.float())
