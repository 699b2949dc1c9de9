include(CMakeFindDependencyMacro)
find_dependency(m2lm COMPONENTS core)
include("${CMAKE_CURRENT_LIST_DIR}/wrapperTargets.cmake")
