// The kernels of a training step, compiled once for each instruction set.
//
// A kernel works on plain pointers in the calling thread; the operators (mlp.cpp, embedding.cpp …) spread work
// over threads and check arguments. Every element is computed by one thread in one order, whatever the number of
// threads, so the bits of a result do not depend on it.
//
// Layouts. With B rows, activations are stored as *panels* of kPanel rows, feature by feature:
//
//     panels    (B / kPanel, features, kPanel)    a feature of kPanel rows is two vectors
//     columns   (features / kPanel, B, kPanel)    the same, transposed block by block
//
// Panels make any product with a weight matrix W (out, in) a sum of a broadcast element of W times
// two vectors: W is read as it lies, row by row, and nothing is packed. The weights' gradient sums
// over rows instead of features, and reads its inputs as columns. The last panel is filled up:
// inputs and bags with zeros, so that nothing in it overflows; what layers make of these is nobody's,
// and the gradients of its outputs are zero.

#pragma once

#include <cstdint>

namespace dlrm {

// Outputs of a layer that are taken at a time: their weights, and the gradients of a few hundred rows,
// stay in the second cache. A multiple of every instruction set's block.
constexpr int64_t kOutputsAtOnce = 24;

enum class Rule : int64_t { kSgd = 0, kAdagrad = 1, kRowwiseAdagrad = 2 };

// How a weight moves along its gradient. Adagrad: sum += g², weight -= rate g / (√sum + epsilon).
struct Update {
  Rule rule;
  float rate;
  float epsilon;
};

// The bags of B rows: bag b * features + f holds ids of table f, offsets[bag] … offsets[bag + 1],
// or the one id at that place if there are no offsets. Table f is rows first_rows[f] … of the arena.
struct Bags {
  const int64_t* ids;
  const int64_t* offsets;  // or nullptr: one id a bag
  const float* weights;    // one an id, or nullptr: all 1
  const int64_t* first_rows;
  int64_t features;
};

// y[p][r] = sum over k of matrix[r][k] x[p][k] (+ bias[r]); then where relu, max(·, 0); where mask,
// 0 wherever mask[p][r] <= 0.
struct Linear {
  const float* matrix;            // (out, in), or where transposed, (in, out)
  const float* bias = nullptr;    // (out)
  const float* mask = nullptr;    // (panels, out)
  const float* x;                 // (panels, in)
  float* y;                       // (panels, out)
  int64_t in;
  int64_t out;
  bool relu = false;
  bool transposed = false;
};

// One fully connected layer's parameters and what its update needs, for weight_update.
struct LayerUpdate {
  int64_t in;
  int64_t out;
  int64_t panels;
  const float* columns;   // its inputs, (in / kPanel, panels * kPanel, kPanel)
  const float* gradient;  // of its outputs, panels
  float* weight;          // (out, in)
  float* bias;            // (out)
  float* weight_sum;      // Adagrad's
  float* bias_sum;
  float* weight_gradient;  // carried between parts of a batch; nullptr if it has one part
  float* bias_gradient;
  bool first;  // start the gradient, or add to the one carried
  bool last;   // update the weights, or carry the gradient
};

struct Kernels {
  const char* name;
  int64_t panel;  // kPanel

  // Outputs [begin, end) for so many panels, of which the first so many rows are asked for: what
  // the last panel's others become is undefined. For one row there must be a bias and no mask,
  // unless transposed.
  void (*linear)(const Linear& layer, int64_t begin, int64_t end, int64_t panels, int64_t rows);

  // Panels [begin, end) of x become columns.
  void (*to_columns)(const float* x, float* columns, int64_t features, int64_t panels,
                     int64_t begin, int64_t end);

  // Updates the outputs [begin, end) of a layer, at most kOutputsAtOnce.
  void (*weight_update)(const LayerUpdate& layer, const Update& update, int64_t begin,
                        int64_t end);

  // Asks for the table rows of the bags of `count` rows of a batch, from row `row` on.
  void (*prefetch)(const Bags& bags, const float* arena, int64_t dim, int64_t row, int64_t count);

  // Sums the bags of a panel: vectors (features, dim, kPanel). pooled: scratch, kPanel * dim.
  void (*gather)(const Bags& bags, const float* arena, int64_t dim, int64_t row, int64_t count,
                 float* vectors, float* pooled);

  // products (pairs, kPanel) of vectors (count, dim, kPanel): the lower triangle, row by row.
  void (*interact)(const float* vectors, int64_t count, int64_t dim, bool itself, float* products);

  // gradient of vectors, (count, dim, kPanel), from that of products.
  void (*interact_backward)(const float* vectors, const float* products, int64_t count,
                            int64_t dim, bool itself, float* gradient);

  // (dim, kPanel) becomes `count` rows of length dim.
  void (*to_rows)(const float* panel, int64_t dim, int64_t count, float* rows);

  // target (+)= scale * source, over dim.
  void (*add_scaled)(float* target, const float* source, float scale, int64_t dim);

  // Moves one row of a table along its gradient, by Adagrad; sum is the row's (dim), or one number
  // for row-wise Adagrad.
  void (*row_update)(float* row, float* sum, const float* gradient, int64_t dim,
                     const Update& update);
};

// The fastest that this processor runs, unless the operator use_instruction_set chose others.
const Kernels& kernels();

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace dlrm
