// Losses of logits, and their gradients.

#include "arguments.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <numeric>
#include <vector>

namespace dlrm {
namespace {

constexpr int64_t kRowsAtOnce = 32;

enum class Loss : int64_t { kCrossEntropy = 0, kSquaredError = 1 };

struct Point {
  double loss;
  double gradient;  // by the logit
};

// The arithmetic is in double, so that the sigmoid's rounding near 0 and 1 does not matter.
Point at_logit(double logit, double label, Loss kind, double threshold) {
  const double probability = 1 / (1 + std::exp(-logit));
  // Not-a-number is not clamped, so that a diverged loss stays visible.
  const bool clamped = threshold > 0 && (probability < threshold || probability > 1 - threshold);
  if (kind == Loss::kCrossEntropy && !clamped) {
    // log(1 + exp(x)) - y x, without overflow.
    const double softplus = std::fmax(logit, 0) + std::log1p(std::exp(-std::fabs(logit)));
    return {softplus - label * logit, probability - label};
  }
  const double p =
      clamped ? std::fmin(std::fmax(probability, threshold), 1 - threshold) : probability;
  if (kind == Loss::kSquaredError) {
    const double gradient = clamped ? 0 : 2 * (p - label) * p * (1 - p);
    return {(p - label) * (p - label), gradient};
  }
  return {-(label * std::log(p) + (1 - label) * std::log1p(-p)), 0};
}

at::Tensor loss_gradient(const at::Tensor& logits, const at::Tensor& labels, int64_t kind,
                         double weight_0, double weight_1, double threshold, double scale,
                         at::Tensor& gradient) {
  TORCH_CHECK(kind == 0 || kind == 1, "dlrm: there is no loss ", kind);
  const int64_t rows = labels.numel(), padded = panels_of(rows) * kernels().panel;
  const float* logit = read(logits, {panels_of(rows), 1, kernels().panel}, "logits");
  const float* label = read(labels, {rows}, "labels");
  float* to = write(gradient, logits.sizes(), "gradient");
  std::vector<double> losses(rows);
  at::parallel_for(0, rows, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Point point = at_logit(logit[b], label[b], static_cast<Loss>(kind), threshold);
      const double weight = scale * (weight_0 + (weight_1 - weight_0) * label[b]);
      losses[b] = weight * point.loss;
      to[b] = static_cast<float>(weight * point.gradient);
    }
  });
  for (int64_t b = rows; b < padded; ++b) to[b] = 0;  // of rows that are not there
  at::Tensor sum = at::empty({}, at::kDouble);
  *sum.mutable_data_ptr<double>() = std::accumulate(losses.begin(), losses.end(), 0.0);
  return sum;
}

}  // namespace
}  // namespace dlrm

TORCH_LIBRARY_FRAGMENT(dlrm, library) {
  library.def(
      "loss_gradient(Tensor logits, Tensor labels, int kind, float weight_0, float weight_1, "
      "float threshold, float scale, Tensor(a!) gradient) -> Tensor");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, library) { library.impl("loss_gradient", &dlrm::loss_gradient); }
