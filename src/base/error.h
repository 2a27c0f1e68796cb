// Errors. The library throws one type, whose message names the file or parameter path, what was expected and
// what was found. It never prints, aborts or exits.
#pragma once

#include <fmt/format.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace latente {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws Error with a formatted message: fail("{}: expected {} bytes, found {}", path, want, have).
template <class... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

[[noreturn]] void assertion_failed(const char* condition, const char* file, int line);

}  // namespace latente

// For our own mistakes only; input from users is checked with fail(). Kept in Release.
#define LATENTE_ASSERT(condition) \
  ((condition) ? static_cast<void>(0) : ::latente::assertion_failed(#condition, __FILE__, __LINE__))
