// The backend's own source, over the fake CUDA runtime and the emulated processor.
#include "compute/cuda/cuda_layer_compute.cu"
