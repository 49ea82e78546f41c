// The module _cpu: turns torch tensors into pointers, sizes and strides, checks what protects memory, and calls the kernels
// of the best instruction set. Tensors are read through their Python attributes: no torch headers, no ABI to match.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace pixelbytes {
namespace baseline { extern const Kernels table; }
#if PIXELBYTES_X86
namespace v3 { extern const Kernels table; }
namespace v4 { extern const Kernels table; }
#endif

const Kernels* kernels_named(const char* name) {
  if (!strcmp(name, "baseline")) return &baseline::table;
#if PIXELBYTES_X86
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
  if (!strcmp(name, "v3") && v3) return &v3::table;
  if (!strcmp(name, "v4") && v4) return &v4::table;
#endif
  return nullptr;
}

const Kernels& best_kernels() {
  static const Kernels* best = [] {
    if (const char* name = std::getenv("PIXELBYTES_CPU_ISA")) {
      const Kernels* k = kernels_named(name);
      if (!k) throw std::runtime_error("PIXELBYTES_CPU_ISA=" + std::string(name) + ": this build or processor has no such instruction set");
      return k;
    }
    for (const char* name : {"v4", "v3"})
      if (const Kernels* k = kernels_named(name)) return k;
    return kernels_named("baseline");
  }();
  return *best;
}

namespace {

// torch's dtype objects are singletons: compare addresses.
PyObject* g_dtypes[9];

DType dtype_of(py::handle t) {
  PyObject* object = py::object(t.attr("dtype")).ptr();
  for (int i = 0; i < 9; ++i)
    if (g_dtypes[i] == object) return DType(i);
  throw py::type_error("_cpu: dtype not supported: " + std::string(py::str(t.attr("dtype"))));
}

}  // namespace
}  // namespace pixelbytes

namespace pybind11::detail {
template <>
struct type_caster<pixelbytes::Tensor> {
  PYBIND11_TYPE_CASTER(pixelbytes::Tensor, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    value = {};
    if (source.is_none()) return true;
    if (!source.attr("is_cpu").cast<bool>()) throw type_error("_cpu: needs tensors in CPU memory");
    const tuple shape = source.attr("shape"), stride = source.attr("stride")();
    if (shape.size() > size_t(pixelbytes::kMaxDims)) return false;
    value.ndim = int(shape.size());
    for (int i = 0; i < value.ndim; ++i) {
      value.size[i] = shape[size_t(i)].cast<int64_t>();
      value.stride[i] = stride[size_t(i)].cast<int64_t>();
    }
    value.dtype = pixelbytes::dtype_of(source);
    value.data = reinterpret_cast<char*>(source.attr("data_ptr")().cast<uintptr_t>());
    return true;
  }
};
}  // namespace pybind11::detail

