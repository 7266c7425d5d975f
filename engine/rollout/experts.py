"""The feed-forward layers: dense, or a mixture of experts.

Letters of tensor names: T tokens (a multiple of ROW_MULTIPLE), E experts, K experts per token.
"""

import torch
import torch.nn.functional as F

from tandem.engine.architecture import Experts
from tandem.engine.rollout.products import ROW_MULTIPLE, linear, round_up, swiglu
from tandem.engine.rollout.weights import LayerWeights
from tandem.engine.routing import choose, scores_of, weigh


def feed_forward(experts: Experts | None, layer: LayerWeights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [T, hidden] to [T, hidden], and the chosen experts [T, K] where the layer is sparse."""
    if layer.router is None:
        return swiglu(x, layer.gate_up, layer.down), None
    assert experts is not None
    chosen, weights = route(experts, layer, x)
    out = (_apply_experts(layer, x, chosen) * weights.to(x.dtype)[..., None]).sum(1)
    if layer.shared_gate_up is not None and layer.shared_down is not None:
        out += swiglu(x, layer.shared_gate_up, layer.shared_down)
    return out, chosen


def route(experts: Experts, layer: LayerWeights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token, [T, K] int64, and the float32 weights of their outputs."""
    assert layer.router_fp32 is not None
    logits_TE = linear(x.float(), layer.router_fp32)
    scores_TE = scores_of(logits_TE, experts)
    chosen_TK = choose(scores_TE, layer.expert_bias, experts)
    return chosen_TK, weigh(scores_TE, chosen_TK, experts)


def _apply_experts(layer: LayerWeights, x: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """[T, K, hidden]: each token through each of its experts."""
    num_experts, num_chosen = len(layer.gate_up), chosen_TK.shape[1]
    by_expert = chosen_TK.flatten().argsort(stable=True)
    sorted_x = x[by_expert // num_chosen]
    sorted_out = torch.empty_like(sorted_x)
    start = 0
    for index, count in enumerate(chosen_TK.flatten().bincount(minlength=num_experts).tolist()):
        if count:
            part = slice(start, start + count)
            rows = F.pad(sorted_x[part], (0, 0, 0, round_up(count, ROW_MULTIPLE) - count))
            sorted_out[part] = swiglu(rows, layer.gate_up[index], layer.down[index])[:count]
        start += count
    out = torch.empty_like(sorted_out)
    out[by_expert] = sorted_out
    return out.view(len(x), num_chosen, -1)
