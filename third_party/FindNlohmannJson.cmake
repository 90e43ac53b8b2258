# The header-only JSON library, from the system (nlohmann-json3-dev) or from the Python package
# nlohmann_json, which is how a wheel is built without system packages.
find_path(NlohmannJson_INCLUDE_DIR nlohmann/json.hpp
          PATH_SUFFIXES include nlohmann_json/include)
if(NOT NlohmannJson_INCLUDE_DIR)
  find_package(Python QUIET COMPONENTS Interpreter)
  if(Python_FOUND)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
              "import pathlib, nlohmann_json; print(pathlib.Path(nlohmann_json.__file__).parent)"
      OUTPUT_VARIABLE package ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    find_path(NlohmannJson_PACKAGE_DIR nlohmann/json.hpp PATHS ${package}/include)
    if(NlohmannJson_PACKAGE_DIR)
      # The folder of pip's build environment has another name each time; ccache needs one that stays.
      set(NlohmannJson_INCLUDE_DIR ${CMAKE_CURRENT_BINARY_DIR}/nlohmann_json)
      file(CREATE_LINK ${NlohmannJson_PACKAGE_DIR} ${NlohmannJson_INCLUDE_DIR} SYMBOLIC)
    endif()
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  NlohmannJson
  REQUIRED_VARS NlohmannJson_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "install nlohmann-json3-dev, or `pip install nlohmann_json`")
if(NlohmannJson_FOUND AND NOT TARGET nlohmann_json::nlohmann_json)
  add_library(nlohmann_json::nlohmann_json INTERFACE IMPORTED GLOBAL)
  target_include_directories(nlohmann_json::nlohmann_json
                             SYSTEM INTERFACE ${NlohmannJson_INCLUDE_DIR})
endif()
mark_as_advanced(NlohmannJson_INCLUDE_DIR)
