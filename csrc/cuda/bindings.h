// Shared by bindings.cpp and every bind_<op>.cpp of the module _cuda.
#pragma once
#define PIXELBYTES_MODULE "_cuda"
#define PIXELBYTES_ON_GPU 1
#include "../python_tensor.h"
#include "launch.h"

namespace pixelbytes::cuda {

namespace py = pybind11;

// Calls launcher(Launch{device, stream}, args...) without the GIL; its sentence becomes a RuntimeError.
template <class... Params, class... Args>
void run(const char* (*launcher)(const Launch&, Params...), int device, uintptr_t stream, const Args&... args) {
  const char* error;
  {
    py::gil_scoped_release release;
    error = launcher(Launch{device, stream}, args...);
  }
#ifdef PIXELBYTES_EMULATE
  if (const char* spoilt = emulator::write_back(); spoilt && !error) error = spoilt;
#endif
  if (!error) return;
  PyErr_SetString(PyExc_RuntimeError, error);
  throw py::error_already_set();
}

void bind_selective_scan(py::module_& m);
void bind_causal_conv1d(py::module_& m);
void bind_updates(py::module_& m);
void bind_pxby_embed(py::module_& m);

}  // namespace pixelbytes::cuda
