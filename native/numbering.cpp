// Numbers values in the order in which they first appear, over any number of calls.
//
// The table is open-addressed with linear probing. A slot holds a value and its number in one
// word, so that a lookup costs one cache miss; a group of lookups is started before the first is
// needed, so that the misses overlap.

#include <torch/library.h>

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

namespace {

constexpr int64_t kGroup = 64;
constexpr int64_t kMostNumbers = std::numeric_limits<int32_t>::max();

uint64_t slot_of(uint32_t value, uint64_t capacity) {
  uint32_t hash = value * 0x9E3779B1u;  // Fibonacci hashing: neighbours scatter
  hash ^= hash >> 15;
  hash *= 0x85EBCA77u;
  return (static_cast<uint64_t>(hash) * capacity) >> 32;
}

uint64_t packed(uint32_t value, int64_t number) {
  return (static_cast<uint64_t>(number + 1) << 32) | value;  // never 0, which is an empty slot
}

void check(const at::Tensor& tensor, at::ScalarType type, const char* name) {
  TORCH_CHECK(tensor.is_contiguous() && tensor.dim() == 1 && tensor.scalar_type() == type,
              "dlrm: ", name, " must be a contiguous vector of ", type);
}

int64_t number_values(const at::Tensor& values, at::Tensor& slots, at::Tensor& numbers,
                      at::Tensor& new_values, int64_t known) {
  check(values, at::kUInt32, "values");
  check(slots, at::kLong, "slots");
  check(numbers, at::kInt, "numbers");
  check(new_values, at::kUInt32, "new_values");
  const int64_t size = values.numel();
  const uint64_t capacity = slots.numel();
  TORCH_CHECK(known + size <= kMostNumbers, "dlrm::number_values: numbers must fit int32");
  TORCH_CHECK(numbers.numel() >= size && new_values.numel() >= size,
              "dlrm::number_values: numbers and new_values must be as long as values");
  TORCH_CHECK(static_cast<uint64_t>(known + size) < capacity,
              "dlrm::number_values: there must be more slots than values, were all of them new");
  const uint32_t* value = values.const_data_ptr<uint32_t>();
  uint64_t* slot = reinterpret_cast<uint64_t*>(slots.mutable_data_ptr<int64_t>());
  int32_t* number = numbers.mutable_data_ptr<int32_t>();
  uint32_t* added = new_values.mutable_data_ptr<uint32_t>();

  for (int64_t begin = 0; begin < size; begin += kGroup) {
    const int64_t end = std::min(size, begin + kGroup);
    std::array<uint64_t, kGroup> first;
    for (int64_t i = begin; i < end; ++i) {
      first[i - begin] = slot_of(value[i], capacity);
      __builtin_prefetch(&slot[first[i - begin]]);
    }
    for (int64_t i = begin; i < end; ++i) {
      uint64_t at = first[i - begin];
      while (slot[at] != 0 && static_cast<uint32_t>(slot[at]) != value[i]) {
        if (++at == capacity) at = 0;
      }
      if (slot[at] == 0) {
        slot[at] = packed(value[i], known++);
        *added++ = value[i];
      }
      number[i] = static_cast<int32_t>((slot[at] >> 32) - 1);
    }
  }
  return known;
}

void count_numbers(const at::Tensor& numbers, at::Tensor& counts) {
  check(numbers, at::kInt, "numbers");
  check(counts, at::kLong, "counts");
  const int64_t size = numbers.numel();
  const int64_t range = counts.numel();
  const int32_t* number = numbers.const_data_ptr<int32_t>();
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  for (int64_t begin = 0; begin < size; begin += kGroup) {
    const int64_t end = std::min(size, begin + kGroup);
    for (int64_t i = begin; i < end; ++i) {
      TORCH_CHECK(number[i] >= 0 && number[i] < range, "dlrm::count_numbers: number out of range");
      __builtin_prefetch(&count[number[i]], 1);
    }
    for (int64_t i = begin; i < end; ++i) ++count[number[i]];
  }
}

void insert_values(const at::Tensor& values, at::Tensor& slots, int64_t first_number) {
  check(values, at::kUInt32, "values");
  check(slots, at::kLong, "slots");
  const int64_t size = values.numel();
  const uint64_t capacity = slots.numel();
  TORCH_CHECK(first_number + size <= kMostNumbers, "dlrm::insert_values: numbers must fit int32");
  TORCH_CHECK(static_cast<uint64_t>(first_number + size) < capacity,
              "dlrm::insert_values: there must be more slots than values");
  const uint32_t* value = values.const_data_ptr<uint32_t>();
  uint64_t* slot = reinterpret_cast<uint64_t*>(slots.mutable_data_ptr<int64_t>());
  for (int64_t begin = 0; begin < size; begin += kGroup) {
    const int64_t end = std::min(size, begin + kGroup);
    for (int64_t i = begin; i < end; ++i) {
      __builtin_prefetch(&slot[slot_of(value[i], capacity)], 1);
    }
    for (int64_t i = begin; i < end; ++i) {
      uint64_t at = slot_of(value[i], capacity);
      while (slot[at] != 0) {
        if (++at == capacity) at = 0;
      }
      slot[at] = packed(value[i], first_number + i);
    }
  }
}

void move_slots(const at::Tensor& from, at::Tensor& to) {
  check(from, at::kLong, "from");
  check(to, at::kLong, "to");
  TORCH_CHECK(to.numel() >= from.numel(), "dlrm::move_slots: the new table must be larger");
  const uint64_t capacity = to.numel();
  const uint64_t* old = reinterpret_cast<const uint64_t*>(from.const_data_ptr<int64_t>());
  uint64_t* slot = reinterpret_cast<uint64_t*>(to.mutable_data_ptr<int64_t>());
  // In the order of the old table, which is that of the hashes: the new one is filled nearly in
  // order too, and no miss is waited for.
  for (int64_t i = 0; i < from.numel(); ++i) {
    if (old[i] == 0) continue;
    uint64_t at = slot_of(static_cast<uint32_t>(old[i]), capacity);
    while (slot[at] != 0) {
      if (++at == capacity) at = 0;
    }
    slot[at] = old[i];
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlrm, library) {
  library.def(
      "number_values(Tensor values, Tensor(a!) slots, Tensor(b!) numbers, Tensor(c!) new_values, "
      "int known) -> int");
  library.def("count_numbers(Tensor numbers, Tensor(a!) counts) -> ()");
  library.def("insert_values(Tensor values, Tensor(a!) slots, int first_number) -> ()");
  library.def("move_slots(Tensor old_slots, Tensor(a!) slots) -> ()");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, library) {
  library.impl("number_values", &number_values);
  library.impl("count_numbers", &count_numbers);
  library.impl("insert_values", &insert_values);
  library.impl("move_slots", &move_slots);
}
