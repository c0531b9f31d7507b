// FlashAttention forward, the loop that every portable kernel shares.
//
//   for each tile of kBlockM queries (a thread block):            Dao, "FlashAttention-2", Algorithm 1
//     for each tile of kBlockN keys that some of its rows may see:
//       S = Q K^T                                                 Products::scores
//       S as a variant makes it, if there is one                  Variant, written by variants/cuda.py
//       (m, d), P = online softmax of S; O rescaled               online_softmax.cuh
//       P without what dropout drops, if kDropout                 dropout.cuh
//       O += P V                                                  Products::weigh
//     O / d, lse = m + log d
//
// `Products` is the arithmetic: which element of S and O a thread holds, and the two products. It brings
//   T                                     the accumulators' type
//   kRows, kScores, kOutputs, kRowLanes   rows a thread holds, scores and outputs a row, lanes that share a row
//   QTile, KTile, VTile                   how the operands lie in shared memory
//   row(r), key(c), output(c)             the place of a thread's element in the block's tiles; warp_grid.cuh has that of its warp
//   scores(s, q, k), weigh(o, s, v)       S += Q K^T and O += P V
// and expects Variant and, as constants: Element, Output, kHeadDim, kHeadDimV, kSlices, kBlockM, kBlockN, kThreads, kStages, kDropout,
// kMaskInLoop, for masks whose copy for each score would be too long, and kVarlen, with which batch entries are sequences in packed arrays:
// each has rows and keys of its own there.
#include "_attention/dropout.cuh"
#include "_attention/sequences.cuh"
#include "_attention/warp_grid.cuh"
#include "device/online_softmax.cuh"
#include "device/shared_tile.cuh"

constexpr int kBatchAxes = 4;
static_assert(kBatchAxes == expression::kBatchAxes, "arrays of variants are walked along the same axes");

// A [batch..., heads, length, dim] array. Strides in elements, of any sign, 0 where it is broadcast.
template <typename T> struct Strided {
  T* data;
  int64 batch[kBatchAxes];
  int64 head;
  int64 row;
};

// An integer for each batch: 4 or 8 bytes each, or none at all.
struct PerBatch {
  const void* data;
  int64 batch[kBatchAxes];  // in elements
  int64 bytes;              // 4, 8, or 0: none
};

// Division of numbers below 2^31 by a length that the host knows: a product and a shift, in place of a long subroutine.
struct Divisor {
  uint32 length, magic, shift;

  // The last digit of `number` in base `length`, which leaves it.
  __device__ __forceinline__ int take(int& number) const {
    const int rest = int(uint64(uint32(number)) * magic >> shift), digit = number - rest * int(length);
    number = rest;
    return digit;
  }
};

// Where variants hide places, the key tiles that each query tile visits (tiles.cu): a bit for each in which some row sees some key, then
// one for each in which some row does not see some key.
struct TileBits {
  uint32* data;             // [batch..., heads, query tiles, 2, words]
  uint32* counter;          // of the query tiles that blocks have taken, beyond the first of each; tiles.cu resets it
  int* order;               // [tasks], which query tiles come first (order.cu); null: as they are numbered
  int64 batch[kBatchAxes];  // in words; 0 along what they do not depend on
  int64 head;
  int words;
  int tasks;                // query tiles, over all heads and batches

  template <typename Index> __device__ __forceinline__ uint32* of(const Index& index) const {
    return data + index.offset(batch) + index.head * head + (kVarlen ? index.sequence.first_tile + index.tile : index.tile) * 2 * words;
  }
};

// What dropout drops; for kernels without kDropout it is nothing.
struct Dropout {
  uint64 seed;
  int64 entries[kBatchAxes];     // by what the number of a batch entry, counted through all batch axes, grows along each
  int64 first;                   // the number of the first
  Accumulator<Element> rescale;  // 1 / the probability to keep a weight
  uint32 threshold;              // 2^16 times the probability to drop it

