#include "serve/chat_history.h"

#include <algorithm>
#include <map>

namespace latente {
namespace {

bool has(const std::string& text, std::string_view part) { return text.find(part) != text.npos; }

Json message(const char* role, Json content) { return {{"role", role}, {"content", std::move(content)}}; }

// Its content stands for nothing if it has calls.
bool calls_alone(const Json& message) {
  return message.contains("tool_calls") && (message["content"].is_null() || message["content"] == "");
}

std::string call_text(const Json& function, const ToolSyntax& syntax) {
  const std::string name = function["name"].get<std::string>(),
                    arguments = function["arguments"].get<std::string>();
  if (syntax.kind == ToolSyntax::Kind::named)
    return syntax.call_begin + name + syntax.after_name + arguments + syntax.call_end;
  return syntax.call_begin + "{\"name\": " + Json(name).dump() + ", \"arguments\": " + arguments + "}" +
         syntax.call_end;
}

std::string calls_text(const Json& calls, const ToolSyntax& syntax) {
  const bool array = syntax.kind == ToolSyntax::Kind::bare && calls.size() > 1;
  std::string text;
  for (const Json& call : calls) {
    if (!text.empty()) text += array ? ", " : "\n";
    text += call_text(call["function"], syntax);
  }
  return array ? "[" + text + "]" : syntax.begin + text + syntax.end;
}

// Results that follow each other, and what the user says behind them, are one message: many templates want
// user and assistant to take turns.
Json as_text(const Json& messages, const ToolSyntax& syntax) {
  Json plain = Json::array();
  std::map<std::string, std::string> names;  // of calls, by id
  bool results = false;                      // the last message is
  for (Json one : messages) {
    if (one.contains("tool_calls")) {
      for (const Json& call : one["tool_calls"])
        names[call.value("id", Json("")).dump()] = call["function"]["name"].get<std::string>();
      const std::string said = calls_alone(one) ? "" : one["content"].get<std::string>() + "\n\n";
      one["content"] = said + calls_text(one["tool_calls"], syntax);
      one.erase("tool_calls");
    }
    const bool result = one["role"] == "tool";
    if (result) {
      const std::string name = names[one.value("tool_call_id", Json("")).dump()];
      one = message("user", fmt::format("{} returned:\n{}", name.empty() ? "The function" : name,
                                        one["content"].get<std::string>()));
    }
    if (results && one["role"] == "user") {
      Json& before = plain.back()["content"];
      before = before.get<std::string>() + "\n\n" + one["content"].get<std::string>();
    } else {
      plain.push_back(std::move(one));
    }
    results = result;
  }
  return plain;
}

}  // namespace

HistoryForm history_form(const std::function<std::optional<std::string>(const Json& messages)>& render) {
  // Mistral's templates take only names of calls that have nine letters and digits.
  const Json call = {{"id", "call12345"},
                     {"type", "function"},
                     {"function", {{"name", "probe"}, {"arguments", R"({"probed": 1})"}}}};
  Json called = message("assistant", nullptr);
  called["tool_calls"] = Json::array({call});
  Json result = message("tool", "the result");
  result["tool_call_id"] = call["id"];
  result["name"] = "probe";
  const Json messages = {message("user", "x"), called, result};

  HistoryForm form;
  form.no_system = !render({message("system", "y"), message("user", "x")});
  const auto said = [&](bool objects, bool no_null) -> std::string {
    form.objects = objects;
    form.no_null = no_null;
    const std::optional<std::string> text = render(in_form(messages, form, {}));
    return text && has(*text, "the result") ? *text : "";
  };
  // JSON is best, Python's way to write an object better than none.
  for (const char* arguments : {R"({"probed": 1})", "probed"}) {
    for (bool no_null : {false, true}) {
      for (bool objects : {true, false}) {
        const std::string text = said(objects, no_null);
        const bool writes_none = !no_null && has(text, "None") && !has(said(objects, true), "None");
        form.no_null = no_null;
        if (has(text, arguments) && !writes_none) return form;
      }
    }
  }
  form.as_text = true;
  return form;
}

Json in_form(Json messages, const HistoryForm& form, const ToolSyntax& syntax) {
  if (form.as_text) return as_text(messages, syntax);
  for (Json& message : messages) {
    if (!message.contains("tool_calls")) continue;
    if (calls_alone(message)) message["content"] = form.no_null ? Json("") : Json();
    if (!form.objects) continue;
    for (Json& call : message["tool_calls"]) {
      Json& arguments = call["function"]["arguments"];
      const Json object = Json::parse(arguments.get<std::string>(), nullptr, false);
      if (object.is_object()) arguments = object;
    }
  }
  return messages;
}

Json with_instructions(Json messages, const Json& tools, const HistoryForm& form, const ToolSyntax& syntax) {
  std::string text = "You may call these functions:\n";
  for (const Json& tool : tools) text += "\n" + tool["function"].dump() + "\n";
  const std::string call = R"({"name": NAME, "arguments": ARGUMENTS})";
  text += "\nTo call one, reply with ";
  switch (syntax.kind) {
    case ToolSyntax::Kind::named:
      text += syntax.begin + syntax.call_begin + "NAME" + syntax.after_name + "ARGUMENTS" + syntax.call_end +
              syntax.end + ", where ARGUMENTS is a JSON object.";
      break;
    case ToolSyntax::Kind::object:
      text += syntax.call_begin + call + syntax.call_end;
      break;
    case ToolSyntax::Kind::bare:
      text += call + " and nothing else.";
  }
  const auto of_user =
      std::find_if(messages.begin(), messages.end(), [](const Json& one) { return one["role"] == "user"; });
  if (messages.front()["role"] == "system") {
    messages.front()["content"] = messages.front()["content"].get<std::string>() + "\n\n" + text;
  } else if (form.no_system && of_user != messages.end()) {
    (*of_user)["content"] = text + "\n\n" + (*of_user)["content"].get<std::string>();
  } else {
    messages.insert(messages.begin(), message("system", text));
  }
  return messages;
}

}  // namespace latente
