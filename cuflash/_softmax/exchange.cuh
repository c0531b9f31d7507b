// How the blocks of a cluster join the states of the row that they share.
#include "_softmax/merge.cuh"
#include "device/cluster.cuh"

struct Exchange {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kStates = kCluster * kWarps;

  State states[2][kStates];  // for even and odd rows: when a warp has all states of a row, all warps have read the last one's
  Mailbox mailboxes[2];

  // By all threads, at the beginning of a kernel; `join` by the time that the first states are sent.
  __device__ __forceinline__ void open() {
    if constexpr (kCluster == 1) return;
    if (threadIdx.x < 2) mailboxes[threadIdx.x].init();
    cluster_arrive();
  }
  __device__ __forceinline__ void join() const {
    if constexpr (kCluster > 1) cluster_wait();  // all blocks run, and their mailboxes are open
  }

  // All threads get the state of row `number`, counted from 0. No block ends while another may send to it: it has had all
  // states of its last row.
  __device__ __forceinline__ State merge(State state, int number) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, odd = number & 1;
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) state.merge(exchange(state, mask));
    State* mine = &states[odd][blockIdx.x % kCluster * kWarps + warp];
    if constexpr (kCluster > 1) {
      if (threadIdx.x == 0) mailboxes[odd].expect(sizeof(states[odd]));
      if (lane < kCluster) send(state, mine, &mailboxes[odd], lane);
      mailboxes[odd].wait(number >> 1 & 1);
    } else {
      if (lane == 0) *mine = state;
      __syncthreads();  // all warps have written theirs
    }
    state = states[odd][lane % kStates];
#pragma unroll
    for (int i = 32; i < kStates; i += 32) state.merge(states[odd][i + lane]);
#pragma unroll
    for (int mask = 1; mask < kStates && mask < 32; mask *= 2) state.merge(exchange(state, mask));
    return state;
  }
};
