// Cross-entropy's losses once the logsumexp of every row of logits is known: a thread takes a row and gathers its target's logit.
// Sums are taken in an order that depends on the plan alone, by one block or by several and, in a second launch, a last one.
//
//   kEach      every row's loss is an answer; there is no sum
//   kCounts    counts the rows that are not ignored, and takes no losses
//   kJoins     the second launch: adds up what the blocks of the first one left
//   kWhole     one block gives the answer; otherwise each block leaves its part
//   kMean      the answer is the sum of the losses over their count
//   kSmoothed  with label smoothing
//   kIgnores   with an ignore_index
#include "_softmax/layout.cuh"

// Of some rows: the sum of their losses, and how many of them are not ignored.
struct alignas(2 * sizeof(Score)) Part {
  Score loss, count;

  __device__ __forceinline__ void add(Part other) {
    loss += other.loss;
    count += other.count;
  }
};

struct LossParams {
  const Element* logits;  // [outer..., classes]
  const Target* targets;  // [outer...]
  const Score* lse;       // [outer...]
  const Score* sums;      // [outer...], of the logits; kSmoothed
  Score* loss;            // [outer...] with kEach, otherwise one number
  Part* parts;            // [blocks of the first launch]; kJoins reads them
  int64 rows;             // the product of the outer sizes; with kJoins, the number of parts
  int64 classes;
  int64 outer[kMaxAxes];  // sizes; strides are in elements
  int64 logits_strides[kMaxAxes], targets_strides[kMaxAxes], lse_strides[kMaxAxes], sums_strides[kMaxAxes],
      loss_strides[kMaxAxes];
  int64 logits_step;  // from class to class
  int64 ignore_index;
  Score hit, share;  // the smoothed target's part of its class, and of every class; kSmoothed
};
static_assert(sizeof(LossParams) == 272 + 2 * sizeof(Score), "the host packs as many bytes");

__device__ __forceinline__ int64 row_offset(const LossParams& params, int64 row, const int64 (&strides)[kMaxAxes]) {
  return offset<kOuterAxes>(Index(row), params.outer, strides);
}

__device__ __forceinline__ Part part_of_row(const LossParams& params, int64 row) {
  const int64 target = int64(params.targets[row_offset(params, row, params.targets_strides)]);
  if (kIgnores && target == params.ignore_index) return {Score(0), Score(0)};
  if (kCounts) return {Score(0), Score(1)};
  if (uint64(target) >= uint64(params.classes)) {  // never a wild read
    const Score infinite = infinity<Score>();
    return {infinite - infinite, Score(1)};
  }
  const Element* logits = params.logits + row_offset(params, row, params.logits_strides);
  Score loss = params.lse[row_offset(params, row, params.lse_strides)];
  if (kSmoothed) {
    loss -= params.hit * widen(logits[target * params.logits_step]);
    loss -= params.share * params.sums[row_offset(params, row, params.sums_strides)];
  } else {
    loss -= widen(logits[target * params.logits_step]);
  }
  return {loss, Score(1)};
}

// Thread 0 gets the sum over the block.
__device__ __forceinline__ Part block_sum(Part part) {
  __shared__ Part warps_smem[kThreads / 32];
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    part.add({__shfl_xor_sync(0xffffffff, part.loss, mask), __shfl_xor_sync(0xffffffff, part.count, mask)});
  }
  if (threadIdx.x % 32 == 0) warps_smem[threadIdx.x / 32] = part;
  __syncthreads();  // thread 0 reads all warps' sums
  if (threadIdx.x == 0) {
#pragma unroll
    for (int warp = 1; warp < kThreads / 32; ++warp) part.add(warps_smem[warp]);
  }
  return part;
}

extern "C" __global__ void __launch_bounds__(kThreads) cross_entropy_loss(const __grid_constant__ LossParams params) {
  Part sum = {Score(0), Score(0)};
  for (int64 i = int64(blockIdx.x) * kThreads + threadIdx.x; i < params.rows; i += int64(gridDim.x) * kThreads) {
    const Part part = kJoins ? params.parts[i] : part_of_row(params, i);
    if (kEach) params.loss[row_offset(params, i, params.loss_strides)] = part.loss;
    sum.add(part);
  }
  if constexpr (!kEach) {
    sum = block_sum(sum);
    if (threadIdx.x != 0) return;
    if (kWhole) {
      *params.loss = kCounts ? sum.count : kMean ? sum.loss / sum.count : sum.loss;
    } else {
      params.parts[blockIdx.x] = sum;
    }
  }
}
