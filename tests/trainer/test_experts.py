"""Experts computed together, and rows on their way to them, against Megatron's own modules and functions on the same input."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

import tandem.engine.trainer  # noqa: F401  before megatron
from tandem.engine.config import LossConfig, MeshConfig, TrainerConfig
from tandem.engine.trainer import dispatch
from tandem.engine.trainer.experts import Experts
from tandem.engine.trainer.megatron import MegatronTrainer
from tandem.engine.trainer.mesh import build_mesh
from tandem.kernels import backend
from tests.kernels.interpreter import DEVICE
from tests.ranks import run_ranks
from tests.trainer.test_state import hf_config

BACKENDS: list[Any] = ["reference", "triton"]
Gradients = list[torch.Tensor]


def layer_of(mesh: MeshConfig) -> Any:
    """An expert layer of a small random model."""
    model = hf_config(num_experts=4, num_experts_per_tok=2)
    trainer = MegatronTrainer(model, build_mesh(mesh, model), TrainerConfig(), LossConfig(), 1.0, 3)
    layers: Any = trainer._chunks[0].decoder.layers
    return layers[0].mlp


def together_and_in_turn(sizes: list[int], choice: Any) -> tuple[Gradients, Gradients, int]:
    """Output and all gradients of the same experts by our forward pass and by Megatron's, and how often ours called a module."""
    experts = layer_of(MeshConfig()).experts
    assert type(experts) is Experts
    calls: list[Any] = []
    torch.manual_seed(0)
    rows = torch.randn(sum(sizes), experts.config.hidden_size, device=DEVICE).requires_grad_()
    weights, counts = torch.rand(sum(sizes), device=DEVICE).requires_grad_(), torch.tensor(sizes)
    leaves = [rows, weights, *experts.parameters()]
    found = []
    for forward in (Experts.forward, SequentialMLP.forward):
        hooks = [module.register_forward_hook(lambda *_: calls.append(_)) for module in experts.modules()] if not found else []
        with backend.chosen(choice):
            out, bias = forward(experts, rows, counts, weights)
            grads = torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True)
        assert bias is None
        found.append([tensor.detach().cpu() for tensor in (out, *grads)])
        for hook in hooks:
            hook.remove()
    return found[0], found[1], len(calls)


@pytest.mark.distributed
@pytest.mark.parametrize("choice", BACKENDS)
@pytest.mark.parametrize("sizes", [[5, 0, 11, 2], [0, 0, 9, 0], [0, 0, 0, 0]], ids=str)
def test_experts_together_are_those_in_turn(sizes: list[int], choice: Any) -> None:
    ((together, in_turn, num_calls),) = run_ranks(together_and_in_turn, 1, sizes, choice)
    assert num_calls == 0, "a module of one expert was called"
    assert len(together) == 3 + 2 * len(sizes)
    for ours, theirs in zip(together, in_turn, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def through_a_layer(mesh: MeshConfig) -> tuple[str, bool, list[Gradients]]:
    """The dispatcher's type, whether it uses our kernels, and output and gradients of a layer with them and with Megatron's functions."""
    layer = layer_of(mesh)
    kind, fused = type(layer.token_dispatcher).__name__, layer.config.moe_permute_fusion
    torch.manual_seed(1 + torch.distributed.get_rank())
    tokens = torch.randn(7, 1, layer.config.hidden_size, device=DEVICE).requires_grad_()
    scores = torch.rand(7, layer.config.num_moe_experts, device=DEVICE).requires_grad_()
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(2).indices, True)
    found = []
    dispatchers = [layer.token_dispatcher]
    groups, local = moe_utils.get_default_pg_collection(), layer.local_expert_indices
    layer.config.moe_permute_fusion = False
    dispatchers.append(MoEAlltoAllTokenDispatcher(len(local), local, config=layer.config, pg_collection=groups))
    for dispatcher, is_ours in zip(dispatchers, (True, False), strict=True):
        layer.token_dispatcher, layer.config.moe_permute_fusion = dispatcher, is_ours
        rows, weights = dispatcher.dispatch_preprocess(tokens, chosen, scores * chosen)
        out, _ = layer.routed_experts_compute(*dispatcher.token_dispatch(rows, weights))
        out = layer.postprocess(layer.combine(out), None)
        grads = torch.autograd.grad(out.square().sum(), [tokens, scores, *layer.experts.parameters()])
        found.append([tensor.detach().cpu() for tensor in (out, *grads)])
    return kind, fused, found


@pytest.mark.distributed
@pytest.mark.parametrize(("num_ranks", "kind"), [(1, "LocalDispatcher"), (2, "MoEAlltoAllTokenDispatcher")])
def test_a_layer_gives_what_megatrons_own_permutation_gives(num_ranks: int, kind: str) -> None:
    for found_kind, fused, (ours, theirs) in run_ranks(through_a_layer, num_ranks, MeshConfig(ep=num_ranks)):
        assert found_kind == kind
        assert fused
        for own, other in zip(ours, theirs, strict=True):
            assert own.shape == other.shape
            assert (own - other).norm() <= 2e-6 * other.norm()


def assert_same(ours: torch.Tensor | None, plain: torch.Tensor | None) -> None:
    assert (ours is None) == (plain is None)
    assert ours is None or plain is None or torch.equal(ours, plain)


def test_our_kernels_stand_in_for_transformer_engines() -> None:
    """Megatron's functions with and without fusion: the same rows, in the same order."""
    dispatch.install()
    torch.manual_seed(4)
    tokens, probs = torch.randn(9, 6, device=DEVICE), torch.rand(9, 5, device=DEVICE)
    chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, probs.topk(2).indices, True)
    for of_probs, part, num_rows in ((probs, chosen, 18), (None, chosen[:, :2], int(chosen[:, :2].sum()))):
        ours, plain = (moe_utils.permute(tokens, part, probs=of_probs, num_out_tokens=num_rows, fused=fused) for fused in (True, False))
        assert torch.equal(ours[0], plain[0])
        assert_same(ours[1], plain[1])
        back, plain_back = (
            moe_utils.unpermute(rows, order, restore_shape=tokens.shape, routing_map=part, fused=fused)
            for (rows, _, order), fused in ((ours, True), (plain, False))
        )
        assert torch.allclose(back, plain_back, rtol=1e-6)
    lengths, order = torch.tensor([3, 0, 5, 1]), torch.tensor([2, 0, 1, 3])
    for of_probs in (probs[:, 0], None):
        ours, plain = (moe_utils.sort_chunks_by_idxs(tokens, lengths, order, probs=of_probs, fused=fused) for fused in (True, False))
        assert torch.equal(ours[0], plain[0])
        assert_same(ours[1], plain[1])
