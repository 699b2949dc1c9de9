// The one place that includes stb: stb_image and stb_image_write with internal linkage, in a namespace of their own.
// Floor: interop. May include: core.
#pragma once

#include <m2lm/config.hpp>

// Everything stb includes, so that inside the namespace its own #include lines find nothing left to do.
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if M2LM_X86_64
#include <emmintrin.h>
#endif

// A user's own stb, included before or after this file, keeps its settings and stays apart: the guards and the linkage macros are
// put aside, the functions lie in m2lm::detail::stb. Only formats with a signature are read: TGA has none, so that any bytes might
// be taken for one; HDR, PIC and PSD are not what people show to a model, and PNM is read by io/image.hpp itself.
#pragma push_macro("STBI_INCLUDE_STB_IMAGE_H")
#pragma push_macro("STB_IMAGE_IMPLEMENTATION")
#pragma push_macro("STB_IMAGE_STATIC")
#pragma push_macro("STBIDEF")
#pragma push_macro("STBI_ASSERT")
#pragma push_macro("STBI_NO_STDIO")
#pragma push_macro("STBI_NO_HDR")
#pragma push_macro("STBI_NO_LINEAR")
#pragma push_macro("STBI_NO_TGA")
#pragma push_macro("STBI_NO_PIC")
#pragma push_macro("STBI_NO_PSD")
#pragma push_macro("STBI_NO_PNM")
#pragma push_macro("INCLUDE_STB_IMAGE_WRITE_H")
#pragma push_macro("STB_IMAGE_WRITE_IMPLEMENTATION")
#pragma push_macro("STB_IMAGE_WRITE_STATIC")
#pragma push_macro("STBIWDEF")
#pragma push_macro("STBIW_ASSERT")
#pragma push_macro("STBI_WRITE_NO_STDIO")
#undef STBI_INCLUDE_STB_IMAGE_H
#undef STBIDEF
#undef STBI_ASSERT
#undef INCLUDE_STB_IMAGE_WRITE_H
#undef STBIWDEF
#undef STBIW_ASSERT
#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ASSERT(condition) static_cast<void>(condition)
#define STBI_NO_STDIO
#define STBI_NO_HDR
#define STBI_NO_LINEAR
#define STBI_NO_TGA
#define STBI_NO_PIC
#define STBI_NO_PSD
#define STBI_NO_PNM
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_IMAGE_WRITE_STATIC
#define STBIW_ASSERT(condition) static_cast<void>(condition)
#define STBI_WRITE_NO_STDIO

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wunknown-warning-option"
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wunused-but-set-variable"
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#pragma GCC diagnostic ignored "-Wimplicit-fallthrough"
#pragma GCC diagnostic ignored "-Wold-style-cast"
#pragma GCC diagnostic ignored "-Wcast-qual"
#pragma GCC diagnostic ignored "-Wcast-align"
#pragma GCC diagnostic ignored "-Wdouble-promotion"
#pragma GCC diagnostic ignored "-Wuseless-cast"
#pragma GCC diagnostic ignored "-Wzero-as-null-pointer-constant"
#pragma GCC diagnostic ignored "-Wextra-semi"
#pragma GCC diagnostic ignored "-Wnull-dereference"
#pragma GCC diagnostic ignored "-Wduplicated-branches"
#pragma GCC diagnostic ignored "-Wmissing-declarations"
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
#pragma GCC diagnostic ignored "-Wtautological-compare"

namespace m2lm::detail::stb {

// An empty IDAT chunk of a PNG makes stb copy no bytes to a null pointer, which C++ does not allow. The name without a namespace
// finds this function first.
inline void*(memcpy)(void* to, const void* from, std::size_t n) { return n ? std::memcpy(to, from, n) : to; }

#include <stb_image.h>
#include <stb_image_write.h>

}  // namespace m2lm::detail::stb

#pragma GCC diagnostic pop

#pragma pop_macro("STBI_INCLUDE_STB_IMAGE_H")
#pragma pop_macro("STB_IMAGE_IMPLEMENTATION")
#pragma pop_macro("STB_IMAGE_STATIC")
#pragma pop_macro("STBIDEF")
#pragma pop_macro("STBI_ASSERT")
#pragma pop_macro("STBI_NO_STDIO")
#pragma pop_macro("STBI_NO_HDR")
#pragma pop_macro("STBI_NO_LINEAR")
#pragma pop_macro("STBI_NO_TGA")
#pragma pop_macro("STBI_NO_PIC")
#pragma pop_macro("STBI_NO_PSD")
#pragma pop_macro("STBI_NO_PNM")
#pragma pop_macro("INCLUDE_STB_IMAGE_WRITE_H")
#pragma pop_macro("STB_IMAGE_WRITE_IMPLEMENTATION")
#pragma pop_macro("STB_IMAGE_WRITE_STATIC")
#pragma pop_macro("STBIWDEF")
#pragma pop_macro("STBIW_ASSERT")
#pragma pop_macro("STBI_WRITE_NO_STDIO")
