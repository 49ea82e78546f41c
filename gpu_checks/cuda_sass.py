"""`python -m gpu_checks.cuda_sass [NAME]`: static instructions of the CUDA kernels' loops, from their sm_75 machine code.

For each kernel whose name contains NAME: all its instructions, and those of every innermost loop with what they are: memory, special
functions (MUFU), shuffles. An instruction is issued once for a warp, so a loop's figure over the steps that one turn does is the issue
slots of a warp-step.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from typing import NamedTuple

from gpu_checks.cuda_budget import Missing, demangled, machine_code, nvidia_tool

KINDS = {
    "LDG": "global",
    "STG": "global",
    "LDS": "shared",
    "STS": "shared",
    "MUFU": "MUFU",
    "SHFL": "shuffle",
    "BAR": "barrier",
    "LDL": "spill",
    "STL": "spill",
}


class Loop(NamedTuple):
    first: int  # address
    last: int
    instructions: int
    kinds: dict[str, int]


def functions(text: str) -> dict[str, list[tuple[int, str]]]:
    """(address, instruction) of every function in a disassembly."""
    found: dict[str, list[tuple[int, str]]] = {}
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, _, body = part.partition("\n")
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", body)
        found[name.strip()] = [(int(address, 16), instruction.strip()) for address, instruction in lines]
    return found


def opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def innermost_loops(code: list[tuple[int, str]]) -> list[Loop]:
    """From the target of a backward branch to the branch, where no other such loop lies inside."""
    spans = set()
    for address, instruction in code:
        target = re.search(r"\bBRA\b.*?(?:0x|`\(\.L_\w+\)\s*)?0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            spans.add((int(target[1], 16), address))
    loops = []
    for first, last in sorted(spans):
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            continue
        body = [opcode(i) for address, i in code if first <= address <= last and opcode(i) != "NOP"]
        loops.append(Loop(first, last, len(body), dict(Counter(KINDS[o] for o in body if o in KINDS))))
    return loops


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu_checks.cuda_sass", description=__doc__)
    parser.add_argument("name", nargs="?", default="scan", help="of the kernels, in part (default: scan)")
    args = parser.parse_args()
    try:
        tool, files = nvidia_tool("cuobjdump"), machine_code()
    except Missing as error:
        print(f"cuda_sass: {error}", file=sys.stderr)
        return 2
    for file in files:
        text = subprocess.run(
            [tool, "-sass", "-arch", "sm_75", str(file)], capture_output=True, text=True, check=True
        ).stdout
        code = functions(text)
        for name, instructions in zip(demangled(code), code.values(), strict=True):
            if args.name not in name:
                continue
            print(f"{name}: {sum(opcode(i) != 'NOP' for _, i in instructions)} instructions")
            for loop in innermost_loops(instructions):
                kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(loop.kinds.items()))
                print(f"    loop at {loop.first:#06x}: {loop.instructions} instructions ({kinds})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
