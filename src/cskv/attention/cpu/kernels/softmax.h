// From scores to weights: scale, cap, mask, and an online softmax over the tiles of a range of tokens.
#pragma once
#include "plan.h"

namespace {

using cskv::Call;

// Turn one row's scores of a head into logits: `count` of them, of tokens from `token` on in the order of the view.
INLINE void to_logits(const Call& call, float* scores, int64_t count, int64_t sequence, int64_t q_head, int64_t added,
                      int64_t token) {
  for (int64_t t = 0; t < count; t++) scores[t] *= float(call.scaling);
  if (call.softcap != 0) {
    const float cap = float(call.softcap);
    for (int64_t t = 0; t < count; t++) scores[t] = cap * __builtin_tanhf(scores[t] / cap);
  }
  if (!call.mask) return;
  const char* mask = call.mask + sequence * call.mask_batch + q_head * call.mask_head + added * call.mask_query;
  mask += token * call.mask_token;
  for (int64_t t = 0; t < count; t++, mask += call.mask_token) {
    if (call.mask_kind == cskv::BOOL) {
      if (!*mask) scores[t] = -__builtin_inff();
    } else {
      scores[t] += number(mask, call.mask_kind);
    }
  }
}

// Turn logits, padded to whole vectors, into weights exp(logit - most), where `most` is at least `before`; 0 behind
// `count`. Return their sum.
template <class E>
__attribute__((noinline)) float to_weights(float* logits, int64_t count, int64_t size, float before, float& most_logit, E* weights) {
  for (int64_t t = count; t < size; t++) logits[t] = -__builtin_inff();
  VF found = broadcast(before);
  for (int64_t t = 0; t < size; t += W) found = largest(found, load(logits + t));
  const float top = most(found);
  most_logit = top;
  VF total{};
  for (int64_t t = 0; t < size; t += W) {
    const VF weight = exponential(load(logits + t) - top);
    total += weight;
    store(weights + t, weight);
  }
  return sum(total);
}

}  // namespace
