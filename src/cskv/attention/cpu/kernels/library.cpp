// What Python calls: the levels of instructions that were built and that this processor has, and attention by one.
#include "call.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cskv {

using Function = int64_t (*)(const Call&, int, char*, int64_t);

using Project = void (*)(const void*, int);

#define DECLARE(level)                                   \
  int64_t level(const Call&, int, char*, int64_t);       \
  void project_##level(const void*, int);
#define LACK(level)                           \
  constexpr Function level = nullptr;         \
  constexpr Project project_##level = nullptr;

DECLARE(baseline)
#if defined(BUILT_AVX2)
DECLARE(avx2)
#else
LACK(avx2)
#endif
#if defined(BUILT_AVX512)
DECLARE(avx512)
#else
LACK(avx512)
#endif
#if defined(BUILT_AVX512_BF16)
DECLARE(avx512_bf16)
#else
LACK(avx512_bf16)
#endif
#if defined(BUILT_AMX)
DECLARE(amx)
#else
LACK(amx)
#endif

constexpr Function FUNCTIONS[] = {baseline, avx2, avx512, avx512_bf16, amx};
constexpr Project PROJECTIONS[] = {project_baseline, project_avx2, project_avx512, project_avx512_bf16, project_amx};
constexpr int LEVELS = 5;

// Linux gives a process tiles when it asks for them.
static bool has_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned tile = 1u << 24, in_bf16 = 1u << 22;
  if ((d & tile) == 0 || (d & in_bf16) == 0) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

static bool has(int level) {
  if (level == 0) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq")) {
    return false;
  }
  if (level == 2) return true;
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  return level == 3 || has_tiles();
#else
  return false;
#endif
}

}  // namespace cskv

extern "C" {

// Bit i is set where level i was built and the processor has it; bit 16 + i where it was built.
int cskv_levels() {
  int found = 0;
  for (int level = 0; level < cskv::LEVELS; level++) {
    if (!cskv::FUNCTIONS[level]) continue;
    found |= 1 << (16 + level);
    if (cskv::has(level)) found |= 1 << level;
  }
  return found;
}

// Attend, and return 0; or return the bytes of scratch memory that it takes, where `size` are too few.
int64_t cskv_attend(int level, const cskv::Call* call, int threads, char* scratch, int64_t size) {
  return cskv::FUNCTIONS[level](*call, threads, scratch, size);
}

// Compute the latents of a few tokens; `call` is a Projection of project.h.
void cskv_project(int level, const void* call, int threads) { cskv::PROJECTIONS[level](call, threads); }

// The bytes of a call: Python compares them with what it writes.
int cskv_call_bytes() { return int(sizeof(cskv::Call)); }

int cskv_threaded() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}
}