  // `entry` is the place along `entries`.
  __device__ __forceinline__ Dropping of(int head, int64 entry) const { return {seed, threshold, uint32(head), uint32(first + entry)}; }
};

struct Params {
  Strided<const Element> q;            // [batch..., heads, len_q, head_dim]
  Strided<const Element> k;            // [batch..., kv_heads, len_k, head_dim]
  Strided<const Element> v;            // [batch..., kv_heads, len_k, head_dim_v]
  Strided<Output> out;                 // [batch..., heads, len_q, head_dim_v]
  Strided<Accumulator<Element>> lse;   // [batch..., heads, len_q]; its row stride is `row`; data may be null
  PerBatch q_starts, kv_lengths;
  int64 q_start;                       // where there is no array; kEndAligned: length - len_q
  int64 left, right;                   // keys a row sees on either side of its diagonal
  Accumulator<Element> scale_log2;     // > 0: scale log2(e)
  Accumulator<Element> factor;         // 1; -1 or 0 where the scale was negative or zero: scores are multiplied by it first
  Accumulator<Element> scale;          // itself, for variants that change scores, in place of the two
  Divisor batch_shape[kBatchAxes];
  Divisor heads, group;                // group: heads / kv_heads
  Divisor sweep, last_sweep;           // (batch, head) pairs that advance through the query tiles together, and what is left for the last
  Divisor tiles_of_sweep;              // query tiles times sweep
  int sweeps;
  int len_q, len_k, head_dim, head_dim_v;
  int pack_shift;  // 2^pack_shift query heads that share keys count as one in `heads`, `group` and `len_q`: their rows alternate
  int by_head;     // with variants: pairs of a head follow one another, not those of a batch entry
  Variant variant;
  TileBits bits;
  Sequences sequences;  // with kVarlen; len_q and len_k are then those of the packed arrays
  Dropout dropout;
};

constexpr int64 kEndAligned = -(1ll << 62);

// A score may exceed its row's reference by this power of two before O is rescaled: most tiles then only add. The largest P is then
// not exactly 1, and rounding it to 16 bits costs what only a float32 output would show.
constexpr int kSlack = sizeof(Element) == 2 && sizeof(Output) == 4 ? 0 : 8;

// A reference is rounded before it is subtracted. Up to this size, by 4 at most: the weight of a score that is not behind fits 16 bits.
// Scores of a variant are in base 2 already, and nothing is rounded.
constexpr Accumulator<Element> kLargestReference = Variant::kHasScore                      ? kLargest<Accumulator<Element>>
                                                   : sizeof(Accumulator<Element>) == 8 ? double(1ull << 56)
                                                                                       : float(1 << 27);

// The part of the output that is this block's: a tile of queries and one of kSlices slices of kHeadDimV columns.
// Tiles that see most keys come first, and `sweep` heads advance together so that their keys stay in L2.
struct BlockIndex {
  int tile, head, first_column = 0;
  int batch[kBatchAxes];
  Sequence sequence = {};  // with kVarlen; of no rows for a block that has nothing to do

  __device__ __forceinline__ explicit BlockIndex(const Params& params) : BlockIndex(params, recomputed(blockIdx.x)) {}

  // The part that block number `sweep` of a grid with a block for each part has.
  __device__ __forceinline__ BlockIndex(const Params& params, int sweep) {
    if (kSlices > 1) {
      first_column = sweep % kSlices * kHeadDimV;
      sweep /= kSlices;
    }
    if (kVarlen) {
      find_in_sequences(params, sweep);
    } else {
      find_in_sweeps(params, sweep);
    }
  }

