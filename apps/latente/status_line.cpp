#include "status_line.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace latente {
namespace {

bool is_terminal() {
  static const bool terminal = isatty(STDERR_FILENO) != 0;
  return terminal;
}

size_t width_of_terminal() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 20 ? size.ws_col - 1u : 119u;
}

}  // namespace

void StatusLine::clear() {
  if (shown_) std::fputs("\r\x1b[2K", stderr);
  shown_ = false;
}

void StatusLine::note(const std::string& text) {
  clear();
  std::fprintf(stderr, "%s\n", text.c_str());
}

void StatusLine::show(const std::string& text, bool last) {
  auto now = std::chrono::steady_clock::now();
  if (!is_terminal()) {
    if (!last && now - printed_ < std::chrono::seconds(10)) return;
    printed_ = now;
    std::fprintf(stderr, "%s\n", text.c_str());
    return;
  }
  if (!last && now - printed_ < std::chrono::milliseconds(100)) return;
  printed_ = now;
  clear();
  std::fputs(text.substr(0, width_of_terminal()).c_str(), stderr);
  std::fflush(stderr);
  shown_ = true;
}

void StatusLine::end() {
  if (shown_) std::fputs("\n", stderr);
  shown_ = false;
}

std::string time_text(double seconds) {
  const int64_t whole = std::llround(seconds);
  if (whole < 60) return fmt::format("{}s", whole);
  if (whole < 3600) return fmt::format("{}m{:02}s", whole / 60, whole % 60);
  return fmt::format("{}h{:02}m", whole / 3600, whole % 3600 / 60);
}

std::string share_text(double share) { return share > 1 ? ">100 %" : fmt::format("{:.0f} %", 100 * share); }

double Pace::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

double Pace::left(double share) const { return seconds() * (1 - share) / std::max(share, 1e-9); }

}  // namespace latente
