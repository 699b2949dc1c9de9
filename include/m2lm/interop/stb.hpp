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
// put aside, the functions lie in m2lm::detail::stb and begin with m2lm_. Only formats with a signature are read: TGA has none, so that any bytes might
// be taken for one; HDR, PIC and PSD are not what people show to a model, and PNM is read by io/image.hpp itself.
#pragma push_macro("STBI_INCLUDE_STB_IMAGE_H")
#pragma push_macro("STB_IMAGE_IMPLEMENTATION")
#pragma push_macro("STB_IMAGE_STATIC")
#pragma push_macro("STBIDEF")
#pragma push_macro("STBI_ASSERT")
#pragma push_macro("STBI_MALLOC")
#pragma push_macro("STBI_REALLOC")
#pragma push_macro("STBI_REALLOC_SIZED")
#pragma push_macro("STBI_FREE")
#pragma push_macro("STBI_NO_STDIO")
#pragma push_macro("STBI_NO_HDR")
#pragma push_macro("STBI_NO_LINEAR")
#pragma push_macro("STBI_NO_TGA")
#pragma push_macro("STBI_NO_PIC")
#pragma push_macro("STBI_NO_PSD")
#pragma push_macro("STBI_NO_PNM")
#pragma push_macro("stbi__err")
#pragma push_macro("stbi__errpf")
#pragma push_macro("stbi__errpuc")
#pragma push_macro("INCLUDE_STB_IMAGE_WRITE_H")
#pragma push_macro("STB_IMAGE_WRITE_IMPLEMENTATION")
#pragma push_macro("STB_IMAGE_WRITE_STATIC")
#pragma push_macro("STBIWDEF")
#pragma push_macro("STBIW_ASSERT")
#pragma push_macro("STBI_WRITE_NO_STDIO")
#undef STBI_INCLUDE_STB_IMAGE_H
#undef STBIDEF
#undef stbi__err
#undef stbi__errpf
#undef stbi__errpuc
#undef STBI_ASSERT
#undef STBI_MALLOC
#undef STBI_REALLOC
#undef STBI_REALLOC_SIZED
#undef STBI_FREE
#undef INCLUDE_STB_IMAGE_WRITE_H
#undef STBIWDEF
#undef STBIW_ASSERT
#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ASSERT(condition) static_cast<void>(condition)
// A JPEG may use a Huffman table that it never defines. stb_image before 2.28 then decodes with what the memory held before, and reads
// outside its tables; zeros are a table.
#define STBI_MALLOC(size) m2lm::detail::stb::noted(std::calloc(1, size))
#define STBI_REALLOC(pointer, size) m2lm::detail::stb::noted(std::realloc(pointer, size))
#define STBI_FREE(pointer) std::free(pointer)
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

// stb_image declares its functions extern "C", which a namespace does not keep apart in the object file.
#define stbi_convert_iphone_png_to_rgb m2lm_stbi_convert_iphone_png_to_rgb
#define stbi_convert_iphone_png_to_rgb_thread m2lm_stbi_convert_iphone_png_to_rgb_thread
#define stbi_failure_reason m2lm_stbi_failure_reason
#define stbi_hdr_to_ldr_gamma m2lm_stbi_hdr_to_ldr_gamma
#define stbi_hdr_to_ldr_scale m2lm_stbi_hdr_to_ldr_scale
#define stbi_image_free m2lm_stbi_image_free
#define stbi_info_from_callbacks m2lm_stbi_info_from_callbacks
#define stbi_info_from_memory m2lm_stbi_info_from_memory
#define stbi_is_16_bit_from_callbacks m2lm_stbi_is_16_bit_from_callbacks
#define stbi_is_16_bit_from_memory m2lm_stbi_is_16_bit_from_memory
#define stbi_is_hdr_from_callbacks m2lm_stbi_is_hdr_from_callbacks
#define stbi_is_hdr_from_memory m2lm_stbi_is_hdr_from_memory
#define stbi_ldr_to_hdr_gamma m2lm_stbi_ldr_to_hdr_gamma
#define stbi_ldr_to_hdr_scale m2lm_stbi_ldr_to_hdr_scale
#define stbi_load_16_from_callbacks m2lm_stbi_load_16_from_callbacks
#define stbi_load_16_from_memory m2lm_stbi_load_16_from_memory
#define stbi_load_from_callbacks m2lm_stbi_load_from_callbacks
#define stbi_load_from_memory m2lm_stbi_load_from_memory
#define stbi_load_gif_from_memory m2lm_stbi_load_gif_from_memory
#define stbi_set_flip_vertically_on_load m2lm_stbi_set_flip_vertically_on_load
#define stbi_set_flip_vertically_on_load_thread m2lm_stbi_set_flip_vertically_on_load_thread
#define stbi_set_unpremultiply_on_load m2lm_stbi_set_unpremultiply_on_load
#define stbi_set_unpremultiply_on_load_thread m2lm_stbi_set_unpremultiply_on_load_thread
#define stbi_zlib_decode_buffer m2lm_stbi_zlib_decode_buffer
#define stbi_zlib_decode_malloc m2lm_stbi_zlib_decode_malloc
#define stbi_zlib_decode_malloc_guesssize m2lm_stbi_zlib_decode_malloc_guesssize
#define stbi_zlib_decode_malloc_guesssize_headerflag m2lm_stbi_zlib_decode_malloc_guesssize_headerflag
#define stbi_zlib_decode_noheader_buffer m2lm_stbi_zlib_decode_noheader_buffer
#define stbi_zlib_decode_noheader_malloc m2lm_stbi_zlib_decode_noheader_malloc

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

