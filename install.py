"""Builds and installs the package comfytp for the Python that runs this: the step that ComfyUI's managers run after a clone."""

import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).resolve().parent


def main() -> int:
    command = [sys.executable, "-m", "pip", "install", str(_ROOT)]
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
