# As an overlay port beside the sources it packages those: vcpkg install --overlay-ports=cmake/vcpkg/ports m2lm
get_filename_component(SOURCE_PATH "${CURRENT_PORT_DIR}/../../../.." ABSOLUTE)
set(VCPKG_BUILD_TYPE release) # headers, and programs if asked for: nothing differs in a debug build

# The package finds what a component needs when a project asks for it, so that the headers are the same with every feature: `xtensor` and
# `cuda` bring libraries, and change nothing here.
vcpkg_check_features(OUT_FEATURE_OPTIONS FEATURE_OPTIONS
  FEATURES
    tools M2LM_PROGRAMS)
vcpkg_cmake_configure(SOURCE_PATH "${SOURCE_PATH}" OPTIONS ${FEATURE_OPTIONS})
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(CONFIG_PATH share/cmake/m2lm)

# stb and sentencepiece bring no .pc files in vcpkg, so that only the core's can be resolved.
file(REMOVE "${CURRENT_PACKAGES_DIR}/share/pkgconfig/m2lm.pc")
vcpkg_fixup_pkgconfig()

file(GLOB programs RELATIVE "${CURRENT_PACKAGES_DIR}/bin" "${CURRENT_PACKAGES_DIR}/bin/m2lm-*")
if(programs)
  vcpkg_copy_tools(TOOL_NAMES ${programs} AUTO_CLEAN)
endif()
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/share/licenses")
file(INSTALL "${CURRENT_PORT_DIR}/usage" DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