  __device__ __forceinline__ void find_in_sweeps(const Params& params, int sweep) {
    int place = params.tiles_of_sweep.take(sweep);
    int pair = sweep * params.sweep.length + (sweep < params.sweeps - 1 ? params.sweep : params.last_sweep).take(place);
    tile = (params.len_q - 1) / kBlockM - place;
    const bool by_head = (Variant::kHasScore || Variant::kHasMask) && params.by_head;
    if (!by_head) head = params.heads.take(pair);
#pragma unroll
    for (int axis = kBatchAxes - 1; axis >= 0; --axis) batch[axis] = params.batch_shape[axis].take(pair);
    if (by_head) head = pair;
  }

  // Sequences follow one another, the heads of each, and the tiles of these, so that keys stay in L2.
  __device__ __forceinline__ void find_in_sequences(const Params& params, int number) {
    const Sequences& all = params.sequences;
    tile = head = 0;
#pragma unroll
    for (int axis = 0; axis < kBatchAxes; ++axis) batch[axis] = 0;
    int place = number;
    params.heads.take(place);  // as many tiles of all heads lie before a sequence's as tiles of one head, times the heads
    if (place >= *all.tiles) return;
    const int entry = all.of_tile[place];
    sequence = all.each[entry];
    const int own = number - sequence.first_tile * int(params.heads.length);
    head = own / sequence.tiles;
    tile = sequence.tiles - 1 - own % sequence.tiles;
    batch[kBatchAxes - 1] = min_of(entry, all.count - 1);  // rows of no sequence read what is the last one's
  }

  __device__ __forceinline__ int len_q(const Params& params) const { return kVarlen ? sequence.rows : params.len_q; }
  __device__ __forceinline__ int len_k(const Params& params) const { return kVarlen ? sequence.keys : params.len_k; }

  __device__ __forceinline__ int64 offset(const int64 (&strides)[kBatchAxes]) const {
    int64 sum = 0;
#pragma unroll
    for (int axis = 0; axis < kBatchAxes; ++axis) sum += batch[axis] * strides[axis];
    return sum;
  }
  template <typename T> __device__ __forceinline__ T* rows_of(const Strided<T>& array, int head) const {
    return array.data + offset(array.batch) + head * array.head + sequence.first_row * array.row;
  }
  template <typename T> __device__ __forceinline__ T* keys_of(const Strided<T>& array, int head) const {
    return array.data + offset(array.batch) + head * array.head + sequence.first_key * array.row;
  }
  __device__ __forceinline__ int64 value_of(const PerBatch& array, int64 otherwise) const {
    if (array.bytes == 0) return otherwise;
    const int64 place = offset(array.batch);
    return array.bytes == 4 ? static_cast<const int*>(array.data)[place] : static_cast<const int64*>(array.data)[place];
  }
};

__device__ __forceinline__ int clamp(int64 x, int64 low, int64 high) {
  return int(min_of(max_of(x, low), high));
}

// Of a key tile, seen from a warp's rows: none of them sees any of it, some see some of it, all see all of it.
enum class Place { kOutside, kBorder, kInside };

// The keys of a block's query rows. Causal, window, q_start and lengths are one thing: the block's row i may see the keys [begin(i), end(i)).
// The rows of packed heads that alternate stand at one place.
struct KeyInterval {
  int first, last;  // begin and end of row 0 before clamping to [0, length)
  int length;
  int start;  // the key position of query 0
  int rows;   // rows of the block that exist
  int pack_shift;

  __device__ __forceinline__ KeyInterval(const Params& params, const BlockIndex& index) : pack_shift(params.pack_shift) {
    const int len_q = index.len_q(params) >> pack_shift, len_k = index.len_k(params), top = index.tile * kBlockM >> pack_shift;
    length = clamp(index.value_of(params.kv_lengths, len_k), 0, len_k);  // never trusted
    const bool aligned = params.q_starts.bytes == 0 && params.q_start == kEndAligned;
    start = aligned ? length - len_q : clamp(index.value_of(params.q_starts, params.q_start), -(1 << 30), 1 << 30);
    first = top + clamp(start - params.left, -len_q, len_k);  // further out changes nothing, and int suffices
    last = top + clamp(start + params.right + 1, -len_q, len_k);
    rows = min_of(kBlockM, index.len_q(params) - index.tile * kBlockM);
  }
  __device__ __forceinline__ int begin(int row) const { return max_of(first + (row >> pack_shift), 0); }
  __device__ __forceinline__ int end(int row) const { return max_of(min_of(last + (row >> pack_shift), length), 0); }

