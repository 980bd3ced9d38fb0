// The sampler of sample.h. Rows are shared out to the thread pool; each works in its thread's scratch.
#include "sample.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "text.h"

namespace hob {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

uint64_t mix(uint64_t x) {  // splitmix64's finaliser: Steele, Lea and Flood 2014
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ x >> 27) * 0x94d049bb133111ebull;
  return x ^ x >> 31;
}

// At least k of the row's values are at or above this, and not many more: the k-th largest of the maxima of blocks of 32.
float lower_bound_of_top(const Kernels& kernels, const float* x, int n, int k, Scratch& s) {
  kernels.block_maxima(x, n, s.maxima);
  const int blocks = n / 32;
  if (k >= blocks) return kMinusInf;
  std::nth_element(s.maxima, s.maxima + (k - 1), s.maxima + blocks, std::greater<>());
  return s.maxima[k - 1];
}

// A maximum does not show them, where the sum of the exponentials does.
bool has_nan(const float* x, int n) {
  int found = 0;
  for (int i = 0; i < n; ++i) found |= x[i] != x[i];
  return found != 0;
}

// Larger first; among equals the lower id.
struct ByValue {
  const float* x;
  bool operator()(int32_t a, int32_t b) const { return x[a] > x[b] || (x[a] == x[b] && a < b); }
};

// The k largest into s.ids, in no order; returns how many (fewer than k only if n is).
int select_top(const Kernels& kernels, const float* x, int n, int k, Scratch& s) {
  const float bound = lower_bound_of_top(kernels, x, n, k, s);
  const int found = kernels.select_at_least(x, n, bound, s.ids, n);
  if (found <= k) return found;
  std::nth_element(s.ids, s.ids + (k - 1), s.ids + found, ByValue{x});
  return k;
}

class Row {
 public:
  Row(const Workspace& w, const Draws& d, int i, Scratch& s)
      : k_(*w.model.kernels), d_(d), i_(i), s_(s), vocab_(w.model.network.vocab_size), n_(w.vocab_padded),
        raw_(w.logits + static_cast<ptrdiff_t>(i) * n_) {}

  // False: no token can be chosen (all masked, or the logits are not finite).
  bool draw() {
    const bool has_logprob = d_.num_logprobs[i_] != kNoLogprob;
    const double lse = has_logprob ? log_sum_exp(k_, raw_, n_, s_) : 0.0;
    if (!std::isfinite(lse) || (!has_logprob && has_nan(raw_, vocab_))) return false;
    if (d_.num_logprobs[i_] > 0) {
      const int at = d_.tops_start[i_];
      most_likely(k_, raw_, n_, d_.num_logprobs[i_], lse, s_, d_.top_ids + at, d_.top_logprobs + at);
    }
    x_ = changed();
    max_ = k_.block_maxima(x_, n_, s_.maxima);
    const bool can_choose = std::isfinite(max_);
    const int32_t id = !can_choose ? 0 : d_.temperature[i_] == 0.0f ? first_largest() : drawn();
    take_back_bias();
    if (!can_choose) return false;
    d_.id[i_] = id;
    d_.logprob[i_] = has_logprob ? static_cast<float>(raw_[id] - lse) : 0.0f;
    return true;
  }

 private:
  // The logits after bias, penalties and mask. A bias alone, unless it is long, changes the raw row itself for the time
  // of the draw: copying the row would take longer than the draw.
  const float* changed() {
    const int bias = d_.bias_start[i_ + 1] - d_.bias_start[i_];
    const bool is_penalised = d_.repetition[i_] != 1.0f || d_.presence[i_] != 0.0f || d_.frequency[i_] != 0.0f;
    const uint8_t* mask = narrowing_mask();
    if (!is_penalised && !mask && bias <= n_) {
      for (int j = 0; j < bias; ++j) {
        float& x = raw_[d_.bias_ids[d_.bias_start[i_] + j]];
        s_.logits[j] = x;
        x += d_.bias_values[d_.bias_start[i_] + j];
      }
      num_changed_ = bias;
      return raw_;
    }
    std::memcpy(s_.logits, raw_, static_cast<size_t>(n_) * sizeof(float));
    for (int j = d_.bias_start[i_]; j < d_.bias_start[i_ + 1]; ++j) s_.logits[d_.bias_ids[j]] += d_.bias_values[j];
    if (is_penalised) penalise();
    if (mask) forbid(mask);
    return s_.logits;
  }

  // Backwards: an id may be there twice.
  void take_back_bias() {
    for (int j = num_changed_ - 1; j >= 0; --j) raw_[d_.bias_ids[d_.bias_start[i_] + j]] = s_.logits[j];
  }

  // The row's mask; null if there is none or it allows every token, as those of sequences without a grammar do.
  const uint8_t* narrowing_mask() const {
    if (!d_.mask) return nullptr;
    const uint8_t* mask = d_.mask + static_cast<size_t>(i_) * d_.mask_stride;
    const auto allows_all = [](uint8_t byte) { return byte == 0xff; };
    const bool is_open = std::all_of(mask, mask + vocab_ / 8, allows_all);
    const int rest = (1 << vocab_ % 8) - 1;
    return is_open && (mask[vocab_ / 8 - (rest == 0)] & rest) == rest ? nullptr : mask;
  }

