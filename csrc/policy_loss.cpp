// The CPU twin of policy_loss.cu, behind kernels/policy_loss/cuda.py.
#include "policy_loss.h"

using namespace tandem;

extern "C" int tandem_policy_loss(const float* logprobs, const float* reference, const float* advantages, const int32_t* cu_seqlens,
                                  const uint8_t* mask, const float* weights, float* losses, float* coefficients, int64_t num_responses,
                                  int variant, double tau, double clip_low, double clip_high, void*) {
  const LossOptions options{variant, tau, clip_low, clip_high};
  for (int64_t r = 0; r < num_responses; ++r) {
    const double advantage = advantages[r];
    ResponseSums sums;
    for (int64_t t = cu_seqlens[r]; t < cu_seqlens[r + 1]; ++t) {
      if (mask && !mask[t]) continue;
      sums.add(token_sums(logprobs[t], reference[t], weights ? weights[t] : 1.0, advantage, options));
    }
    losses[r] = static_cast<float>(response_loss(sums, advantage, options));
    for (int64_t t = cu_seqlens[r]; t < cu_seqlens[r + 1]; ++t) {
      coefficients[t] = mask && !mask[t] ? 0.0f
                                         : static_cast<float>(token_coefficient(logprobs[t], reference[t], weights ? weights[t] : 1.0, sums, advantage, options));
    }
  }
  return 0;
}

extern "C" int tandem_group_statistics(const float* base, const int32_t* lengths, const uint8_t* correct, const uint8_t* graded,
                                       const int32_t* cu_groups, float* length_rewards, float* rewards, float* advantages,
                                       int64_t num_groups, double length_weight, double tau, int log_mean_exp, int normalise_std, void*) {
  const GroupOptions options{length_weight, tau, log_mean_exp, normalise_std};
  for (int64_t g = 0; g < num_groups; ++g) {
    group_statistics(base, lengths, correct, graded, length_rewards, rewards, advantages, cu_groups[g], cu_groups[g + 1], options);
  }
  return 0;
}

extern "C" const char* tandem_error(int) { return "no error"; }
