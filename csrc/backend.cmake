# The CUDA backend, or the one that says that it was left out. Objects, not an archive: whoever links
# them may instead link others of the same functions, as the tests do.
add_library(spmoe_backend OBJECT)
target_link_libraries(spmoe_backend PUBLIC spmoe_core PRIVATE spmoe_options)
if(SPMOE_WITH_CUDA)
  target_sources(spmoe_backend PRIVATE compute/expert_ffn_cuda.cu compute/no_cuda_layer_compute.cpp
                                       device/no_cuda.cpp)
  target_link_libraries(spmoe_backend PUBLIC CUDA::cudart_static)
  # Sums and products are rounded one by one, the same in every kernel of a template.
  set_source_files_properties(compute/expert_ffn_cuda.cu PROPERTIES COMPILE_OPTIONS --fmad=false)
else()
  target_sources(spmoe_backend PRIVATE compute/no_cuda_layer_compute.cpp device/no_cuda.cpp)
endif()
