// Choosing tokens from rows of logits.
//
//   raw logits -> log-probability of the choice (log softmax of the raw logits)
//   raw logits -> + bias -> repetition penalty (prompt and output) -> presence and frequency (output) -> mask
//              -> temperature -> top_k -> min_p -> top_p -> kept tokens in id order -> inverse CDF
//
// The random number of a draw is a function of (seed, sample index, position) and of nothing else. Temperature 0 takes
// the largest logit, the lowest id among equals. Nothing sorts a vocabulary: thresholds select candidates, and only
// those are sorted. Native because 16 rows of 49,152 logits take NumPy longer than the step that made them.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "workspace.h"

namespace hob {

constexpr int32_t kNoLogprob = -1;  // as num_logprobs: nobody wants the token's own log-probability; 0 is given instead

// n rows, those of the last step that asked for logits. The arrays belong to the caller.
struct Draws {
  int n;
  const float *temperature, *top_p, *min_p, *repetition, *presence, *frequency;  // (n)
  const int32_t *top_k, *sample_index, *position, *num_logprobs, *num_generated;  // (n)
  const uint64_t* seed;            // (n)
  const int32_t* history;          // prompt and output ids of all rows
  const int32_t* history_start;    // (n + 1)
  const int32_t* bias_ids;
  const float* bias_values;
  const int32_t* bias_start;       // (n + 1)
  const uint8_t* mask;             // null or (n, mask_stride): bit id % 8 of byte id / 8 allows a token
  size_t mask_stride;
  int32_t* id;                     // (n) out
  float* logprob;                  // (n) out
  const int32_t* tops_start;       // (n + 1) where each row's tops go; row i takes num_logprobs[i]
  int32_t* top_ids;                // out, most likely first
  float* top_logprobs;             // out
};

// Throws std::invalid_argument naming the row and value, std::runtime_error when a row has no token to choose.
void sample(Workspace& workspace, const Draws& draws);

// In [0, 1), from a counter-based hash.
double uniform(uint64_t seed, int32_t sample_index, int32_t position);

// log(sum(exp(x))) over a padded row of logits; not finite if a logit is NaN.
double log_sum_exp(const Kernels& kernels, const float* x, int n, Scratch& scratch);

// The k largest of a padded row, largest first, lower id first among equals: ids and x - lse.
void most_likely(const Kernels& kernels, const float* x, int n, int k, double lse, Scratch& scratch, int32_t* ids,
                 float* logprobs);

}  // namespace hob
