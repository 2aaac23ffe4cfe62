"""Builds and installs the package comfytp for the Python that runs this: the step that ComfyUI's managers run after a clone."""

import pathlib
import shutil
import subprocess
import sys
import sysconfig

_ROOT = pathlib.Path(__file__).resolve().parent


def cuda_options() -> list[str]:
    """Where nvcc is: cudnn-frontend's headers beside the cuBLAS and cuDNN that torch brought, and the option that names the place."""
    if shutil.which("nvcc") is None:
        print("comfytp: nvcc was not found; the package is built for CPUs alone. With the CUDA toolkit (12.8 or newer) it is for GPUs too.")
        return []
    headers = [line for line in (_ROOT / "requirements-cuda13.txt").read_text().splitlines() if line.startswith("nvidia-cudnn-frontend")]
    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", *headers])
    return [f"--config-settings=cmake.define.COMFYTP_CUDA_PACKAGES={sysconfig.get_path('purelib')}"]


def main() -> int:
    command = [sys.executable, "-m", "pip", "install", *cuda_options(), str(_ROOT)]
    print("comfytp: building the package, which takes some minutes …", flush=True)
    if subprocess.run(command).returncode == 0:
        return 0
    print(
        "comfytp: the build failed. It needs a C++20 compiler, CMake, fmt and nlohmann-json; on Debian and Ubuntu:\n"
        "  apt-get install g++ cmake ninja-build libfmt-dev nlohmann-json3-dev python3-dev\n"
        f"and then: {subprocess.list2cmdline(command)}",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
