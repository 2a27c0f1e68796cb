// Without a device nothing can be compared: every test is skipped.
#include <gtest/gtest.h>

#include <cstdio>

#include "cuda/stream.h"

namespace {

class NeedsDevice : public testing::Environment {
  void SetUp() override {
    if (latente::cuda::device_count() > 0) return;
    std::puts("[  SKIPPED ] no CUDA device");  // ctest looks for this; GoogleTest says nothing of its own
    GTEST_SKIP();
  }
};

[[maybe_unused]] const auto* const environment = testing::AddGlobalTestEnvironment(new NeedsDevice);

}  // namespace
