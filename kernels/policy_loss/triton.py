"""Policy losses and group statistics in Triton: one launch each, sums in fp64 in a fixed order.

The formulas are those of csrc/policy_loss.h, documented in `tandem.kernels.policy_loss`. Shapes: T tokens, R responses, G groups.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (triton's types do not know that a launch takes plain values for constexpr parameters)

import torch
import triton
import triton.language as tl

from tandem.kernels.policy_loss.inputs import VARIANTS, Responses, Tokens

TOKENS_PER_TILE = 1024
RESPONSES_PER_TILE = 64


@triton.jit
def _term(log_ratio, advantage, tau, clip_low, clip_high, VARIANT: tl.constexpr):
    """A token's (or, for gspo, a response's) term, and its slope in the log-ratio."""
    ratio = tl.exp(log_ratio)
    bounded = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
    plain, clipped = ratio * advantage, bounded * advantage
    if VARIANT == "token_level":
        value = -clipped + tau * log_ratio * log_ratio
        slope = tl.where(bounded == ratio, -plain, 0.0) + 2.0 * tau * log_ratio
    else:
        value = -tl.minimum(plain, clipped)
        slope = tl.where(plain <= clipped, -plain, 0.0)
    return value, slope


@triton.jit
def _load_tile(logprobs, reference, mask, weights, t, end, HAS_MASK: tl.constexpr, HAS_WEIGHTS: tl.constexpr):
    """(trained, log-probs, log-ratios, weights) of a tile of tokens; 0 where a token is not trained, whatever lies there."""
    trained = t < end
    if HAS_MASK:
        trained = trained & (tl.load(mask + t, mask=trained, other=0) != 0)
    logprob = tl.load(logprobs + t, mask=trained, other=0.0).to(tl.float64)
    log_ratio = logprob - tl.load(reference + t, mask=trained, other=0.0).to(tl.float64)
    if HAS_WEIGHTS:
        weight = tl.load(weights + t, mask=trained, other=0.0).to(tl.float64)
    else:
        weight = tl.where(trained, 1.0, 0.0).to(tl.float64)
    return trained, logprob, log_ratio, weight


@triton.jit
def _loss_kernel(
    logprobs,
    reference,
    advantages,
    cu_seqlens,
    mask,
    weights,
    losses,
    coefficients,
    tau,
    clip_low,
    clip_high,
    VARIANT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    TILE: tl.constexpr,
):
    response = tl.program_id(0)
    first = tl.load(cu_seqlens + response).to(tl.int64)
    end = tl.load(cu_seqlens + response + 1).to(tl.int64)
    advantage = tl.load(advantages + response).to(tl.float64)
    lane = tl.arange(0, TILE)
    count = tl.zeros([TILE], dtype=tl.float64)
    weight_sum = tl.zeros([TILE], dtype=tl.float64)
    logprob_sum = tl.zeros([TILE], dtype=tl.float64)
    ratio_sum = tl.zeros([TILE], dtype=tl.float64)
    plain_sum = tl.zeros([TILE], dtype=tl.float64)
    term_sum = tl.zeros([TILE], dtype=tl.float64)
    for start in range(first, end, TILE):
        trained, logprob, log_ratio, weight = _load_tile(logprobs, reference, mask, weights, start + lane, end, HAS_MASK, HAS_WEIGHTS)
        count += tl.where(trained, 1.0, 0.0)
        weight_sum += weight
        logprob_sum += weight * logprob
        ratio_sum += weight * log_ratio
        plain_sum += log_ratio
        if VARIANT == "grpo" or VARIANT == "ppo_clip" or VARIANT == "token_level":
            value, _ = _term(log_ratio, advantage, tau, clip_low, clip_high, VARIANT)
            term_sum += weight * value
    num_trained = tl.maximum(tl.sum(count), 1.0)
    weights_of_response = tl.sum(weight_sum)
    log_ratio_of_response = tl.sum(ratio_sum)
    if VARIANT == "mirror_descent":
        loss = -(advantage * tl.sum(logprob_sum) - tau / 2.0 * log_ratio_of_response * log_ratio_of_response)
    elif VARIANT == "rest":
        loss = -advantage * tl.sum(logprob_sum)
    elif VARIANT == "gspo":
        value, sequence_slope = _term(tl.sum(plain_sum) / num_trained, advantage, tau, clip_low, clip_high, VARIANT)
        loss = value * weights_of_response / num_trained
    elif VARIANT == "grpo":
        loss = tl.sum(term_sum) / num_trained
    else:
        loss = tl.sum(term_sum)
    tl.store(losses + response, loss.to(tl.float32))
    for start in range(first, end, TILE):
        t = start + lane
        trained, _, log_ratio, weight = _load_tile(logprobs, reference, mask, weights, t, end, HAS_MASK, HAS_WEIGHTS)
        if VARIANT == "mirror_descent":
            slope = -weight * (advantage - tau * log_ratio_of_response)
        elif VARIANT == "rest":
            slope = -weight * advantage
        elif VARIANT == "gspo":
            slope = tl.where(trained, 1.0, 0.0) * (sequence_slope * weights_of_response / num_trained / num_trained)
        else:
            _, of_token = _term(log_ratio, advantage, tau, clip_low, clip_high, VARIANT)
            slope = weight * of_token
            if VARIANT == "grpo":
                slope = slope / num_trained
        tl.store(coefficients + t, tl.where(trained, slope, 0.0).to(tl.float32), mask=t < end)


def loss_and_coefficients(x: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_R, d loss / d logprobs_T), fp32."""
    assert x.variant in VARIANTS
    inputs = [tensor.contiguous() for tensor in x[:4]]
    losses_R, coefficients_T = torch.empty_like(inputs[2]), torch.empty_like(inputs[0])
    if len(losses_R):
        _loss_kernel[(len(losses_R),)](
            *inputs,
            x.loss_mask_T.contiguous().view(torch.uint8) if x.loss_mask_T is not None else inputs[0],
            x.importance_weights_T.contiguous() if x.importance_weights_T is not None else inputs[0],
            losses_R,
            coefficients_T,
            x.tau,
            x.clip_low,
            x.clip_high,
            VARIANT=x.variant,
            HAS_MASK=x.loss_mask_T is not None,
            HAS_WEIGHTS=x.importance_weights_T is not None,
            TILE=TOKENS_PER_TILE,
        )
    return losses_R, coefficients_T


