// Stacks of fully connected layers, in the panels of kernels.h: forward, backward, update.

#include "arguments.h"
#include "operators.h"

#include <algorithm>
#include <vector>

namespace dlrm {
namespace {

// Panels that a thread takes through all layers at a time: their activations stay in its cache.
constexpr int64_t kPanelsAtOnce = 8;

struct Layer {
  const float* weight;  // (out, in)
  const float* bias;    // (out)
  int64_t in;
  int64_t out;
};

std::vector<Layer> layers_of(at::TensorList weights, at::TensorList biases) {
  TORCH_CHECK(weights.size() == biases.size() && !weights.empty(),
              "dlrm: a stack needs as many weights as biases, and one at least");
  std::vector<Layer> layers;
  for (size_t l = 0; l < weights.size(); ++l) {
    TORCH_CHECK(weights[l].dim() == 2, "dlrm: weights must have two axes");
    const int64_t out = weights[l].size(0), in = weights[l].size(1);
    TORCH_CHECK(l == 0 || in == layers.back().out, "dlrm: layers do not fit together");
    layers.push_back({read(weights[l], {out, in}, "weights"), read(biases[l], {out}, "biases"), in,
                      out});
  }
  return layers;
}

int64_t columns_of(int64_t features) {
  return (features + kernels().panel - 1) / kernels().panel;
}

// Calls f(begin, end) for runs of panels, spread over the threads.
template <typename F>
void for_panels(int64_t panels, const F& f) {
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += kPanelsAtOnce) f(begin, std::min(begin + kPanelsAtOnce, end));
  });
}

}  // namespace

void to_panels(const at::Tensor& rows, at::Tensor& panels) {
  const int64_t count = rows.size(0), features = rows.size(1), width = kernels().panel;
  const float* from = read(rows, {count, features}, "rows");
  float* to = write(panels, {panels_of(count), features, width}, "panels");
  for (int64_t row = 0; row < panels_of(count) * width; ++row) {
    float* lane = to + row / width * features * width + row % width;
    for (int64_t f = 0; f < features; ++f) {
      lane[f * width] = row < count ? from[row * features + f] : 0;
    }
  }
}

void mlp_forward(const at::Tensor& x, int64_t rows, at::TensorList weights,
                 at::TensorList biases, bool relu_last, at::TensorList outputs, at::TensorList columns) {
  const Kernels& kernel = kernels();
  const std::vector<Layer> layers = layers_of(weights, biases);
  const int64_t panels = x.size(0), width = kernel.panel;
  TORCH_CHECK(panels == panels_of(rows), "dlrm: x has ", panels, " panels for ", rows, " rows");
  TORCH_CHECK(outputs.size() == layers.size() &&
                  (columns.empty() || columns.size() == layers.size()),
              "dlrm: as many outputs and columns as layers are needed");
  const float* input = read(x, {panels, layers[0].in, width}, "x");
  std::vector<float*> output, column;
  for (size_t l = 0; l < layers.size(); ++l) {
    const auto [weight, bias, in, out] = layers[l];
    output.push_back(write(outputs[l], {panels, out, width}, "outputs"));
    if (!columns.empty()) {
      column.push_back(write(columns[l], {columns_of(in), panels * width, width}, "columns"));
    }
  }
  const auto linear = [&](size_t l, int64_t panel) {
    const auto [weight, bias, in, out] = layers[l];
    const float* from = l == 0 ? input : output[l - 1];
    return Linear{.matrix = weight,
                  .bias = bias,
                  .x = from + panel * in * width,
                  .y = output[l] + panel * out * width,
                  .in = in,
                  .out = out,
                  .relu = relu_last || l + 1 < layers.size()};
  };
  const int64_t wanted = columns.empty() ? rows : panels * width;  // columns take whole panels
  if (columns.empty() && panels < at::get_num_threads()) {  // few rows: share out the outputs
    for (size_t l = 0; l < layers.size(); ++l) {
      at::parallel_for(0, layers[l].out, kOutputsAtOnce, [&](int64_t begin, int64_t end) {
        kernel.linear(linear(l, 0), begin, end, panels, wanted);
      });
    }
    return;
  }
  for_panels(panels, [&](int64_t begin, int64_t end) {
    for (size_t l = 0; l < layers.size(); ++l) {
      const float* from = l == 0 ? input : output[l - 1];
      kernel.linear(linear(l, begin), 0, layers[l].out, end - begin,
                    std::min(end * width, wanted) - begin * width);
      if (!column.empty()) {
        kernel.to_columns(from, column[l], layers[l].in, panels, begin, end);
      }
    }
  });
}