namespace pixelbytes {
namespace {

void run(const char* (*kernel)(const ScanArgs&), const ScanArgs& args) {
  const char* error;
  {
    py::gil_scoped_release release;
    error = kernel(args);
  }
  if (error) {
    PyErr_SetString(PyExc_MemoryError, error);
    throw py::error_already_set();
  }
}

// The members in the order of the Python tuples (see ops/selective_scan/cpu.py).
ScanDirection scan_direction(const py::tuple& t) {
  ScanDirection d;
  d.reverse = t[0].cast<bool>();
  Tensor* members[] = {&d.u, &d.delta, &d.A, &d.B, &d.C, &d.D, &d.delta_bias, &d.initial_state, &d.last_state, &d.states,
                       &d.dlast_state, &d.du, &d.ddelta, &d.dA, &d.dB, &d.dC, &d.dD, &d.ddelta_bias, &d.dinitial_state};
  size_t i = 1;
  for (Tensor* member : members) {
    if (i == t.size()) break;
    *member = t[i++].cast<Tensor>();
  }
  return d;
}

ScanArgs scan_args(const py::list& directions, Tensor z, Tensor seq_idx, double scale, bool delta_softplus, bool use_double, int threads) {
  ScanArgs a;
  a.directions = int(directions.size());
  for (int i = 0; i < a.directions; ++i) a.direction[i] = scan_direction(directions[size_t(i)].cast<py::tuple>());
  a.z = z, a.seq_idx = seq_idx, a.scale = scale, a.delta_softplus = delta_softplus, a.use_double = use_double, a.threads = threads;
  return a;
}

void scan_forward(const py::list& directions, Tensor z, Tensor seq_idx, double scale, bool delta_softplus, bool use_double, int threads,
                  Tensor out) {
  ScanArgs a = scan_args(directions, z, seq_idx, scale, delta_softplus, use_double, threads);
  a.out = out;
  run(best_kernels().scan_forward, a);
}

void scan_backward(const py::list& directions, Tensor z, Tensor seq_idx, double scale, bool delta_softplus, bool use_double, int threads,
                   Tensor dout, Tensor dz, Tensor out) {
  ScanArgs a = scan_args(directions, z, seq_idx, scale, delta_softplus, use_double, threads);
  a.dout = dout, a.dz = dz, a.out = out;
  run(best_kernels().scan_backward, a);
}

// args: the tensors of EmbedArgs up to norm_bias.
EmbedArgs embed_args(const py::tuple& tensors, double eps, bool folded, bool use_double, int threads) {
  EmbedArgs a;
  Tensor* members[] = {&a.tokens, &a.emb, &a.conv_weight, &a.conv_bias, &a.alpha, &a.proj_weight, &a.proj_bias, &a.norm_weight, &a.norm_bias};
  for (size_t i = 0; i < 9; ++i) *members[i] = tensors[i].cast<Tensor>();
  a.eps = eps, a.folded = folded, a.use_double = use_double, a.threads = threads;
  return a;
}

void run(EmbedOutcome (*kernel)(const EmbedArgs&), const EmbedArgs& args) {
  EmbedOutcome outcome;
  {
    py::gil_scoped_release release;
    outcome = kernel(args);
  }
  if (outcome.error) {
    PyErr_SetString(PyExc_MemoryError, outcome.error);
    throw py::error_already_set();
  }
  if (outcome.position < 0) return;
  const int64_t n = outcome.position / 9, p = outcome.position % 9, seqlen = args.tokens.size[1];
  throw py::index_error("pxby_embed: id " + std::to_string(outcome.id) + " at tokens[" + std::to_string(n / seqlen) + ", " +
                        std::to_string(n % seqlen) + ", " + std::to_string(p / 3) + ", " + std::to_string(p % 3) +
                        "] is outside the vocabulary [0, " + std::to_string(args.emb.size[0]) + ")");
}

void bind_pxby_embed(py::module_& m) {
  m.def("pxby_embed_forward", [](const py::tuple& tensors, double eps, bool folded, bool use_double, int threads, Tensor out) {
    EmbedArgs a = embed_args(tensors, eps, folded, use_double, threads);
    a.out = out;
    run(best_kernels().pxby_embed_forward, a);
  });
  // gradients: one for each weight, None where unwanted.
  m.def("pxby_embed_backward", [](const py::tuple& tensors, double eps, bool folded, bool use_double, int threads, Tensor dout,
                                  const py::tuple& gradients) {
    EmbedArgs a = embed_args(tensors, eps, folded, use_double, threads);
    a.dout = dout;
    Tensor* members[] = {&a.demb, &a.dconv_weight, &a.dconv_bias, &a.dalpha, &a.dproj_weight, &a.dproj_bias, &a.dnorm_weight, &a.dnorm_bias};
    for (size_t i = 0; i < 8; ++i) *members[i] = gradients[i].cast<Tensor>();
    run(best_kernels().pxby_embed_backward, a);
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  const py::module_ torch = py::module_::import("torch");
  const char* names[] = {"float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64"};
  for (int i = 0; i < 9; ++i) g_dtypes[i] = py::object(torch.attr(names[i])).release().ptr();
  m.attr("isa") = best_kernels().name;
  m.attr("lanes") = best_kernels().lanes;
  m.attr("chunk") = best_kernels().chunk;
  m.def("scan_forward", &scan_forward);
  m.def("scan_backward", &scan_backward);
  bind_pxby_embed(m);
}

}  // namespace pixelbytes
