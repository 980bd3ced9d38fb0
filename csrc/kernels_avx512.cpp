// Kernels for AVX-512 F/BW/VL/DQ with VNNI (Ice Lake, Zen 4 and later). Layouts and contracts: kernels.h.
//
// linear: a tile of 6 rows x 32 columns holds 12 integer and 12 float accumulators; each quad of K costs two weight
// loads (or one, split into nibbles), six broadcasts and twelve vpdpbusd. One row streams the panel at DRAM speed.
#include "kernels.h"

#if defined(__x86_64__)
#include "vec_avx512.h"

namespace {
constexpr int kRows = 6;
constexpr int kValueVecs = 4;
}  // namespace

#include "kernels_body.inc"

namespace hob {
namespace {

template <Kind KIND>
struct Layout {
  static constexpr bool kIsNibbles = KIND == Kind::kQ4M || KIND == Kind::kQ4S;
  static constexpr bool kHasMin = KIND == Kind::kQ4M || KIND == Kind::kQ8M;
  static constexpr size_t kCodeBytes = kIsNibbles ? 512 : 1024;
  static constexpr size_t kGroupBytes = kCodeBytes + (kHasMin ? 128 : 64);
};

template <Kind KIND>
inline void load_quad(const uint8_t* codes, int j, __m512i* w0, __m512i* w1) {
  if constexpr (Layout<KIND>::kIsNibbles) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i w = _mm512_loadu_si512(codes + j * 64);
    *w0 = _mm512_and_si512(w, low);
    *w1 = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
  } else {
    *w0 = _mm512_loadu_si512(codes + j * 128);
    *w1 = _mm512_loadu_si512(codes + j * 128 + 64);
  }
}

template <int M, Kind KIND>
void linear_tile(const uint8_t* panel, int num_groups, const ActGroup* tile, float* out, ptrdiff_t out_stride,
                 bool is_added, const uint8_t* ahead, int ahead_lines) {
  using L = Layout<KIND>;
  __m512 f[M][2];
#pragma GCC unroll 6
  for (int r = 0; r < M; ++r) f[r][0] = f[r][1] = _mm512_setzero_ps();
  for (int g = 0; g < num_groups; ++g, panel += L::kGroupBytes, ++tile) {
    const ActGroup& a = *tile;
    __m512i n[M][2];
#pragma GCC unroll 6
    for (int r = 0; r < M; ++r) {
      const __m512i init = L::kHasMin ? _mm512_setzero_si512() : _mm512_set1_epi32((L::kIsNibbles ? a.init4 : a.init8)[r]);
      n[r][0] = n[r][1] = init;
    }
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      __m512i w0, w1;
      load_quad<KIND>(panel, j, &w0, &w1);
#pragma GCC unroll 6
      for (int r = 0; r < M; ++r) {
        int32_t quad;
        std::memcpy(&quad, a.codes[j][r], 4);
        const __m512i x = _mm512_set1_epi32(quad);
        n[r][0] = _mm512_dpbusd_epi32(n[r][0], w0, x);
        n[r][1] = _mm512_dpbusd_epi32(n[r][1], w1, x);
      }
    }
    for (int b = 0; b < ahead_lines; ++b, ahead += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    const auto* scales = reinterpret_cast<const uint16_t*>(panel + L::kCodeBytes);
    const __m512 d0 = v_load_half(scales), d1 = v_load_half(scales + 16);
#pragma GCC unroll 6
    for (int r = 0; r < M; ++r) {
      const __m512 s = _mm512_set1_ps(a.scale[r]);
      f[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(n[r][0]), _mm512_mul_ps(d0, s), f[r][0]);
      f[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(n[r][1]), _mm512_mul_ps(d1, s), f[r][1]);
    }
    if constexpr (L::kHasMin) {
      const __m512 m0 = v_load_half(scales + 32), m1 = v_load_half(scales + 48);
#pragma GCC unroll 6
      for (int r = 0; r < M; ++r) {
        const __m512 s = _mm512_set1_ps(a.scaled_sum[r]);
        f[r][0] = _mm512_fmadd_ps(m0, s, f[r][0]);
        f[r][1] = _mm512_fmadd_ps(m1, s, f[r][1]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < M; ++r) {
    float* o = out + r * out_stride;
    v_store(o, is_added ? v_add(v_load(o), f[r][0]) : f[r][0]);
    v_store(o + 16, is_added ? v_add(v_load(o + 16), f[r][1]) : f[r][1]);
  }
}

template <Kind KIND>
void linear_kind(const uint8_t* panel, int num_groups, const ActGroup* tile, int num_rows, float* out,
                 ptrdiff_t out_stride, bool is_added, const uint8_t* ahead, int ahead_lines) {
  switch (num_rows) {
    case 1: return linear_tile<1, KIND>(panel, num_groups, tile, out, out_stride, is_added, ahead, ahead_lines);
    case 2: return linear_tile<2, KIND>(panel, num_groups, tile, out, out_stride, is_added, ahead, ahead_lines);
    case 3: return linear_tile<3, KIND>(panel, num_groups, tile, out, out_stride, is_added, ahead, ahead_lines);
    case 4: return linear_tile<4, KIND>(panel, num_groups, tile, out, out_stride, is_added, ahead, ahead_lines);
    case 5: return linear_tile<5, KIND>(panel, num_groups, tile, out, out_stride, is_added, ahead, ahead_lines);
    default: return linear_tile<6, KIND>(panel, num_groups, tile, out, out_stride, is_added, ahead, ahead_lines);
  }
}

void linear(Kind kind, const uint8_t* panel, int num_groups, const ActGroup* tile, int num_rows, float* out,
            ptrdiff_t out_stride, bool is_added, const uint8_t* ahead, int ahead_lines) {
  switch (kind) {
    case Kind::kQ4M: return linear_kind<Kind::kQ4M>(panel, num_groups, tile, num_rows, out, out_stride, is_added, ahead, ahead_lines);
    case Kind::kQ4S: return linear_kind<Kind::kQ4S>(panel, num_groups, tile, num_rows, out, out_stride, is_added, ahead, ahead_lines);
    case Kind::kQ8S: return linear_kind<Kind::kQ8S>(panel, num_groups, tile, num_rows, out, out_stride, is_added, ahead, ahead_lines);
    case Kind::kQ8M: return linear_kind<Kind::kQ8M>(panel, num_groups, tile, num_rows, out, out_stride, is_added, ahead, ahead_lines);
    case Kind::kF32: return;  // linear_f32's
  }
}

const Kernels kTable = {"avx512",   linear,      linear_f32, rms_norm,       quantise,     silu_mul, rope,
                        store_key,  store_value, attention,  merge_partials, block_maxima, exp_sums, select_at_least,
                        gelu_mul};

}  // namespace

const Kernels* avx512_kernels() { return &kTable; }

}  // namespace hob

#else

namespace hob {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace hob

#endif
