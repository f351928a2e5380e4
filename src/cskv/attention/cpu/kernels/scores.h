// Products of queries and the keys of a tile of sealed tokens: [m][tile], before they are scaled.
#pragma once
#include "plan.h"

namespace {

template <class E>
struct Scores {
  const Plan<E>& plan;
  typename Plan<E>::Own& own;
  Prefetch& prefetch;  // of the next tile
  const Call& call = plan.call;

  // Read the latents of a tile's keys. Absorbed queries meet them at once, while they are in the nearest cache.
  void read(Reader<E>& keys, int64_t sequence, int64_t start, int64_t count) {
    const int64_t tile = plan.tile, m = plan.m, row = call.groups * plan.k_width;
    if (call.rebuilds) {
      keys.read(start, count, tile, own.k_rows);
      return;
    }
    lay_across(sequence);
    for (int64_t at = 0; at < tile; at += REBUILT_TILE) {
      const int64_t left = count - at < 0 ? 0 : count - at, some = left < REBUILT_TILE ? left : REBUILT_TILE;
      keys.read(start + at, some, REBUILT_TILE, own.k_rows);
      for (int64_t group = 0; group < call.groups; group++) {
        const E* across = own.across + group * m * plan.k_width;
        float* products = own.channels + (group * tile + at) * m;
        product(own.k_rows + group * plan.k_width, row, across, m, products, m, REBUILT_TILE, m, plan.k_width, false);
      }
    }
  }

  // Compute the scores of a group with the tile that was read.
  void compute(int64_t sequence, int64_t group) {
    const int64_t block = sequence * call.groups + group, row = call.groups * plan.k_width;
    if (call.rebuilds) {
      by_latent(own.k_rows + group * plan.k_width, row, plan.k_width, plan.tile, own.tile);
      rebuild(block, group);
    } else {
      absorbed(sequence, group);
    }
    if (call.constant) {
      const float* offsets = plan.offsets + block * plan.rows * plan.angles;
      product(offsets, plan.angles, own.angles, plan.tile, own.scores, plan.tile, plan.rows, plan.tile, plan.angles, true);
    }
  }

  // Tiles of the processor have 16 rows; dot products need no padding.
  int64_t rows_of_product() const {
#if defined(__AMX_BF16__)
    if (sizeof(E) == 2) return plan.m;
#endif
    return plan.rows;
  }

