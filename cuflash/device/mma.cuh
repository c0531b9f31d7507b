// Tensor-core products of one warp (mma.sync) and the loads of their fragments.
//
// In every accumulator fragment below, with g = lane / 4 and t = lane % 4, the four values are
// (row g, columns 2t and 2t + 1) and (row g + 8, columns 2t and 2t + 1) of a 16 x 8 block.
#include "device/types.cuh"

// ldmatrix, PTX ISA 9.7.14.5.15: four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and
// receives the pair (row l / 4, columns 2 (l % 4), +1) of each. A row is 16 bytes: four 32-bit words serve as well.
__device__ __forceinline__ void load_matrices(uint32 (&to)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32 (&to)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}
// stmatrix, 9.7.14.5.16: the way back (sm_90).
__device__ __forceinline__ void store_matrices(uint32 row, uint32 a, uint32 b, uint32 c, uint32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// Of a row's four lanes, lane l has words l 0, l 1, l 2, l 3; then 0 l, 1 l, 2 l, 3 l.
__device__ __forceinline__ void transpose_quad(uint32 (&x)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool odd = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32 got = __shfl_xor_sync(0xffffffffu, odd ? x[i] : x[i + step], step);
      if (odd) {
        x[i] = got;
      } else {
        x[i + step] = got;
      }
    }
  }
}

// mma.m16n8k16, PTX ISA 9.7.14.5.8: c += a b, with a 16 x 16, b 16 x 8, both 16-bit. sm_75 has the half-long m16n8k8 only.
template <typename Element>
__device__ __forceinline__ void mma_16x8x16(float& c0, float& c1, float& c2, float& c3, const uint32 (&a)[4],
                                            uint32 b0, uint32 b1);
template <>
__device__ __forceinline__ void mma_16x8x16<float16>(float& c0, float& c1, float& c2, float& c3,
                                                     const uint32 (&a)[4], uint32 b0, uint32 b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3) : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
template <>
__device__ __forceinline__ void mma_16x8x16<bfloat16>(float& c0, float& c1, float& c2, float& c3,
                                                      const uint32 (&a)[4], uint32 b0, uint32 b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// mma.m16n8k8 on TF32, PTX ISA 9.7.14.5.7: a is (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b is (t, g), (t + 4, g).
__device__ __forceinline__ void mma_16x8x8(float& c0, float& c1, float& c2, float& c3, const uint32 (&a)[4],
                                           uint32 b0, uint32 b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// The same product in float64: one instruction from sm_90 on, four m8n8k4 before (PTX ISA 9.7.14.5.1 and 9.7.14.5.12).
__device__ __forceinline__ void mma_16x8x8(double& c0, double& c1, double& c2, double& c3, const double (&a)[4],
                                           double b0, double b1) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+d"(c0), "+d"(c1), "+d"(c2), "+d"(c3)
               : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b0), "d"(b1));
#elif __CUDA_ARCH__ >= 800
  const auto quarter = [](double& x, double& y, double row, double column) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(x), "+d"(y) : "d"(row), "d"(column));
  };
  quarter(c0, c1, a[0], b0);
  quarter(c2, c3, a[1], b0);
  quarter(c0, c1, a[2], b1);
  quarter(c2, c3, a[3], b1);
#endif
}

// x = high + low in TF32's 11 significant bits each: all of float32's 24 but, at worst, the last.
__device__ __forceinline__ void split_tf32(uint32& high, uint32& low, float x) {
  high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  low = __float_as_uint(x - __uint_as_float(high));  // at most one bit too long, which the tensor core cuts off
}
