// topk and softmax_topk: the k largest elements of each row, sorted, in one read of x (Milakov and Gimelshein,
// Algorithm 4).
//
// Each row, or each of `slices` parts of it, is read chunk by chunk. Instead of k + 1 sorted elements there are a bound
// that k elements so far are at least equal to, and a buffer of those that were above the bound. Later elements that only
// equal the bound have higher columns and come too late. When the buffer would overflow, the bound is raised: to the k-th
// largest candidate, and to the k-th largest of the maxima that threads have of parts of the chunk.
//
//   kThreadsPerRow  32, so that a warp has a row, or all kThreads of the block
//   kBlocks         of which a multiprocessor has room for: what registers go by
//   kVectors        16-byte loads of a thread at a time: with those of its row's other threads, a chunk
//   kMaxima         maxima that a thread has of a chunk
//   kCapacity       keys in the buffer: at least `most` and `most` parts of a chunk
//   kLoops          a row may be longer than a chunk
//   kSoftmax        the pair (m, d) is taken from the same read
//   kSlices         rows are in parts: each leaves its k largest, and its pair, for a second launch
//   kMerges         that second launch: x is what the parts left, in their order and so with equal elements in theirs
//   kProbabilities  values are probabilities and not elements of x
#include "_softmax/selection/topk_candidates.cuh"
#include "device/online_softmax.cuh"

constexpr int kMaxAxes = 4;
constexpr int kVector = 16 / sizeof(Element);
constexpr int kItems = kVectors * kVector;
constexpr int kUnit = kItems / kMaxima;
constexpr int kStep = kThreadsPerRow * kItems;
constexpr int kRowsPerBlock = kThreads / kThreadsPerRow;
static_assert(kOuterAxes >= 1 && kOuterAxes <= kMaxAxes, "rows need 1 to 4 axes");
static_assert(kItems <= 32, "an item has a bit of a word");
static_assert(kItems % kMaxima == 0, "maxima are of equal parts");

using Pair = RunningPair<Score, BaseE>;

struct Params {
  const Element* x;         // [outer..., columns]
  Result* values;           // [outer..., k]; [rows, slices, k] with kSlices
  int64* indices;           // [outer..., k]; [rows, slices, k] with kSlices
  Pair* pairs;              // [rows, slices]
  const int64* columns_of;  // [rows, columns], where the elements of x were; kMerges
  int64 rows;               // the product of the outer sizes
  int64 columns;
  int64 slices;
  int64 k;
  int64 most;  // candidates that are kept when the bound is raised: at least k
  int64 outer[kMaxAxes];
  int64 x_strides[kMaxAxes];  // in elements
  int64 values_strides[kMaxAxes + 1];
  int64 indices_strides[kMaxAxes + 1];
};
static_assert(sizeof(Params) == 224, "the host packs as many bytes");

__device__ __forceinline__ int64 offset(const Params& params, int64 row, const int64* strides) {
  int64 sum = 0;
#pragma unroll
  for (int axis = kOuterAxes - 1; axis > 0; --axis) {
    sum += row % params.outer[axis] * strides[axis];
    row /= params.outer[axis];
  }
  return sum + row * strides[0];
}

// What a thread has of a chunk: vector v of thread t lies behind vector v of thread t - 1. In words, so that two halves
// stay in one register.
struct Chunk {
  Vector<uint32, 4> vectors[kVectors];

  __device__ __forceinline__ Score operator[](int i) const {
    return widen(reinterpret_cast<const Vector<Element, kVector>&>(vectors[i / kVector]).at[i % kVector]);
  }
};

// Where this thread's items lie in a chunk. Made anew where it is wanted: no register keeps it through the loop.
struct Places {
  int first = recomputed(thread_of_row()) * kVector;

  __device__ __forceinline__ int operator[](int i) const {
    return first + i / kVector * (kThreadsPerRow * kVector) + i % kVector;
  }
};

// Which slice of which row; made anew where it is wanted, like Places.
struct Part {
  int64 row, slice, number;

  explicit __device__ __forceinline__ Part(const Params& params) {
    number = int64(recomputed(blockIdx.x)) * kRowsPerBlock + recomputed(threadIdx.x) / kThreadsPerRow;
    row = kSlices ? number / params.slices : number;
    slice = kSlices ? number - row * params.slices : 0;
  }
};

// A row or a slice of it. Positions count from the aligned address at or before the row's first element.
struct Row {
  const Element* x;  // position 0
  int head;          // the position of column 0: nothing is before it
  int64 start, end;  // the slice's positions; `start` is aligned

  __device__ __forceinline__ Row(const Params& params, Part part) {
    const Element* begin = params.x + offset(params, part.row, params.x_strides);
    head = int(reinterpret_cast<uint64>(begin) % 16 / sizeof(Element));
    x = begin - head;
    end = head + params.columns;
    start = 0;
    if constexpr (kSlices) {
      const int64 width = end / params.slices / kVector * kVector;
      start = part.slice * width;
      if (part.slice + 1 < params.slices) end = start + width;
    }
  }

