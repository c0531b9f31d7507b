// Sums, or maxima, over the threads of the one block that sorts (sequences.cu, order.cu).
#include "device/types.cuh"

constexpr int kSorters = 1024;  // threads

// What `combine` makes of the values of all threads up to this one.
template <typename Combine> __device__ __forceinline__ int scan(int x, Combine combine) {
  __shared__ int of_warps[kSorters / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto in_warp = [&](int y) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, y, step);
      if (lane >= step) y = combine(before, y);
    }
    return y;
  };
  x = in_warp(x);
  __syncthreads();  // everybody has read what the scan before left
  if (lane == 31) of_warps[warp] = x;
  __syncthreads();
  if (warp == 0) of_warps[lane] = in_warp(of_warps[lane]);
  __syncthreads();
  return warp == 0 ? x : combine(of_warps[warp - 1], x);
}
