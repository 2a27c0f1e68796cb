#include "serve/chat_format.h"

#include <algorithm>

#include "grammar/json_schema.h"
#include "serve/chat_history.h"

namespace latente {
namespace {

bool has(std::string_view text, std::string_view part) { return text.find(part) != text.npos; }

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

}  // namespace

std::string_view trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == text.npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t\r\n") + 1 - begin);
}

ChatFormat::ChatFormat(std::string source, std::string bos_token, std::string eos_token)
    : source_(std::move(source)),
      bos_(std::move(bos_token)),
      eos_(std::move(eos_token)),
      template_(source_),
      tools_(syntax_of(source_)),
      reasons_(has(source_, think_end) || has(source_, think_begin)),
      knows_tools_(has(source_, "tools")) {
  const Json tool = {{"type", "function"},
                     {"function",
                      {{"name", "probe"},
                       {"description", ""},
                       {"parameters", {{"type", "object"}, {"properties", Json::object()}}}}}};
  const Json tools = knows_tools_ ? Json::array({tool}) : Json::array();
  history_ = history_form([&](const Json& messages) -> std::optional<std::string> {
    try {
      return render(messages, tools, Json::object());
    } catch (const Error&) {
      return std::nullopt;
    }
  });
}

std::string ChatFormat::render(const Json& messages, const Json& tools, const Json& kwargs) const {
  Json context = kwargs;
  context["messages"] = messages;
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
  Json messages = in_form(request.messages, history_, tools_);
  if (!tools.empty() && !knows_tools_)
    messages = with_instructions(std::move(messages), tools, history_, tools_);
  try {
    return render(messages, tools, request.template_kwargs);
  } catch (const Error& error) {
    throw ApiError(400, error.what(), "messages");
  }
}

std::string_view call_mark(const ToolSyntax& syntax) {
  return trimmed(syntax.begin.empty() ? syntax.call_begin : syntax.begin);
}

bool opens_reasoning(std::string_view prompt) { return trimmed(prompt).ends_with(think_begin); }

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

std::string object_begin(const Tool& tool) {
  return "{\"name\": " + Json(tool.name).dump() + ", \"arguments\": ";
}

// Only where a call is required must its schema be understood.
Expression arguments(Grammar& into, const ChatRequest& chat, const Tool& tool) {
  try {
    return embed(into, schema_grammar(tool.parameters, "tools"));
  } catch (const ApiError&) {
    if (chat.tool_choice.kind == ToolChoice::Kind::required) throw;
    return embed(into, grammar::json_object_grammar());
  }
}

Expression calls(Grammar& into, const ChatRequest& chat, const std::vector<Tool>& tools,
                 const ToolSyntax& syntax) {
  std::vector<Expression> one;
  for (const Tool& tool : tools) {
    if (!chat.tool_choice.name.empty() && tool.name != chat.tool_choice.name) continue;
    const bool named = syntax.kind == ToolSyntax::Kind::named;
    one.push_back(
        sequence({grammar::literal(syntax.call_begin),
                  grammar::literal(named ? tool.name + syntax.after_name : object_begin(tool)),
                  arguments(into, chat, tool), grammar::literal((named ? "" : "}") + syntax.call_end)}));
  }
  const bool several =
      chat.parallel_tool_calls && chat.tool_choice.name.empty() && syntax.kind != ToolSyntax::Kind::bare;
  into.rules.push_back({"call", choice(std::move(one))});
  const Expression call = grammar::call(static_cast<uint32_t>(into.rules.size() - 1));
  Expression more = repeat(sequence({grammar::optional(grammar::literal("\n")), call}), 0, several ? 15 : 0);
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

std::vector<OpenedCall> opened_calls(const ChatRequest& chat, const ToolSyntax& syntax) {
  std::vector<OpenedCall> opened;
  const auto add = [&](std::string_view mark, const std::vector<Tool>& tools) {
    Grammar grammar;
    Expression body = calls(grammar, chat, tools, syntax);
    grammar.root = static_cast<uint32_t>(grammar.rules.size());
    grammar.rules.push_back({"calls", std::move(body)});
    opened.push_back({std::string(mark), std::move(grammar)});
  };
  if (syntax.kind == ToolSyntax::Kind::bare) {
    for (const Tool& tool : chat.tool_list) add(object_begin(tool), {tool});
  } else {
    add(call_mark(syntax), chat.tool_list);
  }
  return opened;
}

std::optional<Grammar> reply_grammar(const ResponseForm& form, const ChatRequest* chat,
                                     const ToolSyntax& syntax, bool reasoning) {
  const bool must_call = chat != nullptr && chat->tool_choice.kind == ToolChoice::Kind::required;
  if (!must_call && form.kind == ResponseForm::Kind::text) return std::nullopt;
  Grammar grammar;
  Expression body = must_call ? calls(grammar, *chat, chat->tool_list, syntax)
                    : form.kind == ResponseForm::Kind::json_schema
                        ? embed(grammar, schema_grammar(form.schema, "response_format"))
                        : embed(grammar, grammar::json_object_grammar());
  if (reasoning) body = sequence({reasoning_text(), std::move(body)});
  grammar.root = static_cast<uint32_t>(grammar.rules.size());
  grammar.rules.push_back({"reply", std::move(body)});
  return grammar;
}

}  // namespace latente
