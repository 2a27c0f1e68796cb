// Stop strings in a stream of text: text is passed on as soon as it cannot be the beginning of a stop string.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace latente {

class StopStrings {
 public:
  // Empty strings are ignored.
  explicit StopStrings(std::vector<std::string> stops);

  // Takes the next piece; returns what may be shown. After a stop string was completed, stopped() is true and
  // everything from it on is dropped.
  std::string push(std::string_view piece);
  // The held-back rest, when the text ended without a stop string.
  std::string finish();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace latente
