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

constexpr int kWarp = 32;
constexpr int kMany = 512;     // threads of a block that does nothing else
constexpr int kAhead = 8;      // tokens that a thread asks for at once
constexpr int kNeurons = 128;  // of a layer, at most: they travel with the call

template <typename T>
struct alignas(16) Eight {
  T of[8];
};

// Nothing is written.
struct Nothing {
  static constexpr bool kAny = false;
  static constexpr int kBlocks = 0;
  static constexpr unsigned images = 0;
};

// `row` (D,), D a multiple of 8, added to the last token's row of `sum` (B, T, D).
template <typename T>
struct Row {
  static constexpr bool kAny = true;
  static constexpr int kBlocks = 0;
  T* sum;
  const T* row;
  unsigned images;
  int tokens, width;

  template <typename Hidden>
  __device__ void write(unsigned image, const Hidden&) const {
    T* last = sum + (static_cast<std::int64_t>(image + 1) * tokens - 1) * width;
    for (int column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
      const auto added = *reinterpret_cast<const Eight<T>*>(row + column);
      auto eight = *reinterpret_cast<Eight<T>*>(last + column);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        eight.of[j] =
            static_cast<T>(static_cast<float>(eight.of[j]) + static_cast<float>(added.of[j]));
      }
      *reinterpret_cast<Eight<T>*>(last + column) = eight;
    }
  }
};

// The largest of an image's hidden units `neurons` times `signs`, times `down` (K, D), D a multiple
// of 8, added to the last token's row of `sum` (B, T, D). `Hidden` tells the units. What can be
// asked for early is: in a small batch, everything waits for memory. So neurons and signs come with
// the call, which the card has at once.
template <typename T>
struct Redirect {
  static constexpr bool kAny = true;
  // That a multiprocessor has to have room for. Were it for more, nvcc would save registers and ask
  // for one token after the other.
  static constexpr int kBlocks = 8;
  T* sum;
  const T* down;
  unsigned images;
  int tokens, width, count;
  int neurons[kNeurons];
  float signs[kNeurons];

  template <typename Hidden>
  __device__ void write(unsigned image, const Hidden& hidden) const {
    __shared__ float largest[kNeurons];  // (count, parts), or as many as there are warps
    const int warps = blockDim.x / kWarp, parts = max(1, warps / count);
    const int first = threadIdx.x * 8, step = blockDim.x * 8;
    T* last = sum + (static_cast<std::int64_t>(image + 1) * tokens - 1) * width;
    for (int column = first; column < width; column += step) {
      for (int k = 0; k < count; ++k) {  // the weights come from afar
        asm volatile("prefetch.global.L2 [%0];" ::"l"(down + k * width + column));
      }
    }
    Eight<T> eight;
    if (first < width) eight = *reinterpret_cast<Eight<T>*>(last + first);
    for (int slot = threadIdx.x / kWarp; slot < count * parts; slot += warps) {
      const float most = strongest(image, slot / parts, slot % parts, parts, hidden);
      if (threadIdx.x % kWarp == 0) largest[slot] = most;
    }
    __syncthreads();
    for (int column = first; column < width; column += step) {
      if (column != first) eight = *reinterpret_cast<Eight<T>*>(last + column);
      add(column, parts, largest, &eight);
      *reinterpret_cast<Eight<T>*>(last + column) = eight;
    }
  }

 private:
  __device__ void add(int column, int parts, const float* largest, Eight<T>* to) const {
    float sums[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[j] = static_cast<float>(to->of[j]);
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
      const auto weights = *reinterpret_cast<const Eight<T>*>(down + k * width + column);
      float most = largest[k * parts];
      for (int part = 1; part < parts; ++part) most = fmaxf(most, largest[k * parts + part]);
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] += most * static_cast<float>(weights.of[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) to->of[j] = static_cast<T>(sums[j]);
  }

  // Of one neuron and a part of the tokens; a neuron's parts are as many warps as there are for it.
  template <typename Hidden>
  __device__ float strongest(unsigned image, int k, int part, int parts,
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
};

// Hidden units that are there: (B T, H).
template <typename T>
struct Given {
  const T* units;
  int hidden;

  struct Unit {
    const T* at;
    int hidden;
    __device__ T load(std::int64_t row) const { return at[row * hidden]; }
    __device__ float value(T loaded) const { return static_cast<float>(loaded); }
  };
  __device__ Unit unit(int index) const { return {units + index, hidden}; }
};

// What is written, and nothing else.
template <typename T, typename Also>
__global__ void __launch_bounds__(kMany) write_alone(Given<T> units, Also also) {
  also.write(blockIdx.x, units);
}

}  // namespace regraft::kernels
