"""FP8 training with Transformer Engine: the fields that megatron-core wants for it, and what came of them.

**Formats.** A number of 8 bits has a sign and 7 bits for exponent and fraction. E4M3 (4 exponent bits, 3 of fraction)
reaches 448 in steps of 1/8 relative; E5M2 reaches 57,344 in steps of 1/4. Weights and activations need the precision
and take E4M3; gradients may need the range: ``tensorwise`` gives them E5M2 (``hybrid``), finer scales need no range and
keep E4M3 throughout (Micikevicius et al. 2022, FP8 Formats for Deep Learning, section 3).

**Scales.** A tensor is multiplied before it is cast so that its largest magnitude, the *amax*, becomes the largest
number of the format (scale = 448 / amax), and the product of two such tensors is divided by both scales afterwards;
sums run in float32. One outlier pushes all that shares its scale towards zero, so the recipes differ in how much shares
one:

- ``tensorwise`` (current scaling): all of a tensor, by the amax that it has now. One more pass over each tensor,
  fastest multiplication.
- ``blockwise`` (DeepSeek-V3, 2024, section 3.3): 128 x 128 of a weight, 1 x 128 of an activation or gradient, so an
  outlier harms its own block alone. What engines of today roll out with.
- ``mxfp8``: 32 neighbours, with a scale of 8 bits that is a power of two; Blackwell's tensor cores apply it by
  themselves.
- ``delayed``: all of a tensor, by the largest amax of past passes, which saves the pass. The past is of training steps;
  in reinforcement learning most passes only score (old and reference log-probs, values, other data, other weights), and
  each pushes its amaxes into the history that the next update scales by. Refused.

Transformer Engine keeps scales of blocks to powers of two unless told otherwise (the multiplication is then exact, the
range used only to a half), and so does vLLM where DeepGEMM multiplies. Both sides must do the same for the same weights
to become the same FP8 numbers, so both are told to divide by 448 as it comes: Transformer Engine by
``FP8Config.environment``, vLLM by :func:`megatron_rl.vllm_engine.scales.environment`.

**What stays.** Master weights, gradients' sums and Adam are float32 as ever; embedding, norms, attention, the router,
the heads of policy and critic are bfloat16. Weights stay bfloat16 too and are cast when they are used
(``parameters=false``), so export, checkpoints and pushes are those of bfloat16 training.

**Cached weights.** A weight is cast once per optimizer step, at the first micro-batch, and kept in FP8 for the others.
megatron-core's schedules say which micro-batch is the first; whoever calls a model around them computes with the
weights of an earlier step. Everything here goes through :func:`~megatron_rl.mcore.step.train_step` or
:func:`~megatron_rl.mcore.step.forward_rows`, which use the schedules. The copies are neither parameters nor buffers:
:func:`clear_cached_weights` frees them where a GPU is handed to the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context

from megatron_rl.config.precision import FP8Config
from megatron_rl.linear_formats import LinearFormat
from megatron_rl.mcore.export import local_parameters
from megatron_rl.mcore.quantised import by_transformer_engine
from megatron_rl.weights.formats import formats_of, is_linear
from megatron_rl.weights.weight_map import WeightEntry, WeightMap


def model_fields(fp8: FP8Config | None) -> dict[str, Any]:
    """Of megatron-core's TransformerConfig."""
    if fp8 is None:
        return {}
    kept = fp8.layers_kept
    return {
        "fp8": "hybrid" if fp8.recipe == "tensorwise" else "e4m3",
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.parameters,
        "first_last_layers_bf16": kept > 0,
        "num_layers_at_start_in_bf16": kept,
        "num_layers_at_end_in_bf16": kept,
    }


def ddp_fields(fp8: FP8Config | None) -> dict[str, Any]:
    """Of megatron-core's DistributedDataParallelConfig."""
    return {} if fp8 is None or not fp8.parameters else {"fp8_param_gather": True}


