// How much memory there is, and how much this process has used.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace latente {

// Bytes that can be allocated now without swapping, the cgroup's limit considered.
int64_t available_memory();
// Bytes of its own that this process holds now: mapped files are not counted.
int64_t resident_memory();

// "1.5 GiB"
std::string bytes_text(double bytes);
// A size as people write it: "512M" and "1.5GiB" count in powers of 1024, "24GB" in powers of 1000 (as GNU's
// tools do), "4096" bytes. Error, which names `what`, for anything else, and beyond what an int64_t holds.
int64_t parse_bytes(std::string_view what, std::string_view text);

}  // namespace latente
