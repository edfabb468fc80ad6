// Tensors as Python passes them: addresses, sizes and strides, without torch's headers. They are
// read through DLPack's C exchange interface where the installed PyTorch has it (2.10 on), which
// takes some 60 nanoseconds each; otherwise through the tensors' own methods, ten times that.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "params.h"

namespace mima {

// DLPack 1, as far as it is used: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLPackExchangeApi {
  uint32_t major, minor;
  void* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_stream;
};

struct TensorArg {
  static constexpr int kMaxDims = 3;

  void* data = nullptr;
  bool strided = false;  // has memory that sizes and strides describe
  bool contiguous = true;
  int64_t ndim = 0;
  int64_t numel = 1;
  int64_t sizes[kMaxDims] = {}, strides[kMaxDims] = {};  // of the first dimensions
};
using TensorArgs = std::vector<TensorArg>;

namespace py = pybind11;

struct TensorType {
  py::object type, strided;
  const DLPackExchangeApi* api;  // null where PyTorch has none
};

inline const TensorType& tensor_type() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<TensorType> stored;
  return stored
      .call_once_and_store_result([] {
        const auto torch = py::module_::import("torch");
        TensorType found{torch.attr("Tensor"), torch.attr("strided"), nullptr};
        const py::object capsule = py::getattr(found.type, "__dlpack_c_exchange_api__", py::none());
        if (!capsule.is_none()) {
          const auto* api = static_cast<const DLPackExchangeApi*>(
              PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
          if (api == nullptr) throw py::error_already_set();
          if (api->major == 1) found.api = api;
        }
        return found;
      })
      .get_stored();
}

inline bool read_tensor(py::handle source, TensorArg& arg) {
  const TensorType& tensor = tensor_type();
  if (!PyObject_TypeCheck(source.ptr(), reinterpret_cast<PyTypeObject*>(tensor.type.ptr())))
    return false;
  const auto set_dims = [&](int64_t ndim, const auto& size, const auto& stride) {
    arg.ndim = ndim;
    for (int64_t i = ndim - 1; i >= 0; --i) {
      arg.contiguous = arg.contiguous && (size(i) <= 1 || stride(i) == arg.numel);
      arg.numel *= size(i);
      if (i < TensorArg::kMaxDims) arg.sizes[i] = size(i), arg.strides[i] = stride(i);
    }
    arg.contiguous = arg.contiguous || arg.numel == 0;
  };
  if (tensor.api != nullptr && tensor.api->tensor_from_object != nullptr) {
    DLTensor view{};
    if (tensor.api->tensor_from_object(source.ptr(), &view) != 0) {
      PyErr_Clear();  // not strided
      return true;
    }
    arg.data = static_cast<char*>(view.data) + (view.data == nullptr ? 0 : view.byte_offset);
    set_dims(
        view.ndim, [&](int64_t i) { return view.shape[i]; },
        [&](int64_t i) { return view.strides[i]; });
  } else {
    if (!py::object(source.attr("layout")).is(tensor.strided)) return true;
    const py::tuple shape = source.attr("shape"), strides = source.attr("stride")();
    arg.data = reinterpret_cast<void*>(source.attr("data_ptr")().cast<uintptr_t>());
    set_dims(
        static_cast<int64_t>(shape.size()), [&](int64_t i) { return shape[i].cast<int64_t>(); },
        [&](int64_t i) { return strides[i].cast<int64_t>(); });
  }
  arg.strided = arg.data != nullptr || arg.numel == 0;
  return true;
}

// What is not strided passes here, and is refused by name where it is used.
inline bool are_contiguous(const TensorArgs& tensors) {
  return std::all_of(tensors.begin(), tensors.end(),
                     [](const TensorArg& arg) { return arg.contiguous; });
}

// What Python has checked already and would be a wild read if it had not.
inline void check_count(const char* what, size_t got, size_t expected, bool optional = false) {
  if (got == expected || (optional && got == 0)) return;
  throw py::value_error(std::string(what) + ": expected " + std::to_string(expected) +
                        " tensors, got " + std::to_string(got));
}

