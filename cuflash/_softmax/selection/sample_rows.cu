// Draws the tokens of rows that stay in registers: one launch, and every logit is read once. A group of lanes has a
// short row, so that a warp has several; a block of a few warps has a longer one, each warp a slice.
//
//   kWarps  warps of a row
#include "_softmax/selection/sample_rounds.cuh"

static_assert(kWarps == 1 || (kLanes == 32 && kThreads == 32 * kWarps), "several warps for a row are a block");

struct Shared {
  Pair slices[kWarps];
  Token token;
};

struct HeldRow {
  Slice slice;
  Pair own;
  Score scale;
  Shared& shared;

  __device__ __forceinline__ HeldRow(const Params& params, int64 number, Shared& shared)
      : scale(Score(params.scale)), shared(shared) {
    slice.load(params.x + number * params.row_stride, params.columns, warp());
    publish(slice.pair(scale));
  }

  static __device__ __forceinline__ int warp() { return kWarps == 1 ? 0 : threadIdx.x / 32; }

  __device__ __forceinline__ Choice choose(double fraction) const {
    if constexpr (kWarps == 1) return {finite_reference(own.max), double(own.mass), 0, fraction};
    return choose_slice(shared.slices, kWarps, scale, fraction);
  }

  __device__ __forceinline__ Token find(const Choice& choice, const Drawable&) const {
    if constexpr (kWarps == 1) return slice.find(choice.fraction);
    if (choice.slice == warp()) {
      const Token token = slice.find(choice.fraction);
      if (group_lane() == 0) shared.token = token;
    }
    __syncthreads();  // the token is there; and all warps have chosen by the masses that `measure` writes over
    return shared.token;
  }

  __device__ __forceinline__ void measure(const Drawable& drawable) {
    publish({drawable.max, slice.measure(drawable)});
  }

 private:
  __device__ __forceinline__ void publish(Pair pair) {
    own = pair;
    if constexpr (kWarps == 1) return;
    if (group_lane() == 0) shared.slices[warp()] = pair;
    __syncthreads();  // all warps choose by all masses; and all have the token that `find` writes over
  }
};

// The 1 is said aloud: left to itself, ptxas aims at more blocks and spills for them.
extern "C" __global__ void __launch_bounds__(kThreads, 1) sample_rows(const __grid_constant__ Params params) {
  constexpr int kThreadsPerRow = kLanes * kWarps;
  __shared__ Shared shared;
  const int64 number = int64(blockIdx.x) * (kThreads / kThreadsPerRow) + threadIdx.x / kThreadsPerRow;
  if (number >= params.rows) return;  // a whole group
  HeldRow row(params, number, shared);
  const int64 token = draw(params, number, row);
  if (threadIdx.x % kThreadsPerRow == 0) params.out[number] = token;
}
