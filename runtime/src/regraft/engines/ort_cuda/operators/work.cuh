// What the small kernels do when their node is run: read tensors, and start on a stream.
#pragma once

#include <algorithm>
#include <string>

#include "activation.cuh"
#include "tensors.cuh"

namespace regraft {

using kernels::Gelu;
using kernels::QuickGelu;
using kernels::SwiGlu;

constexpr std::int64_t kManyRows = 1024;   // of tokens, that fill a card
constexpr std::int64_t kAmpleRows = 4096;  // that fill it several times
constexpr std::int64_t kManyReads = 2048;  // of one block, which does about one in a cycle
constexpr std::int64_t kFewReads = 2560;   // done before ample rows are, one after the other, too

inline std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Blocks for each of these images: several where images are few and each is much for one block.
// To meet costs about as much as half of `kManyReads`. `reads`: of each neuron and image.
inline unsigned shares_of(std::int64_t images, std::int64_t count, std::int64_t reads) {
  if (images == 0 || count * reads < kManyReads) return 1;
  const std::int64_t most = std::min(count, kernels::kSearching / images);
  if (most < kernels::kFewest) return 1;
  return static_cast<unsigned>(divided_up(count, divided_up(count, most)));  // each as many neurons
}

// Whether the blocks that search may be slow: they are done long before the others.
template <typename Also>
bool may_be_slow(const Also&, std::int64_t, int) {
  return false;
}

template <typename T>
bool may_be_slow(const kernels::Redirect<T>& also, std::int64_t rows, int halves) {
  const std::int64_t own = divided_up(also.search.count, also.search.shares);
  return rows >= kAmpleRows && own * also.tokens * halves < kFewReads;
}

inline Status* unfit(const Api* api, const char* what) {
  const std::string text = std::string("regraft: ") + what + " got shapes that do not fit";
  return api->error(ort::kInvalidArgument, text.c_str());
}

// What a small kernel is started with.
struct Call {
  const Api* api;
  KernelContext* context;
  cudaStream_t stream;
  kernels::Meeting* meeting;  // none: nothing is redirected
};

// Reads what a node writes besides: its inputs from `at` on, residual first; `index`: the output.
// Rows are those of (images, tokens); `halves`: reads of each hidden unit.
inline Status* read_also(const Call&, std::size_t, std::size_t, int, kernels::Nothing*) {
  return nullptr;
}

template <typename T>
Status* read_rows(const Call& call, const Tensor& residual, std::size_t index,
                  kernels::LastRows<T>* rows) {
  void* sum = nullptr;
  TRY(in_place(call.api, call.context, residual, sizeof(T), call.stream, index, &sum));
  rows->sum = static_cast<T*>(sum);
  rows->images = static_cast<unsigned>(residual.lengths[0]);
  rows->tokens = static_cast<int>(residual.lengths[1]);
  rows->width = static_cast<int>(residual.lengths[2]);
  return nullptr;
}

template <typename T>
Status* read_also(const Call& call, std::size_t at, std::size_t index, int,
                  kernels::Row<T>* also) {
  Tensor residual, added;
  TRY(read(call.api, call.context, at, &residual));
  TRY(read(call.api, call.context, at + 1, &added));
  const std::int64_t width = residual.lengths[2];
  if (added.size() != width || width % 8 != 0) return unfit(call.api, "a row");
  also->added = static_cast<const T*>(added.data);
  return read_rows<T>(call, residual, index, also);
}

template <typename T>
Status* read_also(const Call& call, std::size_t at, std::size_t index, int halves,
                  kernels::Redirect<T>* also) {
  Tensor residual, neurons, signs, down;
  TRY(read(call.api, call.context, at, &residual));
  TRY(read(call.api, call.context, at + 1, &neurons));
  TRY(read(call.api, call.context, at + 2, &signs));
  TRY(read(call.api, call.context, at + 3, &down));
  const std::int64_t width = residual.lengths[2], count = neurons.size();
  if (signs.size() != count || down.size() != count * width || width % 8 != 0 || count == 0 ||
      count > kernels::kNeurons) {
    return unfit(call.api, "a redirect");
  }
  also->down = static_cast<const T*>(down.data);
  kernels::Search& search = also->search;
  search.meeting = call.meeting;
  search.shares = shares_of(residual.lengths[0], count, residual.lengths[1] * halves);
  search.count = static_cast<int>(count);
  for (std::int64_t k = 0; k < count; ++k) {  // these two are in the host's memory
    search.neurons[k] = static_cast<int>(static_cast<const std::int64_t*>(neurons.data)[k]);
    search.signs[k] = static_cast<float>(static_cast<const T*>(signs.data)[k]);
  }
  return read_rows<T>(call, residual, index, also);
}

// Whether what is written besides is of the same images and tokens as these hidden units.
inline bool belongs(const kernels::Nothing&, const Tensor&, std::int64_t) { return true; }

template <typename T>
bool belongs(const kernels::Row<T>& also, const Tensor& x, std::int64_t) {
  return x.lengths[0] == also.images && x.lengths[1] == also.tokens;
}

template <typename T>
bool belongs(const kernels::Redirect<T>& also, const Tensor& x, std::int64_t hidden) {
  const auto is_unit = [&](int neuron) { return 0 <= neuron && neuron < hidden; };
  const int* neurons = also.search.neurons;
  return x.lengths[0] == also.images && x.lengths[1] == also.tokens &&
         std::all_of(neurons, neurons + also.search.count, is_unit);
}

template <typename T, typename Also>
Status* start_alone(const Call& call, const kernels::Given<T>& units, const Also& also) {
  if (also.images == 0 || also.tokens == 0) return nullptr;
  kernels::write_alone<<<also.blocks(), kernels::kMany, 0, call.stream>>>(units, also);
  return launched(call.api);
}

template <typename T>
Status* add_redirected(const Call& call) {
  Tensor hidden;
  kernels::Redirect<T> also{};
  TRY(read(call.api, call.context, 0, &hidden));
  TRY(read_also(call, 1, 0, 1, &also));
  if (!belongs(also, hidden, hidden.lengths[2])) return unfit(call.api, "a redirect");
  const kernels::Given<T> units{static_cast<const T*>(hidden.data),
                                static_cast<int>(hidden.lengths[2])};
  return start_alone(call, units, also);
}

template <typename T>
Status* add_row(const Call& call) {
  kernels::Row<T> also{};
  TRY(read_also(call, 0, 0, 1, &also));
  return start_alone(call, kernels::Given<T>{}, also);
}

// Inputs: x, bias, and those of what is written besides; outputs: y, and the residual's sum.
template <typename T, typename Activation, typename Also>
Status* activate(const Call& call) {
  constexpr int kHalves = Activation::kHalves;
  Tensor x, bias;
  Also also{};
  TRY(read(call.api, call.context, 0, &x));
  TRY(read(call.api, call.context, 1, &bias));
  TRY(read_also(call, 2, 1, kHalves, &also));
  const std::int64_t rows = x.lengths[0] * x.lengths[1], hidden = x.lengths[2] / kHalves;
  if (bias.size() != x.lengths[2] || x.lengths[2] % (8 * kHalves) != 0 ||
      !belongs(also, x, hidden)) {
    return unfit(call.api, "an activation");
  }
  void* y = nullptr;
  TRY(write(call.api, call.context, x, hidden, &y));
  if (x.size() == 0) return nullptr;
  const auto start = [&](auto kernel, int each) {
    const dim3 grid(static_cast<unsigned>(also.blocks() + divided_up(rows, each)),
                    static_cast<unsigned>(divided_up(hidden, 8 * kernels::kFew)));
    kernel<<<grid, kernels::kFew, 0, call.stream>>>(
        static_cast<const T*>(x.data), static_cast<const T*>(bias.data), static_cast<T*>(y), rows,
        static_cast<int>(hidden), also);
  };
  // On a full card a thread had better do two rows; a gated one asks for twice as much anyway.
  constexpr int kEach = kHalves == 1 ? 2 : 1;
  if (rows < kManyRows) {
    start(kernels::activate<T, Activation, 1, Also::kRoom, Also>, 1);
  } else if (may_be_slow(also, rows, kHalves)) {
    start(kernels::activate<T, Activation, kEach, Also::kTight, Also>, kEach);
  } else {
    start(kernels::activate<T, Activation, kEach, Also::kRoom, Also>, kEach);
  }
  return launched(call.api);
}

}  // namespace regraft
