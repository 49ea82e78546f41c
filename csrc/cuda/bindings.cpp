// The module _cuda: one bind function per op, each in its bind_<op>.cpp. Importing it calls no CUDA function, so it loads without a driver.
#include "bindings.h"

#include "devices.h"

#ifdef PIXELBYTES_EMULATE
namespace emulator {
void bind(pybind11::module_& m);
}
#endif

namespace pixelbytes::cuda {

PYBIND11_MODULE(_cuda, m) {
  learn_torch();
  m.attr("archs") = PIXELBYTES_CUDA_ARCHS;
  m.def("device_count", [] {
    const char* reason = nullptr;
    const int count = device_count(&reason);
    return py::make_tuple(count, reason ? reason : "");
  }, "Number of CUDA devices, and why there is none.");
#ifdef PIXELBYTES_EMULATE
  emulator::bind(m);
#endif
  bind_selective_scan(m);
  bind_causal_conv1d(m);
  bind_updates(m);
  bind_pxby_embed(m);
}

}  // namespace pixelbytes::cuda
