// From pattern to program.
#include <algorithm>
#include <map>
#include <memory>
#include <optional>

#include "base/error.h"
#include "tokenizer/regex.h"
#include "tokenizer/regex_syntax.h"

namespace latente {

using Op = RegexInstruction::Op;
using Mode = RegexInstruction::Mode;
using unicode::CodeSet;

class RegexCompiler {
 public:
  RegexCompiler(Regex& regex, std::string_view where) : regex_(regex), where_(where) {}

  void compile(const RegexNode& root) {
    emit(root);
    add({.op = Op::end});
    regex_.first_ = first_bit(root);
    fill_tables();
  }

 private:
  static constexpr std::size_t max_program = 5000;
  // Characters a match of a node may start with; nothing: it may match without taking a character.
  using First = std::optional<CodeSet>;

  std::uint32_t here() const { return static_cast<std::uint32_t>(regex_.program_.size()); }

  std::uint32_t add(RegexInstruction instruction) {
    if (regex_.program_.size() >= max_program) fail("{}: expected a shorter pattern", where_);
    regex_.program_.push_back(instruction);
    return here() - 1;
  }

  // 255: more sets than bits.
  std::uint8_t bit_or_none(const CodeSet& set) {
    for (std::size_t i = 0; i < sets_.size(); ++i) {
      if (std::equal(set.begin(), set.end(), sets_[i].begin(), sets_[i].end(),
                     [](auto x, auto y) { return x.first == y.first && x.last == y.last; })) {
        return static_cast<std::uint8_t>(i);
      }
    }
    if (sets_.size() == 64) return 255;
    sets_.push_back(set);
    return static_cast<std::uint8_t>(sets_.size() - 1);
  }

  std::uint8_t bit(const CodeSet& set) {
    const std::uint8_t found = bit_or_none(set);
    if (found == 255) fail("{}: expected at most 64 different character classes", where_);
    return found;
  }

  static First first(const RegexNode& node) {
    switch (node.kind) {
      case RegexNode::Kind::set:
        return node.set;
      case RegexNode::Kind::sequence: {
        CodeSet all;
        for (const RegexNode& child : node.children) {
          if (child.kind == RegexNode::Kind::assertion) continue;  // takes nothing: the rest decides
          if (!can_be_empty(child)) {
            const First own = first(child);
            if (!own) return std::nullopt;
            return unicode::unite(all, *own);
          }
          const First own = first_if_taken(child);
          if (!own) return std::nullopt;
          all = unicode::unite(all, *own);
        }
        return std::nullopt;
      }
      case RegexNode::Kind::alternation: {
        CodeSet all;
        for (const RegexNode& child : node.children) {
          const First own = first(child);
          if (!own) return std::nullopt;
          all = unicode::unite(all, *own);
        }
        return all;
      }
      case RegexNode::Kind::repeat:
        return node.min == 0 ? std::nullopt : first(node.children[0]);
      case RegexNode::Kind::atomic:
        return first(node.children[0]);
      default:
        return std::nullopt;
    }
  }

  static First first_if_taken(const RegexNode& node) {
    return node.kind == RegexNode::Kind::repeat ? first(node.children[0]) : std::nullopt;
  }

  static bool can_be_empty(const RegexNode& node) {
    const auto& children = node.children;
    switch (node.kind) {
      case RegexNode::Kind::set:
        return false;
      case RegexNode::Kind::sequence:
        return std::all_of(children.begin(), children.end(), can_be_empty);
      case RegexNode::Kind::alternation:
        return std::any_of(children.begin(), children.end(), can_be_empty);
      case RegexNode::Kind::repeat:
        return node.min == 0 || can_be_empty(children[0]);
      case RegexNode::Kind::atomic:
        return can_be_empty(children[0]);
      default:
        return true;
    }
  }

  std::uint8_t first_bit(const RegexNode& node) {
    const First set = first(node);
    return set ? bit_or_none(*set) : 255;
  }

  void emit(const RegexNode& node) {
    switch (node.kind) {
      case RegexNode::Kind::set: {
        if (node.set.size() == 1 && node.set[0].first == node.set[0].last) {
          add({.op = Op::character, .a = static_cast<std::uint32_t>(node.set[0].first)});
        } else {
          add({.op = Op::set, .bit = bit(node.set)});
        }
        return;
      }
      case RegexNode::Kind::sequence:
        for (const RegexNode& child : node.children) emit(child);
        return;
      case RegexNode::Kind::alternation:
        return emit_alternation(node);
      case RegexNode::Kind::repeat:
        return emit_repeat(node);
      case RegexNode::Kind::atomic: {
        const std::uint32_t at = add({.op = Op::atomic});
        emit(node.children[0]);
        add({.op = Op::end});
        regex_.program_[at].a = here();
        return;
      }
      case RegexNode::Kind::look: {
        const std::uint32_t at = add({.op = Op::look, .b = node.negative});
        emit(node.children[0]);
        add({.op = Op::end});
        regex_.program_[at].a = here();
        return;
      }
      case RegexNode::Kind::look_behind:
        add({.op = Op::look_behind, .bit = bit(node.set), .b = node.negative});
        return;
      case RegexNode::Kind::assertion:
        if (node.assertion == Op::word_boundary || node.assertion == Op::not_word_boundary) {
          regex_.word_ = bit(unicode::letters_and_digits_of_regex());
        }
        add({.op = node.assertion});
        return;
    }
  }

