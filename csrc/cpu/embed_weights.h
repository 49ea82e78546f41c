// The weights of pxby_embed in the compute type, and the two ways to multiply them out.
//
// Y[q] = keep[q] X[q] + mix[q] Conv(X)[q] for the nine cells q, then the projection: everything up to the LayerNorm is affine in
// the one-hot ids. Folded: one table row per (cell, id), so that a token costs nine additions of rows. Direct: the formula
// itself, for so few tokens that building the table would cost more.
// Letters: p the cell an embedding comes from, q the cell a convolution writes to, k its tap; e and o its channels in and out.
#pragma once
#include "cpu/kernels.h"
#include "cpu/product.h"
#include "cpu/tile.h"

namespace pixelbytes {
namespace {

constexpr int kCells = 9;

// The tap that carries cell p into cell q, or -1 where they are no neighbours.
inline int tap(int p, int q) {
  const int i = p / 3 - q / 3 + 1, j = p % 3 - q % 3 + 1;
  return i < 0 || i > 2 || j < 0 || j > 2 ? -1 : i * 3 + j;
}

template <class T>
inline int64_t padded(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Hands out `count` elements at a time; called twice with the same list, first to add up the bytes.
class Arena {
 public:
  template <class Layout>
  explicit Arena(Layout&& layout) {
    Counter counter;
    layout(counter);
    base_ = static_cast<char*>(aligned_alloc(64, size_t(counter.bytes + 64)));
    if (base_) layout(Taker{base_});
  }
  ~Arena() { free(base_); }
  Arena(const Arena&) = delete;
  explicit operator bool() const { return base_ != nullptr; }

 private:
  static int64_t round(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  struct Counter {
    int64_t bytes = 0;
    template <class T>
    void operator()(T*&, int64_t count, bool = true) {
      bytes += round(count * int64_t(sizeof(T)));
    }
  };
  struct Taker {
    char* next;
    template <class T>
    void operator()(T*& p, int64_t count, bool zero = true) {
      p = reinterpret_cast<T*>(next);
      const int64_t bytes = round(count * int64_t(sizeof(T)));
      if (zero) memset(next, 0, size_t(bytes));
      next += bytes;
    }
  };
  char* base_ = nullptr;
};

template <class T>
struct EmbedWeights {
  static constexpr int W = kLanes<T>;
  const EmbedArgs& a;
  const int64_t vocab, width, dim, width_row, dim_row;  // V, E, D; lengths of padded rows of E and D
  const bool conv;
  T keep[kCells], mix[kCells], gate[kCells];
  T* emb;         // (V, width_row)
  T* proj;        // (cell, E, dim_row)
  T* mixed;       // mix * proj, (cell, E, dim_row)
  T* taps_in;     // (tap, o, width_row of e)
  T* taps_out;    // (tap, e, width_row of o)
  T* conv_bias;   // (width_row)
  T *proj_bias, *norm_weight, *norm_bias;  // (dim_row)
  T* tile;                                 // (V or 9 E, W): on the way in and out

  explicit EmbedWeights(const EmbedArgs& args)
      : a(args), vocab(args.emb.size[0]), width(args.emb.size[1]), dim(args.proj_weight.size[0]), width_row(padded<T>(width)),
        dim_row(padded<T>(dim)), conv(args.conv_weight) {}

  int64_t taps_size() const { return kCells * width * width_row; }
  int64_t proj_size() const { return kCells * width * dim_row; }

  template <class Take>
  void layout(Take&& take) {
    take(emb, vocab * width_row);
    take(proj, proj_size());
    take(mixed, conv ? proj_size() : 0);
    take(taps_in, conv ? taps_size() : 0);
    take(taps_out, conv ? taps_size() : 0);
    take(conv_bias, width_row);
    take(proj_bias, dim_row);
    take(norm_weight, dim_row);
    take(norm_bias, dim_row);
    take(tile, (vocab > width * kCells ? vocab : width * kCells) * W, false);
  }

  // Column i of the projection, which is channel-major, as a row of `proj`.
  int64_t cell_major(int64_t i) const { return i % kCells * width + i / kCells; }
  static int lanes(int64_t size, int64_t at) { return int(size - at < W ? size - at : W); }

  static void read_row(const Tensor& t, int64_t count, T* to) {
    if (t)
      for (int64_t i = 0; i < count; ++i) to[i] = load_element<T>(t.at(i), t.dtype);
  }

  // Reads every weight; padding stays zero.
  void read() {
    for (int64_t e = 0; e < width_row; e += W) {
      load_block<T>({a.emb.data, a.emb.dtype, a.emb.stride[1], a.emb.stride[0]}, e, lanes(width, e), 0, vocab, {tile, 0, 1});
      for (int64_t v = 0; v < vocab; ++v) store(emb + v * width_row + e, load(tile + v * W));
    }
    for (int64_t d = 0; d < dim_row; d += W) {
      load_block<T>({a.proj_weight.data, a.proj_weight.dtype, a.proj_weight.stride[0], a.proj_weight.stride[1]}, d, lanes(dim, d), 0,
                    width * kCells, {tile, 0, 1});
      for (int64_t i = 0; i < width * kCells; ++i) store(proj + cell_major(i) * dim_row + d, load(tile + i * W));
    }
    read_row(a.proj_bias, dim, proj_bias);
    read_row(a.norm_weight, dim, norm_weight);
    read_row(a.norm_bias, dim, norm_bias);
    read_row(a.conv_bias, width, conv_bias);
    for (int q = 0; q < kCells; ++q) {
      const Tensor& t = a.alpha;
      if (t) gate[q] = T(1 / (1 + __builtin_exp(-load_element<double>(t.data + (q / 3 * t.stride[2] + q % 3 * t.stride[3]) * item_size(t.dtype), t.dtype))));
      else gate[q] = conv ? T(0.5) : T(1);
      keep[q] = gate[q];
      mix[q] = conv ? 1 - gate[q] : T(0);
    }
    if (!conv) return;
    const Tensor& t = a.conv_weight;
    for (int64_t o = 0; o < width; ++o)
      for (int64_t e = 0; e < width; ++e)
        for (int k = 0; k < kCells; ++k) {
          const int64_t at = o * t.stride[0] + e * t.stride[1] + k / 3 * t.stride[2] + k % 3 * t.stride[3];
          const T value = load_element<T>(t.data + at * item_size(t.dtype), t.dtype);
          taps_in[(k * width + o) * width_row + e] = value;
          taps_out[(k * width + e) * width_row + o] = value;
        }
    for (int q = 0; q < kCells; ++q)
      for (int64_t i = 0; i < width * dim_row; ++i) mixed[q * width * dim_row + i] = mix[q] * proj[q * width * dim_row + i];
  }

  T* at_cell(T* base, int q) const { return base + q * width * dim_row; }  // proj, mixed, and everything shaped like them
  T* at_tap(T* base, int k) const { return base + k * width * width_row; }
};

// Gradients of the weights in the compute type, shaped as in EmbedWeights; conv as (tap, o, width_row of e).
template <class T>
struct EmbedGradients {
  static constexpr int W = kLanes<T>;
  T *emb, *proj, *taps, *conv_bias, *proj_bias, *norm_weight, *norm_bias;
  T keep[kCells] = {}, mix[kCells] = {};

  template <class Take>
  void layout(const EmbedWeights<T>& w, Take&& take) {
    take(emb, w.vocab * w.width_row);
    take(proj, w.proj_size());
    take(taps, w.conv ? w.taps_size() : 0);
    take(conv_bias, w.width_row);
    take(proj_bias, w.dim_row);
    take(norm_weight, w.dim_row);
    take(norm_bias, w.dim_row);
  }

  static void write_row(const Tensor& t, int64_t count, const T* from) {
    if (t)
      for (int64_t i = 0; i < count; ++i) store_element<T>(t.at(i), t.dtype, from[i]);
  }

  // Casts once, into the contiguous tensors of the arguments; null ones are not wanted.
  void write(const EmbedWeights<T>& w) const {
    const EmbedArgs& a = w.a;
    for (int64_t e = 0; a.demb && e < w.width_row; e += W) {
      for (int64_t v = 0; v < w.vocab; ++v) store(w.tile + v * W, load(emb + v * w.width_row + e));
      store_block<T>({a.demb.data, a.demb.dtype, 1, w.width}, e, w.lanes(w.width, e), 0, w.vocab, {w.tile, 0, 1});
    }
    for (int64_t d = 0; a.dproj_weight && d < w.dim_row; d += W) {
      for (int64_t i = 0; i < w.width * kCells; ++i) store(w.tile + i * W, load(proj + w.cell_major(i) * w.dim_row + d));
      store_block<T>({a.dproj_weight.data, a.dproj_weight.dtype, w.width * kCells, 1}, d, w.lanes(w.dim, d), 0, w.width * kCells,
                     {w.tile, 0, 1});
    }
    if (a.dconv_weight) {
      char* to = a.dconv_weight.data;
      for (int64_t o = 0; o < w.width; ++o)
        for (int64_t e = 0; e < w.width; ++e)
          for (int k = 0; k < kCells; ++k, to += item_size(a.dconv_weight.dtype))
            store_element<T>(to, a.dconv_weight.dtype, taps[(k * w.width + o) * w.width_row + e]);
    }
    if (a.dalpha)
      for (int q = 0; q < kCells; ++q)
        store_element<T>(a.dalpha.data + q * item_size(a.dalpha.dtype), a.dalpha.dtype,
                         (keep[q] - mix[q]) * w.gate[q] * (1 - w.gate[q]));
    write_row(a.dconv_bias, w.width, conv_bias);
    write_row(a.dproj_bias, w.dim, proj_bias);
    write_row(a.dnorm_weight, w.dim, norm_weight);
    write_row(a.dnorm_bias, w.dim, norm_bias);
  }
};

// ---- folded ------------------------------------------------------------------------------------------------------------

// table (cell, V, dim_row) and shift (dim_row): what goes into the LayerNorm is shift + the sum over p of table[p, id_p].
template <class T>
struct EmbedTable {
  T *fold, *table, *shift;  // fold (cell, E, dim_row): projection after convolution and gate, acting on the embeddings

  template <class Take>
  void layout(const EmbedWeights<T>& w, Take&& take) {
    take(fold, w.proj_size());
    take(table, kCells * w.vocab * w.dim_row, false);
    take(shift, w.dim_row);
  }

  void build(const EmbedWeights<T>& w, int threads) {
    const int64_t E = w.width, row = w.dim_row;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int p = 0; p < kCells; ++p) {
      T* fold_p = w.at_cell(fold, p);
      for (int64_t i = 0; i < E * row; ++i) fold_p[i] = w.keep[p] * w.at_cell(w.proj, p)[i];
      for (int q = 0; w.conv && q < kCells; ++q)
        if (const int k = tap(p, q); k >= 0)
          product(E, row, E, w.at_tap(w.taps_out, k), w.width_row, int64_t(1), w.at_cell(w.mixed, q), row, fold_p, row, true);
      product(w.vocab, row, E, w.emb, w.width_row, int64_t(1), fold_p, row, table + p * w.vocab * row, row, false);
    }
    memcpy(shift, w.proj_bias, size_t(row) * sizeof(T));
    for (int64_t i = 0; w.conv && i < kCells * E; ++i)
      for (int64_t d = 0; d < row; ++d) shift[d] += w.conv_bias[i % E] * w.mixed[i * row + d];
  }
};

// From the gradients of table and shift to those of the weights.
template <class T>
struct UnfoldScratch {
  T *dfold, *fold_columns, *dfold_columns;  // (cell, E, dim_row), (cell, D, width_row) twice

  template <class Take>
  void layout(const EmbedWeights<T>& w, Take&& take) {
    take(dfold, w.proj_size());
    take(fold_columns, kCells * w.dim * w.width_row);
    take(dfold_columns, w.conv ? kCells * w.dim * w.width_row : 0);
  }
};

template <class T>
void unfold(const EmbedWeights<T>& w, const EmbedTable<T>& t, const T* dtable, const T* dshift, UnfoldScratch<T>& s, EmbedGradients<T>& g,
            int threads) {
  constexpr int64_t kRows = 32;  // of demb in one task
  const int64_t E = w.width, D = w.dim, V = w.vocab, row = w.dim_row, columns = D * w.width_row;
  memcpy(g.proj_bias, dshift, size_t(row) * sizeof(T));
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int p = 0; p < kCells; ++p) {
      product(E, row, V, w.emb, int64_t(1), w.width_row, dtable + p * V * row, row, w.at_cell(s.dfold, p), row, false);
      transpose_copy(E, D, w.at_cell(t.fold, p), row, s.fold_columns + p * columns, w.width_row);
      if (w.conv) transpose_copy(E, D, w.at_cell(s.dfold, p), row, s.dfold_columns + p * columns, w.width_row);
    }
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t v = 0; v < V; v += kRows)
      for (int p = 0; p < kCells; ++p)
        product(V - v < kRows ? V - v : kRows, w.width_row, D, dtable + (p * V + v) * row, row, int64_t(1), s.fold_columns + p * columns,
                w.width_row, g.emb + v * w.width_row, w.width_row, p > 0);
#pragma omp for schedule(dynamic, 1) nowait
    for (int q = 0; q < kCells; ++q) {
      T *dproj = w.at_cell(g.proj, q), *dfold = w.at_cell(s.dfold, q), *proj = w.at_cell(w.proj, q);
      for (int64_t o = 0; w.conv && o < E; ++o)
        for (int64_t d = 0; d < row; ++d) dproj[o * row + d] = w.conv_bias[o] * dshift[d];
      for (int p = 0; w.conv && p < kCells; ++p)
        if (const int k = tap(p, q); k >= 0)
          product(E, row, E, w.at_tap(w.taps_in, k), w.width_row, int64_t(1), w.at_cell(s.dfold, p), row, dproj, row, true);
      // Here dproj is still the gradient that mixed gets.
      double dkeep = 0, dmix = 0;  // in lanes and rows first: one number is left of E x D products
      for (int64_t o = 0; o < E; ++o) {
        Vec<T> keep_row = {}, mix_row = {};
        for (int64_t i = o * row; i < (o + 1) * row; i += kLanes<T>) {
          const Vec<T> weight = load(proj + i), kept = load(dfold + i), mixed = load(dproj + i);
          keep_row += weight * kept;
          mix_row += weight * mixed;
          store(dproj + i, w.keep[q] * kept + w.mix[q] * mixed);
        }
        for (int lane = 0; lane < kLanes<T>; ++lane) dkeep += double(keep_row[lane]), dmix += double(mix_row[lane]);
      }
      g.keep[q] = T(dkeep), g.mix[q] = T(dmix);
    }
#pragma omp for schedule(dynamic, 1)
    for (int k = 0; k < (w.conv ? kCells : 0); ++k)
      for (int q = 0; q < kCells; ++q)
        for (int p = 0; p < kCells; ++p)
          if (tap(p, q) == k)
            product(E, w.width_row, D, w.at_cell(w.mixed, q), row, int64_t(1), s.dfold_columns + p * columns, w.width_row,
                    w.at_tap(g.taps, k), w.width_row, true);
  }
  for (int64_t i = 0; w.conv && i < kCells * E; ++i)
    for (int64_t d = 0; d < D; ++d) g.conv_bias[i % E] += w.mixed[i * row + d] * dshift[d];
}

