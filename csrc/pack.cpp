// Packing: weights in kernel order, one layout for all instruction sets.
//
//   matrix  = panels of 32 outputs, one after the other (outputs padded to 32 with zero scales)
//   panel   = groups of 32 inputs, one after the other            (float32: [K][32], no groups)
//   group   = codes, then 32 float16 d, then (kinds with a minimum) 32 float16 m
//   codes   = 8 quads of 4 inputs; 4-bit quad: 64 bytes, byte[c * 4 + i] = column c (low) and column 16 + c (high)
//                                  8-bit quad: 2 x 64 bytes, half h: byte[c * 4 + i] = column 16 h + c
//
// A 64-byte load is thus 16 columns x 4 inputs: the operand of one 8-bit dot product instruction, and decode reads one
// stream from start to end. Native because a Python loop over 100 million codes takes minutes; this takes 0.2 s.
//
// Each GGML type is a row of `kFormats`: how many bytes a block of `block_values` takes and how it decodes into groups
// of (codes, d, m). Types whose groups do not fit ours exactly are decoded to floats and coded again in 8 bits.
#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "text.h"

namespace hob {
namespace {

struct Group {
  uint8_t codes[32];
  uint16_t d;
  uint16_t m;
};

uint16_t half_in(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, 2);
  return h;
}

void nibbles(const uint8_t* qs, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = qs[i] & 15;
    codes[i + 16] = qs[i] >> 4;
  }
}

// The fifth bits of 32 codes, in a little-endian word.
void add_fifth_bits(const uint8_t* qh, uint8_t* codes) {
  uint32_t bits;
  std::memcpy(&bits, qh, 4);
  for (int i = 0; i < 32; ++i) codes[i] |= static_cast<uint8_t>((bits >> i & 1u) << 4);
}

void decode_q4_0(const uint8_t* block, Group* g) {
  g->d = half_in(block);
  nibbles(block + 2, g->codes);
}

void decode_q4_1(const uint8_t* block, Group* g) {
  g->d = half_in(block);
  g->m = half_in(block + 2);
  nibbles(block + 4, g->codes);
}

void decode_q5_0(const uint8_t* block, Group* g) {
  g->d = half_in(block);
  nibbles(block + 6, g->codes);
  add_fifth_bits(block + 2, g->codes);
  for (auto& code : g->codes) code = static_cast<uint8_t>(code + 112);  // q - 16 = code - 128
}

void decode_q5_1(const uint8_t* block, Group* g) {
  g->d = half_in(block);
  g->m = half_in(block + 2);
  nibbles(block + 8, g->codes);
  add_fifth_bits(block + 4, g->codes);
}

void decode_q8_0(const uint8_t* block, Group* g) {
  g->d = half_in(block);
  for (int i = 0; i < 32; ++i) g->codes[i] = static_cast<uint8_t>(block[2 + i] ^ 0x80);
}

// Six-bit scale and minimum of sub-block j of Q4_K and Q5_K.
void k_scale(int j, const uint8_t* scales, int* d, int* m) {
  if (j < 4) {
    *d = scales[j] & 63;
    *m = scales[j + 4] & 63;
  } else {
    *d = (scales[j + 4] & 15) | (scales[j - 4] >> 6 << 4);
    *m = (scales[j + 4] >> 4) | (scales[j] >> 6 << 4);
  }
}

void k_scales(const uint8_t* block, Group* groups) {
  const float d = half_to_float(half_in(block)), m = half_to_float(half_in(block + 2));
  for (int j = 0; j < 8; ++j) {
    int scale, minimum;
    k_scale(j, block + 4, &scale, &minimum);
    groups[j].d = float_to_half(d * static_cast<float>(scale));
    groups[j].m = float_to_half(-m * static_cast<float>(minimum));
  }
}

void decode_q4_k(const uint8_t* block, Group* groups) {
  k_scales(block, groups);
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 32; ++i) groups[j].codes[i] = block[16 + j / 2 * 32 + i] >> (j % 2 * 4) & 15;
}

