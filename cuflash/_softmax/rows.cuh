// How threads share rows that lie denser than their neighbours: the threads of a row read what lies side by side.
//
//   kSharing   threads of a row, in all blocks that share it
//   kVector    elements a load
//   kVectors   vectors a thread has at a time: its tile
//   kDense     the elements of a row lie side by side
//   kRagged    dense rows, only read, begin and end anywhere between two vectors; otherwise rows or all their runs are whole ones
#include "_softmax/merge.cuh"

constexpr int kTile = kVectors * kVector;
constexpr int64 kStep = int64(kSharing) * kTile;  // columns that the threads of a row take at a time
static_assert(!kRagged || (kDense && kReduces), "only dense rows that are not written are ragged");
constexpr bool kPacked = sizeof(Element) == 2 && kVector > 1 && !kBeside && !kReduces;  // held two elements to a register
static_assert(kTile <= 32 || kPacked, "a tile's elements are told by the bits of a word");

using Loaded = Vector<Element, kVector>;

// One thread's elements at a time, and which of them the row has.
struct Tile {
  Score x[kTile], beside[kTile];  // beside: with kBeside
  uint32 present;
};

// One thread's share of a row, or of a part of it.
struct Share {
  const Element* x;       // [reduced...], the row
  const Element* beside;  // [reduced...]
  Result* out;            // [reduced...]
  int64 start;            // the first column that is loaded, at a multiple of kVector
  int64 first, end;       // columns of this share; none in threads past the last row, which go along for the merge
  int thread;             // among those of the row

  __device__ __forceinline__ int64 column(int64 start, int vector) const {
    return start + int64(vector * kSharing + thread) * kVector;
  }

  // A dense row needs no arithmetic for its addresses.
  __device__ __forceinline__ int64 along(const Params& params, int64 column, const Strides& strides) const {
    if constexpr (kDense) return column;
    return offset<kReducedAxes>(Index(column), params.reduced, strides.reduced);
  }
};

// The share of thread `thread` in part `split` of a row.
__device__ __forceinline__ Share share_of(const Params& params, int64 row, int64 split, int thread) {
  const Element* x = params.x + row_offset(params, row, params.x_strides);
  // Columns are counted from the last whole vector of memory that is not past the row's beginning; in all arrays alike.
  const int lead = kRagged ? int(reinterpret_cast<uint64>(x) / sizeof(Element) % kVector) : 0;
  const int64 start = split * params.slice;
  const int64 end = min_of(start + params.slice, params.columns);
  return {
      x - lead,
      params.weights + (kBeside ? row_offset(params, row, params.weights_strides) - lead : 0),
      params.out + (kReduces ? 0 : row_offset(params, row, params.out_strides)),
      start,
      start + lead,
      row < params.rows ? end + lead : start,
      thread,
  };
}

// Which elements of a thread's tile the row has, in few registers.
struct Present {
  static constexpr uint32 kWhole = (1u << kVector) - 1;

  int before, after;  // elements from where the tile begins to where the share does, and to where it ends

  __device__ __forceinline__ Present(const Share& share, int64 start) {
    const int64 own = share.column(start, 0);
    before = int(max_of(share.first - own, -kStep));
    after = int(min_of(share.end - own, kStep));
  }

  // One bit for each element of a vector.
  __device__ __forceinline__ uint32 bits(int vector) const {
    const int at = vector * kSharing * kVector;
    if (!kRagged) return at < after ? kWhole : 0;
    const int head = max_of(before - at, 0), tail = max_of(at + kVector - after, 0);
    return head < kVector && tail < kVector ? (kWhole << head) & (kWhole >> tail) : 0;
  }

  __device__ __forceinline__ bool whole(int vector) const {
    const int at = vector * kSharing * kVector;
    if (!kRagged) return at < after;
    return at + kVector <= after && (vector > 0 || before <= 0);  // a lead is shorter than a vector
  }

  // Whether the row has an element of a tile, but not all of the vector that it is in.
  __device__ __forceinline__ bool in_part(int element) const {
    const int at = element / kVector * kSharing * kVector + element % kVector;
    return before <= at && at < after && !whole(element / kVector);
  }

  // Whether the share may begin or end within one of the thread's vectors. Those are seen to after all others, and by few
  // threads: a branch for each load would keep the loads from being under way together.
  __device__ __forceinline__ bool any_part() const {
    return kRagged && (before > 0 || after < (kVectors - 1) * kSharing * kVector + kVector);
  }
};

