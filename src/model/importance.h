// How much an error in each column of a matrix costs, beside errors in its other columns.
#pragma once

#include <map>
#include <string>
#include <vector>

namespace latente {

// By the checkpoint's names, [columns] each, positive; what is missing counts its columns alike.
using Importance = std::map<std::string, std::vector<float>, std::less<>>;

}  // namespace latente
