"""A microbatch as one rank computes it: its tokens, rotary angles and mask, on the device.

Shapes: S tokens of the microbatch and T positions (S, but for shared prompts), L tokens of this rank (a few of them padding at the end),
D rotated width of a head, M trained targets that this rank's tokens predict, R sequences, Q nodes (sequences, but for shared prompts);
for routers: X sparse layers, K experts per token.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from tandem.engine.algo.pack import FILLER_ROW_ID, Microbatch
from tandem.engine.trainer.context_parallel import split_positions, split_tokens, token_order
from tandem.engine.trainer.mesh import Mesh
from tandem.kernels.attention import AttentionPlan, plan_attention
from tandem.kernels.permute import Plan

D = TypeVar("D")


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """What a pass asks of the routers of a model with X sparse layers."""

    num_sparse_layers: int  # X
    num_experts: int
    num_experts_per_tok: int  # K
    replay: bool = False  # take the experts that the rollout chose, where they are recorded
    balance_weight: float = 0.0  # of each sequence's balance loss


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What the routers need of this rank's tokens."""

    node_L: torch.Tensor  # int64, 0 … Q-1; Q for padding and fillers
    num_nodes: int  # Q
    balance_weights_R: torch.Tensor  # fp32, the weight of a sequence's balance loss over its squared length; 0 for a filler
    nodes_of_row_2R: torch.Tensor | None  # int64, a sequence's prompt and response; None: each sequence is a node
    has_balance_loss: bool
    recorded_LXK: torch.Tensor | None  # int64, the experts to take, -1 where the router chooses

    def part(self, rank: int, size: int) -> "Routing":
        """What one of `size` ranks needs that share these tokens in equal parts (sequence parallelism)."""
        recorded_LXK = self.recorded_LXK.chunk(size)[rank] if self.recorded_LXK is not None else None
        return replace(self, node_L=self.node_L.chunk(size)[rank], recorded_LXK=recorded_LXK)

    def balance_factors(self, counts_QE: torch.Tensor) -> torch.Tensor:
        """[Q+1, E]: what a token's scores are multiplied by, given the tokens of each node that count for each expert.

        A sequence's loss is its counts times its scores, times its weight. A shared prompt's token is one of several sequences.
        """
        weights_R1, nodes_2R = self.balance_weights_R[:, None], self.nodes_of_row_2R
        factors_QE = torch.zeros_like(counts_QE)  # the last row is padding's
        if nodes_2R is None:
            factors_QE[:-1] = counts_QE[:-1] * weights_R1
        else:
            factors_RE = (counts_QE[nodes_2R[0]] + counts_QE[nodes_2R[1]]) * weights_R1
            for node_R in nodes_2R:
                factors_QE.index_put_((node_R,), factors_RE, accumulate=True)
        return factors_QE


@dataclass(frozen=True, kw_only=True)
class LocalBatch:
    """What the layers and the loss need. Megatron hands it through to them as its `packed_seq_params`."""

    qkv_format = "sbhd"  # what Megatron reads of packed_seq_params: activations stay [L, 1, H]
    whole: Microbatch  # all tokens, on the device
    tokens_L: torch.Tensor  # int64
    cos_L1D: torch.Tensor  # fp32 [L, 1, D/2], times the scaling of the model's rotary embedding
    sin_L1D: torch.Tensor
    splits_heads: bool  # Ulysses: in attention this rank has a part of the heads of all tokens
    plan: AttentionPlan  # of all queries with Ulysses, otherwise of this rank's against all S keys
    order_S: torch.Tensor | None  # int64, place of each token in the ranks' parts laid end to end; None if that is its own index
    order_T: torch.Tensor | None  # the same of each position in the ranks' outputs
    num_outputs: int  # positions of this rank, a few of them padding at the end
    output_M: torch.Tensor  # int64, places of the trained targets among them
    source_M: torch.Tensor  # int64, the tokens of this rank that predict them
    copies: Plan | None  # where one token predicts several targets (shared prompts): how its copies' gradients are added up
    position_M: torch.Tensor  # int64, which of the T positions they are
    targets_M: torch.Tensor  # int64
    coefficients_M: torch.Tensor | None = None  # fp32, of their log-probs in the loss, where these are known beforehand
    routing: Routing | None  # None: the model has no experts

    @property
    def num_local(self) -> int:
        return self.tokens_L.shape[0]


