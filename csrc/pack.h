// GGML tensor data -> our packed panels (the layout is drawn in pack.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace hob {

// Bytes of a packed matrix of n outputs and k inputs. kF32 with n == 1 is a plain vector of k floats.
size_t packed_bytes(Kind kind, int64_t n, int64_t k);
size_t group_bytes(Kind kind);

// Which kind a GGML type becomes. Throws std::invalid_argument for a type that is not supported.
Kind kind_of(int ggml_type);

// Throws std::invalid_argument unless data_bytes is what the type and shape take.
void check_packable(size_t data_bytes, int ggml_type, int64_t n, int64_t k);

// Packs checked data into out (packed_bytes).
void pack_tensor(const uint8_t* data, int ggml_type, int64_t n, int64_t k, uint8_t* out);

// One row of a packed matrix as floats: x (k), zero up to k_padded.
void unpack_row(Kind kind, const uint8_t* data, int64_t k, int64_t row, int64_t k_padded, float* x);

}  // namespace hob
