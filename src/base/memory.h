// How much memory there is, and how much this process has used.
#pragma once

#include <cstdint>
#include <string>

namespace latente {

// Bytes that can be allocated now without swapping, the cgroup's limit considered.
int64_t available_memory();
// Bytes of its own that this process holds now: mapped files are not counted.
int64_t resident_memory();

// "1.5 GiB"
std::string bytes_text(double bytes);

}  // namespace latente
