# Everything goes to include/m2lm and share: the package is the same for every architecture.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(M2LM_INSTALL_CMAKEDIR "${CMAKE_INSTALL_DATADIR}/cmake/m2lm" CACHE STRING "Where the CMake package files are installed")
mark_as_advanced(M2LM_INSTALL_CMAKEDIR)

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/m2lm" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
  COMPONENT m2lm_Development FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh")

# Two export sets, so that a user of the core needs only the core's libraries.
install(TARGETS m2lm_core EXPORT m2lmCoreTargets INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(TARGETS m2lm EXPORT m2lmTargets)
foreach(set IN ITEMS m2lmCoreTargets m2lmTargets)
  install(EXPORT ${set} NAMESPACE m2lm:: DESTINATION "${M2LM_INSTALL_CMAKEDIR}" COMPONENT m2lm_Development)
endforeach()

write_basic_package_version_file("${PROJECT_BINARY_DIR}/m2lmConfigVersion.cmake" VERSION "${PROJECT_VERSION}"
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES
  "${PROJECT_BINARY_DIR}/m2lmConfigVersion.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/m2lmConfig.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/m2lmCompiled.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/compiled.cpp"
  "${PROJECT_SOURCE_DIR}/cmake/m2lmCuda.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/m2lmInstantiate.cpp.in"
  "${PROJECT_SOURCE_DIR}/cmake/m2lmInstantiate.cu.in"
  "${PROJECT_SOURCE_DIR}/cmake/FindSentencePiece.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/FindStb.cmake"
  DESTINATION "${M2LM_INSTALL_CMAKEDIR}" COMPONENT m2lm_Development)
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DATADIR}/licenses/m2lm" COMPONENT m2lm_Development)
