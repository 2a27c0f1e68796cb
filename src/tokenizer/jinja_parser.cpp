#include "tokenizer/jinja_parser.h"

#include <algorithm>

#include "tokenizer/jinja_parser_core.h"
#include "tokenizer/jinja_scopes.h"

namespace latente::jinja {

namespace {

class Parser : public ExpressionParser {
 public:
  using ExpressionParser::ExpressionParser;

  void run() {
    program_.root = body({});
    if (current().kind != TokenKind::end) unexpected("the end of the template");
    if (!unknown_.empty()) syntax_error(unknown_[0].first, unknown_[0].second);
  }

 private:
  using Names = std::initializer_list<std::string_view>;

  // Sets a variable until the scope ends.
  template <class T>
  class Saved {
   public:
    Saved(T& place, T value) : place_(place), old_(place) { place_ = value; }
    ~Saved() { place_ = old_; }
    Saved(const Saved&) = delete;
    Saved& operator=(const Saved&) = delete;

   private:
    T& place_;
    T old_;
  };

  static std::string joined(Names ends) {
    std::string out;
    for (std::string_view end : ends) out += (out.empty() ? "'" : " or '") + std::string(end) + "'";
    return out;
  }

  // Statements up to a tag named in `ends`, whose name is then current; to the end of the template when
  // empty.
  Block body(Names ends) {
    Level level(*this);
    Block out;
    while (current().kind != TokenKind::end) {
      const Token& token = next();
      if (token.kind == TokenKind::data) {
        Stmt* node = program_.stmt(Stmt::Kind::data, token.line);
        node->text = Value::constant(token.text);
        out.push_back(node);
      } else if (token.kind == TokenKind::print_begin) {
        Stmt* node = program_.stmt(Stmt::Kind::print, token.line);
        node->exprs = {tuple({})};
        expect(TokenKind::print_end);
        out.push_back(node);
      } else {
        if (current().kind == TokenKind::name &&
            std::find(ends.begin(), ends.end(), std::string_view(current().text)) != ends.end()) {
          return out;
        }
        out.push_back(statement(ends));
        expect(TokenKind::block_end);
      }
    }
    if (ends.size()) syntax_error(current().line, "Unexpected end of template: expected " + joined(ends));
    return out;
  }

  // The body after a tag's head, through the closing tag's name.
  Block block(Names ends) {
    skip_op(":");
    expect(TokenKind::block_end);
    return body(ends);
  }

  Block whole_block(std::string_view end) {
    Block out = block({end});
    next();
    return out;
  }

  // A body that Jinja compiles in a frame of its own, where unknown filters are errors again.
  Block hard_block(std::string_view end) {
    Saved soft(soft_, false);
    return whole_block(end);
  }

  // A body compiled as a function of its own: a loop outside is out of reach.
  Block function_block(std::string_view end) {
    Saved loops(loops_, 0);
    return hard_block(end);
  }

  Stmt* statement(Names ends) {
    const Token& token = current();
    if (token.kind != TokenKind::name) syntax_error(token.line, "tag name expected");
    const std::string& name = token.text;
    int line = token.line;
    next();
    if (name == "for") return loop(line);
    if (name == "if") return branch(line);
    if (name == "set") return assign(line);
    if (name == "macro") return macro(line);
    if (name == "call") return call_block(line);
    if (name == "filter") return filter_block(line);
    if (name == "with") return with(line);
    if (name == "print") return print(line);
    if (name == "break" || name == "continue") {
      if (loops_ == 0) syntax_error(line, "'" + name + "' outside loop");
      return program_.stmt(name == "break" ? Stmt::Kind::break_loop : Stmt::Kind::continue_loop, line);
    }
    if (name == "generation") {
      Stmt* node = program_.stmt(Stmt::Kind::scope, line);
      node->bodies = {function_block("endgeneration")};
      return node;
    }
    static constexpr std::string_view kUnsupported[] = {"include", "import", "from",
                                                        "extends", "block",  "autoescape"};
    if (std::find(std::begin(kUnsupported), std::end(kUnsupported), name) != std::end(kUnsupported)) {
      syntax_error(line, "the tag '" + name + "' is not supported in chat templates");
    }
    syntax_error(line, "unknown tag '" + name + "'" + (ends.size() ? "; expected " + joined(ends) : ""));
  }

