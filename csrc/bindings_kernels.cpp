// Single kernels of one instruction set, as Python sees them: what tests hold against native/reference.py and what
// `lab` may measure. Nothing here is on the path of a step.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "arrays.h"
#include "cpu.h"
#include "kv.h"
#include "memory.h"
#include "model.h"
#include "pack.h"
#include "pool_trial.h"

namespace hob {
namespace {

using Floats3 = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Result3 = nb::ndarray<nb::numpy, float, nb::ndim<3>>;

// x (R, K) times a packed matrix (N, K) -> (R, N).
Result2<float> linear(const std::string& isa, int kind_, nb::handle data, int64_t n, int64_t k, const Matrix2<float>& x) {
  const Kernels& kernels = *kernels_for(isa);
  if (kind_ < 0 || kind_ >= kNumKinds) refuse("kind is ", kind_, ", expected 0..", kNumKinds - 1);
  const auto kind = static_cast<Kind>(kind_);
  const Buffer packed(data);
  if (n < 2 || k < 1 || (kind != Kind::kF32 && k % kGroup != 0)) refuse("shape ", n, " x ", k, " cannot be packed as kind ", kind_);
  if (packed.size() != packed_bytes(kind, n, k)) refuse("data has ", packed.size(), " bytes, expected ", packed_bytes(kind, n, k));
  if (x.shape(1) != static_cast<size_t>(k)) refuse("x has rows of ", x.shape(1), " values, expected ", k);
  const auto rows = static_cast<int>(x.shape(0)), groups = static_cast<int>(k / kGroup);
  const int panels = static_cast<int>((n + kPanel - 1) / kPanel);
  const size_t panel_bytes = packed.size() / static_cast<size_t>(panels);
  Arena arena;
  uint8_t* tiles;
  uint8_t* weights;
  const size_t tile_bytes = static_cast<size_t>(groups) * kernels.group_bytes;
  arena.add(&tiles, static_cast<size_t>((rows + kernels.tile_rows - 1) / kernels.tile_rows) * tile_bytes + 1);
  arena.add(&weights, packed.size());
  arena.commit(false);
  std::memcpy(weights, packed.data(), packed.size());
  std::vector<float> out(static_cast<size_t>(rows) * static_cast<size_t>(panels) * kPanel);
  const ptrdiff_t stride = static_cast<ptrdiff_t>(panels) * kPanel;
  for (int r = 0; r < rows && kind != Kind::kF32; ++r)
    kernels.quantise(x.data() + r * k, groups, tiles + static_cast<size_t>(r / kernels.tile_rows) * tile_bytes, r % kernels.tile_rows);
  for (int p = 0; p < panels; ++p) {
    const uint8_t* panel = weights + static_cast<size_t>(p) * panel_bytes;
    float* to = out.data() + p * kPanel;
    if (kind == Kind::kF32)
      kernels.linear_f32(reinterpret_cast<const float*>(panel), static_cast<int>(k), x.data(), k, rows, to, stride, false);
    else
      kernels.linear(kind, panel, groups, tiles, rows, to, stride, false, panel + panel_bytes);
  }
  return copied_rows(out.data(), static_cast<size_t>(rows), static_cast<size_t>(n), static_cast<size_t>(stride));
}

Result2<float> rms_norm(const std::string& isa, const Matrix2<float>& x, const Array<float>& weight, float eps) {
  const size_t rows = x.shape(0), n = x.shape(1);
  const auto wide = static_cast<size_t>(padded(static_cast<int>(n)));
  std::vector<float> in(wide), w(wide), out(rows * wide);
  std::copy_n(of_length("weight", weight, n), n, w.data());
  for (size_t r = 0; r < rows; ++r) {
    std::copy_n(x.data() + r * n, n, in.data());
    kernels_for(isa)->rms_norm(in.data(), w.data(), static_cast<int>(n), static_cast<int>(wide), eps, out.data() + r * wide);
  }
  return copied_rows(out.data(), rows, n, wide);
}

// activation(gate) * up, 32 values a row.
Result2<float> gate_mul(const std::string& isa, const std::string& activation, const Matrix2<float>& gate,
                        const Matrix2<float>& up) {
  if (gate.shape(1) != 32 || up.shape(1) != 32 || gate.shape(0) != up.shape(0)) refuse("gate and up must be (R, 32)");
  float* out;
  auto result = new_matrix<float>(gate.shape(0), 32, &out);
  gate_kernel(*kernels_for(isa), activation)(gate.data(), up.data(), static_cast<int>(gate.shape(0)) * 32, out);
  return result;
}

// x (R, D) with cos and sin (R, half).
Result2<float> rope(const std::string& isa, const Matrix2<float>& x, const Matrix2<float>& cos, const Matrix2<float>& sin) {
  const size_t rows = x.shape(0), dim = x.shape(1), half = cos.shape(1);
  if (cos.shape(0) != rows || sin.shape(0) != rows || sin.shape(1) != half || 2 * half > dim) refuse("cos and sin must be (R, at most D / 2)");
  auto result = copied_rows(x.data(), rows, dim, dim);
  for (size_t r = 0; r < rows; ++r)
    kernels_for(isa)->rope(result.data() + r * dim, cos.data() + r * half, sin.data() + r * half, static_cast<int>(half),
                           static_cast<int>(dim), 1.0f);
  return result;
}

// query (R, A, D) over keys and values (T, B, D), row r seeing lengths[r] of them, through blocks laid in reverse.
// kv_type: how they are stored. is_split: chunk by chunk, then merged. Scores are query . key: the scale is the caller's. window: 0 for none.
Result3 attention(const std::string& isa, const Floats3& query, const Floats3& keys, const Floats3& values,
                  const Array<int32_t>& lengths, bool is_split, int window, const std::string& kv_type_) {
  const KvType kv_type = kv_type_of(kv_type_);
  const Kernels& kernels = *kernels_for(isa);
  const KvKernels& kv = kernels.kv[static_cast<int>(kv_type)];
  const auto rows = static_cast<int>(query.shape(0)), heads = static_cast<int>(query.shape(1)), dim = static_cast<int>(query.shape(2));
  const auto tokens = static_cast<int>(keys.shape(0)), kv_heads = static_cast<int>(keys.shape(1));
  for (size_t i = 0; i < 3; ++i)
    if (values.shape(i) != keys.shape(i)) refuse("keys and values differ in shape");
  if (kv_heads < 1 || heads % kv_heads != 0 || keys.shape(2) != query.shape(2) || dim > kMaxHeadDim) refuse("heads or dimensions do not fit");
  const int group = heads / kv_heads, blocks = (tokens + kBlockTokens - 1) / kBlockTokens;
  const int32_t* length = of_length("lengths", lengths, query.shape(0));
  for (int r = 0; r < rows; ++r)
    if (length[r] < 1 || length[r] > tokens) refuse("lengths[", r, "] is ", length[r], ", expected 1..", tokens);
  const size_t head_bytes = kv_head_bytes(kv_type, dim), block_bytes = 2 * head_bytes * static_cast<size_t>(kv_heads);
  const int partial_size = kPartialHead + dim;
  Arena arena;
  uint8_t* pool;
  float *scratch, *partials;
  arena.add(&pool, block_bytes * static_cast<size_t>(blocks));
  arena.add(&scratch, attention_scratch_floats(dim));
  arena.add(&partials, static_cast<size_t>((tokens / kChunkKeys + 1) * partial_size));
  arena.commit(false);
  std::vector<int32_t> table(static_cast<size_t>(blocks));
  for (int b = 0; b < blocks; ++b) table[static_cast<size_t>(b)] = blocks - 1 - b;
  for (int t = 0; t < tokens; ++t)
    for (int h = 0; h < kv_heads; ++h) {
      uint8_t* block = pool + static_cast<size_t>(table[static_cast<size_t>(t / kBlockTokens)]) * block_bytes;
      const ptrdiff_t at = (static_cast<ptrdiff_t>(t) * kv_heads + h) * dim;
      kv.store_key(keys.data() + at, dim, block + static_cast<size_t>(h) * head_bytes, t % kBlockTokens);
      kv.store_value(values.data() + at, dim, block + static_cast<size_t>(kv_heads + h) * head_bytes, t % kBlockTokens);
    }
  auto* out = new float[static_cast<size_t>(rows) * static_cast<size_t>(heads) * static_cast<size_t>(dim)];
  Result3 result(out, {query.shape(0), query.shape(1), query.shape(2)},
                 nb::capsule(out, [](void* p) noexcept { delete[] static_cast<float*>(p); }));
  for (int h = 0; h < kv_heads; ++h)
    for (int first = 0; first < rows * group; first += is_split ? 1 : kMaxQueries) {
      const float* q[kMaxQueries];
      float* o[kMaxQueries];
      int32_t n[kMaxQueries];
      const int count = is_split ? 1 : std::min(kMaxQueries, rows * group - first);
      int longest = 0;
      for (int i = 0; i < count; ++i) {
        const int r = (first + i) / group;
        const ptrdiff_t at = (static_cast<ptrdiff_t>(r) * heads + h * group + (first + i) % group) * dim;
        q[i] = query.data() + at;
        o[i] = is_split ? partials : out + at;
        n[i] = length[r];
        longest = std::max(longest, n[i]);
      }
      const int chunks = (longest - 1) / kChunkKeys + 1;
      AttentionCall call = {q, n, o, count, dim, table.data(), pool + static_cast<size_t>(h) * head_bytes,
                            pool + static_cast<size_t>(kv_heads + h) * head_bytes,
                            block_bytes, 0, chunks, is_split, scratch, window};
      if (!is_split) {
        kv.attention(&call);
        continue;
      }
      for (int c = 0; c < chunks; ++c) {
        o[0] = partials + c * partial_size;
        call.first_chunk = c;
        call.end_chunk = c + 1;
        kv.attention(&call);
      }
      kernels.merge_partials(partials, chunks, dim, out + (q[0] - query.data()));
    }
  return result;
}

}  // namespace

void bind_kernels(nb::module_& m) {
  using namespace nb::literals;
  m.def("kernel_linear", &linear, "isa"_a, "kind"_a, "data"_a, "n"_a, "k"_a, "x"_a);
  m.def("kernel_rms_norm", &rms_norm, "isa"_a, "x"_a, "weight"_a, "eps"_a);
  m.def("kernel_gate_mul", &gate_mul, "isa"_a, "activation"_a, "gate"_a, "up"_a);
  m.def("kernel_rope", &rope, "isa"_a, "x"_a, "cos"_a, "sin"_a);
  m.def("kernel_attention", &attention, "isa"_a, "query"_a, "keys"_a, "values"_a, "lengths"_a, "is_split"_a, "window"_a = 0,
        "kv_type"_a = "f16");
  m.def("pool_trial", &pool_trial, "num_threads"_a, "num_jobs"_a, "num_pieces"_a, "num_late"_a,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("pool_attendance", &pool_attendance, "num_threads"_a, "num_chains"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("pool_calls", &pool_calls, "num_threads"_a, "num_chains"_a, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace hob
