#include <algorithm>
#include <cstring>

#include "ops/support.h"
#include "tensor/choice.h"

namespace latente::test {
namespace {

// By definition (tensor/choice.h), in float64: the tokens in falling order and their weights.
struct Ranked {
  std::vector<int32_t> ids;
  Numbers weights;
};

Ranked ranked(const std::vector<float>& logits, const Choice& choice, double top_p) {
  Ranked all;
  all.ids.resize(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) all.ids[i] = static_cast<int32_t>(i);
  const auto logit = [&](int32_t id) { return logits[static_cast<size_t>(id)]; };
  std::stable_sort(all.ids.begin(), all.ids.end(), [&](int32_t a, int32_t b) { return logit(a) > logit(b); });
  for (int32_t id : all.ids)
    all.weights.push_back(
        std::exp((static_cast<double>(logit(id)) - logit(all.ids[0])) * choice.inverse_temperature));
  const auto sum = [&] {
    double total = 0;
    for (double weight : all.weights) total += weight;
    return total;
  };
  if (choice.top_k > 0) all.weights.resize(std::min(all.weights.size(), static_cast<size_t>(choice.top_k)));
  if (top_p < 1) {
    const double wanted = top_p * sum();
    double reached = 0;
    size_t count = 0;
    while (count < all.weights.size() && reached < wanted) reached += all.weights[count++];
    all.weights.resize(count);
  }
  while (all.weights.back() < choice.min_p) all.weights.pop_back();
  const double total = sum();
  for (double& weight : all.weights) weight /= total;
  return all;
}

// Whether the number falls on that token, or so near to it that rounding may decide.
bool falls_on(int32_t token, double number, const std::vector<float>& logits, const Choice& choice) {
  constexpr double near = 1e-5;
  for (double p : {choice.top_p - near, static_cast<double>(choice.top_p), choice.top_p + near}) {
    const Ranked all = ranked(logits, choice, p);
    double before = 0;
    for (size_t i = 0; i < all.weights.size(); ++i) {
      if (all.ids[i] == token && number > before - near && number < before + all.weights[i] + near)
        return true;
      before += all.weights[i];
    }
  }
  return false;
}

std::vector<int32_t> chosen(const std::vector<std::vector<float>>& logits,
                            const std::vector<Choice>& choices) {
  const auto rows = static_cast<int64_t>(logits.size()), columns = static_cast<int64_t>(logits[0].size());
  Numbers values;
  for (const auto& row : logits) values.insert(values.end(), row.begin(), row.end());
  std::vector<int32_t> words(choices.size() * Choice::words);
  std::memcpy(words.data(), choices.data(), choices.size() * sizeof(Choice));
  Plan plan(backend(3));
  const Tensor out = buffer(backend(3), {rows}, DType::i32);
  choose(constant(plan, {rows, columns}, DType::f32, values),
         indices(plan, {static_cast<int64_t>(words.size())}, words), out);
  plan.compile();
  plan.allocate();
  plan.run();
  const Numbers found = read(out.view(), backend(3));
  return {found.begin(), found.end()};
}

std::vector<float> random_logits(Random& random, size_t count) {
  std::vector<float> row(count);
  const double spread = std::exp(random.uniform(-3, 2.5));
  const auto kind = random.below(4);
  for (float& x : row) {
    x = static_cast<float>(spread * random.normal());
    if (kind == 1) x = std::round(x);  // many are equal
    if (kind == 2 && random.chance(0.3)) x = -std::numeric_limits<float>::infinity();
  }
  if (kind == 2) row[random.below(count)] = 1;
  if (kind == 3) row[random.below(count)] += static_cast<float>(8 * spread);  // one stands out
  return row;
}

Choice random_choice(Random& random, double number) {
  Choice choice;
  choice.set_temperature(random.chance(0.2) ? 0 : std::exp(random.uniform(-2, 1.5)));
  if (random.chance(0.4)) choice.top_k = static_cast<int32_t>(1 + random.below(100));
  if (random.chance(0.4)) choice.top_p = static_cast<float>(random.uniform(0.05, 1));
  if (random.chance(0.4)) choice.min_p = static_cast<float>(random.uniform(0, 0.3));
  choice.set_number(number);
  return choice;
}

TEST(Choose, TakesTheTokenThatTheNumberFallsOn) {
  Random random(3);
  for (size_t columns : {1, 2, 31, 512, 2049, 30000}) {
    std::vector<std::vector<float>> logits;
    std::vector<Choice> choices;
    Numbers numbers;
    for (int row = 0; row < 40; ++row) {
      numbers.push_back(row < 4 ? row / 2 * (1 - 0x1p-53) : random.uniform());
      logits.push_back(random_logits(random, columns));
      choices.push_back(random_choice(random, numbers.back()));
    }
    const std::vector<int32_t> found = chosen(logits, choices);
    for (size_t row = 0; row < logits.size(); ++row) {
      const auto top = std::max_element(logits[row].begin(), logits[row].end()) - logits[row].begin();
      if (choices[row].greedy()) {
        EXPECT_EQ(found[row], top);
      } else {
        EXPECT_TRUE(falls_on(found[row], numbers[row], logits[row], choices[row]))
            << found[row] << " of " << columns << ", row " << row << ", 1/T "
            << choices[row].inverse_temperature << " k " << choices[row].top_k << " p " << choices[row].top_p
            << " min " << choices[row].min_p;
      }
      // The same alone.
      EXPECT_EQ(row % 8 == 0 ? chosen({logits[row]}, {choices[row]})[0] : found[row], found[row]);
    }
  }
}

// Equals stand in their order.
TEST(Choose, BreaksTiesByTheLowestId) {
  constexpr int32_t count = 70000;
  const std::vector<float> row(count, 2.5f);
  std::vector<std::vector<float>> logits;
  std::vector<Choice> choices;
  std::vector<int32_t> want;
  for (int32_t i : {0, 1, 4095, 50000, count - 1}) {
    for (int32_t k : {0, 600}) {
      Choice choice{.inverse_temperature = 1.4f, .top_k = k};
      const int32_t among = k > 0 ? k : count, token = i % among;
      choice.set_number((token + 0.5) / among);
      logits.push_back(row), choices.push_back(choice), want.push_back(token);
    }
  }
  EXPECT_EQ(chosen(logits, choices), want);
}

TEST(Choose, SaysWhereThereIsNothingToChoose) {
  const float infinity = std::numeric_limits<float>::infinity();
  const Choice greedy, drawn{.inverse_temperature = 1};
  EXPECT_EQ(chosen({{1, NAN, 3}, {1, NAN, 3}, {-infinity, -infinity, -infinity}, {1, infinity, 0}, {0, 5, 1}},
                   {greedy, drawn, drawn, greedy, drawn}),
            (std::vector<int32_t>{Backend::not_a_number, Backend::not_a_number, Backend::not_finite,
                                  Backend::not_finite, 1}));
}

TEST(TakeChosen, TakesWhatWasChosenOrTheIdsThemselves) {
  Plan plan(backend());
  const Tensor out = take_chosen(indices(plan, {4}, {7, 8, 9, 10}), indices(plan, {4}, {-1, 2, 0, 1}),
                                 indices(plan, {3}, {5, Backend::not_a_number, 6}));
  plan.keep(out);
  plan.compile();
  plan.allocate();
  plan.run();
  EXPECT_EQ(read(out.view(), backend()), (Numbers{7, 6, 5, 0}));
}

}  // namespace
}  // namespace latente::test
