#include "grammar/vocabulary.h"

#include <algorithm>
#include <limits>

#include "base/error.h"

namespace latente::grammar {

Vocabulary::Vocabulary(const std::vector<std::string>& texts, std::vector<int32_t> stop_tokens)
    : size_(texts.size()), stop_tokens_(std::move(stop_tokens)) {
  std::sort(stop_tokens_.begin(), stop_tokens_.end());
  stop_tokens_.erase(std::unique(stop_tokens_.begin(), stop_tokens_.end()), stop_tokens_.end());
  for (int32_t id : stop_tokens_) {
    if (id < 0 || static_cast<size_t>(id) >= size_)
      fail("stop token {} lies outside the vocabulary of {}", id, size_);
  }
  size_t total = 0;
  for (const std::string& text : texts) total += text.size();
  if (total >= std::numeric_limits<uint32_t>::max() || size_ >= size_t{1} << 31)
    fail("the vocabulary is too large: {} tokens with {} bytes", size_, total);
  text_begin_.reserve(size_ + 1);
  bytes_.reserve(total);
  for (size_t i = 0; i < size_; ++i) {
    text_begin_.push_back(static_cast<uint32_t>(bytes_.size()));
    if (stops(static_cast<int32_t>(i))) continue;
    if (texts[i].size() > std::numeric_limits<uint16_t>::max())
      fail("token {} is too long: {} bytes", i, texts[i].size());
    bytes_ += texts[i];
    longest_ = std::max(longest_, texts[i].size());
    if (!texts[i].empty()) tokens_.push_back(static_cast<int32_t>(i));
  }
  text_begin_.push_back(static_cast<uint32_t>(bytes_.size()));

  std::sort(tokens_.begin(), tokens_.end(), [&](int32_t a, int32_t b) {
    const int order = text(a).compare(text(b));
    return order != 0 ? order < 0 : a < b;
  });
  std::string_view before;
  std::vector<size_t> path;  // nodes of the text before, by depth
  for (size_t t = 0; t < tokens_.size(); ++t) {
    const std::string_view now = text(tokens_[t]);
    const auto common = static_cast<size_t>(
        std::mismatch(before.begin(), before.end(), now.begin(), now.end()).first - before.begin());
    close(path, common);
    for (size_t depth = common; depth < now.size(); ++depth) {
      path.push_back(nodes_.size());
      // Shorter texts come first, so that only the last of the new nodes has tokens, this and its equals.
      const auto length = static_cast<uint16_t>(depth + 1);
      nodes_.push_back({0, static_cast<uint32_t>(t), length, length, static_cast<uint8_t>(now[depth])});
    }
    before = now;
  }
  close(path, 0);
  nodes_.push_back({0, static_cast<uint32_t>(tokens_.size()), 0, 0, 0});

  by_length_ = tokens_;
  std::stable_sort(by_length_.begin(), by_length_.end(),
                   [&](int32_t a, int32_t b) { return text(a).size() > text(b).size(); });
}

// Leaves the nodes of the path beyond a depth: nothing more comes below them.
void Vocabulary::close(std::vector<size_t>& path, size_t depth) {
  for (; path.size() > depth; path.pop_back()) {
    Node& node = nodes_[path.back()];
    node.end = static_cast<uint32_t>(nodes_.size());
    if (path.size() > 1) {
      Node& parent = nodes_[path[path.size() - 2]];
      parent.reach = std::max(parent.reach, node.reach);
    }
  }
}

std::span<const int32_t> Vocabulary::longer_than(size_t bytes) const {
  const auto end = std::partition_point(by_length_.begin(), by_length_.end(),
                                        [&](int32_t token) { return text(token).size() > bytes; });
  return {by_length_.begin(), end};
}

bool Vocabulary::stops(int32_t token) const {
  return std::binary_search(stop_tokens_.begin(), stop_tokens_.end(), token);
}

}  // namespace latente::grammar
