#include "base/error.h"

#include <cstdio>

namespace latente {

void assertion_failed(const char* condition, const char* file, int line) {
  throw std::logic_error(fmt::format("{}:{}: broken assumption: {}", file, line, condition));
}

}  // namespace latente
