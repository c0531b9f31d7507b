// Which blocks of scores a mask leaves empty, and which whole: it is evaluated at every place.
//
// A warp has a block, until it has seen both; its lanes have keys side by side. Expects Variant and, as constants: Element, kWholeBlocks,
// kWarps.
constexpr int kEmpty = 0, kPartial = 1, kWhole = 2;

struct Params {
  signed char* kinds;  // [batch, heads, n_q, n_k]
  int64 blocks;        // of them all
  int heads, n_q, n_k;
  int size_q, size_k;  // queries and keys of a block
  int len_q, len_k;
  int start;           // the key position of query 0
  Variant variant;
};

extern "C" __global__ void __launch_bounds__(32 * kWarps) attention_blocks(const __grid_constant__ Params params) {
  const int64 block = blockIdx.x * int64(kWarps) + threadIdx.x / 32;
  if (block >= params.blocks) return;
  const int block_k = int(block % params.n_k), block_q = int(block / params.n_k % params.n_q);
  const int pair = int(block / params.n_k / params.n_q);
  const int key = block_k * params.size_k, end = key + min_of(params.size_k, params.len_k - key);
  const int row = block_q * params.size_q, last_row = row + min_of(params.size_q, params.len_q - row) - 1;

  Variant::Coordinates at = {};
  at.b = pair / params.heads;
  at.h = pair % params.heads;
  at.len_q = params.len_q;
  at.len_k = params.len_k;
  bool hides = false, shows = false;  // some place
  for (at.row = row; at.row <= last_row; ++at.row) {
    at.i = at.row + params.start;
    for (at.key = key + threadIdx.x % 32; at.key < end; at.key += 32) {
      const bool seen = params.variant.mask<false>(at, 0, Variant::MaskReads(), 0);
      shows |= seen;
      hides |= !seen;
    }
    if (__any_sync(0xffffffffu, hides) && __any_sync(0xffffffffu, shows)) break;
  }
  hides = __any_sync(0xffffffffu, hides);
  shows = __any_sync(0xffffffffu, shows);
  if (threadIdx.x % 32 == 0) params.kinds[block] = !shows ? kEmpty : hides ? kPartial : kWhole;
}
