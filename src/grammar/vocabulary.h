// The texts of a vocabulary's tokens as one tree over bytes, built once a vocabulary.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace latente::grammar {

class Vocabulary {
 public:
  // texts[i]: the bytes of token i; empty = it has none, and no grammar admits it. stop_tokens: those that
  // end a text, whatever their bytes: admitted where the grammar may end. Errors: a stop token out of range,
  // a text of more than 65,535 bytes.
  Vocabulary(const std::vector<std::string>& texts, std::vector<int32_t> stop_tokens);

  size_t size() const { return size_; }               // tokens
  size_t words() const { return (size_ + 63) / 64; }  // of a mask
  size_t longest() const { return longest_; }         // text of a token, in bytes
  const std::vector<int32_t>& stop_tokens() const { return stop_tokens_; }
  bool stops(int32_t token) const;
  // Those with a text of more bytes.
  std::span<const int32_t> longer_than(size_t bytes) const;
  std::string_view text(int32_t token) const {
    return std::string_view(bytes_).substr(
        text_begin_[static_cast<size_t>(token)],
        text_begin_[static_cast<size_t>(token) + 1] - text_begin_[static_cast<size_t>(token)]);
  }

  // Nodes come in the order of their texts: behind a node, up to its `end`, those below it.
  struct Node {
    uint32_t end;
    uint32_t tokens;  // where in the list of tokens those with exactly this text begin
    uint16_t depth;   // bytes
    uint16_t reach;   // of the longest text below it, or its own
    uint8_t byte;     // the last one
  };
  // Without the root (the empty text).
  std::span<const Node> nodes() const { return {nodes_.data(), nodes_.size() - 1}; }
  std::span<const int32_t> tokens_at(size_t node) const {
    return {tokens_.data() + nodes_[node].tokens, nodes_[node + 1].tokens - nodes_[node].tokens};
  }

 private:
  void close(std::vector<size_t>& path, size_t depth);

  size_t size_ = 0, longest_ = 0;
  std::vector<int32_t> stop_tokens_;  // sorted
  std::string bytes_;
  std::vector<uint32_t> text_begin_;
  std::vector<Node> nodes_;  // and one behind the last
  std::vector<int32_t> tokens_;
  std::vector<int32_t> by_length_;  // the longest first
};

}  // namespace latente::grammar
