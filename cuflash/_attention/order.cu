// Which query tiles come first where variants hide places: those that visit more than twice as many key tiles as the mean, since whoever
// began one of them last would be waited for. The others keep their order, in which neighbours share keys.
//
// One block, between tiles.cu and the attention kernel. Constants: those of the attention kernel whose tiles they are.
#include "_attention/scan.cuh"
#include "_attention/tile_loop.cuh"

__device__ __forceinline__ int visits(const Params& params, int task) {
  const BlockIndex index(params, task * kSlices);
  const uint32* words = params.bits.of(index);
  const int length = params.bits.words;
  int count = 0;
  if (length % 4 == 0) {  // lanes have words far apart: the fewer loads, the better
    for (int word = 0; word < length; word += 4) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(words + word));
      count += __popc(four.x) + __popc(four.y) + __popc(four.z) + __popc(four.w);
    }
  } else {
    for (int word = 0; word < length; ++word) count += __popc(__ldg(words + word));
  }
  return count;
}

// The sum over all threads up to this one, and over all of them.
__device__ __forceinline__ int2 sums(int x) {
  __shared__ int all;
  const int up_to_here = scan(x, [](int a, int b) { return a + b; });
  if (threadIdx.x == kSorters - 1) all = up_to_here;
  __syncthreads();
  return {up_to_here, all};
}

// A thread has neighbouring tasks, 64 at most. How many key tiles each visits waits where the order will be: that costs less than to count
// them again.
extern "C" __global__ void __launch_bounds__(kSorters, 1) attention_order(const __grid_constant__ Params params) {
  int* order = params.bits.order;
  const int tasks = params.bits.tasks, each = (tasks + kSorters - 1) / kSorters;
  const int begin = min_of(int(threadIdx.x) * each, tasks), end = min_of(begin + each, tasks);
  int own = 0;
#pragma unroll 4
  for (int task = begin; task < end; ++task) own += order[task] = visits(params, task);

  const int64 twice = 2ll * sums(own).y;
  uint64 is_long = 0;  // a bit for each
  for (int task = begin; task < end; ++task) is_long |= uint64(int64(order[task]) * tasks > twice) << (task - begin);
  const int own_long = __popcll(is_long);
  const auto [long_up_to_here, all_long] = sums(own_long);  // everybody has read what is now replaced

  int next_long = long_up_to_here - own_long, next = all_long + begin - next_long;
  for (int task = begin; task < end; ++task, is_long >>= 1) order[is_long & 1 ? next_long++ : next++] = task;
}
