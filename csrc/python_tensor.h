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
// Attributes by interned names: half the time of a call is reading them.
struct Names {
  PyObject *home, *shape, *stride, *dtype, *data_ptr;
};
inline Names g_names;

#if PIXELBYTES_ON_GPU && !defined(PIXELBYTES_EMULATE)
constexpr const char *kHome = "is_cuda", *kHomeError = PIXELBYTES_MODULE ": needs tensors in CUDA memory";
#else
constexpr const char *kHome = "is_cpu", *kHomeError = PIXELBYTES_MODULE ": needs tensors in CPU memory";
#endif

// To be called when the module is made.
inline void learn_torch() {
  g_names = {PyUnicode_InternFromString(kHome), PyUnicode_InternFromString("shape"), PyUnicode_InternFromString("stride"),
             PyUnicode_InternFromString("dtype"), PyUnicode_InternFromString("data_ptr")};
  const pybind11::module_ torch = pybind11::module_::import("torch");
  const char* names[kDTypes] = {"float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64"};
  for (int i = 0; i < kDTypes; ++i) g_dtypes[i] = pybind11::object(torch.attr(names[i])).release().ptr();
}

inline pybind11::object checked(PyObject* found) {
  if (!found) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(found);
}
inline pybind11::object get(pybind11::handle t, PyObject* name) { return checked(PyObject_GetAttr(t.ptr(), name)); }
inline pybind11::object call(pybind11::handle t, PyObject* name) { return checked(PyObject_CallMethodNoArgs(t.ptr(), name)); }

inline DType dtype_of(pybind11::handle t) {
  const pybind11::object dtype = get(t, g_names.dtype);
  for (int i = 0; i < kDTypes; ++i)
    if (g_dtypes[i] == dtype.ptr()) return DType(i);
  throw pybind11::type_error(PIXELBYTES_MODULE ": dtype not supported: " + std::string(pybind11::str(dtype)));
}

}  // namespace pixelbytes

namespace pybind11::detail {
template <>
struct type_caster<pixelbytes::Tensor> {
  PYBIND11_TYPE_CASTER(pixelbytes::Tensor, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    value = {};
    if (source.is_none()) return true;
    using pixelbytes::g_names;
    if (pixelbytes::get(source, g_names.home).ptr() != Py_True) throw type_error(pixelbytes::kHomeError);
    const object shape = pixelbytes::get(source, g_names.shape), stride = pixelbytes::call(source, g_names.stride);
    const Py_ssize_t ndim = PyTuple_GET_SIZE(shape.ptr());
    if (ndim > pixelbytes::kMaxDims) return false;
    value.ndim = int(ndim);
    for (int i = 0; i < value.ndim; ++i) {
      value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
    }
    value.dtype = pixelbytes::dtype_of(source);
    value.data = static_cast<char*>(PyLong_AsVoidPtr(pixelbytes::call(source, g_names.data_ptr).ptr()));
    if (PyErr_Occurred()) throw error_already_set();
#ifdef PIXELBYTES_EMULATE
    value.data = static_cast<char*>(emulator::guarded(value.data, item_size(value.dtype), value.ndim, value.size, value.stride));
#endif
    return true;
  }
};
}  // namespace pybind11::detail
