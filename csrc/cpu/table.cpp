// The functions of this instruction set.
#include "cpu/kernels.h"
#include "cpu/scan_steps.h"

namespace pixelbytes {
namespace PIXELBYTES_ISA {

const char* scan_forward(const ScanArgs&);
const char* scan_backward(const ScanArgs&);
const char* conv_forward(const ConvArgs&);
const char* conv_backward(const ConvArgs&);
const char* state_update(const StateArgs&);
void* step_create(const StepLayer*, int64_t, double);
const char* step_run(void*, float*, int64_t, int);
void step_destroy(void*);
EmbedOutcome pxby_embed_forward(const EmbedArgs&);
EmbedOutcome pxby_embed_backward(const EmbedArgs&);
double fma_rate(double);

#define PIXELBYTES_STRING_(x) #x
#define PIXELBYTES_STRING(x) PIXELBYTES_STRING_(x)

extern const Kernels table;
const Kernels table = {PIXELBYTES_STRING(PIXELBYTES_ISA), kLanes<float>, kChunk, scan_forward, scan_backward, conv_forward, conv_backward,
                       state_update, step_create, step_run, step_destroy, pxby_embed_forward, pxby_embed_backward, fma_rate};

}  // namespace PIXELBYTES_ISA
}  // namespace pixelbytes
