// XXH64, a fast non-cryptographic checksum: github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace latente {

uint64_t xxh64(std::span<const std::byte> bytes, uint64_t seed = 0);

}  // namespace latente
