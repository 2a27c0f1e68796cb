#include "profile.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

namespace latente {

void print_profile(const std::map<std::string, double>& seconds) {
  std::vector<std::pair<double, std::string>> rows;
  double total = 0;
  for (const auto& [op, time] : seconds) rows.emplace_back(time, op), total += time;
  std::sort(rows.rbegin(), rows.rend());
  for (const auto& [time, op] : rows)
    fmt::print("{:<40}{:>10.3f} s{:>7.1f} %\n", op, time, 100 * time / total);
}

}  // namespace latente
