// Sizes of a call, its memory, and what is made once for all of its tokens: queries in the layouts that products want.
#pragma once
#include "latents.h"
#include "products.h"

namespace {

constexpr float LEAST = -3.402823466e38f;  // a row's largest logit, where all are hidden, as in torch's path
constexpr int PAIRS = 16;                  // of channels that RoPE mixes, rebuilt together
// Tokens of a tile. Where keys are rebuilt, it, a head's angles and 32 rows of U_k share the nearest cache; else so many
// tokens are read at a time.
constexpr int REBUILT_TILE = 32, MOST_TILE = 128;

// The two channels of a head that a rotation mixes, of every pair; channels that are not rotated are paired as well.
struct Pairs {
  int64_t count, rotated, half, rest, head_dim;
  Pairs(const Call& call) {
    head_dim = call.head_dim, rotated = call.rotary / 2, half = rotated, rest = (head_dim - call.rotary + 1) / 2;
    count = padded(rotated + rest, PAIRS);
  }
  int64_t first(int64_t pair) const {
    if (pair < rotated) return pair;
    return pair < rotated + rest ? pair + half : -1;
  }
  int64_t second(int64_t pair) const {
    if (pair < rotated) return pair + half;
    const int64_t channel = pair + half + rest;
    return pair < rotated + rest && channel < head_dim ? channel : -1;
  }
};

template <class E>
struct Plan {
  const Call& call;
  Pairs pairs;
  int threads;
  int64_t rows, head_rows, m, heads;  // query rows of a head group and of a kv head; the former padded; kv heads of a group
  int64_t k_rank, v_rank, k_width, v_width, tile, splits, tasks, angles;
  // What all threads share, by sequence and group: queries, and partial results.
  E* absorbed;       // [m][k_width]
  float* of_bias;    // [m]: the query's product with the bias of keys, where nothing is rebuilt
  E* by_pairs;       // the query by pairs of channels, where keys are rebuilt: see `lay_out_query`
  float* offsets;    // [rows][angles]: what the angles are multiplied by
  E* up;             // U_k by pairs, where keys are rebuilt: of 16 pairs, 16 first channels, then 16 second ones
  float *most_logit, *total, *sums;  // by split and group: [m], [m], [m][v_width]

  // What a thread has to itself.
  struct Own {
    E *k_rows, *values, *tile, *weights, *turned, *across;
    int64_t sequence = -1;  // whose absorbed queries `across` has
    float *scores, *channels, *angles, *angle_rows, *squares, *exact;
    Codes k_codes, v_codes;
  };
  Own* owns;

  Plan(const Call& c, int n, Memory& memory) : call(c), pairs(c), threads(n) {
    heads = c.kv_heads / c.groups, head_rows = c.q_heads / c.kv_heads * c.added, rows = heads * head_rows;
    m = padded(rows, 16);
    k_rank = c.k.rank / c.groups, v_rank = c.v.rank / c.groups;
    k_width = padded(k_rank, LANES), v_width = padded(v_rank, LANES);
    tile = c.rebuilds ? REBUILT_TILE : sizeof(E) == 2 ? 2 * MOST_TILE : MOST_TILE;
    while (tile > 32 && tile / 2 >= c.sealed) tile /= 2;
    splits = n == 1 ? 1 : (n * 2 + c.batch - 1) / c.batch;
    const int64_t worth = (c.sealed + 255) / 256;
    splits = splits > worth ? (worth > 0 ? worth : 1) : splits;
    tasks = c.batch * splits;
    angles = pairs.count * (c.is_symmetric ? 2 : 4);
    const int64_t blocks = c.batch * c.groups;
    if (c.sealed) {
      absorbed = memory.take<E>(c.rebuilds ? 0 : blocks * m * k_width);
      of_bias = memory.take<float>(c.rebuilds ? 0 : blocks * m);
      by_pairs = memory.take<E>(c.rebuilds ? blocks * heads * padded(head_rows, 16) * 2 * pairs.count : 0);
      offsets = memory.take<float>(c.constant ? blocks * rows * angles : 0);
      up = memory.take<E>(c.rebuilds ? c.kv_heads * 2 * pairs.count * k_width : 0);
      most_logit = memory.take<float>(tasks * c.groups * m), total = memory.take<float>(tasks * c.groups * m);
      sums = memory.take<float>(tasks * c.groups * m * v_width);
    }
    static thread_local Own kept[256];
    owns = kept;
    const bool turns = c.rebuilds || c.constant;
    const int64_t width = k_width > v_width ? k_width : v_width;
    for (int i = 0; i < n; i++) {
      Own& own = kept[i];
      own.k_rows = memory.take<E>(REBUILT_TILE * c.groups * k_width + SLACK), own.values = memory.take<E>(tile * c.groups * v_width + SLACK);
      own.sequence = -1;
      own.tile = memory.take<E>(tile * c.groups * width + SLACK);
      own.turned = memory.take<E>(c.rebuilds ? 2 * pairs.count * tile : 0);
      own.across = memory.take<E>(c.rebuilds ? 0 : c.groups * m * k_width);
      own.weights = memory.take<E>(m * tile), own.scores = memory.take<float>(m * tile);
      // Rebuilt channels and scores of a head; or scores of all groups, by token.
      own.channels = memory.take<float>(c.rebuilds ? (2 * PAIRS + padded(head_rows, 16)) * tile : c.groups * m * tile);
      own.angles = memory.take<float>(turns ? angles * tile : 0);
      own.angle_rows = memory.take<float>(turns ? tile * padded(c.rotary, W) : 0);
      own.squares = memory.take<float>(heads * tile);
      own.k_codes = Codes::taken(memory, c.k.rank), own.v_codes = Codes::taken(memory, c.v.rank);
      own.exact = memory.take<float>(head_rows * (c.recent + c.head_dim + v_width + 64) + c.head_dim + 4 * width + 64);
    }
  }

