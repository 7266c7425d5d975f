// The policy losses and the group statistics, one response and one group at a time: the same text for the CPU and the GPU.
// The formulas are documented in kernels/policy_loss/__init__.py. Sums are in double.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define TANDEM_INLINE __host__ __device__ __forceinline__
#else
#define TANDEM_INLINE inline
#endif

namespace tandem {

enum Variant : int { kMirrorDescent = 0, kGrpo = 1, kPpoClip = 2, kGspo = 3, kRest = 4, kTokenLevel = 5 };

struct LossOptions {
  int variant;
  double tau, clip_low, clip_high;
};

// What is summed over the trained tokens of a response.
struct ResponseSums {
  double count = 0.0;           // trained tokens
  double weight = 0.0;          // importance weights
  double logprob = 0.0;         // weight * log pi
  double log_ratio = 0.0;       // weight * (log pi - log pi_ref)
  double plain_log_ratio = 0.0; // the same without the weight
  double token_loss = 0.0;      // weight * the token's own term, where the variant has one

  TANDEM_INLINE void add(const ResponseSums& other) {
    count += other.count;
    weight += other.weight;
    logprob += other.logprob;
    log_ratio += other.log_ratio;
    plain_log_ratio += other.plain_log_ratio;
    token_loss += other.token_loss;
  }
};

struct Clipped {
  double value, slope; // of -min(r A, clip(r) A), the slope in log r
};

TANDEM_INLINE Clipped clipped_ratio(double log_ratio, double advantage, const LossOptions& o) {
  const double ratio = exp(log_ratio);
  const double bounded = fmin(fmax(ratio, 1.0 - o.clip_low), 1.0 + o.clip_high);
  const double plain = ratio * advantage, clipped = bounded * advantage;
  return plain <= clipped ? Clipped{-plain, -plain} : Clipped{-clipped, 0.0};
}

// The term of one token and its slope in log pi: clipped whatever the sign of the advantage, and drawn back by the squared log-ratio.
TANDEM_INLINE Clipped token_level(double log_ratio, double advantage, const LossOptions& o) {
  const double ratio = exp(log_ratio);
  const double bounded = fmin(fmax(ratio, 1.0 - o.clip_low), 1.0 + o.clip_high);
  const double slope = bounded == ratio ? -ratio * advantage : 0.0;
  return {-bounded * advantage + o.tau * log_ratio * log_ratio, slope + 2.0 * o.tau * log_ratio};
}

TANDEM_INLINE bool has_token_terms(int variant) { return variant == kGrpo || variant == kPpoClip || variant == kTokenLevel; }

TANDEM_INLINE Clipped token_term(double log_ratio, double advantage, const LossOptions& o) {
  return o.variant == kTokenLevel ? token_level(log_ratio, advantage, o) : clipped_ratio(log_ratio, advantage, o);
}

TANDEM_INLINE ResponseSums token_sums(double logprob, double reference, double weight, double advantage, const LossOptions& o) {
  ResponseSums sums;
  const double log_ratio = logprob - reference;
  sums.count = 1.0;
  sums.weight = weight;
  sums.logprob = weight * logprob;
  sums.log_ratio = weight * log_ratio;
  sums.plain_log_ratio = log_ratio;
  if (has_token_terms(o.variant)) sums.token_loss = weight * token_term(log_ratio, advantage, o).value;
  return sums;
}

TANDEM_INLINE double response_loss(const ResponseSums& s, double advantage, const LossOptions& o) {
  const double count = fmax(s.count, 1.0);
  switch (o.variant) {
    case kMirrorDescent: return -(advantage * s.logprob - o.tau / 2.0 * s.log_ratio * s.log_ratio);
    case kRest: return -advantage * s.logprob;
    case kGspo: return clipped_ratio(s.plain_log_ratio / count, advantage, o).value * s.weight / count;
    case kGrpo: return s.token_loss / count;
    default: return s.token_loss;
  }
}

// d loss / d log pi of one trained token.
TANDEM_INLINE double token_coefficient(double logprob, double reference, double weight, const ResponseSums& s, double advantage, const LossOptions& o) {
  const double count = fmax(s.count, 1.0);
  switch (o.variant) {
    case kMirrorDescent: return -weight * (advantage - o.tau * s.log_ratio);
    case kRest: return -weight * advantage;
    case kGspo: return clipped_ratio(s.plain_log_ratio / count, advantage, o).slope * s.weight / count / count;
    case kGrpo: return weight * token_term(logprob - reference, advantage, o).slope / count;
    default: return weight * token_term(logprob - reference, advantage, o).slope;
  }
}

struct GroupOptions {
  double length_weight, tau;
  int log_mean_exp, normalise_std;
};

// Length rewards, rewards and advantages of the responses [first, last) of one prompt. Those that nobody could grade get 0 and count nowhere.
TANDEM_INLINE void group_statistics(const float* base, const int32_t* lengths, const uint8_t* correct, const uint8_t* graded, float* length_rewards,
                                    float* rewards, float* advantages, int64_t first, int64_t last, const GroupOptions& o) {
  double shortest = INFINITY, longest = -INFINITY, count = 0.0;
  for (int64_t i = first; i < last; ++i) {
    if (!graded[i]) continue;
    shortest = fmin(shortest, static_cast<double>(lengths[i]));
    longest = fmax(longest, static_cast<double>(lengths[i]));
    count += 1.0;
  }
  const double spread = longest - shortest;
  double largest = -INFINITY;
  for (int64_t i = first; i < last; ++i) {
    double bonus = 0.0;
    if (graded[i] && spread > 0.0) {
      const double lambda = 0.5 - (lengths[i] - shortest) / spread;
      bonus = correct[i] ? lambda : fmin(lambda, 0.0);
    }
    length_rewards[i] = static_cast<float>(bonus);
    rewards[i] = graded[i] ? static_cast<float>(base[i] + o.length_weight * length_rewards[i]) : 0.0f;
    if (graded[i]) largest = fmax(largest, static_cast<double>(rewards[i]));
  }
  // Counted from the largest reward, equal rewards cancel exactly and no exponential overflows.
  double mean = 0.0, mean_exp = 0.0;
  for (int64_t i = first; i < last; ++i) {
    if (!graded[i]) continue;
    mean += rewards[i] - largest;
    if (o.log_mean_exp) mean_exp += exp((rewards[i] - largest) / o.tau);
  }
  mean /= fmax(count, 1.0);
  mean_exp /= fmax(count, 1.0);
  const double baseline = o.log_mean_exp ? o.tau * log(mean_exp) : mean;
  double variance = 0.0;
  for (int64_t i = first; i < last; ++i) {
    const double below = rewards[i] - largest;
    if (graded[i]) variance += (below - mean) * (below - mean) / count;
  }
  const double divisor = o.normalise_std ? sqrt(variance) + 1e-6 : 1.0;
  for (int64_t i = first; i < last; ++i) advantages[i] = graded[i] ? static_cast<float>((rewards[i] - largest - baseline) / divisor) : 0.0f;
}

}  // namespace tandem
