// A JSON value with its path, for errors such as "tokenizer.json.model.vocab: expected an object, found
// null".
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/error.h"

namespace latente {

class JsonReader {
 public:
  JsonReader(const nlohmann::json& value, std::string path) : value_(value), path_(std::move(path)) {}

  const std::string& path() const { return path_; }
  const nlohmann::json& value() const { return value_; }
  bool is_null() const { return value_.is_null(); }

  [[noreturn]] void expected(std::string_view what) const {
    std::string found = value_.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
    if (found.size() > 60) found = found.substr(0, 57) + "...";
    fail("{}: expected {}, found {}", path_, what, value_.is_structured() ? value_.type_name() : found);
  }

  const JsonReader& object() const {
    if (!value_.is_object()) expected("an object");
    return *this;
  }
  // A member that may be absent: then null.
  JsonReader get(const std::string& key) const {
    static const nlohmann::json null;
    object();
    const auto member = value_.find(key);
    return {member == value_.end() ? null : *member, path_ + "." + key};
  }
  JsonReader at(std::size_t index) const {
    return {value_.at(index), path_ + "[" + std::to_string(index) + "]"};
  }
  std::size_t array_size() const {
    if (!value_.is_array()) expected("an array");
    return value_.size();
  }

  const std::string& string() const {
    if (!value_.is_string()) expected("a string");
    return value_.get_ref<const std::string&>();
  }
  bool boolean() const {
    if (!value_.is_boolean()) expected("true or false");
    return value_.get<bool>();
  }
  std::int64_t integer(std::int64_t low, std::int64_t high) const {
    const bool fits = value_.is_number_unsigned()
                          ? value_.get<std::uint64_t>() <= static_cast<std::uint64_t>(high)
                          : value_.is_number_integer();
    if (!fits || value_.get<std::int64_t>() < low || value_.get<std::int64_t>() > high) {
      expected(fmt::format("an integer from {} to {}", low, high));
    }
    return value_.get<std::int64_t>();
  }
  bool boolean_or(bool otherwise) const { return is_null() ? otherwise : boolean(); }
  std::string string_or(std::string_view otherwise) const {
    return is_null() ? std::string(otherwise) : string();
  }

 private:
  const nlohmann::json& value_;
  std::string path_;
};

}  // namespace latente
