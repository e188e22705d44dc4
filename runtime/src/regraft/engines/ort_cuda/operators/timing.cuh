// Which of several ways to compute products is the fastest on this card.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "choices.cuh"
#include "pass_on.cuh"

namespace regraft {

constexpr std::size_t kAligned = 256;  // bytes, what cuBLASLt takes for granted
constexpr int kRounds = 21;
constexpr int kEarly = 3;           // rounds, after which
constexpr float kHopeless = 1.15f;  // of the best are given up
// A later way has to be so much faster than an earlier one: cuBLASLt's order breaks ties.
constexpr float kGain = 0.998f;
constexpr int kPassing = 1024;  // blocks that write a product's input anew

// How many calls in a row make one time: products of a millisecond, at 400 TFLOP/s.
inline int repeats(const Size& size) {
  const double products = 2.0 * size.together * size.rows * size.inner * size.columns;
  return static_cast<int>(std::clamp(4e11 / products, 4.0, 48.0));
}

// Runs calls as a model does. Their weights are copies in turn, about as many as the card's cache
// holds, or one for each call: in a model, too, others were read since. And before each call its
// input is written anew. One product after another finds the cache otherwise than in a model, and
// takes the card to its limit of power, where others are the fastest than in a model that also
// normalises and attends.
class Timer {
 public:
  Timer() = default;
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() {
    if (start_ != nullptr) cudaEventDestroy(start_);
    if (stop_ != nullptr) cudaEventDestroy(stop_);
    cudaFree(copies_);
  }

  Text prepare(const void* x, const void* weight, const Size& size, cudaStream_t stream) {
    int device = 0, cache = 0;
    REGRAFT_CUDA(cudaGetDevice(&device));
    REGRAFT_CUDA(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device));
    stream_ = stream;
    input_ = x;
    passed_ = size.bytes_of_input() / sizeof(uint4);
    calls_ = repeats(size);
    bytes_ = (size.bytes_of_weight() + kAligned - 1) / kAligned * kAligned;
    const std::size_t together = static_cast<std::size_t>(size.together);
    count_ = std::min(cache / bytes_ + 2, together * calls_);
    count_ = std::max(count_ / together, std::size_t{1}) * together;
    REGRAFT_CUDA(cudaEventCreate(&start_));
    REGRAFT_CUDA(cudaEventCreate(&stop_));
    REGRAFT_CUDA(cudaMalloc(&copies_, bytes_ * count_));
    for (std::size_t i = 0; i < count_; ++i) {
      REGRAFT_CUDA(cudaMemcpyAsync(copies_ + i * bytes_, weight, size.bytes_of_weight(),
                                   cudaMemcpyDeviceToDevice, stream));
    }
    return {};
  }

  // Weight `i` of call `number`.
  const void* copy(std::size_t number, std::size_t i, std::size_t together) const {
    return copies_ + (number * together + i) % count_ * bytes_;
  }

  // Calls in a row as a CUDA graph; none if one is refused, which is no error: it is passed over.
  template <typename Call>
  Text record(const Call& call, cudaGraphExec_t* executable) const {
    if (!call(0)) {  // and what is loaded on first use may not be recorded
      cudaGetLastError();
      return {};
    }
    cudaGraph_t graph = nullptr;
    REGRAFT_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    bool fine = true;
    for (int i = 0; i < calls_ && fine; ++i) {
      // Onto itself: what is there stays as it is.
      kernels::pass_on<<<kPassing, kernels::kThreads, 0, stream_>>>(
          static_cast<uint4*>(const_cast<void*>(input_)), static_cast<const uint4*>(input_),
          passed_);
      fine = cudaPeekAtLastError() == cudaSuccess && call(i);
    }
    cudaError_t status = cudaStreamEndCapture(stream_, &graph);
    if (fine && status == cudaSuccess) status = cudaGraphInstantiate(executable, graph, 0);
    if (graph != nullptr) cudaGraphDestroy(graph);
    if (!fine) {
      cudaGetLastError();
      return {};
    }
    REGRAFT_CUDA(status);
    return {};
  }

  // Milliseconds of one launch.
  Text time(cudaGraphExec_t graph, float* milliseconds) const {
    REGRAFT_CUDA(cudaEventRecord(start_, stream_));
    REGRAFT_CUDA(cudaGraphLaunch(graph, stream_));
    REGRAFT_CUDA(cudaEventRecord(stop_, stream_));
    REGRAFT_CUDA(cudaEventSynchronize(stop_));
    REGRAFT_CUDA(cudaEventElapsedTime(milliseconds, start_, stop_));
    return {};
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
  const void* input_ = nullptr;
  std::size_t passed_ = 0;  // of the input, in pieces of 16 bytes
  char* copies_ = nullptr;
  std::size_t bytes_ = 0, count_ = 0;  // from a copy to the next; copies
  int calls_ = 1;                      // in a graph
};

struct Contender {
  std::size_t which;
  cudaGraphExec_t graph;
  std::vector<float> times = {};
  bool hopeless = false;

  float median() const {
    std::vector<float> sorted = times;
    std::sort(sorted.begin(), sorted.end());
    return sorted[sorted.size() / 2];
  }
};

class Contest {
 public:
  Contest() = default;
  Contest(const Contest&) = delete;
  Contest& operator=(const Contest&) = delete;
  ~Contest() {
    for (const Contender& one : all_) cudaGraphExecDestroy(one.graph);
  }

  void add(std::size_t which, cudaGraphExec_t graph) { all_.push_back({which, graph}); }

  // The fastest; a later one has to beat the best before it by kGain.
  Text decide(const Timer& timer, std::size_t* which) {
    if (all_.empty()) return "regraft: no algorithm of cuBLASLt can do a product";
    // All in turn, so that a clock that falls is the same for each.
    for (int round = 0; round <= kRounds; ++round) {
      for (Contender& one : all_) {
        float milliseconds = 0;
        if (one.hopeless) continue;
        if (Text failed = timer.time(one.graph, &milliseconds); !failed.empty()) return failed;
        if (round > 0) one.times.push_back(milliseconds);  // the first one loads kernels
      }
      if (round == kEarly) give_up();
    }
    *which = fastest().which;
    return {};
  }

 private:
  const Contender& fastest() const {
    const Contender* best = nullptr;
    for (const Contender& one : all_) {
      if (one.hopeless) continue;
      if (best == nullptr || one.median() < kGain * best->median()) best = &one;
    }
    return *best;
  }

  void give_up() {
    const float limit = kHopeless * fastest().median();
    for (Contender& one : all_) one.hopeless = one.median() > limit;
  }

  std::vector<Contender> all_;
};

}  // namespace regraft
