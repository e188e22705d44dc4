// Products of activations and weights by cuBLASLt, each with the algorithm that was fastest.
//
// Left alone, cuBLAS chooses by rules of thumb, and otherwise for 258 tokens than for 257, so that
// the one token more may cost 8 %. So `regraft build` times what cuBLASLt proposes for every size
// that will be run (`regraft_tune`), and keeps the fastest beside the library (`regraft_save`). A
// process that runs the graph reads that file and times nothing: it computes what was verified. A
// size that is not in it gets cuBLASLt's first proposal.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "choices.cuh"

namespace regraft {

constexpr std::size_t kWorkspace = 32 << 20;  // bytes, what cuBLAS itself takes on Hopper
constexpr std::size_t kAligned = 256;         // bytes, what cuBLASLt takes for granted
constexpr int kProposals = 16;                // that are asked for at once
constexpr int kRounds = 21;
// A later proposal has to be so much faster than an earlier one: cuBLASLt's order breaks ties.
constexpr float kGain = 0.997f;

// How many products in a row make one time: about a millisecond's, at 400 TFLOP/s.
inline int repeats(const Size& size) {
  const double products = 2.0 * size.rows * size.inner * size.columns;
  return static_cast<int>(std::clamp(4e11 / products, 4.0, 48.0));
}

// Memory for algorithms to work in: one for all products of a stream, which follow each other.
class Workspace {
 public:
  void* data = nullptr;

  ~Workspace() { cudaFree(data); }

  static std::shared_ptr<Workspace> of(cudaStream_t stream) {
    static std::mutex mutex;
    static std::map<cudaStream_t, std::weak_ptr<Workspace>> all;
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Workspace> found = all[stream].lock();
    if (found == nullptr) {
      found = std::make_shared<Workspace>();
      if (cudaMalloc(&found->data, kWorkspace) != cudaSuccess) {
        cudaGetLastError();
        return nullptr;
      }
      all[stream] = found;
    }
    return found;
  }
};

// One node's products of one size.
class Product {
 public:
  Product() = default;
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;
  ~Product() {
    const Lt& lt = Lt::get();
    if (operation_ != nullptr) lt.MatmulDescDestroy(operation_);
    for (cublasLtMatrixLayout_t layout : layouts_) {
      if (layout != nullptr) lt.MatrixLayoutDestroy(layout);
    }
  }

  // cuBLAS counts by columns: what are rows of y here are columns of its result, and x is its B.
  Text prepare(const Size& size, const void* bias) {
    const Lt& lt = Lt::get();
    if (!lt.error.empty()) return lt.error;
    size_ = size;
    const auto type = static_cast<cudaDataType_t>(size.type);
    REGRAFT_LT(lt.MatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    if (bias != nullptr) {
      const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
      REGRAFT_LT(lt.MatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                           sizeof epilogue));
      if (Text failed = bind(bias); !failed.empty()) return failed;
    }
    const auto n = static_cast<std::uint64_t>(size.columns);
    const auto m = static_cast<std::uint64_t>(size.rows);
    const auto k = static_cast<std::uint64_t>(size.inner);
    REGRAFT_LT(lt.MatrixLayoutCreate(&layouts_[0], type, n, k, size.columns));
    REGRAFT_LT(lt.MatrixLayoutCreate(&layouts_[1], type, k, m, size.inner));
    REGRAFT_LT(lt.MatrixLayoutCreate(&layouts_[2], type, n, m, size.columns));
    return {};
  }

  // The algorithm: the one that is known, or the fastest if there is leave to time, or the first.
  Text choose(const void* x, const void* weight, void* y, void* workspace, cudaStream_t stream) {
    Choices& choices = Choices::get();
    const std::lock_guard<std::mutex> lock(choices.mutex);
    if (!choices.error.empty()) return choices.error;
    if (const auto found = choices.known.find(size_); found != choices.known.end()) {
      choice_ = found->second;
      return {};
    }
    std::vector<Choice> all;
    if (Text failed = propose(size_.rows, &all); !failed.empty()) return failed;
    if (all.empty()) return "regraft: cuBLASLt knows no algorithm for a product";
    choice_ = all.front();
    cudaStreamCaptureStatus recording = cudaStreamCaptureStatusNone;
    REGRAFT_CUDA(cudaStreamIsCapturing(stream, &recording));
    if (!choices.tuning || recording != cudaStreamCaptureStatusNone) return {};
    // What is proposed for a few rows more or less is often not proposed here, and faster.
    for (const std::int64_t part : {-256, 256, -32, 32, -8, 8}) {
      const std::int64_t rows = size_.rows + size_.rows / part;
      if (Text failed = propose(rows, &all); !failed.empty()) return failed;
    }
    if (Text failed = fastest(all, x, weight, y, workspace, stream); !failed.empty()) return failed;
    choices.known[size_] = choice_;
    return {};
  }

