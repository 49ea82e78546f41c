// pxby_embed, forward and backward: nine table rows summed per token (or the formula itself, see embed_weights.h), then LayerNorm.
//
// Forward: a task owns 64 tokens. Backward, folded: tokens go by in chunks of 512 whose pre-activations are summed again from the
// table and turned into their gradients in place, in scratch that stays in cache; then tasks that own one cell and a few vectors of
// the table's gradient each add the chunk's rows in token order. Every sum has one order whatever the number of threads: no atomics.
#include "cpu/embed_weights.h"

namespace pixelbytes {
namespace PIXELBYTES_ISA {
namespace {

constexpr int64_t kBlock = 64, kChunkBlocks = 8;  // tokens of a task, tasks of a backward chunk
constexpr int kUnitVecs = 8;                      // vectors of a row that are summed in registers at once
static_assert(kBlock <= kDirectTokens && kBlock % kLanes<float> == 0 && kBlock % kLanes<double> == 0, "a block is whole groups");

// tokens (batch, seqlen, 3, 3) with any strides, read as they are stored.
class Ids {
 public:
  Ids(const Tensor& tokens, int64_t vocab) : t_(tokens), vocab_(uint64_t(vocab)), seqlen_(tokens.size[1]) {
    for (int p = 0; p < kCells; ++p) offset_[p] = p / 3 * t_.stride[2] + p % 3 * t_.stride[3];
  }
  int64_t count() const { return t_.size[0] * seqlen_; }

  // Tokens [begin, begin + count) into ids (count, 9). False if one is outside the vocabulary: then `bad` says which, and
  // nothing may be looked up.
  bool load(int64_t begin, int64_t count, int32_t* ids, EmbedOutcome& bad) const {
    switch (t_.dtype) {
      case DType::u8: return load_as<uint8_t>(begin, count, ids, bad);
      case DType::i8: return load_as<int8_t>(begin, count, ids, bad);
      case DType::i16: return load_as<int16_t>(begin, count, ids, bad);
      case DType::i32: return load_as<int32_t>(begin, count, ids, bad);
      default: return load_as<int64_t>(begin, count, ids, bad);
    }
  }

 private:
  template <class Id>
  bool load_as(int64_t begin, int64_t count, int32_t* ids, EmbedOutcome& bad) const {
    const Id* data = reinterpret_cast<const Id*>(t_.data);
    bool outside = false;
    int64_t batch = begin / seqlen_, time = begin % seqlen_;
    for (int64_t n = 0; n < count; ++n) {
      const Id* window = data + batch * t_.stride[0] + time * t_.stride[1];
      for (int p = 0; p < kCells; ++p) {
        const int64_t id = window[offset_[p]];
        outside |= uint64_t(id) >= vocab_;
        ids[n * kCells + p] = int32_t(id);
      }
      if (++time == seqlen_) time = 0, ++batch;
    }
    if (!outside) return true;
    for (int64_t i = 0; i < count * kCells; ++i) {
      const int64_t n = begin + i / kCells, p = i % kCells;
      const int64_t id = data[n / seqlen_ * t_.stride[0] + n % seqlen_ * t_.stride[1] + offset_[p]];
      if (uint64_t(id) < vocab_) continue;
#pragma omp critical(pixelbytes_bad_id)
      if (bad.position < 0 || n * kCells + p < bad.position) bad.position = n * kCells + p, bad.id = id;
      break;
    }
    return false;
  }

  const Tensor& t_;
  uint64_t vocab_;
  int64_t seqlen_, offset_[kCells];
};

template <class T>
inline void sum_rows(const EmbedWeights<T>& w, const EmbedTable<T>& t, const int32_t* ids, T* out) {
  constexpr int W = kLanes<T>;
  const T* rows[kCells];
  for (int p = 0; p < kCells; ++p) rows[p] = t.table + (p * w.vocab + ids[p]) * w.dim_row;
  const auto columns = [&](int64_t at, auto vecs) {
    constexpr int N = decltype(vecs)::value;
    Vec<T> sum[N];
    for (int j = 0; j < N; ++j) sum[j] = load(t.shift + at + j * W);
    for (int p = 0; p < kCells; ++p)
      for (int j = 0; j < N; ++j) sum[j] += load(rows[p] + at + j * W);
    for (int j = 0; j < N; ++j) store(out + at + j * W, sum[j]);
  };
  int64_t at = 0;
  for (; at + 4 * W <= w.dim_row; at += 4 * W) columns(at, ConstantInt<4>{});
  for (; at < w.dim_row; at += W) columns(at, ConstantInt<1>{});
}

// A group: up to kLanes rows (row, dim_row) of scratch, normalised together so that one vector holds a number for each of them.
template <class T>
struct Group {
  static constexpr int W = kLanes<T>;
  const EmbedWeights<T>& w;
  T* rows;
  int count;
  T mean[W], rstd[W];

