// The faults that -DM2LM_PLANT_FAULT=n plants: each is a mistake that is easy to make, and a test must notice every one.
// Floor: testing. May include: config, core, ops, backends, layers, parts, io, sampling, models, train.
#pragma once

#include <m2lm/config.hpp>

#include <array>
#include <cstdint>
#include <string_view>

namespace m2lm::inline M2LM_ABI::testing {

/// The number is what M2LM_FAULT(n) in the library asks for. tests/faults/faults.json names the program that catches each.
enum class Fault : std::uint8_t {
  bicubic_without_antialiasing = 1,
  mean_and_std_in_bgr_order = 2,
  crop_off_by_one = 3,
  bf16_read_as_f16 = 4,
  space_before_text_behind_added_token = 5,
  resize_without_rounding = 6,
  pad_to_square_at_the_corner = 7,
  bytes_shown_before_their_character_is_whole = 8,
  longer_edge_rounded_up = 9,
  top_p_drops_the_crossing_token = 10,
  repetition_penalty_only_divides = 11,
  temperature_multiplies = 12,
  min_p_is_absolute = 13,
  stop_string_not_held_back = 14,
  turn_not_ended = 15,
  last_k_block_dropped = 16,
  softmax_not_rescaled = 17,
  wrong_gqa_head = 18,
  causal_mask_off_by_one = 19,
  rope_position_always_first = 20,
  stale_kv_row = 21,
  cls_kept_and_patch_dropped = 22,
  rope_halves_swapped = 23,
  llama3_rope_scaling_ignored = 24,
  feature_layer_off_by_one = 25,
  final_norm_skipped = 26,
  own_head_replaced_by_the_embedding_table = 27,
  second_picture_gets_features_of_the_first = 28,
  sliding_window_off_by_one = 29,
  projector_with_tanh_gelu = 30,
  last_token_of_the_answer_forgotten = 31,
  attention_scale_without_root = 32,
  rope_gradient_turned_forwards = 33,
  softmax_gradient_without_its_mean = 34,
  key_gradient_of_one_head_of_a_group = 35,
  norm_gradient_with_a_fixed_scale = 36,
  gated_gradient_without_activation = 37,
  residual_gradient_dropped = 38,
  ignored_target_has_a_gradient = 39,
  decay_through_the_gradient = 40,
  moments_without_bias_correction = 41,
  cpu_softmax_gradient_without_its_mean = 42,
  prompt_counts_in_the_loss = 43,
  cpu_layer_norm_gradient_not_centred = 44,
  gguf_rows_of_keys_ordered_as_queries = 45,
  gguf_high_nibble_ignored = 46,
  gguf_minimum_of_four_bits = 47,
  adapter_scale_left_out = 50,
  strides_of_a_pickled_tensor_ignored = 51,
  aspect_ratio_of_llava_ignored = 52,
  checksum_of_a_pickle_not_compared = 53,
  file_named_before_it_is_on_the_disk = 55,
  truncated_mapping_not_reported = 56,
  nan_weights_pass_the_check = 57,
  far_token_ids_take_memory = 58,
  links_lead_anywhere = 59,
  sink_ignored = 60,
  delimiter_left_out = 61,
  media_forgotten_after_the_prompt = 62,
  placeholders_taken_for_media = 63,
};

struct FaultNote {
  Fault fault;
  std::string_view area;         ///< where in include/m2lm it is planted
  std::string_view description;  ///< what goes wrong
};

inline constexpr auto fault_notes = std::to_array<FaultNote>({
    {Fault::bicubic_without_antialiasing, "io", "downscaling reads as few pixels as upscaling does"},
    {Fault::mean_and_std_in_bgr_order, "io", "red is normalised with blue's mean and deviation"},
    {Fault::crop_off_by_one, "io", "the middle of a picture is cut one pixel to the right and below"},
    {Fault::bf16_read_as_f16, "io", "BF16 tensors are decoded as F16"},
    {Fault::space_before_text_behind_added_token, "io", "the rule for a space before text that follows <image> is the other one"},
    {Fault::resize_without_rounding, "io", "fixed-point sums are cut, not rounded, to 8 bits"},
    {Fault::pad_to_square_at_the_corner, "io", "the picture lies in a corner of the square, not in its middle"},
    {Fault::bytes_shown_before_their_character_is_whole, "io", "a byte token is shown before its character is complete"},
    {Fault::longer_edge_rounded_up, "io", "the longer edge of a resized picture is rounded up instead of down"},
    {Fault::top_p_drops_the_crossing_token, "sampling", "the token with which the probability reaches top_p is removed"},
    {Fault::repetition_penalty_only_divides, "sampling", "negative logits are divided too, which makes repetition likelier"},
    {Fault::temperature_multiplies, "sampling", "logits are multiplied by the temperature"},
    {Fault::min_p_is_absolute, "sampling", "min_p is not relative to the most likely token"},
    {Fault::stop_string_not_held_back, "sampling", "the beginning of a stop string is shown"},
    {Fault::turn_not_ended, "models", "an answer is not closed before the next turn"},
    {Fault::last_k_block_dropped, "backends", "a product leaves out the last block of its sum"},
    {Fault::softmax_not_rescaled, "backends", "the online softmax does not rescale its output when the maximum grows"},
    {Fault::wrong_gqa_head, "backends", "a query head reads the key-value head of another group"},
    {Fault::causal_mask_off_by_one, "backends", "a token sees the one behind it"},
    {Fault::rope_position_always_first, "backends", "all rows are rotated as the first one"},
    {Fault::stale_kv_row, "backends", "a decode step overwrites the newest cached key instead of adding one"},
    {Fault::cls_kept_and_patch_dropped, "parts", "the CLS token is handed on and the last patch is not"},
    {Fault::rope_halves_swapped, "layers", "the halves of a head change roles in the rotation"},
    {Fault::llama3_rope_scaling_ignored, "layers", "llama3 frequencies are not scaled"},
    {Fault::feature_layer_off_by_one, "parts", "the encoder stops one layer early"},
    {Fault::final_norm_skipped, "models", "logits come from hidden states that are not normalised"},
    {Fault::own_head_replaced_by_the_embedding_table, "parts", "a checkpoint's own lm_head is not used"},
    {Fault::second_picture_gets_features_of_the_first, "models", "all placeholders get the first picture"},
    {Fault::sliding_window_off_by_one, "layers", "a window of W sees W + 1 keys"},
    {Fault::projector_with_tanh_gelu, "parts", "the projector uses the tanh approximation of gelu"},
    {Fault::last_token_of_the_answer_forgotten, "models", "a conversation goes on without the token chosen last"},
    {Fault::attention_scale_without_root, "layers", "scores are divided by head_dim instead of its square root"},
    {Fault::rope_gradient_turned_forwards, "backends", "the gradient of a rotation is rotated by the same angle again"},
    {Fault::softmax_gradient_without_its_mean, "backends", "the gradient of scores leaves out that probabilities sum to one"},
    {Fault::key_gradient_of_one_head_of_a_group, "backends", "keys and values get the gradient of one query head of their group"},
    {Fault::norm_gradient_with_a_fixed_scale, "backends", "rms_norm is differentiated as if its scale did not depend on x"},
    {Fault::gated_gradient_without_activation, "backends", "the gradient of `up` is multiplied by the gate before its activation"},
    {Fault::residual_gradient_dropped, "parts", "a block passes on the gradient of its MLP without that of the residual"},
    {Fault::ignored_target_has_a_gradient, "backends", "positions outside the loss get the gradient of a softmax"},
    {Fault::decay_through_the_gradient, "train", "weight decay goes through the gradient and the moments"},
    {Fault::moments_without_bias_correction, "train", "the first steps of AdamW are too long or too short"},
    {Fault::cpu_softmax_gradient_without_its_mean, "backends", "the gradient of a row of scores does not sum to zero"},
    {Fault::prompt_counts_in_the_loss, "train", "the tokens of the prompt are targets too"},
    {Fault::cpu_layer_norm_gradient_not_centred, "backends", "the gradient of LayerNorm forgets that the mean depends on x"},
    {Fault::gguf_rows_of_keys_ordered_as_queries, "io", "the interleaved rows of keys are told apart by the number of query heads"},
    {Fault::gguf_high_nibble_ignored, "io", "both values of a byte of Q4_1 come from its low half"},
    {Fault::gguf_minimum_of_four_bits, "io", "the 6-bit minimum of Q4_K loses its upper bits"},
    {Fault::adapter_scale_left_out, "models", "an adapter's update is added as it is, without alpha/r"},
    {Fault::strides_of_a_pickled_tensor_ignored, "io", "a transposed tensor of a PyTorch file is read as if it were not"},
    {Fault::aspect_ratio_of_llava_ignored, "models", "pictures are not padded to a square where LLaVA's config asks for it"},
    {Fault::checksum_of_a_pickle_not_compared, "io", "a damaged pickle in a zip archive is read"},
    {Fault::file_named_before_it_is_on_the_disk, "io", "a saved file gets its name before its bytes are flushed"},
    {Fault::truncated_mapping_not_reported, "io", "what was read of a file that was cut short counts as read"},
    {Fault::nan_weights_pass_the_check, "models", "the check of weights finds nothing"},
    {Fault::far_token_ids_take_memory, "io", "a token's id may be as far behind the vocabulary as it likes"},
    {Fault::links_lead_anywhere, "io", "symbolic links of a checkpoint are followed out of its directory"},
    {Fault::sink_ignored, "backends", "a softmax with a zero logit is computed without it"},
    {Fault::delimiter_left_out, "models", "the token behind an instance is left out"},
    {Fault::media_forgotten_after_the_prompt, "models", "hooks of the decoder see no media while an answer is generated"},
    {Fault::placeholders_taken_for_media, "models", "a session takes another picture for the one it holds"},
});

/// The note of fault `number`; null if there is no such fault.
constexpr const FaultNote* find_fault(int number) {
  for (const FaultNote& note : fault_notes)
    if (static_cast<int>(note.fault) == number) return &note;
  return nullptr;
}

}  // namespace m2lm::testing
