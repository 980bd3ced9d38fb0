// Opening and checking a packed model (model.h).
#include "model.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "cpu.h"
#include "pack.h"
#include "text.h"

namespace hob {
namespace {

class File {
 public:
  explicit File(const std::string& path) : path_(path), fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) refuse("cannot open ", path, ": ", std::strerror(errno));
  }
  ~File() { close(fd_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int fd() const { return fd_; }
  uint64_t size() const {
    struct stat status;
    if (fstat(fd_, &status) != 0) refuse("cannot read the size of ", path_, ": ", std::strerror(errno));
    return static_cast<uint64_t>(status.st_size);
  }
  void read(uint8_t* to, uint64_t bytes, uint64_t offset) const {
    while (bytes > 0) {
      const ssize_t n = pread(fd_, to, bytes, static_cast<off_t>(offset));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) refuse("reading ", path_, " at byte ", offset, ": ", n == 0 ? "end of file" : std::strerror(errno));
      to += n;
      offset += static_cast<uint64_t>(n);
      bytes -= static_cast<uint64_t>(n);
    }
  }

 private:
  const std::string path_;
  int fd_;
};

void check_extent(const TensorEntry& t, uint64_t bytes) {
  if (t.kind < 0 || t.kind >= kNumKinds) refuse("tensor ", t.name, " has kind ", t.kind, ", expected 0..", kNumKinds - 1);
  if (t.n < 1 || t.k < 1 || t.n > (1 << 28) || t.k > (1 << 28)) refuse("tensor ", t.name, " has shape ", t.n, " x ", t.k);
  const auto kind = static_cast<Kind>(t.kind);
  if (kind != Kind::kF32 && t.k % kGroup != 0)
    refuse("tensor ", t.name, " is quantised and has rows of ", t.k, " values, expected a multiple of ", kGroup);
  if (t.offset % 64 != 0) refuse("tensor ", t.name, " starts at offset ", t.offset, ", expected a multiple of 64");
  if (t.num_bytes != packed_bytes(kind, t.n, t.k))
    refuse("tensor ", t.name, " of ", t.n, " x ", t.k, " has ", t.num_bytes, " bytes, expected ", packed_bytes(kind, t.n, t.k));
  if (t.offset > bytes || t.num_bytes > bytes - t.offset)
    refuse("tensor ", t.name, " ends at byte ", t.offset + t.num_bytes, " of a data part of ", bytes, " bytes");
}

}  // namespace

GateKernel gate_kernel(const Kernels& kernels, const std::string& activation) {
  if (activation == "silu") return kernels.silu_mul;
  if (activation == "gelu_tanh") return kernels.gelu_mul;
  refuse("activation is '", activation, "', expected 'silu' or 'gelu_tanh'");
}

Model::Model(const std::string& path, uint64_t data_offset, Network network_, const std::vector<TensorEntry>& tensors,
             const std::string& isa, int num_threads, bool is_mapped)
    : network(std::move(network_)), kernels(kernels_for(isa)), tensors_(tensors) {
  if (num_threads < 1 || num_threads > 256) refuse("num_threads is ", num_threads, ", expected 1..256");
  check_network();
  const uint64_t file_bytes = File(path).size();
  if (data_offset % 64 != 0 || data_offset > file_bytes)
    refuse("data_offset is ", data_offset, ", expected a multiple of 64 within the ", file_bytes, " bytes of ", path);
  uint64_t bytes = 0;
  for (const auto& tensor : tensors_) {
    check_extent(tensor, file_bytes - data_offset);
    bytes = std::max(bytes, tensor.offset + tensor.num_bytes);
    weight_bytes += tensor.num_bytes;
  }
  read_weights(path, data_offset, bytes, is_mapped);

  const Network& net = network;
  embedding = matrix("token_embd.weight", net.vocab_size, net.hidden_size);
  head = net.is_head_tied ? embedding : matrix("output.weight", net.vocab_size, net.hidden_size);
  output_norm = vector("output_norm.weight", net.hidden_size);
  for (int i = 0; i < net.num_layers; ++i) layers.push_back(layer(i));
  rope_frequencies.push_back(rope_frequency(net.rope_theta, net.rope_scale, net.rope_factors));
  if (net.sliding_rope_theta > 0.0) rope_frequencies.push_back(rope_frequency(net.sliding_rope_theta, 1.0, {}));
  gate_mul = gate_kernel(*kernels, net.activation);
  attention_scale = net.attention_scale != 0.0f ? net.attention_scale : 1.0f / std::sqrt(static_cast<float>(net.head_dim));
  threads = std::make_unique<ThreadPool>(num_threads);
}

