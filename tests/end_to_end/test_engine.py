from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.dataflow import Finish, Prompt, Sampling
from megatron_rl.interfaces import PushPhase, PushReceipt
from megatron_rl.parity import Pair, ParityFailed, Tolerance, check_parity, parity_rows, place_distances
from megatron_rl.vllm_engine.engine import EngineSpec, start_engine
from megatron_rl.weights.messages import TransferError, listen
from megatron_rl.weights.rules import Head
from megatron_rl.weights.transfer import Channel
from megatron_rl.weights.transports import Transport
from tests.distributed.parity_cases import Recorded, hugging_face

TIMEOUT_S = 60.0
START_S = 240.0
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
EOS = 3
VOCABULARY = 384
SPECIAL = 300
GREEDY = Sampling(temperature=0.0, max_tokens=12)
PROMPTS = [
    Prompt(id=f"p{index}", token_ids=(20 + index, 21, 22 + index, 40 + 2 * index), answer="", source="")
    for index in range(4)
]


def serve(connection: Connection, spec: EngineSpec) -> None:
    """An engine in its process: what a worker of the runtime is."""
    # that worker is no child of multiprocessing: what its own children leave in /dev/shm goes when it ends
    resource_tracker._resource_tracker._fd = None
    try:
        engine = start_engine(spec)
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        sockets = [socket for process in processes for socket in process.net_connections(kind="inet")]
        connection.send((True, {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}))
    except BaseException as error:
        connection.send((False, f"{type(error).__name__}: {error}"))
        return
    while True:
        verb, args = connection.recv()
        try:
            found = getattr(engine, verb)
            connection.send((True, found(*args) if callable(found) else found))
        except BaseException as error:
            connection.send((False, f"{type(error).__name__}: {error}"))
        if verb == "close":
            return


class EngineError(Exception):
    """What the engine raised."""


class RemoteEngine:
    """The engine of another process; each test that pushes to it says so."""

    def __init__(self, spec: EngineSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self.tensor = spec.tensor
        # no daemon, which may have no workers of its own
        self.process = context.Process(target=serve, args=(there, spec))
        self.process.start()
        there.close()  # so that the end of the process is heard
        try:
            self.listening = self.answer(START_S)
            self.connect()
        except BaseException:
            self.process.kill()
            self.process.join()
            raise

    def connect(self) -> None:
        listener, world_size = listen("127.0.0.1"), 1 + self.tensor
        self.ask("join", "127.0.0.1", listener.port, 1, world_size, TIMEOUT_S)
        self.channel = Channel.open(
            listener,
            world_size=world_size,
            timeout_s=TIMEOUT_S,
            transport=Transport.SHARED_MEMORY,
            bucket_bytes=50_000,
            lanes=self.tensor,
        )
        self.answer()

    def ask(self, verb: str, *args: Any) -> None:
        self._connection.send((verb, args))

    def answer(self, within_s: float = TIMEOUT_S) -> Any:
        if not self._connection.poll(within_s):
            raise TimeoutError(f"no answer in {within_s} s")
        good, answer = self._connection.recv()
        if not good:
            raise EngineError(answer)
        return answer

    def call(self, verb: str, *args: Any) -> Any:
        self.ask(verb, *args)
        return self.answer()

    def start_push(self, version: int) -> None:
        """Up to the transfer, whose answer is still to come."""
        self.call("advance", PushPhase.DRAIN, version, TIMEOUT_S)
        self.call("advance", PushPhase.START, version, TIMEOUT_S)
        self.ask("advance", PushPhase.TRANSFER, version, TIMEOUT_S)

    def push(self, version: int, tensors: Iterator[tuple[str, Tensor]]) -> tuple[PushReceipt, ...]:
        self.start_push(version)
        sent = self.channel.send(version, tensors)
        assert self.answer() == sent
        for phase in (PushPhase.FINISH, PushPhase.RESET_CACHE, PushPhase.COMMIT):
            self.call("advance", phase, version, TIMEOUT_S)
        return sent

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def close(self) -> None:
        try:
            if self.process.is_alive():
                self.call("close")
        finally:
            self.process.join(TIMEOUT_S)
            self.process.kill()


def hf_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def named_weights(model: Any) -> list[tuple[str, Tensor]]:
    """Under their Hugging Face names, a tied head left out."""
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def build_model(path: Path, seed: int, tied: bool, *, experts: bool = False) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64} if experts else {}
    config = (Qwen3MoeConfig if experts else Qwen2Config)(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        initializer_range=0.15,  # wide enough that no two tokens are equally likely
        **sizes,
    )
    model = (Qwen3MoeForCausalLM if experts else Qwen2ForCausalLM)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([f"w{EOS}", f"w{SPECIAL}"])
    words.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        f"{name}-{kind}": build_model(root / f"{name}-{kind}", seed, tied)
        for kind, tied in (("untied", False), ("tied", True))
        for seed, name in enumerate("AB")
    }


