// The check of a batch, apart from the pass that relies on it.
#pragma once

#include "forward.h"

namespace hob {

// Throws std::invalid_argument naming the row or sequence, the value and what was expected.
void check_batch(const Batch& batch, const Workspace& workspace, const KvPool& pool);

}  // namespace hob
