#include <cmath>

#include "base/threads.h"
#include "cpu/cpu_backend.h"

namespace latente {
namespace {

template <class T>
int32_t most_likely_of(const T* logits, int64_t count) {
  int64_t best = 0;
  bool numbers = true;
  for (int64_t i = 0; i < count; ++i) {
    numbers = numbers && logits[i] == logits[i];
    if (logits[i] > logits[best]) best = i;
  }
  if (!numbers) return Backend::not_a_number;
  return std::isinf(logits[best]) ? Backend::not_finite : static_cast<int32_t>(best);
}

}  // namespace

void CpuBackend::most_likely(View logits, View out) {
  LATENTE_ASSERT(logits.shape.rank() == 2 && out.count() == logits[0] && out.contiguous());
  pool_.parallel_for(logits[0], 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      int32_t& found = out.as<int32_t>()[t];
      if (logits.dtype == DType::f64) {
        found = most_likely_of(logits.as<double>() + t * logits.stride(0), logits[1]);
      } else {
        found = most_likely_of(logits.as<float>() + t * logits.stride(0), logits[1]);
      }
    }
  });
}

}  // namespace latente
