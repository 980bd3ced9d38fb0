// Sixteen floats as one value, for kernels_body.inc: two AVX2 registers. Include only from a file compiled with its flags.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace hob {
namespace {

struct V {
  __m256 a, b;
};

inline V v_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V v_set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V v_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void v_store(float* p, V v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
inline V v_add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V v_sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V v_mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V v_div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline V v_fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline V v_max(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline V v_min(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline V v_abs(V x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
inline V v_load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void v_store_half(uint16_t* p, V v) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.a, mode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.b, mode));
}
// Byte i of each of 16 quads of signed bytes.
inline V v_load_code(const uint8_t* p, int i) {
  const __m128i up = _mm_cvtsi32_si128(24 - 8 * i);
  const auto part = [&](const uint8_t* at) {
    const __m256i quads = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_sll_epi32(quads, up), 24));
  };
  return {part(p), part(p + 32)};
}
inline float v_hmax(V v) {
  const __m256 m = _mm256_max_ps(v.a, v.b);
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}
inline float v_hsum(V v) {
  const __m256 a = _mm256_add_ps(v.a, v.b);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
// Lanes at or past `count` (0..16) become `other`.
inline V v_keep(V v, int count, float other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 keep_a = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
  const __m256 keep_b = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), lane));
  const __m256 o = _mm256_set1_ps(other);
  return {_mm256_blendv_ps(o, v.a, keep_a), _mm256_blendv_ps(o, v.b, keep_b)};
}
inline unsigned v_mask_ge(V x, V y) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ))) |
         static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ))) << 8;
}
inline __m256 scale2_half(__m256 x, __m256 n) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(bits));
}
// 2^n * x for whole n in -126..127.
inline V v_scale2(V x, V n) { return {scale2_half(x.a, n.a), scale2_half(x.b, n.b)}; }
inline V v_round(V x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline V v_zero_below(V v, V x, V limit) {
  return {_mm256_andnot_ps(_mm256_cmp_ps(x.a, limit.a, _CMP_LT_OQ), v.a),
          _mm256_andnot_ps(_mm256_cmp_ps(x.b, limit.b, _CMP_LT_OQ), v.b)};
}
// 32 floats in -127..127, rounded to nearest even, as bytes; returns their sum.
inline int32_t v_store_i8(int8_t* p, V x, V y) {
  // Beside what is no number anything may come, -2^31 for that itself, and sums of such overflow.
  const __m256i least = _mm256_set1_epi32(-127), most = _mm256_set1_epi32(127);
  const auto code = [&](__m256 v) { return _mm256_min_epi32(_mm256_max_epi32(_mm256_cvtps_epi32(v), least), most); };
  const __m256i a = code(x.a), b = code(x.b), c = code(y.a), d = code(y.b);
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  const __m256i s = _mm256_add_epi32(_mm256_add_epi32(a, b), _mm256_add_epi32(c, d));
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1));
  return _mm_cvtsi128_si32(t);
}

}  // namespace
}  // namespace hob
