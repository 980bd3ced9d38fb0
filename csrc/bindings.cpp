// hob.native._core: the compute core as Python sees it. Checks shapes, lets go of the GIL, translates errors
// (std::invalid_argument -> ValueError, std::runtime_error -> RuntimeError, std::bad_alloc -> MemoryError).
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <thread>

#include "arrays.h"
#include "cpu.h"
#include "density.h"
#include "forward.h"
#include "kv.h"
#include "model.h"
#include "pack.h"
#include "sample.h"
#include "text.h"
#include "workspace.h"

namespace hob {
namespace {

template <class T>
T field(const nb::dict& network, const char* name) {
  if (!network.contains(name)) refuse("network: '", name, "' is missing");
  T value;
  if (!nb::try_cast<T>(network[name], value)) refuse("network: '", name, "' is of another type, or a number out of range");
  return value;
}

// Switches of architectures that the forward pass does not have yet must be at their neutral value.
void require_neutral(const nb::dict& network) {
  for (const char* name : {"logit_softcap", "attention_softcap"})
    if (network.contains(name) && nb::cast<double>(nb::float_(network[name])) != 0.0)
      refuse("network: ", name, " is not supported by this version (architecture '", field<std::string>(network, "architecture"), "')");
}

Network network_from(const nb::dict& d) {
  require_neutral(d);
  Network n;
  n.architecture = field<std::string>(d, "architecture");
  n.num_layers = field<int>(d, "num_layers");
  n.hidden_size = field<int>(d, "hidden_size");
  n.num_heads = field<int>(d, "num_heads");
  n.num_kv_heads = field<int>(d, "num_kv_heads");
  n.head_dim = field<int>(d, "head_dim");
  n.ffn_size = field<int>(d, "ffn_size");
  n.vocab_size = field<int>(d, "vocab_size");
  n.context_length = field<int>(d, "context_length");
  n.rms_eps = field<float>(d, "rms_eps");
  n.rope_theta = field<double>(d, "rope_theta");
  n.rope_scale = field<double>(d, "rope_scale");
  n.rope_dim = field<int>(d, "rope_dim");
  n.rope_factors = field<std::vector<double>>(d, "rope_factors");
  n.is_head_tied = field<bool>(d, "tied_head");
  n.embedding_scale = field<float>(d, "embedding_scale");
  n.attention_scale = field<float>(d, "attention_scale");
  n.has_qkv_bias = field<bool>(d, "qkv_bias");
  n.has_qk_norm = field<bool>(d, "qk_norm");
  n.is_qk_norm_joint = field<bool>(d, "qk_norm_joint");
  n.has_post_norms = field<bool>(d, "post_norms");
  n.activation = field<std::string>(d, "activation");
  n.sliding_window = field<int>(d, "sliding_window");
  n.sliding_layers = field<std::vector<uint8_t>>(d, "sliding_layers");
  n.sliding_rope_theta = field<double>(d, "sliding_rope_theta");
  n.num_experts = field<int>(d, "num_experts");
  n.num_active_experts = field<int>(d, "num_active_experts");
  n.expert_ffn_size = field<int>(d, "expert_ffn_size");
  n.is_expert_weight_normalised = field<bool>(d, "normalise_experts");
  return n;
}

using TensorTuple = std::tuple<std::string, int, int64_t, int64_t, uint64_t, uint64_t>;

void open_model(Model* self, const std::string& path, uint64_t data_offset, const nb::dict& network,
                const std::vector<TensorTuple>& tensors, const std::string& isa, int num_threads, const std::string& memory) {
  if (memory != "copy" && memory != "map") refuse("memory is '", memory, "', expected 'copy' or 'map'");
  std::vector<TensorEntry> entries;
  for (const auto& [name, kind, n, k, offset, bytes] : tensors) entries.push_back({name, kind, n, k, offset, bytes});
  Network shape = network_from(network);
  nb::gil_scoped_release release;
  new (self) Model(path, data_offset, std::move(shape), entries, isa, num_threads, memory == "map");
}

using PairTuple = std::tuple<int, std::string, Matrix2<float>, Matrix2<float>>;

// pairs: (layer, matrix, A (rank, K), B (N, rank)). Returns the bytes it takes.
size_t add_adapter(Model& model, int id, const std::vector<PairTuple>& tuples) {
  std::vector<AdapterPair> pairs;
  for (const auto& [layer, target, a, b] : tuples) {
    if (a.shape(0) != b.shape(1)) refuse("adapter: A of ", target, " has rank ", a.shape(0), ", B has ", b.shape(1));
    pairs.push_back({layer, target, static_cast<int>(a.shape(0)), static_cast<int>(b.shape(0)), static_cast<int>(a.shape(1)),
                     a.data(), b.data()});
  }
  nb::gil_scoped_release release;
  return model.add_adapter(id, pairs);
}

std::pair<int, nb::bytes> pack(nb::handle data, int ggml_type, int64_t n, int64_t k) {
  constexpr int64_t kMost = int64_t{1} << 40;
  if (n < 1 || k < 1 || n > kMost / k) refuse("shape ", n, " x ", k, " is not a matrix");
  const Kind kind = kind_of(ggml_type);
  const Buffer buffer(data);
  check_packable(buffer.size(), ggml_type, n, k);
  auto out = nb::steal<nb::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(packed_bytes(kind, n, k))));
  if (!out.is_valid()) throw nb::python_error();
  auto* to = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(out.ptr()));
  {
    nb::gil_scoped_release release;
    pack_tensor(buffer.data(), ggml_type, n, k, to);
  }
  return {static_cast<int>(kind), out};
}

