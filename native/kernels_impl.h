// The kernels' definitions; kernels_*.cpp include this, each for its instruction set. Everything
// is in an unnamed namespace, and nothing of the standard library that could be compiled out of
// line is used: else the linker might keep one instruction set's copy for all.

#pragma once

#include "kernels.h"
#include "vector.h"

namespace {

using dlrm::Bags;
using dlrm::kOutputsAtOnce;
using dlrm::LayerUpdate;
using dlrm::Linear;
using dlrm::Rule;
using dlrm::Update;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Sums of kRows outputs for the rows of a panel: of all of them in two vectors, or of the first
// half in one.
template <int kRows, int kVectors = 2>
struct Tile {
  Vector sums[kRows][kVectors];
};

// tile[r] += sum over k of a[r][k] * x[k], for vectors x[k] of kPanel lanes. Rows of a lie `stride`
// apart; where it is kTransposed, its columns do.
template <bool kTransposed, int kRows, int kVectors>
__attribute__((always_inline)) inline void multiply(Tile<kRows, kVectors>& tile, const float* a,
                                                    int64_t stride, const float* x,
                                                    int64_t depth) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vector factors[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) factors[v] = load(x + k * kPanel + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector factor = broadcast(kTransposed ? a[k * stride + r] : a[r * stride + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) tile.sums[r][v] += factor * factors[v];
    }
  }
}

// Calls f with a compile-time number of rows, at most kBlock, for all of [begin, end).
template <int kRows = kBlock, typename F>
inline void for_blocks(int64_t begin, int64_t end, const F& f) {
  if constexpr (kRows == kBlock) {
    for (; begin + kRows <= end; begin += kRows) f.template operator()<kRows>(begin);
  } else {
    if (begin + kRows == end) return f.template operator()<kRows>(begin);
  }
  if constexpr (kRows > 1) for_blocks<kRows - 1>(begin, end, f);
}

// Terms that are summed one after another before their sum joins the others': rounding errors grow
// with this number rather than with that of all terms.
constexpr int64_t kTerms = 64;

// Inputs of a panel that go through some outputs before the next, to stay in the first cache.
constexpr int64_t kInputsAtOnce = 4 * kTerms;

// Outputs [begin, end) of one panel, over its inputs [top, bottom). Sums of those before wait in y.
template <bool kTransposed, int kVectors>
void linear_panel(const Linear& layer, int64_t begin, int64_t end, int64_t p, int64_t top,
                  int64_t bottom) {
  for_blocks(begin, end, [&]<int kRows>(int64_t row) {
    Tile<kRows, kVectors> tile;
    float* y = layer.y + (p * layer.out + row) * kPanel;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        tile.sums[r][v] = top ? load(y + r * kPanel + v * kWidth)
                        : layer.bias ? broadcast(layer.bias[row + r]) : Vector{};
      }
    }
    for (int64_t k = top; k < bottom; k += kTerms) {
      Tile<kRows, kVectors> terms{};
      multiply<kTransposed>(
          terms,
          kTransposed ? layer.matrix + k * layer.out + row : layer.matrix + row * layer.in + k,
          kTransposed ? layer.out : layer.in, layer.x + (p * layer.in + k) * kPanel,
          smaller(kTerms, bottom - k));
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) tile.sums[r][v] += terms.sums[r][v];
      }
    }
    const bool done = bottom == layer.in;
    const float* mask = layer.mask ? layer.mask + (p * layer.out + row) * kPanel : nullptr;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = r * kPanel + v * kWidth;
        Vector sum = tile.sums[r][v];
        if (done && layer.relu) sum = where_positive(sum, sum);
        if (done && mask) sum = where_positive(load(mask + at), sum);
        store(y + at, sum);
      }
    }
  });
}

