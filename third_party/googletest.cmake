# The targets GTest::gtest and GTest::gtest_main: an installed GoogleTest, or else one built here,
# from the sources in the Python package ros-gtest-vendor, or else from those of a release.
find_package(GTest QUIET)
if(NOT GTest_FOUND)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('data'))"
    OUTPUT_VARIABLE prefix OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_path(SPMOE_GTEST_SOURCES src/gtest-all.cc PATHS ${prefix}/src/gtest_vendor NO_DEFAULT_PATH)
  mark_as_advanced(SPMOE_GTEST_SOURCES)
  if(NOT SPMOE_GTEST_SOURCES)
    message(STATUS "GoogleTest: not installed, and no `pip install ros-gtest-vendor`; downloading")
    include(FetchContent)
    FetchContent_Declare(
      googletest
      URL https://github.com/google/googletest/releases/download/v1.15.2/googletest-1.15.2.tar.gz
      URL_HASH SHA256=7b42b4d6ed48810c5362c265a17faebe90dc2373c885e5216439d37927f02926
      SOURCE_SUBDIR none # its own build is not run
    )
    FetchContent_MakeAvailable(googletest)
    set(SPMOE_GTEST_SOURCES ${googletest_SOURCE_DIR}/googletest)
  endif()
  foreach(target gtest-all gtest_main)
    add_library(spmoe_${target} STATIC ${SPMOE_GTEST_SOURCES}/src/${target}.cc)
    target_include_directories(spmoe_${target} SYSTEM PUBLIC ${SPMOE_GTEST_SOURCES}/include
                               PRIVATE ${SPMOE_GTEST_SOURCES})
    target_compile_options(spmoe_${target} PRIVATE $<$<CXX_COMPILER_ID:GNU,Clang>:-O0>)
    target_link_libraries(spmoe_${target} PUBLIC Threads::Threads)
  endforeach()
  target_link_libraries(spmoe_gtest_main PUBLIC spmoe_gtest-all)
  add_library(GTest::gtest ALIAS spmoe_gtest-all)
  add_library(GTest::gtest_main ALIAS spmoe_gtest_main)
  message(STATUS "GoogleTest: built from ${SPMOE_GTEST_SOURCES}")
else()
  message(STATUS "GoogleTest: installed, ${GTest_DIR}")
endif()
