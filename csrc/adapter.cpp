// Checking and laying out an adapter (adapter.h).
#include "adapter.h"

#include <algorithm>

#include "model.h"
#include "text.h"

namespace hob {

const char* const kTargetNames[kNumTargets] = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"};

namespace {

constexpr Input kInputOf[kNumTargets] = {kInputQkv, kInputQkv, kInputQkv, kInputO, kInputGateUp, kInputGateUp, kInputDown};

const Matrix& matrix_of(const Layer& l, int target) {
  const Matrix* matrices[kNumTargets] = {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down};
  return *matrices[target];
}

int check_pair(const Model& model, const AdapterPair& p) {
  const auto* found = std::find(std::begin(kTargetNames), std::end(kTargetNames), p.target);
  if (found == std::end(kTargetNames)) refuse("adapter: '", p.target, "' is not a matrix that can be adapted");
  if (p.layer < 0 || p.layer >= model.network.num_layers)
    refuse("adapter: layer ", p.layer, " of ", p.target, ", the model has ", model.network.num_layers);
  if (p.rank < 1 || p.rank > kMaxRank) refuse("adapter: rank ", p.rank, " of ", p.target, ", expected 1..", kMaxRank);
  const int target = static_cast<int>(found - std::begin(kTargetNames));
  const Matrix& matrix = matrix_of(model.layers[static_cast<size_t>(p.layer)], target);
  if (p.n != matrix.n || p.k != matrix.k)
    refuse("adapter: ", p.target, " of layer ", p.layer, " is ", p.n, " x ", p.k, ", the model's is ", matrix.n, " x ", matrix.k);
  return target;
}

int panels(int n) { return (n + kPanel - 1) / kPanel; }

// Rows of `source` (n, k) become columns first .. first + n of panels (k, 32).
void lay_out(const float* source, int n, int k, int first, float* to) {
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < k; ++j)
      to[(static_cast<ptrdiff_t>((first + i) / kPanel) * k + j) * kPanel + (first + i) % kPanel] = source[static_cast<ptrdiff_t>(i) * k + j];
}

}  // namespace

Adapter::Adapter(const Model& model, const std::vector<AdapterPair>& pairs) : layers_(model.layers.size()) {
  for (const AdapterPair& p : pairs) {
    const int target = check_pair(model, p);
    AdapterLayer& l = layers_[static_cast<size_t>(p.layer)];
    AdapterLayer::Part& part = l.part[target];
    if (part.rank != 0) refuse("adapter: ", p.target, " of layer ", p.layer, " comes twice");
    part.rank = p.rank;
    part.first = l.stacked[kInputOf[target]];
    l.stacked[kInputOf[target]] += p.rank;
  }
  for (const AdapterPair& p : pairs) {
    const int target = check_pair(model, p);
    AdapterLayer& l = layers_[static_cast<size_t>(p.layer)];
    const Input input = kInputOf[target];
    arena_.add(&l.part[target].b, static_cast<size_t>(panels(p.n)) * kPanel * static_cast<size_t>(p.rank));
    if (l.part[target].first == 0) arena_.add(&l.a[input], static_cast<size_t>(panels(l.stacked[input])) * kPanel * static_cast<size_t>(p.k));
  }
  arena_.commit(false);
  for (const AdapterPair& p : pairs) {
    const int target = check_pair(model, p);
    const AdapterLayer& l = layers_[static_cast<size_t>(p.layer)];
    lay_out(p.a, p.rank, p.k, l.part[target].first, l.a[kInputOf[target]]);
    lay_out(p.b, p.n, p.rank, 0, l.part[target].b);
  }
}

}  // namespace hob
