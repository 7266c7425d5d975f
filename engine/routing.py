"""How a mixture-of-experts layer chooses and weighs its experts. One text, so that trainer and embedded rollout engine choose alike.

Shapes: S tokens, E experts, K experts per token.
"""

import torch

from tandem.engine.architecture import Experts


def scores_of(logits_SE: torch.Tensor, experts: Experts) -> torch.Tensor:
    """Each expert's affinity for each token, from fp32 logits."""
    if experts.scoring == "softmax":
        return logits_SE.softmax(-1)
    # On a CPU, torch computes the last few elements of an fp32 tensor by another formula, so that a token's bits would depend on its place.
    return logits_SE.double().sigmoid().float()


def choose(scores_SE: torch.Tensor, bias_E: torch.Tensor | None, experts: Experts) -> torch.Tensor:
    """[S, K] int64, best first: the experts of the highest scores plus bias, within the groups whose two best experts sum highest
    (DeepSeek-V3, arXiv:2412.19437, 2.1.2)."""
    with torch.no_grad():
        biased_SE = scores_SE if bias_E is None else scores_SE + bias_E
        if experts.num_groups > 1:
            grouped = biased_SE.unflatten(1, (experts.num_groups, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(experts.num_groups_per_tok, dim=-1).indices
            is_closed = torch.ones(grouped.shape[:2], dtype=torch.bool, device=grouped.device).scatter_(1, best, False)
            biased_SE = grouped.masked_fill(is_closed[..., None], float("-inf")).flatten(1)
        return biased_SE.topk(experts.num_experts_per_tok, dim=-1).indices


def weigh(scores_SE: torch.Tensor, chosen_SK: torch.Tensor, experts: Experts) -> torch.Tensor:
    """[S, K] weights of the chosen experts' outputs."""
    weights_SK = scores_SE.gather(1, chosen_SK)
    if experts.norm_topk_prob:
        floor = 1e-20 if experts.scoring == "sigmoid" else 0.0  # sigmoids may all be 0, a softmax's may not
        weights_SK = weights_SK / (weights_SK.sum(-1, keepdim=True) + floor)
    return weights_SK * experts.routed_scaling_factor
