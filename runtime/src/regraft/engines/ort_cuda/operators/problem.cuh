// What cuBLASLt is asked for: products of one size, and the algorithms that it proposes for them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "choices.cuh"

namespace regraft {

constexpr int kProposals = 16;  // that are asked for at once

class Problem {
 public:
  Problem() = default;
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;
  ~Problem() {
    const Lt& lt = Lt::get();
    for (cublasLtMatmulDesc_t operation : {plain_, biased_}) {
      if (operation != nullptr) lt.MatmulDescDestroy(operation);
    }
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
    if (size.biased < size.together) {
      REGRAFT_LT(lt.MatmulDescCreate(&plain_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    }
    if (size.biased > 0) {
      REGRAFT_LT(lt.MatmulDescCreate(&biased_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
      const cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
      REGRAFT_LT(lt.MatmulDescSetAttribute(biased_, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
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

  // Where the bias is differs from lane to lane, and may change from run to run.
  Text bind(const void* bias) const {
    REGRAFT_LT(Lt::get().MatmulDescSetAttribute(biased_, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                                sizeof bias));
    return {};
  }

  // One of the products, on a stream; `bias` and `workspace` may be none.
  Text call(const Choice& choice, const void* x, const void* weight, const void* bias, void* y,
            void* workspace, cudaStream_t stream) const {
    const Lt& lt = Lt::get();
    const float one = 1, none = 0;
    if (bias != nullptr) {
      if (Text failed = bind(bias); !failed.empty()) return failed;
    }
    REGRAFT_LT(lt.Matmul(lt.handle, bias ? biased_ : plain_, &one, weight, layouts_[0], x,
                         layouts_[1], &none, y, layouts_[2], y, layouts_[2], &choice.algorithm,
                         workspace, choice.workspace, stream));
    return {};
  }

  // The algorithms that are worth a try, cuBLASLt's first one first; without those for
  // other rows unless they are asked for.
  Text propose(bool other, std::vector<Choice>* all) const {
    if (Text failed = propose_for(size_.rows, all); !failed.empty()) return failed;
    if (all->empty()) return "regraft: cuBLASLt knows no algorithm for a product";
    if (!other) return {};
    for (const std::int64_t rows : other_rows()) {
      if (Text failed = propose_for(rows, all); !failed.empty()) return failed;
    }
    return {};
  }

  // Whether an algorithm can do ours, with a bias and without as they are needed, and the
  // bytes that it works in.
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

 private:
  // What is proposed for a few rows more or less is often not proposed here, and faster; and what
  // is for round numbers, with a token more or without.
  std::vector<std::int64_t> other_rows() const {
    std::vector<std::int64_t> all;
    for (const std::int64_t part : {-256, 256, -32, 32, -8, 8}) {
      all.push_back(size_.rows + size_.rows / part);
    }
    for (std::int64_t power = 2; power <= 2 * size_.rows; power *= 2) {
      for (const std::int64_t rows : {power, power / 2 * 3}) {
        if (2 * rows >= size_.rows && rows <= 2 * size_.rows) all.push_back(rows);
      }
    }
    return all;
  }

  // Appends what cuBLASLt proposes for so many rows, if it can do ours and is not there yet.
  Text propose_for(std::int64_t rows, std::vector<Choice>* all) const {
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

  Size size_{};
  cublasLtMatmulDesc_t plain_ = nullptr, biased_ = nullptr;
  std::array<cublasLtMatrixLayout_t, 3> layouts_{};
};

}  // namespace regraft
