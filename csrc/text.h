// Messages with numbers in them: text("needs ", n, " bytes").
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace hob {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Becomes ValueError in Python.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw std::invalid_argument(text(parts...));
}

}  // namespace hob
