#include "tokenizer/pre_tokenizer.h"

#include <algorithm>

#include "tokenizer/byte_alphabet.h"
#include "tokenizer/regex_syntax.h"
#include "tokenizer/unicode.h"

namespace latente {

namespace {

using StepKind = PreTokenizerStep::Kind;
using NodeKind = RegexNode::Kind;

RegexNode one_of(unicode::CodeSet set) { return {.kind = NodeKind::set, .set = std::move(set)}; }

RegexNode some_of(unicode::CodeSet set) {
  RegexNode out{.kind = NodeKind::repeat, .min = 1, .max = RegexNode::unlimited};
  out.children.push_back(one_of(std::move(set)));
  return out;
}

PreTokenizerStep split_step(Regex pattern, SplitBehavior behavior, bool invert = false) {
  PreTokenizerStep out{.kind = StepKind::split};
  out.pattern = std::move(pattern);
  out.behavior = behavior;
  out.invert = invert;
  return out;
}

struct Part {
  std::size_t begin, end;
  bool match;
};

// Joins the parts that a behavior keeps together. As in the Python package, a run of matches joins one by
// one: "a--b" split at '-' with merged_with_previous is "a-", "-", "b".
std::vector<Part> joined(std::vector<Part> parts, SplitBehavior behavior) {
  const bool backwards = behavior == SplitBehavior::merged_with_next;
  if (backwards) std::reverse(parts.begin(), parts.end());
  std::vector<Part> out;
  bool previous = false;
  for (const Part& part : parts) {
    const bool join =
        behavior == SplitBehavior::contiguous ? part.match == previous : part.match && !previous;
    if (join && !out.empty()) {
      out.back().begin = std::min(out.back().begin, part.begin);
      out.back().end = std::max(out.back().end, part.end);
    } else {
      out.push_back(part);
    }
    previous = part.match;
  }
  if (backwards) std::reverse(out.begin(), out.end());
  return out;
}

}  // namespace

PreTokenizerStep PreTokenizerStep::digits(bool individual) {
  return split_step(Regex::from_tree(one_of(unicode::numeric()), "Digits"),
                    individual ? SplitBehavior::isolated : SplitBehavior::contiguous);
}

PreTokenizerStep PreTokenizerStep::punctuation(SplitBehavior behavior) {
  return split_step(Regex::from_tree(one_of(unicode::punctuation()), "Punctuation"), behavior);
}

PreTokenizerStep PreTokenizerStep::whitespace() {
  const unicode::CodeSet& word = unicode::word_of_added_tokens();
  RegexNode either{.kind = NodeKind::alternation};
  either.children.push_back(some_of(word));
  either.children.push_back(some_of(unicode::complement(unicode::unite(word, unicode::space))));
  return split_step(Regex::from_tree(either, "Whitespace"), SplitBehavior::removed, true);
}

PreTokenizerStep PreTokenizerStep::whitespace_split() {
  return split_step(Regex::from_tree(one_of(unicode::space), "WhitespaceSplit"), SplitBehavior::removed);
}

PreTokenizerStep PreTokenizerStep::delimiter(char32_t character) {
  return split_step(Regex::from_tree(one_of({{character, character}}), "CharDelimiterSplit"),
                    SplitBehavior::removed);
}

PreTokenizerStep PreTokenizerStep::byte_level(bool add_prefix_space, bool use_regex) {
  PreTokenizerStep out{.kind = StepKind::byte_level};
  out.add_prefix_space = add_prefix_space;
  if (use_regex) {
    out.pattern = Regex("'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
                        "ByteLevel");
  }
  return out;
}

PreTokenizerStep PreTokenizerStep::metaspace(std::string replacement, Prepend prepend, bool split) {
  PreTokenizerStep out{.kind = StepKind::metaspace};
  out.pattern = Regex::literal(replacement, "Metaspace");
  out.replacement = std::move(replacement);
  out.prepend = prepend;
  out.split = split;
  return out;
}

void PreTokenizer::run(std::size_t index, std::string_view text, bool first, const Sink& sink) const {
  if (text.empty()) return;
  if (index == steps.size()) {
    sink(text);
    return;
  }
  const PreTokenizerStep& step = steps[index];
  switch (step.kind) {
    case StepKind::split:
      return split_by(index, *step.pattern, step.behavior, step.invert, text, first, sink);
    case StepKind::byte_level: {
      std::string prefixed;
      if (step.add_prefix_space && !text.starts_with(' ')) {
        prefixed = ' ';
        prefixed += text;
        text = prefixed;
      }
      if (step.pattern)
        return split_by(index, *step.pattern, SplitBehavior::isolated, false, text, first, sink);
      if (index + 1 == steps.size()) return sink(text);
      return run(index + 1, spell_bytes(text), first, sink);
    }
    case StepKind::metaspace: {
      std::string out;
      const bool prepend = step.prepend == PreTokenizerStep::Prepend::always ||
                           (step.prepend == PreTokenizerStep::Prepend::first && first);
      if (prepend && !text.starts_with(' ') && !text.starts_with(step.replacement)) out = step.replacement;
      for (const char c : text) {
        if (c == ' ') {
          out += step.replacement;
        } else {
          out += c;
        }
      }
      if (!step.split) return run(index + 1, out, first, sink);
      return split_by(index, *step.pattern, SplitBehavior::merged_with_next, false, out, first, sink);
    }
  }
}

void PreTokenizer::split_by(std::size_t index, const Regex& pattern, SplitBehavior behavior, bool invert,
                            std::string_view text, bool first, const Sink& sink) const {
  const bool spell = steps[index].kind == StepKind::byte_level && index + 1 < steps.size();
  const auto emit = [&](std::size_t begin, std::size_t end) {
    if (begin == end) return;
    const std::string_view part = text.substr(begin, end - begin);
    const bool starts = first && begin == 0;
    if (spell) {
      run(index + 1, spell_bytes(part), starts, sink);
    } else {
      run(index + 1, part, starts, sink);
    }
  };
  Regex::Matches matches(pattern, text);
  std::size_t done = 0, begin, end;
  if (behavior == SplitBehavior::isolated || behavior == SplitBehavior::removed) {
    const bool keep_matches = behavior == SplitBehavior::isolated || invert;
    const bool keep_others = behavior == SplitBehavior::isolated || !invert;
    while (matches.next(begin, end)) {
      if (keep_others) emit(done, begin);
      if (keep_matches) emit(begin, end);
      done = end;
    }
    if (keep_others) emit(done, text.size());
    return;
  }
  std::vector<Part> parts;
  while (matches.next(begin, end)) {
    if (done != begin) parts.push_back({done, begin, invert});
    parts.push_back({begin, end, !invert});
    done = end;
  }
  if (done != text.size()) parts.push_back({done, text.size(), invert});
  for (const Part& part : joined(std::move(parts), behavior)) emit(part.begin, part.end);
}

}  // namespace latente