  // Minus infinity for what the mask (vocab_ bits) does not allow. Most bytes are all ones or all zeros.
  void forbid(const uint8_t* mask) {
    for (int id = 0; id < vocab_; id += 8) {
      const int end = std::min(id + 8, vocab_);
      const uint8_t byte = mask[id / 8];
      if (byte == 0xff) continue;
      for (int j = id; j < end; ++j)
        if (!(byte >> (j - id) & 1)) s_.logits[j] = kMinusInf;
    }
  }

  // counts[id] = 1 + how often `id` was generated, for ids in the history; zero again when done.
  void penalise() {
    const int32_t *begin = d_.history + d_.history_start[i_], *end = d_.history + d_.history_start[i_ + 1];
    const int32_t* output = end - d_.num_generated[i_];
    for (const int32_t* id = begin; id != end; ++id) {
      if (s_.counts[*id] == 0) s_.counts[*id] = 1;
      if (id >= output) ++s_.counts[*id];
    }
    for (const int32_t* id = begin; id != end; ++id) {
      const int count = s_.counts[*id] - 1;
      if (count < 0) continue;
      s_.counts[*id] = 0;
      float& x = s_.logits[*id];
      x = x > 0.0f ? x / d_.repetition[i_] : x * d_.repetition[i_];
      if (count > 0) x -= d_.presence[i_] + d_.frequency[i_] * static_cast<float>(count);
    }
  }

  int32_t first_largest() {
    k_.select_at_least(x_, n_, max_, s_.ids, 1);
    return s_.ids[0];
  }

  int32_t drawn() {
    const double u = uniform(d_.seed[i_], d_.sample_index[i_], d_.position[i_]);
    inverse_temperature_ = 1.0f / d_.temperature[i_];
    const bool has_top_k = d_.top_k[i_] > 0 && d_.top_k[i_] < vocab_;
    if (!has_top_k && d_.min_p[i_] <= 0.0f && d_.top_p[i_] >= 1.0f) return from_all(u);
    int count = has_top_k ? select_top(k_, x_, n_, d_.top_k[i_], s_) : -1;
    if (d_.min_p[i_] > 0.0f) count = keep_min_p(count);
    if (d_.top_p[i_] < 1.0f) count = count < 0 ? top_p_of_all() : top_p_of(count, total(count));
    return from_kept(count, u);
  }

  double weight(int32_t id) { return static_cast<double>(s_.weights[id]); }

  // Weights exp((x - max) / temperature) of the whole row into s.weights; returns their sum.
  double weigh_all() { return k_.exp_sums(x_, n_, max_, inverse_temperature_, s_.weights, s_.sums); }

  int32_t from_all(double u) {
    double target = u * weigh_all();
    const int chunks = (n_ + 511) / 512;
    int c = 0;
    while (c + 1 < chunks && target >= s_.sums[c]) target -= s_.sums[c++];
    int32_t last = -1;
    for (int32_t id = c * 512; id < std::min(n_, (c + 1) * 512); ++id) {
      if (s_.weights[id] <= 0.0f) continue;
      last = id;
      target -= weight(id);
      if (target < 0.0) return id;
    }
    return last >= 0 ? last : first_largest();  // rounding used up the chunk
  }

  // Weights of the ids kept so far; returns their sum.
  double total(int count) {
    double sum = 0.0;
    for (int j = 0; j < count; ++j) sum += weight(s_.ids[j]);
    return sum;
  }

  // Drops ids with less than min_p of the largest weight. count < 0: none were selected yet.
  int keep_min_p(int count) {
    weigh_all();
    is_weighed_ = true;
    const float least = d_.min_p[i_];  // the largest weight is exp(0) = 1
    if (count < 0) return k_.select_at_least(s_.weights, n_, least, s_.ids, n_);
    return static_cast<int>(std::remove_if(s_.ids, s_.ids + count, [&](int32_t id) { return s_.weights[id] < least; }) - s_.ids);
  }

  // The smallest set of likeliest ids with top_p of the row's weight, found in ever wider selections.
  int top_p_of_all() {
    const double all = weigh_all();
    is_weighed_ = true;
    for (const float least : {0.05f, 0.005f, 5e-4f, 5e-5f, 1e-6f, 0.0f}) {
      const int count = k_.select_at_least(s_.weights, n_, least, s_.ids, n_);
      if (least == 0.0f || total(count) >= static_cast<double>(d_.top_p[i_]) * all) return top_p_of(count, all);
    }
    return 0;
  }

  int top_p_of(int count, double all) {
    if (!is_weighed_) all = weigh_kept(count);
    std::sort(s_.ids, s_.ids + count, ByValue{x_});
    const double wanted = static_cast<double>(d_.top_p[i_]) * all;
    double sum = 0.0;
    for (int j = 0; j < count; ++j) {
      sum += weight(s_.ids[j]);
      if (sum >= wanted) return j + 1;
    }
    return count;
  }

  double weigh_kept(int count) {
    weigh_all();
    is_weighed_ = true;
    return total(count);
  }

