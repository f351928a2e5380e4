// Attention of one call by all its threads, in three stages:
//
//   queries    absorb U_k, or are laid out by the pairs of channels that RoPE mixes
//   ranges     of sealed tokens, by sequence and head group: an online softmax, tile by tile, and sums of value latents
//   outputs    by sequence and kv head: ranges joined, U_v once, and the exact branch
#pragma once
#include "scores.h"
#include "softmax.h"
#if defined(_OPENMP)
#include <omp.h>
#endif
#include <sched.h>

namespace {

template <class E>
struct Attention {
  using Own = typename Plan<E>::Own;
  const Plan<E>& plan;
  const Call& call = plan.call;

  int64_t length(int64_t sequence) const {
    if (!call.lengths) return call.sealed;
    const int64_t own = whole_number(call.lengths + sequence * call.lengths_bytes, call.lengths_bytes);
    return own < call.sealed ? own : call.sealed;
  }

  // Attend to one range of a sequence's sealed tokens in all head groups.
  void range(int64_t task, Own& own) const {
    const int64_t split = task % plan.splits, sequence = task / plan.splits, tile = plan.tile, lines = call.groups * plan.m;
    for (int64_t i = task * lines; i < (task + 1) * lines; i++) plan.most_logit[i] = LEAST, plan.total[i] = 0;
    zero(plan.sums + task * lines * plan.v_width, lines * plan.v_width * 4);
    zero(own.weights + plan.rows * tile, (plan.m - plan.rows) * tile * sizeof(E));
    const int64_t held = length(sequence), tiles = (held + tile - 1) / tile;
    const int64_t end = tiles * (split + 1) / plan.splits * tile, stop = end < held ? end : held;
    Reader<E> keys{call, call.k, sequence, plan.k_rank, plan.k_width, own.k_codes};
    Reader<E> values{call, call.v, sequence, plan.v_rank, plan.v_width, own.v_codes};
    Prefetch prefetch;
    Scores<E> scores{plan, own, prefetch};
    for (int64_t start = tiles * split / plan.splits * tile; start < stop; start += tile) {
      const int64_t count = stop - start < tile ? stop - start : tile;
      scores.read(keys, sequence, start, count);
      values.read_by_token(start, count, tile, own.values, own.tile);
      scores.take_angles(sequence, start, count);
      prefetch = Prefetch{};
      if (const int64_t next = start + count; next < stop) {
        const int64_t more = stop - next < tile ? stop - next : tile;
        keys.announce(next, more, prefetch), values.announce(next, more, prefetch);
        scores.announce(sequence, next, more);
      }
      prefetch.divide(call.rebuilds ? call.kv_heads * plan.pairs.count / PAIRS : call.groups * plan.rows);
      for (int64_t group = 0; group < call.groups; group++) {
        scores.compute(sequence, group);
        sum_up(task * call.groups + group, sequence, group, start, count, own, scores.rows_of_product(), prefetch);
      }
    }
  }

  // Weigh the values of a tile by a group's scores.
  void sum_up(int64_t block, int64_t sequence, int64_t group, int64_t start, int64_t count, Own& own, int64_t m,
              Prefetch& prefetch) const {
    const int64_t tile = plan.tile, width = plan.v_width, row_of_values = call.groups * width;
    float *most_logit = plan.most_logit + block * plan.m, *total = plan.total + block * plan.m;
    float* sums = plan.sums + block * plan.m * width;
    for (int64_t row = 0; row < plan.rows; row++) {
      if (!call.rebuilds) prefetch.step();
      float* logits = own.scores + row * tile;
      const int64_t q_head = (group * plan.rows + row) / call.added;
      const float scaling = to_logits(call, logits, count, sequence, q_head, row % call.added, start);
      const float before = most_logit[row];
      const float of_tile = to_weights(logits, scaling, count, tile, before, most_logit[row], own.weights + row * tile);
      if (most_logit[row] != before) {
        const float factor = __builtin_expf(before - most_logit[row]);
        total[row] *= factor, scale(sums + row * width, width, factor);
      }
      total[row] += of_tile;
    }
    const E* values = own.values + group * width * (sizeof(E) == 2 ? tile : 1);
    product(own.weights, tile, values, sizeof(E) == 2 ? width : row_of_values, sums, width, m, width, tile, true);
  }

