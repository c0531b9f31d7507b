// The last step of logsumexp and its kin where rows were split: a warp for each row joins the states of its parts.
#include "_softmax/merge.cuh"

extern "C" __global__ void __launch_bounds__(kThreads) softmax_parts(const __grid_constant__ Params params) {
  const int64 row = (int64(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (row >= params.rows) return;
  const State state = merge_parts(params, row);
  if (threadIdx.x % 32 == 0) Operation::write(params, row, state);
}