// An argument for messages: its name, and where it is one of a list its number.
struct Name {
  const char* what;
  int64_t index = -1;

  std::string str() const {
    return index < 0 ? what : std::string(what) + "[" + std::to_string(index) + "]";
  }
};

inline void* pointer(const Name& name, const TensorArg& arg) {
  if (arg.strided) return arg.data;
  throw py::type_error(name.str() + " must be a strided tensor in memory, got one without storage");
}

// The rows of [rows, cols], or of a contiguous [b, t, cols].
inline Matrix matrix(const Name& name, const TensorArg& arg) {
  void* data = pointer(name, arg);
  const int64_t last = arg.ndim - 1;
  if (arg.ndim != 2 && arg.ndim != 3)
    throw py::value_error(name.str() + " must be a matrix, got " + std::to_string(arg.ndim) +
                          " dimensions");
  if (arg.numel > 0 && arg.sizes[last] > 1 && arg.strides[last] != 1)
    throw py::value_error(name.str() + ": the elements of a row must lie side by side");
  // the stride of a dimension of size 1 is anything
  return {data, arg.contiguous ? arg.sizes[last] : arg.strides[last - 1]};
}

inline std::vector<void*> pointers(const char* what, const TensorArgs& args, size_t expected,
                                   bool optional = false) {
  check_count(what, args.size(), expected, optional);
  std::vector<void*> result;
  for (const TensorArg& arg : args)
    result.push_back(pointer({what, static_cast<int64_t>(result.size())}, arg));
  return result;
}

inline std::vector<Matrix> matrices(const char* what, const TensorArgs& args, size_t expected,
                                    bool optional = false) {
  check_count(what, args.size(), expected, optional);
  std::vector<Matrix> result;
  for (const TensorArg& arg : args)
    result.push_back(matrix({what, static_cast<int64_t>(result.size())}, arg));
  return result;
}

inline std::vector<int64_t> sizes_of(const TensorArgs& args) {
  std::vector<int64_t> result;
  for (const TensorArg& arg : args) result.push_back(arg.numel);
  return result;
}

inline std::vector<int64_t> rows_of(const TensorArgs& args) {
  std::vector<int64_t> result;
  for (const TensorArg& arg : args) result.push_back(arg.sizes[0]);
  return result;
}

inline DType dtype_of(int code) {
  if (code < 0 || code > 3) throw py::value_error("dtype code must be 0 to 3");
  return static_cast<DType>(code);
}

// What the modules of both devices take.
inline WeightedMergeParams weighted_merge_params(int dtype, const TensorArgs& base,
                                                 const TensorArgs& thetas,
                                                 std::vector<double> weights) {
  WeightedMergeParams params{};
  params.dtype = dtype_of(dtype);
  params.sizes = sizes_of(base);
  params.base = pointers("weighted_merge: base", base, base.size());
  params.thetas = pointers("weighted_merge: thetas", thetas, base.size() * weights.size());
  params.weights = std::move(weights);
  return params;
}

using Reals = std::vector<double>;

// The rows of `factors` are the results', which may be lists of x themselves.
inline CombineParams combine_params(int dtype, const std::vector<Reals>& factors,
                                    const TensorArgs& x, const TensorArgs& out) {
  constexpr size_t kMost = CombineParams::kMost;
  const size_t num_out = factors.size(), num_in = num_out == 0 ? 0 : factors[0].size();
  if (num_in < 1 || num_in > kMost || num_out > kMost)
    throw py::value_error("combine: 1 to 3 lists on either side");
  CombineParams params{};
  params.dtype = dtype_of(dtype);
  params.num_in = static_cast<int>(num_in);
  params.num_out = static_cast<int>(num_out);
  double* factor = params.factors;
  for (const Reals& row : factors) {
    check_count("combine: factors", row.size(), num_in);
    factor = std::copy(row.begin(), row.end(), factor);
  }
  const size_t num_tensors = x.size() / num_in;
  params.sizes = sizes_of(x);
  params.sizes.resize(num_tensors);
  params.x = pointers("combine: x", x, num_in * num_tensors);
  params.out = pointers("combine: out", out, num_out * num_tensors);
  return params;
}

