// Chooses, once at import, the kernels of the best instruction set that this CPU runs.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace clustops::cpu {

#define CLUSTOPS_DECLARE(isa) \
  namespace isa {             \
  extern const Kernels table; \
  }
CLUSTOPS_DECLARE(baseline)
#if defined(__x86_64__)
CLUSTOPS_DECLARE(avx2)
CLUSTOPS_DECLARE(avx512)
CLUSTOPS_DECLARE(amx)
#endif

namespace {

struct Candidate {
  const char* name;
  const Kernels* table;
  bool runs;
};

#if defined(__x86_64__)
// Whether the CPU has tiles for bf16, and the system lets this process use them: it must be asked.
bool may_use_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (d & kBf16) && (d & kTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = [] {
    std::vector<Candidate> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    found.push_back({"amx", &amx::table, has_avx512 && __builtin_cpu_supports("avx512bf16") && may_use_amx()});
    found.push_back({"avx512", &avx512::table, has_avx512});
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