void decode_q5_k(const uint8_t* block, Group* groups) {
  k_scales(block, groups);
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 32; ++i)
      groups[j].codes[i] =
          static_cast<uint8_t>((block[48 + j / 2 * 32 + i] >> (j % 2 * 4) & 15) | (block[16 + i] >> j & 1) << 4);
}

// 32 floats in 8 symmetric bits.
void encode_q8s(const float* x, Group* g) {
  float amax = 0.0f;
  for (int i = 0; i < 32; ++i) amax = std::max(amax, std::fabs(x[i]));
  g->d = float_to_half(amax / 127.0f);
  const float d = half_to_float(g->d);
  for (int i = 0; i < 32; ++i) {
    const float q = d > 0.0f ? std::nearbyint(x[i] / d) : 0.0f;
    g->codes[i] = static_cast<uint8_t>(128 + static_cast<int>(std::clamp(q, -127.0f, 127.0f)));
  }
}

void decode_q6_k(const uint8_t* block, Group* groups) {
  const uint8_t *low = block, *high = block + 128;
  const auto* scales = reinterpret_cast<const int8_t*>(block + 192);
  const float d = half_to_float(half_in(block + 208));
  float x[256];
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, quarter = i % 128 / 32, l = i % 32;
    const int nibble = low[half * 64 + quarter % 2 * 32 + l] >> (quarter / 2 * 4) & 15;
    const int top = high[half * 32 + l] >> (2 * quarter) & 3;
    x[i] = d * static_cast<float>(scales[i / 16]) * static_cast<float>((nibble | top << 4) - 32);
  }
  for (int j = 0; j < 8; ++j) encode_q8s(x + 32 * j, groups + j);
}

