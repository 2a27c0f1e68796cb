// How much memory there is, and how much this process has used.
#pragma once

#include <cstdint>
#include <string>

namespace latente {

// Bytes that can be allocated now without swapping, the cgroup's limit considered.
int64_t available_memory();
// Bytes of its own that this process holds now: mapped files are not counted.
int64_t resident_memory();

// Gives back what this process holds of a mapped file in [data, data + bytes); it is read again when it is
// needed. Not for memory that was written to.
void release_mapped(const void* data, int64_t bytes);

// "1.5 GiB"
std::string bytes_text(double bytes);

}  // namespace latente
