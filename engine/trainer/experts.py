"""The experts of a layer, computed together: three launches for all of them instead of a loop over modules.

Shapes: M rows that were sent to this rank's experts, grouped by expert, E experts of this rank, H hidden width.
"""

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP

from tandem.kernels.grouped_gemm import grouped_linear
from tandem.kernels.swiglu import weighted_swiglu


class Experts(SequentialMLP):
    """Megatron's experts, with their parameters, names and checkpoints; only the forward pass is ours.

    With expert tensor parallelism the output is this rank's part of a sum, as Megatron's dispatchers expect. The experts' modules are
    never called, so Megatron must not wait for their parameters in a hook: `overlap_param_gather` stays off.
    """

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """(out_MH, no bias) from rows [M, H], counts [E] on any device, and the router's weights [M]."""
        experts: Any = self.local_experts
        rows_MH = permuted_local_hidden_states
        offsets_E1 = _offsets(tokens_per_expert, rows_MH.device)
        inner_M2F = grouped_linear(rows_MH, [expert.linear_fc1.weight for expert in experts], offsets_E1)
        inner_MF = weighted_swiglu(inner_M2F, permuted_probs.float())
        return grouped_linear(inner_MF, [expert.linear_fc2.weight for expert in experts], offsets_E1), None


def _offsets(counts_E: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[E + 1] int32 on the device, without waiting for it: counts that a dispatcher has read are copied back from pinned memory."""
    offsets_E1 = torch.nn.functional.pad(counts_E.cumsum(0, dtype=torch.int32), (1, 0))
    if device.type == "cuda" and not offsets_E1.is_cuda:
        offsets_E1 = offsets_E1.pin_memory()
    return offsets_E1.to(device, non_blocking=True)
