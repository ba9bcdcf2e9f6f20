from __future__ import annotations

import json

import pytest

from eval.samples import SampleLog, read_samples
from eval.tasks import BadInput
from tests.unit.eval.builders import graded


def test_samples_come_back_as_they_were_written(tmp_path):
    file = tmp_path / "s.jsonl"
    samples = [graded("a", 0, "1", response="line\u2028one\nline two 😀"), graded("a", 1, None)]
    SampleLog(file).append(samples)
    assert read_samples(file) == samples
    assert json.loads(file.read_text().splitlines()[1])["extracted"] is None


def test_every_cut_of_the_last_line_is_dropped_and_the_file_goes_on(tmp_path):
    file = tmp_path / "s.jsonl"
    first, second = graded("a", 0, "1"), graded("b", 0, "2")
    SampleLog(file).append([first])
    whole = file.read_bytes()
    SampleLog(file).append([second])
    both = file.read_bytes()
    for kept in range(len(whole), len(both)):
        file.write_bytes(both[:kept])
        log = SampleLog(file)
        assert list(log.samples.values()) == [first]
        assert file.read_bytes() == whole
        log.append([second])
        assert file.read_bytes() == both
        assert SampleLog(file).samples.keys() == {("a", 0), ("b", 0)}


def test_a_broken_line_before_the_last_is_an_error_with_its_number(tmp_path):
    file = tmp_path / "s.jsonl"
    SampleLog(file).append([graded("a", 0, "1")])
    file.write_text(file.read_text() + '{"task": "t"}\n' + graded("b", 0, "1").as_json() + "\n")
    with pytest.raises(BadInput, match=r"s\.jsonl:2: every line must be a graded sample"):
        SampleLog(file)


def test_a_sample_that_stands_there_twice_is_an_error_with_its_number(tmp_path):
    file = tmp_path / "s.jsonl"
    SampleLog(file).append([graded("a", 0, "1"), graded("a", 1, "1")])
    assert len(read_samples(file)) == 2
    SampleLog(file).append([graded("a", 0, "2")])
    with pytest.raises(BadInput, match=r"s\.jsonl:3: sample 0 of t a stands there already"):
        read_samples(file)
