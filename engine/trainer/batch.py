"""A microbatch as one rank computes it: its tokens, rotary angles and mask, on the device.

Shapes: T tokens of the microbatch, L tokens of this rank (a few of them padding at the end), D head width, M trained tokens.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from tandem.engine.algo.pack import Microbatch
from tandem.engine.trainer.context_parallel import split_tokens, token_order
from tandem.engine.trainer.mesh import Mesh
from tandem.kernels.attention import AttentionPlan, plan_attention


@dataclass(frozen=True, kw_only=True)
class LocalBatch:
    """What the layers and the loss need. Megatron hands it through to them as its `packed_seq_params`."""

    qkv_format = "sbhd"  # what Megatron reads of packed_seq_params: activations stay [L, 1, H]
    whole: Microbatch  # all tokens, on the device
    tokens_L: torch.Tensor  # int64
    cos_L1D: torch.Tensor  # fp32 [L, 1, D/2]
    sin_L1D: torch.Tensor
    plan: AttentionPlan  # the rank's queries against all T keys
    order_T: torch.Tensor | None  # int64, place of each token in the ranks' parts laid end to end; None if that is its own index
    trained_M: torch.Tensor  # int64, rows of this rank whose targets are trained
    targets_M: torch.Tensor  # int64

    @property
    def num_local(self) -> int:
        return self.tokens_L.shape[0]


def to_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    """The microbatch with its tensors on the device."""
    return Microbatch(**{field.name: getattr(microbatch, field.name).to(device) for field in fields(microbatch)})


def num_local_tokens(microbatch: Microbatch, mesh: Mesh) -> int:
    """L of a microbatch without further padding."""
    return split_tokens(_offsets(microbatch), mesh.cp_size, mesh.token_multiple).shape[1]


def _offsets(microbatch: Microbatch) -> np.ndarray:
    return microbatch.cu_seqlens.cpu().numpy().astype(np.int64)


def localise(microbatch: Microbatch, mesh: Mesh, inverse_frequencies_D: torch.Tensor, min_tokens: int = 0) -> LocalBatch:
    """This rank's part of a microbatch.

    Args:
        inverse_frequencies_D: [D/2] fp32 on the device; the angle of a token is its position times these.
        min_tokens: pad the rank's part to at least this many tokens.
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
        cos_L1D=angles_LD.cos()[:, None],
        sin_L1D=angles_LD.sin()[:, None],
        plan=plan,
        order_T=order_T,
        trained_M=trained_M,
        targets_M=whole.targets_T[own][trained_M],
    )
