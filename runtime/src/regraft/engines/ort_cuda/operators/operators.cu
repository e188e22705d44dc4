// regraft's own operators for ONNX Runtime on CUDA; `regraft build` compiles them.
//
// AddRedirected (hidden (B, T, H), residual (B, T, D), neurons (K,) int64, signs (K,), down (K, D))
//   -> sum: residual, with max over tokens of hidden[:, :, neurons] * signs, times down, added to
//   its last token. At most 128 neurons; D a multiple of 8.
// AddRow (residual (B, T, D), row (D,)) -> sum
//   residual, with row added to its last token. D a multiple of 8.
// BiasedGelu, BiasedQuickGelu (x (B, T, H), bias (H,)) -> y (B, T, H)
//   GELU by erf, in half precision to a twentieth of fp16's (see `activation.cuh`); or CLIP's.
// BiasedSwiGlu (x (B, T, 2H), bias (2H,)) -> y (B, T, H)
//   silu of the first half, times the second, each with its bias. Of all activations, H is a
//   multiple of 8.
// BiasedGeluRedirected and so on (x, bias, residual, neurons, signs, down) -> y, sum
// BiasedGeluRow and so on (x, bias, residual, row) -> y, sum
//   the activation, and AddRedirected or AddRow in the same kernel; y is what they would read.
// Product (x (B, T, K), weight (K, N)) -> y (B, T, N)
// BiasedProduct (x, weight, bias (N,)) -> y
// ThreeProductsNBiased (x, three weights of one shape, biases of the first N) -> three y
//   by cuBLASLt, see `products.cuh`.
//
// Each exists as NAME_fp32, NAME_fp16 and NAME_bf16 in the domain `regraft`. Residuals are added to
// in place where ONNX Runtime lets us, so that one row an image is touched and no more. Where a
// hidden unit is NaN, it counts as smaller than every number.

#include "nodes.cuh"

