#include "cuda/coded_rows.cuh"

namespace latente::cuda {
namespace {

// Of gates fewer, so that three blocks fit in a multiprocessor.
constexpr int ring_stages = 12, gated_stages = 8, down_stages = 8, coded_stages = 8;
constexpr int most_warps = 4, most_down_warps = 16;
constexpr int most_whole = 96 * 1024;  // a warp's weights in shared memory at once: two on a multiprocessor

__device__ void rotate_pair(const Rotary& p, int index) {
  const int i = index % p.half, head = index / p.half % p.heads, token = index / p.half / p.heads;
  const float* angles = p.table + p.positions[token] * p.table_row;
  const int first = p.interleaved ? 2 * i : i, second = p.interleaved ? 2 * i + 1 : p.half + i;
  const bf16* x = p.x + token * p.x_row + head * p.x_head;
  bf16* out = p.out + token * p.out_row + head * p.out_head;
  float a = widen(x[first]), b = widen(x[second]);
  rotate(a, b, angles[i], angles[p.half + i]);
  out[first] = narrow<bf16>(a), out[second] = narrow<bf16>(b);
}

template <class Stream, bool gated, class Out>
__global__ __launch_bounds__(most_warps* warp_size) void few_rows_kernel(
    const __grid_constant__ RowsLaunch p) {
  extern __shared__ __align__(128) char memory[];
  const int lane = static_cast<int>(threadIdx.x) % warp_size,
            warp = static_cast<int>(threadIdx.x) / warp_size, warps = p.warps,
            block = static_cast<int>(blockIdx.x);
  if constexpr (Stream::rotates && !gated) {
    const RowsProduct& last = p.products[p.count - 1];
    int after = block - last.first_block - last.column_blocks * last.row_tiles * last.batches;
    if (after >= 0) {
      wait_for_earlier_kernels();
      if (after < p.latent_blocks) return p.latents.store(after);
      after -= p.latent_blocks;
      const int index = after * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      if (index < p.rotary.count) rotate_pair(p.rotary, index);
      return;
    }
  }
  const RowsProduct& product = p.products[p.count > 1 && block >= p.products[1].first_block ? 1 : 0];
  const int local = block - product.first_block, tile = local / product.column_blocks;
  constexpr int sharing = gated ? Stream::gated_warps : 1;    // warps of the same columns
  constexpr bool half = Stream::columns == warp_columns / 2;  // of the instruction's columns
  const int column = (local % product.column_blocks * (warps / sharing) + warp / sharing) *
                     (gated ? warp_columns / 2 : Stream::columns);
  const bool inside = warp < warps && column < product.columns;

  Stream stream;
  stream.ring = mma::shared_address(memory) + static_cast<unsigned>(warp * p.ring);
  stream.depth = p.depth;
  auto begin = [&](int64_t batch) {
    if (!inside) return;
    if constexpr (half) {
      stream.point(0, gated && warp % 2 == 1 ? product.up : product.w, batch, column);
    } else {
      stream.point(0, product.w, batch, column);
      if constexpr (gated) {
        stream.point(1, product.up, batch, column);
      } else if (column + 8 < product.columns) {
        stream.point(1, product.w, batch, column + 8);
      }
    }
    stream.begin();
  };

  char* x = memory + warps * p.ring;
  int first = 0, end = product.rows;
  int64_t batch = 0;
  const auto row_of_x = [&](int i) {
    int64_t row = first + i;
    if (product.choices) row /= product.top_k;
    if (product.gather) row = product.gather[row];
    return product.x + batch * product.x_batch + row * product.x_row;
  };
  FewNorms::Weights norm_weights{};
  if (!product.offsets && !product.choices) {
    batch = tile / product.row_tiles;
    first = tile % product.row_tiles * tile_rows;
    begin(batch);
    if constexpr (!gated) {
      if (p.norm.lanes > 0) norm_weights = p.norm.weights(p.norm.own_part(), p.depth);
    }
    wait_for_earlier_kernels();
  } else {
    wait_for_earlier_kernels();
    if (product.choices) {
      first = tile, end = tile + 1;
      begin(product.choices[tile]);
    } else {
      const ExpertTile found = find_tile(product.offsets, product.experts, tile_rows, tile);
      first = found.begin, end = found.end;
      if (first >= end) return;  // the whole block
      begin(found.expert);
    }
  }
  const int rows = min(end - first, tile_rows);
  const int pitch = row_pitch(p.depth, Stream::step_depth);
  bool normed = false;
  if constexpr (!gated) {
    normed = p.norm.lanes > 0;
    if (normed) p.norm.take(x, pitch, rows, p.depth, norm_weights, block == 0);
  }
  if (!normed) load_rows(x, rows, p.depth, Stream::step_depth, warp, warps, row_of_x);
  __syncthreads();

  float sums[4] = {};
  if (inside) stream.multiply(mma::shared_address(x), pitch, rows, sums);
  if constexpr (sharing == 2) {  // the warp of the gate takes over
    __shared__ float risen[most_warps / 2][2 * warp_size];
    if (warp % 2 == 1) risen[warp / 2][lane] = sums[0], risen[warp / 2][warp_size + lane] = sums[1];
    __syncthreads();
    if (warp % 2 == 1) return;
    sums[2] = risen[warp / 2][lane], sums[3] = risen[warp / 2][warp_size + lane];
  }
  if (!inside) return;

#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = lane % 4 * 2 + j;
    if (row >= rows) continue;
    Out* out = static_cast<Out*>(product.out) + batch * product.out_batch + (first + row) * product.out_row +
               column + lane / 4;
    if constexpr (gated) {
      *out = narrow<Out>(swiglu_of(widen(narrow<bf16>(sums[j])), widen(narrow<bf16>(sums[2 + j]))));
    } else {
#pragma unroll
      for (int eight = 0; eight < (half ? 1 : 2); ++eight) {
        const int own = column + eight * 8 + lane / 4;
        if (column + eight * 8 >= product.columns) continue;
        float one[1] = {sums[eight * 2 + j]};
        if (product.bias) {
          one[0] += product.exact_bias ? static_cast<const float*>(product.bias)[own]
                                       : widen(static_cast<const bf16*>(product.bias)[own]);
        }
        put<1>(p.accumulate, one, out + eight * 8);
      }
    }
  }
}

// A block has 16 columns (or 8, coded) of a token, a warp one of its experts; the last warp the shared one.
template <class Stream>
__global__ __launch_bounds__(most_down_warps* warp_size) void experts_down_kernel(
    const __grid_constant__ ExpertsDown p) {
  extern __shared__ __align__(128) char memory[];
  __shared__ float results[most_down_warps][warp_columns], weights[most_down_warps];
  const int lane = static_cast<int>(threadIdx.x) % warp_size,
            warp = static_cast<int>(threadIdx.x) / warp_size,
            warps = static_cast<int>(blockDim.x) / warp_size;
  const int column = static_cast<int>(blockIdx.x) * Stream::columns, token = static_cast<int>(blockIdx.y);
  const int choice = token * p.top_k + warp;
  const bool shared = warp == p.top_k;

  Stream stream;
  stream.ring = mma::shared_address(memory) + static_cast<unsigned>(warp * Stream::bytes);
  stream.depth = shared ? p.shared_depth : p.depth;
  // The experts were chosen before the kernel in front began; only the first level of caches may not know.
  const RowsWeights& w = shared ? p.shared_w : p.w;
  const int expert = shared ? 0 : __ldcg(p.experts + choice);
  stream.point(0, w, expert, column);
  if (Stream::columns == warp_columns && column + 8 < p.columns) stream.point(1, w, expert, column + 8);
  stream.begin();
  if (lane == 0 && !shared) weights[warp] = __ldcg(p.weights + choice);
  wait_for_earlier_kernels();

  char* x = memory + warps * Stream::bytes + warp * row_pitch(p.depth, Stream::step_depth);
  load_rows(x, 1, stream.depth, Stream::step_depth, 0, 1, [&](int) {
    return shared ? p.shared_inner + token * p.shared_row : p.inner + choice * p.inner_row;
  });
  __syncwarp();
  float sums[4] = {};
  stream.multiply(mma::shared_address(x), 0, 1, sums);
  if (lane % 4 == 0) {
    results[warp][lane / 4] = widen(narrow<bf16>(sums[0]));
    results[warp][lane / 4 + 8] = widen(narrow<bf16>(sums[2]));
  }
  __syncthreads();
  const int i = static_cast<int>(threadIdx.x);
  if (i >= Stream::columns || column + i >= p.columns) return;
  float sum = p.shared_w.at ? results[p.top_k][i] : 0;
  for (int k = 0; k < p.top_k; ++k) sum = fmaf(weights[k], results[k][i], sum);
  p.out[token * p.out_row + column + i] = narrow<bf16>(sum);
}

// Warps that each have so many columns of a tile of rows.
int64_t warps_of(RowsLaunch& p, int columns) {
  int64_t sum = 0;
  for (int i = 0; i < p.count; ++i) {
    RowsProduct& one = p.products[i];
    one.row_tiles = one.choices   ? one.rows
                    : one.offsets ? static_cast<int>(most_tiles(one.rows, one.experts, tile_rows))
                                  : (one.rows + tile_rows - 1) / tile_rows;
    sum += int64_t{one.row_tiles} * one.batches * ((one.columns + columns - 1) / columns);
  }
  return sum;
}

template <class Stream, bool gated, class Out>
bool run(RowsLaunch p, const char* name, const Context& context) {
  constexpr int each = gated ? warp_columns / 2 : Stream::columns, sharing = gated ? Stream::gated_warps : 1;
  // Few warps a block where there are few, so that every multiprocessor has some.
  const int64_t in_all = warps_of(p, each) * sharing;
  int most_rows = 0;
  for (int i = 0; i < p.count; ++i) {
    const RowsProduct& one = p.products[i];
    most_rows = std::max(most_rows, one.choices ? 1 : std::min(one.rows, tile_rows));
  }
  int warps = most_warps;
  // Of coded columns a warp has half as many.
  const int64_t enough = (p.code ? 1 : 2) * int64_t{context.multiprocessors};
  while (warps > sharing && in_all < (p.code ? warps - 1 : warps) * enough) warps /= 2;
  const size_t x_bytes = static_cast<size_t>(most_rows * row_pitch(p.depth, Stream::step_depth));
  p.ring = Stream::ring_bytes(p.depth);
  const auto ring = static_cast<size_t>(p.ring);
  constexpr size_t own = 1024;  // at most, what the kernel has beside: what gates hand over, or sums of norms
  const size_t limit = static_cast<size_t>(context.shared_bytes) - own;
  while (warps > sharing && static_cast<size_t>(warps) * ring + x_bytes > limit) warps /= 2;
  const size_t bytes = static_cast<size_t>(warps) * ring + x_bytes;
  if (bytes > limit) return false;

  int blocks = 0;
  for (int i = 0; i < p.count; ++i) {
    RowsProduct& one = p.products[i];
    one.first_block = blocks;
    const int of_block = each * (warps / sharing);
    one.column_blocks = (one.columns + of_block - 1) / of_block;
    blocks += one.column_blocks * one.row_tiles * one.batches;
  }
  const int threads = (p.norm.lanes > 0 ? most_warps : warps) * warp_size;
  p.warps = warps;
  if (p.rotary.count > 0) {
    if (p.latents.latent.rows > 0) {
      const int64_t each = threads / p.latents.latent.lanes;
      p.latent_blocks = static_cast<int>((p.latents.latent.rows + each - 1) / each);
    }
    blocks += p.latent_blocks + (p.rotary.count + threads - 1) / threads;
  }
  launch_early(few_rows_kernel<Stream, gated, Out>, static_cast<unsigned>(blocks), threads, bytes, name,
               context, p);
  return true;
}

// Whether what takes time, where warps are few, is a warp's chain of products.
bool is_chain(const RowsLaunch& p, int deep) {
  const RowsProduct& first = p.products[0];
  return p.depth > deep && !first.up.at && !first.choices && !first.offsets && p.rotary.count == 0;
}

template <class Stream>
bool run_ungated(const RowsLaunch& p, bool exact_out, const char* name, const Context& context) {
  return exact_out ? run<Stream, false, float>(p, name, context) : run<Stream, false, bf16>(p, name, context);
}

template <class Stream>
bool run_along_depth(const RowsLaunch& p, bool exact_out, const char* name, const Context& context) {
  if (p.products[0].up.at) return run<Stream, true, bf16>(p, name, context);
  return exact_out ? run<Stream, false, float>(p, name, context) : run<Stream, false, bf16>(p, name, context);
}

// Two strips a warp take fewer instructions; one each takes less time where warps are few.
template <Code code>
bool run_coded(RowsLaunch p, bool exact_out, const char* name, const Context& context) {
  const int columns = p.products[0].up.at ? strip_rows : 2 * strip_rows;
  const bool few = warps_of(p, columns) < int64_t{4} * context.multiprocessors;
  if (few && is_chain(p, 1024) && few_rows_in_parts(p, exact_out, name, context)) return true;
  return few ? run_along_depth<CodedStream<code, coded_stages, 1>>(p, exact_out, name, context)
             : run_along_depth<CodedStream<code, coded_stages, 2>>(p, exact_out, name, context);
}

template <class Stream>
bool run_down(const ExpertsDown& p, const Context& context) {
  const bool shared = p.shared_w.at;
  const int warps = p.top_k + (shared ? 1 : 0);
  const size_t bytes =
      static_cast<size_t>(warps * Stream::bytes + p.top_k * row_pitch(p.depth, Stream::step_depth) +
                          (shared ? row_pitch(p.shared_depth, Stream::step_depth) : 0));
  if (warps > most_down_warps || bytes > static_cast<size_t>(context.shared_bytes)) return false;
  launch_early(experts_down_kernel<Stream>,
               dim3(blocks_for(p.columns, Stream::columns), static_cast<unsigned>(p.tokens)),
               warps * warp_size, bytes, "experts_down", context, p);
  return true;
}

}  // namespace

