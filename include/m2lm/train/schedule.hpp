// Learning rates by step.
// Floor: train. May include: core, ops, layers, parts, io, sampling, models.
#pragma once

#include <m2lm/core/error.hpp>

#include <cmath>
#include <cstdint>
#include <numbers>

namespace m2lm::inline M2LM_ABI::train {

/// How the rate goes on after the warm-up.
enum class Decay : std::uint8_t { none, linear, cosine };

/// A linear warm-up to `peak`, then a way down to floor · peak at the last step.
struct Schedule {
  double peak = 1e-4;             ///< the largest rate
  std::int64_t warmup_steps = 0;  ///< steps up to it
  Decay decay = Decay::none;      ///< the way down
  std::int64_t total_steps = 0;   ///< where the way down ends, warm-up included; needed for linear and cosine
  double floor = 0;               ///< share of the peak that is left at the end
  friend bool operator==(const Schedule&, const Schedule&) = default;

  /// Rate of step 0, 1, …: peak·(step + 1)/warmup_steps, then peak·(floor + (1 − floor)·w) with w from 1 to 0.
  double operator()(std::int64_t step) const {
    if (step < warmup_steps) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup_steps);
    if (decay == Decay::none) return peak;
    const double progress =
        total_steps <= warmup_steps ? 1.0 : static_cast<double>(step - warmup_steps) / static_cast<double>(total_steps - warmup_steps);
    const double at = progress < 1.0 ? progress : 1.0;
    return peak * (floor + (1.0 - floor) * (decay == Decay::linear ? 1.0 - at : 0.5 * (1.0 + std::cos(std::numbers::pi * at))));
  }
  /// throws OptionError for what makes no schedule.
  void check() const {
    require<OptionError>(peak >= 0 && peak - peak == 0 && warmup_steps >= 0 && total_steps >= 0 && floor >= 0 && floor <= 1,
                         "m2lm::train::Schedule: peak ", peak, ", warmup_steps ", warmup_steps, ", total_steps ", total_steps, ", floor ", floor,
                         ": a rate, two counts and a share are wanted");
    require<OptionError>(decay == Decay::none || total_steps > warmup_steps, "m2lm::train::Schedule: total_steps = ", total_steps,
                         " is not more than warmup_steps = ", warmup_steps, "; the rate cannot come down");
  }
};

}  // namespace m2lm::train
