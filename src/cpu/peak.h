// What these cores can do at best: the yardstick for "share of peak".
#pragma once

#include "base/threads.h"

namespace latente {

// Floating-point operations a second of all threads of the pool in float32 fused multiply-adds on registers:
// the best of several short runs (about 50 ms in all).
double measure_peak_flops(ThreadPool& pool);

}  // namespace latente
