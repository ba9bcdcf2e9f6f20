"""FP8 and Transformer Engine's layers without either: classes that stand in for its modules, with their names for
weights and their habit of keeping a copy of each weight between micro-batches, and what ranks run on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rl.config.precision import FP8Config
from megatron_rl.interfaces import UpdateResult
from megatron_rl.layout import ParallelLayout
from megatron_rl.linear_formats import LinearFormat
from tests.distributed.cases import (
    POLICY,
    Reinforce,
    Setup,
    SquaredError,
    gradient_tensors,
    minibatch,
    named,
    start,
    token_rows,
)

RECIPES = {
    "blockwise": SimpleNamespace(
        float8_block_scaling=lambda: True, fp8_quant_fwd_weight=SimpleNamespace(power_2_scale=False)
    ),
    "powers of two": SimpleNamespace(
        float8_block_scaling=lambda: True, fp8_quant_fwd_weight=SimpleNamespace(power_2_scale=True)
    ),
}
"""As much of Transformer Engine's recipes as is asked of them."""


def recipe_of(recipe: Any, config: Any, layer: int) -> Any:
    """As megatron-core's context would have it."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    return None if config.fp8 is None or is_first_last_bf16_layer(config, layer) else recipe


def stand_ins() -> dict[str, Any]:
    """The classes, by the name of what they stand for."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.post_training.modelopt.layers import Linear
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_rl.mcore.model import _Norm

    class Caches:
        """As TELinear: the weight is copied at the first micro-batch and read from the copy at the others."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.is_first_microbatch = True
            self._fp8_workspaces: dict[str, Tensor] = {}

        def forward(self, hidden: Tensor) -> Any:
            weight: Any = self.weight  # type: ignore[attr-defined]
            if self.config.fp8 is not None:  # type: ignore[attr-defined]
                if self.is_first_microbatch or "weight" not in self._fp8_workspaces:
                    self._fp8_workspaces["weight"] = weight.detach().clone()
                if not torch.equal(self._fp8_workspaces["weight"], weight):
                    raise AssertionError("a pass computes with the weights of an earlier step")
            self.is_first_microbatch = False
            return super().forward(hidden)  # type: ignore[misc]

    class TEColumnParallelLinear(Caches, ColumnParallelLinear):  # type: ignore[misc]
        pass

    class TERowParallelLinear(Caches, RowParallelLinear):  # type: ignore[misc]
        pass

    class TELayerNormColumnParallelLinear(TEColumnParallelLinear):
        def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
            super().__init__(*args, config=config, **kwargs)
            self.layer_norm_weight = _Norm(config, args[0], config.layernorm_epsilon).weight

        def forward(self, hidden: Tensor) -> Any:
            width, eps = (hidden.shape[-1],), self.config.layernorm_epsilon
            return super().forward(F.rms_norm(hidden, width, self.layer_norm_weight, eps))

    class TEDotProductAttention(torch.nn.Module):
        def __init__(self, config: Any, softmax_scale: float | None = None, **ignored: Any) -> None:
            super().__init__()
            self.scale = softmax_scale

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, mask: None, *, packed_seq_params: Any, **_: Any
        ) -> Tensor:
            assert packed_seq_params.qkv_format == "thd"
            assert packed_seq_params.cu_seqlens_kv_padded is packed_seq_params.cu_seqlens_kv
            rows = []
            sizes = packed_seq_params.cu_seqlens_q.diff().tolist()
            assert max(sizes) == packed_seq_params.max_seqlen_q
            for q, k, v in zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
                q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
                rows.append(attended[0].transpose(0, 1).flatten(1))
            return torch.cat(rows)

    for kind in (TEColumnParallelLinear, TERowParallelLinear, TELayerNormColumnParallelLinear):
        kind.__module__ = "transformer_engine.pytorch.stand_in"

    class Provider(LocalSpecProvider):  # type: ignore[misc]
        def linear(self) -> type:
            return Linear

        def column_parallel_linear(self) -> type:
            return TEColumnParallelLinear

        def row_parallel_linear(self) -> type:
            return TERowParallelLinear

        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> type:
            return TELayerNormColumnParallelLinear

        def layer_norm(self, *args: Any, **kwargs: Any) -> Any:
            return _Norm

        def core_attention(self) -> type:
            return TEDotProductAttention

        def grouped_mlp_modules(self, *args: Any) -> Any:
            from megatron.core.transformer.mlp import MLPSubmodules

            experts = super().grouped_mlp_modules(*args)
            linears = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
            # newer releases name the linears inside
            return (experts[0], linears) if isinstance(experts, tuple) else partial(experts.func, submodules=linears)

    return {"provider": Provider, "norm": _Norm, "attention": TEDotProductAttention}


@contextmanager
def engine_layers(recipe: Any = None, *, fused: bool = True) -> Iterator[None]:
    """Inside, layers are made of the stand-ins; with a recipe, FP8 is taken for possible. Attention is theirs where the
    GPU is ``fused``.
    """
    import megatron.core.extensions.transformer_engine as extension
    import megatron.core.models.gpt.gpt_layer_specs as specs
    import megatron.core.transformer.multi_latent_attention as latent
    from megatron.core.post_training.modelopt.layers import Linear

    import megatron_rl.mcore.model as model
    import megatron_rl.mcore.worker as worker
    from megatron_rl.mcore.fp8 import linear_formats

    found = stand_ins()
    with ExitStack() as stack:
        for owner, name, value in (
            (specs, "TESpecProvider", found["provider"]),
            (specs, "TENorm", found["norm"]),
            (specs, "HAVE_TE", True),
            (latent, "Linear", Linear),  # as layer_spec does for the local modules
            (extension, "TEDotProductAttention", found["attention"]),
            (model, "fuses_packed_rows", lambda: fused),
            (worker, "uses_transformer_engine", lambda layers, dtype: True),
            (worker, "fp8_faults", lambda spec: []),
            (worker, "linear_formats", partial(linear_formats, recipe_of=partial(recipe_of, recipe))),
        ):
            stack.enter_context(patch.object(owner, name, value, create=True))
        yield


def one_step(
    rank: int, port: int, model: Path, setup: Setup, engine: bool, fused: bool = True
) -> tuple[Any, UpdateResult | None, dict[str, Tensor], dict[str, Tensor]]:
    """Log-probs, one update, and on rank 0 all gradients and parameters after it."""
    with ExitStack() as stack:
        if engine:
            stack.enter_context(engine_layers(RECIPES["blockwise"], fused=fused))
        worker = start(rank, port, model, setup)
        scored = worker.logprobs(token_rows())
        result = worker.update(minibatch(), Reinforce())
        gradients, after = named(gradient_tensors(worker)), named(worker._full_tensors())
        worker.close()
    return scored, result, gradients, after


def padded_step(
    rank: int, port: int, model: Path, setup: Setup, role: str, multiple: int
) -> tuple[Any, UpdateResult | None, dict[str, Tensor], int]:
    """Scores, an update's result and gradients, micro-batches padded to ``multiple``; positions that were packed."""
    from megatron_rl.mcore import step

    worker = start(rank, port, model, setup, role)
    placement, pack, packed = worker._placement, step.pack, []

    def count(*args: Any, **kwargs: Any) -> Any:
        packed.append(pack(*args, **kwargs))
        return packed[-1]

    worker._placement = lambda packed=True: {**placement(packed), "multiple": multiple}
    scored = worker.logprobs(token_rows()) if role == POLICY else worker.values(token_rows())
    loss = Reinforce() if role == POLICY else SquaredError()
    worker.update(minibatch(), loss)  # a value head begins at zero and lets no gradient through
    with patch.object(step, "pack", count):
        result = worker.update(minibatch(), loss)
    gradients = named(gradient_tensors(worker))
    worker.close()
    return scored, result, gradients, sum(len(batch.inputs) for batch in packed)


