// Embedding bags and how their vectors meet the dense one: forward, backward, update of the tables.

#include "arguments.h"
#include "operators.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace dlrm {
namespace {

// What becomes of a row's vectors: their products, or they themselves one after another.
int64_t pairs_of(int64_t vectors, bool itself) {
  return itself ? vectors * (vectors + 1) / 2 : vectors * (vectors - 1) / 2;
}

// Two tables of a feature give its vector together: `count` pairs of a feature's table and one
// behind all features', joined as a product or a sum.
struct Combined {
  int64_t features;
  int64_t count = 0;
  const int64_t* pairs = nullptr;  // (count, 2): the feature; 1: multiply, 0: add

  int64_t feature(int64_t i) const { return pairs[2 * i]; }
  bool multiplies(int64_t i) const { return pairs[2 * i + 1] != 0; }
};

Combined combined_of(const std::optional<at::Tensor>& combined, int64_t tables) {
  if (!combined) return {tables};
  const int64_t count = combined->size(0);
  TORCH_CHECK(count <= tables, "dlrm: more vectors are combined than there are tables");
  check_tensor(*combined, at::kLong, {count, 2}, "combined");
  const Combined made{tables - count, count, combined->const_data_ptr<int64_t>()};
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK(0 <= made.feature(i) && made.feature(i) < made.features,
                "dlrm: a combined feature is out of range");
  }
  return made;
}

// Of a panel's vectors, each of `size` elements: the dense one, each table's, and then room for each
// combined feature's own, which the backward pass needs. Joins pair i.
void combine(float* vectors, const Combined& pair, int64_t i, int64_t size) {
  float* own = vectors + (1 + pair.feature(i)) * size;
  const float* other = vectors + (1 + pair.features + i) * size;
  std::memcpy(vectors + (1 + pair.features + pair.count + i) * size, own, sizeof(float) * size);
  const bool multiplies = pair.multiplies(i);
  for (int64_t k = 0; k < size; ++k) own[k] = multiplies ? own[k] * other[k] : own[k] + other[k];
}

// The gradients of the vectors before pair i was joined, of which the feature's is that of both.
void combine_backward(const float* vectors, const Combined& pair, int64_t i, int64_t size,
                      float* gradients) {
  float* own = gradients + (1 + pair.feature(i)) * size;
  float* other = gradients + (1 + pair.features + i) * size;
  if (!pair.multiplies(i)) {
    std::memcpy(other, own, sizeof(float) * size);
    return;
  }
  const float* factor = vectors + (1 + pair.features + i) * size;
  const float* before = vectors + (1 + pair.features + pair.count + i) * size;
  for (int64_t k = 0; k < size; ++k) {
    other[k] = own[k] * before[k];
    own[k] *= factor[k];
  }
}

}  // namespace

void embed_interact(const at::Tensor& dense_vector, const at::Tensor& arena,
                    const at::Tensor& first_rows, const at::Tensor& ids,
                    const std::optional<at::Tensor>& offsets,
                    const std::optional<at::Tensor>& weights,
                    const std::optional<at::Tensor>& combined, int64_t rows, bool itself,
                    at::Tensor& vectors, const std::optional<at::Tensor>& interactions) {
  const Kernels& kernel = kernels();
  const Bags bags = bags_of(ids, offsets, weights, first_rows, rows);
  const Combined pair = combined_of(combined, bags.features);
  const int64_t dim = arena.size(1), width = kernel.panel, panels = panels_of(rows);
  const int64_t count = pair.features + 1, pairs = pairs_of(count, itself);
  const int64_t slots = 1 + bags.features + pair.count;
  TORCH_CHECK(!pair.count || interactions, "dlrm: combined vectors need interactions");
  const float* table = read(arena, {arena.size(0), dim}, "arena");
  const float* dense = read(dense_vector, {panels, dim, width}, "dense_vector");
  float* vector = write(vectors, {panels, slots * dim, width}, "vectors");
  float* product = nullptr;
  if (interactions) product = write(*interactions, {panels, dim + pairs, width}, "interactions");
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> pooled;
    pooled.resize(width * dim);
    const auto in_panel = [&](int64_t p) { return std::min(width, rows - p * width); };
    kernel.prefetch(bags, table, dim, begin * width, in_panel(begin));
    for (int64_t p = begin; p < end; ++p) {
      if (p + 1 < end) kernel.prefetch(bags, table, dim, (p + 1) * width, in_panel(p + 1));
      float* to = vector + p * slots * dim * width;
      const size_t dense_bytes = sizeof(float) * dim * width;
      std::memcpy(to, dense + p * dim * width, dense_bytes);
      kernel.gather(bags, table, dim, p * width, in_panel(p), to + dim * width, pooled.data());
      if (!product) continue;
      for (int64_t i = 0; i < pair.count; ++i) combine(to, pair, i, dim * width);
      float* out = product + p * (dim + pairs) * width;
      std::memcpy(out, to, dense_bytes);
      kernel.interact(to, count, dim, itself, out + dim * width);
    }
  });
}

