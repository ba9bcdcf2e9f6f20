"""The policy's output layer: holds the projection to the vocabulary and leaves the projecting to the log-probs."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from megatron_rl.mcore.logprobs import Kernels


class TokenHead(ColumnParallelLinear):  # type: ignore[misc]
    """Hidden states [s (/ tensor under sequence parallelism), b, h] -> the same, whole, on every tensor rank.

    It stands where ``GPTModel.output_layer`` stood and keeps that layer's weight (none where the weight is the
    embedding of this same stage), so names, gradient buffers and checkpoints stay as they are. The model then ends in
    hidden states, which :func:`~megatron_rl.mcore.logprobs.linear_logprobs` multiplies with the weight a few tokens at
    a time. Each tensor rank computes its vocabulary's part of their gradient; the backward of this layer sums the parts
    (all-reduce, or reduce-scatter under sequence parallelism), which the whole layer would have done.
    """

    def __init__(self, projection: Any, vocabulary: int, kernels: Kernels) -> None:
        """Take the place of a layer.

        Args:
            projection: the layer.
            vocabulary: tokens; rows of the weight beyond them are padding.
            kernels: what multiplies.
        """
        super().__init__(
            projection.input_size,
            projection.output_size,
            config=projection.config,
            init_method=projection.config.output_layer_init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=projection.tp_group,
        )
        self.weight = projection.weight
        self.vocabulary = vocabulary
        self.kernels = kernels

    def forward(self, hidden: Tensor, **ignored: Any) -> tuple[Tensor, None]:
        """Hidden states and no bias, as an output layer answers."""
        whole = gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        return whole(hidden, group=self.tp_group), None


def output_weight(model: Any) -> Tensor:
    """[V with padding / tensor, h], which hidden states of ``model`` (a policy's last stage, wrapped or not) are
    projected by.
    """
    stage = _last_stage(model)
    own = stage.output_layer.weight
    weight: Tensor = stage.shared_embedding_or_output_weight() if own is None else own
    return weight


def logprob_kernels(model: Any) -> Kernels:
    """What the same ``model`` multiplies that weight with."""
    kernels: Kernels = _last_stage(model).output_layer.kernels
    return kernels


def real_vocabulary(model: Any) -> int:
    """Tokens that the same ``model`` knows; what :func:`output_weight` has beyond them is padding."""
    tokens: int = _last_stage(model).output_layer.vocabulary
    return tokens


def _last_stage(model: Any) -> Any:
    return get_attr_wrapped_model(model, "output_layer", return_model_obj=True)
