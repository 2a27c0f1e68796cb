#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace latente::cuda {
namespace {

constexpr int threads = 256;

// Views of one shape as rows of `width` elements that are contiguous in each of them.
struct Rows {
  unsigned extents[3] = {1, 1, 1};  // of the axes before
  int64_t width = 1;

  int64_t count() const { return int64_t{1} * extents[0] * extents[1] * extents[2] * width; }
};

// The element (or pack) that a thread is at.
struct Place {
  unsigned row[3];
  int64_t column;
};

template <class T>
struct Operand {
  T* data = nullptr;
  int64_t strides[3] = {};

  __device__ T* at(const Place& place) const {
    return data + place.row[0] * strides[0] + place.row[1] * strides[1] + place.row[2] * strides[2] +
           place.column;
  }
};

// Merges axes as far as every view allows; `operands` get each view's strides.
Rows rows_of(std::initializer_list<View> views, std::initializer_list<int64_t*> strides) {
  const Shape& shape = views.begin()->shape;
  const int rank = shape.rank();
  for (const View& view : views) LATENTE_ASSERT(view.shape == shape);
  auto all = [&](auto&& holds) { return std::all_of(views.begin(), views.end(), holds); };
  Rows rows;
  int axis = rank - 1;
  for (; axis >= 0; --axis) {
    const bool merges = all([&](const View& view) { return view.stride(axis) == rows.width; });
    if (!merges && shape[axis] != 1) break;
    rows.width *= shape[axis];
  }
  int place = 2;  // among extents
  for (int inner = -1; axis >= 0; --axis) {
    if (shape[axis] == 1) continue;
    const bool merges = inner >= 0 && all([&](const View& view) {
                          return view.stride(axis) == view.stride(inner) * rows.extents[place];
                        });
    if (merges) {
      rows.extents[place] *= static_cast<unsigned>(shape[axis]);
      continue;
    }
    place -= inner >= 0 ? 1 : 0;
    inner = axis;
    LATENTE_ASSERT(place >= 0);
    rows.extents[place] = static_cast<unsigned>(shape[axis]);
    auto to = strides.begin();
    for (const View& view : views) (*to++)[place] = view.stride(axis);
  }
  return rows;
}

template <int N, class Op>
__global__ __launch_bounds__(threads) void elements_kernel(Rows rows, unsigned packs, Op op) {
  wait_for_earlier_kernels();
  const unsigned index = blockIdx.x * threads + threadIdx.x;
  if (index >= packs) return;
  const unsigned width = static_cast<unsigned>(rows.width / N);
  const unsigned row = index / width, outer = row / rows.extents[2];
  const Place place{{outer / rows.extents[1], outer % rows.extents[1], row % rows.extents[2]},
                    static_cast<int64_t>(index - row * width) * N};
  op.template run<N>(place);
}

template <int N, class Op>
void launch(const Rows& rows, const Op& op, const char* name, const Context& context) {
  const int64_t packs = rows.count() / N;
  LATENTE_ASSERT(packs < (int64_t{1} << 31));
  if (packs == 0) return;
  launch_early(elements_kernel<N, Op>, blocks_for(packs, threads), threads, 0, name, context, rows,
               static_cast<unsigned>(packs), op);
}

// In packs where all views allow it. Merged rows are as wide as they are.
template <class Op>
void launch_widest(const Rows& rows, const Op& op, std::initializer_list<View> views, const char* name,
                   const Context& context) {
  if (rows.width % wide == 0 && in_packs(wide, views)) {
    launch<wide>(rows, op, name, context);
  } else {
    launch<1>(rows, op, name, context);
  }
}

template <class T>
struct Fill {
  Operand<T> x;
  T value;

  template <int N>
  __device__ void run(const Place& place) const {
    Pack<T, N> pack;
    for (int i = 0; i < N; ++i) pack.at[i] = value;
    *reinterpret_cast<Pack<T, N>*>(x.at(place)) = pack;
  }
};

template <class T>
void fill_with(const View& x, T value, const Context& context) {
  Fill<T> op{{static_cast<T*>(x.data)}, value};
  const Rows rows = rows_of({x}, {op.x.strides});
  launch_widest(rows, op, {x}, "fill", context);
}

// Of one type: bits.
template <class T>
struct Move {
  Operand<const T> from;
  Operand<T> to;

  template <int N>
  __device__ void run(const Place& place) const {
    *reinterpret_cast<Pack<T, N>*>(to.at(place)) = *reinterpret_cast<const Pack<T, N>*>(from.at(place));
  }
};

template <class T>
void move(const View& from, const View& to, const Context& context) {
  Move<T> op{{static_cast<const T*>(from.data)}, {static_cast<T*>(to.data)}};
  const Rows rows = rows_of({from, to}, {op.from.strides, op.to.strides});
  launch_widest(rows, op, {from, to}, "copy", context);
}

template <class From, class To>
struct Convert {
  Operand<const From> from;
  Operand<To> to;
  bool accumulate;

  template <int N>
  __device__ void run(const Place& place) const {
    float x[N];
    load<N>(from.at(place), x);
    put<N>(accumulate, x, to.at(place));
  }
};

template <class T>
struct Add {
  Operand<const T> a, b;
  Operand<T> out;

  template <int N>
  __device__ void run(const Place& place) const {
    float x[N], y[N];
    load<N>(a.at(place), x);
    load<N>(b.at(place), y);
    for (int i = 0; i < N; ++i) x[i] += y[i];
    store<N>(x, out.at(place));
  }
};

template <class T>
struct SwiGlu {
  Operand<const T> gate, up;
  Operand<T> out;