def to_device(data: D, device: torch.device) -> D:
    """A microbatch, or a dataclass in it, with its tensors on the device."""
    values = {field.name: getattr(data, field.name) for field in fields(data)}  # pyright: ignore[reportArgumentType]
    moved = {name: to_device(x, device) if is_dataclass(x) else x.to(device) for name, x in values.items() if x is not None}
    return replace(data, **moved)  # pyright: ignore[reportArgumentType, reportCallIssue]


def num_local_tokens(microbatch: Microbatch, mesh: Mesh) -> int:
    """L of a microbatch without further padding."""
    return split_tokens(_offsets(microbatch), mesh.cp_size, mesh.token_multiple).shape[1]


def _offsets(microbatch: Microbatch) -> np.ndarray:
    return microbatch.cu_nodes.cpu().numpy().astype(np.int64)


def localise(
    microbatch: Microbatch,
    mesh: Mesh,
    inverse_frequencies_D: torch.Tensor,
    min_tokens: int = 0,
    *,
    rope_scaling: float = 1.0,
    routing: RoutingOptions | None = None,
    splits_heads: bool = False,
) -> LocalBatch:
    """This rank's part of a microbatch.

    Args:
        inverse_frequencies_D: [D/2] fp32 on the device; the angle of a token is its position times these.
        min_tokens: pad the rank's part to at least this many tokens.
        rope_scaling: factor of the angles' cosines and sines.
        routing: None for a model without experts.
        splits_heads: attend by Ulysses; needs several context-parallel ranks.
    Raises: ValueError if the experts to replay are not of this model.
    """
    device = inverse_frequencies_D.device
    num_tokens = microbatch.num_tokens
    split_CL = split_tokens(_offsets(microbatch), mesh.cp_size, mesh.token_multiple, min_tokens)
    own_L = split_CL[mesh.cp_rank]
    whole = to_device(microbatch, device)
    visible_end_S = microbatch.visible_end_S
    if mesh.cp_size == 1 and len(own_L) == num_tokens:
        own, order_S, plan = slice(None), None, plan_attention(visible_end_S, device=device)
    else:
        own = torch.from_numpy(np.maximum(own_L, 0)).to(device)
        order_S = torch.from_numpy(token_order(split_CL, num_tokens)).to(device)
        plan = plan_attention(visible_end_S, None if splits_heads else torch.from_numpy(own_L), device=device)
    angles_LD = whole.positions_S[own, None].float() * inverse_frequencies_D
    return LocalBatch(
        whole=whole,
        tokens_L=whole.tokens_S[own],
        cos_L1D=angles_LD.cos()[:, None] * rope_scaling,
        sin_L1D=angles_LD.sin()[:, None] * rope_scaling,
        splits_heads=splits_heads,
        plan=plan,
        order_S=order_S,
        **_outputs(microbatch, split_CL, order_S, mesh.cp_rank, device),
        routing=_routing(whole, own_L, routing) if routing is not None else None,
    )