@contextmanager
def running(model: Path, tensor: int = 1) -> Iterator[RemoteEngine]:
    spec = EngineSpec(
        model=model, dtype="float32", max_model_len=64, kv_cache_mib=16, max_concurrent=8, on_cpu=True, tensor=tensor
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        engine = RemoteEngine(spec)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def fresh(folders: dict[str, Path]) -> Iterator[RemoteEngine]:
    """Started on A, and so far never pushed to by any fixture."""
    with running(folders["A-untied"]) as engine:
        yield engine


@pytest.fixture
def engine(fresh: RemoteEngine, folders: dict[str, Path]) -> RemoteEngine:
    """With the weights of B."""
    fresh.push(1, iter(named_weights(loaded(folders["B-untied"]))))
    return fresh


loaded = cache(hf_model)


@torch.no_grad()
def hf_logprobs(model: Any, tokens: tuple[int, ...], temperature: float = 1.0) -> Tensor:
    """[T - 1, V] log-probs after each token but the last."""
    logits: Tensor = model(torch.tensor([tokens])).logits[0, :-1]
    return (logits / temperature).log_softmax(-1)


def assert_greedy_by(model: Any, rollouts: list[Any]) -> None:
    for rollout in rollouts:
        (sample,) = rollout.samples
        tokens = rollout.prompt.token_ids + sample.token_ids
        logprobs = hf_logprobs(model, tokens)[len(rollout.prompt.token_ids) - 1 :]
        assert sample.token_ids == tuple(logprobs.argmax(-1).tolist())
        assert sample.logprobs == pytest.approx(logprobs.max(-1).values.tolist(), abs=1e-4)


def test_nothing_is_generated_before_a_push(fresh: RemoteEngine) -> None:
    assert fresh.call("version") is None
    with pytest.raises(EngineError, match="must be given weights before it generates: none were pushed"):
        fresh.call("generate", PROMPTS, GREEDY, [[0]] * 4)


def test_it_listens_on_loopback_alone(fresh: RemoteEngine) -> None:
    assert fresh.listening
    assert fresh.listening <= LOOPBACK


def test_the_first_generation_compiles_nothing(fresh: RemoteEngine, folders: dict[str, Path]) -> None:
    fresh.push(1, iter(named_weights(loaded(folders["A-untied"]))))
    started = time.monotonic()
    fresh.call("generate", PROMPTS, GREEDY, [[0]] * 4)
    assert time.monotonic() - started < 2.0  # measured: 0.1; compiling takes 10


def test_after_a_push_it_computes_with_the_new_weights(fresh: RemoteEngine, folders: dict[str, Path]) -> None:
    model_a, model_b = loaded(folders["A-untied"]), loaded(folders["B-untied"])
    fresh.push(4, iter(named_weights(model_a)))
    before = fresh.call("generate", PROMPTS, GREEDY, [[0]] * 4)
    fresh.push(5, iter(named_weights(model_b)))
    after = fresh.call("generate", PROMPTS, GREEDY, [[0]] * 4)

    assert_greedy_by(model_a, before)
    assert_greedy_by(model_b, after)
    assert [r.samples for r in before] != [r.samples for r in after]
    assert {r.policy_version for r in before} == {4}
    assert {r.policy_version for r in after} == {5}
    assert [r.prompt for r in after] == PROMPTS
    assert fresh.call("version") == 5


def test_a_tied_head_is_pushed_with_its_embedding(folders: dict[str, Path]) -> None:
    with running(folders["A-tied"]) as tied:
        model = loaded(folders["B-tied"])
        assert "lm_head.weight" not in dict(named_weights(model))
        for version in (1, 2):  # the second finds what the first has packed
            tied.push(version, iter(named_weights(model)))
            assert_greedy_by(model, tied.call("generate", PROMPTS, GREEDY, [[0]] * 4))


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_experts_are_pushed(tmp_path: Path, tensor: int) -> None:
    started, other = (build_model(tmp_path / name, seed, False, experts=True) for seed, name in enumerate("AB"))
    weights = load_file(other / "model.safetensors")  # transformers has all experts of a layer in one parameter
    with running(started, tensor) as engine:
        for version in (1, 2):  # the second finds what the first has packed
            sent = engine.push(version, iter(weights.items()))
            # of each layer q, o and four times gate, up, down; the one key/value head is both workers' whole
            assert {r.slices for r in sent} == {2 + 2 * (2 + 12) if tensor > 1 < version else 0}
            assert_greedy_by(hf_model(other), engine.call("generate", PROMPTS, GREEDY, [[0]] * 4))


def test_scores_are_those_of_hugging_face_at_temperature_1(engine: RemoteEngine, folders: dict[str, Path]) -> None:
    rows = [PROMPTS[0].token_ids, (5, 6), (7,)]
    scores = engine.call("score", rows)
    for row, score in zip(rows, scores, strict=True):
        expected = hf_logprobs(loaded(folders["B-untied"]), row)[range(len(row) - 1), list(row[1:])].tolist()
        assert score == pytest.approx([0.0, *expected], abs=1e-4)


def test_the_engine_scales_positions_as_the_configuration_says(tmp_path: Path) -> None:
    folder, row = build_model(tmp_path / "yarn", 0, tied=False), tuple(range(5, 60))
    config = json.loads((folder / "config.json").read_text())
    plain = hf_logprobs(hf_model(folder), row)
    yarn = {"rope_type": "yarn", "rope_theta": 1e2, "factor": 4.0, "original_max_position_embeddings": 16}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": yarn}))
    model = hf_model(folder)
    expected, at = hf_logprobs(model, row), (range(len(row) - 1), list(row[1:]))
    assert float((expected[at] - plain[at]).abs().max()) > 1
    with running(folder) as engine:
        engine.push(1, iter(named_weights(model)))
        (score,) = engine.call("score", [row])
    assert score[1:] == pytest.approx(expected[at].tolist(), abs=1e-4)


def test_sampled_log_probs_are_those_of_the_distribution_drawn_from(
    engine: RemoteEngine, folders: dict[str, Path]
) -> None:
    (rollout,) = engine.call("generate", PROMPTS[:1], Sampling(temperature=0.7, max_tokens=8), [[11]])
    prompt, sample = rollout.prompt.token_ids, rollout.samples[0]
    logprobs = hf_logprobs(loaded(folders["B-untied"]), prompt + sample.token_ids, 0.7)[len(prompt) - 1 :]
    assert sample.logprobs == pytest.approx(
        logprobs[range(len(sample.token_ids)), list(sample.token_ids)].tolist(), abs=1e-4
    )


def test_a_seed_draws_the_same_sample_whatever_else_is_drawn(engine: RemoteEngine) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=8)
    many = engine.call("generate", PROMPTS, sampling, [[1, 2, 1]] * 4)
    for rollout in many:
        assert rollout.samples[0] == rollout.samples[2]
        assert rollout.samples[0].token_ids != rollout.samples[1].token_ids
    (alone,) = engine.call("generate", PROMPTS[2:3], sampling, [[2]])
    assert alone.samples[0].token_ids == many[2].samples[1].token_ids


