// Vectors of the instruction set this file is compiled for, and the few functions the kernels need on them.
//
// Width follows the compiler's flags: 64 bytes with AVX-512, 32 with AVX2, 16 elsewhere (SSE2, NEON). Everything lives in an
// anonymous namespace and uses no std:: template: the same source is compiled several times, and the linker must never
// merge a baseline function with one that needs AVX-512.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "tensor.h"

namespace pixelbytes {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVecBytes), may_alias));
  typedef int32_t mask __attribute__((vector_size(kVecBytes), may_alias));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVecBytes), may_alias));
  typedef int64_t mask __attribute__((vector_size(kVecBytes), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using Mask = typename VecOf<T>::mask;
typedef Vec<float> vf;
typedef Mask<float> vi;
typedef Vec<double> vd;

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef uint32_t type __attribute__((vector_size(kVecBytes), may_alias));
};
template <class T>
using Bits = typename BitsOf<T>::type;

template <class T>
constexpr int kLanes = kVecBytes / int(sizeof(T));

// A number as a type, for generic lambdas (std::integral_constant would be a shared template).
template <int kValue>
struct ConstantInt {
  static constexpr int value = kValue;
};

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof v);
}
template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 keeps NaN and the sign of zero
}
template <class T>
inline Vec<T> lane_index() {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = T(i);
  return v;
}
inline vf select(vi m, vf a, vf b) { return m ? a : b; }
inline vd select(Mask<double> m, vd a, vd b) { return m ? a : b; }
// NaN in `x` survives both: the comparison is false and x is kept. (The instructions give their second operand then. Their forms without
// a mask make GCC 12 warn of its own header; a full mask costs nothing.)
#if defined(__AVX512F__)
inline vf at_least(vf x, vf low) { return (vf)_mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)x); }
inline vf at_most(vf x, vf high) { return (vf)_mm512_maskz_min_ps(0xffff, (__m512)high, (__m512)x); }
#elif defined(__AVX2__)
inline vf at_least(vf x, vf low) { return (vf)_mm256_max_ps((__m256)low, (__m256)x); }
inline vf at_most(vf x, vf high) { return (vf)_mm256_min_ps((__m256)high, (__m256)x); }
#else
inline vf at_least(vf x, vf low) { return x < low ? low : x; }
inline vf at_most(vf x, vf high) { return x > high ? high : x; }
#endif
inline vd at_least(vd x, vd low) { return x < low ? low : x; }

// Whether a comparison holds in every lane.
inline bool all(vi m) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)m) == 0xff;
#else
  bool every = true;
  for (int i = 0; i < kLanes<float>; ++i) every &= m[i] != 0;
  return every;
#endif
}

inline Bits<float> bits(vf v) {
  Bits<float> b;
  memcpy(&b, &v, sizeof b);
  return b;
}

// ---- 2^y, float ------------------------------------------------------------------------------------------------------
// y is split as k / S + r with S table entries per octave; k comes from adding a magic number, whose rounding leaves k in the
// low mantissa bits. Relative error below 1.1e-7 on every path.
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLog2eLow = float(1.4426950408889634 - double(1.4426950408889634f));

#if defined(__AVX512F__)
constexpr float kMagic = 393216.0f;  // 1.5 * 2^(23 - 5): 32 steps per octave
// [y] must lie in [kExp2Low, kExp2High] for exp2_split to be exact to rounding; scalef under- and overflows as it should.
constexpr float kExp2Low = -65536.0f, kExp2High = 65536.0f;
alignas(64) constexpr float kExp2Table[32] = {
    1.0f,         1.02189715f,  1.04427378f,  1.06714042f,  1.09050773f,  1.11438674f,  1.13878863f,  1.16372487f,
    1.18920712f,  1.2152474f,   1.24185781f,  1.26905096f,  1.29683955f,  1.32523665f,  1.35425555f,  1.38390988f,
    1.41421356f,  1.44518081f,  1.47682614f,  1.50916443f,  1.54221083f,  1.57598085f,  1.61049033f,  1.6457555f,
    1.68179283f,  1.71861930f,  1.75625216f,  1.79470907f,  1.83400809f,  1.87416764f,  1.91520656f,  1.95714412f};