  // The keys that any of the block's rows may see.
  __device__ __forceinline__ int begin() const { return begin(recomputed(0)); }
  __device__ __forceinline__ int end() const { return end(recomputed(rows) - 1); }

  // Where the kBlockN keys from `key` on lie for the rows of this warp.
  template <int kWarpRows> __device__ __forceinline__ Place place(int key) const {
    const int top = WarpGrid<kWarpRows>::first_row(recomputed(threadIdx.x)), bottom = min_of(top + kWarpRows, rows) - 1;
    if (top > bottom || key >= end(bottom) || key + kBlockN <= begin(top)) return Place::kOutside;
    return key >= begin(bottom) && key + kBlockN <= end(top) ? Place::kInside : Place::kBorder;
  }
};

// Where row i of the block's tile stands, for a variant.
__device__ __forceinline__ Variant::Coordinates coordinates(const Params& params, const BlockIndex& index, const KeyInterval& keys, int i) {
  Variant::Coordinates at;
#pragma unroll
  for (int axis = 0; axis < kBatchAxes; ++axis) at.entry[axis] = index.batch[axis];
  at.b = int(params.variant.first + index.offset(params.variant.entries));
  at.h = index.head;
  at.row = index.tile * kBlockM + i;
  at.i = at.row + keys.start;
  at.len_q = index.len_q(params);
  at.len_k = keys.length;
  at.scale = params.scale;
  return at;
}

