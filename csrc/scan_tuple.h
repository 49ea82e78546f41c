// A scan's arguments from Python: shared by both modules.
#pragma once
#include "python_tensor.h"
#include "scan_args.h"

namespace pixelbytes {

// (batch, dstate, seqlen) as one group of (batch, groups, dstate, seqlen).
inline Tensor with_groups(Tensor t) {
  if (t.ndim != 3) return t;
  t.ndim = 4;
  for (int i = 3; i > 1; --i) t.size[i] = t.size[i - 1], t.stride[i] = t.stride[i - 1];
  t.size[1] = 1;
  return t;
}

// The members in the order of the Python tuples (see ops/selective_scan/cpu.py); those at the end may be missing.
inline ScanDirection scan_direction(const pybind11::tuple& t) {
  ScanDirection d;
  d.reverse = t[0].cast<bool>();
  Tensor* members[] = {&d.u, &d.delta, &d.A, &d.B, &d.C, &d.D, &d.delta_bias, &d.initial_state, &d.last_state, &d.states,
                       &d.dlast_state, &d.du, &d.ddelta, &d.dA, &d.dB, &d.dC, &d.dD, &d.ddelta_bias, &d.dinitial_state};
  size_t i = 1;
  for (Tensor* member : members) {
    if (i == t.size()) break;
    *member = t[i++].cast<Tensor>();
  }
  d.B = with_groups(d.B), d.C = with_groups(d.C);
  return d;
}

inline ScanArgs scan_args(const pybind11::list& directions, const Tensor& z, const Tensor& seq_idx, double scale, bool delta_softplus) {
  ScanArgs a;
  a.directions = int(directions.size());
  for (size_t i = 0; i < directions.size() && i < 2; ++i) a.direction[i] = scan_direction(directions[i].cast<pybind11::tuple>());
  a.z = z, a.seq_idx = seq_idx, a.scale = scale, a.delta_softplus = delta_softplus;
  return a;
}

}  // namespace pixelbytes
