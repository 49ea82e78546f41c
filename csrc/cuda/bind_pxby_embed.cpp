#include "bindings.h"
#include "pxby_embed.h"

namespace pixelbytes::cuda {

void bind_pxby_embed(py::module_& m) {
  m.def("embed_lanes", [](int64_t dim) {
    int64_t lanes = 0;
    return embed_groups(dim, &lanes) ? 0 : lanes;
  }, "Lanes that share a token in the fused kernels; 0 where D is too large for them.");
  m.def("embed_forward", [](int device, uintptr_t stream, Tensor tokens, Tensor table, Tensor shift, Tensor norm_weight, Tensor norm_bias, Tensor out,
                            double eps) {
    EmbedArgs a;
    a.tokens = tokens, a.table = table, a.shift = shift, a.norm_weight = norm_weight, a.norm_bias = norm_bias, a.out = out, a.eps = eps;
    run(&embed_forward, device, stream, a);
  });
  m.def("embed_backward", [](int device, uintptr_t stream, Tensor tokens, Tensor table, Tensor shift, Tensor norm_weight, Tensor dout, Tensor dpre,
                             Tensor keys, Tensor partial, Tensor sums, double eps) {
    EmbedArgs a;
    a.tokens = tokens, a.table = table, a.shift = shift, a.norm_weight = norm_weight, a.dout = dout, a.eps = eps;
    a.dpre = dpre, a.keys = keys, a.partial = partial, a.sums = sums;
    run(&embed_backward, device, stream, a);
  });
  m.def("embed_sums_by_key", [](int device, uintptr_t stream, Tensor rows, Tensor keys, Tensor order, Tensor starts, Tensor whole, Tensor parts,
                                Tensor out, int64_t run_length) {
    run(&sums_by_key, device, stream, KeySumArgs{rows, keys, order, starts, whole, parts, out, run_length});
  });
  m.def("embed_mixing", [](int device, uintptr_t stream, Tensor conv_weight, Tensor conv_bias, Tensor alpha, Tensor mixing) {
    MixingArgs a;
    a.conv_weight = conv_weight, a.conv_bias = conv_bias, a.alpha = alpha, a.mixing = mixing;
    run(&embed_mixing, device, stream, a);
  });
  m.def("embed_mixing_backward", [](int device, uintptr_t stream, Tensor conv_weight, Tensor conv_bias, Tensor alpha, Tensor dmixing, Tensor dconv,
                                    Tensor dbias, Tensor dgate) {
    MixingArgs a;
    a.conv_weight = conv_weight, a.conv_bias = conv_bias, a.alpha = alpha;
    a.dmixing = dmixing, a.dconv = dconv, a.dbias = dbias, a.dgate = dgate;
    run(&embed_mixing_backward, device, stream, a);
  });
}

}  // namespace pixelbytes::cuda
