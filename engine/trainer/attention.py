"""Attention within each packed sequence, over all context-parallel ranks, in the place of Megatron's core attention.

Shapes: L tokens of this rank, N query heads, G key/value heads, D head width.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from tandem.engine.architecture import Architecture
from tandem.engine.trainer.batch import LocalBatch
from tandem.engine.trainer.context_parallel import gather_heads, gather_keys, scatter_heads
from tandem.kernels.attention import packed_attention
from tandem.kernels.rope import rope


def attend(
    query_LND: torch.Tensor, key_LGD: torch.Tensor, value_LGD: torch.Tensor, batch: LocalBatch, cp_group: Any, softmax_scale: float
) -> torch.Tensor:
    """[L, 1, N * width of a value]. Queries and keys are rotated already."""
    query, key, value, order_S = query_LND, key_LGD, value_LGD, batch.order_S
    if batch.splits_heads:
        assert order_S is not None
        query, key, value = scatter_heads((query, key, value), order_S, cp_group)
    elif order_S is not None and cp_group.size() > 1:
        key, value = (gather_keys(x, order_S, cp_group) for x in (key, value))
    elif order_S is not None:  # padding alone
        key, value = (x.index_select(0, order_S) for x in (key, value))
    out = packed_attention(query, key, value, batch.whole.visible_end_S, scale=softmax_scale, plan=batch.plan)
    if batch.splits_heads:
        assert order_S is not None
        out = gather_heads(out, order_S, batch.num_local, cp_group)
    return out.reshape(out.shape[0], 1, -1)


class PackedCoreAttention(torch.nn.Module):
    """Rotary embedding by position, then `attend`."""

    def __init__(self, config: TransformerConfig, pg_collection: Any, architecture: Architecture, **_: Any) -> None:
        super().__init__()
        self.cp_group, self.softmax_scale = pg_collection.cp, architecture.softmax_scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, *, packed_seq_params: LocalBatch, **_: Any
    ) -> torch.Tensor:
        """query [L, 1, N, D], key and value [L, 1, G, D] to [L, 1, N * D]."""
        batch = packed_seq_params
        query, key = (rope(x[:, 0], batch.cos_L1D, batch.sin_L1D) for x in (query, key))
        return attend(query, key, value[:, 0], batch, self.cp_group, self.softmax_scale)
