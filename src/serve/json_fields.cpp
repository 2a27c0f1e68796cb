#include "serve/json_fields.h"

#include <cmath>

namespace latente {
namespace {

int nesting(std::string_view text) {
  int depth = 0, most = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    if (quoted) {
      if (text[i] == '\\') ++i;
      quoted = i >= text.size() || text[i] != '"';
    } else if (text[i] == '"') {
      quoted = true;
    } else if (text[i] == '{' || text[i] == '[') {
      most = std::max(most, ++depth);
    } else if (text[i] == '}' || text[i] == ']') {
      --depth;
    }
  }
  return most;
}

}  // namespace

Json parse_body(std::string_view text) {
  if (nesting(text) > most_nested)
    throw ApiError(400, fmt::format("the body is nested deeper than {} levels", most_nested));
  Json body;
  try {
    body = Json::parse(text);
  } catch (const Json::exception& error) {
    throw ApiError(400, std::string("the body is no valid JSON: ") + error.what());
  }
  if (!body.is_object()) throw ApiError(400, "expected a JSON object as the body, found " + shown(body));
  return body;
}

Json byte_list(std::string_view bytes) {
  Json list = Json::array();
  for (char byte : bytes) list.push_back(static_cast<unsigned char>(byte));
  return list;
}

std::string shown(const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);  // paths may be no UTF-8
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

const Json* field(const Json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

std::optional<double> number_field(const Json& object, const char* key, double low, double high) {
  const Json* value = field(object, key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number()) refuse(key, "expected a number, found {}", shown(*value));
  const double number = value->get<double>();
  if (!(number >= low && number <= high))
    refuse(key, "expected a number from {} to {}, found {}", low, high, shown(*value));
  return number;
}

std::optional<int64_t> integer_field(const Json& object, const char* key, int64_t low, int64_t high) {
  const Json* value = field(object, key);
  if (value == nullptr) return std::nullopt;
  const auto wrong = [&] {
    refuse(key, "expected an integer from {} to {}, found {}", low, high, shown(*value));
  };
  if (!value->is_number()) wrong();
  // 1e3 and 2.0 are integers, too.
  const double number = value->get<double>();
  constexpr double beyond = 0x1p63;  // the largest integer is none of the doubles
  if (!(number >= static_cast<double>(low) && number <= static_cast<double>(high)) || number >= beyond ||
      number != std::floor(number))
    wrong();
  const int64_t integer = value->is_number_integer() ? value->get<int64_t>() : static_cast<int64_t>(number);
  if (integer < low || integer > high) wrong();
  return integer;
}

std::optional<bool> flag_field(const Json& object, const char* key) {
  const Json* value = field(object, key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_boolean()) refuse(key, "expected true or false, found {}", shown(*value));
  return value->get<bool>();
}

std::optional<std::string> text_field(const Json& object, const char* key) {
  const Json* value = field(object, key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) refuse(key, "expected a text, found {}", shown(*value));
  return value->get<std::string>();
}

}  // namespace latente