  // Join the ranges of one kv head's query rows with its exact tokens.
  __attribute__((noinline)) void output(int64_t sequence, int64_t head, Own& own) const {
    const int64_t recent = padded(call.recent, W), hd = padded(call.head_dim, W), size = call.kind == cskv::FLOAT32 ? 4 : 2;
    float *line = own.exact, *q = line + hd, *logits = q + hd * plan.head_rows;
    float* means = logits + recent * plan.head_rows;
    const int64_t rows = plan.head_rows, width = plan.v_width, per_head = call.q_heads / call.kv_heads;
    for (int64_t row = 0; row < rows; row++) {
      zero(q + row * hd, hd * 4);
      convert(q + row * hd, plan.query_row(sequence, head, row), call.kind, call.head_dim);
    }
    for (int64_t t = 0; t < call.recent; t++) {
      const char* key = call.keys + sequence * call.keys_batch + head * call.keys_head + t * call.keys_token;
      zero(line, hd * 4);
      convert(line, key, call.kind, call.head_dim);
      for (int64_t row = 0; row < rows; row++) {
        VF products{};
        for (int64_t c = 0; c < hd; c += W) products += load(q + row * hd + c) * load(line + c);
        logits[row * recent + t] = sum(products);
      }
    }
    float most_logit[128], total[128], of_values[128];
    for (int64_t row = 0; row < rows; row++) {
      const int64_t added = row % call.added, q_head = head * per_head + row / call.added;
      float* own_logits = logits + row * recent;
      const float scaling = to_logits(call, own_logits, call.recent, sequence, q_head, added, call.sealed);
      const int64_t read_until = call.mask ? call.recent : call.recent - call.added + added + 1;
      for (int64_t t = read_until; t < call.recent; t++) own_logits[t] = -__builtin_inff();
      if (call.exists) {
        for (int64_t t = 0; t < call.recent; t++) {
          if (!call.exists[sequence * call.exists_batch + t]) own_logits[t] = -__builtin_inff();
        }
      }
      total[row] = to_weights(own_logits, scaling, call.recent, recent, LEAST, most_logit[row], own_logits);
      join(sequence, head, row, most_logit[row], total[row], of_values[row], own_logits, recent, means + row * width);
      if (call.sink_logits) {
        const float sink = reinterpret_cast<const float*>(call.sink_logits)[q_head];
        const float top = sink > most_logit[row] ? sink : most_logit[row], factor = __builtin_expf(most_logit[row] - top);
        total[row] = total[row] * factor + __builtin_expf(sink - top);
        scale(own_logits, recent, factor), scale(means + row * width, width, factor), of_values[row] *= factor;
      }
    }
    // The query is done with: its memory takes the outputs.
    zero(q, rows * hd * 4);
    if (call.sealed) expand(head, q, hd, means, of_values, means + rows * width);
    for (int64_t t = 0; t < call.recent; t++) {
      const char* value = call.values + sequence * call.values_batch + head * call.values_head + t * call.values_token;
      convert(line, value, call.kind, call.head_dim);
      for (int64_t row = 0; row < rows; row++) {
        const float weight = logits[row * recent + t];
        if (weight == 0) continue;
        for (int64_t c = 0; c < hd; c += W) store(q + row * hd + c, load(q + row * hd + c) + weight * load(line + c));
      }
    }
    for (int64_t row = 0; row < rows; row++) {
      scale(q + row * hd, hd, 1.0f / (total[row] > 1 ? total[row] : 1));
      const int64_t q_head = head * per_head + row / call.added;
      char* to = call.output + (((sequence * call.q_heads + q_head) * call.added) + row % call.added) * call.head_dim * size;
      write(to, q + row * hd);
    }
  }

  INLINE void scale(float* x, int64_t n, float factor) const {
    for (int64_t i = 0; i < n; i += W) store(x + i, load(x + i) * factor);
  }

  void write(char* to, const float* x) const {
    for (int64_t c = 0; c < call.head_dim; c++) {
      if (call.kind == cskv::FLOAT32) {
        reinterpret_cast<float*>(to)[c] = x[c];
      } else {
        reinterpret_cast<uint16_t*>(to)[c] = call.kind == cskv::BFLOAT16 ? narrowed(x[c]) : narrowed_half(x[c]);
      }
    }
  }

