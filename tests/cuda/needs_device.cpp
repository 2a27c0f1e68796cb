// Without a device nothing can be compared: every test is skipped.
#include <gtest/gtest.h>

#include "cuda/stream.h"

namespace {

class NeedsDevice : public testing::Environment {
  void SetUp() override {
    if (latente::cuda::device_count() == 0) GTEST_SKIP() << "no CUDA device";
  }
};

[[maybe_unused]] const auto* const environment = testing::AddGlobalTestEnvironment(new NeedsDevice);

}  // namespace
