"""The HTTP ingress starts without torch: sooner, and with a fifth of the memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each in an interpreter that has imported nothing yet.
PROGRAM = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(getattr(package, "__path__", ()), package.__name__ + "."):
    importlib.import_module(module.name)
print(*sorted(name for name in ("torch", "ray", "mlflow", "deepspeed", "calumma.serve.replica") if name in sys.modules))
"""


@pytest.mark.parametrize(
    "module", ["calumma.serve.http", "calumma.serve.deploy.ingress", "calumma.serve.deploy.scaling"]
)
def test_the_ingress_imports_nothing_heavy(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, module], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_application_is_made_without_torch() -> None:
    program = (
        "import sys\n"
        "from calumma.serve.http.app import create_app\n"
        "from calumma.serve.settings import ServeSettings\n"
        "create_app({}, ServeSettings(model='/models/tiny'))\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