// One fully connected layer.
template <bool kTransposed>
void linear_outputs(const Linear& layer, int64_t begin, int64_t end, int64_t panels,
                    int64_t rows) {
  // Where the last panel's rows fit into one vector, half of it is computed.
  const int64_t whole = rows <= (panels - 1) * kPanel + kWidth ? panels - 1 : panels;
  for (int64_t top = 0; top == 0 || top < layer.in; top += kInputsAtOnce) {
    const int64_t bottom = smaller(top + kInputsAtOnce, layer.in);
    for (int64_t group = begin; group < end; group += kOutputsAtOnce) {
      const int64_t last = smaller(group + kOutputsAtOnce, end);
      for (int64_t p = 0; p < whole; ++p) {
        linear_panel<kTransposed, 2>(layer, group, last, p, top, bottom);
      }
      if (whole < panels) linear_panel<kTransposed, 1>(layer, group, last, whole, top, bottom);
    }
  }
}

// The first row of a panel alone, a lane an output: what linear_outputs does for a vector of rows
// costs one row as much. Every output is summed in the same order, to the same bits.
void linear_row(const Linear& layer, int64_t begin, int64_t end) {
  int64_t row = begin;
#if defined(__AVX2__)
  constexpr int kSquares = 4;
  constexpr int64_t kOutputs = kSquares * kSquare;
  for (; row + kOutputs <= end; row += kOutputs) {
    const float* matrix = layer.matrix + row * layer.in;
    __m256 sums[kSquares];
#pragma GCC unroll 4
    for (int s = 0; s < kSquares; ++s) sums[s] = _mm256_loadu_ps(layer.bias + row + s * kSquare);
    for (int64_t first = 0; first < layer.in; first += kTerms) {
      const int64_t last = smaller(first + kTerms, layer.in);
      __m256 terms[kSquares]{};
      int64_t k = first;
      for (; k + kSquare <= last; k += kSquare) {
#pragma GCC unroll 4
        for (int s = 0; s < kSquares; ++s) {
          for_columns([&](int i) { return matrix + (s * kSquare + i) * layer.in + k; },
                      [&](int j, __m256 column) {
                        terms[s] += column * _mm256_set1_ps(layer.x[(k + j) * kPanel]);
                      });
        }
      }
      for (; k < last; ++k) {
        const __m256 factor = _mm256_set1_ps(layer.x[k * kPanel]);
#pragma GCC unroll 4
        for (int s = 0; s < kSquares; ++s) {
          __m256 column;
          for (int i = 0; i < 8; ++i) column[i] = matrix[(s * kSquare + i) * layer.in + k];
          terms[s] += column * factor;
        }
      }
#pragma GCC unroll 4
      for (int s = 0; s < kSquares; ++s) sums[s] += terms[s];
    }
    for (int64_t i = 0; i < kOutputs; ++i) {
      const Vector sum{sums[i / kSquare][i % kSquare]};
      float* to = layer.y + (row + i) * kPanel;
      store(to, layer.relu ? where_positive(sum, sum) : sum);
      store(to + kWidth, Vector{});
    }
  }
#endif
  linear_outputs<false>(layer, row, end, 1, 1);
}

void linear(const Linear& layer, int64_t begin, int64_t end, int64_t panels, int64_t rows) {
  if (layer.transposed) return linear_outputs<true>(layer, begin, end, panels, rows);
  if (rows == 1) return linear_row(layer, begin, end);
  linear_outputs<false>(layer, begin, end, panels, rows);
}

void to_columns(const float* x, float* columns, int64_t features, int64_t panels, int64_t begin,
                int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t f = 0; f < features; f += kPanel) {
      float* to = columns + (f / kPanel * panels + p) * kPanel * kPanel;
      const float* from = x + (p * features + f) * kPanel;
      const int64_t count = smaller(kPanel, features - f);
      transpose_block([&](int64_t i) { return from + i * kPanel; },
                      [&](int64_t j) { return to + j * kPanel; }, count, kPanel);
      for (int64_t row = 0; row < kPanel && count < kPanel; ++row) {
        for (int64_t i = count; i < kPanel; ++i) to[row * kPanel + i] = 0;
      }
    }
  }
}

