// JSON from files that may be hostile. Stricter than nlohmann::json::parse: duplicate keys, nesting deeper
// than max_depth and bytes after the end are Errors, whose one line names the file and the position.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace latente {

inline constexpr int max_json_depth = 64;

nlohmann::json parse_json(std::string_view text, const std::string& label, int max_depth = max_json_depth);

// Text from a file, fit for a message: quoted, control and non-ASCII bytes escaped, shortened to about 100
// characters.
std::string printable(std::string_view text);

bool has_control_character(std::string_view text);

}  // namespace latente