@triton.jit
def _group_kernel(
    base_rewards,
    lengths,
    correct,
    graded,
    cu_groups,
    length_rewards,
    rewards,
    advantages,
    length_weight,
    tau,
    LOG_MEAN_EXP: tl.constexpr,
    NORMALISE_STD: tl.constexpr,
    TILE: tl.constexpr,
):
    group = tl.program_id(0)
    first = tl.load(cu_groups + group).to(tl.int64)
    end = tl.load(cu_groups + group + 1).to(tl.int64)
    lane = tl.arange(0, TILE)
    shortest = tl.full([TILE], float("inf"), dtype=tl.float64)
    longest = tl.full([TILE], float("-inf"), dtype=tl.float64)
    counts = tl.zeros([TILE], dtype=tl.float64)
    for start in range(first, end, TILE):
        i = start + lane
        known = (i < end) & (tl.load(graded + i, mask=i < end, other=0) != 0)
        length = tl.load(lengths + i, mask=known, other=0).to(tl.float64)
        shortest = tl.minimum(shortest, tl.where(known, length, float("inf")))
        longest = tl.maximum(longest, tl.where(known, length, float("-inf")))
        counts += tl.where(known, 1.0, 0.0)
    least, count = tl.min(shortest), tl.sum(counts)
    spread = tl.max(longest) - least
    largest = tl.full([TILE], float("-inf"), dtype=tl.float64)
    for start in range(first, end, TILE):
        i = start + lane
        known = (i < end) & (tl.load(graded + i, mask=i < end, other=0) != 0)
        length = tl.load(lengths + i, mask=known, other=0).to(tl.float64)
        place = 0.5 - (length - least) / tl.where(spread > 0, spread, 1.0)
        bonus = tl.where(tl.load(correct + i, mask=known, other=0) != 0, place, tl.minimum(place, 0.0))
        bonus = tl.where(spread > 0, tl.where(known, bonus, 0.0), 0.0).to(tl.float32)
        base = tl.load(base_rewards + i, mask=known, other=0.0).to(tl.float64)
        reward = tl.where(known, base + length_weight * bonus.to(tl.float64), 0.0).to(tl.float32)
        tl.store(length_rewards + i, bonus, mask=i < end)
        tl.store(rewards + i, reward, mask=i < end)
        largest = tl.maximum(largest, tl.where(known, reward.to(tl.float64), float("-inf")))
    top = tl.max(largest)
    tl.debug_barrier()  # the rewards are read again
    divisor = tl.maximum(count, 1.0)
    means = tl.zeros([TILE], dtype=tl.float64)
    mean_exps = tl.zeros([TILE], dtype=tl.float64)
    for start in range(first, end, TILE):
        i = start + lane
        known = (i < end) & (tl.load(graded + i, mask=i < end, other=0) != 0)
        below = tl.where(known, tl.load(rewards + i, mask=known, other=0.0).to(tl.float64) - top, 0.0)
        means += below
        if LOG_MEAN_EXP:
            mean_exps += tl.where(known, tl.exp(below / tau), 0.0)
    mean = tl.sum(means) / divisor
    baseline = mean
    if LOG_MEAN_EXP:
        baseline = tau * tl.log(tl.sum(mean_exps) / divisor)
    scale = 1.0
    if NORMALISE_STD:
        squares = tl.zeros([TILE], dtype=tl.float64)
        for start in range(first, end, TILE):
            i = start + lane
            known = (i < end) & (tl.load(graded + i, mask=i < end, other=0) != 0)
            off = tl.load(rewards + i, mask=known, other=0.0).to(tl.float64) - top - mean
            squares += tl.where(known, off * off, 0.0) / divisor
        scale = tl.sqrt(tl.sum(squares)) + 1e-6
    for start in range(first, end, TILE):
        i = start + lane
        known = (i < end) & (tl.load(graded + i, mask=i < end, other=0) != 0)
        below = tl.load(rewards + i, mask=known, other=0.0).to(tl.float64) - top
        tl.store(advantages + i, tl.where(known, (below - baseline) / scale, 0.0).to(tl.float32), mask=i < end)


def group_statistics(x: Responses) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(length_rewards_R, rewards_R, advantages_R), fp32."""
    length_rewards_R, rewards_R, advantages_R = (torch.empty_like(x.base_rewards_R) for _ in range(3))
    if len(x.cu_groups) > 1:
        _group_kernel[(len(x.cu_groups) - 1,)](
            x.base_rewards_R.contiguous(),
            x.lengths_R.contiguous(),
            x.correct_R.contiguous().view(torch.uint8),
            x.graded_R.contiguous().view(torch.uint8),
            x.cu_groups.contiguous(),
            length_rewards_R,
            rewards_R,
            advantages_R,
            x.length_weight,
            x.tau,
            LOG_MEAN_EXP=x.baseline == "log_mean_exp",
            NORMALISE_STD=x.normalise_std,
            TILE=RESPONSES_PER_TILE,
        )
    return length_rewards_R, rewards_R, advantages_R
