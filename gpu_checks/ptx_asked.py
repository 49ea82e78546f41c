"""Which bytes of global memory the lanes of a warp ask for twice: a tracer for the ptx_on_cpu runner.

The runner's own count is of bytes as every lane asks for them. Here each access is also looked up among those that the other lanes of its
warp make at the same execution of the same instruction: where one of them has named the same address, the bytes are repetition, which a
GPU fetches once. Addresses are those of the run, taken as they are used.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

BUFFERS = 64  # most tensors of a kernel

TRACE = """#include "emu.h"
#include <unordered_map>
extern "C" { u64 ASKED[%(buffers)d][2][2]; }  // buffer, written, repeated: bytes
static std::unordered_map<u64, std::vector<u64>> asked_at;  // warp, line, how many times before: addresses
static std::vector<u32> asked_times;  // thread, line
static u32 asked_block[3] = {~0u, ~0u, ~0u};
template <int WRITES, int N> static inline char *asked(u64 a, int line, Thr *t) {
  if (memcmp(asked_block, G.ct, sizeof asked_block)) {
    memcpy(asked_block, G.ct, sizeof asked_block);
    asked_at.clear();
    asked_times.assign(G.th.size() * %(lines)dull, 0);
  }
  u64 times = asked_times[(t - G.th.data()) * %(lines)dull + line]++;
  auto &others = asked_at[(u64)t->warp << 58 | (u64)line << 40 | times];
  bool again = std::find(others.begin(), others.end(), a) != others.end();
  if (!again) others.push_back(a);
  for (size_t i = 0; i < G.rg.size() && i < %(buffers)d; i++)
    if (a >= G.rg[i].lo && a < G.rg[i].lo + G.rg[i].n) ASKED[i][WRITES][again] += N;
  return gp<N>(a, line);
}
"""


class Asked(NamedTuple):
    """Bytes that a kernel asks for of one tensor; `_again`: how many of them are repetition within a warp."""

    shape: tuple[int, ...]
    read: int
    read_again: int
    written: int
    written_again: int


@contextlib.contextmanager
def traced(runner_module: Any) -> Iterator[None]:
    """What `runner_module` (ptx2cpp) compiles inside of this counts into ASKED too."""

    class Traced(runner_module.Gen):  # type: ignore[misc]
        def instr(self, text: str) -> str:
            found: str = super().instr(text)
            kind = re.match(r"(ld|st)\.(\w+\.)*global\.", text)
            return (
                re.sub(r"\bgp<(\d+)>\((.*?), (\d+)\);", rf"asked<{int(kind[1] == 'st')}, \1>(\2, \3, t);", found)
                if kind
                else found
            )

        def generate(self, dyn: int, stats: bool = False) -> str:
            source: str = super().generate(dyn, stats)
            head = TRACE % {"buffers": BUFFERS, "lines": self.ptx.count("\n") + 2}
            return source.replace('#include "emu.h"\n', head, 1)

    with mock.patch.object(runner_module, "Gen", Traced):
        yield


def taken(library: Any, shapes: list[tuple[int, ...]]) -> list[Asked]:
    """What was asked of tensors of these `shapes`, in the order of the kernel's arguments, since it was asked last."""
    assert len(shapes) <= BUFFERS
    counters = (ctypes.c_uint64 * (4 * BUFFERS)).in_dll(library, "ASKED")
    found = []
    for i, shape in enumerate(shapes):
        read, read_again, written, written_again = counters[4 * i : 4 * i + 4]
        found.append(Asked(shape, read + read_again, read_again, written + written_again, written_again))
    ctypes.memset(ctypes.addressof(counters), 0, ctypes.sizeof(counters))
    return found
