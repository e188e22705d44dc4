// What the small kernels do when their node is run: read tensors, and start on a stream.
#pragma once

#include <algorithm>

#include "kernels.cuh"
#include "ort_abi.h"

namespace regraft {

using ort::Api;
using ort::ElementType;
using ort::KernelContext;
using ort::Operator;
using ort::Status;

#define TRY(expression) \
  if (Status* failed = (expression)) return failed

struct Tensor {
  void* data = nullptr;
  std::int64_t lengths[3] = {1, 1, 1};  // of the last axes; those in front are multiplied up
  std::int64_t size() const { return lengths[0] * lengths[1] * lengths[2]; }
};

Status* read(const Api* api, const KernelContext* context, std::size_t index, Tensor* out) {
  const ort::Value* value = nullptr;
  ort::TensorInfo* info = nullptr;
  std::int64_t lengths[8];
  std::size_t rank = 0;
  TRY(api->input(context, index, &value));
  TRY(api->data(value, &out->data));
  TRY(api->info(value, &info));
  Status* failed = api->rank(info, &rank);
  if (failed == nullptr && rank > 8) failed = api->error(ort::kFail, "regraft: more than 8 axes");
  if (failed == nullptr) failed = api->lengths(info, lengths, rank);
  api->release(info);
  if (failed != nullptr) return failed;
  for (std::size_t axis = 0; axis < rank; ++axis) {
    const std::size_t from_end = rank - 1 - axis;
    out->lengths[2 - (from_end < 2 ? from_end : 2)] *= lengths[axis];
  }
  return nullptr;
}

Status* write(const Api* api, KernelContext* context, const Tensor& like, std::int64_t last,
              void** out, std::size_t index = 0) {
  ort::Value* value = nullptr;
  const std::int64_t lengths[3] = {like.lengths[0], like.lengths[1], last};
  TRY(api->output(context, index, lengths, 3, &value));
  return api->data(value, out);
}

Status* launched(const Api* api) {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : api->error(ort::kFail, cudaGetErrorString(error));
}

// What becomes of `residual` before anything is added: nothing where the output is the input.
Status* in_place(const Api* api, KernelContext* context, const Tensor& residual, std::size_t bytes,
                 cudaStream_t stream, std::size_t index, void** out) {
  TRY(write(api, context, residual, residual.lengths[2], out, index));
  if (*out == residual.data || residual.size() == 0) return nullptr;
  cudaMemcpyAsync(*out, residual.data, residual.size() * bytes, cudaMemcpyDeviceToDevice, stream);
  return launched(api);
}

constexpr std::int64_t kManyRows = 4096;  // of a GELU's input

std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Blocks of whole warps that have a thread for every column of every image.
struct Blocks {
  dim3 grid;
  unsigned threads;

