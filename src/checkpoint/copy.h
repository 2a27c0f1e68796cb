// Moving elements between files and views: conversion, strides, and data that is not aligned.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string>

#include "tensor/view.h"

namespace latente {

// True when elements can be converted: floating to floating, integer to integer (checked for range).
bool convertible(DType from, DType to);

// Calls f(first, count) for runs of consecutive elements, in row-major order; `first` counts elements from
// view.data.
void for_each_run(const View& view, const std::function<void(int64_t first, int64_t count)>& f);

// Contiguous elements at `source`, aligned or not, into a view of any strides. `name` is for messages.
void copy_into(DType from, const std::byte* source, const View& target, const std::string& name);

// The view's elements in row-major order as type `to`, in pieces.
void copy_out(const View& source, DType to, const std::string& name,
              const std::function<void(std::span<const std::byte>)>& sink);

// FP8 codes [R, C] times one scale per block of block_rows x block_columns, into a floating view [R, C]. The
// scales are row-major [., ceil(C / block_columns)]; the first row is the block's row `first_row`.
struct BlockScales {
  std::span<const float> values;
  int64_t block_rows = 128, block_columns = 128, first_row = 0;
};
void dequantize_into(const std::byte* codes, const BlockScales& scales, const View& target);

}  // namespace latente
