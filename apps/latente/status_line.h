// How far a long command is: one live line where standard error is a terminal, plain lines elsewhere.
#pragma once

#include <chrono>
#include <string>

namespace latente {

class StatusLine {
 public:
  // Replaced by the next one; without a terminal printed every ten seconds at most, unless it is the last.
  void show(const std::string& text, bool last = false);
  // A line that stays.
  void note(const std::string& text);
  // What is shown stays.
  void end();

 private:
  void clear();

  bool shown_ = false;
  std::chrono::steady_clock::time_point printed_{};
};

// "3m05s"
std::string time_text(double seconds);
// "57 %" of a bound; ">100 %" where the bound does not hold: it was measured in a bad moment, or what it
// counts as read from memory lies in the caches.
std::string share_text(double share);

// Seconds since `start` and, as a share is done, those left.
class Pace {
 public:
  double seconds() const;
  double left(double share) const;  // of the work, above 0

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace latente
