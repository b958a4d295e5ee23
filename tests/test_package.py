"""The wheel, the release files and the docstrings that the API reference is made of."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
import warnings
import zipfile
from pathlib import Path

import pdoc
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mosaics

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PARTS = ("ops", "memories", "models", "inspection", "data", "training", "library")
PUBLIC = ["mosaics", *(f"mosaics.{part}" for part in PARTS)]


def python(*words: str, cwd: Path, path: Path | None = None) -> str:
    """Standard output of this Python with `path` as its only extra place for modules."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    python("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (found,) = folder.glob("*.whl")
    return found


def test_wheel_holds_the_package_its_recipes_and_its_licence(wheel):
    assert wheel.name == f"mosaics-{mosaics.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {path.name for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes and {Path(name).name for name in names if name.startswith("mosaics/recipes/")} == recipes
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "mosaics").rglob("*.py")}
    assert sources <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {"mosaics/py.typed", "mosaics/LICENSE", "mosaics/reporting/page.html.j2"} <= set(names)
    demo = {path.name: path.stat().st_size for path in (ROOT / "src" / "mosaics" / "models" / "demo").iterdir()}
    assert {f"mosaics/models/demo/{name}" for name in demo} <= set(names) and "model.safetensors" in demo
    assert sum(zipfile.ZipFile(wheel).getinfo(f"mosaics/models/demo/{name}").compress_size for name in demo) < 4e6
    assert {name.split("/")[0] for name in names} == {"mosaics", f"mosaics-{mosaics.__version__}.dist-info"}


@pytest.mark.slow
def test_wheel_installs_and_works_away_from_the_checkout(wheel, tmp_path):
    target = tmp_path / "installed"
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    python(*pip, "--disable-pip-version-check", cwd=tmp_path)
    assert "quickstart" in python("-m", "mosaics", "--help", cwd=tmp_path, path=target)
    look = (
        "import json, mosaics; from mosaics.training import shipped_recipes; "
        "config = mosaics.MosaicConfig.from_preset('memory-mosaics-v2-tiny'); "
        "found = [mosaics.__file__, *map(str, shipped_recipes().values())]; print(json.dumps(found))"
    )
    found = json.loads(python("-c", look, cwd=tmp_path, path=target))
    assert len(found) == 1 + len(list((ROOT / "recipes").glob("*.yaml")))
    assert all(Path(name).is_relative_to(target) for name in found)


def test_release_files_agree_on_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mosaics.__version__
    assert f"## {mosaics.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "arXiv:2507.03285" in str(citation["preferred-citation"]["identifiers"])


def test_constraints_pin_every_dependency_within_its_range():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    named = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, named):
        if requirement.name != "mosaics":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("name", PUBLIC[1:] + ["mosaics.ops.kernel_regression", "mosaics.ops.leaky_average"])
def test_public_names_have_docstrings(name):
    module = importlib.import_module(name)
    assert module.__doc__
    bare = []
    for public in getattr(module, "__all__", []):
        value = getattr(module, public)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        documented = inspect.getdoc(value) if inspect.isfunction(value) else value.__doc__
        if not documented or documented.startswith(f"{public}("):  # what dataclass makes up
            bare.append(public)
        if inspect.isclass(value):
            own = (k for k, v in vars(value).items() if inspect.isfunction(v) and not k.startswith("_"))
            bare += [f"{public}.{k}" for k in own if not inspect.getdoc(getattr(value, k))]
    assert not bare


def test_api_reference_is_rendered(tmp_path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = re.search(r"^PUBLIC := mosaics \$\(addprefix mosaics\.,(.*)\)$", makefile, re.M)[1].split()
    assert ["mosaics", *(f"mosaics.{part}" for part in listed)] == PUBLIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pdoc.render.configure(docformat="google", math=True)
        pdoc.pdoc(*PUBLIC[1:4], output_directory=tmp_path)  # the others bring nothing new, and take seconds
    page = (tmp_path / "mosaics" / "ops" / "kernel_regression.html").read_text(encoding="utf-8")
    assert "What a memory answers" in page and "Bandwidth" in page
    assert "remove_memories" in (tmp_path / "mosaics" / "models.html").read_text(encoding="utf-8")