def _outputs(microbatch: Microbatch, split_CL: np.ndarray, order_S: torch.Tensor | None, cp_rank: int, device: torch.device) -> Any:
    """The fields of a LocalBatch about what this rank predicts."""
    loss_mask_T, targets_T = microbatch.loss_mask_T.cpu().numpy(), microbatch.targets_T.cpu().numpy()
    copies = None
    if microbatch.shared is None:  # a position is a token
        own_L = split_CL[cp_rank]
        order_T, num_outputs = order_S, len(own_L)
        output_M = source_M = np.flatnonzero(loss_mask_T[own_L] & (own_L >= 0))
        position_M = own_L[output_M]
    else:
        place_T = token_order(split_CL, microbatch.num_tokens)[microbatch.shared.token_T.cpu().numpy()]
        positions_CO = split_positions(place_T // split_CL.shape[1], len(split_CL))
        own_O = positions_CO[cp_rank]
        order_T = torch.from_numpy(token_order(positions_CO, len(place_T))).to(device) if len(split_CL) > 1 else None
        num_outputs = len(own_O)
        output_M = np.flatnonzero(loss_mask_T[own_O] & (own_O >= 0))
        source_M = place_T[own_O[output_M]] % split_CL.shape[1]
        position_M = own_O[output_M]
        copies = _copies(source_M, split_CL.shape[1], device)

    def on_device(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).to(device)

    return {
        "order_T": order_T,
        "num_outputs": num_outputs,
        "output_M": on_device(output_M),
        "source_M": on_device(source_M),
        "copies": copies,
        "position_M": on_device(position_M),
        "targets_M": on_device(targets_T[position_M]),
    }


def _copies(source_M: np.ndarray, num_tokens: int, device: torch.device) -> Plan:
    """For `permute`, which adds up the gradients of a token's copies in the order of the targets, the same in every run."""
    by_source_M = np.argsort(source_M, kind="stable")
    counts_L = np.bincount(source_M, minlength=num_tokens)
    nth_M = np.arange(len(source_M)) - np.repeat(np.cumsum(counts_L) - counts_L, counts_L)
    # A power of two, so that a kernel is compiled for few numbers of copies.
    place_LK = np.full((num_tokens, 1 << int(counts_L.max() - 1).bit_length() if len(source_M) else 1), -1, dtype=np.int32)
    place_LK[source_M[by_source_M], nth_M] = by_source_M
    tensors = (source_M.astype(np.int32), place_LK, np.array([0, len(source_M)], dtype=np.int32))
    return Plan(*(torch.from_numpy(x).to(device) for x in tensors))


def _routing(whole: Microbatch, own_L: np.ndarray, options: RoutingOptions) -> Routing:
    device, shared = whole.tokens_S.device, whole.shared
    node_lengths_Q = whole.cu_nodes.diff()
    num_nodes = len(node_lengths_Q)
    is_filler_R = whole.row_ids_R == FILLER_ROW_ID  # such a microbatch has no other row
    node_Q = torch.arange(num_nodes, device=device)
    if shared is None:
        node_Q = node_Q.masked_fill(is_filler_R, num_nodes)
    # One entry more, at which padding (-1) looks.
    node_S = torch.cat([node_Q.repeat_interleave(node_lengths_Q), node_Q.new_full((1,), num_nodes)])
    own = torch.from_numpy(own_L).to(device)
    return Routing(
        node_L=node_S[own],
        num_nodes=num_nodes,
        balance_weights_R=torch.where(is_filler_R, 0.0, options.balance_weight / whole.cu_seqlens.diff().double() ** 2).float(),
        nodes_of_row_2R=torch.stack([shared.prompt_node_R, shared.response_node_R]) if shared is not None else None,
        has_balance_loss=options.balance_weight > 0,
        recorded_LXK=_recorded(whole, options)[own] if options.replay and whole.routed_experts_SXK is not None else None,
    )


def _recorded(whole: Microbatch, options: RoutingOptions) -> torch.Tensor:
    """[S+1, X, K] int64, the last row (for padding) -1."""
    recorded_SXK = whole.routed_experts_SXK
    assert recorded_SXK is not None
    shape = (options.num_sparse_layers, options.num_experts_per_tok)
    if recorded_SXK.shape[1:] != shape or (len(recorded_SXK) and int(recorded_SXK.max()) >= options.num_experts):
        raise ValueError(
            f"rows {whole.row_ids_R[:8].tolist()} recorded {tuple(recorded_SXK.shape[1:])} experts (sparse layers, experts per token) "
            f"up to number {int(recorded_SXK.max())}, but the model has {shape} of {options.num_experts}; "
            "set trainer.replay_routing=False, or generate with this model"
        )
    return torch.cat([recorded_SXK.long(), recorded_SXK.new_full((1, *shape), -1).long()])
