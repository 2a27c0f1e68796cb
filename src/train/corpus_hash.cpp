#include "train/corpus_hash.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace latente {

namespace {

static_assert(std::endian::native == std::endian::little);

constexpr uint64_t prime1 = 0x9E3779B185EBCA87, prime2 = 0xC2B2AE3D27D4EB4F, prime3 = 0x165667B19E3779F9,
                   prime4 = 0x85EBCA77C2B2AE63, prime5 = 0x27D4EB2F165667C5;

template <class T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

uint64_t mixed(uint64_t lane, uint64_t input) { return std::rotl(lane + input * prime2, 31) * prime1; }

void add_stripe(std::array<uint64_t, 4>& lanes, const std::byte* at) {
  for (size_t i = 0; i < 4; ++i) lanes[i] = mixed(lanes[i], load<uint64_t>(at + 8 * i));
}

}  // namespace

Hash64::Hash64(uint64_t seed)
    : seed_(seed), lanes_{seed + prime1 + prime2, seed + prime2, seed, seed - prime1} {}

void Hash64::add(std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  const size_t held = length_ % 32;
  length_ += bytes.size();
  if (held > 0) {
    const size_t taken = std::min(bytes.size(), 32 - held);
    std::memcpy(rest_.data() + held, bytes.data(), taken);
    bytes = bytes.subspan(taken);
    if (held + taken < 32) return;
    add_stripe(lanes_, rest_.data());
  }
  for (; bytes.size() >= 32; bytes = bytes.subspan(32)) add_stripe(lanes_, bytes.data());
  if (!bytes.empty()) std::memcpy(rest_.data(), bytes.data(), bytes.size());
}

uint64_t Hash64::value() const {
  uint64_t hash = seed_ + prime5;
  if (length_ >= 32) {
    hash = std::rotl(lanes_[0], 1) + std::rotl(lanes_[1], 7) + std::rotl(lanes_[2], 12) +
           std::rotl(lanes_[3], 18);
    for (const uint64_t lane : lanes_) hash = (hash ^ mixed(0, lane)) * prime1 + prime4;
  }
  hash += length_;
  const std::byte* at = rest_.data();
  const std::byte* const end = at + length_ % 32;
  for (; end - at >= 8; at += 8) hash = std::rotl(hash ^ mixed(0, load<uint64_t>(at)), 27) * prime1 + prime4;
  for (; end - at >= 4; at += 4) hash = std::rotl(hash ^ load<uint32_t>(at) * prime1, 23) * prime2 + prime3;
  for (; at < end; ++at) hash = std::rotl(hash ^ load<uint8_t>(at) * prime5, 11) * prime1;
  hash = (hash ^ hash >> 33) * prime2;
  hash = (hash ^ hash >> 29) * prime3;
  return hash ^ hash >> 32;
}

}  // namespace latente
