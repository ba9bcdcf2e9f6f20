"""A model loader of vLLM's that loads nothing, for engines that are given their first weights by a push.

Importing this module registers it with vLLM. Written against the interface of vLLM 0.26 to 0.32.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

LOAD_FORMAT = "megatron_rl_unloaded"
_CACHE_SCALES = frozenset({"q_scale", "k_scale", "v_scale"})
"""Of attention in a model whose configuration says that it is quantised."""


@register_model_loader(LOAD_FORMAT)
class Unloaded(DummyModelLoader):  # type: ignore[misc]
    """Fills weights with small random numbers."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Fill all but the scales of keys and values, which no push brings: they stay as vLLM makes them, 1."""
        kept = {
            name: tensor.detach().clone()
            for name, tensor in model.named_parameters()
            if name.rpartition(".")[2] in _CACHE_SCALES
        }
        super().load_weights(model, model_config)
        for name, tensor in model.named_parameters():
            if name in kept:
                tensor.data.copy_(kept[name])
