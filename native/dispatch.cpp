// Which instruction set's kernels to use, and operators to ask and to say.

#include "kernels.h"

#include <torch/library.h>

#include <atomic>
#include <cstring>
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

int64_t panel_rows() { return kernels().panel; }

}  // namespace

const Kernels& kernels() { return *chosen(); }

}  // namespace dlrm

TORCH_LIBRARY_FRAGMENT(dlrm, library) {
  library.def("instruction_sets() -> str[]", &dlrm::instruction_sets);
  library.def("use_instruction_set(str name) -> ()", &dlrm::use_instruction_set);
  library.def("panel_rows() -> int", &dlrm::panel_rows);
}
