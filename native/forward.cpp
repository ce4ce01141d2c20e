// The whole model at once, for scoring: a call from Python costs as much as a few rows do.

#include "arguments.h"
#include "operators.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

namespace dlrm {
namespace {

// What a part goes through, in panels.
struct Activations {
  at::Tensor features;
  std::vector<at::Tensor> dense;
  at::Tensor vectors;
  std::optional<at::Tensor> interactions;
  std::vector<at::Tensor> over;
};

at::Tensor forward(const at::Tensor& dense_features, const at::Tensor& ids,
                   const std::optional<at::Tensor>& offsets,
                   const std::optional<at::Tensor>& weights, const at::Tensor& arena,
                   const at::Tensor& first_rows, const std::optional<at::Tensor>& combined,
                   at::TensorList dense_weights,
                   at::TensorList dense_biases, at::TensorList over_weights,
                   at::TensorList over_biases, bool dot, bool itself, int64_t part_rows) {
  TORCH_CHECK(dense_features.dim() == 2 && arena.dim() == 2,
              "dlrm: features and arena must have two axes");
  TORCH_CHECK(part_rows > 0, "dlrm: a part must have rows");
  TORCH_CHECK(!dense_weights.empty() && !over_weights.empty(), "dlrm: there are no layers");
  TORCH_CHECK(over_weights.back().dim() == 2 && over_weights.back().size(0) == 1,
              "dlrm: the last layer must have one output");
  const int64_t rows = dense_features.size(0), tables = first_rows.numel();
  const int64_t slots = 1 + tables + (combined ? combined->size(0) : 0);
  TORCH_CHECK(!offsets || offsets->numel() == rows * tables + 1,
              "dlrm: offsets must be one more than the bags");
  const auto room = [&](int64_t count) {
    const auto panels = [&](int64_t size) {
      return at::empty({panels_of(count), size, kernels().panel}, dense_features.options());
    };
    Activations made;
    made.features = panels(dense_features.size(1));
    for (const at::Tensor& weight : dense_weights) made.dense.push_back(panels(weight.size(0)));
    made.vectors = panels(slots * arena.size(1));
    if (dot) made.interactions = panels(over_weights[0].size(1));
    for (const at::Tensor& weight : over_weights) made.over.push_back(panels(weight.size(0)));
    return made;
  };
  at::Tensor logits = at::empty({rows}, dense_features.options());
  Activations part;
  for (int64_t start = 0; start < rows; start += part_rows) {
    const int64_t count = std::min(part_rows, rows - start);
    if (start == 0 || count < part_rows) part = room(count);
    const bool whole = count == rows;  // a view costs a microsecond
    at::Tensor part_ids = ids;
    std::optional<at::Tensor> part_offsets = offsets, part_weights = weights;
    if (offsets && !whole) {
      const at::Tensor ends = offsets->narrow(0, start * tables, count * tables + 1);
      const int64_t first = ends[0].item<int64_t>(), last = ends[-1].item<int64_t>();
      part_ids = ids.narrow(0, first, last - first);
      if (weights) part_weights = weights->narrow(0, first, last - first);
      part_offsets = ends - first;
    } else if (!whole) {
      part_ids = ids.narrow(0, start, count);
      if (weights) part_weights = weights->narrow(0, start, count);
    }
    to_panels(whole ? dense_features : dense_features.narrow(0, start, count), part.features);
    mlp_forward(part.features, count, dense_weights, dense_biases, true, part.dense, {});
    embed_interact(part.dense.back(), arena, first_rows, part_ids, part_offsets, part_weights,
                   combined, count, itself, part.vectors, part.interactions);
    mlp_forward(dot ? *part.interactions : part.vectors, count, over_weights, over_biases, false,
                part.over, {});
    std::memcpy(logits.mutable_data_ptr<float>() + start, part.over.back().const_data_ptr<float>(),
                sizeof(float) * count);
  }
  return logits;
}

}  // namespace
}  // namespace dlrm

TORCH_LIBRARY_FRAGMENT(dlrm, library) {
  library.def(
      "forward(Tensor dense_features, Tensor ids, Tensor? offsets, Tensor? weights, "
      "Tensor arena, Tensor first_rows, Tensor? combined, Tensor[] dense_weights, Tensor[] dense_biases, Tensor[] over_weights, "
      "Tensor[] over_biases, bool dot, bool itself, int part_rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, library) { library.impl("forward", &dlrm::forward); }