namespace m2lm::inline M2LM_ABI::detail::stb {

// stb does not always say that memory was short: this does, until it is set back.
inline thread_local bool out_of_memory = false;
inline void* noted(void* allocated) {
  if (allocated == nullptr) out_of_memory = true;
  return allocated;
}

// An empty IDAT chunk of a PNG makes stb copy no bytes to a null pointer, which C++ does not allow. The name without a namespace
// finds this function first.
inline void*(memcpy)(void* to, const void* from, std::size_t n) { return n ? std::memcpy(to, from, n) : to; }

#include <stb_image.h>
#include <stb_image_write.h>

}  // namespace m2lm::detail::stb

#pragma GCC diagnostic pop

#undef stbi_convert_iphone_png_to_rgb
#undef stbi_convert_iphone_png_to_rgb_thread
#undef stbi_failure_reason
#undef stbi_hdr_to_ldr_gamma
#undef stbi_hdr_to_ldr_scale
#undef stbi_image_free
#undef stbi_info_from_callbacks
#undef stbi_info_from_memory
#undef stbi_is_16_bit_from_callbacks
#undef stbi_is_16_bit_from_memory
#undef stbi_is_hdr_from_callbacks
#undef stbi_is_hdr_from_memory
#undef stbi_ldr_to_hdr_gamma
#undef stbi_ldr_to_hdr_scale
#undef stbi_load_16_from_callbacks
#undef stbi_load_16_from_memory
#undef stbi_load_from_callbacks
#undef stbi_load_from_memory
#undef stbi_load_gif_from_memory
#undef stbi_set_flip_vertically_on_load
#undef stbi_set_flip_vertically_on_load_thread
#undef stbi_set_unpremultiply_on_load
#undef stbi_set_unpremultiply_on_load_thread
#undef stbi_zlib_decode_buffer
#undef stbi_zlib_decode_malloc
#undef stbi_zlib_decode_malloc_guesssize
#undef stbi_zlib_decode_malloc_guesssize_headerflag
#undef stbi_zlib_decode_noheader_buffer
#undef stbi_zlib_decode_noheader_malloc

#pragma pop_macro("STBI_INCLUDE_STB_IMAGE_H")
#pragma pop_macro("STB_IMAGE_IMPLEMENTATION")
#pragma pop_macro("STB_IMAGE_STATIC")
#pragma pop_macro("STBIDEF")
#pragma pop_macro("STBI_ASSERT")
#pragma pop_macro("STBI_MALLOC")
#pragma pop_macro("STBI_REALLOC")
#pragma pop_macro("STBI_REALLOC_SIZED")
#pragma pop_macro("STBI_FREE")
#pragma pop_macro("STBI_NO_STDIO")
#pragma pop_macro("STBI_NO_HDR")
#pragma pop_macro("STBI_NO_LINEAR")
#pragma pop_macro("STBI_NO_TGA")
#pragma pop_macro("STBI_NO_PIC")
#pragma pop_macro("STBI_NO_PSD")
#pragma pop_macro("STBI_NO_PNM")
#pragma pop_macro("stbi__err")
#pragma pop_macro("stbi__errpf")
#pragma pop_macro("stbi__errpuc")
#pragma pop_macro("INCLUDE_STB_IMAGE_WRITE_H")
#pragma pop_macro("STB_IMAGE_WRITE_IMPLEMENTATION")
#pragma pop_macro("STB_IMAGE_WRITE_STATIC")
#pragma pop_macro("STBIWDEF")
#pragma pop_macro("STBIW_ASSERT")
#pragma pop_macro("STBI_WRITE_NO_STDIO")
