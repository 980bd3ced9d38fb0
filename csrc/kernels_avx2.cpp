// Kernels for AVX2 with FMA and F16C (Haswell, Zen and later). Layouts and contracts: kernels.h.
//
// linear: vpmaddubsw adds two products in 16 bits and saturates, so its unsigned operand may not use all of 0..255.
// Four-bit codes never come near; eight-bit codes are made signed (code ^ 128), and |w| x sign(x, w) stays below
// 2 * 128 * 127 = 32,512. The correction for the shifted code lives in the initial value.
#include "kernels.h"

#if defined(__x86_64__)
#include "vec_avx2.h"

namespace {
constexpr int kRows = 2;
constexpr int kValueVecs = 2;
constexpr int kCodeRows = 6;
}  // namespace

#include "kernels_body.inc"
#include "codes.inc"

namespace hob {
namespace {

template <Kind KIND>
struct Layout {
  static constexpr bool kIsNibbles = KIND == Kind::kQ4M || KIND == Kind::kQ4S;
  static constexpr bool kHasMin = KIND == Kind::kQ4M || KIND == Kind::kQ8M;
  static constexpr size_t kCodeBytes = kIsNibbles ? 512 : 1024;
  static constexpr size_t kGroupBytes = kCodeBytes + (kHasMin ? 128 : 64);
};

// Eight columns (quarter 0..3) of quad j: 4 codes each, unsigned nibbles or signed bytes.
template <Kind KIND>
inline __m256i load_quarter(const uint8_t* codes, int j, int quarter) {
  if constexpr (Layout<KIND>::kIsNibbles) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + j * 64 + (quarter & 1) * 32));
    return _mm256_and_si256(quarter >= 2 ? _mm256_srli_epi16(w, 4) : w, _mm256_set1_epi8(15));
  } else {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + j * 128 + quarter * 32));
    return _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80)));
  }
}

template <Kind KIND>
inline __m256i dot_quad(__m256i w, __m256i x) {
  if constexpr (Layout<KIND>::kIsNibbles) return _mm256_maddubs_epi16(w, x);
  else return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}

template <Kind KIND>
inline int32_t initial(const CodeGroup& a, int r) {
  if constexpr (KIND == Kind::kQ4S) return a.init4[r];
  else if constexpr (KIND == Kind::kQ8M) return -a.init8[r];
  else return 0;
}

template <int M, Kind KIND>
void linear_quarter(const uint8_t* panel, int num_groups, const CodeGroup* tile, int quarter, float* out,
                    ptrdiff_t out_stride, bool is_added, const uint8_t* ahead, int ahead_lines) {
  using L = Layout<KIND>;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 f[M];
  for (int r = 0; r < M; ++r) f[r] = _mm256_setzero_ps();
  for (int g = 0; g < num_groups; ++g, panel += L::kGroupBytes, ++tile) {
    const CodeGroup& a = *tile;
    __m256i n[M];
    for (int r = 0; r < M; ++r) n[r] = _mm256_set1_epi32(initial<KIND>(a, r));
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m256i w = load_quarter<KIND>(panel, j, quarter);
#pragma GCC unroll 6
      for (int r = 0; r < M; ++r) {
        int32_t quad;
        std::memcpy(&quad, a.codes[r] + 4 * j, 4);
        n[r] = _mm256_add_epi32(n[r], _mm256_madd_epi16(dot_quad<KIND>(w, _mm256_set1_epi32(quad)), ones));
      }
    }
    for (int b = 0; b < ahead_lines; ++b, ahead += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
    const auto* d_at = reinterpret_cast<const __m128i*>(panel + L::kCodeBytes + quarter * 16);
    const __m256 d = _mm256_cvtph_ps(_mm_loadu_si128(d_at));
    for (int r = 0; r < M; ++r)
      f[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(n[r]), _mm256_mul_ps(d, _mm256_set1_ps(a.scale[r])), f[r]);
    if constexpr (L::kHasMin) {
      const __m256 m = _mm256_cvtph_ps(_mm_loadu_si128(d_at + 4));
      for (int r = 0; r < M; ++r) f[r] = _mm256_fmadd_ps(m, _mm256_set1_ps(a.scaled_sum[r]), f[r]);
    }
  }
  for (int r = 0; r < M; ++r) {
    float* o = out + r * out_stride + quarter * 8;
    _mm256_storeu_ps(o, is_added ? _mm256_add_ps(_mm256_loadu_ps(o), f[r]) : f[r]);
  }
}

template <Kind KIND>
void linear_rows(const uint8_t* panel, int num_groups, const CodeGroup* tile, int num_rows, float* out,
                 ptrdiff_t out_stride, bool is_added, const uint8_t* ahead, int ahead_lines) {
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int lines = quarter == 0 ? ahead_lines : 0;
    switch (num_rows) {
      case 1: linear_quarter<1, KIND>(panel, num_groups, tile, quarter, out, out_stride, is_added, ahead, lines); break;
      case 2: linear_quarter<2, KIND>(panel, num_groups, tile, quarter, out, out_stride, is_added, ahead, lines); break;
      case 3: linear_quarter<3, KIND>(panel, num_groups, tile, quarter, out, out_stride, is_added, ahead, lines); break;
      case 4: linear_quarter<4, KIND>(panel, num_groups, tile, quarter, out, out_stride, is_added, ahead, lines); break;
      case 5: linear_quarter<5, KIND>(panel, num_groups, tile, quarter, out, out_stride, is_added, ahead, lines); break;
      default: linear_quarter<6, KIND>(panel, num_groups, tile, quarter, out, out_stride, is_added, ahead, lines); break;
    }
  }
}

// `ahead` is fetched in equal shares, one with each group of each register tile.
template <Kind KIND>
void linear_kind(const uint8_t* panel, int num_groups, const uint8_t* tiles, int num_rows, float* out,
                 ptrdiff_t out_stride, bool is_added, const uint8_t* ahead) {
  const int steps = (num_rows + kCodeRows - 1) / kCodeRows;
  const int lines = (static_cast<int>(Layout<KIND>::kGroupBytes) / 64 + steps - 1) / steps;
  for (int r = 0; r < num_rows; r += kCodeRows) {
    const int rows = num_rows - r < kCodeRows ? num_rows - r : kCodeRows;
    linear_rows<KIND>(panel, num_groups, reinterpret_cast<const CodeGroup*>(tiles) + r / kCodeRows * num_groups, rows,
                      out + r * out_stride, out_stride, is_added, ahead, lines);
    ahead += static_cast<ptrdiff_t>(num_groups) * lines * 64;
  }
}

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

const Kernels kTable = {"avx2", kCodeRows, sizeof(CodeGroup), linear, linear_f32, rms_norm, quantise, silu_mul, rope,
                        {{store_key, store_value, attention<HalfCache>}, {store_key_codes, store_value_codes, attention<ByteCache>}},
                        merge_partials, block_maxima, exp_sums, select_at_least, gelu_mul};

}  // namespace

const Kernels* avx2_kernels() { return &kTable; }

}  // namespace hob

#else

namespace hob {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace hob

#endif
