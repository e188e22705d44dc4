// cuBLASLt, and which of its algorithms was chosen for which size: read from beside the library.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

namespace regraft {

constexpr const char* kFile = "products.txt";
constexpr std::size_t kWorkspace = 32 << 20;  // bytes, what cuBLAS itself takes on Hopper

// What a call says of itself: empty if it worked.
using Text = std::string;

// What failed is forgotten, lest the next launch on this thread be taken for the culprit.
inline Text failed_with(cudaError_t error) {
  cudaGetLastError();
  return std::string("regraft: ") + cudaGetErrorString(error);
}

#define REGRAFT_CUDA(call) \
  if (cudaError_t failed = (call); failed != cudaSuccess) return failed_with(failed)
#define REGRAFT_LT(call)                                              \
  if (cublasStatus_t failed = (call); failed != CUBLAS_STATUS_SUCCESS) \
  return "regraft: cuBLASLt failed with status " + std::to_string(failed)

// cuBLASLt of ONNX Runtime's process, found by name, so that the library loads where there is none.
struct Lt {
  Text error;
  cublasLtHandle_t handle = nullptr;
#define REGRAFT_EACH(do)                                                                        \
  do(Create) do(GetVersion) do(MatmulDescCreate) do(MatmulDescDestroy) do(MatmulDescSetAttribute) \
  do(MatrixLayoutCreate) do(MatrixLayoutDestroy) do(MatmulPreferenceCreate)                     \
  do(MatmulPreferenceDestroy) do(MatmulPreferenceSetAttribute) do(MatmulAlgoGetHeuristic)       \
  do(MatmulAlgoCheck) do(Matmul)
#define REGRAFT_MEMBER(name) decltype(&cublasLt##name) name = nullptr;
  REGRAFT_EACH(REGRAFT_MEMBER)

  static const Lt& get() {
    static const Lt lt;
    return lt;
  }

 private:
  Lt() {
    const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
    void* library = dlopen(name.c_str(), RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) {
      const char* said = dlerror();
      error = "regraft: " + name + " of the CUDA toolkit that compiled the operators is not there" +
              " (" + (said == nullptr ? "" : said) +
              "); onnxruntime-gpu has to be for the same CUDA";
      return;
    }
#define REGRAFT_LOAD(name)                                                             \
  name = reinterpret_cast<decltype(name)>(dlsym(library, "cublasLt" #name));           \
  if (name == nullptr) {                                                               \
    error = "regraft: cuBLASLt has no cublasLt" #name;                                 \
    return;                                                                            \
  }
    REGRAFT_EACH(REGRAFT_LOAD)
    if (Create(&handle) != CUBLAS_STATUS_SUCCESS) error = "regraft: cuBLASLt does not start";
  }
};

// (rows, inner) x (inner, columns): how many at once, and how many of them with a bias (columns,).
struct Size {
  int type;  // cudaDataType_t
  int biased;
  int together;
  std::int64_t rows, inner, columns;

  bool operator<(const Size& other) const { return tied() < other.tied(); }
  std::size_t bytes_of_weight() const { return bytes(inner * columns); }
  std::size_t bytes_of_input() const { return bytes(rows * inner); }

  // As many rows or up to a 32nd more (8 if few), mostly the same for T tokens as for T + 1.
  Size rounded() const {
    std::int64_t step = 8;
    while (step < 256 && step * 64 <= rows) step *= 2;
    Size other = *this;
    other.rows = (rows + step - 1) / step * step;
    return other;
  }

 private:
  std::size_t bytes(std::int64_t count) const {
    return static_cast<std::size_t>(count) * (type == CUDA_R_32F ? 4 : 2);
  }
  std::tuple<int, int, int, std::int64_t, std::int64_t, std::int64_t> tied() const {
    return {type, biased, together, rows, inner, columns};
  }
};

struct Choice {
  cublasLtMatmulAlgo_t algorithm{};
  std::size_t workspace = 0;
  int apart = 0;  // whether several products of the same input follow each other
};

// The algorithms that were chosen: read from beside the library, or timed since.
class Choices {
 public:
  static Choices& get() {
    static Choices choices;
    return choices;
  }
  std::mutex mutex;  // for all below
  bool tuning = false;
  Text error;
  std::map<Size, Choice> known;
  // One for about as many rows, by rounded sizes: while timing the first, then that of the fewest.
  // Which of two algorithms about equally fast is chosen is chance, and a model would seem to gain
  // or lose by a token what it does by that.
  std::map<Size, Choice> near;

  void keep(const Size& size, const Choice& choice) {
    known[size] = choice;
    near.emplace(size.rounded(), choice);
  }

  bool save(const char* path) const {
    std::FILE* file = std::fopen(path, "w");
    if (file == nullptr) return false;
    std::fprintf(file, "cublasLt %zu\n%zu sizes\n", Lt::get().GetVersion(), known.size());
    for (const auto& [size, choice] : known) {
      std::fprintf(file, "%d %d %d %" PRId64 " %" PRId64 " %" PRId64 " %d %zu", size.type,
                   size.biased, size.together, size.rows, size.inner, size.columns, choice.apart,
                   choice.workspace);
      for (std::uint64_t word : choice.algorithm.data) std::fprintf(file, " %" PRIx64, word);
      std::fputc('\n', file);
    }
    const bool written = std::ferror(file) == 0;
    return std::fclose(file) == 0 && written;
  }

 private:
  Choices() {
    Dl_info info{};
    if (dladdr(reinterpret_cast<const void*>(&Choices::get), &info) == 0) return;
    std::string path = info.dli_fname;
    path = path.substr(0, path.rfind('/') + 1) + kFile;
    std::FILE* file = std::fopen(path.c_str(), "r");
    if (file == nullptr) return;  // being built
    error = read(file, path);
    std::fclose(file);
  }

  Text read(std::FILE* file, const std::string& path) {
    const Lt& lt = Lt::get();
    if (!lt.error.empty()) return lt.error;
    std::size_t version = 0, count = 0;
    if (std::fscanf(file, "cublasLt %zu", &version) != 1 || version != lt.GetVersion()) {
      return "regraft: products were chosen with cuBLASLt " + std::to_string(version) +
             ", and this is " + std::to_string(lt.GetVersion()) +
             "; run regraft build --force again";
    }
    const Text cut = "regraft: " + path + " is cut off or damaged; run regraft build --force again";
    if (std::fscanf(file, "%zu sizes", &count) != 1) return cut;
    for (std::size_t i = 0; i < count; ++i) {
      Size size{};
      Choice choice;
      if (std::fscanf(file, "%d %d %d %" SCNd64 " %" SCNd64 " %" SCNd64 " %d %zu", &size.type,
                      &size.biased, &size.together, &size.rows, &size.inner, &size.columns,
                      &choice.apart, &choice.workspace) != 8) {
        return cut;
      }
      if (choice.workspace > kWorkspace) return cut;
      for (std::uint64_t& word : choice.algorithm.data) {
        if (std::fscanf(file, "%" SCNx64, &word) != 1) return cut;
      }
      keep(size, choice);
    }
    return {};
  }
};

}  // namespace regraft