namespace {

void mlp_backward(at::TensorList weights, at::TensorList biases, at::TensorList inputs,
                  at::TensorList gradients, const std::optional<at::Tensor>& input_gradient) {
  const Kernels& kernel = kernels();
  const std::vector<Layer> layers = layers_of(weights, biases);
  const size_t count = layers.size();
  TORCH_CHECK(inputs.size() == count && gradients.size() == count,
              "dlrm: as many inputs and gradients as layers are needed");
  const int64_t panels = gradients[0].size(0), width = kernel.panel;
  struct Backward {
    const float* mask;
    float* from;
    float* to;
  };
  std::vector<Backward> steps;
  for (size_t l = 0; l < count; ++l) {
    const auto [weight, bias, in, out] = layers[l];
    Backward step{};
    step.from = write(gradients[l], {panels, out, width}, "gradients");
    if (l > 0) {
      step.mask = read(inputs[l], {panels, in, width}, "inputs");
      step.to = write(gradients[l - 1], {panels, in, width}, "gradients");
    } else if (input_gradient) {
      step.to = write(*input_gradient, {panels, in, width}, "input_gradient");
    }
    steps.push_back(step);
  }
  for_panels(panels, [&](int64_t begin, int64_t end) {
    for (size_t l = count; l-- > 0;) {
      const auto [mask, from, to] = steps[l];
      if (!to) continue;
      const int64_t in = layers[l].in, out = layers[l].out;
      const Linear backward{.matrix = layers[l].weight,
                            .mask = mask ? mask + begin * in * width : nullptr,
                            .x = from + begin * out * width,
                            .y = to + begin * in * width,
                            .in = out,
                            .out = in,
                            .transposed = true};
      kernel.linear(backward, 0, in, end - begin, (end - begin) * width);
    }
  });
}

// Empty lists where there is nothing to write: no sums without Adagrad, no carried gradients for a
// batch of one part.
float* write_if_any(at::TensorList tensors, size_t index, at::IntArrayRef shape,
                    const char* name) {
  return tensors.empty() ? nullptr : write(tensors[index], shape, name);
}

void mlp_update(at::TensorList columns, at::TensorList gradients, at::TensorList weights,
                at::TensorList biases, at::TensorList weight_sums, at::TensorList bias_sums,
                at::TensorList weight_gradients, at::TensorList bias_gradients, int64_t rule,
                double rate, double epsilon, bool first, bool last) {
  const Kernels& kernel = kernels();
  const std::vector<Layer> shapes = layers_of(weights, biases);
  const size_t count = shapes.size();
  TORCH_CHECK(columns.size() == count && gradients.size() == count,
              "dlrm: as many columns and gradients as layers are needed");
  const int64_t width = kernel.panel, panels = gradients[0].size(0);
  const Update update = update_of(rule, rate, epsilon);
  const bool adaptive = update.rule != Rule::kSgd;
  TORCH_CHECK(!adaptive || (weight_sums.size() == count && bias_sums.size() == count),
              "dlrm: sums are missing");
  TORCH_CHECK((first && last) ||
                  (weight_gradients.size() == count && bias_gradients.size() == count),
              "dlrm: a batch of several parts needs gradients to carry");
  std::vector<LayerUpdate> layers;
  std::vector<std::pair<size_t, int64_t>> tasks;
  for (size_t l = 0; l < shapes.size(); ++l) {
    const int64_t in = shapes[l].in, out = shapes[l].out;
    LayerUpdate layer{};
    layer.in = in;
    layer.out = out;
    layer.panels = panels;
    layer.columns = read(columns[l], {columns_of(in), panels * width, width}, "columns");
    layer.gradient = read(gradients[l], {panels, out, width}, "gradients");
    layer.weight = write(weights[l], {out, in}, "weights");
    layer.bias = write(biases[l], {out}, "biases");
    layer.weight_sum = write_if_any(weight_sums, l, {out, in}, "weight_sums");
    layer.bias_sum = write_if_any(bias_sums, l, {out}, "bias_sums");
    layer.weight_gradient = write_if_any(weight_gradients, l, {out, in}, "weight_gradients");
    layer.bias_gradient = write_if_any(bias_gradients, l, {out}, "bias_gradients");
    layer.first = first;
    layer.last = last;
    layers.push_back(layer);
    for (int64_t row = 0; row < out; row += kOutputsAtOnce) tasks.emplace_back(l, row);
  }
  // The longest first, so that the threads end together.
  std::stable_sort(tasks.begin(), tasks.end(), [&](const auto& a, const auto& b) {
    return shapes[a.first].in > shapes[b.first].in;
  });
  for_tasks(tasks.size(), [&](int64_t task) {
    const auto [l, row] = tasks[task];
    kernel.weight_update(layers[l], update, row, std::min(row + kOutputsAtOnce, layers[l].out));
  });
}

}  // namespace
}  // namespace dlrm

TORCH_LIBRARY_FRAGMENT(dlrm, library) {
  library.def("to_panels(Tensor rows, Tensor(a!) panels) -> ()");
  library.def(
      "mlp_forward(Tensor x, int rows, Tensor[] weights, Tensor[] biases, bool relu_last, "
      "Tensor(a!)[] outputs, Tensor(b!)[] columns) -> ()");
  library.def(
      "mlp_backward(Tensor[] weights, Tensor[] biases, Tensor[] inputs, "
      "Tensor(a!)[] gradients, Tensor(b!)? input_gradient) -> ()");
  library.def(
      "mlp_update(Tensor[] columns, Tensor[] gradients, Tensor(a!)[] weights, "
      "Tensor(b!)[] biases, Tensor(c!)[] weight_sums, Tensor(d!)[] bias_sums, "
      "Tensor(e!)[] weight_gradients, Tensor(f!)[] bias_gradients, int rule, float rate, "
      "float epsilon, bool first, bool last) -> ()");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, library) {
  library.impl("to_panels", &dlrm::to_panels);
  library.impl("mlp_forward", &dlrm::mlp_forward);
  library.impl("mlp_backward", &dlrm::mlp_backward);
  library.impl("mlp_update", &dlrm::mlp_update);
}
