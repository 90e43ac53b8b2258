// The kernels' own source, over the emulated processor.
#include "compute/cuda/expert_ffn_cuda.cu"
