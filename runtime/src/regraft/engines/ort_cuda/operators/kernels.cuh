// What the operators compute, on a card. Sums are float, whatever the tensors are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace regraft {

constexpr int kThreads = 256;
constexpr int kMost = 1024;  // threads of a block
constexpr int kGroup = 16;   // neurons whose maxima one pass over the tokens finds

// Largest of `hidden[b, :, neurons] * signs`, times `down`, added to the last token's row of `sum`.
// A block has an image's every column, or, where D is beyond `kMost`, finds the maxima anew, which
// is cheaper than a second kernel. `hidden` (B, T, H), `sum` (B, T, D), `down` (K, D); `group` is a
// power of two up to `kGroup`: so many neighbouring threads take one token, a neuron each. Blocks
// are whole warps.
template <typename T>
__global__ void __launch_bounds__(kMost)
add_redirected(const T* hidden, T* sum, const std::int64_t* neurons, const T* signs, const T* down,
               int tokens, int width_hidden, int count, int width, int group) {
  __shared__ float of_warp[kMost / 32][kGroup];
  __shared__ float largest[kGroup];
  const T* of_image = hidden + static_cast<std::int64_t>(blockIdx.y) * tokens * width_hidden;
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float added = 0;
  for (int first = 0; first < count; first += group) {
    const int here = min(group, count - first), k = threadIdx.x % group;
    float most = -INFINITY;
    if (k < here) {
      const T* at = of_image + neurons[first + k];
      const float sign = static_cast<float>(signs[first + k]);
      const int step = blockDim.x / group;
#pragma unroll 4
      for (int token = threadIdx.x / group; token < tokens; token += step) {
        const float value = static_cast<float>(at[static_cast<std::int64_t>(token) * width_hidden]);
        most = fmaxf(most, sign * value);
      }
    }
    for (int offset = group; offset < 32; offset *= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    }
    if (lane < group) of_warp[warp][lane] = most;
    __syncthreads();
    if (threadIdx.x < group) {
      for (int w = 1; w < warps; ++w) most = fmaxf(most, of_warp[w][threadIdx.x]);
      largest[threadIdx.x] = most;
    }
    __syncthreads();
    if (column < width) {
#pragma unroll 4
      for (int j = 0; j < here; ++j) {
        added += largest[j] * static_cast<float>(down[(first + j) * width + column]);
      }
    }
    __syncthreads();
  }
  if (column < width) {
    T* row = sum + (static_cast<std::int64_t>(blockIdx.y + 1) * tokens - 1) * width;
    row[column] = static_cast<T>(static_cast<float>(row[column]) + added);
  }
}

// `row` (D,) added to the last token's row of `sum` (B, T, D).
template <typename T>
__global__ void __launch_bounds__(kThreads) add_row(T* sum, const T* row, int tokens, int width) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column < width) {
    T* to = sum + (static_cast<std::int64_t>(blockIdx.y + 1) * tokens - 1) * width;
    to[column] = static_cast<T>(static_cast<float>(to[column]) + static_cast<float>(row[column]));
  }
}

template <typename T>
struct alignas(16) Eight {
  T of[8];
};

// `silu(x[:, :H] + b[:H]) * (x[:, H:] + b[H:])`, for x (N, 2H), b (2H,), H a multiple of 8.
template <typename T>
__global__ void __launch_bounds__(kThreads)
biased_swiglu(const T* x, const T* bias, T* y, std::int64_t eights, int hidden) {
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= eights) return;
  const int per_row = hidden / 8;
  const std::int64_t row = index / per_row;
  const int column = static_cast<int>(index - row * per_row) * 8;
  const T* at = x + row * 2 * hidden + column;
  const auto gate = *reinterpret_cast<const Eight<T>*>(at);
  const auto value = *reinterpret_cast<const Eight<T>*>(at + hidden);
  const auto gate_bias = *reinterpret_cast<const Eight<T>*>(bias + column);
  const auto value_bias = *reinterpret_cast<const Eight<T>*>(bias + hidden + column);
  Eight<T> out;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float g = static_cast<float>(gate.of[j]) + static_cast<float>(gate_bias.of[j]);
    const float v = static_cast<float>(value.of[j]) + static_cast<float>(value_bias.of[j]);
    out.of[j] = static_cast<T>(g / (1.0f + __expf(-g)) * v);
  }
  *reinterpret_cast<Eight<T>*>(y + row * hidden + column) = out;
}

// `x * Phi(x)`. In float as exact as erf is; what is rounded to half precision anyway takes erfc by
// an approximation of relative error 1.2e-7 (W. H. Press et al., Numerical Recipes, section 6.2),
// which needs a third of erf's instructions.
template <typename T>
__device__ float gelu(float x) {
  if constexpr (sizeof(T) == 4) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  } else {
    const float z = fabsf(x) * 0.70710678f;
    const float t = __fdividef(1.0f, fmaf(0.5f, z, 1.0f));
    float sum = 0.17087277f;
    for (float next : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f,
                       0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f}) {
      sum = fmaf(sum, t, next);
    }
    const float half = 0.5f * t * __expf(fmaf(-z, z, sum));  // of erfc(z)
    return x * (x >= 0 ? 1.0f - half : half);
  }
}

// `gelu(x + bias)`, for x (rows, H), bias (H,), H a multiple of 8; a block does `each` rows.
template <typename T>
__global__ void __launch_bounds__(kMost)
biased_gelu(const T* x, const T* bias, T* y, std::int64_t rows, int hidden, int each) {
  for (int column = threadIdx.x * 8; column < hidden; column += blockDim.x * 8) {
    const auto added = *reinterpret_cast<const Eight<T>*>(bias + column);
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * each;
#pragma unroll 2
    for (std::int64_t row = first; row < min(first + each, rows); ++row) {
      const std::int64_t at = row * hidden + column;
      auto eight = *reinterpret_cast<const Eight<T>*>(x + at);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float sum = static_cast<float>(eight.of[j]) + static_cast<float>(added.of[j]);
        eight.of[j] = static_cast<T>(gelu<T>(sum));
      }
      *reinterpret_cast<Eight<T>*>(y + at) = eight;
    }
  }
}

}  // namespace regraft
