"""build_ext for the kernels: `_cpu` per instruction set, `_cuda` by nvcc, a switch for each. See setup.py for the
environment.

Neither needs torch: the sources see pointers, sizes and strides. A missing or failing compiler is a warning (switch
`auto`) or an error (`1`); an object is compiled again when its source, a header it included or its command changed.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent

# name -> compiler flags; the name is also the C++ namespace. A processor runs the last one that it supports.
X86_SETS: dict[str, list[str]] = {
    "v3": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "v4": [
        *("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mprefer-vector-width=512"),
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd"),
    ],
}
CXX_FLAGS = [
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"),
]
DEFAULT_CUDA_ARCHS = ("75", "80+PTX")


class BuildError(Exception):
    """An extension that cannot be built, with the reason as a sentence."""


class Job(NamedTuple):
    """One compilation: `command` makes `object`."""

    object: Path
    command: list[str]


# ---- decisions, all pure -----------------------------------------------------------------------------------


def switch(name: str, env: Mapping[str, str]) -> str:
    """PIXELBYTES_CPU or PIXELBYTES_CUDA: "auto", "1" or "0"."""
    value = env.get(name, "").strip().lower() or "auto"
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"{name} must be auto, 1 or 0, got {value!r}")
    return value


def is_x86(machine: str, env: Mapping[str, str]) -> bool:
    """Whether the build is for x86-64 alone: a universal or cross build on macOS says otherwise in ARCHFLAGS."""
    return machine.lower() in ("x86_64", "amd64") and "arm64" not in env.get("ARCHFLAGS", "")


def instruction_sets(x86: bool) -> dict[str, list[str]]:
    return {"baseline": [], **(X86_SETS if x86 else {})}


def find_cxx(env: Mapping[str, str], which: Callable[[str], str | None] = shutil.which) -> list[str]:
    """The C++ compiler as the start of a command: CXX, else the first of c++, g++, clang++ on PATH."""
    asked = shlex.split(env.get("CXX", ""))
    if asked:
        if which(asked[0]) is None:
            raise BuildError(f"no C++ compiler: CXX={env['CXX']} is not found")
        return asked
    for name in ("c++", "g++", "clang++"):
        found = which(name)
        if found:
            return [found]
    raise BuildError("no C++ compiler: none of c++, g++, clang++ is on PATH, and CXX is not set")


def find_nvcc(env: Mapping[str, str], which: Callable[[str], str | None] = shutil.which) -> str:
    """nvcc from CUDA_HOME, CUDA_PATH, PATH, then /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(variable):
            found = which(str(Path(env[variable]) / "bin" / "nvcc"))
            if found:
                return found
    found = which("nvcc") or which("/usr/local/cuda/bin/nvcc")
    if not found:
        raise BuildError("no nvcc: not in CUDA_HOME, CUDA_PATH, on PATH or in /usr/local/cuda")
    return found


def cuda_archs(env: Mapping[str, str], offered: Iterable[int]) -> list[str]:
    """Architectures as "75" or "80+PTX", from PIXELBYTES_CUDA_ARCHS, else TORCH_CUDA_ARCH_LIST, else the default.

    Those that nvcc does not offer are left out; an error when none is left.
    """
    name = next((n for n in ("PIXELBYTES_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST") if env.get(n, "").strip()), "")
    asked = re.split(r"[;,\s]+", env[name].strip()) if name else list(DEFAULT_CUDA_ARCHS)
    available = set(offered)
    archs = []
    for arch in asked:
        match = re.fullmatch(r"(?:sm_)?(\d+)(?:\.(\d+))?[a-z]?(\+PTX)?", arch)
        if not match:
            raise BuildError(f"{name}: {arch!r} is no architecture; write for instance 75,80+PTX or 7.5;8.0+PTX")
        number = match[1] + (match[2] or "")
        if int(number) in available:
            archs.append(number + (match[3] or ""))
    if not archs:
        raise BuildError(f"nvcc offers none of the architectures {', '.join(asked)}; it has {sorted(available)}")
    return archs


def gencode(archs: Iterable[str]) -> list[str]:
    flags = []
    for arch in archs:
        number, _, ptx = arch.partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cpu_jobs(root: Path, build: Path, cxx: list[str], flags: list[str], x86: bool) -> list[Job]:
    """One object for the bindings, and one per kernel source and instruction set."""
    csrc = root / "csrc"
    common = [*cxx, *CXX_FLAGS, *flags]
    jobs = [Job(build / "bindings.o", [*common, f"-DPIXELBYTES_X86={int(x86)}", "-c", str(csrc / "bindings.cpp")])]
    for name, set_flags in instruction_sets(x86).items():
        for source in sorted((csrc / "cpu").glob("*.cpp")):
            command = [*common, *set_flags, f"-DPIXELBYTES_ISA={name}", "-c", str(source)]
            jobs.append(Job(build / f"{source.stem}.{name}.o", command))
    return jobs


