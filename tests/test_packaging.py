"""The package as others get it: dependencies, pins, import contracts and what the wheel holds."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hd_core", "pipelines", "tune_spaces")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASSETS_BYTES_MAX = 6_000_000

RUNTIME = [Requirement(line) for line in PROJECT["dependencies"]]
DEVELOPMENT = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]
OPTIONAL = [Requirement(line) for extra in ("datasets", "lpips") for line in PROJECT["optional-dependencies"][extra]]


def has_lower_bound(requirement: Requirement) -> bool:
    return any(specifier.operator == ">=" for specifier in requirement.specifier)


def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    parts = [line.split("==") for line in lines]
    assert all(len(part) == 2 for part in parts), [part for part in parts if len(part) != 2]
    return {canonicalize_name(name): Version(version) for name, version in parts}


def imported_modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((alias.name.split(".")[0], path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.module.split(".")[0], path


@pytest.fixture(scope="module")
def wheel_sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Bytes of every file in a wheel that is built from a copy of the tree, without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True)
    (wheel,) = out.glob("hdistill-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


def test_the_console_script_is_hdistill_and_exists():
    assert PROJECT["scripts"] == {"hdistill": "pipelines.cli:main"}
    module, function = PROJECT["scripts"]["hdistill"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("requirement", RUNTIME + DEVELOPMENT, ids=lambda requirement: requirement.name)
def test_every_dependency_has_a_lower_bound_and_its_pin_satisfies_it(requirement: Requirement):
    assert has_lower_bound(requirement)
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)], prereleases=True)


def test_every_dependency_says_why_it_is_there():
    text = (ROOT / "pyproject.toml").read_text()
    for requirement in RUNTIME + DEVELOPMENT:
        pattern = rf'^    "{re.escape(requirement.name)}\b[^"]*",  # \w.+$'
        assert re.search(pattern, text, re.MULTILINE), f"{requirement.name}: no reason behind its line"


def test_no_pin_carries_a_local_version():
    assert [name for name, version in pins().items() if version.local] == []


def test_every_imported_distribution_is_declared():
    declared = {canonicalize_name(requirement.name) for requirement in RUNTIME + OPTIONAL}
    distributions = packages_distributions()
    for package in PACKAGES:
        for module, path in imported_modules(package):
            if module in sys.stdlib_module_names or module in PACKAGES:
                continue
            providers = {canonicalize_name(name) for name in distributions.get(module, [module])}
            assert providers & declared, (
                f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not name"
            )


def test_import_contracts_hold():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()", "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_wheel_holds_every_module_recipe_asset_and_type_marker(wheel_sizes: dict[str, int]):
    tree = {path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()}
    ours = {path.relative_to(ROOT).as_posix() for path in tree if "__pycache__" not in path.parts}
    assert "pipelines/recipes/digits.yaml" in ours
    assert {f"{name}/py.typed" for name in PACKAGES} <= ours
    assert sorted(ours - wheel_sizes.keys()) == []


def test_the_wheel_holds_nothing_but_the_packages(wheel_sizes: dict[str, int]):
    assert {name.split("/")[0] for name in wheel_sizes if ".dist-info/" not in name} == set(PACKAGES)


def test_embedded_assets_are_safetensors_and_small(wheel_sizes: dict[str, int]):
    assets = {name: size for name, size in wheel_sizes.items() if name.startswith("pipelines/assets/")}
    assert any(name.endswith(".safetensors") for name in assets)
    assert [name for name in assets if name.endswith((".bin", ".ckpt", ".pkl", ".pt", ".pth"))] == []
    assert sum(assets.values()) < ASSETS_BYTES_MAX