  T* row(int r) const { return rows + r * w.dim_row; }
  int64_t last() const { return w.dim_row - W; }                        // start of the last, perhaps partial vector
  int valid(int64_t at) const { return at < last() ? W : int(w.dim - last()); }
  static Vec<T> masked(Vec<T> v, int valid) { return select(lane_index<T>() < splat(T(valid)), v, Vec<T>{}); }

  Group(const EmbedWeights<T>& weights, T* rows_, int count_) : w(weights), rows(rows_), count(count_) {
    Vec<T> sums[W] = {};
    for (int r = 0; r < count; ++r)
      for (int64_t at = 0; at < w.dim_row; at += W) sums[r] += load(row(r) + at);
    store(mean, sum_lanes<T>(sums) / T(w.dim));
    for (int r = 0; r < W; ++r) {
      Vec<T> sum = {};
      for (int64_t at = 0; r < count && at < w.dim_row; at += W) {
        const Vec<T> x = masked(load(row(r) + at) - mean[r], valid(at));
        sum += x * x;
      }
      sums[r] = sum;
    }
    store(rstd, sum_lanes<T>(sums) / T(w.dim) + T(w.a.eps));
    for (T& x : rstd) x = T(1) / T(__builtin_sqrt(x));
  }

  template <class S>
  void store_output(S* out) const {  // (count, D)
    for (int r = 0; r < count; ++r)
      for (int64_t at = 0; at < w.dim_row; at += W) {
        const Vec<T> x = (load(row(r) + at) - mean[r]) * rstd[r] * load(w.norm_weight + at) + load(w.norm_bias + at);
        store_part<T>(out + r * w.dim + at, valid(at), x);
      }
  }

