// Sixteen floats as one value, for kernels_body.inc: AVX-512. Include only from a file compiled with its flags.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace hob {
namespace {

typedef __m512 V;

inline V v_zero() { return _mm512_setzero_ps(); }
inline V v_set1(float x) { return _mm512_set1_ps(x); }
inline V v_load(const float* p) { return _mm512_loadu_ps(p); }
inline void v_store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V v_add(V a, V b) { return _mm512_add_ps(a, b); }
inline V v_sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V v_mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V v_div(V a, V b) { return _mm512_div_ps(a, b); }
inline V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V v_max(V a, V b) { return _mm512_max_ps(a, b); }
inline V v_min(V a, V b) { return _mm512_min_ps(a, b); }
inline V v_abs(V a) { return _mm512_abs_ps(a); }
inline V v_load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void v_store_half(uint16_t* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Byte i of each of 16 quads of signed bytes.
inline V v_load_code(const uint8_t* p, int i) {
  const __m512i quads = _mm512_loadu_si512(p);
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sll_epi32(quads, _mm_cvtsi32_si128(24 - 8 * i)), 24));
}
inline float v_hmax(V v) { return _mm512_reduce_max_ps(v); }
inline float v_hsum(V v) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
// Lanes at or past `count` (0..16) become `other`.
inline V v_keep(V v, int count, float other) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << count) - 1u), _mm512_set1_ps(other), v);
}
inline unsigned v_mask_ge(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// 2^n * x for whole n in -126..127.
inline V v_scale2(V x, V n) { return _mm512_scalef_ps(x, n); }
inline V v_round(V x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V v_zero_below(V v, V x, V limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), v);
}
// 32 floats in -127..127, rounded to nearest even, as bytes; returns their sum.
inline int32_t v_store_i8(int8_t* p, V a, V b) {
  // Beside what is no number anything may come, -2^31 for that itself, and sums of such overflow.
  const __m512i least = _mm512_set1_epi32(-127), most = _mm512_set1_epi32(127);
  const __m512i n = _mm512_min_epi32(_mm512_max_epi32(_mm512_cvtps_epi32(a), least), most);
  const __m512i m = _mm512_min_epi32(_mm512_max_epi32(_mm512_cvtps_epi32(b), least), most);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(n));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm512_cvtepi32_epi8(m));
  return _mm512_reduce_add_epi32(_mm512_add_epi32(n, m));
}

}  // namespace
}  // namespace hob
