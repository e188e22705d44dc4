// Products of activations and weights by cuBLASLt, each with the algorithm that was fastest.
//
// Left alone, cuBLAS chooses by rules of thumb, and otherwise for 258 tokens than for 257, so that
// the one token more may cost 8 %. So `regraft build` times what cuBLASLt proposes for every size
// that will be run (`regraft_tune`), and keeps the fastest beside the library (`regraft_save`). A
// process that runs the graph reads that file and times nothing: it computes what was verified. A
// size that is not in it gets cuBLASLt's first proposal.
//
// Products of the same input run at the same time where that is faster: a small batch leaves most
// of the card idle.
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
#include "lanes.cuh"
#include "timing.cuh"

namespace regraft {

constexpr int kProposals = 16;  // that are asked for at once
constexpr int kTogether = 3;    // products, at most

// One of the products of the same input.
struct Lane {
  const void* weight = nullptr;
  const void* bias = nullptr;  // none: without
  void* y = nullptr;
  Beside* beside = nullptr;  // none: the session's own stream
  void* workspace = nullptr;
};

using Lanes = std::array<Lane, kTogether>;  // as many as `Size::together` says

// One node's products of one size.
class Product {
 public:
  Product() = default;
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;
  ~Product() {
    const Lt& lt = Lt::get();
    for (cublasLtMatmulDesc_t operation : {plain_, biased_}) {
      if (operation != nullptr) lt.MatmulDescDestroy(operation);
    }
    for (cublasLtMatrixLayout_t layout : layouts_) {
      if (layout != nullptr) lt.MatrixLayoutDestroy(layout);
    }
  }

