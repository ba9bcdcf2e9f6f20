"""Write docs/configuration.md from the schema: ``python docs/make_configuration.py`` (a test compares the two)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "megatron_rl" / "config" / "schema.py"
PRECISION = ROOT / "megatron_rl" / "config" / "precision.py"
LAYOUT = ROOT / "megatron_rl" / "layout.py"

HEAD = """# Settings

Written by `docs/make_configuration.py` from `megatron_rl/config/schema.py`. A TOML file has one table per section
(`[ppo]`, `[policy.optimizer]`); several files are merged left to right, and `key.path=value` on the command line wins.
`megatron-rl show-config FILE.toml...` prints the result, or everything that is wrong with it; with `--origins` each
setting with the file that it comes from. A run leaves the result in `run_dir/config.json`, which commands take, too.

On the command line a text needs no quotes, unless it has a backslash: `'data.template="Q: {question}\\nA:"'`. A path
may begin with `~`. A setting whose type says `None` is unset with `"none"`, in a later file or on the command line:
`ppo.advantage=grpo critic=none`. Any other is as if it was not given when it has its default.
"""

KINDS = {
    "Positive": "int > 0",
    "Count": "int >= 0",
    "PositiveFloat": "float > 0",
    "NonNegative": "float >= 0",
    "Fraction": "float, 0 to 1",
    "BelowOne": "float >= 0 and < 1",
    "Annotated[int, Ge(2)]": "int >= 2",
    "Path": "path",
}


def sections(file: Path) -> dict[str, ast.ClassDef]:
    """The dataclasses of a file, by name."""
    return {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)}


def rows(section: ast.ClassDef) -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of each setting."""
    found = []
    for node, following in zip(section.body, [*section.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        default = "required" if node.value is None else f"`{ast.unparse(node.value)}`"
        if default.startswith("`field("):
            default = "see its table"
        meaning = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            meaning = " ".join(str(following.value.value).split())
        kind = ast.unparse(node.annotation)
        name = kind.removesuffix(" | None")
        if name.endswith("Config") or name == "ParallelLayout":
            kind = f"[table](#{name.lower()})" + kind.removeprefix(name)
        else:
            kind = f"`{KINDS.get(name, name)}{kind.removeprefix(name)}`"
        kind = kind.replace("|", "\\|")
        found.append((node.target.id, kind, default.replace("|", "\\|"), meaning.replace("|", "\\|")))
    return found


def tables(known: dict[str, ast.ClassDef]) -> dict[str, list[str]]:
    """The tables of a file that each section is, by the section's name."""
    found: dict[str, list[str]] = {name: [] for name in known}

    def walk(section: str, prefix: str) -> None:
        for node in known[section].body:
            if isinstance(node, ast.AnnAssign):
                kind = ast.unparse(node.annotation).removesuffix(" | None")
                if kind in known:
                    table = prefix + ast.unparse(node.target)
                    found[kind] += [] if table in found[kind] else [table]
                    walk(kind, f"{table}.")

    for root in ("RunConfig", "SFTConfig"):
        walk(root, "")
    return found


def document() -> str:
    """The whole page."""
    parts = [HEAD]
    known = sections(SCHEMA) | {
        "ParallelLayout": sections(LAYOUT)["ParallelLayout"],
        "FP8Config": sections(PRECISION)["FP8Config"],
    }
    places = tables(known)
    for name in ("RunConfig", "SFTConfig", *(name for name in known if name not in {"RunConfig", "SFTConfig"})):
        where = f"\n\nIn {', '.join(f'`[{table}]`' for table in places[name])}." if places[name] else ""
        parts.append(f"## {name}\n\n{ast.get_docstring(known[name], clean=True)}{where}\n")
        parts.append("| key | type | default | meaning |\n| --- | --- | --- | --- |")
        parts.append(
            "\n".join(f"| `{key}` | {kind} | {default} | {text} |" for key, kind, default, text in rows(known[name]))
        )
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(document())
