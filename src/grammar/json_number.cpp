#include "grammar/json_number.h"

#include <algorithm>
#include <charconv>

namespace latente::grammar {
namespace {

constexpr size_t most_digits = 19, most_fraction = 20, most_written = 40;

Expression digits(char low, char high) {
  return one_of({{static_cast<char32_t>(low), static_cast<char32_t>(high)}});
}
Expression digit() { return digits('0', '9'); }
Expression never() { return choice({}); }
Expression digit_text(char c) { return literal(std::string_view(&c, 1)); }

bool is_zero(const Decimal& value) { return value.whole == "0" && value.fraction.empty(); }

// Whole numbers without a sign, as digits without leading zeros.
bool less(const std::string& a, const std::string& b) {
  return a.size() != b.size() ? a.size() < b.size() : a < b;
}

std::string next(std::string whole) {
  size_t i = whole.size();
  while (i > 0 && whole[i - 1] == '9') whole[--i] = '0';
  if (i == 0) return "1" + whole;
  ++whole[i - 1];
  return whole;
}

// Of one above 0.
std::string previous(std::string whole) {
  size_t i = whole.size();
  while (whole[i - 1] == '0') whole[--i] = '9';
  --whole[i - 1];
  if (whole.size() > 1 && whole[0] == '0') whole.erase(0, 1);
  return whole;
}

// As many digits as low and high have, from low to high.
Expression same_length(std::string_view low, std::string_view high) {
  if (low.empty()) return literal("");
  const auto rest = static_cast<uint32_t>(low.size() - 1);
  const bool from_zero = low.find_first_not_of('0') == low.npos,
             to_nine = high.find_first_not_of('9') == high.npos;
  if (from_zero && to_nine) return repeat(digit(), rest + 1, rest + 1);
  if (low[0] == high[0]) return sequence({digit_text(low[0]), same_length(low.substr(1), high.substr(1))});
  const std::string zeros(rest, '0'), nines(rest, '9');
  std::vector<Expression> all{sequence({digit_text(low[0]), same_length(low.substr(1), nines)}),
                              sequence({digit_text(high[0]), same_length(zeros, high.substr(1))})};
  if (high[0] - low[0] > 1) {
    all.push_back(sequence({digits(static_cast<char>(low[0] + 1), static_cast<char>(high[0] - 1)),
                            repeat(digit(), rest, rest)}));
  }
  return choice(std::move(all));
}

// low to high, or to the most digits; both without a sign.
Expression wholes(const std::string& low, const std::optional<std::string>& high) {
  const std::string last = high ? *high : std::string(std::max(most_digits, low.size()), '9');
  if (less(last, low)) return never();
  std::vector<Expression> all;
  for (size_t length = low.size(); length <= last.size(); ++length) {
    const std::string first = length == 1 ? "0" : "1" + std::string(length - 1, '0');
    all.push_back(same_length(length == low.size() ? low : first,
                              length == last.size() ? last : std::string(length, '9')));
  }
  return choice(std::move(all));
}

// What is left of a bound on a fraction's digits, from here on.
struct Rest {
  std::string_view digits;
  bool exclusive;
};

// Digits that may follow, so that the fraction lies between the bounds; what is not written is 0.
// may_end: also none.
Expression fraction(std::optional<Rest> low, std::optional<Rest> high, bool may_end) {
  if (low && low->digits.empty() && !low->exclusive) low.reset();
  if (!low && !high) return repeat(digit(), may_end ? 0 : 1, most_fraction);
  if (high && high->digits.empty()) {
    // Only zeros may follow.
    if (low || high->exclusive) return never();
    return repeat(digit_text('0'), may_end ? 0 : 1, most_fraction);
  }
  if (low && low->digits.empty() && !high) {
    return sequence(
        {repeat(digit_text('0'), 0, most_fraction), digits('1', '9'), repeat(digit(), 0, most_fraction)});
  }
  std::vector<Expression> all;
  if (may_end && !low) all.push_back(literal(""));  // high has a digit above 0 left
  const auto behind = [](const Rest& rest) {
    return Rest{rest.digits.empty() ? rest.digits : rest.digits.substr(1), rest.exclusive};
  };
  const char first = low && !low->digits.empty() ? low->digits[0] : '0', last = high ? high->digits[0] : '9';
  if (first > last) return never();
  // From the first digit to the last: at either end, what is left of the bound counts further.
  const auto starts = [&](char c) {
    return fraction(low && c == first ? std::optional(behind(*low)) : std::nullopt,
                    high && c == last ? std::optional(behind(*high)) : std::nullopt, true);
  };
  all.push_back(sequence({digit_text(first), starts(first)}));
  if (last > first) all.push_back(sequence({digit_text(last), starts(last)}));
  if (last - first > 1) {
    all.push_back(sequence({digits(static_cast<char>(first + 1), static_cast<char>(last - 1)),
                            repeat(digit(), 0, most_fraction)}));
  }
  return choice(std::move(all));
}

// With the point, or nothing where a fraction of 0 lies between the bounds.
Expression point_and_fraction(std::optional<Rest> low, std::optional<Rest> high) {
  const bool zero = (!low || (low->digits.empty() && !low->exclusive)) &&
                    (!high || !high->digits.empty() || !high->exclusive);
  Expression some = sequence({literal("."), fraction(low, high, false)});
  return zero ? optional(std::move(some)) : std::move(some);
}

Rest rest_of(const Bound& bound) { return {bound.value.fraction, bound.exclusive}; }

// Numbers without a sign between bounds without a sign.
Expression magnitudes(const Bound& low, const std::optional<Bound>& high) {
  const std::string& first = low.value.whole;
  if (high && less(high->value.whole, first)) return never();
  if (high && high->value.whole == first)
    return sequence({literal(first), point_and_fraction(rest_of(low), rest_of(*high))});
  std::vector<Expression> all{sequence({literal(first), point_and_fraction(rest_of(low), std::nullopt)})};
  const std::optional<std::string> last = high ? std::optional(previous(high->value.whole)) : std::nullopt;
  all.push_back(sequence({wholes(next(first), last), point_and_fraction(std::nullopt, std::nullopt)}));
  if (high)
    all.push_back(sequence({literal(high->value.whole), point_and_fraction(std::nullopt, rest_of(*high))}));
  return choice(std::move(all));
}

Bound without_sign(Bound bound) {
  bound.value.negative = false;
  return bound;
}

// The numbers below 0 mirrored, and those from 0 on.
template <class Make>
Expression by_sign(const NumberRange& range, Make make) {
  const auto negative = [](const std::optional<Bound>& bound) { return bound && bound->value.negative; };
  std::vector<Expression> all;
  if (!range.low || range.low->value.negative) {
    const Bound above_zero{{}, true};
    all.push_back(
        sequence({literal("-"), make(negative(range.high) ? without_sign(*range.high) : above_zero,
                                     range.low ? std::optional(without_sign(*range.low)) : std::nullopt)}));
  }
  if (!negative(range.high))
    all.push_back(make(range.low && !negative(range.low) ? *range.low : Bound{}, range.high));
  return choice(std::move(all));
}

}  // namespace

std::optional<Decimal> read_decimal(std::string_view text) {
  Decimal out;
  out.negative = text.starts_with('-');
  if (out.negative) text.remove_prefix(1);
  const size_t e = text.find_first_of("eE");
  int64_t exponent = 0;
  if (e != text.npos) {
    const std::string_view power = text.substr(text[e + 1] == '+' ? e + 2 : e + 1);
    const auto [end, error] = std::from_chars(power.data(), power.data() + power.size(), exponent);
    if (error != std::errc() || end != power.data() + power.size()) return std::nullopt;
  }
  const std::string_view mantissa = text.substr(0, e);
  const size_t point = std::min(mantissa.find('.'), mantissa.size());
  std::string all(mantissa.substr(0, point));
  if (point < mantissa.size()) all += mantissa.substr(point + 1);
  const int64_t most = most_written;
  if (static_cast<int64_t>(all.size()) > most || exponent > most || exponent < -most) return std::nullopt;
  const int64_t at = static_cast<int64_t>(point) + exponent;  // of the point
  if (at < 0) all.insert(0, static_cast<size_t>(-at), '0');
  if (at > static_cast<int64_t>(all.size())) all.append(static_cast<size_t>(at) - all.size(), '0');
  const auto cut = static_cast<size_t>(std::max<int64_t>(at, 0));
  out.whole = all.substr(0, cut);
  out.fraction = all.substr(cut);
  out.whole.erase(0, std::min(out.whole.find_first_not_of('0'), out.whole.size()));
  if (out.whole.empty()) out.whole = "0";
  while (out.fraction.ends_with('0')) out.fraction.pop_back();
  if (static_cast<int64_t>(out.whole.size() + out.fraction.size()) > most) return std::nullopt;
  if (is_zero(out)) out.negative = false;
  return out;
}

bool operator<(const Decimal& a, const Decimal& b) {
  if (a.negative != b.negative) return a.negative;
  const Decimal &x = a.negative ? b : a, &y = a.negative ? a : b;
  return x.whole != y.whole ? less(x.whole, y.whole) : x.fraction < y.fraction;
}

Expression integers(const NumberRange& range) {
  if (!range.low && !range.high) {
    return sequence(
        {optional(literal("-")),
         choice({literal("0"), sequence({digits('1', '9'), repeat(digit(), 0, most_digits - 1)})})});
  }
  return by_sign(range, [](const Bound& low, const std::optional<Bound>& high) {
    const bool beyond_low = !low.value.fraction.empty() || low.exclusive;
    const std::string first = beyond_low ? next(low.value.whole) : low.value.whole;
    if (!high) return wholes(first, std::nullopt);
    if (!high->exclusive || !high->value.fraction.empty()) return wholes(first, high->value.whole);
    return high->value.whole == "0" ? never() : wholes(first, previous(high->value.whole));
  });
}

Expression numbers(const NumberRange& range) {
  if (range.low || range.high) return by_sign(range, magnitudes);
  const Expression exponent = sequence(
      {one_of({{'E', 'E'}, {'e', 'e'}}), optional(one_of({{'+', '+'}, {'-', '-'}})), repeat(digit(), 1, 2)});
  return sequence({integers(range), optional(sequence({literal("."), repeat(digit(), 1, most_fraction)})),
                   optional(exponent)});
}

// The state is what is left over of the digits so far, as a whole number, and how many of them stand behind
// the point.
std::optional<Machine> multiples_of(const Decimal& step) {
  const std::string digits = step.whole + step.fraction;
  const size_t begin = std::min(digits.find_first_not_of('0'), digits.size());
  const auto places = static_cast<uint32_t>(step.fraction.size());
  uint32_t unit = 0;
  const auto [end, error] = std::from_chars(digits.data() + begin, digits.data() + digits.size(), unit);
  if (error != std::errc() || end != digits.data() + digits.size() || unit == 0 || unit > most_step)
    return std::nullopt;
  if ((places + 2) * static_cast<size_t>(unit) + 2 > Machine::most_states) return std::nullopt;

  Machine out;
  const auto state = [&](uint32_t phase, uint64_t rest) {
    return 2 + phase * unit + static_cast<uint32_t>(rest % unit);
  };
  const auto byte = [](uint32_t digit) { return static_cast<uint8_t>('0' + digit); };
  const auto read = [&](uint32_t from, uint32_t phase, uint64_t rest) {
    for (uint32_t d = 0; d < 10; ++d) {
      const bool fails = phase == places + 1 && (rest * 10 + d) % unit != 0;  // only zeros may follow
      if (!fails) out.states[from].edges.push_back({byte(d), byte(d), state(phase, rest * 10 + d)});
    }
  };
  out.states.resize(2 + (places + 2) * unit);
  out.states[0].edges.push_back({'-', '-', 1});
  read(0, 0, 0);
  read(1, 0, 0);
  // Phase 0: before the point; phase 1 + n: n digits behind it.
  for (uint32_t phase = 0; phase < places + 2; ++phase) {
    for (uint32_t rest = 0; rest < unit; ++rest) {
      const uint32_t at = state(phase, rest);
      uint64_t scaled = rest;
      for (uint32_t left = phase == 0 ? places : places + 1 - phase; left > 0; --left)
        scaled = scaled * 10 % unit;
      out.states[at].accepts = scaled == 0;
      if (phase == 0) out.states[at].edges.push_back({'.', '.', state(1, rest)});
      if (phase < places + 1) {
        read(at, phase == 0 ? 0 : phase + 1, rest);
      } else {
        out.states[at].edges.push_back({'0', '0', at});
      }
    }
  }
  return out;
}

}  // namespace latente::grammar
