// The linear layers of linear.h.
#include "linear.h"

#include <algorithm>

#include "adapter.h"

namespace hob {

void Linear::project(const Matrix& matrix, const Acts& acts, int count, int first_panel, int end_panel, float* out,
                     ptrdiff_t stride, bool is_added) const {
  for (int p = first_panel; p < end_panel; ++p) {
    const uint8_t* panel = matrix.data + static_cast<size_t>(p) * matrix.panel_bytes;
    float* to = out + p * kPanel;
    if (matrix.is_quantised())  // while a panel is at work the next one is fetched
      k.linear(matrix.kind, panel, acts.num_groups, acts.tiles, count, to, stride, is_added, panel + matrix.panel_bytes);
    else
      k.linear_f32(reinterpret_cast<const float*>(panel), matrix.k, acts.rows, acts.stride, count, to, stride, is_added);
  }
}

void Linear::adapt_input(int layer, Input input, const Adapter* adapter, int i, const float* x, int size, Scratch& s) const {
  if (!adapter) return;
  const AdapterLayer& l = adapter->layer(layer);
  for (int p = 0; p * kPanel < l.stacked[input]; ++p)
    k.linear_f32(l.a[input] + static_cast<ptrdiff_t>(p) * size * kPanel, size, x, 0, 1, s.adapted + i * kMaxStacked + p * kPanel, 0,
                 false);
}

void Linear::adapt(int layer, Target target, const Adapter* const* adapters, int count, int first_panel, int end_panel, float* out,
                   ptrdiff_t stride, const Scratch& s) const {
  for (int i = 0; i < count && adapters; ++i) {
    if (!adapters[i]) continue;
    const AdapterLayer::Part& part = adapters[i]->layer(layer).part[target];
    for (int p = first_panel; p < end_panel && part.b; ++p)
      k.linear_f32(part.b + static_cast<ptrdiff_t>(p) * part.rank * kPanel, part.rank, s.adapted + i * kMaxStacked + part.first, 0, 1,
                   out + i * stride + p * kPanel, 0, true);
  }
}

Unit Linear::unit(int layer, int i) const {
  const Layer& l = m.layers[static_cast<size_t>(layer)];
  const int q_units = is_head_unit() ? net.num_heads : 1, kv_units = is_head_unit() ? net.num_kv_heads : 1;
  const Target target = i < q_units ? kTargetQ : (i < q_units + kv_units ? kTargetK : kTargetV);
  const Matrix& matrix = target == kTargetQ ? l.q : (target == kTargetK ? l.k : l.v);
  if (!is_head_unit()) return {target, &matrix, 0, target == kTargetQ ? net.num_heads : net.num_kv_heads, 0, matrix.num_panels};
  const int head = target == kTargetQ ? i : (i - q_units) % kv_units, panels = net.head_dim / kPanel;
  return {target, &matrix, head, 1, head * panels, (head + 1) * panels};
}

void Linear::qkv(int layer, const Unit& u, const Acts& in, const Adapter* const* adapters, int count, float* out, ptrdiff_t stride,
                 const Scratch& s) const {
  project(*u.matrix, in, count, u.first_panel, u.end_panel, out, stride, false);
  adapt(layer, u.target, adapters, count, u.first_panel, u.end_panel, out, stride, s);
}

void Linear::gate_up(int layer, int p, const Acts& in, const Adapter* const* adapters, int count, Scratch& s) const {
  const Layer& l = m.layers[static_cast<size_t>(layer)];
  project(l.gate, in, count, p, p + 1, s.gate - p * kPanel, kPanel, false);
  project(l.up, in, count, p, p + 1, s.up - p * kPanel, kPanel, false);
  adapt(layer, kTargetGate, adapters, count, p, p + 1, s.gate - p * kPanel, kPanel, s);
  adapt(layer, kTargetUp, adapters, count, p, p + 1, s.up - p * kPanel, kPanel, s);
  m.gate_mul(s.gate, s.up, count * kPanel, s.gate);
}

void compute_qkv(void* scratch, int piece) {
  Scratch& s = *static_cast<Scratch*>(scratch);
  const Linear linear{*s.model};
  const Unit unit = linear.unit(s.layer, piece);
  linear.qkv(s.layer, unit, shaped(s.in, linear.net.hidden_size), s.adapters, s.num_rows, s.heads, linear.stride(unit), s);
}

namespace {

// A panel of what goes onto the residual stream -> s.gate (rows, 32), and of the adapters -> s.up: each is a sum of its own.
void compute_panel(Target target, const Matrix& matrix, const Acts& in, int p, Scratch& s) {
  const Linear linear{*s.model};
  linear.project(matrix, in, s.num_rows, p, p + 1, s.gate - p * kPanel, kPanel, false);
  if (!s.adapters) return;
  std::fill_n(s.up, s.num_rows * kPanel, -0.0f);  // to which adding changes no bit
  linear.adapt(s.layer, target, s.adapters, s.num_rows, p, p + 1, s.up - p * kPanel, kPanel, s);
}

}  // namespace

void compute_out(void* scratch, int piece) {
  Scratch& s = *static_cast<Scratch*>(scratch);
  compute_panel(kTargetO, s.model->layers[static_cast<size_t>(s.layer)].o, shaped(s.in, s.model->heads_size()), piece, s);
}

void compute_gate_up(void* scratch, int piece) {
  Scratch& s = *static_cast<Scratch*>(scratch);
  Linear{*s.model}.gate_up(s.layer, piece, shaped(s.in, s.model->network.hidden_size), s.adapters, s.num_rows, s);
}

void compute_down(void* scratch, int piece) {
  Scratch& s = *static_cast<Scratch*>(scratch);
  compute_panel(kTargetDown, s.model->layers[static_cast<size_t>(s.layer)].down, s.down, piece, s);
}

void compute_head(void* scratch, int piece) {
  Scratch& s = *static_cast<Scratch*>(scratch);
  const Matrix& head = s.model->head;
  const int first = piece * kHeadPanels;
  Linear{*s.model}.project(head, shaped(s.in, s.model->network.hidden_size), s.num_rows, first,
                           std::min(head.num_panels, first + kHeadPanels), s.head - first * kPanel, kHeadPanels * kPanel, false);
}

}  // namespace hob