// A thread's vectors of one operand; what the row does not have is `absent`.
struct Vectors {
  Loaded at[kVectors];

  __device__ __forceinline__ void load(const Params& params, const Share& share, const Element* from, const Strides& strides,
                                       int64 start, Score absent) {
    const Present present(share, start);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      at[v] = ::load<kVector>(from + share.along(params, share.column(start, v), strides), present.whole(v), absent);
    }
    if (present.any_part()) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        if (present.in_part(i)) at[i / kVector].at[i % kVector] = from[share.column(start, i / kVector) + i % kVector];
      }
    }
  }

  __device__ __forceinline__ void widen_to(Score (&to)[kTile]) const {
#pragma unroll
    for (int i = 0; i < kTile; ++i) to[i] = widen(at[i / kVector].at[i % kVector]);
  }
};

__device__ __forceinline__ Tile load_tile(const Params& params, const Share& share, int64 start) {
  Tile tile;
  Vectors vectors;
  vectors.load(params, share, share.x, params.x_strides, start, Operation::absent());
  vectors.widen_to(tile.x);
  if constexpr (kBeside) {
    vectors.load(params, share, share.beside, params.weights_strides, start, 0);
    vectors.widen_to(tile.beside);
  }
  tile.present = 0;
  if constexpr (kTile <= 32) {
    const Present present(share, start);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) tile.present |= present.bits(v) << (v * kVector);
  }
  return tile;
}

__device__ __forceinline__ void store_tile(const Params& params, const Share& share, int64 start, const Score (&x)[kTile]) {
  const Present present(share, start);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64 at = share.column(start, v);
    store<kVector>(x + v * kVector, present.whole(v), share.out + share.along(params, at, params.out_strides));
  }
}

// A row of one tile, from its only read to its answers. After `load`, `take` gives the state of the thread's own elements and
// `answer` stores what the state of the whole row makes of them.
template <typename Operation, bool kPacked> struct Held {
  Tile tile;
  State own;

  __device__ __forceinline__ void load(const Params& params, const Share& share) { tile = load_tile(params, share, share.start); }

  __device__ __forceinline__ State take() {
    own = State::empty();
    Operation::take_held(own, tile.x, tile.beside, tile.present);
    return own;
  }

  __device__ __forceinline__ void answer(const Params& params, Share share, State row) {
    typename Operation::Answers(row).answer_held(own, tile.x, tile.beside);
    share.thread = recomputed(share.thread);  // the scores need the registers that addresses would be kept in
    store_tile(params, share, share.start, tile.x);
  }
};

// Halves stay two to a register and are widened twice: so twice as many can be under way.
template <typename Operation> struct Held<Operation, true> {
  static constexpr int kWords = kVector > 1 ? kVector / 2 : 1;
  uint32 words[kVectors][kWords];

  __device__ __forceinline__ void load(const Params& params, const Share& share) {
    const Present present(share, share.start);
    const uint32 absent = narrow_pair<Element>(Operation::absent(), Operation::absent());
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[v][w] = absent;
      if (present.whole(v)) {
        const Element* from = share.x + share.along(params, share.column(share.start, v), params.x_strides);
        const auto loaded = *reinterpret_cast<const Vector<uint32, kWords>*>(from);
#pragma unroll
        for (int w = 0; w < kWords; ++w) words[v][w] = loaded.at[w];
      }
    }
  }

  __device__ __forceinline__ void widen_vector(int vector, Score (&x)[kVector]) const {
#pragma unroll
    for (int w = 0; w < kWords; ++w) widen_pair<Element>(words[vector][w], x[2 * w], x[2 * w + 1]);
  }

  __device__ __forceinline__ State take() {
    State own = State::empty();
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Score x[kVector];
      widen_vector(v, x);
      Operation::take(own, x, x, Present::kWhole);
    }
    return own;
  }

  __device__ __forceinline__ void answer(const Params& params, Share share, State row) {
    const typename Operation::Answers answers(row);
    share.thread = recomputed(share.thread);
    const Present present(share, share.start);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Score x[kVector];
      widen_vector(v, x);
      answers.answer(x, x);
      const int64 at = share.column(share.start, v);
      store<kVector>(x, present.whole(v), share.out + share.along(params, at, params.out_strides));
    }
  }
};
