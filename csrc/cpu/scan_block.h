// What forward and backward of the scan share: the plan, a task's tensors in scratch, coefficients, states, runs.
#pragma once
#include "cpu/denormals.h"
#include "cpu/kernels.h"
#include "cpu/scan_steps.h"

namespace pixelbytes {
namespace {

constexpr int64_t kMaxBlockTiles = 4;   // eight were slower at large sizes: they share B, C and the sums of dB, dC, but fill more cache
constexpr int64_t kMaxRowSteps = 4096;  // of all tiles of a block: the whole rows that two directions keep fill about the L2 cache
constexpr int64_t kWantedTasks = 4;     // so that a batch of one keeps several threads busy

// How a scan is cut into tasks: a pure function of the sizes, so that the order of every sum is too.
struct Plan {
  int64_t batch, dim, seqlen, dstate, groups;
  int64_t group_dim, group_tiles, block_tiles, group_blocks, chunks;
  int64_t tasks() const { return batch * groups * group_blocks; }
  int64_t end_of(int64_t chunk) const { return (chunk + 1) * kChunk < seqlen ? (chunk + 1) * kChunk : seqlen; }
};

template <class T>
Plan make_plan(const ScanArgs& a) {
  const ScanDirection& first = a.direction[0];
  const int64_t batch = first.u.size[0], dim = first.u.size[1], seqlen = first.u.size[2], dstate = first.A.size[1];
  int64_t groups = 1;
  for (int d = 0; d < a.directions; ++d) {
    if (a.direction[d].B.ndim == 4) groups = a.direction[d].B.size[1];
    if (a.direction[d].C.ndim == 4) groups = a.direction[d].C.size[1];
  }
  Plan p{batch, dim, seqlen, dstate, groups, dim / groups, 0, 0, 0, (seqlen + kChunk - 1) / kChunk};
  p.group_tiles = (p.group_dim + kLanes<T> - 1) / kLanes<T>;
  int64_t tiles = batch * groups * p.group_tiles / kWantedTasks;
  int64_t most = a.directions == 2 ? kMaxRowSteps / seqlen : kMaxBlockTiles;
  if (most < 2) most = 2;
  if (most > kMaxBlockTiles) most = kMaxBlockTiles;
  if (tiles > most) tiles = most;
  if (tiles < 1) tiles = 1;
  p.group_blocks = (p.group_tiles + tiles - 1) / tiles;
  p.block_tiles = (p.group_tiles + p.group_blocks - 1) / p.group_blocks;
  return p;
}

// The runs of equal sequence index within [t0, t1), in scan order.
inline int find_runs(const Tensor& seq_idx, int64_t batch, int64_t t0, int64_t t1, int64_t seqlen, bool reverse, Run* runs) {
  const int steps = int(t1 - t0), first = reverse ? steps - 1 : 0, sign = reverse ? -1 : 1;
  if (!seq_idx) {
    runs[0] = {0, steps, first, false};
    return 1;
  }
  int n = 0;
  for (int i = 0; i < steps; ++i) {
    const int64_t t = t0 + first + sign * i, before = t - sign;
    const bool fresh = before >= 0 && before < seqlen &&
                       load_index(seq_idx.at(batch, t), seq_idx.dtype) != load_index(seq_idx.at(batch, before), seq_idx.dtype);
    if (i == 0 || fresh) runs[n++] = {i, 0, first + sign * i, fresh};
    ++runs[n - 1].count;
  }
  return n;
}

// Of a task: a batch row and a block of neighbouring channel tiles.
struct Place {
  int64_t batch, group, block, tile0, tiles, channel, channels;
};
template <class T>
Place place_of(const Plan& p, int64_t task) {
  constexpr int W = kLanes<T>;
  Place at;
  at.block = task % p.group_blocks;
  at.group = task / p.group_blocks % p.groups;
  at.batch = task / p.group_blocks / p.groups;
  at.tile0 = at.block * p.block_tiles;
  at.tiles = p.group_tiles - at.tile0 < p.block_tiles ? p.group_tiles - at.tile0 : p.block_tiles;
  at.channel = at.group * p.group_dim + at.tile0 * W;
  at.channels = p.group_dim - at.tile0 * W < at.tiles * W ? p.group_dim - at.tile0 * W : at.tiles * W;
  return at;
}

struct Tiles {  // of a task
  int64_t first, count;
  int64_t end() const { return first + count; }
};

// A (tile, time, lane) array in scratch: of the whole row where both directions need it, else of the present chunk only.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t steps = 0, origin = 0;

