// Saving what the cache holds of a sequence, and reading it back: an Engine's members that know the file.
#include <fmt/format.h>

#include <algorithm>

#include "checkpoint/checksum.h"
#include "checkpoint/safetensors.h"
#include "infer/engine.h"
#include "tensor/device.h"

namespace latente {
namespace {

constexpr std::string_view format = "latente cache 1";

View first_pages(const Tensor& cache, int64_t pages) {
  View view = cache.rows(0, 1).view();
  view.shape = {pages, cache[1], cache[2], cache[3]};
  return view;
}

}  // namespace

// Norms differ from training to training and stay as they are when weights are quantised, so they stand for
// the model; the rest says how its entries are stored.
std::string Engine::fingerprint() {
  const Transformer& model = runner_.model();
  uint64_t sum = 0;
  auto add = [&](const Tensor& tensor) {
    const HostCopy copy = on_host(runner_.backend(), tensor.view());
    const View& view = copy.view;
    sum = xxh64({static_cast<const std::byte*>(view.data), static_cast<size_t>(view.bytes())}, sum);
  };
  for (const Layer& layer : model.model.layers) {
    add(layer.input_layernorm.weight);
    add(layer.post_attention_layernorm.weight);
  }
  add(model.model.norm.weight);
  const Tensor& keys = runner_.caches().front().keys;
  return fmt::format("{:016x} {} {}x{} {} layers", sum, name_of(keys.dtype()), keys[2], keys[3],
                     runner_.caches().size());
}

int64_t Engine::save(const std::string& path, std::span<const int32_t> tokens,
                     const std::map<std::string, std::string>& notes) {
  int64_t modules = runner_.modules();
  PagePool::Match match = pool_.match(tokens, modules);
  for (int64_t fewer = modules; fewer-- > 0;) {
    PagePool::Match other = pool_.match(tokens, fewer);
    if (other.positions > match.positions + runner_.modules()) match = std::move(other), modules = fewer;
  }
  if (match.partial >= 0) match.pages.push_back(match.partial);
  const int64_t pages = static_cast<int64_t>(match.pages.size());
  // Modules have read on behind the last position.
  const int64_t known = std::min(match.positions + modules, static_cast<int64_t>(tokens.size()));

  std::vector<TensorSpec> specs = {{"tokens", DType::i32, {std::max<int64_t>(known, 1)}}};
  auto for_each_cache = [&](auto&& f) {
    for (size_t layer = 0; pages > 0 && layer < runner_.caches().size(); ++layer) {
      const LayerCache& cache = runner_.caches()[layer];
      f(fmt::format("{}.keys", layer), cache.keys);
      if (cache.values) f(fmt::format("{}.values", layer), cache.values);
    }
  };
  for_each_cache([&](const std::string& name, const Tensor& cache) {
    specs.push_back({name, cache.dtype(), {pages, cache[1], cache[2], cache[3]}});
  });
  std::map<std::string, std::string> metadata = notes;
  metadata["format"] = format;
  metadata["model"] = fingerprint();
  metadata["positions"] = std::to_string(match.positions);
  metadata["modules"] = std::to_string(modules);
  SafetensorsWriter writer(path, specs, metadata);
  std::vector<int32_t> prefix(tokens.begin(), tokens.begin() + known);
  prefix.resize(static_cast<size_t>(std::max<int64_t>(known, 1)));
  writer.write("tokens", View(prefix.data(), {static_cast<int64_t>(prefix.size())}, DType::i32));
  std::vector<std::byte> memory;
  for_each_cache([&](const std::string& name, const Tensor& cache) {
    const View page = first_pages(cache, 1);
    memory.resize(static_cast<size_t>(pages * page.bytes()));
    for (int64_t i = 0; i < pages; ++i) {
      const int32_t from = match.pages[static_cast<size_t>(i)];
      runner_.backend().download(cache.rows(from, from + 1).view(), memory.data() + i * page.bytes());
    }
    writer.write(name, View(memory.data(), first_pages(cache, pages).shape, cache.dtype()));
  });
  writer.commit();
  return match.positions;
}

int64_t Engine::load(const std::string& path, std::map<std::string, std::string>* notes) {
  const SafetensorsFile file(path);
  auto note = [&](const std::string& key) {
    const auto found = file.metadata().find(key);
    if (found == file.metadata().end()) fail("{}: is no saved cache (it has no {})", path, key);
    return found->second;
  };
  auto number = [&](const std::string& key, int64_t most) {
    const std::string text = note(key);
    int64_t value = -1;
    if (!text.empty() && text.size() < 12 && text.find_first_not_of("0123456789") == text.npos)
      value = std::stoll(text);
    if (value < 0 || value > most) fail("{}: {}: expected 0 to {}, found {}", path, key, most, text);
    return value;
  };
  if (note("format") != format) fail("{}: is no saved cache of this version", path);
  if (note("model") != fingerprint())
    fail("{}: is the cache of another model, or of another --kv-cache-dtype ({}; here {})", path,
         note("model"), fingerprint());
  const SafetensorsEntry& stored = file.at("tokens");
  if (stored.extents.size() != 1) fail("{}: tokens: expected one dimension", path);
  std::vector<int32_t> tokens(static_cast<size_t>(stored.extents[0]));
  file.read("tokens", View(tokens.data(), {stored.extents[0]}, DType::i32));
  for (int32_t id : tokens) {
    if (id < 0 || id >= config_->vocab_size) fail("{}: token {} lies outside the vocabulary", path, id);
  }
  const int64_t positions = number("positions", stored.extents[0]),
                modules = number("modules", runner_.modules());
  const int64_t page_size = runner_.caches().front().keys[1];
  const int64_t theirs = positions > 0 ? file.at("0.keys").shape()[1] : page_size;
  if (theirs != page_size) fail("{}: has pages of {} tokens, here they have {}", path, theirs, page_size);
  const int64_t count = (positions + page_size - 1) / page_size;
  if (count > pool_.available())
    fail("{}: has {} tokens, the cache has room for {}", path, positions, pool_.available() * page_size);

  std::vector<std::pair<const Tensor*, std::string>> parts;
  for (size_t layer = 0; layer < runner_.caches().size(); ++layer) {
    const LayerCache& cache = runner_.caches()[layer];
    parts.emplace_back(&cache.keys, fmt::format("{}.keys", layer));
    if (cache.values) parts.emplace_back(&cache.values, fmt::format("{}.values", layer));
  }
  for (const auto& [cache, name] : parts) {
    if (count == 0) break;
    const SafetensorsEntry& entry = file.at(name);
    check_shape(entry, {count, (*cache)[1], (*cache)[2], (*cache)[3]}, path);
    if (entry.dtype != cache->dtype())
      fail("{}: {}: expected {}, found {}", path, name, name_of(cache->dtype()), entry.dtype_name);
  }
  // Nothing can fail from here on.
  std::vector<int32_t> pages;
  for (int64_t i = 0; i < count; ++i) pages.push_back(pool_.take().value());
  for (const auto& [cache, name] : parts) {
    if (count == 0) break;
    const SafetensorsEntry& entry = file.at(name);
    const int64_t bytes = first_pages(*cache, 1).bytes();
    for (int64_t i = 0; i < count; ++i) {
      const int32_t to = pages[static_cast<size_t>(i)];
      runner_.backend().upload(entry.data + i * bytes, cache->rows(to, to + 1).view());
    }
  }
  pool_.remember(std::span(tokens).first(static_cast<size_t>(positions > 0 ? stored.extents[0] : 0)), pages,
                 modules);
  for (int32_t page : pages) pool_.release(page);
  if (notes != nullptr) *notes = file.metadata();
  return positions;
}

}  // namespace latente
