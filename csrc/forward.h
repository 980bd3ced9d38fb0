// One step: a forward pass over named rows, which writes only the KV slots it names (engine/base.py has the contract).
#pragma once

#include "kv.h"
#include "model.h"
#include "workspace.h"

namespace hob {

enum class Out : uint8_t { kNone = 0, kLogits = 1, kScore = 2, kHidden = 3 };

// R rows of S sequences; the arrays belong to the caller.
struct Batch {
  int num_rows, num_sequences, num_blocks;
  const int32_t* token;        // (R)
  const int32_t* position;     // (R)
  const int32_t* index;        // (R)
  const uint8_t* out;          // (R) values of Out
  const int32_t* target;       // (R)
  const int32_t* row_start;    // (S + 1)
  const int32_t* table_start;  // (S + 1)
  const int32_t* blocks;       // (num_blocks)
  const int32_t* adapter;      // (S)
  int num_tops;
  const int32_t* layers;       // (num_kept) after which layers HIDDEN rows are kept, ascending; num_layers: the final norm
  int num_kept;
  int depth;                   // layers to compute; fewer than all: the rows owe kept states only
  int measured = -1;           // LOGITS row whose queries are kept for `density`. -1: none
};

// False: stopped between two layers. Throws std::invalid_argument for a batch that does not fit (before anything is
// written) and std::runtime_error naming the layer when a value is not finite.
bool forward(KvPool& pool, Workspace& workspace, const Batch& batch);

}  // namespace hob
