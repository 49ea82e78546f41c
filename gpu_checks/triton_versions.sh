#!/usr/bin/env bash
# Compiles the scan for sm_75 with other releases of Triton, each in a virtual environment that is thrown away, and prints what it takes.
# usage: gpu_checks/triton_versions.sh [VERSION...]; default: 3.4.0 3.6.0 and the newest. The environment must see torch: PYTHON names one that does.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python}
versions=("$@")
if [ ${#versions[@]} -eq 0 ]; then versions=(3.4.0 3.6.0 newest); fi
status=0
for version in "${versions[@]}"; do
  work=$(mktemp -d)
  wanted=triton==$version
  if [ "$version" = newest ]; then wanted=triton; fi
  if "$python" -m pip install -q --no-deps --target "$work" "$wanted" >"$work/log" 2>&1; then
    TRITON_CACHE_DIR=$work/cache PYTHONPATH=$work:. "$python" - <<'CODE' || status=1
import triton

import gpu_checks.triton_budget as budget

names = [n for n in budget.launches("selective_scan") if "dstate 16, 2 direction(s), float32, batch 512" in n]
rows = [budget.row(75, "selective_scan", name) for name in names]
for row in rows:
    print(f"triton {triton.__version__}: {row['kernel']}: {row['registers']} registers, {row['spills']} bytes spilled, {row['t4_occupancy']} of a T4")
CODE
  else
    echo "triton $version: cannot be installed: $(tail -n 1 "$work/log")"
    status=1
  fi
  rm -rf "$work"
done
exit $status
