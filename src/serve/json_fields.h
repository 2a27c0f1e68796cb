// Bodies of requests: JSON that may be hostile, and its fields with their bounds. What is wrong is an
// ApiError, which names the field.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "base/error.h"

namespace latente {

// Keys keep their order: templates write tools out as they came.
using Json = nlohmann::ordered_json;

// What a client did wrong.
class ApiError : public Error {
 public:
  ApiError(int http_status, const std::string& message, std::string field = {}, std::string kind = {})
      : Error(message), status(http_status), param(std::move(field)), code(std::move(kind)) {}
  int status;
  std::string param, code;
};

template <class... Args>
[[noreturn]] void refuse(const std::string& param, fmt::format_string<Args...> format, Args&&... args) {
  throw ApiError(400, param + ": " + fmt::format(format, std::forward<Args>(args)...), param);
}

inline constexpr int most_nested = 64;

// An object. ApiError for anything else, for nesting beyond most_nested and for numbers beyond a double.
Json parse_body(std::string_view text);

// As numbers, since they may be no UTF-8.
Json byte_list(std::string_view bytes);

// A value's text, shortened, for messages.
std::string shown(const Json& value);

// Of an object, by key; null is as good as absent.
const Json* field(const Json& object, const char* key);
std::optional<double> number_field(const Json& object, const char* key, double low, double high);
std::optional<int64_t> integer_field(const Json& object, const char* key, int64_t low, int64_t high);
std::optional<bool> flag_field(const Json& object, const char* key);
std::optional<std::string> text_field(const Json& object, const char* key);

}  // namespace latente