  Stmt* loop(int line) {
    Stmt* node = program_.stmt(Stmt::Kind::loop, line);
    Saved soft(soft_, false);
    node->target = target("in", false);
    expect_name("in");
    node->exprs = {tuple({.with_conditional = false, .end = "recursive"}), nullptr};
    if (skip_name("if")) node->exprs[1] = expression();
    if (current().is_name("recursive")) syntax_error(line, "recursive loops are not supported");
    ++loops_;
    int before = loop_names_;
    node->bodies.push_back(block({"endfor", "else"}));
    if (loop_names_ > before) node->id = program_.id("loop");
    --loops_;
    node->bodies.emplace_back();
    if (next().text == "else") node->bodies[1] = whole_block("endfor");
    return node;
  }

  Stmt* branch(int line) {
    Stmt* node = program_.stmt(Stmt::Kind::branch, line);
    Saved soft(soft_, true);
    while (true) {
      node->exprs.push_back(tuple({.with_conditional = false}));
      node->bodies.push_back(block({"elif", "else", "endif"}));
      const std::string& end = next().text;
      if (end == "elif") continue;
      if (end == "else") node->bodies.push_back(whole_block("endif"));
      return node;
    }
  }

  Stmt* assign(int line) {
    Stmt* node = program_.stmt(Stmt::Kind::assign, line);
    node->target = target({}, true);
    if (skip_op("=")) {
      node->exprs = {tuple({})};
      return node;
    }
    node->kind = Stmt::Kind::assign_body;
    if (current().is_op("|")) node->exprs = {filters(nullptr, false)};
    node->bodies = {hard_block("endset")};
    return node;
  }

  void signature(Signature& out) {
    expect_op("(");
    while (!current().is_op(")")) {
      if (!out.names.empty()) expect_op(",");
      Expr* name = name_target();
      if (std::find(out.names.begin(), out.names.end(), name->text) != out.names.end()) {
        syntax_error(name->line, "duplicate argument '" + name->text + "'");
      }
      out.names.push_back(name->text);
      out.ids.push_back(name->id);
      if (skip_op("=")) {
        out.defaults.push_back(expression());
      } else if (!out.defaults.empty()) {
        syntax_error(name->line, "non-default argument follows default argument");
      }
    }
    expect_op(")");
  }

  Stmt* macro(int line) {
    Stmt* node = program_.stmt(Stmt::Kind::macro, line);
    Expr* name = name_target();
    node->id = name->id;
    node->signature.name = name->text;
    macro_body(
        node, [&] { signature(node->signature); }, "endmacro");
    return node;
  }

  template <class Head>
  void macro_body(Stmt* node, Head head, std::string_view end) {
    macros_.push_back(&node->signature);
    head();
    node->bodies = {function_block(end)};
    macros_.pop_back();
    // A parameter of that name is an ordinary one.
    Signature& made = node->signature;
    auto caller = std::find(made.names.begin(), made.names.end(), "caller");
    if (made.uses_caller && made.names.end() - caller > static_cast<ptrdiff_t>(made.defaults.size())) {
      syntax_error(node->line, "the parameter 'caller' must be omitted or be given a default");
    }
    auto declared = [&](const char* name) {
      return std::find(made.names.begin(), made.names.end(), name) != made.names.end();
    };
    made.uses_caller &= !declared("caller");
    made.uses_varargs &= !declared("varargs");
    made.uses_kwargs &= !declared("kwargs");
  }

  Stmt* call_block(int line) {
    Stmt* node = program_.stmt(Stmt::Kind::call, line);
    node->signature.name = "caller";
    if (current().is_op("(")) signature(node->signature);
    node->exprs = {expression()};
    if (node->exprs[0]->kind != Expr::Kind::call) syntax_error(line, "expected call");
    macro_body(
        node, [] {}, "endcall");
    return node;
  }

  Stmt* filter_block(int line) {
    Stmt* node = program_.stmt(Stmt::Kind::filter, line);
    node->exprs = {filters(nullptr, true)};
    node->bodies = {hard_block("endfilter")};
    return node;
  }

  Stmt* with(int line) {
    Stmt* node = program_.stmt(Stmt::Kind::with, line);
    while (current().kind != TokenKind::block_end) {
      if (!node->targets.empty()) expect_op(",");
      node->targets.push_back(target({}, false));
      expect_op("=");
      node->exprs.push_back(expression());
    }
    node->bodies = {hard_block("endwith")};
    return node;
  }

  Stmt* print(int line) {
    Stmt* node = program_.stmt(Stmt::Kind::print, line);
    while (current().kind != TokenKind::block_end) {
      if (!node->exprs.empty()) expect_op(",");
      node->exprs.push_back(expression());
    }
    return node;
  }

  int loops_ = 0;
};

}  // namespace

std::unique_ptr<const Program> parse(std::string_view source) {
  auto program = std::make_unique<Program>();
  Parser(tokenize(source), *program).run();
  resolve_names(*program);
  return program;
}

}  // namespace latente::jinja
