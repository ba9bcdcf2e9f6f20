"""The program, with an engine that is no model where one is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from eval.run import _model_name, main
from eval.samples import read_samples
from eval.settings import parse
from eval.tasks import BadInput
from megatron_rl.dataflow import Finish, Prompt, Rollout, Sample, Sampling
from megatron_rl.durable import locked
from megatron_rl.rewards import answers

ROOT = Path(__file__).parents[3]
PYTHON_BLOCK = """```python
open({path!r}, "w").write("ran")
print(4)
```
```output
4
```
So the answer is \\boxed{{5}}."""


class ScriptedEngine:
    """Says what a function of question number and seed says."""

    def __init__(self, say):
        self.say = say
        self.calls = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        self.calls += 1
        return [
            Rollout(prompt=prompt, samples=tuple(self._sample(prompt, seed) for seed in of), policy_version=0)
            for prompt, of in zip(prompts, seeds, strict=True)
        ]

    def _sample(self, prompt, seed):
        return Sample(token_ids=(1, 2, 3), logprobs=(0.0,) * 3, text=self.say(prompt, seed), finish=Finish.STOP)


@pytest.fixture
def engine(monkeypatch):
    """Put a scripted engine in the place of the real ones; says the right answer unless told otherwise."""
    import megatron_rl.assemble

    scripted = ScriptedEngine(lambda prompt, seed: f"\\boxed{{{prompt.answer}}}")
    scripted.opened = []

    @contextmanager
    def opened(spec, count, cluster, run_dir) -> Iterator[list[ScriptedEngine]]:
        scripted.opened.append((spec, count))
        scripted.limit = cluster.call_limit
        yield [scripted] * count

    monkeypatch.setattr(megatron_rl.assemble, "open_engines", opened)
    return scripted


def make_model(folder: Path, **config) -> Path:
    folder.mkdir(parents=True)
    Tokenizer(models.WordLevel({"x": 0, "<unk>": 1}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    settings = {"max_position_embeddings": 64, "dtype": "float32", "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(settings | config))
    (folder / "model.safetensors").write_text("weights")
    return folder


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


@pytest.fixture
def task(tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"question": f"{n}+0?", "answer": str(n)}) + "\n" for n in range(5)))
    return file


def command(tmp_path, model, task, *more):
    return [
        *("--model", str(model), "--tasks", str(task), "--template", "abel", "--output", str(tmp_path / "out")),
        *("--max-tokens", "8", *more),
    ]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_graders_that_are_not_up_in_time_are_told_with_the_option(tmp_path, model, task, engine, capsys):
    assert main(command(tmp_path, model, task, "--start-timeout-s", "0.001")) == 1
    assert "must be ready within 0.001 s" in (told := capsys.readouterr().err)
    assert "--start-timeout-s" in told


def test_graders_that_have_too_little_memory_are_told_with_the_option(tmp_path, model, task, engine, capsys):
    rule = tmp_path / "large.py"
    rule.write_text("import mmap\nROOM = mmap.mmap(-1, 3 << 30)\n\ndef rule(text, answer, finish): ...\n")
    assert main(command(tmp_path, model, task, "--rule", f"{rule}:rule", "--memory-gib", "2")) == 1
    assert "has 2 GiB by reward.memory_gib (of eval/run.py: --memory-gib)" in capsys.readouterr().err


def test_a_model_is_evaluated_and_everything_is_written(tmp_path, model, task, engine, capsys):
    engine.say = lambda prompt, seed: f"\\boxed{{{prompt.answer}}}" if prompt.id != "3" else "I do not know"
    assert main(command(tmp_path, model, task)) == 0
    found = results(tmp_path / "out")
    assert found["results"]["sums"]["pass@1,none"] == 0.8
    assert found["results"]["sums"]["boxed,none"] == 0.8
    assert found["n-samples"]["sums"] == {"original": 5, "effective": 5, "samples": 1}
    assert found["configs"]["sums"]["doc_to_text"].startswith("Question:\n{question}")
    assert found["configs"]["sums"]["generation_kwargs"]["max_gen_toks"] == 8
    assert len(found["configs"]["sums"]["data_sha256"]) == 64
    assert {"versions", "n-shot", "higher_is_better", "config", "date", "git_hash"} <= found.keys()
    samples = read_samples(tmp_path / "out" / "samples_sums.jsonl")
    assert [(sample.id, sample.correct, sample.extracted) for sample in samples] == [
        *[(str(n), True, str(n)) for n in range(3)],
        ("3", False, None),
        ("4", True, "4"),
    ]
    assert samples[1].prompt == "Question:\n1+0?\nAnswer:\nLet's think step by step.\n"
    assert (tmp_path / "out" / "table.md").read_text() == "| | sums |\n|---|---|\n| model | 80.0 |\n"
    assert "| model | 80.0 |" in capsys.readouterr().out


def test_a_response_with_a_python_block_is_graded_as_text(tmp_path, model, task, engine):
    proof = tmp_path / "proof"
    engine.say = lambda prompt, seed: PYTHON_BLOCK.format(path=str(proof))
    assert main(command(tmp_path, model, task, "--limit", "5")) == 0
    assert not proof.exists()
    assert engine.calls == 1  # one turn: nothing was fed back
    samples = read_samples(tmp_path / "out" / "samples_sums.jsonl")
    assert {sample.extracted for sample in samples} == {"5"}
    assert all("```output" in sample.response for sample in samples)
    assert results(tmp_path / "out")["results"]["sums"]["pass@1,none"] == 0.0


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path, model, task, engine):
    say, counted = (lambda prompt, seed: f"{seed} \\boxed{{{prompt.answer}}}"), []
    engine.say = say
    more = ("--samples", "2", "--temperature", "1")
    assert main(command(tmp_path, model, task, *more)) == 0
    file = tmp_path / "out" / "samples_sums.jsonl"
    whole = read_samples(file)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:3]) + lines[3][:50])  # killed while it wrote the fourth
    (tmp_path / "out" / "results.json").unlink()

    def counting(prompt, seed):
        counted.append(prompt.id)
        return say(prompt, seed)

    engine.say = counting
    assert main(command(tmp_path, model, task, *more)) == 0
    assert counted == ["1", "2", "2", "3", "3", "4", "4"]
    assert sorted(read_samples(file), key=lambda s: s.key) == whole
    assert results(tmp_path / "out")["n-samples"]["sums"]["samples"] == 2


def test_an_interrupted_evaluation_closes_its_engines_at_once_and_asks_for_nothing_more(
    tmp_path, model, task, monkeypatch
):
    import megatron_rl.assemble

    busy, closed, in_time, late = threading.Event(), threading.Event(), [], []

    class Engine(ScriptedEngine):
        def generate(self, prompts, sampling, seeds):
            if closed.is_set():
                late.append(prompts)
            if self.calls:
                busy.set()
                in_time.append(closed.wait(3))
            return super().generate(prompts, sampling, seeds)

    @contextmanager
    def opened(spec, count, cluster, run_dir):
        try:
            yield [Engine(lambda prompt, seed: "no")]
        finally:
            closed.set()
            time.sleep(0.5)  # for the thread that was drawing to go on, if it does

    def interrupted(responses, grader):
        assert busy.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(megatron_rl.assemble, "open_engines", opened)
    monkeypatch.setattr("eval.evaluation.grade", interrupted)
    many = ("--samples", "4", "--temperature", "1", "--max-concurrent", "1")  # five parts
    assert main(command(tmp_path, model, task, *many)) == 130
    assert in_time == [True]
    assert late == []


def test_more_samples_and_problems_are_added_to_those_that_are_there(tmp_path, model, task, engine):
    assert main(command(tmp_path, model, task, "--limit", "2", "--temperature", "1")) == 0
    assert main(command(tmp_path, model, task, "--samples", "2", "--temperature", "1")) == 0
    assert len(read_samples(tmp_path / "out" / "samples_sums.jsonl")) == 10
    assert main(command(tmp_path, model, task, "--limit", "2", "--temperature", "1")) == 0
    assert results(tmp_path / "out")["n-samples"]["sums"]["original"] == 2
    assert len(engine.opened) == 2  # nothing was missing the third time


def test_engines_are_as_large_and_as_rounded_as_asked(tmp_path, model, task, engine, capsys, monkeypatch):
    monkeypatch.setattr("megatron_rl.device.has_wide_vectors", lambda: True)
    asked = ("--tensor", "2", "--quantization", "fp8_per_channel", "--kv-cache-dtype", "fp8")
    assert main(command(tmp_path, model, task, *asked)) == 0
    ((spec, _),) = engine.opened
    assert (spec.tensor, spec.quantization, spec.kv_cache_dtype, spec.dtype) == (
        2,
        "fp8_per_channel",
        "fp8",
        "bfloat16",
    )
    told = results(tmp_path / "out")["config"]["model_args"]
    assert (told["quantization"], told["kv_cache_dtype"]) == ("fp8_per_channel", "fp8")
    assert main(command(tmp_path, model, task, "--tensor", "1")) == 2
    assert "(other quantization, kv_cache_dtype)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--kv-cache-dtype", "fp8"), "--kv-cache-dtype: "),
        (("--quantization", "fp8_per_tensor"), "--quantization: without a GPU vLLM has no kernel for 'fp8_per_tensor'"),
    ],
)
def test_what_the_machine_cannot_do_is_refused_by_its_option(
    tmp_path, model, task, engine, capsys, monkeypatch, asked, said
):
    monkeypatch.setattr("megatron_rl.device.has_wide_vectors", lambda: False)
    assert main(command(tmp_path, model, task, *asked)) == 2
    assert said in capsys.readouterr().err
    assert engine.opened == []


def test_more_engines_than_gpus_are_refused_by_their_options(tmp_path, model, task, engine, capsys, monkeypatch):
    monkeypatch.setattr("megatron_rl.device.gpu_count", lambda: 8)
    assert main(command(tmp_path, model, task, "--engines", "8", "--tensor", "2")) == 2
    assert "--engines 8 x --tensor 2 need 16 GPUs, this machine has 8" in capsys.readouterr().err


def test_a_cache_that_holds_no_whole_sequence_is_refused_before_an_engine_starts(tmp_path, task, engine, capsys):
    sizes = {"vocab_size": 64, "hidden_size": 4096, "intermediate_size": 64, "num_hidden_layers": 64}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    large = make_model(tmp_path / "large", architectures=["LlamaForCausalLM"], **sizes, **heads)
    assert main(command(tmp_path, large, task, "--kv-cache-mib", "10")) == 2
    assert "--kv-cache-mib: must hold one sequence of" in capsys.readouterr().err
    assert engine.opened == []


def test_samples_of_other_settings_are_not_mixed(tmp_path, model, task, engine, capsys):
    assert main(command(tmp_path, model, task)) == 0
    assert main(command(tmp_path, model, task, "--max-tokens", "9")) == 2
    assert "holds samples drawn otherwise (other max_tokens); name another" in capsys.readouterr().err
    task.write_text(task.read_text().replace('"0"', '"00"'))
    assert main(command(tmp_path, model, task)) == 2
    assert "(other data of sums)" in capsys.readouterr().err
    (model / "model.safetensors").write_text("other weights")
    assert main(command(tmp_path, model, task)) == 2
    assert "(other model, data of sums)" in capsys.readouterr().err


def test_verdicts_of_a_rule_that_changed_are_not_mixed(tmp_path, model, task, engine, monkeypatch, capsys):
    rule = tmp_path / "rule.py"
    rule.write_text(
        "from megatron_rl.dataflow import Score\n\n\n"
        "def always(text, answer, finish):\n    return Score(value=1.0, parts={'correct': 1.0})\n"
    )
    asked = command(tmp_path, model, task, "--rule", f"{rule}:always")
    assert main(asked) == 0
    assert main(asked) == 0
    rule.write_text(rule.read_text().replace("'correct': 1.0", "'correct': 0.0"))
    assert main(asked) == 2
    assert "holds samples drawn otherwise (other rule_sha256)" in capsys.readouterr().err
    assert main([*asked, "--output", str(tmp_path / "other")]) == 0
    monkeypatch.setattr("megatron_rl.__version__", "0.0.1")
    assert main([*asked, "--output", str(tmp_path / "other")]) == 2
    assert "(other megatron_rl)" in capsys.readouterr().err


def test_verdicts_of_another_grammar_and_samples_of_another_engine_are_not_mixed(
    tmp_path, model, task, engine, monkeypatch, capsys
):
    asked = command(tmp_path, model, task)
    assert main(asked) == 0
    rewards = Path(shutil.copytree(Path(answers.__file__).parent, tmp_path / "rewards"))
    with monkeypatch.context() as patch:
        patch.setattr(answers, "__file__", str(rewards / "answers.py"))
        assert main(asked) == 0  # the same code in another place
        (rewards / "notation.py").write_text((rewards / "notation.py").read_text() + "# another grammar\n")
        assert main(asked) == 2
        assert "holds samples drawn otherwise (other rewards_sha256)" in capsys.readouterr().err
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1" if name.startswith("vllm") else installed(name))
    assert main(asked) == 2
    assert "holds samples drawn otherwise (other releases)" in capsys.readouterr().err


def test_samples_vote_by_equality_of_their_answers(tmp_path, model, engine):
    task = tmp_path / "half.jsonl"
    task.write_text('{"question": "half?", "answer": "1/2"}\n')
    said = iter(["\\boxed{7}", "\\boxed{\\frac{1}{2}}", "\\boxed{0.5}", "none"])
    engine.say = lambda prompt, seed: next(said)
    assert main(command(tmp_path, model, task, "--samples", "4", "--temperature", "1")) == 0
    found = results(tmp_path / "out")["results"]["half"]
    assert (found["pass@1,none"], found["pass@2,none"], found["maj@4,none"]) == (0.5, pytest.approx(5 / 6), 1.0)
    assert found["pass@1_stderr,none"] == "N/A"


def test_every_checkpoint_of_a_run_is_evaluated_once(tmp_path, task, engine, capsys):
    run = tmp_path / "run"
    for step in (1, 2):
        make_model(run / "checkpoints" / f"step_{step:06}" / "hf")
    arguments = ["--run", str(run), "--tasks", str(task), "--template", "abel", "--max-tokens", "8"]
    assert main(arguments) == 0
    assert [spec.model.parent.name for spec, _ in engine.opened] == ["step_000001", "step_000002"]
    make_model(run / "checkpoints" / "step_000003" / "hf")
    assert main(arguments) == 0
    assert [spec.model.parent.name for spec, _ in engine.opened[2:]] == ["step_000003"]
    assert (run / "eval" / "table.md").read_text().count("| 100.0 |") == 3
    assert "step_000001: complete, no engine started" in capsys.readouterr().err
    assert main(["--run", str(tmp_path / "model")]) == 2


def test_checkpoints_that_a_run_removes_keep_their_rows_and_hold_up_no_other(tmp_path, task, engine, capsys):
    run = tmp_path / "run"
    kept = run / "checkpoints"
    make_model(kept / "step_000001" / "hf")
    asked = ["--run", str(run), "--tasks", str(task), "--template", "abel", "--max-tokens", "8"]
    assert main(asked) == 0
    shutil.rmtree(kept / "step_000001")
    for step in (2, 3, 4, 5):
        make_model(kept / f"step_{step:06}" / "hf")

    def say(prompt, seed):
        shutil.rmtree(kept / "step_000003", ignore_errors=True)  # while the one before it is evaluated
        if engine.calls == 3:
            shutil.rmtree(kept / "step_000004")
            raise RuntimeError("the weights are not there")
        return "I do not know"

    engine.say = say
    assert main(asked) == 0
    rows = (run / "eval" / "table.md").read_text().splitlines()[2:]
    assert rows == ["| step_000001 | 100.0 |", "| step_000002 | 0.0 |", "| step_000005 | 0.0 |"]
    told = capsys.readouterr().err
    assert all(f"step_00000{step}: the run has removed this checkpoint since" in told for step in (3, 4))
    assert [spec.model.parent.name[-1] for spec, _ in engine.opened] == ["1", "2", "4", "5"]
    make_model(kept / "step_000006" / "hf")

    def broken(prompt, seed):
        raise RuntimeError("out of memory")

    engine.say = broken
    assert main(asked) == 1
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"), [(("--max-tokens", "9"), "max_tokens"), (("--limit", "2"), "samples of sums")]
)
def test_a_row_of_before_that_does_not_compare_is_told_and_left_out(more, told, tmp_path, task, engine, capsys):
    run = tmp_path / "run"
    make_model(run / "checkpoints" / "step_000001" / "hf")
    asked = ["--run", str(run), "--tasks", str(task), "--template", "abel", "--max-tokens", "8"]
    assert main(asked) == 0
    (run / "checkpoints" / "step_000001").rename(run / "checkpoints" / "step_000002")
    assert main([*asked, *more]) == 0
    assert (run / "eval" / "table.md").read_text().splitlines()[2:] == ["| step_000002 | 100.0 |"]
    assert f"step_000001 was evaluated otherwise (other {told}) and has no row" in capsys.readouterr().err


def test_engines_are_given_what_the_model_says(tmp_path, task, engine):
    model = make_model(tmp_path / "half" / "hf", dtype="bfloat16")
    assert main(command(tmp_path, model.parent, task, "--engines", "2", "--kv-cache-mib", "64")) == 0
    ((spec, count),) = engine.opened
    assert (spec.model, spec.dtype, spec.kv_cache_mib, spec.version) == (model, "bfloat16", 64, 0)
    assert count == 1  # one part, so a second engine would have nothing to do
    assert spec.max_model_len <= 64


def test_how_long_an_engine_may_draw_is_an_option_that_the_message_names(tmp_path, model, task, engine):
    assert main(command(tmp_path, model, task, "--call-deadline-s", "7200")) == 0
    assert str(engine.limit) == "7200 s (--call-deadline-s, to be raised if it may take longer)"


def test_a_prompt_that_the_model_has_no_room_for_is_answered_by_nothing(tmp_path, task, engine, capsys):
    model = make_model(tmp_path / "short", max_position_embeddings=3)
    words = Tokenizer(models.WordLevel({"x": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(model / "tokenizer.json"))
    (tmp_path / "bare.txt").write_text("{question}")
    task.write_text('{"question": "a b c d e", "answer": "0"}\n{"question": "a", "answer": "1"}\n')
    asked = [*command(tmp_path, model, task), "--template", str(tmp_path / "bare.txt")]
    assert main(asked) == 0
    assert [spec.max_model_len for spec, _ in engine.opened] == [3]  # not the 5 of the prompt without room
    found = {sample.id: sample for sample in read_samples(tmp_path / "out" / "samples_sums.jsonl")}
    assert {name: (sample.response, sample.correct) for name, sample in found.items()} == {
        **{"0": ("", False), "1": ("\\boxed{1}", True)}
    }
    assert "sums 0: a prompt of 5 tokens leaves room for 0 of 8" in capsys.readouterr().err
    assert main([*asked, "--output", str(tmp_path / "first"), "--limit", "1"]) == 0
    assert len(engine.opened) == 1  # an engine that draws nothing is not started
    assert results(tmp_path / "first")["results"]["sums"]["pass@1,none"] == 0.0


def test_responses_are_graded_again_without_an_engine(tmp_path, model, task, engine, capsys):
    engine.say = lambda prompt, seed: f"the boxed {prompt.answer}"
    assert main(command(tmp_path, model, task)) == 0
    samples = tmp_path / "out" / "samples_sums.jsonl"
    assert results(tmp_path / "out")["results"]["sums"]["pass@1,none"] == 0.0
    assert main(["--rescore", str(samples), "--rule", "seed"]) == 0
    out = capsys.readouterr().out
    assert "sums 4 sample 0: now right: ' 4'" in out or "sums 4 sample 0: now right: '4'" in out
    assert "5 samples graded again with rule seed, 5 verdicts changed" in out
    assert results(tmp_path / "out" / "rescored" / "samples_sums")["results"]["sums"]["pass@1,none"] == 1.0
    assert len(engine.opened) == 1
    assert main(["--rescore", str(samples), "--rule", "seed"]) == 2
    assert main(["--rescore", str(tmp_path / "none.jsonl")]) == 2


def test_graded_again_the_results_are_as_full_as_a_runs(tmp_path, model, task, engine):
    engine.say = lambda prompt, seed: f"\\boxed{{{prompt.answer}.004}}"
    assert main(command(tmp_path, model, task, "--samples", "2", "--temperature", "1", "--limit", "4")) == 0
    before = results(tmp_path / "out")
    assert main(["--rescore", str(tmp_path / "out" / "samples_sums.jsonl"), "--relative-tolerance", "sums=0.0021"]) == 0
    after = results(tmp_path / "out" / "rescored" / "samples_sums")
    assert after.keys() == before.keys()
    assert after["results"]["sums"].keys() == before["results"]["sums"].keys()
    assert (before["results"]["sums"]["avg@2,none"], after["results"]["sums"]["avg@2,none"]) == (0.0, 0.5)  # of 0..3
    for same in ("config", "n-samples", "higher_is_better", "n-shot", "versions"):
        assert after[same] == before[same]
    changed = {"leniency": {"relative": 0.0021, "factor_100": False}}
    place = {"rescored_from": str(tmp_path / "out" / "samples_sums.jsonl")}
    assert after["configs"]["sums"] == before["configs"]["sums"] | changed | place
    assert (
        tmp_path / "out" / "rescored" / "samples_sums" / "table.md"
    ).read_text() == "| | sums |\n|---|---|\n| samples_sums | 50.0 |\n"


def test_graded_again_without_the_runs_results_what_is_unknown_is_null(tmp_path, model, task, engine):
    assert main(command(tmp_path, model, task)) == 0
    before = results(tmp_path / "out")
    (tmp_path / "out" / "results.json").unlink()
    assert main(["--rescore", str(tmp_path / "out" / "samples_sums.jsonl")]) == 0
    after = results(tmp_path / "out" / "rescored" / "samples_sums")
    assert after.keys() == before.keys()
    assert after["configs"]["sums"].keys() == before["configs"]["sums"].keys() | {"rescored_from"}
    assert after["configs"]["sums"]["generation_kwargs"] is None
    assert after["config"] == {"model": None, "model_args": None, "limit": None, "seed": None}
    assert after["n-samples"] == before["n-samples"]


def test_graded_again_one_task_leaves_the_results_of_another(tmp_path, model, task, engine, capsys):
    other = tmp_path / "more.jsonl"
    other.write_text('{"question": "Q", "answer": "7"}\n')
    assert main(command(tmp_path, model, f"{task},{other}")) == 0
    sums, more = (tmp_path / "out" / f"samples_{name}.jsonl" for name in ("sums", "more"))
    assert main(["--rescore", str(sums)]) == 0
    assert main(["--rescore", str(more)]) == 0
    rescored = tmp_path / "out" / "rescored"
    assert [results(rescored / f"samples_{name}")["results"].keys() for name in ("sums", "more")] == [
        {"sums"},
        {"more"},
    ]
    before = (rescored / "samples_sums" / "results.json").read_text()
    assert main(["--rescore", str(more), "--output", str(rescored / "samples_sums")]) == 2
    assert "results.json is there already; remove it or name another folder" in capsys.readouterr().err
    assert (rescored / "samples_sums" / "results.json").read_text() == before


def test_a_file_without_samples_is_not_graded_again(tmp_path, capsys):
    (tmp_path / "samples_x.jsonl").write_text("")
    assert main(["--rescore", str(tmp_path / "samples_x.jsonl")]) == 2
    assert "samples_x.jsonl: there is no sample in it" in capsys.readouterr().err


def test_two_evaluations_do_not_write_to_one_folder(tmp_path, model, task, engine, capsys):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / "lock", writing=tmp_path / "out", wait_s=0):
        assert main(command(tmp_path, model, task)) == 1
    error = capsys.readouterr().err
    assert f"another process is writing {tmp_path / 'out'} (pid {os.getpid()}" in error
    assert engine.opened == []
    assert main(command(tmp_path, model, task)) == 0


def test_answers_whose_grading_failed_are_limited_told_and_graded_again(tmp_path, model, task, engine, capsys):
    """The rule fails on as many questions as a file says, as a machine short of memory would."""
    (tmp_path / "failing").write_text("2")
    rule = tmp_path / "rule.py"
    rule.write_text(
        "from pathlib import Path\nfrom megatron_rl.dataflow import Score\n\n\n"
        "def shaky(text, answer, finish):\n"
        "    failing = int(Path(__file__).with_name('failing').read_text())\n"
        "    if answer in ['2', '3'][:failing]:\n"
        "        raise OSError('no room')\n"
        "    return Score(value=1.0, parts={'correct': 1.0})\n"
    )
    asked = command(tmp_path, model, task, "--rule", f"{rule}:shaky")
    assert main(asked) == 1
    message = "grading failed on 2 of 5 samples of sums, at most --max-error-rate=0.25 of them may fail"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()
    assert main(asked) == 1  # still so, and nothing is drawn again
    assert main(["--rescore", str(tmp_path / "out" / "samples_sums.jsonl"), "--rule", f"{rule}:shaky"]) == 1
    assert main([*asked, "--max-error-rate", "0.4"]) == 0
    told = "model, sums: 2 samples could not be graded and count as wrong (time-outs 0, errors 2)."
    assert told in (tmp_path / "out" / "table.md").read_text()
    (tmp_path / "failing").write_text("1")
    assert main(asked) == 0  # one of five
    assert results(tmp_path / "out")["results"]["sums"]["grader_errors,none"] == 1
    (tmp_path / "failing").write_text("0")
    assert main(asked) == 0
    assert results(tmp_path / "out")["results"]["sums"]["pass@1,none"] == 1.0
    assert [sample.id for sample in read_samples(tmp_path / "out" / "samples_sums.jsonl")] == list("01234")
    assert engine.calls == 1


def test_answers_whose_grading_ran_out_of_time_are_graded_again(tmp_path, model, task, engine):
    (tmp_path / "waits").write_text("30")
    rule = tmp_path / "rule.py"
    rule.write_text(
        "import time\nfrom pathlib import Path\nfrom megatron_rl.dataflow import Score\n\n\n"
        "def waits(text, answer, finish):\n"
        "    if answer == '3':\n"
        "        time.sleep(float(Path(__file__).with_name('waits').read_text()))\n"
        "    return Score(value=1.0, parts={'correct': 1.0})\n"
    )
    asked = command(tmp_path, model, task, "--rule", f"{rule}:waits", "--wall-timeout-s", "1")
    assert main(asked) == 0
    found = results(tmp_path / "out")["results"]["sums"]
    assert (found["grader_timeouts,none"], found["pass@1,none"]) == (1, 0.8)
    (tmp_path / "waits").write_text("0")
    assert main(asked) == 0
    found = results(tmp_path / "out")["results"]["sums"]
    assert (found["grader_timeouts,none"], found["pass@1,none"]) == (0, 1.0)
    assert engine.calls == 1


def test_a_rule_is_tried_on_an_answer_of_the_task_and_told_what_it_raised_on(tmp_path, model, engine, capsys):
    file = tmp_path / "code.jsonl"
    file.write_text(json.dumps({"question": "Q", "answer": [{"in": 1, "out": True}]}) + "\n")
    rule = tmp_path / "rule.py"
    rule.write_text(
        "import json\nfrom megatron_rl.dataflow import Score\n\n\n"
        "def cases(text, answer, finish):\n"
        "    return Score(value=1.0, parts={'correct': float(json.loads(answer)[0]['out'])})\n"
    )
    asked = ["--rule", f"{rule}:cases"]
    assert main(command(tmp_path, model, file, *asked)) == 0
    assert results(tmp_path / "out")["results"]["code"]["pass@1,none"] == 1.0
    file.write_text(json.dumps({"question": "Q", "answer": "1 2"}) + "\n")
    assert main([*command(tmp_path, model, file, *asked), "--output", str(tmp_path / "other")]) == 2
    told = capsys.readouterr().err
    assert "it raised or ended its process on" in told
    assert "with the gold answer '1 2'" in told


def test_a_first_answer_that_a_rule_raises_on_is_told_and_counted(tmp_path, model, task, engine, capsys):
    rule = tmp_path / "rule.py"
    rule.write_text(
        "from megatron_rl.dataflow import Score\n\n\ndef nonzero(text, answer, finish):\n"
        "    return Score(value=1.0, parts={'correct': int(answer) / int(answer)})\n"
    )
    asked = command(tmp_path, model, task, "--rule", f"{rule}:nonzero")
    assert main(asked) == 0
    assert "note: sums: rule" in (told := capsys.readouterr().err)
    assert "did not score 1 of 5 responses that box a reference answer: '0' (error)" in told
    found = results(tmp_path / "out")["results"]["sums"]
    assert (found["grader_errors,none"], found["pass@1,none"]) == (1, 0.8)
    assert main(["--rescore", str(tmp_path / "out" / "samples_sums.jsonl"), "--rule", f"{rule}:nonzero"]) == 0
    capsys.readouterr()
    assert main(["--gold-oracle", "--tasks", str(task), "--rule", f"{rule}:nonzero"]) == 1
    assert capsys.readouterr().out.splitlines() == ["sums: 4 of 5 gold answers equal themselves", "  0: '0' (error)"]


def test_the_gold_oracle_needs_a_rule_that_says_what_is_right(tmp_path, task, capsys):
    (tmp_path / "rule.py").write_text("def half(text, answer, finish):\n    return 0.5\n")
    assert main(["--gold-oracle", "--tasks", str(task), "--rule", f"{tmp_path}/rule.py:half"]) == 2
    assert "must return a Score with a part 'correct'" in capsys.readouterr().err


def test_a_verdict_between_right_and_wrong_is_refused(tmp_path, model, task, engine, capsys):
    rule = tmp_path / "rule.py"
    rule.write_text(
        "from megatron_rl.dataflow import Score\n\n\ndef part(text, answer, finish):\n"
        "    return Score(value=0.0, parts={'correct': 0.3 if answer == '3' else 1.0})\n"
    )
    assert main(command(tmp_path, model, task, "--rule", f"{rule}:part")) == 1
    error = capsys.readouterr().err
    assert "rule.py:part: the part 'correct' must be 0 or 1, got 0.3" in error
    assert "sample 0 of sums 3" in error


def test_leniency_is_a_tasks_own_and_counts_in_votes(tmp_path, model, engine):
    for name in ("strict", "near", "percent"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "Q", "answer": "50"}\n')
    said = {}

    def say(prompt, seed):
        said[prompt.source] = said.get(prompt.source, 0) + 1
        answers = {1: "7", 2: "50.2", 3: "50.3", 4: "0.5"}
        return f"\\boxed{{{answers[said[prompt.source]]}}}"

    engine.say = say
    tasks = ",".join(str(tmp_path / f"{name}.jsonl") for name in ("strict", "near", "percent"))
    lenient = ("--relative-tolerance", "near=1e-2", "--factor-100", "percent")
    assert main(command(tmp_path, model, tasks, "--samples", "4", "--temperature", "1", *lenient)) == 0
    found = results(tmp_path / "out")
    assert {task: of["avg@4,none"] for task, of in found["results"].items()} == {
        **{"strict": 0.0, "near": 0.5, "percent": 0.25}
    }
    # 50.2 and 50.3 vote together only where both are near enough to 50
    assert {task: of["maj@4,none"] for task, of in found["results"].items()} == {"strict": 0, "near": 1, "percent": 0}
    assert {task: of["leniency"] for task, of in found["configs"].items()} == {
        "strict": {"relative": 0.0, "factor_100": False},
        "near": {"relative": 0.01, "factor_100": False},
        "percent": {"relative": 0.0, "factor_100": True},
    }


def test_the_gold_oracle_names_what_cannot_be_earned(tmp_path, capsys):
    file = tmp_path / "g.jsonl"
    file.write_text('{"question": "Q", "answer": "\\\\frac{1}{2}"}\n{"id": "odd", "question": "Q", "answer": "}"}\n')
    assert main(["--gold-oracle", "--tasks", str(file)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "g: 1 of 2 gold answers equal themselves",
        "  odd: '}' (scored)",
    ]
    file.write_text('{"question": "Q", "answer": "[1,2)"}\n')
    assert main(["--gold-oracle", "--tasks", str(file)]) == 0


def test_the_gold_oracle_judges_with_the_leniency_of_the_task(tmp_path, capsys):
    file = tmp_path / "g.jsonl"
    file.write_text('{"question": "Q", "answer": "5"}\n')
    oracle = ["--gold-oracle", "--tasks", str(file)]
    assert main([*oracle, "--factor-100", "other"]) == 2
    assert "--factor-100 must name tasks of this evaluation (g), got 'other'" in capsys.readouterr().err
    assert main([*oracle, "--factor-100", "g", "--rule", "seed"]) == 2
    assert "leniency needs the rule correctness, final_answer or boxed" in capsys.readouterr().err
    assert main([*oracle, "--factor-100", "g"]) == 0


def test_a_folder_that_another_process_rescores_to_is_left_alone(tmp_path, model, task, engine, capsys):
    assert main(command(tmp_path, model, task)) == 0
    target = tmp_path / "again"
    target.mkdir()
    capsys.readouterr()
    with locked(target / "lock", writing=target, wait_s=0):
        assert main(["--rescore", str(tmp_path / "out" / "samples_sums.jsonl"), "--output", str(target)]) == 1
    assert "another process is writing" in capsys.readouterr().err
    assert [file.name for file in target.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "math50", "--data", "."], "unknown task 'math50'; did you mean math500?"),
        (["--tasks", "{folder}/bad.jsonl"], "bad.jsonl:2: every line must be a JSON object"),
        (["--tasks", "{folder}/nogold.jsonl"], "nogold.jsonl:1: needs 'answer'"),
        (["--tasks", "math500"], "--data must say where the problem sets lie"),
        (["--template", "abelian"], "unknown template 'abelian'; did you mean abel?"),
        (["--rule", "sead"], "unknown reward rule 'sead'"),
        (["--factor-100", "sum"], "--factor-100 must name tasks of this evaluation (sums), got 'sum'"),
        (
            ["--relative-tolerance", "sums=0.01", "--rule", "seed"],
            "leniency needs the rule correctness, final_answer or",
        ),
        (["--samples", "4"], "would draw the same response 4 times"),
        (["--rule", "{folder}/rule.py:half"], "must return a Score with a part 'correct'"),
    ],
)
def test_wrong_input_is_one_clear_error_before_anything_starts(
    arguments, message, tmp_path, model, task, engine, capsys
):
    (tmp_path / "bad.jsonl").write_text('{"question": "Q", "answer": "1"}\n{"question": "Q", "ans\n')
    (tmp_path / "nogold.jsonl").write_text('{"question": "Q"}\n')
    (tmp_path / "rule.py").write_text("def half(text, answer, finish):\n    return 0.5\n")
    asked = [word.format(folder=tmp_path) for word in arguments]
    assert main(command(tmp_path, model, task, *asked)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert engine.opened == []
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_whole_says_what_is_missing(tmp_path, model, task, capsys):
    for name, message in (
        ("model.safetensors", "no *.safetensors"),
        ("tokenizer.json", "no tokenizer.json"),
        ("config.json", "no config.json"),
    ):
        (model / name).unlink()
        assert main(command(tmp_path, model, task)) == 2
        assert message in capsys.readouterr().err
    assert main(command(tmp_path, tmp_path / "nowhere", task)) == 2
    assert "no such folder" in capsys.readouterr().err
    checkpoint = tmp_path / "step_000002"
    (checkpoint / "hf").mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"state.json": {}, "hf/model.safetensors": {}}')
    assert main(command(tmp_path, checkpoint / "policy", task)) == 2
    assert f"only the weights were kept, take {checkpoint / 'hf'}" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["weights", "checkpoint/policy"])
def test_a_megatron_checkpoint_is_converted_once(place, tmp_path, model, task, engine, monkeypatch, capsys):
    """By a stand-in for the converter, which copies a folder and leaves a mark of each call."""
    source = tmp_path / place
    source.mkdir(parents=True)
    (source / "__0_0.distcp").write_text("weights")
    converter = tmp_path / "convert.py"
    converter.write_text(
        "import pathlib, shutil, sys\n"
        f"assert sys.argv[1].endswith({place!r})\n"
        f"shutil.copytree({str(model)!r}, sys.argv[2])\n"
        "pathlib.Path(__file__).with_name('calls').open('a').write('x')\n"
    )
    monkeypatch.setattr("eval.model.CONVERTER", converter)
    asked = command(tmp_path, tmp_path / place.split("/")[0], task)
    assert main(asked) == 0
    assert [spec.model for spec, _ in engine.opened] == [tmp_path / "out" / "hf"]
    assert main(asked) == 0
    assert (tmp_path / "calls").read_text() == "x"
    converter.write_text("raise SystemExit('a shard is missing')")
    assert main([*asked, "--output", str(tmp_path / "other")]) == 2
    assert "convert.py could not convert it:\na shard is missing" in capsys.readouterr().err


def make_checkpoint(folder: Path, model: Path) -> Path:
    """A stand-in for a Megatron checkpoint, whose stand-in converter copies ``model``."""
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_text("weights")
    return folder


@pytest.fixture
def converter(tmp_path, model, monkeypatch):
    file = tmp_path / "convert.py"
    file.write_text(f"import shutil, sys\nshutil.copytree({str(model)!r}, sys.argv[2])\n")
    monkeypatch.setattr("eval.model.CONVERTER", file)


def test_a_converted_model_is_not_taken_for_that_of_another_checkpoint(
    tmp_path, model, task, engine, converter, capsys
):
    first, second = (make_checkpoint(tmp_path / run / "policy", model) for run in "ab")
    assert main(command(tmp_path, first, task)) == 0
    assert json.loads((tmp_path / "out" / "identity.json").read_text())["settings"]["source"]["path"] == str(first)
    assert main(command(tmp_path, second, task)) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out' / 'hf'} cannot be used again: it was converted from {first}, not from {second}" in error
    (first / "__0_0.distcp").write_text("trained on")
    assert main(command(tmp_path, first, task)) == 2
    assert f"was converted from {first} before its files changed" in capsys.readouterr().err
    (tmp_path / "out" / "hf_source.json").unlink()
    assert main(command(tmp_path, first, task)) == 2
    assert "there is no hf_source.json beside it" in capsys.readouterr().err
    assert len(engine.opened) == 1


def test_a_conversion_that_was_cut_short_is_made_again(tmp_path, model, task, engine, converter):
    first, second = (make_checkpoint(tmp_path / run / "policy", model) for run in "ab")
    assert main(command(tmp_path, first, task)) == 0
    for left in ("identity.json", "results.json", "samples_sums.jsonl"):
        (tmp_path / "out" / left).unlink()
    shutil.rmtree(tmp_path / "out" / "hf")
    assert main(command(tmp_path, second, task)) == 0
    assert len(engine.opened) == 2


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/a/checkpoints/step_10", "a-step_10"),
        ("runs/a/checkpoints/step_10/hf", "a-step_10"),
        ("runs/a/checkpoints/step_10/policy", "a-step_10"),
        ("runs/a/checkpoints/step_10/critic", "a-step_10"),
        ("runs/policy/checkpoints/step_10", "policy-step_10"),
        ("models/qwen", "qwen"),
        ("models/qwen/hf", "models-qwen"),
    ],
)
def test_a_model_is_named_by_what_tells_it_from_others(path, name):
    assert _model_name(Path(path)) == name


def test_a_model_without_a_tokenizer_is_refused_in_seconds(tmp_path, model, task):
    (model / "tokenizer.json").unlink()
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval" / "run.py"), *command(tmp_path, model, task)],
        cwd=tmp_path,  # the program finds its checkout from anywhere
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"eval: --model {model}: no tokenizer.json in {model}; copy the tokenizer's files")
    assert done.stdout == ""
    assert time.monotonic() - started < 30


def test_the_seeds_protocol_is_the_default_and_options_override_it(tmp_path):
    found = parse(["--model", "m"])
    assert (found.temperature, found.max_tokens, found.samples, found.seed, found.top_p) == (0.0, 3000, 1, 0, 1.0)
    assert found.template == "qwen25-math-cot"
    assert len(found.tasks) == 8
    assert found.stop == ("</s>", "<|im_end|>", "<|endoftext|>")
    assert parse(["--model", "m", "--max-tokens", "5", "--tasks", "a,b"]).tasks == ("a", "b")
    other = tmp_path / "p.toml"
    other.write_text("temperature = 0.6\nmax_tokens = 5\n")
    with pytest.raises(BadInput, match="unknown key 'max_tokens'; did you mean max-tokens"):
        parse(["--model", "m", "--protocol", str(other)])
    other.write_text("temperature = 0.6\n")
    with pytest.raises(BadInput, match="give none for --tasks, --template"):
        parse(["--model", "m", "--protocol", str(other)])
    with pytest.raises(BadInput, match=r"--temperature must be 0 \(greedy\) or at least 0.01, .* got 0.005"):
        parse(["--model", "m", "--temperature", "0.005"])
    assert parse(["--model", "m", "--temperature", "0.01"]).temperature == 0.01
    with pytest.raises(BadInput, match="exactly one of"):
        parse([])
    with pytest.raises(BadInput, match="exactly one of"):
        parse(["--model", "m", "--gold-oracle"])
    with pytest.raises(BadInput, match="cannot be read"):
        parse(["--model", "m", "--protocol", str(tmp_path / "none.toml")])
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--top-p", "1.5"])
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--seed", "-1"])
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--relative-tolerance", "0.01"])


def test_a_list_of_a_protocol_stays_as_it_is(tmp_path):
    protocol = tmp_path / "p.toml"
    written = (ROOT / "eval" / "seed_protocol.toml").read_text().partition("stop =")[0]
    protocol.write_text(written + 'stop = ["Therefore, done", "\\n\\n"]\n')
    asked = ["--model", "m", "--protocol", str(protocol)]
    found = parse(asked)
    assert found.stop == ("Therefore, done", "\n\n")
    assert len(found.tasks) == 8
    assert parse([*asked, "--stop", "a,b"]).stop == ("a", "b")
    protocol.write_text(written + "stop = ''\n")
    assert parse(asked).stop == ()
    protocol.write_text(written + "stop = ['a', '']\n")
    with pytest.raises(BadInput, match="stop must be a list of strings that are not empty, got"):
        parse(asked)
    protocol.write_text(written.replace("seed = 0", "seed = [0]") + "stop = []\n")
    with pytest.raises(BadInput, match="seed must be one value, got the list"):
        parse(asked)


def test_the_quick_starts_template_is_that_of_its_configuration():
    folder = ROOT / "examples" / "arithmetic_cpu"
    template = tomllib.loads((folder / "ppo.toml").read_text())["data"]["template"]
    assert (folder / "template.txt").read_text() == template
