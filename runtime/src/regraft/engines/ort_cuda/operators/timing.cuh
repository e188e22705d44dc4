// Which of several ways to compute products is the fastest on this card.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "choices.cuh"

namespace regraft {

constexpr std::size_t kAligned = 256;  // bytes, what cuBLASLt takes for granted
constexpr int kRounds = 21;
// A later way has to be so much faster than an earlier one: cuBLASLt's order breaks ties.
constexpr float kGain = 0.997f;
// A card that reaches its limit of power lowers its clock within some 20 ms, and then a way that
// does the same with less power is the faster one. So long products are decided at a stretch.
constexpr float kLong = 0.02f;     // milliseconds of one call from which on that matters
constexpr float kClose = 1.03f;    // of the best: who takes part in the second part
constexpr std::size_t kBest = 5;   // of those, at most
constexpr float kStretch = 25.0f;  // milliseconds to settle, and as many to be timed
constexpr int kStretches = 3;

// How many calls in a row make one time: about a millisecond's, at 400 TFLOP/s.
inline int repeats(const Size& size) {
  const double products = 2.0 * size.together * size.rows * size.inner * size.columns;
  return static_cast<int>(std::clamp(4e11 / products, 4.0, 48.0));
}

// Runs calls with copies of a weight in turn, about as many as the card's cache holds, or one for
// each call: in a model, too, others were read since.
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

  Text prepare(const void* weight, const Size& size, cudaStream_t stream) {
    int device = 0, cache = 0;
    REGRAFT_CUDA(cudaGetDevice(&device));
    REGRAFT_CUDA(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device));
    stream_ = stream;
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
    for (int i = 0; i < calls_ && fine; ++i) fine = call(i);
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

  // Milliseconds of one call, over some launches after others that are not timed.
  Text time(cudaGraphExec_t graph, int before, int launches, float* milliseconds) const {
    for (int i = 0; i < before; ++i) REGRAFT_CUDA(cudaGraphLaunch(graph, stream_));
    REGRAFT_CUDA(cudaEventRecord(start_, stream_));
    for (int i = 0; i < launches; ++i) REGRAFT_CUDA(cudaGraphLaunch(graph, stream_));
    REGRAFT_CUDA(cudaEventRecord(stop_, stream_));
    REGRAFT_CUDA(cudaEventSynchronize(stop_));
    REGRAFT_CUDA(cudaEventElapsedTime(milliseconds, start_, stop_));
    *milliseconds /= static_cast<float>(launches * calls_);
    return {};
  }

  int calls() const { return calls_; }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
  char* copies_ = nullptr;
  std::size_t bytes_ = 0, count_ = 0;  // from a copy to the next; copies
  int calls_ = 1;                      // in a graph
};

struct Contender {
  std::size_t which;
  cudaGraphExec_t graph;
  std::vector<float> times = {};
  float median = 0;

  void settle() {
    std::sort(times.begin(), times.end());
    median = times[times.size() / 2];
    times.clear();
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
    if (Text failed = bursts(timer); !failed.empty()) return failed;
    const float best = fastest(all_).median;
    *which = fastest(all_).which;
    if (best < kLong) return {};
    std::vector<Contender*> close;
    for (Contender& one : all_) {
      if (one.median <= kClose * best) close.push_back(&one);
    }
    if (close.size() == 1) return {};
    if (close.size() > kBest) {
      std::nth_element(close.begin(), close.begin() + kBest, close.end(),
                       [](auto* a, auto* b) { return a->median < b->median; });
      close.resize(kBest);
      std::sort(close.begin(), close.end());  // cuBLASLt's order again
    }
    if (Text failed = stretches(timer, close); !failed.empty()) return failed;
    std::vector<Contender> last;
    for (Contender* one : close) last.push_back(*one);
    *which = fastest(last).which;
    return {};
  }

 private:
  static const Contender& fastest(const std::vector<Contender>& all) {
    const Contender* best = &all.front();
    for (const Contender& one : all) {
      if (one.median < kGain * best->median) best = &one;
    }
    return *best;
  }

  // All in turn, so that a clock that falls is the same for each.
  Text bursts(const Timer& timer) {
    for (int round = 0; round <= kRounds; ++round) {
      for (Contender& one : all_) {
        float milliseconds = 0;
        if (Text failed = timer.time(one.graph, 0, 1, &milliseconds); !failed.empty()) {
          return failed;
        }
        if (round > 0) one.times.push_back(milliseconds);  // the first one loads kernels
      }
    }
    for (Contender& one : all_) one.settle();
    return {};
  }

  // Each for as long as it takes to settle, forwards and backwards.
  Text stretches(const Timer& timer, std::vector<Contender*> close) {
    for (int round = 0; round < kStretches; ++round) {
      for (Contender* one : close) {
        const float each = one->median * static_cast<float>(timer.calls());
        const int launches = std::max(1, static_cast<int>(kStretch / each));
        float milliseconds = 0;
        if (Text failed = timer.time(one->graph, launches, launches, &milliseconds);
            !failed.empty()) {
          return failed;
        }
        one->times.push_back(milliseconds);
      }
      std::reverse(close.begin(), close.end());
    }
    for (Contender* one : close) one->settle();
    return {};
  }

  std::vector<Contender> all_;
};

}  // namespace regraft
