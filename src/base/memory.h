// How much memory there is, and how much this process has used.
#pragma once

#include <cstdint>
#include <string>

namespace latente {

// Bytes that can be allocated now without swapping, the cgroup's limit considered.
int64_t available_memory();
// The most bytes of its own (mapped files not counted) this process has held so far, and holds now.
int64_t peak_resident_memory();
int64_t resident_memory();

// "1.5 GiB"
std::string bytes_text(double bytes);

}  // namespace latente
