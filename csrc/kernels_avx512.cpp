// Kernels for AVX-512 F/BW/VL/DQ with VNNI (Ice Lake, Zen 4 and later). Layouts and contracts: kernels.h.
#include "kernels.h"

#if defined(__x86_64__)
#include "vec_avx512.h"

namespace {
constexpr int kRows = 6;
constexpr int kValueVecs = 4;
constexpr int kCodeRows = 6;
}  // namespace

#include "kernels_body.inc"
#include "codes.inc"
#include "linear_avx512.inc"
#include "attention_bytes_avx512.inc"

namespace hob {
namespace {

void linear(Kind kind, const uint8_t* panel, int num_groups, const uint8_t* tiles, int num_rows, float* out,
            ptrdiff_t out_stride, bool is_added, const uint8_t* ahead) {
  switch (kind) {
    case Kind::kQ4M: return linear_kind<Kind::kQ4M>(panel, num_groups, tiles, num_rows, out, out_stride, is_added, ahead);
    case Kind::kQ4S: return linear_kind<Kind::kQ4S>(panel, num_groups, tiles, num_rows, out, out_stride, is_added, ahead);
    case Kind::kQ8S: return linear_kind<Kind::kQ8S>(panel, num_groups, tiles, num_rows, out, out_stride, is_added, ahead);
    case Kind::kQ8M: return linear_kind<Kind::kQ8M>(panel, num_groups, tiles, num_rows, out, out_stride, is_added, ahead);
    case Kind::kF32: return;  // linear_f32's
  }
}

const Kernels kTable = {"avx512", kCodeRows, sizeof(CodeGroup), linear, linear_f32, rms_norm, quantise, silu_mul, rope,
                        {{store_key, store_value, attention<HalfCache>}, {store_key_codes, store_value_codes, attention_bytes<VectorProducts>}},
                        merge_partials, block_maxima, exp_sums, select_at_least, gelu_mul};

}  // namespace

const Kernels* avx512_kernels() { return &kTable; }

}  // namespace hob

#else

namespace hob {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace hob

#endif
