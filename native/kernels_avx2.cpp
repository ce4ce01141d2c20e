#include "kernels_impl.h"

namespace dlrm {

const Kernels& avx2_kernels() {
  static constexpr Kernels table = make_kernels("avx2");
  return table;
}

}  // namespace dlrm
