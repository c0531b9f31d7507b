// The candidates of a row: keys in shared memory, among them the k largest of what has been read. All threads of the
// row take part in everything here: a warp, or the whole block.
#include "_softmax/selection/topk_keys.cuh"

constexpr bool kWarpPerRow = kThreadsPerRow == 32;
static_assert(kWarpPerRow || kThreadsPerRow == kThreads, "a row has a warp or a block");

constexpr int kWarps = kThreadsPerRow / 32;
constexpr int kCounted = kWarpPerRow ? 32 : 128;  // keys that are sorted by counting, one by each thread
constexpr int kFew = kWarpPerRow ? 64 : 128;      // keys that are sorted without a search for a bound before
constexpr int kUnroll = kWarpPerRow ? 1 : 4;

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

template <typename Bits> __device__ __forceinline__ Bits least_in_warp(Bits bits) {
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(Bits) == 4) return __reduce_min_sync(0xffffffff, bits);
#endif
  for (int mask = 1; mask < 32; mask *= 2) bits = min_of(bits, __shfl_xor_sync(0xffffffff, bits, mask));
  return bits;
}

struct Candidates {
  Key keys[kCapacity + kThreadsPerRow * kMaxima];  // behind those that were appended, the maxima of a chunk
  int counts[2][kWarps];
  int held;  // keys; more than there is room for, once some have found none

  // Appends the keys of those of a warp's threads that want it. False where there is no room.
  __device__ __forceinline__ bool append(Key key, bool wants) {
    const int lane = threadIdx.x % 32;
    const uint32 wanting = __ballot_sync(0xffffffff, wants);
    int slot = 0;
    if (lane == 0) slot = atomicAdd(&held, __popc(wanting));
    slot = __shfl_sync(0xffffffff, slot, 0) + __popc(wanting & ((1u << lane) - 1));
    if (wants && slot < kCapacity) keys[slot] = key;
    return !wants || slot < kCapacity;
  }

  // A threshold that at least k of n keys reach, and at most `most` if there is one. It lies between the least and the
  // largest part of a key: each warp tries one between two of as many sections and one more, until few keys or one
  // threshold are left. `reached` is how many reach the least, and then the answer.
  template <typename Part, typename Reaches>
  __device__ __forceinline__ auto select(int n, int k, int most, int& reached, Part part, Reaches reaches) {
    using Bits = decltype(part(keys[0]));
    const int warp = thread_of_row() / 32, lane = threadIdx.x % 32;
    Bits low = ~Bits(0), other_high = low;
#pragma unroll 1
    for (int i = lane; i < n; i += 32) {
      low = min_of(low, part(keys[i]));
      other_high = min_of(other_high, Bits(~part(keys[i])));
    }
    low = least_in_warp(low);
    Bits high = ~least_in_warp(other_high);
#pragma unroll 1
    for (int round = 0; low != high && reached > most; ++round) {
      const Bits base = low, span = high - low, step = span / (kWarps + 1) + 1;
      const auto between = [&](int section) { return base + min_of(Bits(section * step), span); };
      const Bits trial = between(warp + 1);
      int count = 0;
#pragma unroll kUnroll
      for (int i = lane; i < n; i += 32) count += reaches(keys[i], trial);
      count = sum_in_warp(count);
      int section = count >= k;
      if constexpr (!kWarpPerRow) {
        if (lane == 0) counts[round % 2][warp] = count;
        sync_row();  // all counts are there; the next but one, in the same place, will come after another barrier
        count = counts[round % 2][lane % kWarps];
        section = 32 - __clz(__ballot_sync(0xffffffff, count >= k) & ((1u << kWarps) - 1));
        count = __shfl_sync(0xffffffff, count, max_of(section - 1, 0));
      }
      if (section > 0) reached = count;
      if (section > 0) low = between(section);
      if (section < kWarps) high = between(section + 1) - 1;
    }
    return low;
  }

  // A key that at least k of n reach, and at most `most` if there is one.
  __device__ __forceinline__ Key threshold(int n, int k, int most) {
    int reached = n;
    const Order value = select(
        n, k, most, reached, [](Key key) { return key.value; },
        [](Key key, Order trial) { return key.value >= trial; });
    if (reached <= most) return {value, 0};
    sync_row();  // all have read the last counts
    const uint32 rank = select(
        n, k, most, reached, [](Key key) { return key.rank; },
        [value](Key key, uint32 trial) { return key.reaches({value, trial}); });
    return {value, rank};
  }

  // Drops those of n keys that do not reach the bound.
  __device__ __forceinline__ void drop(int n, Key bound) {
    const int thread = thread_of_row();
    sync_row();  // all know n, and have read what is overwritten now
    if (thread == 0) held = 0;
#pragma unroll 1
    for (int base = 0; base < n; base += kThreadsPerRow) {
      const int i = base + thread;
      const Key key = i < n ? keys[i] : Key{0, 0};
      sync_row();  // all have read what is overwritten now, and the count is 0
      append(key, i < n && key.reaches(bound));
    }
    sync_row();  // the count and the keys are complete
  }

  // Sorts n keys, the largest first.
  __device__ __forceinline__ void sort(int n) {
    if (n <= kCounted) {
      sort_by_counts(n);
    } else {
      sort_by_merges(n);
    }
  }

  // The place of each key is how many are larger.
  __device__ __forceinline__ void sort_by_counts(int n) {
    const int thread = thread_of_row();
    const Key own = keys[thread];
    int place = 0;
    if (thread < n) {
#pragma unroll 4
      for (int i = 0; i < n; ++i) place += !own.reaches(keys[i]);
    }
    sync_row();  // all have read what is overwritten now
    if (thread < n) keys[place] = own;
    sync_row();  // the keys are complete
  }

  // Bitonic merges: of runs of 64 in the registers of a warp, then of runs in shared memory.
  __device__ __forceinline__ void sort_by_merges(int n) {
    const int thread = thread_of_row();
    int padded = 64;
    while (padded < n) padded *= 2;
    for (int i = n + thread; i < padded; i += kThreadsPerRow) keys[i] = {0, 0};
    sync_row();  // all keys are there
#pragma unroll 1
    for (int run = thread / 32; run < padded / 64; run += kWarps) sort_run(run);
    sync_row();  // all runs are sorted
#pragma unroll 1
    for (int size = 128; size <= padded; size *= 2) {
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

  // Sorts 64 keys, of which each thread of a warp takes two neighbours: in falling order, or rising in every other run.
  __device__ __forceinline__ void sort_run(int run) {
    const int lane = threadIdx.x % 32, own_pair = 32 * run + lane;
    Key own[2] = {keys[2 * own_pair], keys[2 * own_pair + 1]};
#pragma unroll 1
    for (int size = 1; size <= 32; size *= 2) {
      const bool falling = (own_pair & size) == 0;
#pragma unroll 1
      for (int stride = size / 2; stride > 0; stride /= 2) {
        const bool larger = falling == ((lane & stride) == 0);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Key other = own[e].of_lane(lane ^ stride);
          if (own[e].reaches(other) != larger) own[e] = other;
        }
      }
      if (own[0].reaches(own[1]) != falling) {
        const Key first = own[0];
        own[0] = own[1];
        own[1] = first;
      }
    }
    keys[2 * own_pair] = own[0];
    keys[2 * own_pair + 1] = own[1];
  }
};
