// A torch tensor as an argument of a bound function: turned into pointer, dtype, sizes and strides through its Python attributes, so there
// are no torch headers and no ABI to match. Before including, define PIXELBYTES_MODULE ("_cpu" or "_cuda") and PIXELBYTES_ON_GPU (0 or 1).
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "tensor.h"
#ifdef PIXELBYTES_EMULATE
#include "emulator.h"
#endif

namespace pixelbytes {

constexpr int kDTypes = int(DType::none);

// torch's dtype objects are singletons: compare addresses.
inline PyObject* g_dtypes[kDTypes];

// To be called when the module is made.
inline void learn_dtypes() {
  const pybind11::module_ torch = pybind11::module_::import("torch");
  const char* names[kDTypes] = {"float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64"};
  for (int i = 0; i < kDTypes; ++i) g_dtypes[i] = pybind11::object(torch.attr(names[i])).release().ptr();
}

inline DType dtype_of(pybind11::handle t) {
  PyObject* object = pybind11::object(t.attr("dtype")).ptr();
  for (int i = 0; i < kDTypes; ++i)
    if (g_dtypes[i] == object) return DType(i);
  throw pybind11::type_error(PIXELBYTES_MODULE ": dtype not supported: " + std::string(pybind11::str(t.attr("dtype"))));
}

}  // namespace pixelbytes

namespace pybind11::detail {
template <>
struct type_caster<pixelbytes::Tensor> {
  PYBIND11_TYPE_CASTER(pixelbytes::Tensor, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    value = {};
    if (source.is_none()) return true;
#if PIXELBYTES_ON_GPU && !defined(PIXELBYTES_EMULATE)
    if (!source.attr("is_cuda").cast<bool>()) throw type_error(PIXELBYTES_MODULE ": needs tensors in CUDA memory");
#else
    if (!source.attr("is_cpu").cast<bool>()) throw type_error(PIXELBYTES_MODULE ": needs tensors in CPU memory");
#endif
    const tuple shape = source.attr("shape"), stride = source.attr("stride")();
    if (shape.size() > size_t(pixelbytes::kMaxDims)) return false;
    value.ndim = int(shape.size());
    for (int i = 0; i < value.ndim; ++i) {
      value.size[i] = shape[size_t(i)].cast<int64_t>();
      value.stride[i] = stride[size_t(i)].cast<int64_t>();
    }
    value.dtype = pixelbytes::dtype_of(source);
    value.data = reinterpret_cast<char*>(source.attr("data_ptr")().cast<uintptr_t>());
#ifdef PIXELBYTES_EMULATE
    value.data = static_cast<char*>(emulator::guarded(value.data, item_size(value.dtype), value.ndim, value.size, value.stride));
#endif
    return true;
  }
};
}  // namespace pybind11::detail
