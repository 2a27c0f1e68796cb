// Products of a warpgroup on Hopper's tensor cores (sm_90a): d [64, N] (+)= a [64, 16] · b [16, N] in
// bfloat16 with float32 sums, N twice the registers of d. a comes from registers or shared memory, b from
// shared memory; there both are K-major, or with a's rows (a_columns = 1) or b's columns (columns = 1)
// contiguous. PTX ISA, "wgmma.mma_async".
#pragma once

#include <cstdint>

namespace latente::cuda {

// The registers of d: as operands, and by their numbers in the instruction.
#define LATENTE_SUMS_8(i)                                                                     \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LATENTE_SUMS_16(i) LATENTE_SUMS_8(i), LATENTE_SUMS_8(i + 8)
#define LATENTE_SUMS_32(i) LATENTE_SUMS_16(i), LATENTE_SUMS_16(i + 16)
#define LATENTE_SUMS_48(i) LATENTE_SUMS_32(i), LATENTE_SUMS_16(i + 32)
#define LATENTE_SUMS_64(i) LATENTE_SUMS_32(i), LATENTE_SUMS_32(i + 32)
#define LATENTE_SUMS_96(i) LATENTE_SUMS_64(i), LATENTE_SUMS_32(i + 64)
#define LATENTE_SUMS_128(i) LATENTE_SUMS_64(i), LATENTE_SUMS_64(i + 64)
#define LATENTE_NUMBERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LATENTE_NUMBERS_32 \
  LATENTE_NUMBERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LATENTE_NUMBERS_48 \
  LATENTE_NUMBERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define LATENTE_NUMBERS_64 \
  LATENTE_NUMBERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LATENTE_NUMBERS_96                                                           \
  LATENTE_NUMBERS_64                                                                 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define LATENTE_NUMBERS_128                                                                      \
  LATENTE_NUMBERS_96                                                                             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// r0 to r6: the numbers that follow those of d.
#define LATENTE_WGMMA(columns_of_b, registers, r0, r1, r2, r3, r4, r5, r6)                                  \
  template <int columns, int a_columns = 0>                                                                 \
  __device__ inline void wgmma(float(&d)[registers], uint64_t a, uint64_t b, int add) {                     \
    asm volatile(                                                                                           \
        "{\n.reg .pred p;\n"                                                                                \
        "setp.ne.b32 p, %" #r2                                                                              \
        ", 0;\n"                                                                                            \
        "wgmma.mma_async.sync.aligned.m64n" #columns_of_b "k16.f32.bf16.bf16 {" LATENTE_NUMBERS_##registers \
        "}, %" #r0 ", %" #r1 ", p, 1, 1, %" #r4 ", %" #r3 ";\n}\n"                                          \
        : LATENTE_SUMS_##registers(0)                                                                       \
        : "l"(a), "l"(b), "r"(add), "n"(columns), "n"(a_columns));                                          \
  }                                                                                                         \
  template <int columns>                                                                                    \
  __device__ inline void wgmma(float(&d)[registers], const uint32_t(&a)[4], uint64_t b, int add) {          \
    asm volatile(                                                                                           \
        "{\n.reg .pred p;\n"                                                                                \
        "setp.ne.b32 p, %" #r5                                                                              \
        ", 0;\n"                                                                                            \
        "wgmma.mma_async.sync.aligned.m64n" #columns_of_b "k16.f32.bf16.bf16 {" LATENTE_NUMBERS_##registers \
        "}, {%" #r0 ", %" #r1 ", %" #r2 ", %" #r3 "}, %" #r4 ", p, 1, 1, %" #r6 ";\n}\n"                    \
        : LATENTE_SUMS_##registers(0)                                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(columns));                      \
  }
LATENTE_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
LATENTE_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
LATENTE_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
LATENTE_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
LATENTE_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
LATENTE_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

// d [64, N] (+)= a [64, 32] · b [32, N] in e4m3, both K-major in shared memory.
#define LATENTE_WGMMA_E4M3(columns_of_b, registers, r0, r1, r2)                                             \
  __device__ inline void wgmma_e4m3(float(&d)[registers], uint64_t a, uint64_t b, int add) {                \
    asm volatile(                                                                                           \
        "{\n.reg .pred p;\n"                                                                                \
        "setp.ne.b32 p, %" #r2                                                                              \
        ", 0;\n"                                                                                            \
        "wgmma.mma_async.sync.aligned.m64n" #columns_of_b "k32.f32.e4m3.e4m3 {" LATENTE_NUMBERS_##registers \
        "}, %" #r0 ", %" #r1 ", p, 1, 1;\n}\n"                                                              \
        : LATENTE_SUMS_##registers(0)                                                                       \
        : "l"(a), "l"(b), "r"(add));                                                                        \
  }
LATENTE_WGMMA_E4M3(64, 32, 32, 33, 34)
LATENTE_WGMMA_E4M3(96, 48, 48, 49, 50)
LATENTE_WGMMA_E4M3(128, 64, 64, 65, 66)

#undef LATENTE_WGMMA_E4M3
#undef LATENTE_WGMMA
#undef LATENTE_NUMBERS_128
#undef LATENTE_NUMBERS_96
#undef LATENTE_NUMBERS_64
#undef LATENTE_NUMBERS_48
#undef LATENTE_NUMBERS_32
#undef LATENTE_NUMBERS_16
#undef LATENTE_SUMS_128
#undef LATENTE_SUMS_96
#undef LATENTE_SUMS_64
#undef LATENTE_SUMS_48
#undef LATENTE_SUMS_32
#undef LATENTE_SUMS_16
#undef LATENTE_SUMS_8

}  // namespace latente::cuda
