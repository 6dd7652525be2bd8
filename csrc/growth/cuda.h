#pragma once

#include "growth/growth.h"

namespace pycodesign::growth::cuda {

// What growth::expand does, for device memory, indices and scales too: the same bits, but for NaNs, which stay NaNs.
// An index that is neither -1 nor in w writes zeros as well, since nobody has read it here. out_index null: every row
// in its place. Queues kernels on `stream`, a cudaStream_t of the current device, and does not wait.
void expand(const Expansion& x, void* stream);

}  // namespace pycodesign::growth::cuda