  void emit_alternation(const RegexNode& node) {
    std::vector<std::uint32_t> exits;
    std::uint32_t last_split = 0;
    for (std::size_t i = 0; i < node.children.size(); ++i) {
      const bool last = i + 1 == node.children.size();
      if (!last) {
        last_split = add({.op = Op::split, .bit = first_bit(node.children[i])});
        regex_.program_[last_split].a = here();
        if (i + 2 == node.children.size())
          regex_.program_[last_split].bit_b = first_bit(node.children[i + 1]);
      }
      emit(node.children[i]);
      if (!last) {
        exits.push_back(add({.op = Op::jump}));
        regex_.program_[last_split].b = here();
      }
    }
    for (const std::uint32_t at : exits) regex_.program_[at].a = here();
  }

  void emit_repeat(const RegexNode& node) {
    const RegexNode& body = node.children[0];
    if (body.kind == RegexNode::Kind::set) {
      add({.op = Op::loop, .mode = node.mode, .bit = bit(body.set), .a = node.min, .b = node.max});
      return;
    }
    if (can_be_empty(body)) fail("{}: expected no repetition of what can be empty", where_);
    std::uint32_t group = 0;
    const bool possessive = node.mode == Mode::possessive;
    if (possessive) group = add({.op = Op::atomic});
    for (std::uint32_t i = 0; i < node.min; ++i) emit(body);
    const bool lazy = node.mode == Mode::lazy;
    const auto add_split = [&] {
      const std::uint32_t at = add({.op = Op::split});
      regex_.program_[at].a = at + 1;
      regex_.program_[at].bit = first_bit(body);
      return at;
    };
    const auto close_split = [&](std::uint32_t at) {
      RegexInstruction& split = regex_.program_[at];
      split.b = here();
      if (lazy) {
        std::swap(split.a, split.b);
        std::swap(split.bit, split.bit_b);
      }
    };
    if (node.max == RegexNode::unlimited) {
      const std::uint32_t at = add_split();
      emit(body);
      add({.op = Op::jump, .a = at});
      close_split(at);
    } else {
      std::vector<std::uint32_t> splits;
      for (std::uint32_t i = node.min; i < node.max; ++i) {
        splits.push_back(add_split());
        emit(body);
      }
      for (const std::uint32_t at : splits) close_split(at);
    }
    if (possessive) {
      add({.op = Op::end});
      regex_.program_[group].a = here();
    }
  }

  // Every code point gets the mask of the sets it is in: the sets' edges cut the code points into intervals,
  // equal masks share a class, equal blocks of 128 classes are stored once.
  void fill_tables() {
    std::map<char32_t, std::uint64_t> flips{{0, 0}};
    for (std::size_t i = 0; i < sets_.size(); ++i) {
      for (const auto range : sets_[i]) {
        flips[range.first] ^= std::uint64_t{1} << i;
        flips[range.last + 1] ^= std::uint64_t{1} << i;
      }
    }
    std::map<std::uint64_t, std::uint16_t> class_of_mask;
    std::map<std::vector<std::uint16_t>, std::uint16_t> block_of_content;
    std::map<std::uint16_t, std::uint16_t> uniform_block;  // class → block of that class alone
    const auto add_block = [&](const std::vector<std::uint16_t>& block) {
      const auto [entry, added] =
          block_of_content.try_emplace(block, static_cast<std::uint16_t>(regex_.class_of_.size() / 128));
      if (added) regex_.class_of_.insert(regex_.class_of_.end(), block.begin(), block.end());
      return entry->second;
    };
    std::vector<std::uint16_t> block(128);
    std::uint64_t mask = 0;
    std::uint16_t current = 0;
    auto flip = flips.begin();
    constexpr char32_t end = unicode::max_code_point + 1;
    for (char32_t begin = 0; begin < end;) {
      const char32_t uniform_end = flip == flips.end() ? end : flip->first / 128 * 128;
      if (begin < uniform_end) {
        const auto [entry, added] = uniform_block.try_emplace(current);
        if (added) {
          std::fill(block.begin(), block.end(), current);
          entry->second = add_block(block);
        }
        regex_.block_of_.insert(regex_.block_of_.end(), (uniform_end - begin) / 128, entry->second);
        begin = uniform_end;
        continue;
      }
      for (char32_t c = begin; c < begin + 128; ++c) {
        if (flip != flips.end() && flip->first == c) {
          mask ^= flip->second;
          ++flip;
          const auto [entry, added] =
              class_of_mask.try_emplace(mask, static_cast<std::uint16_t>(regex_.masks_.size()));
          if (added) {
            if (regex_.masks_.size() == 65535) fail("{}: expected fewer different character classes", where_);
            regex_.masks_.push_back(mask);
          }
          current = entry->second;
        }
        block[c % 128] = current;
        if (c < 128) regex_.ascii_[c] = mask;
      }
      regex_.block_of_.push_back(add_block(block));
      begin += 128;
    }
  }

  Regex& regex_;
  std::string_view where_;
  std::vector<CodeSet> sets_;
};

Regex::Regex(std::string_view pattern, std::string_view where) : pattern_(pattern), where_(where) {
  RegexCompiler(*this, where_).compile(parse_regex(pattern, where_));
}

Regex Regex::literal(std::string_view text, std::string_view where) {
  RegexNode root{.kind = RegexNode::Kind::sequence};
  for (std::size_t at = 0; at < text.size();) {
    const char32_t c = unicode::decode(text, at);
    root.children.push_back({.kind = RegexNode::Kind::set, .set = {{c, c}}});
  }
  Regex out = from_tree(root, where);
  out.pattern_ = text;
  return out;
}

Regex Regex::from_tree(const RegexNode& root, std::string_view name) {
  Regex out;
  out.pattern_ = out.where_ = name;
  RegexCompiler(out, out.where_).compile(root);
  return out;
}

}  // namespace latente
