"""The rollout engine: a vLLM engine inside the calling process, which should do nothing else.

vLLM sets environment variables, the default process group and torch's threads of its process, so neither a training
rank nor a second engine can live there.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from megatron_rl.dataflow import Finish, Prompt, Rollout, Sample, Sampling
from megatron_rl.device import compute_capability, limit_threads, memory_used
from megatron_rl.interfaces import MemoryUse, PushPhase, PushReceipt
from megatron_rl.lifetime import die_with_child
from megatron_rl.linear_formats import LinearFormat, first_difference
from megatron_rl.model_dims import read_ending_tokens
from megatron_rl.vllm_engine import scales

if TYPE_CHECKING:
    from torch import Tensor

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_PLUGINS": "",
    "TOKENIZERS_PARALLELISM": "false",
}
_ENVIRONMENT_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_HOST_IP": "127.0.0.1",  # the engine's own group is on one host; on any other address it would be reachable
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else tensor-parallel workers ask for a NUMA node each
    # 0.26's second one, which needs Triton, so that no CPU has it, rounds logits to bfloat16 once more where it divides
    # them by the temperature: a gap to the trainer of 0.02 nats
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # torch has threads by then
}
_CPU_BATCHED_TOKENS = 8192
_GPU_BATCHED_TOKENS = 2048
"""vLLM's own, where a prompt may be cut."""
_CHECKED_FRACTION = 0.01
"""Of a GPU's memory that vLLM asks to be free before it starts, whatever it then takes; nothing else of it counts where
the size of the cache is given. The default, 0.92, would refuse a GPU that others use as well.
"""
_SLEEP_TAGS = ("weights", "kv_cache")
"""What vLLM wakes by itself, in that order."""
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_EXPANDABLE = re.compile(r"expandable_segments\s*:\s*(True|1)", re.IGNORECASE)
_FINISH = {"stop": Finish.STOP, "length": Finish.LENGTH}


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What an engine must know to start; picklable.

    Attributes:
        model: a Hugging Face folder. Its eos_token_id (config.json and generation_config.json) end a sample.
        dtype: type of the weights, ``float32`` or ``bfloat16``.
        max_model_len: longest prompt and response together, in tokens.
        kv_cache_mib: memory for keys and values.
        max_concurrent: sequences generated at the same time.
        on_cpu: leave out compiling, which would take longer than it saves.
        eager: leave it out on a GPU, too: the layers of a model that runs compiled cannot be watched.
        tensor: tensor-parallel workers; with more than one, each is a process of its own.
        sleeps: shares its GPU, and gives it back in its sleep.
        version: of the weights in ``model``; None where they are not to be sampled from before a push.
        quantization: vLLM's name of the format that linears quantise their weights to, of those in ``model`` and of
            those pushed; None: not at all.
        pushed_quantised: what is pushed is in that format already (:mod:`megatron_rl.weights.fp8_push`). Such an engine
            starts with weights that mean nothing, whatever is in ``model``.
        kv_cache_dtype: of keys and values: ``auto`` (that of the weights) or ``fp8``.
    """

    model: Path
    dtype: str
    max_model_len: int
    kv_cache_mib: int
    max_concurrent: int
    on_cpu: bool
    eager: bool = False
    tensor: int = 1
    version: int | None = None
    quantization: str | None = None
    pushed_quantised: bool = False
    kv_cache_dtype: str = "auto"
    sleeps: bool = False

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ValueError: it is to take up quantised weights, but in no format, or to generate before it has them.
        """
        if self.pushed_quantised and (self.quantization is None or self.version is not None):
            raise ValueError(
                "pushed_quantised needs a quantization, and no version: the engine has no weights before a push; got "
                f"quantization={self.quantization}, version={self.version}"
            )

    @property
    def compiled(self) -> bool:
        """Whether vLLM compiles the model, and replays it as CUDA graphs."""
        return not (self.on_cpu or self.eager)

    @property
    def batched_tokens(self) -> int:
        """Tokens that go through the model at a time, at most; vLLM refuses fewer than sequences, and where a prompt
        may not be cut, than the longest one has.
        """
        least = max(self.max_model_len, _CPU_BATCHED_TOKENS) if self.on_cpu else _GPU_BATCHED_TOKENS
        return max(least, self.max_concurrent)


class WorkerError(RuntimeError):
    """What some of the engine's workers raised, by rank."""


class NotFinite(RuntimeError):
    """The model gave a log-prob that is NaN or infinite."""