  // The places from `low` on and below `high` of the chunk at `at` are elements of the row.
  __device__ __forceinline__ int low(int64 at) const { return at == 0 ? head : 0; }
  __device__ __forceinline__ int high(int64 at) const { return end - at < kStep ? int(end - at) : kStep; }
  __device__ __forceinline__ bool has_all(int64 at) const { return low(at) == 0 && at + kStep <= end; }

  __device__ __forceinline__ uint32 column(int64 at, int place) const { return uint32(at) + place - head; }

  // What the row does not have is -inf.
  __device__ __forceinline__ void load(int64 at, Chunk& chunk) const {
    const Places places;
    const Element* from = x + at;
    if (has_all(at)) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        chunk.vectors[v] = *reinterpret_cast<const Vector<uint32, 4>*>(from + places[v * kVector]);
      }
      return;
    }
    const int below = low(at), above = high(at);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int here = places[v * kVector];
      if (below <= here && here + kVector <= above) {
        chunk.vectors[v] = *reinterpret_cast<const Vector<uint32, 4>*>(from + here);
        continue;
      }
      Vector<Element, kVector> vector;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const bool present = below <= here + i && here + i < above;
        vector.at[i] = present ? from[here + i] : narrow<Element>(-infinity<Score>());
      }
      chunk.vectors[v] = reinterpret_cast<const Vector<uint32, 4>&>(vector);
    }
  }

  // A bit for each item that is an element of the row.
  __device__ __forceinline__ uint32 present(int64 at) const {
    if (has_all(at)) return ~0u;
    const Places places;
    const int below = low(at), above = high(at);
    uint32 bits = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) bits |= uint32(below <= places[i] && places[i] < above) << i;
    return bits;
  }
};

// One pass over a row.
struct Search {
  const Params& params;
  const Row& row;
  Candidates& candidates;
  int held = 0;     // candidates
  Order bound = 0;  // nothing is below it at first
  Pair pair = Pair::empty();

  __device__ __forceinline__ int k() const { return int(params.k); }
  __device__ __forceinline__ int most() const { return int(params.most); }

  __device__ __forceinline__ void take_pair(const Chunk& chunk, Score largest) {
    pair.raise(largest);
    const Score shift = BaseE::reference(pair.max);
#pragma unroll
    for (int i = 0; i < kItems; ++i) pair.sum += BaseE::exp_in_sum(chunk[i] - shift);
  }

  // The items above the bound, a bit for each. More where the bound is no number, as when it tells NaN from infinity.
  __device__ __forceinline__ uint32 above(const Chunk& chunk) const {
    const Score bound_score = score_of(bound);
    uint32 bits = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) bits |= uint32(exceeds(chunk[i], bound_score)) << i;
    return bits;
  }

  // Raises the bound to the k-th largest of the maxima; returns the items that were above the bound and reach it. They
  // are in at most `most` parts.
  __device__ __forceinline__ uint32 tighten(const Chunk& chunk, const Score (&maxima)[kMaxima], int64 at) {
    const Places places;
    Order values[kMaxima];
#pragma unroll
    for (int j = 0; j < kMaxima; ++j) values[j] = order(maxima[j]);
    int reached = most() + 1;  // more than `most`, however many
    const Order value = select<Order>(k(), most(), reached, [&](Order trial) {
      int n = 0;
#pragma unroll
      for (int j = 0; j < kMaxima; ++j) n += count_in_row(values[j] >= trial);
      return n;
    });
    uint32 rank = 0;
    if (reached > most()) {  // many are equal: of them the lowest columns
      const uint32 present = row.present(at);
      uint32 ranks[kMaxima];
#pragma unroll
      for (int j = 0; j < kMaxima; ++j) {
        ranks[j] = values[j] > value ? ~0u : 0;
#pragma unroll
        for (int i = (j + 1) * kUnit - 1; i >= j * kUnit; --i) {  // the first, by coming last
          const bool ties = values[j] == value && order(chunk[i]) == value && (present >> i & 1);
          if (ties) ranks[j] = ~row.column(at, places[i]);
        }
      }
      rank = select<uint32>(k(), most(), reached, [&](uint32 trial) {
        int n = 0;
#pragma unroll
        for (int j = 0; j < kMaxima; ++j) n += count_in_row(ranks[j] >= trial);
        return n;
      });
    }
    uint32 bits = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Key key = {order(chunk[i]), ~row.column(at, places[i])};
      bits |= uint32(key.value > bound && key.reaches(value, rank)) << i;
    }
    bound = max_of(bound, value);
    return bits & row.present(at);
  }

  __device__ __forceinline__ void append(uint32 bits, int slot, int64 at) {
    const Places places;
    while (bits != 0) {
      const int here = places[__ffs(bits) - 1];
      bits &= bits - 1;
      candidates.keys[slot++] = {order(widen(row.x[at + here])), ~row.column(at, here)};
    }
  }

  __device__ __forceinline__ void take(const Chunk& chunk, int64 at) {
    Score maxima[kMaxima];
#pragma unroll
    for (int j = 0; j < kMaxima; ++j) {
      maxima[j] = chunk[j * kUnit];
#pragma unroll
      for (int i = 1; i < kUnit; ++i) maxima[j] = larger(maxima[j], chunk[j * kUnit + i]);
    }
    Score largest = maxima[0];
#pragma unroll
    for (int j = 1; j < kMaxima; ++j) largest = larger(largest, maxima[j]);
    if (kSoftmax) take_pair(chunk, largest);

    const bool passes = order(largest) > bound;
    if (!any_in_row(passes)) return;  // a barrier too: all have read `held`, and the keys are complete
    uint32 bits = 0;
    int slot = 0;
    bool fits = bound != 0;  // the first chunk passes entirely
    if (fits) {
      if (passes) bits = above(chunk) & row.present(at);
      slot = candidates.reserve(__popc(bits));
      sync_row();  // everyone has reserved
      fits = candidates.held <= kCapacity;
    }
    if (!fits) {
      sync_row();  // everyone has seen that
      if (thread_of_row() == 0) candidates.held = held;
      sync_row();  // the reservations are taken back
      if (held > most()) bound = max_of(bound, candidates.shrink(held, k(), most()));
      bits = tighten(chunk, maxima, at);
      slot = candidates.reserve(__popc(bits));
      sync_row();  // everyone has reserved
    }
    append(bits, slot, at);
    held = candidates.held;
  }

  __device__ __forceinline__ void run() {
    Chunk chunk, next;
    row.load(row.start, chunk);
#pragma unroll 1
    for (int64 at = row.start;; at += kStep) {
      const bool last = !kLoops || at + kStep >= row.end;
      if (!last) row.load(at + kStep, next);  // on its way while this one is looked at
      take(chunk, at);
      if (last) break;
      chunk = next;
    }
    sync_row();  // the keys are complete
    if (held > most()) {
      candidates.shrink(held, k(), most());
      held = candidates.held;
    }
    candidates.sort(held);
  }
};