inline AdamStepParams adam_step_params(int dtype, const Reals& rule, int64_t step,
                                       const TensorArgs& g, const TensorArgs& m,
                                       const TensorArgs& v) {
  check_count("adam_step: rule", rule.size(), 5);
  const double lr = rule[0], beta1 = rule[1], beta2 = rule[2], eps = rule[3], decay = rule[4];
  const double count = static_cast<double>(step) + 1;
  AdamStepParams params{};
  params.dtype = dtype_of(dtype);
  params.rule = {
      lr / (1 - std::pow(beta1, count)), 1 - lr * decay, beta1, 1 - beta1, beta2, 1 - beta2, eps,
      1 - std::pow(beta2, count)};
  params.sizes = sizes_of(g);
  params.g = pointers("adam_step: g", g, g.size());
  params.m = pointers("adam_step: m", m, g.size());
  params.v = pointers("adam_step: v", v, g.size());
  return params;
}

// out: z, m and v after the step; the last two may be the lists m and v themselves.
inline AdamStepParams adam_step_forward_params(int dtype, const Reals& rule, int64_t step,
                                               const TensorArgs& z, const TensorArgs& g,
                                               const TensorArgs& m, const TensorArgs& v,
                                               const TensorArgs& out_z, const TensorArgs& out_m,
                                               const TensorArgs& out_v) {
  auto params = adam_step_params(dtype, rule, step, g, m, v);
  params.z = pointers("adam_step: z", z, g.size());
  params.out_z = pointers("adam_step: out_z", out_z, g.size());
  params.out_m = pointers("adam_step: out_m", out_m, g.size());
  params.out_v = pointers("adam_step: out_v", out_v, g.size());
  return params;
}

inline AdamStepParams adam_step_backward_params(int dtype, const Reals& rule, int64_t step,
                                                const TensorArgs& bar_z, const TensorArgs& bar_m,
                                                const TensorArgs& bar_v, const TensorArgs& g,
                                                const TensorArgs& m, const TensorArgs& v,
                                                const TensorArgs& d_z, const TensorArgs& d_g,
                                                const TensorArgs& d_m, const TensorArgs& d_v) {
  auto params = adam_step_params(dtype, rule, step, g, m, v);
  params.bar_z = pointers("adam_step: bar_z", bar_z, g.size());
  params.bar_m = pointers("adam_step: bar_m", bar_m, g.size());
  params.bar_v = pointers("adam_step: bar_v", bar_v, g.size());
  params.d_z = pointers("adam_step: d_z", d_z, g.size(), true);
  params.d_g = pointers("adam_step: d_g", d_g, g.size(), true);
  params.d_m = pointers("adam_step: d_m", d_m, g.size(), true);
  params.d_v = pointers("adam_step: d_v", d_v, g.size(), true);
  return params;
}

inline ProjectedMergeParams projected_merge_params(int dtype, const TensorArgs& W0,
                                                   const TensorArgs& W, const TensorArgs& C,
                                                   const TensorArgs& M) {
  ProjectedMergeParams params{};
  params.dtype = dtype_of(dtype);
  params.d = W0.empty() ? 0 : W0[0].sizes[1];
  params.rows = rows_of(W0);
  params.tokens = rows_of(C);
  params.W0 = matrices("projected_merge: W0", W0, W0.size());
  params.W = matrices("projected_merge: W", W, W0.size() * C.size());
  params.C = matrices("projected_merge: C", C, C.size());
  params.M = matrices("projected_merge: M", M, C.size());
  return params;
}

}  // namespace mima

namespace pybind11::detail {
template <>
struct type_caster<mima::TensorArg> {
  PYBIND11_TYPE_CASTER(mima::TensorArg, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    value = mima::TensorArg();
    return mima::read_tensor(source, value);
  }
};
}  // namespace pybind11::detail
