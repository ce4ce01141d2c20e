// The operators that another one is made of.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace dlrm {

void to_panels(const at::Tensor& rows, at::Tensor& panels);

void mlp_forward(const at::Tensor& x, int64_t rows, at::TensorList weights, at::TensorList biases,
                 bool relu_last, at::TensorList outputs, at::TensorList columns);

void embed_interact(const at::Tensor& dense_vector, const at::Tensor& arena,
                    const at::Tensor& first_rows, const at::Tensor& ids,
                    const std::optional<at::Tensor>& offsets,
                    const std::optional<at::Tensor>& weights,
                    const std::optional<at::Tensor>& combined, int64_t rows, bool itself,
                    at::Tensor& vectors, const std::optional<at::Tensor>& interactions);

}  // namespace dlrm
