"""A study predicts every run, and measures those that have run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rl.__main__ import main
from megatron_rl.config.load import ConfigError, dump, parse
from megatron_rl.config.schema import RunConfig
from megatron_rl.planner.study import StudyRow, is_done, plot_study, read_study, study_rows, study_table

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "examples" / "beyond_7b" / "qwen2.5_14b.toml"
MODEL = ROOT / "examples" / "beyond_7b" / "models" / "qwen2.5_14b"


def written(folder, extra="", names=("one", "two")):
    runs = "".join(
        f"""
[[runs]]
name = "{name}"
settings = ["model.path={MODEL}", "prompts_per_step={1024 * (index + 1)}"]
"""
        for index, name in enumerate(names)
    )
    file = folder / "study.toml"
    file.write_text(f'recipe = "{RECIPE}"\nfolder = "{folder}"\n{extra}{runs}')
    return file


def finished(study, name, seconds):
    """What a run of ``study`` leaves once it is done."""
    (run,) = [run for run in study.runs if run.name == name]
    config = parse(RunConfig, study.recipe, study.settings(run))
    config.run_dir.mkdir()
    record = {"step": 0, "kind": "step", "nonfinite": 0, "seconds/step": seconds, "peak_rss_gib/policy": 2.0}
    (config.run_dir / "metrics.jsonl").write_text(json.dumps(record | {"rollout/length_mean": 800.0}) + "\n")
    (config.run_dir / "summary.json").write_text(json.dumps({"steps": config.steps}))
    (config.run_dir / "config.json").write_text(dump(config))


def test_without_runs_a_study_is_the_plan_of_each(tmp_path, capsys):
    assert main(["scale", "plan", str(written(tmp_path))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| one", "| two"]


def test_the_first_run_calibrates_the_others(tmp_path):
    study = read_study(written(tmp_path))
    finished(study, "one", 500.0)
    finished(study, "two", 1100.0)
    one, two = study_rows(study)
    assert one.predicted_seconds == pytest.approx(500.0)
    assert two.predicted_seconds == pytest.approx(two.raw_seconds * 500 / one.raw_seconds)
    assert (two.measured_seconds, two.measured_gib) == (1100.0, None)  # a resident set says nothing of GPUs


def test_on_a_cpu_memory_is_resident_sets_and_includes_what_the_host_keeps(tmp_path):
    file = written(tmp_path, extra='device = "cpu"\n')
    file.write_text(file.read_text().replace("prompts_per_step=2048", "policy.optimizer_on_host=true"))
    finished(read_study(file), "two", 1100.0)
    one, two = study_rows(read_study(file))
    assert two.measured_gib == 2.0
    assert one.predicted_gib == pytest.approx(two.predicted_gib)  # the optimizer is elsewhere on the same machine
    finished(read_study(file), "one", 500.0)
    calibrated, same = study_rows(read_study(file))
    assert calibrated.predicted_gib == same.predicted_gib == pytest.approx(2.0)  # libraries included


def test_what_a_role_of_the_first_run_held_beyond_its_prediction_it_holds_in_the_others_too(tmp_path):
    file = written(tmp_path, extra='device = "cpu"\n')
    file.write_text(file.read_text().replace("prompts_per_step=2048", "engine.kv_cache_mib=65536"))
    raw = study_rows(read_study(file))
    finished(read_study(file), "one", 500.0)
    one, two = study_rows(read_study(file))
    assert one.predicted_gib == pytest.approx(2.0)
    assert two.predicted_gib == pytest.approx(2.0 + 48)
    assert raw[1].predicted_gib == pytest.approx(raw[0].predicted_gib + 48)


def test_settings_on_the_command_line_go_to_every_run_which_may_change_them(tmp_path, monkeypatch):
    commands = []

    def train(command):
        commands.append(command)
        finished(study, command[-1].rpartition("/")[2], 500.0)
        return 0

    monkeypatch.setattr("megatron_rl.__main__.run_command", train)
    monkeypatch.setattr("megatron_rl.__main__.load", parse)  # the model has no weights
    shared = ["cluster.address=auto", "prompts_per_step=512"]
    file = written(tmp_path)
    study = read_study(file, shared)
    assert main(["scale", "run", str(file), *shared]) == 0
    assert [command[3:5] for command in commands] == [["train", str(RECIPE)]] * 2
    for number, (name, command) in enumerate(zip(("one", "two"), commands, strict=True), start=1):
        own = [f"model.path={MODEL}", f"prompts_per_step={1024 * number}", f"run_dir={tmp_path / name}"]
        assert command[5:] == [*shared, *own]
        config = parse(RunConfig, [RECIPE], command[5:])
        assert (config.cluster.address, config.prompts_per_step) == ("auto", 1024 * number)


def test_runs_are_predicted_for_the_machine_of_their_settings_unless_the_study_names_one(tmp_path):
    def seconds(*shared, extra=""):
        (row,) = study_rows(read_study(written(tmp_path, extra=extra, names=("one",)), shared))
        return row.raw_seconds

    h100, a100 = seconds(), seconds("cluster.device=a100-80g")
    assert a100 > 1.5 * h100  # 989 Tflop/s against 312
    assert seconds("cluster.device=a100-80g", extra='device = "h100"\n') == h100
    apart = seconds("cluster.gpus_per_node=2")  # tensor ranks over two nodes
    assert apart > h100
    assert seconds("cluster.gpus_per_node=2", extra="gpus_per_node = 8\n") == h100


def test_settings_for_every_run_are_in_what_is_predicted(tmp_path):
    file = written(tmp_path, names=("one",))
    (alone,), (more,) = study_rows(read_study(file)), study_rows(read_study(file, ["engine.count=64"]))
    assert more.devices > alone.devices


def test_a_second_study_and_a_wrong_setting_are_refused(tmp_path, capsys):
    file = str(written(tmp_path))
    assert main(["scale", "plan", file, file]) == 2
    assert f"takes one study, and settings for all its runs, got files: ['{file}', '{file}']" in capsys.readouterr().err
    assert main(["scale", "run", file, "cluster.adress=auto"]) == 2
    assert "cluster.adress" in capsys.readouterr().err


def test_a_run_that_was_stopped_is_not_done(tmp_path):
    study = read_study(written(tmp_path), ["steps=4"])
    one, two = study.runs
    for run, summary in ((one, {"steps": 2, "stopped_after_step": 2}), (two, {"steps": 4})):
        (tmp_path / run.name).mkdir()
        (tmp_path / run.name / "summary.json").write_text(json.dumps(summary))
        (tmp_path / run.name / "config.json").write_text(dump(parse(RunConfig, study.recipe, study.settings(run))))
    assert (is_done(study, one), is_done(study, two)) == (False, True)
    longer = read_study(written(tmp_path), ["steps=5"])
    assert not is_done(longer, two)
    elsewhere = read_study(written(tmp_path), ["steps=4", "cluster.address=auto", "logging.samples=1"])
    assert is_done(elsewhere, two)
    other = read_study(written(tmp_path), ["steps=4", "seed=7", "engine.count=64"])
    with pytest.raises(ConfigError, match=r"runs: 'two' must have the settings .* others for engine.count, seed: give"):
        is_done(other, two)
    (tmp_path / "two" / "summary.json").unlink()
    assert not is_done(study, two)


def test_table_and_picture_give_error_and_efficiency(tmp_path, monkeypatch):
    row = {"raw_seconds": 1.0, "predicted_gib": 1.0, "measured_gib": None, "accuracy": 0.5, "problems": ()}
    rows = [
        StudyRow(name="one", devices=2, predicted_seconds=10.0, measured_seconds=10.0, **row),
        StudyRow(name="two", devices=4, predicted_seconds=6.0, measured_seconds=8.0, **row),
    ]
    assert study_table(rows).splitlines()[-1] == "| two | 4 | 6.00 | 8.00 | -25 % | 62 % | 1.00 |  | 0.50 | yes |"
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, _: drawn.append(figure))
    plot_study(rows, tmp_path / "study.png")
    heights = {axes.get_ylabel(): [bar.get_height() for bar in axes.patches] for axes in drawn[0].axes}
    assert heights == {
        "seconds of a step": [10.0, 6.0, 10.0, 8.0],
        "GiB, largest worker of each role": [1.0, 1.0],
        "efficiency, % of the first run's": [100.0, pytest.approx(1000 / 12), 100.0, 62.5],
        "accuracy at the end": [0.5, 0.5],
    }


def test_all_that_is_wrong_with_a_study_is_told_together(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_study(written(tmp_path, extra='device = "tpu"\nspeed = 1\n', names=("one", "one")))
    text = str(caught.value)
    assert "speed: unknown key" in text
    assert "device: must be one of" in text
    assert text.count("needs a name of its own, got 'one'") == 2


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("[[runs]]", "runs = ['a']\n[other]", "runs: must be tables ([[runs]]), got ['a']"),
        ("[[runs]]", "gpus_per_node = 'x'\n[[runs]]", "gpus_per_node: must be a whole number of at least 1, got 'x'"),
        ("[[runs]]", "gpus_per_node = 0\n[[runs]]", "gpus_per_node: must be a whole number of at least 1, got 0"),
        ("[[runs]]", "device = ['h100']\n[[runs]]", "device: must be one of "),
        ("folder = ", "folder = 3 # ", "folder: must be a string, got 3"),
        ("recipe = ", "recipe = [3] # ", "recipe: must be a file, or a list of files, got [3]"),
        ('"one"', '"../one"', "runs: a name must be that of a folder, without a path, got '../one'"),
        ('"one"', '".."', "runs: a name must be that of a folder, without a path, got '..'"),
        ('"one"', "1", "runs: a name must be that of a folder, without a path, got 1"),
        (
            "settings = [",
            "settings = 'seed=1' # ",
            "runs.settings: must be a list of strings (key=value), got 'seed=1'",
        ),
        ("settings = [", "settings = [3] # ", "runs.settings: must be a list of strings (key=value), got [3]"),
    ],
)
def test_a_study_of_the_wrong_shape_is_refused_by_key(before, after, said, tmp_path):
    file = written(tmp_path, names=("one",))
    file.write_text(file.read_text().replace(before, after, 1))
    with pytest.raises(ConfigError) as caught:
        read_study(file)
    assert said in str(caught.value)


def test_a_run_that_does_not_fit_says_so_in_the_table(tmp_path):
    file = written(tmp_path)
    file.write_text(file.read_text().replace("prompts_per_step=2048", "engine.kv_cache_mib=81920"))
    fits, full = study_table(study_rows(read_study(file))).splitlines()[2:]
    assert fits.endswith(" | yes |")
    assert " | engine: needs " in full
    assert full.endswith(" GB of a device's 82.9 GB |")


def test_a_run_that_does_not_fit_is_left_out(tmp_path, capsys):
    file = written(tmp_path, names=("one",))
    file.write_text(file.read_text().replace("prompts_per_step=1024", "engine.kv_cache_mib=81920"))
    assert main(["scale", "run", str(file)]) == 0
    said = capsys.readouterr()
    assert "run one of the study is left out, it does not fit: engine: needs " in said.err
    assert said.out == (tmp_path / "study.md").read_text()
    assert not (tmp_path / "one").exists()


def test_a_run_that_cannot_start_is_refused_before_any_does(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_rl.__main__.run_command", lambda command: pytest.fail(f"started {command}"))
    assert main(["scale", "run", str(written(tmp_path))]) == 2
    assert "run one: model.path: " in capsys.readouterr().err  # it has no weights


def test_after_a_run_that_fails_the_others_go_on_and_the_same_command_tries_it_again(tmp_path, capsys, monkeypatch):
    file, started = written(tmp_path), []

    def train(command):
        name = command[-1].rpartition("/")[2]
        started.append(name)
        if started == ["one"]:  # the first time
            (tmp_path / name).mkdir()
            (tmp_path / name / "metrics.jsonl").write_text('{"step": 0, "kind": "step", "aborted": true}\n{"ste')
            return 1
        if name == "one":
            (tmp_path / name / "metrics.jsonl").unlink()
            (tmp_path / name).rmdir()
        finished(read_study(file), name, 500.0)
        return 0

    monkeypatch.setattr("megatron_rl.__main__.run_command", train)
    monkeypatch.setattr("megatron_rl.__main__.load", parse)
    assert main(["scale", "run", str(file)]) == 1
    said = capsys.readouterr()
    assert started == ["one", "two"]
    assert "runs of the study failed: one (status 1); the same command tries them again" in said.err
    assert said.out == (tmp_path / "study.md").read_text()
    assert " | 500.00 | " in said.out.splitlines()[-1]
    assert main(["scale", "run", str(file)]) == 0
    assert started == ["one", "two", "one"]


def test_a_run_that_was_told_to_stop_ends_the_study(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_rl.__main__.run_command", lambda command: 0)
    monkeypatch.setattr("megatron_rl.__main__.load", parse)
    assert main(["scale", "run", str(written(tmp_path))]) == 1
    assert "run one of the study was asked to stop; the same command goes on from there" in capsys.readouterr().err


def test_a_run_that_is_not_done_counts_as_not_measured(tmp_path):
    study = read_study(written(tmp_path))
    finished(study, "one", 500.0)
    (tmp_path / "one" / "summary.json").write_text(json.dumps({"steps": 1, "stopped_after_step": 1}))
    one, two = study_rows(study)
    assert (one.measured_seconds, one.accuracy) == (None, None)
    assert (one.predicted_seconds, two.predicted_seconds) == (one.raw_seconds, two.raw_seconds)


def test_a_recipe_may_be_several_files(tmp_path):
    file, over = written(tmp_path, names=("one",)), tmp_path / "over.toml"
    over.write_text("[engine]\ncount = 64\n")
    (alone,) = study_rows(read_study(file))
    file.write_text(file.read_text().replace(f'recipe = "{RECIPE}"', f'recipe = ["{RECIPE}", "{over}"]'))
    (more,) = study_rows(read_study(file))
    assert more.devices > alone.devices
