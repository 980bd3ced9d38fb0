// AMX tiles: set-up and the instructions. Include only from a file compiled with its flags.
//
// Written here because GCC 12's _tile_loadconfig declares 8 of the 64 bytes it reads, so that the stores of the others
// may be dropped, and its _tile_loadd does not declare that it reads memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hob {
namespace {

// Rows and bytes of a row of each tile register.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64);

inline void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
// Tiles in use are 8 KB that the kernel saves with each change of thread.
inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* from, ptrdiff_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T>
inline void tile_store(void* to, ptrdiff_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride) : "memory");
}
// C += A B with signed bytes in A (rows, k) and in B (k / 4, columns, 4) ..
template <int C, int A, int B>
inline void tile_dot_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// .. or unsigned ones in B.
template <int C, int A, int B>
inline void tile_dot_unsigned() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// .. and with unsigned bytes in A and signed ones in B.
template <int C, int A, int B>
inline void tile_dot_unsigned_signed() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// C += A B with bfloat16 in A (rows, k) and B (k / 2, columns, 2), sums in float32.
template <int C, int A, int B>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace hob
