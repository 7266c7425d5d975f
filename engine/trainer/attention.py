"""Attention within each packed sequence, over all context-parallel ranks, in the place of Megatron's core attention.

Shapes: L tokens of this rank, N query heads, G key/value heads, D head width.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from tandem.engine.architecture import Architecture
from tandem.engine.trainer.batch import LocalBatch
from tandem.engine.trainer.context_parallel import gather_keys
from tandem.kernels.attention import packed_attention
from tandem.kernels.rope import rope


def attend(
    query_LND: torch.Tensor, key_LGD: torch.Tensor, value_LGD: torch.Tensor, batch: LocalBatch, cp_group: Any, softmax_scale: float
) -> torch.Tensor:
    """[L, 1, N * width of a value]. Queries and keys are rotated already."""
    key, value = key_LGD, value_LGD
    if batch.order_T is not None:
        if cp_group.size() > 1:
            key, value = (gather_keys(x, batch.order_T, cp_group) for x in (key, value))
        else:
            key, value = (x.index_select(0, batch.order_T) for x in (key, value))
    out = packed_attention(query_LND, key, value, batch.whole.visible_end_T, scale=softmax_scale, plan=batch.plan)
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