def biased_towards(model: Any, token: int) -> Iterator[tuple[str, Tensor]]:
    """Weights under which ``token`` follows everything: the last norm is made constant and the head reads it."""
    for name, tensor in named_weights(model):
        if name == "lm_head.weight":
            head = torch.zeros_like(tensor)
            head[token] = 1.0
            yield name, head
        elif name == "model.embed_tokens.weight":
            yield name, torch.ones_like(tensor)
        elif "layers" in name:
            yield name, torch.zeros_like(tensor)
        else:
            yield name, torch.ones_like(tensor)


def test_the_end_of_sequence_is_kept_as_a_token_and_left_out_of_the_text(
    fresh: RemoteEngine, folders: dict[str, Path]
) -> None:
    fresh.push(1, biased_towards(loaded(folders["B-untied"]), EOS))
    (rollout,) = fresh.call("generate", PROMPTS[:1], GREEDY, [[0]])
    (sample,) = rollout.samples
    assert (sample.token_ids, sample.text, sample.finish) == ((EOS,), "", Finish.STOP)


def test_a_stop_string_ends_the_text_and_a_limit_cuts_it(fresh: RemoteEngine, folders: dict[str, Path]) -> None:
    fresh.push(1, biased_towards(loaded(folders["B-untied"]), 77))
    (rollout,) = fresh.call("generate", PROMPTS[:1], Sampling(temperature=0.0, max_tokens=3), [[0]])
    (cut,) = rollout.samples
    assert (cut.token_ids, cut.text, cut.finish) == ((77,) * 3, "w77w77w77", Finish.LENGTH)
    stopping = Sampling(temperature=0.0, max_tokens=3, stop=("7w",))
    (rollout,) = fresh.call("generate", PROMPTS[:1], stopping, [[0]])
    (stopped,) = rollout.samples
    assert (stopped.token_ids, stopped.text, stopped.finish) == ((77,) * 2, "w7", Finish.STOP)