def saved(rank: int, port: int, model: Path, setup: Setup, engine: bool, folder: Path) -> dict[str, Tensor]:
    """One update and a checkpoint; the parameters."""
    with ExitStack() as stack:
        if engine:
            stack.enter_context(engine_layers())
        worker = start(rank, port, model, setup)
        worker.update(minibatch(), Reinforce())
        worker.save(folder)
        worker.written()
        after = named(worker._full_tensors())
        worker.close()
    return after


def loaded(
    rank: int, port: int, model: Path, setup: Setup, engine: bool, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parameters after loading, and after an update then."""
    with ExitStack() as stack:
        if engine:
            stack.enter_context(engine_layers())
        worker = start(rank, port, model, setup)
        worker.load(folder)
        before = named(worker._full_tensors())
        worker.update(minibatch(), Reinforce())
        after = named(worker._full_tensors())
        worker.close()
    return before, after


def fp8_trained(rank: int, port: int, model: Path, setup: Setup, role: str, fp8: FP8Config) -> Any:
    """Formats; in which passes a layer found FP8 on; how many cached weights were dropped, twice. Scoring and updates
    take turns, and the stand-ins fail where a cached weight is stale.
    """
    from megatron_rl.mcore.fp8 import clear_cached_weights

    with engine_layers(RECIPES["blockwise"]):
        worker = start(rank, port, model, setup, role, fp8=fp8)
        score, loss = (worker.logprobs, Reinforce()) if role == POLICY else (worker.values, SquaredError())
        seen = []
        block = worker._training.chunks[0].module.decoder
        block.register_forward_pre_hook(lambda *_: seen.append((torch.is_grad_enabled(), block.config.fp8)))
        for _ in range(2):
            score(token_rows())
            worker.update(minibatch(), loss)
        dropped = [clear_cached_weights(worker._training.chunks) for _ in range(2)]
        worker.update(minibatch(), loss)
        formats = worker.formats()
        worker.close()
    return formats, set(seen), dropped


def left_in_bfloat16(rank: int, port: int, model: Path, layer: int) -> str:
    """What the start says where one linear of ``layer`` is megatron-core's own."""
    from megatron.core.tensor_parallel import RowParallelLinear

    import megatron_rl.mcore.worker as module

    build = module.build_chunks

    def fault(*args: Any, **kwargs: Any) -> Any:
        chunks = build(*args, **kwargs)
        chunks[0].decoder.layers[layer].mlp.linear_fc2.__class__ = RowParallelLinear
        return chunks

    with engine_layers(RECIPES["blockwise"]), patch.object(module, "build_chunks", fault):
        return _said(rank, port, model, FP8Config())


def wrong_scales(rank: int, port: int, model: Path) -> str:
    """What the start says where Transformer Engine rounds scales to powers of two."""
    with engine_layers(RECIPES["powers of two"]):
        return _said(rank, port, model, FP8Config())


def without_gpu(rank: int, port: int, model: Path) -> str:
    """What the start says of FP8 on this machine."""
    return _said(rank, port, model, FP8Config())


def _said(rank: int, port: int, model: Path, fp8: FP8Config) -> str:
    from megatron_rl.mcore.groups import stop_groups

    try:
        start(rank, port, model, Setup(dtype="bfloat16"), fp8=fp8)
    except ValueError as error:
        return str(error)
    finally:
        stop_groups()
    return "it started"


def accepted_fields(rank: int, port: int, model: Path) -> dict[str, Any]:
    """What megatron-core's own configurations make of each recipe."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

    from megatron_rl.config.schema import OptimizerConfig, TrainerConfig
    from megatron_rl.mcore.fp8 import ddp_fields, optimizer_fields
    from megatron_rl.mcore.model import transformer_config
    from megatron_rl.model_dims import read_model_dims

    dims = read_model_dims(model)
    found: dict[str, Any] = {}
    for name, fp8 in {
        "none": None,
        "blockwise": FP8Config(),
        "tensorwise": FP8Config(recipe="tensorwise", parameters=True),
        "mxfp8": FP8Config(recipe="mxfp8", first_last_layers_bf16=2),
    }.items():
        trainer = TrainerConfig(optimizer=OptimizerConfig(lr=1.0), layout=ParallelLayout(), fp8=fp8)
        config = transformer_config(dims, trainer, torch.bfloat16, transformer_engine=fp8 is not None)
        found[name] = (
            config.fp8,
            config.fp8 and config.fp8_recipe,
            config.fp8_param,
            config.first_last_layers_bf16 and (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16),
            config.transformer_impl,
            DistributedDataParallelConfig(**ddp_fields(fp8)).fp8_param_gather,
            MegatronOptimizerConfig(**optimizer_fields(fp8)).fp8_recipe,
        )
    return found


def fp8_parameter(rank: int, port: int, model: Path) -> dict[str, Any]:
    """A rank whose first output projection is kept in FP8: what the load put in it, and what an export reads."""
    import megatron_rl.mcore.worker as module
    from megatron_rl.mcore.quantised import forget_values

    class Quantised(torch.nn.Parameter):
        """Reads as zeros until it is dequantised; views of it are copies."""

        def dequantize(self) -> Tensor:  # type: ignore[override]
            return self.get_high_precision_init_val()  # type: ignore[attr-defined, no-any-return]

    Quantised.__module__ = "transformer_engine.pytorch.tensor.stand_in"
    build = module.build_chunks

    def quantise(*args: Any, **kwargs: Any) -> Any:
        chunks = build(*args, **kwargs)
        linear = chunks[0].decoder.layers[0].self_attention.linear_proj
        values = torch.zeros_like(linear.weight)
        old = vars(linear.weight)
        linear.weight = Quantised(values)
        vars(linear.weight).update(old)
        return chunks

    with patch.object(module, "build_chunks", quantise):
        worker = start(rank, port, model, Setup())
        exported = named(worker._full_tensors())["model.layers.0.self_attn.o_proj.weight"]
        first = worker._training.chunks[0].module.decoder.layers[0].self_attention.linear_proj.weight
        quantised = first.data.clone()
        forget_values([chunk.module for chunk in worker._training.chunks])
        forgotten = first.get_high_precision_init_val() is None
        worker.close()
    return {"exported": exported, "quantised": quantised, "forgotten": forgotten}


def fp8_parameter_saved(rank: int, port: int, model: Path, folder: Path) -> Tensor:
    """What a checkpoint holds of a parameter in FP8, read without knowing of it; its bytes are zeros, it means ones."""
    from megatron.core import dist_checkpointing, fp8_utils
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_rl.mcore.checkpoint import SaveToMemory

    class Quantised(torch.nn.Parameter):
        def dequantize(self) -> Tensor:  # type: ignore[override]
            return torch.ones(4, 2)

    worker, strategy = start(rank, port, model, Setup()), SaveToMemory()
    state = {"weight": ShardedTensor.from_rank_offsets("weight", Quantised(torch.zeros(4, 2)))}
    with (
        patch.object(fp8_utils, "is_float8tensor", lambda tensor: isinstance(tensor, Quantised)),
        patch.object(fp8_utils, "dequantize_fp8_tensor", Quantised.dequantize),
    ):
        dist_checkpointing.save(state, str(folder), sharded_strategy=strategy)
    for path, content in strategy.memory.files.items():
        (folder / path.name).write_bytes(content.getbuffer())
    wanted = {"weight": ShardedTensor.from_rank_offsets("weight", torch.empty(4, 2))}
    values: Tensor = dist_checkpointing.load(wanted, str(folder))["weight"]
    worker.close()
    return values


def fp8_parameter_from_checkpoint(rank: int, port: int, model: Path, folder: Path) -> Tensor:
    """What a main weight would start from after weights of a checkpoint were loaded into a parameter in FP8."""
    from megatron_rl.mcore.checkpoint import load_weights

    worker = start(rank, port, model, Setup())
    chunks = [chunk.module for chunk in worker._training.chunks]
    linear = chunks[0].decoder.layers[0].self_attention.linear_proj
    kind = type("Quantised", (torch.nn.Parameter,), {"__module__": "transformer_engine.pytorch.tensor.stand_in"})
    linear.weight = kind(torch.zeros_like(linear.weight))
    vars(linear.weight).update(allreduce=True, tensor_model_parallel=True, partition_dim=1, partition_stride=1)
    load_weights(folder, chunks)
    values: Tensor = linear.weight.get_high_precision_init_val()
    worker.close()
    return values


def formats_here(rank: int, port: int, model: Path, setup: Setup) -> list[LinearFormat]:
    """Of this rank's linears, as they are."""
    worker = start(rank, port, model, setup)
    found = worker.formats()
    worker.close()
    return found
