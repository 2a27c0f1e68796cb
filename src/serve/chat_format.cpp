#include "serve/chat_format.h"

#include <algorithm>

#include "grammar/json_schema.h"

namespace latente {
namespace {

constexpr std::string_view open_mark = "<think>", close_mark = "</think>";

bool has(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

std::string_view trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == text.npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t\r\n") + 1 - begin);
}

// The formats of the models' own templates: DeepSeek-V3 and R1; V3.1; Hermes and Qwen.
ToolSyntax syntax_of(std::string_view source) {
  if (has(source, "<｜tool▁call▁begin｜>")) {
    if (has(source, "```json"))
      return {
          ToolSyntax::Kind::named, "<｜tool▁calls▁begin｜>",   "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
          "\n```json\n",           "\n```<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"};
    return {ToolSyntax::Kind::named, "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",        "<｜tool▁call▁end｜>",    "<｜tool▁calls▁end｜>"};
  }
  if (has(source, "<tool_call>"))
    return {.kind = ToolSyntax::Kind::object, .call_begin = "<tool_call>\n", .call_end = "\n</tool_call>"};
  return {};
}

// For templates that say nothing of tools.
std::string instructions(const Json& tools, const ToolSyntax& syntax) {
  std::string text = "You may call these functions:\n";
  for (const Json& tool : tools) text += "\n" + tool["function"].dump() + "\n";
  const std::string call = R"({"name": NAME, "arguments": ARGUMENTS})";
  text += "\nTo call one, reply with ";
  switch (syntax.kind) {
    case ToolSyntax::Kind::named:
      return text + syntax.begin + syntax.call_begin + "NAME" + syntax.after_name + "ARGUMENTS" +
             syntax.call_end + syntax.end + ", where ARGUMENTS is a JSON object.";
    case ToolSyntax::Kind::object:
      return text + syntax.call_begin + call + syntax.call_end;
    case ToolSyntax::Kind::bare:
      return text + call + " and nothing else.";
  }
  return text;
}

Json with_instructions(Json messages, const std::string& text) {
  if (messages.front()["role"] == "system") {
    messages.front()["content"] = messages.front()["content"].get<std::string>() + "\n\n" + text;
  } else {
    messages.insert(messages.begin(), Json{{"role", "system"}, {"content", text}});
  }
  return messages;
}

Json with_objects(Json messages) {
  for (Json& message : messages) {
    if (!message.contains("tool_calls")) continue;
    for (Json& call : message["tool_calls"]) {
      Json& arguments = call["function"]["arguments"];
      const Json object = Json::parse(arguments.get<std::string>(), nullptr, false);
      if (object.is_object()) arguments = object;
    }
  }
  return messages;
}

}  // namespace

ChatFormat::ChatFormat(std::string source, std::string bos_token, std::string eos_token)
    : source_(std::move(source)),
      bos_(std::move(bos_token)),
      eos_(std::move(eos_token)),
      template_(source_),
      tools_(syntax_of(source_)),
      reasons_(has(source_, close_mark) || has(source_, open_mark)),
      knows_tools_(has(source_, "tools")) {
  // Does a call come out as JSON if its arguments are an object?
  const Json call = {
      {"id", "call"}, {"type", "function"}, {"function", {{"name", "probe"}, {"arguments", R"({"a": 1})"}}}};
  const Json messages = {{{"role", "user"}, {"content", "x"}},
                         {{"role", "assistant"}, {"content", nullptr}, {"tool_calls", Json::array({call})}}};
  try {
    objects_ = has(render(messages, {}, Json::object(), true), R"({"a": 1})");
  } catch (const Error&) {
  }
}

std::string ChatFormat::render(const Json& messages, const Json& tools, const Json& kwargs,
                               bool objects) const {
  Json context = kwargs;
  context["messages"] = objects ? with_objects(messages) : messages;
  context["tools"] = tools.empty() ? Json() : tools;
  context["add_generation_prompt"] = true;
  context["bos_token"] = bos_;
  context["eos_token"] = eos_;
  ChatTemplate::Limits limits;
  limits.seconds = 2;
  return template_.render(context, limits);
}

std::string ChatFormat::prompt(const ChatRequest& request) const {
  const bool may_call = request.tool_choice.kind != ToolChoice::Kind::none;
  const Json tools = may_call ? request.tools : Json::array();
  const bool tell = !tools.empty() && !knows_tools_;
  try {
    return render(tell ? with_instructions(request.messages, instructions(tools, tools_)) : request.messages,
                  tools, request.template_kwargs, objects_);
  } catch (const Error& error) {
    throw ApiError(400, error.what(), "messages");
  }
}

bool opens_reasoning(std::string_view prompt) { return trimmed(prompt).ends_with(open_mark); }

// -- What a reply must be

namespace {

using grammar::choice;
using grammar::Expression;
using grammar::Grammar;
using grammar::repeat;
using grammar::sequence;

void shift(Expression& expression, uint32_t by) {
  if (expression.kind == Expression::Kind::rule) expression.rule += by;
  for (Expression& part : expression.parts) shift(part, by);
}

// Another grammar's root, its rules behind those of `into`.
Expression embed(Grammar& into, Grammar other) {
  const auto offset = static_cast<uint32_t>(into.rules.size());
  for (Grammar::Rule& rule : other.rules) {
    shift(rule.body, offset);
    into.rules.push_back(std::move(rule));
  }
  return grammar::call(other.root + offset);
}

Grammar schema_grammar(const std::string& schema, const std::string& param) {
  try {
    return grammar::parse_json_schema(schema, param);
  } catch (const Error& error) {
    throw ApiError(400, error.what(), param);
  }
}

Expression object_call(Grammar& into, const Tool& tool) {
  return sequence({grammar::literal("{\"name\": " + Json(tool.name).dump() + ", \"arguments\": "),
                   embed(into, schema_grammar(tool.parameters, "tools")), grammar::literal("}")});
}

Expression calls(Grammar& into, const ChatRequest& chat, const ToolSyntax& syntax) {
  std::vector<Expression> one;
  for (const Tool& tool : chat.tool_list) {
    if (!chat.tool_choice.name.empty() && tool.name != chat.tool_choice.name) continue;
    if (syntax.kind == ToolSyntax::Kind::named) {
      one.push_back(sequence({grammar::literal(syntax.call_begin + tool.name + syntax.after_name),
                              embed(into, schema_grammar(tool.parameters, "tools")),
                              grammar::literal(syntax.call_end)}));
    } else if (syntax.kind == ToolSyntax::Kind::object) {
      one.push_back(sequence(
          {grammar::literal(syntax.call_begin), object_call(into, tool), grammar::literal(syntax.call_end)}));
    } else {
      one.push_back(object_call(into, tool));
    }
  }
  const bool several =
      chat.parallel_tool_calls && chat.tool_choice.name.empty() && syntax.kind != ToolSyntax::Kind::bare;
  into.rules.push_back({"call", choice(std::move(one))});
  const Expression call = grammar::call(static_cast<uint32_t>(into.rules.size() - 1));
  Expression more = repeat(sequence({grammar::literal("\n"), call}), 0, several ? 15 : 0);
  return sequence({grammar::literal(syntax.begin), call, std::move(more), grammar::literal(syntax.end)});
}

// Anything up to </think>, and line breaks behind it. Of texts with "</" in them only that one.
Expression reasoning_text() {
  grammar::CharSet angle{{'<', '<'}}, slash{{'<', '<'}, {'/', '/'}};
  const Expression angles = repeat(one_of(angle), 1, Expression::unlimited);
  Expression inside = choice({one_of(angle.complement()), sequence({angles, one_of(slash.complement())})});
  return sequence({repeat(std::move(inside), 0, Expression::unlimited), angles, grammar::literal("/think>"),
                   repeat(grammar::literal("\n"), 0, 2)});
}

}  // namespace

std::optional<Grammar> reply_grammar(const ResponseForm& form, const ChatRequest* chat,
                                     const ToolSyntax& syntax, bool reasoning) {
  const bool must_call = chat != nullptr && chat->tool_choice.kind == ToolChoice::Kind::required;
  if (!must_call && form.kind == ResponseForm::Kind::text) return std::nullopt;
  Grammar grammar;
  Expression body = must_call ? calls(grammar, *chat, syntax)
                    : form.kind == ResponseForm::Kind::json_schema
                        ? embed(grammar, schema_grammar(form.schema, "response_format"))
                        : embed(grammar, grammar::json_object_grammar());
  if (reasoning) body = sequence({reasoning_text(), std::move(body)});
  grammar.root = static_cast<uint32_t>(grammar.rules.size());
  grammar.rules.push_back({"reply", std::move(body)});
  return grammar;
}

// -- What a reply was

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
      if (state_ == State::beginning && options_.reasons && !last && open_mark.starts_with(rest) &&
          rest.size() < open_mark.size())
        return false;
      if (state_ == State::beginning && options_.reasons && rest.starts_with(open_mark)) {
        held_.erase(0, held_.find(open_mark) + open_mark.size());
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
      if (!pass_until(close_mark, parts.reasoning, last)) return false;
      state_ = State::behind_reasoning;
      return true;
    case State::content: {
      if (options_.tools == nullptr || options_.tools->kind == ToolSyntax::Kind::bare) {
        parts.content += std::exchange(held_, {});
        return false;
      }
      // The line break behind <tool_call> is the model's choice.
      const ToolSyntax& tools = *options_.tools;
      const std::string_view mark =
          tools.begin.empty() ? trimmed(tools.call_begin) : std::string_view(tools.begin);
      if (!pass_until(mark, parts.content, last)) return false;
      held_.insert(0, mark);
      state_ = State::calls;
      return true;
    }
    case State::calls:
      if (read_call(parts)) return true;
      if (!last) return false;
      if (!trimmed(held_).starts_with(options_.tools->end) || options_.tools->end.empty())
        parts.content += trimmed(held_);
      held_.clear();
      return false;
    case State::bare:
      if (!last) return false;
      if (!read_bare(parts)) parts.content += held_;
      held_.clear();
      return false;
  }
  return false;
}

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
  const std::string_view call_begin = trimmed(tools.call_begin), call_end = trimmed(tools.call_end);
  const size_t begin = held_.find(call_begin);
  if (begin == held_.npos) return false;
  const size_t at = begin + call_begin.size(), end = held_.find(call_end, at);
  if (end == held_.npos) return false;
  const std::string_view inside = std::string_view(held_).substr(at, end - at);
  if (tools.kind == ToolSyntax::Kind::named) {
    const std::string_view separator = trimmed(tools.after_name);
    const size_t name_end = inside.find(separator);
    if (name_end == inside.npos) return false;
    parts.calls.push_back({std::string(trimmed(inside.substr(0, name_end))),
                           std::string(trimmed(inside.substr(name_end + separator.size())))});
  } else {
    const std::optional<ToolCall> call = call_of(Json::parse(inside, nullptr, false));
    if (!call) return false;
    parts.calls.push_back(*call);
  }
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
