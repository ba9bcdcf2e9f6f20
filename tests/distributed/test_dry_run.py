"""What the planner predicts is what the real model of megatron-core holds, to the byte."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, Literal, get_args

import pytest

from megatron_rl.config.precision import FP8Config
from megatron_rl.config.schema import OptimizerConfig, TrainerConfig
from megatron_rl.layout import ParallelLayout
from megatron_rl.planner.memory import trainer_cells
from megatron_rl.planner.states import state_bytes
from megatron_rl.weights.rules import Head
from tests.distributed.ranks import RankFailed, Ranks
from tests.unit.weights.models import EXTRA, dims

SIZES = {"num_hidden_layers": 8, "hidden_size": 48, "intermediate_size": 40, "vocab_size": 400}
EIGHT = {"num_experts": 8, "n_routed_experts": 8}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[int]]] = {
    "dense": ("Qwen2", {}, {}, [0]),
    "dense TP4 SP": ("Qwen2", {}, {"tensor": 4, "sequence_parallel": True, "data": 3}, [0, 7]),
    "dense PP4": ("Qwen2", {}, {"pipeline": 4}, [0, 1, 3]),
    "dense PP2 VPP2": ("Qwen2", {}, {"pipeline": 2, "virtual_pipeline": 2, "data": 2}, [0, 3]),
    "dense uneven PP3": (
        "Qwen2",
        {},
        {"pipeline": 3, "first_stage_layers": 2, "last_stage_layers": 2},
        [0, 1, 2],
    ),
    "tied PP2": ("Qwen2", {"tie_word_embeddings": True}, {"pipeline": 2, "data": 2}, [0, 1, 2, 3]),
    "tied": ("Qwen2", {"tie_word_embeddings": True}, {"tensor": 2}, [0]),
    "qk-norm CP4": ("Qwen3", {}, {"context": 4, "tensor": 2, "data": 2}, [0, 5, 15]),
    "4096 ranks": ("Qwen3", {}, {"tensor": 2, "pipeline": 4, "data": 512}, [0, 2047, 4095]),
    "experts EP4": ("Qwen3Moe", {}, {"expert": 4, "data": 8}, [0, 5]),
    "experts TP2 EP2 ETP2": (
        "Qwen2Moe",
        {},
        {"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 2, "data": 4},
        [0, 5],
    ),
    "latent TP2 PP2": (
        "DeepseekV3",
        {},
        {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "expert": 4, "data": 4},
        [0, 9],
    ),
    "latent without query rank": (
        "DeepseekV2",
        {},
        {"pipeline": 2, "virtual_pipeline": 2, "expert": 2, "data": 2},
        [0, 3],
    ),
}


def _answer(rank: int, port: int, cases: list[tuple[Any, ...]], world: int) -> list[Any]:
    from megatron_rl.mcore.dry_run import dry_run

    return [dry_run(*case) for case in cases[rank::world]]


def dry_runs(process: Ranks, cases: list[tuple[Any, ...]]) -> list[Any]:
    """Of each case, in order; two at a time."""
    world = min(2, len(cases))
    answers = process.run(world, _answer, cases, world, timeout_s=240)
    return [answers[place % world][place // world] for place in range(len(cases))]


@pytest.fixture(scope="module")
def process() -> Any:
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.mark.parametrize("case", CASES)
def test_predicted_bytes_are_those_of_the_real_model(case: str, process: Ranks) -> None:
    family, changes, axes, chosen = CASES[case]
    sizes = dims(
        f"{family}ForCausalLM", **(SIZES | EXTRA.get(family, {}) | (EIGHT if family in EXTRA else {}) | changes)
    )
    settings = [
        ("bfloat16", {"distributed_optimizer": True}),
        ("float32", {}),
        ("bfloat16", {"distributed_optimizer": True, "overlap_communication": True, "optimizer_on_host": True}),
    ]
    asked = [
        (sizes, TrainerConfig(optimizer=OptimizerConfig(lr=1e-6), layout=ParallelLayout(**axes), **flags), *of, dtype)
        for dtype, flags in settings
        for of in product(Head, chosen)
    ]
    for one, found in zip(asked, dry_runs(process, asked), strict=True):
        said = state_bytes(*one)
        assert vars(said) == {name: getattr(found, name) for name in vars(said)}, one


HEADS = {"num_hidden_layers": 4, "num_attention_heads": 16, "head_dim": 16}
DENSE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "TP1": ("Qwen2", {}, {}),
    "TP2 SP": ("Qwen2", {}, {"tensor": 2, "sequence_parallel": True}),
    "TP4 SP": ("Qwen2", HEADS | {"num_key_value_heads": 4}, {"tensor": 4, "sequence_parallel": True}),
    "TP8 SP": ("Qwen2", HEADS | {"num_key_value_heads": 8}, {"tensor": 8, "sequence_parallel": True}),
    "fewer key/value heads than TP4": ("Qwen2", HEADS | {"num_key_value_heads": 2}, {"tensor": 4}),
    "fewer key/value heads than TP4 SP, norms of heads": (
        "Qwen3",
        HEADS | {"num_key_value_heads": 2},
        {"tensor": 4, "sequence_parallel": True},
    ),
    "fewer key/value heads than TP8 SP": (
        "Qwen2",
        HEADS | {"num_key_value_heads": 2},
        {"tensor": 8, "sequence_parallel": True},
    ),
    "weights as large as a micro-batch TP8 SP": (
        "Qwen2",
        {"num_hidden_layers": 2, "hidden_size": 4096, "intermediate_size": 11264, "num_attention_heads": 32}
        | {"num_key_value_heads": 8},
        {"tensor": 8, "sequence_parallel": True},
    ),
}


Recompute = Literal["none", "selective", "full"]


@pytest.mark.parametrize(
    ("case", "dtypes"),
    [(case, ["float32", "bfloat16"] if case in ("TP1", "TP8 SP") else ["bfloat16"]) for case in DENSE],
    ids=[*DENSE],
)
def test_predicted_activations_are_near_what_a_pass_of_the_real_model_holds(
    case: str, dtypes: list[str], process: Ranks
) -> None:
    family, changes, axes = DENSE[case]
    sizes = dims(
        f"{family}ForCausalLM",
        **({"num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 704, "vocab_size": 128} | changes),
    )
    trainer = TrainerConfig(
        optimizer=OptimizerConfig(lr=1e-6), layout=ParallelLayout(**axes), tokens_per_microbatch=4096
    )
    asked = [
        (sizes, replace(trainer, recompute=recompute), Head.VALUE, 0, dtype, 256)
        for recompute, dtype in product(get_args(Recompute), dtypes)
    ]
    for (_, one, _, _, dtype, _), found in zip(asked, dry_runs(process, asked), strict=True):
        cells = trainer_cells("critic", sizes, one, Head.VALUE, dtype, reference=False, on_gpu=False)
        said = next(cell.value for cell in cells if cell.name == "critic.activations")
        assert said == pytest.approx(found.activations, rel=0.05), (one.recompute, dtype)


LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,  # of queries: torch's attention on a CPU keeps scores where they differ
}
WIDE = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 704, "vocab_size": 128}
SPARSE = {"head_dim": 64, "num_experts": 8, "moe_intermediate_size": 192}
ETP2 = {"tensor": 2, "sequence_parallel": True, "expert_tensor": 2}
ETP4 = {"tensor": 4, "sequence_parallel": True, "expert_tensor": 4}
ACTIVATIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "norms of heads": ("Qwen3", {"head_dim": 64}, {}),
    "latent": ("DeepseekV3", LATENT | {"q_lora_rank": 96, "first_k_dense_replace": 4}, {}),
    "latent without query rank": ("DeepseekV2", LATENT | {"first_k_dense_replace": 4}, {}),
    "experts": ("Qwen3Moe", SPARSE | {"num_experts_per_tok": 2}, {}),
    "many experts a token": ("Qwen3Moe", SPARSE | {"moe_intermediate_size": 96, "num_experts_per_tok": 4}, {}),
    "a gated shared expert": (
        "Qwen2Moe",
        {"num_experts": 8, "moe_intermediate_size": 192, "shared_expert_intermediate_size": 384},
        {},
    ),
    "dense and sparse, latent": (
        "DeepseekV3",
        LATENT | {"q_lora_rank": 96, "n_routed_experts": 8, "moe_intermediate_size": 192, "first_k_dense_replace": 2},
        {},
    ),
    "experts EP2": ("Qwen3Moe", SPARSE | {"num_experts_per_tok": 2}, {"data": 2, "expert": 2}),
    "experts ETP2": ("Qwen3Moe", SPARSE | {"num_experts_per_tok": 2}, ETP2),
    "many experts a token ETP2": (
        "Qwen3Moe",
        SPARSE | {"moe_intermediate_size": 96, "num_experts_per_tok": 4},
        ETP2,
    ),
    "a gated shared expert ETP2": (
        "Qwen2Moe",
        {"num_experts": 8, "moe_intermediate_size": 192, "shared_expert_intermediate_size": 384},
        ETP2,
    ),
    "experts ETP4": (
        "Qwen3Moe",
        SPARSE | {"num_experts_per_tok": 2, "num_key_value_heads": 4},
        ETP4,
    ),
}


def _count(rank: int, port: int, sizes: Any, trainer: TrainerConfig, dtype: str, row_tokens: int) -> int:
    """What a pass of the real model with real tensors holds: experts get what a router of random weights says."""
    import torch

    from megatron_rl.device import dtype as torch_dtype
    from megatron_rl.mcore.dry_run import count_activations
    from megatron_rl.mcore.groups import start_groups, stop_groups
    from megatron_rl.mcore.model import build_chunks
    from megatron_rl.mcore.optimizer import prepare_training, release

    start_groups(trainer.layout, rank=rank, host="127.0.0.1", port=port, timeout_s=60.0, seed=0)
    try:
        torch.manual_seed(0)
        chunks = build_chunks(sizes, trainer, torch_dtype(dtype), Head.VALUE)
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            torch.nn.init.normal_(parameter.data, std=0.02)
        training = prepare_training(chunks, trainer, total_updates=1)
        counted = count_activations(training, trainer, Head.VALUE, row_tokens)
        release(training)
        return counted
    finally:
        stop_groups()


@pytest.mark.parametrize(("dtype", "recompute"), [("float32", "full"), ("bfloat16", "none")])
@pytest.mark.parametrize("case", ACTIVATIONS)
def test_predicted_activations_of_experts_and_latent_attention_are_near_those_of_the_real_model(
    case: str, dtype: str, recompute: Literal["none", "full"], process: Ranks
) -> None:
    family, changes, axes = ACTIVATIONS[case]
    sizes = dims(f"{family}ForCausalLM", **(WIDE | EXTRA.get(family, {}) | {"mlp_only_layers": []} | changes))
    layout = ParallelLayout(**axes)
    trainer = TrainerConfig(
        optimizer=OptimizerConfig(lr=1e-6), layout=layout, tokens_per_microbatch=512, recompute=recompute
    )
    # of two ranks the one whose experts were not chosen more often than by chance
    found = min(process.run(layout.world_size, _count, sizes, trainer, dtype, 128))
    cells = trainer_cells("critic", sizes, trainer, Head.VALUE, dtype, reference=False, on_gpu=False)
    said = next(cell.value for cell in cells if cell.name == "critic.activations")
    assert said == pytest.approx(found, rel=0.05)


def test_activations_are_counted_with_overlapped_communication_too(process: Ranks) -> None:
    layout = ParallelLayout(data=4)
    apart = TrainerConfig(optimizer=OptimizerConfig(lr=1e-6), layout=layout, distributed_optimizer=True)
    trainers = (apart, replace(apart, overlap_communication=True))
    one, two = dry_runs(
        process, [(dims("Qwen2ForCausalLM"), trainer, Head.TOKEN, 0, "bfloat16", 32) for trainer in trainers]
    )
    assert two.activations is not None
    assert (one.weights, one.optimizer) == (two.weights, two.optimizer)
    assert one.gradients <= two.gradients < 1.1 * one.gradients  # padded to whole buckets


def test_experts_activations_are_not_counted_and_the_dry_run_says_why(process: Ranks) -> None:
    sizes = dims("Qwen3MoeForCausalLM", **EXTRA["Qwen3Moe"])
    trainer = TrainerConfig(optimizer=OptimizerConfig(lr=1e-6))
    [found] = dry_runs(process, [(sizes, trainer, Head.TOKEN, 0, "float32", 32)])
    assert found.activations is None
    assert found.uncounted.startswith("how many tokens each expert gets depends on values")


def test_rows_that_tensor_ranks_do_not_divide_are_padded_as_in_training(process: Ranks) -> None:
    layout = ParallelLayout(tensor=2, sequence_parallel=True)
    trainer = TrainerConfig(optimizer=OptimizerConfig(lr=1e-6), layout=layout, tokens_per_microbatch=33)
    odd, even = dry_runs(
        process, [(dims("Qwen2ForCausalLM"), trainer, Head.TOKEN, 0, "bfloat16", tokens) for tokens in (33, 32)]
    )
    assert odd.activations is not None
    assert even.activations is not None
    assert odd.activations > even.activations


def test_a_trainer_that_contradicts_itself_is_refused(process: Ranks) -> None:
    trainer = TrainerConfig(optimizer=OptimizerConfig(lr=1e-6), optimizer_on_host=True)
    with pytest.raises(RankFailed, match="optimizer_on_host needs distributed_optimizer=true"):
        dry_runs(process, [(dims("Qwen2ForCausalLM"), trainer, Head.TOKEN, 0, "bfloat16")])


def test_weights_in_fp8_are_refused_with_the_reason(process: Ranks) -> None:
    trainer = TrainerConfig(
        optimizer=OptimizerConfig(lr=1e-6), distributed_optimizer=True, fp8=FP8Config(parameters=True)
    )
    with pytest.raises(RankFailed, match=r"fp8\.parameters must be false in a dry run"):
        dry_runs(process, [(dims("Qwen2ForCausalLM"), trainer, Head.TOKEN, 0, "bfloat16")])