template <int kLanes, typename T, typename Combine> __device__ __forceinline__ T across_row(T x, Combine combine) {
#pragma unroll
  for (int lane = 1; lane < kLanes; lane *= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

// The shared memory of a block: Q, then kStages of K and V.
template <typename Products> struct Shared {
  static constexpr int kK = Products::QTile::kBytes;
  static constexpr int kV = kK + kStages * Products::KTile::kBytes;
  static constexpr int kBytes = kV + kStages * Products::VTile::kBytes;
};

template <typename T, int kRows, int kColumns> __device__ __forceinline__ void zero(T (&x)[kRows][kColumns]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) x[r][c] = 0;
}

// Where nothing that a variant reads has been brought to shared memory.
struct NothingToFetch {
  template <typename Reads> __device__ __forceinline__ void operator()(Reads&, int, int) const {}
};

template <typename Products> struct Rows {
  using T = typename Products::T;
  T s[Products::kRows][Products::kScores];
  T o[Products::kRows][Products::kOutputs];
  static constexpr bool kPairs = Products::kRowLanes == 4;  // a lane's scores are neighbours in pairs
  RunningPair<T> pair[Products::kRows];  // the sum counts this thread's own keys until `finish`

  __device__ __forceinline__ void start() {
    zero(o);
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) pair[r] = RunningPair<T>::empty();
  }

  __device__ __forceinline__ void multiply_scores(T factor) {
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r)
#pragma unroll
      for (int c = 0; c < Products::kScores; ++c) s[r][c] *= factor;
  }

  // By what scores are multiplied for base 2: those of a variant have it already.
  static __device__ __forceinline__ T scale_of(const Params& params) { return Variant::kHasScore ? T(1) : params.scale_log2; }

  // What a variant reads along the keys of a tile, for each row.
  template <typename Reads> struct Along { Reads at[(Products::kScores + 7) / 8][Products::kRows]; };
  using ScoresAlong = Along<Variant::ScoreReads>;
  using MaskAlong = Along<Variant::MaskReads>;

  // Has all loads under way. `place(i)` says where row i of the block stands.
  template <typename Reads, typename Where>
  static __device__ __forceinline__ void look_up(Along<Reads>& along, const Variant& variant, int first_key, Where place) {
    if (!kPairs) return;
#pragma unroll
    for (int c = 0; c < Products::kScores; c += 8) {
      const int own = 4 * c + threadIdx.x % 4 * 8;
#pragma unroll
      for (int r = 0; r < Products::kRows; ++r) {
        along.at[c / 8][r].load(variant, place(Products::row(r)), own < kBlockN ? first_key + own : 1 << 30);
      }
    }
  }

  // Where the rows of this lane stand, with its first key of a tile.
  template <typename Where>
  static __device__ __forceinline__ void stand(Variant::Coordinates (&at)[Products::kRows], int first_key, Where place) {
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      at[r] = place(Products::row(r));
      at[r].key = first_key + Products::key(0);
    }
  }

  // Scores become what `change(score, at, step, reads, c)` makes of them, for the key at.key + step. `fetch(reads, n, r)` completes what
  // is read of row r and the n-th 32 keys.
  template <typename Reads, typename Where, typename Change, typename Fetch = NothingToFetch>
  __device__ __forceinline__ void change_scores(Along<Reads>& along, int first_key, Where place, Change change, Fetch fetch = {}) {
    Variant::Coordinates at[Products::kRows];
    stand(at, first_key, place);
#pragma unroll
    for (int c = 0; c < Products::kScores; ++c) {  // what is read by key serves all rows
#pragma unroll
      for (int r = 0; r < Products::kRows; ++r) {
        if (kPairs && c % 8 == 0) {
          along.at[c / 8][r].exchange();
          fetch(along.at[c / 8][r], c / 8, r);
        }
        s[r][c] = change(s[r][c], at[r], Products::key(c) - Products::key(0), along.at[c / 8][r], c % 8);
      }
    }
  }

  // Scores become what the variant makes of them, with what was looked up for them.
  template <typename Where, typename Fetch = NothingToFetch>
  __device__ __forceinline__ void vary(const Variant& variant, ScoresAlong& along, int first_key, Where place, Fetch fetch = {}) {
    using At = const Variant::Coordinates&;
    const auto change = [&](T score, At at, int step, const Variant::ScoreReads& reads, int c) {
      return variant.score<kPairs>(score, at, step, reads, c);
    };
    change_scores(along, first_key, place, change, fetch);
  }

  // Scores become -inf where the variant's mask hides them, each by itself.
  template <typename Where> __device__ __forceinline__ void hide_one_by_one(const Variant& variant, int first_key, Where place) {
    MaskAlong along;
    look_up(along, variant, first_key, place);
    change_scores(along, first_key, place, [&](T score, const Variant::Coordinates& at, int step, const Variant::MaskReads& reads, int c) {
      return variant.mask<kPairs>(at, step, reads, c) ? score : -infinity<T>();
    });
  }

  // Takes out of `seen`, a bit for each score, those that the variant's mask hides: in a loop, for a long mask.
  template <typename Where>
  static __device__ __forceinline__ void leave_out_hidden(uint32 (&seen)[Products::kRows], const Variant& variant, int first_key, Where place) {
    constexpr int kAtOnce = Products::kScores % 2 == 0 ? 2 : 1;
    static_assert(Products::kScores <= 32, "a bit for each score");
    Variant::Coordinates at[Products::kRows];
    stand(at, first_key, place);
#pragma unroll 1
    for (int first = 0; first < Products::kScores; first += kAtOnce) {
      const int step = Products::key(first) - Products::key(0);
#pragma unroll
      for (int r = 0; r < Products::kRows; ++r) {
        uint32 hidden = 0;
#pragma unroll
        for (int c = 0; c < kAtOnce; ++c) {
          const int further = Products::key(c) - Products::key(0);
          hidden |= uint32(!variant.mask<false>(at[r], step + further, Variant::MaskReads(), 0)) << c;
        }
        seen[r] &= ~(hidden << first);
      }
    }
  }

  // Scores whose bits are not set become -inf: replaced, so that a NaN among them does not survive.
  __device__ __forceinline__ void leave(const uint32 (&seen)[Products::kRows]) {
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Products::kScores; ++c) {
        if (!(seen[r] & 1u << c)) s[r][c] = -infinity<T>();
      }
    }
  }

  // Scores become -inf where the variant's mask hides them.
  template <typename Where> __device__ __forceinline__ void hide(const Variant& variant, int first_key, Where place) {
    if constexpr (kMaskInLoop) {
      uint32 seen[Products::kRows];
      for (uint32& bits : seen) bits = ~0u;
      leave_out_hidden(seen, variant, first_key, place);
      leave(seen);
    } else {
      hide_one_by_one(variant, first_key, place);
    }
  }

  // A score without a key joins the sum. Returns what O is to be multiplied by for it.
  static __device__ __forceinline__ T take_sink(RunningPair<T>& pair, T sink) {
    const T factor = pair.raise(sink);
    pair.sum += exp_2(sink - finite_reference(pair.max));
    return factor;
  }

  // Scores of keys that their row may not see become -inf: replaced, so that a NaN among them does not survive.
  __device__ __forceinline__ void mask(const KeyInterval& keys, int first_key) {
    const int block_row = recomputed(0);
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      const int row = block_row + Products::row(r), own = first_key + Products::key(0);
      const int begin = keys.begin(row) - own, end = keys.end(row) - own;
#pragma unroll
      for (int c = 0; c < Products::kScores; ++c) {
        const int key = Products::key(c) - Products::key(0);  // a constant
        if (key < begin || key >= end) s[r][c] = -infinity<T>();
      }
    }
  }

  // S becomes P = 2^(scale S - m). The reference m follows the row's maximum only when it falls behind by kSlack: any m gives the same
  // softmax, and its rows do not depend on one another.
  __device__ __forceinline__ void softmax(T scale) {
    T highest[Products::kRows];
    bool behind = false;
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      highest[r] = s[r][0];
#pragma unroll
      for (int c = 1; c < Products::kScores; ++c) highest[r] = max_of(s[r][c], highest[r]);  // a NaN score is passed over
      behind |= highest[r] * scale > pair[r].max + kSlack;
    }
    if (__any_sync(0xffffffffu, behind)) raise(highest, scale);
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      const T reference = finite_reference(pair[r].max);
#pragma unroll
      for (int c = 0; c < Products::kScores; ++c) {
        s[r][c] = exp_2(s[r][c] * scale - reference);
        pair[r].sum += s[r][c];
      }
    }
  }

  __device__ __forceinline__ void raise(const T (&highest)[Products::kRows], T scale) {
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      const T score = scale * across_row<Products::kRowLanes>(highest[r], [](T a, T b) { return max_of(a, b); });
      const T factor = score > pair[r].max + kSlack ? pair[r].raise(score) : T(1);
#pragma unroll
      for (int c = 0; c < Products::kOutputs; ++c) o[r][c] *= factor;
    }
  }

  // Weights that dropout drops become 0, once the sums have counted them.
  __device__ __forceinline__ void drop(const Dropping& dropping, int first_row, int first_key) {
    if constexpr (kPairs && Products::kRows % 2 == 0 && Products::kScores % 4 == 0) {  // 16 x 16 blocks
      const int row = recomputed(first_row) + Products::row(0);
      const uint32 row_place = Dropping::row_place(row), key_place = Dropping::key_place(first_key + Products::key(0));
#pragma unroll
      for (int r = 0; r < Products::kRows; r += 2)
#pragma unroll
        for (int c = 0; c < Products::kScores; c += 4) dropping.drop(s[r], s[r + 1], c, row_place + 4 * r, key_place + c);
    } else {
#pragma unroll
      for (int r = 0; r < Products::kRows; ++r)
#pragma unroll
        for (int c = 0; c < Products::kScores; ++c)
          if (!dropping.keeps(first_row + Products::row(r), first_key + Products::key(c))) s[r][c] = 0;
    }
  }

  static __device__ __forceinline__ bool has_weights(T reference) {
    return reference <= kLargestReference && -reference <= kLargestReference;
  }

  // O / d and the logarithm of the sum. A row that saw no key gives 0 and -inf.
  __device__ __forceinline__ void finish(const Params& params) {
    const BlockIndex index(params);
    const int first_row = index.tile * kBlockM;
    const int columns = params.head_dim_v - index.first_column;
    Output* out = index.rows_of(params.out, index.head) + index.first_column;
    auto* lse = params.lse.data == nullptr || index.first_column > 0 ? nullptr : index.rows_of(params.lse, index.head);
    const uint64 alignment = reinterpret_cast<uint64>(out) | params.out.row * sizeof(Output);
    const bool whole = alignment % (2 * sizeof(Output)) == 0 && columns >= kHeadDimV;
#pragma unroll
    for (int r = 0; r < Products::kRows; ++r) {
      const int row = first_row + Products::row(r);
      pair[r].sum = across_row<Products::kRowLanes>(pair[r].sum, [](T a, T b) { return a + b; });
      const bool empty = pair[r].max == -infinity<T>() && pair[r].sum == T(0);  // and no NaN
      if (row >= index.len_q(params)) continue;
      const bool fits = has_weights(pair[r].max);
      T factor = kDropout ? params.dropout.rescale : T(1);
      if (Variant::kHasSink) {
        const KeyInterval keys(params, index);
        factor *= take_sink(pair[r], params.variant.sink(coordinates(params, index, keys, Products::row(r))));
      }
      if (lse != nullptr && Products::output(0) == 0) lse[row * params.lse.row] = pair[r].log_sum() * T(kLn2);
      const bool sees_nothing = empty && pair[r].sum == pair[r].sum;  // and its sink is no NaN
      const T inverse = sees_nothing ? T(0) : fits ? factor / pair[r].sum : nan<T>();
      Output* out_row = out + row * params.out.row;
#pragma unroll
      for (int c = 0; c < Products::kOutputs; ++c) o[r][c] = sees_nothing ? T(0) : o[r][c] * inverse;
      if (whole) {
        store_pairs(out_row, o[r]);
      } else {
        store(out_row, o[r], columns);
      }
    }
  }

  static __device__ __forceinline__ void store_pairs(Output* row, const T (&o)[Products::kOutputs]) {
#pragma unroll
    for (int c = 0; c < Products::kOutputs; c += 2) {
      const Vector<Output, 2> both = {narrow<Output>(o[c]), narrow<Output>(o[c + 1])};
      *reinterpret_cast<Vector<Output, 2>*>(row + Products::output(c)) = both;
    }
  }

  static __device__ __forceinline__ void store(Output* row, const T (&o)[Products::kOutputs], int columns) {
#pragma unroll
    for (int c = 0; c < Products::kOutputs; ++c)
      if (Products::output(c) < columns) row[Products::output(c)] = narrow<Output>(o[c]);
  }
};