def optimizer_fields(fp8: FP8Config | None) -> dict[str, Any]:
    """Of megatron-core's OptimizerConfig, which asks for the recipe to know how FP8 parameters are sharded."""
    return {} if fp8 is None or not fp8.parameters else {"fp8_recipe": fp8.recipe}


@contextmanager
def high_precision(chunks: Sequence[Any]) -> Iterator[None]:
    """Inside, the pieces of a model compute without FP8: their layers ask their configuration at each pass."""
    configs = list({id(chunk.config): chunk.config for chunk in chunks}.values())
    asked = [config.fp8 for config in configs]
    for config in configs:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8 in zip(configs, asked, strict=True):
            config.fp8 = fp8


def scoring_precision(chunks: Sequence[Any], fp8: FP8Config | None) -> AbstractContextManager[None]:
    """The precision of passes that only score."""
    return nullcontext() if fp8 is None or fp8.logprobs else high_precision(chunks)


def clear_cached_weights(chunks: Sequence[Any]) -> int:
    """Drop the FP8 copies of weights that Transformer Engine keeps between micro-batches; how many there were.

    The next pass casts them anew. Call it before a GPU is handed to somebody else, between two steps.
    """
    dropped = 0
    for module in (module for chunk in chunks for module in chunk.modules()):
        cached = getattr(module, "_fp8_workspaces", None)
        if cached:
            dropped += len(cached)
            cached.clear()
    return dropped


Recipe = Callable[[Any, int], Any]


def layer_recipe(config: Any, layer: int) -> Any:
    """The recipe that Transformer Engine will multiply layer ``layer`` (from 0, over the whole model) by; None: none.

    Asked inside the context that megatron-core runs this layer in, so it is what counts, not what was meant.
    """
    if config.fp8 is None:
        return None
    with get_fp8_context(config, layer):
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        return FP8GlobalStateManager.get_fp8_recipe() if FP8GlobalStateManager.is_fp8_enabled() else None


def linear_formats(chunks: Sequence[Any], weights: WeightMap, recipe_of: Recipe = layer_recipe) -> list[LinearFormat]:
    """What each linear of this rank's layers will multiply in, in the weight map's order.

    Args:
        chunks: this rank's pieces of the model, unwrapped.
        weights: of the model.
        recipe_of: see :func:`layer_recipe`.
    """
    owners = {id(module.weight): module for chunk in chunks for module in chunk.modules() if _has_weight(module)}
    mine = local_parameters(chunks)
    return [
        found
        for entry in weights.entries
        if is_linear(entry) and entry.megatron in mine
        for found in _formats(entry, chunks[0].config, owners[id(mine[entry.megatron])], recipe_of)
    ]


def _has_weight(module: Any) -> bool:
    return isinstance(getattr(module, "weight", None), torch.nn.Parameter)


def _formats(entry: WeightEntry, config: Any, module: Any, recipe_of: Recipe) -> Iterator[LinearFormat]:
    assert entry.layer is not None
    recipe = recipe_of(config, entry.layer) if by_transformer_engine(module) else None
    if recipe is not None and not getattr(module, "will_execute_quantized", lambda enabled: enabled)(True):
        recipe = None
    plain = str(module.weight.dtype).removeprefix("torch.")
    if recipe is None:
        yield from formats_of(entry, plain, None)
        return
    name = recipe_name(recipe)
    for found in formats_of(entry, plain, name):
        powers = name == "blockwise" and recipe.fp8_quant_fwd_weight.power_2_scale
        yield dataclasses.replace(found, scale="float8_e8m0fnu") if powers else found


def recipe_name(recipe: Any) -> str:
    """Ours for one of Transformer Engine's recipes.

    Raises:
        ValueError: it is none that this project trains with.
    """
    for name, asks in (
        ("blockwise", "float8_block_scaling"),
        ("tensorwise", "float8_current_scaling"),
        ("mxfp8", "mxfp8"),
    ):
        if getattr(recipe, asks)():
            return name
    raise ValueError(f"a recipe must be blockwise, tensorwise or mxfp8, Transformer Engine has {recipe}")
