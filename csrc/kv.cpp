// The pool of kv.h.
#include "kv.h"

#include <algorithm>
#include <cstring>

#include "text.h"

namespace hob {

KvType kv_type_of(const std::string& name) {
  if (name == "f16") return KvType::kF16;
  if (name == "q8") return KvType::kQ8;
  refuse("kv_type is '", name, "', expected 'f16' or 'q8'");
}

size_t kv_head_bytes(KvType type, int head_dim) {
  return type == KvType::kF16 ? static_cast<size_t>(head_dim) * kBlockTokens * 2 : code_bytes(head_dim) + kBlockTokens * 2;
}

KvPool::KvPool(const Model& model_, int num_blocks, KvType type_)
    : model(model_),
      type(type_),
      num_blocks_(num_blocks),
      num_layers_(model.network.num_layers),
      num_heads_(model.network.num_kv_heads),
      head_dim_(model.network.head_dim),
      head_bytes_(kv_head_bytes(type_, head_dim_)),
      block_bytes_(2 * head_bytes_ * static_cast<size_t>(num_heads_) * static_cast<size_t>(num_layers_)) {
  if (num_blocks < 1) refuse("num_blocks is ", num_blocks, ", expected at least 1");
  region_ = Region::anonymous(block_bytes_ * static_cast<size_t>(num_blocks), true);
}

size_t KvPool::key_offset(int layer, int head) const {
  return static_cast<size_t>(2 * layer * num_heads_ + head) * head_bytes_;
}

size_t KvPool::value_offset(int layer, int head) const {
  return static_cast<size_t>((2 * layer + 1) * num_heads_ + head) * head_bytes_;
}

void KvPool::check(int i) const {
  if (i < 0 || i >= num_blocks_) refuse("block ", i, " is not in the pool of ", num_blocks_);
}

void KvPool::copy(int source, int destination, int num_tokens) {
  check(source);
  check(destination);
  if (num_tokens < 0 || num_tokens > kBlockTokens) refuse("num_tokens is ", num_tokens, ", expected 0..", kBlockTokens);
  const auto tokens = static_cast<size_t>(num_tokens);
  for (int layer = 0; layer < num_layers_; ++layer)
    for (int head = 0; head < num_heads_; ++head) {
      const size_t keys = key_offset(layer, head), values = value_offset(layer, head);
      if (type == KvType::kQ8) {
        copy_codes(block(source) + keys, block(destination) + keys, tokens, true);
        copy_codes(block(source) + values, block(destination) + values, tokens, false);
        continue;
      }
      for (size_t d = 0; d < static_cast<size_t>(head_dim_); ++d)
        std::memmove(block(destination) + keys + d * kBlockTokens * 2, block(source) + keys + d * kBlockTokens * 2, tokens * 2);
      std::memmove(block(destination) + values, block(source) + values, tokens * static_cast<size_t>(head_dim_) * 2);
    }
}

// Keys: quads of dimensions of one token after the other. Values: quads of tokens, of one dimension after the other.
void KvPool::copy_codes(const uint8_t* source, uint8_t* destination, size_t num_tokens, bool is_key) const {
  const size_t codes = code_bytes(head_dim_), quad_row = is_key ? kBlockTokens * 4 : codes / 4;
  for (size_t at = 0; at < codes; at += 4) {
    const size_t first = is_key ? at % quad_row / 4 : at / quad_row * 4, step = is_key ? 4 : 1;
    const size_t wanted = num_tokens > first ? std::min((num_tokens - first) * step, size_t{4}) : 0;
    std::memmove(destination + at, source + at, wanted);
  }
  std::memmove(destination + codes, source + codes, num_tokens * 2);
}

void KvPool::discard(size_t offset, size_t bytes) {
  if (offset % kDiscardBytes != 0 || bytes % kDiscardBytes != 0 || offset > region_.size() || bytes > region_.size() - offset)
    refuse("the stretch of ", bytes, " bytes at ", offset, " is not made of whole 2 MB of a pool of ", region_.size(), " bytes");
  region_.discard(offset, bytes);
}

}  // namespace hob
