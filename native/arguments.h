// Checks of operators' arguments, and pointers to them.

#pragma once

#include <torch/library.h>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "kernels.h"

namespace dlrm {

inline void check_tensor(const at::Tensor& tensor, at::ScalarType type, at::IntArrayRef shape,
                         const char* name) {
  TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() && tensor.sizes() == shape,
              "dlrm: ", name, " must be contiguous, ", type, ", of shape ", shape, "; got ",
              tensor.scalar_type(), ", ", tensor.sizes());
}

inline const float* read(const at::Tensor& tensor, at::IntArrayRef shape, const char* name) {
  check_tensor(tensor, at::kFloat, shape, name);
  return tensor.const_data_ptr<float>();
}

inline float* write(const at::Tensor& tensor, at::IntArrayRef shape, const char* name) {
  check_tensor(tensor, at::kFloat, shape, name);
  return tensor.mutable_data_ptr<float>();
}

inline int64_t panels_of(int64_t rows) {
  const int64_t panel = kernels().panel;
  return (rows + panel - 1) / panel;
}

inline Update update_of(int64_t rule, double rate, double epsilon) {
  TORCH_CHECK(rule >= 0 && rule <= 2, "dlrm: there is no rule ", rule);
  return {static_cast<Rule>(rule), static_cast<float>(rate), static_cast<float>(epsilon)};
}

// Calls f(task) for all tasks; each thread takes the next when it is free.
template <typename F>
void for_tasks(int64_t tasks, const F& f) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(tasks, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t task = next++; task < tasks; task = next++) f(task);
  });
}

// Bags over the tensors of an operator's arguments, which must outlive it. Where ids point to and
// that offsets rise is the caller's to check: readers of data do, once.
inline Bags bags_of(const at::Tensor& ids, const std::optional<at::Tensor>& offsets,
                    const std::optional<at::Tensor>& weights, const at::Tensor& first_rows,
                    int64_t rows) {
  const int64_t features = first_rows.numel();
  check_tensor(first_rows, at::kLong, {features}, "first_rows");
  Bags bags{ids.const_data_ptr<int64_t>(), nullptr, nullptr, first_rows.const_data_ptr<int64_t>(),
            features};
  if (offsets) {
    check_tensor(ids, at::kLong, {ids.numel()}, "ids");
    check_tensor(*offsets, at::kLong, {rows * features + 1}, "offsets");
    bags.offsets = offsets->const_data_ptr<int64_t>();
    TORCH_CHECK(bags.offsets[0] == 0 && bags.offsets[rows * features] == ids.numel(),
                "dlrm: offsets must begin with 0 and end with the number of ids");
  } else {
    check_tensor(ids, at::kLong, {rows, features}, "ids");
  }
  if (weights) {
    check_tensor(*weights, at::kFloat, ids.sizes(), "weights");
    bags.weights = weights->const_data_ptr<float>();
  }
  return bags;
}

}  // namespace dlrm
