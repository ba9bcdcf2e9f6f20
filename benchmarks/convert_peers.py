"""Another converter at work, run by ``benchmarks/convert.py`` with the Python of that converter's own environment.

``PYTHON benchmarks/convert_peers.py PEER import|export SOURCE TARGET HF`` follows the peer's own documentation for one
process on a CPU. Of this project it imports what lets a peer begin there: the CPU's answers to calls that ask torch for
CUDA, and names for Transformer Engine. The peer's own code converts, or says why it cannot.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from te_standin import NOTE, install

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rl.device import has_cuda, prepare_megatron

os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "29517")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "HF_HUB_OFFLINE": "1"}


def megatron_bridge(action: str, source: str, target: str, hf: str, *, stand_in: bool) -> None:
    import torch
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.bridge.training.model_load_save import temporary_distributed_context

    began = time.monotonic()
    bridge = AutoBridge.from_hf_pretrained(hf, torch_dtype=torch.bfloat16, device_map="cpu")
    if action == "export":
        bridge.export_ckpt(source, target)
    elif not stand_in:
        AutoBridge.import_ckpt(source, target, torch_dtype=torch.bfloat16, device_map="cpu")
    else:  # what import_ckpt does, with the settings for which megatron-core needs no Transformer Engine
        provider = bridge.to_megatron_provider()
        provider.transformer_layer_spec = local_layer_spec
        provider.apply_rope_fusion = provider.gradient_accumulation_fusion = provider.persist_layer_norm = False
        provider.finalize()
        with temporary_distributed_context("gloo"):
            model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
            bridge.save_megatron_model(model, target, low_memory_save=True)
    print(f"converted in {time.monotonic() - began:.2f} s")


def mbridge(action: str, source: str, target: str, hf: str, *, stand_in: bool) -> None:
    import torch
    from mbridge import AutoBridge
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    began = time.monotonic()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
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
    print(f"converted in {time.monotonic() - began:.2f} s")


if __name__ == "__main__":
    if not has_cuda():
        prepare_megatron()
    stand_in = install()
    if stand_in:
        print(NOTE)
    {"megatron-bridge": megatron_bridge, "mbridge": mbridge}[sys.argv[1]](*sys.argv[2:], stand_in=stand_in)
