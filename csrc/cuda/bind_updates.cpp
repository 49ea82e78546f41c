#include "bindings.h"
#include "updates.h"

namespace pixelbytes::cuda {

void bind_updates(py::module_& m) {
  m.def("state_update", [](int device, uintptr_t stream, Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z,
                           Tensor dt_bias, Tensor out, bool dt_softplus) {
    run(&state_update, device, stream, StateArgs{state, x, dt, A, B, C, D, z, dt_bias, out, dt_softplus});
  });
  m.def("conv_update", [](int device, uintptr_t stream, Tensor x, Tensor conv_state, Tensor weight, Tensor bias, Tensor out, bool silu) {
    run(&conv_update, device, stream, ConvUpdateArgs{x, conv_state, weight, bias, out, silu});
  });
}

}  // namespace pixelbytes::cuda