def cuda_jobs(root: Path, build: Path, nvcc: str, cxx: list[str], archs: list[str], includes: list[str]) -> list[Job]:
    """nvcc for csrc/cuda/*.cu, the C++ compiler for csrc/cuda/*.cpp (the bindings)."""
    cuda = root / "csrc" / "cuda"
    device = [nvcc, "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-ccbin={cxx[0]}", *gencode(archs)]
    jobs = [Job(build / f"{p.stem}.cu.o", [*device, *includes, "-c", str(p)]) for p in sorted(cuda.glob("*.cu"))]
    for p in sorted(cuda.glob("*.cpp")):
        named = f'-DPIXELBYTES_CUDA_ARCHS="{",".join(archs)}"'
        jobs.append(Job(build / f"{p.stem}.o", [*cxx, *CXX_FLAGS, "-O1", *includes, named, "-c", str(p)]))  # glue
    return jobs


def link_command(cxx: list[str], objects: Iterable[Path], flags: list[str], system: str) -> list[str]:
    """Without `-o`. No symbol of a static library leaves the module."""
    shared = (
        ["-bundle", "-undefined", "dynamic_lookup"] if system == "Darwin" else ["-shared", "-Wl,--exclude-libs,ALL"]
    )
    return [*cxx, *shared, *map(str, objects), *flags]


def needs_building(job: Job) -> bool:
    """Whether the object is missing or older than its source or a header, or was made by another command."""
    record = job.object.with_suffix(".cmd")
    depfile = job.object.with_suffix(".d")
    if not (job.object.exists() and record.exists() and depfile.exists()):
        return True
    if record.read_text() != shlex.join(job.command):
        return True
    made = job.object.stat().st_mtime_ns
    _, _, listed = depfile.read_text().replace("\\\n", " ").partition(": ")
    for name in (part.replace("\\ ", " ") for part in re.split(r"(?<!\\)\s+", listed.strip()) if part):
        try:
            if Path(name).stat().st_mtime_ns >= made:
                return True
        except OSError:
            return True
    return False


# ---- asking the tools --------------------------------------------------------------------------------------


def ask(command: list[str]) -> str:
    """What a tool prints, both streams; "" where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def toolkit_root(nvcc: str) -> Path:
    """Where nvcc's toolkit really is: nvcc on PATH may be a wrapper script, so ask it."""
    match = re.search(r"^#\$ TOP=(.*)$", ask([nvcc, "--dryrun", "-c", "x.cu"]), re.MULTILINE)
    if not match:
        raise BuildError(f"{nvcc} --dryrun names no toolkit root (TOP=)")
    return Path(match[1].strip()).resolve()


def offered_archs(nvcc: str) -> list[int]:
    return [int(n) for n in re.findall(r"^compute_(\d+)$", ask([nvcc, "--list-gpu-arch"]), re.MULTILINE)]


def compiles(command: list[str], source: str) -> bool:
    """Whether a C++ program compiles and links with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.cpp"
        path.write_text(source)
        try:
            done = subprocess.run(
                [*command, str(path), "-o", str(path.with_suffix(""))], capture_output=True, check=False
            )
        except OSError:
            return False
        return done.returncode == 0


def openmp_flags(cxx: list[str]) -> list[str]:
    """`-fopenmp` where the compiler has it; without, as with Apple's, the kernels are compiled for one thread."""
    return (
        ["-fopenmp"]
        if compiles([*cxx, "-fopenmp"], "#include <omp.h>\nint main() { return omp_in_parallel(); }\n")
        else []
    )


def run_tool(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        output = (done.stderr + done.stdout).strip()
        lines = output.splitlines()
        shown = "\n".join(lines[:60] + ([f"... {len(lines) - 60} lines more"] if len(lines) > 60 else []))
        raise BuildError(
            f"{Path(command[0]).name} failed with status {done.returncode}:\n{shlex.join(command)}\n{shown}"
        )
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr, end="")


def compile_job(job: Job) -> None:
    run_tool([*job.command, "-MMD", "-MF", str(job.object.with_suffix(".d")), "-o", str(job.object)])
    job.object.with_suffix(".cmd").write_text(shlex.join(job.command))


