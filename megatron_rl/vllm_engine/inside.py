"""Looking into the engine's model: what its layers give, and which weights it computes with.

Each function runs in a worker, which it takes as its first argument.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from megatron_rl.linear_formats import LinearFormat
from megatron_rl.vllm_engine.scales import scaling

_WATCHED = re.compile(r"model\.(embed_tokens|layers\.\d+(\.self_attn)?|norm)$")
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Hugging Face tensors that vLLM lays one below the other."""


class _Watch:
    """Hooks on a worker's model, and what they have seen; kept on the worker between calls."""

    def __init__(self, model: Any) -> None:
        self.seen: dict[str, list[Tensor]] = defaultdict(list)
        self.handles = [
            module.register_forward_hook(self._keep(name))
            for name, module in model.named_modules()
            if _WATCHED.match(name)
        ]

    def _keep(self, place: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if not isinstance(output, tuple):
                hidden = output
            elif place == "model.norm":
                hidden = output[0]
            else:  # the residual is added by the norm that follows
                hidden = output[0] + output[1]
            self.seen[place].append(hidden.float().cpu())

        return hook


def watch(worker: Any) -> None:
    """Begin to keep what the layers give."""
    worker._watch = _Watch(worker.get_model())


def take(worker: Any) -> dict[str, Tensor]:
    """What was kept since the last time: [tokens, h] f32 by place. Empty where the model runs compiled."""
    seen, worker._watch.seen = dict(worker._watch.seen), defaultdict(list)
    return {place: torch.cat(parts) for place, parts in seen.items()}


def unwatch(worker: Any) -> None:
    """Remove the hooks."""
    for handle in worker._watch.handles:
        handle.remove()
    del worker._watch


def linear_formats(worker: Any) -> list[LinearFormat]:
    """What each linear of a model without experts computes with, by the Hugging Face names of its weights; an output
    layer that is tied to the embedding is none.
    """
    linears = LinearBase if worker.model_config.hf_text_config.tie_word_embeddings else LinearBase | ParallelLMHead
    return [
        LinearFormat(weight=name, dtype=str(module.weight.dtype).removeprefix("torch."), **scaling(module))
        for module_name, module in worker.get_model().named_modules()
        if isinstance(module, linears)
        for name in _names(module_name, "weight")
    ]


@torch.no_grad()
def tensors(worker: Any, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Weights whose Hugging Face name starts with one of ``prefixes``, as the model computes with them.

    What a linear layer computes with may be packed in a form that nobody can read. Multiplied with the identity it
    gives its weight, exactly: every other term of each sum is 0. Routed experts are left out, and with several tensor
    ranks everything that they share.
    """
    shared = worker.parallel_config.tensor_parallel_size > 1
    return {
        name: tensor.to("cpu", copy=True)
        for module_name, module in worker.get_model().named_modules()
        if not (shared and isinstance(module, LinearBase | VocabParallelEmbedding))
        for name, tensor in _tensors_of(module_name, module)
        if name.startswith(prefixes)
    }


def _tensors_of(name: str, module: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one module, those of its children left out."""
    if isinstance(module, LinearBase):
        identity = torch.eye(module.input_size, dtype=module.params_dtype, device=module.weight.device)
        yield from _parts(name, "weight", module, module.quant_method.apply(module, identity, None).T)
        if module.bias is not None:
            yield from _parts(name, "bias", module, module.bias)
    elif isinstance(module, VocabParallelEmbedding):
        yield f"{name}.weight", module.weight[: module.org_vocab_size]  # rows of padding follow
    elif isinstance(module, RotaryEmbeddingBase):
        yield "model.rotary_emb.inv_freq", module._compute_inv_freq(module.base)
    else:
        yield from ((f"{name}.{part}", parameter) for part, parameter in module.named_parameters(recurse=False))


def _parts(name: str, kind: str, module: Any, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
    names = _names(name, kind)
    yield from zip(names, [whole] if len(names) == 1 else whole.split(module.output_sizes), strict=True)


def _names(name: str, kind: str) -> list[str]:
    """Of the Hugging Face tensors that one of vLLM's is made of."""
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{part}.{kind}" for part in _FUSED[last]] if last in _FUSED else [f"{name}.{kind}"]
