// The first of two kernels for long rows: the pair (m, d) of every slice of every row. A warp takes a slice, all of
// it in flight at once, so that a few long rows fill the GPU and neighbouring warps read what lies side by side.
#include "_softmax/selection/sample.cuh"

static_assert(kLanes == 32, "a warp has a slice");

extern "C" __global__ void __launch_bounds__(kThreads) sample_sums(const __grid_constant__ Params params) {
  const int64 number = int64(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int64 row = int64(Index(number) / Index(params.slices_of_row));
  if (row >= params.rows) return;
  Slice slice;
  slice.load(params.x + row * params.row_stride, params.columns, number - row * params.slices_of_row);
  const Pair pair = slice.pair(Score(params.scale));
  if (group_lane() == 0) params.slices[number] = pair;
}
