// Where the elements of a call lie: the folded axes of layout.py, and loads and stores of a vector of elements.
#include "device/types.cuh"

constexpr int kMaxAxes = 4;
static_assert(kOuterAxes >= 1 && kOuterAxes <= kMaxAxes, "rows need 1 to 4 axes");
static_assert(kReducedAxes >= 1 && kReducedAxes <= kMaxAxes, "a row needs 1 to 4 axes");

using Score = Accumulator<Element>;

// In elements, one stride for each folded axis, the densest axis last.
struct Strides {
  int64 outer[kMaxAxes];
  int64 reduced[kMaxAxes];
};

struct Params {
  const Element* x;        // [outer..., reduced...]
  const Element* weights;  // [outer..., reduced...], the second operand; kBeside
  Result* out;             // [outer..., reduced...], or [outer...] of operations that reduce
  Result* sign;            // [outer...], the second result; kSigned
  void* states;            // [rows, splits], the operation's states between two launches; kPartial, kFinish
  int64 splits, slice;     // parts of a row, and columns of each; all columns where a row is not split
  int64 rows;              // the product of the outer sizes
  int64 columns;           // the product of the reduced sizes
  int64 outer[kMaxAxes];   // sizes
  int64 reduced[kMaxAxes];
  Strides x_strides, weights_strides, out_strides, sign_strides;
};
static_assert(sizeof(Params) == 392, "the host packs as many bytes");

// The offset of element `index` of axes that are numbered through. Index is 32 bits wide where that is enough: divisions
// are what odd layouts cost.
template <int kAxes>
__device__ __forceinline__ int64 offset(Index index, const int64 (&sizes)[kMaxAxes], const int64 (&strides)[kMaxAxes]) {
  int64 sum = 0;
#pragma unroll
  for (int axis = kAxes - 1; axis > 0; --axis) {
    const Index size = Index(sizes[axis]);
    const Index quotient = index / size;
    sum += int64(index - quotient * size) * strides[axis];
    index = quotient;
  }
  return sum + int64(index) * strides[0];
}

__device__ __forceinline__ int64 row_offset(const Params& params, int64 row, const Strides& strides) {
  return offset<kOuterAxes>(Index(row), params.outer, strides.outer);
}

// N elements that are `absent` until something is loaded over them: a choice after a load would wait for it.
template <int N> __device__ __forceinline__ Vector<Element, N> filled(Score absent) {
  Vector<Element, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) vector.at[i] = narrow<Element>(absent);
  return vector;
}

// One load of a whole vector, if there is one.
template <int N> __device__ __forceinline__ Vector<Element, N> load(const Element* from, bool present, Score absent) {
  Vector<Element, N> vector = filled<N>(absent);
  if (present) vector = *reinterpret_cast<const Vector<Element, N>*>(from);
  return vector;
}

template <int N> __device__ __forceinline__ void store(const Score* from, bool present, Result* to) {
  Vector<Result, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) vector.at[i] = narrow<Result>(from[i]);
  if (present) *reinterpret_cast<Vector<Result, N>*>(to) = vector;
}
