// Parses rows of a CSV file and checks every byte of the cells that are asked for.
//
// A row is a line of cells, each plain or in double quotes. Parsing stops at the first line that is
// no row; what is wrong with it is for data/csv_rows.py to say.

#include <torch/library.h>

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "arguments.h"
#include "fields.h"

namespace dlrm {
namespace {

// Where a row's cells go.
struct Row {
  uint8_t* label;
  int32_t* integers;
  uint32_t* ids;
};

// A cell's meaning: the number of an integer, beyond these of an id, then the label; or nothing.
struct Cells {
  const int32_t* meanings;
  int64_t count, integers, ids;
};

// ".", then any number of zeros: how an integer is written that was a float.
template <uint8_t kEnd>
void skip_zeros(Cursor<kEnd>& cursor) {
  if (cursor.take('.')) {
    while (cursor.take('0')) {
    }
  }
}

// The content of a cell, up to what ends it.
template <uint8_t kEnd>
bool take_content(Cursor<kEnd>& cursor, int32_t meaning, const Cells& cells, const Row& row) {
  int64_t missing = 0;
  if (meaning < cells.integers) {
    if (!cursor.integer(&row.integers[meaning], &missing)) return false;
    if (!missing) skip_zeros(cursor);
    return true;
  }
  if (meaning < cells.integers + cells.ids) return cursor.id(&row.ids[meaning - cells.integers]);
  if (!cursor.label(row.label)) return false;
  skip_zeros(cursor);
  return true;
}

template <uint8_t kSeparator>
bool take_cell(Cursor<kSeparator>& cursor, int32_t meaning, const Cells& cells, const Row& row) {
  if (*cursor.at != '"') {
    if (meaning >= 0) return take_content(cursor, meaning, cells, row);
    while (!cursor.ends_field()) ++cursor.at;
    return true;
  }
  Cursor<'"'> quoted{cursor.at + 1, cursor.end};
  if (meaning >= 0) {
    if (!take_content(quoted, meaning, cells, row) || !quoted.take('"')) return false;
  } else {
    do {  // a quote within is written twice
      while (!quoted.ends_field()) ++quoted.at;
      if (!quoted.take('"')) return false;
    } while (quoted.take('"'));
  }
  cursor.at = quoted.at;
  return true;
}

template <uint8_t kSeparator>
int64_t parse(Cursor<kSeparator> cursor, const Cells& cells, Row row, int64_t rows,
              int64_t longest) {
  for (int64_t parsed = 0; parsed < rows; ++parsed) {
    const uint8_t* line = cursor.at;
    if (line == cursor.end) return parsed;
    for (int64_t cell = 0; cell < cells.count; ++cell) {
      if (!take_cell(cursor, cells.meanings[cell], cells, row) ||
          !cursor.take(cell + 1 < cells.count ? kSeparator : '\n')) {
        return parsed;
      }
    }
    if (cursor.at - line > longest) return parsed;
    ++row.label;
    row.integers += cells.integers;
    row.ids += cells.ids;
  }
  return rows;
}

int64_t parse_cells(const at::Tensor& text, const at::Tensor& meanings, int64_t separator,
                    int64_t longest, at::Tensor& labels, at::Tensor& dense, at::Tensor& sparse) {
  const int64_t rows = labels.size(0), count = meanings.numel();
  const Cells cells{meanings.const_data_ptr<int32_t>(), count, dense.size(1), sparse.size(1)};
  check_tensor(text, at::kByte, {text.numel()}, "text");
  check_tensor(meanings, at::kInt, {count}, "meanings");
  check_tensor(labels, at::kByte, {rows}, "labels");
  check_tensor(dense, at::kInt, {rows, cells.integers}, "dense");
  check_tensor(sparse, at::kUInt32, {rows, cells.ids}, "sparse");
  for (int64_t cell = 0; cell < count; ++cell) {
    TORCH_CHECK(cells.meanings[cell] <= cells.integers + cells.ids,
                "dlrm::parse_cells: there is no such feature");
  }
  const uint8_t* begin = text.const_data_ptr<uint8_t>();
  const uint8_t* end = begin + text.numel();
  TORCH_CHECK(text.numel() > 0 && end[-1] == '\n', "dlrm::parse_cells: expected whole lines");
  const Row row{labels.mutable_data_ptr<uint8_t>(), dense.mutable_data_ptr<int32_t>(),
                sparse.mutable_data_ptr<uint32_t>()};
  switch (separator) {
    case ',':
      return parse(Cursor<','>{begin, end}, cells, row, rows, longest);
    case ';':
      return parse(Cursor<';'>{begin, end}, cells, row, rows, longest);
    default:
      TORCH_CHECK(separator == '\t', "dlrm::parse_cells: expected comma, semicolon or tab");
      return parse(Cursor<'\t'>{begin, end}, cells, row, rows, longest);
  }
}

}  // namespace
}  // namespace dlrm

TORCH_LIBRARY_FRAGMENT(dlrm, library) {
  library.def(
      "parse_cells(Tensor text, Tensor meanings, int separator, int longest, Tensor(a!) labels, "
      "Tensor(b!) dense, Tensor(c!) sparse) -> int");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, library) { library.impl("parse_cells", &dlrm::parse_cells); }
