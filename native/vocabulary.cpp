// Looks raw values up in sorted vocabularies, which may be mapped files: nothing is copied.
//
// A vocabulary is parts of ascending values. An index of a part tells for each of equal ranges of
// numbers which values lie in it: hashed values are spread evenly, so that a range has a few, and
// where they are not, a binary search within the range is left. What a lookup waits for is memory,
// three times (the index, the values, the ids), so that a tile of lookups takes each of these steps
// together, with the memory of the next step on its way.

#include <torch/library.h>

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "arguments.h"
#include "fields.h"

namespace dlrm {
namespace {

constexpr int64_t kTile = 1024;   // lookups that are on their way together
constexpr uint32_t kWindow = 16;  // values that are compared all at once: a line of the cache
constexpr int64_t kSmall = 1 << 15;  // values that caches hold, with their ids

struct Part {
  const uint32_t* values;
  const int32_t* ids;
  const uint32_t* starts;
  uint64_t factor;
  uint32_t first, last, size;

  // Which of the ranges a value in first … last lies in.
  uint64_t range_of(uint32_t value) const { return (value - first) * factor >> 32; }

  // Between which places a range's values lie.
  void bounds_of(uint32_t range, uint32_t* low, uint32_t* high) const {
    *high = std::min(starts[range + 1], size);
    *low = std::min(starts[range], *high);
  }

  // The place of the first value that is not below one: there, if it has that value at all. Ranges
  // of different lengths take the same steps, since a branch that is guessed wrong costs more.
  uint32_t place_of(uint32_t low, uint32_t high, uint32_t value) const {
    while (high - low > kWindow) {
      const uint32_t middle = low + (high - low) / 2;
      if (values[middle] < value) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    uint32_t below = 0;
    if (size < kWindow) {
      for (uint32_t i = 0; i < size; ++i) below += values[i] < value;
      return below;
    }
    low = std::min(low, size - kWindow);  // what comes in before it is below the value too
    const uint32_t* window = values + low;  // an index that could overflow would be no vector's
    for (uint32_t i = 0; i < kWindow; ++i) below += window[i] < value;
    return low + below;
  }

  bool has(uint32_t value, uint32_t place) const { return place < size && values[place] == value; }
};

uint64_t factor_of(uint32_t first, uint32_t last, uint64_t ranges) {
  return (ranges << 32) / (static_cast<uint64_t>(last) - first + 1);
}

// Fills starts, one more than there are ranges: how many values lie in earlier ranges.
void index_values(const at::Tensor& values, at::Tensor& starts) {
  const int64_t size = values.numel();
  const int64_t ranges = starts.numel() - 1;
  check_tensor(values, at::kUInt32, {size}, "values");
  check_tensor(starts, at::kUInt32, {ranges + 1}, "starts");
  TORCH_CHECK(size > 0 && size < int64_t{1} << 31 && ranges > 0 && ranges < int64_t{1} << 31,
              "dlrm::index_values: expected values and ranges, fewer than 2**31 of each");
  const uint32_t* value = values.const_data_ptr<uint32_t>();
  uint32_t* start = starts.mutable_data_ptr<uint32_t>();
  TORCH_CHECK(value[0] <= value[size - 1], "dlrm::index_values: values must ascend");
  const uint64_t factor = factor_of(value[0], value[size - 1], ranges);
  uint64_t range = 0;  // up to which starts are known
  start[0] = 0;
  for (int64_t i = 0; i < size; ++i) {
    TORCH_CHECK(i == 0 || value[i] > value[i - 1], "dlrm::index_values: values must ascend");
    for (const uint64_t own = (value[i] - value[0]) * factor >> 32; range < own;) {
      start[++range] = static_cast<uint32_t>(i);
    }
  }
  while (range < static_cast<uint64_t>(ranges)) start[++range] = static_cast<uint32_t>(size);
}

struct Feature {
  const Part* parts;
  int64_t part_count;
  int32_t other;
  uint32_t modulus, buckets;

  uint32_t value_of(uint32_t raw) const { return modulus ? raw % modulus : raw; }

  // The part that has a value, if any has.
  const Part* part_of(uint32_t value) const {
    int64_t part = -1;
    for (int64_t p = 0; p < part_count; ++p) part += parts[p].first <= value;
    return part >= 0 && value <= parts[part].last ? parts + part : nullptr;
  }
};

uint64_t mix(uint64_t value) {
  value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9u;
  value = (value ^ value >> 27) * 0x94D049BB133111EBu;
  return value ^ value >> 31;
}

// What is encoded, and where ids go.
struct Encoding {
  const Feature* described;  // (features)
  const uint32_t* raw;
  const int64_t* columns;  // (features, 2): first, step
  int64_t features;
  int32_t* ids;      // (rows, features)
  int64_t* unknown;  // (features)

  uint32_t value_of(int64_t f, int64_t row) const {
    return described[f].value_of(raw[columns[2 * f] + row * columns[2 * f + 1]]);
  }

