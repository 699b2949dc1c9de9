// Prompt: text or token ids, and what is attached to its placeholders.
// Floor: models. May include: core, ops, layers, parts, io, sampling.
#pragma once

#include <m2lm/core/policy.hpp>
#include <m2lm/core/tensor.hpp>

#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

namespace m2lm::inline M2LM_ABI {

namespace detail {

/// Index of the component called Name; sizeof...(C) if there is none.
template <FixedString Name, class... C>
consteval std::size_t component_index() {
  std::size_t i = 0, found = sizeof...(C);
  (((C::name == Name) ? (found = i, ++i) : ++i), ...);
  return found;
}

}  // namespace detail

/// A value that stands for a component's Input without being one: Prompt::attach and Model::encode make it one by
/// to_input(InputTag<Input>, value), found by argument-dependent lookup. <m2lm/xtensor.hpp> has it for pictures.
template <class Input>
struct InputTag {};

namespace detail {

template <class Value, class Input>
concept StandsForInput = requires(Value& value) { { to_input(InputTag<Input>{}, value) } -> std::convertible_to<Input>; };

}  // namespace detail

/// How a prompt's text becomes tokens.
enum class PromptForm : std::uint8_t {
  chat,  ///< the text is a user's turn; the checkpoint's chat template goes around it
  raw,   ///< the text is used as it is, after the beginning-of-sequence token
  ids,   ///< token ids are given, nothing is added
};

/// What one call of generate, logits or hidden_states works on. Made by Model::prompt. Each "<name>" in the text stands for one
/// attached instance of that component, in order; any number of instances, in any order of components.
template <class... C>
struct Prompt {
  PromptForm form = PromptForm::chat;
  std::string text;
  std::vector<std::int32_t> ids;   ///< form ids: a placeholder's id stands once per instance, or once per row of the instance
  std::string template_name;       ///< instead of the checkpoint's template; empty = the checkpoint's
  std::string system;              ///< system message of a chat; empty = the template's default
  /// Per component: inputs, or embeddings [tokens, hidden] that take the place of an encoder's output.
  std::tuple<std::vector<std::variant<typename C::Input, AnyTensor>>...> attachments;

  /// Attaches an input for the next placeholder of the component, or what stands for one (see InputTag).
  template <FixedString Name>
  Prompt& attach(auto input) {
    constexpr std::size_t index = detail::component_index<Name, C...>();
    static_assert(index < sizeof...(C), "m2lm::Prompt::attach<name>: this model has no component of that name");
    if constexpr (index < sizeof...(C)) {
      using Input = typename std::tuple_element_t<index, std::tuple<C...>>::Input;
      if constexpr (detail::StandsForInput<decltype(input), Input>)
        std::get<index>(attachments).emplace_back(std::in_place_index<0>, to_input(InputTag<Input>{}, input));
      else
        std::get<index>(attachments).emplace_back(std::in_place_index<0>, std::move(input));
    }
    return *this;
  }
  /// Attaches embeddings [tokens, hidden] instead of an input.
  template <FixedString Name>
  Prompt& attach_embeddings(AnyTensor embeddings) {
    constexpr std::size_t index = detail::component_index<Name, C...>();
    static_assert(index < sizeof...(C), "m2lm::Prompt::attach_embeddings<name>: this model has no component of that name");
    if constexpr (index < sizeof...(C)) std::get<index>(attachments).emplace_back(std::in_place_index<1>, std::move(embeddings));
    return *this;
  }
};

}  // namespace m2lm