  // The number of a query row in its head: the query's head and new token.
  const char* query_row(int64_t sequence, int64_t head, int64_t row) const {
    const int64_t q_head = head * (call.q_heads / call.kv_heads) + row / call.added;
    return call.query + sequence * call.query_batch + q_head * call.query_head + row % call.added * call.query_token;
  }

  // Prepare the queries of one kv head of one sequence.
  __attribute__((noinline)) void prepare(int64_t sequence, int64_t head, Own& own) const {
    const int64_t group = head / heads, in_group = head % heads, block = sequence * call.groups + group;
    if (call.rebuilds && sequence == 0) lay_out(head);
    const int64_t hd = padded(call.head_dim, 16);
    float *queries = own.exact, *lines_of_four = queries + hd * head_rows;
    for (int64_t row = 0; row < head_rows; row++) {
      float* q = queries + row * hd;
      convert(q, query_row(sequence, head, row), call.kind, call.head_dim);
      if (call.rebuilds) lay_out_query(q, block * heads + in_group, row);
      if (call.constant) offset(q, head, offsets + (block * rows + in_group * head_rows + row) * angles);
    }
    for (int64_t row = 0; row < head_rows && !call.rebuilds;) {
      const float* q = queries + row * hd;
      const int64_t some = head_rows - row >= 4 ? 4 : 1, first = block * m + in_group * head_rows + row;
      if (some == 4) {
        absorb<4>(q, hd, head, lines_of_four);
      } else {
        absorb<1>(q, hd, head, lines_of_four);
      }
      for (int64_t r = 0; r < some; r++, row++) {
        convert(absorbed + (first + r) * k_width, reinterpret_cast<const char*>(lines_of_four + r * k_width), cskv::FLOAT32, k_width);
        of_bias[first + r] = with_bias(q + r * hd, head);
      }
    }
    if (call.rebuilds) {
      const int64_t lines = padded(head_rows, 16), width = 2 * pairs.count;
      zero(by_pairs + ((block * heads + in_group) * lines + head_rows) * width, (lines - head_rows) * width * sizeof(E));
    } else if (in_group == 0) {
      zero(absorbed + (block * m + rows) * k_width, (m - rows) * k_width * sizeof(E));
    }
  }

  // By pairs of channels: 16-bit numbers as [rows][pairs][2], fp32 as [rows][2][pairs].
  void lay_out_query(const float* q, int64_t head, int64_t row) const {
    E* out = by_pairs + (head * padded(head_rows, 16) + row) * 2 * pairs.count;
    for (int64_t p = 0; p < pairs.count; p++) {
      const float first = pairs.first(p) < 0 ? 0 : q[pairs.first(p)], second = pairs.second(p) < 0 ? 0 : q[pairs.second(p)];
      if constexpr (sizeof(E) == 2) {
        out[2 * p] = narrowed(first), out[2 * p + 1] = narrowed(second);
      } else {
        out[p] = first, out[pairs.count + p] = second;
      }
    }
  }

