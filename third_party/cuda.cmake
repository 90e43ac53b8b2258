# Sets SPMOE_WITH_CUDA, whether the CUDA backend is built, and enables the language if so. Included
# by the top directory, since a language belongs to the directory that enables it and those below.
# The wheel needs neither the driver's nor the runtime's library: cudart is linked statically.
set(SPMOE_WITH_CUDA OFF)
if(SPMOE_CUDA STREQUAL "OFF")
  return()
endif()

# One binary for each generation by name, and PTX for those to come.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90-real 90-virtual)
endif()
if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(SPMOE_NVCC nvcc PATHS /usr/local/cuda/bin /opt/cuda/bin)
  mark_as_advanced(SPMOE_NVCC)
  if(SPMOE_NVCC)
    set(ENV{CUDACXX} ${SPMOE_NVCC})
  endif()
endif()

include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  find_package(CUDAToolkit 12.0 QUIET)
endif()
if(CMAKE_CUDA_COMPILER AND TARGET CUDA::cudart_static)
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  set(SPMOE_WITH_CUDA ON)
elseif(SPMOE_CUDA STREQUAL "ON")
  message(
    FATAL_ERROR
      "SPMOE_CUDA=ON, but no CUDA 12 or later was found that works: compiler "
      "'${CMAKE_CUDA_COMPILER}', toolkit '${CUDAToolkit_VERSION}'. Install nvcc and cudart (with its "
      "static library) and put nvcc on PATH, or set CUDACXX; or use SPMOE_CUDA=OFF, for the host alone")
endif()
message(STATUS "CUDA backend: ${SPMOE_WITH_CUDA} (SPMOE_CUDA=${SPMOE_CUDA})")
