#include "model/background_layout.h"

#include <algorithm>

#include "base/background_pace.h"
#include "base/error.h"
#include "tensor/panels.h"

namespace latente {

void MappedBytes::release() const {
  if (!file || file->size() == 0) return;
  constexpr size_t beside = size_t{64} << 10;  // what the system maps with a page that is read
  const auto begin = static_cast<size_t>(bytes.data() - file->bytes().data());
  const size_t before = std::min(begin, beside);
  file->advise(MappedFile::Advice::dont_need, begin - before, before + bytes.size() + beside);
}

BackgroundLayout::~BackgroundLayout() = default;

void BackgroundLayout::add(const Tensor& tensor, View view, std::unique_ptr<MatricesInFile> matrices,
                           std::shared_ptr<void> memory) {
  LATENTE_ASSERT(view.data && view.layout == Layout::panels && !thread_.joinable());
  const int64_t unit = is_quantised(view.dtype) ? 1 : size_of(view.dtype);
  const int64_t stride = view.shape.rank() == 3 ? view.stride(0) * unit : 0;
  view.pending = matrices.get();
  places_.push_back({std::move(matrices), static_cast<std::byte*>(view.data), stride, {}});
  places_.back().tried.resize(static_cast<size_t>(places_.back().matrices->matrices()));
  if (memories_.empty() || memories_.back() != memory) memories_.push_back(std::move(memory));
  bind_view(tensor, view, shared_from_this());
}

bool BackgroundLayout::choose() {
  place_ = nullptr;
  uint32_t most = 0;
  for (Place& place : places_) {
    for (int64_t i = 0; i < place.matrices->matrices(); ++i) {
      if (place.tried[static_cast<size_t>(i)]) continue;
      const uint32_t missed = place.matrices->missed(i);
      if (place_ && missed <= most) continue;
      place_ = &place, matrix_ = i, most = missed;
    }
  }
  if (place_) place_->tried[static_cast<size_t>(matrix_)] = true;
  return place_;
}

bool BackgroundLayout::advance() {
  constexpr int64_t at_once = int64_t{1} << 20;  // bytes
  if (panel_ == 0 && !choose()) return false;
  MatricesInFile& matrices = *place_->matrices;
  std::byte* to = place_->to + matrix_ * place_->stride;
  const int64_t count =
      std::min(std::max<int64_t>(at_once / matrices.panel_bytes(), 1), matrices.panels() - panel_);
  try {
    matrices.make(matrix_, panel_, count, to + panel_ * matrices.panel_bytes());
    panel_ += count;
    if (panel_ < matrices.panels()) return true;
    matrices.finish(matrix_, to);
    matrices.set(matrix_, to);
  } catch (const Error&) {
    // Who needs it will say so.
  }
  matrices.stored(matrix_).release();
  panel_ = 0;
  return true;
}

bool BackgroundLayout::step() {
  if (!advance()) return false;
  while (panel_ > 0) advance();
  return true;
}

void BackgroundLayout::start() {
  // Of one core's time: while there is something that products have missed, and for the rest.
  constexpr double urgent_share = 0.5, share = 0.05;
  thread_ = std::jthread([this](const std::stop_token& stop) {
    for (BackgroundPace pace; !stop.stop_requested() && advance();)
      pace.keep(stop, place_->matrices->missed(matrix_) > 0 ? urgent_share : share);
    // Who was still reading then has mapped pages again.
    for (const Place& place : places_) {
      for (int64_t i = 0; i < place.matrices->matrices(); ++i) place.matrices->stored(i).release();
    }
  });
}

void BackgroundLayout::wait() {
  if (thread_.joinable()) thread_.join();
}

}  // namespace latente
