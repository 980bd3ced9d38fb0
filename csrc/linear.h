// Linear layers over packed panels, with adapters: what both schedules of a forward pass (forward.cpp) are made of.
//
// Nothing here knows the step, only the model, what it is given and a thread's own Scratch: so a thread whose job is over
// may be at work here still (threads.h).
#pragma once

#include "kernels.h"
#include "model.h"
#include "workspace.h"

namespace hob {

// A view of an input buffer for rows of k values.
inline Acts shaped(const Acts& acts, int k) { return {acts.tiles, acts.rows, padded(k) / kGroup, padded(k)}; }

// What is to be done of QKV at once: one head, so that the thread that has a head's values rotates and stores them too.
// A head that does not fill panels (head_dim % 32 != 0), or is normalised with the others, makes its whole matrix one unit.
struct Unit {
  Target target;
  const Matrix* matrix;
  int first_head, num_heads, first_panel, end_panel;
};

struct Linear {
  const Model& m;
  const Kernels& k = *m.kernels;
  const Network& net = m.network;

  // out (count, stride) (+)= panels first_panel .. end_panel of `matrix` times acts. `out` is where panel 0 would go.
  void project(const Matrix& matrix, const Acts& acts, int count, int first_panel, int end_panel, float* out,
               ptrdiff_t stride, bool is_added) const;

  // ---- adapters: out += B (A x) for the rows that have one, each row by itself. `adapters`: of the rows; null: none has ----

  // A x of one row, the i-th of those at work, for all matrices that read this input. x (size)
  void adapt_input(int layer, Input input, const Adapter* adapter, int i, const float* x, int size, Scratch& s) const;
  // What `project` gave, in the same place.
  void adapt(int layer, Target target, const Adapter* const* adapters, int count, int first_panel, int end_panel, float* out,
             ptrdiff_t stride, const Scratch& s) const;

  // ---- QKV ----

  bool is_head_unit() const { return net.head_dim % kPanel == 0 && !net.is_qk_norm_joint; }
  int num_units() const { return is_head_unit() ? net.num_heads + 2 * net.num_kv_heads : 3; }
  Unit unit(int layer, int i) const;
  // Floats from a row of all heads to the next.
  ptrdiff_t stride(const Unit& u) const { return padded(u.target == kTargetQ ? m.heads_size() : m.kv_size()); }
  // The values of a unit's heads -> out (count, stride), where they lie among all heads of a row.
  void qkv(int layer, const Unit& u, const Acts& in, const Adapter* const* adapters, int count, float* out, ptrdiff_t stride,
           const Scratch& s) const;

  // ---- FFN ----

  // Panel p of what goes into down -> s.gate (count, 32).
  void gate_up(int layer, int p, const Acts& in, const Adapter* const* adapters, int count, Scratch& s) const;
};

// ---- what may be computed twice: pieces of jobs with few rows. Weights and the thread's own Scratch, nothing else ----

void compute_qkv(void* scratch, int piece);
void compute_out(void* scratch, int piece);
void compute_gate_up(void* scratch, int piece);
void compute_down(void* scratch, int piece);
void compute_head(void* scratch, int piece);

}  // namespace hob