def compile_all(jobs: list[Job], env: Mapping[str, str]) -> int:
    """Compiles what is out of date, MAX_JOBS at a time; returns how many that was."""
    wanted = [job for job in jobs if needs_building(job)]
    with ThreadPoolExecutor(int(env.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        for future in [pool.submit(compile_job, job) for job in wanted]:
            try:
                future.result()
            except BuildError:
                pool.shutdown(cancel_futures=True)
                raise
    return len(wanted)


# ---- the command -------------------------------------------------------------------------------------------


class BuildKernels(build_ext):
    """Builds the extensions named `_cpu` and `_cuda`; one that cannot be built leaves the list, unless it was
    demanded."""

    def run(self) -> None:
        self.wants_inplace = bool(self.inplace) or getattr(self, "editable_mode", False)
        super().run()

    def build_extensions(self) -> None:
        built = []
        for ext in self.extensions:
            name = ext.name.rpartition("._")[2]
            variable = f"PIXELBYTES_{name.upper()}"
            wish = switch(variable, os.environ)
            try:
                if wish == "0":
                    raise BuildError(f"{variable}=0")
                getattr(self, f"build_{name}")(Path(self.get_ext_fullpath(ext.name)))
                built.append(ext)
            except BuildError as error:
                if wish == "1":
                    raise SystemExit(
                        f"pixelbytes: _{name} was demanded by {variable}=1 and cannot be built: {error}"
                    ) from None
                self.remove(ext)
                if wish == "auto":
                    self.report(name, str(error))
        self.extensions = built

    @staticmethod
    def report(name: str, reason: str) -> None:
        fallback = (
            "the PyTorch paths will be used, slower" if name == "cpu" else "GPU tensors will use Triton or PyTorch"
        )
        line = "*" * 80
        print(f"{line}\npixelbytes: WARNING: _{name} is not built; {fallback}.\n{reason}\n{line}", file=sys.stderr)

    def remove(self, ext) -> None:
        """No file of an earlier build may pass for this one's."""
        paths = [Path(self.get_ext_fullpath(ext.name))]
        if self.wants_inplace:
            paths.append(ROOT / Path(*ext.name.split(".")[:-1]) / paths[0].name)
        for path in paths:
            path.unlink(missing_ok=True)

    def finish(self, out: Path, command: list[str]) -> None:
        """Links aside and renames: a process that has the old file loaded keeps it."""
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            run_tool([*command, "-o", str(aside)])
            os.replace(aside, out)
        finally:
            aside.unlink(missing_ok=True)

    def includes(self) -> list[str]:
        import pybind11

        return [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def build_cpu(self, out: Path) -> None:
        if platform.system() == "Windows":
            raise BuildError("the kernels need GCC or Clang; Windows is not supported")
        cxx = find_cxx(os.environ)
        extra = [
            *shlex.split(os.environ.get("ARCHFLAGS", "")),
            *shlex.split(os.environ.get("PIXELBYTES_CPU_FLAGS", "")),
        ]
        if not compiles(cxx, "int main() { return 0; }\n"):
            raise BuildError(f"the C++ compiler {shlex.join(cxx)} cannot make a program")
        openmp = openmp_flags(cxx)
        build = Path(self.build_temp).resolve() / "cpu"
        build.mkdir(parents=True, exist_ok=True)
        x86 = is_x86(platform.machine(), os.environ)
        jobs = cpu_jobs(ROOT, build, cxx, [*openmp, *extra, *self.includes()], x86)
        compile_all(jobs, os.environ)
        self.finish(out, link_command(cxx, [job.object for job in jobs], [*openmp, *extra], platform.system()))

    def build_cuda(self, out: Path) -> None:
        nvcc, cxx = find_nvcc(os.environ), find_cxx(os.environ)
        root = toolkit_root(nvcc)
        archs = cuda_archs(os.environ, offered_archs(nvcc))
        build = Path(self.build_temp).resolve() / "cuda"
        build.mkdir(parents=True, exist_ok=True)
        includes = [*self.includes(), f"-I{root / 'include'}"]
        jobs = cuda_jobs(ROOT, build, nvcc, cxx, archs, includes)
        compile_all(jobs, os.environ)
        folders = [f"-L{root / name}" for name in ("lib64", "lib") if (root / name).is_dir()]
        libraries = [*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        self.finish(out, link_command(cxx, [job.object for job in jobs], libraries, platform.system()))


def cuda_sources() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / "cuda").glob("*.cu"))
