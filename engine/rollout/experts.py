"""The feed-forward layers: dense, or a mixture of experts.

Letters of tensor names: T tokens (a multiple of ROW_MULTIPLE), E experts, K experts per token.
"""

import torch
import torch.nn.functional as F

from tandem.engine.architecture import Experts
from tandem.engine.rollout.products import ROW_MULTIPLE, linear, round_up, swiglu
from tandem.engine.rollout.weights import LayerWeights


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
    # In float64 the number of elements is a multiple of what is computed at a time, for any number of experts.
    scores_TE = logits_TE.double().sigmoid().float() if experts.scoring == "sigmoid" else logits_TE.softmax(-1)
    biased_TE = scores_TE if layer.expert_bias is None else scores_TE + layer.expert_bias
    if experts.num_groups > 1:
        biased_TE = _within_best_groups(biased_TE, experts)
    chosen_TK = biased_TE.topk(experts.num_experts_per_tok, dim=-1).indices
    weights_TK = scores_TE.gather(1, chosen_TK)
    if experts.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + (1e-20 if experts.scoring == "sigmoid" else 0.0))
    return chosen_TK, weights_TK * experts.routed_scaling_factor


def _within_best_groups(scores_TE: torch.Tensor, experts: Experts) -> torch.Tensor:
    """-inf outside the groups whose two best experts sum highest (DeepSeek-V3, arXiv:2412.19437, 2.1.2)."""
    grouped = scores_TE.unflatten(1, (experts.num_groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1).topk(experts.num_groups_per_tok, dim=-1).indices
    is_closed = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(is_closed[..., None], -torch.inf).flatten(1)


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
