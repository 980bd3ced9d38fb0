// All memory a step needs beside weights and KV, taken once: a step allocates nothing.
//
// Shapes use R = max_rows, H = hidden, Q = heads x head_dim, F = ffn, V = vocab; "p" after a size means padded to 32.
// Large buffers that a device may never use (logits of all R rows, say) are address space only until touched.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "model.h"

namespace hob {

constexpr int kMaxBlockRows = 96;    // most rows a thread takes through a layer at once
constexpr int kHeadRows = 48;        // .. and through the head
constexpr int kMaxTops = 128;        // most likely tokens one may ask for
constexpr int kHeadPanels = 16;      // panels of the head in one piece: 310 KB of 8-bit weights
constexpr int kMaxPartials = 2048;   // attention results of split chunks kept for merging

enum Phase { kEmbed, kQkv, kAttention, kOut, kGateUp, kDown, kLayers, kHead, kNumPhases };
extern const char* const kPhaseNames[kNumPhases];

// Input of a linear layer for up to kMaxBlockRows rows: quantised tiles, and float rows where a float32 matrix needs them.
struct Acts {
  uint8_t* tiles;  // (rows / tile_rows, k / 32) groups of the kernel table
  float* rows;     // (rows, stride)
  int num_groups;  // k / 32
  int stride;      // k padded to 32

  // Where group g of the tile that holds row i begins.
  uint8_t* group(const Kernels& kernels, int i, int g) const {
    return tiles + (static_cast<size_t>(i / kernels.tile_rows) * static_cast<size_t>(num_groups) + static_cast<size_t>(g)) *
                       kernels.group_bytes;
  }
};

// What a thread needs to itself.
struct Scratch {
  // What `compute` of a repeatable job (threads.h) reads beside weights: these, `in` and `adapted`.
  const Model* model;
  int layer, num_rows;
  const Adapter* const* adapters;  // of the rows; null: none has one
  Acts down;                       // one of Workspace::ffn
  std::atomic<int> down_index{-1};  // which; it is not written to meanwhile. -1: none
  Acts in;           // input of QKV, of the output projection, of gate and up: k = max(H, Q)
  Acts own_ffn;      // input of down: k = F
  float* row;        // (max(Hp, Qp))
  float* heads;      // (kMaxBlockRows, max(Qp, KVp)): queries, keys or values before they go where they belong
  float* gate;       // (kMaxBlockRows, 32); and a panel of what out and down give
  float* up;         // (kMaxBlockRows, 32)
  float* head;       // (kHeadRows, kHeadPanels x 32) logits before they go where they belong
  const Adapter** row_adapters;  // (kMaxBlockRows) where `adapters` lie
  float* attention;  // attention_scratch_floats
  float* adapted;    // (kMaxBlockRows, kMaxStacked) A x of the rows' adapters
  float* scores;     // (experts padded to 32) of the router
  float* logits;     // (Vp) penalised copy of a row
  float* weights;    // (Vp) exp of it
  float* maxima;     // (Vp / 32)
  double* sums;      // (Vp / 512 + 1)
  int32_t* ids;      // (Vp)
  int32_t* counts;   // (Vp) zero between uses
};

// One call of the attention kernel: queries first .. first + count of a sequence (row-major over rows x heads of a group).
struct AttentionPiece {
  int sequence, kv_head, first_query, num_queries, first_chunk, end_chunk;
  bool is_partial;
};

class Workspace {
 public:
  Workspace(const Model& model, int max_rows);
  ~Workspace() { model.threads->settle(); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  const Model& model;
  const int max_rows;
  int vocab_padded, q_stride;

  float* x;         // (R, Hp) residual stream
  float* q;         // (R, Qp) rotated, scaled queries
  float* attended;  // (R, Qp)
  float* measured;  // (layers, Qp) queries of the step's measured row
  float* branch;    // (R, Hp) what attention or FFN gave, where it is normalised before the residual sum
  float* cos;       // (ropes, R, rope_dim / 2)
  float* sin;       // (ropes, R, rope_dim / 2)
  int32_t* sequence_of;     // (R)
  const Adapter** adapter_of;  // (R) null: none
  int32_t* first_partial;   // (R, heads) slot in `partials`
  int32_t* num_partials;    // (R, heads) 0: the result is in `attended`
  float* partials;          // (kMaxPartials, kPartialHead + head_dim)
  // Input of down when threads split the outputs: k = F. One more than there are threads, so that one is always free of
  // readers that are late.
  std::vector<Acts> ffn;
  // Mixture of experts: a pair is a row and one of the experts chosen for it. Pairs at work are sorted by expert.
  int32_t* expert;          // (R, active) by falling weight
  float* expert_weight;     // (R, active)
  int32_t* pair_row;        // (R x active) row of each sorted pair
  int32_t* pair_of;         // (R, active) its place among the sorted
  int32_t* expert_start;    // (experts + 1) first sorted pair of each expert
  int32_t* busy_experts;    // (experts) those that have pairs
  float* expert_out;        // (R x active, Hp) what each sorted pair's expert gave
  float* logits;            // (R, Vp)
  float* score_logits;      // (kHeadRows, Vp)
  float* hidden;            // (R, num_kept, H) with up to layers + 1 kept
  float* score_logprob;     // (R)
  int32_t* top_ids;         // (R, kMaxTops)
  float* top_logprobs;      // (R, kMaxTops)
  std::vector<Scratch> scratch;

  // Of the last step, reserved in full at the start.
  std::vector<AttentionPiece> pieces, last_pieces;
  std::vector<int32_t> logits_rows, score_rows, hidden_rows, kept_layers;
  int num_tops = 0;
  int measured_keys = 0;  // keys that the measured row sees. 0: no row was measured
  int64_t phase_ns[kNumPhases] = {};
  std::atomic<int> bad_point{-1};  // earliest point with a value that is not finite
  std::atomic<bool> is_stop_requested{false};

  size_t num_bytes() const { return arena_.size(); }  // of address space: logits are touched as far as they are used

 private:
  void add_acts(Acts* acts, int k, int rows);
  Arena arena_;
};

}  // namespace hob
