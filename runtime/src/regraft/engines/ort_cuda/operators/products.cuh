// Products of activations and weights by cuBLASLt, each with the algorithm that was fastest.
//
// Left alone, cuBLAS chooses by rules of thumb, and otherwise for 258 tokens than for 257, so that
// the one token more may cost 8 %. So `regraft build` times what cuBLASLt proposes for every size
// that will be run (`regraft_tune`), and keeps the fastest beside the library (`regraft_save`). A
// process that runs the graph reads that file and times nothing: it computes what was verified.
// Sizes that differ by a token an image share a choice (`Choices::near`); one that nothing was
// chosen for gets cuBLASLt's first proposal.
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
#include "problem.cuh"
#include "timing.cuh"

namespace regraft {

constexpr int kTogether = 3;  // products, at most

// One of the products of the same input.
struct Lane {
  const void* weight = nullptr;
  const void* bias = nullptr;  // none: without
  void* y = nullptr;
  Beside* beside = nullptr;  // none: the session's own stream
  Workspace* workspace = nullptr;
};

using Lanes = std::array<Lane, kTogether>;  // as many as `Size::together` says

// One node's products of one size.
class Product {
 public:
  Text prepare(const Size& size, const Lanes& lanes) {
    size_ = size;
    return problem_.prepare(size, lanes[0].bias);
  }

  // The algorithm: the one that is known, or that of a size nearby, or the fastest if there is
  // leave to time, or the first.
  Text choose(const void* x, const Lanes& lanes, cudaStream_t stream) {
    Choices& choices = Choices::get();
    const std::lock_guard<std::mutex> lock(choices.mutex);
    if (!choices.error.empty()) return choices.error;
    if (const auto found = choices.known.find(size_); found != choices.known.end()) {
      choice_ = found->second;
      if (problem_.fits(choice_.algorithm, &choice_.workspace)) return {};
      return "regraft: a product cannot be computed as it was chosen; "
             "run regraft build --force again";
    }
    cudaStreamCaptureStatus recording = cudaStreamCaptureStatusNone;
    REGRAFT_CUDA(cudaStreamIsCapturing(stream, &recording));
    const bool tried = recording == cudaStreamCaptureStatusNone, timed = choices.tuning && tried;
    if (const auto near = choices.near.find(size_.rounded()); near != choices.near.end()) {
      choice_ = near->second;
      // What does for other rows may not do for these, and cuBLASLt may refuse only to run it.
      if (problem_.fits(choice_.algorithm, &choice_.workspace) &&
          (!tried || run(x, lanes, stream).empty())) {
        if (timed) choices.keep(size_, choice_);
        return {};
      }
      cudaGetLastError();
    }
    std::vector<Choice> all;
    if (Text failed = problem_.propose(timed, &all); !failed.empty()) return failed;
    choice_ = all.front();
    if (!timed) return {};
    if (Text failed = fastest(all, x, lanes, stream); !failed.empty()) return failed;
    choices.keep(size_, choice_);
    return {};
  }

  Text run(const void* x, const Lanes& lanes, cudaStream_t stream) const {
    return run(choice_, x, lanes, stream);
  }

 private:
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
    void* workspace = nullptr;
    if (choice.workspace > 0) {
      if (Text failed = lane.workspace->get(&workspace); !failed.empty()) return failed;
    }
    return problem_.call(choice, x, lane.weight, lane.bias, lane.y, workspace, stream);
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
    // Here, where it can be told that there is no memory: an algorithm that fails is passed over.
    if (std::any_of(all.begin(), all.end(), [](const Choice& one) { return one.workspace > 0; })) {
      for (std::size_t i = 0; i < together; ++i) {
        void* workspace = nullptr;
        if (Text failed = lanes[i].workspace->get(&workspace); !failed.empty()) return failed;
      }
    }
    Timer timer;
    if (Text failed = timer.prepare(x, lanes[0].weight, size_, stream); !failed.empty()) {
      return failed;
    }
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
  Problem problem_;
  Choice choice_;
};

// All products of one node: one for each number of rows.
class Products {
 public:
  // `lanes`: weights, biases and results; the first is on the session's own stream.
  Text run(const Size& size, const void* x, Lanes lanes, cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    place(size.together, stream, &lanes);
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
  void place(int together, cudaStream_t stream, Lanes* lanes) {
    for (int i = 0; i < together; ++i) {
      if (i > 0) (*lanes)[i].beside = &beside_[i];
      (*lanes)[i].workspace = workspaces_[i].of(stream, i, kWorkspace);
    }
  }

  std::mutex mutex_;
  std::array<Beside, kTogether> beside_;  // the first is not used
  std::array<Workspaces, kTogether> workspaces_;
  std::map<std::int64_t, std::unique_ptr<Product>> products_;
};

}  // namespace regraft