// Where a weight moves to along its gradient, under SGD or Adagrad.
template <bool kAdaptive>
inline Vector moved(Vector weight, Vector& sum, Vector gradient, const Update& update) {
  if constexpr (!kAdaptive) return weight - update.rate * gradient;
  sum += gradient * gradient;
  return weight - update.rate * (gradient / (square_root(sum) + update.epsilon));
}

// The first n <= kWidth of a vector's floats.
inline Vector load_some(const float* from, int64_t n) {
  if (n == kWidth) return load(from);
#if defined(__AVX512F__)
  return _mm512_maskz_loadu_ps((1u << n) - 1, from);
#elif defined(__AVX2__)
  return _mm256_maskload_ps(from, first_lanes(n));
#else
  Vector some{};
  for (int64_t i = 0; i < n; ++i) some[i] = from[i];
  return some;
#endif
}

inline void store_some(float* to, Vector value, int64_t n) {
  if (n == kWidth) return store(to, value);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, (1u << n) - 1, value);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(to, first_lanes(n), value);
#else
  for (int64_t i = 0; i < n; ++i) to[i] = value[i];
#endif
}

// Moves n <= kWidth neighbouring weights.
template <bool kAdaptive>
inline void move(float* weight, float* sum, Vector gradient, int64_t n, const Update& update) {
  Vector sums = kAdaptive ? load_some(sum, n) : Vector{};
  store_some(weight, moved<kAdaptive>(load_some(weight, n), sums, gradient, update), n);
  if constexpr (kAdaptive) store_some(sum, sums, n);
}

template <bool kAdaptive>
void bias_update(const LayerUpdate& layer, const Update& update, int64_t row) {
  Vector sums{};
  for (int64_t p = 0; p < layer.panels; ++p) {
    const float* gradient = layer.gradient + (p * layer.out + row) * kPanel;
    sums += load(gradient) + load(gradient + kWidth);
  }
  float sum = sum_of(sums);
  if (!layer.first) sum += layer.bias_gradient[row];
  if (!layer.last) {
    layer.bias_gradient[row] = sum;
    return;
  }
  move<kAdaptive>(layer.bias + row, layer.bias_sum + row, broadcast(sum), 1, update);
}

// Panels whose columns go through all outputs before the next, to stay in the first cache.
constexpr int64_t kPanelsAtOnce = 4096 / (kPanel * kPanel);

// Updates the weights of outputs [begin, end) and of kVectors vectors of inputs from i on, the last
// of which has fewer than kWidth unless kWhole.
template <bool kAdaptive, bool kWhole, int kVectors = 2>
void columns_update(const LayerUpdate& layer, const Update& update, int64_t begin, int64_t end,
                    int64_t i) {
  const auto count = [&](int v) {
    return kWhole ? kWidth : smaller(kWidth, layer.in - i - v * kWidth);
  };
  float* moving = layer.last ? layer.weight : layer.weight_gradient;
  float sums[kOutputsAtOnce * kPanel];  // of the panels before
  for (int64_t top = 0; top < layer.panels; top += kPanelsAtOnce) {
    const int64_t bottom = smaller(top + kPanelsAtOnce, layer.panels);
    const bool done = bottom == layer.panels;
    const float* x = layer.columns + (i * layer.panels + top * kPanel) * kPanel;
    for_blocks(begin, end, [&]<int kRows>(int64_t row) {
      Tile<kRows, kVectors> tile{};
      const int64_t first = row * layer.in + i;
      float* partial = sums + (row - begin) * kPanel;
      if (done) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          // Needed when the sums are done; they come from beyond the second cache.
          for (int v = 0; v < kVectors; ++v) {
            __builtin_prefetch(moving + first + r * layer.in + v * kWidth, 1);
          }
        }
      }
      if (top) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kVectors; ++v) {
            tile.sums[r][v] = load(partial + r * kPanel + v * kWidth);
          }
        }
      } else if (!layer.first) {
        for (int r = 0; r < kRows; ++r) {
          for (int v = 0; v < kVectors; ++v) {
            const float* from = layer.weight_gradient + first + r * layer.in + v * kWidth;
            tile.sums[r][v] = load_some(from, count(v));
          }
        }
      }
      for (int64_t p = top; p < bottom; ++p) {
        const float* gradient = layer.gradient + (p * layer.out + row) * kPanel;
        // The next tile's gradients: too short a run for the processor to foresee.
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) __builtin_prefetch(gradient + (kRows + r) * kPanel);
        multiply<false>(tile, gradient, kPanel, x + (p - top) * kPanel * kPanel, kPanel);
      }
      if (!done) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            store(partial + r * kPanel + v * kWidth, tile.sums[r][v]);
          }
        }
        return;
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = first + r * layer.in + v * kWidth;
          if (layer.last) {
            move<kAdaptive>(layer.weight + at, layer.weight_sum + at, tile.sums[r][v],
                            count(v), update);
          } else {
            store_some(layer.weight_gradient + at, tile.sums[r][v], count(v));
          }
        }
      }
    });
  }
}

