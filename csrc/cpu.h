// What this CPU can do, and which kernel table that allows.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace hob {

std::vector<std::string> cpu_features();
// Of "portable", "avx2", "avx512", "amx", slowest first: what was built and what the CPU and the system support.
std::vector<std::string> available_isas();
// Throws std::invalid_argument naming what is available.
const Kernels* kernels_for(const std::string& isa);

}  // namespace hob
