"""Which releases fit together, and how an installation is held against them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from megatron_rl.version_matrix import CAVEATS, SETS, Difference, Hardware, State, installed, nearest, python_release

ROOT = Path(__file__).parents[2]
GPU = {"torch": "2.11.0", "megatron-core": "0.19.2", "vllm": "0.26.0", "ray": "2.60.0", "triton": "3.6.0"}


def test_an_installation_that_fits_has_no_difference() -> None:
    found, differences = nearest(Hardware.CUDA, "3.12", GPU | {"nvidia-modelopt": "0.47.0"})
    assert (found.packages["vllm"], differences) == ("0.26.0", ())


def test_a_local_part_of_a_release_does_not_count() -> None:
    _, differences = nearest(Hardware.CUDA, "3.12", GPU | {"torch": "2.11.0+cu130"})
    assert differences == ()


def test_what_differs_is_named_against_the_nearest_set() -> None:
    newer = {
        "torch": "2.13.0",
        "megatron-core": "0.19.2",
        "vllm": "0.31.0",
        "triton": "3.7.1",
        "transformer-engine": "2.19.0",
    }
    found, differences = nearest(Hardware.CUDA, "3.11", newer)
    assert found.packages["torch"] == "2.13.0"
    assert differences == (
        Difference(package="python", wanted="3.12", found="3.11"),
        Difference(package="vllm", wanted="0.32.0", found="0.31.0"),
        Difference(package="ray", wanted="2.60.0", found=None),
        Difference(package="transformer-engine", wanted="2.20.2", found="2.19.0"),
    )
    assert str(differences[2]) == "ray: 2.60.0 fits, found none"


def test_these_tests_run_with_a_set() -> None:
    found, differences = nearest(Hardware.CPU, python_release(), installed())
    assert differences == ()
    assert python_release() != "3.11" or found.state is State.RUN


@pytest.mark.parametrize(("file", "hardware"), [("cpu", Hardware.CPU), ("gpu", Hardware.CUDA)])
def test_the_requirements_ask_for_the_first_set(file: str, hardware: Hardware) -> None:
    lock = (ROOT / "requirements" / f"{file}.lock").read_text()
    pins = set(re.findall(r"^[a-z-]+==[\d.]+", lock, re.MULTILINE))
    first = next(each for each in SETS if each.hardware is hardware)
    assert {f"{name}=={release}" for name, release in first.packages.items()} <= pins


def test_the_extra_for_transformer_engine_asks_for_its_release_in_the_first_set() -> None:
    first = next(each for each in SETS if each.hardware is Hardware.CUDA)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["te"] == [f"transformer-engine[pytorch]=={first.optional['transformer-engine']}"]
    assert f"nvidia-modelopt=={first.optional['nvidia-modelopt']}" in extras["gpu"]


def test_what_does_not_load_as_it_resolves_is_marked_in_the_table_of_the_docs() -> None:
    table = (ROOT / "docs" / "gpu.md").read_text()
    rows = {
        tuple(row.split(" | ")[:4]): row for row in re.findall(r"^\| ([\d.]+ \| [\d.]+ \| [^\n]+) \|$", table, re.M)
    }
    sets = [each for each in SETS if each.hardware is Hardware.CUDA]
    assert len(rows) == len(sets)
    for each in sets:
        engine = each.optional["transformer-engine"]
        told = rows[(*(each.packages[name] for name in ("torch", "vllm", "triton")), engine)]
        assert ("does not load" in told) is (("transformer-engine", engine) in CAVEATS)
