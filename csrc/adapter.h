// A LoRA adapter: to some linear layers it adds y += B (A x), with A (rank, K) and B (N, rank). Hu et al. 2021,
// arXiv:2106.09685. It lies apart from the weights, which never change, so sequences with different adapters and with none
// share a step.
//
// Matrices that read the same input (q, k, v; gate, up) have their A stacked, so that the input is read once:
//
//   t = A x        a[input]: panels (K, 32) float over the stacked ranks
//   y += B t       b: panels (rank, 32) float; its t begins at `first`
#pragma once

#include <string>
#include <vector>

#include "memory.h"

namespace hob {

enum Target { kTargetQ, kTargetK, kTargetV, kTargetO, kTargetGate, kTargetUp, kTargetDown, kNumTargets };
enum Input { kInputQkv, kInputO, kInputGateUp, kInputDown, kNumInputs };
extern const char* const kTargetNames[kNumTargets];  // as GGUF: "attn_q", ...

constexpr int kMaxRank = 256;
constexpr int kMaxStacked = 3 * kMaxRank;  // ranks of q, k and v together

// One matrix's pair as it comes in; row-major.
struct AdapterPair {
  int layer;
  std::string target;
  int rank, n, k;
  const float* a;  // (rank, k)
  const float* b;  // (n, rank), the scale in it
};

struct AdapterLayer {
  struct Part {
    float* b = nullptr;  // null: the matrix is not adapted
    int first = 0, rank = 0;
  };
  float* a[kNumInputs] = {};
  int stacked[kNumInputs] = {};
  Part part[kNumTargets];
};

class Model;

class Adapter {
 public:
  // Throws std::invalid_argument unless every pair fits the model.
  Adapter(const Model& model, const std::vector<AdapterPair>& pairs);

  const AdapterLayer& layer(int i) const { return layers_[static_cast<size_t>(i)]; }
  size_t num_bytes() const { return arena_.size(); }

 private:
  std::vector<AdapterLayer> layers_;
  Arena arena_;
};

}  // namespace hob
