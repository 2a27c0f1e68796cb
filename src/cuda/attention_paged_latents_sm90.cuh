// How the kernel for any contexts (attention_paged_sm90.cu) lays latents out and cuts contexts.
#pragma once

#include "cuda/attention_paged.cuh"

namespace latente::cuda::latents {

// A key is `tiles` of 64 columns, the last of which is no value, in steps of 16. Values go by pairs of tiles
// through a ring in shared memory, the keys' last tiles through one of three. Either warpgroup of values has
// `first` or `second` tiles.
template <int Tiles, int Steps, int First, int Second, int Ring>
struct LatentShape {
  static constexpr int tiles = Tiles, steps = Steps, first = First, second = Second, ring = Ring;
  static constexpr int values = tiles - 1, pairs = (values + 1) / 2;
  static_assert(first + second == values && first % 2 == 0 && ring >= 2 * pairs);
};

// Keys of a piece of a context, chosen as those of split_keys: long pieces are for many sequences, which have
// to write and read little, short ones for a sequence on its own, whose pieces should be as many as there are
// multiprocessors. Up to 2048 attention_paged_pieces_sm90.cu cuts them so, too.
__host__ __device__ constexpr int piece_keys(int length) {
  return length <= 2048 ? 128 : length <= 8192 ? 256 : length <= 32768 ? 512 : 2048;
}
__host__ __device__ constexpr int piece_count(int length) {
  return length <= 0 ? 1 : (length + piece_keys(length) - 1) / piece_keys(length);
}
constexpr int most_pieces_of(int64_t length) {
  int most = 1;
  for (const int64_t edge : {int64_t{2048}, int64_t{8192}, int64_t{32768}, length}) {
    most = std::max(most, piece_count(static_cast<int>(std::min(edge, length))));
  }
  return most;
}

using Latent512 = LatentShape<9, 36, 4, 4, 8>;  // 512 + 64
using Latent192 = LatentShape<4, 14, 2, 1, 9>;  // 192 + 32

// Puts the pieces of rows that have several together. The kernel before it on the stream made them.
void combine_pieces_sm90(const Paged<__nv_bfloat16>& a, const PieceResults& pieces, const Context& context);

}  // namespace latente::cuda::latents
