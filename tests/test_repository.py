"""The repository itself: names, imports, packaging, pins, and the files that other tools read."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
FOLDERS = ("jobs", "model", "platform", "serve")

# The model runs on a machine that has nothing else: these and the standard library are all it may use.
MODEL_MAY_USE = {
    "PIL",
    "jinja2",
    "llguidance",
    "numpy",
    "pydantic",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "torch",
}


def test_the_standard_librarys_platform_is_not_shadowed() -> None:
    command = [sys.executable, "-c", "import platform; print(platform.system())"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == os.uname().sysname
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_every_folder_with_code_is_a_package_that_is_shipped() -> None:
    holds_code = {file.parent for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    found = {"calumma." + ".".join(folder.relative_to(ROOT).parts) for folder in holds_code}
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


# --- imports -------------------------------------------------------------------------------------------------------


def imports(file: Path) -> Iterator[str]:
    """Modules that a file imports, at its head or inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


# Without what an editable installation adds to Python's imports: it knows where the working tree is.
LINT = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
sys.path[:] = [sys.argv.pop(1), *(path for path in sys.path if "__editable__" not in path)]
from importlinter.cli import lint_imports_command
lint_imports_command()
"""


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says of the four packages below `folder`/calumma, by the contracts of pyproject.toml."""
    command = [sys.executable, "-c", LINT, str(folder), "--no-cache", str(ROOT / "pyproject.toml")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_tree_keeps_the_contracts_of_imports(tmp_path: Path) -> None:
    (tmp_path / "calumma").mkdir()
    for name in FOLDERS:
        (tmp_path / "calumma" / name).symlink_to(ROOT / name)
    done = linted(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("model/loss.py", "from calumma.platform import storage", "floors"),
        (
            "platform/sources/files.py",
            "def later():\n    from calumma.platform.cluster import progress",
            "rooms of platform/",
        ),
        ("platform/storage/uri.py", "if TYPE_CHECKING:\n    from calumma.platform.storage import s3", "no circles"),
        ("serve/settings.py", "from calumma.platform.training import errors", "serve and the rooms of platform/"),
    ],
)
def test_a_planted_import_breaks_the_contract_it_is_against(tmp_path: Path, file: str, line: str, broken: str) -> None:
    """Also inside a function, and for types alone."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / "calumma" / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "calumma" / file).open("a") as planted:
        planted.write(f"\n{line}\n")
    done = linted(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"^{re.escape(broken)}.* BROKEN$", done.stdout, re.MULTILINE)
    assert done.stdout.count(" BROKEN") == 1


def test_the_model_needs_nothing_but_pytorch_and_its_tokenizers() -> None:
    wrong = {
        f"{file.relative_to(ROOT)}: {module}"
        for file in (ROOT / "model").rglob("*.py")
        for module in imports(file)
        if module.partition(".")[0] not in MODEL_MAY_USE | set(sys.stdlib_module_names) | {"calumma"}
    }
    assert wrong == set()


def test_our_platform_is_never_imported_by_its_bare_name() -> None:
    """`import platform` is the standard library's, `platform.storage` would be ours under a wrong name."""
    wrong = {
        f"{file.relative_to(ROOT)}: {module}"
        for folder in (*FOLDERS, "tests", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
        for module in imports(file)
        if re.match(
            r"(platform\.(specification|storage|tracking|shards|sources|cluster|streaming|curation|training)"
            r"|(model|jobs|serve)(\.|$))",
            module,
        )
    }
    assert wrong == set()


# --- pins and packages ---------------------------------------------------------------------------------------------


UNPINNED = ("clients", "gpu")  # have pins of their own; are compiled for the torch that is there


def requirements() -> list[Requirement]:
    extras = [more for name, more in PROJECT["project"]["optional-dependencies"].items() if name not in UNPINNED]
    return [
        Requirement(text) for text in [*PROJECT["project"]["dependencies"], *(one for more in extras for one in more)]
    ]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_the_pins_satisfy_what_the_project_asks(requirement: Requirement) -> None:
    pinned = PINS.get(canonicalize_name(requirement.name))
    assert pinned is not None, f"{requirement.name} is missing in constraints.txt"
    assert requirement.specifier.contains(Version(pinned), prereleases=True)


@pytest.mark.parametrize("text", PROJECT["project"]["optional-dependencies"]["clients"])
def test_the_clients_have_pins_of_their_own(text: str) -> None:
    requirement = Requirement(text)
    lines = (ROOT / "tests/serve/clients/constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)[requirement.name]
    assert requirement.specifier.contains(Version(pinned), prereleases=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this tree, built without a network in a copy."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "quickstart.log")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    script = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(folder / "dist")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return zipfile.ZipFile(next((folder / "dist").glob("*.whl")))


def test_the_wheel_contains_every_module(wheel: zipfile.ZipFile) -> None:
    expected = {
        "calumma/" + file.relative_to(ROOT).as_posix() for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")
    }
    assert expected - set(wheel.namelist()) == set()
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected


def test_the_wheel_contains_recipes_playground_templates_and_license(wheel: zipfile.ZipFile) -> None:
    data = [
        *(ROOT / "jobs" / "recipes").rglob("*.yaml"),
        *(ROOT / "jobs" / "recipes").rglob("*.json"),
        *(ROOT / "serve").rglob("*.html"),
        *(ROOT / "serve").rglob("*.css"),
        *(ROOT / "model").rglob("*.cpp"),
        *(ROOT / "model").rglob("*.h"),
    ]
    data += [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.html.j2")]
    expected = {"calumma/" + file.relative_to(ROOT).as_posix() for file in data}
    assert len(expected) > 2
    assert expected - set(wheel.namelist()) == set()
    assert any(fnmatch(name, "calumma-*.dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_the_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    [entry_points] = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "calumma = calumma.jobs.commands.main:main" in wheel.read(entry_points).decode()


def test_the_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License\n")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


# --- infrastructure ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aws() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    return values


def test_ray_accepts_the_cluster_file(aws: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(aws)
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]
    # nothing of Ray's defaults is installed over the image's pinned versions
    assert prepared["setup_commands"] == prepared["head_setup_commands"] == prepared["worker_setup_commands"] == []


def test_the_cluster_file_has_a_head_without_gpus_and_gpu_workers_from_zero(aws: dict[str, Any]) -> None:
    kinds = aws["available_node_types"]
    families = {name: kind["node_config"]["InstanceType"].partition(".")[0] for name, kind in kinds.items()}
    assert families[aws["head_node_type"]] not in ("g6e", "p5")
    gpu_kinds = [kinds[name] for name, family in families.items() if family in ("g6e", "p5")]
    assert gpu_kinds
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in gpu_kinds)


def test_the_image_copies_only_what_the_build_context_has() -> None:
    dockerfile = (ROOT / "infra" / "docker" / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE)
    sources = [source for words in copied for source in words.split()[:-1]]
    assert {"constraints.txt", "pyproject.toml", "infra/install.py"} <= set(sources)
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for source in sources:
        assert (ROOT / source).exists()
        assert not any(fnmatch(source, pattern) for pattern in ignored)
    assert not {*FOLDERS, "infra", "README.md", "LICENSE"} & set(ignored)


def test_the_image_and_the_installer_use_the_same_uv() -> None:
    dockerfile = (ROOT / "infra" / "docker" / "Dockerfile").read_text()
    [in_image] = re.findall(r"astral-sh/uv:([\d.]+)", dockerfile)
    [in_installer] = re.findall(r'^UV = "([\d.]+)"', (ROOT / "infra" / "install.py").read_text(), re.MULTILINE)
    assert in_image == in_installer


# --- installation --------------------------------------------------------------------------------------------------


@pytest.fixture
def installer() -> Any:
    import importlib.util

    found = importlib.util.spec_from_file_location("install", ROOT / "infra" / "install.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_pips_settings_reach_uv(installer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in installer.SETTINGS.values():
        monkeypatch.delenv(name[0], raising=False)
    settings = {"find-links": "/wheels\n/more", "extra-index-url": "https://a/simple https://b/simple"}
    assert installer.uv_variables(settings) == {
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INDEX": "https://a/simple https://b/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    monkeypatch.setenv("UV_FIND_LINKS", "/mine")
    assert "UV_FIND_LINKS" not in installer.uv_variables(settings)


def test_pips_variables_win_over_its_files(installer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nfind-links = /from/file\nindex-url = https://index/simple\ntimeout = 5\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("PIP_FIND_LINKS", "/from/variable")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_NO_INDEX", "PIP_CERT", "PIP_TRUSTED_HOST"):
        monkeypatch.delenv(name, raising=False)
    settings = installer.pip_settings()
    assert settings["find-links"] == "/from/variable"
    assert "timeout" not in settings


def test_an_environment_is_kept_when_it_works(installer: Any, tmp_path: Path) -> None:
    assert installer.usable(Path(sys.prefix))
    assert not installer.usable(tmp_path)
    (tmp_path / "pyvenv.cfg").write_text("home = /gone\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/gone/python")
    assert not installer.usable(tmp_path)


def make(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, env=os.environ | variables)


def test_make_alone_explains() -> None:
    shown = make().stdout
    assert [
        name
        for name in ("quickstart", "install", "test", "check", "docs", "docs-check", "reference", "clean")
        if f"make {name} " not in shown
    ] == []


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    """In an empty environment, when there is no Python that is new enough."""
    done = make("install", "PYTHON=", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert "calumma needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_check_and_test_and_fails_on_either(tmp_path: Path) -> None:
    fake = tmp_path / "make"
    called = tmp_path / "called"
    for failing in ("check", "test", "neither"):
        called.write_text("")
        fake.write_text(f'#!/bin/sh\necho "$1" >> {called}\n[ "$1" != {failing} ]\n')
        fake.chmod(0o755)
        variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run([str(ROOT / ".ci" / "run")], env=variables, capture_output=True)
        assert called.read_text().split() == ["check", "test"]
        assert (done.returncode == 0) == (failing == "neither")
