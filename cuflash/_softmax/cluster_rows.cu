// softmax, log_softmax and their backward passes for rows that a cluster of blocks holds in registers: one read, one write.
//
//   kCluster   blocks that share a row, and exchange states only; sm_90 and later
constexpr int kSharing = kThreads * kCluster;
#include "_softmax/rows.cuh"
#include "_softmax/exchange.cuh"

extern "C" __global__ void CLUSTER_OF(kCluster) __launch_bounds__(kThreads, kBlocks)
    softmax_cluster_rows(const __grid_constant__ Params params) {
  __shared__ Exchange exchange_smem;
  exchange_smem.open();
  Share share = share_of(params, blockIdx.x / kCluster, 0, threadIdx.x + blockIdx.x % kCluster * kThreads);
  Tile tile = load_tile(params, share, 0);
  State own = State::empty();
  Operation::take_held(own, tile.x, tile.beside, tile.present);
  exchange_smem.join();
  const Operation::Answers answers(exchange_smem.merge(own, 0));
  answers.answer_held(own, tile.x, tile.beside);
  share.thread = recomputed(share.thread);  // the scores need the registers that addresses would be kept in
  store_tile(params, share, 0, tile);
}
