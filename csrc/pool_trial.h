// See pool_trial.cpp.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace hob {

using TrialResult = std::pair<std::vector<uint32_t>, int64_t>;  // the values, and how many pieces were computed again

// `num_late` times a thread sleeps for 20 ms in the middle of a piece.
TrialResult pool_trial(int num_threads, int num_jobs, int num_pieces, int num_late);

// How many threads are still there after chains of short jobs with pauses, in which threads fall asleep and come late.
int pool_attendance(int num_threads, int num_chains);

// How often the caller was called over in chains at which it stays away for some milliseconds.
int64_t pool_calls(int num_threads, int num_chains);

}  // namespace hob
