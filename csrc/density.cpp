// The pass of density.h: queries that the step kept, against the keys as they lie in the pool. Asked for once in many
// steps, so it is plain code and no kernel.
#include "density.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "half.h"
#include "text.h"

namespace hob {
namespace {

// Dimension d of the keys of a block's 16 tokens, as their KvType has them (kernels.h).
void load_keys(KvType type, const uint8_t* block, int head_dim, int d, float* keys) {
  if (type == KvType::kF16) {
    const auto* halves = reinterpret_cast<const uint16_t*>(block) + d * kBlockTokens;
    for (int t = 0; t < kBlockTokens; ++t) keys[t] = half_to_float(halves[t]);
    return;
  }
  const auto* codes = reinterpret_cast<const int8_t*>(block) + d / 4 * kBlockTokens * 4 + d % 4;
  const auto* scales = reinterpret_cast<const uint16_t*>(block + code_bytes(head_dim));
  for (int t = 0; t < kBlockTokens; ++t) keys[t] = static_cast<float>(codes[4 * t]) * half_to_float(scales[t]);
}

// One layer's part: softmax over the keys that its heads see, summed by block into mass (num_blocks).
void add_layer(KvPool& pool, const Workspace& w, int layer, const int32_t* blocks, int num_blocks, float* mass) {
  const Network& net = w.model.network;
  const int dim = net.head_dim, group = net.num_heads / net.num_kv_heads, num_keys = w.measured_keys;
  const int window = w.model.layers[static_cast<size_t>(layer)].is_sliding ? net.sliding_window : 0;
  const int first_key = window > 0 ? std::max(num_keys - window, 0) : 0;
  std::vector<float> scores(static_cast<size_t>(group) * static_cast<size_t>(num_blocks) * kBlockTokens);
  float keys[kBlockTokens];
  for (int kv_head = 0; kv_head < net.num_kv_heads; ++kv_head) {
    std::fill(scores.begin(), scores.end(), 0.0f);
    const float* query = w.measured + static_cast<ptrdiff_t>(layer) * w.q_stride + kv_head * group * dim;
    for (int b = first_key / kBlockTokens; b < num_blocks; ++b) {
      const uint8_t* block = pool.block(blocks[b]) + pool.key_offset(layer, kv_head);
      for (int d = 0; d < dim; ++d) {
        load_keys(pool.type, block, dim, d, keys);
        for (int g = 0; g < group; ++g) {
          float* sums = scores.data() + (static_cast<ptrdiff_t>(g) * num_blocks + b) * kBlockTokens;
          const float q = query[g * dim + d];
          for (int t = 0; t < kBlockTokens; ++t) sums[t] += q * keys[t];
        }
      }
    }
    for (int g = 0; g < group; ++g) {
      float* row = scores.data() + static_cast<ptrdiff_t>(g) * num_blocks * kBlockTokens;
      const float most = *std::max_element(row + first_key, row + num_keys);
      double total = 0;
      for (int k = first_key; k < num_keys; ++k) total += row[k] = std::exp(row[k] - most);
      const float share = static_cast<float>(1.0 / (total * net.num_heads * net.num_layers));
      for (int k = first_key; k < num_keys; ++k) mass[k / kBlockTokens] += row[k] * share;
    }
  }
}

}  // namespace

void density(KvPool& pool, const Workspace& w, const int32_t* blocks, int num_blocks, float* mass) {
  if (&w.model != &pool.model) refuse("the workspace and the pool belong to another model");
  if (w.measured_keys == 0) refuse("density: no row of the last step was measured");
  if ((w.measured_keys - 1) / kBlockTokens + 1 != num_blocks)
    refuse("density: the measured row sees ", w.measured_keys, " keys, the table has ", num_blocks, " blocks");
  for (int b = 0; b < num_blocks; ++b) pool.check(blocks[b]);
  const int num_layers = w.model.network.num_layers;
  // A row of sums for each layer, added up in order: the same bits on any number of threads.
  std::vector<float> sums(static_cast<size_t>(num_layers) * static_cast<size_t>(num_blocks));
  auto one = [&](int layer, int) { add_layer(pool, w, layer, blocks, num_blocks, sums.data() + static_cast<ptrdiff_t>(layer) * num_blocks); };
  w.model.threads->run(num_layers, one);
  std::fill_n(mass, num_blocks, 0.0f);
  for (int layer = 0; layer < num_layers; ++layer)
    for (int b = 0; b < num_blocks; ++b) mass[b] += sums[static_cast<size_t>(layer) * static_cast<size_t>(num_blocks) + static_cast<size_t>(b)];
}

}  // namespace hob
