// expect: m2lm::MlpProjector<Depth>: at least one layer
#include <m2lm/parts/projectors/mlp_projector.hpp>

#if defined(M2LM_MUST_FAIL)
using Projector = m2lm::MlpProjector<0>;
#else
using Projector = m2lm::MlpProjector<1>;
#endif

Projector projector;
