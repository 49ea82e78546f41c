#include "bindings.h"
#include "causal_conv1d.h"

namespace pixelbytes::cuda {
namespace {

// tensors: x, weight, bias, seq_idx, initial_states.
ConvArgs conv_args(const py::tuple& tensors, bool silu, bool reverse, int64_t steps) {
  ConvArgs a;
  Tensor* members[] = {&a.x, &a.weight, &a.bias, &a.seq_idx, &a.initial_states};
  for (size_t i = 0; i < 5; ++i) *members[i] = tensors[i].cast<Tensor>();
  a.silu = silu, a.reverse = reverse, a.steps = steps;
  return a;
}

}  // namespace

void bind_causal_conv1d(py::module_& m) {
  m.def("conv_forward", [](int device, uintptr_t stream, const py::tuple& tensors, bool silu, bool reverse, int64_t steps, Tensor out,
                           Tensor final_states) {
    ConvArgs a = conv_args(tensors, silu, reverse, steps);
    a.out = out, a.final_states = final_states;
    run(&conv_forward, device, stream, a);
  });
  m.def("conv_backward", [](int device, uintptr_t stream, const py::tuple& tensors, bool silu, bool reverse, int64_t steps, Tensor dout,
                            Tensor dfinal_states, Tensor dx, Tensor dinitial_states, Tensor partial, Tensor sums) {
    ConvArgs a = conv_args(tensors, silu, reverse, steps);
    a.dout = dout, a.dfinal_states = dfinal_states, a.dx = dx, a.dinitial_states = dinitial_states;
    a.partial = partial, a.sums = sums;
    run(&conv_backward, device, stream, a);
  });
}

}  // namespace pixelbytes::cuda
