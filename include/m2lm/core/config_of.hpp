// ConfigOf: the run-time values that a component reads from config.json, if it has any.
// Floor: core. May include: config, core.
#pragma once

#include <m2lm/config.hpp>

namespace m2lm::inline M2LM_ABI {

/// The config of components that have none.
struct NoConfig {};
/// Nothing is read for them.
template <class Root>
void read_config(const Root&, NoConfig&) {}

namespace detail {

template <class Component>
struct ConfigOf {
  using type = NoConfig;
};
template <class Component>
  requires requires { typename Component::Config; }
struct ConfigOf<Component> {
  using type = typename Component::Config;
};

}  // namespace detail

/// `Component::Config`, or NoConfig. It is filled by read_config(root, config), found by argument-dependent lookup.
template <class Component>
using ConfigOf = typename detail::ConfigOf<Component>::type;

}  // namespace m2lm
