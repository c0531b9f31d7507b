// topk and softmax_topk: the k largest elements of each row, sorted, in one read of x (Milakov and Gimelshein,
// Algorithm 4).
//
// Each row, or each of `slices` parts of it, is read chunk by chunk. Instead of k + 1 sorted elements there are a
// bound that k elements so far reach, and a buffer of those that reached it. The first bound comes from the threads'
// maxima of the first chunk. From then on warps read on by themselves, and meet when one finds no room in the buffer:
// the bound is raised to about the k-th of the candidates and of the maxima of what waits, and what does not reach it is
// dropped.
//
//   kThreadsPerRow  32, so that a warp has a row, or all kThreads of the block
//   kBlocks         of which a multiprocessor has room for: what registers go by
//   kVectors        16-byte loads of a thread at a time: with those of its row's other threads, a chunk
//   kMaxima         maxima that a thread has of a chunk
//   kCapacity       keys in the buffer
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
constexpr int kStride = kThreadsPerRow * kVector;  // between two vectors of a thread
constexpr int kStep = kVectors * kStride;
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

  // Halves are widened anew each time: registers have no room for all of them widened.
  __device__ __forceinline__ Score operator[](int i) const {
    auto words = vectors[i / kVector];
    if (sizeof(Element) == 2) words.at[i % kVector / 2] = recomputed(words.at[i % kVector / 2]);
    return widen(reinterpret_cast<const Vector<Element, kVector>&>(words).at[i % kVector]);
  }
};

// Where item i of this thread lies in a chunk. Made anew where it is wanted: no register keeps it through the loop.
__device__ __forceinline__ int place_of(int i) {
  const int thread = uint32(recomputed(threadIdx.x)) % kThreadsPerRow;
  return thread * kVector + i / kVector * kStride + i % kVector;
}

// Which slice of which row; made anew where it is wanted, like Places.
struct Part {
  int64 row, slice, number;

  explicit __device__ __forceinline__ Part(const Params& params) {
    number = int64(recomputed(blockIdx.x)) * kRowsPerBlock + recomputed(threadIdx.x) / kThreadsPerRow;
    row = kSlices ? uint32(number) / uint32(params.slices) : number;  // two launches are for few rows
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
  __device__ __forceinline__ int high(int64 at) const { return int(min_of(end - at, int64(kStep))); }
  __device__ __forceinline__ bool has(int64 at, int place) const { return low(at) <= place && place < high(at); }

  // Of the element there. Elements of lower columns have higher ranks.
  __device__ __forceinline__ uint32 rank(int64 at, int place) const { return ~(uint32(at) + place - head); }

  __device__ __forceinline__ Key key(int64 at, int place) const { return {order(widen(x[at + place])), rank(at, place)}; }

  // What the row does not have is -inf. Whole vectors come first, all at once; few threads have one in part.
  __device__ __forceinline__ void load(int64 at, Chunk& chunk) const {
    const int own = place_of(0), below = low(at) - own, above = high(at) - own;
    const Element* from = x + at + own;
    if (low(at) == 0 && high(at) == kStep) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        chunk.vectors[v] = *reinterpret_cast<const Vector<uint32, 4>*>(from + v * kStride);
      }
      return;
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      auto& vector = reinterpret_cast<Vector<Element, kVector>&>(chunk.vectors[v]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) vector.at[i] = narrow<Element>(-infinity<Score>());
      if (below <= v * kStride && v * kStride + kVector <= above) {
        chunk.vectors[v] = *reinterpret_cast<const Vector<uint32, 4>*>(from + v * kStride);
      }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (below <= v * kStride && v * kStride + kVector <= above) continue;
      auto& vector = reinterpret_cast<Vector<Element, kVector>&>(chunk.vectors[v]);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int here = v * kStride + i;
        if (below <= here && here < above) vector.at[i] = from[here];
      }
    }
  }
};

// One pass over a row.
struct Search {
  const Params& params;
  const Row& row;
  Candidates& candidates;
  Key bound = {0, 0};  // which all elements reach
  Pair pair = Pair::empty();

  __device__ __forceinline__ int k() const { return int(params.k); }
  __device__ __forceinline__ int most() const { return int(params.most); }

  // Of items first to end - 1. In two chains, for one would wait for itself; so do the sums.
  static __device__ __forceinline__ Score largest(const Chunk& chunk, int first, int end) {
    Score max[2] = {chunk[first], chunk[end - 1]};
#pragma unroll
    for (int i = first + 1; i < end - 1; ++i) max[i % 2] = larger(max[i % 2], chunk[i]);
    return larger(max[0], max[1]);
  }

  // The largest of items first to end - 1, where it is one of those in `bits`. Else, as a NaN is, none: all candidates
  // reach the bound without a rank. -inf may be no element, and all elements reach it without a rank.
  __device__ __forceinline__ Key largest_of(const Chunk& chunk, uint32 bits, int first, int end, int64 at) const {
    const Score max = largest(chunk, first, end);
    uint32 equal = 0;
#pragma unroll
    for (int i = first; i < end; ++i) equal |= uint32(same(chunk[i], max)) << i;
    const int found = __ffs(equal & bits) - 1;
    const Key key = {order(max), max == -infinity<Score>() ? 0 : row.rank(at, place_of(found))};
    return found >= 0 && key.reaches(bound) ? key : Key{bound.value, 0};
  }

