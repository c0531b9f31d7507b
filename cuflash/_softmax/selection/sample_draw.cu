// The second of two kernels for long rows: draws the tokens, from the pairs that sample_sums left. Without a filter a
// warp has a row, and reads one slice of it again. With one a block has a row, and reads it once more for each token
// that it has to judge.
//
//   kWarps  warps of a row
#include "_softmax/selection/sample_rounds.cuh"

static_assert(kLanes == 32, "a warp has a slice");
static_assert(kWarps == 1 || kThreads == 32 * kWarps, "several warps for a row mean a block for a row");

// Each of the row's warps does the same, but for `measure`, where they share the slices.
struct LongRow {
  const Params& params;
  const Element* x;  // [columns]
  Pair* slices;      // [slices]

  static __device__ __forceinline__ void barrier() {
    if (kWarps > 1) __syncthreads();
    else __syncwarp();
  }

  __device__ __forceinline__ Choice choose(double fraction) const {
    return choose_slice(slices, params.slices_of_row, Score(params.scale), fraction);
  }

  __device__ __forceinline__ Token find(const Choice& choice, const Drawable& drawable) const {
    Slice slice;
    slice.load(x, params.columns, choice.slice);
    slice.measure(drawable);
    return slice.find(choice.fraction);
  }

  __device__ __forceinline__ void measure(const Drawable& drawable) const {
    barrier();  // all warps have chosen by the masses that are written over now
    for (int64 s = threadIdx.x / 32 % kWarps; s < params.slices_of_row; s += kWarps) {
      Slice slice;
      slice.load(x, params.columns, s);
      const Score mass = slice.measure(drawable);
      if (group_lane() == 0) slices[s] = {drawable.max, mass};
    }
    barrier();  // all warps choose by all masses
  }
};

// The 1 is said aloud: left to itself, ptxas aims at more blocks and spills for them.
extern "C" __global__ void __launch_bounds__(kThreads, 1) sample_draw(const __grid_constant__ Params params) {
  const int64 number = int64(blockIdx.x) * (kThreads / 32 / kWarps) + threadIdx.x / 32 / kWarps;
  if (number >= params.rows) return;  // a whole warp
  LongRow row = {params, params.x + number * params.row_stride, params.slices + number * params.slices_of_row};
  const int64 token = draw(params, number, row);
  if (threadIdx.x % (32 * kWarps) == 0) params.out[number] = token;
}
