"""What is done to torch so that megatron-core runs on a CPU; in processes of their own, since it stays done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megatron_rl.device import prepare_megatron

prepare_megatron()
config = Qwen2Config(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)
made = Qwen2ForCausalLM(config)
made.save_pretrained(sys.argv[1])
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert torch.equal(loaded.model.rotary_emb.inv_freq, made.model.rotary_emb.inv_freq), "rotary frequencies"
with torch.device("meta"):
    for factory in (torch.arange, torch.empty, torch.zeros):
        assert factory(3).is_meta, factory
assert torch.zeros(3, device="cuda").device.type == "cpu"
"""
ON_A_GPU = """
import torch

from megatron_rl import device

assert torch.backends.cuda.cudnn_sdp_enabled()
device.has_cuda = lambda: True
device.prepare_megatron()
import megatron.core.optimizer as optimizer
import megatron.core.transformer.moe.moe_utils as moe_utils
import megatron.core.transformer.multi_latent_attention as latent

assert optimizer.Adam is device.FusedAdam
assert not torch.backends.cuda.cudnn_sdp_enabled(), "it keeps a graph for every shape"
assert torch.zeros(1).type() == "torch.FloatTensor", "torch is left as it is"
gating = moe_utils.RouterGatingLinearFunction.apply
found = gating(torch.ones(2, 3), torch.ones(4, 3), None, torch.float32)
assert found.tolist() == [[3.0] * 4] * 2
assert not latent.HAVE_TE
"""
TOO_LATE = "import megatron.core; from megatron_rl.device import prepare_megatron; prepare_megatron()"
FREED_MEMORY = """
import resource

import torch

from megatron_rl.device import keep_freed_memory


def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


found = new_pages()
keep_freed_memory()
new_pages()  # until the heap holds what it needs
print(found, new_pages())
"""


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_transformers_loads_the_same_model_beside_a_prepared_megatron(tmp_path: Path) -> None:
    done = _run(LOAD, str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_experts_and_latent_attention_need_no_transformer_engine_on_a_gpu() -> None:
    done = _run(ON_A_GPU)
    assert done.returncode == 0, done.stderr


def test_preparing_too_late_is_refused() -> None:
    done = _run(TOO_LATE)
    assert "prepare_megatron() must run before megatron.core is imported" in done.stderr


def test_freed_memory_is_used_again_without_new_pages() -> None:
    done = _run(FREED_MEMORY)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after < before / 10
