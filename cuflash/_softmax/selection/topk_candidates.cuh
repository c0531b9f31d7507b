// The candidates of a row: keys in shared memory, among them the k largest of what has been read. All threads of the
// row take part in everything here: a warp, or the whole block.
#include "_softmax/selection/topk_keys.cuh"

constexpr bool kWarpPerRow = kThreadsPerRow == 32;
static_assert(kWarpPerRow || kThreadsPerRow == kThreads, "a row has a warp or a block");

constexpr int kWarps = kThreadsPerRow / 32;
constexpr int kDigit = kWarps == 1 ? 1 : kWarps < 8 ? 2 : 4;  // bits of a threshold that are found at a time
constexpr int kFew = kWarpPerRow ? 64 : 128;                  // keys that are sorted by counting
constexpr int kFewEach = kFew > kThreadsPerRow ? kFew / kThreadsPerRow : 1;

__device__ __forceinline__ int thread_of_row() { return threadIdx.x % kThreadsPerRow; }
__device__ __forceinline__ void sync_row() {
  if constexpr (kWarpPerRow) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}
// Also a barrier, which a vote by itself is not.
__device__ __forceinline__ bool any_in_row(bool yes) {
  if constexpr (kWarpPerRow) __syncwarp();
  return kWarpPerRow ? __any_sync(0xffffffff, yes) : __syncthreads_or(yes);
}
__device__ __forceinline__ int sum_in_warp(int n) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(0xffffffff, n);
#else
  for (int mask = 1; mask < 32; mask *= 2) n += __shfl_xor_sync(0xffffffff, n, mask);
  return n;
#endif
}

struct Candidates {
  Key keys[kCapacity];
  int counts[2][1 << kDigit];
  int held;  // keys; more than there is room for, once some have found none

  // Appends a key; false if there is no room.
  __device__ __forceinline__ bool append(Key key) {
    const int slot = atomicAdd(&held, 1);
    if (slot < kCapacity) keys[slot] = key;
    return slot < kCapacity;
  }

  // A threshold that at least k of n keys reach, and at most `most` if there is one, found digit by digit from the top;
  // 0 for fewer than k. `reached` is how many reach 0, and then the answer. Each warp has trials of its own.
  template <typename Bits, typename Reaches>
  __device__ __forceinline__ Bits select(int n, int k, int most, int& reached, Reaches reaches) {
    const int warp = thread_of_row() / 32, lane = threadIdx.x % 32;
    Bits threshold = 0;
#pragma unroll 1
    for (int shift = 8 * sizeof(Bits) - kDigit; shift >= 0 && reached > most; shift -= kDigit) {
      int(&tried)[1 << kDigit] = counts[shift / kDigit % 2];
#pragma unroll 1
      for (int digit = 1 + warp; digit < 1 << kDigit; digit += kWarps) {
        const Bits trial = threshold | Bits(digit) << shift;
        int count = 0;
#pragma unroll 4
        for (int i = lane; i < n; i += 32) count += reaches(keys[i], trial);
        count = sum_in_warp(count);
        if (lane == 0) tried[digit] = count;
      }
      sync_row();  // all counts are there; the next but one, in the same place, will come after another barrier
      const int count = lane > 0 && lane < 1 << kDigit ? tried[lane] : 0;
      const uint32 enough = __ballot_sync(0xffffffff, count >= k);
      if (enough == 0) continue;
      const int digit = 31 - __clz(enough);
      threshold |= Bits(digit) << shift;
      reached = __shfl_sync(0xffffffff, count, digit);
    }
    return threshold;
  }

  // A key that at least k of n reach, and at most `most` if there is one.
  __device__ __forceinline__ Key threshold(int n, int k, int most) {
    int reached = n;
    const Order value =
        select<Order>(n, k, most, reached, [](Key key, Order trial) { return key.value >= trial; });
    const uint32 rank = select<uint32>(n, k, most, reached, [value](Key key, uint32 trial) {
      return key.reaches({value, trial});
    });
    return {value, rank};
  }

  // Drops all of n keys but the k largest, or a few more, at most `most`; all that are left reach the key returned.
  __device__ __forceinline__ Key shrink(int n, int k, int most) {
    const int thread = thread_of_row();
    const Key least = threshold(n, k, most);
    sync_row();  // all know n
    if (thread == 0) held = 0;
#pragma unroll 1
    for (int base = 0; base < n; base += kThreadsPerRow) {
      const int i = base + thread;
      const Key key = i < n ? keys[i] : Key{0, 0};
      sync_row();  // all have read what is overwritten now, and the count is 0
      if (i < n && key.reaches(least)) append(key);
    }
    sync_row();  // the count and the keys are complete
    return least;
  }

  // Sorts n keys, the largest first: the place of each is how many are larger.
  __device__ __forceinline__ void sort_few(int n) {
    const int thread = thread_of_row();
    Key own[kFewEach];
    int places[kFewEach];
#pragma unroll
    for (int e = 0; e < kFewEach; ++e) {
      const int i = e * kThreadsPerRow + thread;
      own[e] = i < n ? keys[i] : Key{0, 0};
      places[e] = 0;
    }
    if (thread < n) {
#pragma unroll 4
      for (int i = 0; i < n; ++i) {
        const Key other = keys[i];
#pragma unroll
        for (int e = 0; e < kFewEach; ++e) places[e] += !own[e].reaches(other);
      }
    }
    sync_row();  // all have read what is overwritten now
#pragma unroll
    for (int e = 0; e < kFewEach; ++e) {
      if (e * kThreadsPerRow + thread < n) keys[places[e]] = own[e];
    }
    sync_row();  // the keys are complete
  }

  // The same by bitonic merges.
  __device__ __forceinline__ void sort_many(int n) {
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
          if (a.reaches(b) != falling) {
            keys[low] = b;
            keys[high] = a;
          }
        }
        sync_row();  // before pairs of another stride
      }
    }
  }
};
