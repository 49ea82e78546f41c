// The emulator's run time: fibers, barriers, guarded memory, counts. One call at a time.
#include "emulator.h"

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "fiber.h"

namespace emulator {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr size_t kPage = 4096, kStack = 128 * 1024, kMaxThreads = 1024, kMaxShared = 64 * 1024;  // sm_75: 64 KB a block
constexpr size_t kSlot = size_t(1) << 24, kSlots = 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in every float format

struct Failure {};

enum class State { ready, at_block, at_warp, done };

// ---- settings and results ----

Order g_order = Order::forward;
uint64_t g_random = 1;
bool g_at_end = true;  // a tensor's copy ends at its guard page, rather than starting there
std::string g_error, g_kernel;
// (kernel, shape, item size) -> bytes read, bytes written
std::map<std::tuple<std::string, std::vector<int64_t>, int64_t>, std::pair<int64_t, int64_t>> g_counts;
std::map<std::string, int64_t> g_launches;

uint64_t random_word() {  // xorshift64
  g_random ^= g_random << 13, g_random ^= g_random >> 7, g_random ^= g_random << 17;
  return g_random;
}

// Puts 0 .. count - 1 into `list`, in the order asked for.
void arrange(std::vector<int>& list, int count) {
  list.resize(size_t(count));
  std::iota(list.begin(), list.end(), 0);
  if (g_order == Order::reverse)
    for (int i = 0; i < count; ++i) list[size_t(i)] = count - 1 - i;
  if (g_order == Order::random)
    for (int i = count - 1; i > 0; --i) std::swap(list[size_t(i)], list[random_word() % uint64_t(i + 1)]);
}

char* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

void open_pages(char* p, size_t bytes) {
  if (bytes && mprotect(p, bytes, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
}

constexpr size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace

// ---- threads ----

struct Thread {
  Fiber fiber;
  State state;
  uint3 index;
  int lane, warp;
  unsigned mask, turn;
};

namespace {

struct Warp {
  uint64_t words[2][32];  // two sets: a lane may give its next word while another still reads the last ones
  int first, count;
};

std::vector<Thread> g_threads;
std::vector<Warp> g_warps;
Fiber g_scheduler;
Thread* g_current;
const std::function<void()>* g_body;
std::vector<int> g_warp_order, g_lane_order, g_block_order;
sigjmp_buf g_fault;

char* stacks() {
  static char* base = [] {
    char* p = reserve(kMaxThreads * (kStack + kPage));
    for (size_t i = 0; i < kMaxThreads; ++i) open_pages(p + i * (kStack + kPage) + kPage, kStack);
    return p;
  }();
  return base;
}

void wait(State state) {
  g_current->state = state;
  switch_fiber(g_current->fiber, g_scheduler);
}

void fiber_main() {
  try {
    (*g_body)();
  } catch (const Failure&) {
  }
  for (;;) wait(State::done);
}

void resume(Thread& t) {
  g_current = &t;
  thread_index = t.index;
  switch_fiber(g_scheduler, t.fiber);
}

// Lets lanes go on whose whole mask has arrived. Returns whether there were any.
bool release_warp(Warp& w) {
  bool any = false;
  for (int i = 0; i < w.count; ++i) {
    Thread& t = g_threads[size_t(w.first + i)];
    if (t.state != State::at_warp) continue;
    bool all = true;
    for (int k = 0; k < 32 && all; ++k) {
      if (!(t.mask >> k & 1)) continue;
      const Thread* other = k < w.count ? &g_threads[size_t(w.first + k)] : nullptr;
      if (!other || other->state == State::done) {
        if (g_error.empty())
          g_error = "lane " + std::to_string(k) + " of warp " + std::to_string(t.warp) + " is named in a mask and has left the kernel, or does not exist";
        return false;
      }
      all = other->state == State::at_warp && other->mask == t.mask;
    }
    if (!all) continue;
    const unsigned mask = t.mask;
    for (int k = 0; k < 32; ++k)
      if (mask >> k & 1) g_threads[size_t(w.first + k)].state = State::ready;
    any = true;
  }
  return any;
}

// Runs a warp until each of its lanes waits for the block or is done, or for one round. Returns whether anything ran.
bool run_warp(Warp& w, bool one_round) {
  bool ran = false, more = true;
  while (more && g_error.empty()) {
    bool this_round = false;
    arrange(g_lane_order, w.count);
    for (const int lane : g_lane_order) {
      Thread& t = g_threads[size_t(w.first + lane)];
      if (t.state != State::ready) continue;
      resume(t);
      this_round = true;
      if (!g_error.empty()) return true;
    }
    const bool released = release_warp(w);
    ran |= this_round | released;
    more = released && !one_round;
  }
  return ran;
}

void run_block() {
  for (;;) {
    bool ran = false;
    arrange(g_warp_order, int(g_warps.size()));
    for (const int w : g_warp_order) {
      ran |= run_warp(g_warps[size_t(w)], g_order == Order::random);
      if (!g_error.empty()) return;
    }
    int waiting = 0, done = 0;
    for (const Thread& t : g_threads) waiting += t.state == State::at_block, done += t.state == State::done;
    const int count = int(g_threads.size());
    if (done == count) return;
    if (waiting + done == count) {
      for (Thread& t : g_threads)
        if (t.state == State::at_block) t.state = State::ready;
    } else if (!ran) {
      g_error = "deadlock: " + std::to_string(waiting) + " of " + std::to_string(count - done) +
                " threads wait at __syncthreads and the others at a warp's barrier that is not complete";
      return;
    }
  }
}

// ---- shared memory ----

struct StaticArray {
  const void* site;
  size_t offset, bytes;
};
constexpr size_t kRedZone = 64;
std::vector<StaticArray> g_static;
size_t g_static_used, g_dynamic_bytes;

char* shared_arena() {  // guard, static arrays, guard, dynamic memory, guard
  static char* base = [] {
    char* p = reserve(2 * kMaxShared + 4 * kPage);
    open_pages(p + kPage, kMaxShared + kPage);
    open_pages(p + 3 * kPage + kMaxShared, kMaxShared);
    return p;
  }();
  return base;
}
char* static_base() { return shared_arena() + kPage; }
char* dynamic_base() { return shared_arena() + 3 * kPage + 2 * kMaxShared - (g_dynamic_bytes + 15) / 16 * 16; }

void poison_shared() {
  memset(static_base(), kPoison, g_static_used);
  memset(dynamic_base(), kPoison, (g_dynamic_bytes + 15) / 16 * 16);
}

void check_red_zones() {
  for (const StaticArray& a : g_static)
    for (size_t i = a.bytes; i < (a.bytes + 15) / 16 * 16 + kRedZone; ++i)
      if (static_cast<unsigned char>(static_base()[a.offset + i]) != kPoison) {
        g_error = "a shared array of " + std::to_string(a.bytes) + " bytes was written behind its end";
        return;
      }
}

// ---- global memory ----

struct Region {
  char *original, *copy;  // of the element at index 0
  char *begin, *end;      // what the elements span in the copy
  char* pages;
  size_t page_bytes;
  int64_t item;
  std::vector<int64_t> size, stride;
  int64_t read, written;  // bytes, in this launch
  bool read_only;         // read through the read-only path in this launch
};
std::vector<Region> g_regions;

char* slots() {
  static char* base = reserve(kSlot * kSlots);
  return base;
}

template <class Visit>
void each_element(const Region& r, char* a, char* b, size_t axis, const Visit& visit) {
  if (axis == r.size.size()) return visit(a, b);
  for (int64_t i = 0; i < r.size[axis]; ++i) each_element(r, a + i * r.stride[axis] * r.item, b + i * r.stride[axis] * r.item, axis + 1, visit);
}

std::string text(const std::vector<int64_t>& shape) {
  std::string s = "(";
  for (const int64_t n : shape) s += std::to_string(n) + ",";
  return s + ")";
}

Region& access(const void* p, size_t bytes, const char* verb) {
  const auto address = static_cast<const char*>(p);
  const size_t slot = size_t(address - slots()) / kSlot;
  if (address < slots() || slot >= g_regions.size()) fail("%s %zu bytes at %p, which is in no tensor of this call", verb, bytes, p);
  Region& r = g_regions[slot];
  if (address < r.begin || address + bytes > r.end)
    fail("%s %zu bytes at byte %td of a tensor of shape %s whose elements span %td bytes", verb, bytes, address - r.begin, text(r.size).c_str(),
         r.end - r.begin);
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("%s %zu bytes at byte %td of a tensor of shape %s: not aligned", verb, bytes, address - r.begin, text(r.size).c_str());
  return r;
}

void count_launch() {
  ++g_launches[g_kernel];
  for (Region& r : g_regions) {
    if (r.read || r.written) {
      auto& total = g_counts[{g_kernel, r.size, r.item}];
      total.first += r.read, total.second += r.written;
    }
    r.read = r.written = 0, r.read_only = false;
  }
}

void on_fault(int, siginfo_t* info, void*) {
  char message[160];
  snprintf(message, sizeof message, "touches address %p, outside every tensor, stack and shared array", info->si_addr);
  g_error = message;
  siglongjmp(g_fault, 1);
}

// SIGSEGV ends the launch with an error while this lives.
class FaultHandler {
 public:
  FaultHandler() {
    static char stack[64 * 1024];
    stack_t alternate{};
    alternate.ss_sp = stack, alternate.ss_size = sizeof stack;
    sigaltstack(&alternate, &stack_before_);
    struct sigaction action {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &before_);
    sigaction(SIGBUS, &action, &bus_before_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &before_, nullptr);
    sigaction(SIGBUS, &bus_before_, nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  struct sigaction before_, bus_before_;
  stack_t stack_before_;
};

void run_grid() {
  const int blocks = int(grid_size.x * grid_size.y * grid_size.z), threads = int(block_size.x * block_size.y * block_size.z);
  arrange(g_block_order, blocks);
  for (const int b : g_block_order) {
    block_index = {unsigned(b) % grid_size.x, unsigned(b) / grid_size.x % grid_size.y, unsigned(b) / grid_size.x / grid_size.y};
    poison_shared();
    for (int i = 0; i < threads; ++i) {
      Thread& t = g_threads[size_t(i)];
      t.state = State::ready, t.turn = 0, t.mask = 0, t.lane = i % 32, t.warp = i / 32;
      t.index = {unsigned(i) % block_size.x, unsigned(i) / block_size.x % block_size.y, unsigned(i) / block_size.x / block_size.y};
      make_fiber(t.fiber, stacks() + size_t(i) * (kStack + kPage) + kPage, kStack, fiber_main);
    }
    run_block();
    if (g_error.empty()) check_red_zones();
    if (!g_error.empty()) return;
  }
}

}  // namespace

namespace py = pybind11;

namespace {

py::object* g_handler;  // gets every launch in the place of the fibers; see bind()

const char* hand_over(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const Parameter* parameters) {
  const py::gil_scoped_acquire acquire;
  Dl_info where{};
  dladdr(kernel, &where);
  py::list values, regions;
  for (; parameters->bytes; ++parameters) values.append(py::bytes(static_cast<const char*>(parameters->value), parameters->bytes));
  for (const Region& r : g_regions) regions.append(py::make_tuple(reinterpret_cast<uintptr_t>(r.begin), r.end - r.begin));
  try {
    (*g_handler)(name, reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(where.dli_fbase), py::make_tuple(grid.x, grid.y, grid.z),
                 py::make_tuple(block.x, block.y, block.z), shared_bytes, values, regions);
  } catch (py::error_already_set& error) {
    g_error = error.what();
    return g_error.c_str();
  }
  return nullptr;
}

}  // namespace

const char* run(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const Parameter* parameters,
                const std::function<void()>& body) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) return "invalid block size";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) return "invalid grid size";
  if (shared_bytes > kMaxShared) return "more shared memory than sm_75 has";
  if (g_handler) return hand_over(name, kernel, grid, block, shared_bytes, parameters);
  g_kernel = name, g_error.clear(), g_body = &body;
  grid_size = grid, block_size = block, g_dynamic_bytes = shared_bytes;
  g_static.clear(), g_static_used = 0;
  g_threads.resize(threads);
  g_warps.resize((threads + 31) / 32);
  for (size_t w = 0; w < g_warps.size(); ++w) g_warps[w].first = int(32 * w), g_warps[w].count = int(std::min<size_t>(32, threads - 32 * w));
  stacks(), shared_arena(), slots();
  {
    const FaultHandler handler;
    if (sigsetjmp(g_fault, 1) == 0) {
      run_grid();
    } else {
      g_error = "block (" + std::to_string(block_index.x) + "," + std::to_string(block_index.y) + "," + std::to_string(block_index.z) + ") thread (" +
                std::to_string(thread_index.x) + "," + std::to_string(thread_index.y) + "," + std::to_string(thread_index.z) + ") " + g_error;
    }
  }
  count_launch();
  return g_error.empty() ? nullptr : g_error.c_str();
}

void fail(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  char where[128];
  snprintf(where, sizeof where, "block (%u,%u,%u) thread (%u,%u,%u) ", block_index.x, block_index.y, block_index.z, thread_index.x, thread_index.y,
           thread_index.z);
  if (g_error.empty()) g_error = std::string(where) + message;
  throw Failure{};
}

int lane() { return g_current->lane; }

void sync_block() { wait(State::at_block); }

const uint64_t* exchange(unsigned mask, uint64_t word) {
  Thread& t = *g_current;
  if (!(mask >> t.lane & 1)) fail("lane %d is not in the mask %#x it calls with", t.lane, mask);
  uint64_t* words = g_warps[size_t(t.warp)].words[t.turn++ & 1];
  words[t.lane] = word;
  t.mask = mask;
  wait(State::at_warp);
  return words;
}

void* dynamic_shared() { return dynamic_base(); }

void* static_shared(const void* site, size_t bytes) {
  for (const StaticArray& a : g_static)
    if (a.site == site) return static_base() + a.offset;
  const size_t offset = g_static_used, used = offset + (bytes + 15) / 16 * 16 + kRedZone;
  if (used + g_dynamic_bytes > kMaxShared) fail("more shared memory than sm_75 has: a static array of %zu bytes", bytes);
  memset(static_base() + offset, kPoison, used - offset);
  g_static.push_back({site, offset, bytes});
  g_static_used = used;
  return static_base() + offset;
}

void check_read(const void* p, size_t bytes) { access(p, bytes, "reads").read += int64_t(bytes); }

void check_read_only(const void* p, size_t bytes) {
  Region& r = access(p, bytes, "reads");
  if (r.written) fail("reads a tensor of shape %s as read-only, which this kernel writes", text(r.size).c_str());
  r.read += int64_t(bytes), r.read_only = true;
}

void check_write(const void* p, size_t bytes) {
  Region& r = access(p, bytes, "writes");
  if (r.read_only) fail("writes a tensor of shape %s, which this kernel reads as read-only", text(r.size).c_str());
  r.written += int64_t(bytes);
}

void* guarded(void* data, int64_t item, int ndim, const int64_t* size, const int64_t* stride) {
  int64_t low = 0, high = 0, count = 1;
  for (int i = 0; i < ndim; ++i) {
    count *= size[i];
    (stride[i] < 0 ? low : high) += (size[i] - 1) * stride[i];
  }
  if (!data || count == 0) return data;
  const std::vector<int64_t> sizes(size, size + ndim), strides(stride, stride + ndim);
  for (const Region& r : g_regions)
    if (r.original == data && r.item == item && r.size == sizes && r.stride == strides) return r.copy;
  if (g_regions.size() == kSlots) throw std::length_error("emulator: too many tensors in one call");
  const size_t bytes = size_t((high - low + 1) * item);
  char* original_begin = static_cast<char*>(data) + low * item;
  const size_t before = reinterpret_cast<uintptr_t>(original_begin) % 16;  // the copy is aligned as the tensor is
  if (bytes + 16 + 2 * kPage > kSlot) throw std::length_error("emulator: a tensor is larger than 16 MB");
  Region r{};
  r.item = item, r.size = sizes, r.stride = strides;
  r.pages = slots() + g_regions.size() * kSlot + kPage;
  r.page_bytes = whole_pages(before + bytes + 16);
  open_pages(r.pages, r.page_bytes);
  memset(r.pages, kPoison, r.page_bytes);
  r.begin = g_at_end ? r.pages + r.page_bytes - (before + bytes + 15) / 16 * 16 + before : r.pages + before;
  r.end = r.begin + bytes;
  r.original = static_cast<char*>(data), r.copy = r.begin - low * item;
  each_element(r, r.copy, r.original, 0, [&](char* to, char* from) { memcpy(to, from, size_t(item)); });
  g_regions.push_back(r);
  return r.copy;
}

const char* write_back() {
  static std::string spoilt;
  spoilt.clear();
  for (Region& r : g_regions) {
    each_element(r, r.copy, r.original, 0, [&](char* from, char* to) {
      if (memcmp(from, to, size_t(r.item))) memcpy(to, from, size_t(r.item));
    });
    each_element(r, r.copy, r.original, 0, [&](char* from, char*) { memset(from, kPoison, size_t(r.item)); });
    for (size_t i = 0; i < r.page_bytes; ++i)
      if (static_cast<unsigned char>(r.pages[i]) != kPoison && spoilt.empty())
        spoilt = g_kernel + " wrote between the elements of a strided tensor of shape " + text(r.size);
    mprotect(r.pages, r.page_bytes, PROT_NONE);
  }
  g_regions.clear();
  return spoilt.empty() ? nullptr : spoilt.c_str();
}

void configure(Order order, uint64_t seed, bool at_end) {
  g_order = order, g_at_end = at_end;
  g_random = seed * 0x9e3779b97f4a7c15u + 1;
}

void bind(py::module_& m) {
  m.attr("emulated") = true;
  m.def("emulator_configure", [](const std::string& order, uint64_t seed, bool at_end) {
    configure(order == "forward" ? Order::forward : order == "reverse" ? Order::reverse : Order::random, seed, at_end);
  }, "order: forward, reverse or random; at_end: tensors end at their guard page, rather than start there.");
  m.def("emulator_reset_counts", [] { g_counts.clear(), g_launches.clear(); });
  m.def("emulator_counts", [] {
    py::list rows;
    for (const auto& [key, bytes] : g_counts) {
      py::list shape;
      for (const int64_t n : std::get<1>(key)) shape.append(n);
      rows.append(py::make_tuple(std::get<0>(key), py::tuple(shape), std::get<2>(key), bytes.first, bytes.second));
    }
    return rows;
  }, "Rows (kernel, shape of a tensor, bytes an element, bytes read, bytes written).");
  m.def("emulator_handler", [](const py::object& handler) {
    delete g_handler;
    g_handler = handler.is_none() ? nullptr : new py::object(handler);
  }, "handler(name, offset of the kernel in this file, grid, block, shared bytes, parameters as bytes, [(address, bytes) of each tensor])"
     " gets every launch from now on, in the place of the fibers; None: no longer.");
  m.def("emulator_launches", [] {
    py::dict launches;
    for (const auto& [name, count] : g_launches) launches[py::str(name)] = count;
    return launches;
  });
}

}  // namespace emulator
