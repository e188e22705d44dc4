// An MLP's activation with the bias in front of it; among its blocks run some that write registers'
// rows. They compute the few hidden units that they need anew, so that nobody waits for them.
#pragma once

#include "redirect.cuh"

namespace regraft::kernels {

constexpr int kFew = 128;

// `x * Phi(x)`. In float as exact as erf is. What is rounded to half precision anyway takes
// `Phi(-|x|) = exp(-x * x / 2) t Q(t)` with `t = 1 / (1 + |x| / 4)` and Q fitted to a relative error
// of 2.4e-5 for |x| up to 9, a twentieth of fp16's; erf needs three times the instructions. An
// infinite x, which nothing behind it survives either, gives NaN.
struct Gelu {
  static constexpr int kHalves = 1;

  template <typename T>
  static __device__ float of(float x) {
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
};

// `x * sigmoid(1.702 x)`, CLIP's.
struct QuickGelu {
  static constexpr int kHalves = 1;

  template <typename T>
  static __device__ float of(float x) {
    return x / (1.0f + __expf(-1.702f * x));
  }
};

// `silu(gate) * value`: the first half of the columns is the gate.
struct SwiGlu {
  static constexpr int kHalves = 2;

  template <typename T>
  static __device__ float of(float gate, float value) {
    return gate / (1.0f + __expf(-gate)) * value;
  }
};

// A hidden unit as the activation of `x` (B T, H or 2 H) with `bias`, rounded as it is written.
template <typename T, typename Activation>
struct Activated {
  const T *x, *bias;
  int hidden;

  __device__ float operator()(std::int64_t row, int unit) const {
    const std::int64_t at = row * Activation::kHalves * hidden + unit;
    const float sum = static_cast<float>(x[at]) + static_cast<float>(bias[unit]);
    if constexpr (Activation::kHalves == 2) {
      const float value =
          static_cast<float>(x[at + hidden]) + static_cast<float>(bias[hidden + unit]);
      return static_cast<float>(static_cast<T>(Activation::template of<T>(sum, value)));
    } else {
      return static_cast<float>(static_cast<T>(Activation::template of<T>(sum)));
    }
  }
};

template <typename T>
__device__ void add(const Eight<T>& x, const Eight<T>& bias, float (&sums)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    sums[j] = static_cast<float>(x.of[j]) + static_cast<float>(bias.of[j]);
  }
}

// `y = Activation(x + bias)`, for x (rows, H or 2 H), H a multiple of 8. Of the blocks (along x), the
// first ones write a row each, the others do `each` rows of `x`, eight columns a thread.
template <typename T, typename Activation, typename Also>
__global__ void __launch_bounds__(kFew)
activate(const T* x, const T* bias, T* y, std::int64_t rows, int hidden, int each, Also also) {
  constexpr int kHalves = Activation::kHalves;
  if constexpr (Also::kAny) {
    if (blockIdx.x < also.images) {
      if (blockIdx.y == 0) also.write(blockIdx.x, Activated<T, Activation>{x, bias, hidden});
      return;
    }
  }
  const int column = (blockIdx.y * kFew + threadIdx.x) * 8;
  if (column >= hidden) return;
  const auto added = *reinterpret_cast<const Eight<T>*>(bias + column);
  Eight<T> other;  // what is added to the second half
  if constexpr (kHalves == 2) other = *reinterpret_cast<const Eight<T>*>(bias + hidden + column);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x - also.images) * each;
#pragma unroll 2
  for (std::int64_t row = first; row < min(first + each, rows); ++row) {
    const T* at = x + row * kHalves * hidden + column;
    float sums[8];
    Eight<T> out;
    add(*reinterpret_cast<const Eight<T>*>(at), added, sums);
    if constexpr (kHalves == 2) {
      float values[8];
      add(*reinterpret_cast<const Eight<T>*>(at + hidden), other, values);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        out.of[j] = static_cast<T>(Activation::template of<T>(sums[j], values[j]));
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) out.of[j] = static_cast<T>(Activation::template of<T>(sums[j]));
    }
    *reinterpret_cast<Eight<T>*>(y + row * hidden + column) = out;
  }
}

}  // namespace regraft::kernels