  template <int N>
  __device__ void run(const Place& place) const {
    float g[N], u[N];
    load<N>(gate.at(place), g);
    load<N>(up.at(place), u);
    for (int i = 0; i < N; ++i) u[i] = swiglu_of(g[i], u[i]);
    store<N>(u, out.at(place));
  }
};

template <class T>
struct SwiGluBackward {
  Operand<const T> d_out, gate, up;
  Operand<T> d_gate, d_up;
  bool add_gate, add_up;

  template <int N>
  __device__ void run(const Place& place) const {
    float d[N], g[N], u[N];
    load<N>(d_out.at(place), d);
    load<N>(gate.at(place), g);
    load<N>(up.at(place), u);
    for (int i = 0; i < N; ++i) swiglu_backward_of(d[i], g[i], u[i]);
    if (d_gate.data) put<N>(add_gate, g, d_gate.at(place));
    if (d_up.data) put<N>(add_up, u, d_up.at(place));
  }
};

template <class T>
struct Finite {
  Operand<const T> x;
  int32_t* flag;

  template <int N>
  __device__ void run(const Place& place) const {
    float v[N];
    load<N>(x.at(place), v);
    for (int i = 0; i < N; ++i) {
      if (!isfinite(v[i])) *flag = 0;
    }
  }
};

}  // namespace

void fill(View x, double value, const Context& context) {
  switch (x.dtype) {
    case DType::f64:
      return fill_with(x, value, context);
    case DType::f32:
      return fill_with(x, static_cast<float>(value), context);
    case DType::bf16:
      return fill_with(x, bf16(static_cast<float>(value)).bits, context);
    case DType::f16:
      return fill_with(x, f16(static_cast<float>(value)).bits, context);
    case DType::f8e4m3:
      return fill_with(x, f8e4m3(static_cast<float>(value)).bits, context);
    case DType::i64:
      return fill_with(x, static_cast<int64_t>(value), context);
    case DType::i32:
      return fill_with(x, static_cast<int32_t>(value), context);
    case DType::u8:
      return fill_with(x, static_cast<uint8_t>(value), context);
    case DType::q8:
    case DType::q4:
    case DType::q4m:
      LATENTE_ASSERT(false);
  }
}

void copy(View from, Grad to, const Context& context) {
  if (from.dtype == to.view.dtype && !to.accumulate) {
    switch (size_of(from.dtype)) {
      case 1:
        return move<uint8_t>(from, to.view, context);
      case 2:
        return move<uint16_t>(from, to.view, context);
      case 4:
        return move<uint32_t>(from, to.view, context);
      default:
        return move<uint64_t>(from, to.view, context);
    }
  }
  with_type(from.dtype, "copy", [&]<class From>(From) {
    with_type(to.view.dtype, "copy", [&]<class To>(To) {
      Convert<From, To> op{{from.as<From>()}, {to.view.as<To>()}, to.accumulate};
      const Rows rows = rows_of({from, to.view}, {op.from.strides, op.to.strides});
      launch_widest(rows, op, {from, to.view}, "copy", context);
    });
  });
}

void add(View a, View b, View out, const Context& context) {
  with_type(out.dtype, "add", [&]<class T>(T) {
    Add<T> op{{a.as<T>()}, {b.as<T>()}, {out.as<T>()}};
    const Rows rows = rows_of({a, b, out}, {op.a.strides, op.b.strides, op.out.strides});
    launch_widest(rows, op, {a, b, out}, "add", context);
  });
}

void swiglu(View gate, View up, View out, const Context& context) {
  with_type(out.dtype, "swiglu", [&]<class T>(T) {
    SwiGlu<T> op{{gate.as<T>()}, {up.as<T>()}, {out.as<T>()}};
    const Rows rows = rows_of({gate, up, out}, {op.gate.strides, op.up.strides, op.out.strides});
    launch_widest(rows, op, {gate, up, out}, "swiglu", context);
  });
}

void swiglu_backward(View d_out, View gate, View up, Grad d_gate, Grad d_up, const Context& context) {
  if (!d_gate && !d_up) return;
  with_type(d_out.dtype, "swiglu_backward", [&]<class T>(T) {
    SwiGluBackward<T> op{{d_out.as<T>()},
                         {gate.as<T>()},
                         {up.as<T>()},
                         {d_gate.view.as_or_null<T>()},
                         {d_up.view.as_or_null<T>()},
                         d_gate.accumulate,
                         d_up.accumulate};
    const View& as_gate = d_gate ? d_gate.view : gate;
    const View& as_up = d_up ? d_up.view : up;
    const Rows rows =
        rows_of({d_out, gate, up, as_gate, as_up},
                {op.d_out.strides, op.gate.strides, op.up.strides, op.d_gate.strides, op.d_up.strides});
    launch_widest(rows, op, {d_out, gate, up, as_gate, as_up}, "swiglu_backward", context);
  });
}

void clear_unless_finite(View x, View flag, const Context& context) {
  with_type(x.dtype, "all_finite", [&]<class T>(T) {
    Finite<T> op{{x.as<T>()}, flag.as<int32_t>()};
    const Rows rows = rows_of({x}, {op.x.strides});
    launch_widest(rows, op, {x}, "all_finite", context);
  });
}

}  // namespace latente::cuda
