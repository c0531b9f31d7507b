// How the blocks of a cluster join the states of the row that they share.
#include "_softmax/merge.cuh"
#include "device/cluster.cuh"

struct Exchange {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kStates = kCluster * kWarps;

  State states[kStates];
  Mailbox mailbox;

  // By all threads, at the beginning of a kernel; `join` by the time that the first states are sent.
  __device__ __forceinline__ void open() {
    if (threadIdx.x == 0) mailbox.init();
    cluster_arrive();
  }
  __device__ __forceinline__ void join() const {
    cluster_wait();  // all blocks run, and their mailboxes are open
  }

  // Once in a kernel; all threads get the state of the row. No block ends while another may send to it: it has had all states.
  __device__ __forceinline__ State merge(State state) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    state = merge_lanes<1, 32>(state);
    State* mine = &states[blockIdx.x % kCluster * kWarps + warp];
    if (threadIdx.x == 0) mailbox.expect(sizeof(states));
    if (lane < kCluster) send(state, mine, &mailbox, lane);
    mailbox.wait();
    state = states[lane % kStates];
#pragma unroll
    for (int i = 32; i < kStates; i += 32) state.merge(states[i + lane]);
    return merge_lanes<1, kStates < 32 ? kStates : 32>(state);
  }
};
