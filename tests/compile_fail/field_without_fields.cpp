// expect: m2lm: a listed field is a Parameter, a struct with `fields`, or a vector of such structs
#include <m2lm/core/fields.hpp>

#if defined(M2LM_MUST_FAIL)
using Scale = float;
#else
using Scale = m2lm::Parameter;
#endif

struct Layer {
  Scale scale{};

  template <class V, class Self>
  static void fields(V&& visit, Self& self) {
    visit("scale", self.scale);
  }
};

void walk(Layer& layer) {
  m2lm::for_each_parameter([](std::string_view, auto&) {}, layer);
}
