// The part of ONNX Runtime's C ABI that an operator library needs, declared anew so that a build
// needs nothing but nvcc. The table of functions only ever grows at its end, so slots keep their
// numbers (ONNX Runtime 1.17 and later; `onnxruntime_c_api.h` asserts them for every release).
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr std::uint32_t kVersion = 18;  // the first whose operators may work in place

struct Status;
struct SessionOptions;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;
struct ShapeContext;

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum MemoryType { kCpuInput = -2, kDefault = 0 };
enum ElementType { kFloat = 1, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16 };

struct Api {
  void* slots[194];

  template <typename Result, typename... Args>
  Result call(int slot, Args... args) const {
    return reinterpret_cast<Result (*)(Args...)>(slots[slot])(args...);
  }
  Status* error(ErrorCode code, const char* text) const { return call<Status*>(0, code, text); }
  Status* create_domain(const char* name, Domain** out) const {
    return call<Status*>(26, name, out);
  }
  template <typename Op>
  Status* add_operator(Domain* domain, const Op* op) const {
    return call<Status*>(27, domain, op);
  }
  Status* add_domain(SessionOptions* options, Domain* domain) const {
    return call<Status*>(28, options, domain);
  }
  Status* data(const Value* value, void** out) const {
    return call<Status*>(51, const_cast<Value*>(value), out);
  }
  Status* rank(const TensorInfo* info, std::size_t* out) const {
    return call<Status*>(61, info, out);
  }
  Status* lengths(const TensorInfo* info, std::int64_t* out, std::size_t count) const {
    return call<Status*>(62, info, out, count);
  }
  Status* info(const Value* value, TensorInfo** out) const { return call<Status*>(65, value, out); }
  Status* input(const KernelContext* context, std::size_t index, const Value** out) const {
    return call<Status*>(90, context, index, out);
  }
  Status* output(KernelContext* context, std::size_t index, const std::int64_t* lengths,
                 std::size_t rank, Value** out) const {
    return call<Status*>(91, context, index, lengths, rank, out);
  }
  void release(TensorInfo* info) const { call<void>(99, info); }
  Status* stream(const KernelContext* context, void** out) const {
    return call<Status*>(193, context, out);
  }
};

struct ApiBase {
  const Api* (*get)(std::uint32_t version);
  const char* (*version)();
};

// One operator: its schema and its callbacks. Field order is the ABI.
struct Operator {
  std::uint32_t version = kVersion;
  void* (*create_kernel)(const Operator*, const Api*, const KernelInfo*) = nullptr;
  const char* (*name)(const Operator*) = nullptr;
  const char* (*provider)(const Operator*) = nullptr;
  ElementType (*input_type)(const Operator*, std::size_t) = nullptr;
  std::size_t (*input_count)(const Operator*) = nullptr;
  ElementType (*output_type)(const Operator*, std::size_t) = nullptr;
  std::size_t (*output_count)(const Operator*) = nullptr;
  void (*compute)(void*, KernelContext*) = nullptr;
  void (*destroy)(void*) = nullptr;
  int (*input_characteristic)(const Operator*, std::size_t) = nullptr;
  int (*output_characteristic)(const Operator*, std::size_t) = nullptr;
  int (*input_memory)(const Operator*, std::size_t) = nullptr;
  int (*variadic_input_least)(const Operator*) = nullptr;
  int (*variadic_input_alike)(const Operator*) = nullptr;
  int (*variadic_output_least)(const Operator*) = nullptr;
  int (*variadic_output_alike)(const Operator*) = nullptr;
  Status* (*create_kernel_v2)(const Operator*, const Api*, const KernelInfo*, void**) = nullptr;
  Status* (*compute_v2)(void*, KernelContext*) = nullptr;
  Status* (*infer_shape)(const Operator*, ShapeContext*) = nullptr;
  int (*first_version)(const Operator*) = nullptr;
  int (*last_version)(const Operator*) = nullptr;
  std::size_t (*may_inplace)(int** inputs, int** outputs) = nullptr;
  void (*release_may_inplace)(int* inputs, int* outputs) = nullptr;
  std::size_t (*aliases)(int** inputs, int** outputs) = nullptr;
  void (*release_aliases)(int* inputs, int* outputs) = nullptr;
};

}  // namespace ort