std::pair<bool, nb::dict> step(const Model& model, KvPool& pool, Workspace& workspace, const Array<int32_t>& token,
                               const Array<int32_t>& position, const Array<int32_t>& index, const Array<uint8_t>& out,
                               const Array<int32_t>& target, const Array<int32_t>& row_start,
                               const Array<int32_t>& table_start, const Array<int32_t>& blocks,
                               const Array<int32_t>& adapter, int num_tops, const Array<int32_t>& layers, int depth,
                               int measured) {
  if (&workspace.model != &model || &pool.model != &model) refuse("the workspace and the pool belong to another model");
  const size_t rows = token.shape(0), sequences = adapter.shape(0);
  const Batch batch = {static_cast<int>(rows),
                       static_cast<int>(sequences),
                       static_cast<int>(blocks.shape(0)),
                       token.data(),
                       of_length("position", position, rows),
                       of_length("index", index, rows),
                       of_length("out", out, rows),
                       of_length("target", target, rows),
                       of_length("row_start", row_start, sequences + 1),
                       of_length("table_start", table_start, sequences + 1),
                       blocks.data(),
                       adapter.data(),
                       num_tops,
                       layers.data(),
                       static_cast<int>(layers.shape(0)),
                       depth == 0 ? model.network.num_layers : depth,
                       measured};
  bool is_done;
  {
    nb::gil_scoped_release release;
    is_done = forward(pool, workspace, batch);
  }
  nb::dict phases;
  for (int i = 0; i < kNumPhases; ++i)
    if (workspace.phase_ns[i] > 0) phases[kPhaseNames[i]] = workspace.phase_ns[i];
  return {is_done, phases};
}

using Sampled = std::tuple<Result1<int32_t>, Result1<float>, Result1<int32_t>, Result1<int32_t>, Result1<float>>;

void check_csr(const char* name, const Array<int32_t>& starts, size_t n, size_t total) {
  const int32_t* s = of_length(name, starts, n + 1);
  if (s[0] != 0 || static_cast<size_t>(s[n]) != total) refuse(name, " runs from ", s[0], " to ", s[n], ", expected 0 to ", total);
  for (size_t i = 0; i < n; ++i)
    if (s[i + 1] < s[i]) refuse(name, "[", i + 1, "] is ", s[i + 1], ", less than the ", s[i], " before it");
}

