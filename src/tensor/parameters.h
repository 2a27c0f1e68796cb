// A parameter's name is its path: structs list their members with FIELDS, and walking them gives checkpoint
// names.
#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "base/fields.h"
#include "tensor/tensor.h"

namespace latente {

namespace detail {

template <class T>
inline constexpr bool is_vector = false;
template <class T>
inline constexpr bool is_vector<std::vector<T>> = true;
template <class T>
inline constexpr bool is_variant = false;
template <class... T>
inline constexpr bool is_variant<std::variant<T...>> = true;

}  // namespace detail

// Calls f(path, tensor) for every parameter below `module`; null tensors (absent parts) are skipped.
template <class Module, class F>
void for_each_parameter(Module& module, const std::string& path, F&& f) {
  using Plain = std::remove_const_t<Module>;
  if constexpr (std::is_same_v<Plain, Tensor>) {
    if (module) f(path, module);
  } else if constexpr (detail::is_vector<Plain>) {
    for (size_t i = 0; i < module.size(); ++i)
      for_each_parameter(module[i], path + "." + std::to_string(i), f);
  } else if constexpr (detail::is_variant<Plain>) {
    std::visit([&](auto& alternative) { for_each_parameter(alternative, path, f); }, module);
  } else {
    Plain::visit_fields(module, [&](const char* name, auto& field) {
      for_each_parameter(field, path.empty() ? std::string(name) : path + "." + name, f);
    });
  }
}

}  // namespace latente
