// What a register's row gets: the redirected neurons' share, or a constant.
//
// A block writes the row of an image, alone or as the last of several. It waits for memory and does
// little else, so that it is best run among the blocks of a kernel that has many of them: an
// activation's (see `activation.cuh`).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "strongest.cuh"

namespace regraft::kernels {

constexpr int kMany = 512;  // threads of a block that does nothing else
static_assert(kMany / kWarp <= kNeurons, "a block keeps a figure for each neuron or each warp");

template <typename T>
struct alignas(16) Eight {
  T of[8];
};

// Nothing is written.
struct Nothing {
  static constexpr bool kAny = false;
  static constexpr int kRoom = 0, kTight = 0;
  __host__ __device__ unsigned blocks() const { return 0; }
};

// Where registers' rows are: the last tokens' in `sum` (B, T, D), D a multiple of 8. What is added
// there writes with blocks of its own, numbered from 0.
template <typename T>
struct LastRows {
  static constexpr bool kAny = true;
  T* sum;
  unsigned images;
  int tokens, width;

  __device__ T* row(unsigned image) const {
    return sum + (static_cast<std::int64_t>(image + 1) * tokens - 1) * width;
  }
};

// `added` (D,), to the rows.
template <typename T>
struct Row : LastRows<T> {
  static constexpr int kRoom = 0, kTight = 0;
  const T* added;

  __host__ __device__ unsigned blocks() const { return this->images; }

  template <typename Hidden>
  __device__ void write(unsigned image, const Hidden&) const {
    T* last = this->row(image);
    for (int column = threadIdx.x * 8; column < this->width; column += blockDim.x * 8) {
      const auto more = *reinterpret_cast<const Eight<T>*>(added + column);
      auto eight = *reinterpret_cast<Eight<T>*>(last + column);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        eight.of[j] =
            static_cast<T>(static_cast<float>(eight.of[j]) + static_cast<float>(more.of[j]));
      }
      *reinterpret_cast<Eight<T>*>(last + column) = eight;
    }
  }
};

// What `search` finds in an image's hidden units, times `down` (K, D), to the image's row. What can
// be asked for early is: in a small batch, everything waits for memory. So neurons and signs come
// with the call, which the card has at once.
template <typename T>
struct Redirect : LastRows<T> {
  // Blocks that a multiprocessor has to have room for. With room for more, by which those that do
  // not search gain, nvcc saves registers, and asks for one token after the other.
  static constexpr int kRoom = 8, kTight = sizeof(T) == 2 ? 12 : kRoom;
  const T* down;
  Search search;

  __host__ __device__ unsigned blocks() const { return this->images * search.shares; }

  template <typename Hidden>
  __device__ void write(unsigned block, const Hidden& hidden) const {
    __shared__ float largest[kNeurons];
    const unsigned image = block / search.shares, share = block % search.shares;
    const int width = this->width, first = threadIdx.x * 8, step = blockDim.x * 8;
    T* last = this->row(image);
    for (int column = first; column < width; column += step) {
      for (int k = share; k < search.count; k += search.shares) {  // the weights come from afar
        asm volatile("prefetch.global.L2 [%0];" ::"l"(down + k * width + column));
      }
    }
    Eight<T> eight;
    if (first < width) eight = *reinterpret_cast<Eight<T>*>(last + first);
    const int parts = search.find(image, share, this->tokens, hidden, largest);
    if (parts == 0) return;
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
    for (int k = 0; k < search.count; ++k) {
      const auto weights = *reinterpret_cast<const Eight<T>*>(down + k * this->width + column);
      float most = largest[k * parts];
      for (int part = 1; part < parts; ++part) most = fmaxf(most, largest[k * parts + part]);
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] += most * static_cast<float>(weights.of[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) to->of[j] = static_cast<T>(sums[j]);
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
