# m2lm::cuda: m2lm::compiled and what a program with CUDA links. Included where m2lm::compiled is.
#
# m2lm_instantiate(target ALIAS HEADER [TRAINING])
#   Adds the model ALIAS (such as my::Vlm, a Model on Cuda), which HEADER declares, to the target: its kernels in a generated .cu, and
#   its members in a generated .cpp, if HEADER says M2LM_EXTERN_MODEL(template arguments) at global scope: then the target's files do
#   not compile them again. nvcc sees the .cu alone. TRAINING adds the kernels of backward passes. (The members are not in the
#   .cu: cicc of CUDA 13.0.88 aborts without a word on an explicit instantiation of a Model beside the kernels.)
#   HEADER is a path, relative to the current source directory, or what stands between <> in an #include. The project has CUDA among
#   its languages.
find_package(CUDAToolkit REQUIRED)
if(NOT TARGET m2lm_cuda)
  add_library(m2lm_cuda INTERFACE)
  add_library(m2lm::cuda ALIAS m2lm_cuda)
  target_link_libraries(m2lm_cuda INTERFACE m2lm::compiled CUDA::cudart CUDA::cublasLt)
  # cxx_std_20 speaks of C++ only, and CMake 3.25 knows no cuda_std_20 of nvcc 13.
  target_compile_options(m2lm_cuda INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
endif()

function(m2lm_instantiate target alias header)
  get_property(languages GLOBAL PROPERTY ENABLED_LANGUAGES)
  if(NOT "CUDA" IN_LIST languages)
    message(FATAL_ERROR "m2lm_instantiate(${target} ${alias} ${header}) needs nvcc: project(... LANGUAGES CXX CUDA), or enable_language(CUDA). "
      "An nvcc that is not in PATH is named by CMAKE_CUDA_COMPILER or the environment variable CUDACXX")
  endif()
  cmake_path(ABSOLUTE_PATH header BASE_DIRECTORY "${CMAKE_CURRENT_SOURCE_DIR}" NORMALIZE OUTPUT_VARIABLE path)
  if(EXISTS "${path}")
    set(header "\"${path}\"")
  else()
    set(header "<${header}>")
  endif()
  set(training_kernels "")
  if("TRAINING" IN_LIST ARGN)
    set(training_kernels "template struct m2lm::cuda::TrainingKernelsOf<${alias}::Backend::Element>;")
  endif()
  string(MAKE_C_IDENTIFIER "${target}_${alias}" name)
  foreach(suffix IN ITEMS cu cpp)
    set(unit "${CMAKE_CURRENT_BINARY_DIR}/m2lm_instantiate/${name}.${suffix}")
    configure_file("${CMAKE_CURRENT_FUNCTION_LIST_DIR}/m2lmInstantiate.${suffix}.in" "${unit}" @ONLY)
    target_sources(${target} PRIVATE "${unit}")
  endforeach()
  target_link_libraries(${target} PUBLIC m2lm::cuda)
endfunction()
