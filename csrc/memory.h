// Memory straight from the system: zeroed, page-aligned, taken when first touched, given back whole.
//
// Why not malloc: weights want huge pages (2 MB: fewer TLB misses while streaming 98 MB a token), and large buffers
// that a device may never need should cost nothing until then.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace hob {

class Region {
 public:
  Region() = default;
  // Anonymous and zero. `is_huge` aligns to huge pages and asks for them. Throws std::bad_alloc with nothing taken.
  static Region anonymous(size_t bytes, bool is_huge);
  // A file's bytes, read-only. Throws std::runtime_error.
  static Region of_file(int fd, size_t bytes, const std::string& path);
  ~Region();
  Region(Region&& other) noexcept;
  Region& operator=(Region&& other) noexcept;

  // Gives memory back to the system; the address space stays and reads as zero.
  void discard(size_t offset, size_t bytes);

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  Region(uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Hands out 64-byte aligned arrays of one region: `add` them all, then `commit` sets the pointers.
class Arena {
 public:
  template <class T>
  void add(T** pointer, size_t count) {
    const size_t at = size_;
    size_ += (count * sizeof(T) + 63) / 64 * 64;
    add_slot(reinterpret_cast<void**>(pointer), at);
  }
  void commit(bool is_huge);
  size_t size() const { return size_; }

 private:
  struct Slot {
    void** pointer;
    size_t at;
  };
  void add_slot(void** pointer, size_t at);
  std::vector<Slot> slots_;
  size_t size_ = 0;
  Region region_;
};

}  // namespace hob