// ---- direct ------------------------------------------------------------------------------------------------------------

constexpr int64_t kDirectTokens = 64;

// X, Conv(X) and Y of up to kDirectTokens tokens, (token, cell, width_row), and gradients of the same shape.
template <class T>
struct EmbedDirect {
  static constexpr int W = kLanes<T>;
  T *x, *z, *y, *dx, *dy, *proj_columns;  // proj_columns (cell, D, width_row)

  template <class Take>
  void layout(const EmbedWeights<T>& w, bool gradients, Take&& take) {
    const int64_t size = kDirectTokens * kCells * w.width_row;
    take(x, size);
    take(z, size);
    take(y, size);
    take(dx, gradients ? size : 0);
    take(dy, gradients ? size : 0);
    take(proj_columns, gradients ? kCells * w.dim * w.width_row : 0);
  }

  void transpose_projection(const EmbedWeights<T>& w) {
    for (int q = 0; q < kCells; ++q)
      transpose_copy(w.width, w.dim, w.at_cell(w.proj, q), w.dim_row, proj_columns + q * w.dim * w.width_row, w.width_row);
  }

  // ids (count, 9) -> rows (count, dim_row), ready for the LayerNorm.
  void forward(const EmbedWeights<T>& w, const int32_t* ids, int64_t count, T* rows) {
    const int64_t E = w.width, cell = w.width_row, token = kCells * cell;
    for (int64_t i = 0; i < count * kCells; ++i) memcpy(x + i * cell, w.emb + ids[i] * cell, size_t(cell) * sizeof(T));
    for (int64_t n = 0; n < count; ++n) memcpy(rows + n * w.dim_row, w.proj_bias, size_t(w.dim_row) * sizeof(T));
    for (int q = 0; q < kCells; ++q) {
      if (w.conv)
        for (int64_t n = 0; n < count; ++n) memcpy(z + n * token + q * cell, w.conv_bias, size_t(cell) * sizeof(T));
      for (int p = 0; w.conv && p < kCells; ++p)
        if (const int k = tap(p, q); k >= 0)
          product(count, cell, E, x + p * cell, token, int64_t(1), w.at_tap(w.taps_out, k), cell, z + q * cell, token, true);
      for (int64_t n = 0; n < count; ++n)
        for (int64_t i = n * token + q * cell; i < n * token + (q + 1) * cell; ++i)
          y[i] = w.conv ? w.keep[q] * x[i] + w.mix[q] * z[i] : w.keep[q] * x[i];
      product(count, w.dim_row, E, y + q * cell, token, int64_t(1), w.at_cell(w.proj, q), w.dim_row, rows, w.dim_row, true);
    }
  }

