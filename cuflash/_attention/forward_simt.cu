// FlashAttention forward on the FMA units: float32 where TF32 has no advantage, float64 without FP64 tensor cores, bfloat16 on sm_75.
//
// Constants: those of tile_loop.cuh, Number, kThreadRows, kMinBlocks.
#include "_attention/simt.cuh"

extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
attention_forward(const __grid_constant__ Params params) {
  attend<SimtProducts<Number>>(params);
}
