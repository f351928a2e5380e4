// The latents of a few new tokens: rows of the down-projection times the layer's input, sums in fp32.
#pragma once
#include "latents.h"

namespace {

struct Projection {
  int64_t kind, tokens, hidden, rank;
  const char *x, *down, *bias;  // bias: 0 for none
  int64_t x_row, down_row;      // bytes
  char* out;                    // of the same kind, packed together
};

INLINE VF load_any(const char* p, int64_t i, int64_t kind) {
  return kind == cskv::FLOAT32 ? load(reinterpret_cast<const float*>(p) + i) : load(reinterpret_cast<const bf16*>(p) + i);
}

void project_row(const Projection& call, int64_t token, int64_t row) {
  const char *x = call.x + token * call.x_row, *down = call.down + row * call.down_row;
  const int64_t size = call.kind == cskv::FLOAT32 ? 4 : 2;
  VF sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= call.hidden; i += 4 * W) {
    for (int j = 0; j < 4; j++) sums[j] += load_any(x, i + j * W, call.kind) * load_any(down, i + j * W, call.kind);
  }
  float total = sum(sums[0] + sums[1] + sums[2] + sums[3]);
  for (; i < call.hidden; i++) total += number(x + i * size, call.kind) * number(down + i * size, call.kind);
  if (call.bias) total += number(call.bias + row * size, call.kind);
  char* out = call.out + (token * call.rank + row) * size;
  if (call.kind == cskv::FLOAT32) {
    std::memcpy(out, &total, 4);
  } else {
    const bf16 rounded = narrowed(total);
    std::memcpy(out, &rounded, 2);
  }
}

INLINE void project_all(const Projection& call, int threads) {
  const int64_t rows = call.tokens * call.rank;
  if (rows * call.hidden < 1 << 17) threads = 1;  // it takes less time than waking others
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) if (threads > 1)
#endif
  for (int64_t i = 0; i < rows; i++) project_row(call, i / call.rank, i % call.rank);
}

}  // namespace
