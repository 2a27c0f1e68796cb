// Where the time of a command went.
#pragma once

#include <map>
#include <string>

namespace latente {

// By op, the longest first, with shares of the total.
void print_profile(const std::map<std::string, double>& seconds);

}  // namespace latente