template <bool kAdaptive>
void layer_update(const LayerUpdate& layer, const Update& update, int64_t begin, int64_t end) {
  int64_t i = 0;
  for (; i + kPanel <= layer.in; i += kPanel) {
    columns_update<kAdaptive, true>(layer, update, begin, end, i);
  }
  if (i + kWidth < layer.in) {
    columns_update<kAdaptive, false>(layer, update, begin, end, i);
  } else if (i < layer.in) {
    columns_update<kAdaptive, false, 1>(layer, update, begin, end, i);
  }
  for (int64_t row = begin; row < end; ++row) bias_update<kAdaptive>(layer, update, row);
}

void weight_update(const LayerUpdate& layer, const Update& update, int64_t begin, int64_t end) {
  if (update.rule == Rule::kSgd) return layer_update<false>(layer, update, begin, end);
  layer_update<true>(layer, update, begin, end);
}

// The ids of a bag: positions first … last-1 in bags.ids.
struct Bag {
  int64_t first;
  int64_t last;
};

inline Bag bag_of(const Bags& bags, int64_t row, int64_t feature) {
  const int64_t bag = row * bags.features + feature;
  if (!bags.offsets) return {bag, bag + 1};
  return {bags.offsets[bag], bags.offsets[bag + 1]};
}

void prefetch(const Bags& bags, const float* arena, int64_t dim, int64_t row, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t b = row; b < row + count; ++b) {
    for (int64_t f = 0; f < bags.features; ++f) {
      const Bag bag = bag_of(bags, b, f);
      for (int64_t i = bag.first; i < bag.last; ++i) {
        const float* from = arena + (bags.first_rows[f] + bags.ids[i]) * dim;
        for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(from + d);
      }
    }
  }
}

void add_scaled(float* target, const float* source, float scale, int64_t dim) {
  int64_t d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    store(target + d, load(target + d) + scale * load(source + d));
  }
  for (; d < dim; ++d) target[d] += scale * source[d];
}

void gather(const Bags& bags, const float* arena, int64_t dim, int64_t row, int64_t count,
            float* vectors, float* pooled) {
  const float* rows[kPanel];
  for (int64_t f = 0; f < bags.features; ++f) {
    const float* table = arena + bags.first_rows[f] * dim;
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      float* sum = pooled + lane * dim;
      rows[lane] = sum;
      if (lane < count && !bags.offsets && !bags.weights) {
        rows[lane] = table + bags.ids[(row + lane) * bags.features + f] * dim;
        continue;
      }
      for (int64_t d = 0; d < dim; ++d) sum[d] = 0;
      if (lane >= count) continue;
      const Bag bag = bag_of(bags, row + lane, f);
      for (int64_t i = bag.first; i < bag.last; ++i) {
        add_scaled(sum, table + bags.ids[i] * dim, bags.weights ? bags.weights[i] : 1, dim);
      }
    }
    float* to = vectors + f * dim * kPanel;
    transpose_block([&](int64_t i) { return rows[i]; },
                    [&](int64_t j) { return to + j * kPanel; }, kPanel, dim);
  }
}

// Dimensions that products are summed over at a time, so that the vectors stay in the first cache.
constexpr int64_t kDepth = 16;

