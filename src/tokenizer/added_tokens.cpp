#include "tokenizer/added_tokens.h"

#include <algorithm>
#include <map>

#include "base/error.h"
#include "tokenizer/unicode.h"

namespace latente {

void StringFinder::build(const std::vector<std::pair<std::string, std::int32_t>>& strings) {
  if (strings.empty()) return;
  std::vector<std::map<unsigned char, std::uint32_t>> children(1);
  nodes_.assign(1, {});
  for (const auto& [text, id] : strings) {
    std::uint32_t node = 0;
    for (const char c : text) {
      const auto [edge, added] = children[node].try_emplace(static_cast<unsigned char>(c),
                                                            static_cast<std::uint32_t>(nodes_.size()));
      const std::uint32_t next = edge->second;
      if (added) {
        nodes_.push_back({.depth = nodes_[node].depth + 1});
        children.emplace_back();
      }
      node = next;
    }
    nodes_[node].id = id;
  }
  for (std::size_t node = 0; node < nodes_.size(); ++node) {
    nodes_[node].first_edge = static_cast<std::uint32_t>(edges_.size());
    nodes_[node].edges = static_cast<std::uint32_t>(children[node].size());
    for (const auto& [byte, to] : children[node]) edges_.push_back({byte, to});
  }
  std::vector<std::uint32_t>
      queue;  // breadth first, so that a node's failure link is ready before its children's
  for (const auto& [byte, to] : children[0]) {
    root_[byte] = to;
    queue.push_back(to);
  }
  for (std::size_t i = 0; i < queue.size(); ++i) {
    const std::uint32_t node = queue[i];
    for (const auto& [byte, to] : children[node]) {
      nodes_[to].fail = step(nodes_[node].fail, byte);
      queue.push_back(to);
    }
    nodes_[node].output = nodes_[node].id >= 0 ? node : nodes_[nodes_[node].fail].output;
  }
}

std::uint32_t StringFinder::child(std::uint32_t node, unsigned char byte) const {
  if (node == 0) return root_[byte];
  const Node& n = nodes_[node];
  const auto first = edges_.begin() + n.first_edge;
  const auto last = first + n.edges;
  const auto edge =
      std::lower_bound(first, last, byte, [](const Edge& e, unsigned char b) { return e.byte < b; });
  return edge != last && edge->byte == byte ? edge->to : 0;
}

std::uint32_t StringFinder::step(std::uint32_t node, unsigned char byte) const {
  while (true) {
    const std::uint32_t next = child(node, byte);
    if (next != 0 || node == 0) return next;
    node = nodes_[node].fail;
  }
}

bool StringFinder::find(std::string_view text, std::size_t from, Match& match) const {
  if (nodes_.empty()) return false;
  bool found = false;
  std::uint32_t node = 0;
  for (std::size_t at = from; at < text.size(); ++at) {
    const auto byte = static_cast<unsigned char>(text[at]);
    if (node == 0 && root_[byte] == 0) {
      if (found) return true;
      continue;
    }
    node = step(node, byte);
    // Once a string is found, only one that begins no later can replace it.
    if (found && at + 1 - nodes_[node].depth > match.begin) return true;
    const std::uint32_t output = nodes_[node].output;
    if (output == 0) continue;
    const std::size_t begin = at + 1 - nodes_[output].depth;
    if (!found || begin <= match.begin) {
      match = {begin, at + 1, nodes_[output].id};
      found = true;
    }
  }
  return found;
}

void AddedTokens::build(std::vector<AddedToken> tokens, const Bpe& model, const Normalize& normalize,
                        const std::string& where) {
  std::int32_t next_id = model.size();
  for (AddedToken& token : tokens) {
    if (token.content.empty()) continue;
    const auto known = by_content_.find(token.content);
    std::int32_t id = known != by_content_.end() ? known->second : model.find(token.content);
    if (id == TokenTable::none) id = next_id++;
    if (id > Bpe::max_id) fail("{}: expected ids up to {}", where, Bpe::max_id);
    normalized_.erase(id);
    if (token.normalized) {
      std::string text = normalize(token.content);
      if (text != token.content) normalized_[id] = std::move(text);
    }
    end_id_ = std::max(end_id_, id + 1);
    by_content_[token.content] = id;
    by_id_[id] = std::move(token);
  }
  std::map<std::pair<bool, std::string>, std::int32_t> strings;
  for (const auto& [id, token] : by_id_) {
    const std::string& text = decoded_text(id);
    if (text.empty())
      fail("{}: expected added token '{}' not to vanish in normalization", where, token.content);
    const auto [other, added] = strings.try_emplace({token.normalized, text}, id);
    if (!added) {
      fail("{}: added tokens {} and {} are both found by '{}'", where, std::min(id, other->second),
           std::max(id, other->second), text);
    }
  }
  std::vector<std::pair<std::string, std::int32_t>> of_original, of_normalized;
  for (const auto& [key, id] : strings)
    (key.first ? of_normalized : of_original).emplace_back(key.second, id);
  original_finder_.build(of_original);
  normalized_finder_.build(of_normalized);
}

const AddedToken* AddedTokens::find(std::int32_t id) const {
  const auto entry = by_id_.find(id);
  return entry == by_id_.end() ? nullptr : &entry->second;
}

std::int32_t AddedTokens::id_of(std::string_view content) const {
  const auto entry = by_content_.find(std::string(content));
  return entry == by_content_.end() ? TokenTable::none : entry->second;
}

const std::string& AddedTokens::decoded_text(std::int32_t id) const {
  const auto entry = normalized_.find(id);
  return entry == normalized_.end() ? by_id_.at(id).content : entry->second;
}

bool AddedTokens::special_text(std::string_view text) const {
  const std::int32_t id = id_of(text);
  return id != TokenTable::none && by_id_.at(id).special;
}

void AddedTokens::split(std::string_view text, bool normalized, bool with_special,
                        std::vector<Piece>& out) const {
  const StringFinder& finder = normalized ? normalized_finder_ : original_finder_;
  const auto word = [](char32_t c) { return unicode::contains(unicode::word_of_added_tokens(), c); };
  std::size_t done = 0;
  std::size_t from = 0;
  StringFinder::Match match;
  while (finder.find(text, from, match)) {
    from = match.end;
    const AddedToken& token = by_id_.at(match.id);
    if (token.special && !with_special) continue;
    if (token.single_word) {
      std::size_t before = match.begin > 0 ? unicode::previous(text, match.begin) : 0;
      std::size_t behind = match.end;
      if (match.begin > 0 && word(unicode::decode(text, before))) continue;
      if (behind < text.size() && word(unicode::decode(text, behind))) continue;
    }
    std::size_t begin = match.begin, end = match.end;
    if (token.lstrip) {
      while (begin > done) {
        const std::size_t before = unicode::previous(text, begin);
        std::size_t at = before;
        if (!unicode::is_space(unicode::decode(text, at))) break;
        begin = before;
      }
      begin = std::max(begin, done);
    }
    if (token.rstrip) {
      while (end < text.size()) {
        std::size_t behind = end;
        if (!unicode::is_space(unicode::decode(text, behind))) break;
        end = behind;
      }
    }
    if (done < begin) out.push_back({done, begin, TokenTable::none});
    out.push_back({begin, end, match.id});
    done = end;
  }
  if (done < text.size()) out.push_back({done, text.size(), TokenTable::none});
}

}  // namespace latente
