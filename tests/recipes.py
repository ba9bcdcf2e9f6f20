"""The recipes of ``examples``: which files make one."""

from __future__ import annotations

import tomllib
from pathlib import Path

from megatron_rl.config.schema import RunConfig, SFTConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
TOMLS = sorted(EXAMPLES.rglob("*.toml"))
BELOW = {  # files that say a part alone, and what they lie over
    "arithmetic_cpu/fp8.toml": ["ppo.toml"],
    "beyond_7b/fp8.toml": ["qwen2.5_14b.toml"],
    "qwen2.5_math_7b/4_nodes_a100.toml": ["simplerl_zero.toml"],
    "qwen2.5_math_7b/4_nodes_h100.toml": ["simplerl_zero.toml"],
    "qwen2.5_math_7b/1_node_a100.toml": ["simplerl_zero.toml"],
    "qwen2.5_math_7b/1_node_h100.toml": ["simplerl_zero.toml"],
    "qwen2.5_math_7b/seed_exact.toml": ["simplerl_zero.toml", "4_nodes_a100.toml"],
    "qwen2.5_math_7b/sft_h100.toml": ["sft_math_8k.toml"],
    "qwen2.5_math_7b/zoo_grpo_h100.toml": ["zoo_grpo.toml"],
}
INCOMPLETE = {"qwen2.5_math_7b/simplerl_zero.toml"}
"""Says nothing of where it runs: no recipe without a file that lies over it."""
MORE = [("qwen2.5_math_7b/sft_long_cot.toml", "qwen2.5_math_7b/sft_h100.toml")]
"""What else a file lies over."""


def name_of(file: Path) -> str:
    """As the tables here have it."""
    return file.relative_to(EXAMPLES).as_posix()


def files_of(file: Path) -> list[Path]:
    """A file with what it lies over."""
    return [*(file.parent / name for name in BELOW.get(name_of(file), ())), file]


def recipes() -> dict[str, list[Path]]:
    """Every recipe: its files by the name of the last ones."""
    whole = {name_of(file): files_of(file) for file in TOMLS if name_of(file) not in INCOMPLETE}
    return whole | {" ".join(names): [EXAMPLES / name for name in names] for names in MORE}


def schema_of(files: list[Path]) -> type[RunConfig] | type[SFTConfig]:
    """PPO has two models, the supervised stage one trainer."""
    return SFTConfig if any("trainer" in tomllib.loads(file.read_text()) for file in files) else RunConfig