Layer Model::layer(int i) {
  const Network& net = network;
  const int hidden = net.hidden_size, q_size = heads_size();
  const std::string prefix = text("blk.", i, ".");
  const auto optional = [&](bool has, const char* name, int k) { return has ? vector(prefix + name, k) : nullptr; };
  Layer l{};
  l.attn_norm = vector(prefix + "attn_norm.weight", hidden);
  l.ffn_norm = vector(prefix + "ffn_norm.weight", hidden);
  l.q_bias = optional(net.has_qkv_bias, "attn_q.bias", q_size);
  l.k_bias = optional(net.has_qkv_bias, "attn_k.bias", kv_size());
  l.v_bias = optional(net.has_qkv_bias, "attn_v.bias", kv_size());
  l.q_norm = optional(net.has_qk_norm, "attn_q_norm.weight", net.is_qk_norm_joint ? q_size : net.head_dim);
  l.k_norm = optional(net.has_qk_norm, "attn_k_norm.weight", net.is_qk_norm_joint ? kv_size() : net.head_dim);
  l.post_attn_norm = optional(net.has_post_norms, "post_attention_norm.weight", hidden);
  l.post_ffn_norm = optional(net.has_post_norms, "post_ffw_norm.weight", hidden);
  l.is_sliding = !net.sliding_layers.empty() && net.sliding_layers[static_cast<size_t>(i)] != 0;
  l.q = matrix(prefix + "attn_q.weight", q_size, hidden);
  l.k = matrix(prefix + "attn_k.weight", kv_size(), hidden);
  l.v = matrix(prefix + "attn_v.weight", kv_size(), hidden);
  l.o = matrix(prefix + "attn_output.weight", hidden, q_size);
  const int experts = std::max(1, net.num_experts);
  const std::string suffix = net.num_experts > 0 ? "_exps.weight" : ".weight";
  l.gate = matrix(prefix + "ffn_gate" + suffix, experts * ffn_size(), hidden);
  l.up = matrix(prefix + "ffn_up" + suffix, experts * ffn_size(), hidden);
  l.down = matrix(prefix + "ffn_down" + suffix, experts * hidden, ffn_size());
  if (net.num_experts > 0) l.router = matrix(prefix + "ffn_gate_inp.weight", net.num_experts, hidden);
  if (l.router.is_quantised()) refuse("tensor ", prefix, "ffn_gate_inp.weight is quantised, expected float32");
  return l;
}

std::vector<double> Model::rope_frequency(double theta, double scale, const std::vector<double>& factors) const {
  const int rope_dim = network.rope_dim == 0 ? network.head_dim : network.rope_dim;
  std::vector<double> frequency;
  for (int i = 0; i < rope_dim / 2; ++i) {
    const double factor = factors.empty() ? 1.0 : factors[static_cast<size_t>(i)];
    frequency.push_back(std::pow(theta, -2.0 * i / rope_dim) / (factor * scale));
  }
  return frequency;
}