Sampled draw(Workspace& workspace, const Array<float>& temperature, const Array<int32_t>& top_k, const Array<float>& top_p,
             const Array<float>& min_p, const Array<float>& repetition, const Array<float>& presence,
             const Array<float>& frequency, const Array<uint64_t>& seed, const Array<int32_t>& sample_index,
             const Array<int32_t>& position, const Array<int32_t>& num_logprobs, const Array<int32_t>& history,
             const Array<int32_t>& history_start, const Array<int32_t>& num_generated, const Array<int32_t>& bias_ids,
             const Array<float>& bias_values, const Array<int32_t>& bias_start, nb::handle mask) {
  const size_t n = temperature.shape(0);
  check_csr("history_start", history_start, n, history.shape(0));
  check_csr("bias_start", bias_start, n, bias_ids.shape(0));
  int32_t *ids, *tops_start, *top_ids;
  float *logprobs, *top_logprobs;
  auto id_array = new_array<int32_t>(n, &ids);
  auto logprob_array = new_array<float>(n, &logprobs);
  auto start_array = new_array<int32_t>(n + 1, &tops_start);
  const int32_t* counts = of_length("num_logprobs", num_logprobs, n);
  tops_start[0] = 0;
  for (size_t i = 0; i < n; ++i) tops_start[i + 1] = tops_start[i] + std::clamp(counts[i], 0, kMaxTops);
  auto top_id_array = new_array<int32_t>(static_cast<size_t>(tops_start[n]), &top_ids);
  auto top_logprob_array = new_array<float>(static_cast<size_t>(tops_start[n]), &top_logprobs);
  std::optional<Buffer> bits;
  if (!mask.is_none()) bits.emplace(mask);
  if (bits && (n == 0 || bits->size() % n != 0)) refuse("mask has ", bits->size(), " bytes for ", n, " draws");
  const Draws draws = {static_cast<int>(n),
                       temperature.data(),
                       of_length("top_p", top_p, n),
                       of_length("min_p", min_p, n),
                       of_length("repetition", repetition, n),
                       of_length("presence", presence, n),
                       of_length("frequency", frequency, n),
                       of_length("top_k", top_k, n),
                       of_length("sample_index", sample_index, n),
                       of_length("position", position, n),
                       counts,
                       of_length("num_generated", num_generated, n),
                       of_length("seed", seed, n),
                       history.data(),
                       history_start.data(),
                       bias_ids.data(),
                       of_length("bias_values", bias_values, bias_ids.shape(0)),
                       bias_start.data(),
                       bits ? bits->data() : nullptr,
                       bits ? bits->size() / n : 0,
                       ids,
                       logprobs,
                       tops_start,
                       top_ids,
                       top_logprobs};
  {
    nb::gil_scoped_release release;
    sample(workspace, draws);
  }
  return {id_array, logprob_array, start_array, top_id_array, top_logprob_array};
}

Result1<float> density_of(KvPool& pool, const Workspace& workspace, const Array<int32_t>& blocks) {
  float* mass;
  auto result = new_array<float>(blocks.shape(0), &mass);
  {
    nb::gil_scoped_release release;
    density(pool, workspace, blocks.data(), static_cast<int>(blocks.shape(0)), mass);
  }
  return result;
}

nb::bytes read_block(KvPool& pool, int i) {
  pool.check(i);
  return nb::bytes(reinterpret_cast<const char*>(pool.block(i)), pool.block_bytes());
}

void write_block(KvPool& pool, int i, nb::handle data) {
  pool.check(i);
  const Buffer buffer(data);
  if (buffer.size() != pool.block_bytes()) refuse("block data has ", buffer.size(), " bytes, expected ", pool.block_bytes());
  nb::gil_scoped_release release;  // pages are made as they are first touched, and several threads write at once
  std::memcpy(pool.block(i), buffer.data(), buffer.size());
}

std::tuple<Result1<float>, Result2<int32_t>, Result2<float>> scores(const Workspace& w) {
  const size_t n = w.score_rows.size(), k = static_cast<size_t>(w.num_tops);
  float* logprob;
  auto logprobs = new_array<float>(n, &logprob);
  std::memcpy(logprob, w.score_logprob, n * sizeof(float));
  return {logprobs, copied_rows(w.top_ids, n, k, kMaxTops), copied_rows(w.top_logprobs, n, k, kMaxTops)};
}

