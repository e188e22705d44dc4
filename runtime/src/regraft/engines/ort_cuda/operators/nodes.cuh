// What a node does when it is run, on the session's stream.
#pragma once

#include "products.cuh"
#include "work.cuh"

namespace regraft {

inline Status* status_of(const Api* api, const Text& failed) {
  return failed.empty() ? nullptr : api->error(ort::kFail, failed.c_str());
}

// Of one node: what it computes, and what it keeps between its runs.
struct Kernel {
  using Work = Status* (*)(Kernel*, KernelContext*, cudaStream_t);
  const Api* api;
  Work work;
  Products products;
  Workspaces meetings;
};

using Work = Kernel::Work;

template <Status* (*Small)(const Call&)>
Status* small(Kernel* kernel, KernelContext* context, cudaStream_t stream) {
  return Small({kernel->api, context, stream, nullptr});
}

template <Status* (*Small)(const Call&)>
Status* small_with_meeting(Kernel* kernel, KernelContext* context, cudaStream_t stream) {
  void* meeting = nullptr;
  Workspace* place = kernel->meetings.of(stream, kTogether, sizeof(kernels::Meeting));
  TRY(status_of(kernel->api, place->get(&meeting)));
  return Small({kernel->api, context, stream, static_cast<kernels::Meeting*>(meeting)});
}

inline cudaDataType_t blas_type(const float*) { return CUDA_R_32F; }
inline cudaDataType_t blas_type(const __half*) { return CUDA_R_16F; }
inline cudaDataType_t blas_type(const __nv_bfloat16*) { return CUDA_R_16BF; }

// Inputs: x, then the weights, then the biases of as many of them; the others have none.
template <typename T, int Biased, int Together = 1>
Status* products(Kernel* kernel, KernelContext* context, cudaStream_t stream) {
  const Api* api = kernel->api;
  Tensor x;
  TRY(read(api, context, 0, &x));
  const T* type = nullptr;
  Size size{blas_type(type), Biased, Together, x.lengths[0] * x.lengths[1], x.lengths[2], 0};
  Lanes lanes;
  for (int i = 0; i < Together; ++i) {
    Tensor weight, bias;
    TRY(read(api, context, 1 + i, &weight));
    if (i == 0) size.columns = weight.lengths[2];
    bool fits = weight.lengths[0] == 1 && weight.lengths[1] == size.inner &&
                weight.lengths[2] == size.columns;
    if (i < Biased) {
      TRY(read(api, context, 1 + Together + i, &bias));
      fits = fits && bias.size() == size.columns;
    }
    if (!fits) {
      return api->error(ort::kInvalidArgument, "regraft: a product got shapes that do not fit");
    }
    lanes[i].weight = weight.data;
    lanes[i].bias = bias.data;
    TRY(write(api, context, x, size.columns, &lanes[i].y, i));
  }
  if (x.size() == 0 || size.columns == 0) return nullptr;
  return status_of(api, kernel->products.run(size, x.data, lanes, stream));
}

}  // namespace regraft