void Model::check_network() const {
  const Network& n = network;
  const std::pair<const char*, int> counts[] = {
      {"num_layers", n.num_layers},   {"hidden_size", n.hidden_size},       {"num_heads", n.num_heads},
      {"num_kv_heads", n.num_kv_heads}, {"head_dim", n.head_dim},           {"ffn_size", n.ffn_size},
      {"vocab_size", n.vocab_size},   {"context_length", n.context_length},
  };
  for (const auto& [name, value] : counts)
    if (value < 1 || value > (1 << 24)) refuse("network: ", name, " is ", value, ", expected 1..", 1 << 24);
  if (n.num_layers > 1024) refuse("network: num_layers is ", n.num_layers, ", expected at most 1024");
  if (n.head_dim > kMaxHeadDim) refuse("network: head_dim is ", n.head_dim, ", expected at most ", kMaxHeadDim);
  if (int64_t{n.num_heads} * n.head_dim > (1 << 20)) refuse("network: ", n.num_heads, " heads of ", n.head_dim, " are too many");
  if (n.num_heads % n.num_kv_heads != 0)
    refuse("network: num_heads is ", n.num_heads, ", expected a multiple of num_kv_heads, ", n.num_kv_heads);
  const int rope_dim = n.rope_dim == 0 ? n.head_dim : n.rope_dim;
  if (rope_dim < 0 || rope_dim > n.head_dim || rope_dim % 2 != 0)
    refuse("network: rope_dim is ", rope_dim, ", expected an even number up to head_dim, ", n.head_dim);
  if (!n.rope_factors.empty() && n.rope_factors.size() != static_cast<size_t>(rope_dim / 2))
    refuse("network: ", n.rope_factors.size(), " rope_factors, expected ", rope_dim / 2);
  for (double factor : n.rope_factors)
    if (!(factor > 0.0)) refuse("network: a rope factor is ", factor, ", expected more than 0");
  if (!(n.rope_theta > 0.0) || !(n.rope_scale > 0.0))
    refuse("network: rope_theta ", n.rope_theta, " and rope_scale ", n.rope_scale, " must be more than 0");
  if (n.sliding_window < 0) refuse("network: sliding_window is ", n.sliding_window, ", expected 0 or more");
  if (!n.sliding_layers.empty() && n.sliding_layers.size() != static_cast<size_t>(n.num_layers))
    refuse("network: ", n.sliding_layers.size(), " sliding_layers, expected ", n.num_layers);
  if (!n.sliding_layers.empty() != (n.sliding_window > 0)) refuse("network: sliding_window and sliding_layers go together");
  if (n.num_experts < 0 || n.num_experts > 4096) refuse("network: num_experts is ", n.num_experts, ", expected 0..4096");
  if (n.num_experts > 0) {
    if (n.num_active_experts < 1 || n.num_active_experts > n.num_experts)
      refuse("network: num_active_experts is ", n.num_active_experts, ", expected 1..", n.num_experts);
    if (n.has_post_norms) refuse("network: post_norms and experts do not go together");
    if (n.expert_ffn_size < kPanel || n.expert_ffn_size > (1 << 20) || n.expert_ffn_size % kPanel != 0 || n.hidden_size % kPanel != 0)
      refuse("network: experts of ", n.hidden_size, " x ", n.expert_ffn_size, ", expected multiples of ", kPanel);
  }
  if (!(n.sliding_rope_theta >= 0.0)) refuse("network: sliding_rope_theta is ", n.sliding_rope_theta, ", expected 0 or more");
  if (!(n.rms_eps >= 0.0f)) refuse("network: rms_eps is ", n.rms_eps, ", expected 0 or more");
}

void Model::read_weights(const std::string& path, uint64_t data_offset, uint64_t bytes, bool is_mapped) {
  const File file(path);
  if (is_mapped) {
    region_ = Region::of_file(file.fd(), data_offset + bytes, path);
    data_ = region_.data() + data_offset;
    return;
  }
  region_ = Region::anonymous(bytes, true);
  file.read(region_.data(), bytes, data_offset);
  data_ = region_.data();
}

size_t Model::add_adapter(int id, const std::vector<AdapterPair>& pairs) {
  if (id < 1) refuse("adapter id is ", id, ", expected 1 or more");
  auto made = std::make_unique<Adapter>(*this, pairs);
  const size_t bytes = made->num_bytes();
  remove_adapter(id);
  adapters_[id] = std::move(made);
  return bytes;
}

Matrix Model::matrix(const std::string& name, int n, int k) const {
  for (const auto& t : tensors_) {
    if (t.name != name) continue;
    if (t.n != n || t.k != k) refuse("tensor ", name, " has shape ", t.n, " x ", t.k, ", the network needs ", n, " x ", k);
    if (n == 1 && t.kind == 0) refuse("tensor ", name, " has one output: matrices need at least two");
    Matrix m;
    m.kind = static_cast<Kind>(t.kind);
    m.data = data_ + t.offset;
    m.n = n;
    m.k = k;
    m.num_panels = (n + kPanel - 1) / kPanel;
    m.panel_bytes = t.num_bytes / static_cast<size_t>(m.num_panels);
    return m;
  }
  refuse("tensor ", name, " is missing");
}

const float* Model::vector(const std::string& name, int k) {
  for (const auto& t : tensors_) {
    if (t.name != name) continue;
    if (t.kind != 0 || t.n != 1 || t.k != k)
      refuse("tensor ", name, " has kind ", t.kind, " and shape ", t.n, " x ", t.k, ", expected float32 of 1 x ", k);
    auto& copy = vectors_.emplace_back(static_cast<size_t>(padded(k)), 0.0f);
    std::memcpy(copy.data(), data_ + t.offset, static_cast<size_t>(k) * sizeof(float));
    return copy.data();
  }
  refuse("tensor ", name, " is missing");
}

}  // namespace hob
