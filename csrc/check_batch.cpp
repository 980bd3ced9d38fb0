// Everything a batch must satisfy before a step trusts it with pointers.
#include "check_batch.h"

#include "text.h"

namespace hob {
namespace {

void check_starts(const char* name, const int32_t* starts, int num_sequences, int last, bool must_reach) {
  if (starts[0] != 0) refuse(name, "[0] is ", starts[0], ", expected 0");
  for (int s = 0; s < num_sequences; ++s)
    if (starts[s + 1] < starts[s]) refuse(name, "[", s + 1, "] is ", starts[s + 1], ", less than the ", starts[s], " before it");
  const int end = starts[num_sequences];
  if (end > last || (must_reach && end != last)) refuse(name, " ends at ", end, ", expected ", must_reach ? "" : "at most ", last);
}

void check_row(const Batch& b, const Network& net, int r, int table_length) {
  if (b.token[r] < 0 || b.token[r] >= net.vocab_size)
    refuse("row ", r, ": token ", b.token[r], " is not in the vocabulary of ", net.vocab_size);
  if (b.position[r] < 0) refuse("row ", r, ": position is ", b.position[r], ", expected 0 or more");
  if (b.index[r] < 0 || b.index[r] / kBlockTokens >= table_length)
    refuse("row ", r, ": index ", b.index[r], " is outside its block table of ", table_length, " blocks (",
           int64_t{table_length} * kBlockTokens, " slots)");
  if (b.out[r] > static_cast<uint8_t>(Out::kHidden)) refuse("row ", r, ": out is ", int{b.out[r]}, ", expected 0..3");
  if (b.out[r] == static_cast<uint8_t>(Out::kScore) && (b.target[r] < 0 || b.target[r] >= net.vocab_size))
    refuse("row ", r, ": target ", b.target[r], " is not in the vocabulary of ", net.vocab_size);
}

}  // namespace

void check_batch(const Batch& b, const Workspace& w, const KvPool& pool) {
  if (b.num_rows < 1 || b.num_rows > w.max_rows) refuse("batch has ", b.num_rows, " rows, expected 1..", w.max_rows);
  if (b.num_tops < 0 || b.num_tops > kMaxTops) refuse("num_tops is ", b.num_tops, ", expected 0..", kMaxTops);
  for (int i = 0; i < b.num_kept; ++i)
    if (b.layers[i] <= (i > 0 ? b.layers[i - 1] : -1) || b.layers[i] > w.model.network.num_layers)
      refuse("layers[", i, "] is ", b.layers[i], ", expected ascending numbers of 0..", w.model.network.num_layers);
  if (b.depth < 1 || b.depth > w.model.network.num_layers)
    refuse("depth is ", b.depth, ", expected 1..", w.model.network.num_layers);
  const bool is_all = b.depth == w.model.network.num_layers;
  if (!is_all && (b.num_kept == 0 || b.layers[b.num_kept - 1] > b.depth))
    refuse("layers are wanted that depth ", b.depth, " does not reach");
  for (int r = 0; r < b.num_rows && !is_all; ++r)
    if (b.out[r] != static_cast<uint8_t>(Out::kNone) && b.out[r] != static_cast<uint8_t>(Out::kHidden))
      refuse("row ", r, ": out is ", int{b.out[r]}, ", but depth ", b.depth, " gives hidden states only");
  if (b.measured < -1 || b.measured >= b.num_rows ||
      (b.measured >= 0 && b.out[b.measured] != static_cast<uint8_t>(Out::kLogits)))
    refuse("measured is ", b.measured, ", expected -1 or a row that owes logits");
  check_starts("row_start", b.row_start, b.num_sequences, b.num_rows, true);
  check_starts("table_start", b.table_start, b.num_sequences, b.num_blocks, false);
  for (int s = 0; s < b.num_sequences; ++s) {
    if (b.adapter[s] != 0 && !w.model.adapter(b.adapter[s])) refuse("sequence ", s, ": adapter ", b.adapter[s], " is not loaded");
    const int first = b.table_start[s], length = b.table_start[s + 1] - first;
    int last = -1;
    for (int r = b.row_start[s]; r < b.row_start[s + 1]; last = b.index[r++]) {
      check_row(b, w.model.network, r, length);
      if (b.index[r] <= last) refuse("row ", r, ": index ", b.index[r], " does not ascend from the ", last, " before it");
    }
    for (int i = 0; last >= 0 && i <= last / kBlockTokens; ++i) pool.check(b.blocks[first + i]);
  }
}

}  // namespace hob
