"""From the log-probs of a microbatch to its part of the loss and to sums for the log.

Every rank of the last pipeline stage sees the whole microbatch (log-probs are gathered over context parallelism), and the caller hands
in the normaliser of the global batch, so that the gradient does not depend on how the batch is split.

Shapes: T tokens, R responses, P pairs of them.
"""

from dataclasses import dataclass, replace

import torch

from tandem.engine.algo.pack import FILLER_ROW_ID, Microbatch
from tandem.engine.config import LossConfig
from tandem.engine.trainer.batch import LocalBatch
from tandem.kernels.policy_loss import policy_loss

# Places in the vector of sums that goes with each microbatch; those after MISMATCH_MAX are maxima.
LOSS, TOKENS, ENTROPY, KL, ON_POLICY, MISMATCH, MISMATCH_MAX = range(7)
NUM_SUMS = 7
# Places of a preference loss: pairs, those whose chosen response scores higher, and by how much.
PAIRS, RIGHT, LEAD = range(1, 4)


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Cross entropy summed over the trained tokens and divided by the normaliser (their number over all ranks)."""

    normaliser: float


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The policy loss summed over responses and divided by the normaliser.

    `reference_T`: log-probs of the policy at the iteration's start. None: take the rollout's, and weigh every token by the truncated
    ratio of the trained to the rollout's probability.
    `is_reference`: no update since `reference_T` was computed, so the log-probs will be these.
    """

    config: LossConfig
    normaliser: float
    reference_T: torch.Tensor | None
    is_reference: bool = False


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Bradley-Terry loss of a reward model's scores, -log sigmoid(chosen - rejected - margin): summed over pairs, over the normaliser.

    The rows of a microbatch are whole pairs: by rising row id the chosen and the rejected response of the first, then of the next.
    `margins_P`: fp32, by how much the chosen response's score is to be ahead.
    """

    normaliser: float
    margins_P: torch.Tensor


Objective = Supervised | Policy | Preference


def microbatch_loss(
    objective: Objective, microbatch: Microbatch, logprobs_T: torch.Tensor, entropy_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, sums): a scalar to differentiate, and [NUM_SUMS] fp64 without a gradient. Both add up over microbatches and ranks."""
    mask_T = microbatch.loss_mask_T
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=logprobs_T.device)
    if isinstance(objective, Preference):
        return _preference_loss(objective, scores_of(microbatch, logprobs_T), sums)
    with torch.no_grad():
        sums[TOKENS], sums[ENTROPY] = mask_T.sum(), entropy_T.sum()
    if isinstance(objective, Supervised):
        total = -torch.where(mask_T, logprobs_T, 0.0).double().sum()
        sums[LOSS] = total.detach() / objective.normaliser
        return (total / objective.normaliser).float(), sums
    config = objective.config
    behaviour_T, detached_T = microbatch.behaviour_logprobs_T, logprobs_T.detach()
    reference_T = behaviour_T if objective.reference_T is None else objective.reference_T
    on_policy_T = mask_T & microbatch.on_policy_T
    weights_T = None
    if objective.reference_T is None:
        weights_T = (detached_T - behaviour_T).exp().clamp(max=config.importance_cap)
    elif config.stale_segments == "correct":
        weights_T = torch.where(on_policy_T, 1.0, (reference_T - behaviour_T).exp().clamp(max=config.importance_cap))
    if weights_T is not None:
        weights_T = torch.where(mask_T, weights_T, 1.0)
    loss_R = policy_loss(
        logprobs_T,
        reference_T,
        microbatch.advantages_R,
        microbatch.cu_seqlens,
        tau=config.tau,
        loss_mask_T=mask_T,
        variant=config.variant,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        importance_weights_T=weights_T,
    )
    total = loss_R.double().sum() / objective.normaliser
    with torch.no_grad():
        log_ratio_T = torch.where(mask_T, detached_T - reference_T, 0.0)
        mismatch_T = torch.where(on_policy_T, (detached_T - behaviour_T).abs(), 0.0)
        sums[LOSS] = total
        # KL(reference || policy) from tokens of about the reference: r - 1 - log r, never negative.
        sums[KL] = (log_ratio_T.expm1() - log_ratio_T).sum()
        sums[ON_POLICY], sums[MISMATCH], sums[MISMATCH_MAX] = on_policy_T.sum(), mismatch_T.sum(), mismatch_T.amax()
    return (total * config.scale).float(), sums


def known_coefficients(objective: Objective, microbatch: Microbatch) -> torch.Tensor | None:
    """The loss's gradient in the log-probs, [T] fp32, where it is known before they are computed; None where it depends on them.

    It does not for cross entropy and for the variant "rest"; for the others the log-probs themselves are known as long as the policy is
    its reference.
    """
    if isinstance(objective, Supervised):
        logprobs_T = torch.zeros_like(microbatch.loss_mask_T, dtype=torch.float32)
    elif isinstance(objective, Preference) or objective.reference_T is None:
        return None
    elif objective.is_reference or objective.config.variant == "rest":
        logprobs_T = objective.reference_T.detach().clone()
    else:
        return None
    with torch.enable_grad():
        loss, _ = microbatch_loss(objective, microbatch, logprobs_T.requires_grad_(), torch.zeros_like(logprobs_T))
        (coefficients_T,) = torch.autograd.grad(loss, logprobs_T)
    return coefficients_T


def with_coefficients(batch: LocalBatch, objective: Objective | None) -> LocalBatch:
    """The batch with the coefficients of this rank's targets, where they are known."""
    coefficients_T = known_coefficients(objective, batch.whole) if objective is not None else None
    return batch if coefficients_T is None else replace(batch, coefficients_M=coefficients_T[batch.position_M])


def with_gradient(loss: torch.Tensor, stats_O: torch.Tensor) -> torch.Tensor:
    """The loss; where the model's outputs have a third row, the gradient comes from there: the weighted sum of this rank's log-probs."""
    if len(stats_O) == 2:
        return loss
    weighted_sum = stats_O[2].sum()
    return loss.detach() + (weighted_sum - weighted_sum.detach())


def scores_of(microbatch: Microbatch, values_T: torch.Tensor) -> torch.Tensor:
    """A reward model's scores of the responses, by rising row id: [R]. Those of `algo.preference.scored_row` have theirs at the end."""
    ends_R, row_ids_R = microbatch.cu_seqlens[1:].long(), microbatch.row_ids_R
    by_row_id = row_ids_R.argsort()
    return values_T[ends_R[by_row_id[row_ids_R[by_row_id] != FILLER_ROW_ID]] - 1]


def _preference_loss(objective: Preference, scores_R: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    chosen_P, rejected_P = scores_R.double().view(-1, 2).unbind(1)
    lead_P = chosen_P - rejected_P
    total = -torch.nn.functional.logsigmoid(lead_P - objective.margins_P.to(lead_P)).sum() / objective.normaliser
    with torch.no_grad():
        sums[LOSS], sums[PAIRS], sums[RIGHT], sums[LEAD] = total, len(lead_P), (lead_P > 0).sum(), lead_P.sum()
    return total.float(), sums
