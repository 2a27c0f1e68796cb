// What the fuzz targets share.
#pragma once

#include <cstdlib>

// A broken promise is a finding.
inline void require(bool condition) {
  if (!condition) std::abort();
}