  static int64_t size(int64_t tiles, int64_t steps) { return tiles * steps * kLanes<T>; }
  void open(Scratch& scratch, int64_t tiles, bool whole, int64_t seqlen) {
    steps = whole ? seqlen : kChunk;
    data = scratch.take<T>(size(tiles, steps));
  }
  void begin_chunk(int64_t t0) { origin = steps == kChunk ? t0 : 0; }
  T* at(int64_t tile, int64_t time) const { return data + (tile * steps + time - origin) * kLanes<T>; }
  Block<T> block(Tiles tiles, int64_t time) const { return {at(tiles.first, time), steps * kLanes<T>, int(tiles.count)}; }
};

// Calls f(n, count as a constant) for the states in passes of kMost, then of kStates, the rest one by one.
template <int kMost>
inline int64_t passes_of(int64_t dstate) {
  const int64_t rest = dstate % kMost;
  return dstate / kMost + rest / kStates + rest % kStates;
}
template <int kMost, class F>
inline void for_states(int64_t dstate, F&& f) {
  int64_t n = 0;
  for (; n + kMost <= dstate; n += kMost) f(n, ConstantInt<kMost>{});
  if constexpr (kMost > kStates)
    for (; n + kStates <= dstate; n += kStates) f(n, ConstantInt<kStates>{});
  for (; n < dstate; ++n) f(n, ConstantInt<1>{});
}

// Planes of memory that are needed soon, dealt out to the passes of the recurrence, which ask for some lines every step.
class AheadList {
 public:
  void add(const Plane& p, int64_t channel, int64_t channels, int64_t time, int64_t steps) {
    const bool by_time = p.channel_stride == 1;
    const int64_t rows = by_time ? steps : channels, pitch = (by_time ? p.time_stride : p.channel_stride) * item_size(p.dtype);
    const char* begin = p.at(channel, time);
    const char* end = begin + (by_time ? channels : steps) * item_size(p.dtype);
    for (begin -= reinterpret_cast<uintptr_t>(begin) & 63; begin < end; begin += 2 * 64) add(begin, rows, pitch);
  }
  void add(const char* begin, int64_t rows, int64_t pitch) {
    for (int64_t row = 0; row < rows && count_ < kMax; row += kChunk)
      all_[count_++] = {begin + row * pitch, pitch, int(rows - row < kChunk ? rows - row : kChunk)};
  }
  void deal(int64_t passes) { each_ = (count_ + passes - 1) / passes; }
  // What the next pass asks for, at most so many rows a step; what is left over then is asked for now.
  Ahead next(int rows_a_step) {
    const int64_t first = at_, end = at_ + each_ < count_ ? at_ + each_ : count_;
    int rows = 0;
    while (at_ < end && rows + all_[at_].count <= rows_a_step * kChunk) rows += all_[at_++].count;
    const int taken = int(at_ - first);
    for (int64_t i = at_; i < end; ++i)
      while (all_[i].count > 0) all_[i].ask();
    at_ = end;
    return {taken ? all_[first] : LineRows{nullptr, 0, 0}, all_ + first + 1, taken - 1, rows > kChunk};
  }

