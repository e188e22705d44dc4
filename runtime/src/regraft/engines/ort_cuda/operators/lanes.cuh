// Streams and memory for what can be done at the same time.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "choices.cuh"

namespace regraft {

// Memory to work in, zero at first. The nodes of a session follow each other, so that one serves
// all of them; what runs beside takes one of another number.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes) : bytes_(bytes) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { cudaFree(data_); }

  static std::shared_ptr<Workspace> of(cudaStream_t session, int number, std::size_t bytes) {
    static std::mutex mutex;
    static std::map<std::pair<cudaStream_t, int>, std::weak_ptr<Workspace>> all;
    const std::lock_guard<std::mutex> lock(mutex);
    std::weak_ptr<Workspace>& known = all[{session, number}];
    std::shared_ptr<Workspace> found = known.lock();
    if (found == nullptr) known = found = std::make_shared<Workspace>(bytes);
    return found;
  }

  Text get(void** data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (data_ == nullptr) {
      if (Text failed = allocate(); !failed.empty()) return failed;
    }
    *data = data_;
    return {};
  }

 private:
  Text allocate() {
    void* fresh = nullptr;
    REGRAFT_CUDA(cudaMalloc(&fresh, bytes_));
    cudaError_t failed = cudaMemset(fresh, 0, bytes_);
    if (failed == cudaSuccess) failed = cudaStreamSynchronize(nullptr);
    if (failed != cudaSuccess) {
      cudaFree(fresh);
      return failed_with(failed);
    }
    data_ = fresh;
    return {};
  }

  std::mutex mutex_;
  const std::size_t bytes_;
  void* data_ = nullptr;
};

// A node's workspaces of one number: one for each stream that it is run on.
class Workspaces {
 public:
  Workspace* of(cudaStream_t session, int number, std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<Workspace>& place = places_[session];
    if (place == nullptr) place = Workspace::of(session, number, bytes);
    return place.get();
  }

 private:
  std::mutex mutex_;
  std::map<cudaStream_t, std::shared_ptr<Workspace>> places_;
};

// A stream beside a session's own, for one node: were it for several, a recording would let what
// runs beside in one node wait for what did in the node before.
class Beside {
 public:
  Beside() = default;
  Beside(const Beside&) = delete;
  Beside& operator=(const Beside&) = delete;
  ~Beside() {
    if (begin_ != nullptr) cudaEventDestroy(begin_);
    if (end_ != nullptr) cudaEventDestroy(end_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  cudaStream_t stream() const { return stream_; }

  // What starts on it from here on comes after all that `after` was given.
  Text begin(cudaStream_t after) {
    // What was made before a failure is made no second time.
    if (begin_ == nullptr) {
      REGRAFT_CUDA(cudaEventCreateWithFlags(&begin_, cudaEventDisableTiming));
    }
    if (end_ == nullptr) REGRAFT_CUDA(cudaEventCreateWithFlags(&end_, cudaEventDisableTiming));
    if (stream_ == nullptr) {
      REGRAFT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    }
    REGRAFT_CUDA(cudaEventRecord(begin_, after));
    REGRAFT_CUDA(cudaStreamWaitEvent(stream_, begin_));
    return {};
  }

  // What `before` is given from here on comes after all that was started on it.
  Text join(cudaStream_t before) {
    REGRAFT_CUDA(cudaEventRecord(end_, stream_));
    REGRAFT_CUDA(cudaStreamWaitEvent(before, end_));
    return {};
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

}  // namespace regraft
