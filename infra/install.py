"""Fill a virtual environment with the pinned packages and calumma itself: `python infra/install.py .venv`.

What `make` and the container image run. pip resolving these packages searches for a quarter of an hour, and unpacks for
ten minutes; uv with the whole resolved set takes one or two. Needs nothing but Python's standard library.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "constraints.txt"
UV = "0.13.9"
OLDEST_PYTHON = (3, 11)
# pip's settings and uv's variables for the same things; several values are separated by what uv wants there
SETTINGS = {
    "find-links": ("UV_FIND_LINKS", ","),
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "no-index": ("UV_NO_INDEX", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
}


class InstallationError(Exception):
    """What stands in the way, and what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environment", type=Path, help="the folder of the virtual environment; made if it is not there")
    parser.add_argument("--only-pins", action="store_true", help="the packages without calumma (a layer of the image)")
    parser.add_argument("--pins", type=Path, help="packages of this file instead, and nothing else")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="which build of PyTorch")
    given = parser.parse_args()
    try:
        if given.pins:
            install_pins(given.environment.absolute(), given.pins.absolute())
        else:
            install(given.environment.absolute(), given.device, given.only_pins)
    except InstallationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(map(str, error.cmd[:6]))} … ended with code {error.returncode}", file=sys.stderr)
        return 1
    return 0


def install_pins(environment: Path, pins: Path) -> None:
    """An environment of a file's packages alone."""
    variables = os.environ | uv_variables(pip_settings())
    uv = find_uv(variables)
    if not usable(environment):
        run([uv, "venv", "--clear", "--python", sys.executable, str(environment)], variables)
    run([uv, "pip", "install", "--python", str(environment), "--no-deps", "-r", str(pins)], variables)


def install(environment: Path, device: str, only_pins: bool = False) -> None:
    """Make the environment if it is needed, and install what it lacks."""
    if sys.version_info < OLDEST_PYTHON:
        raise InstallationError(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]} ({sys.executable})")
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        print("note: there is no C++ compiler. The quickstart runs without; fused optimizers on GPUs need one (g++).")
    settings = pip_settings()
    variables = os.environ | uv_variables(settings)
    uv = find_uv(variables)
    if not usable(environment):
        run([uv, "venv", "--clear", "--python", sys.executable, str(environment)], variables)
    cuda = has_gpu() if device == "auto" else device == "cuda"
    pip = [uv, "pip", "install", "--python", str(environment), "--compile-bytecode"]
    print(f"installing the pinned packages into {environment} …", flush=True)
    torch = next(line for line in PINS.read_text().split() if line.startswith("torch=="))
    # Without `sources` of the user's own, PyTorch's packages for CPUs come from PyTorch's index: what the public
    # index has is the build for CUDA, with gigabytes of libraries that the pins leave out.
    sources = {"find-links", "index-url", "extra-index-url", "no-index"} & settings.keys()
    backend = [] if cuda or sources else ["--torch-backend", "cpu"]
    run([*pip, *backend, "--no-deps", "-r", str(PINS)], variables)
    if cuda or not imports_torch(environment):
        run([*pip, "--constraint", str(PINS), torch], variables)  # with the CUDA libraries of that build
    if not imports_torch(environment):
        raise InstallationError(
            f"{torch} is installed and cannot be imported: see `{environment}/bin/python -c 'import torch'`"
        )
    import tomllib  # new in Python 3.11: not before the version has been checked

    # What builds calumma stays installed: DeepSpeed and PyTorch build their own extensions with it.
    run([*pip, *tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]], variables)
    if not only_pins:
        run([*pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], variables)


def pip_settings() -> dict[str, str]:
    """pip's settings, from its files and variables (which win), as far as uv knows the same."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    found: dict[str, str] = {}
    for line in listing.stdout.splitlines():
        name, separator, value = line.partition("=")
        key = name.rpartition(".")[2]
        if separator and key in SETTINGS and (name.startswith(("global.", "install."))):
            found[key] = str(ast.literal_eval(value))
    for key in SETTINGS:
        if given := os.environ.get("PIP_" + key.upper().replace("-", "_")):
            found[key] = given
    return {key: value for key, value in found.items() if value.strip()}


def uv_variables(settings: dict[str, str]) -> dict[str, str]:
    """pip's settings as uv's variables; those of uv that are set already stay as they are."""
    variables = {}
    for key, value in settings.items():
        name, separator = SETTINGS[key]
        variables[name] = separator.join(value.split())
    if "extra-index-url" in settings:
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip does: the best version of any index
    return {name: value for name, value in variables.items() if name not in os.environ}


def find_uv(variables: dict[str, str]) -> str:
    """uv's program: the one on the path, or one that pip puts into build/uv."""
    if found := shutil.which("uv"):
        return found
    folder = ROOT / "build" / "uv"
    program = folder / "bin" / "uv"
    if not program.is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"uv=={UV}"]
        try:
            run(command, variables)
        except subprocess.CalledProcessError as error:
            raise InstallationError(
                f"pip of {sys.executable} could not install uv. Install pip (`apt install python3-pip`), or uv itself "
                "(https://docs.astral.sh/uv), and try again"
            ) from error
    return str(program)


def usable(environment: Path) -> bool:
    """Whether there is a virtual environment whose Python runs and is new enough."""
    python = environment / "bin" / "python"
    if not (environment / "pyvenv.cfg").is_file() or not python.exists():
        return False
    test = f"import sys; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    return subprocess.run([str(python), "-c", test], capture_output=True).returncode == 0


def imports_torch(environment: Path) -> bool:
    """Whether PyTorch works there: the CUDA build does not without its libraries."""
    python = environment / "bin" / "python"
    return subprocess.run([str(python), "-c", "import torch"], capture_output=True).returncode == 0


def has_gpu() -> bool:
    """Whether the machine has an NVIDIA device that programs can open."""
    return Path("/dev/nvidia0").exists()


def run(command: list[str], variables: dict[str, str]) -> None:
    subprocess.run(command, env=variables, check=True, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
