#include "checkpoint/json.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace latente {

namespace {

using Json = nlohmann::json;

class StrictBuilder final : public nlohmann::json_sax<Json> {
 public:
  StrictBuilder(const std::string& label, int max_depth) : label_(label), max_depth_(max_depth) {}

  Json take() { return std::move(root_); }

  bool null() override { return add(nullptr), true; }
  bool boolean(bool value) override { return add(value), true; }
  bool number_integer(number_integer_t value) override { return add(value), true; }
  bool number_unsigned(number_unsigned_t value) override { return add(value), true; }
  bool number_float(number_float_t value, const string_t&) override { return add(value), true; }
  bool string(string_t& value) override { return add(std::move(value)), true; }
  bool binary(binary_t&) override { fail("{}: binary values are not JSON", label_); }

  bool start_object(std::size_t) override { return open(Json::object()); }
  bool end_object() override { return open_.pop_back(), true; }
  bool start_array(std::size_t) override { return open(Json::array()); }
  bool end_array() override { return open_.pop_back(), true; }

  bool key(string_t& name) override {
    auto [place, added] = open_.back()->get_ref<Json::object_t&>().emplace(name, nullptr);
    if (!added) fail("{}: duplicate key {}", label_, printable(name));
    slot_ = &place->second;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const Json::exception& error) override {
    std::string what = error.what();
    // "[json.exception.parse_error.101] parse error at line 1, column 2: reason; last read: ..."
    size_t reason = what.find(": ");
    what = reason == what.npos ? what : what.substr(reason + 2);
    fail("{}: not valid JSON at byte {}: {}", label_, position, printable(what));
  }

 private:
  Json* add(Json value) {
    if (open_.empty()) return &(root_ = std::move(value));
    if (open_.back()->is_array()) {
      auto& array = open_.back()->get_ref<Json::array_t&>();
      array.push_back(std::move(value));
      return &array.back();
    }
    return &(*slot_ = std::move(value));
  }

  bool open(Json empty) {
    if (static_cast<int>(open_.size()) >= max_depth_)
      fail("{}: expected at most {} nested levels, found more", label_, max_depth_);
    open_.push_back(add(std::move(empty)));
    return true;
  }

  const std::string& label_;
  int max_depth_;
  Json root_;
  Json* slot_ = nullptr;     // where the value of the last key goes
  std::vector<Json*> open_;  // stable: a container only grows while it is the innermost one
};

}  // namespace

Json parse_json(std::string_view text, const std::string& label, int max_depth) {
  // The parser takes a NUL byte for the end of its input.
  if (size_t nul = text.find('\0'); nul != text.npos)
    fail("{}: not valid JSON at byte {}: a NUL byte", label, nul);
  StrictBuilder builder(label, max_depth);
  Json::sax_parse(text.begin(), text.end(), &builder);
  return builder.take();
}

std::string printable(std::string_view text) {
  constexpr size_t longest = 100;
  std::string out = "\"";
  for (size_t i = 0; i < text.size(); ++i) {
    if (out.size() >= longest) return out + "\"...";
    unsigned char c = static_cast<unsigned char>(text[i]);
    if (c < 0x20 || c >= 0x7f) {
      out += fmt::format("\\x{:02x}", c);
    } else {
      out += text[i];
    }
  }
  return out + "\"";
}

bool has_control_character(std::string_view text) {
  return std::any_of(text.begin(), text.end(), [](char c) { return (c >= 0 && c < 0x20) || c == 0x7f; });
}

}  // namespace latente
