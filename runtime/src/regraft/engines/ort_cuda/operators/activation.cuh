// An MLP's activation with the bias in front of it; among its blocks run some that write registers'
// rows. They compute the few hidden units that they need anew, so as not to wait for the others.
#pragma once

#include "redirect.cuh"

namespace regraft::kernels {

constexpr int kFew = 128;  // threads that go along a row

// In float to the last bit; where the result is rounded anyway, to two units in the last place,
// without a branch.
template <typename T>
__device__ float divided(float a, float b) {
  return sizeof(T) == 4 ? a / b : __fdividef(a, b);
}

// `x * Phi(x)`. In float as exact as erf is. What is rounded to half precision anyway takes
// `Phi(-|x|) = exp(-x * x / 2) t Q(t)` with `t = 1 / (1 + |x| / 4)` and Q fitted to a relative
// error of 2.4e-5 for |x| up to 9, a twentieth of fp16's; erf needs three times the instructions.
// An infinite x, which nothing behind it survives either, gives NaN.
struct Gelu {
  static constexpr int kHalves = 1;

  template <typename T>
  static __device__ float of(const float (&sums)[1]) {
    const float x = sums[0];
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
  static __device__ float of(const float (&sums)[1]) {
    const float x = sums[0];
    return divided<T>(x, 1.0f + __expf(-1.702f * x));
  }
};

// `silu(gate) * value`: the first half of the columns is the gate.
struct SwiGlu {
  static constexpr int kHalves = 2;

  template <typename T>
  static __device__ float of(const float (&sums)[2]) {
    return divided<T>(sums[0], 1.0f + __expf(-sums[0])) * sums[1];
  }
};

// Hidden units as the activation of `x` (B T, H or 2 H) with `bias`, rounded as they are written.
template <typename T, typename Activation>
struct Activated {
  static constexpr int kHalves = Activation::kHalves;
  const T *x, *bias;
  int hidden;

  struct Loaded {
    T of[kHalves];
  };
  struct Unit {
    const T* at;
    int hidden;
    float bias[kHalves];

    __device__ Loaded load(std::int64_t row) const {
      Loaded loaded;
#pragma unroll
      for (int i = 0; i < kHalves; ++i) loaded.of[i] = at[(row * kHalves + i) * hidden];
      return loaded;
    }

    __device__ float value(Loaded loaded) const {
      float sums[kHalves];
#pragma unroll
      for (int i = 0; i < kHalves; ++i) sums[i] = static_cast<float>(loaded.of[i]) + bias[i];
      return static_cast<float>(static_cast<T>(Activation::template of<T>(sums)));
    }
  };

  __device__ Unit unit(int index) const {
    Unit unit{x + index, hidden, {}};
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      unit.bias[i] = static_cast<float>(bias[i * hidden + index]);
    }
    return unit;
  }
};

// `y = Activation(x + bias)`, for x (rows, H or 2 H), H a multiple of 8. Of the blocks (along x),
// the first ones are `also`'s. The others do `kRows` rows, eight columns a thread, and ask for all
// they read together.
template <typename T, typename Activation, int kRows, int kRoom, typename Also>
__global__ void __launch_bounds__(kFew, kRoom)
activate(const T* __restrict__ x, const T* __restrict__ bias, T* __restrict__ y, std::int64_t rows,
         int hidden, Also also) {
  constexpr int kHalves = Activation::kHalves;
  if constexpr (Also::kAny) {
    if (blockIdx.x < also.blocks()) {
      if (blockIdx.y == 0) also.write(blockIdx.x, Activated<T, Activation>{x, bias, hidden});
      return;
    }
  }
  const int column = (blockIdx.y * kFew + threadIdx.x) * 8;
  if (column >= hidden) return;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x - also.blocks()) * kRows;
  Eight<T> in[kRows][kHalves], added[kHalves];
#pragma unroll
  for (int i = 0; i < kHalves; ++i) {
    added[i] = *reinterpret_cast<const Eight<T>*>(bias + i * hidden + column);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= rows) continue;
      const T* at = x + ((first + r) * kHalves + i) * hidden + column;
      in[r][i] = *reinterpret_cast<const Eight<T>*>(at);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r >= rows) continue;
    Eight<T> out;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float sums[kHalves];
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
        sums[i] = static_cast<float>(in[r][i].of[j]) + static_cast<float>(added[i].of[j]);
      }
      out.of[j] = static_cast<T>(Activation::template of<T>(sums));
    }
    *reinterpret_cast<Eight<T>*>(y + (first + r) * hidden + column) = out;
  }
}

}  // namespace regraft::kernels
