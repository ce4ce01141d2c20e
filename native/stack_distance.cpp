// A stack of items in the order of their last access, over any number of calls.
//
// An access takes the next slot of a row of them; a Fenwick tree counts the taken slots before any
// one, so that an item's depth, and the item at a depth, cost the logarithm of their number. Where
// the slots are used up they are numbered anew without gaps. There are twice as many as items, so
// that this costs a constant for each access.

#include <torch/library.h>

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int32_t kNone = -1;

void check(const at::Tensor& tensor, at::ScalarType type, const char* name) {
  TORCH_CHECK(tensor.is_contiguous() && tensor.dim() == 1 && tensor.scalar_type() == type,
              "dlrm: ", name, " must be a contiguous vector of ", type);
}

class Stack {
 public:
  Stack(at::Tensor& slots, at::Tensor& tree, at::Tensor& state)
      : capacity_(slots.numel()),
        item_(slots.mutable_data_ptr<int32_t>()),
        tree_(tree.mutable_data_ptr<int32_t>()),
        next_(state.mutable_data_ptr<int64_t>()[0]),
        size_(state.mutable_data_ptr<int64_t>()[1]) {
    check(slots, at::kInt, "slots");
    check(tree, at::kInt, "tree");
    check(state, at::kLong, "state");
    TORCH_CHECK(tree.numel() == capacity_ + 1 && state.numel() == 2,
                "dlrm: a tree is one longer than its slots, and a state has two numbers");
    TORCH_CHECK(next_ >= 0 && next_ <= capacity_ && size_ >= 0 && size_ <= capacity_,
                "dlrm: the state of a stack is damaged");
    top_bit_ = 1;
    while (top_bit_ * 2 <= capacity_) top_bit_ *= 2;
  }

  int64_t size() const { return size_; }

  // How many items were accessed since the one in this slot, itself included.
  int64_t depth(int64_t slot) const {
    int64_t before = 0;
    for (int64_t i = slot; i > 0; i -= i & -i) before += tree_[i];
    return size_ - before;
  }

  // The slot of the item at this depth, 1 … size.
  int64_t slot_at(int64_t depth) const {
    int64_t before = size_ - depth;  // items that lie deeper
    int64_t slot = 0;
    for (int64_t bit = top_bit_; bit > 0; bit /= 2) {
      if (slot + bit <= capacity_ && tree_[slot + bit] <= before) {
        slot += bit;
        before -= tree_[slot];
      }
    }
    return slot;
  }

  int32_t take(int64_t slot) {
    const int32_t item = item_[slot];
    item_[slot] = kNone;
    add(slot, -1);
    --size_;
    return item;
  }

  // Puts an item on top and returns its slot; calls moved(item, slot) for all that move.
  template <typename F>
  int64_t put(int32_t item, const F& moved) {
    if (next_ == capacity_) close_gaps(moved);
    TORCH_CHECK(next_ < capacity_, "dlrm: a stack must have more slots than items");
    const int64_t slot = next_++;
    item_[slot] = item;
    add(slot, 1);
    ++size_;
    return slot;
  }

 private:
  void add(int64_t slot, int32_t count) {
    for (int64_t i = slot + 1; i <= capacity_; i += i & -i) tree_[i] += count;
  }

  template <typename F>
  void close_gaps(const F& moved) {
    next_ = 0;
    for (int64_t slot = 0; slot < capacity_; ++slot) {
      const int32_t item = item_[slot];
      if (item == kNone) continue;
      item_[slot] = kNone;
      item_[next_] = item;
      moved(item, next_++);
    }
    for (int64_t i = 1; i <= capacity_; ++i) {
      tree_[i] = static_cast<int32_t>(std::max<int64_t>(0, std::min(i, next_) - (i - (i & -i))));
    }
  }

  int64_t capacity_;
  int32_t* item_;
  int32_t* tree_;  // from 1
  int64_t& next_;
  int64_t& size_;
  int64_t top_bit_;
};

