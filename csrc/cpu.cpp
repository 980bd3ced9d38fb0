// The questions of cpu.h. __builtin_cpu_supports also asks whether the system saves the registers.
#include "cpu.h"

#include <algorithm>
#include <stdexcept>

namespace hob {
namespace {

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const auto& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
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
  return isas;
}

const Kernels* kernels_for(const std::string& isa) {
  const auto isas = available_isas();
  if (std::find(isas.begin(), isas.end(), isa) == isas.end())
    throw std::invalid_argument("isa '" + isa + "' is not available here. Available: " + joined(isas));
  if (isa == "avx512") return avx512_kernels();
  if (isa == "avx2") return avx2_kernels();
  return portable_kernels();
}

}  // namespace hob
