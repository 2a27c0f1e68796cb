// Tokens added to a vocabulary, which are found in the text before it is split.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "tokenizer/bpe.h"

namespace latente {

struct AddedToken {
  std::string content;
  bool single_word = false;  // only between characters that are not of words
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // takes the white space behind it
  bool normalized = true;    // its normalized form is found in the normalized text
  bool special = false;
};

// Finds the longest of several strings at the leftmost place, again and again: an Aho-Corasick automaton.
class StringFinder {
 public:
  // Distinct and not empty.
  void build(const std::vector<std::pair<std::string, std::int32_t>>& strings);
  bool empty() const { return nodes_.empty(); }

  struct Match {
    std::size_t begin, end;
    std::int32_t id;
  };
  // The first match at or behind `from`.
  bool find(std::string_view text, std::size_t from, Match& match) const;

 private:
  struct Node {
    std::int32_t id = -1;  // of the string that ends here
    std::uint32_t depth = 0;
    std::uint32_t fail = 0;
    std::uint32_t first_edge = 0, edges = 0;
    std::uint32_t output = 0;  // node of the longest string that is a suffix of this one; 0: none
  };
  struct Edge {
    unsigned char byte;
    std::uint32_t to;
  };
  std::uint32_t step(std::uint32_t node, unsigned char byte) const;
  std::uint32_t child(std::uint32_t node, unsigned char byte) const;  // 0: none

  std::vector<Node> nodes_;  // 0: the root
  std::vector<Edge> edges_;  // ascending by byte within a node
  std::uint32_t root_[256] = {};
};

class AddedTokens {
 public:
  using Normalize = std::function<std::string(std::string_view)>;

  // Ids are given as the Python package does: the model's where it has the token, else counting on from its
  // size. Throws Error, starting with `where`, where two tokens would be found by the same string.
  void build(std::vector<AddedToken> tokens, const Bpe& model, const Normalize& normalize,
             const std::string& where);

  const AddedToken* find(std::int32_t id) const;
  std::int32_t id_of(std::string_view content) const;  // TokenTable::none if absent
  // How the token enters decoding: normalized where it is found so.
  const std::string& decoded_text(std::int32_t id) const;
  bool special_text(std::string_view text) const;  // whether a special token reads so
  std::int32_t end_id() const { return end_id_; }
  const std::unordered_map<std::int32_t, AddedToken>& all() const { return by_id_; }

  struct Piece {
    std::size_t begin, end;
    std::int32_t id;  // TokenTable::none: text between tokens
  };
  // Splits `text` at tokens that are found in the normalized (or the original) text, in order; not empty.
  void split(std::string_view text, bool normalized, bool with_special, std::vector<Piece>& out) const;

 private:
  std::unordered_map<std::int32_t, AddedToken> by_id_;
  std::unordered_map<std::string, std::int32_t> by_content_;
  std::unordered_map<std::int32_t, std::string> normalized_;  // where it differs from the content
  StringFinder original_finder_, normalized_finder_;
  std::int32_t end_id_ = 0;
};

}  // namespace latente
