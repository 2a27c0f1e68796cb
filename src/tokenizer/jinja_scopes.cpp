// A scope is first read as a whole, nested scopes left out, to find the names that it assigns or reads; then
// its names get their places and the nested scopes follow. So a name that is assigned anywhere in a scope is
// that scope's own from its start, as in jinja2.
#include "tokenizer/jinja_scopes.h"

#include "tokenizer/jinja_lexer.h"

namespace latente::jinja {

namespace {

using Load = Scope::Load;

struct Function {
  int slots = 0;
  bool captured = false;
};

struct Symbols {
  const Symbols* parent;
  Function* function;
  Scope* scope;
  std::unordered_map<int, int> slots = {};  // of the names
};

class Resolver {
 public:
  explicit Resolver(Program& program) : program_(program), loop_(program.known_id("loop")) {}

  void run() {
    Function function;
    Symbols symbols{nullptr, &function, &program_.scope};
    body(symbols, program_.root);
    program_.frame_size = static_cast<size_t>(function.slots);
  }

 private:
  static Place find(const Symbols* symbols, int id) {
    Place place;
    for (; symbols; symbols = symbols->parent) {
      auto found = symbols->slots.find(id);
      if (found != symbols->slots.end()) {
        place.slot = found->second;
        return place;
      }
      place.hops += symbols->parent && symbols->parent->function != symbols->function;
    }
    return {};
  }

  static int define(Symbols& symbols, int id, Load load, Place outer = {}) {
    auto [found, added] = symbols.slots.try_emplace(id, symbols.function->slots);
    if (added) symbols.scope->variables.push_back({load, id, symbols.function->slots++, outer});
    return found->second;
  }

  static int parameter(Symbols& symbols, int id) { return define(symbols, id, Load::parameter); }

  // An assignment that may not happen leaves the name with the context's value.
  void store(Symbols& symbols, int id, bool maybe) {
    if (symbols.slots.contains(id)) return;
    Place outer = find(&symbols, id);
    define(symbols, id, outer.slot >= 0 ? Load::outer : maybe ? Load::context : Load::missing, outer);
  }

  static void load(Symbols& symbols, int id) {
    if (find(&symbols, id).slot < 0) define(symbols, id, Load::context);
  }

  // Calls visit for every name in the expression. Without recursion: a chain of operators nests deeply.
  template <class Visit>
  static void each_name(Expr* root, Visit visit) {
    std::vector<Expr*> left = {root};
    while (!left.empty()) {
      Expr* node = left.back();
      left.pop_back();
      if (!node) continue;
      if (node->kind == Expr::Kind::name || node->kind == Expr::Kind::member) visit(node);
      left.insert(left.end(), node->items.begin(), node->items.end());
      left.insert(left.end(), node->args.positional.begin(), node->args.positional.end());
      for (auto& [name, value] : node->args.named) left.push_back(value);
      left.push_back(node->args.star);
      left.push_back(node->args.double_star);
    }
  }

  static void read(Symbols& symbols, Expr* expr) {
    each_name(expr, [&](Expr* node) { load(symbols, node->id); });
  }

  static void place(const Symbols& symbols, Expr* expr) {
    each_name(expr, [&](Expr* node) { node->place = find(&symbols, node->id); });
  }

  void assign(Symbols& symbols, Expr* target, bool maybe) {
    each_name(target, [&](Expr* node) {
      if (node->kind == Expr::Kind::member) {
        load(symbols, node->id);
      } else {
        if (node->id == loop_ && loops_ > 0) {
          syntax_error(node->line, "Can't assign to special loop variable in for-loop target");
        }
        store(symbols, node->id, maybe);
      }
    });
  }

  void survey(Symbols& symbols, const Block& block, bool maybe) {
    for (Stmt* node : block) {
      switch (node->kind) {
        case Stmt::Kind::branch:
          for (size_t i = 0; i < node->bodies.size(); ++i) {
            if (i < node->exprs.size()) read(symbols, node->exprs[i]);
            survey(symbols, node->bodies[i], true);
          }
          break;
        case Stmt::Kind::loop:
          read(symbols, node->exprs[0]);
          break;
        case Stmt::Kind::macro:
          store(symbols, node->id, maybe);
          break;
        case Stmt::Kind::assign:
        case Stmt::Kind::assign_body:
          if (node->kind == Stmt::Kind::assign) read(symbols, node->exprs[0]);
          assign(symbols, node->target, maybe);
          break;
        default:
          for (Expr* expr : node->exprs) read(symbols, expr);
      }
    }
  }