  // U_k^T q of the rows of one head, some at a time.
  template <int R>
  INLINE void absorb(const float* q, int64_t q_row, int64_t head, float* out) const {
    const int64_t size = call.kind == cskv::FLOAT32 ? 4 : 2;
    const char* up = call.k_factors.up + head * call.head_dim * call.k_factors.row;
    int64_t i = 0;
    for (; i + 4 * W <= k_rank && call.kind != cskv::FLOAT16; i += 4 * W) absorb_some<R, 4>(q, q_row, up, i, out);
    for (; i + W <= k_rank && call.kind != cskv::FLOAT16; i += W) absorb_some<R, 1>(q, q_row, up, i, out);
    for (; i < k_rank; i++) {
      for (int r = 0; r < R; r++) {
        float sum = 0;
        for (int64_t c = 0; c < call.head_dim; c++) sum += q[r * q_row + c] * number(up + c * call.k_factors.row + i * size, call.kind);
        out[r * k_width + i] = sum;
      }
    }
    for (int r = 0; r < R; r++) zero(out + r * k_width + k_rank, (k_width - k_rank) * 4);
  }

  template <int R, int N>
  INLINE void absorb_some(const float* q, int64_t q_row, const char* up, int64_t first, float* out) const {
    const int64_t size = call.kind == cskv::FLOAT32 ? 4 : 2;
    VF sums[R][N] = {};
    const char* in = up + first * size;
    for (int64_t c = 0; c < call.head_dim; c++, in += call.k_factors.row) {
      for (int j = 0; j < N; j++) {
        const VF y = size == 4 ? load(reinterpret_cast<const float*>(in) + j * W) : load(reinterpret_cast<const bf16*>(in) + j * W);
        for (int r = 0; r < R; r++) sums[r][j] += q[r * q_row + c] * y;
      }
    }
    for (int r = 0; r < R; r++) {
      for (int j = 0; j < N; j++) store(out + r * k_width + first + j * W, sums[r][j]);
    }
  }

  float with_bias(const float* q, int64_t head) const {
    float out = 0;
    for (int64_t c = 0; c < call.head_dim && call.k_factors.bias; c++) out += q[c] * parameter(call.k_factors.bias, head, c);
    return out;
  }

  // A channel's number of a bias or a norm, which are of the call's kind.
  float parameter(const char* of, int64_t head, int64_t channel) const {
    return number(of + (head * call.head_dim + channel) * (call.kind == cskv::FLOAT32 ? 4 : 2), call.kind);
  }

  // q . R_t b is linear in cos and sin: what they are multiplied by.
  void offset(const float* q, int64_t head, float* out) const {
    const float* b = reinterpret_cast<const float*>(call.constant) + head * call.head_dim;
    const int64_t n = pairs.count;
    for (int64_t p = 0; p < n; p++) {
      const int64_t i = pairs.first(p), j = pairs.second(p);
      const float q1 = i < 0 ? 0 : q[i], q2 = j < 0 ? 0 : q[j], b1 = i < 0 ? 0 : b[i], b2 = j < 0 ? 0 : b[j];
      out[p] = q1 * b1, out[n + p] = -q1 * b2;
      if (call.is_symmetric) {
        out[p] += q2 * b2, out[n + p] += q2 * b1;
      } else {
        out[2 * n + p] = q2 * b2, out[3 * n + p] = q2 * b1;
      }
    }
  }

  // Where the 32 rows of U_k of 16 pairs of a head are laid out; the same pairs of all heads follow one another.
  E* rows_of_up(int64_t head, int64_t begin) const {
    return up + ((head / heads * pairs.count + begin) * heads + head % heads * PAIRS) * 2 * k_width;
  }

  // Lay out the rows of U_k of one head by pairs.
  void lay_out(int64_t head) const {
    for (int64_t begin = 0; begin < pairs.count; begin += PAIRS) {
      E* out = rows_of_up(head, begin);
      for (int64_t row = 0; row < 2 * PAIRS; row++, out += k_width) {
        const int64_t pair = begin + row % PAIRS, channel = row < PAIRS ? pairs.first(pair) : pairs.second(pair);
        if (channel < 0) {
          zero(out, k_width * sizeof(E));
          continue;
        }
        convert(out, call.k_factors.up + (head * call.head_dim + channel) * call.k_factors.row, call.kind, k_rank);
        zero(out + k_rank, (k_width - k_rank) * sizeof(E));
      }
    }
  }
};

}  // namespace
