// What a register's row gets: the redirected neurons' share, or a constant.
//
// A block writes the row of an image. It waits for memory and does little else, so that it is best
// run among the blocks of a kernel that has many of them: an activation's (see `activation.cuh`).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace regraft::kernels {

constexpr int kMost = 1024;  // threads of a block
constexpr int kWarp = 32;
constexpr int kAhead = 8;     // tokens that a thread asks for at once
constexpr int kNeurons = 128;  // of a layer, at most: they travel with the call

template <typename T>
struct alignas(16) Eight {
  T of[8];
};

// Nothing is written.
struct Nothing {
  static constexpr bool kAny = false;
  static constexpr unsigned images = 0;
  std::size_t shared(unsigned) const { return 0; }
};

// `row` (D,), D a multiple of 8, added to the last token's row of `sum` (B, T, D).
template <typename T>
struct Row {
  static constexpr bool kAny = true;
  T* sum;
  const T* row;
  unsigned images;
  int tokens, width;

  std::size_t shared(unsigned) const { return 0; }

  template <typename Hidden>
  __device__ void write(unsigned image, const Hidden&) const {
    T* last = sum + (static_cast<std::int64_t>(image + 1) * tokens - 1) * width;
    for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
      auto* to = reinterpret_cast<Eight<T>*>(last + column);
      const auto added = *reinterpret_cast<const Eight<T>*>(row + column);
      Eight<T> eight = *to;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        eight.of[j] = static_cast<T>(static_cast<float>(eight.of[j]) + static_cast<float>(added.of[j]));
      }
      *to = eight;
    }
  }
};

// The largest of `hidden (row, neurons) * signs` over an image's tokens, times `down` (K, D), added
// to the last token's row of `sum` (B, T, D), D a multiple of 8. `Hidden` tells the hidden unit of a
// row of (B T,). Blocks are whole warps. What can be asked for early is: in a small batch, everything
// waits for memory. So neurons and signs come with the call, which the card has at once.
template <typename T>
struct Redirect {
  static constexpr bool kAny = true;
  T* sum;
  const T* down;
  unsigned images;
  int tokens, width, count;
  int neurons[kNeurons];
  float signs[kNeurons];

  // So many warps share a neuron's tokens.
  __host__ __device__ int parts(unsigned threads) const {
    const int warps = static_cast<int>(threads) / kWarp;
    return warps > count ? warps / count : 1;
  }

  std::size_t shared(unsigned threads) const { return sizeof(float) * count * parts(threads); }

  template <typename Hidden>
  __device__ void write(unsigned image, const Hidden& hidden) const {
    extern __shared__ float largest[];  // (count, parts)
    const int warps = blockDim.x / kWarp, several = parts(blockDim.x);
    T* last = sum + (static_cast<std::int64_t>(image + 1) * tokens - 1) * width;
    Eight<T> eight;
    for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
      for (int k = 0; k < count; ++k) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(down + k * width + column));
      }
    }
    if (threadIdx.x * 8 < width) eight = *reinterpret_cast<Eight<T>*>(last + threadIdx.x * 8);
    for (int slot = threadIdx.x / kWarp; slot < count * several; slot += warps) {
      const float most = strongest(image, slot / several, slot % several, several, hidden);
      if (threadIdx.x % kWarp == 0) largest[slot] = most;
    }
    __syncthreads();
    for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
      auto* to = reinterpret_cast<Eight<T>*>(last + column);
      if (column != threadIdx.x * 8) eight = *to;
      float added[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) added[j] = static_cast<float>(eight.of[j]);
#pragma unroll 4
      for (int k = 0; k < count; ++k) {
        const auto weights = *reinterpret_cast<const Eight<T>*>(down + k * width + column);
        float most = largest[k * several];
        for (int part = 1; part < several; ++part) most = fmaxf(most, largest[k * several + part]);
#pragma unroll
        for (int j = 0; j < 8; ++j) added[j] += most * static_cast<float>(weights.of[j]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) eight.of[j] = static_cast<T>(added[j]);
      *to = eight;
    }
  }

 private:
  // One warp's part of the maximum of neuron `k`.
  template <typename Hidden>
  __device__ float strongest(unsigned image, int k, int part, int several,
                             const Hidden& hidden) const {
    const std::int64_t first = static_cast<std::int64_t>(image) * tokens;
    const int neuron = neurons[k];
    const float sign = signs[k];
    const int step = several * kWarp;
    float most = -INFINITY;
    for (int token = part * kWarp + threadIdx.x % kWarp; token < tokens; token += kAhead * step) {
      float values[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        // Past the end the first token again, which is among them anyway.
        const int one = token + j * step < tokens ? token + j * step : token;
        values[j] = hidden(first + one, neuron);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) most = fmaxf(most, sign * values[j]);
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    }
    return most;
  }
};

// Hidden units that are there: (B T, H).
template <typename T>
struct Given {
  const T* units;
  int hidden;

  __device__ float operator()(std::int64_t row, int unit) const {
    return static_cast<float>(units[row * hidden + unit]);
  }
};

// What is written, and nothing else.
template <typename T, typename Also>
__global__ void __launch_bounds__(kMost) write_alone(Given<T> units, Also also) {
  also.write(blockIdx.x, units);
}

}  // namespace regraft::kernels
