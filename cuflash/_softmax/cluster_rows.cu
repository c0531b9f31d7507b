// Rows that a cluster of blocks shares: held in registers by operations that give an answer for each element, one read and one
// write; read once, however long, by those that reduce.
//
//   kCluster   blocks that share a row, and exchange states only; sm_90 and later
constexpr int kSharing = kThreads * kCluster;
#include "_softmax/rows.cuh"
#include "_softmax/exchange.cuh"

template <typename Operation> __device__ __forceinline__ void reduce(const Params& params, const Share& share, Exchange& exchange) {
  State own = State::empty();
  for (int64 start = 0; start < share.end; start += kStep) {
    Tile tile = load_tile(params, share, start);
    Operation::take(own, tile.x, tile.beside, tile.present);
  }
  exchange.join();
  const State state = exchange.merge(own);
  if (share.thread == 0) Operation::write(params, blockIdx.x / kCluster, state);
}

template <typename Operation> __device__ __forceinline__ void map(const Params& params, const Share& share, Exchange& exchange) {
  Held<Operation, kPacked> held;
  held.load(params, share);
  const State own = held.take();
  exchange.join();
  held.answer(params, share, exchange.merge(own));
}

extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, kBlocks)
    softmax_cluster_rows(const __grid_constant__ Params params) {
  __shared__ Exchange exchange_smem;
  exchange_smem.open();
  const Share share = share_of(params, blockIdx.x / kCluster, 0, threadIdx.x + blockIdx.x % kCluster * kThreads);
  if constexpr (kReduces) {
    reduce<Operation>(params, share, exchange_smem);
  } else {
    map<Operation>(params, share, exchange_smem);
  }
}
