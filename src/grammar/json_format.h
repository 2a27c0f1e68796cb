// The formats of JSON Schema that are understood.
#pragma once

#include <map>
#include <string>

namespace latente::grammar {

// Names and regular expressions (pattern.h): RFC 3339 of dates and times, RFC 4122 of uuid, RFC 2673 of ipv4;
// of e-mail addresses the usual form.
const std::map<std::string, std::string, std::less<>>& string_formats();

}  // namespace latente::grammar
