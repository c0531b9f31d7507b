// How the threads that share a row join their states.
#include "_softmax/operation.cuh"

using State = Operation::State;

// Both in global memory, from one launch to the next: the state of part `split` of a row.
__device__ __forceinline__ State* state_of(const Params& params, int64 row, int64 split) {
  return static_cast<State*>(params.states) + row * params.splits + split;
}

// The state of a whole row whose parts an earlier launch has left; for all threads of a warp, in a fixed order.
__device__ __forceinline__ State merge_parts(const Params& params, int64 row) {
  State state = State::empty();
  for (int64 split = threadIdx.x % 32; split < params.splits; split += 32) state.merge(*state_of(params, row, split));
  return merge_lanes<1, 32>(state);
}
