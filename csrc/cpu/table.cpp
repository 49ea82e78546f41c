// The functions of this instruction set.
#include "cpu/kernels.h"
#include "cpu/scan_steps.h"

namespace pixelbytes {
namespace PIXELBYTES_ISA {

const char* scan_forward(const ScanArgs&);
const char* scan_backward(const ScanArgs&);
EmbedOutcome pxby_embed_forward(const EmbedArgs&);
EmbedOutcome pxby_embed_backward(const EmbedArgs&);

#define PIXELBYTES_STRING_(x) #x
#define PIXELBYTES_STRING(x) PIXELBYTES_STRING_(x)

extern const Kernels table;
const Kernels table = {PIXELBYTES_STRING(PIXELBYTES_ISA), kLanes<float>, kChunk, scan_forward, scan_backward, pxby_embed_forward, pxby_embed_backward};

}  // namespace PIXELBYTES_ISA
}  // namespace pixelbytes
