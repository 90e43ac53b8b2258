# The CUDA backend, or the one that says that it was left out. Objects, not an archive: whoever links
# them may instead link others of the same functions, as the tests do.
add_library(spmoe_backend OBJECT)
set_target_properties(spmoe_backend PROPERTIES POSITION_INDEPENDENT_CODE ON)
target_link_libraries(spmoe_backend PUBLIC spmoe_core PRIVATE spmoe_options)
set(SPMOE_CUDA_DEVICE
    ${CMAKE_CURRENT_SOURCE_DIR}/device/cuda/batch_copy.cpp
    ${CMAKE_CURRENT_SOURCE_DIR}/device/cuda/cuda_device.cpp
    ${CMAKE_CURRENT_SOURCE_DIR}/device/cuda/events.cpp
    ${CMAKE_CURRENT_SOURCE_DIR}/device/cuda/movers.cpp
    CACHE INTERNAL "What the tests also build, over a fake CUDA runtime")
if(SPMOE_WITH_CUDA)
  target_sources(
    spmoe_backend PRIVATE compute/cuda/cuda_layer_compute.cu compute/cuda/expert_ffn_cuda.cu
                          ${SPMOE_CUDA_DEVICE})
  target_link_libraries(spmoe_backend PUBLIC CUDA::cudart_static)
  # Sums and products are rounded one by one, the same in every kernel of a template.
  set_source_files_properties(
    compute/cuda/expert_ffn_cuda.cu PROPERTIES COMPILE_OPTIONS --fmad=false)
else()
  target_sources(spmoe_backend PRIVATE compute/cuda/none.cpp device/cuda/none.cpp)
endif()
