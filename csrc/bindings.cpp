// The module _cpu: takes torch tensors as pointers, sizes and strides (python_tensor.h) and calls the kernels of the best instruction set.
#define PIXELBYTES_MODULE "_cpu"
#define PIXELBYTES_ON_GPU 0
#include "python_tensor.h"
#include "scan_tuple.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/large.h"

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

void raise_memory_error(const char* error) {
  if (!error) return;
  PyErr_SetString(PyExc_MemoryError, error);
  throw py::error_already_set();
}

// `fresh`: the outputs that may be large, of which nothing was written yet.
template <class Args, class... Outputs>
void run(const char* (*kernel)(const Args&), const Args& args, const Outputs&... fresh) {
  const char* error;
  {
    py::gil_scoped_release release;
    (ask_for_huge_pages(fresh), ...);
    error = kernel(args);
  }
  raise_memory_error(error);
}

ScanArgs cpu_scan_args(const py::list& directions, const Tensor& z, const Tensor& seq_idx, double scale, bool delta_softplus, bool use_double,
                       int threads) {
  ScanArgs a = scan_args(directions, z, seq_idx, scale, delta_softplus);
  a.use_double = use_double, a.threads = threads;
  return a;
}

void scan_forward(const py::list& directions, Tensor z, Tensor seq_idx, double scale, bool delta_softplus, bool use_double, int threads,
                  Tensor out) {
  ScanArgs a = cpu_scan_args(directions, z, seq_idx, scale, delta_softplus, use_double, threads);
  a.out = out;
  run(best_kernels().scan_forward, a, out, a.direction[0].states, a.direction[1].states);
}

void scan_backward(const py::list& directions, Tensor z, Tensor seq_idx, double scale, bool delta_softplus, bool use_double, int threads,
                   Tensor dout, Tensor dz, Tensor out) {
  ScanArgs a = cpu_scan_args(directions, z, seq_idx, scale, delta_softplus, use_double, threads);
  a.dout = dout, a.dz = dz, a.out = out;
  const ScanDirection &first = a.direction[0], &second = a.direction[1];
  run(best_kernels().scan_backward, a, first.du, first.ddelta, second.du, second.ddelta, dz, out);
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
  raise_memory_error(outcome.error);
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
    ask_for_huge_pages(out);
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

// tensors: x, weight, bias, seq_idx, initial_states.
ConvArgs conv_args(const py::tuple& tensors, bool silu, bool reverse, bool use_double, int threads) {
  ConvArgs a;
  Tensor* members[] = {&a.x, &a.weight, &a.bias, &a.seq_idx, &a.initial_states};
  for (size_t i = 0; i < 5; ++i) *members[i] = tensors[i].cast<Tensor>();
  a.silu = silu, a.reverse = reverse, a.use_double = use_double, a.threads = threads;
  return a;
}

void bind_causal_conv1d(py::module_& m) {
  m.def("conv_forward", [](const py::tuple& tensors, bool silu, bool reverse, bool use_double, int threads, Tensor out, Tensor final_states) {
    ConvArgs a = conv_args(tensors, silu, reverse, use_double, threads);
    a.out = out, a.final_states = final_states;
    run(best_kernels().conv_forward, a, out);
  });
  m.def("conv_backward", [](const py::tuple& tensors, bool silu, bool reverse, bool use_double, int threads, Tensor dout,
                            Tensor dfinal_states, Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_states) {
    ConvArgs a = conv_args(tensors, silu, reverse, use_double, threads);
    a.dout = dout, a.dfinal_states = dfinal_states;
    a.dx = dx, a.dweight = dweight, a.dbias = dbias, a.dinitial_states = dinitial_states;
    run(best_kernels().conv_backward, a, dx);
  });
}

void bind_selective_state_update(py::module_& m) {
  m.def("state_update", [](Tensor state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z, Tensor dt_bias, Tensor out,
                           bool dt_softplus, bool use_double, int threads) {
    run(best_kernels().state_update, StateArgs{state, x, dt, A, B, C, D, z, dt_bias, out, dt_softplus, use_double, threads});
  });
}

// The packed weights of mamba_step. Python keeps the state tensors alive for as long as this lives.
class StepPlan {
 public:
  StepPlan(const py::list& layers, double eps) {
    std::vector<StepLayer> all(layers.size());
    for (size_t i = 0; i < all.size(); ++i) {
      const py::tuple t = layers[i].cast<py::tuple>();
      StepLayer& l = all[i];
      Tensor* members[] = {&l.norm, &l.in_proj, &l.in_proj_bias, &l.conv_weight, &l.conv_bias, &l.x_proj, &l.dt_proj, &l.dt_bias,
                           &l.A, &l.D, &l.out_proj, &l.out_proj_bias, &l.conv_state, &l.state};
      for (size_t k = 0; k < 14; ++k) *members[k] = t[k].cast<Tensor>();
    }
    batch_ = all[0].state.size[0], dim_ = all[0].in_proj.size[1];
    plan_ = best_kernels().step_create(all.data(), int64_t(all.size()), eps);
    if (!plan_) raise_memory_error("mamba_step: out of memory for the packed weights");
  }
  ~StepPlan() {
    if (plan_) best_kernels().step_destroy(plan_);
  }
  StepPlan(const StepPlan&) = delete;

  // False, and nothing done, if x is not a contiguous float32 tensor (batch, dim). Checked here: in Python, with no_grad,
  // it took a fifth of a step.
  bool run(const Tensor& x, int threads) {
    if (x.ndim != 2 || x.dtype != DType::f32 || x.size[0] != batch_ || x.size[1] != dim_) return false;
    if (x.stride[1] != 1 || (batch_ > 1 && x.stride[0] != dim_)) return false;
    raise_memory_error(best_kernels().step_run(plan_, reinterpret_cast<float*>(x.data), batch_, threads));
    return true;
  }

 private:
  void* plan_ = nullptr;
  int64_t batch_ = 0, dim_ = 0;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  learn_torch();
  m.attr("isa") = best_kernels().name;
  m.attr("lanes") = best_kernels().lanes;
  m.attr("chunk") = best_kernels().chunk;
  m.def("scan_forward", &scan_forward);
  m.def("scan_backward", &scan_backward);
  bind_causal_conv1d(m);
  bind_selective_state_update(m);
  py::class_<StepPlan>(m, "StepPlan").def(py::init<const py::list&, double>()).def("run", &StepPlan::run);
  bind_pxby_embed(m);
  m.def("fma_rate", [](double seconds) { return best_kernels().fma_rate(seconds) * best_kernels().lanes; },
        "fp32 multiply-adds a second of one thread, measured for `seconds`.");
}

}  // namespace pixelbytes