  // Turns the rows into their gradients; adds to the gradients of the LayerNorm's weights and to the columns' sum.
  template <class S>
  void backward(const S* dout, T* dweight, T* dbias, T* dshift) {  // dout (count, D)
    const auto dout_at = [&](int r, int64_t at) { return load_part<T>(dout + r * w.dim + at, valid(at)); };
    Vec<T> sums[W] = {}, products[W] = {};
    for (int r = 0; r < count; ++r) {
      Vec<T> sum = {}, dot = {};
      for (int64_t at = 0; at < w.dim_row; at += W) {
        const Vec<T> x = masked((load(row(r) + at) - mean[r]) * rstd[r], valid(at)), g = dout_at(r, at) * load(w.norm_weight + at);
        store(row(r) + at, x);
        sum += g;
        dot += g * x;
      }
      sums[r] = sum, products[r] = dot;
    }
    T shift[W], slope[W];
    store(shift, sum_lanes<T>(sums) / T(w.dim));
    store(slope, sum_lanes<T>(products) / T(w.dim));
    for (int64_t at = 0; at < w.dim_row; at += W) {
      const Vec<T> weight = load(w.norm_weight + at);
      Vec<T> dw = load(dweight + at), db = load(dbias + at), ds = load(dshift + at);
      for (int r = 0; r < count; ++r) {
        const Vec<T> x = load(row(r) + at), g = dout_at(r, at);
        dw += g * x;
        db += g;
        const Vec<T> dx = masked((g * weight - shift[r] - x * slope[r]) * rstd[r], valid(at));
        store(row(r) + at, dx);
        ds += dx;
      }
      store(dweight + at, dw), store(dbias + at, db), store(dshift + at, ds);
    }
  }
};

// f(group, its first row of `data`) for the groups of `count` rows; data is out or dout, (tokens, D), read from `first_token` on.
template <class T, class F>
inline void for_groups(const EmbedWeights<T>& w, T* rows, int64_t count, const Tensor& data, int64_t first_token, F&& f) {
  const auto run = [&](auto* stored) {
    stored += first_token * w.dim;
    for (int64_t r = 0; r < count; r += kLanes<T>) {
      Group<T> group(w, rows + r * w.dim_row, int(count - r < kLanes<T> ? count - r : kLanes<T>));
      f(group, stored + r * w.dim);
    }
  };
  if (sizeof(T) == 4 && data.dtype == DType::f16) run(reinterpret_cast<Half*>(data.data));
  else if (sizeof(T) == 4 && data.dtype == DType::bf16) run(reinterpret_cast<Bfloat*>(data.data));
  else run(reinterpret_cast<T*>(data.data));
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr const char* kNoMemory = "pxby_embed: out of memory for scratch";

// ---- forward -----------------------------------------------------------------------------------------------------------

template <class T>
EmbedOutcome forward(const EmbedArgs& a) {
  EmbedOutcome outcome;
  EmbedWeights<T> w(a);
  EmbedTable<T> table;
  EmbedDirect<T> direct;
  const Ids tokens(a.tokens, w.vocab);
  const int64_t count = tokens.count(), blocks = (count + kBlock - 1) / kBlock;
  const int threads = a.folded ? a.threads : 1;  // the direct form is for few tokens
  T* rows;
  int32_t* ids;
  Arena arena([&](auto&& take) {
    w.layout(take);
    if (a.folded) table.layout(w, take);
    else direct.layout(w, false, take);
    take(rows, threads * kBlock * w.dim_row, false);
    take(ids, threads * kBlock * kCells, false);
  });
  if (!arena) return {kNoMemory};
  w.read();
  if (a.folded) table.build(w, threads);
  int64_t next = 0;  // slices of rows and ids
#pragma omp parallel num_threads(threads)
  {
    int64_t slice;
#pragma omp atomic capture
    slice = next++;
    T* my_rows = rows + slice * kBlock * w.dim_row;
    int32_t* my_ids = ids + slice * kBlock * kCells;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * kBlock, n = smaller(count - begin, kBlock);
      if (!tokens.load(begin, n, my_ids, outcome)) continue;
      if (a.folded)
        for (int64_t i = 0; i < n; ++i) sum_rows(w, table, my_ids + i * kCells, my_rows + i * w.dim_row);
      else
        direct.forward(w, my_ids, n, my_rows);
      for_groups(w, my_rows, n, a.out, begin, [](const Group<T>& group, auto* out) { group.store_output(out); });
    }
  }
  return outcome;
}

// ---- backward ----------------------------------------------------------------------------------------------------------

// rows[id of each token] += drows in token order, for one cell and `vecs` vectors of the row.
template <class T>
inline void add_rows(const int32_t* ids, int64_t count, int64_t row, const T* drows, T* rows, int64_t vecs) {
  constexpr int W = kLanes<T>;
  const auto columns = [&](int64_t at, auto constant) {
    constexpr int N = decltype(constant)::value;
    for (int64_t n = 0; n < count; ++n) {
      T* to = rows + ids[n * kCells] * row + at;
      Vec<T> sum[N];
      for (int j = 0; j < N; ++j) sum[j] = load(to + j * W) + load(drows + n * row + at + j * W);
      for (int j = 0; j < N; ++j) store(to + j * W, sum[j]);
    }
  };
  int64_t j = 0;
  for (; j + 4 <= vecs; j += 4) columns(j * W, ConstantInt<4>{});
  for (; j < vecs; ++j) columns(j * W, ConstantInt<1>{});
}

// One block's sums over its tokens: gradients of the LayerNorm's weights and of the shift, (dim_row) each; and the cells whose id
// is the same for all its tokens, as bits.
template <class T>
struct BlockSums {
  T *dweight, *dbias, *dshift;
  int32_t constant;
};

template <class T>
EmbedOutcome backward_folded(const EmbedArgs& a) {
  constexpr int W = kLanes<T>;
  EmbedOutcome outcome;
  EmbedWeights<T> w(a);
  EmbedTable<T> table;
  EmbedGradients<T> g;
  UnfoldScratch<T> scratch;
  const Ids tokens(a.tokens, w.vocab);
  const int64_t count = tokens.count(), row = w.dim_row, chunk = kBlock * kChunkBlocks;
  T *rows, *dtable, *dshift, *sums;
  int32_t* ids;
  BlockSums<T> block_sums[kChunkBlocks];
  Arena arena([&](auto&& take) {
    w.layout(take);
    table.layout(w, take);
    g.layout(w, take);
    scratch.layout(w, take);
    take(dtable, kCells * w.vocab * row);
    take(dshift, row);
    take(sums, kChunkBlocks * 3 * row, false);
    take(rows, chunk * row, false);
    take(ids, chunk * kCells, false);
  });
  if (!arena) return {kNoMemory};
  w.read();
  table.build(w, a.threads);
  for (int64_t b = 0; b < kChunkBlocks; ++b)
    block_sums[b] = {sums + b * 3 * row, sums + (b * 3 + 1) * row, sums + (b * 3 + 2) * row, 0};
  const int64_t units_in_row = (row / W + kUnitVecs - 1) / kUnitVecs, units = (kCells + 1) * units_in_row;

#pragma omp parallel num_threads(a.threads)
  for (int64_t start = 0; start < count; start += chunk) {
    const int64_t in_chunk = smaller(count - start, chunk), blocks = (in_chunk + kBlock - 1) / kBlock;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * kBlock, n = smaller(in_chunk - begin, kBlock);
      int32_t* my_ids = ids + begin * kCells;
      BlockSums<T>& s = block_sums[b];
      if (!tokens.load(start + begin, n, my_ids, outcome)) continue;
      s.constant = 0;
      for (int p = 0; p < kCells; ++p) {
        int32_t differs = 0;
        for (int64_t i = 1; i < n; ++i) differs |= my_ids[i * kCells + p] ^ my_ids[p];
        s.constant |= int32_t(differs == 0) << p;
      }
      memset(s.dweight, 0, size_t(3 * row) * sizeof(T));
      for (int64_t i = 0; i < n; ++i) sum_rows(w, table, my_ids + i * kCells, rows + (begin + i) * row);
      for_groups(w, rows + begin * row, n, a.dout, start + begin,
                 [&](Group<T>& group, const auto* dout) { group.backward(dout, s.dweight, s.dbias, s.dshift); });
    }
    if (outcome.position >= 0) break;
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int p = int(unit / units_in_row);
      const int64_t at = unit % units_in_row * kUnitVecs * W, vecs = smaller((row - at) / W, kUnitVecs);
      const auto add_sums = [&](T* BlockSums<T>::*member, T* to) {
        for (int64_t j = at; j < at + vecs * W; j += W) {
          Vec<T> sum = {};
          for (int64_t b = 0; b < blocks; ++b) sum += load(block_sums[b].*member + j);
          store(to + j, load(to + j) + sum);
        }
      };
      if (p == kCells) {
        add_sums(&BlockSums<T>::dweight, g.norm_weight);
        add_sums(&BlockSums<T>::dbias, g.norm_bias);
        add_sums(&BlockSums<T>::dshift, dshift);
        continue;
      }
      bool constant = true;
      for (int64_t b = 0; b < blocks; ++b)
        constant &= (block_sums[b].constant >> p & 1) && ids[b * kBlock * kCells + p] == ids[p];
      T* dtable_p = dtable + p * w.vocab * row;
      if (constant) add_sums(&BlockSums<T>::dshift, dtable_p + ids[p] * row);
      else add_rows(ids + p, in_chunk, row, rows + at, dtable_p + at, vecs);
    }
  }
  if (outcome.position >= 0) return outcome;
  unfold(w, table, dtable, dshift, scratch, g, a.threads);
  g.write(w);
  return outcome;
}

template <class T>
EmbedOutcome backward_direct(const EmbedArgs& a) {
  EmbedOutcome outcome;
  EmbedWeights<T> w(a);
  EmbedDirect<T> direct;
  EmbedGradients<T> g;
  const Ids tokens(a.tokens, w.vocab);
  T *rows, *sums;
  int32_t* ids;
  Arena arena([&](auto&& take) {
    w.layout(take);
    direct.layout(w, true, take);
    g.layout(w, take);
    take(rows, kBlock * w.dim_row, false);
    take(sums, 3 * w.dim_row);
    take(ids, kBlock * kCells, false);
  });
  if (!arena) return {kNoMemory};
  w.read();
  direct.transpose_projection(w);
  for (int64_t begin = 0; begin < tokens.count(); begin += kBlock) {
    const int64_t n = smaller(tokens.count() - begin, kBlock);
    if (!tokens.load(begin, n, ids, outcome)) return outcome;
    direct.forward(w, ids, n, rows);
    T* to[] = {g.norm_weight, g.norm_bias, g.proj_bias};
    memset(sums, 0, size_t(3 * w.dim_row) * sizeof(T));
    for_groups(w, rows, n, a.dout, begin,
               [&](Group<T>& group, const auto* dout) { group.backward(dout, sums, sums + w.dim_row, sums + 2 * w.dim_row); });
    for (int64_t i = 0; i < 3 * w.dim_row; ++i) to[i / w.dim_row][i % w.dim_row] += sums[i];
    direct.backward(w, ids, n, rows, g);
  }
  g.write(w);
  return outcome;
}

template <class T>
EmbedOutcome backward(const EmbedArgs& a) {
  return a.folded ? backward_folded<T>(a) : backward_direct<T>(a);
}

}  // namespace

EmbedOutcome pxby_embed_forward(const EmbedArgs& a) { return a.use_double ? forward<double>(a) : forward<float>(a); }
EmbedOutcome pxby_embed_backward(const EmbedArgs& a) { return a.use_double ? backward<double>(a) : backward<float>(a); }

}  // namespace PIXELBYTES_ISA
}  // namespace pixelbytes
