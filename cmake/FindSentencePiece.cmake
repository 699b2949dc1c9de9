# The sentencepiece tokenizer library, which brings no CMake package of its own.
# Result: SentencePiece_FOUND, the target SentencePiece::SentencePiece, the cache entries SentencePiece_INCLUDE_DIR and
# SentencePiece_LIBRARY. Only the processor is linked; its pkg-config file would add the trainer.
find_path(SentencePiece_INCLUDE_DIR sentencepiece_processor.h DOC "Directory of sentencepiece_processor.h")
find_library(SentencePiece_LIBRARY sentencepiece DOC "The sentencepiece library")
mark_as_advanced(SentencePiece_INCLUDE_DIR SentencePiece_LIBRARY)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(SentencePiece REQUIRED_VARS SentencePiece_LIBRARY SentencePiece_INCLUDE_DIR)

if(SentencePiece_FOUND AND NOT TARGET SentencePiece::SentencePiece)
  add_library(SentencePiece::SentencePiece UNKNOWN IMPORTED)
  set_target_properties(SentencePiece::SentencePiece PROPERTIES
    IMPORTED_LOCATION "${SentencePiece_LIBRARY}"
    INTERFACE_INCLUDE_DIRECTORIES "${SentencePiece_INCLUDE_DIR}")
endif()
