#include "base/memory.h"

#include <sys/resource.h>

#include <algorithm>
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

}  // namespace latente
