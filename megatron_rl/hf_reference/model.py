"""A Hugging Face model as its authors run it: one row at a time, without padding, in float32."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from megatron_rl.batches import TokenRows
from megatron_rl.weights.rules import Head
from megatron_rl.weights.safetensors_io import HfFolder

_WATCHED = re.compile(r"(embed_tokens|layers\.\d+(\.self_attn)?|norm)$")


class HfReference:
    """The model in a folder; its methods are what :class:`~megatron_rl.hf_reference.process.HfProcess` calls."""

    def __init__(self, folder: Path, head: Head) -> None:
        """Load it.

        Args:
            folder: a Hugging Face folder.
            head: TOKEN for a language model; VALUE for a critic, a ``*ForTokenClassification`` of one label.

        Raises:
            ValueError: a tensor of the model is not in the folder: transformers would fill it with random numbers.
        """
        kind = AutoModelForCausalLM if head is Head.TOKEN else AutoModelForTokenClassification
        more = {} if head is Head.TOKEN else {"num_labels": 1}
        self._model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **more)
        if info["missing_keys"]:
            raise ValueError(f"{folder} must hold every tensor of the model, it lacks {sorted(info['missing_keys'])}")
        self._model.eval()
        self._folder = folder
        self._tied = head is Head.TOKEN and bool(self._model.config.tie_word_embeddings)

    @torch.no_grad()
    def logprobs(self, rows: TokenRows) -> Tensor:
        """[B, T] f32 log-probs of the response tokens at temperature 1, 0 elsewhere."""
        found = torch.zeros(rows.tokens.shape)
        for row, tokens in _each(rows):
            logits = self._model(tokens[None], use_cache=False).logits[0, :-1]
            found[row, 1 : len(tokens)] = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        return found * rows.response_mask

    @torch.no_grad()
    def values(self, rows: TokenRows, through: Tensor | None) -> Tensor:
        """[B, T] f32 values of the states before the response tokens, 0 elsewhere.

        Args:
            rows: the tokens.
            through: [h] read the final hidden states through this instead of the model's own head.
        """
        found = torch.zeros(rows.tokens.shape)
        for row, tokens in _each(rows):
            if through is None:
                said = self._model(tokens[None]).logits[0, :, 0]
            else:
                said = self._model.base_model(tokens[None], use_cache=False).last_hidden_state[0] @ through
            found[row, 1 : len(tokens)] = said[:-1]
        return found * rows.response_mask

    @torch.no_grad()
    def activations(self, rows: TokenRows) -> dict[str, Tensor]:
        """See :meth:`megatron_rl.interfaces.ScoresTokens.activations`."""
        with _watched(self._model.base_model) as seen:
            for _, tokens in _each(rows):
                self._model.base_model(tokens[None], use_cache=False)
        return {place: torch.cat(parts) for place, parts in seen.items()}

    def tensors(self, prefixes: Sequence[str]) -> dict[str, Tensor]:
        """What the folder holds under these names, and the rotary frequencies that transformers made."""
        folder = HfFolder(self._folder)
        found = {name: folder.tensor(name) for name in sorted(folder.names) if name.startswith(tuple(prefixes))}
        if self._tied:
            found.pop("lm_head.weight", None)  # some folders hold a copy
        frequencies = "model.rotary_emb.inv_freq"
        if frequencies.startswith(tuple(prefixes)):
            found[frequencies] = self._model.base_model.rotary_emb.inv_freq
        return found


def _each(rows: TokenRows) -> Iterator[tuple[int, Tensor]]:
    for row, length in enumerate(rows.lengths.tolist()):
        yield row, rows.tokens[row, :length]


@contextmanager
def _watched(decoder: Any) -> Iterator[Mapping[str, list[Tensor]]]:
    """Keep what the modules give for each row, its last token left out."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def keep(place: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[place].append((output[0] if isinstance(output, tuple) else output)[0, :-1])

        return hook

    watched = [(f"model.{name}", module) for name, module in decoder.named_modules() if _WATCHED.match(name)]
    handles = [module.register_forward_hook(keep(place)) for place, module in watched]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
