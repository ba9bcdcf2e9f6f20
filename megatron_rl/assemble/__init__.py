"""The composition root: from a configuration to a run. The only place that sees Megatron, vLLM and Ray together."""

from megatron_rl.assemble.audit import check_engine
from megatron_rl.assemble.gate import open_parity, verify_folder
from megatron_rl.assemble.roles import spec_of
from megatron_rl.assemble.runs import open_engine, open_engines, open_run, open_supervised

__all__ = [
    "check_engine",
    "open_engine",
    "open_engines",
    "open_parity",
    "open_run",
    "open_supervised",
    "spec_of",
    "verify_folder",
]
