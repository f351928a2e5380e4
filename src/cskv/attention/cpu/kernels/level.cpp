// Attention for one level of instructions. This file is compiled once for each, with LEVEL the name of its function, and
// all that it includes is local to it: no function of one level is ever called by another.
#include "attend.h"
#include "project.h"

#define JOINED(a, b) a##b
#define NAMED(a, b) JOINED(a, b)

namespace cskv {

int64_t LEVEL(const Call& call, int threads, char* scratch, int64_t size) { return run_any(call, threads, scratch, size); }

void NAMED(project_, LEVEL)(const void* call, int threads) { project_all(*static_cast<const Projection*>(call), threads); }

}  // namespace cskv