inline int64_t pairs_before(int64_t vector, bool itself) {
  return itself ? vector * (vector + 1) / 2 : vector * (vector - 1) / 2;
}

void interact(const float* vectors, int64_t count, int64_t dim, bool itself, float* products) {
  for (int64_t begin = 0; begin < dim; begin += kDepth) {
    const int64_t end = smaller(begin + kDepth, dim);
    for (int64_t i = 0; i < count; ++i) {
      const float* one = vectors + i * dim * kPanel;
      float* out = products + pairs_before(i, itself) * kPanel;
      for_blocks(0, itself ? i + 1 : i, [&]<int kRows>(int64_t j) {
        Tile<kRows> tile{};
        if (begin) {
          for (int r = 0; r < kRows; ++r) {
            tile.sums[r][0] = load(out + (j + r) * kPanel);
            tile.sums[r][1] = load(out + (j + r) * kPanel + kWidth);
          }
        }
        for (int64_t d = begin; d < end; ++d) {
          const Vector left = load(one + d * kPanel);
          const Vector right = load(one + d * kPanel + kWidth);
          const float* other = vectors + (j * dim + d) * kPanel;
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) {
            tile.sums[r][0] += left * load(other + r * dim * kPanel);
            tile.sums[r][1] += right * load(other + r * dim * kPanel + kWidth);
          }
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          store(out + (j + r) * kPanel, tile.sums[r][0]);
          store(out + (j + r) * kPanel + kWidth, tile.sums[r][1]);
        }
      });
    }
  }
}

void interact_backward(const float* vectors, const float* products, int64_t count, int64_t dim,
                       bool itself, float* gradient) {
  for (int64_t i = 0; i < count; ++i) {
    for_blocks(0, dim, [&]<int kRows>(int64_t d) {
      // Vectors before and after this one, each with a sum of its own: see kTerms.
      Tile<kRows> tile{}, before{};
      for (int64_t j = 0; j < count; ++j) {
        if (i == j) before = tile, tile = Tile<kRows>{};
        if (i == j && !itself) continue;
        const int64_t pair = i < j ? pairs_before(j, itself) + i : pairs_before(i, itself) + j;
        Vector left = load(products + pair * kPanel);
        Vector right = load(products + pair * kPanel + kWidth);
        if (i == j) {  // v · v has the gradient 2 v
          left += left;
          right += right;
        }
        const float* other = vectors + (j * dim + d) * kPanel;
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          tile.sums[r][0] += left * load(other + r * kPanel);
          tile.sums[r][1] += right * load(other + r * kPanel + kWidth);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        float* to = gradient + (i * dim + d + r) * kPanel;
        store(to, before.sums[r][0] + tile.sums[r][0]);
        store(to + kWidth, before.sums[r][1] + tile.sums[r][1]);
      }
    });
  }
}

void to_rows(const float* panel, int64_t dim, int64_t count, float* rows) {
  transpose_block([&](int64_t i) { return panel + i * kPanel; },
                  [&](int64_t j) { return rows + j * dim; }, dim, count);
}

void row_update(float* row, float* sum, const float* gradient, int64_t dim,
                const Update& update) {
  if (update.rule != Rule::kRowwiseAdagrad) {
    for (int64_t d = 0; d < dim; d += kWidth) {
      const int64_t n = smaller(kWidth, dim - d);
      move<true>(row + d, sum + d, load_some(gradient + d, n), n, update);
    }
    return;
  }
  Vector squares{};
  for (int64_t d = 0; d < dim; d += kWidth) {
    const Vector some = load_some(gradient + d, smaller(kWidth, dim - d));
    squares += some * some;
  }
  *sum += sum_of(squares) / static_cast<float>(dim);
  add_scaled(row, gradient, -update.rate / (std::sqrt(*sum) + update.epsilon), dim);
}

constexpr dlrm::Kernels make_kernels(const char* name) {
  return {name,     kPanel,   linear,            to_columns, weight_update, prefetch,
          gather,   interact, interact_backward, to_rows,    add_scaled,    row_update};
}

}  // namespace
