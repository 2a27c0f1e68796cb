// Numbers between bounds, as expressions over their digits.
#pragma once

#include <optional>
#include <string>

#include "grammar/machine.h"

namespace latente::grammar {

// A decimal number: (-1)^negative · whole.fraction, digits without useless zeros ("0" is a whole of zero).
struct Decimal {
  bool negative = false;
  std::string whole = "0", fraction{};
};
// Of a number in JSON's notation; null if it needs more than 40 digits written without an exponent.
std::optional<Decimal> read_decimal(std::string_view text);
bool operator<(const Decimal& a, const Decimal& b);

struct Bound {
  Decimal value;
  bool exclusive = false;
};
struct NumberRange {
  std::optional<Bound> low, high;
};

// Whole numbers have at most 19 digits, or as many as a bound; without bounds, numbers have at most 20 digits
// behind the point and 2 in the exponent, and with a bound no exponent.
Expression integers(const NumberRange& range);
Expression numbers(const NumberRange& range);

// Digits, with a sign and a point, of which a number is made that is a whole multiple of `step` (above 0): to
// be combined with one of the above, which know how numbers are written. Null if the step is more than
// `most_step` of its last decimal place.
constexpr int most_step = 3'000;
std::optional<Machine> multiples_of(const Decimal& step);

}  // namespace latente::grammar