  // cuBLAS counts by columns: what are rows of y here are columns of its result, and x is its B.
  Text prepare(const Size& size, const Lanes& lanes) {
    const Lt& lt = Lt::get();
    if (!lt.error.empty()) return lt.error;
    size_ = size;
    const auto type = static_cast<cudaDataType_t>(size.type);
    if (size.biased < size.together) {
      REGRAFT_LT(lt.MatmulDescCreate(&plain_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    }
    if (size.biased > 0) {
      REGRAFT_LT(lt.MatmulDescCreate(&biased_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
      const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
      REGRAFT_LT(lt.MatmulDescSetAttribute(biased_, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                           sizeof epilogue));
      if (Text failed = bind(lanes[0].bias); !failed.empty()) return failed;
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
  Text choose(const void* x, const Lanes& lanes, cudaStream_t stream) {
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
    if (Text failed = fastest(all, x, lanes, stream); !failed.empty()) return failed;
    choices.known[size_] = choice_;
    return {};
  }

  Text run(const void* x, const Lanes& lanes, cudaStream_t stream) const {
    return run(choice_, x, lanes, stream);
  }

 private:
  // Where the bias is differs from lane to lane, and may change from run to run.
  Text bind(const void* bias) const {
    REGRAFT_LT(Lt::get().MatmulDescSetAttribute(biased_, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                                sizeof bias));
    return {};
  }

  // Whether an algorithm can do ours, with a bias and without as they are needed.
  bool fits(const cublasLtMatmulAlgo_t& algorithm, std::size_t* workspace) const {
    const Lt& lt = Lt::get();
    *workspace = 0;
    for (cublasLtMatmulDesc_t operation : {plain_, biased_}) {
      cublasLtMatmulHeuristicResult_t checked{};
      if (operation == nullptr) continue;
      if (lt.MatmulAlgoCheck(lt.handle, operation, layouts_[0], layouts_[1], layouts_[2],
                             layouts_[2], &algorithm, &checked) != CUBLAS_STATUS_SUCCESS) {
        return false;
      }
      *workspace = std::max(*workspace, checked.workspaceSize);
    }
    return *workspace <= kWorkspace;
  }

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
      return lt.MatmulAlgoGetHeuristic(lt.handle, biased_ ? biased_ : plain_, layouts_[0], x, y, y,
                                       preference, kProposals, found.data(), &count);
    });
    if (x != nullptr) lt.MatrixLayoutDestroy(x);
    if (y != nullptr) lt.MatrixLayoutDestroy(y);
    if (preference != nullptr) lt.MatmulPreferenceDestroy(preference);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED) return {};  // none
    REGRAFT_LT(status);
    for (int i = 0; i < count; ++i) {
      const auto same = [&](const Choice& other) {
        return std::equal(std::begin(other.algorithm.data), std::end(other.algorithm.data),
                          std::begin(found[i].algo.data));
      };
      std::size_t workspace = 0;
      if (fits(found[i].algo, &workspace) && std::none_of(all->begin(), all->end(), same)) {
        all->push_back({found[i].algo, workspace});
      }
    }
    return {};
  }

  Text run(const Choice& choice, const void* x, const Lanes& lanes, cudaStream_t stream) const {
    Text failed;
    int begun = 0;
    for (const int last = choice.apart ? 0 : size_.together; begun < last; ++begun) {
      if (Beside* beside = lanes[begun].beside) failed = beside->begin(stream);
      if (!failed.empty()) break;
    }
    for (int i = 0; i < size_.together && failed.empty(); ++i) {
      Beside* const beside = choice.apart ? nullptr : lanes[i].beside;
      failed = call(choice, x, lanes[i], beside ? beside->stream() : stream);
    }
    // After a failure, too: a recording must end on the stream where it began.
    for (int i = 0; i < begun; ++i) {
      Text also = lanes[i].beside ? lanes[i].beside->join(stream) : Text();
      if (failed.empty()) failed = also;
    }
    return failed;
  }

  Text call(const Choice& choice, const void* x, const Lane& lane, cudaStream_t stream) const {
    const Lt& lt = Lt::get();
    const float one = 1, none = 0;
    if (lane.bias != nullptr) {
      if (Text failed = bind(lane.bias); !failed.empty()) return failed;
    }
    REGRAFT_LT(lt.Matmul(lt.handle, lane.bias ? biased_ : plain_, &one, lane.weight, layouts_[0], x,
                         layouts_[1], &none, lane.y, layouts_[2], lane.y, layouts_[2],
                         &choice.algorithm, lane.workspace, choice.workspace, stream));
    return {};
  }

  Text fastest(std::vector<Choice> all, const void* x, Lanes lanes, cudaStream_t stream) {
    const auto together = static_cast<std::size_t>(size_.together);
    if (together > 1) {  // large products fill the card, and may as well follow each other
      const std::vector<Choice> before = all;
      for (Choice choice : before) {
        choice.apart = 1;
        all.push_back(choice);
      }
    }
    Timer timer;
    if (Text failed = timer.prepare(lanes[0].weight, size_, stream); !failed.empty()) return failed;
    Contest contest;
    for (std::size_t i = 0; i < all.size(); ++i) {
      cudaGraphExec_t graph = nullptr;
      const auto call = [&](std::size_t number) {
        for (std::size_t j = 0; j < together; ++j) {
          lanes[j].weight = timer.copy(number, j, together);
        }
        return run(all[i], x, lanes, stream).empty();
      };
      if (Text failed = timer.record(call, &graph); !failed.empty()) return failed;
      if (graph != nullptr) contest.add(i, graph);
    }
    std::size_t which = 0;
    if (Text failed = contest.decide(timer, &which); !failed.empty()) return failed;
    choice_ = all[which];
    return {};
  }

  Size size_{};
  Choice choice_;
  cublasLtMatmulDesc_t plain_ = nullptr, biased_ = nullptr;
  std::array<cublasLtMatrixLayout_t, 3> layouts_{};
};

// All products of one node: one for each number of rows.
class Products {
 public:
  // `lanes`: weights, biases and results; the first is on the session's own stream.
  Text run(const Size& size, const void* x, Lanes lanes, cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (Text failed = place(size.together, stream, &lanes); !failed.empty()) return failed;
    std::unique_ptr<Product>& product = products_[size.rows];
    if (product == nullptr) {
      auto fresh = std::make_unique<Product>();
      Text failed = fresh->prepare(size, lanes);
      if (failed.empty()) failed = fresh->choose(x, lanes, stream);
      if (!failed.empty()) return failed;
      product = std::move(fresh);
    }
    return product->run(x, lanes, stream);
  }

 private:
  // Gives each lane its stream and its memory.
  Text place(int together, cudaStream_t stream, Lanes* lanes) {
    for (int i = 0; i < together; ++i) {
      if (workspaces_[i] == nullptr) workspaces_[i] = Workspace::of(stream, i);
      if (i > 0) (*lanes)[i].beside = &beside_[i];
      if (Text failed = workspaces_[i]->get(&(*lanes)[i].workspace); !failed.empty()) return failed;
    }
    return {};
  }

  std::mutex mutex_;
  std::array<Beside, kTogether> beside_;  // the first is not used
  std::array<std::shared_ptr<Workspace>, kTogether> workspaces_;
  std::map<std::int64_t, std::unique_ptr<Product>> products_;
};

}  // namespace regraft
