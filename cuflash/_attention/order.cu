// In which order query tiles are worked on where variants hide places. Those that visit more than twice as many key tiles as the mean come
// first, since whoever began one of them last would be waited for. The last ones go by how many they visit, most first, so that all blocks
// end at about the same time. The others keep their order, in which neighbours share keys.
//
// One block, between tiles.cu and the attention kernel. Constants: those of the attention kernel whose tiles they are.
#include "_attention/scan.cuh"
#include "_attention/tile_loop.cuh"

constexpr int kLast = 512;  // tasks that go by what they visit: more would be of more heads than L2 has room for the keys of
constexpr int kWarps = kSorters / 32, kBuckets = 128;

__device__ __forceinline__ int visits(const Params& params, int task) {
  const BlockIndex index(params, task * kSlices);
  const uint32* words = params.bits.of(index);
  const int length = params.bits.words;
  int count = 0;
  if (length % 4 == 0) {  // lanes have words far apart: the fewer loads, the better
#pragma unroll 2
    for (int word = 0; word < length; word += 4) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(words + word));
      count += __popc(four.x) + __popc(four.y) + __popc(four.z) + __popc(four.w);
    }
  } else {
#pragma unroll 2
    for (int word = 0; word < length; ++word) count += __popc(__ldg(words + word));
  }
  return count;
}

// The sum over all threads up to this one, and over all of them.
__device__ __noinline__ int2 sums(int x) {
  __shared__ int all;
  const int up_to_here = scan(x, [](int a, int b) { return a + b; });
  if (threadIdx.x == kSorters - 1) all = up_to_here;
  __syncthreads();
  return {up_to_here, all};
}

// Where this thread's task stands among those of all threads, by what they visit, most first: a counting sort that leaves equals as they
// are. `share` is what it visits, of twice the mean. Each warp has counts of its own, bucket by bucket.
__device__ __forceinline__ int place_by_visits(float share, bool exists) {
  constexpr int kEach = kBuckets * kWarps / kSorters;
  __shared__ int4 counts[kSorters];
  static_assert(kEach == 4, "a thread adds up four counts");
  counts[threadIdx.x] = {0, 0, 0, 0};
  __syncthreads();
  const int bucket = exists ? kBuckets - 1 - min_of(int(share * kBuckets), kBuckets - 1) : kBuckets;
  const uint32 equals = __match_any_sync(~0u, bucket), before = equals & ((1u << threadIdx.x % 32) - 1);
  int& own = reinterpret_cast<int*>(counts)[min_of(bucket, kBuckets - 1) * kWarps + threadIdx.x / 32];
  if (exists && before == 0) own = __popc(equals);
  __syncthreads();
  const int4 four = counts[threadIdx.x];
  const int end = sums(four.x + four.y + four.z + four.w).x, third = end - four.w, second = third - four.z, first = second - four.y;
  counts[threadIdx.x] = {first - four.x, first, second, third};
  __syncthreads();
  return own + __popc(before);
}

// Neighbouring tasks of a thread, 64 at most, and where they go.
struct Neighbours {
  int begin, end;
  uint64 are_long = 0;            // a bit for each
  int first_long = 0, first = 0;  // the places of those that are long, and of the others

  template <typename Put> __device__ __forceinline__ void each(Put put) const {
    int next_long = first_long, next = first;
#pragma unroll 1
    for (int task = begin; task < end; ++task) put(are_long >> (task - begin) & 1 ? next_long++ : next++, task);
  }
};

// How many key tiles each task visits waits where the order will be: that costs less than to count them again.
extern "C" __global__ void __launch_bounds__(kSorters, 1) attention_order(const __grid_constant__ Params params) {
  int* order = params.bits.order;
  const int tasks = params.bits.tasks, each = (tasks + kSorters - 1) / kSorters, begin = min_of(int(threadIdx.x) * each, tasks);
  Neighbours own{begin, min_of(begin + each, tasks)};
  int visited = 0;
#pragma unroll 2
  for (int task = own.begin; task < own.end; ++task) visited += order[task] = visits(params, task);

  const int64 twice = 2ll * sums(visited).y;
#pragma unroll 1
  for (int task = own.begin; task < own.end; ++task) own.are_long |= uint64(int64(order[task]) * tasks > twice) << (task - begin);
  const int count = __popcll(own.are_long);
  const int2 all_long = sums(count);
  own.first_long = all_long.x - count;
  own.first = all_long.y + begin - own.first_long;

  __shared__ int last_tasks[kLast], last_visits[kLast];
  const int first_last = max_of(0, tasks - kLast);
  own.each([&](int place, int task) {
    if (place < first_last) return;
    last_tasks[place - first_last] = task;
    last_visits[place - first_last] = order[task];
  });
  __syncthreads();  // and everybody has read what is now replaced
  own.each([&](int place, int task) {
    if (place < first_last) order[place] = task;
  });
  const bool exists = int(threadIdx.x) < min_of(kLast, tasks);
  const int place = place_by_visits(exists ? last_visits[threadIdx.x] * (float(tasks) / max_of(twice, int64(1))) : 0, exists);
  if (exists) order[first_last + place] = last_tasks[threadIdx.x];
}
