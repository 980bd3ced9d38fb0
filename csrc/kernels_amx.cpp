// Kernels for AMX beside AVX-512 (Sapphire Rapids and later). Layouts and contracts: kernels.h.
//
// linear: the integer dot products of 16 rows x 16 columns x one group are one tile instruction; what follows them is
// the float arithmetic of linear_avx512.inc in its order, so a row has the same bits in both, and few rows are left to
// that. The two take turns over kSpan groups, with the sums in L1 between them: while a tile instruction is at work, one
// of the two 512-bit float units is shut (measured on Sapphire Rapids), so overlapping them gains nothing.
// Tried beside this: weights turned into bfloat16 before the tile instruction, with nothing left to do per group. Half
// as fast again for 48 rows, but it takes twice the time for one row, whose bits must be the same.
#include "kernels.h"

#if defined(__x86_64__)
#include "vec_avx512.h"

namespace {
constexpr int kRows = 6;
constexpr int kValueVecs = 4;
constexpr int kCodeRows = 16;  // of a tile register
}  // namespace

#include "kernels_body.inc"
#include "codes.inc"
#include "linear_avx512.inc"
#include "attention_bytes_avx512.inc"

#include "amx.h"

namespace hob {
namespace {

constexpr int kSpan = 6;           // groups whose weights are unpacked at once
constexpr int kPassRows = 96;      // rows for which that is done
constexpr int kLeastTileRows = 29; // up to 28 rows VNNI is ahead: a decode step is bound by reading weights
constexpr int kSums = kCodeRows * kPanel;

// kSpan groups of a panel: codes as bytes (signed for symmetric kinds), d and m as floats.
struct alignas(64) Unpacked {
  uint8_t codes[kSpan][8][2][64];  // [group][quad][half of the columns][column and k]
  float d[kSpan][kPanel];
  float m[kSpan][kPanel];
};

template <Kind KIND>
void unpack_group(const uint8_t* group, int g, Unpacked* to) {
  using L = Layout<KIND>;
  for (int j = 0; j < 8; ++j) {
    __m512i w0, w1;
    load_quad<KIND>(group, j, &w0, &w1);
    if constexpr (KIND == Kind::kQ4S) {
      w0 = _mm512_sub_epi8(w0, _mm512_set1_epi8(8));
      w1 = _mm512_sub_epi8(w1, _mm512_set1_epi8(8));
    } else if constexpr (KIND == Kind::kQ8S) {
      w0 = _mm512_xor_si512(w0, _mm512_set1_epi8(static_cast<char>(0x80)));
      w1 = _mm512_xor_si512(w1, _mm512_set1_epi8(static_cast<char>(0x80)));
    }
    _mm512_store_si512(to->codes[g][j][0], w0);
    _mm512_store_si512(to->codes[g][j][1], w1);
  }
  const auto* scales = reinterpret_cast<const uint16_t*>(group + L::kCodeBytes);
  v_store(to->d[g], v_load_half(scales));
  v_store(to->d[g] + 16, v_load_half(scales + 16));
  if constexpr (L::kHasMin) {
    v_store(to->m[g], v_load_half(scales + 32));
    v_store(to->m[g] + 16, v_load_half(scales + 48));
  }
}

// The integer sums (16, 32) of one group.
template <Kind KIND>
inline void dot_group(const Unpacked& w, int g, const CodeGroup& rows, int32_t* sums) {
  tile_load<0>(rows.codes, kGroup);
  tile_load<2>(w.codes[g][0][0], 128);
  tile_load<3>(w.codes[g][0][1], 128);
  tile_zero<4>();
  tile_zero<5>();
  if constexpr (Layout<KIND>::kHasMin) {
    tile_dot_unsigned<4, 0, 2>();
    tile_dot_unsigned<5, 0, 3>();
  } else {
    tile_dot_signed<4, 0, 2>();
    tile_dot_signed<5, 0, 3>();
  }
  tile_store<4>(sums, kPanel * sizeof(int32_t));
  tile_store<5>(sums + 16, kPanel * sizeof(int32_t));
}

// total (8, 32) += what the groups give to 8 rows from row `first` of their tile on.
template <Kind KIND>
inline void add_groups(const Unpacked& w, const CodeGroup* tile, int first, int num_groups, const int32_t* sums, float* total) {
  __m512 f[8][2];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    f[r][0] = _mm512_load_ps(total + r * kPanel);
    f[r][1] = _mm512_load_ps(total + r * kPanel + 16);
  }
  for (int g = 0; g < num_groups; ++g, sums += kSums) {
    const float *scale = tile[g].scale + first, *scaled_sum = tile[g].scaled_sum + first;
    const __m512 d0 = _mm512_load_ps(w.d[g]), d1 = _mm512_load_ps(w.d[g] + 16);
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      const __m512 s = _mm512_set1_ps(scale[r]);
      const __m512 n0 = _mm512_cvtepi32_ps(_mm512_load_si512(sums + r * kPanel));
      const __m512 n1 = _mm512_cvtepi32_ps(_mm512_load_si512(sums + r * kPanel + 16));
      f[r][0] = _mm512_fmadd_ps(n0, _mm512_mul_ps(d0, s), f[r][0]);
      f[r][1] = _mm512_fmadd_ps(n1, _mm512_mul_ps(d1, s), f[r][1]);
    }
    if constexpr (Layout<KIND>::kHasMin) {
      const __m512 m0 = _mm512_load_ps(w.m[g]), m1 = _mm512_load_ps(w.m[g] + 16);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        const __m512 s = _mm512_set1_ps(scaled_sum[r]);
        f[r][0] = _mm512_fmadd_ps(m0, s, f[r][0]);
        f[r][1] = _mm512_fmadd_ps(m1, s, f[r][1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    _mm512_store_ps(total + r * kPanel, f[r][0]);
    _mm512_store_ps(total + r * kPanel + 16, f[r][1]);
  }
}

// Up to kPassRows rows.
template <Kind KIND>
void linear_pass(const uint8_t* panel, int num_groups, const CodeGroup* tiles, int num_rows, float* out,
                 ptrdiff_t out_stride, bool is_added, const uint8_t* ahead, int ahead_lines) {
  Unpacked w;
  alignas(64) int32_t sums[kSpan * kSums];
  alignas(64) float total[kPassRows * kPanel];
  std::memset(total, 0, sizeof total);
  const int num_spans = (num_groups + kSpan - 1) / kSpan;
  for (int span = 0; span < num_spans; ++span) {
    const int from = num_groups * span / num_spans, count = num_groups * (span + 1) / num_spans - from;
    for (int g = 0; g < count; ++g, panel += Layout<KIND>::kGroupBytes) {
      unpack_group<KIND>(panel, g, &w);
      for (int b = 0; b < ahead_lines; ++b, ahead += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    }
    for (int r = 0; r < num_rows; r += kCodeRows) {
      const CodeGroup* tile = tiles + static_cast<ptrdiff_t>(r / kCodeRows) * num_groups + from;
      for (int g = 0; g < count; ++g) dot_group<KIND>(w, g, tile[g], sums + g * kSums);
      add_groups<KIND>(w, tile, 0, count, sums, total + r * kPanel);
      if (r + 8 < num_rows) add_groups<KIND>(w, tile, 8, count, sums + 8 * kPanel, total + (r + 8) * kPanel);
    }
  }
  for (int r = 0; r < num_rows; ++r) {
    float* o = out + r * out_stride;
    const V f0 = v_load(total + r * kPanel), f1 = v_load(total + r * kPanel + 16);
    v_store(o, is_added ? v_add(v_load(o), f0) : f0);
    v_store(o + 16, is_added ? v_add(v_load(o + 16), f1) : f1);
  }
}

template <Kind KIND>
void linear_tiles(const uint8_t* panel, int num_groups, const uint8_t* tiles, int num_rows, float* out,
                  ptrdiff_t out_stride, bool is_added, const uint8_t* ahead) {
  if (num_rows < kLeastTileRows)
    return linear_kind<KIND>(panel, num_groups, tiles, num_rows, out, out_stride, is_added, ahead);
  TileConfig config;
  config.set(0, kCodeRows, kGroup);
  for (int half = 0; half < 2; ++half) {
    config.set(2 + half, kGroup / 4, 64);
    config.set(4 + half, kCodeRows, 64);
  }
  tile_configure(config);
  int lines = static_cast<int>(Layout<KIND>::kGroupBytes) / 64;
  for (int r = 0; r < num_rows; r += kPassRows, lines = 0)
    linear_pass<KIND>(panel, num_groups, reinterpret_cast<const CodeGroup*>(tiles) + static_cast<ptrdiff_t>(r / kCodeRows) * num_groups,
                      num_rows - r < kPassRows ? num_rows - r : kPassRows, out + r * out_stride, out_stride, is_added,
                      ahead, lines);
  tile_release();
}

void linear(Kind kind, const uint8_t* panel, int num_groups, const uint8_t* tiles, int num_rows, float* out,
            ptrdiff_t out_stride, bool is_added, const uint8_t* ahead) {
  switch (kind) {
    case Kind::kQ4M: return linear_tiles<Kind::kQ4M>(panel, num_groups, tiles, num_rows, out, out_stride, is_added, ahead);
    case Kind::kQ4S: return linear_tiles<Kind::kQ4S>(panel, num_groups, tiles, num_rows, out, out_stride, is_added, ahead);
    case Kind::kQ8S: return linear_tiles<Kind::kQ8S>(panel, num_groups, tiles, num_rows, out, out_stride, is_added, ahead);
    case Kind::kQ8M: return linear_tiles<Kind::kQ8M>(panel, num_groups, tiles, num_rows, out, out_stride, is_added, ahead);
    case Kind::kF32: return;  // linear_f32's
  }
}

// ---- attention ----

// Both products of attention in bfloat16 tiles of 16 queries, sums in float32; softmax and the merge of chunks in
// float32 by the shared code. One bfloat16 holds 8 bits of a number, so each number is two, `high` and what is left of
// it: keys and values (float16) are exact then, queries and weights have 16 bits. Products of two low parts are left
// out. Keys and values of a chunk are turned into tiles once for all queries of the call, or, where all queries fit one
// tile and so use each once, a few at a time, which stay in L1.
// Tried beside this for few queries: the tile instruction's arithmetic (chains of even and of odd products, their sum,
// then the total; no subnormals) by FMA on vectors. The bits are equal; it takes 1.27 times as long for three queries.
constexpr int kQueryRows = 16;  // queries of a tile register
constexpr int kFewKeys = 64;    // whose tiles stay in L1
constexpr int kTile = 512;      // values of a tile of bfloat16

// The working memory of a call, carved out of its scratch. Each array is there twice: high parts, then low parts.
struct Parts {
  uint16_t* query;    // (kMaxQueries / 16, dim / 32, 16, 32)
  uint16_t* keys;     // (kChunkKeys / 16, dim / 32, 16 pairs of dimensions, 16 keys, 2)
  uint16_t* values;   // (kChunkKeys / 32, dim / 16, 16 pairs of keys, 16 dimensions, 2)
  uint16_t* weights;  // (16, kChunkKeys)
  float* scores;      // (16, kChunkKeys); once
  float* chunk;       // (16, dim); once
  float* running;     // (kMaxQueries, dim); once
};

Parts parts_of(float* scratch, int dim) {
  Parts p;
  p.running = scratch;
  p.chunk = p.running + kMaxQueries * dim;
  p.scores = p.chunk + kQueryRows * dim;
  p.weights = reinterpret_cast<uint16_t*>(p.scores + kQueryRows * kChunkKeys);
  p.query = p.weights + 2 * kQueryRows * kChunkKeys;
  p.keys = p.query + 2 * kMaxQueries * dim;
  p.values = p.keys + 2 * kChunkKeys * dim;
  return p;
}

inline __m512i to_bf16(__m512 first, __m512 second) {
  const __m512bh halves = _mm512_cvtne2ps_pbh(second, first);
  __m512i bits;
  std::memcpy(&bits, &halves, sizeof bits);
  return bits;
}

// Each float rounded to the eight bits of a bfloat16, as a float.
inline __m512 high_part(__m512 x) {
  const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  return _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// 32 floats, one after the other.
inline void split(__m512 first, __m512 second, uint16_t* high, uint16_t* low) {
  const __m512 a = high_part(first), b = high_part(second);
  _mm512_storeu_si512(high, to_bf16(a, b));
  _mm512_storeu_si512(low, to_bf16(v_sub(first, a), v_sub(second, b)));
}

// The same, lane by lane beside each other, for floats that were float16: no bit is lost.
inline void split_pairs(__m512 even, __m512 odd, uint16_t* high, uint16_t* low) {
  const auto beside = [](__m512 a, __m512 b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(a), 16), _mm512_castps_si512(b));
  };
  const __m512 a = high_part(even), b = high_part(odd);
  _mm512_storeu_si512(high, beside(a, b));
  _mm512_storeu_si512(low, beside(v_sub(even, a), v_sub(odd, b)));
}

void tile_queries(const AttentionCall& call, const Parts& p) {
  const int dim = call.head_dim;
  for (int m = 0; m < call.num_queries; ++m)
    for (int d = 0; d < dim; d += 32) {
      uint16_t* to = p.query + (m / kQueryRows * dim / 32 + d / 32) * kTile + m % kQueryRows * 32;
      split(v_load(call.query[m] + d), v_load(call.query[m] + d + 16), to, to + kMaxQueries * dim);
    }
}

// Blocks before key `end` are fetched while those before them are at work.
void tile_keys(const AttentionCall& call, const Parts& p, int first, int count, int end) {
  const int dim = call.head_dim;
  uint16_t* to = p.keys;
  for (int j = 0; j < count; j += kBlockTokens) {
    const uint16_t* keys = block_of(call.keys, call, first + j);
    const uint16_t* next = first + j + kBlockTokens < end ? block_of(call.keys, call, first + j + kBlockTokens) : keys;
    for (int d = 0; d < dim; d += 2, to += 32, next += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
      split_pairs(v_load_half(keys + d * 16), v_load_half(keys + d * 16 + 16), to, to + kChunkKeys * dim);
    }
  }
}

// Slots from `count` on hold anything, and zero times it must be zero.
void tile_values(const AttentionCall& call, const Parts& p, int first, int count, int end) {
  const int dim = call.head_dim;
  for (int j = 0; j < (count + 31) / 32 * 32; j += 2) {
    const uint16_t* row = j < count ? block_of(call.values, call, first + j) + j % kBlockTokens * dim : nullptr;
    if (first + j + 32 < end) {
      const uint16_t* next = block_of(call.values, call, first + j + 32) + j % kBlockTokens * dim;
      for (int d = 0; d < 2 * dim; d += 32) _mm_prefetch(reinterpret_cast<const char*>(next + d), _MM_HINT_T0);
    }
    uint16_t* to = p.values + j / 32 * dim / 16 * kTile + j % 32 * 16;
    for (int d = 0; d < dim; d += 16, to += kTile)
      split_pairs(row ? v_load_half(row + d) : v_zero(), j + 1 < count ? v_load_half(row + dim + d) : v_zero(), to,
                  to + kChunkKeys * dim);
  }
}

// Tiles of a matrix: its step s, column n at `data` + s * step + n * next, the low parts `low` behind.
struct Tiles {
  const uint16_t* data;
  ptrdiff_t step, next, low;
  ptrdiff_t row_bytes;
};

// C[n] += A B[n] in registers 0 to N, A in register 4.
template <int N>
inline void dot_columns(const uint16_t* b, ptrdiff_t next) {
  tile_load<5>(b, 64);
  tile_dot_bf16<0, 4, 5>();
  if constexpr (N > 1) tile_load<6>(b + next, 64), tile_dot_bf16<1, 4, 6>();
  if constexpr (N > 2) tile_load<7>(b + 2 * next, 64), tile_dot_bf16<2, 4, 7>();
  if constexpr (N > 3) tile_load<5>(b + 3 * next, 64), tile_dot_bf16<3, 4, 5>();
}

// c (16, 16 N) = A B over all steps. `prepare` is called before each.
template <int N, class Prepare>
void multiply_columns(const Tiles& a, const Tiles& b, int steps, float* c, ptrdiff_t c_stride, const Prepare& prepare) {
  tile_zero<0>();
  if constexpr (N > 1) tile_zero<1>();
  if constexpr (N > 2) tile_zero<2>();
  if constexpr (N > 3) tile_zero<3>();
  for (int s = 0; s < steps; ++s) {
    prepare(s);
    const uint16_t *rows = a.data + s * a.step, *columns = b.data + s * b.step;
    tile_load<4>(rows, a.row_bytes);
    dot_columns<N>(columns, b.next);
    dot_columns<N>(columns + b.low, b.next);
    tile_load<4>(rows + a.low, a.row_bytes);
    dot_columns<N>(columns, b.next);
  }
  tile_store<0>(c, c_stride);
  if constexpr (N > 1) tile_store<1>(c + 16, c_stride);
  if constexpr (N > 2) tile_store<2>(c + 32, c_stride);
  if constexpr (N > 3) tile_store<3>(c + 48, c_stride);
}

// The same for any number of columns.
template <class Prepare>
void multiply(const Tiles& a, Tiles b, int num_columns, int steps, float* c, int c_size, const Prepare& prepare) {
  const auto stride = c_size * static_cast<ptrdiff_t>(sizeof(float));
  for (; num_columns > 0; num_columns -= 4, b.data += 4 * b.next, c += 64) switch (num_columns) {
      case 1: multiply_columns<1>(a, b, steps, c, stride, prepare); break;
      case 2: multiply_columns<2>(a, b, steps, c, stride, prepare); break;
      case 3: multiply_columns<3>(a, b, steps, c, stride, prepare); break;
      default: multiply_columns<4>(a, b, steps, c, stride, prepare); break;
    }
}

// `count` weights of a query, zero up to a whole step of 32.
inline void split_weights(const float* scores, int count, uint16_t* weights) {
  for (int j = 0; j < count; j += 32)
    split(v_load(scores + j), j + 16 < count ? v_load(scores + j + 16) : v_zero(), weights + j,
          weights + j + kQueryRows * kChunkKeys);
}

// Heads that do not fill tiles are left to the shared kernel.
void attention_tiles(const AttentionCall* call_) {
  const AttentionCall& call = *call_;
  const int dim = call.head_dim;
  if (dim % 32 != 0) return attention<HalfCache>(call_);
  const Parts p = parts_of(call.scratch, dim);
  const bool is_alone = call.num_queries <= kQueryRows && dim <= 64;  // tiles are used once: make and use few at a time
  float max[kMaxQueries], sum[kMaxQueries];
  int32_t start[kMaxQueries];  // first key each sees
  int longest = 0, earliest = call.length[0];
  for (int m = 0; m < call.num_queries; ++m) {
    max[m] = kMinusInf;
    sum[m] = 0.0f;
    start[m] = call.window > 0 && call.length[m] > call.window ? call.length[m] - call.window : 0;
    longest = call.length[m] > longest ? call.length[m] : longest;
    earliest = start[m] < earliest ? start[m] : earliest;
  }
  std::memset(p.running, 0, static_cast<size_t>(call.num_queries * dim) * sizeof(float));
  tile_queries(call, p);
  TileConfig config;
  for (int t = 0; t < 8; ++t) config.set(t, t > 4 || call.num_queries > kQueryRows ? kQueryRows : call.num_queries, 64);
  tile_configure(config);
  for (int c = call.first_chunk; c < call.end_chunk; ++c) {
    const int end = longest < (c + 1) * kChunkKeys ? longest : (c + 1) * kChunkKeys;
    if (end <= c * kChunkKeys) break;
    if (end <= earliest) continue;
    // Whole tiles of keys that nobody sees weigh nothing: leaving them out changes no bit.
    const int skipped = earliest > c * kChunkKeys ? (earliest - c * kChunkKeys) / 64 * 64 : 0;
    const int first = c * kChunkKeys + skipped, count = end - first;
    const auto sees_some = [&](int m) { return call.length[m] > first && start[m] < end; };
    if (!is_alone) tile_keys(call, p, first, count, end), tile_values(call, p, first, count, end);
    for (int t = 0; t < call.num_queries; t += kQueryRows) {
      const int rows = call.num_queries - t < kQueryRows ? call.num_queries - t : kQueryRows;
      const Tiles queries = {p.query + t * dim, kTile, 0, kMaxQueries * dim, 64};
      for (int j = 0, n; j < count; j += n) {
        n = is_alone && count - j > kFewKeys ? kFewKeys : count - j;
        if (is_alone) tile_keys(call, p, first + j, n, end);
        multiply(queries, {p.keys, kTile, dim * 16, kChunkKeys * dim, 64}, (n + 15) / 16, dim / 32, p.scores + j, kChunkKeys, [](int) {});
      }
      float chunk_max[kQueryRows], chunk_sum[kQueryRows];
      for (int m = 0; m < rows; ++m) {
        if (!sees_some(t + m)) continue;
        float* scores = p.scores + m * kChunkKeys;
        chunk_sum[m] = softmax_chunk(scores, start[t + m] - first, call.length[t + m] - first, count, &chunk_max[m]);
        split_weights(scores, count, p.weights + m * kChunkKeys);
      }
      const Tiles weights = {p.weights, 32, 0, kQueryRows * kChunkKeys, kChunkKeys * 2};
      if (is_alone)
        multiply(weights, {p.values, 0, kTile, kChunkKeys * dim, 64}, dim / 16, (count + 31) / 32, p.chunk, dim,
                 [&](int s) { tile_values(call, p, first + s * 32, count - s * 32 < 32 ? count - s * 32 : 32, end); });
      else
        multiply(weights, {p.values, dim / 16 * kTile, kTile, kChunkKeys * dim, 64}, dim / 16, (count + 31) / 32, p.chunk, dim,
                 [](int) {});
      for (int m = 0; m < rows; ++m)
        if (sees_some(t + m))
          merge_chunk(&max[t + m], &sum[t + m], p.running + (t + m) * dim, chunk_max[m], chunk_sum[m], p.chunk + m * dim, dim);
    }
  }
  tile_release();
  for (int m = 0; m < call.num_queries; ++m) {
    if (!call.is_partial) {
      divide(p.running + m * dim, sum[m], dim, call.out[m]);
      continue;
    }
    call.out[m][0] = max[m];
    call.out[m][1] = sum[m];
    std::memcpy(call.out[m] + kPartialHead, p.running + m * dim, static_cast<size_t>(dim) * sizeof(float));
  }
}

// ---- attention over bytes ----

constexpr int kFewQueries = 4;  // up to here vectors are as fast
constexpr int kPair = 32;       // columns of two tiles

// The products of attention_bytes_avx512.inc by tiles of 16 queries. A block of keys is a tile as it lies in the pool.
struct TileProducts {
  static constexpr int kLowest = 0;

  static void begin(const AttentionCall& call) {
    TileConfig config;
    const int rows = call.num_queries < kGroupQueries ? call.num_queries : kGroupQueries;
    for (int t = 0; t < 8; ++t) config.set(t, t < 6 ? rows : 16, 64);
    tile_configure(config);
  }
  static void end() { tile_release(); }

  static void load_chunk(const AttentionCall& call, const ByteParts& p, int first, int count) {
    for (int j = 0; j < count; j += kBlockTokens)
      std::memcpy(p.values + j * p.dim, bytes_of(call.values, call, first + j), static_cast<size_t>(kBlockTokens * p.dim));
  }

  static void score(const AttentionCall& call, const ByteParts& p, int m0, int rows, int first, int count) {
    for (int j = 0; j < count; j += kPair) {
      const uint8_t *low = bytes_of(call.keys, call, first + j), *high = low;  // of two tiles; the last may be alone
      if (j + 16 < count) high = bytes_of(call.keys, call, first + j + 16);
      clear();
      for (int d = 0; d < p.dim; d += 64) {
        tile_load<4>(p.query[0] + m0 * p.dim + d, p.dim);
        tile_load<5>(p.query[1] + m0 * p.dim + d, p.dim);
        tile_load<6>(low + d * kBlockTokens, 64);
        tile_load<7>(high + d * kBlockTokens, 64);
        tile_dot_signed<0, 4, 6>();
        tile_dot_signed<1, 4, 7>();
        tile_dot_unsigned_signed<2, 5, 6>();
        tile_dot_unsigned_signed<3, 5, 7>();
      }
      const int32_t* sums = store(p);
      const __m512 scale0 = v_load(p.key_scale + j), scale1 = v_load(p.key_scale + j + 16);
      for (int m = 0; m < rows; ++m) {
        v_store(p.scores + m * kChunkKeys + j, v_mul(joined(sums + m * kPair), scale0));
        v_store(p.scores + m * kChunkKeys + j + 16, v_mul(joined(sums + m * kPair + 16), scale1));
      }
    }
  }

  static void weigh(const AttentionCall&, const ByteParts& p, int rows, int, int count, const float* unit) {
    for (int d = 0; d < p.dim; d += kPair) {
      clear();
      for (int j = 0; j < count; j += 64) {
        tile_load<4>(p.weights[0] + j, kChunkKeys);
        tile_load<5>(p.weights[1] + j, kChunkKeys);
        tile_load<6>(p.values + j * p.dim + d * 4, p.dim * 4);
        tile_load<7>(p.values + j * p.dim + d * 4 + 64, p.dim * 4);
        tile_dot_unsigned_signed<0, 4, 6>();
        tile_dot_unsigned_signed<1, 4, 7>();
        tile_dot_unsigned_signed<2, 5, 6>();
        tile_dot_unsigned_signed<3, 5, 7>();
      }
      const int32_t* sums = store(p);
      for (int m = 0; m < rows; ++m) {
        v_store(p.chunk + m * p.dim + d, v_mul(joined(sums + m * kPair), v_set1(unit[m])));
        v_store(p.chunk + m * p.dim + d + 16, v_mul(joined(sums + m * kPair + 16), v_set1(unit[m])));
      }
    }
  }

  static void clear() {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }

  // Two tiles of high digits and two of low ones -> (2, 16, kPair).
  static const int32_t* store(const ByteParts& p) {
    tile_store<0>(p.sums, kPair * 4);
    tile_store<1>(p.sums + 16, kPair * 4);
    tile_store<2>(p.sums + kGroupQueries * kPair, kPair * 4);
    tile_store<3>(p.sums + kGroupQueries * kPair + 16, kPair * 4);
    return p.sums;
  }

  static V joined(const int32_t* high) {
    const __m512i h = _mm512_loadu_si512(high), l = _mm512_loadu_si512(high + kGroupQueries * kPair);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(h, 8), l));
  }
};

// Whole numbers are exact, so either kind of product gives the same bits.
void attention_codes(const AttentionCall* call) {
  if (call->num_queries > kFewQueries && call->head_dim % 64 == 0) attention_bytes<TileProducts>(call);
  else attention_bytes<VectorProducts>(call);
}

const Kernels kTable = {"amx", kCodeRows, sizeof(CodeGroup), linear, linear_f32, rms_norm, quantise, silu_mul, rope,
                        {{store_key, store_value, attention_tiles}, {store_key_codes, store_value_codes, attention_codes}},
                        merge_partials, block_maxima, exp_sums, select_at_least, gelu_mul};

}  // namespace

const Kernels* amx_kernels() { return &kTable; }

}  // namespace hob

#else

namespace hob {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace hob

#endif
