// What the sampling kernels share: a slice of a row in the registers of a group of lanes, and picking by cumulative
// mass.
//
//   kLanes     lanes of a group, 1 to 32: each group has a slice
//   kVectors   loads of 16 bytes that a lane makes of a slice
//   kFiltered  whether a token that was drawn may be turned down, by top_p or min_p
#include "device/online_softmax.cuh"

using Score = Accumulator<Element>;

constexpr int kVector = 16 / sizeof(Element);
constexpr int kStep = kLanes * kVector;    // elements from one of a lane's loads to its next
constexpr int kSlice = kVectors * kStep;   // elements
static_assert(kLanes <= 32 && (kLanes & (kLanes - 1)) == 0, "a butterfly halves the lanes");

// The running pair of a slice: its maximum, and the sum of 2^((x - max) * scale).
struct Pair { Score max, mass; };

struct Params {
  const Element* x;      // [rows, columns], rows `row_stride` elements apart
  Pair* slices;          // [rows, slices]; where rows are cut into slices
  const int64* indices;  // [rows, columns], what to answer for a column; null for the column itself
  int64* out;            // [rows]
  int64 rows, columns, row_stride, slices_of_row;
  uint64 seed, offset;
  double scale;  // log2(e) / temperature
  double top_p;  // infinite without one
  double least;  // log2(min_p): the least exponent that stays
};
static_assert(sizeof(Params) == 104, "the host packs as many bytes");

struct Token {
  int64 column;
  Score score;
};

// The tokens of a row that may be drawn: those above `bound` in descending order, ties by lowest index, with an
// exponent of at least `least`. Their weights are relative to `max`.
struct Drawable {
  Score max, scale, least;
  Token bound;

  static __device__ __forceinline__ Drawable all(Score max, Score scale) {
    return {max, scale, -infinity<Score>(), {0x7fffffffffffffffll, -infinity<Score>()}};
  }

  __device__ __forceinline__ Score exponent(Score score) const { return (score - max) * scale; }

  // `before` tells whether the score's column is ahead of the bound's. Comparisons say what is out, so that a NaN
  // stays in.
  __device__ __forceinline__ Score weight(Score score, bool before) const {
    const Score power = exponent(score);
    const bool out = score < bound.score || (score == bound.score && !before) || power < least;
    return kFiltered && out ? Score(0) : exp_2(power);
  }
};

// Groups of fewer than 32 lanes share a warp and may part ways: each names its own lanes to the shuffles.
__device__ __forceinline__ int group_lane() { return threadIdx.x % kLanes; }
__device__ __forceinline__ uint32 group_lanes() {
  if (kLanes == 32) return 0xffffffff;
  return ((1u << kLanes % 32) - 1) << threadIdx.x % 32 / kLanes * kLanes;
}

template <typename T> __device__ __forceinline__ T group_sum(T value) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) value += __shfl_xor_sync(group_lanes(), value, mask);
  return value;
}

template <typename T> __device__ __forceinline__ T group_max(T value) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) value = max_of(value, __shfl_xor_sync(group_lanes(), value, mask));
  return value;
}

template <typename T> __device__ __forceinline__ T broadcast(T value, int lane) {
  return __shfl_sync(group_lanes(), value, lane, kLanes);
}

template <typename T> constexpr T kBelowOne = T(1) - (sizeof(T) == 4 ? T(0x1p-24) : T(0x1p-53));

// How far into a part of this mass the rest of a target lies, in [0, 1) whatever rounding did.
template <typename T> __device__ __forceinline__ T fraction_of(T rest, T mass) {
  return min_of(max_of(rest / mass, T(0)), kBelowOne<T>);
}

// Goes through parts in order and stays with the one in which the target lies. A part without mass is never stayed
// with, and where rounding leaves the target past all parts it is the last with any.
template <typename T> struct Walk {
  T target;
  bool arrived = false;
  int part = 0;
  T rest = 0, mass = 1;

  __device__ __forceinline__ explicit Walk(T target) : target(target) {}

  __device__ __forceinline__ void pass(int index, T next) {
    if (arrived || !(next > 0)) return;
    part = index;
    rest = target;
    mass = next;
    arrived = target < next;
    target -= next;
  }

  __device__ __forceinline__ T fraction() const { return fraction_of(rest, mass); }
};

// The lane whose part holds `fraction` of the group's mass, and how far into that part it lies.
template <typename T> struct Pick {
  T total;
  int lane;
  T fraction;
};
template <typename T> __device__ __forceinline__ Pick<T> pick_lane(T mass, T fraction) {
  T end = mass;  // inclusive prefix sum
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const T ahead = __shfl_up_sync(group_lanes(), end, step, kLanes);
    if (group_lane() >= step) end += ahead;
  }
  const T total = broadcast(end, kLanes - 1);
  const T target = fraction * total;
  // As in Walk: no lane without mass, and the last with any where rounding leaves none.
  const uint32 heavy = __ballot_sync(group_lanes(), mass > 0);
  const uint32 past = __ballot_sync(group_lanes(), mass > 0 && end > target);
  const int lane = (past ? __ffs(past) - 1 : 31 - __clz(heavy | 1)) % kLanes;
  T begin = __shfl_up_sync(group_lanes(), end, 1, kLanes);
  if (group_lane() == 0) begin = T(0);
  return {total, lane, broadcast(fraction_of(target - begin, mass), lane)};
}