bool few_rows(const RowsLaunch& p, bool by_columns, bool exact_out, const char* name,
              const Context& context) {
  if (by_columns) {
    using Stream = WeightStream<true, ring_stages>;
    return run_ungated<Stream>(p, exact_out, name, context);
  }
  if (!p.code) {
    using Stream = WeightStream<false, ring_stages>;
    if (p.products[0].up.at) return run<WeightStream<false, gated_stages>, true, bf16>(p, name, context);
    using Whole = WeightStream<false, ring_stages, true>;
    RowsLaunch counted = p;
    if (is_chain(p, 512) && Whole::ring_bytes(p.depth) <= most_whole &&
        warps_of(counted, warp_columns) < int64_t{2} * context.multiprocessors &&
        run_ungated<Whole>(p, exact_out, name, context)) {
      return true;
    }
    return run_ungated<Stream>(p, exact_out, name, context);
  }
  switch (*p.code) {
    case Code::q8:
      return run_coded<Code::q8>(p, exact_out, name, context);
    case Code::q4:
      return run_coded<Code::q4>(p, exact_out, name, context);
    case Code::f8:
      return run_coded<Code::f8>(p, exact_out, name, context);
  }
  return false;
}

bool experts_down(const ExpertsDown& p, const Context& context) {
  if (!p.code) return run_down<WeightStream<false, down_stages>>(p, context);
  switch (*p.code) {
    case Code::q8:
      return run_down<CodedStream<Code::q8, coded_stages, 1>>(p, context);
    case Code::q4:
      return run_down<CodedStream<Code::q4, coded_stages, 1>>(p, context);
    case Code::f8:
      return run_down<CodedStream<Code::f8, coded_stages, 1>>(p, context);
  }
  return false;
}

