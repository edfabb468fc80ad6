"""Maps kernels/triton to the package mima.kernels and builds the native extensions.

Two modules are built from csrc/ with pybind11 and ninja, without torch: `mima._native` for the CPU,
and `mima._native_cuda` where nvcc is found. Neither is needed: where one cannot be built, the
installation goes on, and `mima/_build_info.json` keeps the reason for `mima doctor`.

Environment: MIMA_BUILD_NATIVE and MIMA_BUILD_CUDA (0: leave out, 1: fail if it cannot be built,
auto: the default), CXX or CC, CUDACXX or CUDA_HOME, MIMA_CUDA_ARCHS (default "80;90"), MAX_JOBS.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = {
    "_native": sorted(ROOT.glob("csrc/cpu/*.cpp")),
    "_native_cuda": [ROOT / "csrc/cuda/bindings.cpp", *sorted(ROOT.glob("csrc/cuda/*.cu"))],
}
VERSION = re.findall(r'__version__ = "(.+)"', (ROOT / "mima/_version.py").read_text("utf-8"))[0]

CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi -pthread"
# -O1 for the bindings: pybind11's templates take most of the build, and nothing in them is hot
BINDINGS_FLAGS = "-O1 -g0"
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden --threads 2"
LAUNCHERS = {"ccache", "sccache", "distcc"}
"""What may stand before a compiler in CXX; nvcc takes one word."""


class CannotBuildError(Exception):
    """What is missing or what failed, in one line that a user can act on."""


@dataclass(frozen=True)
class Outcome:
    """What became of one module."""

    built: bool
    reason: str
    """Empty when built."""
    tool: str = ""
    """The compiler, as it calls itself."""


def requested(variable: str) -> str:
    """The value of MIMA_BUILD_*: "0", "1" or "auto"."""
    value = os.environ.get(variable, "auto").strip().lower() or "auto"
    if value not in {"0", "1", "auto"}:
        raise SystemExit(f"{variable} must be 0, 1 or auto, got {value!r}")
    return value


def version_of(command: list[str]) -> str:
    """What the compiler says it is, in a line; CannotBuildError where it does not run."""
    try:
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except OSError as error:
        raise CannotBuildError(f"{command[0]} does not run: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise CannotBuildError(f"{command[0]} --version exits with {error.returncode}") from error
    lines = result.stdout.strip().splitlines()
    # nvcc gives its number in the fourth line
    return next((line for line in lines if "release" in line), lines[0] if lines else command[0])


def find_cxx() -> list[str]:
    """Command line of the C++ compiler: CXX, else CC, else the first that PATH holds."""
    for variable in ("CXX", "CC"):
        if os.environ.get(variable):
            command = shlex.split(os.environ[variable])
            if shutil.which(command[0]) is None:
                raise CannotBuildError(f"no C++ compiler: {variable}={command[0]} does not exist")
            return command
    configured = shlex.split(sysconfig.get_config_var("CXX") or "")[:1]
    for name in (*configured, "c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise CannotBuildError(
        "no C++ compiler: install g++ or clang++ (for instance `apt install g++`) or set CXX, "
        "then install mima again"
    )


def find_nvcc() -> list[str]:
    """Command line of nvcc: CUDACXX, else CUDA_HOME, else PATH, else /usr/local/cuda."""
    if named := os.environ.get("CUDACXX"):
        command = shlex.split(named)
        if shutil.which(command[0]) is None:
            raise CannotBuildError(f"no nvcc: CUDACXX={command[0]} does not exist")
        return command
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        path = Path(home, "bin", "nvcc")
        if not path.exists():
            raise CannotBuildError(f"no nvcc: {path} does not exist (CUDA_HOME={home})")
        return [str(path)]
    path_or_default = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if path_or_default is None:
        raise CannotBuildError("no nvcc: install the CUDA toolkit or set CUDA_HOME")
    return [path_or_default]


def find_ninja() -> str:
    """Path of ninja: the build requirement's, else PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        bundled = None
    else:
        bundled = shutil.which("ninja", path=BIN_DIR)
    path = bundled or shutil.which("ninja")
    if path is None:
        raise CannotBuildError("no ninja: pip install ninja, then install mima again")
    return path


