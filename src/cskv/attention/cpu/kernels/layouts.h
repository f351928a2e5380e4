// Numbers of any kind as those that are computed in, and rows of them in the two layouts of a product's second operand:
//
//   by token    tile[t][r], in pairs of tokens where numbers have 16 bits: [t / 2][r][2]
//   by latent   tile[r][t], in pairs of latents where numbers have 16 bits: [r / 2][t][2]
#pragma once
#include "call.h"
#include "memory.h"

namespace {

constexpr int SLACK = 128;  // numbers behind a row that whole vectors may be read or written over
constexpr int LANES = 32;  // ranks are padded to so many: one step of a product of 16-bit numbers by tiles

template <class E>
INLINE void convert(E* out, const char* in, int64_t kind, int64_t n) {
  if (kind == (sizeof(E) == 4 ? cskv::FLOAT32 : cskv::BFLOAT16)) {
    std::memcpy(out, in, n * sizeof(E));
    return;
  }
  int64_t i = 0;
  if (kind == cskv::FLOAT32) {
    const float* p = reinterpret_cast<const float*>(in);
    for (; i + W <= n; i += W) store(out + i, load(p + i));
  } else if (kind == cskv::BFLOAT16) {
    const bf16* p = reinterpret_cast<const bf16*>(in);
    for (; i + W <= n; i += W) store(out + i, load(p + i));
  }
#if defined(__F16C__) && defined(__AVX512F__)
  else {
    for (; i + W <= n; i += W) store(out + i, (VF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(in + 2 * i))));
  }
#elif defined(__F16C__)
  else {
    for (; i + W <= n; i += W) store(out + i, (VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(in + 2 * i))));
  }
#endif
  for (; i < n; i++) {
    const float x = number(in + i * (kind == cskv::FLOAT32 ? 4 : 2), kind);
    if constexpr (sizeof(E) == 4) {
      out[i] = x;
    } else {
      out[i] = narrowed(x);
    }
  }
}

// Transpose 32-bit words: out[c][t] = in[t][c] of W tokens by W columns.
INLINE void transpose_words(const uint32_t* in, int64_t in_row, uint32_t* out, int64_t out_row) {
  VU x[W];
  for (int t = 0; t < W; t++) x[t] = *reinterpret_cast<const VU1*>(in + t * in_row);
#if defined(__AVX512F__)
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]), b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]), b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), a[4 + i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
    a[8 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88), a[12 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_si512(out + (i + 0) * out_row, _mm512_shuffle_i32x4(a[i], a[8 + i], 0x88));
    _mm512_storeu_si512(out + (i + 8) * out_row, _mm512_shuffle_i32x4(a[i], a[8 + i], 0xdd));
    _mm512_storeu_si512(out + (i + 4) * out_row, _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0x88));
    _mm512_storeu_si512(out + (i + 12) * out_row, _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0xdd));
  }
#else
  for (int c = 0; c < W; c++) {
    for (int t = 0; t < W; t++) out[c * out_row + t] = x[t][c];
  }
#endif
}

// rows[t][width] -> [width (/ 2)][tokens (x 2)]: a pair of 16-bit numbers is a word. Rows are `row` numbers apart.
template <class E>
__attribute__((noinline)) void by_latent(const E* rows, int64_t row, int64_t width, int64_t tokens, E* out) {
  const int64_t words = width * sizeof(E) / 4, step = row * sizeof(E) / 4;
  const uint32_t* in = reinterpret_cast<const uint32_t*>(rows);
  for (int64_t t = 0; t < tokens; t += W) {
    for (int64_t c = 0; c < words; c += W) {
      transpose_words(in + t * step + c, step, reinterpret_cast<uint32_t*>(out) + c * tokens + t, tokens);
    }
  }
}

// rows[t][width] -> [t / 2][width][2] for 16-bit numbers; fp32 rows are what they should be.
[[maybe_unused]] __attribute__((noinline)) void by_token(const bf16* rows, int64_t row, int64_t width, int64_t tokens, bf16* out) {
  for (int64_t t = 0; t < tokens; t += 2) {
    const bf16 *even = rows + t * row, *odd = even + row;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(out + t * width);
    for (int64_t i = 0; i < width; i += W) {
      *reinterpret_cast<VU1*>(pairs + i) = words(even + i) | (words(odd + i) << 16);
    }
  }
}

}  // namespace
