// The byte-level alphabet of GPT-2: each byte is spelled as a printable character; those that are not
// printable as U+0100 onwards.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace latente {

char32_t character_of_byte(unsigned char byte);
std::string spell_bytes(std::string_view bytes);
// The bytes that `text` (valid UTF-8) spells; nothing if a character is not in the alphabet.
std::optional<std::string> unspell_bytes(std::string_view text);

}  // namespace latente
