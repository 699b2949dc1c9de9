// expect: m2lm::Modality: the insertion is one of ExpandPlaceholder, PlaceholderRun, PrefixAfterBos<...> and DiscreteTokens<...>
#include <m2lm/m2lm.hpp>

struct AtTheEnd {};

#if defined(M2LM_MUST_FAIL)
using Insertion = AtTheEnd;
#else
using Insertion = m2lm::ExpandPlaceholder;
#endif

m2lm::Modality<"image", m2lm::ClipVit<>, m2lm::IdentityProjector, Insertion> modality;