  // Raises the bound to what about k reach of the candidates and of the maxima of a chunk, of which the items in `bits`
  // are no candidates yet. So a row in rising order has no more candidates than others. At first all items are new, and
  // ranks are left out: they cost more than ties, where they would help, are rare.
  template <bool kFirst> __device__ __forceinline__ void raise(const Chunk& chunk, uint32 bits, int64 at) {
    const int held = min_of(candidates.held, kCapacity);
#pragma unroll
    for (int j = 0; j < kMaxima; ++j) {
      const int first = j * kUnit, end = (j + 1) * kUnit;
      candidates.keys[held + j * kThreadsPerRow + thread_of_row()] =
          kFirst ? Key{order(largest(chunk, first, end)), 0} : largest_of(chunk, bits, first, end, at);
    }
    sync_row();  // all maxima are there
    const Key raised = candidates.threshold(held + kThreadsPerRow * kMaxima, k(), most());
    if (raised.reaches(bound)) bound = raised;
    candidates.drop(held, bound);
  }

  // Takes a chunk into the pair.
  __device__ __forceinline__ void add(const Chunk& chunk, Score max) {
    pair.raise(max);
    const Score shift = BaseE::reference(pair.max);
    Score sums[2] = {Score(0), Score(0)};
#pragma unroll
    for (int i = 0; i < kItems; ++i) sums[i % 2] += BaseE::exp_in_sum(chunk[i] - shift);
    pair.sum += sums[0] + sums[1];
  }

  // The items that may reach the bound, a bit for each: with those that compare to neither side, and equal ones.
  __device__ __forceinline__ uint32 reaching(const Chunk& chunk) const {
    const Score score = score_of(bound.value);
    uint32 bits = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) bits |= uint32(!(chunk[i] < score)) << i;
    return bits;
  }

  // Appends those of the items that reach the bound, read again: they are few, and in the cache. Returns those that there
  // was no room for.
  __device__ __forceinline__ uint32 append(uint32 bits, int64 at) {
#pragma unroll 1
    while (__any_sync(0xffffffff, bits != 0)) {
      const int place = place_of(max_of(__ffs(bits) - 1, 0));
      const bool has = bits != 0 && row.has(at, place);
      const Key key = has ? row.key(at, place) : Key{0, 0};
      const bool fits = candidates.append(key, has && key.reaches(bound));
      if (fits) bits &= bits - 1;
      if (__any_sync(0xffffffff, !fits)) break;
    }
    return bits;
  }

  // Appends what reaches the bound, which is raised when there is no room. Returns once that is done, and behind the last
  // chunk, where there is nothing to append, once all warps are done. `chunk` is the next one, on its way.
  __device__ __forceinline__ void keep(Chunk& chunk, uint32 bits, int64 at) {
    bool lost = false;
#pragma unroll 1
    for (;;) {
      bits = append(bits, at);
      const bool waits = __any_sync(0xffffffff, bits != 0);
      if (!waits && at < row.end) break;
      // A barrier: all warps are here, and the keys are complete.
      if (!any_in_row(waits)) break;
      if (at < row.end) row.load(at, chunk);
      lost = true;
      raise<false>(chunk, bits, at);
      bits &= reaching(chunk);
    }
    if (lost && at + kStep < row.end) row.load(at + kStep, chunk);
  }

  // Leaves the k largest in the buffer, sorted.
  __device__ __forceinline__ void run() {
    Chunk chunk;
    row.load(row.start, chunk);
    if (row.end - row.start > min_of(kFew, 4 * most())) raise<true>(chunk, ~0u, row.start);
#pragma unroll 1
    for (int64 at = row.start; at < row.end; at += kStep) {
      const Score max = largest(chunk, 0, kItems);
      if constexpr (kSoftmax) add(chunk, max);
      // Of equal ones, all have come too late where the first has.
      const Key best = {order(max), row.rank(at, row.low(at))};
      const uint32 bits = best.reaches(bound) ? reaching(chunk) : 0;
      if (at + kStep < row.end) row.load(at + kStep, chunk);
      keep(chunk, bits, at);
    }
    keep(chunk, 0, row.end);
    finish(candidates.held);
  }

  __device__ __forceinline__ void finish(int held) {
    if (held > kFew && held > most()) {
      candidates.drop(held, candidates.threshold(held, k(), most()));
      held = candidates.held;
    }
    candidates.sort(held);
  }
};

// Joins the pairs of a row's threads; all of them get the same. At most once in a kernel.
__device__ __forceinline__ Pair merge_row(Pair pair) {
  const auto merge = [&](int threads) {
    Score max = pair.max;
    for (int mask = 1; mask < threads; mask *= 2) max = max_of(max, __shfl_xor_sync(0xffffffff, max, mask));
    pair.raise(max);
    for (int mask = 1; mask < threads; mask *= 2) pair.sum += __shfl_xor_sync(0xffffffff, pair.sum, mask);
  };
  merge(32);
  if constexpr (!kWarpPerRow) {
    __shared__ Pair warps_smem[kWarps];
    if (threadIdx.x % 32 == 0) warps_smem[threadIdx.x / 32] = pair;
    __syncthreads();  // every warp reads all warps' pairs
    pair = warps_smem[threadIdx.x % kWarps];
    merge(kWarps);
  }
  return pair;
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
    const Key key = keys[j];
    const uint32 column = ~key.rank;
    Result& value = values[kSlices ? j : j * params.values_strides[kMaxAxes]];
    if constexpr (kProbabilities) {
      value = narrow<Result>(BaseE::exp(score_of(key.value) - shift) * inverse);
    } else {
      // Bit for bit: keys know neither -0 nor one NaN from another.
      value = reinterpret_cast<const Result*>(row.x)[row.head + int64(column)];
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
  sync_row();  // the count is 0
  search.run();

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