  // Where the bias is may change from run to run.
  Text bind(const void* bias) const {
    if (bias == nullptr) return {};
    REGRAFT_LT(Lt::get().MatmulDescSetAttribute(operation_, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                                &bias, sizeof bias));
    return {};
  }

  Text run(const void* x, const void* weight, void* y, void* workspace, cudaStream_t stream) const {
    REGRAFT_LT(call(choice_, x, weight, y, workspace, stream));
    return {};
  }

 private:
  // Appends what cuBLASLt proposes for so many rows, if it can do ours and is not there yet.
  Text propose(std::int64_t rows, std::vector<Choice>* all) const {
    const Lt& lt = Lt::get();
    const auto type = static_cast<cudaDataType_t>(size_.type);
    cublasLtMatmulPreference_t preference = nullptr;
    cublasLtMatrixLayout_t x = nullptr, y = nullptr;
    std::array<cublasLtMatmulHeuristicResult_t, kProposals> found;
    int count = 0;
    cublasStatus_t status = lt.MatmulPreferenceCreate(&preference);
    const auto then = [&](auto call) {
      if (status == CUBLAS_STATUS_SUCCESS) status = call();
    };
    then([&] {
      return lt.MatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &kWorkspace, sizeof kWorkspace);
    });
    then([&] { return lt.MatrixLayoutCreate(&x, type, size_.inner, rows, size_.inner); });
    then([&] { return lt.MatrixLayoutCreate(&y, type, size_.columns, rows, size_.columns); });
    then([&] {
      return lt.MatmulAlgoGetHeuristic(lt.handle, operation_, layouts_[0], x, y, y, preference,
                                       kProposals, found.data(), &count);
    });
    if (x != nullptr) lt.MatrixLayoutDestroy(x);
    if (y != nullptr) lt.MatrixLayoutDestroy(y);
    if (preference != nullptr) lt.MatmulPreferenceDestroy(preference);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED) return {};  // none
    REGRAFT_LT(status);
    for (int i = 0; i < count; ++i) {
      cublasLtMatmulHeuristicResult_t checked{};
      const bool fits =
          lt.MatmulAlgoCheck(lt.handle, operation_, layouts_[0], layouts_[1], layouts_[2],
                             layouts_[2], &found[i].algo, &checked) == CUBLAS_STATUS_SUCCESS &&
          checked.workspaceSize <= kWorkspace;
      const auto same = [&](const Choice& other) {
        return std::equal(std::begin(other.algorithm.data), std::end(other.algorithm.data),
                          std::begin(found[i].algo.data));
      };
      if (fits && std::none_of(all->begin(), all->end(), same)) {
        all->push_back({found[i].algo, checked.workspaceSize});
      }
    }
    return {};
  }

  cublasStatus_t call(const Choice& choice, const void* x, const void* weight, void* y,
                      void* workspace, cudaStream_t stream) const {
    const Lt& lt = Lt::get();
    const float one = 1, none = 0;
    return lt.Matmul(lt.handle, operation_, &one, weight, layouts_[0], x, layouts_[1], &none, y,
                     layouts_[2], y, layouts_[2], &choice.algorithm, workspace, choice.workspace,
                     stream);
  }

  // Times all proposals in turn, so that a clock that falls is the same for each.
  Text fastest(const std::vector<Choice>& all, const void* x, const void* weight, void* y,
               void* workspace, cudaStream_t stream) {
    int device = 0, cache = 0;
    REGRAFT_CUDA(cudaGetDevice(&device));
    REGRAFT_CUDA(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device));
    const Timer timer(weight, size_, static_cast<std::size_t>(cache), stream);
    if (!timer.error.empty()) return timer.error;
    std::vector<cudaGraphExec_t> graphs;
    std::vector<std::size_t> which;
    Text failed;
    for (std::size_t i = 0; i < all.size(); ++i) {
      cudaGraphExec_t graph = nullptr;
      failed = timer.record(stream, &graph, [&](const void* copy) {
        return call(all[i], x, copy, y, workspace, stream) == CUBLAS_STATUS_SUCCESS;
      });
      if (!failed.empty()) break;
      if (graph == nullptr) continue;  // proposed, and then refused
      graphs.push_back(graph);
      which.push_back(i);
    }
    std::vector<std::vector<float>> times(graphs.size());
    for (int round = 0; failed.empty() && round <= kRounds; ++round) {
      for (std::size_t i = 0; failed.empty() && i < graphs.size(); ++i) {
        float milliseconds = 0;
        failed = timer.time(stream, graphs[i], &milliseconds);
        if (round > 0) times[i].push_back(milliseconds);  // the first one loads kernels
      }
    }
    for (cudaGraphExec_t graph : graphs) cudaGraphExecDestroy(graph);
    if (!failed.empty()) return failed;
    float best = 0;
    for (std::size_t i = 0; i < times.size(); ++i) {
      std::sort(times[i].begin(), times[i].end());
      const float median = times[i][kRounds / 2];
      if (best != 0 && median >= kGain * best) continue;
      best = median;
      choice_ = all[which[i]];
    }
    return best > 0 ? Text() : "regraft: no algorithm of cuBLASLt can do a product";
  }

  // Runs a product with copies of its weight in turn, more than the card's cache holds: in a model,
  // too, others were read since.
  struct Timer {
    Text error;
    cudaEvent_t start = nullptr, stop = nullptr;
    char* copies = nullptr;
    std::size_t bytes, products, count;  // from a copy to the next; in a row; copies

    Timer(const void* weight, const Size& size, std::size_t cache, cudaStream_t stream)
        : bytes((size.bytes_of_weight() + kAligned - 1) / kAligned * kAligned),
          products(repeats(size)),
          count(std::min(cache / bytes + 2, products)) {
      bool made = cudaEventCreate(&start) == cudaSuccess &&
                  cudaEventCreate(&stop) == cudaSuccess &&
                  cudaMalloc(&copies, bytes * count) == cudaSuccess;
      for (std::size_t i = 0; i < count && made; ++i) {
        made = cudaMemcpyAsync(copies + i * bytes, weight, size.bytes_of_weight(),
                               cudaMemcpyDeviceToDevice, stream) == cudaSuccess;
      }
      if (!made) error = std::string("regraft: ") + cudaGetErrorString(cudaGetLastError());
    }
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;
    ~Timer() {
      if (start != nullptr) cudaEventDestroy(start);
      if (stop != nullptr) cudaEventDestroy(stop);
      cudaFree(copies);
    }

    template <typename Call>
    Text record(cudaStream_t stream, cudaGraphExec_t* executable, const Call& call) const {
      // A refusal is no error: the proposal is passed over.
      if (!call(copies)) return {};  // and what is loaded on first use may not be recorded
      cudaGraph_t graph = nullptr;
      REGRAFT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      bool fine = true;
      for (std::size_t i = 0; i < products && fine; ++i) {
        fine = call(copies + i % count * bytes);
      }
      cudaError_t status = cudaStreamEndCapture(stream, &graph);
      if (fine && status == cudaSuccess) status = cudaGraphInstantiate(executable, graph, 0);
      if (graph != nullptr) cudaGraphDestroy(graph);
      if (!fine) {
        cudaGetLastError();
        return {};
      }
      REGRAFT_CUDA(status);
      return {};
    }

    Text time(cudaStream_t stream, cudaGraphExec_t graph, float* milliseconds) const {
      REGRAFT_CUDA(cudaEventRecord(start, stream));
      REGRAFT_CUDA(cudaGraphLaunch(graph, stream));
      REGRAFT_CUDA(cudaEventRecord(stop, stream));
      REGRAFT_CUDA(cudaEventSynchronize(stop));
      REGRAFT_CUDA(cudaEventElapsedTime(milliseconds, start, stop));
      return {};
    }
  };

  Size size_{};
  Choice choice_;
  cublasLtMatmulDesc_t operation_ = nullptr;
  std::array<cublasLtMatrixLayout_t, 3> layouts_{};
};

// All products of one node: one for each number of rows.
class Products {
 public:
  Text run(const Size& size, const void* x, const void* weight, const void* bias, void* y,
           cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (workspace_ == nullptr) workspace_ = Workspace::of(stream);
    if (workspace_ == nullptr) return "regraft: out of memory for the products' workspace";
    void* const data = workspace_->data;
    std::unique_ptr<Product>& product = products_[size.rows];
    if (product == nullptr) {
      auto fresh = std::make_unique<Product>();
      Text failed = fresh->prepare(size, bias);
      if (failed.empty()) failed = fresh->choose(x, weight, y, data, stream);
      if (!failed.empty()) return failed;
      product = std::move(fresh);
    }
    if (Text failed = product->bind(bias); !failed.empty()) return failed;
    return product->run(x, weight, y, data, stream);
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<Workspace> workspace_;
  std::map<std::int64_t, std::unique_ptr<Product>> products_;
};

}  // namespace regraft
