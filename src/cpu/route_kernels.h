// What the vector code of route.cpp works on.
#pragma once

#include "cpu/rows.h"
#include "tensor/backend.h"

namespace latente {

template <class T>
struct Router {
  View logits, scores;  // [T, E]
  const T* bias;        // [E] or null
  const T* mask;        // [T] or null
  T* weights;           // [T, K]
  int32_t* experts;     // [T, K]
  Routing routing;
};

template <class T>
struct RouterGradient {
  const T* d_weights;  // [T, K] or null
  View scores;
  const T* weights;
  const int32_t* experts;
  const T* mask;
  Routing routing;
  Grad d_logits;
};

// What one thread needs to choose experts.
template <class T>
struct RouteScratch {
  T* selection;       // [E]
  T* values;          // [max(K, groups)]
  int32_t* group;     // [groups]
  uint8_t* in_reach;  // [groups]
};

}  // namespace latente
