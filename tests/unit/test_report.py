from __future__ import annotations

import json
import math

import pytest

from megatron_rl.report import plot_curve, read_records, summarise, summary_table

PNG = b"\x89PNG\r\n\x1a\n"


def step(number, accuracy, **more):
    return {
        "step": number,
        "kind": "step",
        "time": 0.0,
        "nonfinite": 0,
        "rollout/accuracy": accuracy,
        "rollout/format_rate": 0.5,
        "rollout/length_mean": 20.0 + number,
        "rollout/timeouts": 1.0,
        "experience/kl": 0.01 * number,
        "experience/explained_variance": 0.1 * number,
        "experience/engine_gap_mean": 1e-6 * (number + 1),
        "seconds/step": 1.0 + number,
        "peak_rss_gib/policy": 1.0 + 0.1 * number,
        **more,
    }


RUN = [
    {"step": 0, "kind": "evaluation", "nonfinite": 0, "heldout/accuracy": 0.1, "heldout/length_mean": 20.0},
    step(0, 0.2),
    {"step": 1, "kind": "step", "nonfinite": 0, "aborted": True, "rollout/accuracy": 9.0},
    step(1, 0.4),
    step(2, 0.5),
    step(2, 0.6, **{"heldout/accuracy": 0.8, "heldout/length_mean": 30.0, "policy/loss": math.nan, "nonfinite": 1}),
]


@pytest.fixture
def metrics(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RUN))
    return file


def test_aborted_records_and_those_of_a_repeated_step_are_left_out(metrics):
    assert [(record["step"], record["kind"]) for record in read_records(metrics)] == [
        (0, "evaluation"),
        (0, "step"),
        (1, "step"),
        (2, "step"),
    ]
    assert [record.get("rollout/accuracy") for record in read_records(metrics)] == [None, 0.2, 0.4, 0.6]


def test_the_summary_of_a_run(metrics):
    assert summarise(metrics) == {
        "steps": 3,
        "accuracy_before": 0.1,
        "accuracy_after": 0.8,
        "length_before": 20.0,
        "length_after": 30.0,
        "rollout_accuracy_first": 0.2,
        "rollout_accuracy_last": 0.6,
        "rollout_format_rate_first": 0.5,
        "rollout_format_rate_last": 0.5,
        "rollout_length_first": 20.0,
        "rollout_length_last": 22.0,
        "kl_last": 0.02,
        "explained_variance_last": 0.2,
        "engine_gap_mean_worst": 3e-6,
        "seconds_per_step_median": 2.0,
        "timeouts": 3,
        "nonfinite": 1,
        "peak_rss_gib": {"policy": 1.2},
    }


def test_timeouts_and_errors_are_those_of_all_that_was_drawn(tmp_path):
    file = tmp_path / "metrics.jsonl"
    drawn = {"sampling/timeouts": 5.0, "sampling/errors": 8.0, "rollout/errors": 0.0}
    rows = [step(0, 0.2, **drawn), step(1, 0.2, **{"heldout/errors": 2.0})]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = summarise(file)
    assert (summary["timeouts"], summary["errors"]) == (6, 10)


def test_there_is_no_before_where_nothing_was_evaluated_before_the_first_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 0, "kind": "step", "rollout/accuracy": 0.2, "nonfinite": 0},
        {"step": 1, "kind": "step", "rollout/accuracy": 0.4, "heldout/accuracy": 0.9, "nonfinite": 0},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = summarise(file)
    assert "accuracy_before" not in summary
    assert summary["accuracy_after"] == 0.9
    assert (summary["rollout_accuracy_first"], summary["rollout_accuracy_last"]) == (0.2, 0.4)


def test_an_evaluation_that_was_not_asked_for_at_the_start_is_no_before(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 0, "kind": "evaluation", "nonfinite": 0},
        {"step": 3, "kind": "step", "heldout/accuracy": 0.7, "nonfinite": 0},
        {"step": 7, "kind": "step", "heldout/accuracy": 0.8, "nonfinite": 0},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = summarise(file)
    assert "accuracy_before" not in summary
    assert summary["accuracy_after"] == 0.8


def test_the_table_flattens_and_aligns():
    table = summary_table({"steps": 3, "accuracy": 0.123456, "peak": {"policy": 1.5, "lost": math.nan}, "run": "a"})
    assert table == ("steps        3\naccuracy     0.1235\npeak/policy  1.5\npeak/lost    nan\nrun          a\n")


def test_the_curve_is_a_picture(metrics, tmp_path):
    plot_curve(metrics, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)


def test_a_supervised_stage_can_be_summarised_and_drawn(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": n, "kind": "step", "nonfinite": 0, "model/loss": 2.0 - n, "seconds/step": 1.0} for n in range(2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert summarise(file) == {
        "steps": 2,
        "loss_first": 2.0,
        "loss_last": 1.0,
        "seconds_per_step_median": 1.0,
        "nonfinite": 0,
    }
    plot_curve(file, tmp_path / "curve.png")


def test_a_file_without_a_complete_record_is_refused(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(RUN[2]) + "\n")
    with pytest.raises(ValueError, match="at least one complete record, found none"):
        summarise(file)
    file.write_text("{\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: every line must be a JSON object"):
        read_records(file)
