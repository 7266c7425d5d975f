"""The split of packed sequences over context-parallel ranks, and their two ways of attention against one rank."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.algo.pack import build_microbatch
from tandem.engine.architecture import Architecture
from tandem.engine.checkpoint.names import NameMap
from tandem.engine.config import LossConfig, MeshConfig, ModelConfig, TrainerConfig
from tandem.engine.hf_config import qwen3_hf_config
from tandem.engine.mesh_rules import splits_heads
from tandem.engine.trainer import loss as losses
from tandem.engine.trainer.context_parallel import gather_heads, scatter_heads, split_positions, split_tokens, token_order
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tests.ranks import run_ranks
from tests.trainer.compare import TOLERANCE, local_parameters, relative_errors, squared_errors
from tests.trainer.families import hf_model
from tests.trainer.reference import LENGTHS, TEMPERATURE, training_rows

CU_SEQLENS = np.array([0, 3, 4, 20, 61, 61, 100])


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("token_multiple", [1, 4])
def test_every_token_is_held_once_and_found_again(cp_size: int, token_multiple: int) -> None:
    split_CL = split_tokens(CU_SEQLENS, cp_size, token_multiple)
    assert split_CL.shape[1] % token_multiple == 0
    held = split_CL[split_CL >= 0]
    assert sorted(held.tolist()) == list(range(100))
    assert split_CL.reshape(-1)[token_order(split_CL, 100)].tolist() == list(range(100))


def test_ranks_have_the_same_causal_work_and_few_padded_tokens() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 50)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    position = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    split_CL = split_tokens(cu_seqlens, 4, 1)
    work = [(position[tokens[tokens >= 0]] + 1).sum() for tokens in split_CL]
    assert max(work) < 1.03 * min(work)
    assert (split_CL < 0).mean() < 0.01


def test_a_prompt_and_its_responses_are_each_cut_evenly() -> None:
    """So that a rank has its share of every response's work, also of that of seeing a long prompt."""
    lengths = np.array([[4000, 300, 10, 700, 90], [1, 500, 2, 2, 400]])  # a prompt, and what its responses add
    cu_nodes = np.concatenate([[0], np.cumsum(lengths)])
    first = np.where(np.arange(5) > 0, lengths[:, :1], 0).reshape(-1)  # position of each node's first token
    seen = np.arange(cu_nodes[-1]) - np.repeat(cu_nodes[:-1], lengths.reshape(-1)) + np.repeat(first, lengths.reshape(-1)) + 1
    split_CL = split_tokens(cu_nodes, 4, 1)
    work = [seen[tokens[tokens >= 0]].sum() for tokens in split_CL]
    assert max(work) < 1.01 * min(work)


def test_positions_lie_with_their_tokens() -> None:
    positions_CO = split_positions(np.array([0, 1, 1, 0, 2, 1, 1]), 4)
    assert positions_CO.tolist() == [[0, 3, -1, -1], [1, 2, 5, 6], [4, -1, -1, -1], [-1, -1, -1, -1]]


SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 8, "head_dim": 8, "intermediate_size": 48}
QWEN3 = Architecture.from_hf(qwen3_hf_config(ModelConfig(**SIZES, num_key_value_heads=4), 64))
MOONLIGHT = Architecture.from_hf(hf_model("moonlight").config.to_dict())


@pytest.mark.parametrize(
    ("architecture", "tp", "cp", "expected"),
    [
        (QWEN3, 1, 1, False),  # nothing to exchange
        (QWEN3, 1, 2, True),
        (QWEN3, 1, 4, True),
        (QWEN3, 2, 2, True),
        (QWEN3, 1, 3, False),  # 4 heads on 3 ranks
        (QWEN3, 2, 4, False),  # more ranks than heads
        (QWEN3, 8, 1, False),
        (MOONLIGHT, 2, 2, True),  # latent attention: a key for each of its 4 query heads
        (MOONLIGHT, 2, 4, False),
    ],
)
def test_ulysses_is_taken_while_every_rank_has_its_own_key_value_heads(
    architecture: Architecture, tp: int, cp: int, expected: bool
) -> None:
    mesh = MeshConfig(tp=tp, cp=cp)
    assert splits_heads("auto", mesh, architecture) == expected
    assert not splits_heads("all_gather", mesh, architecture)
    if expected:
        assert splits_heads("ulysses", mesh, architecture)
    elif cp > 1:
        with pytest.raises(ValueError, match=rf"mesh.tp={tp} x mesh.cp={cp} \({tp * cp}\) needs a multiple .* has 4; set .*'all_gather'"):
            splits_heads("ulysses", mesh, architecture)


