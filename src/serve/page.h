// The page to chat with the model: one HTML file (serve/page/page.html), part of the binary.
#pragma once

#include <string_view>

namespace latente {

extern const std::string_view page;

}  // namespace latente