// A slice in registers. Slices begin at multiples of 16 bytes, so that every load is one vector: the first slice may
// begin ahead of the row, and the last one ends behind it. What the row does not have is -inf there, and is not read.
struct Slice {
  Score scores[kVectors][kVector];
  int64 first;  // the column of the lane's first element
  Drawable drawable;        // what was last measured,
  Score masses[kVectors];   // and its masses in the lane's vectors

  __device__ __forceinline__ void load(const Element* row, int64 columns, int64 slice) {
    const int head = int(reinterpret_cast<uint64>(row) % 16 / sizeof(Element));
    const int64 begin = slice * kSlice - head;
    first = begin + group_lane() * kVector;
    if (begin >= 0 && begin + kSlice <= columns) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) load_vector(row, v);
      return;
    }
    // Elements of the slice that the row has, from the lane's first.
    const int from = int(max_of(-begin, int64(0))) - group_lane() * kVector;
    const int to = int(min_of(columns - begin, int64(kSlice))) - group_lane() * kVector;
    const auto whole = [&](int v) { return from <= v * kStep && v * kStep + kVector <= to; };
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) scores[v][e] = -infinity<Score>();
      if (whole(v)) load_vector(row, v);
    }
    if (head == 0 && columns % kVector == 0) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const int at = v * kStep + e;
        if (!whole(v) && from <= at && at < to) scores[v][e] = widen(row[first + at]);
      }
    }
  }

  __device__ __forceinline__ void load_vector(const Element* row, int v) {
    const auto vector = *reinterpret_cast<const Vector<Element, kVector>*>(row + first + v * kStep);
#pragma unroll
    for (int e = 0; e < kVector; ++e) scores[v][e] = widen(vector.at[e]);
  }

  // The pair (Algorithm 3, over a slice at once). A NaN or +inf makes the mass NaN.
  __device__ __forceinline__ Pair pair(Score scale) {
    Score max = scores[0][0];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) max = max_of(max, scores[v][e]);
    }
    max = group_max(max);
    return {max, measure(Drawable::all(finite_reference(max), scale))};
  }

  // The mass of what is drawable.
  __device__ __forceinline__ Score measure(const Drawable& now) {
    drawable = now;
    Score mass = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      masses[v] = 0;
#pragma unroll
      for (int e = 0; e < kVector; ++e) masses[v] += drawable.weight(scores[v][e], v * kStep + e < ahead());
      mass += masses[v];
    }
    return group_sum(mass);
  }

  // The token at `fraction` of the mass that was measured, which must not be 0: the vectors' masses lead to a vector
  // of all lanes, the lanes' to a lane, and the elements' to an element.
  __device__ __forceinline__ Token find(double fraction) const {
    Score vectors[kVectors];
    double total = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) total += vectors[v] = group_sum(masses[v]);
    Walk<double> across(fraction * total);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) across.pass(v, vectors[v]);

    // Registers have no addresses: the vector is chosen by comparing.
    Score mass = 0, vector[kVector] = {};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      mass = v == across.part ? masses[v] : mass;
#pragma unroll
      for (int e = 0; e < kVector; ++e) vector[e] = v == across.part ? scores[v][e] : vector[e];
    }
    const Pick<Score> pick = pick_lane(mass, min_of(Score(across.fraction()), kBelowOne<Score>));
    const int begin = across.part * kStep;
    Walk<Score> along(pick.fraction * mass);
    Score score = 0;
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      along.pass(e, drawable.weight(vector[e], begin + e < ahead()));
      score = along.part == e ? vector[e] : score;
    }
    return {broadcast(first + begin + along.part, pick.lane), broadcast(score, pick.lane)};
  }

 private:
  // How far the bound's column is ahead, in 32 bits, which compare at once. A column outside of the slice stays on
  // its side.
  __device__ __forceinline__ int ahead() const {
    return int(min_of(max_of(drawable.bound.column - first, int64(-1)), int64(kSlice)));
  }
};

// A slice chosen by a number in [0, 1), and what its row comes to.
struct Choice {
  Score max;
  double total;  // relative to max
  int64 slice;
  double fraction;  // how far into the slice's mass
};

// By a warp, from the pairs of a row's slices: each lane has a run of them, so that runs are in order too.
__device__ __forceinline__ Choice choose_slice(const Pair* slices, int64 count, Score scale, double fraction) {
  const int64 run = (count + 31) / 32;
  const int64 begin = min_of(group_lane() * run, count), end = min_of(begin + run, count);
  Score max = -infinity<Score>();
#pragma unroll 4
  for (int64 s = begin; s < end; ++s) max = max_of(max, slices[s].max);
  max = group_max(max);

  const Score reference = finite_reference(max);
  const auto mass_of = [&](Pair slice) { return double(slice.mass * exp_2((slice.max - reference) * scale)); };
  double mass = 0;
#pragma unroll 4
  for (int64 s = begin; s < end; ++s) mass += mass_of(slices[s]);
  const Pick<double> pick = pick_lane(mass, fraction);

  Walk<double> walk(pick.fraction * mass);
  if (group_lane() == pick.lane) {
#pragma unroll 4
    for (int64 s = begin; s < end; ++s) walk.pass(int(s - begin), mass_of(slices[s]));
  }
  const int64 slice = begin + walk.part;
  return {max, pick.total, broadcast(slice, pick.lane), broadcast(walk.fraction(), pick.lane)};
}