  // Name the memory of cos and sin of `count` tokens.
  void announce(int64_t sequence, int64_t start, int64_t count) const {
    if (!call.rebuilds && !call.constant) return;
    prefetch.add(call.cos + sequence * call.cos_batch + start * call.cos_row, count * call.cos_row);
    prefetch.add(call.sin + sequence * call.sin_batch + start * call.sin_row, count * call.sin_row);
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
        if (call.kind == cskv::BFLOAT16 && rotated % (2 * W) == 0 && count == tile) {
          transposed_pairs(in, rows[which], rotated, out);
        } else {
          for (int64_t t = 0; t < count; t++) convert(own.angle_rows + t * width, in + t * rows[which], call.kind, rotated);
          for (int64_t t = count; t < tile; t++) zero(own.angle_rows + t * width, rotated * 4);
          transposed(own.angle_rows, width, rotated, out);
        }
        const VF rest = broadcast(which ? 0.0f : 1.0f);
        for (float* p = out + rotated * tile; p < out + n * tile; p += W) store(p, rest);
      }
    }
  }

 private:
  // Lay out a sequence's absorbed queries as second operands: there are more latents of a token to transpose than scores.
  void lay_across(int64_t sequence) {
    if (own.sequence == sequence) return;
    own.sequence = sequence;
    const int64_t size = plan.m * plan.k_width;
    for (int64_t group = 0; group < call.groups; group++) {
      const E* of_group = plan.absorbed + (sequence * call.groups + group) * size;
      by_latent(of_group, plan.k_width, plan.k_width, plan.m, own.across + group * size);
    }
  }

  // Take the products with absorbed queries, which are by token.
  void absorbed(int64_t sequence, int64_t group) {
    const int64_t tile = plan.tile, m = plan.m;
    transposed(own.channels + group * tile * m, m, m, own.scores);
    for (int64_t line = 0; line < plan.rows && call.k_factors.bias; line++) {
      const float x = plan.of_bias[(sequence * call.groups + group) * m + line];
      float* p = own.scores + line * tile;
      for (int64_t t = 0; t < tile; t += W) store(p + t, load(p + t) + x);
    }
  }

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

  // The same of rows of 16-bit numbers, two channels a word.
  INLINE void transposed_pairs(const char* rows, int64_t row_bytes, int64_t channels, float* out) {
    const int64_t tile = plan.tile;
    alignas(64) uint32_t words[W * W];
    for (int64_t c = 0; c < channels; c += 2 * W) {
      for (int64_t t = 0; t < tile; t += W) {
        const char* in = rows + t * row_bytes + 2 * c;
        transpose_words(reinterpret_cast<const uint32_t*>(in), row_bytes / 4, words, W);
        for (int i = 0; i < W; i++) {
          const VU both = *reinterpret_cast<const VU1*>(words + i * W);
          store(out + (c + 2 * i) * tile + t, (VF)(both << 16));
          store(out + (c + 2 * i + 1) * tile + t, (VF)(both & 0xffff0000u));
        }
      }
    }
  }

  // Rebuild the keys of a tile, 16 pairs of channels of a head at a time, and meet the queries with them.
  __attribute__((noinline)) void rebuild(int64_t block, int64_t group) {
    const int64_t tile = plan.tile, n = plan.pairs.count, lines = padded(plan.head_rows, 16);
    if (call.norm) zero(own.squares, plan.heads * tile * 4);
    for (int64_t head = 0; head < plan.heads; head++) {
      const E* query = plan.by_pairs + (block * plan.heads + head) * lines * 2 * n;
      float *scores = own.scores + head * plan.head_rows * tile, *padded_scores = own.channels + 2 * PAIRS * tile;
      if (sizeof(E) == 4) zero(scores, plan.head_rows * tile * 4);
      for (int64_t begin = 0; begin < n; begin += PAIRS) {
        prefetch.step();
        const E* up = plan.rows_of_up(group * plan.heads + head, begin);
        product(up, plan.k_width, own.tile, tile, own.channels, tile, 2 * PAIRS, tile, plan.k_width, false);
        adjust(group * plan.heads + head, begin, own.squares + head * tile);
        if constexpr (sizeof(E) == 2) {
          turn(begin);
        } else {
          meet_all(query + begin, begin, scores);
        }
      }
      if constexpr (sizeof(E) == 2) {
        product(query, 2 * n, own.turned, tile, padded_scores, tile, lines, tile, 2 * n, false);
        std::memcpy(scores, padded_scores, plan.head_rows * tile * 4);
      }
    }
    if (call.norm) normalise();
  }

  // Rotate the channels of 16 pairs; the two of a pair lie side by side then, for a product of 16-bit numbers.
  INLINE void turn(int64_t begin) {
    const int64_t tile = plan.tile, n = plan.pairs.count;
    const float *cos1 = own.angles + begin * tile, *sin1 = cos1 + n * tile;
    const float *cos2 = call.is_symmetric ? cos1 : cos1 + 2 * n * tile, *sin2 = call.is_symmetric ? sin1 : sin1 + 2 * n * tile;
    bf16* out = reinterpret_cast<bf16*>(own.turned) + 2 * begin * tile;
    for (int64_t at = 0; at < PAIRS * tile; at += W) {
      const VF a = load(own.channels + at), b = load(own.channels + PAIRS * tile + at);
      store_pairs(out + 2 * at, a * load(cos1 + at) - b * load(sin1 + at), b * load(cos2 + at) + a * load(sin2 + at));
    }
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
