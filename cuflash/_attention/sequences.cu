// Where the sequences of packed arrays lie, and in which order their query tiles are worked on: one block, before the attention kernel.
//
//   first_row, first_key = the offsets, never trusted: the first is 0, they never fall, and the arrays bound them
//   tiles = rows / kBlockM, rounded up
//   first_tile = a counting sort by the number of keys, most first: the longest work starts first
//
// Constants: those of the attention kernel whose tiles they are.
#include "_attention/scan.cuh"
#include "_attention/tile_loop.cuh"

constexpr int kBuckets = kSorters;

// Writes where each sequence begins along one axis: `of_rows` or that of keys.
template <bool kRows> __device__ __forceinline__ void find_beginnings(const Sequences& all, int length) {
  const void* offsets = all.offsets[kRows ? 0 : 1];
  const int64 stride = all.strides[kRows ? 0 : 1];
  const bool narrow = all.bytes[kRows ? 0 : 1] == 4;
  __shared__ int reached;
  for (int base = 0; base <= all.count; base += kSorters) {
    const int i = base + threadIdx.x;
    int begin = 0;
    if (i > 0 && i <= all.count) {
      const int64 offset = narrow ? static_cast<const int*>(offsets)[i * stride] : static_cast<const int64*>(offsets)[i * stride];
      begin = clamp(offset, 0, length);
    }
    begin = scan(begin, [](int a, int b) { return max_of(a, b); });
    if (base > 0) begin = max_of(begin, reached);
    __syncthreads();  // everybody has read what was reached before
    if (threadIdx.x == kSorters - 1) reached = begin;
    __syncthreads();
    if (i <= all.count) (kRows ? all.each[i].first_row : all.each[i].first_key) = begin;
  }
}

extern "C" __global__ void __launch_bounds__(kSorters) attention_sequences(const __grid_constant__ Params params) {
  const Sequences& all = params.sequences;
  __shared__ int most_keys, places[kBuckets];
  if (threadIdx.x == 0) {
    most_keys = 1;
    *params.bits.counter = 0;
    all.each[all.count + 1].first_row = params.len_q;
  }
  places[threadIdx.x] = 0;
  find_beginnings<true>(all, params.len_q);
  find_beginnings<false>(all, params.len_k);
  __syncthreads();

  for (int i = threadIdx.x; i <= all.count; i += kSorters) {
    Sequence& it = all.each[i];
    it.rows = all.each[i + 1].first_row - it.first_row;
    it.keys = i < all.count ? all.each[i + 1].first_key - it.first_key : 0;
    it.tiles = (it.rows + kBlockM - 1) / kBlockM;
    if (it.rows > 0) atomicMax(&most_keys, it.keys);
  }
  __syncthreads();
  const auto bucket = [&](const Sequence& it) { return kBuckets - 1 - int(int64(min_of(it.keys, most_keys)) * (kBuckets - 1) / most_keys); };
  for (int i = threadIdx.x; i <= all.count; i += kSorters) atomicAdd(&places[bucket(all.each[i])], all.each[i].tiles);
  __syncthreads();
  const int own = places[threadIdx.x], end = scan(own, [](int a, int b) { return a + b; });
  places[threadIdx.x] = end - own;
  if (threadIdx.x == kSorters - 1) *all.tiles = end;
  __syncthreads();

  // Which of the sequences of a bucket comes first is left to chance: no answer depends on it.
  for (int i = threadIdx.x; i <= all.count; i += kSorters) {
    Sequence& it = all.each[i];
    it.first_tile = atomicAdd(&places[bucket(it)], it.tiles);
  }
  __syncthreads();
  for (int i = threadIdx.x / 32; i <= all.count; i += kSorters / 32) {
    const Sequence it = all.each[i];
    for (int tile = threadIdx.x % 32; tile < it.tiles; tile += 32) all.of_tile[it.first_tile + tile] = i;
  }
}
