#include "kernels_impl.h"

namespace dlrm {

const Kernels& avx512_kernels() {
  static constexpr Kernels table = make_kernels("avx512");
  return table;
}

}  // namespace dlrm
