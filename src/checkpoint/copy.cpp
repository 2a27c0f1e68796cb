#include "checkpoint/copy.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <vector>

namespace latente {

namespace {

constexpr int64_t piece_size = 1 << 16;  // elements converted at a time: stays in cache

int64_t load_integer(DType type, const std::byte* at) {
  if (type == DType::i64) {
    int64_t value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  if (type == DType::i32) {
    int32_t value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  return static_cast<int64_t>(*at);
}

void store_integer(DType type, std::byte* at, int64_t value, const std::string& name) {
  if (type == DType::i64) {
    std::memcpy(at, &value, sizeof(value));
  } else if (type == DType::i32) {
    if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())
      fail("{}: {} does not fit into {}", name, value, name_of(type));
    int32_t narrow = static_cast<int32_t>(value);
    std::memcpy(at, &narrow, sizeof(narrow));
  } else {
    if (value < 0 || value > 255) fail("{}: {} does not fit into {}", name, value, name_of(type));
    *at = static_cast<std::byte>(value);
  }
}

// `target` is aligned for its type; `source` need not be.
void convert_run(DType from, const std::byte* source, DType to, std::byte* target, int64_t count,
                 const std::string& name) {
  if (count == 0) return;
  if (from == to) {
    std::memcpy(target, source, static_cast<size_t>(count * size_of(from)));
  } else if (!is_floating(from)) {
    for (int64_t i = 0; i < count; ++i)
      store_integer(to, target + i * size_of(to), load_integer(from, source + i * size_of(from)), name);
  } else if (reinterpret_cast<uintptr_t>(source) % static_cast<size_t>(size_of(from)) == 0) {
    convert(from, source, to, target, count);
  } else {
    alignas(8) std::array<std::byte, 4096> aligned;
    int64_t room = static_cast<int64_t>(aligned.size()) / size_of(from);
    for (int64_t done = 0; done < count; done += room) {
      int64_t n = std::min(room, count - done);
      std::memcpy(aligned.data(), source + done * size_of(from), static_cast<size_t>(n * size_of(from)));
      convert(from, aligned.data(), to, target + done * size_of(to), n);
    }
  }
}

void check_convertible(DType from, DType to, const std::string& name) {
  if (!convertible(from, to)) fail("{}: cannot convert {} to {}", name, name_of(from), name_of(to));
}

std::byte* element(const View& view, int64_t index) {
  return static_cast<std::byte*>(view.data) + index * size_of(view.dtype);
}

const std::array<float, 256>& f8e4m3_values() {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> table{};
    for (size_t i = 0; i < table.size(); ++i) {
      f8e4m3 code;
      code.bits = static_cast<uint8_t>(i);
      table[i] = static_cast<float>(code);
    }
    return table;
  }();
  return values;
}

}  // namespace

bool convertible(DType from, DType to) { return is_floating(from) == is_floating(to); }

void for_each_run(const View& view, const std::function<void(int64_t first, int64_t count)>& f) {
  if (view.count() == 0) return;
  // Axes from `inner` on are contiguous together.
  int inner = view.shape.rank();
  int64_t run = 1;
  while (inner > 0 && (view.shape[inner - 1] == 1 || view.stride(inner - 1) == run))
    run *= view.shape[--inner];
  std::array<int64_t, max_rank> index{};
  while (true) {
    int64_t first = 0;
    for (int axis = 0; axis < inner; ++axis) first += index[static_cast<size_t>(axis)] * view.stride(axis);
    f(first, run);
    int axis = inner - 1;
    while (axis >= 0 && ++index[static_cast<size_t>(axis)] == view.shape[axis])
      index[static_cast<size_t>(axis--)] = 0;
    if (axis < 0) return;
  }
}

void copy_into(DType from, const std::byte* source, const View& target, const std::string& name) {
  check_convertible(from, target.dtype, name);
  for_each_run(target, [&](int64_t first, int64_t count) {
    convert_run(from, source, target.dtype, element(target, first), count, name);
    source += count * size_of(from);
  });
}

void copy_out(const View& source, DType to, const std::string& name,
              const std::function<void(std::span<const std::byte>)>& sink) {
  check_convertible(source.dtype, to, name);
  if (source.dtype == to && source.contiguous()) {
    sink({element(source, 0), static_cast<size_t>(source.bytes())});
    return;
  }
  std::vector<double> buffer(static_cast<size_t>(piece_size * size_of(to)) / sizeof(double));
  std::byte* out = reinterpret_cast<std::byte*>(buffer.data());
  int64_t filled = 0;
  auto flush = [&] {
    sink({out, static_cast<size_t>(filled * size_of(to))});
    filled = 0;
  };
  for_each_run(source, [&](int64_t first, int64_t count) {
    for (int64_t done = 0; done < count;) {
      int64_t n = std::min(count - done, piece_size - filled);
      convert_run(source.dtype, element(source, first + done), to, out + filled * size_of(to), n, name);
      done += n;
      filled += n;
      if (filled == piece_size) flush();
    }
  });
  if (filled > 0) flush();
}

void dequantize_into(const std::byte* codes, const BlockScales& scales, const View& target) {
  LATENTE_ASSERT(target.shape.rank() == 2 && is_floating(target.dtype));
  int64_t rows = target[0], columns = target[1];
  int64_t blocks_a_row = (columns + scales.block_columns - 1) / scales.block_columns;
  const std::array<float, 256>& values = f8e4m3_values();
  std::vector<float> row(static_cast<size_t>(columns));
  for (int64_t r = 0; r < rows; ++r) {
    const std::byte* from = codes + r * columns;
    const float* scale = scales.values.data() + (scales.first_row + r) / scales.block_rows * blocks_a_row;
    for (int64_t begin = 0; begin < columns; begin += scales.block_columns, ++scale) {
      int64_t end = std::min(columns, begin + scales.block_columns);
      for (int64_t c = begin; c < end; ++c)
        row[static_cast<size_t>(c)] = values[static_cast<size_t>(from[c])] * *scale;
    }
    View line(element(target, r * target.stride(0)), Shape{columns}, target.dtype);
    line.strides[0] = target.stride(1);
    copy_into(DType::f32, reinterpret_cast<const std::byte*>(row.data()), line, "block scales");
  }
}

}  // namespace latente