void stack_distances(const at::Tensor& items, at::Tensor& places, at::Tensor& slots,
                     at::Tensor& tree, at::Tensor& state, at::Tensor& distances) {
  check(items, at::kInt, "items");
  check(places, at::kInt, "places");
  check(distances, at::kInt, "distances");
  TORCH_CHECK(distances.numel() == items.numel(), "dlrm: distances must be as long as items");
  Stack stack(slots, tree, state);
  const int64_t size = items.numel();
  const int64_t range = places.numel();
  const int32_t* item = items.const_data_ptr<int32_t>();
  int32_t* place = places.mutable_data_ptr<int32_t>();
  int32_t* distance = distances.mutable_data_ptr<int32_t>();
  const auto moved = [&](int32_t each, int64_t slot) { place[each] = static_cast<int32_t>(slot); };
  for (int64_t i = 0; i < size; ++i) {
    TORCH_CHECK(item[i] >= 0 && item[i] < range, "dlrm::stack_distances: item out of range");
    const int32_t slot = place[item[i]];
    distance[i] = slot == kNone ? 0 : static_cast<int32_t>(stack.depth(slot));
    if (slot != kNone) stack.take(slot);
    place[item[i]] = static_cast<int32_t>(stack.put(item[i], moved));
  }
}

// The reference's generate_stack_distance and trace_generate_lru.
int64_t draw_accesses(const at::Tensor& uniforms, const at::Tensor& distances,
                      const at::Tensor& cumulative, bool padding, int64_t fresh, at::Tensor& slots,
                      at::Tensor& tree, at::Tensor& state, at::Tensor& items) {
  check(uniforms, at::kDouble, "uniforms");
  check(distances, at::kInt, "distances");
  check(cumulative, at::kDouble, "cumulative");
  check(items, at::kInt, "items");
  const int64_t kinds = distances.numel();
  TORCH_CHECK(kinds > 0 && cumulative.numel() == kinds && items.numel() == uniforms.numel(),
              "dlrm::draw_accesses: lengths do not fit");
  Stack stack(slots, tree, state);
  const int32_t* distance = distances.const_data_ptr<int32_t>();
  const double* sum = cumulative.const_data_ptr<double>();
  const double* uniform = uniforms.const_data_ptr<double>();
  int32_t* item = items.mutable_data_ptr<int32_t>();
  const int64_t deepest = distance[kinds - 1];
  TORCH_CHECK(distance[0] == 0 && deepest <= stack.size(),
              "dlrm::draw_accesses: a distance is larger than the stack");
  const auto moved = [](int32_t, int64_t) {};
  for (int64_t i = 0; i < uniforms.numel(); ++i) {
    double u = uniform[i];
    if (fresh < deepest) {
      // No distance that is larger than what has occurred so far.
      u *= sum[std::upper_bound(distance, distance + kinds, fresh) - distance - 1];
    } else if (padding) {
      u = (1 - sum[0]) * u + sum[0];
    }
    const int64_t kind = std::min(std::lower_bound(sum, sum + kinds, u) - sum, kinds - 1);
    // A new access takes what lies deepest: what never occurred, or longest ago.
    const int64_t depth = distance[kind] == 0 ? stack.size() : distance[kind];
    fresh += distance[kind] == 0;
    item[i] = stack.take(stack.slot_at(depth));
    stack.put(item[i], moved);
  }
  return fresh;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dlrm, library) {
  library.def(
      "stack_distances(Tensor items, Tensor(a!) places, Tensor(b!) slots, Tensor(c!) tree, "
      "Tensor(d!) state, Tensor(e!) distances) -> ()");
  library.def(
      "draw_accesses(Tensor uniforms, Tensor distances, Tensor cumulative, bool padding, "
      "int fresh, Tensor(a!) slots, Tensor(b!) tree, Tensor(c!) state, Tensor(d!) items) -> int");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, library) {
  library.impl("stack_distances", &stack_distances);
  library.impl("draw_accesses", &draw_accesses);
}
