// The contract between the forward pass and the compute kernels: layouts, argument records, one table of pointers.
//
// A kernel file (kernels_portable.cpp, kernels_avx2.cpp, kernels_avx512.cpp, kernels_amx.cpp) is compiled with its own instruction-set
// flags and fills one `Kernels` table. This header is included by all of them, so it holds plain data only: no STL and
// no function bodies (an inline body compiled for AVX-512 could be the one the linker keeps for the portable path).
//
// Same row, same bits: every kernel below computes a row by the same float operations in the same order whatever the
// number of rows beside it. Within one table; two tables may differ in the last bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hob {

constexpr int kPanel = 32;       // outputs of a matrix that lie side by side
constexpr int kGroup = 32;       // values along K that share a scale
constexpr int kBlockTokens = 16; // tokens in a block of KV
constexpr int kChunkKeys = 256;  // keys between two merges of the online softmax, anchored at key 0
constexpr int kMaxQueries = 48;  // queries (rows x heads of a group) of one attention call
constexpr int kPartialHead = 16; // floats before the values of a partial attention result: [max, sum, unused...]
constexpr int kMaxHeadDim = 256;

// How a weight matrix is stored. d and m are float16, one per output and group.
enum class Kind : uint8_t {
  kF32 = 0,  // panel: [K][32] float
  kQ4M = 1,  // w = d * q + m, q in 0..15
  kQ4S = 2,  // w = d * (q - 8)
  kQ8S = 3,  // w = d * (q - 128), q in 0..255
  kQ8M = 4,  // w = d * q + m
};
constexpr int kNumKinds = 5;

// How keys and values are stored: what a KV head has in a block of 16 tokens (t), D being head_dim padded to 16.
enum class KvType : uint8_t {
  kF16 = 0,  // key: (head_dim, t) float16           value: (t, head_dim) float16
  kQ8 = 1,   // key: (D / 4, t, 4) int8, (t) float16   value: (t / 4, D, 4) int8, (t) float16: x = code * scale of its token
};
constexpr int kNumKvTypes = 2;

constexpr int padded_head(int head_dim) { return (head_dim + 15) / 16 * 16; }
constexpr size_t code_bytes(int head_dim) { return static_cast<size_t>(padded_head(head_dim)) * kBlockTokens; }

// Attention of up to kMaxQueries queries of one sequence to one KV head, over chunks [first_chunk, end_chunk).
struct AttentionCall {
  const float* const* query;  // (num_queries) -> (head_dim), rotated and scaled
  const int32_t* length;      // (num_queries) keys each sees, counted from key 0
  float* const* out;          // (num_queries) -> (head_dim); if partial -> (kPartialHead + head_dim)
  int num_queries;
  int head_dim;
  const int32_t* blocks;      // block table of the sequence
  const uint8_t* keys;        // what this layer and head has of keys in block 0 of the pool, as its KvType says
  const uint8_t* values;      // .. and of values
  size_t block_stride;        // bytes from a block to the next
  int first_chunk;
  int end_chunk;
  bool is_partial;            // leave [max, sum, values] unnormalised for `merge_partials`
  float* scratch;             // attention_scratch_floats(head_dim), 64-byte aligned
  int window;                 // each query sees this many latest keys, itself included; 0: all
};

constexpr size_t attention_scratch_floats(int head_dim) {
  return static_cast<size_t>(kMaxQueries) * (kChunkKeys + 3 * (head_dim + 16)) + 2 * kChunkKeys * static_cast<size_t>(head_dim + 16);
}

// What there is for each KvType.
struct KvKernels {
  // A head's values (head_dim) into their slot of a block, clamped to the range of float16.
  void (*store_key)(const float* x, int head_dim, uint8_t* block, int slot);
  void (*store_value)(const float* x, int head_dim, uint8_t* block, int slot);
  void (*attention)(const AttentionCall* call);
};

struct Kernels {
  const char* name;

  // Input rows of `linear` are written by `quantise` and lie in tiles of tile_rows rows: num_groups groups of group_bytes
  // each. What is in a group is the table's own business.
  int tile_rows;
  size_t group_bytes;

  // out[r * out_stride + c] (+)= sum over k of w[c][k] x[r][k], for one panel (32 columns c) and any number of rows.
  // panel: num_groups groups in packed order; tiles: (num_rows / tile_rows) tiles. As many bytes as the panel has are
  // fetched from `ahead` into the cache meanwhile: it is the caller who knows what comes next. They may lie past the
  // weights.
  void (*linear)(Kind kind, const uint8_t* panel, int num_groups, const uint8_t* tiles, int num_rows, float* out,
                 ptrdiff_t out_stride, bool is_added, const uint8_t* ahead);
  // The same for float32: panel (k_size, 32), x (num_rows, k_size) with x_stride floats between rows.
  void (*linear_f32)(const float* panel, int k_size, const float* x, ptrdiff_t x_stride, int num_rows, float* out,
                     ptrdiff_t out_stride, bool is_added);

  // y = x / sqrt(mean(x^2) + eps) * weight. n_padded % 32 == 0, zero beyond n. Returns sum(x^2): not finite if x is not.
  float (*rms_norm)(const float* x, const float* weight, int n, int n_padded, float eps, float* y);
  // x (num_groups * 32) -> row `row` of the tile.
  void (*quantise)(const float* x, int num_groups, uint8_t* tile, int row);
  // y = silu(gate) * up over n values, n % 32 == 0; y may be gate.
  void (*silu_mul)(const float* gate, const float* up, int n, float* y);
  // x (2 * half): pairs (i, i + half) turned by cos, sin (half), then all n values multiplied by scale.
  void (*rope)(float* x, const float* cos, const float* sin, int half, int n, float scale);
  KvKernels kv[kNumKvTypes];
  // partials: num_partials of (kPartialHead + head_dim), in ascending order of chunks -> out (head_dim)
  // A partial with sum 0 (a chunk wholly behind the window) is passed over.
  void (*merge_partials)(const float* partials, int num_partials, int head_dim, float* out);

  // Rows of logits; n % 32 == 0, padding is -infinity.
  // maxima (n / 32): largest of each 32. Returns the largest of all; NaN anywhere gives NaN.
  float (*block_maxima)(const float* x, int n, float* maxima);
  // sums (ceil(n / 512)): sum of exp((x - shift) * scale) of each 512; p (n) or null takes the terms. Returns the total.
  double (*exp_sums)(const float* x, int n, float shift, float scale, float* p, double* sums);
  // ids of x >= threshold in ascending order, at most max_ids of them; returns how many there are.
  int (*select_at_least)(const float* x, int n, float threshold, int32_t* ids, int max_ids);

  // y = gelu(gate) * up, the tanh form of gelu; as silu_mul.
  void (*gelu_mul)(const float* gate, const float* up, int n, float* y);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where the build is not for x86-64
const Kernels* avx512_kernels();  // "
const Kernels* amx_kernels();     // "

}  // namespace hob
