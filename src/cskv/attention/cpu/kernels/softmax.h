// From scores to weights: scale, cap, mask, and an online softmax over the tiles of a range of tokens.
#pragma once
#include "plan.h"

namespace {

using cskv::Call;

// Whether a score becomes a logit by scaling alone, which `to_weights` does on the way.
INLINE bool only_scales(const Call& call) { return call.softcap == 0 && !call.mask && call.scaling > 0; }

// Turn one row's scores of a head into logits: `count` of them, of tokens from `token` on in the order of the view.
// Nothing where they are only scaled. Return what is left to scale them by.
INLINE float to_logits(const Call& call, float* scores, int64_t count, int64_t sequence, int64_t q_head, int64_t added,
                      int64_t token) {
  if (only_scales(call)) return float(call.scaling);
  for (int64_t t = 0; t < count; t++) scores[t] *= float(call.scaling);
  if (call.softcap != 0) {
    const float cap = float(call.softcap);
    for (int64_t t = 0; t < count; t++) scores[t] = cap * __builtin_tanhf(scores[t] / cap);
  }
  if (!call.mask) return 1;
  const char* mask = call.mask + sequence * call.mask_batch + q_head * call.mask_head + added * call.mask_query;
  mask += token * call.mask_token;
  for (int64_t t = 0; t < count; t++, mask += call.mask_token) {
    if (call.mask_kind == cskv::BOOL) {
      if (!*mask) scores[t] = -__builtin_inff();
    } else {
      scores[t] += number(mask, call.mask_kind);
    }
  }
  return 1;
}

// Turn logits, padded to whole vectors, into weights exp(scaling * logit - most), where `most` is at least `before`; 0
// behind `count`. Return their sum.
template <class E>
__attribute__((noinline)) float to_weights(float* logits, float scaling, int64_t count, int64_t size, float before,
                                           float& most_logit, E* weights) {
  for (int64_t t = count; t < size; t++) logits[t] = -__builtin_inff();
  VF found = broadcast(-__builtin_inff());
  for (int64_t t = 0; t < size; t += W) found = largest(found, load(logits + t));
  const float own = most(found) * scaling, top = own > before ? own : before;
  most_logit = top;
  VF total{};
  for (int64_t t = 0; t < size; t += W) {
    const VF weight = exponential(load(logits + t) * scaling - top);
    total += weight;
    store(weights + t, weight);
  }
  return sum(total);
}

}  // namespace