inline vf exp2_split(vf t, vf tn, vf r) {
  const __m512 low = _mm512_load_ps(kExp2Table), high = _mm512_load_ps(kExp2Table + 16);
  const vf table = (vf)_mm512_permutex2var_ps(low, _mm512_castps_si512((__m512)t), high);
  const vf q = r * (0.69315735f + r * 0.24022846f);
  return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)(table + table * q), (__m512)tn);
}
#elif defined(__AVX2__)
constexpr float kMagic = 1572864.0f;  // 1.5 * 2^(23 - 3): 8 steps per octave
constexpr float kExp2Low = -126.0f, kExp2High = 126.0f;

inline vf exp2_split(vf t, vf, vf r) {
  // 2^(j/8) with j << 20 taken off its bits, so that adding t << 20 gives 2^(n + j/8) in one step.
  const __m256i table = _mm256_setr_epi32(0x3f800000, 0x3f8b95c2 - (1 << 20), 0x3f9837f0 - (2 << 20), 0x3fa5fed7 - (3 << 20),
                                          0x3fb504f3 - (4 << 20), 0x3fc5672a - (5 << 20), 0x3fd744fd - (6 << 20),
                                          0x3feac0c7 - (7 << 20));
  const __m256i k = _mm256_castps_si256((__m256)t);
  const vf s = (vf)_mm256_castsi256_ps(_mm256_add_epi32(_mm256_permutevar8x32_epi32(table, k), _mm256_slli_epi32(k, 20)));
  const vf q = r * (0.69314717f + r * (0.24025782f + r * 0.05551062f));
  return s + s * q;
}
#else
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: whole octaves
constexpr float kExp2Low = -126.0f, kExp2High = 126.0f;

inline vf exp2_split(vf t, vf, vf r) {
  const vf p = 1.0f + r * (0.6931472f + r * (0.240226511f + r * (0.0555034067f + r * (0.00961803993f +
                                                                 r * (0.00133952854f + r * 0.000154653180f)))));
  vi bits;
  memcpy(&bits, &p, sizeof p);
  vi k;
  memcpy(&k, &t, sizeof t);
  bits += k << 23;
  vf out;
  memcpy(&out, &bits, sizeof out);
  return out;
}
#endif

// What rounding a b to `y` left over, where one instruction tells.
inline vf product_remainder([[maybe_unused]] vf a, [[maybe_unused]] vf b, [[maybe_unused]] vf y) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)y);
#elif defined(__AVX2__)
  return (vf)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)y);
#else
  return vf{};
#endif
}

// 2^(a (b + b_low)). kSafe promises that a b is within [-65536, 0] and not NaN (the caller checked a whole chunk at once), and leaves
// b_low out: below 1 the rounding of b is lost with the state that it multiplies, above it grows with it.
template <bool kSafe>
inline vf exp2_product(vf a, vf b, vf b_low = vf{}) {
  const vf magic = splat(kMagic);
#if defined(__AVX512F__)
  if constexpr (kSafe) {
    // Spelled out, since a compiler may share the rounded product of both sums instead.
    const vf t = (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)magic), tn = t - magic;
    return exp2_split(t, tn, (vf)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)tn));
  }
