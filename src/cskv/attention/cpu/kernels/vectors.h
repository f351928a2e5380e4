// Vectors of fp32 as wide as the processor has them, by the compilers' own vector types.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float VF __attribute__((vector_size(W * 4)));
typedef int32_t VI __attribute__((vector_size(W * 4)));
typedef uint32_t VU __attribute__((vector_size(W * 4)));
typedef uint16_t VH __attribute__((vector_size(W * 2)));
typedef uint8_t VB __attribute__((vector_size(W)));
typedef float VF1 __attribute__((vector_size(W * 4), aligned(4)));
typedef uint32_t VU1 __attribute__((vector_size(W * 4), aligned(4)));
typedef uint16_t VH1 __attribute__((vector_size(W * 2), aligned(2)));
typedef uint8_t VB1 __attribute__((vector_size(W), aligned(1)));

using bf16 = uint16_t;
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

INLINE VF broadcast(float x) { return VF{} + x; }
INLINE VF load(const float* p) { return *reinterpret_cast<const VF1*>(p); }
INLINE void store(float* p, VF x) { *reinterpret_cast<VF1*>(p) = x; }
INLINE VF largest(VF a, VF b) { return a > b ? a : b; }

INLINE float widened(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// W numbers of 16 or 8 bits in 32. The compiler would take them one by one.
INLINE VU words(const uint16_t* p) {
#if defined(__AVX512F__)
  return (VU)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (VU)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const VH1*>(p), VU);
#endif
}

INLINE VF load(const uint8_t* p) {
#if defined(__AVX512F__)
  const VI wide = (VI)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  const VI wide = (VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  const VI wide = __builtin_convertvector(*reinterpret_cast<const VB1*>(p), VI);
#endif
  return __builtin_convertvector(wide, VF);
}

INLINE VF load(const bf16* p) { return (VF)(words(p) << 16); }

INLINE bf16 narrowed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16((bits >> 16) | 64);  // NaN
  return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void store(bf16* p, VF x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  const VU bits = (VU)x;
  const VU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *reinterpret_cast<VH1*>(p) = __builtin_convertvector(x == x ? rounded : (bits >> 16) | 64, VH);
#endif
}

// Two vectors as pairs of 16-bit numbers: a[i], b[i] in word i.
[[maybe_unused]] INLINE void store_pairs(bf16* p, VF a, VF b) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both));
#else
  for (int i = 0; i < W; i++) p[2 * i] = narrowed(a[i]), p[2 * i + 1] = narrowed(b[i]);
#endif
}

INLINE float widened_half(uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#else
  const uint32_t sign = uint32_t(x & 0x8000) << 16, magnitude = x & 0x7fff;
  uint32_t bits = magnitude >= 0x7c00 ? (magnitude << 13) + 0x70000000 : magnitude << 13;
  float out;
  std::memcpy(&out, &bits, 4);
  if (magnitude < 0x7c00) out *= 5.192296858534828e33f;  // 2**112: subnormal numbers come out right as well
  std::memcpy(&bits, &out, 4);
  bits |= sign;
  std::memcpy(&out, &bits, 4);
  return out;
#endif
}

INLINE uint16_t narrowed_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  float absolute;
  std::memcpy(&absolute, &magnitude, 4);
  if (magnitude < 0x38800000) return sign | uint16_t(absolute * 16777216.0f + 0.5f);
  return sign | uint16_t((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
#endif
}

// One number of any kind, for the few that are read one by one.
INLINE float number(const char* p, int64_t kind) {
  if (kind == 0) {
    float out;
    std::memcpy(&out, p, 4);
    return out;
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return kind == 1 ? widened(bits) : widened_half(bits);
}

// exp of numbers up to 0, and 0 for those below -87; NaN of NaN.
INLINE VF exponential(VF x) {
  const VF low = broadcast(-87.0f);
#if defined(__AVX512F__)
  const VF bounded = (VF)_mm512_max_ps((__m512)low, (__m512)x);  // of NaN, the second
  const VF whole = (VF)_mm512_roundscale_ps((__m512)(bounded * 1.44269504088896341f), 0);
#else
  const VF bounded = x < low ? low : x;
  const VF magic = broadcast(12582912.0f);
  const VF whole = (bounded * 1.44269504088896341f + magic) - magic;
#endif
  const VF rest = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
  VF y = broadcast(1.9875691500e-4f);
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 some = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
  return (VF)_mm512_maskz_scalef_ps(some, (__m512)y, (__m512)whole);
#endif
  const VI exponent = (__builtin_convertvector(whole, VI) + 127) << 23;
  const VF out = y * (VF)exponent;
  return x < low ? VF{} : out;
}

INLINE float sum(VF x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#endif
  float out = 0;
  for (int i = 0; i < W; i++) out += x[i];
  return out;
}

INLINE float most(VF x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#endif
  float out = x[0];
  for (int i = 1; i < W; i++) out = x[i] > out ? x[i] : out;
  return out;
}

INLINE int64_t padded(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace
