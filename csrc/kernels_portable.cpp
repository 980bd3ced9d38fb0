// Kernels for any CPU: plain C++ that the compiler lowers to the target's baseline. The reference among the native
// paths, and what an aarch64 build runs. Layouts and contracts: kernels.h.
#include "kernels.h"
#include "vec_portable.h"

namespace {
constexpr int kRows = 2;
constexpr int kValueVecs = 1;
constexpr int kCodeRows = 6;
}  // namespace

#include "kernels_body.inc"
#include "codes.inc"

namespace hob {
namespace {


inline float half_at(const uint8_t* p, int i) {
  uint16_t h;
  std::memcpy(&h, p + 2 * i, 2);
  return half_to_float(h);
}

// dot[c] for the 32 columns of one group and one row; codes as packed.
inline void dot_group(const uint8_t* codes, bool is_nibbles, const CodeGroup& a, int row, int32_t init, int32_t* dot) {
  for (int c = 0; c < 32; ++c) dot[c] = init;
  for (int j = 0; j < 8; ++j) {
    const int8_t* x = a.codes[row] + 4 * j;
    for (int half = 0; half < 2; ++half) {
      const uint8_t* w = is_nibbles ? codes + j * 64 : codes + j * 128 + half * 64;
      const int shift = is_nibbles ? 4 * half : 0;
      const int mask = is_nibbles ? 15 : 255;
      for (int c = 0; c < 16; ++c) {
        int32_t s = 0;
        for (int i = 0; i < 4; ++i) s += ((w[c * 4 + i] >> shift) & mask) * x[i];
        dot[half * 16 + c] += s;
      }
    }
  }
}

// Up to kCodeRows rows.
void linear_tile(Kind kind, const uint8_t* panel, int num_groups, const CodeGroup* tile, int num_rows, float* out,
                 ptrdiff_t out_stride, bool is_added) {
  const bool is_nibbles = kind == Kind::kQ4M || kind == Kind::kQ4S;
  const bool has_min = kind == Kind::kQ4M || kind == Kind::kQ8M;
  const size_t code_bytes = is_nibbles ? 512 : 1024;
  const size_t group_bytes = code_bytes + (has_min ? 128 : 64);
  float acc[kCodeRows][32] = {};
  for (int g = 0; g < num_groups; ++g, panel += group_bytes) {
    const CodeGroup& a = tile[g];
    float d[32], m[32];
    for (int c = 0; c < 32; ++c) {
      d[c] = half_at(panel + code_bytes, c);
      m[c] = has_min ? half_at(panel + code_bytes + 64, c) : 0.0f;
    }
    for (int r = 0; r < num_rows; ++r) {
      const int32_t init = has_min ? 0 : (is_nibbles ? a.init4[r] : a.init8[r]);
      int32_t dot[32];
      dot_group(panel, is_nibbles, a, r, init, dot);
      for (int c = 0; c < 32; ++c) acc[r][c] += static_cast<float>(dot[c]) * (d[c] * a.scale[r]);
      if (has_min)
        for (int c = 0; c < 32; ++c) acc[r][c] += m[c] * a.scaled_sum[r];
    }
  }
  for (int r = 0; r < num_rows; ++r)
    for (int c = 0; c < 32; ++c) {
      float* o = out + r * out_stride + c;
      *o = is_added ? *o + acc[r][c] : acc[r][c];
    }
}

void linear(Kind kind, const uint8_t* panel, int num_groups, const uint8_t* tiles, int num_rows, float* out,
            ptrdiff_t out_stride, bool is_added, const uint8_t*) {
  const auto* tile = reinterpret_cast<const CodeGroup*>(tiles);
  for (int r = 0; r < num_rows; r += kCodeRows, tile += num_groups)
    linear_tile(kind, panel, num_groups, tile, num_rows - r < kCodeRows ? num_rows - r : kCodeRows, out + r * out_stride,
                out_stride, is_added);
}

const Kernels kTable = {"portable", kCodeRows, sizeof(CodeGroup), linear, linear_f32, rms_norm, quantise, silu_mul, rope,
                        {{store_key, store_value, attention<HalfCache>}, {store_key_codes, store_value_codes, attention<ByteCache>}},
                        merge_partials, block_maxima, exp_sums, select_at_least, gelu_mul};

}  // namespace

const Kernels* portable_kernels() { return &kTable; }

}  // namespace hob