#ifdef HOB_SANITIZE
// Mistakes on purpose, to see that the sanitizers see them.
int provoke(const std::string& mistake) {
  std::vector<int> values(4);
  volatile int at = 4;
  if (mistake == "address") return values.data()[at];
  if (mistake == "undefined") return std::numeric_limits<int>::max() - 4 + at * 2;
  int shared = 0;
  const auto race = [&] { ++shared; };
  std::thread one(race), other(race);
  one.join();
  other.join();
  return shared;
}
#endif

}  // namespace
}  // namespace hob

NB_MODULE(_core, m) {
  using namespace hob;
  using namespace nb::literals;
  m.def("cpu_features", &cpu_features);
  m.def("available_isas", &available_isas);
  m.def("uniform", &uniform, "seed"_a, "sample_index"_a, "position"_a);
  bind_kernels(m);
#ifdef HOB_SANITIZE
  m.def("provoke", &provoke, "mistake"_a);
#endif
  m.def("pack_tensor", &pack, "data"_a, "ggml_type"_a, "n"_a, "k"_a);

  nb::class_<Model>(m, "Model")
      .def("__init__", &open_model, "path"_a, "data_offset"_a, "network"_a, "tensors"_a, "isa"_a, "num_threads"_a, "memory"_a)
      .def("add_adapter", &add_adapter, "adapter"_a, "pairs"_a)
      .def("remove_adapter", &Model::remove_adapter, "adapter"_a)
      .def_prop_ro("weight_bytes", [](const Model& model) { return model.weight_bytes; })
      .def_prop_ro("num_threads", [](const Model& model) { return model.threads->num_threads(); })
      .def_prop_ro("num_repeated", [](const Model& model) { return model.threads->num_repeated(); })
      .def_prop_ro("isa", [](const Model& model) { return model.kernels->name; });

  nb::class_<KvPool>(m, "KvPool")
      .def("__init__", [](KvPool* pool, const Model& model, int num_blocks, const std::string& kv_type) {
        new (pool) KvPool(model, num_blocks, kv_type_of(kv_type));
      }, "model"_a, "num_blocks"_a, "kv_type"_a, nb::keep_alive<1, 2>())
      .def_prop_ro("block_bytes", &KvPool::block_bytes)
      .def_prop_ro("num_blocks", &KvPool::num_blocks)
      .def("read", &read_block, "block"_a)
      .def("write", &write_block, "block"_a, "data"_a)
      .def("copy", &KvPool::copy, "source"_a, "destination"_a, "num_tokens"_a)
      .def_ro_static("page_bytes", &kDiscardBytes)
      .def("discard", &KvPool::discard, "offset"_a, "num_bytes"_a);

  nb::class_<Workspace>(m, "Workspace")
      .def(nb::init<const Model&, int>(), "model"_a, "max_rows"_a, nb::keep_alive<1, 2>())
      .def_ro("max_rows", &Workspace::max_rows)
      .def_prop_ro("num_bytes", &Workspace::num_bytes);

  m.def("forward", &step, "model"_a, "pool"_a, "workspace"_a, "token"_a, "position"_a, "index"_a, "out"_a, "target"_a,
        "row_start"_a, "table_start"_a, "blocks"_a, "adapter"_a, "num_tops"_a, "layers"_a, "depth"_a, "measured"_a = -1);
  m.def("density", &density_of, "pool"_a, "workspace"_a, "blocks"_a);
  m.def("sample", &draw, "workspace"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "repetition"_a, "presence"_a,
        "frequency"_a, "seed"_a, "sample_index"_a, "position"_a, "num_logprobs"_a, "history"_a, "history_start"_a,
        "num_generated"_a, "bias_ids"_a, "bias_values"_a, "bias_start"_a, "mask"_a = nb::none());
  m.def("logits", [](const Workspace& w) {
    return copied_rows(w.logits, w.logits_rows.size(), static_cast<size_t>(w.model.network.vocab_size),
                       static_cast<size_t>(w.vocab_padded));
  }, "workspace"_a);
  m.def("scores", &scores, "workspace"_a);
  m.def("hidden", [](const Workspace& w) {
    const auto size = static_cast<size_t>(w.model.network.hidden_size) * w.kept_layers.size();
    return copied_rows(w.hidden, w.hidden_rows.size(), size, size);
  }, "workspace"_a);
  m.def("request_stop", [](Workspace& w) { w.is_stop_requested.store(true); }, "workspace"_a);
}