def exchanged(tensors: Sequence[torch.Tensor], order_S: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What this rank gets of tensors [ranks, L, heads, width], and what comes back to it."""
    rank, num_local = dist.get_rank(), tensors[0].shape[1]
    group: Any = dist.group.WORLD
    scattered = scatter_heads([x[rank] for x in tensors], order_S, group)
    return [x.clone() for x in scattered], [gather_heads(x, order_S, num_local, group) for x in scattered]


@pytest.mark.distributed
def test_heads_are_exchanged_for_tokens_and_back() -> None:
    split_CL = split_tokens(np.array([0, 5, 6, 13]), 2, 4)
    order_S = torch.from_numpy(token_order(split_CL, 13))
    num_local = split_CL.shape[1]
    tensors = [torch.randn(2, num_local, heads, width) for heads, width in ((4, 3), (2, 3), (2, 5))]
    for rank, (scattered, back) in enumerate(run_ranks(exchanged, 2, tensors, order_S)):
        for x, mine, again in zip(tensors, scattered, back, strict=True):
            num_heads = x.shape[2] // 2
            assert torch.equal(mine, x.flatten(0, 1)[order_S][:, rank * num_heads : (rank + 1) * num_heads])
            is_token_L = torch.from_numpy(split_CL[rank] >= 0)
            assert torch.equal(again[is_token_L], x[rank][is_token_L])
            assert not again[~is_token_L].any()


Found = dict[str, Any]


def found_with(hf_config: Mapping[str, Any], mesh: MeshConfig, attention: Sequence[Any], wanted: Found | None) -> list[Found]:
    """For each way of attention: log-probs of all rows, and their gradients, whole without `wanted`, else as squared errors of parts."""
    built = build_mesh(mesh, hf_config)
    rows = training_rows(LENGTHS)
    microbatches = [build_microbatch(rows[:4]), build_microbatch(rows[4:])]
    found = []
    for way in attention:
        config = TrainerConfig(distributed_optimizer=False, cp_attention=way)
        trainer = MegatronTrainer(hf_config, built, config, LossConfig(), TEMPERATURE, seed=1)
        assert trainer._splits_heads == (way == "ulysses")
        logprobs = torch.cat(trainer.logprobs(microbatches))
        trainer.accumulate_gradients(microbatches, [losses.Supervised(normaliser=10.0)] * 2)
        names = NameMap(hf_config)
        views = [view for shard in local_parameters(trainer, gradients=True) for view in names.views(shard)]
        if wanted is None:
            gradients = {}
            for view in views:
                gradients[view.name] = torch.empty(view.region_shape)
                view.copy_to(gradients[view.name])
        else:
            gradients = squared_errors(trainer, wanted["gradients"], gradients=True)
        found.append({"logprobs": logprobs, "gradients": gradients})
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", [MeshConfig(cp=2), MeshConfig(cp=4), MeshConfig(tp=2, cp=2, sequence_parallel=True)], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "moonlight"])
def test_both_ways_of_attention_come_to_the_same_as_one_rank(family: str, mesh: MeshConfig) -> None:
    hf_config = qwen3_hf_config(ModelConfig(**SIZES, num_key_value_heads=4), 64)
    if family == "moonlight":
        hf_config = hf_model(family, num_hidden_layers=2).config.to_dict()
    ((wanted,),) = run_ranks(found_with, 1, hf_config, MeshConfig(), ["auto"], None)
    of_ranks = run_ranks(found_with, mesh.tp * mesh.cp, hf_config, mesh, ["ulysses", "all_gather"], wanted)
    for way in (0, 1):
        errors = relative_errors([found[way]["gradients"] for found in of_ranks], wanted["gradients"])
        assert max(errors.values()) <= TOLERANCE, errors
        for found in of_ranks:
            assert (found[way]["logprobs"] - wanted["logprobs"]).abs().max() <= TOLERANCE
