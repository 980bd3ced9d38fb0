// NumPy arrays in and out of bindings.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>

#include "text.h"

namespace hob {

namespace nb = nanobind;

template <class T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Result1 = nb::ndarray<nb::numpy, T, nb::ndim<1>>;
template <class T>
using Result2 = nb::ndarray<nb::numpy, T, nb::ndim<2>>;

template <class T>
const T* of_length(const char* name, const Array<T>& array, size_t length) {
  if (array.shape(0) != length) refuse(name, " has ", array.shape(0), " values, expected ", length);
  return array.data();
}

// A NumPy array of its own memory; *data is where to write.
template <class T>
Result1<T> new_array(size_t n, T** data) {
  *data = new T[n > 0 ? n : 1];
  return Result1<T>(*data, {n}, nb::capsule(*data, [](void* p) noexcept { delete[] static_cast<T*>(p); }));
}

template <class T>
Result2<T> new_matrix(size_t rows, size_t cols, T** data) {
  *data = new T[rows * cols > 0 ? rows * cols : 1];
  return Result2<T>(*data, {rows, cols}, nb::capsule(*data, [](void* p) noexcept { delete[] static_cast<T*>(p); }));
}

// Rows of `source`, `stride` apart, as a new matrix.
template <class T>
Result2<T> copied_rows(const T* source, size_t rows, size_t cols, size_t stride) {
  T* to;
  auto result = new_matrix<T>(rows, cols, &to);
  for (size_t r = 0; r < rows; ++r) std::memcpy(to + r * cols, source + r * stride, cols * sizeof(T));
  return result;
}

// The bytes of any object with the buffer protocol.
class Buffer {
 public:
  explicit Buffer(nb::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_C_CONTIGUOUS) != 0) throw nb::python_error();
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  const uint8_t* data() const { return static_cast<const uint8_t*>(view_.buf); }
  size_t size() const { return static_cast<size_t>(view_.len); }

 private:
  Py_buffer view_;
};

// The functions of bindings_kernels.cpp.
void bind_kernels(nb::module_& m);

}  // namespace hob
