# m2lm::compiled: one translation unit, built by the project that links it, that holds the library's non-template
# definitions. Users of the target see declarations only (M2LM_SEPARATE_IMPL), so their files compile faster.
if(NOT TARGET m2lm_compiled)
  add_library(m2lm_compiled STATIC EXCLUDE_FROM_ALL "${CMAKE_CURRENT_LIST_DIR}/compiled.cpp")
  add_library(m2lm::compiled ALIAS m2lm_compiled)
  target_compile_definitions(m2lm_compiled PUBLIC M2LM_SEPARATE_IMPL=1)
  target_link_libraries(m2lm_compiled PUBLIC m2lm::m2lm)
endif()