// Joins the pairs of a row's threads; all of them get the same. At most once in a kernel.
__device__ __forceinline__ Pair merge_row(Pair pair) {
  const auto merge = [&](int threads) {
    for (int mask = 1; mask < threads; mask *= 2) {
      pair.merge({__shfl_xor_sync(0xffffffff, pair.max, mask), __shfl_xor_sync(0xffffffff, pair.sum, mask)});
    }
  };
  merge(32);
  if constexpr (!kWarpPerRow) {
    constexpr int kWarps = kThreads / 32;
    __shared__ Pair warps_smem[kWarps];
    if (threadIdx.x % 32 == 0) warps_smem[threadIdx.x / 32] = pair;
    __syncthreads();  // every warp reads all warps' pairs
    pair = warps_smem[threadIdx.x % kWarps];
    merge(kWarps);
  }
  // Threads may differ in the last bit, from the order in which they added.
  return {__shfl_sync(0xffffffff, pair.max, 0), __shfl_sync(0xffffffff, pair.sum, 0)};
}

__device__ __forceinline__ void write(const Params& params, const Row& row, const Key* keys, Pair pair) {
  const Part part(params);
  const Score infinite = infinity<Score>(), shift = BaseE::reference(pair.max);
  // A row with +inf has inf / inf in it: NaN throughout, as in SciPy.
  const Score inverse = pair.max == infinite ? infinite - infinite : 1 / pair.sum;
  const int64 packed = part.number * params.k;
  Result* values = params.values + (kSlices ? packed : offset(params, part.row, params.values_strides));
  int64* indices = params.indices + (kSlices ? packed : offset(params, part.row, params.indices_strides));
  for (int j = thread_of_row(); j < params.k; j += kThreadsPerRow) {
    const uint32 column = ~keys[j].rank;
    const Element element = row.x[row.head + int64(column)];
    Result& value = values[kSlices ? j : j * params.values_strides[kMaxAxes]];
    if constexpr (kProbabilities) {
      value = narrow<Result>(BaseE::exp(widen(element) - shift) * inverse);
    } else {
      value = element;
    }
    indices[kSlices ? j : j * params.indices_strides[kMaxAxes]] =
        kMerges ? params.columns_of[part.row * params.columns + column] : int64(column);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) topk(const __grid_constant__ Params params) {
  __shared__ Candidates rows_smem[kRowsPerBlock];
  const int mine = threadIdx.x / kThreadsPerRow;
  const Part part(params);
  if (part.row >= params.rows) return;  // a whole warp, which has no barriers with the others
  const Row row(params, part);
  Search search = {params, row, rows_smem[mine]};
  if (thread_of_row() == 0) search.candidates.held = 0;
  search.run();  // which begins with a barrier

  Pair pair = search.pair;
  if constexpr (kMerges && kProbabilities) {
    const Pair* pairs = params.pairs + Part(params).row * params.slices;
    for (int64 i = thread_of_row(); i < params.slices; i += kThreadsPerRow) pair.merge(pairs[i]);
  }
  if constexpr (kSoftmax || kProbabilities) pair = merge_row(pair);
  if constexpr (kSoftmax && kSlices) {
    if (thread_of_row() == 0) params.pairs[Part(params).number] = pair;
  }
  write(params, row, search.candidates.keys, pair);
}
