// regraft's own operators for ONNX Runtime on CUDA; `regraft build` compiles them.
//
// AddRedirected (hidden (B, T, H), residual (B, T, D), neurons (K,) int64, signs (K,), down (K, D))
//   -> sum: residual, with max over tokens of hidden[:, :, neurons] * signs, times down, added to its
//   last token.
// AddRow (residual (B, T, D), row (D,)) -> sum
//   residual, with row added to its last token.
// BiasedSwiGlu (x (B, T, 2H), bias (2H,)) -> y (B, T, H)
//   silu of the first half, times the second, each with its bias.
// BiasedGelu (x (B, T, H), bias (H,)) -> y (B, T, H)
//   GELU by erf; in half precision to a twentieth of fp16's (see `kernels.cuh`).
// Product (x (B, T, K), weight (K, N)) -> y (B, T, N)
// BiasedProduct (x, weight, bias (N,)) -> y
// ThreeProductsNBiased (x, three weights of one shape, biases of the first N) -> three y
//   by cuBLASLt, see `products.cuh`.
// ProductRedirected (hidden, weight, residual, neurons, signs, down) -> y, sum
// ProductRow (x, weight, residual, row) -> y, sum
//   Product and AddRedirected or AddRow at the same time: neither needs the other's result.
//
// Each exists as NAME_fp32, NAME_fp16 and NAME_bf16 in the domain `regraft`. Residuals are added to in
// place where ONNX Runtime lets us, so that one row an image is touched and no more. Where a hidden
// unit is NaN, it counts as smaller than every number.

#include "nodes.cuh"

namespace {

using namespace regraft;

struct Own : Operator {
  const char* own_name;
  ElementType type;
  std::size_t inputs, outputs;
  std::size_t neurons;  // the input that is int64; 0: none
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
  op.input_memory = [](const Operator*, std::size_t) { return 0; };  // the provider's own
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

Own both(const char* name, ElementType type, std::size_t inputs, Work work) {
  Own op = declare(name, type, inputs, work);
  op.outputs = 2;
  op.may_inplace = may_inplace<2, 1>;
  op.neurons = inputs == 6 ? 3 : 0;
  return op;
}

const Own kOperators[] = {
    redirected("AddRedirected_fp32", ort::kFloat, redirected_alone<float>),
    redirected("AddRedirected_fp16", ort::kFloat16, redirected_alone<__half>),
    redirected("AddRedirected_bf16", ort::kBfloat16, redirected_alone<__nv_bfloat16>),
    row("AddRow_fp32", ort::kFloat, row_alone<float>),
    row("AddRow_fp16", ort::kFloat16, row_alone<__half>),
    row("AddRow_bf16", ort::kBfloat16, row_alone<__nv_bfloat16>),
    declare("BiasedSwiGlu_fp32", ort::kFloat, 2, without_state<biased_swiglu<float>>),
    declare("BiasedSwiGlu_fp16", ort::kFloat16, 2, without_state<biased_swiglu<__half>>),
    declare("BiasedSwiGlu_bf16", ort::kBfloat16, 2, without_state<biased_swiglu<__nv_bfloat16>>),
    declare("BiasedGelu_fp32", ort::kFloat, 2, without_state<biased_gelu<float>>),
    declare("BiasedGelu_fp16", ort::kFloat16, 2, without_state<biased_gelu<__half>>),
    declare("BiasedGelu_bf16", ort::kBfloat16, 2, without_state<biased_gelu<__nv_bfloat16>>),
    declare("Product_fp32", ort::kFloat, 2, products<float, 0>),
    declare("Product_fp16", ort::kFloat16, 2, products<__half, 0>),
    declare("Product_bf16", ort::kBfloat16, 2, products<__nv_bfloat16, 0>),
    declare("BiasedProduct_fp32", ort::kFloat, 3, products<float, 1>),
    declare("BiasedProduct_fp16", ort::kFloat16, 3, products<__half, 1>),
    declare("BiasedProduct_bf16", ort::kBfloat16, 3, products<__nv_bfloat16, 1>),
    three("ThreeProducts0Biased_fp32", ort::kFloat, 0, products<float, 0, 3>),
    three("ThreeProducts0Biased_fp16", ort::kFloat16, 0, products<__half, 0, 3>),
    three("ThreeProducts0Biased_bf16", ort::kBfloat16, 0, products<__nv_bfloat16, 0, 3>),
    three("ThreeProducts1Biased_fp32", ort::kFloat, 1, products<float, 1, 3>),
    three("ThreeProducts1Biased_fp16", ort::kFloat16, 1, products<__half, 1, 3>),
    three("ThreeProducts1Biased_bf16", ort::kBfloat16, 1, products<__nv_bfloat16, 1, 3>),
    three("ThreeProducts2Biased_fp32", ort::kFloat, 2, products<float, 2, 3>),
    three("ThreeProducts2Biased_fp16", ort::kFloat16, 2, products<__half, 2, 3>),
    three("ThreeProducts2Biased_bf16", ort::kBfloat16, 2, products<__nv_bfloat16, 2, 3>),
    three("ThreeProducts3Biased_fp32", ort::kFloat, 3, products<float, 3, 3>),
    three("ThreeProducts3Biased_fp16", ort::kFloat16, 3, products<__half, 3, 3>),
    three("ThreeProducts3Biased_bf16", ort::kBfloat16, 3, products<__nv_bfloat16, 3, 3>),
    both("ProductRedirected_fp32", ort::kFloat, 6, product_and<float, add_redirected<float>>),
    both("ProductRedirected_fp16", ort::kFloat16, 6, product_and<__half, add_redirected<__half>>),
    both("ProductRedirected_bf16", ort::kBfloat16, 6,
         product_and<__nv_bfloat16, add_redirected<__nv_bfloat16>>),
    both("ProductRow_fp32", ort::kFloat, 4, product_and<float, add_row<float>>),
    both("ProductRow_fp16", ort::kFloat16, 4, product_and<__half, add_row<__half>>),
    both("ProductRow_bf16", ort::kBfloat16, 4, product_and<__nv_bfloat16, add_row<__nv_bfloat16>>),
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
