// How the threads that share a row join their states.
#include "_softmax/operation.cuh"
#include "device/cluster.cuh"

using State = Operation::State;

// Both in global memory, from one launch to the next: the state of part `split` of a row.
__device__ __forceinline__ State* state_of(const Params& params, int64 row, int64 split) {
  return static_cast<State*>(params.states) + row * params.splits + split;
}

// The state of a whole row whose parts an earlier launch has left; for all threads of a warp, in a fixed order.
__device__ __forceinline__ State merge_parts(const Params& params, int64 row) {
  State state = State::empty();
  for (int64 split = threadIdx.x % 32; split < params.splits; split += 32) state.merge(*state_of(params, row, split));
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) state.merge(exchange(state, mask));
  return state;
}

// Joins the states that kPlaces threads of each of the cluster's blocks hold in `mine_smem`; all blocks get the results there.
template <int kPlaces> __device__ __forceinline__ void merge_cluster(State (&states_smem)[kPlaces]) {
  if constexpr (kCluster > 1) {
    __shared__ State blocks_smem[kCluster][kPlaces];
    const int rank = blockIdx.x % kCluster;
    cluster_wait();  // for the arrival at the kernel's start: only a block that runs has shared memory
    for (int i = threadIdx.x; i < kPlaces * kCluster; i += kThreads) {
      store_to_block(&blocks_smem[rank][i / kCluster], i % kCluster, states_smem[i / kCluster]);
    }
    cluster_arrive();
    cluster_wait();  // every block's states are here, and no one writes to a block that may have ended
    for (int i = threadIdx.x; i < kPlaces; i += kThreads) {
      State state = blocks_smem[0][i];
#pragma unroll
      for (int block = 1; block < kCluster; ++block) state.merge(blocks_smem[block][i]);
      states_smem[i] = state;
    }
    __syncthreads();  // all threads read the results
  }
}
