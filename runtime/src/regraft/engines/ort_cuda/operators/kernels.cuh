// What the operators compute, on a card. Sums are float, whatever the tensors are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace regraft::kernels {

constexpr int kThreads = 256;
constexpr int kFew = 128;
constexpr int kMost = 1024;  // threads of a block
constexpr int kAhead = 4;    // tokens that a thread asks for at once

// Largest of `hidden[b, :, neurons] * signs`, times `down`, added to the last token's row of `sum`.
// A block has an image's every column, or, where D is beyond `kMost`, finds the maxima anew, which
// is cheaper than a second kernel. `hidden` (B, T, H), `sum` (B, T, D), `down` (K, D); `Group` is a
// power of two up to 16: so many neighbouring threads take one token, a neuron each. Blocks are
// whole warps. A block waits for memory and does little else, so what can be asked for is asked for
// early and together: the row and the weights before the hidden units, those of four tokens at once.
template <typename T, int Group>
__global__ void __launch_bounds__(kMost)
add_redirected(const T* hidden, T* sum, const std::int64_t* neurons, const T* signs, const T* down,
               int tokens, int width_hidden, int count, int width) {
  __shared__ float of_warp[kMost / 32][Group];
  __shared__ float largest[Group];
  const T* of_image = hidden + static_cast<std::int64_t>(blockIdx.y) * tokens * width_hidden;
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int k = threadIdx.x % Group, step = blockDim.x / Group;
  T* row = sum + (static_cast<std::int64_t>(blockIdx.y + 1) * tokens - 1) * width + column;
  float added = column < width ? static_cast<float>(*row) : 0.0f;
  for (int first = 0; first < count; first += Group) {
    const int here = min(Group, count - first);
    T weights[Group];
#pragma unroll
    for (int j = 0; j < Group; ++j) {
      weights[j] = j < here && column < width ? down[(first + j) * width + column] : T(0.0f);
    }
    float most = -INFINITY;
    if (k < here) {
      const T* at = of_image + neurons[first + k];
      const float sign = static_cast<float>(signs[first + k]);
      for (int token = threadIdx.x / Group; token < tokens; token += kAhead * step) {
        T values[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          // Past the end the first token again, which is among them anyway.
          const int one = token + j * step < tokens ? token + j * step : token;
          values[j] = at[static_cast<std::int64_t>(one) * width_hidden];
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) most = fmaxf(most, sign * static_cast<float>(values[j]));
      }
    }
    for (int offset = Group; offset < 32; offset *= 2) {
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
    }
    if (lane < Group) of_warp[warp][lane] = most;
    __syncthreads();
    for (int mine = warp; mine < Group; mine += warps) {
      float of_all = lane < warps ? of_warp[lane][mine] : -INFINITY;
      for (int offset = 16; offset > 0; offset /= 2) {
        of_all = fmaxf(of_all, __shfl_xor_sync(0xffffffffu, of_all, offset));
      }
      if (lane == 0) largest[mine] = of_all;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < Group; ++j) {
      if (j < here) added += largest[j] * static_cast<float>(weights[j]);
    }
    __syncthreads();
  }
  if (column < width) *row = static_cast<T>(added);
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

__global__ void __launch_bounds__(kThreads)
pass_on(uint4* to, const uint4* from, std::size_t count) {
  const std::size_t step = static_cast<std::size_t>(gridDim.x) * kThreads;
  for (std::size_t i = static_cast<std::size_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    to[i] = from[i];
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

// `x * Phi(x)`. In float as exact as erf is. What is rounded to half precision anyway takes
// `Phi(-|x|) = exp(-x * x / 2) t Q(t)` with `t = 1 / (1 + |x| / 4)` and Q fitted to a relative error
// of 2.4e-5 for |x| up to 9, a twentieth of fp16's; erf needs three times the instructions. An infinite x, which
// nothing behind it survives either, gives NaN.
template <typename T>
__device__ float gelu(float x) {
  if constexpr (sizeof(T) == 4) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  } else {
    const float z = fabsf(x) * 0.8493218f;  // the root of log2(e) / 2
    float power, t;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-z * z));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(t) : "f"(fmaf(0.25f, fabsf(x), 1.0f)));
    float q = fmaf(0.2458635f, t, -0.11426049f);
    q = fmaf(q, t, 0.18941101f);
    q = fmaf(q, t, 0.07722346f);
    q = fmaf(q, t, 0.1017743f);
    return fmaxf(x, 0.0f) - fabsf(x) * (power * (t * q));
  }
}

// `gelu(x + bias)`, for x (rows, H), bias (H,), H a multiple of 8. A block does `each` rows of eight
// columns a thread.
template <typename T>
__global__ void __launch_bounds__(kFew)
biased_gelu(const T* x, const T* bias, T* y, std::int64_t rows, int hidden, int each) {
  const int column = (blockIdx.y * kFew + threadIdx.x) * 8;
  if (column >= hidden) return;
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

}  // namespace regraft::kernels
