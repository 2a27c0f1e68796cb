// What these cores can do at best: the yardstick for "share of peak".
#pragma once

#include "base/threads.h"

namespace latente {

// Floating-point operations a second of all threads of the pool in float32 fused multiply-adds on registers:
// the best of several short runs (about 50 ms in all).
double measure_peak_flops(ThreadPool& pool);

// Bytes a second that all threads together read from memory, in one run of some 0.2 s; the best of a few.
double measure_read_bandwidth(ThreadPool& pool);

// The same as measure_peak_flops for products of bytes, as weights of 8 bits are multiplied.
double measure_peak_of_bytes(ThreadPool& pool);

}  // namespace latente
