// UTF-8 text with the meaning Python's str gives it: lengths and positions in code points, Unicode white
// space and case. Case follows utf8proc's simple mappings, plus the few full mappings that occur in European
// text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace latente::jinja {

bool is_utf8(std::string_view text);
size_t count_points(std::string_view text);

// The code point at byte `at`, which moves past it. Precondition: valid UTF-8, at < text.size().
char32_t decode_point(std::string_view text, size_t& at);
void append_point(std::string& out, char32_t point);
// The byte where code point number `index` starts; text.size() when index is the number of code points.
size_t byte_offset(std::string_view text, size_t index);

bool is_space(char32_t point);
bool is_identifier(std::string_view name);
bool is_word(char32_t point);

std::string to_upper(std::string_view text);
std::string to_lower(std::string_view text);
std::string to_title(std::string_view text);        // str.title()
std::string to_capitalized(std::string_view text);  // str.capitalize()

enum class CharClass { alnum, alpha, decimal, lower, space, upper };
bool all_in(CharClass wanted, std::string_view text);

// Removes white space, or the code points in `chars`, from the chosen ends.
std::string_view strip(std::string_view text, std::optional<std::string_view> chars, bool left, bool right);

std::vector<std::string_view> split_space(std::string_view text, int64_t max_splits);
std::vector<std::string_view> split_space_right(std::string_view text, int64_t max_splits);
std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends);
// Linear in the text whatever the needle; npos when absent.
size_t find_bytes(std::string_view text, std::string_view needle, size_t from = 0);

std::string quote_python(std::string_view text);  // repr(str)
std::string quote_json(std::string_view text, bool ensure_ascii);
std::string escape_html(std::string_view text);           // markupsafe.escape
std::string format_real(double value);                    // repr(float)
std::optional<double> parse_real(std::string_view text);  // float(str); empty where Python raises ValueError

}  // namespace latente::jinja
