// The whole model at once, for scoring: a call from Python costs as much as a few rows do.

#include "arguments.h"
#include "operators.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

namespace dlrm {
namespace {

// Rows that go through the model at a time, so that memory does not grow with the batch.
constexpr int64_t kPartRows = 2048;

at::Tensor forward(const at::Tensor& dense_features, const at::Tensor& ids,
                   const std::optional<at::Tensor>& offsets, const at::Tensor& arena,
                   const at::Tensor& first_rows, at::TensorList dense_weights,
                   at::TensorList dense_biases, at::TensorList over_weights,
                   at::TensorList over_biases, bool dot, bool itself) {
  TORCH_CHECK(dense_features.dim() == 2 && arena.dim() == 2,
              "dlrm: features and arena must have two axes");
  TORCH_CHECK(!dense_weights.empty() && !over_weights.empty(), "dlrm: there are no layers");
  TORCH_CHECK(over_weights.back().dim() == 2 && over_weights.back().size(0) == 1,
              "dlrm: the last layer must have one output");
  const int64_t rows = dense_features.size(0), features = first_rows.numel();
  TORCH_CHECK(!offsets || offsets->numel() == rows * features + 1,
              "dlrm: offsets must be one more than the bags");
  const int64_t width = kernels().panel, panels = panels_of(std::min(rows, kPartRows));
  const int64_t in = over_weights[0].size(1);
  const auto room = [&](int64_t size) {
    return at::empty({panels * size * width}, dense_features.options());
  };
  std::vector<at::Tensor> dense_room, over_room;
  for (const at::Tensor& weight : dense_weights) dense_room.push_back(room(weight.size(0)));
  for (const at::Tensor& weight : over_weights) over_room.push_back(room(weight.size(0)));
  const int64_t vector_size = (features + 1) * arena.size(1);
  const at::Tensor panel_room = room(dense_features.size(1)), vector_room = room(vector_size);
  const at::Tensor interaction_room = dot ? room(in) : at::Tensor();
  at::Tensor logits = at::empty({rows}, dense_features.options());
  for (int64_t start = 0; start < rows; start += kPartRows) {
    const int64_t count = std::min(kPartRows, rows - start), some = panels_of(count);
    const auto part = [&](const at::Tensor& all, int64_t size) {
      return all.narrow(0, 0, some * size * width).view({some, size, width});
    };
    const auto outputs = [&](const std::vector<at::Tensor>& all, at::TensorList weights) {
      std::vector<at::Tensor> parts;
      for (size_t l = 0; l < all.size(); ++l) parts.push_back(part(all[l], weights[l].size(0)));
      return parts;
    };
    at::Tensor part_ids;
    std::optional<at::Tensor> part_offsets;
    if (offsets) {
      const at::Tensor ends = offsets->narrow(0, start * features, count * features + 1);
      const int64_t first = ends[0].item<int64_t>(), last = ends[-1].item<int64_t>();
      part_ids = ids.narrow(0, first, last - first);
      part_offsets = start ? ends - first : ends;
    } else {
      part_ids = ids.narrow(0, start, count);
    }
    at::Tensor x = part(panel_room, dense_features.size(1));
    to_panels(dense_features.narrow(0, start, count), x);
    const std::vector<at::Tensor> dense = outputs(dense_room, dense_weights);
    mlp_forward(x, count, dense_weights, dense_biases, true, dense, {});
    at::Tensor vectors = part(vector_room, vector_size);
    std::optional<at::Tensor> interactions;
    if (dot) interactions = part(interaction_room, in);
    embed_interact(dense.back(), arena, first_rows, part_ids, part_offsets, std::nullopt, count,
                   itself, vectors, interactions);
    const std::vector<at::Tensor> over = outputs(over_room, over_weights);
    mlp_forward(dot ? *interactions : vectors, count, over_weights, over_biases, false, over, {});
    logits.narrow(0, start, count).copy_(over.back().view({-1}).narrow(0, 0, count));
  }
  return logits;
}

}  // namespace
}  // namespace dlrm

TORCH_LIBRARY_FRAGMENT(dlrm, library) {
  library.def(
      "forward(Tensor dense_features, Tensor ids, Tensor? offsets, Tensor arena, "
      "Tensor first_rows, Tensor[] dense_weights, Tensor[] dense_biases, Tensor[] over_weights, "
      "Tensor[] over_biases, bool dot, bool itself) -> Tensor");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, library) { library.impl("forward", &dlrm::forward); }
