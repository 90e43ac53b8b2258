// The kernels' own source, over the emulated processor.
#include "compute/expert_ffn_cuda.cu"