 private:
  static constexpr int64_t kMax = 128;
  LineRows all_[kMax];  // the first count_ of them
  int64_t count_ = 0, at_ = 0, each_ = 0;
};

// A chunk that is needed soon, of some direction of a task; none where it is negative.
struct Soon {
  Place at;
  int direction;
  int64_t chunk;
};

// One task, with its tensors in scratch.
template <class T>
struct ScanTask : Place {
  static constexpr int W = kLanes<T>;
  const ScanArgs& a;
  const Plan& p;
  const int64_t task;
  bool separate_u, separate_delta;  // the second direction has its own
  Rows<T> u[2], delta[2], y;
  T *A[2], *A2[2], *D[2], *h;       // (tile, state, lane); D (tile, lane); A2 = A log2(e)
  T* steepest[2];                   // (tile, lane): the lowest A2 of all states, or NaN where one is above zero or NaN
  T* stage;                         // (tile, time in chunk, lane), for whatever is on its way in or out
  T *B_scratch, *C_scratch;
  const T *B, *C;                   // of the present chunk (time, state), or constant (tile, state, lane)
  int64_t pitch_B = 0, pitch_C = 0;

  // B or C of one step in scratch: whole vectors.
  static int64_t row_of_states(const Plan& p) { return (p.dstate + W - 1) / W * W; }
  static int64_t bytes(const ScanArgs& a, const Plan& p) {
    const int64_t row = Rows<T>::size(p.block_tiles, a.directions == 2 && p.seqlen > kChunk ? p.seqlen : kChunk);
    const int64_t states = p.block_tiles * p.dstate * W;
    return (row * (1 + 2 * a.directions) + p.block_tiles * kChunk * W + states * 7 + p.block_tiles * W * 4 +
            2 * kChunk * row_of_states(p)) * int64_t(sizeof(T)) + 18 * 128;
  }

  ScanTask(const ScanArgs& args, const Plan& plan, int64_t number, Scratch& scratch)
      : Place(place_of<T>(plan, number)), a(args), p(plan), task(number) {
    separate_u = a.directions == 2 && a.direction[1].u;
    separate_delta = a.directions == 2 && a.direction[1].delta;
    const int64_t states = tiles * p.dstate * W;
    for (int d = 0; d < a.directions; ++d) {
      if (d == 0 || separate_u) u[d].open(scratch, tiles, a.directions == 2 && !separate_u, p.seqlen);
      if (d == 0 || separate_delta) delta[d].open(scratch, tiles, a.directions == 2 && !separate_delta, p.seqlen);
      const bool shared = d && !a.direction[d].A;
      A[d] = shared ? A[0] : scratch.take<T>(states);
      A2[d] = shared ? A2[0] : scratch.take<T>(states);
      steepest[d] = shared ? steepest[0] : scratch.take<T>(tiles * W);
      D[d] = d && !a.direction[d].D ? D[0] : scratch.take<T>(tiles * W);
    }
    y.open(scratch, tiles, a.directions == 2, p.seqlen);
    h = scratch.take<T>(states);
    stage = scratch.take<T>(tiles * kChunk * W);
    B_scratch = scratch.take<T>(kChunk * row_of_states(p) + states);
    C_scratch = scratch.take<T>(kChunk * row_of_states(p) + states);
    load_parameters();
  }

  int valid(int64_t tile) const { return valid_channels(channels, tile, W); }
  const Tensor& source(Tensor ScanDirection::*member, int d) const {
    return a.direction[d].*member ? a.direction[d].*member : a.direction[0].*member;
  }
  bool varies(Tensor ScanDirection::*member, int d) const { return source(member, d).ndim == 4; }
  Rows<T>& rows_u(int d) { return u[separate_u ? d : 0]; }
  Rows<T>& rows_delta(int d) { return delta[separate_delta ? d : 0]; }
  T* state(T* base, int64_t tile, int64_t n) const { return base + (tile * p.dstate + n) * W; }
  // Where a direction's entry state of a chunk is kept between forward and backward.
  T* kept(const Tensor& states, int64_t chunk, int64_t tile) const { return kept(states, *this, chunk, tile); }
  T* kept(const Tensor& states, const Place& at, int64_t chunk, int64_t tile) const {
    const int64_t tile_index = (at.batch * p.groups + at.group) * p.group_tiles + at.tile0 + tile;
    return reinterpret_cast<T*>(states.data) + (chunk * p.batch * p.groups * p.group_tiles + tile_index) * p.dstate * W;
  }