  int32_t from_kept(int count, double u) {
    std::sort(s_.ids, s_.ids + count);
    double target = u * (is_weighed_ ? total(count) : weigh_kept(count));
    int32_t last = -1;
    for (int j = 0; j < count; ++j) {
      if (weight(s_.ids[j]) <= 0.0) continue;
      last = s_.ids[j];
      target -= weight(last);
      if (target < 0.0) return last;
    }
    return last >= 0 ? last : first_largest();
  }

  const Kernels& k_;
  const Draws& d_;
  const int i_;
  Scratch& s_;
  const int vocab_, n_;
  float* raw_;
  int num_changed_ = 0;  // values of it, kept in s_.logits
  const float* x_ = nullptr;
  float max_ = 0.0f, inverse_temperature_ = 1.0f;
  bool is_weighed_ = false;
};

void check_at_least(const char* name, int row, double value, double least) {
  if (!(value >= least && std::isfinite(value))) refuse("draw ", row, ": ", name, " is ", value, ", expected at least ", least);
}

void check_draws(const Workspace& w, const Draws& d) {
  const int vocab = w.model.network.vocab_size;
  if (static_cast<size_t>(d.n) != w.logits_rows.size())
    refuse(d.n, " draws for a step with ", w.logits_rows.size(), " rows of logits");
  if (d.mask && d.mask_stride < static_cast<size_t>((vocab + 7) / 8))
    refuse("mask has ", d.mask_stride, " bytes a row, expected at least ", (vocab + 7) / 8);
  for (int i = 0; i < d.n; ++i) {
    check_at_least("temperature", i, d.temperature[i], 0.0);
    check_at_least("top_k", i, d.top_k[i], 0.0);
    check_at_least("top_p", i, d.top_p[i], 0.0);
    check_at_least("min_p", i, d.min_p[i], 0.0);
    if (d.min_p[i] > 1.0f) refuse("draw ", i, ": min_p is ", d.min_p[i], ", expected at most 1");
    if (!(d.repetition[i] > 0.0f && std::isfinite(d.repetition[i])))
      refuse("draw ", i, ": repetition_penalty is ", d.repetition[i], ", expected more than 0");
    if (!std::isfinite(d.presence[i]) || !std::isfinite(d.frequency[i]))
      refuse("draw ", i, ": presence ", d.presence[i], " and frequency ", d.frequency[i], " must be finite");
    if (d.num_logprobs[i] < kNoLogprob || d.num_logprobs[i] > std::min(kMaxTops, vocab))
      refuse("draw ", i, ": num_logprobs is ", d.num_logprobs[i], ", expected -1..", std::min(kMaxTops, vocab));
    if (d.num_generated[i] < 0 || d.num_generated[i] > d.history_start[i + 1] - d.history_start[i])
      refuse("draw ", i, ": num_generated is ", d.num_generated[i], " of a history of ", d.history_start[i + 1] - d.history_start[i]);
  }
  const auto check_ids = [&](const char* name, const int32_t* ids, int count) {
    for (int j = 0; j < count; ++j)
      if (ids[j] < 0 || ids[j] >= vocab) refuse(name, "[", j, "] is ", ids[j], ", not in the vocabulary of ", vocab);
  };
  check_ids("history", d.history, d.history_start[d.n]);
  check_ids("bias_ids", d.bias_ids, d.bias_start[d.n]);
}

}  // namespace

double uniform(uint64_t seed, int32_t sample_index, int32_t position) {
  uint64_t h = mix(seed + 0x9e3779b97f4a7c15ull);
  h = mix(h ^ static_cast<uint32_t>(sample_index));
  h = mix(h + 0x9e3779b97f4a7c15ull * (static_cast<uint64_t>(static_cast<uint32_t>(position)) + 1));
  return static_cast<double>(h >> 11) * 0x1p-53;
}

double log_sum_exp(const Kernels& kernels, const float* x, int n, Scratch& s) {
  const float max = kernels.block_maxima(x, n, s.maxima);
  return static_cast<double>(max) + std::log(kernels.exp_sums(x, n, max, 1.0f, nullptr, s.sums));
}

void most_likely(const Kernels& kernels, const float* x, int n, int k, double lse, Scratch& s, int32_t* ids,
                 float* logprobs) {
  if (k == 0) return;
  const int found = select_top(kernels, x, n, k, s);
  std::sort(s.ids, s.ids + found, ByValue{x});
  for (int j = 0; j < k; ++j) {
    ids[j] = s.ids[std::min(j, found - 1)];
    logprobs[j] = static_cast<float>(x[ids[j]] - lse);
  }
}

void sample(Workspace& w, const Draws& d) {
  check_draws(w, d);
  std::atomic<int> failed{-1};
  auto work = [&](int i, int thread) {
    if (!Row(w, d, i, w.scratch[static_cast<size_t>(thread)]).draw()) failed.store(i);
  };
  w.model.threads->run(d.n, work);
  if (const int i = failed.load(); i >= 0)
    throw std::runtime_error(text("draw ", i, ": no token can be chosen: the logits are not finite or all are masked"));
}

}  // namespace hob
