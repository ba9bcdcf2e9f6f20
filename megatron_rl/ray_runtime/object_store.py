"""How much shared memory Ray's objects take and get. Loads neither Ray nor torch, so that it can be asked without."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_rl.config.schema import RunConfig

_SHARED_MEMORY = Path("/dev/shm")
_LEAST = 4 << 30
_ROLLOUT = 14
"""Of a :class:`.RolloutBatch`, a padded token in bytes: int64, float32 and two masks. Tests hold these three against
what travels.
"""
_FLOAT = 4
"""Of each float32 beside it: in answers, in an :class:`.ExperienceBatch`, in the weights of a minibatch."""
_DRAWN = 18
"""Of a :class:`.Rollout`, a token drawn: its id, its log-prob and about four letters."""


def step_bytes(config: RunConfig) -> int:
    """Bytes in the store at the moment that takes most, with every sample as long as it may be: while engines answer,
    while models score the batch, or while they get the experience. A batch lies there once for each group of workers
    that gets it, and policy and critic get theirs at the same time; what models answer lies there beside it.
    """
    asked = max(config.samples_per_step, config.evaluation.prompts * config.evaluation.samples)
    drawn = asked * config.rollout.max_response_tokens * _DRAWN
    row = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    groups, critics, references = len(config.trainers), len(config.trainers) - 1, int(config.ppo.kl_coef > 0)
    scored = groups * _ROLLOUT + (1 + critics + references) * _FLOAT
    # old log-probs, rewards, advantages; those of a reference; values and returns
    learned = groups * (3 + references + 2 * critics) * _FLOAT
    weights = groups * config.ppo.minibatch_samples * _FLOAT
    return max(drawn, row * config.samples_per_step * scored, row * (config.samples_per_step * learned + weights))


def free_shared_memory() -> int | None:
    """Bytes; None where there is no ``/dev/shm``."""
    return shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None


def object_store_bytes(needed: int, memory: int, shared_memory: int) -> int:
    """Of a Ray that a run starts: what its step needs, at most half of the shared memory that is free, at least 4 GiB,
    and never more than a quarter of the memory that is available; all in bytes.
    """
    return min(memory // 4, max(_LEAST, min(needed, shared_memory // 2)))


def small_store(needed: int, store: int, *, joined: bool) -> tuple[str, str] | None:
    """What is asked and what is there, and what to change; None: it fits.

    Args:
        needed: see :func:`step_bytes`.
        store: bytes of a node's.
        joined: whether the Ray is one that a run joins.
    """
    if needed <= store:
        return None
    if joined:
        more = f"export RAY_OBJECT_STORE_BYTES={needed} before ray_head.sh and ray_worker.sh"
    else:
        more = f"have {_gib(4 * needed)} of memory and {_gib(2 * needed)} of /dev/shm free (--shm-size of a container)"
    return (
        f"a step has up to {_gib(needed)} in Ray's object store, which has {_gib(store)}: Ray puts the rest into "
        "files, which is slow, and fails where their disk is full",
        f"{more}, or lower prompts_per_step, rollout.samples_per_prompt or rollout.max_response_tokens, of an "
        "evaluation evaluation.prompts or evaluation.samples",
    )


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
