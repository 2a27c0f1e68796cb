// The syntax tree of a template. A Program owns all nodes in two flat lists, so freeing one never recurses.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "tokenizer/jinja_value.h"

namespace latente::jinja {

using FilterFunction = Value (*)(Runtime&, const Value&, const Args&);
using TestFunction = bool (*)(Runtime&, const Value&, const Args&);
FilterFunction find_filter(std::string_view name);  // null when unknown
TestFunction find_test(std::string_view name);

struct Expr;

// Where a variable lives: a slot of the frame of the function (the template or a macro) `hops` levels out.
struct Place {
  int hops = 0, slot = -1;
};

// Jinja decides before rendering which scope each name belongs to. A scope's own variables hold, when it is
// entered: nothing yet (parameters are filled by the statement), nothing, the context's variable, or the
// value that an outer scope's variable has then.
struct Scope {
  enum class Load : uint8_t { parameter, missing, context, outer };
  struct Variable {
    Load load;
    int id, slot;
    Place outer;
  };
  std::vector<Variable> variables;
};

struct CallArgs {
  std::vector<Expr*> positional;
  std::vector<std::pair<std::string, Expr*>> named;
  Expr* star = nullptr;         // *args
  Expr* double_star = nullptr;  // **kwargs
};

struct Expr {
  enum class Kind : uint8_t {
    constant,     // value
    name,         // id
    list,         // items
    tuple,        // items
    dict,         // items: key, value, key, value, ...
    conditional,  // items: condition, then, otherwise or null
    logical_or,   // items
    logical_and,
    logical_not,  // items[0]
    compare,      // items[0] ops[0] items[1] ops[1] ...
    arithmetic,   // likewise, from left to right
    concat,       // items
    negative,     // items[0]
    positive,
    attribute,  // items[0].text
    subscript,  // items[0][items[1]]
    slice,      // items: start, stop, step; null where left out
    call,       // items[0](args)
    filter,     // items[0] or, in a filter block, null | text(args)
    test,       // items[0] is text(args)
    member,     // of a namespace, only as a target: id.text
  };
  Kind kind{};
  int line = 0;
  int id = -1;
  Place place;  // of a name or member
  std::string text;
  Value value;
  std::vector<Expr*> items;
  std::vector<std::string> ops;
  CallArgs args;
  FilterFunction filter = nullptr;
  TestFunction test = nullptr;
};

struct Stmt;
using Block = std::vector<Stmt*>;

struct Signature {
  std::string name;
  std::vector<std::string> names;
  std::vector<int> ids;
  std::vector<Expr*> defaults;  // of the last parameters
  bool uses_caller = false, uses_varargs = false, uses_kwargs = false;
  std::vector<int> slots;  // of the parameters
  int caller = -1, varargs = -1, kwargs = -1;
  size_t frame_size = 0;
  bool captured = false;  // by a macro inside, which may outlive a call
};

struct Stmt {
  enum class Kind : uint8_t {
    data,         // text
    print,        // exprs
    assign,       // target = exprs[0]
    assign_body,  // target = body, through exprs[0], the last of its filters, if given
    loop,         // for target in exprs[0] if exprs[1]: bodies[0], else: bodies[1]; id >= 0: `loop` is used
    branch,       // if exprs[i]: bodies[i] ..., else: the last of bodies
    macro,        // id, signature, bodies[0]
    call,         // exprs[0] a call, signature, bodies[0]
    filter,       // exprs[0], bodies[0]
    with,         // targets = exprs, bodies[0]
    scope,        // bodies[0]
    break_loop,
    continue_loop,
  };
  Kind kind{};
  int line = 0;
  int id = -1;
  Place place;  // of a macro's name, of `loop`
  Value text;
  Expr* target = nullptr;
  std::vector<Expr*> targets;
  std::vector<Expr*> exprs;
  std::vector<Block> bodies;
  std::vector<Scope> scopes;  // of the bodies (not of branches); scopes[2]: of a loop's condition
  Signature signature;
};

class Program {
 public:
  Block root;
  Scope scope;
  size_t frame_size = 0;
  std::vector<std::string> names;  // of the ids

  int id(const std::string& name) {
    auto [found, added] = ids_.try_emplace(name, static_cast<int>(names.size()));
    if (added) names.push_back(name);
    return found->second;
  }
  // -1 when the template never names it.
  int known_id(const std::string& name) const {
    auto found = ids_.find(name);
    return found == ids_.end() ? -1 : found->second;
  }
  Expr* expr(Expr::Kind kind, int line) {
    exprs_.push_back(std::make_unique<Expr>());
    Expr* node = exprs_.back().get();
    node->kind = kind;
    node->line = line;
    return node;
  }
  Stmt* stmt(Stmt::Kind kind, int line) {
    stmts_.push_back(std::make_unique<Stmt>());
    Stmt* node = stmts_.back().get();
    node->kind = kind;
    node->line = line;
    return node;
  }

 private:
  std::unordered_map<std::string, int> ids_;
  std::vector<std::unique_ptr<Expr>> exprs_;
  std::vector<std::unique_ptr<Stmt>> stmts_;
};

}  // namespace latente::jinja
