// The candidates of a row: keys in shared memory, among them the k largest of what has been read. All threads of the
// row take part in everything here: a warp, or the whole block.
#include "_softmax/selection/topk_keys.cuh"

constexpr bool kWarpPerRow = kThreadsPerRow == 32;
static_assert(kWarpPerRow || kThreadsPerRow == kThreads, "a row has a warp or a block");

__device__ __forceinline__ int thread_of_row() { return threadIdx.x % kThreadsPerRow; }
__device__ __forceinline__ void sync_row() {
  if constexpr (kWarpPerRow) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}
__device__ __forceinline__ int count_in_row(bool yes) {
  return kWarpPerRow ? __popc(__ballot_sync(0xffffffff, yes)) : __syncthreads_count(yes);
}
// Also a barrier, which a vote by itself is not.
__device__ __forceinline__ bool any_in_row(bool yes) {
  if constexpr (kWarpPerRow) __syncwarp();
  return kWarpPerRow ? __any_sync(0xffffffff, yes) : __syncthreads_or(yes);
}

// A threshold that at least k reach, and at most `most` if there is one, found bit by bit from the top. `count(bits)`
// tells all threads how many reach `bits`; `reached` is how many reach 0, and then the answer.
template <typename Bits, typename Count>
__device__ __forceinline__ Bits select(int k, int most, int& reached, Count count) {
  Bits threshold = 0;
#pragma unroll 1
  for (Bits bit = Bits(1) << (8 * sizeof(Bits) - 1); bit != 0 && reached > most; bit >>= 1) {
    const int n = count(threshold | bit);
    if (n >= k) {
      threshold |= bit;
      reached = n;
    }
  }
  return threshold;
}

struct Candidates {
  Key keys[kCapacity];
  int held;  // or reserved

  // Places for n keys of each thread; the first of this thread's. A barrier must follow.
  __device__ __forceinline__ int reserve(int n) { return n > 0 ? atomicAdd(&held, n) : 0; }

  // Drops all of n but the k largest, or a few more, at most `most`. Returns a value that k are at least equal to.
  __device__ __forceinline__ Order shrink(int n, int k, int most) {
    const int thread = thread_of_row();
    const auto count = [&](Order value, uint32 rank) {
      int reached = 0;
#pragma unroll 1
      for (int base = 0; base < n; base += kThreadsPerRow) {
        const int i = base + thread;
        reached += count_in_row(i < n && keys[i].reaches(value, rank));
      }
      return reached;
    };
    int reached = n;
    const Order value =
        select<Order>(k, most, reached, [&](Order trial) { return count(trial, 0); });
    const uint32 rank =
        select<uint32>(k, most, reached, [&](uint32 trial) { return count(value, trial); });
    if (thread == 0) held = 0;  // which no one has read since a barrier
#pragma unroll 1
    for (int base = 0; base < n; base += kThreadsPerRow) {
      const int i = base + thread;
      const Key key = i < n ? keys[i] : Key{0, 0};
      sync_row();  // all have read what is overwritten now, and the count is 0
      if (i < n && key.reaches(value, rank)) keys[reserve(1)] = key;
    }
    sync_row();  // the count and the keys are complete
    return value;
  }

  // Sorts n keys, the largest first, by bitonic merges.
  __device__ __forceinline__ void sort(int n) {
    const int thread = thread_of_row();
    int padded = 1;
    while (padded < n) padded *= 2;
    for (int i = n + thread; i < padded; i += kThreadsPerRow) keys[i] = {0, 0};
    sync_row();  // all keys are there
#pragma unroll 1
    for (int size = 2; size <= padded; size *= 2) {
#pragma unroll 1
      for (int stride = size / 2; stride > 0; stride /= 2) {
        for (int i = thread; i < padded / 2; i += kThreadsPerRow) {
          const int low = 2 * i - (i & (stride - 1)), high = low + stride;
          const Key a = keys[low], b = keys[high];
          const bool falling = (low & size) == 0;
          if (a.reaches(b.value, b.rank) != falling) {
            keys[low] = b;
            keys[high] = a;
          }
        }
        sync_row();  // before pairs of another stride
      }
    }
  }
};