namespace {

void embed_interact_backward(const at::Tensor& vectors, const at::Tensor& gradient, int64_t rows,
                             int64_t tables, const std::optional<at::Tensor>& combined, bool dot,
                             bool itself, int64_t first_row, at::Tensor& dense_gradient,
                             at::Tensor& bag_gradients) {
  const Kernels& kernel = kernels();
  const Combined pair = combined_of(combined, tables);
  TORCH_CHECK(!pair.count || dot, "dlrm: combined vectors need interactions");
  const int64_t width = kernel.panel, panels = panels_of(rows), count = pair.features + 1;
  const int64_t slots = 1 + tables + pair.count;
  const int64_t dim = vectors.size(1) / slots, pairs = pairs_of(count, itself);
  const int64_t in_width = dot ? dim + pairs : count * dim;
  const int64_t stride = bag_gradients.size(1);  // rows of the whole batch
  TORCH_CHECK(first_row + rows <= stride, "dlrm: bag_gradients is too short");
  const float* vector = read(vectors, {panels, slots * dim, width}, "vectors");
  const float* from = read(gradient, {panels, in_width, width}, "gradient");
  float* dense = write(dense_gradient, {panels, dim, width}, "dense_gradient");
  float* bag = write(bag_gradients, {tables, stride, dim}, "bag_gradients");
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> scratch;
    scratch.resize((1 + tables) * dim * width);
    for (int64_t p = begin; p < end; ++p) {
      const float* mine = vector + p * slots * dim * width;
      const float* out = from + p * in_width * width;
      const float* each = out;  // "cat": the gradients of the vectors are there already
      float* to = dense + p * dim * width;
      if (dot) {
        kernel.interact_backward(mine, out + dim * width, count, dim, itself, scratch.data());
        each = scratch.data();
        for (int64_t i = 0; i < dim * width; ++i) to[i] = each[i] + out[i];
        for (int64_t i = 0; i < pair.count; ++i) {
          combine_backward(mine, pair, i, dim * width, scratch.data());
        }
      } else {
        std::memcpy(to, out, sizeof(float) * dim * width);
      }
      // The dense vector comes out of a ReLU.
      for (int64_t i = 0; i < dim * width; ++i) {
        if (mine[i] <= 0) to[i] = 0;
      }
      const int64_t lanes = std::min(width, rows - p * width);
      for (int64_t f = 0; f < tables; ++f) {
        kernel.to_rows(each + (f + 1) * dim * width, dim, lanes,
                       bag + (f * stride + first_row + p * width) * dim);
      }
    }
  });
}

// Numbers the rows that a table's bags hold, in the order in which they first appear.
class Numbering {
 public:
  void restart(int64_t most) {
    capacity_ = 16;
    while (capacity_ < 2 * most) capacity_ *= 2;
    slots_.assign(capacity_, -1);
    rows_.clear();
  }

  int64_t number(int64_t row) {
    uint64_t at = static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u >> 32 & (capacity_ - 1);
    while (slots_[at] >= 0 && rows_[slots_[at]] != row) at = (at + 1) & (capacity_ - 1);
    if (slots_[at] < 0) {
      slots_[at] = static_cast<int32_t>(rows_.size());
      rows_.push_back(row);
    }
    return slots_[at];
  }

  const std::vector<int64_t>& rows() const { return rows_; }

 private:
  int64_t capacity_ = 0;
  std::vector<int32_t> slots_;  // into rows_, or -1
  std::vector<int64_t> rows_;
};

