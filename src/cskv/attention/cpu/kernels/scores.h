// Products of queries and the keys of a tile of sealed tokens: [m][tile], before they are scaled.
#pragma once
#include "plan.h"

namespace {

template <class E>
struct Scores {
  const Plan<E>& plan;
  typename Plan<E>::Own& own;
  const Call& call = plan.call;

  // Compute the scores of a group with the tile whose latents lie in `own.tile` by latent.
  void compute(int64_t sequence, int64_t group) {
    const int64_t block = sequence * call.groups + group, tile = plan.tile;
    if (call.rebuilds) {
      rebuild(block, group);
    } else {
      const E* absorbed = plan.absorbed + block * plan.m * plan.k_width;
      product(absorbed, plan.k_width, own.tile, tile, own.scores, tile, rows_of_product(), tile, plan.k_width, false);
      if (call.k_factors.bias) {
        for (int64_t row = 0; row < plan.rows; row++) {
          const float x = plan.of_bias[block * plan.m + row];
          for (int64_t t = 0; t < tile; t += W) store(own.scores + row * tile + t, load(own.scores + row * tile + t) + x);
        }
      }
    }
    if (call.constant) {
      const float* offsets = plan.offsets + block * plan.rows * plan.angles;
      product(offsets, plan.angles, own.angles, tile, own.scores, tile, plan.rows, tile, plan.angles, true);
    }
  }

  // Tiles of the processor have 16 rows; dot products need no padding.
  int64_t rows_of_product() const {
#if defined(__AMX_BF16__)
    if (sizeof(E) == 2) return plan.m;
#endif
    return plan.rows;
  }

  // Take cos and sin of `count` tokens by pair, [pairs][tile] each: of first channels, and behind them of second ones where these differ.
  __attribute__((noinline)) void take_angles(int64_t sequence, int64_t start, int64_t count) {
    if (!call.rebuilds && !call.constant) return;
    const int64_t n = plan.pairs.count, tile = plan.tile;
    const char* parts[2] = {call.cos, call.sin};
    const int64_t batches[2] = {call.cos_batch, call.sin_batch}, rows[2] = {call.cos_row, call.sin_row};
    for (int which = 0; which < 2; which++) {
      const int64_t rotated = plan.pairs.rotated, width = padded(call.rotary, W);
      for (int half = 0; half < (call.is_symmetric ? 1 : 2); half++) {
        float* out = own.angles + (2 * half + which) * n * tile;
        const char* in = parts[which] + sequence * batches[which] + start * rows[which];
        in += half * rotated * (call.kind == cskv::FLOAT32 ? 4 : 2);
        for (int64_t t = 0; t < tile; t++) {
          if (t < count) {
            convert(own.angle_rows + t * width, in + t * rows[which], call.kind, rotated);
          } else {
            zero(own.angle_rows + t * width, rotated * 4);
          }
        }
        transposed(own.angle_rows, width, rotated, out);
        const VF rest = broadcast(which ? 0.0f : 1.0f);
        for (float* p = out + rotated * tile; p < out + n * tile; p += W) store(p, rest);
      }
    }
  }

 private:
  INLINE void transposed(const float* rows, int64_t width, int64_t channels, float* out) {
    const int64_t tile = plan.tile;
    int64_t c = 0;
    for (; c + W <= channels; c += W) {
      for (int64_t t = 0; t < tile; t += W) {
        transpose_words(reinterpret_cast<const uint32_t*>(rows + t * width + c), width,
                        reinterpret_cast<uint32_t*>(out + c * tile + t), tile);
      }
    }
    for (; c < channels; c++) {
      for (int64_t t = 0; t < tile; t++) out[c * tile + t] = rows[t * width + c];
    }
  }

  // Rebuild the keys of a tile, 16 pairs of channels of a head at a time, and meet the queries with them. The same pairs
  // of all heads follow one another: they turn by the same angles, which stay in the core's nearest cache.
  __attribute__((noinline)) void rebuild(int64_t block, int64_t group) {
    const int64_t tile = plan.tile, n = plan.pairs.count;
    zero(own.scores, plan.rows * tile * 4);
    if (call.norm) zero(own.squares, plan.heads * tile * 4);
    for (int64_t begin = 0; begin < n; begin += PAIRS) {
      for (int64_t head = 0; head < plan.heads; head++) {
        const E* up = plan.rows_of_up(group * plan.heads + head, begin);
        product(up, plan.k_width, own.tile, tile, own.channels, tile, 2 * PAIRS, tile, plan.k_width, false);
        adjust(group * plan.heads + head, begin, own.squares + head * tile);
        const float* turned = plan.turned + (block * plan.rows + head * plan.head_rows) * 2 * n + begin;
        meet_all(turned, begin, own.scores + head * plan.head_rows * tile);
      }
    }
    if (call.norm) normalise();
  }

