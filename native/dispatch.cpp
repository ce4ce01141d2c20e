// Which instruction set's kernels to use, and operators to ask and to say.

#include "kernels.h"

#include <torch/library.h>

#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace dlrm {
namespace {

std::vector<const Kernels*> available() {  // the fastest first
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(&avx512_kernels());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&avx2_kernels());
  }
#endif
  found.push_back(&portable_kernels());
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{available().front()};
  return kernels;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* each : available()) names.emplace_back(each->name);
  return names;
}

void use_instruction_set(std::string name) {
  for (const Kernels* each : available()) {
    if (name == each->name) {
      chosen() = each;
      return;
    }
  }
  TORCH_CHECK(false, "dlrm: this processor has no ", name);
}

// Asks for huge pages under a tensor that has not been written to yet: a table's rows are read at
// random, and with small pages each costs a walk through the page table too.
void advise_huge_pages(const at::Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t end = begin + tensor.nbytes();
  // Only advice: where it is refused, small pages it is.
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

int64_t panel_rows() { return kernels().panel; }

}  // namespace

const Kernels& kernels() { return *chosen(); }

}  // namespace dlrm

TORCH_LIBRARY_FRAGMENT(dlrm, library) {
  library.def("instruction_sets() -> str[]", &dlrm::instruction_sets);
  library.def("use_instruction_set(str name) -> ()", &dlrm::use_instruction_set);
  library.def("panel_rows() -> int", &dlrm::panel_rows);
  library.def("advise_huge_pages(Tensor tensor) -> ()");
}

TORCH_LIBRARY_IMPL(dlrm, CPU, library) {
  library.impl("advise_huge_pages", &dlrm::advise_huge_pages);
}
