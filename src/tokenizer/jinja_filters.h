// Filters on sequences and mappings (jinja_collections.cpp), for the table in jinja_filters.cpp.
#pragma once

#include "tokenizer/jinja_value.h"

namespace latente::jinja::filters {

using Filter = Value(Runtime&, const Value&, const Args&);
Filter default_value, dict_sort, first, items, join, last, length, list, map, max, min, reject, reject_attr,
    reverse, select, select_attr, sort, sum, unique;

}  // namespace latente::jinja::filters