#endif
  const vf y = a * b;
  vf c = at_least(y, splat(kSafe ? kExp2Low : (kExp2Low < -200.0f ? -200.0f : kExp2Low)));
  if constexpr (!kSafe) c = at_most(c, splat(kExp2High > 200.0f ? 200.0f : kExp2High));
  const vf t = c + magic, tn = t - magic;
  vf r = c - tn;
  if constexpr (!kSafe) {
    const vf more = a * b_low + product_remainder(a, b, y);
    r += select(more - more == 0.0f, more, vf{});
  }
  vf p = exp2_split(t, tn, r);
  if constexpr (!kSafe) {  // zero and infinity where the clamp stopped short of them
    p = select(y > 128.0f, splat(INFINITY), p);
    p = select(y < -149.0f, splat(0.0f), p);
  }
  return p;
}
template <bool>
inline vd exp2_product(vd a, vd b, vd b_low = vd{}) {
  const vd more = a * b_low;
  vd y = a * b + select(more - more == 0.0, more, vd{});
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_exp2(y[i]);
  return y;
}

// What rounding a log2(e) to `a2` left over; 0 where that is not finite.
template <class T>
inline Vec<T> log2e_remainder(Vec<T> a, Vec<T> a2) {
  Vec<T> low;
  for (int i = 0; i < kLanes<T>; ++i) low[i] = T(double(a[i]) * 1.4426950408889634 - double(a2[i]));
  return select(low - low == T(0), low, Vec<T>{});
}

