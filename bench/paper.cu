// The algorithms of M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867), as
// plain as in the paper: a thread block a row, whose threads walk it side by side, one element at a time. They are what
// the paper compared, not what cuflash runs.
//
//   kTop   elements selected, K of the paper; defined in front
//
// blockDim.x is a multiple of 32, and at most kMostThreads.
constexpr int kMostThreads = 256;
constexpr float kLowest = -3.402823466e38f;  // finite, so that nothing subtracts infinities

// The running maximum and normaliser of Algorithm 3.
struct Pair {
  float m, d;
};

__device__ __forceinline__ Pair merge(Pair a, Pair b) {
  const bool a_is_larger = a.m > b.m;
  const Pair larger = a_is_larger ? a : b, smaller = a_is_larger ? b : a;
  return {larger.m, larger.d + smaller.d * __expf(smaller.m - larger.m)};
}

// The sorted buffers u and p of Algorithm 4.
struct Top {
  float u[kTop];
  int p[kTop];

  static __device__ __forceinline__ Top empty() {
    Top top;
#pragma unroll
    for (int k = 0; k < kTop; ++k) {
      top.u[k] = kLowest;
      top.p[k] = -1;
    }
    return top;
  }

  __device__ __forceinline__ void insert(float value, int index) {
    if (!(value > u[kTop - 1])) return;
    u[kTop - 1] = value;
    p[kTop - 1] = index;
#pragma unroll
    for (int k = kTop - 1; k > 0; --k) {
      if (u[k] > u[k - 1]) {
        const float larger = u[k];
        const int its = p[k];
        u[k] = u[k - 1];
        p[k] = p[k - 1];
        u[k - 1] = larger;
        p[k - 1] = its;
      }
    }
  }

  __device__ __forceinline__ void drop_first() {
#pragma unroll
    for (int k = 1; k < kTop; ++k) {
      u[k - 1] = u[k];
      p[k - 1] = p[k];
    }
    u[kTop - 1] = kLowest;
    p[kTop - 1] = -1;
  }
};

struct Sum {
  float value;
};
struct Max {
  float value;
};
__device__ __forceinline__ Sum merge(Sum a, Sum b) { return {a.value + b.value}; }
__device__ __forceinline__ Max merge(Max a, Max b) { return {fmaxf(a.value, b.value)}; }

// The state of the lane whose number differs in the bits of `mask`.
__device__ __forceinline__ float exchange(float value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }
__device__ __forceinline__ Sum exchange(Sum state, int mask) { return {exchange(state.value, mask)}; }
__device__ __forceinline__ Max exchange(Max state, int mask) { return {exchange(state.value, mask)}; }
__device__ __forceinline__ Pair exchange(Pair state, int mask) {
  return {exchange(state.m, mask), exchange(state.d, mask)};
}

// Joins the states of a block's threads. Thread 0 gets the result. At most once in a kernel for each kind of state.
template <typename State> __device__ __forceinline__ State reduce_block(State state) {
  __shared__ State warps_smem[kMostThreads / 32];
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) state = merge(state, exchange(state, mask));
  if (threadIdx.x % 32 == 0) warps_smem[threadIdx.x / 32] = state;
  __syncthreads();  // thread 0 reads all warps' states
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < blockDim.x / 32; ++warp) state = merge(state, warps_smem[warp]);
  }
  return state;
}

// Gives thread 0's state to all threads of the block. At most once in a kernel for each kind of state.
template <typename State> __device__ __forceinline__ State broadcast(State state) {
  __shared__ State from_first_smem;
  if (threadIdx.x == 0) from_first_smem = state;
  __syncthreads();  // all threads read what thread 0 wrote
  return from_first_smem;
}

// The kTop largest of a warp's sorted buffers: so many times the largest of the first ones. Lane 0 writes them.
__device__ __forceinline__ void select_warp(Top own, Top& selected_smem) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int k = 0; k < kTop; ++k) {
    float value = own.u[0];
    int from = lane;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      const float other = exchange(value, mask);
      const int its = __shfl_xor_sync(0xffffffff, from, mask);
      if (other > value || (other == value && its < from)) {  // so that all lanes agree
        value = other;
        from = its;
      }
    }
    const int index = __shfl_sync(0xffffffff, own.p[0], from);
    if (lane == 0) {
      selected_smem.u[k] = value;
      selected_smem.p[k] = index;
    }
    if (lane == from) own.drop_first();
  }
}

// The same of a block's, in shared memory for its first warp.
__device__ __forceinline__ const Top& select_block(const Top& own) {
  __shared__ Top warps_smem[kMostThreads / 32], block_smem;
  select_warp(own, warps_smem[threadIdx.x / 32]);
  __syncthreads();  // the first warp reads all warps' buffers
  if (threadIdx.x < 32) {
    select_warp(threadIdx.x < blockDim.x / 32 ? warps_smem[threadIdx.x] : Top::empty(), block_smem);
    __syncwarp();  // its lanes read what lane 0 wrote
  }
  return block_smem;
}

