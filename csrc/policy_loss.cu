// Policy losses on a GPU, behind kernels/policy_loss/cuda.py: one launch per call, no atomics, the same bits every time.
#include <cuda_runtime.h>

#include "policy_loss.h"

using namespace tandem;

namespace {

constexpr int kThreads = 512;

// The sum over the block, in a fixed order, on every thread.
__device__ ResponseSums sum_over_block(ResponseSums mine) {
  __shared__ ResponseSums shared[kThreads];
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int stride = kThreads / 2; stride > 0; stride /= 2) {
    if (threadIdx.x < stride) shared[threadIdx.x].add(shared[threadIdx.x + stride]);
    __syncthreads();
  }
  return shared[0];
}

// One block per response: its sums, then its loss and the coefficients of its tokens, which are still in the cache.
__global__ void __launch_bounds__(kThreads) loss_kernel(const float* __restrict__ logprobs, const float* __restrict__ reference,
                                                        const float* __restrict__ advantages, const int32_t* __restrict__ cu_seqlens,
                                                        const uint8_t* __restrict__ mask, const float* __restrict__ weights,
                                                        float* __restrict__ losses, float* __restrict__ coefficients, LossOptions options) {
  const int64_t r = blockIdx.x;
  const int64_t first = cu_seqlens[r], last = cu_seqlens[r + 1];
  const double advantage = advantages[r];
  ResponseSums sums;
  for (int64_t t = first + threadIdx.x; t < last; t += kThreads) {
    if (mask && !mask[t]) continue;
    sums.add(token_sums(logprobs[t], reference[t], weights ? weights[t] : 1.0, advantage, options));
  }
  sums = sum_over_block(sums);
  if (threadIdx.x == 0) losses[r] = static_cast<float>(response_loss(sums, advantage, options));
  for (int64_t t = first + threadIdx.x; t < last; t += kThreads) {
    coefficients[t] = mask && !mask[t] ? 0.0f
                                       : static_cast<float>(token_coefficient(logprobs[t], reference[t], weights ? weights[t] : 1.0, sums, advantage, options));
  }
}

// One thread per group: k is small.
__global__ void group_kernel(const float* base, const int32_t* lengths, const uint8_t* correct, const uint8_t* graded,
                             const int32_t* cu_groups, float* length_rewards, float* rewards, float* advantages, int64_t num_groups,
                             GroupOptions options) {
  const int64_t g = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (g < num_groups) group_statistics(base, lengths, correct, graded, length_rewards, rewards, advantages, cu_groups[g], cu_groups[g + 1], options);
}

}  // namespace

extern "C" int tandem_policy_loss(const float* logprobs, const float* reference, const float* advantages, const int32_t* cu_seqlens,
                                  const uint8_t* mask, const float* weights, float* losses, float* coefficients, int64_t num_responses,
                                  int variant, double tau, double clip_low, double clip_high, void* stream) {
  if (num_responses == 0) return 0;
  const LossOptions options{variant, tau, clip_low, clip_high};
  loss_kernel<<<static_cast<unsigned>(num_responses), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      logprobs, reference, advantages, cu_seqlens, mask, weights, losses, coefficients, options);
  return static_cast<int>(cudaGetLastError());
}

extern "C" int tandem_group_statistics(const float* base, const int32_t* lengths, const uint8_t* correct, const uint8_t* graded,
                                       const int32_t* cu_groups, float* length_rewards, float* rewards, float* advantages,
                                       int64_t num_groups, double length_weight, double tau, int log_mean_exp, int normalise_std,
                                       void* stream) {
  if (num_groups == 0) return 0;
  const GroupOptions options{length_weight, tau, log_mean_exp, normalise_std};
  constexpr int kGroupThreads = 128;
  group_kernel<<<static_cast<unsigned>((num_groups + kGroupThreads - 1) / kGroupThreads), kGroupThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      base, lengths, correct, graded, cu_groups, length_rewards, rewards, advantages, num_groups, options);
  return static_cast<int>(cudaGetLastError());
}

extern "C" const char* tandem_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
