// The KV pool: blocks of 16 tokens, each contiguous over all layers, so a block is one read or write of a disk.
//
//   block = layer 0 | layer 1 | ...        layer = keys of all KV heads | values of all KV heads
//
// What a head has is in kernels.h, by KvType. Keys lie with 16 tokens side by side, so a register holds 16 keys and
// nothing is summed across its lanes.
// Which block is whose is not known here. The layout is the same on every instruction set.
#pragma once

#include <string>

#include "memory.h"
#include "model.h"

namespace hob {

constexpr size_t kDiscardBytes = size_t{2} << 20;  // a huge page: what the system takes and gives at a time

// 'f16' or 'q8'. Throws std::invalid_argument.
KvType kv_type_of(const std::string& name);
// Of a head's keys, or values, in a block.
size_t kv_head_bytes(KvType type, int head_dim);

class KvPool {
 public:
  // Throws std::bad_alloc when the address space cannot be had, std::invalid_argument for a count below 1.
  KvPool(const Model& model, int num_blocks, KvType type);

  const Model& model;
  const KvType type;
  size_t block_bytes() const { return block_bytes_; }
  int num_blocks() const { return num_blocks_; }
  uint8_t* block(int i) { return region_.data() + static_cast<size_t>(i) * block_bytes_; }
  // Bytes from a block's start.
  size_t key_offset(int layer, int head) const;
  size_t value_offset(int layer, int head) const;
  // Throws std::invalid_argument when i is not a block.
  void check(int i) const;
  void copy(int source, int destination, int num_tokens);
  // Gives the memory of a stretch back; what lies there is zero when it is next touched. Throws std::invalid_argument
  // unless it is made of whole kDiscardBytes.
  void discard(size_t offset, size_t bytes);

 private:
  void copy_codes(const uint8_t* source, uint8_t* destination, size_t num_tokens, bool is_key) const;
  int num_blocks_, num_layers_, num_heads_, head_dim_;
  size_t head_bytes_, block_bytes_;
  Region region_;
};

}  // namespace hob
