// Chooses, once at import, the kernels of the best instruction set that this CPU runs.
#include "kernels.h"

namespace clustops::cpu {

#define CLUSTOPS_DECLARE(isa) \
  namespace isa {             \
  extern const Kernels table; \
  }
CLUSTOPS_DECLARE(baseline)
#if defined(__x86_64__)
CLUSTOPS_DECLARE(avx2)
CLUSTOPS_DECLARE(avx512)
#endif

namespace {

struct Candidate {
  const char* name;
  const Kernels* table;
  bool runs;
};

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = [] {
    std::vector<Candidate> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    found.push_back({"avx512", &avx512::table,
                     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")});
    found.push_back({"avx2", &avx2::table, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("f16c")});
    found.push_back({"sse2", &baseline::table, true});
#else
    found.push_back({"neon", &baseline::table, true});
#endif
    return found;
  }();
  return all;
}

const Candidate*& chosen() {
  static const Candidate* candidate = [] {
    const Candidate* best = candidates().data();
    while (!best->runs) ++best;
    return best;
  }();
  return candidate;
}

}  // namespace

const Kernels& kernels() { return *chosen()->table; }

std::string instruction_set() { return chosen()->name; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) {
    if (candidate.runs) names.push_back(candidate.name);
  }
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const Candidate& candidate : candidates()) {
    if (candidate.runs && name == candidate.name) {
      chosen() = &candidate;
      return;
    }
  }
  throw std::invalid_argument("instruction set must be one of instruction_sets(), got " + name);
}

}  // namespace clustops::cpu