// Calls f(row of the arena, bag's row of the batch, weight) for every id of a table.
template <typename F>
void for_ids(const Bags& bags, int64_t feature, int64_t rows, const F& f) {
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t bag = b * bags.features + feature;
    const int64_t first = bags.offsets ? bags.offsets[bag] : bag;
    const int64_t last = bags.offsets ? bags.offsets[bag + 1] : bag + 1;
    for (int64_t i = first; i < last; ++i) {
      f(bags.first_rows[feature] + bags.ids[i], b, bags.weights ? bags.weights[i] : 1.0f);
    }
  }
}

void tables_update(const at::Tensor& bag_gradients, const at::Tensor& first_rows,
                   const at::Tensor& ids, const std::optional<at::Tensor>& offsets,
                   const std::optional<at::Tensor>& weights, int64_t rule, double rate,
                   double epsilon, at::Tensor& arena, const std::optional<at::Tensor>& sums) {
  const Kernels& kernel = kernels();
  const int64_t rows = bag_gradients.size(1), dim = arena.size(1), all = arena.size(0);
  const Bags bags = bags_of(ids, offsets, weights, first_rows, rows);
  const float* gradients = read(bag_gradients, {bags.features, rows, dim}, "bag_gradients");
  float* table = write(arena, {all, dim}, "arena");
  const Update update = update_of(rule, rate, epsilon);
  const bool adaptive = update.rule != Rule::kSgd;
  const int64_t sum_dim = update.rule == Rule::kRowwiseAdagrad ? 1 : dim;
  TORCH_CHECK(!adaptive || sums, "dlrm: sums are missing");
  float* sum = nullptr;
  if (update.rule == Rule::kRowwiseAdagrad) sum = write(*sums, {all}, "sums");
  if (update.rule == Rule::kAdagrad) sum = write(*sums, {all, dim}, "sums");
  // A table is one thread's, so that the order of additions does not depend on the threads.
  for_tasks(bags.features, [&](int64_t f) {
    static thread_local Numbering numbering;
    static thread_local std::vector<float> summed;
    const float* gradient = gradients + f * rows * dim;
    if (!adaptive) {
      for_ids(bags, f, rows, [&](int64_t row, int64_t b, float weight) {
        kernel.add_scaled(table + row * dim, gradient + b * dim, -update.rate * weight, dim);
      });
      return;
    }
    // An adaptive rule squares gradients, so those of one row are summed first.
    int64_t most = 0;
    for_ids(bags, f, rows, [&](int64_t, int64_t, float) { ++most; });
    numbering.restart(most);
    summed.clear();
    for_ids(bags, f, rows, [&](int64_t row, int64_t b, float weight) {
      const size_t at = numbering.number(row) * dim;
      if (at == summed.size()) {
        summed.resize(at + dim, 0);
        __builtin_prefetch(sum + row * sum_dim, 1);
      }
      kernel.add_scaled(&summed[at], gradient + b * dim, weight, dim);
    });
    for (size_t i = 0; i < numbering.rows().size(); ++i) {
      const int64_t row = numbering.rows()[i];
      kernel.row_update(table + row * dim, sum + row * sum_dim, &summed[i * dim], dim, update);
    }
  });
}

}  // namespace
}  // namespace dlrm

TORCH_LIBRARY_FRAGMENT(dlrm, library) {
  library.def(
      "embed_interact(Tensor dense_vector, Tensor arena, Tensor first_rows, Tensor ids, "
      "Tensor? offsets, Tensor? weights, Tensor? combined, int rows, bool itself, "
      "Tensor(a!) vectors, Tensor(b!)? interactions) -> ()");
  library.def(
      "embed_interact_backward(Tensor vectors, Tensor gradient, int rows, int tables, "
      "Tensor? combined, bool dot, bool itself, int first_row, Tensor(a!) dense_gradient, "
      "Tensor(b!) bag_gradients) -> ()");
  library.def(
      "tables_update(Tensor bag_gradients, Tensor first_rows, Tensor ids, Tensor? offsets, "
      "Tensor? weights, int rule, float rate, float epsilon, Tensor(a!) arena, "
      "Tensor(b!)? sums) -> ()");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, library) {
  library.impl("embed_interact", &dlrm::embed_interact);
  library.impl("embed_interact_backward", &dlrm::embed_interact_backward);
  library.impl("tables_update", &dlrm::tables_update);
}