  Blocks(const Tensor& sum, int most)
      : grid(static_cast<unsigned>(divided_up(sum.lengths[2], most)),
             static_cast<unsigned>(sum.lengths[0])),
        threads(static_cast<unsigned>(divided_up(divided_up(sum.lengths[2], grid.x), 32) * 32)) {}
};

// `at`: the input from which on residual, neurons, signs and down follow; `index`: the output.
template <typename T>
Status* add_redirected(const Api* api, KernelContext* context, cudaStream_t stream, std::size_t at,
                       std::size_t index) {
  Tensor hidden, residual, neurons, signs, down;
  TRY(read(api, context, 0, &hidden));
  TRY(read(api, context, at, &residual));
  TRY(read(api, context, at + 1, &neurons));
  TRY(read(api, context, at + 2, &signs));
  TRY(read(api, context, at + 3, &down));
  if (hidden.lengths[1] != residual.lengths[1] || down.lengths[2] != residual.lengths[2] ||
      hidden.lengths[0] != residual.lengths[0] || signs.size() != neurons.size() ||
      down.size() != neurons.size() * residual.lengths[2]) {
    return api->error(ort::kInvalidArgument, "regraft: a redirect got shapes that do not fit");
  }
  void* sum = nullptr;
  TRY(in_place(api, context, residual, sizeof(T), stream, index, &sum));
  if (residual.size() == 0) return nullptr;
  const int count = static_cast<int>(neurons.size());
  const Blocks blocks(residual, kernels::kMost);
  const auto start = [&](auto kernel) {
    kernel<<<blocks.grid, blocks.threads, 0, stream>>>(
        static_cast<const T*>(hidden.data), static_cast<T*>(sum),
        static_cast<const std::int64_t*>(neurons.data), static_cast<const T*>(signs.data),
        static_cast<const T*>(down.data), static_cast<int>(hidden.lengths[1]),
        static_cast<int>(hidden.lengths[2]), count, static_cast<int>(residual.lengths[2]));
  };
  if (count > 8) {
    start(kernels::add_redirected<T, 16>);
  } else if (count > 4) {
    start(kernels::add_redirected<T, 8>);
  } else if (count > 2) {
    start(kernels::add_redirected<T, 4>);
  } else if (count > 1) {
    start(kernels::add_redirected<T, 2>);
  } else {
    start(kernels::add_redirected<T, 1>);
  }
  return launched(api);
}

// `at`: the input that is the residual, after which the row follows; `index`: the output.
template <typename T>
Status* add_row(const Api* api, KernelContext* context, cudaStream_t stream, std::size_t at,
                std::size_t index) {
  Tensor residual, row;
  TRY(read(api, context, at, &residual));
  TRY(read(api, context, at + 1, &row));
  if (row.size() != residual.lengths[2]) {
    return api->error(ort::kInvalidArgument, "regraft: a row got shapes that do not fit");
  }
  void* sum = nullptr;
  TRY(in_place(api, context, residual, sizeof(T), stream, index, &sum));
  if (residual.size() == 0) return nullptr;
  const Blocks blocks(residual, kernels::kThreads);
  kernels::add_row<T><<<blocks.grid, blocks.threads, 0, stream>>>(
      static_cast<T*>(sum), static_cast<const T*>(row.data), static_cast<int>(residual.lengths[1]),
      static_cast<int>(residual.lengths[2]));
  return launched(api);
}

template <typename T>
Status* biased_swiglu(const Api* api, KernelContext* context, cudaStream_t stream) {
  Tensor x, bias;
  TRY(read(api, context, 0, &x));
  TRY(read(api, context, 1, &bias));
  if (bias.size() != x.lengths[2] || x.lengths[2] % 16 != 0) {
    return api->error(ort::kInvalidArgument, "regraft: BiasedSwiGlu got shapes that do not fit");
  }
  void* y = nullptr;
  TRY(write(api, context, x, x.lengths[2] / 2, &y));
  const std::int64_t eights = x.size() / 16;
  if (eights == 0) return nullptr;
  const auto blocks = static_cast<unsigned>(divided_up(eights, kernels::kThreads));
  kernels::biased_swiglu<T><<<blocks, kernels::kThreads, 0, stream>>>(
      static_cast<const T*>(x.data), static_cast<const T*>(bias.data), static_cast<T*>(y), eights,
      static_cast<int>(x.lengths[2] / 2));
  return launched(api);
}

template <typename T>
Status* biased_gelu(const Api* api, KernelContext* context, cudaStream_t stream) {
  Tensor x, bias;
  TRY(read(api, context, 0, &x));
  TRY(read(api, context, 1, &bias));
  const std::int64_t rows = x.lengths[0] * x.lengths[1], hidden = x.lengths[2];
  if (bias.size() != hidden || hidden % 8 != 0) {
    return api->error(ort::kInvalidArgument, "regraft: BiasedGelu got shapes that do not fit");
  }
  void* y = nullptr;
  TRY(write(api, context, x, hidden, &y));
  if (x.size() == 0) return nullptr;
  const int each = rows < kManyRows ? 1 : 4;  // a full card does more rows with fewer reads
  const dim3 grid(static_cast<unsigned>(divided_up(rows, each)),
                  static_cast<unsigned>(divided_up(hidden, 8 * kernels::kFew)));
  kernels::biased_gelu<T><<<grid, kernels::kFew, 0, stream>>>(
      static_cast<const T*>(x.data), static_cast<const T*>(bias.data), static_cast<T*>(y), rows,
      static_cast<int>(hidden), each);
  return launched(api);
}

}  // namespace regraft