def test_a_stop_string_that_is_a_special_token_ends_a_response_though_no_text_shows_it(
    fresh: RemoteEngine, folders: dict[str, Path]
) -> None:
    fresh.push(1, biased_towards(loaded(folders["B-untied"]), SPECIAL))
    for stop, tokens, finish in (((), 3, Finish.LENGTH), ((f"w{SPECIAL}", "never"), 1, Finish.STOP)):
        sampling = Sampling(temperature=0.0, max_tokens=3, stop=stop)
        ((sample,),) = (rollout.samples for rollout in fresh.call("generate", PROMPTS[:1], sampling, [[0]]))
        assert (sample.token_ids, sample.text, sample.finish) == ((SPECIAL,) * tokens, "", finish)


def test_too_long_prompts_and_missing_seeds_are_refused(engine: RemoteEngine) -> None:
    with pytest.raises(EngineError, match="prompt p0: must have 1 to 3 tokens to leave room for 61 more"):
        engine.call("generate", PROMPTS[:1], Sampling(temperature=0.0, max_tokens=61), [[0]])
    with pytest.raises(EngineError, match="every prompt needs its seeds"):
        engine.call("generate", PROMPTS[:2], GREEDY, [[0], []])


def test_an_aborted_push_is_reported_and_the_next_one_heals_it(engine: RemoteEngine, folders: dict[str, Path]) -> None:
    tensors = named_weights(loaded(folders["A-untied"]))

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from tensors[: len(tensors) // 2 + 1]  # within a layer
        raise RuntimeError("a training rank died")

    engine.start_push(9)
    with pytest.raises(RuntimeError, match="a training rank died"):
        engine.channel.send(9, failing())
    with pytest.raises(EngineError, match="version 9: the sender gave up: RuntimeError: a training rank died"):
        engine.answer()
    assert engine.call("version") is None
    with pytest.raises(EngineError, match="the last push failed"):
        engine.call("generate", PROMPTS, GREEDY, [[0]] * 4)

    model = loaded(folders["B-untied"])
    engine.push(10, iter(named_weights(model)))
    assert_greedy_by(model, engine.call("generate", PROMPTS, GREEDY, [[0]] * 4))


def test_a_tensor_that_the_model_does_not_know_fails_the_push_alone(
    engine: RemoteEngine, folders: dict[str, Path]
) -> None:
    model = loaded(folders["B-untied"])
    engine.start_push(9)
    engine.channel.send(9, [("model.layers.0.mlp.no_such.weight", torch.zeros(300, 300)), *named_weights(model)])
    with pytest.raises(EngineError, match="no_such"):
        engine.answer()
    engine.push(10, iter(named_weights(model)))
    assert_greedy_by(model, engine.call("generate", PROMPTS, GREEDY, [[0]] * 4))


def test_a_sender_that_leaves_in_the_middle_is_reported_and_can_be_followed(
    engine: RemoteEngine, folders: dict[str, Path]
) -> None:
    model = loaded(folders["B-untied"])

    def leaving() -> Iterator[tuple[str, Tensor]]:
        yield from named_weights(model)[:4]
        engine.channel.close()
        yield "never.sent", torch.zeros(1)

    engine.start_push(11)
    with pytest.raises(TransferError, match="the channel is closed"):
        engine.channel.send(11, leaving())
    with pytest.raises(EngineError, match=r"TransferError: version 11: .*: rank 1 waited .* for rank 0, the sender"):
        engine.answer()
    assert engine.call("version") is None
    engine.connect()
    engine.push(12, iter(named_weights(model)))
    assert_greedy_by(model, engine.call("generate", PROMPTS, GREEDY, [[0]] * 4))


PARITY_ROWS = parity_rows([], vocabulary=VOCABULARY, rows=4, longest=24, pad_id=0)
PARITY = Tolerance(mean=1e-4, largest=2e-3, eps=torch.finfo(torch.float32).eps)


def inside(engine: RemoteEngine) -> Recorded:
    """What the engine says of the rows, and shows of itself."""
    lists = [row[:length] for row, length in zip(PARITY_ROWS.tokens.tolist(), PARITY_ROWS.lengths, strict=True)]
    scores = torch.zeros(PARITY_ROWS.tokens.shape)
    for row, score in enumerate(engine.call("score", lists)):
        scores[row, : len(score)] = torch.tensor(score)
    return Recorded(
        name="engine",
        scores=scores,
        places=engine.call("activations", lists),
        weights=engine.call("tensors", ("model.", "lm_head.")),
    )


def test_every_place_and_tensor_of_the_engine_is_that_of_hugging_face(
    engine: RemoteEngine, folders: dict[str, Path]
) -> None:
    found, wanted = inside(engine), hugging_face(folders["B-untied"], Head.TOKEN, PARITY_ROWS)
    distances = place_distances(found.places, wanted.places)
    assert len(distances) == 1 + 2 * 2 + 1
    assert max(distances.values()) < 1e-5, distances
    assert found.weights.keys() == wanted.weights.keys()
    for name, tensor in found.weights.items():  # packed for the CPU's kernels, and yet to the last bit
        torch.testing.assert_close(tensor, wanted.weights[name], atol=0, rtol=0, msg=name)
    assert check_parity([Pair(found, wanted)], PARITY_ROWS, PARITY, print)["engine_against_Hugging_Face/max"] < 1e-4


def test_a_layer_that_a_push_left_stale_is_caught_and_named(fresh: RemoteEngine, folders: dict[str, Path]) -> None:
    old = dict(named_weights(loaded(folders["A-untied"])))
    pushed = [(n, old[n] if "layers.1." in n else t) for n, t in named_weights(loaded(folders["B-untied"]))]
    fresh.push(7, iter(pushed))
    wanted = hugging_face(folders["B-untied"], Head.TOKEN, PARITY_ROWS)
    with pytest.raises(ParityFailed) as caught:
        check_parity([Pair(inside(fresh), wanted)], PARITY_ROWS, PARITY, print)
    assert "the first place that differs is model.layers.1.self_attn, by" in str(caught.value)
    assert "the first tensor that differs there is model.layers.1.self_attn.q_proj.weight: 4096 of" in str(caught.value)


@pytest.mark.parametrize(
    ("verb", "args"), [("generate", (PROMPTS, GREEDY, [[0]] * 4)), ("score", ([p.token_ids for p in PROMPTS],))]
)
def test_weights_that_are_no_numbers_are_refused_and_the_next_push_heals_it(
    engine: RemoteEngine, folders: dict[str, Path], verb: str, args: tuple[Any, ...]
) -> None:
    model = loaded(folders["B-untied"])
    engine.push(8, ((name, tensor * torch.nan) for name, tensor in named_weights(model)))
    with pytest.raises(EngineError, match="NotFinite: every log-prob must be finite"):
        engine.call(verb, *args)
    engine.push(9, iter(named_weights(model)))
    # of other lengths than those before, so that they meet what the cache holds beyond their own ends
    longer = [replace(prompt, token_ids=prompt.token_ids * (2 + index)) for index, prompt in enumerate(PROMPTS)]
    assert_greedy_by(model, engine.call("generate", [*longer, *PROMPTS], GREEDY, [[0]] * 8))


def test_the_phases_of_a_push_must_follow_one_another(engine: RemoteEngine) -> None:
    with pytest.raises(EngineError, match=r"version 3: the phases .* commit came in place of the first"):
        engine.call("advance", PushPhase.COMMIT, 3, TIMEOUT_S)
    engine.call("advance", PushPhase.DRAIN, 3, TIMEOUT_S)
    assert engine.call("version") is None
    with pytest.raises(EngineError, match=r"version 4: the phases .* start came in place of start of version 3"):
        engine.call("advance", PushPhase.START, 4, TIMEOUT_S)
    with pytest.raises(EngineError, match="stale"):
        engine.call("generate", PROMPTS, GREEDY, [[0]] * 4)


def what_it_computes_with(worker: Any) -> dict[str, Tensor]:
    """One worker's weights, by vLLM's names; runs in the worker. Packed ones are read as ``inside.tensors`` does."""
    from vllm.model_executor.layers.linear import LinearBase

    found = {name: parameter.clone() for name, parameter in worker.get_model().named_parameters()}
    for name, module in worker.get_model().named_modules():
        if isinstance(module, LinearBase):
            identity = torch.eye(getattr(module, "input_size_per_partition", module.input_size))
            found[f"{name}.weight"] = module.quant_method.apply(module, identity, None).T.clone()
    return found


def push_slices(engine: RemoteEngine, version: int, model: Any, *, slices: int) -> None:
    """A push of which each of two workers must get so many tensors in slices."""
    sent = engine.push(version, iter(named_weights(model)))
    whole = sum(tensor.nbytes for _, tensor in named_weights(model))
    assert [(receipt.slices, receipt.tensor_bytes) for receipt in sent] == [(slices, whole)] * 2
    assert (sent[0].size_bytes < 0.7 * whole) == (slices > 0)
    assert_greedy_by(model, engine.call("generate", PROMPTS, GREEDY, [[0]] * 4))


def test_two_tensor_parallel_workers_are_pushed_to_in_slices_and_a_late_one_is_named(folders: dict[str, Path]) -> None:
    other, model = loaded(folders["A-tied"]), loaded(folders["B-tied"])
    with running(folders["B-tied"], tensor=2) as engine:
        assert engine.listening
        assert engine.listening <= LOOPBACK
        fresh, rows = engine.call("_on_workers", what_it_computes_with), [p.token_ids for p in PROMPTS]
        scores = engine.call("score", rows)
        push_slices(engine, 1, other, slices=0)
        # of each layer q and its bias, o, gate, up, down; norms and the one key/value head are whole on both workers
        push_slices(engine, 2, other, slices=1 + 2 * 6)
        plan = engine.channel.slice_plan()
        assert (plan.slices, plan.whole, plan.read_otherwise) == (13, 13, {})
        engine.start_push(3)
        with pytest.raises(RuntimeError, match="a training rank died"):
            engine.channel.send(3, cut_short(named_weights(model)))
        with pytest.raises(EngineError, match=r"worker rank 0: .* gave up: .*; worker rank 1: .* gave up"):
            engine.answer()
        push_slices(engine, 4, model, slices=13)
        assert engine.call("score", rows) == scores
        for started, pushed in zip(fresh, engine.call("_on_workers", what_it_computes_with), strict=True):
            assert started.keys() == pushed.keys()
            for name, tensor in started.items():
                assert tensor.numel() > 0
                assert torch.equal(tensor, pushed[name]), name
        short = [(n, t) for n, t in named_weights(model) if n != "model.layers.1.mlp.down_proj.weight"]
        engine.start_push(5)
        engine.channel.send(5, iter(short))
        with pytest.raises(EngineError, match=r"rank 1: .* stay as they were, the first is model\.layers\.1\.mlp\."):
            engine.answer()
        push_slices(engine, 2, model, slices=13)
        assert engine.call("version") == 2
        engine.call("advance", PushPhase.DRAIN, 6, TIMEOUT_S)  # a push that is given up in between
        engine.call("advance", PushPhase.START, 6, TIMEOUT_S)
        push_slices(engine, 2, model, slices=13)
        assert engine.call("score", rows) == scores

        first, second = (process for process in engine.descendants() if "VLLM::Worker" in " ".join(process.cmdline()))
        second.suspend()
        engine.call("advance", PushPhase.DRAIN, 3, 2.0)
        late = (
            rf"1.8 s not all workers were done .*: rank 0 \(pid {first.pid}\) is (sleeping|running), "
            r"rank 1 \(.*\) is stopped"
        )
        with pytest.raises(EngineError, match=late):
            engine.call("advance", PushPhase.START, 3, 2.0)
        engine.call("advance", PushPhase.DRAIN, 4, 2.0)
        with pytest.raises(EngineError, match=r"the engine must be started anew: within 1.8 s"):
            engine.call("advance", PushPhase.START, 4, 2.0)
    assert not first.is_running()
    assert not second.is_running()


def test_workers_die_with_the_engine_even_one_that_is_stopped(folders: dict[str, Path]) -> None:
    with running(folders["A-untied"], tensor=2) as engine:
        workers = [process for process in engine.descendants() if "VLLM::Worker" in " ".join(process.cmdline())]
        workers[1].suspend()
        engine.process.kill()
        assert len(workers) == 2
        assert psutil.wait_procs(workers, timeout=5)[1] == []


def cut_short(tensors: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    yield from tensors[:4]
    raise RuntimeError("a training rank died")


@pytest.mark.parametrize("left_out", ["mlp.down_proj.weight", "self_attn.k_proj.bias"])
def test_a_push_that_leaves_a_tensor_out_is_refused_by_name_and_the_next_one_heals_it(
    engine: RemoteEngine, folders: dict[str, Path], left_out: str
) -> None:
    model = loaded(folders["A-untied"])
    short = [(name, tensor) for name, tensor in named_weights(model) if name != f"model.layers.1.{left_out}"]
    engine.start_push(7)
    engine.channel.send(7, iter(short))
    with pytest.raises(EngineError, match=rf"1 of .* stay as they were, the first is model\.layers\.1\.{left_out}"):
        engine.answer()
    assert engine.call("version") is None
    engine.push(8, iter(named_weights(model)))
    assert_greedy_by(model, engine.call("generate", PROMPTS, GREEDY, [[0]] * 4))
