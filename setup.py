"""Builds clustops/native/_kernels with CMake and Ninja; without a C++ compiler the package is pure Python.

CLUSTOPS_NATIVE=0        build no extension
CLUSTOPS_CUDA=auto|0|1   auto (default): for the visible GPUs, if nvcc is found; 1: without a GPU; 0: never
CLUSTOPS_CUDA_ARCHS      "80;90a": instead of those of the visible GPUs, or of the default list
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHS = ["80", "86", "89", "90a", "100a", "120a"]


def find_compiler():
    names = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    return next((name for name in names if name and shutil.which(name)), None)


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [
        os.environ.get("CUDACXX"),
        f"{home}/bin/nvcc" if home else None,
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def visible_archs():
    """Compute capabilities of the GPUs of this machine, as nvcc names them: ["80", "90a"]."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    caps = re.findall(r"^(\d+)\.(\d)\s*$", found.stdout, re.M) if found.returncode == 0 else []
    return sorted({major + minor + ("a" if int(major) >= 9 else "") for major, minor in caps})


def supported_archs(nvcc):
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"sm_(\w+)", listed))


def choose_cuda():
    """(nvcc, archs, reason): archs is empty where no CUDA kernels are built, and reason says why."""
    wish = os.environ.get("CLUSTOPS_CUDA", "auto").lower()
    if wish not in ("auto", "0", "1"):
        sys.exit(f"CLUSTOPS_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return None, [], "CLUSTOPS_CUDA=0"
    nvcc = find_nvcc()
    if nvcc is None:
        if wish == "1":
            sys.exit("CLUSTOPS_CUDA=1 needs nvcc: put it on PATH or set CUDA_HOME")
        return None, [], "nvcc was not found when the package was built"
    archs = [a for a in re.split(r"[;, ]+", os.environ.get("CLUSTOPS_CUDA_ARCHS", "")) if a]
    if not archs:
        archs = visible_archs()
    if not archs and wish == "auto":
        return None, [], "no GPU was visible when the package was built (CLUSTOPS_CUDA=1 builds without one)"
    if not archs:
        supported = supported_archs(nvcc)
        archs = [a for a in DEFAULT_ARCHS if a in supported]
    return nvcc, archs, ""


def write_build_info(folder, **info):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build_info.json").write_text(json.dumps(info, indent=2) + "\n")


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        compiler = find_compiler()
        if os.environ.get("CLUSTOPS_NATIVE", "1") == "0" or compiler is None:
            reason = (
                "no C++ compiler was found when the package was built"
                if compiler is None
                else "CLUSTOPS_NATIVE=0"
            )
            write_build_info(target, native=False, cuda=False, cuda_archs=[], reason=reason)
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # of an earlier build
            print(f"clustops: {reason}; installing without native kernels")
            return
        nvcc, archs, reason = choose_cuda()
        build = Path(self.build_temp).resolve() / "-".join(["cmake", *archs])
        configure = [
            "cmake", "--fresh", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={self.pybind11_folder()}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DCLUSTOPS_CUDA_ARCHS={';'.join(archs)}",
            f"-DCLUSTOPS_WERROR={os.environ.get('CLUSTOPS_WERROR', 'OFF')}",
        ]  # fmt: skip
        if nvcc and archs:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)
        write_build_info(target, native=True, cuda=bool(archs), cuda_archs=archs, reason=reason)

    @staticmethod
    def pybind11_folder():
        import pybind11

        return pybind11.get_cmake_dir()

    def get_outputs(self):
        outputs = [Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions]
        info = [out.parent / "build_info.json" for out in outputs]
        return [str(path) for path in outputs + info if path.exists()]

    def copy_extensions_to_source(self):
        """An editable install runs from the source folder, so the build's report goes there too."""
        for ext in self.extensions:
            package = Path(*ext.name.split(".")[:-1])
            (ROOT / package / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
            shutil.copy(Path(self.build_lib) / package / "build_info.json", ROOT / package)
        super().copy_extensions_to_source()


setup(
    ext_modules=[Extension("clustops.native._kernels", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
