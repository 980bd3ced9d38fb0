// How much attention the last step's measured row pays to each block of its context: which blocks tolerate fewer bits.
#pragma once

#include "kv.h"
#include "workspace.h"

namespace hob {

// mass (num_blocks): softmax weight of the keys in each block, mean over all layers and heads; it sums up to 1.
// blocks: the row's block table. Throws std::invalid_argument unless a row was measured and the table holds its keys.
void density(KvPool& pool, const Workspace& workspace, const int32_t* blocks, int num_blocks, float* mass);

}  // namespace hob
