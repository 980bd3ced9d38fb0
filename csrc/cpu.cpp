// The questions of cpu.h. __builtin_cpu_supports also asks whether the system saves the registers.
#include "cpu.h"

#include <algorithm>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hob {
namespace {

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const auto& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

// AMX with 8-bit and bfloat16 tiles: the CPU's word (leaf 7: __builtin_cpu_supports does not know it in GCC 12), and the system's leave,
// which Linux gives to a process that asks; threads made later have it too.
bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // amx_bf16, amx_tile, amx_int8
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const std::pair<const char*, bool> known[] = {
      {"avx2", __builtin_cpu_supports("avx2")},
      {"fma", __builtin_cpu_supports("fma")},
      {"f16c", __builtin_cpu_supports("f16c")},
      {"avx512f", __builtin_cpu_supports("avx512f")},
      {"avx512bw", __builtin_cpu_supports("avx512bw")},
      {"avx512vl", __builtin_cpu_supports("avx512vl")},
      {"avx512dq", __builtin_cpu_supports("avx512dq")},
      {"avx512vnni", __builtin_cpu_supports("avx512vnni")},
      {"avx512bf16", __builtin_cpu_supports("avx512bf16")},
  };
  for (const auto& [name, is_there] : known)
    if (is_there) found.emplace_back(name);
  if (may_use_amx()) found.emplace_back("amx");
#elif defined(__aarch64__)
  found.emplace_back("neon");
#endif
  return found;
}

std::vector<std::string> available_isas() {
  const auto features = cpu_features();
  const auto has = [&](std::initializer_list<const char*> names) {
    return std::all_of(names.begin(), names.end(), [&](const char* name) {
      return std::find(features.begin(), features.end(), name) != features.end();
    });
  };
  std::vector<std::string> isas = {"portable"};
  if (avx2_kernels() && has({"avx2", "fma", "f16c"})) isas.emplace_back("avx2");
  if (avx512_kernels() && has({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"}))
    isas.emplace_back("avx512");
  if (amx_kernels() && isas.back() == "avx512" && has({"avx512bf16", "amx"})) isas.emplace_back("amx");
  return isas;
}

const Kernels* kernels_for(const std::string& isa) {
  const auto isas = available_isas();
  if (std::find(isas.begin(), isas.end(), isa) == isas.end())
    throw std::invalid_argument("isa '" + isa + "' is not available here. Available: " + joined(isas));
  if (isa == "amx") return amx_kernels();
  if (isa == "avx512") return avx512_kernels();
  if (isa == "avx2") return avx2_kernels();
  return portable_kernels();
}

}  // namespace hob