class Engine:
    """Generates, scores, and takes up weights. One per process; not for several threads.

    With tensor-parallel workers, the thread that makes it must live as long as the process: the workers die with it.
    """

    def __init__(self, spec: EngineSpec) -> None:
        """Load the model.

        Raises:
            ValueError: the model names no eos_token_id, or vLLM cannot use it as asked.
        """
        self._spec = spec
        self._ending = read_ending_tokens(spec.model)
        self._version = spec.version
        self._next: tuple[PushPhase, int] | None = None
        self._late: str | None = None
        self._closing = False
        self._cache_spoilt = False
        self._asleep: frozenset[str] = frozenset()
        self._request_ids = count()
        _prepare_process(spec)
        with _imports_kept_from_collector():
            from vllm import EngineArgs, SamplingParams
            from vllm.config import WeightTransferConfig
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.llm_engine import LLMEngine

            from megatron_rl.vllm_engine import receiver
        self._sampling_params = SamplingParams
        self._final_only = RequestOutputKind.FINAL_ONLY
        arguments = EngineArgs(
            **_model_arguments(spec),
            dtype=spec.dtype,
            max_model_len=spec.max_model_len,
            max_num_seqs=spec.max_concurrent,
            kv_cache_memory_bytes=spec.kv_cache_mib << 20,
            gpu_memory_utilization=_CHECKED_FRACTION,
            kv_cache_dtype=spec.kv_cache_dtype,
            tensor_parallel_size=spec.tensor,
            distributed_executor_backend="uni" if spec.tensor == 1 else "mp",
            enforce_eager=not spec.compiled,
            # a prompt cut in two rewinds its request's random state, which CPU generators cannot
            enable_chunked_prefill=not spec.on_cpu,
            max_num_batched_tokens=spec.batched_tokens,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",  # else its temperature and top-k become defaults
            seed=0,
            enable_sleep_mode=spec.sleeps and not spec.on_cpu,  # refused on a CPU, where sleep frees nothing
            disable_log_stats=True,
            weight_transfer_config=WeightTransferConfig(backend=receiver.BACKEND),
            worker_extension_cls=f"{receiver.__name__}.{receiver.WorkerExtension.__name__}",
        )
        self._engine: Any = LLMEngine.from_engine_args(arguments, enable_multiprocessing=False)
        self._worker_pids: list[int] = self._on_workers("pid")
        if spec.tensor > 1:
            self._on_workers("die_with_engine", os.getpid())
            # vLLM would tell a death at the next call alone; and without a worker, the engine can do nothing more
            die_with_child(self._worker_pids, "tensor-parallel worker", unless=lambda: self._closing)
            if spec.on_cpu:
                self._on_workers("unname_shared_memory")

    @property
    def version(self) -> int | None:
        """Of the weights; None before the first push and after a failed one."""
        return self._version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        """Draw one sample per prompt and seed; equal seeds give equal samples.

        Args:
            prompts: the questions.
            sampling: how to draw.
            seeds: for each prompt, one per sample.

        Returns:
            one rollout per prompt, in order. Log-probs are those of the distribution that was drawn from: divided by
            the temperature and cut to ``top_p``; of a greedy sample at temperature 1.

        Raises:
            RuntimeError: the version of the weights is not known, or a log-prob is missing or not finite.
            ValueError: a prompt and its response could become longer than ``max_model_len``, or seeds are missing.
        """
        self._check_awake(*_SLEEP_TAGS)
        if self._version is None:
            raise RuntimeError(
                "the engine is stale and must be given weights before it generates: none were pushed, or the last push "
                "failed"
            )
        if len(seeds) != len(prompts) or not all(seeds):
            raise ValueError(
                f"every prompt needs its seeds, got {len(prompts)} prompts, {[len(s) for s in seeds]} seeds"
            )
        for prompt in prompts:
            self._check_length(f"prompt {prompt.id}", len(prompt.token_ids), sampling.max_tokens)
        requests = [
            (prompt.token_ids, self._draw(sampling, seed))
            for prompt, of_prompt in zip(prompts, seeds, strict=True)
            for seed in of_prompt
        ]
        self._forget_prefixes()
        with self._noting_what_is_not_finite():
            samples = iter([_sample(output) for output in self._run(requests)])
        return [
            Rollout(prompt=prompt, samples=tuple(next(samples) for _ in of_prompt), policy_version=self._version)
            for prompt, of_prompt in zip(prompts, seeds, strict=True)
        ]

    def score(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob of each token given those before it, at temperature 1; 0.0 for the first of a row.

        Raises:
            RuntimeError: a log-prob is missing or not finite.
            ValueError: a row is empty or leaves no room within ``max_model_len`` for one more token.
        """
        self._check_awake(*_SLEEP_TAGS)
        for index, row in enumerate(rows):
            self._check_length(f"row {index}", len(row), 1)
        params = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        requests = [(row, self._sampling_params(**params, output_kind=self._final_only)) for row in rows]
        with self._noting_what_is_not_finite():
            return [
                [0.0, *_chosen(row[1:], output.prompt_logprobs[1:])]
                for row, output in zip(rows, self._run(requests), strict=True)
            ]

    @contextmanager
    def _noting_what_is_not_finite(self) -> Iterator[None]:
        """Why: it stays in the cache of keys and values, where attention multiplies it with 0 for rows to come."""
        try:
            yield
        except NotFinite:
            self._cache_spoilt = True
            raise

    def activations(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """What leaves the model's layers, see :meth:`megatron_rl.interfaces.ScoresTokens.activations`; errors as
        :meth:`score`.
        """
        import torch

        from megatron_rl.vllm_engine import inside

        found: list[dict[str, Tensor]] = []
        self._on_workers(inside.watch)
        try:
            for row in rows:
                self.score([row])
                found.append(self._on_workers(inside.take)[0])
        finally:
            self._on_workers(inside.unwatch)
        return {place: torch.cat([row[place][:-1] for row in found]) for place in found[0]}

    def tensors(self, prefixes: Sequence[str]) -> dict[str, Tensor]:
        """The weights that the model computes with, see :func:`megatron_rl.vllm_engine.inside.tensors`."""
        from megatron_rl.vllm_engine import inside

        found: dict[str, Tensor] = self._on_workers(inside.tensors, tuple(prefixes))[0]
        return found

    def linear_formats(self) -> list[LinearFormat]:
        """See :func:`megatron_rl.vllm_engine.inside.linear_formats`.

        Raises:
            RuntimeError: tensor-parallel workers differ, or the weights sleep.
        """
        self._check_awake("weights")
        from megatron_rl.vllm_engine import inside

        first, *others = self._on_workers(inside.linear_formats)
        for rank, other in enumerate(others, 1):
            if (difference := first_difference(first, other)) is not None:
                raise RuntimeError(f"worker rank {rank} must hold its linears as rank 0 does: {difference}")
        formats: list[LinearFormat] = first
        return formats

    def join(self, host: str, port: int, rank: int, world_size: int, timeout_s: float) -> None:
        """Join the channel that weights will be pushed through.

        Args:
            host: of the sender.
            port: of the sender.
            rank: of this engine in the channel.
            world_size: sender and receivers together.
            timeout_s: bound on joining.

        Raises:
            WorkerError: the sender or another receiver is not there in time.
        """
        where = {"host": host, "port": port, "rank": rank, "world_size": world_size}
        self._on_workers("init_weight_transfer_engine", {**where, "timeout_s": timeout_s})

    def advance(self, phase: PushPhase, version: int, deadline_s: float) -> tuple[PushReceipt, ...] | None:
        """Go through one phase of a push. The engine is stale from the first to the last, and after an error until a
        push comes to its end.

        Args:
            phase: the one after the last one; the first is always allowed.
            version: of the weights, the same in all phases.
            deadline_s: bound on the phase; the workers get nine tenths of it, so that there is time to say who is late.

        Returns:
            what arrived at each worker, in the transfer; else None.

        Raises:
            RuntimeError: the phase is not the next one.
            WorkerError: the sender gave up, is gone or is silent for too long, or the model cannot load what it sent.
            TimeoutError: a worker is late; the engine can only be started anew.
        """
        self._check_awake("weights")
        order = list(PushPhase)
        if phase is not order[0] and self._next != (phase, version):
            raise RuntimeError(
                f"version {version}: the phases of a push must follow one another, {phase.value} came in place of "
                f"{'the first' if self._next is None else f'{self._next[0].value} of version {self._next[1]}'}"
            )
        self._version, self._next = None, None
        receipts = self._go_through(phase, version, 0.9 * deadline_s)
        if phase is order[-1]:
            self._version = version
        else:
            self._next = order[order.index(phase) + 1], version
        return receipts

    def _go_through(self, phase: PushPhase, version: int, deadline_s: float) -> tuple[PushReceipt, ...] | None:
        if phase is PushPhase.DRAIN and self._engine.has_unfinished_requests():
            raise RuntimeError(f"version {version}: no request may be under way when weights change")
        if phase is PushPhase.START:
            self._on_workers("start_push", deadline_s=deadline_s)
        if phase is PushPhase.TRANSFER:
            self._on_workers("update_weights", {"version": version}, deadline_s=deadline_s)
            return tuple(self._on_workers("push_receipt", deadline_s=deadline_s))
        if phase is PushPhase.FINISH:
            self._on_workers("finish_weight_update", deadline_s=deadline_s)
        if phase is PushPhase.RESET_CACHE:
            self._forget_prefixes()
            if self._cache_spoilt and not self._asleep:  # else it is zeroed when it wakes
                self._on_workers("zero_cache", deadline_s=deadline_s)
                self._cache_spoilt = False
        return None

    def _forget_prefixes(self) -> None:
        """Why before each rollout, too: what was scored or drawn since the push, at a resume another time than without
        one, would decide which tokens are computed together, and with it how they are rounded.
        """
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("the cache of prefixes must be emptied, it is still in use")

    def sleep(self, keep_weights: bool) -> MemoryUse:
        """Free the GPU: weights go to host memory or are thrown away, keys and values are forgotten. On a CPU nothing
        is freed, and all else is the same.

        Args:
            keep_weights: else the engine is stale until a push.

        Raises:
            RuntimeError: it sleeps already, or is generating.
        """
        self._check_awake(*_SLEEP_TAGS)
        if self._engine.has_unfinished_requests():
            raise RuntimeError("no request may be under way when the engine goes to sleep")
        self._engine.sleep(level=1 if keep_weights else 2)
        self._asleep = frozenset(_SLEEP_TAGS)
        if not keep_weights:
            self._version, self._next = None, None
        return self._memory()

    def wake(self, weights: bool, cache: bool) -> MemoryUse:
        """Get memory back for the weights, for keys and values, or both: for a push the weights alone will do.

        Raises:
            RuntimeError: what is asked for does not sleep.
        """
        tags = [tag for tag, asked in zip(_SLEEP_TAGS, (weights, cache), strict=True) if asked]
        if not set(tags) <= self._asleep:
            raise RuntimeError(
                f"{' and '.join(tags)} must sleep to be woken, asleep: {sorted(self._asleep) or 'nothing'}"
            )
        self._engine.wake_up(tags)
        self._asleep -= set(tags)
        if cache:
            self._on_workers("zero_cache")  # what the GPU gives back may hold anything
            self._cache_spoilt = False
        return self._memory()

    def _check_awake(self, *tags: str) -> None:
        if asleep := [tag for tag in tags if tag in self._asleep]:
            raise RuntimeError(f"the engine's {' and '.join(asleep)} must be awake, wake them first")

    def _memory(self) -> MemoryUse:
        """Of the first worker."""
        weights: int = self._on_workers("weight_bytes")[0]
        kept = {"weights": weights, "kv_cache": self._spec.kv_cache_mib << 20}
        planned = sum(size for tag, size in kept.items() if tag not in self._asleep)
        return MemoryUse(planned_bytes=planned, measured_bytes=memory_used())

    def close(self) -> None:
        """Leave the channel and stop."""
        self._closing = True
        if self._late is None:
            self._on_workers("leave_channel")
        self._engine.engine_core.shutdown()

    def _on_workers(self, method: str | Callable[..., Any], *args: Any, deadline_s: float | None = None) -> list[Any]:
        """What every worker answers to a call of its method, or of a function that takes the worker first."""
        if self._late is not None:
            raise RuntimeError(f"the engine must be started anew: {self._late}")
        try:
            attempts = self._engine.collective_rpc("attempt", timeout=deadline_s, args=(method, *args))
        except TimeoutError as error:
            self._late = f"within {deadline_s:g} s not all workers were done with {method}: {self._worker_states()}"
            self._closing = True
            for pid in self._worker_pids:  # a late answer would be taken for that to the next question
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise TimeoutError(self._late) from error
        failed = [(rank, attempt.error) for rank, attempt in enumerate(attempts) if attempt.error is not None]
        if failed:
            raise WorkerError("; ".join(f"worker rank {rank}: {error}" for rank, error in failed))
        return [attempt.value for attempt in attempts]

    def _worker_states(self) -> str:
        return ", ".join(
            f"rank {rank} (pid {pid}) is {psutil.Process(pid).status() if psutil.pid_exists(pid) else 'gone'}"
            for rank, pid in enumerate(self._worker_pids)
        )

    def _draw(self, sampling: Sampling, seed: int) -> Any:
        return self._sampling_params(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            # vLLM looks for stop strings in the text, where special tokens are left out
            stop_token_ids=self._ending.with_stops(sampling.stop),
            seed=seed,
            logprobs=0,
            output_kind=self._final_only,
        )

    def _check_length(self, name: str, length: int, more: int) -> None:
        if not 0 < length <= self._spec.max_model_len - more:
            raise ValueError(
                f"{name}: must have 1 to {self._spec.max_model_len - more} tokens to leave room for {more} more within "
                f"max_model_len={self._spec.max_model_len}, has {length}"
            )

    def _run(self, requests: Sequence[tuple[Sequence[int], Any]]) -> list[Any]:
        """All outputs, in the order of the requests."""
        outputs: dict[str, Any] = {}
        ids = []
        try:
            for token_ids, params in requests:
                ids.append(str(next(self._request_ids)))
                self._engine.add_request(ids[-1], {"prompt_token_ids": list(token_ids)}, params)
            while self._engine.has_unfinished_requests():
                outputs |= {output.request_id: output for output in self._engine.step() if output.finished}
        except BaseException:
            self._engine.abort_request(ids)  # else the next call would finish them
            raise
        return [outputs[request_id] for request_id in ids]


def _model_arguments(spec: EngineSpec) -> dict[str, Any]:
    """What vLLM is told of the folder, of the weights to start with, and of those to come.

    Configuration, tokenizer and weights are those that trainers read: by itself vLLM takes Mistral's own (params.json,
    tekken.json, consolidated.safetensors) from a folder that has both.
    """
    folder = {"model": str(spec.model), "config_format": "hf", "tokenizer_mode": "hf"}
    if not spec.pushed_quantised:
        return folder | {"load_format": "safetensors", "quantization": spec.quantization}
    from megatron_rl.vllm_engine import unloaded
    from megatron_rl.weights.fp8_push import quantization_config

    assert spec.quantization is not None
    return folder | {
        "hf_overrides": {"quantization_config": quantization_config(spec.quantization)},
        "load_format": unloaded.LOAD_FORMAT,  # the folder's are not quantised
    }


def start_engine(spec: EngineSpec) -> Engine:
    """Make an engine in this process."""
    return Engine(spec)


def _sample(output: Any) -> Sample:
    completion = output.outputs[0]
    if completion.finish_reason not in _FINISH:
        raise RuntimeError(f"a sample must end with one of {sorted(_FINISH)}, got {completion.finish_reason!r}")
    return Sample(
        token_ids=tuple(completion.token_ids),
        logprobs=tuple(_chosen(completion.token_ids, completion.logprobs)),
        text=completion.text,
        finish=_FINISH[completion.finish_reason],
    )


def _chosen(token_ids: Sequence[int], candidates: Sequence[Any] | None) -> list[float]:
    """Log-prob of each token among the candidates that vLLM lists for its position."""
    if candidates is None or len(candidates) != len(token_ids):
        raise RuntimeError(f"{len(token_ids)} tokens need as many log-probs, got {len(candidates or ())}")
    found = [
        float(listed[token].logprob) if token in listed else math.nan
        for token, listed in zip(token_ids, candidates, strict=True)
    ]
    if bad := [place for place, logprob in enumerate(found) if not math.isfinite(logprob)]:
        raise NotFinite(
            f"every log-prob must be finite, {len(bad)} of {len(found)} are not, first at token {bad[0]} "
            f"({found[bad[0]]}): the weights may hold NaN or infinity"
        )
    return found


def _prepare_process(spec: EngineSpec) -> None:
    """Set what vLLM reads while it is imported."""
    os.environ.update(_ENVIRONMENT)
    for name, value in _ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    _keep_memory_exportable()
    if spec.tensor > 1:
        # its sockets lie there, and the names of sockets are short: that of a run's scratch folder need not be
        folder = os.open(tempfile.gettempdir(), os.O_RDONLY)
        os.environ["VLLM_RPC_BASE_PATH"] = f"/proc/{os.getpid()}/fd/{folder}"
    if spec.on_cpu:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # eager mode alone still compiles the ranking of log-probs, with g++
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override kv_cache_mib
        limit_threads()
    else:
        os.environ.update(scales.environment(spec.quantization, compute_capability()))


def _keep_memory_exportable() -> None:
    """Turn expandable segments off, which trainers may have: the engine's workers open each other's buffers, and
    cudaIpcGetMemHandle refuses such memory. torch takes a text of settings whole, so the others stay in it.
    """
    for name in _ALLOCATOR_SETTINGS:
        asked = os.environ.get(name, "")
        if (kept := _EXPANDABLE.sub("expandable_segments:False", asked)) != asked:
            os.environ[name] = kept
            logging.getLogger(__name__).warning("an engine goes without expandable segments: %s=%s", name, kept)


@contextmanager
def _imports_kept_from_collector() -> Iterator[None]:
    """Why: importing vLLM makes millions of objects, and collecting among them takes a third of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
