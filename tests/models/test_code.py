"""The code that goes with a saved model: loaded by a stranger's program, it computes what the package does."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_imports, get_relative_import_files

from helpers import tiny_model
from mosaics import MosaicConfig
from mosaics.memories import REGISTRY, Memory
from mosaics.models import PRESETS
from mosaics.models.code import CODE_LICENSE, sources, write_code
from mosaics.ops import kernel_regression, leaky_average, unit_values
from stranger import computed

ROOT = Path(__file__).parents[2]
NARROW = "memory-mosaics-v2-tiny in int8"
LIMIT = 3000  # lines, for memory-mosaics-v2


def types(preset: str) -> set[str]:
    return MosaicConfig.from_preset(preset).memory_types()


# One for each set of memories, and all whose memories have other names than their types.
ARRANGEMENTS = list({frozenset(types(preset)): preset for preset in reversed(PRESETS) if "tiny" in preset}.values())
ARRANGEMENTS = [
    "memory-mosaics-v2-tiny",
    *sorted({*ARRANGEMENTS, "transformer-long-short-tiny"} - {"memory-mosaics-v2-tiny"}),
]


def stranger(how: str, jobs: list[dict], folder: Path, path: str = "") -> list[str]:
    """Run the stranger's program; the modules of the classes that it got."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "MOSAICS_COMPILE": "0"}
    # Isolated, but for the package where it is to be had: it may be installed somewhere else.
    start = f"import sys, runpy; sys.path[:0] = {[path] if path else []}; sys.argv[:] = sys.argv[1:]; "
    start += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-I", "-c", start, str(ROOT / "tests" / "stranger.py"), how, json.dumps(jobs)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def plain_forms(monkeypatch):
    """The package with the forms alone that go with a model, as it computes there."""
    for op in (kernel_regression, leaky_average, unit_values):
        faster = op.FASTER.functions()
        monkeypatch.setattr(op, "FORMS", {name: form for name, form in op.FORMS.items() if name not in faster})
        monkeypatch.setattr(op.FASTER, "_modules", {})
    monkeypatch.setattr(Memory, "step_of_one", None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A saved model of every arrangement, and one that keeps its pairs in 8 bits: folders by name."""
    folder, folders = tmp_path_factory.mktemp("models"), {}
    for name in [*ARRANGEMENTS, NARROW]:
        more = {"state_dtype": "int8"} if name == NARROW else {}
        folders[name] = folder / name.replace(" ", "-")
        # Weights so large that inner loops run away would compare what is no number.
        tiny_model(torch.float32, 2.0, preset=name.partition(" ")[0], **more).save_pretrained(folders[name])
    return folders


def assert_equal(found: Path, expected: dict[str, torch.Tensor]) -> None:
    tensors = load_file(found)
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
        assert x.isfinite().all() and torch.equal(tensors[name], x), name


@pytest.mark.slow
def test_self_contained_code_computes_bit_for_bit_what_the_package_does(models, tmp_path, plain_forms):
    jobs = []
    for name, folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(folder)
        own, out = tmp_path / folder.name, str(tmp_path / f"{folder.name}.safetensors")
        model.save_pretrained(own)
        write_code(own, self_contained=True)
        jobs.append({"folder": str(own), "out": out, "save": f"{own}-saved", "name": name})
    # What a saved one saves, and a file that lacks some of the weights.
    again = {"folder": jobs[0]["save"], "out": str(tmp_path / "again"), "save": str(tmp_path / "twice")}
    twice = {"folder": again["save"], "out": str(tmp_path / "thrice")}
    partial = {"folder": str(tmp_path / "partial"), "out": str(tmp_path / "weights"), "weights": True}
    model = AutoModelForCausalLM.from_pretrained(jobs[0]["folder"])
    model.save_pretrained(partial["folder"])
    write_code(Path(partial["folder"]), self_contained=True)
    file = Path(partial["folder"]) / "model.safetensors"
    kept = load_file(file)
    lacking = [name for name in kept if re.search(r"key_proj|0\..*feed_forward|1\..*bandwidth_base|0\..*norm", name)]
    assert len(lacking) >= 8
    save_file({name: x for name, x in kept.items() if name not in lacking}, file, metadata={"format": "pt"})

    modules = stranger("without", [*jobs, again, twice, partial], tmp_path)
    assert all(module.startswith("transformers_modules.") for module in modules)
    torch.set_num_threads(1)
    for job in jobs:
        assert_equal(job["out"], expected := computed(AutoModelForCausalLM.from_pretrained(job["folder"])))
        if job is jobs[0]:
            assert expected["drawn"].unique().numel() > 1
            for saved in (again, twice):
                assert_equal(saved["out"], expected)
    torch.manual_seed(3)
    initialised = AutoModelForCausalLM.from_pretrained(partial["folder"]).state_dict()
    assert_equal(partial["out"], initialised)
    assert all(x.isfinite().all() for x in initialised.values())
    assert not any(torch.equal(initialised[name], kept[name]) for name in lacking if "proj" in name)


@pytest.mark.slow
def test_a_saved_model_loads_by_trust_remote_code_where_the_package_is_installed(models, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAICS_COMPILE", "0")
    folder = models[ARRANGEMENTS[0]]
    first = {"folder": str(folder), "out": str(tmp_path / "one"), "save": str(tmp_path / "saved")}
    # By then the package is imported, and its own classes serve: what they save is as good.
    second = {"folder": first["save"], "out": str(tmp_path / "two"), "save": str(tmp_path / "again")}
    modules = stranger("with", [first, second], tmp_path, str(ROOT / "src"))
    assert modules[0].startswith("transformers_modules.") and modules[1] == "mosaics.models.modeling_mosaic"
    one, two = load_file(first["out"]), load_file(second["out"])
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    logits = computed(AutoModelForCausalLM.from_pretrained(folder))["plain"]
    torch.testing.assert_close(one["plain"], logits, rtol=1e-4, atol=1e-4)
    for saved in (first["save"], second["save"]):
        files = {path.name: path.read_bytes() for path in Path(saved).iterdir()}
        assert files.keys() == {"config.json", "generation_config.json", "model.safetensors", "modeling_mosaic.py"}
        assert all((folder / name).read_bytes() == files[name] for name in ("modeling_mosaic.py", "config.json"))


@pytest.mark.parametrize("self_contained", [False, True])
def test_with_mosaics_imported_the_package_is_taken(models, tmp_path, self_contained):
    model = AutoModelForCausalLM.from_pretrained(models[ARRANGEMENTS[0]])
    model.save_pretrained(tmp_path)
    write_code(tmp_path, self_contained)
    for options in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert type(loaded) is type(model) and type(loaded.config) is type(model.config)
    assert "auto_map" not in loaded.config.to_dict()  # nor in what is known of a run by its config


@pytest.mark.slow
@pytest.mark.parametrize("preset", {frozenset(types(preset)): preset for preset in PRESETS}.values())
def test_sources_are_small_and_reached_as_transformers_looks_for_them(preset, tmp_path):
    texts = sources(types(preset))
    if preset.startswith("memory-mosaics-v2"):
        assert sum(text.count("\n") for text in texts.values()) <= LIMIT
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        tree = ast.parse(text)
        assert name.removesuffix(".py").isidentifier()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1 and (node.level == 0 or f"{node.module}.py" in texts)
        wanted = {"torch", "transformers", "numpy", "huggingface_hub", *sys.stdlib_module_names}
        assert set(get_imports(tmp_path / name)) <= wanted
    reached = get_relative_import_files(tmp_path / "modeling_mosaic.py")
    assert {Path(path).name for path in reached} | {"modeling_mosaic.py"} == set(texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_sources_of_each_memory_stand_alone(name, tmp_path):
    """Every name that a module uses is defined in it, imported or built in."""
    for text in sources({name}).values():
        tree = ast.parse(text)
        known = set(dir(__builtins__)) | set(vars(__builtins__) if not isinstance(__builtins__, dict) else __builtins__)
        known |= {"__name__", "__package__", "__spec__", "__file__", "__class__"}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.arg):
                known.add(node.arg)
            elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                known.add(node.id)
            elif isinstance(node, ast.ExceptHandler):
                known.add(node.name)
        unknown = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - known
        assert not unknown


def test_sources_do_not_depend_on_those_made_before():
    before = sources({"feed_forward"})
    sources({"long_term"})
    assert sources({"feed_forward"}) == before


def test_sources_refuse_the_memory_of_another_package_by_name(monkeypatch):
    class Foreign(REGISTRY["long_term"]):
        pass

    Foreign.__module__ = "elsewhere.memories"
    monkeypatch.setitem(REGISTRY, "far_away", Foreign)
    with pytest.raises(ValueError, match=r"'far_away' is of another package \(elsewhere\.memories\)"):
        sources({"far_away", "feed_forward"})


def test_write_code_puts_the_licence_beside_the_code(models, tmp_path):
    AutoModelForCausalLM.from_pretrained(models[ARRANGEMENTS[0]]).save_pretrained(tmp_path)
    write_code(tmp_path, self_contained=True)
    assert (tmp_path / CODE_LICENSE).read_text() == (ROOT / "LICENSE").read_text()
    assert all("Apache-2.0" in path.read_text().partition('"""')[0] for path in tmp_path.glob("*.py"))


@pytest.mark.parametrize("self_contained", [False, True])
def test_push_to_hub_takes_the_code_along(models, tmp_path, monkeypatch, self_contained):
    """Nothing is sent: what would be is looked at."""
    AutoModelForCausalLM.from_pretrained(models[ARRANGEMENTS[0]]).save_pretrained(tmp_path)
    write_code(tmp_path, self_contained)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    load = lambda name: get_class_from_dynamic_module(f"modeling_mosaic.{name}", str(tmp_path))  # noqa: E731
    config, kind = load("MosaicConfig"), load("MosaicForCausalLM")
    config.register_for_auto_class()
    kind.register_for_auto_class("AutoModelForCausalLM")
    model = kind.from_pretrained(tmp_path, config=config.from_pretrained(tmp_path))
    sent = {}

    class Hub:
        def create_repo(self, repo_id, **_):
            return transformers.utils.generic.ModelOutput(repo_id=repo_id)

        def create_commit(self, repo_id, operations, **_):
            sent.update({x.path_in_repo: Path(x.path_or_fileobj).read_bytes() for x in operations})

        def __getattr__(self, name):
            return lambda *_, **__: None

    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *_, **__: Hub())
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card",
        lambda *_, **__: type("Card", (), {"save": lambda self, path: Path(path).write_text("card")})(),
    )
    model.push_to_hub("somebody/mosaic")
    modules = {path.name for path in tmp_path.glob("*.py")}
    assert modules | {"config.json", "model.safetensors", "README.md"} <= set(sent)
    assert all(sent[name] == (tmp_path / name).read_bytes() for name in modules)
    auto = json.loads(sent["config.json"])["auto_map"]
    assert {f"{value.partition('.')[0]}.py" for value in auto.values()} <= set(sent)
