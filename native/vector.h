// A vector of floats for the instruction set that a file is compiled for, and what is not an
// operator on it. GCC's and Clang's vector extension: a * b + c becomes one fused instruction where
// there is one (-ffp-contract=fast), and nothing else is reordered.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t kWidth = 16;
constexpr int kBlock = 12;  // outputs that a tile sums at once: as many as registers allow
#elif defined(__AVX2__)
constexpr int64_t kWidth = 8;
constexpr int kBlock = 6;
#else
constexpr int64_t kWidth = 4;
constexpr int kBlock = 6;
#endif

constexpr int64_t kPanel = 2 * kWidth;

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t Mask __attribute__((vector_size(kWidth * sizeof(float))));
typedef float Unaligned __attribute__((vector_size(kWidth * sizeof(float)), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
inline Vector broadcast(float value) { return value - Vector{}; }

// 0 where the condition is at most 0. Not-a-number counts as positive, as in PyTorch's ReLU, so that
// a diverged loss stays visible.
inline Vector where_positive(Vector condition, Vector value) {
  return reinterpret_cast<Vector>(~(condition <= Vector{}) & reinterpret_cast<Mask>(value));
}

inline Vector square_root(Vector value) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xFFFF, value);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(value);
#else
  for (int64_t lane = 0; lane < kWidth; ++lane) value[lane] = std::sqrt(value[lane]);
  return value;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// A mask of the first n of 8 lanes.
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

inline float sum_of(Vector value) {
  float sum = 0;
  for (int64_t lane = 0; lane < kWidth; ++lane) sum += value[lane];
  return sum;
}

constexpr int64_t kSquare = 8;

#if defined(__AVX2__)
// Calls take(j, column j) for j = 0 … 7, in this order, of 8 rows of 8, each by its own address.
template <typename From, typename Take>
inline void for_columns(From from, Take take) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from(i));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) take(i, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
  for (int i = 0; i < 4; ++i) take(i + 4, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
}
#endif

// to[j][i] = from[i][j] for 8 rows of 8, each row by its own address.
template <typename From, typename To>
inline void transpose_square(From from, To to) {
#if defined(__AVX2__)
  for_columns(from, [&](int j, __m256 column) { _mm256_storeu_ps(to(j), column); });
#else
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) to(j)[i] = from(i)[j];
  }
#endif
}

// to[j][i] = from[i][j] for rows × columns of any size, in squares of a cache line either way.
template <typename From, typename To>
inline void transpose_block(From from, To to, int64_t rows, int64_t columns) {
  constexpr int64_t kLine = 2 * kSquare;
  for (int64_t top = 0; top < rows; top += kLine) {
    const int64_t bottom = top + kLine < rows ? top + kLine : rows;
    for (int64_t left = 0; left < columns; left += kLine) {
      const int64_t right = left + kLine < columns ? left + kLine : columns;
      int64_t i = top;
      for (; i + kSquare <= bottom; i += kSquare) {
        int64_t j = left;
        for (; j + kSquare <= right; j += kSquare) {
          transpose_square([&](int64_t row) { return from(i + row) + j; },
                           [&](int64_t row) { return to(j + row) + i; });
        }
        for (; j < right; ++j) {
          for (int64_t row = i; row < i + kSquare; ++row) to(j)[row] = from(row)[j];
        }
      }
      for (; i < bottom; ++i) {
        for (int64_t j = left; j < right; ++j) to(j)[i] = from(i)[j];
      }
    }
  }
}

}  // namespace
