// FIELDS(a, b, ...) lists a struct's members once; visit_fields(object, f) calls f("a", object.a), ... in order.
// Parameter trees (loading, export, optimizer, initialisation) and option structs (flags, TOML) walk it.
#pragma once

#include <type_traits>

#define LATENTE_PARENS ()
#define LATENTE_EXPAND(...) LATENTE_EXPAND3(LATENTE_EXPAND3(LATENTE_EXPAND3(LATENTE_EXPAND3(__VA_ARGS__))))
#define LATENTE_EXPAND3(...) LATENTE_EXPAND2(LATENTE_EXPAND2(LATENTE_EXPAND2(LATENTE_EXPAND2(__VA_ARGS__))))
#define LATENTE_EXPAND2(...) LATENTE_EXPAND1(LATENTE_EXPAND1(LATENTE_EXPAND1(LATENTE_EXPAND1(__VA_ARGS__))))
#define LATENTE_EXPAND1(...) __VA_ARGS__

#define LATENTE_FIELD_EACH(...) __VA_OPT__(LATENTE_EXPAND(LATENTE_FIELD_STEP(__VA_ARGS__)))
#define LATENTE_FIELD_STEP(field, ...) \
  visitor(#field, self.field);         \
  __VA_OPT__(LATENTE_FIELD_AGAIN LATENTE_PARENS(__VA_ARGS__))
#define LATENTE_FIELD_AGAIN() LATENTE_FIELD_STEP

#define FIELDS(...)                                       \
  template <class Self, class Visitor>                    \
  static void visit_fields(Self& self, Visitor&& visitor) { \
    LATENTE_FIELD_EACH(__VA_ARGS__)                       \
  }

namespace latente {

template <class T>
concept HasFields = requires(T& object) { T::visit_fields(object, [](const char*, auto&) {}); };

template <class T, class Visitor>
void visit_fields(T& object, Visitor&& visitor) {
  std::remove_const_t<T>::visit_fields(object, visitor);
}

}  // namespace latente
