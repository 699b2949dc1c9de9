# Everything goes to include/m2lm and share: the package is the same for every architecture.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(M2LM_INSTALL_CMAKEDIR "${CMAKE_INSTALL_DATADIR}/cmake/m2lm" CACHE STRING "Where the CMake package files are installed")
mark_as_advanced(M2LM_INSTALL_CMAKEDIR)

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/m2lm" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
  COMPONENT m2lm_Development FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh")

# Two export sets, so that a user of the core needs only the core's libraries. The build tree is a package too: -Dm2lm_DIR=BUILD/package.
set(m2lm_build_package "${PROJECT_BINARY_DIR}/package")
install(TARGETS m2lm_core EXPORT m2lmCoreTargets INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(TARGETS m2lm EXPORT m2lmTargets)
foreach(set IN ITEMS m2lmCoreTargets m2lmTargets)
  install(EXPORT ${set} NAMESPACE m2lm:: DESTINATION "${M2LM_INSTALL_CMAKEDIR}" COMPONENT m2lm_Development)
  export(EXPORT ${set} NAMESPACE m2lm:: FILE "${m2lm_build_package}/${set}.cmake")
endforeach()

write_basic_package_version_file("${m2lm_build_package}/m2lmConfigVersion.cmake" VERSION "${PROJECT_VERSION}"
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
foreach(file IN ITEMS m2lmConfig.cmake m2lmCompiled.cmake compiled.cpp m2lmCuda.cmake m2lmInstantiate.cpp.in m2lmInstantiate.cu.in
                      m2lmXtensor.cmake FindSentencePiece.cmake FindStb.cmake)
  configure_file("${PROJECT_SOURCE_DIR}/cmake/${file}" "${m2lm_build_package}/${file}" COPYONLY)
  install(FILES "${PROJECT_SOURCE_DIR}/cmake/${file}" DESTINATION "${M2LM_INSTALL_CMAKEDIR}" COMPONENT m2lm_Development)
endforeach()
install(FILES "${m2lm_build_package}/m2lmConfigVersion.cmake" DESTINATION "${M2LM_INSTALL_CMAKEDIR}" COMPONENT m2lm_Development)

# For builds without CMake. A .pc file finds its prefix from its own place.
file(RELATIVE_PATH m2lm_prefix_of_pc "/${CMAKE_INSTALL_DATADIR}/pkgconfig" "/")
string(REGEX REPLACE "/$" "" m2lm_prefix_of_pc "${m2lm_prefix_of_pc}")
foreach(name IN ITEMS m2lm-core m2lm)
  configure_file("${PROJECT_SOURCE_DIR}/cmake/${name}.pc.in" "${PROJECT_BINARY_DIR}/${name}.pc" @ONLY)
  install(FILES "${PROJECT_BINARY_DIR}/${name}.pc" DESTINATION "${CMAKE_INSTALL_DATADIR}/pkgconfig" COMPONENT m2lm_Development)
endforeach()
install(FILES "${PROJECT_SOURCE_DIR}/tools/m2lm_gdb.py" DESTINATION "${CMAKE_INSTALL_DATADIR}/m2lm" COMPONENT m2lm_Development)
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DATADIR}/licenses/m2lm" COMPONENT m2lm_Development)

# cpack -G TGZ: an archive that is a prefix. cpack -G DEB: the same below /usr, for Debian and Ubuntu.
if(PROJECT_IS_TOP_LEVEL)
  set(CPACK_GENERATOR TGZ)
  set(CPACK_PACKAGE_FILE_NAME "m2lm-${PROJECT_VERSION}")
  set(CPACK_PACKAGE_CONTACT "the m2lm project")
  set(CPACK_DEBIAN_PACKAGE_NAME libm2lm-dev)
  set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
  set(CPACK_DEBIAN_PACKAGE_SECTION libdevel)
  set(CPACK_DEBIAN_PACKAGE_DEPENDS "libeigen3-dev (>= 3.4), nlohmann-json3-dev (>= 3.10), libsentencepiece-dev, libstb-dev")
  set(CPACK_DEBIAN_PACKAGE_SUGGESTS "libxtensor-dev (>= 0.24)")
  if(NOT M2LM_PROGRAMS)
    set(CPACK_DEBIAN_PACKAGE_ARCHITECTURE all)
  endif()
  set(CPACK_RESOURCE_FILE_LICENSE "${PROJECT_SOURCE_DIR}/LICENSE")
  set(CPACK_VERBATIM_VARIABLES ON)
  include(CPack)
endif()
