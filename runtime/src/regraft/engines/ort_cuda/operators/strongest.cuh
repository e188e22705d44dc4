// The largest of an image's hidden units, for some neurons: by a block of threads, or by several.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace regraft::kernels {

constexpr int kWarp = 32;
constexpr int kAhead = 8;                 // tokens that a thread asks for at once
constexpr int kNeurons = 128;             // of a layer, at most: they travel with the call
constexpr std::int64_t kSearching = 128;  // blocks of a call, at most, where several do an image
constexpr std::int64_t kFewest = 4;       // that share an image; fewer are not worth it

// Where the blocks that share an image meet. For one stream, whose kernels follow each other; zero
// at first, and `arrived` is so again after each of them.
struct Meeting {
  float largest[kSearching / kFewest][kNeurons];
  unsigned arrived[kSearching / kFewest];
};

// `neurons` (count,) of the hidden units of some images, each times its sign. Of an image, the
// block `share` takes every neuron number `shares` from the share's on.
struct Search {
  Meeting* meeting;
  unsigned shares;
  int count;
  int neurons[kNeurons];
  float signs[kNeurons];

  // Into `largest` (count, parts), which all threads may read then. Returns the parts, whose
  // largest is the neuron's; 0 where another block goes on. `Hidden` tells the units of an image's
  // `tokens`.
  template <typename Hidden>
  __device__ int find(unsigned image, unsigned share, int tokens, const Hidden& hidden,
                      float* largest) const {
    const int own = (count - share + shares - 1) / shares;
    const int warps = blockDim.x / kWarp, parts = max(1, warps / own);
    for (int slot = threadIdx.x / kWarp; slot < own * parts; slot += warps) {
      const int k = share + slot / parts * shares;
      const float most = strongest(image, k, slot % parts, parts, tokens, hidden);
      if (threadIdx.x % kWarp == 0) largest[slot] = most;
    }
    __syncthreads();
    if (shares == 1) return parts;
    return joined(image, share, own, parts, largest) ? 1 : 0;
  }

 private:
  // Of one neuron and a part of the tokens; a neuron's parts are as many warps as there are for it.
  template <typename Hidden>
  __device__ float strongest(unsigned image, int k, int part, int parts, int tokens,
                             const Hidden& hidden) const {
    const std::int64_t first = static_cast<std::int64_t>(image) * tokens;
    const auto unit = hidden.unit(neurons[k]);
    const float sign = signs[k];
    const int step = parts * kWarp, lane = threadIdx.x % kWarp;
    float most = -INFINITY;
    for (int least = part * kWarp; least < tokens; least += kAhead * step) {
      decltype(unit.load(first)) loaded[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int token = least + lane + j * step;
        // Past the end one that is among them anyway.
        loaded[j] = unit.load(first + (token < tokens ? token : least));
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) most = fmaxf(most, sign * unit.value(loaded[j]));
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    }
    return most;
  }

  // Whether this is the image's last block; it alone gets what the others found.
  __device__ bool joined(unsigned image, unsigned share, int own, int parts, float* largest) const {
    volatile float* all = meeting->largest[image];
    for (int i = threadIdx.x; i < own; i += blockDim.x) {
      float most = largest[i * parts];
      for (int part = 1; part < parts; ++part) most = fmaxf(most, largest[i * parts + part]);
      all[share + i * shares] = most;
    }
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {  // the counter wraps to zero
      __threadfence();       // what the block wrote, before it counts
      last = atomicInc(&meeting->arrived[image], shares - 1) == shares - 1;
      __threadfence();  // and what the others did, after
    }
    __syncthreads();
    if (!last) return false;
    for (int k = threadIdx.x; k < count; k += blockDim.x) largest[k] = all[k];
    __syncthreads();
    return true;
  }
};

}  // namespace regraft::kernels
