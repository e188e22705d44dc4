// What the small kernels do when their node is run: read tensors, and start on a stream.
#pragma once

#include <algorithm>

#include "activation.cuh"
#include "redirect.cuh"
#include "tensors.cuh"

namespace regraft {

using kernels::Gelu;
using kernels::QuickGelu;
using kernels::SwiGlu;

constexpr std::int64_t kManyRows = 1024;  // of tokens, that fill a card

inline std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Reads what a node writes besides: its inputs from `at` on, residual first; `index`: the output.
// Rows are those of (images, tokens).
inline Status* read_also(const Api*, KernelContext*, cudaStream_t, std::size_t, std::size_t,
                         kernels::Nothing*) {
  return nullptr;
}

template <typename T>
Status* read_also(const Api* api, KernelContext* context, cudaStream_t stream, std::size_t at,
                  std::size_t index, kernels::Row<T>* also) {
  Tensor residual, row;
  TRY(read(api, context, at, &residual));
  TRY(read(api, context, at + 1, &row));
  const std::int64_t width = residual.lengths[2];
  if (row.size() != width || width % 8 != 0) {
    return api->error(ort::kInvalidArgument, "regraft: a row got shapes that do not fit");
  }
  void* sum = nullptr;
  TRY(in_place(api, context, residual, sizeof(T), stream, index, &sum));
  *also = {static_cast<T*>(sum), static_cast<const T*>(row.data),
           static_cast<unsigned>(residual.lengths[0]), static_cast<int>(residual.lengths[1]),
           static_cast<int>(width)};
  return nullptr;
}

template <typename T>
Status* read_also(const Api* api, KernelContext* context, cudaStream_t stream, std::size_t at,
                  std::size_t index, kernels::Redirect<T>* also) {
  Tensor residual, neurons, signs, down;
  TRY(read(api, context, at, &residual));
  TRY(read(api, context, at + 1, &neurons));
  TRY(read(api, context, at + 2, &signs));
  TRY(read(api, context, at + 3, &down));
  const std::int64_t width = residual.lengths[2], count = neurons.size();
  if (signs.size() != count || down.size() != count * width || width % 8 != 0 || count == 0 ||
      count > kernels::kNeurons) {
    return api->error(ort::kInvalidArgument, "regraft: a redirect got shapes that do not fit");
  }
  void* sum = nullptr;
  TRY(in_place(api, context, residual, sizeof(T), stream, index, &sum));
  also->sum = static_cast<T*>(sum);
  also->down = static_cast<const T*>(down.data);
  also->images = static_cast<unsigned>(residual.lengths[0]);
  also->tokens = static_cast<int>(residual.lengths[1]);
  also->width = static_cast<int>(width);
  also->count = static_cast<int>(count);
  for (std::int64_t k = 0; k < count; ++k) {  // these two are in the host's memory
    also->neurons[k] = static_cast<int>(static_cast<const std::int64_t*>(neurons.data)[k]);
    also->signs[k] = static_cast<float>(static_cast<const T*>(signs.data)[k]);
  }
  return nullptr;
}

// Whether what is written besides is of the same images and tokens as these hidden units.
template <typename T>
bool belongs(const kernels::Row<T>& also, const Tensor& x, std::int64_t) {
  return x.lengths[0] == also.images && x.lengths[1] == also.tokens;
}

template <typename T>
bool belongs(const kernels::Redirect<T>& also, const Tensor& x, std::int64_t hidden) {
  const auto is_unit = [&](int neuron) { return 0 <= neuron && neuron < hidden; };
  return x.lengths[0] == also.images && x.lengths[1] == also.tokens &&
         std::all_of(also.neurons, also.neurons + also.count, is_unit);
}

inline bool belongs(const kernels::Nothing&, const Tensor&, std::int64_t) { return true; }

template <typename T, typename Also>
Status* start_alone(const Api* api, cudaStream_t stream, const kernels::Given<T>& units,
                    const Also& also) {
  if (also.images == 0 || also.tokens == 0) return nullptr;
  kernels::write_alone<<<also.images, kernels::kMany, 0, stream>>>(units, also);
  return launched(api);
}

template <typename T>
Status* add_redirected(const Api* api, KernelContext* context, cudaStream_t stream) {
  Tensor hidden;
  kernels::Redirect<T> also{};
  TRY(read(api, context, 0, &hidden));
  TRY(read_also(api, context, stream, 1, 0, &also));
  if (!belongs(also, hidden, hidden.lengths[2])) {
    return api->error(ort::kInvalidArgument, "regraft: a redirect got shapes that do not fit");
  }
  const kernels::Given<T> units{static_cast<const T*>(hidden.data),
                                static_cast<int>(hidden.lengths[2])};
  return start_alone(api, stream, units, also);
}

template <typename T>
Status* add_row(const Api* api, KernelContext* context, cudaStream_t stream) {
  kernels::Row<T> also{};
  TRY(read_also(api, context, stream, 0, 0, &also));
  return start_alone(api, stream, kernels::Given<T>{}, also);
}

// Inputs: x, bias, and those of what is written besides; outputs: y, and the residual's sum.
template <typename T, typename Activation, typename Also>
Status* activate(const Api* api, KernelContext* context, cudaStream_t stream) {
  Tensor x, bias;
  Also also{};
  TRY(read(api, context, 0, &x));
  TRY(read(api, context, 1, &bias));
  TRY(read_also(api, context, stream, 2, 1, &also));
  const std::int64_t rows = x.lengths[0] * x.lengths[1];
  const std::int64_t hidden = x.lengths[2] / Activation::kHalves;
  if (bias.size() != x.lengths[2] || x.lengths[2] % (8 * Activation::kHalves) != 0 ||
      !belongs(also, x, hidden)) {
    return api->error(ort::kInvalidArgument, "regraft: an activation got shapes that do not fit");
  }
  void* y = nullptr;
  TRY(write(api, context, x, hidden, &y));
  if (x.size() == 0) return nullptr;
  const auto start = [&](auto kernel, int each) {
    const dim3 grid(static_cast<unsigned>(also.images + divided_up(rows, each)),
                    static_cast<unsigned>(divided_up(hidden, 8 * kernels::kFew)));
    kernel<<<grid, kernels::kFew, 0, stream>>>(
        static_cast<const T*>(x.data), static_cast<const T*>(bias.data), static_cast<T*>(y), rows,
        static_cast<int>(hidden), also);
  };
  // On a full card a thread had better do two rows; a gated one asks for twice as much anyway.
  if (Activation::kHalves == 1 && rows >= kManyRows) {
    start(kernels::activate<T, Activation, Activation::kHalves == 1 ? 2 : 1, Also>, 2);
  } else {
    start(kernels::activate<T, Activation, 1, Also>, 1);
  }
  return launched(api);
}

}  // namespace regraft