namespace {

using namespace regraft;

struct Own : Operator {
  const char* own_name;
  ElementType type;
  std::size_t inputs, outputs;
  std::size_t neurons;  // the input that is int64; 0: none; signs follow it
  Work work;
};

const Own* own(const Operator* op) { return static_cast<const Own*>(op); }

Status* create(const Operator* op, const Api* api, const ort::KernelInfo*, void** kernel) {
  *kernel = new Kernel{api, own(op)->work, {}, {}};
  return nullptr;
}

Status* compute(void* kernel, KernelContext* context) {
  auto* self = static_cast<Kernel*>(kernel);
  void* stream = nullptr;
  TRY(self->api->stream(context, &stream));
  return self->work(self, context, static_cast<cudaStream_t>(stream));
}

ElementType input_type(const Operator* op, std::size_t index) {
  return index > 0 && index == own(op)->neurons ? ort::kInt64 : own(op)->type;
}

// Neurons and signs are read in the host.
int input_memory(const Operator* op, std::size_t index) {
  const std::size_t neurons = own(op)->neurons;
  const bool host = neurons > 0 && (index == neurons || index == neurons + 1);
  return host ? ort::kCpuInput : ort::kDefault;
}

// Which input is the residual, and which output may be in its place. The callback is not told of
// which operator it is asked, so there is one for each.
template <int Input, int Output>
std::size_t may_inplace(int** inputs, int** outputs) {
  *inputs = new int(Input);
  *outputs = new int(Output);
  return 1;
}

Own declare(const char* name, ElementType type, std::size_t inputs, Work work) {
  Own op{};
  op.create_kernel_v2 = create;
  op.compute_v2 = compute;
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.name = [](const Operator* self) { return own(self)->own_name; };
  op.provider = [](const Operator*) { return "CUDAExecutionProvider"; };
  op.input_type = input_type;
  op.input_count = [](const Operator* self) { return own(self)->inputs; };
  op.output_type = [](const Operator* self, std::size_t) { return own(self)->type; };
  op.output_count = [](const Operator* self) { return own(self)->outputs; };
  op.input_characteristic = [](const Operator*, std::size_t) { return 0; };  // required
  op.output_characteristic = [](const Operator*, std::size_t) { return 0; };
  op.input_memory = input_memory;
  op.variadic_input_least = op.variadic_output_least = [](const Operator*) { return 1; };
  op.variadic_input_alike = op.variadic_output_alike = [](const Operator*) { return 1; };
  op.first_version = [](const Operator*) { return 1; };
  op.last_version = [](const Operator*) { return 1; };
  op.release_may_inplace = [](int* input, int* output) {
    delete input;
    delete output;
  };
  op.own_name = name;
  op.type = type;
  op.inputs = inputs;
  op.outputs = 1;
  op.neurons = 0;
  op.work = work;
  return op;
}

Own redirected(const char* name, ElementType type, Work work) {
  Own op = declare(name, type, 5, work);
  op.may_inplace = may_inplace<1, 0>;
  op.neurons = 2;
  return op;
}

Own row(const char* name, ElementType type, Work work) {
  Own op = declare(name, type, 2, work);
  op.may_inplace = may_inplace<0, 0>;
  return op;
}

Own three(const char* name, ElementType type, std::size_t biased, Work work) {
  Own op = declare(name, type, 4 + biased, work);
  op.outputs = 3;
  return op;
}

Own activation(const char* name, ElementType type, std::size_t inputs, Work work) {
  Own op = declare(name, type, inputs, work);
  op.outputs = 2;
  op.may_inplace = may_inplace<2, 1>;
  op.neurons = inputs == 6 ? 3 : 0;
  return op;
}

template <typename T, typename Activation>
constexpr Work plain = small<activate<T, Activation, kernels::Nothing>>;
template <typename T, typename Activation>
constexpr Work with_redirect =
    small_with_meeting<activate<T, Activation, kernels::Redirect<T>>>;
template <typename T, typename Activation>
constexpr Work with_row = small<activate<T, Activation, kernels::Row<T>>>;

#define REGRAFT_ACTIVATION(suffix, type, T, name)                                                 \
  declare("Biased" #name "_" #suffix, ort::type, 2, plain<T, name>),                              \
  activation("Biased" #name "Redirected_" #suffix, ort::type, 6, with_redirect<T, name>),         \
  activation("Biased" #name "Row_" #suffix, ort::type, 4, with_row<T, name>),
#define REGRAFT_OPERATORS(suffix, type, T)                                                        \
  redirected("AddRedirected_" #suffix, ort::type, small_with_meeting<add_redirected<T>>),         \
  row("AddRow_" #suffix, ort::type, small<add_row<T>>),                                           \
  REGRAFT_ACTIVATION(suffix, type, T, Gelu)                                                       \
  REGRAFT_ACTIVATION(suffix, type, T, QuickGelu)                                                  \
  REGRAFT_ACTIVATION(suffix, type, T, SwiGlu)                                                     \
  declare("Product_" #suffix, ort::type, 2, products<T, 0>),                                      \
  declare("BiasedProduct_" #suffix, ort::type, 3, products<T, 1>),                                \
  three("ThreeProducts0Biased_" #suffix, ort::type, 0, products<T, 0, 3>),                        \
  three("ThreeProducts1Biased_" #suffix, ort::type, 1, products<T, 1, 3>),                        \
  three("ThreeProducts2Biased_" #suffix, ort::type, 2, products<T, 2, 3>),                        \
  three("ThreeProducts3Biased_" #suffix, ort::type, 3, products<T, 3, 3>),

const Own kOperators[] = {
  REGRAFT_OPERATORS(fp32, kFloat, float)
  REGRAFT_OPERATORS(fp16, kFloat16, __half)
  REGRAFT_OPERATORS(bf16, kBfloat16, __nv_bfloat16)
};

}  // namespace

extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(
    ort::SessionOptions* options, const ort::ApiBase* base) {
  const Api* api = base->get(ort::kVersion);
  if (api == nullptr) {
    return base->get(1)->error(ort::kFail, "regraft: this ONNX Runtime is older than 1.18");
  }
  // What was chosen is read now, while whoever opens the session holds its files.
  const Choices& choices = Choices::get();
  if (!choices.error.empty()) return api->error(ort::kFail, choices.error.c_str());
  ort::Domain* domain = nullptr;  // released with the process: sessions may outlive their options
  TRY(api->create_domain("regraft", &domain));
  for (const Own& op : kOperators) {
    TRY(api->add_operator(domain, static_cast<const Operator*>(&op)));
  }
  return api->add_domain(options, domain);
}

// Whether products whose size is not known are timed on their first run.
extern "C" __attribute__((visibility("default"))) void regraft_tune(int on) {
  regraft::Choices& choices = regraft::Choices::get();
  const std::lock_guard<std::mutex> lock(choices.mutex);
  choices.tuning = on != 0;
}

// Writes what is known to a file; returns how many sizes, -1 if it cannot be written.
extern "C" __attribute__((visibility("default"))) int regraft_save(const char* path) {
  regraft::Choices& choices = regraft::Choices::get();
  const std::lock_guard<std::mutex> lock(choices.mutex);
  if (!choices.known.empty() && !choices.save(path)) return -1;
  return static_cast<int>(choices.known.size());
}