RowsWeights rows_weights(const View& w) {
  const bool stack = w.shape.rank() == 3;
  if (const auto form = coded_form(w)) {
    const int blocks = w.group / scale_depth;
    return {w.data,
            0,
            stack ? form->bytes : 0,
            form->scale_bytes,
            static_cast<int>(form->groups),
            ((1 << 16) + blocks - 1) / blocks};
  }
  return {w.as<bf16>(), w.stride(stack ? 1 : 0), stack ? w.stride(0) : 0};
}

std::optional<Code> code_of(const View& w) {
  const auto form = coded_form(w);
  return form ? std::optional(form->code) : std::nullopt;
}

template <class C>
bool few_rows(const Product<bf16, bf16, C>& p, int64_t rows, int64_t batches, const char* name,
              const Context& context) {
  if (p.by_depth || p.part_depth > 0 || p.a_depth != 1 || (p.b_depth != 1 && p.b_row != 1)) return false;
  if (rows > tile_rows * (p.offsets ? p.experts : 1)) return false;
  RowsLaunch launch;
  launch.depth = static_cast<int>(p.depth);
  launch.accumulate = p.accumulate;
  RowsProduct& one = launch.products[0];
  const bool by_columns = p.b_depth != 1;
  one.x = p.a, one.x_row = p.a_row, one.x_batch = p.a_batch;
  one.w = {p.b, by_columns ? p.b_depth : p.b_row, p.b_batch};
  one.out = p.c, one.out_row = p.c_row, one.out_batch = p.c_batch;
  one.bias = p.bias, one.exact_bias = p.exact_bias;
  one.offsets = p.offsets, one.gather = p.gather, one.experts = p.experts;
  one.rows = static_cast<int>(rows), one.columns = static_cast<int>(p.columns);
  one.batches = static_cast<int>(batches);
  return few_rows(launch, by_columns, std::is_same_v<C, float>, name, context);
}
template bool few_rows(const Product<bf16, bf16, float>&, int64_t, int64_t, const char*, const Context&);
template bool few_rows(const Product<bf16, bf16, bf16>&, int64_t, int64_t, const char*, const Context&);

}  // namespace latente::cuda