  void load_parameters() {
    for (int d = 0; d < a.directions; ++d) {
      const ScanDirection& dir = a.direction[d];
      if (dir.A) load_constant(dir.A, A[d]);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        if (d == 0 || dir.D) store(D[d] + tile * W, dir.D ? load_channels<T>(dir.D, channel + tile * W, valid(tile)) : Vec<T>{});
        if (!dir.A) continue;
        Vec<T> lowest = {};
        for (int64_t n = 0; n < p.dstate; ++n) {
          const Vec<T> a2 = load(state(A[d], tile, n)) * T(1.4426950408889634);
          store(state(A2[d], tile, n), a2);
          lowest = select(a2 <= lowest, a2, select(a2 <= T(0), lowest, splat(T(NAN))));  // NaN stays: nothing is below it
        }
        store(steepest[d] + tile * W, lowest);
      }
    }
  }

  void begin_chunk(int d, int64_t t0) {
    y.begin_chunk(t0);
    rows_u(d).begin_chunk(t0);
    rows_delta(d).begin_chunk(t0);
  }
  Tiles all() const { return {0, tiles}; }
  int64_t channels_of(Tiles part) const { return channels_of(*this, part); }
  static int64_t channels_of(const Place& at, Tiles part) {
    return at.channels - part.first * W < part.count * W ? at.channels - part.first * W : part.count * W;
  }
  void load_rows(const Tensor& from, Tiles part, int64_t t0, int64_t t1, const Block<T>& to) const {
    load_block<T>(plane(from, batch), channel + part.first * W, channels_of(part), t0, t1 - t0, to);
  }
  void store_rows(const Tensor& to, Tiles part, int64_t t0, int64_t t1, const Block<T>& from) const {
    Plane p = plane(to, batch);
    p.streams = should_stream<T>(to);
    store_block<T>(p, channel + part.first * W, channels_of(part), t0, t1 - t0, from);
  }
  Block<T> staging(Tiles part) const { return {stage, kChunk * W, int(part.count)}; }

  // Brings some tiles of a chunk in: u, and delta after bias and softplus. What the first direction left for both is not read again.
  // The derivative of softplus goes to `slope` where that is given.
  void load_inputs(int d, Tiles part, int64_t t0, int64_t t1, const Rows<T>* slope = nullptr) {
    if (d == 0 || separate_u) load_rows(source(&ScanDirection::u, d), part, t0, t1, u[d].block(part, t0));
    if (d && !separate_delta) return;
    load_rows(source(&ScanDirection::delta, d), part, t0, t1, delta[d].block(part, t0));
    const Tensor& bias = source(&ScanDirection::delta_bias, d);
    if (!bias && !a.delta_softplus) return;
    for (int64_t tile = part.first; tile < part.end(); ++tile) {
      const Vec<T> b = bias ? load_channels<T>(bias, channel + tile * W, valid(tile)) : Vec<T>{};
      const Mask<T> is_valid = lane_index<T>() < splat(T(valid(tile)));
      T *at = delta[d].at(tile, t0), *slopes = slope ? slope->at(tile, t0) : nullptr;
      for (int64_t i = 0; i < (t1 - t0) * W; i += W) {
        const Vec<T> x = load(at + i) + b;
        if (!a.delta_softplus) {
          store(at + i, x);
        } else if (slopes) {
          Vec<T> derivative;
          store(at + i, select(is_valid, softplus(x, &derivative), Vec<T>{}));
          store(slopes + i, derivative);
        } else {
          store(at + i, select(is_valid, softplus(x), Vec<T>{}));
        }
      }
    }
  }

