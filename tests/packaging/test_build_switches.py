"""Decisions of the build: switches, compilers, architectures, what is compiled again. Tools are small shell scripts."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("setuptools", reason="the build needs setuptools")
sys.path.insert(0, str(ROOT / "build_tools"))

import kernels_build as kb  # noqa: E402

posix_only = pytest.mark.skipif(os.name != "posix", reason="needs shell scripts")


def tool(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def which_of(*present: str):
    return lambda name: name if name in present else None


@pytest.mark.parametrize(("value", "meant"), [(None, "auto"), ("", "auto"), ("AUTO", "auto"), ("1", "1"), ("0", "0")])
def test_switch(value, meant):
    assert kb.switch("PIXELBYTES_CUDA", {} if value is None else {"PIXELBYTES_CUDA": value}) == meant


def test_switch_refuses_other_words():
    with pytest.raises(SystemExit, match="PIXELBYTES_CUDA must be auto, 1 or 0, got 'yes'"):
        kb.switch("PIXELBYTES_CUDA", {"PIXELBYTES_CUDA": "yes"})


def test_compiler_from_cxx_then_path():
    assert kb.find_cxx({"CXX": "ccache g++-13"}, which_of("ccache", "c++")) == ["ccache", "g++-13"]
    assert kb.find_cxx({}, which_of("g++", "clang++")) == ["g++"]
    with pytest.raises(kb.BuildError, match="no C\\+\\+ compiler: CXX=icpc is not found"):
        kb.find_cxx({"CXX": "icpc"}, which_of("g++"))
    with pytest.raises(kb.BuildError, match="none of c\\+\\+, g\\+\\+, clang\\+\\+ is on PATH"):
        kb.find_cxx({}, which_of())


def test_nvcc_is_looked_for_in_order():
    home, path, default = "/h/bin/nvcc", "/p/bin/nvcc", "/usr/local/cuda/bin/nvcc"
    env = {"CUDA_HOME": "/h", "CUDA_PATH": "/p"}
    assert kb.find_nvcc(env, which_of(home, path, "nvcc", default)) == home
    assert kb.find_nvcc(env, which_of(path, "nvcc", default)) == path
    assert kb.find_nvcc(env, which_of("nvcc", default)) == "nvcc"
    assert kb.find_nvcc({}, which_of(default)) == default
    with pytest.raises(kb.BuildError, match="no nvcc"):
        kb.find_nvcc(env, which_of())


@pytest.mark.parametrize(
    ("env", "archs"),
    [
        ({}, ["75", "80+PTX"]),
        ({"PIXELBYTES_CUDA_ARCHS": "75,80", "TORCH_CUDA_ARCH_LIST": "9.0"}, ["75", "80"]),
        ({"TORCH_CUDA_ARCH_LIST": "7.5;8.6+PTX 9.0a"}, ["75", "86+PTX", "90"]),
        ({"TORCH_CUDA_ARCH_LIST": "6.0 7.5"}, ["75"]),  # nvcc does not offer the first
    ],
)
def test_architectures(env, archs):
    assert kb.cuda_archs(env, [75, 80, 86, 90]) == archs


@pytest.mark.parametrize("asked", ["6.0", "Turing"])
def test_architectures_that_cannot_be(asked):
    with pytest.raises(kb.BuildError, match=asked.replace(".", r"\.")):
        kb.cuda_archs({"TORCH_CUDA_ARCH_LIST": asked}, [75, 80])


def test_gencode_embeds_ptx_only_where_asked():
    assert kb.gencode(["75", "80+PTX"]) == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
    ]


def test_instruction_sets_only_on_x86():
    assert list(kb.instruction_sets(kb.is_x86("x86_64", {}))) == ["baseline", "v3", "v4"]
    assert list(kb.instruction_sets(kb.is_x86("aarch64", {}))) == ["baseline"]
    assert list(kb.instruction_sets(kb.is_x86("x86_64", {"ARCHFLAGS": "-arch arm64 -arch x86_64"}))) == ["baseline"]
    jobs = kb.cpu_jobs(ROOT, Path("b"), ["c++"], [], x86=False)
    assert not [job for job in jobs if any(flag.startswith("-mavx") for flag in job.command)]
    assert "-DPIXELBYTES_X86=0" in jobs[0].command


def test_symbols_stay_inside():
    assert "-fvisibility=hidden" in kb.CXX_FLAGS
    assert "-Wl,--exclude-libs,ALL" in kb.link_command(["c++"], [], [], "Linux")
    assert "dynamic_lookup" in kb.link_command(["c++"], [], [], "Darwin")


@posix_only
def test_toolkit_root_of_a_wrapper_script(tmp_path):
    real = tmp_path / "toolkit"
    real.mkdir()
    nvcc = tool(tmp_path / "bin" / "nvcc", f"echo '#$ _HERE_=x' >&2; echo '#$ TOP={real}/bin/..' >&2")
    (real / "bin").mkdir()
    assert kb.toolkit_root(str(nvcc)) == real
    with pytest.raises(kb.BuildError, match="names no toolkit root"):
        kb.toolkit_root(str(tool(tmp_path / "mute", "true")))


@posix_only
def test_offered_architectures(tmp_path):
    nvcc = tool(tmp_path / "nvcc", "echo compute_75; echo compute_121")
    assert kb.offered_archs(str(nvcc)) == [75, 121]
    assert kb.offered_archs(str(tmp_path / "missing")) == []


@posix_only
def test_failing_tool_is_quoted(tmp_path):
    broken = tool(tmp_path / "cxx", "echo 'x.cpp:1: error: no such thing' >&2; exit 3")
    with pytest.raises(kb.BuildError, match="(?s)cxx failed with status 3.*no such thing"):
        kb.run_tool([str(broken), "-c", "x.cpp"])
    with pytest.raises(kb.BuildError, match="cannot be run"):
        kb.run_tool([str(tmp_path / "missing")])


@posix_only
def test_without_openmp_the_flag_is_left_out(tmp_path):
    apple = tool(tmp_path / "c++", 'for a; do [ "$a" = -fopenmp ] && exit 1; done; exit 0')
    assert kb.openmp_flags([str(apple)]) == []
    assert kb.openmp_flags([str(tool(tmp_path / "g++", "exit 0"))]) == ["-fopenmp"]


@pytest.fixture
def job(tmp_path):
    """A source with a header, and a "compiler" that writes the object and its dependencies and keeps count."""
    (tmp_path / "a.cpp").write_text("")
    (tmp_path / "a.h").write_text("")
    cxx = tool(
        tmp_path / "cxx",
        f'echo run >> "{tmp_path}/runs"\n'
        'while [ $# -gt 0 ]; do case "$1" in -MF) dep=$2; shift;; -o) out=$2; shift;; esac; shift; done\n'
        f'echo "$out: {tmp_path}/a.cpp \\\\\n {tmp_path}/a.h" > "$dep"; touch "$out"',
    )
    made = kb.Job(tmp_path / "a.o", [str(cxx), "-c", str(tmp_path / "a.cpp")])
    for name in ("a.cpp", "a.h"):
        os.utime(tmp_path / name, (time.time() - 100,) * 2)
    return made


@posix_only
def test_only_what_changed_is_compiled_again(job, tmp_path):
    assert kb.compile_all([job], {}) == 1
    assert kb.compile_all([job], {}) == 0
    later = time.time() + 5
    os.utime(tmp_path / "a.h", (later, later))  # a header
    assert kb.compile_all([job], {}) == 1
    os.utime(tmp_path / "a.h", (time.time() - 100,) * 2)
    assert kb.compile_all([job], {}) == 0
    other = job._replace(command=[*job.command, "-DX"])  # another command
    assert kb.compile_all([other], {}) == 1
    (tmp_path / "a.h").unlink()
    assert kb.needs_building(other)
    assert len((tmp_path / "runs").read_text().split()) == 3


class FakeCommand(kb.BuildKernels):
    """The command without setuptools around it: one extension whose build does what the test says."""

    def __init__(self, folder: Path, name: str, outcome: str):
        self.extensions = [SimpleNamespace(name=f"pixelbytes_kernels._{name}")]
        self.folder, self.outcome, self.wants_inplace = folder, outcome, False
        self.calls = 0
        setattr(self, f"build_{name}", self.build_it)

    def get_ext_fullpath(self, name: str) -> str:
        return str(self.folder / f"{name}.so")

    def build_it(self, out: Path) -> None:
        self.calls += 1
        if self.outcome:
            raise kb.BuildError(self.outcome)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("wish", "outcome", "kept", "calls"),
    [("auto", "", 1, 1), ("auto", "nvcc fell over", 0, 1), ("1", "", 1, 1), ("0", "", 0, 0)],
)
def test_switch_decides_what_a_failure_means(monkeypatch, capsys, tmp_path, name, wish, outcome, kept, calls):
    monkeypatch.setenv(f"PIXELBYTES_{name.upper()}", wish)
    command = FakeCommand(tmp_path, name, outcome)
    stale = Path(command.get_ext_fullpath(f"pixelbytes_kernels._{name}"))
    stale.write_text("of an earlier build")
    command.build_extensions()
    assert (len(command.extensions), command.calls) == (kept, calls)
    assert stale.exists() == bool(kept)
    warned = capsys.readouterr().err
    assert (f"WARNING: _{name} is not built" in warned and outcome in warned) == (outcome != "")


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_demanded_and_failed_is_an_error(monkeypatch, tmp_path, name):
    monkeypatch.setenv(f"PIXELBYTES_{name.upper()}", "1")
    with pytest.raises(SystemExit, match=f"_{name} was demanded by PIXELBYTES_{name.upper()}=1.*it fell over"):
        FakeCommand(tmp_path, name, "it fell over").build_extensions()


def test_readme_commands_are_found_by_ci():
    """`.ci/run` takes the line after this marker; the README must keep it in one block of one line."""
    text = (ROOT / "README.md").read_text()
    for marker, word in (("<!-- test command -->", "pytest"), ("<!-- main command -->", "pixelbytes train")):
        _, found, after = text.partition(f"{marker}\n```sh\n")
        assert found, marker
        command, _, _ = after.partition("\n```")
        assert word in command and "\n" not in command
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
