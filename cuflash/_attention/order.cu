// Which query tiles come first where variants hide places: those that visit more than twice as many key tiles as the mean, since whoever
// began one of them last would be waited for. The others keep their order, in which neighbours share keys.
//
// One block, between tiles.cu and the attention kernel. Constants: those of the attention kernel whose tiles they are.
#include "_attention/scan.cuh"
#include "_attention/tile_loop.cuh"

__device__ __forceinline__ int visits(const Params& params, int task) {
  const BlockIndex index(params, task * kSlices);
  const uint32* words = params.bits.of(index);
  int count = 0;
  for (int word = 0; word < params.bits.words; ++word) count += __popc(words[word]);
  return count;
}

// The sum over all threads, for all of them.
__device__ __forceinline__ int sum_of_all(int x) {
  __shared__ int all;
  const int up_to_here = scan(x, [](int a, int b) { return a + b; });
  if (threadIdx.x == kSorters - 1) all = up_to_here;
  __syncthreads();
  return all;
}

extern "C" __global__ void __launch_bounds__(kSorters) attention_order(const __grid_constant__ Params params) {
  const TileBits& bits = params.bits;
  int own = 0;
  for (int task = threadIdx.x; task < bits.tasks; task += kSorters) own += visits(params, task);
  const int64 twice = 2ll * sum_of_all(own);
  const auto is_long = [&](int task) { return int64(visits(params, task)) * bits.tasks > twice; };
  own = 0;
  for (int task = threadIdx.x; task < bits.tasks; task += kSorters) own += is_long(task);
  const int all_long = sum_of_all(own);

  int long_before = 0;  // among the tasks before these
  for (int base = 0; base < bits.tasks; base += kSorters) {
    const int task = base + threadIdx.x;
    const bool exists = task < bits.tasks, longer = exists && is_long(task);
    const int up_to_here = long_before + scan(int(longer), [](int a, int b) { return a + b; });
    if (exists) bits.order[longer ? up_to_here - 1 : all_long + task - up_to_here] = task;
    long_before += sum_of_all(longer);
  }
}
