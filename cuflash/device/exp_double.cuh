// The exponential in double precision for terms of a sum beside the largest, which are at most 1. CUDA's own takes branches and
// loads its coefficients anew, for arguments that do not occur there.
//
// x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 in two parts; Cody and Waite), and e^x = 2^n (1 + r + r^2 q(r)) with the polynomial q of
// degree 9 whose largest relative error is least: 3.6e-18 (found by Remez' algorithm).

// A template, so that only kernels of doubles have it; not const, so that operands are read from where they are.
template <typename T> __constant__ T kExpTail[] = {0x1.000000000000ap-1,  0x1.55555555554fap-3,  0x1.555555555087cp-5,
                                                   0x1.1111111127be5p-7,  0x1.6c16c1842a11dp-10, 0x1.a01a012a57b51p-13,
                                                   0x1.a0199a0c677acp-16, 0x1.71df2552390c2p-19, 0x1.28ad72cc30daap-22,
                                                   0x1.ad7f6f0799ee2p-26};

constexpr double kMostExponent = 708.5;  // below -708.5, e^x is no normal number any more

// e^x for |x| <= kMostExponent and NaN; 0 for -1023 ln 2.
__device__ __forceinline__ double exp_of_near(double x) {
  constexpr double kLn2Tail = 2.3190468138462996e-17;
  constexpr double kToInteger = 0x1.8p52;  // a sum with it has n in its lowest bits
  const double shifted = fma(x, 1.4426950408889634, kToInteger), n = shifted - kToInteger;
  const double r = fma(n, -kLn2Tail, fma(n, -0.6931471805599453, x));
  double q = kExpTail<double>[9];
#pragma unroll
  for (int i = 8; i >= 0; --i) q = fma(q, r, kExpTail<double>[i]);
  const double power = __hiloint2double((__double2loint(shifted) + 1023) << 20, 0);
  return fma(fma(q, r, 1.0), r, 1.0) * power;
}

// e^x for x <= kMostExponent and NaN, 0 below -kMostExponent. A row with +inf has others: inf of inf, and something large.
__device__ __forceinline__ double exp_of_term(double x) {
  return fabs(x) > kMostExponent ? (x > 0 ? x : 0.0) : exp_of_near(x);
}

// e^x for x <= 0 and NaN where the caller may not use it: without a branch, which compilers would make around something so long.
__device__ __forceinline__ double exp_of_term_in_any_case(double x) {
  double y = exp_of_near(x < -kMostExponent ? -1023 * 0.6931471805599453 : x);
  asm volatile("" : "+d"(y));
  return y;
}
