// Small matrix products for weights that fit in cache: one thread, one fixed order of additions.
#pragma once
#include "cpu/simd.h"

namespace pixelbytes {
namespace {

// kRows x kVecs vectors of C stay in registers over the whole depth.
template <class T, int kRows, int kVecs>
inline void product_block(int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row, T* c, int64_t c_row,
                          bool add) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[kRows][kVecs];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVecs; ++j) sum[i][j] = add ? load(c + i * c_row + j * W) : Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[kVecs];
    for (int j = 0; j < kVecs; ++j) row[j] = load(b + k * b_row + j * W);
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> factor = splat(a[i * a_row + k * a_column]);
      for (int j = 0; j < kVecs; ++j) sum[i][j] += factor * row[j];
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVecs; ++j) store(c + i * c_row + j * W, sum[i][j]);
}

template <class T, int kVecs>
inline void product_columns(int64_t rows, int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row, T* c,
                            int64_t c_row, bool add) {
  constexpr int kRows = kVecs == 1 ? 8 : 4;  // enough chains of additions to hide their latency
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    product_block<T, kRows, kVecs>(depth, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, add);
  for (; i < rows; ++i) product_block<T, 1, kVecs>(depth, a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, add);
}

// C (rows, columns) = A (rows, depth) B (depth, columns), or += with `add`. columns is a multiple of kLanes, B and C have
// contiguous rows; element (i, k) of A is a[i * a_row + k * a_column].
template <class T>
inline void product(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_row,
                    T* c, int64_t c_row, bool add) {
  constexpr int W = kLanes<T>, kWide = kVecBytes == 64 ? 4 : 2;
  int64_t j = 0;
  for (; j + kWide * W <= columns; j += kWide * W)
    product_columns<T, kWide>(rows, depth, a, a_row, a_column, b + j, b_row, c + j, c_row, add);
  if constexpr (kWide == 4)
    for (; j + 2 * W <= columns; j += 2 * W)
      product_columns<T, 2>(rows, depth, a, a_row, a_column, b + j, b_row, c + j, c_row, add);
  for (; j < columns; j += W) product_columns<T, 1>(rows, depth, a, a_row, a_column, b + j, b_row, c + j, c_row, add);
}

// (rows, columns) with row stride from_row -> (columns, rows) with row stride to_row.
template <class T>
inline void transpose_copy(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * to_row + i] = from[i * from_row + j];
}

}  // namespace
}  // namespace pixelbytes
