#include "base/memory.h"

#include <sys/resource.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>

#include "base/error.h"

namespace latente {
namespace {

// The number behind `key` in a file of "key value" lines, in the file's unit; 0 when there is none.
int64_t value_of(const char* path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    int64_t value = 0;
    if (words >> name >> value && name == key) return value;
  }
  return 0;
}

// A file that holds one number; nothing for "max" and for a file that is not there.
int64_t number_in(const char* path, int64_t otherwise) {
  std::ifstream file(path);
  int64_t value = 0;
  return file >> value ? value : otherwise;
}

}  // namespace

int64_t available_memory() {
  constexpr int64_t unlimited = std::numeric_limits<int64_t>::max();
  int64_t available = value_of("/proc/meminfo", "MemAvailable:") * 1024;
  int64_t limit = number_in("/sys/fs/cgroup/memory.max", unlimited);
  if (limit != unlimited) {
    int64_t used = number_in("/sys/fs/cgroup/memory.current", 0);
    int64_t reclaimable = value_of("/sys/fs/cgroup/memory.stat", "inactive_file");
    available = std::min(available, std::max<int64_t>(limit - used + reclaimable, 0));
  }
  return available;
}

int64_t resident_memory() { return value_of("/proc/self/status", "RssAnon:") * 1024; }

std::string bytes_text(double bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1024 && unit < 4) bytes /= 1024, ++unit;
  return fmt::format("{:.{}f} {}", bytes, unit == 0 ? 0 : 1, units[unit]);
}

int64_t parse_bytes(std::string_view what, std::string_view text) {
  double number = 0;
  const auto [end, error] =
      std::from_chars(text.data(), text.data() + text.size(), number, std::chars_format::fixed);
  std::string unit(text.substr(static_cast<size_t>(end - text.data())));
  unit.erase(0, unit.find_first_not_of(' '));
  std::transform(unit.begin(), unit.end(), unit.begin(), [](unsigned char c) { return std::tolower(c); });
  const size_t power = unit.empty() ? 0 : std::string_view("bkmgtp").find(unit[0]);
  const std::string_view rest = std::string_view(unit).substr(unit.empty() ? 0 : 1);
  const bool known =
      power != std::string_view::npos && (rest.empty() || (power > 0 && (rest == "b" || rest == "ib")));
  const bool begins = !text.empty() && text[0] >= '0' && text[0] <= '9';  // no sign, no "nan"
  if (error != std::errc() || !begins || !known)
    fail("{}: expected a size such as 512M, 1.5GiB or 24GB, found '{}'", what, text);
  const double bytes = number * std::pow(rest == "b" ? 1000.0 : 1024.0, power);
  if (bytes >= 0x1p63) fail("{}: {} is too large", what, text);
  return std::llround(bytes);
}

}  // namespace latente
