// The buffers of workspace.h.
#include "workspace.h"

#include <algorithm>

#include "text.h"

namespace hob {

const char* const kPhaseNames[kNumPhases] = {"embed", "qkv", "attention", "out", "gate_up", "down", "layers", "head"};

void Workspace::add_acts(Acts* acts, int k, int rows) {
  acts->num_groups = padded(k) / kGroup;
  acts->stride = padded(k);
  const Kernels& kernels = *model.kernels;
  const auto tiles = static_cast<size_t>((rows + kernels.tile_rows - 1) / kernels.tile_rows);
  arena_.add(&acts->tiles, tiles * static_cast<size_t>(acts->num_groups) * kernels.group_bytes);
  arena_.add(&acts->rows, static_cast<size_t>(rows) * static_cast<size_t>(acts->stride));
}

Workspace::Workspace(const Model& model_, int max_rows_)
    : model(model_), max_rows(max_rows_), scratch(static_cast<size_t>(model_.threads->num_threads())) {
  if (max_rows < 1 || max_rows > (1 << 20)) refuse("max_rows is ", max_rows, ", expected 1..", 1 << 20);
  const Network& net = model.network;
  const auto rows = static_cast<size_t>(max_rows), heads = static_cast<size_t>(net.num_heads);
  const int widest = std::max(net.hidden_size, model.heads_size());
  vocab_padded = padded(net.vocab_size);
  q_stride = padded(model.heads_size());
  const auto vocab = static_cast<size_t>(vocab_padded);

  arena_.add(&x, rows * static_cast<size_t>(model.hidden_padded()));
  arena_.add(&q, rows * static_cast<size_t>(q_stride));
  arena_.add(&attended, rows * static_cast<size_t>(q_stride));
  arena_.add(&measured, static_cast<size_t>(net.num_layers) * static_cast<size_t>(q_stride));
  arena_.add(&branch, net.has_post_norms ? rows * static_cast<size_t>(model.hidden_padded()) : 0);
  const size_t angles = rows * model.rope_frequencies.size() * static_cast<size_t>(model.half_rope());
  arena_.add(&cos, angles);
  arena_.add(&sin, angles);
  arena_.add(&sequence_of, rows);
  arena_.add(&adapter_of, rows);
  arena_.add(&first_partial, rows * heads);
  arena_.add(&num_partials, rows * heads);
  arena_.add(&partials, static_cast<size_t>(kMaxPartials) * static_cast<size_t>(kPartialHead + net.head_dim));
  ffn.resize(static_cast<size_t>(model.threads->num_threads()) + 1);
  for (Acts& acts : ffn) add_acts(&acts, model.ffn_size(), kHeadRows);
  arena_.add(&score_logits, kHeadRows * vocab);
  arena_.add(&hidden, rows * static_cast<size_t>(net.num_layers + 1) * static_cast<size_t>(net.hidden_size));
  arena_.add(&score_logprob, rows);
  arena_.add(&top_ids, rows * kMaxTops);
  arena_.add(&top_logprobs, rows * kMaxTops);
  for (Scratch& s : scratch) {
    add_acts(&s.in, widest, kMaxBlockRows);
    add_acts(&s.own_ffn, model.ffn_size(), kMaxBlockRows);
    arena_.add(&s.scores, static_cast<size_t>(padded(net.num_experts)));
    arena_.add(&s.row, static_cast<size_t>(padded(widest)));
    arena_.add(&s.heads, static_cast<size_t>(kMaxBlockRows) * static_cast<size_t>(padded(std::max(model.heads_size(), model.kv_size()))));
    arena_.add(&s.gate, kMaxBlockRows * kPanel);
    arena_.add(&s.up, kMaxBlockRows * kPanel);
    arena_.add(&s.head, kHeadRows * kHeadPanels * kPanel);
    arena_.add(&s.row_adapters, kMaxBlockRows);
    arena_.add(&s.attention, attention_scratch_floats(net.head_dim));
    arena_.add(&s.adapted, static_cast<size_t>(kMaxBlockRows) * kMaxStacked);
    arena_.add(&s.logits, vocab);
    arena_.add(&s.weights, vocab);
    arena_.add(&s.maxima, vocab / 32);
    arena_.add(&s.sums, vocab / 512 + 1);
    arena_.add(&s.ids, vocab);
    arena_.add(&s.counts, vocab);
  }
  const size_t pairs = rows * static_cast<size_t>(net.num_active_experts), experts = static_cast<size_t>(net.num_experts);
  arena_.add(&expert, pairs);
  arena_.add(&expert_weight, pairs);
  arena_.add(&pair_row, pairs);
  arena_.add(&pair_of, pairs);
  arena_.add(&expert_start, experts + 1);
  arena_.add(&busy_experts, experts);
  arena_.add(&expert_out, pairs * static_cast<size_t>(model.hidden_padded()));
  arena_.add(&logits, rows * vocab);
  arena_.commit(false);

  const auto group = heads / static_cast<size_t>(net.num_kv_heads);
  const size_t most_pieces = (rows * group / kMaxQueries + rows + 1) * static_cast<size_t>(net.num_kv_heads) + kMaxPartials;
  pieces.reserve(most_pieces);
  last_pieces.reserve(most_pieces);
  logits_rows.reserve(rows);
  score_rows.reserve(rows);
  hidden_rows.reserve(rows);
  kept_layers.reserve(static_cast<size_t>(net.num_layers) + 1);
}

}  // namespace hob