  // Join a row's ranges: their mean latents, and the weight that they have beside those of exact tokens, which are scaled.
  void join(int64_t sequence, int64_t head, int64_t row, float& most_logit, float& total, float& of_values, float* weights,
            int64_t recent, float* means) const {
    of_values = 0;
    if (!call.sealed) return;
    const int64_t width = plan.v_width, group = head / plan.heads, own_row = head % plan.heads * plan.head_rows + row;
    const int64_t first = sequence * plan.splits * call.groups + group;
    float top = most_logit;
    for (int64_t split = 0; split < plan.splits; split++) {
      const float own = plan.most_logit[(first + split * call.groups) * plan.m + own_row];
      top = own > top ? own : top;
    }
    const float factor = __builtin_expf(most_logit - top);
    scale(weights, recent, factor), total *= factor, most_logit = top;
    zero(means, width * 4);
    for (int64_t split = 0; split < plan.splits; split++) {
      const int64_t at = (first + split * call.groups) * plan.m + own_row;
      const float weight = __builtin_expf(plan.most_logit[at] - top);
      of_values += weight * plan.total[at];
      for (int64_t i = 0; i < width; i += W) store(means + i, load(means + i) + weight * load(plan.sums + at * width + i));
    }
    total += of_values;
  }

  // Add U_v times sums of latents, and the bias as often as it was weighed, to the outputs of a head's rows.
  void expand(int64_t head, float* out, int64_t hd, const float* means, const float* of_values, float* line) const {
    const int64_t width = plan.v_width;
    const char* up = call.v_factors.up + head * call.head_dim * call.v_factors.row;
    zero(line, width * 4);
    for (int64_t c = 0; c < call.head_dim; c++, up += call.v_factors.row) {
      convert(line, up, call.kind, plan.v_rank);
      const float added = call.v_factors.bias ? plan.parameter(call.v_factors.bias, head, c) : 0;
      for (int64_t row = 0; row < plan.head_rows; row++) {
        VF products{};
        for (int64_t i = 0; i < width; i += W) products += load(line + i) * load(means + row * width + i);
        out[row * hd + c] = sum(products) + added * of_values[row];
      }
    }
  }
};

// Where all threads of a call wait for the last. Whoever waits long gives its processor to others: they may be what the
// last one waits for.
struct Barrier {
  int waiting = 0, generation = 0;

  void wait(int threads) {
    if (threads == 1) return;
    const int current = __atomic_load_n(&generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&waiting, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&waiting, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&generation, current + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == current; spins++) {
      if (spins > MOST_SPINS) sched_yield();
    }
  }

  static constexpr int MOST_SPINS = 20000;  // some tens of microseconds
};

template <class E>
int64_t run(const Call& call, int threads, char* scratch, int64_t size) {
  Memory measured{nullptr};
  {
    Plan<E> plan(call, threads, measured);
    (void)plan;
  }
  if (measured.used > size) return measured.used;
  Memory memory{scratch};
  const Plan<E> plan(call, threads, memory);
  const Attention<E> attention{plan};
  const int64_t heads = call.batch * call.kv_heads, tasks = plan.tasks;
  int64_t tickets[3] = {0, 0, 0};
  Barrier barrier;
  auto next = [&tickets](int stage) { return __atomic_fetch_add(&tickets[stage], 1, __ATOMIC_RELAXED); };
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
#if defined(_OPENMP)
    auto& own = plan.owns[omp_get_thread_num()];
    const int together = omp_get_num_threads();
#else
    auto& own = plan.owns[0];
    const int together = 1;
#endif
#if defined(__AMX_BF16__)
    alignas(64) char before[64];
    _tile_storeconfig(before);
    const TileConfig config;
    _tile_loadconfig(&config);
#endif
    if (call.sealed) {
      for (int64_t i = next(0); i < heads; i = next(0)) plan.prepare(i / call.kv_heads, i % call.kv_heads, own);
      barrier.wait(together);
      for (int64_t i = next(1); i < tasks; i = next(1)) attention.range(i, own);
      barrier.wait(together);
    }
    for (int64_t i = next(2); i < heads; i = next(2)) attention.output(i / call.kv_heads, i % call.kv_heads, own);
#if defined(__AMX_BF16__)
    if (before[0]) {
      _tile_loadconfig(before);
    } else {
      _tile_release();
    }
#endif
  }
  return 0;
}

INLINE int64_t run_any(const Call& call, int threads, char* scratch, int64_t size) {
#if defined(__AVX512BF16__)
  if (call.kind == cskv::BFLOAT16) return run<bf16>(call, threads, scratch, size);
#endif
  return run<float>(call, threads, scratch, size);
}

}  // namespace