  void put(int64_t f, int64_t row, const Part* part, uint32_t place) const {
    unknown[f] += !part;
    ids[row * features + f] = part ? part->ids[place] : described[f].other;
  }
};

// Whether lookups have to wait for memory, so that many are made in stages together.
bool is_large(const Feature& feature) {
  int64_t size = 0;
  for (int64_t p = 0; p < feature.part_count; ++p) size += feature.parts[p].size;
  return !feature.buckets && size > kSmall;
}

void encode_at_once(const Encoding& all, int64_t f, int64_t row) {
  const Feature& feature = all.described[f];
  const uint32_t value = all.value_of(f, row);
  if (feature.buckets) {
    all.ids[row * all.features + f] =
        static_cast<int32_t>((mix(value) >> 32) * feature.buckets >> 32);
    return;
  }
  const Part* part = feature.part_of(value);
  uint32_t place = 0;
  if (part) {
    uint32_t low, high;
    part->bounds_of(static_cast<uint32_t>(part->range_of(value)), &low, &high);
    place = part->place_of(low, high, value);
    if (!part->has(value, place)) part = nullptr;
  }
  all.put(f, row, part, place);
}

// Encodes the first `rows` rows of some features.
void encode(const Encoding& all, const std::vector<int64_t>& chosen, int64_t rows) {
  std::vector<int64_t> staged, direct;
  for (const int64_t f : chosen) (is_large(all.described[f]) ? staged : direct).push_back(f);
  const int64_t large = static_cast<int64_t>(staged.size());
  const int64_t tile_rows = std::max<int64_t>(1, kTile / std::max<int64_t>(1, large));
  struct Lookup {
    const Part* part;
    uint32_t value, low, high;
  };
  std::vector<Lookup> lookups(large * std::min(tile_rows, rows));
  for (int64_t begin = 0; begin < rows; begin += tile_rows) {
    const int64_t tile = std::min(tile_rows, rows - begin);
    const auto each = [&](const auto& step) {
      for (int64_t s = 0; s < large; ++s) {
        for (int64_t r = 0; r < tile; ++r) step(lookups[s * tile + r], staged[s], begin + r);
      }
    };
    each([&](Lookup& lookup, int64_t f, int64_t row) {
      lookup.value = all.value_of(f, row);
      lookup.part = all.described[f].part_of(lookup.value);
      if (!lookup.part) return;
      lookup.low = static_cast<uint32_t>(lookup.part->range_of(lookup.value));
      __builtin_prefetch(lookup.part->starts + lookup.low);
    });
    each([&](Lookup& lookup, int64_t, int64_t) {
      if (!lookup.part) return;
      lookup.part->bounds_of(lookup.low, &lookup.low, &lookup.high);
      __builtin_prefetch(lookup.part->values + lookup.low);
      __builtin_prefetch(lookup.part->values + lookup.low + kWindow - 1);
    });
    each([&](Lookup& lookup, int64_t, int64_t) {
      if (!lookup.part) return;
      lookup.low = lookup.part->place_of(lookup.low, lookup.high, lookup.value);
      if (lookup.part->has(lookup.value, lookup.low)) {
        __builtin_prefetch(lookup.part->ids + lookup.low);
      } else {
        lookup.part = nullptr;
      }
    });
    each([&](Lookup& lookup, int64_t f, int64_t row) { all.put(f, row, lookup.part, lookup.low); });
    for (const int64_t f : direct) {
      for (int64_t row = begin; row < begin + tile; ++row) encode_at_once(all, f, row);
    }
  }
}

// The value of a feature in a row is values[first + row * step]; where step is 0 one value is meant
// for every row, and is looked up once.
void encode_values(const at::Tensor& values, const at::Tensor& columns, const at::Tensor& rules,
                   at::TensorList part_values, at::TensorList part_ids, at::TensorList part_starts,
                   const at::Tensor& bounds, at::Tensor& ids, at::Tensor& unknown) {
  const int64_t rows = ids.size(0);
  const int64_t features = columns.size(0);
  const int64_t part_count = static_cast<int64_t>(part_values.size());
  check_tensor(values, at::kUInt32, {values.numel()}, "values");
  check_tensor(columns, at::kLong, {features, 2}, "columns");
  check_tensor(rules, at::kLong, {features, 5}, "rules");
  check_tensor(bounds, at::kLong, {part_count, 2}, "bounds");
  check_tensor(ids, at::kInt, {rows, features}, "ids");
  check_tensor(unknown, at::kLong, {features}, "unknown");
  TORCH_CHECK(part_ids.size() == part_values.size() && part_starts.size() == part_values.size(),
              "dlrm::encode_values: each part has values, ids and starts");
  std::vector<Part> parts(part_count);
  for (int64_t i = 0; i < part_count; ++i) {
    const int64_t size = part_values[i].numel();
    const int64_t ranges = part_starts[i].numel() - 1;
    check_tensor(part_values[i], at::kUInt32, {size}, "values of a part");
    check_tensor(part_ids[i], at::kInt, {size}, "ids of a part");
    check_tensor(part_starts[i], at::kUInt32, {ranges + 1}, "starts of a part");
    const int64_t* bound = bounds.const_data_ptr<int64_t>() + 2 * i;
    TORCH_CHECK(ranges > 0 && 0 <= bound[0] && bound[0] <= bound[1] && bound[1] < int64_t{1} << 32,
                "dlrm::encode_values: a part has bounds that ascend, and ranges");
    const uint32_t first = static_cast<uint32_t>(bound[0]), last = static_cast<uint32_t>(bound[1]);
    parts[i] = {part_values[i].const_data_ptr<uint32_t>(),
                part_ids[i].const_data_ptr<int32_t>(),
                part_starts[i].const_data_ptr<uint32_t>(),
                factor_of(first, last, ranges),
                first,
                last,
                static_cast<uint32_t>(size)};
  }
  std::vector<Feature> described(features);
  for (int64_t f = 0; f < features; ++f) {
    const int64_t* rule = rules.const_data_ptr<int64_t>() + 5 * f;
    TORCH_CHECK(0 <= rule[0] && rule[0] <= rule[1] && rule[1] <= part_count && 0 <= rule[3] &&
                    0 <= rule[4],
                "dlrm::encode_values: a rule names parts that there are, and no negative numbers");
    described[f] = {parts.data() + rule[0], rule[1] - rule[0], static_cast<int32_t>(rule[2]),
                    static_cast<uint32_t>(rule[3]), static_cast<uint32_t>(rule[4])};
  }
  const int64_t* column = columns.const_data_ptr<int64_t>();
  for (int64_t f = 0; f < features; ++f) {
    const int64_t first = column[2 * f], step = column[2 * f + 1];
    const int64_t behind = values.numel() - 1 - first;
    TORCH_CHECK(0 <= first && 0 <= step && (rows == 0 || behind >= 0) &&
                    (rows <= 1 || step <= behind / (rows - 1)),
                "dlrm::encode_values: a column lies within the values");
  }
  std::vector<int64_t> varying, common;
  for (int64_t f = 0; f < features; ++f) (column[2 * f + 1] ? varying : common).push_back(f);
  const Encoding all{described.data(), values.const_data_ptr<uint32_t>(), column, features,
                     ids.mutable_data_ptr<int32_t>(), unknown.mutable_data_ptr<int64_t>()};
  encode(all, varying, rows);
  encode(all, common, std::min<int64_t>(rows, 1));
  for (const int64_t f : common) {
    all.unknown[f] *= rows;
    for (int64_t row = 1; row < rows; ++row) all.ids[row * features + f] = all.ids[f];
  }
}

// Reads texts that are 8 hexadecimal digits, or empty: 0. Each has its length before it, in 4 bytes;
// tensors of `counts` texts and `sizes` bytes follow each other. Returns whether they are that.
bool unpack_values(const at::Tensor& data, at::IntArrayRef sizes, at::IntArrayRef counts,
                   at::Tensor& values) {
  int64_t bytes = 0, texts = 0;
  TORCH_CHECK(sizes.size() == counts.size(), "dlrm::unpack_values: a size for each count");
  for (size_t i = 0; i < sizes.size(); ++i) {
    TORCH_CHECK(0 <= sizes[i] && sizes[i] <= data.numel() && 0 <= counts[i] &&
                    counts[i] <= values.numel(),
                "dlrm::unpack_values: no tensor is larger than all of them");
    bytes += sizes[i];
    texts += counts[i];
  }
  check_tensor(data, at::kByte, {bytes}, "data");
  check_tensor(values, at::kUInt32, {texts}, "values");
  const uint8_t* at = data.const_data_ptr<uint8_t>();
  uint32_t* value = values.mutable_data_ptr<uint32_t>();
  for (size_t i = 0; i < sizes.size(); ++i) {
    const uint8_t* end = at + sizes[i];
    for (int64_t text = 0; text < counts[i]; ++text, ++value) {
      if (end - at < 4) return false;
      const int length = at[0];
      if (length & ~8 || at[1] | at[2] | at[3] || end - at < 4 + length) return false;
      at += 4;
      *value = 0;
      if (length && !parse_id(at, value)) return false;
      at += length;
    }
    if (at != end) return false;
  }
  return true;
}

}  // namespace
}  // namespace dlrm

TORCH_LIBRARY_FRAGMENT(dlrm, library) {
  library.def("index_values(Tensor values, Tensor(a!) starts) -> ()");
  library.def(
      "encode_values(Tensor values, Tensor columns, Tensor rules, Tensor[] part_values, "
      "Tensor[] part_ids, Tensor[] part_starts, Tensor bounds, Tensor(a!) ids, Tensor(b!) unknown) "
      "-> ()");
  library.def("unpack_values(Tensor data, int[] sizes, int[] counts, Tensor(a!) values) -> bool");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, library) {
  library.impl("index_values", &dlrm::index_values);
  library.impl("encode_values", &dlrm::encode_values);
  library.impl("unpack_values", &dlrm::unpack_values);
}
