#include "kernels_impl.h"

namespace dlrm {

const Kernels& portable_kernels() {
  static constexpr Kernels table = make_kernels("portable");
  return table;
}

}  // namespace dlrm
