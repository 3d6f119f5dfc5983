"""What training imports is what each of its processes waits for."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, pkgutil, sys
import calumma.platform.training as package
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
heavy = ("torch._dynamo", "sympy", "deepspeed", "ray", "mlflow", "torchao")
print(*sorted(name for name in heavy if name in sys.modules))
"""


def test_training_imports_the_compiler_and_other_heavy_libraries_where_it_uses_them() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