  // `chunk` of direction d, where the walk goes next. Past the end of the row it is the first one of the other direction, or of the task that
  // this thread will most likely take.
  Soon following(int d, int64_t chunk) const {
    if (chunk >= 0 && chunk < p.chunks) return {*this, d, chunk};
    const int64_t end = chunk < 0 ? 0 : p.chunks - 1, other_end = p.chunks - 1 - end;
    if (d + 1 < a.directions) return {*this, d + 1, end};
    if (task + a.threads >= p.tasks()) return {*this, d, -1};
    return {place_of<T>(p, task + a.threads), 0, a.directions == 2 ? end : other_end};
  }
  void add_ahead(AheadList& ahead, const Tensor& t, Tiles part, const Soon& soon) const {
    const int64_t count = channels_of(soon.at, part);  // none where that task has fewer tiles
    if (!t || soon.chunk < 0 || count <= 0) return;
    const int64_t t0 = soon.chunk * kChunk;
    ahead.add(plane(t, soon.at.batch), soon.at.channel + part.first * W, count, t0, p.end_of(soon.chunk) - t0);
  }
  void add_output_ahead(AheadList& ahead, const Tensor& t, Tiles part, const Soon& soon) const {
    if (!should_stream<T>(t)) add_ahead(ahead, t, part, soon);
  }
  // u, delta, and the kept state: read by the backward, written by the forward.
  void add_inputs_ahead(AheadList& ahead, Tiles part, const Soon& soon) const {
    const int d = soon.direction;
    if (d == 0 || separate_u) add_ahead(ahead, source(&ScanDirection::u, d), part, soon);
    if (d == 0 || separate_delta) add_ahead(ahead, source(&ScanDirection::delta, d), part, soon);
    const Tensor& states = a.direction[d].states;
    const int64_t tile_count = (channels_of(soon.at, part) + W - 1) / W;
    if (!states || soon.chunk < 0 || tile_count <= 0) return;
    const int64_t bytes = tile_count * p.dstate * W * int64_t(sizeof(T));
    ahead.add(reinterpret_cast<const char*>(kept(states, soon.at, soon.chunk, part.first)), (bytes + 127) / 128, 128);
  }

  // Where a task's partial sums of dB or dC for step t are, in elements: (block, batch, group, time, state).
  int64_t sums_at(int64_t t) const { return (((block * p.batch + batch) * p.groups + group) * p.seqlen + t) * p.dstate; }
  void add_sums_ahead(AheadList& ahead, const T* sums, int64_t t0, int64_t t1) const {
    const int64_t bytes = (t1 - t0) * p.dstate * int64_t(sizeof(T));
    if (sums) ahead.add(reinterpret_cast<const char*>(sums + sums_at(t0)), (bytes + 127) / 128, 128);
  }

  // y's skip part: the first direction sets it, the second adds its own.
  void begin_y(int d, Tiles part, int64_t t0, int64_t t1) {
    for (int64_t tile = part.first; tile < part.end(); ++tile) {
      const Vec<T> skip = load(D[d] + tile * W);
      const T* from = rows_u(d).at(tile, t0);
      T* to = y.at(tile, t0);
      for (int64_t i = 0; i < (t1 - t0) * W; i += W) store(to + i, (d ? load(to + i) : Vec<T>{}) + skip * load(from + i));
    }
  }