  void body(Symbols& symbols, const Block& block) {
    survey(symbols, block, false);
    settle(symbols, block);
  }

  void settle(Symbols& symbols, const Block& block) {
    for (Stmt* node : block) statement(symbols, node);
  }

  void statement(Symbols& symbols, Stmt* node) {
    using Kind = Stmt::Kind;
    node->scopes.resize(node->kind == Kind::loop ? 3 : 1);
    Symbols inner{&symbols, symbols.function, &node->scopes[0]};
    switch (node->kind) {
      case Kind::branch:
        for (Expr* expr : node->exprs) place(symbols, expr);
        for (const Block& block : node->bodies) settle(symbols, block);
        break;
      case Kind::loop:
        loop(symbols, inner, node);
        break;
      case Kind::macro:
        node->place = find(&symbols, node->id);
        macro(symbols, node);
        break;
      case Kind::call:
        place(symbols, node->exprs[0]);
        macro(symbols, node);
        break;
      case Kind::assign_body:
      case Kind::filter:
        if (node->target) place(symbols, node->target);
        survey(inner, node->bodies[0], false);
        for (Expr* expr : node->exprs) {
          read(inner, expr);
          place(inner, expr);
        }
        settle(inner, node->bodies[0]);
        break;
      case Kind::with:
        for (Expr* expr : node->exprs) place(symbols, expr);
        for (Expr* target : node->targets) {
          declare(inner, target);
        }
        body(inner, node->bodies[0]);
        break;
      case Kind::scope:
        body(inner, node->bodies[0]);
        break;
      default:
        for (Expr* expr : node->exprs) place(symbols, expr);
        if (node->target) place(symbols, node->target);
    }
  }

  static void declare(Symbols& symbols, Expr* target) {
    each_name(target, [&](Expr* name) { name->place = {0, parameter(symbols, name->id)}; });
  }

  void loop(Symbols& symbols, Symbols& inner, Stmt* node) {
    place(symbols, node->exprs[0]);
    ++loops_;
    if (node->id >= 0) node->place = {0, parameter(inner, node->id)};
    each_name(node->target, [&](Expr* name) {
      if (name->id == loop_)
        syntax_error(name->line, "Can't assign to special loop variable in for-loop target");
    });
    declare(inner, node->target);
    body(inner, node->bodies[0]);
    Symbols otherwise{&symbols, symbols.function, &node->scopes[1]};
    body(otherwise, node->bodies[1]);
    if (node->exprs[1]) {
      // The condition sees the loop's targets, but not what the body assigns.
      Symbols test{&symbols, symbols.function, &node->scopes[2]};
      each_name(node->target, [&](Expr* name) { test.slots.emplace(name->id, name->place.slot); });
      read(test, node->exprs[1]);
      place(test, node->exprs[1]);
    }
    --loops_;
  }

  void macro(Symbols& symbols, Stmt* node) {
    symbols.function->captured = true;
    Function function;
    Symbols inner{&symbols, &function, &node->scopes[0]};
    Signature& made = node->signature;
    for (int id : made.ids) made.slots.push_back(parameter(inner, id));
    if (made.uses_caller) made.caller = parameter(inner, program_.id("caller"));
    if (made.uses_kwargs) made.kwargs = parameter(inner, program_.id("kwargs"));
    if (made.uses_varargs) made.varargs = parameter(inner, program_.id("varargs"));
    for (Expr* expr : made.defaults) read(inner, expr);
    survey(inner, node->bodies[0], false);
    for (Expr* expr : made.defaults) place(inner, expr);
    settle(inner, node->bodies[0]);
    made.frame_size = static_cast<size_t>(function.slots);
    made.captured = function.captured;
  }

  Program& program_;
  int loop_;
  int loops_ = 0;
};

}  // namespace

void resolve_names(Program& program) { Resolver(program).run(); }

}  // namespace latente::jinja
