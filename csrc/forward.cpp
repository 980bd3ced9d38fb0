// The forward pass of decoder-only transformers: RMSNorm, RoPE, grouped-query attention, gated FFN. A family is what its
// Layer has beside the matrices (model.h): biases, norms of Q and K, norms before the residual sums, a sliding window.
//
// The same building blocks run under two schedules:
//
//   few rows   threads split the outputs of each matrix, so each weight is read once, by one core, at DRAM speed:
//              qkv | attention | out | gate_up | down, five joins a layer. Cheap preparation (norm, quantise) is
//              repeated by each thread rather than waited for.
//   many rows  threads split the rows: a block of rows goes through the whole layer while its activations stay in
//              cache, and the weights come from the last-level cache: out..down..next qkv | attention, two joins.
//
// A row's float operations are the same under both (kernels.h), so the choice is invisible in the results.
#include "forward.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <utility>

#include "check_batch.h"
#include "pack.h"
#include "sample.h"
#include "text.h"

namespace hob {
namespace {

constexpr int kFewRows = 32;       // up to here threads split outputs: ahead below 20 rows, level at 24 to 30 (2 cores)
constexpr int kHeadPanels = 16;    // panels of the head in one piece: 310 KB of 8-bit weights
static_assert(kFewRows <= kMaxBlockRows);

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class Step {
 public:
  Step(KvPool& pool, Workspace& workspace, const Batch& batch)
      : pool_(pool), w_(workspace), m_(workspace.model), net_(m_.network), k_(*m_.kernels), kv_(k_.kv[static_cast<int>(pool.type)]), b_(batch) {}

  bool run() {
    prepare();
    embed();
    keep(0, 0, b_.num_rows);
    const bool is_done = b_.num_rows <= kFewRows ? run_few() : run_many();
    if (is_done) head();
    if (const int point = w_.bad_point.load(); point >= 0) throw std::runtime_error(describe(point));
    return is_done;
  }

 private:
  // ---- preparation ----

  void prepare() {
    w_.bad_point.store(-1);
    w_.is_stop_requested.store(false);
    w_.num_tops = b_.num_tops;
    w_.measured_keys = b_.measured < 0 ? 0 : b_.index[b_.measured] + 1;
    std::fill(std::begin(w_.phase_ns), std::end(w_.phase_ns), 0);
    w_.logits_rows.clear();
    w_.score_rows.clear();
    w_.hidden_rows.clear();
    w_.kept_layers.assign(b_.layers, b_.layers + b_.num_kept);
    if (w_.kept_layers.empty()) w_.kept_layers.push_back(net_.num_layers);
    for (int s = 0; s < b_.num_sequences; ++s)
      for (int r = b_.row_start[s]; r < b_.row_start[s + 1]; ++r) {
        w_.sequence_of[r] = s;
        w_.adapter_of[r] = m_.adapter(b_.adapter[s]);
      }
    has_adapters_ = std::any_of(b_.adapter, b_.adapter + b_.num_sequences, [](int32_t id) { return id != 0; });
    for (int r = 0; r < b_.num_rows; ++r) switch (static_cast<Out>(b_.out[r])) {
        case Out::kNone: break;
        case Out::kLogits: w_.logits_rows.push_back(r); break;
        case Out::kScore: w_.score_rows.push_back(r); break;
        case Out::kHidden: w_.hidden_rows.push_back(r); break;
      }
    plan_attention();
  }

  bool is_any_needed(int first, int end) const {
    return std::any_of(b_.out + first, b_.out + end, [](uint8_t out) { return out != 0; });
  }

  // Few pieces and long contexts: split by chunks of keys too, so that every thread has work.
  void plan_attention() {
    const int group = net_.num_heads / net_.num_kv_heads;
    w_.pieces.clear();
    w_.last_pieces.clear();
    std::fill_n(w_.num_partials, static_cast<size_t>(b_.num_rows) * static_cast<size_t>(net_.num_heads), 0);
    const bool may_split = b_.num_rows <= kFewRows && m_.threads->num_threads() > 1;
    int num_partials = 0;
    for (int s = b_.num_sequences - 1; s >= 0; --s) {
      const int first_row = b_.row_start[s], num_queries = (b_.row_start[s + 1] - first_row) * group;
      for (int first = (num_queries - 1) / kMaxQueries * kMaxQueries; first >= 0 && num_queries > 0; first -= kMaxQueries) {
        const int count = std::min(kMaxQueries, num_queries - first);
        const int row = first_row + first / group, last_row = first_row + (first + count - 1) / group;
        const int chunks = b_.index[last_row] / kChunkKeys + 1;
        const int partials = chunks * count * net_.num_kv_heads;
        const bool is_split = may_split && chunks > 1 && num_partials + partials <= kMaxPartials;
        for (int h = 0; h < net_.num_kv_heads; ++h) {
          if (is_split) reserve_partials(first_row, first, count, group, h, chunks, &num_partials);
          for (int c = 0; c < (is_split ? chunks : 1); ++c) {
            const AttentionPiece piece{s, h, first, count, is_split ? c : 0, is_split ? c + 1 : chunks, is_split};
            w_.pieces.push_back(piece);
            if (is_any_needed(row, last_row + 1)) w_.last_pieces.push_back(piece);
          }
        }
      }
    }
  }

  void reserve_partials(int first_row, int first, int count, int group, int kv_head, int chunks, int* next) {
    for (int i = first; i < first + count; ++i, *next += chunks) {
      const int at = (first_row + i / group) * net_.num_heads + kv_head * group + i % group;
      w_.first_partial[at] = *next;
      w_.num_partials[at] = std::min(chunks, b_.index[first_row + i / group] / kChunkKeys + 1);
    }
  }

  template <class F>
  void timed(Phase phase, int num_pieces, F&& work) {
    const int64_t start = now_ns();
    ++w_.job;
    m_.threads->run(num_pieces, work);
    w_.phase_ns[phase] += now_ns() - start;
  }

  // ---- rows in ----

  void embed() {
    const int step = 16, stride = m_.hidden_padded();
    timed(kEmbed, (b_.num_rows + step - 1) / step, [&](int piece, int) {
      for (int r = piece * step; r < std::min(b_.num_rows, (piece + 1) * step); ++r) {
        float* x = w_.x + static_cast<ptrdiff_t>(r) * stride;
        unpack_row(m_.embedding.kind, m_.embedding.data, net_.hidden_size, b_.token[r], stride, x);
        if (net_.embedding_scale != 1.0f)
          for (int i = 0; i < net_.hidden_size; ++i) x[i] *= net_.embedding_scale;
        for (size_t rope = 0; rope < m_.rope_frequencies.size(); ++rope) turn(rope, r);
      }
    });
  }

  // How far each pair of dimensions of row r turns, under one of the model's bases.
  void turn(size_t rope, int r) {
    const ptrdiff_t at = angles_at(rope, r);
    for (int i = 0; i < m_.half_rope(); ++i) {
      const double angle = b_.position[r] * m_.rope_frequencies[rope][static_cast<size_t>(i)];
      w_.cos[at + i] = static_cast<float>(std::cos(angle));
      w_.sin[at + i] = static_cast<float>(std::sin(angle));
    }
  }

  ptrdiff_t angles_at(size_t rope, int r) const {
    return (static_cast<ptrdiff_t>(rope) * w_.max_rows + r) * m_.half_rope();
  }

  // ---- inputs of linear layers, rows first .. first + count ----

  void fill(const Acts& acts, int i, const float* values) {
    k_.quantise(values, acts.num_groups, acts.group(k_, i, 0), i % k_.tile_rows);
  }

  // x -> norm -> acts, and where the floats are. `point` names the place in the network for the check of finiteness.
  const float* normalise(const float* x, const float* weight, int point, int i, bool is_float, bool is_quantised, Scratch& s,
                 const Acts& acts) {
    float* y = is_float ? acts.rows + static_cast<ptrdiff_t>(i) * acts.stride : s.row;
    const float sum = k_.rms_norm(x, weight, net_.hidden_size, m_.hidden_padded(), net_.rms_eps, y);
    if (!std::isfinite(sum)) note_bad(point);
    if (is_quantised) fill(acts, i, y);
    return y;
  }

  // A view of the thread's input buffer for rows of k values.
  static Acts shaped(const Acts& acts, int k) { return {acts.tiles, acts.rows, padded(k) / kGroup, padded(k)}; }

  Acts attention_input(int layer, int first, int count, Scratch& s) {
    const Layer& l = m_.layers[static_cast<size_t>(layer)];
    const Acts acts = shaped(s.in, net_.hidden_size);
    const bool is_quantised = l.q.is_quantised() || l.k.is_quantised() || l.v.is_quantised();
    const bool is_float = !l.q.is_quantised() || !l.k.is_quantised() || !l.v.is_quantised();
    for (int i = 0; i < count; ++i) {
      const float* y = normalise(row_x(first + i), l.attn_norm, 2 * layer, i, is_float, is_quantised, s, acts);
      adapt_input(layer, kInputQkv, first + i, i, y, net_.hidden_size, s);
    }
    return acts;
  }

  Acts ffn_input(int layer, int first, int count, Scratch& s) {
    const Layer& l = m_.layers[static_cast<size_t>(layer)];
    const Acts acts = shaped(s.in, net_.hidden_size);
    const bool is_quantised = l.gate.is_quantised() || l.up.is_quantised();
    const bool is_float = !l.gate.is_quantised() || !l.up.is_quantised();
    for (int i = 0; i < count; ++i) {
      const float* y = normalise(row_x(first + i), l.ffn_norm, 2 * layer + 1, i, is_float, is_quantised, s, acts);
      adapt_input(layer, kInputGateUp, first + i, i, y, net_.hidden_size, s);
    }
    return acts;
  }

  Acts out_input(int layer, int first, int count, Scratch& s) {
    const Acts acts = shaped(s.in, m_.heads_size());
    const bool is_quantised = m_.layers[static_cast<size_t>(layer)].o.is_quantised();
    for (int i = 0; i < count; ++i) {
      float* row = is_quantised ? s.row : acts.rows + static_cast<ptrdiff_t>(i) * acts.stride;
      // Rows of which nothing is wanted had no attention in the last layer.
      if (layer + 1 == net_.num_layers && b_.out[first + i] == 0) std::fill_n(row, w_.q_stride, 0.0f);
      else join_heads(first + i, row);
      if (is_quantised) fill(acts, i, row);
      adapt_input(layer, kInputO, first + i, i, row, m_.heads_size(), s);
    }
    return acts;
  }

  void join_heads(int r, float* row) {
    std::memcpy(row, w_.attended + static_cast<ptrdiff_t>(r) * w_.q_stride, static_cast<size_t>(w_.q_stride) * sizeof(float));
    for (int h = 0; h < net_.num_heads; ++h) {
      const ptrdiff_t at = static_cast<ptrdiff_t>(r) * net_.num_heads + h;
      if (w_.num_partials[at] == 0) continue;
      k_.merge_partials(partial(w_.first_partial[at]), w_.num_partials[at], net_.head_dim, row + h * net_.head_dim);
    }
  }

  // The residual stream of HIDDEN rows first .. end after `layer` layers, if it is wanted. The last layer's: head().
  void keep(int layer, int first, int end) {
    const auto found = std::find(w_.kept_layers.begin(), w_.kept_layers.end(), layer);
    if (found == w_.kept_layers.end() || layer == net_.num_layers) return;
    const auto rows = w_.hidden_rows.begin();
    for (auto r = std::lower_bound(rows, w_.hidden_rows.end(), first); r != w_.hidden_rows.end() && *r < end; ++r)
      std::copy_n(row_x(*r), net_.hidden_size, kept(r - rows, found - w_.kept_layers.begin()));
  }

  float* kept(ptrdiff_t i, ptrdiff_t j) {
    return w_.hidden + (i * static_cast<ptrdiff_t>(w_.kept_layers.size()) + j) * net_.hidden_size;
  }

  float* row_x(int r) { return w_.x + static_cast<ptrdiff_t>(r) * m_.hidden_padded(); }
  float* partial(int slot) { return w_.partials + static_cast<ptrdiff_t>(slot) * (kPartialHead + net_.head_dim); }

  // ---- linear layers ----

  // out (count, stride) (+)= panels first_panel .. end_panel of `matrix` times acts. `out` is where panel 0 would go.
  void project(const Matrix& matrix, const Acts& acts, int count, int first_panel, int end_panel, float* out,
               ptrdiff_t stride, bool is_added) {
    for (int p = first_panel; p < end_panel; ++p) {
      const uint8_t* panel = matrix.data + static_cast<size_t>(p) * matrix.panel_bytes;
      float* to = out + p * kPanel;
      if (matrix.is_quantised())  // while a panel is at work the next one is fetched
        k_.linear(matrix.kind, panel, acts.num_groups, acts.tiles, count, to, stride, is_added, panel + matrix.panel_bytes);
      else
        k_.linear_f32(reinterpret_cast<const float*>(panel), matrix.k, acts.rows, acts.stride, count, to, stride, is_added);
    }
  }

  // ---- adapters: out += B (A x) for the rows that have one, each row by itself ----

  // A x of row r, the i-th of those at work, for all matrices that read this input.
  void adapt_input(int layer, Input input, int r, int i, const float* x, int k, Scratch& s) {
    if (!has_adapters_ || !w_.adapter_of[r]) return;
    const AdapterLayer& l = w_.adapter_of[r]->layer(layer);
    for (int p = 0; p * kPanel < l.stacked[input]; ++p)
      k_.linear_f32(l.a[input] + static_cast<ptrdiff_t>(p) * k * kPanel, k, x, 0, 1, s.adapted + i * kMaxStacked + p * kPanel, 0, false);
  }

  // The input of down, which is there in full only when all panels of gate and up are done.
  void adapt_down_input(int layer, int first, int count, const Acts& ffn, Scratch& s) {
    for (int i = 0; i < count && has_adapters_; ++i)
      adapt_input(layer, kInputDown, first + i, i, ffn.rows + static_cast<ptrdiff_t>(i) * ffn.stride, m_.ffn_size(), s);
  }

  // What `project` gave for rows first .. first + count, in the same place.
  void adapt(int layer, Target target, int first, int count, int first_panel, int end_panel, float* out, ptrdiff_t stride,
             const Scratch& s) {
    for (int i = 0; i < count && has_adapters_; ++i) {
      if (!w_.adapter_of[first + i]) continue;
      const AdapterLayer::Part& part = w_.adapter_of[first + i]->layer(layer).part[target];
      for (int p = first_panel; p < end_panel && part.b; ++p)
        k_.linear_f32(part.b + static_cast<ptrdiff_t>(p) * part.rank * kPanel, part.rank, s.adapted + i * kMaxStacked + part.first, 0,
                      1, out + i * stride + p * kPanel, 0, true);
    }
  }

  // QKV is worked on in units of one head, so that the thread that has a head's values rotates and stores them too.
  // A head that does not fill panels (head_dim % 32 != 0), or is normalised with the others, makes its whole matrix one unit.
  bool is_head_unit() const { return net_.head_dim % kPanel == 0 && !net_.is_qk_norm_joint; }
  int num_units() const { return is_head_unit() ? net_.num_heads + 2 * net_.num_kv_heads : 3; }

  void qkv_unit(int layer, int unit, const Acts& acts, int first, int count, Scratch& s) {
    const Layer& l = m_.layers[static_cast<size_t>(layer)];
    const int q_units = is_head_unit() ? net_.num_heads : 1, kv_units = is_head_unit() ? net_.num_kv_heads : 1;
    const bool is_query = unit < q_units, is_key = !is_query && unit < q_units + kv_units;
    const Matrix& matrix = is_query ? l.q : (is_key ? l.k : l.v);
    const int local = is_query ? unit : (unit - q_units) % kv_units;
    const int heads = is_head_unit() ? 1 : (is_query ? net_.num_heads : net_.num_kv_heads), first_head = local;
    const int panels = is_head_unit() ? net_.head_dim / kPanel : matrix.num_panels;
    float* base = is_query ? w_.q + static_cast<ptrdiff_t>(first) * w_.q_stride : s.heads;
    const ptrdiff_t stride = is_query ? w_.q_stride : padded(m_.kv_size());
    project(matrix, acts, count, local * panels, (local + 1) * panels, base, stride, false);
    adapt(layer, is_query ? kTargetQ : (is_key ? kTargetK : kTargetV), first, count, local * panels, (local + 1) * panels, base,
          stride, s);
    const float* bias = is_query ? l.q_bias : (is_key ? l.k_bias : l.v_bias);
    const float* norm = is_query ? l.q_norm : (is_key ? l.k_norm : nullptr);
    for (int i = 0; i < count; ++i) {
      float* row = base + i * stride;
      if (bias) add(bias + first_head * net_.head_dim, heads * net_.head_dim, row + first_head * net_.head_dim);
      if (norm && net_.is_qk_norm_joint) normalise_in_place(row, norm, heads * net_.head_dim, s);
      for (int h = first_head; h < first_head + heads; ++h) {
        float* head = row + h * net_.head_dim;
        if (norm && !net_.is_qk_norm_joint) normalise_in_place(head, norm, net_.head_dim, s);
        if (is_query) rotate(l, first + i, head, m_.attention_scale);
        else store(layer, first + i, h, head, is_key);
      }
    }
  }

  static void add(const float* x, int n, float* to) {
    for (int i = 0; i < n; ++i) to[i] += x[i];
  }

  // Kernels work on whole vectors of 32, and what lies behind n values of a row may be the next head's.
  void normalise_in_place(float* x, const float* weight, int n, Scratch& s) {
    std::copy_n(x, n, s.row);
    std::fill(s.row + n, s.row + padded(n), 0.0f);
    k_.rms_norm(s.row, weight, n, padded(n), net_.rms_eps, s.row);
    std::copy_n(s.row, n, x);
  }

  void rotate(const Layer& l, int r, float* head, float scale) {
    const ptrdiff_t at = angles_at(m_.rope_of(l), r);
    k_.rope(head, w_.cos + at, w_.sin + at, m_.half_rope(), net_.head_dim, scale);
  }

  void store(int layer, int r, int head, float* values, bool is_key) {
    const int table = b_.table_start[w_.sequence_of[r]];
    const int slot = b_.index[r] % kBlockTokens;
    uint8_t* block = pool_.block(b_.blocks[table + b_.index[r] / kBlockTokens]);
    if (is_key) {
      rotate(m_.layers[static_cast<size_t>(layer)], r, values, 1.0f);
      kv_.store_key(values, net_.head_dim, block + pool_.key_offset(layer, head), slot);
    } else {
      kv_.store_value(values, net_.head_dim, block + pool_.value_offset(layer, head), slot);
    }
  }

  // Panel p of what goes into down, for rows first .. first + count.
  void gate_up_panel(int layer, int p, const Acts& in, int first, int count, const Acts& ffn, Scratch& s) {
    const Layer& l = m_.layers[static_cast<size_t>(layer)];
    project(l.gate, in, count, p, p + 1, s.gate - p * kPanel, kPanel, false);
    project(l.up, in, count, p, p + 1, s.up - p * kPanel, kPanel, false);
    adapt(layer, kTargetGate, first, count, p, p + 1, s.gate - p * kPanel, kPanel, s);
    adapt(layer, kTargetUp, first, count, p, p + 1, s.up - p * kPanel, kPanel, s);
    activate(p, count, l.down.is_quantised(), ffn, s);
  }

  // Panel p of gate and up -> panel p of what goes into down.
  void activate(int p, int count, bool is_quantised, const Acts& ffn, Scratch& s) {
    m_.gate_mul(s.gate, s.up, count * kPanel, s.gate);
    for (int i = 0; i < count; ++i) {
      const float* y = s.gate + i * kPanel;
      if (is_quantised) k_.quantise(y, 1, ffn.group(k_, i, p), i % k_.tile_rows);
      if (!is_quantised || has_adapters_)
        std::copy_n(y, kPanel, ffn.rows + static_cast<ptrdiff_t>(i) * ffn.stride + p * kPanel);
    }
  }

  // ---- mixture of experts: route each row, run each expert over its rows, sum a row's experts in the router's order ----

  // Whether a row's FFN is computed: in the last layer only those of which something is wanted.
  bool is_routed(int layer, int r) const { return layer + 1 < net_.num_layers || b_.out[r] != 0; }

  void route(int layer, int r, Scratch& s) {
    const Layer& l = m_.layers[static_cast<size_t>(layer)];
    const int count = net_.num_active_experts;
    const float* y = normalise(row_x(r), l.ffn_norm, 2 * layer + 1, 0, false, false, s, s.in);
    for (int p = 0; p < l.router.num_panels; ++p)
      k_.linear_f32(reinterpret_cast<const float*>(l.router.data + static_cast<size_t>(p) * l.router.panel_bytes), l.router.k, y, 0,
                    1, s.scores + p * kPanel, 0, false);
    const float largest = *std::max_element(s.scores, s.scores + net_.num_experts);
    float total = 0.0f, chosen = 0.0f;
    for (int e = 0; e < net_.num_experts; ++e) total += s.scores[e] = std::exp(s.scores[e] - largest);
    for (int i = 0; i < count; ++i) {
      float* best = std::max_element(s.scores, s.scores + net_.num_experts);
      w_.expert[r * count + i] = static_cast<int32_t>(best - s.scores);
      chosen += w_.expert_weight[r * count + i] = *best / total;
      *best = -1.0f;
    }
    for (int i = 0; i < count && net_.is_expert_weight_normalised; ++i) w_.expert_weight[r * count + i] /= chosen;
  }

  // Sort the pairs of all rows by expert, rows ascending. Returns how many experts have any.
  int sort_pairs(int layer) {
    const int count = net_.num_active_experts;
    std::fill_n(w_.expert_start, net_.num_experts + 1, 0);
    for (int r = 0; r < b_.num_rows; ++r)
      for (int i = 0; i < count && is_routed(layer, r); ++i) ++w_.expert_start[w_.expert[r * count + i] + 1];
    int num_busy = 0;
    for (int e = 0; e < net_.num_experts; ++e) {
      if (w_.expert_start[e + 1] > 0) w_.busy_experts[num_busy++] = e;
      w_.expert_start[e + 1] += w_.expert_start[e];
    }
    for (int r = b_.num_rows - 1; r >= 0; --r)
      for (int i = 0; i < count && is_routed(layer, r); ++i) {
        const int32_t place = --w_.expert_start[w_.expert[r * count + i] + 1];
        w_.pair_row[place] = r;
        w_.pair_of[r * count + i] = place;
      }
    // Each start was moved down to its own begin: entry e + 1 now holds where e begins.
    std::copy(w_.expert_start + 1, w_.expert_start + net_.num_experts + 1, w_.expert_start);
    return num_busy;
  }

  void experts(int layer) {
    const int num_busy = sort_pairs(layer), num_pairs = num_pairs_of(layer);
    timed(kGateUp, num_busy, [&](int piece, int thread) {
      const int e = w_.busy_experts[piece];
      const int end = piece + 1 < num_busy ? w_.expert_start[w_.busy_experts[piece + 1]] : num_pairs;
      for (int first = w_.expert_start[e]; first < end; first += kMaxBlockRows)
        run_expert(layer, e, first, std::min(kMaxBlockRows, end - first), scratch(thread));
    });
  }

  int num_pairs_of(int layer) const {
    int rows = 0;
    for (int r = 0; r < b_.num_rows; ++r) rows += static_cast<int>(is_routed(layer, r));
    return rows * net_.num_active_experts;
  }

  // Expert e over sorted pairs first .. first + count.
  void run_expert(int layer, int e, int first, int count, Scratch& s) {
    const Layer& l = m_.layers[static_cast<size_t>(layer)];
    const Matrix gate = l.gate.part(e, net_.num_experts), up = l.up.part(e, net_.num_experts), down = l.down.part(e, net_.num_experts);
    const Acts in = shaped(s.in, net_.hidden_size);
    for (int i = 0; i < count; ++i)
      normalise(row_x(w_.pair_row[first + i]), l.ffn_norm, 2 * layer + 1, i, !gate.is_quantised() || !up.is_quantised(),
                gate.is_quantised() || up.is_quantised(), s, in);
    for (int p = 0; p < gate.num_panels; ++p) {
      project(gate, in, count, p, p + 1, s.gate - p * kPanel, kPanel, false);
      project(up, in, count, p, p + 1, s.up - p * kPanel, kPanel, false);
      activate(p, count, down.is_quantised(), s.ffn, s);
    }
    project(down, s.ffn, count, 0, down.num_panels, w_.expert_out + static_cast<ptrdiff_t>(first) * m_.hidden_padded(),
            m_.hidden_padded(), false);
  }

  void add_experts(int layer, int first, int count) {
    for (int r = first; r < first + count; ++r)
      for (int i = 0; i < net_.num_active_experts && is_routed(layer, r); ++i) {
        const ptrdiff_t at = static_cast<ptrdiff_t>(r) * net_.num_active_experts + i;
        const float* y = w_.expert_out + static_cast<ptrdiff_t>(w_.pair_of[at]) * m_.hidden_padded();
        float* x = row_x(r);
        for (int j = 0; j < net_.hidden_size; ++j) x[j] += w_.expert_weight[at] * y[j];
      }
  }

  // ---- residual sums of rows first .. first + count ----

  // Where attention or FFN put what they give: onto the residual stream, or aside if it is normalised before the sum.
  float* branch(const float* post_norm, int first) {
    return (post_norm ? w_.branch : w_.x) + static_cast<ptrdiff_t>(first) * m_.hidden_padded();
  }

  void add_branch(const float* post_norm, int first, int count, Scratch& s) {
    if (!post_norm) return;
    for (int r = first; r < first + count; ++r) {
      k_.rms_norm(branch(post_norm, r), post_norm, net_.hidden_size, m_.hidden_padded(), net_.rms_eps, s.row);
      add(s.row, net_.hidden_size, row_x(r));
    }
  }

  // The same, rows shared out among the threads.
  void add_branches(Phase phase, const float* post_norm) {
    if (post_norm)
      timed(phase, b_.num_rows, [&](int r, int thread) { add_branch(post_norm, r, 1, scratch(thread)); });
  }

  // ---- attention ----

  void attend(int layer, const AttentionPiece& piece, Scratch& s) {
    const int group = net_.num_heads / net_.num_kv_heads;
    const float* query[kMaxQueries];
    float* out[kMaxQueries];
    int32_t length[kMaxQueries];
    for (int i = 0; i < piece.num_queries; ++i) {
      const int r = b_.row_start[piece.sequence] + (piece.first_query + i) / group;
      const int head = piece.kv_head * group + (piece.first_query + i) % group;
      const ptrdiff_t at = static_cast<ptrdiff_t>(r) * w_.q_stride + head * net_.head_dim;
      const int slot = w_.first_partial[static_cast<ptrdiff_t>(r) * net_.num_heads + head] + piece.first_chunk;
      query[i] = w_.q + at;
      out[i] = piece.is_partial ? partial(slot) : w_.attended + at;
      length[i] = b_.index[r] + 1;
    }
    const AttentionCall call = {query,
                                length,
                                out,
                                piece.num_queries,
                                net_.head_dim,
                                b_.blocks + b_.table_start[piece.sequence],
                                pool_.block(0) + pool_.key_offset(layer, piece.kv_head),
                                pool_.block(0) + pool_.value_offset(layer, piece.kv_head),
                                pool_.block_bytes(),
                                piece.first_chunk,
                                piece.end_chunk,
                                piece.is_partial,
                                s.attention,
                                m_.layers[static_cast<size_t>(layer)].is_sliding ? net_.sliding_window : 0};
    kv_.attention(&call);
  }

  void attention(int layer) {
    const auto& pieces = layer + 1 == net_.num_layers ? w_.last_pieces : w_.pieces;
    if (b_.measured >= 0)
      std::copy_n(w_.q + static_cast<ptrdiff_t>(b_.measured) * w_.q_stride, w_.q_stride,
                  w_.measured + static_cast<ptrdiff_t>(layer) * w_.q_stride);
    timed(kAttention, static_cast<int>(pieces.size()),
          [&](int piece, int thread) { attend(layer, pieces[static_cast<size_t>(piece)], scratch(thread)); });
  }

  Scratch& scratch(int thread) { return w_.scratch[static_cast<size_t>(thread)]; }
  bool is_stopped() const { return w_.is_stop_requested.load(std::memory_order_relaxed); }

  // ---- few rows: threads split outputs ----

  // The thread's input for this job, made on its first piece of it.
  template <class F>
  Acts prepared(Scratch& s, int k, F&& make) {
    if (s.prepared == w_.job) return shaped(s.in, k);
    s.prepared = w_.job;
    return make();
  }

  bool run_few() {
    const int n = b_.num_rows;
    for (int layer = 0; layer < b_.depth; ++layer) {
      if (is_stopped()) return false;
      const Layer& l = m_.layers[static_cast<size_t>(layer)];
      timed(kQkv, num_units(), [&](int unit, int thread) {
        Scratch& s = scratch(thread);
        const Acts in = prepared(s, net_.hidden_size, [&] { return attention_input(layer, 0, n, s); });
        qkv_unit(layer, unit, in, 0, n, s);
      });
      if (layer + 1 == net_.num_layers && !is_any_needed(0, n)) return true;
      attention(layer);
      timed(kOut, l.o.num_panels, [&](int p, int thread) {
        Scratch& s = scratch(thread);
        const Acts in = prepared(s, m_.heads_size(), [&] { return out_input(layer, 0, n, s); });
        float* out = branch(l.post_attn_norm, 0);
        project(l.o, in, n, p, p + 1, out, m_.hidden_padded(), !l.post_attn_norm);
        adapt(layer, kTargetO, 0, n, p, p + 1, out, m_.hidden_padded(), s);
      });
      add_branches(kOut, l.post_attn_norm);
      if (l.has_experts()) {
        timed(kGateUp, n, [&](int r, int thread) { route(layer, r, scratch(thread)); });
        experts(layer);
        timed(kDown, n, [&](int r, int) { add_experts(layer, r, 1); });
        keep(layer + 1, 0, n);
        continue;
      }
      timed(kGateUp, l.gate.num_panels, [&](int p, int thread) {
        Scratch& s = scratch(thread);
        const Acts in = prepared(s, net_.hidden_size, [&] { return ffn_input(layer, 0, n, s); });
        gate_up_panel(layer, p, in, 0, n, w_.ffn, s);
      });
      timed(kDown, l.down.num_panels, [&](int p, int thread) {
        Scratch& s = scratch(thread);
        if (std::exchange(s.prepared, w_.job) != w_.job) adapt_down_input(layer, 0, n, w_.ffn, s);
        float* out = branch(l.post_ffn_norm, 0);
        project(l.down, w_.ffn, n, p, p + 1, out, m_.hidden_padded(), !l.post_ffn_norm);
        adapt(layer, kTargetDown, 0, n, p, p + 1, out, m_.hidden_padded(), s);
      });
      add_branches(kDown, l.post_ffn_norm);
      keep(layer + 1, 0, n);
    }
    return true;
  }

  // ---- many rows: threads split rows ----

  void qkv_rows(int layer, int first, int count, Scratch& s) {
    const Acts in = attention_input(layer, first, count, s);
    for (int unit = 0; unit < num_units(); ++unit) qkv_unit(layer, unit, in, first, count, s);
  }

  void finish_rows(int layer, int first, int count, Scratch& s) {
    if (m_.layers[static_cast<size_t>(layer)].has_experts()) return add_experts(layer, first, count);
    out_rows(layer, first, count, s);
    ffn_rows(layer, first, count, s);
  }

  void out_rows(int layer, int first, int count, Scratch& s) {
    const Layer& l = m_.layers[static_cast<size_t>(layer)];
    float* out = branch(l.post_attn_norm, first);
    project(l.o, out_input(layer, first, count, s), count, 0, l.o.num_panels, out, m_.hidden_padded(), !l.post_attn_norm);
    adapt(layer, kTargetO, first, count, 0, l.o.num_panels, out, m_.hidden_padded(), s);
    add_branch(l.post_attn_norm, first, count, s);
  }

  void ffn_rows(int layer, int first, int count, Scratch& s) {
    const Layer& l = m_.layers[static_cast<size_t>(layer)];
    const Acts in = ffn_input(layer, first, count, s);
    for (int p = 0; p < l.gate.num_panels; ++p) gate_up_panel(layer, p, in, first, count, s.ffn, s);
    adapt_down_input(layer, first, count, s.ffn, s);
    float* out = branch(l.post_ffn_norm, first);
    project(l.down, s.ffn, count, 0, l.down.num_panels, out, m_.hidden_padded(), !l.post_ffn_norm);
    adapt(layer, kTargetDown, first, count, 0, l.down.num_panels, out, m_.hidden_padded(), s);
    add_branch(l.post_ffn_norm, first, count, s);
  }

  bool run_many() {
    const int tiles = (b_.num_rows + k_.tile_rows - 1) / k_.tile_rows, most = kMaxBlockRows / k_.tile_rows;
    const int threads = m_.threads->num_threads();
    const int blocks = std::min(tiles, ((tiles + most - 1) / most + threads - 1) / threads * threads);
    const auto first_row = [&](int block) {
      return std::min(b_.num_rows, static_cast<int>(int64_t{tiles} * block / blocks) * k_.tile_rows);
    };
    for (int layer = 0; layer <= b_.depth; ++layer) {
      if (is_stopped()) return false;
      timed(kLayers, blocks, [&](int block, int thread) {
        const int first = first_row(block), count = first_row(block + 1) - first;
        const bool is_last = layer == b_.depth;
        if (layer > 0 && (!is_last || is_any_needed(first, first + count))) finish_rows(layer - 1, first, count, scratch(thread));
        if (layer > 0) keep(layer, first, first + count);
        if (!is_last) qkv_rows(layer, first, count, scratch(thread));
      });
      if (layer == b_.depth) break;
      attention(layer);
      if (!m_.layers[static_cast<size_t>(layer)].has_experts()) continue;
      timed(kLayers, blocks, [&](int block, int thread) {
        const int first = first_row(block), end = first_row(block + 1);
        out_rows(layer, first, end - first, scratch(thread));
        for (int r = first; r < end; ++r) route(layer, r, scratch(thread));
      });
      experts(layer);
    }
    return true;
  }

  // ---- what is wanted of the rows ----

  void head() {
    const int64_t start = now_ns();
    for (size_t i = 0; i < w_.logits_rows.size(); i += kMaxBlockRows)
      head_block(w_.logits_rows, i, w_.logits + static_cast<ptrdiff_t>(i) * w_.vocab_padded);
    for (size_t i = 0; i < w_.score_rows.size(); i += kMaxBlockRows) {
      head_block(w_.score_rows, i, w_.score_logits);
      score_block(i);
    }
    const int point = 2 * net_.num_layers;
    const bool is_last_kept = w_.kept_layers.back() == net_.num_layers;
    for (size_t i = 0; i < w_.hidden_rows.size() && is_last_kept; ++i) {
      normalise(row_x(w_.hidden_rows[i]), m_.output_norm, point, 0, false, false, scratch(0), w_.head);
      std::copy_n(scratch(0).row, net_.hidden_size, kept(static_cast<ptrdiff_t>(i), std::ssize(w_.kept_layers) - 1));
    }
    w_.phase_ns[kHead] = now_ns() - start;
  }

  // Logits of up to kMaxBlockRows of `rows` from the i-th on -> out (.., Vp), padding minus infinity.
  void head_block(const std::vector<int32_t>& rows, size_t i, float* out) {
    const int count = static_cast<int>(std::min<size_t>(kMaxBlockRows, rows.size() - i));
    const Matrix& head = m_.head;
    timed(kHead, count, [&](int j, int thread) {
      normalise(row_x(rows[i + static_cast<size_t>(j)]), m_.output_norm, 2 * net_.num_layers, j, !head.is_quantised(),
                head.is_quantised(), scratch(thread), w_.head);
    });
    timed(kHead, (head.num_panels + kHeadPanels - 1) / kHeadPanels, [&](int piece, int) {
      const int first = piece * kHeadPanels;
      project(head, w_.head, count, first, std::min(head.num_panels, first + kHeadPanels), out, w_.vocab_padded, false);
    });
    for (int j = 0; j < count; ++j)
      std::fill(out + static_cast<ptrdiff_t>(j) * w_.vocab_padded + net_.vocab_size,
                out + static_cast<ptrdiff_t>(j + 1) * w_.vocab_padded, -INFINITY);
  }

  void score_block(size_t i) {
    const int count = static_cast<int>(std::min<size_t>(kMaxBlockRows, w_.score_rows.size() - i));
    timed(kHead, count, [&](int j, int thread) {
      const size_t n = i + static_cast<size_t>(j);
      const float* logits = w_.score_logits + static_cast<ptrdiff_t>(j) * w_.vocab_padded;
      Scratch& s = scratch(thread);
      const double lse = log_sum_exp(k_, logits, w_.vocab_padded, s);
      if (!std::isfinite(lse)) note_bad(2 * net_.num_layers + 1);
      w_.score_logprob[n] = static_cast<float>(logits[b_.target[w_.score_rows[n]]] - lse);
      most_likely(k_, logits, w_.vocab_padded, w_.num_tops, lse, s, w_.top_ids + n * kMaxTops, w_.top_logprobs + n * kMaxTops);
    });
  }

  // ---- finiteness ----

  void note_bad(int point) {
    int seen = w_.bad_point.load();
    while ((seen < 0 || point < seen) && !w_.bad_point.compare_exchange_weak(seen, point)) {
    }
  }

  std::string describe(int point) const {
    const int layer = point / 2;
    if (point == 0) return "a value is not finite: in the embedding";
    if (point == 2 * net_.num_layers + 1) return "a value is not finite: in the output head";
    return point % 2 == 1 ? text("a value is not finite: after the attention of layer ", layer)
                          : text("a value is not finite: after the FFN of layer ", layer - 1);
  }

  KvPool& pool_;
  Workspace& w_;
  const Model& m_;
  const Network& net_;
  const Kernels& k_;
  const KvKernels& kv_;
  const Batch& b_;
  bool has_adapters_ = false;
};

}  // namespace

bool forward(KvPool& pool, Workspace& workspace, const Batch& batch) {
  check_batch(batch, workspace, pool);
  return Step(pool, workspace, batch).run();
}

}  // namespace hob
