"""Tokens on their way to the experts and back, on our kernels.

A rank that holds all experts needs no messages and nothing that its device would have to be asked for (`LocalDispatcher`). With several
ranks Megatron's dispatchers send the rows, and `install` puts our kernels where they would call Transformer Engine's (their option
`moe_permute_fusion`): without them each layer waits for the counts once more and adds rows up in an order that differs from run to run.

Shapes: S tokens of this rank, E experts, M rows, H hidden width.
"""

from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

from tandem.kernels.permute import Plan, chunk_plan, gather_weights, permute, route, unpermute


class LocalDispatcher(MoETokenDispatcher):
    """For a rank whose experts are all of the layer's, each of them whole."""

    plan: Plan
    shape: torch.Size

    def dispatch_preprocess(
        self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.shape = tokens.shape
        tokens_SH, num_chosen = tokens.reshape(-1, tokens.shape[-1]), self.config.moe_router_topk
        self.plan = route(routing_map, num_rows=len(tokens_SH) * num_chosen, max_per_token=num_chosen)
        return tokens_SH, probs

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return permute(hidden_states, self.plan), self.plan.offsets_E1.diff(), gather_weights(probs, self.plan)

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return unpermute(hidden_states, self.plan)

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.view(self.shape)


def keep_local(layer: MoELayer) -> None:
    """Take the messages out of a layer whose experts are all on this rank."""
    dispatcher: Any = layer.token_dispatcher
    if dispatcher.tp_ep_group.size() == 1:
        layer.token_dispatcher = LocalDispatcher(layer.config, moe_utils.get_default_pg_collection())


def install() -> None:
    """Put our kernels into Megatron's dispatchers, whether Transformer Engine is there or not. Calling it again changes nothing."""
    utils: Any = moe_utils
    utils.fused_permute, utils.fused_permute_with_probs, utils.fused_unpermute = _permute, _permute_with_probs, _unpermute
    utils.fused_sort_chunks_by_index, utils.fused_sort_chunks_by_index_with_probs = _sort_chunks, _sort_chunks_with_probs
    if not utils.HAVE_TE:
        for name in ("fused_moe_aux_loss", "fused_compute_score_for_moe_aux_loss", "fused_topk_with_score_function"):
            setattr(utils, name, None)  # what the failed import left undefined
        utils.HAVE_TE = True  # read only to see whether these functions can be called


def _permute(tokens: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int | torch.Tensor) -> tuple[torch.Tensor, Plan]:
    """Of all ranks' tokens those that are sent to this rank's experts; one may be sent to all of them."""
    plan = route(routing_map, num_rows=int(num_out_tokens), max_per_token=routing_map.shape[1])
    return permute(tokens, plan), plan


def _permute_with_probs(
    tokens: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor, num_out_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, Plan]:
    """Of this rank's tokens, each of which is sent to the same number of experts."""
    plan = route(routing_map, num_rows=num_out_tokens, max_per_token=num_out_tokens // max(1, len(tokens)))
    return permute(tokens, plan), gather_weights(probs, plan), plan


def _unpermute(permuted_tokens: torch.Tensor, plan: Plan, merging_probs: None, restore_shape: torch.Size) -> torch.Tensor:
    assert merging_probs is None, "the experts apply the router's weights"
    return unpermute(permuted_tokens, plan)


def _sort_chunks(rows: torch.Tensor, split_sizes: torch.Tensor, sorted_idxs: torch.Tensor) -> torch.Tensor:
    return permute(rows, chunk_plan(split_sizes, sorted_idxs, num_rows=len(rows)))


def _sort_chunks_with_probs(
    rows: torch.Tensor, probs: torch.Tensor, split_sizes: torch.Tensor, sorted_idxs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = chunk_plan(split_sizes, sorted_idxs, num_rows=len(rows))
    return permute(rows, plan), probs.gather(0, plan.source_M.long())
