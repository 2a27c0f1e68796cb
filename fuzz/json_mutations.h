// Mutations of JSON that leave it JSON: bytes changed at random are mostly refused by the parser.
#pragma once

#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

class JsonMutations {
 public:
  using Json = nlohmann::json;
  explicit JsonMutations(unsigned seed) : random_(seed) {}

  std::size_t below(std::size_t end) { return random_() % end; }

  // Changes a value somewhere in `json`. `other`: a document of the same kind to take values from.
  void apply(Json& json, const Json& other) {
    std::vector<Place<Json>> places;
    collect(json, "", places);
    const Place<Json> place = places[below(places.size())];
    switch (below(4)) {
      case 0:
        *place.value = taken(other, place.key);
        break;
      case 1:
        *place.value = taken(json, "");
        break;
      default:
        change(*place.value, other);
    }
  }

 private:
  template <typename Value>
  struct Place {
    std::string key;  // empty for elements of arrays
    Value* value;
  };

  template <typename Value>
  static void collect(Value& json, const std::string& key, std::vector<Place<Value>>& out) {
    out.push_back({key, &json});
    if (json.is_object()) {
      for (auto member = json.begin(); member != json.end(); ++member) collect(*member, member.key(), out);
    } else if (json.is_array()) {
      for (auto& element : json) collect(element, "", out);
    }
  }

  // A copy of a value in `json`, one of that name if there is one.
  Json taken(const Json& json, const std::string& key) {
    std::vector<Place<const Json>> places, named;
    collect(json, "", places);
    for (const auto& place : places) {
      if (!key.empty() && place.key == key) named.push_back(place);
    }
    const auto& from = named.empty() ? places : named;
    return *from[below(from.size())].value;
  }

  void change(Json& value, const Json& other) {
    switch (value.type()) {
      case Json::value_t::object:
        return change_object(value, other);
      case Json::value_t::array:
        return change_array(value, other);
      case Json::value_t::string:
        return change_string(value.get_ref<std::string&>());
      case Json::value_t::boolean:
        value = !value.get<bool>();
        return;
      default: {
        static const Json values[] = {0, 1, 2, 3, 20, 255, -1, 1 << 22, 4294967296, 0.5, nullptr, true, ""};
        value = values[below(std::size(values))];
      }
    }
  }

  void change_object(Json& value, const Json& other) {
    if (value.empty() || below(3) == 0) {
      std::string key = below(2) ? "type" : "a";
      change_string(key);
      value[key] = taken(other, "");
      return;
    }
    const auto member = std::next(value.begin(), static_cast<std::ptrdiff_t>(below(value.size())));
    std::string key = member.key();
    Json content = *member;
    value.erase(member);
    if (below(2)) {
      change_string(key);
      value[key] = std::move(content);
    }
  }

  void change_array(Json& value, const Json& other) {
    if (value.empty() || below(3) == 0) {
      value.push_back(taken(other, ""));
    } else if (below(2)) {
      value.push_back(Json(value[below(value.size())]));
    } else {
      value.erase(below(value.size()));
    }
  }

  // Pieces are whole characters, so the text stays UTF-8; what is cut off is one character too.
  void change_string(std::string& text) {
    static const char* const pieces[] = {
        "a",      "b",    "ab",   " ",    "  ",  "▁",      "Ġ",   "é", "e\u0301",   "中", "\u0130",
        "##",     "</w>", "\n",   "[ab]", "(?:", ")",      "*",   "+", "{1,2}",     "|",  "\\s",
        "\\p{L}", "(?=",  "(?i)", "^",    "$",   "<0x41>", "<s>", "A", "\U0001F600"};
    switch (below(5)) {
      case 0:
        text.clear();
        return;
      case 1:
        if (!text.empty()) {
          std::size_t end = text.size() - 1;
          while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
          text.resize(end);
        }
        break;
      case 2:
        text.insert(0, pieces[below(std::size(pieces))]);
        return;
      default:
        break;
    }
    text += pieces[below(std::size(pieces))];
  }

  std::minstd_rand random_;
};
