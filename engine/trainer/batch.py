"""A microbatch as one rank computes it: its tokens, rotary angles and mask, on the device.

Shapes: T tokens of the microbatch, L tokens of this rank (a few of them padding at the end), D rotated width of a head, M trained tokens,
R sequences; for routers: X sparse layers, K experts per token.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from tandem.engine.algo.pack import FILLER_ROW_ID, Microbatch
from tandem.engine.trainer.context_parallel import split_tokens, token_order
from tandem.engine.trainer.mesh import Mesh
from tandem.kernels.attention import AttentionPlan, plan_attention


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

    sequence_L: torch.Tensor  # int64, 0 … R-1; R for padding and fillers
    balance_weights_R: torch.Tensor  # fp32 [R+1], the weight of a sequence's balance loss over its squared length; 0 at R
    has_balance_loss: bool
    recorded_LXK: torch.Tensor | None  # int64, the experts to take, -1 where the router chooses

    def part(self, rank: int, size: int) -> "Routing":
        """What one of `size` ranks needs that share these tokens in equal parts (sequence parallelism)."""
        recorded_LXK = self.recorded_LXK.chunk(size)[rank] if self.recorded_LXK is not None else None
        return replace(self, sequence_L=self.sequence_L.chunk(size)[rank], recorded_LXK=recorded_LXK)


@dataclass(frozen=True, kw_only=True)
class LocalBatch:
    """What the layers and the loss need. Megatron hands it through to them as its `packed_seq_params`."""

    qkv_format = "sbhd"  # what Megatron reads of packed_seq_params: activations stay [L, 1, H]
    whole: Microbatch  # all tokens, on the device
    tokens_L: torch.Tensor  # int64
    cos_L1D: torch.Tensor  # fp32 [L, 1, D/2], times the scaling of the model's rotary embedding
    sin_L1D: torch.Tensor
    plan: AttentionPlan  # the rank's queries against all T keys
    order_T: torch.Tensor | None  # int64, place of each token in the ranks' parts laid end to end; None if that is its own index
    trained_M: torch.Tensor  # int64, rows of this rank whose targets are trained
    targets_M: torch.Tensor  # int64
    routing: Routing | None  # None: the model has no experts

    @property
    def num_local(self) -> int:
        return self.tokens_L.shape[0]


def to_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    """The microbatch with its tensors on the device."""
    values = {field.name: getattr(microbatch, field.name) for field in fields(microbatch)}
    return replace(microbatch, **{name: value.to(device) for name, value in values.items() if value is not None})


def num_local_tokens(microbatch: Microbatch, mesh: Mesh) -> int:
    """L of a microbatch without further padding."""
    return split_tokens(_offsets(microbatch), mesh.cp_size, mesh.token_multiple).shape[1]


def _offsets(microbatch: Microbatch) -> np.ndarray:
    return microbatch.cu_seqlens.cpu().numpy().astype(np.int64)


def localise(
    microbatch: Microbatch,
    mesh: Mesh,
    inverse_frequencies_D: torch.Tensor,
    min_tokens: int = 0,
    *,
    rope_scaling: float = 1.0,
    routing: RoutingOptions | None = None,
) -> LocalBatch:
    """This rank's part of a microbatch.

    Args:
        inverse_frequencies_D: [D/2] fp32 on the device; the angle of a token is its position times these.
        min_tokens: pad the rank's part to at least this many tokens.
        rope_scaling: factor of the angles' cosines and sines.
        routing: None for a model without experts.
    Raises: ValueError if the experts to replay are not of this model.
    """
    device = inverse_frequencies_D.device
    num_tokens = microbatch.num_tokens
    split_CL = split_tokens(_offsets(microbatch), mesh.cp_size, mesh.token_multiple, min_tokens)
    own_L = split_CL[mesh.cp_rank]
    whole = to_device(microbatch, device)
    if mesh.cp_size == 1 and len(own_L) == num_tokens:
        own, order_T, plan = slice(None), None, plan_attention(whole.visible_end_T)
    else:
        own = torch.from_numpy(np.maximum(own_L, 0)).to(device)
        order_T = torch.from_numpy(token_order(split_CL, num_tokens)).to(device)
        plan = plan_attention(whole.visible_end_T, torch.from_numpy(own_L))
    angles_LD = whole.positions_T[own, None].float() * inverse_frequencies_D
    is_trained_L = whole.loss_mask_T[own]
    if order_T is not None:
        is_trained_L = is_trained_L & torch.from_numpy(own_L >= 0).to(device)
    trained_M = torch.nonzero(is_trained_L)[:, 0]
    return LocalBatch(
        whole=whole,
        tokens_L=whole.tokens_T[own],
        cos_L1D=angles_LD.cos()[:, None] * rope_scaling,
        sin_L1D=angles_LD.sin()[:, None] * rope_scaling,
        plan=plan,
        order_T=order_T,
        trained_M=trained_M,
        targets_M=whole.targets_T[own][trained_M],
        routing=_routing(whole, own_L, routing) if routing is not None else None,
    )


def _routing(whole: Microbatch, own_L: np.ndarray, options: RoutingOptions) -> Routing:
    device, num_sequences = whole.tokens_T.device, whole.num_rows
    lengths_R = whole.cu_seqlens.diff()
    is_filler_R = whole.row_ids_R == FILLER_ROW_ID
    places_R = torch.arange(num_sequences, device=device).masked_fill(is_filler_R, num_sequences)
    # One entry more, at which padding (-1) looks.
    sequence_T = torch.cat([places_R.repeat_interleave(lengths_R), places_R.new_full((1,), num_sequences)])
    weights_R = torch.where(is_filler_R, 0.0, options.balance_weight / lengths_R.double() ** 2).float()
    own = torch.from_numpy(own_L).to(device)
    return Routing(
        sequence_L=sequence_T[own],
        balance_weights_R=torch.cat([weights_R, weights_R.new_zeros(1)]),
        has_balance_loss=options.balance_weight > 0,
        recorded_LXK=_recorded(whole, options)[own] if options.replay and whole.routed_experts_TXK is not None else None,
    )


def _recorded(whole: Microbatch, options: RoutingOptions) -> torch.Tensor:
    """[T+1, X, K] int64, the last row (for padding) -1."""
    recorded_TXK = whole.routed_experts_TXK
    assert recorded_TXK is not None
    shape = (options.num_sparse_layers, options.num_experts_per_tok)
    if recorded_TXK.shape[1:] != shape or (len(recorded_TXK) and int(recorded_TXK.max()) >= options.num_experts):
        raise ValueError(
            f"rows {whole.row_ids_R[:8].tolist()} recorded {tuple(recorded_TXK.shape[1:])} experts (sparse layers, experts per token) "
            f"up to number {int(recorded_TXK.max())}, but the model has {shape} of {options.num_experts}; "
            "set trainer.replay_routing=False, or generate with this model"
        )
    return torch.cat([recorded_TXK.long(), recorded_TXK.new_full((1, *shape), -1).long()])
