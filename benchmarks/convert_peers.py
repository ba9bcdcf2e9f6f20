"""Another converter at work, run by ``benchmarks/convert.py`` with the Python of that converter's own environment.

``PYTHON benchmarks/convert_peers.py PEER import|export SOURCE TARGET HF`` follows the peer's own documentation for one
process on a CPU. It imports nothing of this project.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "29517")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "HF_HUB_OFFLINE": "1"}


def megatron_bridge(action: str, source: str, target: str, hf: str) -> None:
    import torch
    from megatron.bridge import AutoBridge

    if action == "import":
        AutoBridge.import_ckpt(source, target, torch_dtype=torch.bfloat16, device_map="cpu")
    else:
        AutoBridge.from_hf_pretrained(hf, torch_dtype=torch.bfloat16).export_ckpt(source, target)


def mbridge(action: str, source: str, target: str, hf: str) -> None:
    import torch
    from mbridge import AutoBridge
    from megatron.core import dist_checkpointing, parallel_state

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    bridge = AutoBridge.from_pretrained(hf)
    models = bridge.get_model()
    state = models[0].sharded_state_dict()
    if action == "import":
        bridge.load_weights(models, source)
        Path(target).mkdir()
        dist_checkpointing.save(state, target)
    else:
        models[0].load_state_dict(dist_checkpointing.load(state, source))
        bridge.save_weights(models, target)


if __name__ == "__main__":
    {"megatron-bridge": megatron_bridge, "mbridge": mbridge}[sys.argv[1]](*sys.argv[2:])
