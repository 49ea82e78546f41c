// A torch tensor as an argument of a bound function: turned into pointer, dtype, sizes and strides by DLPack's exchange table where this
// torch has one, else through its Python attributes, so there are no torch headers and no ABI of torch's to match. Before including, define
// PIXELBYTES_MODULE ("_cpu" or "_cuda") and PIXELBYTES_ON_GPU (0 or 1).
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
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
  PyObject *home, *shape, *stride, *dtype, *data_ptr, *is_neg;
};
inline Names g_names;

// A tensor as DLPack 1 describes it, and the table with which torch 2.10 and up hands it out: one C call instead of five attributes.
// Layouts as in DLPack's specification (https://dmlc.github.io/dlpack), which only a new major version may change.
struct DlTensor {
  void* data;
  int32_t device, device_number, ndim;
  uint8_t kind, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DlExchange {
  uint32_t major, minor;
  const DlExchange* older;
  void* owning[3];
  int (*view)(void* tensor, DlTensor* found);  // borrows: shape and strides are the tensor's own
};
inline const DlExchange* g_exchange;
inline PyTypeObject* g_tensor_type;

#if PIXELBYTES_ON_GPU && !defined(PIXELBYTES_EMULATE)
constexpr const char *kHome = "is_cuda", *kHomeError = PIXELBYTES_MODULE ": needs tensors in CUDA memory";
constexpr int32_t kDlHome = 2;
#else
constexpr const char *kHome = "is_cpu", *kHomeError = PIXELBYTES_MODULE ": needs tensors in CPU memory";
constexpr int32_t kDlHome = 1;
#endif

// To be called when the module is made.
inline void learn_torch() {
  g_names = {PyUnicode_InternFromString(kHome), PyUnicode_InternFromString("shape"), PyUnicode_InternFromString("stride"),
             PyUnicode_InternFromString("dtype"), PyUnicode_InternFromString("data_ptr"), PyUnicode_InternFromString("is_neg")};
  const pybind11::module_ torch = pybind11::module_::import("torch");
  const char* names[kDTypes] = {"float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64"};
  for (int i = 0; i < kDTypes; ++i) g_dtypes[i] = pybind11::object(torch.attr(names[i])).release().ptr();
  const pybind11::object type = torch.attr("Tensor");
  g_tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
  const pybind11::object table = pybind11::getattr(type, "__dlpack_c_exchange_api__", pybind11::none());
  if (!PyCapsule_IsValid(table.ptr(), "dlpack_exchange_api")) return;
  g_exchange = static_cast<const DlExchange*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
  while (g_exchange && g_exchange->major > 1) g_exchange = g_exchange->older;
}

inline DType dtype_of(const DlTensor& t) {
  constexpr struct {
    uint8_t kind, bits;
  } known[kDTypes] = {{2, 32}, {2, 64}, {2, 16}, {4, 16}, {1, 8}, {0, 8}, {0, 16}, {0, 32}, {0, 64}};  // in DType's order
  for (int i = 0; i < kDTypes; ++i)
    if (t.lanes == 1 && t.kind == known[i].kind && t.bits == known[i].bits) return DType(i);
  return DType::none;
}

// False where DLPack does not say it, or says something that the kernels do not take: the attributes then tell, or name the error.
inline bool read_exchange(PyObject* source, Tensor& t) {
  DlTensor found;
  if (!g_exchange || g_exchange->major != 1 || !PyObject_TypeCheck(source, g_tensor_type)) return false;
  if (g_exchange->view(source, &found)) {
    PyErr_Clear();
    return false;
  }
  t.dtype = dtype_of(found);
  if (found.device != kDlHome || found.ndim > kMaxDims || !found.strides || t.dtype == DType::none) return false;
  t.ndim = found.ndim;
  for (int i = 0; i < t.ndim; ++i) t.size[i] = found.shape[i], t.stride[i] = found.strides[i];
  t.data = static_cast<char*>(found.data) + found.byte_offset;
  return true;
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
    if (!pixelbytes::read_exchange(source.ptr(), value) && !read_attributes(source)) return false;
    if (pixelbytes::call(source, pixelbytes::g_names.is_neg).ptr() == Py_True)
      throw std::runtime_error(PIXELBYTES_MODULE ": a tensor has its negative bit set, as that of x.conj().imag; call resolve_neg() on it");
#ifdef PIXELBYTES_EMULATE
    value.data = static_cast<char*>(emulator::guarded(value.data, item_size(value.dtype), value.ndim, value.size, value.stride));
#endif
    return true;
  }

 private:
  bool read_attributes(handle source) {
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
    return true;
  }
};
}  // namespace pybind11::detail
