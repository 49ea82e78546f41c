// From Python's tensors to a kernel's parameters, and which kernel serves which sizes.
#pragma once
#include <climits>

#include "scan_tile.h"

namespace pixelbytes::cuda {

// A kernel serves every dstate up to its own; see ScanShape for `staged`.
template <int kDstate, bool kStaged>
struct Case {
  static constexpr int dstate = kDstate;
  static constexpr bool staged = kStaged;
};

// Forward: 4 threads a channel, so that small batches fill a device; 16 above dstate 64.
template <class C>
using ForwardShape = Shape<C::dstate == 256 ? 16 : C::dstate / 4, C::dstate == 256 ? 16 : 4, C::dstate == 256 ? 8 : 16, 16, C::staged>;

// Backward: 4 states a thread (2 at dstate 8, 8 at 256), so that what it keeps stays in registers.
template <class C>
using BackwardShape = Shape<C::dstate == 8 ? 2 : C::dstate == 256 ? 8 : 4, C::dstate <= 16 ? 4 : C::dstate == 256 ? 32 : C::dstate / 4,
                            C::dstate <= 32 ? 16 : C::dstate == 64 ? 8 : 4, kChunk, C::staged>;

struct StagedCases {
  template <class F>
  static auto pick(int dstate, F f) {
    return dstate <= 8 ? f(Case<8, true>{}) : dstate <= 16 ? f(Case<16, true>{}) : dstate <= 32 ? f(Case<32, true>{}) : f(Case<64, true>{});
  }
};
struct DirectCases {
  template <class F>
  static auto pick(int dstate, F f) {
    return dstate <= 16 ? f(Case<16, false>{}) : dstate <= 64 ? f(Case<64, false>{}) : f(Case<256, false>{});
  }
};

inline Plane plane_of(const Tensor& t) {
  if (!t) return {};
  return {t.data, t.dtype, t.stride[0], int(t.stride[1]), int(t.stride[2]), false};
}

// Whether packets of 4 elements along the fast axis can be read at once. Tiles and chunks start at multiples of 4 where groups do.
inline bool is_packed(const Plane& r, const ScanParams& p) {
  const bool fits = (p.time_fast ? r.step == 1 && r.k % 4 == 0 : r.k == 1 && r.step % 4 == 0 && (p.dim / p.groups) % 4 == 0) && r.batch % 4 == 0;
  return fits && reinterpret_cast<uintptr_t>(r.data) % uintptr_t(4 * item_size(r.dtype)) == 0;
}
inline bool is_packed(const Coefficient& c) {
  const bool fits = c.k == 1 && c.step % 4 == 0 && c.group % 4 == 0 && c.batch % 4 == 0;
  return fits && reinterpret_cast<uintptr_t>(c.data) % uintptr_t(4 * item_size(c.dtype)) == 0;
}

inline Coefficient coefficient_of(const Tensor& t) {
  if (t.ndim == 2) return {{t.data, t.dtype, 0, 1, 0, false}, t.stride[0], true};
  return {{t.data, t.dtype, t.stride[0], int(t.stride[2]), int(t.stride[3]), false}, t.stride[1], false};
}

inline const float* floats(const Tensor& t) { return reinterpret_cast<const float*>(t.data); }
inline float* results(const Tensor& t) { return reinterpret_cast<float*>(t.data); }

inline bool is_direct(const ScanArgs& args) {
  bool direct = args.direction[0].A.size[1] > kDirectDstate;
  for (int i = 0; i < args.directions; ++i)
    direct |= args.direction[i].B.ndim == 2 || args.direction[i].C.ndim == 2;
  return direct;
}

// Whether the strides that a kernel keeps in 32 bits fit, that of time also as bytes of a chunk; a negative one would do, but torch has none.
inline bool strides_fit(const Tensor& t) {
  for (int i = t.ndim == 3 ? 1 : 2; i < t.ndim; ++i)
    if (t.stride[i] > (i == t.ndim - 1 ? INT_MAX / (4 * kChunk) : INT_MAX)) return false;
  return true;
}
inline bool strides_fit(const ScanArgs& args) {
  bool fit = strides_fit(args.z) && strides_fit(args.out) && strides_fit(args.partial) && strides_fit(args.dout) && strides_fit(args.dz);
  for (const ScanDirection& d : args.direction)
    for (const Tensor* t : {&d.u, &d.delta, &d.B, &d.C, &d.du, &d.ddelta}) fit &= strides_fit(*t);
  return fit;
}

inline ScanParams scan_params(const ScanArgs& args) {
  ScanParams p;
  const ScanDirection& first = args.direction[0];
  p.directions = args.directions;
  p.batch = int(first.u.size[0]), p.dim = int(first.u.size[1]), p.seqlen = int(first.u.size[2]), p.dstate = int(first.A.size[1]);
  for (int i = 0; i < args.directions; ++i) {
    const ScanDirection& own = args.direction[i];
    const auto either = [&](Tensor ScanDirection::*member) { return own.*member ? own.*member : first.*member; };
    Direction& d = p.direction[i];
    d.reverse = own.reverse;
    d.u = plane_of(either(&ScanDirection::u)), d.delta = plane_of(either(&ScanDirection::delta));
    d.A = floats(either(&ScanDirection::A)), d.D = floats(either(&ScanDirection::D)), d.delta_bias = floats(either(&ScanDirection::delta_bias));
    const Tensor B = either(&ScanDirection::B), C = either(&ScanDirection::C);
    d.B = coefficient_of(B), d.C = coefficient_of(C);
    for (const Tensor& t : {B, C})
      if (t.ndim == 4) p.groups = int(t.size[1]);
    d.initial_state = floats(own.initial_state), d.dlast_state = floats(own.dlast_state);
    d.last_state = results(own.last_state), d.states = results(own.states);
    d.du = plane_of(own.du), d.ddelta = plane_of(own.ddelta);
    d.dA = results(own.dA), d.dB = results(own.dB), d.dC = results(own.dC);
    d.dD = results(own.dD), d.ddelta_bias = results(own.ddelta_bias), d.dinitial_state = results(own.dinitial_state);
  }
  p.stretch = args.stretch ? int(args.stretch) : p.seqlen;
  p.z = plane_of(args.z), p.out = plane_of(args.out), p.partial = args.partial ? plane_of(args.partial) : p.out;
  p.dout = plane_of(args.dout), p.dz = plane_of(args.dz);
  if (p.dz && !p.out) p.partial = p.dz;
  p.seq_idx = reinterpret_cast<const int*>(args.seq_idx.data);
  p.scale = float(args.scale), p.softplus = args.delta_softplus;
  p.shares_u = args.directions == 2 && !args.direction[1].u, p.shares_delta = args.directions == 2 && !args.direction[1].delta;
  if (p.shares_u) p.direction[1].du = p.direction[0].du;
  if (p.shares_delta) p.direction[1].ddelta = p.direction[0].ddelta;
  p.time_fast = p.direction[0].u.step == 1 && p.seqlen > 1;
  for (Plane* r : {&p.z, &p.out, &p.partial, &p.dout, &p.dz}) r->packed = is_packed(*r, p);
  for (Direction& d : p.direction) {
    for (Plane* r : {&d.u, &d.delta, &d.du, &d.ddelta}) r->packed = is_packed(*r, p);
    for (Coefficient* c : {&d.B, &d.C}) c->packed = is_packed(*c);
  }
  return p;
}

// Whether a kernel for Whole<T> may run, see there. A gradient is to have the steps of its tensor.
template <class S>
bool is_whole(const ScanParams& p, DType dtype) {
  const auto fits = [&](const Plane& t) { return !t || (t.packed && t.dtype == dtype); };
  bool whole = p.seqlen % S::steps == 0 && p.dim / p.groups % S::channels == 0 && p.dstate == S::dstate && !p.seq_idx;
  whole = whole && (!p.out || p.partial.data == p.out.data) && (!p.dz || p.dz.step == p.z.step);
  for (const Plane* t : {&p.z, &p.out, &p.dout, &p.dz, &p.partial}) whole = whole && fits(*t);
  for (int i = 0; i < p.directions; ++i) {
    const Direction& d = p.direction[i];
    for (const Plane* t : {&d.u, &d.delta, &d.du, &d.ddelta}) whole = whole && fits(*t);
    whole = whole && fits(d.B) && fits(d.C) && (!d.du || d.du.step == d.u.step) && (!d.ddelta || d.ddelta.step == d.delta.step);
  }
  return whole;
}

// Runs Kernel<its shape, what it may rely on>::run(at, params, blocks) for the sizes of `args`.
template <template <class, class> class Kernel, template <class> class ShapeOf, class Cases>
const char* launch_scan(const Launch& at, const ScanArgs& args) {
  ScanParams p = scan_params(args);
  return Cases::pick(p.dstate, [&](auto c) -> const char* {
    using S = ShapeOf<decltype(c)>;
    p.tiles = ceil_div(p.dim / p.groups, S::channels);
    const int64_t blocks = int64_t(p.batch) * p.groups * p.tiles;
    const auto run = [&]() -> const char* {
      if (!strides_fit(args)) return "selective_scan: a stride of 2^24 elements or more in time, or of 2^31; make the tensor contiguous";
      if (blocks > INT_MAX) return "selective_scan: too many channels for one launch";
      if constexpr (S::staged && S::dstate <= 16) {
        if (is_whole<S>(p, DType::f32)) return Kernel<S, Whole<float>>::run(at, p, int(blocks));
        if (is_whole<S>(p, DType::f16)) return Kernel<S, Whole<__half>>::run(at, p, int(blocks));
      }
      return Kernel<S, Any>::run(at, p, int(blocks));
    };
    return with_sizes(run(), "batch %d, dim %d, seqlen %d, dstate %d", p.batch, p.dim, p.seqlen, p.dstate);
  });
}

}  // namespace pixelbytes::cuda