template <typename Products> __device__ __forceinline__ void attend(const Params& params) {
  using T = typename Products::T;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32 base = shared_address(shared);

  // Setup: this block's rows, and the keys that any of them may see.
  const BlockIndex index(params);
  if (kVarlen && index.sequence.rows == 0) return;
  const KeyInterval keys(params, index);
  const uint32* bits = Variant::kHasMask ? params.bits.of(index) : nullptr;
  const auto tile_from = [&](int tile) {  // the first one that is visited
    if constexpr (Variant::kHasMask) {
      for (int word = tile / 32; word < params.bits.words; ++word) {
        const uint32 left = word == tile / 32 ? bits[word] >> tile % 32 << tile % 32 : bits[word];
        if (left != 0) return word * 32 + __ffs(left) - 1;
      }
      return params.len_k / kBlockN + 1;
    } else {
      return tile;
    }
  };
  const int first_tile = tile_from(keys.begin() / kBlockN);
  const Element* q = index.rows_of(params.q, index.head);
  int kv_head = index.head;
  params.group.take(kv_head);
  const Element* k = index.keys_of(params.k, kv_head);
  const Element* v = index.keys_of(params.v, kv_head) + index.first_column;

  const auto k_smem = [&](int turn) {
    return typename Products::KTile(base + Shared<Products>::kK + turn % kStages * Products::KTile::kBytes);
  };
  const auto v_smem = [&](int turn) {
    return typename Products::VTile(base + Shared<Products>::kV + turn % kStages * Products::VTile::kBytes);
  };
  const auto load_k = [&](int tile, int turn) {
    const int begin = keys.begin(), end = keys.end();
    if (tile * kBlockN < end) fill<kThreads>(k_smem(turn), k, params.k.row, params.head_dim, tile * kBlockN, begin, end);
  };
  const auto load_v = [&](int tile, int turn) {
    const int begin = keys.begin(), end = keys.end(), columns = params.head_dim_v - index.first_column;
    if (tile * kBlockN < end) fill<kThreads>(v_smem(turn), v, params.v.row, columns, tile * kBlockN, begin, end);
  };

  const typename Products::QTile q_smem(base);
  Rows<Products> rows;
  rows.start();
  fill<kThreads>(q_smem, q, params.q.row, params.head_dim, index.tile * kBlockM, 0, index.len_q(params));
  load_k(first_tile, first_tile);
  if (kStages == 2) load_v(first_tile, first_tile);

#pragma unroll 1
  for (int tile = first_tile, visits = 0; tile * kBlockN < keys.end(); tile = tile_from(tile + 1), ++visits) {
    const int first_key = tile * kBlockN, turn = Variant::kHasMask ? first_tile + visits : tile;
    copy_async_wait();
    __syncthreads();  // K (and V, of two stages) of this tile are there; every warp is done with the tile before
    if (kStages == 2) {
      load_k(tile_from(tile + 1), turn + 1);
      load_v(tile_from(tile + 1), turn + 1);
    } else {
      load_v(tile, turn);
    }
    const Place place = keys.template place<Products::kWarpRows>(first_key);
    if (place != Place::kOutside) {
      zero(rows.s);
      Products::scores(rows.s, q_smem, k_smem(turn));
    }
    if (kStages == 1) {
      copy_async_wait();
      __syncthreads();  // V of this tile is there; every warp is done with K
      load_k(tile_from(tile + 1), turn + 1);
    }
    if (place == Place::kOutside) continue;
    if (!Variant::kHasScore && params.factor != T(1)) rows.multiply_scores(params.factor);
    if (Variant::kHasScore || Variant::kHasMask) {
      const bool partial = Variant::kHasMask && (bits[params.bits.words + tile / 32] & 1u << tile % 32);
      const auto at = [&](int row) { return coordinates(params, index, keys, row); };
      if (Variant::kHasScore) {
        typename Rows<Products>::ScoresAlong along;
        rows.look_up(along, params.variant, first_key, at);
        rows.vary(params.variant, along, first_key, at);
      }
      if (Variant::kHasMask && partial) rows.hide(params.variant, first_key, at);
    }
    if (place == Place::kBorder) rows.mask(keys, first_key);
    rows.softmax(Rows<Products>::scale_of(params));
    if (kDropout) {
      const Dropping dropping = params.dropout.of(index.head, index.offset(params.dropout.entries));
      rows.drop(dropping, index.tile * kBlockM, first_key);
    }
    Products::weigh(rows.o, rows.s, v_smem(turn));
  }

  copy_async_wait();  // where there was no key, Q is still under way
  rows.finish(params);
}
