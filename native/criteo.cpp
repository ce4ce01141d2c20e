// Parses rows of Criteo's logs and checks every byte on the way.
//
// A row is a line of tab-separated fields: a label (where rows have one), integers, and ids of 8
// hexadecimal digits. Parsing stops at the first malformed line; what is wrong with it is for
// data/row_parser.py to say.

#include <torch/library.h>

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

namespace {

constexpr uint8_t kNoDigit = 0xFF;

constexpr std::array<uint8_t, 256> digit_values() {
  std::array<uint8_t, 256> values{};
  for (int byte = 0; byte < 256; ++byte) {
    values[byte] = byte >= '0' && byte <= '9'   ? byte - '0'
                   : byte >= 'a' && byte <= 'f' ? byte - 'a' + 10
                   : byte >= 'A' && byte <= 'F' ? byte - 'A' + 10
                                                : kNoDigit;
  }
  return values;
}

constexpr std::array<uint8_t, 256> kDigits = digit_values();

// A position in text that ends with a newline, so that a field always has an end.
struct Cursor {
  const uint8_t* at;
  const uint8_t* end;

  bool ends_field() const { return *at == '\t' || *at == '\n'; }

  bool take(uint8_t separator) { return *at == separator ? (++at, true) : false; }

  // 0 or 1.
  bool label(uint8_t* value) {
    *value = *at - '0';
    return *value <= 1 ? (++at, true) : false;
  }

  // An integer of 64 bits if it is negative, which becomes 0, else of 31; missing: 0.
  bool integer(int32_t* value, int64_t* missing) {
    *value = 0;
    if (ends_field()) {
      ++*missing;
      return true;
    }
    const bool negative = take('-');
    const uint64_t limit = negative ? uint64_t{1} << 63 : (uint64_t{1} << 31) - 1;
    const uint8_t* first = at;
    uint64_t magnitude = 0;
    for (uint8_t digit; (digit = *at - '0') <= 9; ++at) {
      if (magnitude > (limit - digit) / 10) return false;
      magnitude = magnitude * 10 + digit;
    }
    if (!negative) *value = static_cast<int32_t>(magnitude);
    return at != first;
  }

  // 8 hexadecimal digits; missing: 0.
  bool id(uint32_t* value) {
    *value = 0;
    if (ends_field()) return true;
    if (end - at < 9) return false;
    uint8_t bad = 0;
    for (int i = 0; i < 8; ++i) {
      const uint8_t digit = kDigits[at[i]];
      bad |= digit;
      *value = *value << 4 | digit;
    }
    at += 8;
    return (bad & 0xF0) == 0;
  }
};

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
  Cursor cursor{begin, begin + text.numel()};
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
