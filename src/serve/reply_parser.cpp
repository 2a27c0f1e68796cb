#include "serve/reply_parser.h"

#include <algorithm>
#include <utility>

namespace latente {

void ReplyParser::Parts::add(const Parts& more) {
  content += more.content;
  reasoning += more.reasoning;
  for (const ToolCall& call : more.calls) {
    if (call.name.empty() && !calls.empty()) {
      calls.back().arguments += call.arguments;
    } else {
      calls.push_back(call);
    }
  }
}

ReplyParser::ReplyParser(Options options)
    : options_(std::move(options)), state_(options_.reasoning ? State::reasoning : State::beginning) {}

ReplyParser::Parts ReplyParser::push(std::string_view piece) {
  held_ += piece;
  Parts parts;
  while (advance(parts, false)) {
  }
  return parts;
}

ReplyParser::Parts ReplyParser::finish() {
  Parts parts;
  while (advance(parts, true)) {
  }
  return parts;
}

bool ReplyParser::pass_until(std::string_view mark, std::string& out, bool last) {
  const size_t at = held_.find(mark);
  if (at != held_.npos) {
    out += held_.substr(0, at);
    held_.erase(0, at + mark.size());
    return true;
  }
  size_t keep = last ? 0 : std::min(mark.size() - 1, held_.size());
  while (keep > 0 && !held_.ends_with(mark.substr(0, keep))) --keep;
  out += held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return false;
}

// Whether the state changed, and there may be more to do.
bool ReplyParser::advance(Parts& parts, bool last) {
  const std::string_view rest = trimmed(held_);
  switch (state_) {
    case State::beginning:
    case State::behind_reasoning:
      if (rest.empty() && !last) return false;
      if (state_ == State::beginning && options_.reasons && !last && think_begin.starts_with(rest) &&
          rest.size() < think_begin.size())
        return false;
      if (state_ == State::beginning && options_.reasons && rest.starts_with(think_begin)) {
        held_.erase(0, held_.find(think_begin) + think_begin.size());
        state_ = State::reasoning;
        return true;
      }
      // Reasoning is followed by line breaks that belong to nobody.
      if (state_ == State::behind_reasoning)
        held_.erase(0, std::min(held_.find_first_not_of("\r\n"), held_.size()));
      state_ = State::content;
      if (options_.tools != nullptr && options_.tools->kind == ToolSyntax::Kind::bare &&
          (rest.starts_with('{') || rest.starts_with('[')))
        state_ = State::bare;
      return true;
    case State::reasoning:
      if (!pass_until(think_end, parts.reasoning, last)) return false;
      state_ = State::behind_reasoning;
      return true;
    case State::content: {
      if (options_.tools == nullptr || options_.tools->kind == ToolSyntax::Kind::bare) {
        parts.content += std::exchange(held_, {});
        return false;
      }
      const std::string_view mark = call_mark(*options_.tools);
      if (!pass_until(mark, parts.content, last)) return false;
      held_.insert(0, mark);
      state_ = State::calls;
      return true;
    }
    case State::calls:
      if (begin_call(parts) || read_call(parts)) return true;
      if (!last) return false;
      if (!trimmed(held_).starts_with(options_.tools->end) || options_.tools->end.empty())
        parts.content += trimmed(held_);
      held_.clear();
      return false;
    case State::arguments:
      return go_on_with_call(parts, last);
    case State::bare:
      return begin_bare(parts, last);
  }
  return false;
}

// -- Calls, their arguments as they come

std::optional<ReplyParser::Head> ReplyParser::read_head(std::string_view text) {
  size_t at = 0;
  const auto pass = [&](std::string_view what) {
    at = std::min(text.find_first_not_of(" \t\r\n", at), text.size());
    if (text.substr(at, what.size()) != what) return false;
    at += what.size();
    return true;
  };
  if (!pass("{") || !pass("\"name\"") || !pass(":") || !pass("\"")) return std::nullopt;
  const size_t end = text.find_first_of("\"\\", at);
  if (end == text.npos || text[end] == '\\' || end == at) return std::nullopt;
  std::string name(text.substr(at, end - at));
  at = end + 1;
  if (!pass(",") || !(pass("\"arguments\"") || pass("\"parameters\"")) || !pass(":") || !pass("{"))
    return std::nullopt;
  return Head{std::move(name), at - 1};
}

size_t ReplyParser::ObjectEnd::pass(std::string_view piece) {
  size_t at = 0;
  for (; at < piece.size() && !ended_; ++at) {
    const char c = piece[at];
    if (in_string_) {
      if (!escaped_ && c == '"') in_string_ = false;
      escaped_ = !escaped_ && c == '\\';
    } else if (c == '"') {
      in_string_ = true;
    } else if (c == '{' || c == '[') {
      ++depth_;
    } else if (c == '}' || c == ']') {
      ended_ = --depth_ <= 0;
    }
  }
  return at;
}

// Takes a call's name and what stands before its arguments from what is held.
bool ReplyParser::begin_call(Parts& parts) {
  const ToolSyntax& tools = *options_.tools;
  const std::string_view call_begin = trimmed(tools.call_begin);
  const size_t begin = held_.find(call_begin);
  if (begin == held_.npos) return false;
  const size_t at = begin + call_begin.size();
  const std::string_view inside = std::string_view(held_).substr(at);
  size_t size = 0;
  std::string name;
  if (tools.kind == ToolSyntax::Kind::named) {
    const std::string_view separator = trimmed(tools.after_name);
    const size_t name_end = inside.find(separator);
    if (name_end == inside.npos) return false;
    name = trimmed(inside.substr(0, name_end));
    size = inside.find_first_not_of(" \t\r\n", name_end + separator.size());
    if (name.empty() || size == inside.npos) return false;
  } else {
    std::optional<Head> head = read_head(inside);
    if (!head) return false;
    name = std::move(head->name);
    size = head->size;
  }
  parts.calls.push_back({std::move(name), ""});
  held_.erase(0, at + size);
  end_ = {};
  state_ = State::arguments;
  return true;
}

// The same of a bare call, which is the whole reply.
bool ReplyParser::begin_bare(Parts& parts, bool last) {
  std::optional<Head> head = read_head(held_);
  const auto called = [&](const Tool& tool) { return tool.name == head->name; };
  if (head && std::any_of(options_.known.begin(), options_.known.end(), called)) {
    parts.calls.push_back({std::move(head->name), ""});
    held_.erase(0, head->size);
    state_ = State::arguments;
    return true;
  }
  if (!last) return false;
  if (!read_bare(parts)) parts.content += held_;
  held_.clear();
  return false;
}

bool ReplyParser::go_on_with_call(Parts& parts, bool last) {
  const ToolSyntax& tools = *options_.tools;
  const bool named = tools.kind == ToolSyntax::Kind::named;
  std::string piece = std::exchange(spaces_, {});
  bool ended = false;
  if (tools.kind == ToolSyntax::Kind::bare) {
    piece += std::exchange(held_, {});
  } else {
    ended = pass_until(trimmed(tools.call_end), piece, false);
  }
  if (!named) piece.resize(end_.pass(piece));
  // White space before the mark is no part of them.
  const size_t size = piece.find_last_not_of(" \t\r\n") + 1;
  if (!ended) spaces_ = piece.substr(size);
  piece.resize(size);
  if (!piece.empty()) parts.calls.push_back({"", std::move(piece)});
  if (ended) state_ = State::calls;
  if (last && !ended) held_.clear();  // what may have been the beginning of the mark
  return ended;
}

// -- Calls in other forms, when they are whole

namespace {

std::optional<ToolCall> call_of(const Json& object) {
  if (!object.is_object() || !object.value("name", Json()).is_string()) return std::nullopt;
  const Json* arguments = field(object, "arguments");
  if (arguments == nullptr) arguments = field(object, "parameters");
  return ToolCall{object["name"].get<std::string>(), arguments == nullptr     ? "{}"
                                                     : arguments->is_string() ? arguments->get<std::string>()
                                                                              : arguments->dump()};
}

}  // namespace

// Takes a whole call from what is held.
bool ReplyParser::read_call(Parts& parts) {
  const ToolSyntax& tools = *options_.tools;
  if (tools.kind == ToolSyntax::Kind::named) return false;
  const std::string_view call_begin = trimmed(tools.call_begin), call_end = trimmed(tools.call_end);
  const size_t begin = held_.find(call_begin);
  if (begin == held_.npos) return false;
  const size_t at = begin + call_begin.size(), end = held_.find(call_end, at);
  if (end == held_.npos) return false;
  const std::string_view inside = std::string_view(held_).substr(at, end - at);
  const std::optional<ToolCall> call = call_of(Json::parse(inside, nullptr, false));
  if (!call || call->name.empty()) return false;
  parts.calls.push_back(*call);
  held_.erase(0, end + call_end.size());
  return true;
}

bool ReplyParser::read_bare(Parts& parts) const {
  const Json reply = Json::parse(trimmed(held_), nullptr, false);
  std::vector<ToolCall> found;
  for (const Json& object : reply.is_array() ? reply : Json::array({reply})) {
    const std::optional<ToolCall> call = call_of(object);
    const auto known = [&](const Tool& tool) { return call && tool.name == call->name; };
    if (std::none_of(options_.known.begin(), options_.known.end(), known)) return false;
    found.push_back(*call);
  }
  parts.calls.insert(parts.calls.end(), found.begin(), found.end());
  return !found.empty();
}

}  // namespace latente
