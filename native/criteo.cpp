// Parses rows of Criteo's logs and checks every byte on the way.
//
// A row is a line of tab-separated fields: a label (where rows have one), integers, and ids of 8
// hexadecimal digits. Parsing stops at the first malformed line; what is wrong with it is for
// data/row_parser.py to say.

#include <torch/library.h>

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "fields.h"

namespace {

int64_t parse_rows(const at::Tensor& text, at::Tensor& labels, at::Tensor& dense,
                   at::Tensor& sparse, at::Tensor& missing, bool labelled, int64_t longest) {
  const int64_t rows = dense.size(0);
  const int64_t integers = dense.size(1);
  const int64_t ids = sparse.size(1);
  TORCH_CHECK(text.is_contiguous() && labels.is_contiguous() && dense.is_contiguous() &&
                  sparse.is_contiguous() && missing.is_contiguous(),
              "dlrm::parse_rows: tensors must be contiguous");
  TORCH_CHECK(labels.numel() >= rows && sparse.size(0) >= rows && missing.numel() == integers,
              "dlrm::parse_rows: labels, dense and sparse must have a place for each row");
  const uint8_t* begin = text.const_data_ptr<uint8_t>();
  dlrm::Cursor<'\t'> cursor{begin, begin + text.numel()};
  TORCH_CHECK(text.numel() > 0 && cursor.end[-1] == '\n', "dlrm::parse_rows: expected whole lines");
  uint8_t* label = labels.mutable_data_ptr<uint8_t>();
  int32_t* integer = dense.mutable_data_ptr<int32_t>();
  uint32_t* id = sparse.mutable_data_ptr<uint32_t>();
  int64_t* missing_in = missing.mutable_data_ptr<int64_t>();

  int64_t row = 0;
  const uint8_t* line = cursor.at;
  while (row < rows && cursor.at < cursor.end) {
    bool good = !labelled || (cursor.label(&label[row]) && cursor.take('\t'));
    for (int64_t i = 0; good && i < integers; ++i) {
      good = cursor.integer(&integer[row * integers + i], &missing_in[i]) &&
             cursor.take(i + 1 < integers + ids ? '\t' : '\n');
    }
    for (int64_t i = 0; good && i < ids; ++i) {
      good = cursor.id(&id[row * ids + i]) && cursor.take(i + 1 < ids ? '\t' : '\n');
    }
    if (!good || cursor.at - line > longest) break;
    line = cursor.at;
    ++row;
  }
  return row;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlrm, library) {
  library.def(
      "parse_rows(Tensor text, Tensor(a!) labels, Tensor(b!) dense, Tensor(c!) sparse, "
      "Tensor(d!) missing, bool labelled, int longest) -> int");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, library) { library.impl("parse_rows", &parse_rows); }
