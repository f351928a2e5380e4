// Products of small matrices in the core's cache: c[m][n] (+)= sum over k of a[m][k] b[k][n], sums in fp32.
//
// Of 16-bit numbers, b has pairs along k side by side: b[k / 2][n][2], as dot products and tiles of the processor want
// them. m is any number for dot products and a multiple of 16 for tiles; n is a multiple of 16, k of 2 (tiles: 32).
#pragma once
#include "vectors.h"

namespace {

// M rows by N vectors of c, in registers.
template <int M, int N, class E>
INLINE void block(const E* a, int64_t a_row, const E* b, int64_t b_row, float* c, int64_t c_row, int64_t k, bool add) {
  VF sums[M][N];
  for (int i = 0; i < M; i++) {
    for (int j = 0; j < N; j++) sums[i][j] = add ? load(c + i * c_row + j * W) : VF{};
  }
  if constexpr (sizeof(E) == 4) {
    for (int64_t step = 0; step < k; step++) {
      VF own[N];
      for (int j = 0; j < N; j++) own[j] = load(b + step * b_row + j * W);
      for (int i = 0; i < M; i++) {
        const VF x = broadcast(a[i * a_row + step]);
        for (int j = 0; j < N; j++) sums[i][j] += x * own[j];
      }
    }
  } else {
#if defined(__AVX512BF16__)
    for (int64_t step = 0; step < k; step += 2) {
      __m512bh own[N];
      for (int j = 0; j < N; j++) own[j] = (__m512bh)_mm512_loadu_si512(b + step * b_row + j * 2 * W);
      for (int i = 0; i < M; i++) {
        int32_t pair;
        std::memcpy(&pair, a + i * a_row + step, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        for (int j = 0; j < N; j++) sums[i][j] = (VF)_mm512_dpbf16_ps((__m512)sums[i][j], x, own[j]);
      }
    }
#endif
  }
  for (int i = 0; i < M; i++) {
    for (int j = 0; j < N; j++) store(c + i * c_row + j * W, sums[i][j]);
  }
}

#if defined(__AVX512F__)
constexpr int ROWS = 8, COLUMNS = 2;  // 16 of 32 registers are sums
#else
constexpr int ROWS = 4, COLUMNS = 2;
#endif

template <int N, class E>
INLINE void columns(const E* a, int64_t a_row, const E* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t k,
                    bool add) {
  int64_t i = 0;
  for (; i + ROWS <= m; i += ROWS) block<ROWS, N>(a + i * a_row, a_row, b, b_row, c + i * c_row, c_row, k, add);
  if constexpr (ROWS > 4) {
    if (i + 4 <= m) block<4, N>(a + i * a_row, a_row, b, b_row, c + i * c_row, c_row, k, add), i += 4;
  }
  for (; i < m; i++) block<1, N>(a + i * a_row, a_row, b, b_row, c + i * c_row, c_row, k, add);
}

#if defined(__AMX_BF16__)

// A tile is 16 rows of 64 bytes; sums of up to 2 x 2 tiles stay in registers 0 to 3.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Where the tiles of an operand are: bytes from row to row of a tile, numbers from tile to tile along k and across.
struct Operand {
  const bf16* first;
  int64_t row, along, across;
};

template <int M, int N>
INLINE void tiles(Operand a, Operand b, float* c, int64_t c_row, int64_t k, bool add) {
  if (add) {
    _tile_loadd(0, c, c_row * 4);
    if (N == 2) _tile_loadd(1, c + 16, c_row * 4);
    if (M == 2) _tile_loadd(2, c + 16 * c_row, c_row * 4);
    if (M == 2 && N == 2) _tile_loadd(3, c + 16 * c_row + 16, c_row * 4);
  } else {
    _tile_zero(0);
    if (N == 2) _tile_zero(1);
    if (M == 2) _tile_zero(2);
    if (M == 2 && N == 2) _tile_zero(3);
  }
  const bf16 *own_a = a.first, *own_b = b.first;
  for (int64_t step = 0; step < k; step += 32, own_a += a.along, own_b += b.along) {
    _tile_loadd(4, own_a, a.row);
    _tile_loadd(6, own_b, b.row);
    _tile_dpbf16ps(0, 4, 6);
    if (N == 2) {
      _tile_loadd(7, own_b + b.across, b.row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (M == 2) {
      _tile_loadd(5, own_a + a.across, a.row);
      _tile_dpbf16ps(2, 5, 6);
      if (N == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_row * 4);
  if (N == 2) _tile_stored(1, c + 16, c_row * 4);
  if (M == 2) _tile_stored(2, c + 16 * c_row, c_row * 4);
  if (M == 2 && N == 2) _tile_stored(3, c + 16 * c_row + 16, c_row * 4);
}

#endif

// Multiply. Rows of a are a_row apart, those of c c_row; b has n numbers a row, in pairs of rows for 16 bits.
template <class E>
__attribute__((noinline)) void product(const E* a, int64_t a_row, const E* b, int64_t b_row, float* c, int64_t c_row, int64_t m,
                                       int64_t n, int64_t k, bool add) {
#if defined(__AMX_BF16__)
  if constexpr (sizeof(E) == 2) {
    for (int64_t j = 0; j < n; j += 32) {
      const Operand own_b{b + 2 * j, b_row * 4, 32 * b_row, 32};
      for (int64_t i = 0; i < m; i += 32) {
        const Operand own_a{a + i * a_row, a_row * 2, 32, 16 * a_row};
        float* own = c + i * c_row + j;
        if (i + 32 <= m && j + 32 <= n) {
          tiles<2, 2>(own_a, own_b, own, c_row, k, add);
        } else if (i + 32 <= m) {
          tiles<2, 1>(own_a, own_b, own, c_row, k, add);
        } else if (j + 32 <= n) {
          tiles<1, 2>(own_a, own_b, own, c_row, k, add);
        } else {
          tiles<1, 1>(own_a, own_b, own, c_row, k, add);
        }
      }
    }
    return;
  }
#endif
  constexpr int pairs = sizeof(E) == 2 ? 2 : 1;
  int64_t j = 0;
  for (; j + COLUMNS * W <= n; j += COLUMNS * W) columns<COLUMNS>(a, a_row, b + pairs * j, b_row, c + j, c_row, m, k, add);
  for (; j < n; j += W) columns<1>(a, a_row, b + pairs * j, b_row, c + j, c_row, m, k, add);
}

}  // namespace