  // After `forward` of the same tokens: drows (count, dim_row) is the gradient of its rows. Adds to `g`, but for the bias of the projection.
  void backward(const EmbedWeights<T>& w, const int32_t* ids, int64_t count, const T* drows, EmbedGradients<T>& g) {
    const int64_t E = w.width, cell = w.width_row, token = kCells * cell, row = w.dim_row;
    for (int q = 0; q < kCells; ++q) {
      product(count, cell, w.dim, drows, row, int64_t(1), proj_columns + q * w.dim * cell, cell, dy + q * cell, token, false);
      product(E, row, count, y + q * cell, int64_t(1), token, drows, row, w.at_cell(g.proj, q), row, true);
      Vec<T> dkeep = {}, dmix = {};
      for (int64_t n = 0; n < count; ++n)
        for (int64_t e = 0; e < cell; e += W) {
          const int64_t i = n * token + q * cell + e;
          const Vec<T> grad = load(dy + i);
          dkeep += grad * load(x + i);
          store(dx + i, w.keep[q] * grad);
          if (!w.conv) continue;
          dmix += grad * load(z + i);
          store(dy + i, w.mix[q] * grad);  // from here on the gradient of Conv(X)
          store(g.conv_bias + e, load(g.conv_bias + e) + w.mix[q] * grad);
        }
      double keep = 0, mix = 0;
      for (int lane = 0; lane < W; ++lane) keep += double(dkeep[lane]), mix += double(dmix[lane]);
      g.keep[q] += T(keep), g.mix[q] += T(mix);
    }
    for (int q = 0; w.conv && q < kCells; ++q)
      for (int p = 0; p < kCells; ++p)
        if (const int k = tap(p, q); k >= 0) {
          product(count, cell, E, dy + q * cell, token, int64_t(1), w.at_tap(w.taps_in, k), cell, dx + p * cell, token, true);
          product(E, cell, count, dy + q * cell, int64_t(1), token, x + p * cell, token, w.at_tap(g.taps, k), cell, true);
        }
    for (int64_t i = 0; i < count * kCells; ++i)
      for (int64_t e = 0; e < cell; ++e) g.emb[ids[i] * cell + e] += dx[i * cell + e];
  }
};

}  // namespace
}  // namespace pixelbytes
