// The forward pass of decoder-only transformers: RMSNorm, RoPE, grouped-query attention, gated FFN. A family is what its
// Layer has beside the matrices (model.h): biases, norms of Q and K, norms before the residual sums, a sliding window.
//
// The same building blocks run under two schedules:
//
//   few rows   threads split the outputs of each matrix, so each weight is read once, by one core, at DRAM speed:
//              qkv | attention | out | gate_up | down, five joins a layer. Cheap preparation (norm, quantise) is
//              repeated by each thread rather than waited for, which also makes the pieces repeatable (threads.h): a
//              core that is taken away in the middle of one does not hold up the step.
//   many rows  threads split the rows: a block of rows goes through the whole layer while its activations stay in
//              cache, and the weights come from the last-level cache: out..down..next qkv | attention, two joins.
//
// A row's float operations are the same under both (kernels.h), so the choice is invisible in the results.
// A step is a chain of jobs (threads.h), written as coroutines (flow.h): they run on whichever thread finished a job, so
// what they use of Scratch is that thread's.
#include "forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "check_batch.h"
#include "flow.h"
#include "linear.h"
#include "pack.h"
#include "sample.h"
#include "text.h"

namespace hob {
namespace {

constexpr int kFewRows = 32;       // up to here threads split outputs: ahead below 20 rows, level at 24 to 30 (2 cores)
static_assert(kFewRows <= kHeadRows && kHeadRows <= kMaxBlockRows);

class Step : private Chain {
 public:
  Step(KvPool& pool, Workspace& workspace, const Batch& batch)
      : pool_(pool), w_(workspace), m_(workspace.model), net_(m_.network), k_(*m_.kernels), kv_(k_.kv[static_cast<int>(pool.type)]), b_(batch) {}

  bool run() {
    prepare();
    flows_.reserve(3);
    flows_.push_back(embed());
    flows_.push_back(b_.num_rows <= kFewRows ? run_few() : run_many());
    flows_.push_back(head());
    m_.threads->run(*this);
    if (const int point = w_.bad_point.load(); point >= 0) throw std::runtime_error(describe(point));
    return !is_abandoned_;
  }

 private:
  // ---- the chain ----

  Job next(int thread) override {
    const int64_t now = now_ns();
    if (job_.num_pieces > 0) w_.phase_ns[phase_] += now - job_.start_ns;
    thread_ = thread;
    job_ = {};
    while (flow_ < flows_.size() && job_.num_pieces == 0 && !is_abandoned_) {
      flows_[flow_].go_on();
      if (flows_[flow_].is_over()) ++flow_;
    }
    job_.start_ns = now;
    return job_;
  }

  std::suspend_always post(Phase phase, const Job& job) {
    phase_ = phase;
    job_ = job;
    return {};
  }

  // A job whose pieces are run once: work(piece, thread), which lives in the frame of the flow that waits.
  template <class F>
  std::suspend_always post(Phase phase, int num_pieces, F& work) {
    return post(phase, {num_pieces, &work, [](void* context, int piece, int thread) { (*static_cast<F*>(context))(piece, thread); }});
  }

  // A repeatable one: prepare(scratch), compute(scratch, piece), commit(piece, scratch).
  template <class P, class C>
  struct Parts {
    Step& step;
    P prepare;
    C commit;
  };
  template <class P, class C>
  Parts<P, C> parts(P prepare, C commit) {
    return {*this, prepare, commit};
  }

  template <class P, class C>
  std::suspend_always post(Phase phase, int num_pieces, Parts<P, C>& parts, void (*compute)(void*, int)) {
    const auto commit = [](void* context, int piece, int thread) {
      auto& p = *static_cast<Parts<P, C>*>(context);
      p.commit(piece, p.step.scratch(thread));
    };
    const auto prepare = [](void* context, int thread) -> void* {
      auto& p = *static_cast<Parts<P, C>*>(context);
      Scratch& s = p.step.scratch(thread);
      p.prepare(s);
      return &s;
    };
    return post(phase, {num_pieces, &parts, commit, prepare, compute});
  }

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

  // ---- rows in ----

