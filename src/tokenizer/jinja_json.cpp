// json.dumps.
#include <algorithm>
#include <cmath>

#include "tokenizer/jinja_operations.h"
#include "tokenizer/jinja_text.h"

namespace latente::jinja {

namespace {

class Writer {
 public:
  Writer(Runtime& runtime, const JsonStyle& style) : runtime_(runtime), style_(style) {}

  std::string take() { return std::move(out_); }

  void write(const Value& value) {
    Nested nested(runtime_);
    runtime_.step();
    switch (value.type()) {
      case Type::none:
      case Type::boolean:
      case Type::integer:
      case Type::real:
        out_ += scalar(value);
        break;
      case Type::string:
        text(value.string());
        break;
      case Type::dict:
        dict(value.dict());
        break;
      case Type::sequence:
        if (value.sequence().kind == Sequence::Kind::list || value.sequence().kind == Sequence::Kind::tuple) {
          list(value.sequence().items);
          break;
        }
        [[fallthrough]];
      default:
        runtime_.fail("Object of type {} is not JSON serializable", type_name(value));
    }
  }

 private:
  static std::string scalar(const Value& value) {
    if (value.is(Type::none)) return "null";
    if (value.is(Type::boolean)) return value.as_boolean() ? "true" : "false";
    if (value.is(Type::integer)) return integer_text(value.as_integer());
    double real = value.as_real();
    if (std::isnan(real)) return "NaN";
    if (std::isinf(real)) return real > 0 ? "Infinity" : "-Infinity";
    return format_real(real);
  }

  void text(std::string_view bytes) {
    runtime_.reserve_text(bytes.size());
    out_ += quote_json(bytes, style_.ensure_ascii);
    runtime_.check_text(out_.size());
  }

  void new_line() {
    if (!style_.indent) return;
    runtime_.work(style_.indent->size() * level_);
    runtime_.check_text(out_.size());
    out_ += '\n';
    for (size_t i = 0; i < level_; ++i) out_ += *style_.indent;
  }

  template <class Entries, class Write>
  void enclosed(char open, char close, const Entries& entries, Write write_entry) {
    out_ += open;
    ++level_;
    bool first = true;
    for (const auto& entry : entries) {
      if (!first) out_ += style_.item_separator;
      first = false;
      new_line();
      write_entry(entry);
    }
    --level_;
    if (!first) new_line();
    out_ += close;
  }

  void list(const std::vector<Value>& items) {
    enclosed('[', ']', items, [&](const Value& item) { write(item); });
  }

  void dict(const Dict& dict) {
    auto entries = dict.entries;
    if (style_.sort_keys) {
      std::stable_sort(entries.begin(), entries.end(), [&](const auto& a, const auto& b) {
        return compare(runtime_, a.first, b.first, "<") == Order::less;
      });
    }
    enclosed('{', '}', entries, [&](const auto& entry) {
      const Value& key = entry.first;
      if (key.is(Type::string)) {
        text(key.string());
      } else if (key.is(Type::none) || key.is_number()) {
        text(scalar(key));
      } else {
        runtime_.fail("keys must be str, int, float, bool or None, not {}", type_name(key));
      }
      out_ += style_.key_separator;
      write(entry.second);
    });
  }

  Runtime& runtime_;
  const JsonStyle& style_;
  std::string out_;
  size_t level_ = 0;
};

}  // namespace

std::string to_json(Runtime& runtime, const Value& value, const JsonStyle& style) {
  Writer writer(runtime, style);
  writer.write(value);
  return writer.take();
}

}  // namespace latente::jinja
