// The backtracking matcher. A loop over one character class is one entry of the stack, however long it is.
#include "base/error.h"
#include "tokenizer/regex.h"
#include "tokenizer/unicode.h"

namespace latente {

using Op = RegexInstruction::Op;
using Mode = RegexInstruction::Mode;

namespace {
constexpr std::uint32_t npc = 0xFFFFFFFF;
constexpr std::uint64_t steps_per_byte = 2000, steps_at_least = 10'000'000;
}  // namespace

Regex::Matches::Matches(const Regex& regex, std::string_view text)
    : regex_(regex), text_(text), steps_left_(steps_at_least + steps_per_byte * text.size()) {}

bool Regex::Matches::next(std::size_t& begin, std::size_t& end) {
  while (!done_) {
    if (!search(next_, begin, end)) {
      done_ = true;
      return false;
    }
    if (begin == end && end == last_end_) {
      if (next_ == text_.size()) {
        done_ = true;
        return false;
      }
      next_ += unicode::length(text_[next_]);
      continue;
    }
    next_ = last_end_ = end;
    return true;
  }
  return false;
}

inline std::uint64_t Regex::Matches::mask(std::size_t at) const {
  if (at >= text_.size()) return 0;
  const auto byte = static_cast<unsigned char>(text_[at]);
  if (byte < 0x80) return regex_.ascii_[byte];
  const char32_t c = unicode::decode(text_, at);
  return regex_.masks_[regex_.class_of_[regex_.block_of_[c / 128] * std::size_t{128} + c % 128]];
}

inline void Regex::Matches::spend() {
  if (steps_left_-- == 0) {
    fail("{}: matching '{}' on {} bytes takes too many steps", regex_.where_, regex_.pattern_, text_.size());
  }
}

bool Regex::Matches::search(std::size_t from, std::size_t& begin, std::size_t& end) {
  std::size_t at = from;
  while (true) {
    if (regex_.first_ != 255) {
      while (at < text_.size() && !(mask(at) >> regex_.first_ & 1)) at += unicode::length(text_[at]);
      if (at >= text_.size()) return false;
    }
    stack_.clear();
    if (run(0, at, end)) {
      begin = at;
      return true;
    }
    if (at >= text_.size()) return false;
    at += unicode::length(text_[at]);
  }
}

bool Regex::Matches::word_at(std::size_t at) const {
  return at < text_.size() && (mask(at) >> regex_.word_ & 1);
}

bool Regex::Matches::holds(const RegexInstruction& instruction, std::size_t at) const {
  switch (instruction.op) {
    case Op::line_begin:
      return at == 0 || (text_[at - 1] == '\n' && at < text_.size());
    case Op::line_end:
      return at == text_.size() || text_[at] == '\n';
    case Op::text_begin:
      return at == 0;
    case Op::text_end:
      return at == text_.size();
    case Op::text_end_line:
      return at == text_.size() || (at + 1 == text_.size() && text_[at] == '\n');
    case Op::word_boundary:
    case Op::not_word_boundary: {
      const bool before = at > 0 && word_at(unicode::previous(text_, at));
      return (before != word_at(at)) == (instruction.op == Op::word_boundary);
    }
    case Op::look_behind: {
      const bool there = at > 0 && (mask(unicode::previous(text_, at)) >> instruction.bit & 1);
      return there != (instruction.b != 0);
    }
    default:
      return false;
  }
}

// Takes what the loop must and, unless lazy, all it can; false if it cannot take enough.
bool Regex::Matches::enter_loop(std::uint32_t pc, std::size_t& at) {
  const RegexInstruction& loop = regex_.program_[pc];
  std::uint32_t count = 0;
  const auto take_until = [&](std::uint32_t limit) {
    while (count < limit && (mask(at) >> loop.bit & 1)) {
      at += unicode::length(text_[at]);
      ++count;
    }
  };
  take_until(loop.a);
  if (count < loop.a) return false;
  const std::size_t least = at;
  if (loop.mode == Mode::lazy) {
    if (loop.b > loop.a) stack_.push_back({pc + 1, Mode::lazy, at, loop.b - count, pc});
    return true;
  }
  take_until(loop.b);
  const std::uint64_t taken = at - least;
  if (taken > steps_left_)
    steps_left_ = 0;
  else
    steps_left_ -= taken;
  if (loop.mode == Mode::greedy && at > least) stack_.push_back({pc + 1, Mode::greedy, at, least, pc});
  return true;
}

// Goes back to the last choice above `base`.
bool Regex::Matches::resume(std::size_t base, std::uint32_t& pc, std::size_t& at) {
  if (stack_.size() == base) return false;
  Choice& choice = stack_.back();
  pc = choice.pc;
  if (choice.loop == npc) {
    at = choice.at;
    stack_.pop_back();
    return true;
  }
  if (choice.mode == Mode::greedy) {  // give one character back
    at = choice.at = unicode::previous(text_, choice.at);
    if (at == choice.limit) stack_.pop_back();
    return true;
  }
  const RegexInstruction& loop = regex_.program_[choice.loop];  // take one more
  if (!(mask(choice.at) >> loop.bit & 1)) {
    stack_.pop_back();
    return resume(base, pc, at);
  }
  choice.at += unicode::length(text_[choice.at]);
  at = choice.at;
  if (--choice.limit == 0) stack_.pop_back();
  return true;
}

// Runs the program from `pc` to its `end` instruction. What is above the stack's size at entry is dropped: a
// lookahead and an atomic group keep their first match only.
bool Regex::Matches::run(std::uint32_t pc, std::size_t at, std::size_t& end) {
  const std::size_t base = stack_.size();
  while (true) {
    spend();
    const RegexInstruction& instruction = regex_.program_[pc];
    bool matches = true;
    switch (instruction.op) {
      case Op::character: {
        matches = at < text_.size();
        if (!matches) break;
        std::size_t after = at;
        matches = unicode::decode(text_, after) == instruction.a;
        at = after;
        ++pc;
        break;
      }
      case Op::set:
        matches = mask(at) >> instruction.bit & 1;
        if (!matches) break;
        at += unicode::length(text_[at]);
        ++pc;
        break;
      case Op::loop:
        matches = enter_loop(pc, at);
        ++pc;
        break;
      case Op::split: {
        const std::uint64_t sets = mask(at);
        const bool first = instruction.bit == 255 || (sets >> instruction.bit & 1);
        const bool second = instruction.bit_b == 255 || (sets >> instruction.bit_b & 1);
        if (first && second) stack_.push_back({instruction.b, Mode::greedy, at, at, npc});
        matches = first || second;
        pc = first ? instruction.a : instruction.b;
        break;
      }
      case Op::jump:
        pc = instruction.a;
        break;
      case Op::look:
      case Op::atomic: {
        std::size_t inner_end;
        matches = run(pc + 1, at, inner_end);
        if (instruction.op == Op::look) {
          matches = matches != (instruction.b != 0);
        } else if (matches) {
          at = inner_end;
        }
        pc = instruction.a;
        break;
      }
      case Op::end:
        end = at;
        stack_.resize(base);
        return true;
      default:
        matches = holds(instruction, at);
        ++pc;
        break;
    }
    if (!matches && !resume(base, pc, at)) return false;
  }
}

}  // namespace latente
