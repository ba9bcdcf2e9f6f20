"""What a run hands to workers, whose folder is not the driver's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_rl.assemble import runs
from megatron_rl.assemble.roles import start_trainer
from megatron_rl.assemble.runs import _saved, uncorrected_experts
from megatron_rl.checkpoints import RunCheckpoints, RunIdentity
from megatron_rl.config.schema import DataConfig, PPOConfig, RewardConfig
from megatron_rl.dataflow import Finish
from megatron_rl.model_dims import read_model_dims
from megatron_rl.rewards.service import reward_service
from megatron_rl.weights.weight_map import Head
from tests.fakes import FileModel, fake_config, fake_supervised


def test_a_checkpoint_is_read_where_it_was_written_whatever_the_workers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = fake_config(Path("runs/a"))
    folder, identity = tmp_path / "runs/a/checkpoints", RunIdentity(model={}, prompts="", settings={})
    model = FileModel()
    checkpoints = RunCheckpoints(
        folder, keep=1, asynchronous=False, models={"policy": model}, parts={}, like=tmp_path, identity=identity
    )
    checkpoints.start(None)
    checkpoints.save(1, wait=True)
    saved, _ = _saved(config, identity)
    assert saved is not None
    assert saved.folder == folder / "step_000001"


def test_reward_workers_that_are_not_up_in_time_are_told_with_the_setting() -> None:
    make = reward_service(RewardConfig(start_timeout_s=0.001))
    with make() as service, pytest.raises(RuntimeError, match=r"ready within 0\.001 s .* reward\.start_timeout_s"):
        service.score([("1", "1", Finish.STOP)])


LARGE_RULE = """
import mmap
from megatron_rl.dataflow import Score

ROOM = mmap.mmap(-1, 3 << 30)


def rule(text, answer, finish):
    return Score(value=1.0)
"""


def test_a_rule_of_which_workers_have_too_little_memory_is_told_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "large.py").write_text(LARGE_RULE)
    reward = RewardConfig(rule=f"{tmp_path}/large.py:rule", memory_gib=2)
    told = r"could not load its rule: .*Cannot allocate memory.* has 2 GiB by reward\.memory_gib"
    with reward_service(reward)() as service, pytest.raises(RuntimeError, match=told):
        service.score([("1", "1", Finish.STOP)])
    for enough in (0, 5):
        with reward_service(replace(reward, memory_gib=enough))() as service:
            assert service.score([("1", "1", Finish.STOP)])[0].value == 1


@pytest.mark.parametrize(
    ("name", "told"), [("qwen3_30b_a3b", "Qwen3MoeForCausalLM has experts, of which "), ("qwen2.5_14b", None)]
)
def test_a_model_with_experts_and_no_correction_is_told(name: str, told: str | None) -> None:
    dims = read_model_dims(Path(__file__).parents[2] / "examples/beyond_7b/models" / name)
    text = uncorrected_experts(dims, PPOConfig())
    assert (text if text is None else text[: len(told or "")]) == told
    assert uncorrected_experts(dims, PPOConfig(engine_correction="tis")) is None


@pytest.mark.parametrize("fake", [fake_config, fake_supervised])
def test_trainers_get_their_model_by_a_path_that_holds_in_any_folder(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, built = fake(tmp_path), []
    group: Any = SimpleNamespace(
        name="policy",
        births=lambda: [SimpleNamespace(address="here")],
        keep_port=lambda: 1,
        build=lambda _, arguments: built.extend(arguments),
    )
    dims: Any = None
    start_trainer(group, config, Head.TOKEN, dims, 1)
    assert not config.model.path.is_absolute()
    assert [spec.model.path for spec, *_ in built] == [tmp_path / config.model.path]


def test_metrics_that_go_elsewhere_are_ended_when_no_worker_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    def closing(name: str) -> Any:
        @contextmanager
        def open_(*arguments: object, **settings: object) -> Iterator[Any]:
            try:
                yield SimpleNamespace(
                    start=lambda *_: {"trainer": None} if name == "cluster" else 0, note=lambda text: None
                )
            except ValueError as error:
                ended.append(f"{name} after {error}")
                raise

        return open_

    for name, what in {"Cluster": "cluster", "RunCheckpoints": "checkpoints", "MetricLog": "metrics"}.items():
        monkeypatch.setattr(runs, name, closing(what))
    rows = SimpleNamespace(digest=lambda: "", first_prompt=(1,))
    for name, result in {
        "check_machine": None,
        "read_model_dims": SimpleNamespace(eos_ids=(0,), max_positions=8),
        "load_tokenizer": None,
        "load_pairs": rows,
        "asdict": {},
        "start_trainer": SimpleNamespace(result=lambda: None),
        "unwritten_start": None,
        "capability_line": "",
    }.items():
        monkeypatch.setattr(runs, name, lambda *_, result=result: result)
    config = fake_supervised(tmp_path)
    with pytest.raises(ValueError, match="cause"), runs.open_supervised(config, SimpleNamespace(asked=False)):
        raise ValueError("cause")
    assert ended == ["checkpoints after cause", "cluster after cause", "metrics after cause"]


@contextmanager
def a_run_on_no_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *answers: str, pools: int = 0
) -> Iterator[MagicMock]:
    """``runs.open_run`` on data with these answers; every part of it that starts or needs a model is a stand-in."""
    rows = "".join(json.dumps({"question": "one", "answer": answer}) + "\n" for answer in answers)
    for name in ("train", "heldout"):
        (folder / f"{name}.jsonl").write_text(rows)
    Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    for name in (
        *("Cluster", "Engines", "RunCheckpoints", "MetricLog", "start_roles", "start_references", "take_turns"),
        *("checked_sync", "push_line", "capability_line", "check_machine", "check_engine"),
        *("read_model_dims", "read_ending_tokens"),
    ):
        monkeypatch.setattr(runs, name, MagicMock())
    monkeypatch.setattr(runs, "asdict", lambda dims: {})
    config = fake_config(folder / "run", reward=RewardConfig(rule="seed", pools=pools))
    data = DataConfig(train=folder / "train.jsonl", heldout=folder / "heldout.jsonl")
    config = replace(config, model=replace(config.model, path=folder), data=data)
    with runs.open_run(replace(config, parity=replace(config.parity, enabled=False)), SimpleNamespace(asked=False)):
        yield runs.MetricLog.return_value.__enter__.return_value


@pytest.mark.parametrize("pools", [0, 1])
def test_answers_that_can_never_be_right_end_a_run_before_it_leaves_or_starts_anything(
    pools: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solutions = [f"It is {number}.\n#### {number}" for number in range(3)]
    refused = pytest.raises(ValueError, match=r"data\.train: .*nothing more, such as 72.*\n.*data\.heldout: .*####$")
    with refused, a_run_on_no_machine(tmp_path, monkeypatch, *solutions, pools=pools):
        pass
    assert not (tmp_path / "run").exists()
    assert [part.mock_calls for part in (runs.start_references, runs.Cluster, runs.start_roles)] == [[], [], []]


def test_a_run_notes_the_answers_that_its_rule_calls_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_run_on_no_machine(tmp_path, monkeypatch, "1", "It is 2.\n#### 2") as metrics:
        told = [str(call.args[0]) for call in metrics.note.call_args_list]
    found = [text for text in told if "different answers that were tried rule seed calls 1 wrong" in text]
    assert [text.split(":")[0] for text in found] == ["data.train", "data.heldout"]