  void meet_all(const float* q, int64_t begin, float* out) {
    const int64_t step = 2 * plan.pairs.count, tile = plan.tile;
    int64_t row = 0;
    for (; row + 8 <= plan.head_rows; row += 8) meet<8>(q + row * step, begin, out + row * tile);
    const int64_t left = plan.head_rows - row;
    if (left & 4) meet<4>(q + row * step, begin, out + row * tile), row += 4;
    if ((left & 3) == 3) meet<3>(q + row * step, begin, out + row * tile);
    if ((left & 3) == 2) meet<2>(q + row * step, begin, out + row * tile);
    if ((left & 3) == 1) meet<1>(q + row * step, begin, out + row * tile);
  }

  // Add the bias to rebuilt channels; sum their squares, and weigh them, for a norm.
  void adjust(int64_t head, int64_t begin, float* squares) {
    const char *bias = call.k_factors.bias, *norm = call.norm;
    if (!bias && !norm) return;
    const int64_t tile = plan.tile;
    for (int row = 0; row < 2 * PAIRS; row++) {
      const int64_t pair = begin + row % PAIRS, channel = row < PAIRS ? plan.pairs.first(pair) : plan.pairs.second(pair);
      if (channel < 0) continue;
      const VF added = broadcast(bias ? plan.parameter(bias, head, channel) : 0);
      const VF weight = broadcast(norm ? plan.parameter(norm, 0, channel) : 1);
      float* p = own.channels + row * tile;
      for (int64_t t = 0; t < tile; t += W) {
        const VF x = load(p + t) + added;
        if (norm) store(squares + t, load(squares + t) + x * x);
        store(p + t, x * weight);
      }
    }
  }

  void normalise() {
    const int64_t tile = plan.tile;
    for (int64_t t = 0; t < plan.heads * tile; t++) {
      own.squares[t] = 1.0f / __builtin_sqrtf(own.squares[t] / float(call.head_dim) + float(call.norm_eps));
    }
    for (int64_t row = 0; row < plan.rows; row++) {
      const float* factor = own.squares + row / plan.head_rows * tile;
      float* p = own.scores + row * tile;
      for (int64_t t = 0; t < tile; t += W) store(p + t, load(p + t) * load(factor + t));
    }
  }

  // Rotate the channels of 16 pairs and add their products with R query rows to the scores.
  template <int R>
  INLINE void meet(const float* q, int64_t begin, float* scores) {
    constexpr int N = W == 16 ? 2 : 1;
    const int64_t tile = plan.tile, n = plan.pairs.count;
    const float *cos1 = own.angles + begin * tile, *sin1 = cos1 + n * tile;
    const float *cos2 = call.is_symmetric ? cos1 : cos1 + 2 * n * tile, *sin2 = call.is_symmetric ? sin1 : sin1 + 2 * n * tile;
    for (int64_t t = 0; t < tile; t += N * W) {
      VF sums[R][N];
      for (int r = 0; r < R; r++) {
        for (int j = 0; j < N; j++) sums[r][j] = load(scores + r * tile + t + j * W);
      }
      for (int p = 0; p < PAIRS; p++) {
        VF first[N], second[N];
        for (int j = 0; j < N; j++) {
          const int64_t at = p * tile + t + j * W;
          const VF a = load(own.channels + at), b = load(own.channels + PAIRS * tile + at);
          first[j] = a * load(cos1 + at) - b * load(sin1 + at);
          second[j] = b * load(cos2 + at) + a * load(sin2 + at);
        }
        for (int r = 0; r < R; r++) {
          const VF x = broadcast(q[r * 2 * n + p]), y = broadcast(q[r * 2 * n + n + p]);
          for (int j = 0; j < N; j++) sums[r][j] += x * first[j] + y * second[j];
        }
      }
      for (int r = 0; r < R; r++) {
        for (int j = 0; j < N; j++) store(scores + r * tile + t + j * W, sums[r][j]);
      }
    }
  }
};

}  // namespace