  Flow embed() {
    const int step = 16, stride = m_.hidden_padded();
    auto work = [&](int piece, int) {
      for (int r = piece * step; r < std::min(b_.num_rows, (piece + 1) * step); ++r) {
        float* x = w_.x + static_cast<ptrdiff_t>(r) * stride;
        unpack_row(m_.embedding.kind, m_.embedding.data, net_.hidden_size, b_.token[r], stride, x);
        if (net_.embedding_scale != 1.0f)
          for (int i = 0; i < net_.hidden_size; ++i) x[i] *= net_.embedding_scale;
        for (size_t rope = 0; rope < m_.rope_frequencies.size(); ++rope) turn(rope, r);
      }
    };
    co_await post(kEmbed, (b_.num_rows + step - 1) / step, work);
    keep(0, 0, b_.num_rows);
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

  Acts attention_input(int layer, int first, int count, Scratch& s) {
    const Layer& l = m_.layers[static_cast<size_t>(layer)];
    const Acts acts = shaped(s.in, net_.hidden_size);
    const bool is_quantised = l.q.is_quantised() || l.k.is_quantised() || l.v.is_quantised();
    const bool is_float = !l.q.is_quantised() || !l.k.is_quantised() || !l.v.is_quantised();
    for (int i = 0; i < count; ++i) {
      const float* y = normalise(row_x(first + i), l.attn_norm, 2 * layer, i, is_float, is_quantised, s, acts);
      linear_.adapt_input(layer, kInputQkv, adapter(first + i), i, y, net_.hidden_size, s);
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
      linear_.adapt_input(layer, kInputGateUp, adapter(first + i), i, y, net_.hidden_size, s);
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
      linear_.adapt_input(layer, kInputO, adapter(first + i), i, row, m_.heads_size(), s);
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

  const Adapter* adapter(int r) const { return w_.adapter_of[r]; }
  // Of rows from `first` on; null: none has one.
  const Adapter* const* adapters(int first) const { return has_adapters_ ? w_.adapter_of + first : nullptr; }

  // The input of down, which is there in full only when all panels of gate and up are done.
  void adapt_down_input(int layer, int first, int count, const Acts& ffn, Scratch& s) {
    for (int i = 0; i < count && has_adapters_; ++i)
      linear_.adapt_input(layer, kInputDown, adapter(first + i), i, ffn.rows + static_cast<ptrdiff_t>(i) * ffn.stride, m_.ffn_size(), s);
  }

  void qkv_unit(int layer, int i, const Acts& in, int first, int count, Scratch& s) {
    const Unit unit = linear_.unit(layer, i);
    float* out = unit.target == kTargetQ ? w_.q + static_cast<ptrdiff_t>(first) * w_.q_stride : s.heads;
    linear_.qkv(layer, unit, in, adapters(first), count, out, linear_.stride(unit), s);
    finish_unit(layer, unit, first, count, out, s);
  }

  // Bias, norm and rotation of a unit's heads, in place; keys and values go to the pool.
  void finish_unit(int layer, const Unit& unit, int first, int count, float* values, Scratch& s) {
    const Layer& l = m_.layers[static_cast<size_t>(layer)];
    const bool is_query = unit.target == kTargetQ, is_key = unit.target == kTargetK;
    const float* bias = is_query ? l.q_bias : (is_key ? l.k_bias : l.v_bias);
    const float* norm = is_query ? l.q_norm : (is_key ? l.k_norm : nullptr);
    const int at = unit.first_head * net_.head_dim, size = unit.num_heads * net_.head_dim;
    for (int i = 0; i < count; ++i) {
      float* row = values + i * linear_.stride(unit);
      if (bias) add(bias + at, size, row + at);
      if (norm && net_.is_qk_norm_joint) normalise_in_place(row, norm, size, s);
      for (int h = unit.first_head; h < unit.first_head + unit.num_heads; ++h) {
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

  // Panel p of what goes into down, from s.gate.
  void put_ffn(int p, int count, bool is_quantised, const Acts& ffn, const Scratch& s) {
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

  // The rows of one expert.
  void run_busy_expert(int layer, int piece, int num_busy, Scratch& s) {
    const int e = w_.busy_experts[piece];
    const int end = piece + 1 < num_busy ? w_.expert_start[w_.busy_experts[piece + 1]] : num_pairs_of(layer);
    for (int first = w_.expert_start[e]; first < end; first += kMaxBlockRows)
      run_expert(layer, e, first, std::min(kMaxBlockRows, end - first), s);
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
      linear_.project(gate, in, count, p, p + 1, s.gate - p * kPanel, kPanel, false);
      linear_.project(up, in, count, p, p + 1, s.up - p * kPanel, kPanel, false);
      m_.gate_mul(s.gate, s.up, count * kPanel, s.gate);
      put_ffn(p, count, down.is_quantised(), s.own_ffn, s);
    }
    linear_.project(down, s.own_ffn, count, 0, down.num_panels, w_.expert_out + static_cast<ptrdiff_t>(first) * m_.hidden_padded(),
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

  // Panel p of what attention or FFN gave, for all of a few rows, from compute_panel.
  void put_branch(const float* post_norm, int p, const Scratch& s) {
    for (int i = 0; i < b_.num_rows; ++i) {
      float* to = branch(post_norm, i) + p * kPanel;
      if (post_norm) std::copy_n(s.gate + i * kPanel, kPanel, to);
      else add(s.gate + i * kPanel, kPanel, to);
      if (s.adapters && s.adapters[i]) add(s.up + i * kPanel, kPanel, to);
    }
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

  // In the last layer only those of which something is wanted. The queries of the row that is measured are kept here.
  const std::vector<AttentionPiece>& attention_pieces(int layer) {
    if (b_.measured >= 0)
      std::copy_n(w_.q + static_cast<ptrdiff_t>(b_.measured) * w_.q_stride, w_.q_stride,
                  w_.measured + static_cast<ptrdiff_t>(layer) * w_.q_stride);
    return layer + 1 == net_.num_layers ? w_.last_pieces : w_.pieces;
  }

  Scratch& scratch(int thread) { return w_.scratch[static_cast<size_t>(thread)]; }
  // Asked between layers; the chain then ends.
  bool is_stopped() { return is_abandoned_ = w_.is_stop_requested.load(std::memory_order_relaxed); }

  // ---- few rows: threads split outputs ----

  // What compute_... of this layer reads beside its input. Few rows: all of the step, or of a block of the head.
  void take_along(int layer, int count, Scratch& s) {
    s.model = &m_;
    s.layer = layer;
    s.num_rows = count;
    s.adapters = has_adapters_ ? s.row_adapters : nullptr;
    if (has_adapters_) std::copy_n(w_.adapter_of, std::min(count, b_.num_rows), s.row_adapters);
    s.down_index.store(-1, std::memory_order_release);
  }

  // One of the inputs of down that no late thread reads.
  int free_ffn() const {
    for (int i = 0;; ++i)
      if (std::none_of(w_.scratch.begin(), w_.scratch.end(), [&](const Scratch& s) { return s.down_index.load(std::memory_order_acquire) == i; }))
        return i;
  }

  Flow run_few() {
    const int n = b_.num_rows;
    for (int layer = 0; layer < b_.depth; ++layer) {
      if (is_stopped()) co_return;
      const Layer& l = m_.layers[static_cast<size_t>(layer)];
      auto qkv = parts([&](Scratch& s) {
                  take_along(layer, n, s);
                  attention_input(layer, 0, n, s);
                },
                [&](int i, Scratch& s) {
                  const Unit unit = linear_.unit(layer, i);
                  finish_unit(layer, unit, 0, n, s.heads, s);
                  if (unit.target == kTargetQ) put_queries(unit, n, s);
                });
      co_await post(kQkv, linear_.num_units(), qkv, compute_qkv);
      if (layer + 1 == net_.num_layers && !is_any_needed(0, n)) co_return;
      const auto& pieces = attention_pieces(layer);
      auto attend_piece = [&](int piece, int thread) { attend(layer, pieces[static_cast<size_t>(piece)], scratch(thread)); };
      co_await post(kAttention, static_cast<int>(pieces.size()), attend_piece);
      auto out = parts([&](Scratch& s) {
                  take_along(layer, n, s);
                  out_input(layer, 0, n, s);
                },
                [&](int p, Scratch& s) { put_branch(l.post_attn_norm, p, s); });
      co_await post(kOut, l.o.num_panels, out, compute_out);
      auto add_attention = [&](int r, int thread) { add_branch(l.post_attn_norm, r, 1, scratch(thread)); };
      co_await post(kOut, l.post_attn_norm ? n : 0, add_attention);
      if (l.has_experts()) {
        auto route_row = [&](int r, int thread) { route(layer, r, scratch(thread)); };
        co_await post(kGateUp, n, route_row);
        const int num_busy = sort_pairs(layer);
        auto expert = [&](int piece, int thread) { run_busy_expert(layer, piece, num_busy, scratch(thread)); };
        co_await post(kGateUp, num_busy, expert);
        auto add_row = [&](int r, int) { add_experts(layer, r, 1); };
        co_await post(kDown, n, add_row);
        keep(layer + 1, 0, n);
        continue;
      }
      const int index = free_ffn();
      const Acts& ffn = w_.ffn[static_cast<size_t>(index)];
      auto gate_up = parts([&](Scratch& s) {
                      take_along(layer, n, s);
                      ffn_input(layer, 0, n, s);
                    },
                    [&](int p, Scratch& s) { put_ffn(p, n, l.down.is_quantised(), ffn, s); });
      co_await post(kGateUp, l.gate.num_panels, gate_up, compute_gate_up);
      auto down = parts([&](Scratch& s) {
                   take_along(layer, n, s);
                   s.down = ffn;
                   s.down_index.store(index, std::memory_order_relaxed);
                   adapt_down_input(layer, 0, n, ffn, s);
                 },
                 [&](int p, Scratch& s) { put_branch(l.post_ffn_norm, p, s); });
      co_await post(kDown, l.down.num_panels, down, compute_down);
      auto add_ffn = [&](int r, int thread) { add_branch(l.post_ffn_norm, r, 1, scratch(thread)); };
      co_await post(kDown, l.post_ffn_norm ? n : 0, add_ffn);
      keep(layer + 1, 0, n);
    }
  }

  void put_queries(const Unit& unit, int count, const Scratch& s) {
    const int at = unit.first_head * net_.head_dim, size = unit.num_heads * net_.head_dim;
    for (int i = 0; i < count; ++i) std::copy_n(s.heads + i * w_.q_stride + at, size, w_.q + static_cast<ptrdiff_t>(i) * w_.q_stride + at);
  }

  // ---- many rows: threads split rows ----

  void qkv_rows(int layer, int first, int count, Scratch& s) {
    const Acts in = attention_input(layer, first, count, s);
    for (int unit = 0; unit < linear_.num_units(); ++unit) qkv_unit(layer, unit, in, first, count, s);
  }

  void finish_rows(int layer, int first, int count, Scratch& s) {
    if (m_.layers[static_cast<size_t>(layer)].has_experts()) return add_experts(layer, first, count);
    out_rows(layer, first, count, s);
    ffn_rows(layer, first, count, s);
  }

  void out_rows(int layer, int first, int count, Scratch& s) {
    const Layer& l = m_.layers[static_cast<size_t>(layer)];
    float* out = branch(l.post_attn_norm, first);
    linear_.project(l.o, out_input(layer, first, count, s), count, 0, l.o.num_panels, out, m_.hidden_padded(), !l.post_attn_norm);
    linear_.adapt(layer, kTargetO, adapters(first), count, 0, l.o.num_panels, out, m_.hidden_padded(), s);
    add_branch(l.post_attn_norm, first, count, s);
  }

  void ffn_rows(int layer, int first, int count, Scratch& s) {
    const Layer& l = m_.layers[static_cast<size_t>(layer)];
    const Acts in = ffn_input(layer, first, count, s);
    for (int p = 0; p < l.gate.num_panels; ++p) {
      linear_.gate_up(layer, p, in, adapters(first), count, s);
      put_ffn(p, count, l.down.is_quantised(), s.own_ffn, s);
    }
    adapt_down_input(layer, first, count, s.own_ffn, s);
    float* out = branch(l.post_ffn_norm, first);
    linear_.project(l.down, s.own_ffn, count, 0, l.down.num_panels, out, m_.hidden_padded(), !l.post_ffn_norm);
    linear_.adapt(layer, kTargetDown, adapters(first), count, 0, l.down.num_panels, out, m_.hidden_padded(), s);
    add_branch(l.post_ffn_norm, first, count, s);
  }

  Flow run_many() {
    const int tiles = (b_.num_rows + k_.tile_rows - 1) / k_.tile_rows, most = kMaxBlockRows / k_.tile_rows;
    const int threads = m_.threads->num_threads();
    const int blocks = std::min(tiles, ((tiles + most - 1) / most + threads - 1) / threads * threads);
    const auto first_row = [&](int block) {
      return std::min(b_.num_rows, static_cast<int>(int64_t{tiles} * block / blocks) * k_.tile_rows);
    };
    for (int layer = 0; layer <= b_.depth; ++layer) {
      if (is_stopped()) co_return;
      auto rows = [&](int block, int thread) {
        const int first = first_row(block), count = first_row(block + 1) - first;
        const bool is_last = layer == b_.depth;
        if (layer > 0 && (!is_last || is_any_needed(first, first + count))) finish_rows(layer - 1, first, count, scratch(thread));
        if (layer > 0) keep(layer, first, first + count);
        if (!is_last) qkv_rows(layer, first, count, scratch(thread));
      };
      co_await post(kLayers, blocks, rows);
      if (layer == b_.depth) break;
      const auto& pieces = attention_pieces(layer);
      auto attend_piece = [&](int piece, int thread) { attend(layer, pieces[static_cast<size_t>(piece)], scratch(thread)); };
      co_await post(kAttention, static_cast<int>(pieces.size()), attend_piece);
      if (!m_.layers[static_cast<size_t>(layer)].has_experts()) continue;
      auto route_rows = [&](int block, int thread) {
        const int first = first_row(block), end = first_row(block + 1);
        out_rows(layer, first, end - first, scratch(thread));
        for (int r = first; r < end; ++r) route(layer, r, scratch(thread));
      };
      co_await post(kLayers, blocks, route_rows);
      const int num_busy = sort_pairs(layer);
      auto expert = [&](int piece, int thread) { run_busy_expert(layer, piece, num_busy, scratch(thread)); };
      co_await post(kGateUp, num_busy, expert);
    }
  }

  // ---- what is wanted of the rows ----

  Flow head() {
    const std::vector<int32_t>* lists[] = {&w_.logits_rows, &w_.score_rows};
    for (const auto* rows : lists) {
      const bool is_score = rows == &w_.score_rows;
      for (size_t i = 0; i < rows->size(); i += kHeadRows) {
        const int count = static_cast<int>(std::min<size_t>(kHeadRows, rows->size() - i));
        float* out = is_score ? w_.score_logits : w_.logits + static_cast<ptrdiff_t>(i) * w_.vocab_padded;
        auto logits = parts([&](Scratch& s) { head_input(rows->data() + i, count, s); },
                     [&](int piece, Scratch& s) { put_logits(piece, count, out, s); });
        co_await post(kHead, (m_.head.num_panels + kHeadPanels - 1) / kHeadPanels, logits, compute_head);
        auto score_row = [&](int j, int thread) { score(i, j, scratch(thread)); };
        co_await post(kHead, is_score ? count : 0, score_row);
      }
    }
    const bool is_last_kept = w_.kept_layers.back() == net_.num_layers;
    for (size_t i = 0; i < w_.hidden_rows.size() && is_last_kept; ++i) {
      Scratch& s = scratch(thread_);
      normalise(row_x(w_.hidden_rows[i]), m_.output_norm, 2 * net_.num_layers, 0, false, false, s, s.in);
      std::copy_n(s.row, net_.hidden_size, kept(static_cast<ptrdiff_t>(i), std::ssize(w_.kept_layers) - 1));
    }
  }

  void head_input(const int32_t* rows, int count, Scratch& s) {
    take_along(net_.num_layers, count, s);
    const Acts in = shaped(s.in, net_.hidden_size);
    const bool is_quantised = m_.head.is_quantised();
    for (int j = 0; j < count; ++j)
      normalise(row_x(rows[j]), m_.output_norm, 2 * net_.num_layers, j, !is_quantised, is_quantised, s, in);
  }

  // What compute_head gave -> out (count, Vp), padding minus infinity.
  void put_logits(int piece, int count, float* out, const Scratch& s) {
    const int first = piece * kHeadPanels * kPanel, end = std::min(w_.vocab_padded, first + kHeadPanels * kPanel);
    const int used = std::min(end, net_.vocab_size) - first;
    for (int j = 0; j < count; ++j) {
      float* row = out + static_cast<ptrdiff_t>(j) * w_.vocab_padded;
      std::copy_n(s.head + j * kHeadPanels * kPanel, used, row + first);
      std::fill(row + first + used, row + end, -INFINITY);
    }
  }

  // The j-th of a block of score rows that begins with the i-th.
  void score(size_t i, int j, Scratch& s) {
    const size_t n = i + static_cast<size_t>(j);
    const float* logits = w_.score_logits + static_cast<ptrdiff_t>(j) * w_.vocab_padded;
    const double lse = log_sum_exp(k_, logits, w_.vocab_padded, s);
    if (!std::isfinite(lse)) note_bad(2 * net_.num_layers + 1);
    w_.score_logprob[n] = static_cast<float>(logits[b_.target[w_.score_rows[n]]] - lse);
    most_likely(k_, logits, w_.vocab_padded, w_.num_tops, lse, s, w_.top_ids + n * kMaxTops, w_.top_logprobs + n * kMaxTops);
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
  const Linear linear_{m_};
  bool has_adapters_ = false;
  std::vector<Flow> flows_;  // one after the other
  size_t flow_ = 0;
  Job job_;          // the last one posted
  Phase phase_ = kEmbed;
  int thread_ = 0;   // the one at work between two jobs
  bool is_abandoned_ = false;
};

}  // namespace

bool forward(KvPool& pool, Workspace& workspace, const Batch& batch) {
  check_batch(batch, workspace, pool);
  return Step(pool, workspace, batch).run();
}

}  // namespace hob
