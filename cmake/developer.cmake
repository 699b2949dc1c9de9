# For those who work on the library: warnings, sanitizers, planted faults. Nothing here reaches a project that uses m2lm.
set(M2LM_SANITIZE "" CACHE STRING "Sanitizers of all developer targets: address,undefined or thread")
option(M2LM_FUZZ "Build the fuzz targets and nothing else (needs clang++)" OFF)
set(M2LM_PLANT_FAULT "" CACHE STRING "Number of a fault to plant in every developer target (see include/m2lm/testing/faults.hpp)")

set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE RelWithDebInfo)
endif()

# Programs and the model they bring stand as they will when installed: bin/ beside share/m2lm/.
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/bin")

find_program(M2LM_CCACHE ccache)
mark_as_advanced(M2LM_CCACHE)
if(M2LM_CCACHE AND NOT DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER "${M2LM_CCACHE}")
endif()

set(M2LM_STRICT_FLAGS -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror)

if(M2LM_SANITIZE)
  add_compile_options("-fsanitize=${M2LM_SANITIZE}" -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options("-fsanitize=${M2LM_SANITIZE}")
endif()
if(NOT M2LM_PLANT_FAULT STREQUAL "")
  add_compile_definitions("M2LM_PLANT_FAULT=${M2LM_PLANT_FAULT}")
endif()

# m2lm_strict(target...): the warnings that the library promises to be free of.
function(m2lm_strict)
  foreach(target IN LISTS ARGN)
    target_compile_options(${target} PRIVATE ${M2LM_STRICT_FLAGS})
  endforeach()
endfunction()

# Where tests find real checkpoints and recorded results that are too large for the repository.
if(DEFINED ENV{M2LM_ASSETS})
  set(M2LM_ASSETS "$ENV{M2LM_ASSETS}")
else()
  cmake_path(SET M2LM_ASSETS NORMALIZE "${PROJECT_SOURCE_DIR}/../shared/assets")
endif()

set(m2lm_asan_options strict_string_checks=1:allocator_may_return_null=1)
set(m2lm_test_environment
  "M2LM_ASSETS=${M2LM_ASSETS}"
  "M2LM_SOURCE_DIR=${PROJECT_SOURCE_DIR}"
  "M2LM_BIN_DIR=${PROJECT_BINARY_DIR}/bin"
  "ASAN_OPTIONS=${m2lm_asan_options}:detect_stack_use_after_return=1"
  "UBSAN_OPTIONS=print_stacktrace=1"
  "TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1")

include("${CMAKE_CURRENT_LIST_DIR}/developer_cuda.cmake")

# Where libbenchmark-dev is installed bench_ops is built, unless told otherwise; not where everything runs at a fraction of its speed.
set(m2lm_bench OFF)
if(NOT M2LM_SANITIZE AND NOT M2LM_FUZZ)
  find_package(benchmark QUIET)
  set(m2lm_bench "${benchmark_FOUND}")
endif()
option(M2LM_BENCH "Build bench_ops, the ops timed by Google Benchmark (libbenchmark-dev)" "${m2lm_bench}")

# m2lm_test_properties(test LABELS label... [PROPERTIES name value...]): what every test of the project has in common.
# Exit status 77 means skipped; ctest lists and counts such tests.
function(m2lm_test_properties test)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "LABELS;PROPERTIES")
  set_tests_properties(${test} PROPERTIES LABELS "${arg_LABELS}" ENVIRONMENT "${m2lm_test_environment}"
    SKIP_RETURN_CODE 77 TIMEOUT 900 ${arg_PROPERTIES})
endfunction()
