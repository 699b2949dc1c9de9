// The version: the one place that states it.
// Floor: config. May include: nothing.
#pragma once

#define M2LM_VERSION_MAJOR 0
#define M2LM_VERSION_MINOR 1
#define M2LM_VERSION_PATCH 0
