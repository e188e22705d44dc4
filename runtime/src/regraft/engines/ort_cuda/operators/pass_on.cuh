// What the timing of products runs between them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace regraft::kernels {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
pass_on(uint4* to, const uint4* from, std::size_t count) {
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * kThreads;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    to[i] = from[i];
  }
}

}  // namespace regraft::kernels
