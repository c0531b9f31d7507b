// Merges attention over disjoint sets of keys: (m, d) pairs whose m is lse and whose d is 1, and the outputs they weigh.
//
// One thread computes one output element; a row's threads read the same few lse. Constants: Element, Output, kParts.
#include "device/online_softmax.cuh"

struct Params {
  const Element* outs[kParts];                // each [rows, head_dim_v], contiguous
  const Accumulator<Element>* lses[kParts];   // each [rows], contiguous
  Output* out;                                // [rows, head_dim_v]
  Accumulator<Element>* lse;                  // [rows]
  int64 elements;                             // rows head_dim_v
  int head_dim_v;
  int parts;  // used, of kParts
};

extern "C" __global__ void __launch_bounds__(256, 4) attention_combine(const __grid_constant__ Params params) {
  using T = Accumulator<Element>;
  const int64 element = blockIdx.x * 256ll + threadIdx.x;
  if (element >= params.elements) return;
  const int64 row = element / params.head_dim_v;

  // The largest lse first, in a pass of its own: it spares O the rounding of each rescale.
  RunningPair<T, BaseE> pair = RunningPair<T, BaseE>::empty();
  for (int part = 0; part < params.parts; ++part) pair.raise(params.lses[part][row]);
  T o = 0;
  for (int part = 0; part < params.parts; ++part) {  // a fixed order: the same answer every run
    const T lse = params.lses[part][row];
    if (lse == -infinity<T>()) continue;  // no keys: whatever its output holds
    const T weight = BaseE::exp(lse - pair.max);
    pair.sum += weight;
    o += weight * widen(params.outs[part][element]);
  }

  const bool empty = pair.max == -infinity<T>() && pair.sum == T(0);  // and no NaN
  params.out[element] = narrow<Output>(empty ? T(0) : o * (T(1) / pair.sum));
  if (element % params.head_dim_v == 0) params.lse[row] = pair.log_sum();
}
