// Loops over a tile's registers: unrolled, they hold sums in registers that would else be indexed in memory.
#pragma once

#if defined(__clang__)
#define LATENTE_UNROLL _Pragma("clang loop unroll(full)")
#define LATENTE_UNROLL_4 _Pragma("clang loop unroll_count(4)")
#define LATENTE_KEEP_ROLLED _Pragma("clang loop unroll(disable)")
#else
#define LATENTE_UNROLL _Pragma("GCC unroll 16")
#define LATENTE_UNROLL_4 _Pragma("GCC unroll 4")
#define LATENTE_KEEP_ROLLED _Pragma("GCC unroll 1")
#endif