def python_includes(build_dir: Path) -> str:
    """Include flags for the bindings; CannotBuildError where the headers are missing."""
    try:
        import pybind11
    except ImportError as error:
        raise CannotBuildError("no pybind11: pip install pybind11") from error
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        raise CannotBuildError(
            f"no Python headers: {include}/Python.h does not exist (for instance "
            "`apt install python3-dev`)"
        )
    # copied: pip puts pybind11 into another folder each time, and bindings would be compiled anew
    copy = build_dir / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        unfinished = copy.with_name(f"{copy.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(pybind11.get_include(), unfinished)
        unfinished.rename(copy)
    return f"-isystem {shlex.quote(str(copy))} -isystem {shlex.quote(include)}"


def ninja_path(path: Path | str) -> str:
    """Escape a path for a build statement."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def compile_module(name: str, build_dir: Path, compilers: dict[str, list[str]]) -> Path:
    """Write a ninja file for the module, run it, and return the shared object."""
    build_dir.mkdir(parents=True, exist_ok=True)
    target = build_dir / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    cxx = shlex.join(compilers["cxx"])
    flags = f"{CXX_FLAGS} {os.environ.get('CPPFLAGS', '')} {os.environ.get('CXXFLAGS', '')}"
    ldflags = os.environ.get("LDFLAGS", "")
    defines = f'-I{shlex.quote(str(ROOT / "csrc"))} -DMIMA_VERSION=\\"{VERSION}\\"'
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {ninja_path(build_dir / name)}",
        f"flags = {flags} {defines}",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule bindings",
        f"  command = {cxx} -MMD -MF $out.d $flags {BINDINGS_FLAGS} {python_includes(build_dir)}"
        " -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    if "nvcc" in compilers:
        nvcc = shlex.join(compilers["nvcc"])
        archs = re.split(r"[;, ]+", os.environ.get("MIMA_CUDA_ARCHS", "80;90").strip("; ,"))
        gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
        # PTX of the newest, for devices that come after it
        gencode += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
        words = compilers["cxx"]
        host = next((word for word in words if Path(word).name not in LAUNCHERS), words[0])
        ccbin = f" -ccbin {shlex.quote(host)}" if os.environ.get("CXX") else ""
        lines += [
            "rule cuda",
            f"  command = {nvcc} -MMD -MF $out.d {NVCC_FLAGS}{ccbin} {gencode} {defines}"
            " -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            # static: the module imports on a machine without CUDA and says there what is missing
            f"  command = {nvcc} -shared -cudart static{ccbin} $in -o $out",
        ]
    else:
        lines += [
            "rule link",
            f"  command = {cxx} -shared -pthread {flags} $in -o $out {ldflags} -lstdc++ -lm",
        ]
    objects = []
    for source in SOURCES[name]:
        output = build_dir / name / f"{source.name}.o"
        rule = {"bindings.cpp": "bindings"}.get(
            source.name, "cuda" if source.suffix == ".cu" else "cxx"
        )
        lines.append(f"build {ninja_path(output)}: {rule} {ninja_path(source)}")
        objects.append(ninja_path(output))
    lines.append(f"build {ninja_path(target)}: link {' '.join(objects)}")
    ninja_file = build_dir / f"{name}.ninja"
    ninja_file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    command = [find_ninja(), "-f", str(ninja_file)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, file=sys.stderr)
    if result.returncode != 0:
        errors = [line for line in result.stdout.splitlines() if "error" in line.lower()]
        raise CannotBuildError(
            f"the compiler failed: {errors[0] if errors else 'see the build log'}"
        )
    return target


def build_module(
    name: str, build_dir: Path, previous: Outcome | None
) -> tuple[Outcome, Path | None]:
    """Build one module as its variable asks; never raises in auto mode."""
    variable = {"_native": "MIMA_BUILD_NATIVE", "_native_cuda": "MIMA_BUILD_CUDA"}[name]
    mode = requested(variable)
    if mode == "0":
        return Outcome(built=False, reason=f"left out at build time by {variable}=0"), None
    try:
        if previous is not None and not previous.built:
            raise CannotBuildError(previous.reason)
        compilers = {"cxx": find_cxx()}
        if name == "_native_cuda":
            compilers["nvcc"] = find_nvcc()
        tool = version_of(list(compilers.values())[-1])
        return Outcome(built=True, reason="", tool=tool), compile_module(name, build_dir, compilers)
    except CannotBuildError as error:
        if mode == "1":
            raise SystemExit(f"mima.{name} cannot be built ({variable}=1): {error}") from error
        print(
            f"mima.{name} is left out: {error}.\n"
            "mima works without it, on PyTorch and Triton; `mima doctor` shows this reason.",
            file=sys.stderr,
        )
        return Outcome(built=False, reason=str(error)), None


class BuildNative(build_ext):
    """Builds what can be built, and writes down what could not and why."""

    def run(self) -> None:
        """Build both modules into build_lib and, for an editable install, beside the sources."""
        build_dir = Path(self.build_temp).resolve()
        package = Path(self.build_lib, "mima")
        package.mkdir(parents=True, exist_ok=True)
        self.produced: list[str] = ["_build_info.json"]
        cpu, cpu_module = build_module("_native", build_dir, None)
        cuda, cuda_module = build_module("_native_cuda", build_dir, cpu)
        for module in (cpu_module, cuda_module):
            if module is not None:
                shutil.copy2(module, package / module.name)
                self.produced.append(module.name)
        info = {"version": VERSION, "native": asdict(cpu), "native_cuda": asdict(cuda)}
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n", "utf-8")
        if self.inplace:
            for suffix in ("*.so", "_build_info.json"):
                for stale in ROOT.glob(f"mima/{'_native' if suffix == '*.so' else ''}{suffix}"):
                    stale.unlink()
            for name in self.produced:
                shutil.copy2(package / name, ROOT / "mima" / name)

    def get_output_mapping(self) -> dict[str, str]:
        """What an editable install put beside the sources."""
        if not self.inplace:
            return {}
        return {str(Path(self.build_lib, "mima", name)): f"mima/{name}" for name in self.produced}

    def get_outputs(self) -> list[str]:
        """What was put into build_lib."""
        return [str(Path(self.build_lib, "mima", name)) for name in self.produced]


setup(
    package_dir={"mima.kernels": "kernels/triton"},
    ext_modules=[Extension("mima._native", [str(p.relative_to(ROOT)) for p in SOURCES["_native"]])],
    cmdclass={"build_ext": BuildNative},
)