// e^x for any x, or any that is not positive; NaN and infinities included.
template <bool kPositive = true>
inline vf exp(vf x) {
  // scalef gives 0 and infinity by itself; elsewhere the clamp stops at the last normal numbers and a select does it.
  constexpr bool kWide = kExp2High > 200.0f;
  vf c = at_least(x, splat(kWide ? -138.0f : -87.3f));
  if constexpr (kPositive) c = at_most(c, splat(kWide ? 138.0f : 87.3f));
  const vf t = c * kLog2e + kMagic, tn = t - kMagic;
  const vf r = (c * kLog2e - tn) + c * kLog2eLow;
  const vf p = exp2_split(t, tn, r);
  if (kWide) return p;
  const vf low = select(x < -103.98f, splat(0.0f), p);
  return kPositive ? select(x > 88.73f, splat(INFINITY), low) : low;
}
template <bool kPositive = true>
inline vd exp(vd x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

inline vf minus_magnitude(vf x) {
  vi bits;
  memcpy(&bits, &x, sizeof x);
  bits |= INT32_MIN;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline vd minus_magnitude(vd x) { return x < 0 ? x : -x; }

// log(1 + e) for 0 <= e <= 1, to 1.6e-7 of itself: e is added last, so that nothing is lost where it is small.
inline vf log1p_unit(vf e) {
  const vf e2 = e * e;
  // Neighbours first: a third of the latency of one sum after the other.
  const vf low = (-0.499996483f + e * 0.33321321f) + e2 * (-0.24857159f + e * 0.191536367f);
  const vf high = (-0.137537614f + e * 0.0792040527f) + e2 * (-0.0300654937f + e * 0.00536474958f);
  return e + e2 * (low + e2 * e2 * high);
}
inline vd log1p_unit(vd e) {
  for (int i = 0; i < kLanes<double>; ++i) e[i] = __builtin_log1p(e[i]);
  return e;
}

// 1 / x for 1 <= x <= 2.
inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf guess = (vf)_mm512_rcp14_ps((__m512)x);  // and Newton's step, since a division blocks its port for many cycles
  return guess + guess * (1 - x * guess);
#else
  return 1 / x;
#endif
}
inline vd reciprocal(vd x) { return 1 / x; }

// All by e^-|x|, which cannot overflow. Infinities and NaN come out as in torch; the derivative of softplus is the sigmoid.
template <class V>
inline V sigmoid(V x, V e) {
  const V r = reciprocal(1 + e);
  return select(x < 0, e * r, r);
}
// Softplus is the identity above 20, as in torch: there float has nothing left to add.
inline vf softplus(vf x, vf e) { return at_least(x, vf{}) + log1p_unit(e); }
inline vd softplus(vd x, vd e) { return select(x > 20, x, at_least(x, vd{}) + log1p_unit(e)); }
template <class V>
inline V sigmoid(V x) {
  return sigmoid(x, exp<false>(minus_magnitude(x)));
}
template <class V>
inline V silu(V x) {
  return x * sigmoid(x);
}
template <class V>
inline V softplus(V x) {
  return softplus(x, exp<false>(minus_magnitude(x)));
}
template <class V>
inline V softplus(V x, V* derivative) {
  const V e = exp<false>(minus_magnitude(x));
  *derivative = sigmoid(x, e);  // in float it is 1 above 20 by itself
  if constexpr (sizeof(x[0]) == 8) *derivative = select(x > 20, V{} + 1, *derivative);
  return softplus(x, e);
}

// ---- transposes and sums across lanes, by log2(lanes) rounds of interleaving ------------------------------------------
#if defined(__AVX512F__)
inline vf zip_low(vf a, vf b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline vf zip_high(vf a, vf b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline vd zip_low(vd a, vd b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline vd zip_high(vd a, vd b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#elif defined(__AVX2__)
inline vf zip_low(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline vf zip_high(vf a, vf b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
inline vd zip_low(vd a, vd b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline vd zip_high(vd a, vd b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#else
inline vf zip_low(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline vf zip_high(vf a, vf b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
inline vd zip_low(vd a, vd b) { return __builtin_shufflevector(a, b, 0, 2); }
inline vd zip_high(vd a, vd b) { return __builtin_shufflevector(a, b, 1, 3); }
#endif

// v[i][j] -> v[j][i], kLanes x kLanes.
template <class T>
inline void transpose(Vec<T>* v) {
  constexpr int W = kLanes<T>;
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    Vec<T> next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = zip_low(v[i], v[i + W / 2]);
      next[2 * i + 1] = zip_high(v[i], v[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = next[i];
  }
}

// The numbers 0 .. kCount - 1 as a pack. (std::index_sequence would be a shared template.)
template <int... kLane>
struct Lanes {};
template <int kCount, int... kLane>
struct CountLanes : CountLanes<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct CountLanes<0, kLane...> {
  using type = Lanes<kLane...>;
};

// Half of the sums across lanes of two vectors: lane j gets a[j] + a[j ^ kBit], or of b where j has that bit.
template <int kBit, class V, int... kLane>
inline V fold(V a, V b, Lanes<kLane...>) {
  constexpr int W = sizeof...(kLane);
  return __builtin_shufflevector(a, b, (kLane & kBit ? kLane + W : kLane)...) +
         __builtin_shufflevector(a, b, (kLane & kBit ? (kLane ^ kBit) + W : kLane ^ kBit)...);
}

// Sums of kCount (a power of two) vectors across their lanes, in a fixed order. v[i] of the result has at lane j part of the sum of
// vector i * kValues + j % kValues, where kValues = min(kCount, lanes); the parts are the lanes of equal j % kValues.
template <class T, int kCount, int kBit = 1>
inline void fold_lanes(Vec<T>* v) {
  if constexpr (kCount > 1 && kBit < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; ++i) v[i] = fold<kBit>(v[2 * i], v[2 * i + 1], typename CountLanes<kLanes<T>>::type{});
    fold_lanes<T, kCount / 2, 2 * kBit>(v);
  }
}

// The sum over the lanes of equal j % kCount, in each of them; kCount is a power of two.
template <class T, int kCount>
inline Vec<T> sum_groups(Vec<T> v) {
  if constexpr (kCount < kLanes<T>) return sum_groups<T, 2 * kCount>(fold<kCount>(v, v, typename CountLanes<kLanes<T>>::type{}));
  else return v;
}

// Lane i of the result is the sum over the lanes of v[i].
template <class T>
inline Vec<T> sum_lanes(Vec<T>* v) {
  fold_lanes<T, kLanes<T>>(v);
  return v[0];
}

}  // namespace
}  // namespace pixelbytes
