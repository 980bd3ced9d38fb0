// The regions and arenas of memory.h.
#include "memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

namespace hob {
namespace {
constexpr size_t kHugePage = size_t{2} << 20;
}

Region Region::anonymous(size_t bytes, bool is_huge) {
  if (bytes == 0) return {};
  if (is_huge) bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  const size_t slack = is_huge ? kHugePage : 0;
  void* mapped = mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  auto* data = static_cast<uint8_t*>(mapped);
  if (is_huge) {  // keep the aligned part
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(data) % kHugePage) % kHugePage;
    if (before > 0) munmap(data, before);
    if (before < slack) munmap(data + before + bytes, slack - before);
    data += before;
    madvise(data, bytes, MADV_HUGEPAGE);  // advice: slower without, never wrong
  }
  return {data, bytes};
}

void Region::discard(size_t offset, size_t bytes) { madvise(data_ + offset, bytes, MADV_DONTNEED); }

Region Region::of_file(int fd, size_t bytes, const std::string& path) {
  void* data = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) throw std::runtime_error("cannot map " + path + ": " + std::strerror(errno));
  madvise(data, bytes, MADV_WILLNEED);
  return {static_cast<uint8_t*>(data), bytes};
}

Region::~Region() {
  if (data_) munmap(data_, size_);
}

Region::Region(Region&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

Region& Region::operator=(Region&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

void Arena::add_slot(void** pointer, size_t at) { slots_.push_back({pointer, at}); }

void Arena::commit(bool is_huge) {
  region_ = Region::anonymous(size_, is_huge);
  for (const Slot& slot : slots_) *slot.pointer = region_.data() + slot.at;
}

}  // namespace hob
