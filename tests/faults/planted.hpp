// Included in front of everything in the library and the probes of tests/faults, where M2LM_PLANT_FAULT is this variable: one build
// serves all faults, and $M2LM_PLANT_FAULT says which one a run has.
#pragma once

extern const int m2lm_planted_fault;
