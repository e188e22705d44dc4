// A node's tensors, as its operator reads and writes them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

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

// What becomes of `residual` before anything is added: nothing where output `index` is the input.
Status* in_place(const Api* api, KernelContext* context, const Tensor& residual, std::size_t bytes,
                 cudaStream_t stream, std::size_t index, void** out) {
  TRY(write(api, context, residual, residual.lengths[2], out, index));
  if (*out == residual.data || residual.size() == 0) return nullptr;
  cudaMemcpyAsync(*out, residual.data, residual.size() * bytes, cudaMemcpyDeviceToDevice, stream);
  return launched(api);
}

}  // namespace regraft
