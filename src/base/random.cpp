#include "base/random.h"

#include <cmath>
#include <numbers>

#include "base/error.h"

namespace latente {

namespace {

uint64_t join(uint32_t low, uint32_t high) { return low | uint64_t{high} << 32; }

double unit(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53; }

std::array<uint32_t, 4> block_at(uint64_t seed, uint64_t stream, uint64_t block) {
  return philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                     static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)},
                    {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
}

// Box and Muller's pair. 1 − u lies in (0, 1], so that the logarithm is finite.
std::pair<double, double> normal_pair(double u, double v) {
  const double radius = std::sqrt(-2 * std::log(1 - u));
  const double angle = 2 * std::numbers::pi * v;
  return {radius * std::cos(angle), radius * std::sin(angle)};
}

// Two numbers a block: pair(words) gives elements 2·block and 2·block + 1.
template <class Pair>
void fill_pairs(std::span<float> out, uint64_t seed, uint64_t stream, uint64_t first, Pair pair) {
  for (size_t i = 0; i < out.size();) {
    const uint64_t element = first + i;
    const auto [a, b] = pair(block_at(seed, stream, element / 2));
    if (element % 2 == 0) out[i++] = static_cast<float>(a);
    if (i < out.size() && (first + i) % 2 == 1) out[i++] = static_cast<float>(b);
  }
}

}  // namespace

std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53} * c[0];
    const uint64_t right = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(right >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(right),
         static_cast<uint32_t>(left >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(left)};
    k[0] += 0x9E3779B9;  // the golden ratio
    k[1] += 0xBB67AE85;  // sqrt(3) − 1
  }
  return c;
}

uint32_t Random::next_u32() {
  const uint64_t block = state_.position / 4;
  if (block != cached_block_) {
    words_ = block_at(state_.seed, state_.stream, block);
    cached_block_ = block;
  }
  return words_[state_.position++ % 4];
}

uint64_t Random::next_u64() {
  const uint32_t low = next_u32();
  return join(low, next_u32());
}

double Random::uniform() { return unit(next_u64()); }

double Random::uniform(double low, double high) {
  const double value = low + (high - low) * uniform();
  return value < high ? value : std::nextafter(high, low);
}

double Random::normal() {
  const double u = uniform();
  return normal_pair(u, uniform()).first;
}

uint64_t Random::below(uint64_t bound) {
  LATENTE_ASSERT(bound > 0);
  // Lemire's multiplication (arXiv:1805.10941): the high half is the result; the few low halves that would
  // favour some results are drawn again.
  unsigned __int128 product = static_cast<unsigned __int128>(next_u64()) * bound;
  if (static_cast<uint64_t>(product) < bound) {
    const uint64_t unfair = -bound % bound;
    while (static_cast<uint64_t>(product) < unfair) {
      product = static_cast<unsigned __int128>(next_u64()) * bound;
    }
  }
  return static_cast<uint64_t>(product >> 64);
}

int64_t Random::between(int64_t low, int64_t high) {
  LATENTE_ASSERT(low <= high);
  const uint64_t width = static_cast<uint64_t>(high) - static_cast<uint64_t>(low) + 1;
  const uint64_t offset = width == 0 ? next_u64() : below(width);
  return static_cast<int64_t>(static_cast<uint64_t>(low) + offset);
}

void fill_normal(std::span<float> out, uint64_t seed, uint64_t stream, uint64_t first, double mean,
                 double deviation) {
  fill_pairs(out, seed, stream, first, [=](const std::array<uint32_t, 4>& w) {
    const auto [a, b] = normal_pair(unit(join(w[0], w[1])), unit(join(w[2], w[3])));
    return std::pair{mean + deviation * a, mean + deviation * b};
  });
}

void fill_uniform(std::span<float> out, uint64_t seed, uint64_t stream, uint64_t first, double low,
                  double high) {
  // Rounding to float may reach `high`; the neighbour below keeps the range half open.
  const float top = std::nextafter(static_cast<float>(high), static_cast<float>(low));
  fill_pairs(out, seed, stream, first, [=](const std::array<uint32_t, 4>& w) {
    const auto draw = [=](uint64_t bits) {
      const auto value = static_cast<float>(low + (high - low) * unit(bits));
      return value < static_cast<float>(high) || low == high ? value : top;
    };
    return std::pair{draw(join(w[0], w[1])), draw(join(w[2], w[3]))};
  });
}

}  // namespace latente
