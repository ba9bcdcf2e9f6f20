"""What is done to torch so that megatron-core runs on a CPU; in processes of their own, since it stays done."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_rl import device

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


def test_host_buffers_beside_a_gpu_are_pinned_exactly_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: dict[int, int] = {}

    def register(address: int, size: int, flags: int) -> int:
        assert address % mmap.PAGESIZE == flags == 0
        pinned[address] = size
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=pinned.pop)
    monkeypatch.setattr("torch.cuda.cudart", lambda: runtime)
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    size = 2 * mmap.PAGESIZE + 8
    buffer = device.host_buffer(size)
    assert pinned == {buffer.data_ptr(): size}
    assert len(buffer) == size
    view = buffer[8:16].view(torch.float32).fill_(1.5)
    del buffer
    assert view.tolist() == [1.5, 1.5]
    assert len(pinned) == 1, "a view still needs it"
    del view
    assert not pinned
    assert len(device.host_buffer(0)) == len(pinned) == 0


def test_memory_that_cannot_be_pinned_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 2))
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    with pytest.raises(MemoryError, match=r"1,000 bytes of host memory must be pinned, CUDA refuses with error 2: .*"):
        device.host_buffer(1000)
