// Sixteen floats as one value, for kernels_body.inc: the portable form (GCC and Clang vector extensions, so the compiler
// lowers it to SSE2, NEON or whatever the target's baseline has).
#pragma once

#include "half.h"

namespace hob {
namespace {

typedef float V __attribute__((vector_size(64)));
typedef int32_t VI __attribute__((vector_size(64)));

inline V v_zero() { return V{}; }
inline V v_set1(float x) { return V{} + x; }
inline V v_load(const float* p) { V v; std::memcpy(&v, p, 64); return v; }
inline void v_store(float* p, V v) { std::memcpy(p, &v, 64); }
inline V v_add(V a, V b) { return a + b; }
inline V v_sub(V a, V b) { return a - b; }
inline V v_mul(V a, V b) { return a * b; }
inline V v_div(V a, V b) { return a / b; }
inline V v_fma(V a, V b, V c) { return a * b + c; }
inline V v_max(V a, V b) { return a > b ? a : b; }
inline V v_min(V a, V b) { return a < b ? a : b; }
inline V v_abs(V a) { return (V)((VI)a & 0x7fffffff); }
inline V v_load_half(const uint16_t* p) {
  V v;
  for (int i = 0; i < 16; ++i) v[i] = half_to_float(p[i]);
  return v;
}
inline void v_store_half(uint16_t* p, V v) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(v[i]);
}
// Byte i of each of 16 quads of signed bytes.
inline V v_load_code(const uint8_t* p, int i) {
  V v;
  for (int k = 0; k < 16; ++k) v[k] = static_cast<int8_t>(p[4 * k + i]);
  return v;
}
inline float v_hmax(V v) {
  float m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
inline float v_hsum(V v) {
  float s[16];
  std::memcpy(s, &v, 64);
  for (int width = 8; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}
// Lanes at or past `count` become `other`.
inline V v_keep(V v, int count, float other) {
  const VI lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < count ? v : v_set1(other);
}
inline unsigned v_mask_ge(V a, V b) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(a[i] >= b[i]) << i;
  return mask;
}
// 2^n * x for whole n in -126..127.
inline V v_scale2(V x, V n) { return x * (V)((__builtin_convertvector(n, VI) + 127) << 23); }
inline V v_round(V x) { return (x + 12582912.0f) - 12582912.0f; }
inline V v_zero_below(V v, V x, V limit) { return x < limit ? V{} : v; }
// 32 floats in -127..127, rounded to nearest even, as bytes; returns their sum.
inline int32_t v_store_i8(int8_t* p, V a, V b) {
  VI n = __builtin_convertvector(v_round(a), VI), m = __builtin_convertvector(v_round(b), VI);
  // Beside what is no number anything may come, and sums of such overflow.
  n = n < -127 ? VI{} - 127 : n > 127 ? VI{} + 127 : n;
  m = m < -127 ? VI{} - 127 : m > 127 ? VI{} + 127 : m;
  int32_t sum = 0;
  for (int i = 0; i < 16; ++i) {
    p[i] = static_cast<int8_t>(n[i]);
    p[i + 16] = static_cast<int8_t>(m[i]);
    sum += n[i] + m[i];
  }
  return sum;
}

}  // namespace
}  // namespace hob
