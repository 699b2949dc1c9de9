// The version: the one place that states it.
// Floor: config. May include: nothing.
#pragma once

#define M2LM_VERSION_MAJOR 0
#define M2LM_VERSION_MINOR 1
#define M2LM_VERSION_PATCH 0

// The inline namespace that all of m2lm:: lies in, v0_1: two versions in one program are different types, so that a mix-up fails when it is
// linked instead of when it runs. Patches of a version keep their types. Code outside writes m2lm:: and does not name it.
#define M2LM_ABI_JOIN(major, minor) v##major##_##minor
#define M2LM_ABI_OF(major, minor) M2LM_ABI_JOIN(major, minor)
#define M2LM_ABI M2LM_ABI_OF(M2LM_VERSION_MAJOR, M2LM_VERSION_MINOR)
