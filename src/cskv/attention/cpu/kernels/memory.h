// Memory: what a call divides among its threads, and what is fetched before it is needed.
#pragma once
#include "vectors.h"

namespace {

INLINE void zero(void* p, int64_t bytes) { std::memset(p, 0, bytes); }

// Memory of a call, cut off a block piece by piece; only measured where there is no block.
struct Memory {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* out = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += padded(count * int64_t(sizeof(T)), 64);
    return out;
  }
};

// Fetches memory into the core's cache while something else is computed, a few lines at a time.
struct Prefetch {
  struct Range {
    const char* first;
    int64_t bytes;
  };
  Range ranges[16];
  int count = 0, at = 0;
  int64_t offset = 0, pieces = 1, total = 0;

  void add(const char* first, int64_t bytes) {
    if (bytes <= 0 || count == 16) return;
    ranges[count++] = Range{first, bytes}, total += bytes;
  }

  // Begin anew, to fetch all in so many steps.
  void divide(int64_t steps) { pieces = (total + steps * 64 - 1) / (steps * 64), at = 0, offset = 0; }

  INLINE void step() {
    for (int64_t line = 0; line < pieces && at < count; line++) {
      __builtin_prefetch(ranges[at].first + offset, 0, 2);
      offset += 64;
      if (offset >= ranges[at].bytes) at++, offset = 0;
    }
  }
};

}  // namespace