  // Points B and C at a chunk as (time, state), read in place where it lies so in memory.
  void load_coefficients(int d, int64_t t0, int64_t t1) {
    if (varies(&ScanDirection::B, d)) B = load_coefficient(source(&ScanDirection::B, d), B_scratch, &pitch_B, t0, t1);
    if (varies(&ScanDirection::C, d)) C = load_coefficient(source(&ScanDirection::C, d), C_scratch, &pitch_C, t0, t1);
  }
  static Plane coefficient_plane(const Tensor& t, const Place& at) { return {t.at(at.batch, at.group), t.dtype, t.stride[2], t.stride[3]}; }
  void add_coefficients_ahead(AheadList& ahead, const Soon& soon) const {
    if (soon.chunk < 0) return;
    const int64_t t0 = soon.chunk * kChunk, steps = p.end_of(soon.chunk) - t0;
    Tensor ScanDirection::*members[] = {&ScanDirection::B, &ScanDirection::C};
    for (auto member : members)
      if (varies(member, soon.direction)) ahead.add(coefficient_plane(source(member, soon.direction), soon.at), 0, p.dstate, t0, steps);
  }
  const T* load_coefficient(const Tensor& t, T* to, int64_t* pitch, int64_t t0, int64_t t1) const {
    const Plane from = coefficient_plane(t, *this);
    if (t.dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32) && t.stride[2] == 1) {
      *pitch = t.stride[3];
      return reinterpret_cast<const T*>(from.at(0, t0));
    }
    *pitch = row_of_states(p);
    if (*pitch == W) {
      load_block<T>(from, 0, p.dstate, t0, t1 - t0, {to, 0, 1});
      return to;
    }
    for (int64_t n = 0; n < p.dstate; n += W) {
      const int64_t count = p.dstate - n < W ? p.dstate - n : W;
      alignas(64) T tile[kChunk * W];
      load_block<T>(from, n, count, t0, t1 - t0, {tile, 0, 1});
      for (int64_t i = 0; i < t1 - t0; ++i) store(to + i * *pitch + n, load(tile + i * W));
    }
    return to;
  }
  void load_constants(int d) {
    if (!varies(&ScanDirection::B, d)) load_constant(source(&ScanDirection::B, d), B_scratch), B = B_scratch;
    if (!varies(&ScanDirection::C, d)) load_constant(source(&ScanDirection::C, d), C_scratch), C = C_scratch;
  }
  // (dim, dstate) as (tile, state, lane): a plane whose time is the state.
  void load_constant(const Tensor& t, T* to) const {
    load_block<T>({t.data, t.dtype, t.stride[0], t.stride[1]}, channel, channels, 0, p.dstate, {to, p.dstate * W, int(tiles)});
  }
  void load_states(const Tensor& from, T* to) const {  // (batch, dim, dstate), or zeros
    if (from) load_block<T>(plane(from, batch), channel, channels, 0, p.dstate, {to, p.dstate * W, int(tiles)});
    else memset(to, 0, size_t(tiles * p.dstate * W) * sizeof(T));
  }
  void store_states(const Tensor& to, T* from) const {
    store_block<T>(plane(to, batch), channel, channels, 0, p.dstate, {from, p.dstate * W, int(tiles)});
  }

  // Where the inner loops start for a tile in the chunk at t0, at its first state and lowest time.
  template <bool kVariesB, bool kVariesC>
  Steps<T> steps(int d, int64_t tile, int64_t t0) {
    const int64_t constant = tile * p.dstate * W;
    return {0, a.direction[d].reverse ? -1 : 1, rows_u(d).at(tile, t0), rows_delta(d).at(tile, t0), B + (kVariesB ? 0 : constant),
            C + (kVariesC ? 0 : constant), pitch_B, pitch_C, {}};
  }
};

// Whether the products of a tile's delta in one chunk with its A2 all stay where the short form of exp2 is exact enough: delta not negative,
// A2 not positive. As unsigned numbers the bits of such floats are in the order of the floats, and those of NaN, infinity and negative ones
// above them.
inline bool is_safe(const float* delta, int64_t steps, const float* steepest) {
  Bits<float> high = {};
  for (int64_t t = 0; t < steps; ++t) {
    const Bits<float> d = bits(load(delta + t * kLanes<float>));
    high = d > high ? d : high;
  }
  vf most;
  memcpy(&most, &high, sizeof most);
  return all((vi)(high < bits(splat(INFINITY))) & (load(steepest) * most > -65536.0f));
}
inline bool is_safe(const double*, int64_t, const double*) { return false; }  // it has no short form

template <class F>
inline void with_bool(bool b, F&& f) {
  if (b) f(ConstantInt<1>{});
  else f(ConstantInt<0>{});
}
// The short form of exp2 exists for float only.
template <class T, class F>
inline void with_safe(bool safe, F&& f) {
  if constexpr (sizeof(T) == 4) with_bool(safe, f);
  else f(ConstantInt<0>{});
}

// f(varies_B, varies_C) as constants.
template <class T, class F>
inline void with_variation(const ScanTask<T>& task, int d, F&& f) {
  with_bool(task.varies(&ScanDirection::B, d), [&](auto varies_B) {
    with_bool(task.varies(&ScanDirection::C, d), [&](auto varies_C) { f(varies_B, varies_C); });
  });
}

}  // namespace
}  // namespace pixelbytes
