#include "bindings.h"

#include "../scan_tuple.h"
#include "selective_scan.h"

namespace pixelbytes::cuda {

void bind_selective_scan(py::module_& m) {
  m.attr("chunk") = kChunk;
  m.attr("direct_dstate") = kDirectDstate;
  m.def("scan_shape", [](int dstate, bool direct) {
    const ScanShape s = scan_shape(dstate, direct);
    return py::make_tuple(s.dstate_padded, s.tile_forward, s.tile_backward);
  });
  m.def("scan_forward", [](int device, uintptr_t stream, const py::list& directions, Tensor z, Tensor seq_idx, double scale,
                           bool delta_softplus, int64_t stretch, Tensor out, Tensor partial) {
    ScanArgs a = scan_args(directions, z, seq_idx, scale, delta_softplus);
    a.stretch = stretch, a.out = out, a.partial = partial;
    run(selective_scan_forward, device, stream, a);
  });
  m.def("scan_backward", [](int device, uintptr_t stream, const py::list& directions, Tensor z, Tensor seq_idx, double scale,
                            bool delta_softplus, int64_t stretch, Tensor dout, Tensor dz, Tensor out) {
    ScanArgs a = scan_args(directions, z, seq_idx, scale, delta_softplus);
    a.stretch = stretch, a.dout = dout, a.dz = dz, a.out = out;
    run(selective_scan_backward, device, stream, a);
  });
}

}  // namespace pixelbytes::cuda