// Place of value i in a block of 256 whose codes lie two bits each, four in a byte: byte 32 (i / 128) + i % 32.
int two_bits(const uint8_t* qs, int i) { return qs[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3; }

void decode_q2_k(const uint8_t* block, Group* groups) {
  const float d = half_to_float(half_in(block + 80)), m = half_to_float(half_in(block + 82));
  float x[256];
  for (int i = 0; i < 256; ++i) {
    const int scale = block[i / 16];
    x[i] = d * static_cast<float>((scale & 15) * two_bits(block + 16, i)) - m * static_cast<float>(scale >> 4);
  }
  for (int j = 0; j < 8; ++j) encode_q8s(x + 32 * j, groups + j);
}

void decode_q3_k(const uint8_t* block, Group* groups) {
  const uint8_t *high = block, *low = block + 32, *scales = block + 96;
  const float d = half_to_float(half_in(block + 108));
  float x[256];
  for (int i = 0; i < 256; ++i) {
    const int s = i / 16;  // its scale: four bits of two a byte, two bits of four a byte
    const int scale = ((scales[s % 8] >> (s / 8 * 4) & 15) | (scales[8 + s % 4] >> (s / 4 * 2) & 3) << 4) - 32;
    const int top = high[i % 32] >> (i / 32) & 1;
    x[i] = d * static_cast<float>(scale * (two_bits(low, i) + 4 * top - 4));
  }
  for (int j = 0; j < 8; ++j) encode_q8s(x + 32 * j, groups + j);
}

// IQ4: a nibble names one of these levels.
constexpr int kLevels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

void levels(const uint8_t* qs, uint8_t* codes) {
  nibbles(qs, codes);
  for (int i = 0; i < 32; ++i) codes[i] = static_cast<uint8_t>(128 + kLevels[codes[i]]);
}

void decode_iq4_nl(const uint8_t* block, Group* g) {
  g->d = half_in(block);
  levels(block + 2, g->codes);
}

void decode_iq4_xs(const uint8_t* block, Group* groups) {
  const float d = half_to_float(half_in(block));
  const int high = half_in(block + 2);
  for (int j = 0; j < 8; ++j) {
    const int scale = ((block[4 + j / 2] >> (j % 2 * 4) & 15) | (high >> (2 * j) & 3) << 4) - 32;
    groups[j].d = float_to_half(d * static_cast<float>(scale));
    levels(block + 8 + 16 * j, groups[j].codes);
  }
}

float decode_f32(const uint8_t* p) {
  float x;
  std::memcpy(&x, p, 4);
  return x;
}

float decode_f16(const uint8_t* p) { return half_to_float(half_in(p)); }

float decode_bf16(const uint8_t* p) {
  const uint32_t bits = static_cast<uint32_t>(half_in(p)) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Format {
  int ggml_type;
  const char* name;
  Kind kind;
  int block_values;
  int block_bytes;
  void (*decode)(const uint8_t* block, Group* groups);  // null: float_of is set
  float (*float_of)(const uint8_t* value);
};

constexpr Format kFormats[] = {
    {0, "F32", Kind::kF32, 1, 4, nullptr, decode_f32},
    {1, "F16", Kind::kF32, 1, 2, nullptr, decode_f16},
    {30, "BF16", Kind::kF32, 1, 2, nullptr, decode_bf16},
    {2, "Q4_0", Kind::kQ4S, 32, 18, decode_q4_0, nullptr},
    {3, "Q4_1", Kind::kQ4M, 32, 20, decode_q4_1, nullptr},
    {6, "Q5_0", Kind::kQ8S, 32, 22, decode_q5_0, nullptr},
    {7, "Q5_1", Kind::kQ8M, 32, 24, decode_q5_1, nullptr},
    {8, "Q8_0", Kind::kQ8S, 32, 34, decode_q8_0, nullptr},
    {10, "Q2_K", Kind::kQ8S, 256, 84, decode_q2_k, nullptr},
    {11, "Q3_K", Kind::kQ8S, 256, 110, decode_q3_k, nullptr},
    {12, "Q4_K", Kind::kQ4M, 256, 144, decode_q4_k, nullptr},
    {13, "Q5_K", Kind::kQ8M, 256, 176, decode_q5_k, nullptr},
    {14, "Q6_K", Kind::kQ8S, 256, 210, decode_q6_k, nullptr},
    {20, "IQ4_NL", Kind::kQ8S, 32, 18, decode_iq4_nl, nullptr},
    {23, "IQ4_XS", Kind::kQ8S, 256, 136, decode_iq4_xs, nullptr},
};

const Format& format_of(int ggml_type) {
  for (const Format& format : kFormats)
    if (format.ggml_type == ggml_type) return format;
  std::string known;
  for (const Format& format : kFormats) known += text(known.empty() ? "" : ", ", format.name, " (", format.ggml_type, ")");
  refuse("GGML type ", ggml_type, " is not supported. Known: ", known);
}

bool is_nibbles(Kind kind) { return kind == Kind::kQ4M || kind == Kind::kQ4S; }
bool has_min(Kind kind) { return kind == Kind::kQ4M || kind == Kind::kQ8M; }
size_t code_bytes(Kind kind) { return is_nibbles(kind) ? 512 : 1024; }

// Column c of a group: its 32 codes and scales. The group's bytes are zero before.
void store_column(Kind kind, const Group& g, int c, uint8_t* group) {
  for (int k = 0; k < 32; ++k) {
    const int at = c % 16 * 4 + k % 4;
    if (is_nibbles(kind)) group[k / 4 * 64 + at] |= static_cast<uint8_t>(g.codes[k] << (c / 16 * 4));
    else group[k / 4 * 128 + c / 16 * 64 + at] = g.codes[k];
  }
  std::memcpy(group + code_bytes(kind) + 2 * c, &g.d, 2);
  if (has_min(kind)) std::memcpy(group + code_bytes(kind) + 64 + 2 * c, &g.m, 2);
}

void pack_floats(const uint8_t* data, const Format& format, int64_t n, int64_t k, uint8_t* out) {
  auto* values = reinterpret_cast<float*>(out);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t i = 0; i < k; ++i) {
      const float x = format.float_of(data + (row * k + i) * format.block_bytes);
      values[n == 1 ? i : (row / kPanel * k + i) * kPanel + row % kPanel] = x;
    }
}

void pack_groups(const uint8_t* data, const Format& format, int64_t n, int64_t k, uint8_t* out) {
  const int64_t groups = k / kGroup, per_block = format.block_values / kGroup;
  const int64_t row_bytes = k / format.block_values * format.block_bytes;
  const auto stride = static_cast<int64_t>(group_bytes(format.kind));
  Group decoded[8] = {};
  for (int64_t row = 0; row < n; ++row)
    for (int64_t block = 0; block < k / format.block_values; ++block) {
      format.decode(data + row * row_bytes + block * format.block_bytes, decoded);
      for (int64_t j = 0; j < per_block; ++j)
        store_column(format.kind, decoded[j], static_cast<int>(row % kPanel),
                     out + (row / kPanel * groups + block * per_block + j) * stride);
    }
}

}  // namespace

