# The stb headers, included as <stb_image.h>: Debian keeps them in include/stb, vcpkg and Conan in include itself.
# Result: Stb_FOUND, the target Stb::Stb, the cache entry Stb_INCLUDE_DIR.
# Header only: Debian's libstb.so is not linked, the implementation is compiled where the library uses it.
find_path(Stb_INCLUDE_DIR stb_image.h PATH_SUFFIXES stb DOC "Directory of stb_image.h")
mark_as_advanced(Stb_INCLUDE_DIR)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Stb REQUIRED_VARS Stb_INCLUDE_DIR)

if(Stb_FOUND AND NOT TARGET Stb::Stb)
  add_library(Stb::Stb INTERFACE IMPORTED)
  set_target_properties(Stb::Stb PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${Stb_INCLUDE_DIR}")
endif()
