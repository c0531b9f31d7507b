// Drawing a row's token, with or without filters, from a Row that knows where its slices are.
//
// A token drawn from everything is kept if the filters admit it; if not, the next is drawn from the tokens above it.
// Each set that is drawn from holds all admitted tokens, because the filters turn down whatever is below a token that
// they turn down; so the token that is kept was drawn by its weight from the admitted ones, which is their
// distribution. A draw from all that top_p has to judge is kept with a probability of at least top_p; one that is not
// leaves a smaller set, in which the most probable token remains. That one is always kept, so the rounds end.
#include "_softmax/selection/sample.cuh"
#include "device/philox.cuh"

// A number in [0, 1) of 53 bits. The counter is (row, offset), 64 bits each, with the number of the draw in the row's
// upper 16.
__device__ __forceinline__ double uniform(uint64 seed, uint64 offset, uint64 row, uint32 draw) {
  const Words words = philox({uint32(row), uint32(row >> 32) | draw << 16, uint32(offset), uint32(offset >> 32)}, seed);
  return double((uint64(words.at[1]) << 32 | words.at[0]) >> 11) * 0x1p-53;
}

// Row has, for all of its threads alike:
//   Choice choose(double fraction)                   the slice that holds that fraction of the mass of all slices
//   Token find(const Choice&, const Drawable&)       the token there, of what was last measured
//   void measure(const Drawable&)                    makes the masses of all slices those of what is drawable
template <typename Row> __device__ __forceinline__ int64 draw(const Params& params, int64 number, Row& row) {
  Drawable drawable;
  Token token;
  double nucleus;       // the mass that the tokens ahead of an admitted one stay below
  bool likely = false;  // whether min_p admits the token
  for (uint32 round = 0;; ++round) {
    const Choice choice = row.choose(uniform(params.seed, params.offset, number, round));
    if (round == 0) {
      if (!(choice.total > 0)) return -1;  // NaN, +inf, or nothing but -inf
      drawable = Drawable::all(choice.max, Score(params.scale));
      nucleus = params.top_p * choice.total;
    }
    if (likely && choice.total < nucleus) break;
    token = row.find(choice, drawable);
    if (!kFiltered) break;
    likely = drawable.exponent(token.score) >= Score(params.least);
    if (likely && nucleus == infinity<double>()) break;
    drawable.bound = token;
    drawable.least = Score(params.least);
    row.measure(drawable);
  }
  return params.indices ? params.indices[number * params.columns + token.column] : token.column;
}
