// A model in memory: its shape, its matrices in packed form, the kernels and the threads that work on it.
//
// Checked once, here, against the file and against the network's shape, so that the forward pass can trust every
// pointer. Errors are std::invalid_argument with the numbers.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "adapter.h"
#include "kernels.h"
#include "memory.h"
#include "threads.h"

namespace hob {

// models/network.py's Network. Counts are of one model; 0 and empty mean what that file says.
struct Network {
  std::string architecture;
  int num_layers = 0, hidden_size = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0, ffn_size = 0, vocab_size = 0;
  int context_length = 0;
  float rms_eps = 1e-5f;
  double rope_theta = 10000.0, rope_scale = 1.0;
  int rope_dim = 0;
  std::vector<double> rope_factors;
  bool is_head_tied = true;
  float embedding_scale = 1.0f, attention_scale = 0.0f;
  bool has_qkv_bias = false, has_qk_norm = false, is_qk_norm_joint = false, has_post_norms = false;
  std::string activation = "silu";
  int sliding_window = 0;
  std::vector<uint8_t> sliding_layers;
  double sliding_rope_theta = 0.0;
  int num_experts = 0, num_active_experts = 0, expert_ffn_size = 0;
  bool is_expert_weight_normalised = false;
};

struct TensorEntry {
  std::string name;
  int kind;
  int64_t n, k;
  uint64_t offset, num_bytes;
};

// Weights of one linear layer: n outputs, k inputs, in panels (kernels.h).
struct Matrix {
  Kind kind = Kind::kF32;
  const uint8_t* data = nullptr;
  int n = 0, k = 0;
  int num_panels = 0;
  size_t panel_bytes = 0;

  bool is_quantised() const { return kind != Kind::kF32; }
  // The i-th of `count` matrices of equal size that lie one after the other; each fills whole panels.
  Matrix part(int i, int count) const {
    Matrix m = *this;
    m.n /= count;
    m.num_panels /= count;
    m.data += static_cast<size_t>(i) * static_cast<size_t>(m.num_panels) * panel_bytes;
    return m;
  }
};

struct Layer {
  const float* attn_norm;  // (hidden padded to 32)
  const float* ffn_norm;   // (hidden padded to 32)
  // Null where the family has none; padded to 32 too.
  const float *q_bias, *k_bias, *v_bias;             // (heads x head_dim)
  const float *q_norm, *k_norm;                      // (head_dim) of each head, or (heads x head_dim) of all at once
  const float *post_attn_norm, *post_ffn_norm;       // (hidden) before the residual sum
  bool is_sliding;                                   // rows see the latest `sliding_window` keys
  Matrix q, k, v, o;
  Matrix router;          // (experts, hidden) float32; no data where the FFN is dense
  Matrix gate, up, down;  // of experts: one expert's panels after the other's

  bool has_experts() const { return router.data != nullptr; }
};

using GateKernel = void (*)(const float* gate, const float* up, int n, float* y);
// The kernel of an activation: 'silu' or 'gelu_tanh'. Throws std::invalid_argument for another.
GateKernel gate_kernel(const Kernels& kernels, const std::string& activation);

constexpr int padded(int n) { return (n + 31) / 32 * 32; }

class Model {
 public:
  Model(const std::string& path, uint64_t data_offset, Network network, const std::vector<TensorEntry>& tensors,
        const std::string& isa, int num_threads, bool is_mapped);
  ~Model() { threads.reset(); }  // first: a late thread may be reading weights still

  Network network;
  const Kernels* kernels;
  std::vector<Layer> layers;
  Matrix embedding, head;
  const float* output_norm;
  // Radians per position, (rope_dim / 2): of layers that see all, and of those that slide if they have a base of their own.
  std::vector<std::vector<double>> rope_frequencies;
  GateKernel gate_mul;
  float attention_scale;
  uint64_t weight_bytes = 0;
  std::unique_ptr<ThreadPool> threads;

  // Between steps only. Ids are the caller's, from 1 on; 0 is none. Throws std::invalid_argument.
  size_t add_adapter(int id, const std::vector<AdapterPair>& pairs);
  void remove_adapter(int id) {
    threads->settle();
    adapters_.erase(id);
  }
  // Null for an id that is not there.
  const Adapter* adapter(int id) const {
    const auto found = adapters_.find(id);
    return found == adapters_.end() ? nullptr : found->second.get();
  }

  int hidden_padded() const { return padded(network.hidden_size); }
  int heads_size() const { return network.num_heads * network.head_dim; }
  int kv_size() const { return network.num_kv_heads * network.head_dim; }
  // Values that go into down: of the FFN, or of one expert's.
  int ffn_size() const { return network.num_experts > 0 ? network.expert_ffn_size : network.ffn_size; }
  int half_rope() const { return static_cast<int>(rope_frequencies[0].size()); }
  size_t rope_of(const Layer& layer) const { return layer.is_sliding ? rope_frequencies.size() - 1 : 0; }

 private:
  void check_network() const;
  Layer layer(int i);
  std::vector<double> rope_frequency(double theta, double scale, const std::vector<double>& factors) const;
  void read_weights(const std::string& path, uint64_t data_offset, uint64_t bytes, bool is_mapped);
  Matrix matrix(const std::string& name, int n, int k) const;
  const float* vector(const std::string& name, int k);

  std::vector<TensorEntry> tensors_;
  Region region_;
  const uint8_t* data_ = nullptr;
  std::vector<std::vector<float>> vectors_;
  std::map<int, std::unique_ptr<Adapter>> adapters_;
};

}  // namespace hob
