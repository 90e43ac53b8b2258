#include <gtest/gtest.h>

#include "fake_cuda.hpp"

void spmoe::fake_cuda::complain(const std::string& what) { ADD_FAILURE() << what; }