template <typename T> __device__ __forceinline__ T* row(T* matrix, int columns) {
  return matrix + (long long)(blockIdx.x) * columns;
}

// Algorithm 1. It overflows for scores above 88.
extern "C" __global__ void __launch_bounds__(kMostThreads)
    softmax_naive(const float* __restrict__ x,  // [batch, columns]
                  float* __restrict__ y,        // [batch, columns]
                  int columns) {
  x = row(x, columns);
  y = row(y, columns);
  Sum d = {0};
  for (int i = threadIdx.x; i < columns; i += blockDim.x) d.value += __expf(x[i]);
  const float scale = 1 / broadcast(reduce_block(d)).value;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) y[i] = __expf(x[i]) * scale;
}

// Algorithm 2: the maximum in a pass of its own.
extern "C" __global__ void __launch_bounds__(kMostThreads)
    softmax_safe(const float* __restrict__ x,  // [batch, columns]
                 float* __restrict__ y,        // [batch, columns]
                 int columns) {
  x = row(x, columns);
  y = row(y, columns);
  Max max = {kLowest};
  for (int i = threadIdx.x; i < columns; i += blockDim.x) max.value = fmaxf(max.value, x[i]);
  const float m = broadcast(reduce_block(max)).value;
  Sum d = {0};
  for (int i = threadIdx.x; i < columns; i += blockDim.x) d.value += __expf(x[i] - m);
  const float scale = 1 / broadcast(reduce_block(d)).value;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) y[i] = __expf(x[i] - m) * scale;
}

// Algorithm 3: maximum and normaliser in one pass.
extern "C" __global__ void __launch_bounds__(kMostThreads)
    softmax_online(const float* __restrict__ x,  // [batch, columns]
                   float* __restrict__ y,        // [batch, columns]
                   int columns) {
  x = row(x, columns);
  y = row(y, columns);
  Pair own = {kLowest, 0};
  for (int i = threadIdx.x; i < columns; i += blockDim.x) own = merge(own, Pair{x[i], 1});
  const Pair pair = broadcast(reduce_block(own));
  const float scale = 1 / pair.d;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) y[i] = __expf(x[i] - pair.m) * scale;
}

// The first warp writes what was selected; `value` makes a probability of an element.
template <typename Value>
__device__ __forceinline__ void write_top(const Top& top, float* values, int* indices, Value value) {
  if (threadIdx.x >= 32) return;
  for (int k = threadIdx.x; k < kTop; k += 32) {
    values[(long long)(blockIdx.x) * kTop + k] = value(top.u[k]);
    indices[(long long)(blockIdx.x) * kTop + k] = top.p[k];
  }
}

// Top-k of a softmax that has been written: the second half of the unfused algorithms.
extern "C" __global__ void __launch_bounds__(kMostThreads)
    topk(const float* __restrict__ y,  // [batch, columns]
         float* values,                // [batch, kTop]
         int* indices,                 // [batch, kTop]
         int columns) {
  y = row(y, columns);
  Top own = Top::empty();
  for (int i = threadIdx.x; i < columns; i += blockDim.x) own.insert(y[i], i);
  write_top(select_block(own), values, indices, [](float u) { return u; });
}

// Safe softmax fused with top-k: two reads, nothing written but what was selected.
extern "C" __global__ void __launch_bounds__(kMostThreads)
    safe_topk(const float* __restrict__ x,  // [batch, columns]
              float* values,                // [batch, kTop]
              int* indices,                 // [batch, kTop]
              int columns) {
  x = row(x, columns);
  Max max = {kLowest};
  for (int i = threadIdx.x; i < columns; i += blockDim.x) max.value = fmaxf(max.value, x[i]);
  const float m = broadcast(reduce_block(max)).value;
  Sum own_sum = {0};
  Top own = Top::empty();
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    const float score = x[i];
    own_sum.value += __expf(score - m);
    own.insert(score, i);
  }
  const float d = broadcast(reduce_block(own_sum)).value;
  write_top(select_block(own), values, indices, [=](float u) { return __expf(u - m) / d; });
}

// Algorithm 4: online softmax fused with top-k, one read.
extern "C" __global__ void __launch_bounds__(kMostThreads)
    online_topk(const float* __restrict__ x,  // [batch, columns]
                float* values,                // [batch, kTop]
                int* indices,                 // [batch, kTop]
                int columns) {
  x = row(x, columns);
  Pair own_pair = {kLowest, 0};
  Top own = Top::empty();
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    const float score = x[i];
    own_pair = merge(own_pair, Pair{score, 1});
    own.insert(score, i);
  }
  const Pair pair = broadcast(reduce_block(own_pair));
  write_top(select_block(own), values, indices, [=](float u) { return __expf(u - pair.m) / pair.d; });
}
