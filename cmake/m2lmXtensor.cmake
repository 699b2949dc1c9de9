# m2lm::xtensor: m2lm::m2lm and xtensor, for <m2lm/xtensor.hpp>. Included where xtensor has been found.
if(NOT TARGET m2lm_xtensor)
  add_library(m2lm_xtensor INTERFACE)
  add_library(m2lm::xtensor ALIAS m2lm_xtensor)
  target_link_libraries(m2lm_xtensor INTERFACE m2lm::m2lm xtensor)
endif()