Kind kind_of(int ggml_type) { return format_of(ggml_type).kind; }

size_t group_bytes(Kind kind) { return code_bytes(kind) + (has_min(kind) ? 128 : 64); }

size_t packed_bytes(Kind kind, int64_t n, int64_t k) {
  const auto panels = static_cast<size_t>((n + kPanel - 1) / kPanel);
  if (kind == Kind::kF32) return n == 1 ? static_cast<size_t>(k) * 4 : panels * static_cast<size_t>(k) * kPanel * 4;
  return panels * static_cast<size_t>(k / kGroup) * group_bytes(kind);
}

void check_packable(size_t data_bytes, int ggml_type, int64_t n, int64_t k) {
  const Format& format = format_of(ggml_type);
  if (k % format.block_values != 0)
    refuse(format.name, " tensor of ", n, " x ", k, ": the row length must be a multiple of ", format.block_values);
  if (n == 1 && format.kind != Kind::kF32) refuse(format.name, " tensor of 1 x ", k, ": vectors must be F32, F16 or BF16");
  const auto expected = static_cast<size_t>(n * (k / format.block_values) * format.block_bytes);
  if (data_bytes != expected)
    refuse(format.name, " tensor of ", n, " x ", k, " has ", data_bytes, " bytes, expected ", expected);
}

void pack_tensor(const uint8_t* data, int ggml_type, int64_t n, int64_t k, uint8_t* out) {
  const Format& format = format_of(ggml_type);
  std::memset(out, 0, packed_bytes(format.kind, n, k));
  if (format.decode) pack_groups(data, format, n, k, out);
  else pack_floats(data, format, n, k, out);
}

void unpack_row(Kind kind, const uint8_t* data, int64_t k, int64_t row, int64_t k_padded, float* x) {
  std::fill(x + k, x + k_padded, 0.0f);
  const auto c = static_cast<int>(row % kPanel);
  if (kind == Kind::kF32) {
    const auto* panel = reinterpret_cast<const float*>(data) + row / kPanel * k * kPanel;
    for (int64_t i = 0; i < k; ++i) x[i] = panel[i * kPanel + c];
    return;
  }
  const int64_t groups = k / kGroup;
  const uint8_t* group = data + static_cast<size_t>(row / kPanel * groups) * group_bytes(kind);
  for (int64_t g = 0; g < groups; ++g, group += group_bytes(kind), x += kGroup) {
    const float d = half_to_float(half_in(group + code_bytes(kind) + 2 * c));
    const float m = has_min(kind) ? half_to_float(half_in(group + code_bytes(kind) + 64 + 2 * c)) : 0.0f;
    const int offset = kind == Kind::kQ4S ? 8 : (kind == Kind::kQ8S ? 128 : 0);
    for (int i = 0; i < kGroup; ++i) {
      const int at = c % 16 * 4 + i % 4;
      const int code = is_nibbles(kind) ? group[i / 4 * 64 + at] >> (c / 16 * 4) & 15 : group[i / 4 * 128 + c / 16 * 64 + at];
      x[i] = d * static_cast<float>(code - offset) + m;
    }
  }
}

}  // namespace hob
