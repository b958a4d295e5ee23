"""The targets: every kind of input that comes from outside."""

import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import shutil
import struct
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch
import yaml
from hypothesis import strategies as st

from . import made
from .inputs import (
    NAMES,
    ODD,
    ODD_VALUES,
    command,
    json_text,
    mutated,
    mutated_tree,
    result_or_sentence,
    target,
)

# Recipes and configs


@target
def recipe_bytes(folder, draw):
    """A damaged recipe file, planned."""
    path = folder / "recipe.yaml"
    path.write_bytes(mutated(draw, yaml.safe_dump(made.values()).encode()))
    command("train", path, "--dry-run")


@target
def recipe_values(folder, draw):
    """A recipe with odd values, planned."""
    path = folder / "recipe.yaml"
    try:
        text = yaml.safe_dump(mutated_tree(draw, made.values()), allow_unicode=True)
    except ValueError:  # more digits than Python prints
        text = f"training: {{steps: {'1' * 5000}}}"
    path.write_text(text, "utf-8", "surrogatepass")
    command("train", path, "--dry-run")


@target
def recipe_options(folder, draw):
    """Odd options on the command line."""
    from mosaics.training.recipe import recipe_keys

    odd = st.sampled_from([str(value) for value in ODD if not isinstance(value, int) or value < 10**30])
    more = ["model.delay", "model.blocks", "training.step", "training.", ".", "model.name"]
    words = ["train", "quickstart", "--dry-run"]
    for _ in range(draw(st.integers(1, 3))):
        words += [f"--{draw(st.sampled_from([*recipe_keys(), *more]))}", draw(odd)]
    command(*words)


@target
def config_values(folder, draw):
    """A config file with odd values: figures of a model, or one sentence."""
    (folder / "config.json").write_bytes(
        json_text(mutated_tree(draw, json.loads((made.exported() / "config.json").read_text())))
    )
    command("info", folder)


def config_keys() -> list[str]:
    """All that a preset lets one set: fields of a config, those of transformers among them, and options."""
    from mosaics import MosaicConfig
    from mosaics.memories.contract import option_names

    config = MosaicConfig.from_preset("memory-mosaics-v2-tiny")
    memories = [memory for block in config.block_steps() for step in block for memory in step]
    options = {option for memory in memories for option in option_names(memory["type"])}
    return sorted({field.name for field in dataclasses.fields(config)} | options)


def odd_config(**values):
    """A config of odd values, and its model without numbers: right, or refused in a sentence."""
    from mosaics import MosaicConfig
    from mosaics.training.setup import build_model

    config = result_or_sentence(lambda: MosaicConfig.from_preset("memory-mosaics-v2-tiny", **values))
    if config is not None:
        result_or_sentence(lambda: build_model(config, meta=True))


@target
def preset_overrides(folder, draw):
    """Odd overrides of a preset."""
    names = st.sampled_from([*config_keys(), "widow", *NAMES])
    overrides = draw(st.dictionaries(names, ODD_VALUES, min_size=1, max_size=3))
    overrides.pop("cls", None)  # Python itself refuses it: from_preset is a method of the class
    odd_config(**overrides)


# Text and tokenizers


def _texts(folder) -> dict[str, list[str]]:
    """What a prepared folder holds, decoded."""
    from mosaics.data import PreparedCorpus

    prepared, found = PreparedCorpus(folder), {}
    tokenizer = prepared.tokenizer()
    for name, counts in prepared.manifest["splits"].items():
        if counts["documents"]:
            split = prepared.split(name)
            borders = zip(split.offsets[:-1].tolist(), split.offsets[1:].tolist(), strict=True)
            ids = [split.read(*border)[1:-1] for border in borders]
            found[name] = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    return found


def _prepared_or_sentence(corpus, folder, *names, **options):
    """Prepares; whatever comes of it, nothing half done lies about."""
    from mosaics.data import open_corpus, prepare

    out = folder / "out" / "data"
    report = result_or_sentence(
        lambda: prepare(open_corpus(corpus) if isinstance(corpus, str) else corpus, out, vocab_size=300, **options),
        *names,
    )
    left = [path.name for path in (folder / "out").iterdir()] if (folder / "out").exists() else []
    assert left == (["data"] if report else []), left
    return out if report else None


@target
def corpus_files(folder, draw):
    """Files of any bytes under the names that are read."""
    source = folder / "texts"
    source.mkdir()
    record = json.dumps({"text": "one \u05d0\U0001f9e9", "n": 1}).encode()
    plain = {".txt": "two\0 \u05d0\u202e\U0001f9e9\n".encode() * 9, ".jsonl": b"\n".join([record] * 3), ".md": b"# x"}
    for number in range(draw(st.integers(1, 3))):
        suffix = draw(st.sampled_from(list(plain)))
        data = plain[suffix]
        if draw(st.booleans()):
            data = mutated(draw, data)
        packed = draw(st.sampled_from(["", "", ".gz", ".xz"]))
        data = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[packed](data)
        if packed and draw(st.booleans()):
            data = mutated(draw, data)
        (source / f"{number}{suffix}{packed}").write_bytes(data)
    _prepared_or_sentence(str(source), folder, "texts", "no text", "too short")


@target
def corpus_texts(folder, draw):
    """Any texts come back exactly; only empty ones are left out."""
    from mosaics.data import Corpus, Document

    text = st.text(st.characters(codec="utf-8"), max_size=60) | st.sampled_from(
        [
            "",
            "\0" * 9,
            "a" * 3000,
            " " * 300,
            "\u202e\u05e9\u05dc\u05d5\u05dd",
            "\U0001f469\u200d\U0001f467" * 9,
            "<|pad|>",
        ]
    )
    texts = draw(st.lists(text, min_size=1, max_size=6))
    corpus = Corpus("drawn", lambda: (Document(str(number), text) for number, text in enumerate(texts)))
    share = draw(st.sampled_from([0, 0.3]))
    out = _prepared_or_sentence(corpus, folder, "drawn", validation=share)
    filled = [text for text in texts if text]
    if out is None:
        assert not filled or (share and len(filled) == 1), texts
        return
    found = [text for texts in _texts(out).values() for text in texts]
    assert sorted(found) == sorted(filled) or (len(filled) == 1 and "".join(found) == filled[0])


@target
def corpus_that_changes(folder, draw):
    """A file that somebody writes to while it is read, in any of the passes over it."""
    from mosaics.data import Corpus, open_corpus

    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {number} of many"}) + "\n" for number in range(20)))
    read = open_corpus(path)
    left = draw(st.integers(0, 55))  # a pass reads 20; the last document of the last pass is nobody's concern
    change = draw(st.sampled_from([b'{"text": "more"}\n', b"", b"x"]))

    def documents():
        nonlocal left
        for document in read:
            if left == 0:
                path.write_bytes(change if draw_all else path.read_bytes() + change)
                os.utime(path, ns=(1, 1))
            left -= 1
            yield document

    draw_all = draw(st.booleans())
    out = _prepared_or_sentence(Corpus(str(path), documents), folder, path.name)
    assert out is None, "a corpus that changed was prepared"


@target
def tokenizer_files(folder, draw):
    """A tokenizer's files with odd values."""
    from mosaics.data.tokenizer import encode_pieces, load_tokenizer, token_bytes

    shutil.copytree(made.prepared() / "tokenizer", folder, dirs_exist_ok=True)
    path = folder / draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    data = path.read_bytes()
    if draw(st.booleans()):
        path.write_bytes(mutated(draw, data))
    else:
        tree = json.loads(data)
        if path.name == "tokenizer.json":  # most of it is the vocabulary
            vocabulary, merges = tree["model"].pop("vocab"), tree["model"].pop("merges")
            tree = mutated_tree(draw, tree)
            if isinstance(tree, dict) and isinstance(tree.get("model"), dict) and draw(st.booleans()):
                tree["model"] |= {"vocab": vocabulary, "merges": merges}
        else:
            tree = mutated_tree(draw, tree)
        path.write_bytes(json_text(tree))
    tokenizer = result_or_sentence(lambda: load_tokenizer(folder), folder)
    if tokenizer is not None:
        result_or_sentence(lambda: (token_bytes(tokenizer), encode_pieces(tokenizer, ["some text"])))


# Folders that were written here, and by strangers


def _damaged(folder, draw, files) -> str:
    """Changes one of the files for good; its name."""
    name = draw(st.sampled_from(sorted(files)))
    path = folder / name
    before = path.read_bytes()
    if draw(st.integers(0, 9)) == 0:
        path.unlink()
        return name
    if name.endswith(".json") and draw(st.booleans()):
        path.write_bytes(json_text(mutated_tree(draw, json.loads(before))))
    elif name.endswith(".safetensors") and draw(st.booleans()):
        path.write_bytes(_header_changed(draw, before))
    else:
        path.write_bytes(mutated(draw, before))
    return name


def _header_changed(draw, data: bytes) -> bytes:
    """A safetensors file whose header says something else: shapes, types, places, or its own size."""
    size = struct.unpack("<Q", data[:8])[0]
    if draw(st.booleans()):
        size = draw(st.sampled_from([0, 1, size - 1, size + 1, 10**8, 2**63, 2**64 - 1]))
        return struct.pack("<Q", size) + data[8:]
    header = json.loads(data[8 : 8 + size])
    name = draw(st.sampled_from(sorted(header)))
    changes = {
        "dtype": ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "X"],
        "shape": [[], [0], [1], [16, 300], [2**62, 4], [-1], "x"],
        "data_offsets": [[0, 0], [0, 4], [4, 0], [-1, 4], [0, 2**63], [0, 19200]],
    }
    key = draw(st.sampled_from(list(changes)))
    how = draw(st.sampled_from(["value", "value", "name", "remove"]))
    if how == "value" and isinstance(header[name], dict):
        header[name][key] = draw(st.sampled_from(changes[key]))
    elif how == "name":
        header[draw(st.sampled_from(["../x", "", "model.norm.weight", "x" * 999]))] = header.pop(name)
    else:
        del header[name]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _files(folder) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _signed(folder) -> None:
    """Makes the hashes of a checkpoint's or export's manifest those of its files, as a stranger would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {
        name: {
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
            "bytes": (folder / name).stat().st_size,
        }
        for name in manifest["files"]
        if (folder / name).exists()
    }
    if manifest.pop("digest", None):
        manifest["digest"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest))


def _weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@target
def prepared_folder(folder, draw):
    """A damaged prepared corpus: what it was, or refused."""
    from mosaics.data import PackedDataset

    def rows():
        return PackedDataset(copy, "train", 48).batch(0, 4)

    copy = shutil.copytree(made.prepared(), folder / "data")
    right = rows()
    _damaged(copy, draw, _files(copy))
    found = result_or_sentence(rows, copy)
    assert found is None or all(torch.equal(found[k], right[k]) for k in ("input_ids", "labels"))


@target
def prepared_by_stranger(folder, draw):
    """A prepared corpus whose hashes are right and whose content is odd."""
    from mosaics.data import PackedDataset, shards

    copy = shutil.copytree(made.prepared(), folder / "data")
    name = draw(
        st.sampled_from(["train/offsets.npy", "train/text_bytes.npy", "train/tokens-00000.bin", "token_bytes.npy"])
    )
    path = copy / name
    if name.endswith(".npy"):
        array = np.load(path).copy()
        place = draw(st.integers(0, len(array) - 1))
        how = draw(st.sampled_from(["value", "value", "short", "dtype", "shape", "bytes"]))
        if how == "value":
            array[place] = draw(
                st.sampled_from([-1, 0, 1, 10**6, np.iinfo(array.dtype).max, np.iinfo(array.dtype).min])
            )
        elif how == "short":
            array = array[:place]
        elif how == "dtype":
            array = array.astype(draw(st.sampled_from(["float64", "uint8", "int16", "S4", "?"])))
        elif how == "shape":
            array = array[None]
        np.save(path, array)
        if how == "bytes":
            path.write_bytes(mutated(draw, path.read_bytes()))
    else:
        tokens = np.fromfile(path, "<u2")
        tokens[draw(st.integers(0, len(tokens) - 1))] = draw(st.sampled_from([0, 1, 299, 300, 65535]))
        tokens.tofile(path)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest.pop("digest")
    (copy / "manifest.json").write_text(json.dumps(manifest | {"digest": shards._digest(manifest)}))

    def rows():
        data = PackedDataset(copy, "train", 48)
        return [batch for batch in data.batches(64)]

    batches = result_or_sentence(rows, copy)
    for batch in batches or ():
        assert 0 <= batch["input_ids"].min() and batch["input_ids"].max() < 300
        assert batch["text_bytes"].min() >= 0


def _checkpoint(root):
    """The newest whole checkpoint under `root`, loaded: weights and state; None if there is none."""
    from mosaics.training.checkpoint import load_checkpoint, newest_checkpoint
    from mosaics.training.optimizer import make_optimizer
    from mosaics.training.setup import build_config, build_model

    recipe = made.recipe()
    from mosaics.data import PreparedCorpus

    model = build_model(build_config(recipe, PreparedCorpus(made.prepared()).tokenizer()))
    optimizer = make_optimizer(model, recipe.training)
    found, _ = newest_checkpoint(root)
    state = load_checkpoint(found, model, optimizer)
    return _weights(model), state


@target
def checkpoint_folder(folder, draw):
    """A damaged checkpoint: refused, or exactly what was saved."""
    newest = max(path.name for path in (made.run() / "checkpoints").iterdir() if path.name.startswith("step-"))
    copy = shutil.copytree(made.run() / "checkpoints" / newest, folder / newest)
    right = _checkpoint(folder)
    _damaged(copy, draw, _files(copy))
    found = result_or_sentence(lambda: _checkpoint(folder), folder)
    assert found is None or (_same(found[0], right[0]) and found[1] == right[1])


@target
def checkpoint_by_stranger(folder, draw):
    """A checkpoint whose hashes are right and whose content is odd."""
    newest = max(path.name for path in (made.run() / "checkpoints").iterdir() if path.name.startswith("step-"))
    copy = shutil.copytree(made.run() / "checkpoints" / newest, folder / newest)
    _damaged(copy, draw, [name for name in _files(copy) if name != "manifest.json"])
    _signed(copy)
    found = result_or_sentence(lambda: _checkpoint(folder), folder)
    assert found is None or all(torch.isfinite(value).all() for value in found[0].values())


@target
def exported_folder(folder, draw):
    """A damaged exported model: refused, or exactly what was exported."""
    from mosaics.models.loading import load_exported, load_model

    copy = shutil.copytree(made.exported(), folder / "model")
    right = _weights(load_model(copy))
    _damaged(copy, draw, [name for name in _files(copy) if name != "README.md"])
    found = result_or_sentence(lambda: load_exported(copy), copy)
    assert found is None or _same(_weights(found[0]), right)


@target
def exported_by_stranger(folder, draw):
    """An exported model without hashes and with odd content: it generates, or is refused."""
    copy = shutil.copytree(made.exported(), folder / "model")
    (copy / "manifest.json").unlink()
    _damaged(copy, draw, [name for name in _files(copy) if name != "README.md"])
    command("generate", copy, "--prompt", "import os", "--max-new-tokens", 2, "--temperature", 0)


@target
def memory_file(folder, draw):
    """A damaged memory of a context: what was kept, or refused."""
    from mosaics.models.memory_file import load_memory

    copy = shutil.copytree(made.memory(), folder, dirs_exist_ok=True)
    (name,) = _files(copy)
    more = torch.tensor([[5, 6, 7]])
    cache, ids = load_memory(copy / name, _model())
    right = _model()(more, past_key_values=cache).logits
    _damaged(copy, draw, [name])
    found = result_or_sentence(lambda: load_memory(copy / name, _model()), copy)
    assert found is None or (
        torch.equal(found[1], ids) and torch.equal(_model()(more, past_key_values=found[0]).logits, right)
    )


@target
def memory_by_stranger(folder, draw):
    """A memory of a context whose hash is right and whose content is odd: it answers, or is refused."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from mosaics.models import memory_file

    (name,) = _files(made.memory())
    with safe_open(made.memory() / name, "pt") as file:
        about = json.loads(file.metadata()["mosaics"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    key = draw(st.sampled_from(sorted(tensors)))
    how = draw(st.sampled_from(["shape", "dtype", "value", "remove", "about"]))
    value = tensors[key]
    if how == "shape":
        tensors[key] = draw(st.sampled_from([value[None], value[..., :1].clone(), value.flatten(), value[:0].clone()]))
    elif how == "dtype":
        tensors[key] = value.to(draw(st.sampled_from([torch.float64, torch.int64, torch.bool, torch.float16])))
    elif how == "value":
        odd = [-1, 0, 10**6, *([float("nan")] if value.is_floating_point() else [])]
        tensors[key] = torch.full_like(value, draw(st.sampled_from(odd)))
    elif how == "remove":
        del tensors[key]
    else:
        about = json.loads(json_text(mutated_tree(draw, about)))
    if isinstance(about, dict):
        about.pop("sha256", None)
        about["sha256"] = memory_file._digest(about, tensors)
    save_file(tensors, folder / name, {"mosaics": json_text(about).decode()})
    words = ["--prompt", "a", "--max-new-tokens", 2, "--temperature", 0]
    command("generate", made.exported(), "--memory", folder / name, *words)


@target
def run_folder(folder, draw):
    """A run folder whose recipe or log is damaged: continued, or refused."""
    from mosaics.training import train

    copy = shutil.copytree(made.run(), folder / "run")
    name = draw(st.sampled_from(["recipe.yaml", "metrics.jsonl"]))
    shutil.rmtree(copy / "export")
    (copy / "curves.png").unlink()
    if draw(st.booleans()) and name == "metrics.jsonl":
        lines = [json.loads(line) for line in (copy / name).read_text().splitlines()]
        (copy / name).write_bytes(b"\n".join(map(json_text, mutated_tree(draw, lines))))
    else:
        (copy / name).write_bytes(mutated(draw, (copy / name).read_bytes()))
    result_or_sentence(lambda: train(made.recipe(), copy), copy, "recipe")


# Evaluation


def _sums():
    from mosaics.evaluation import Example, Record, Suite

    class Sums(Suite):
        """Sums of small numbers."""

        name: ClassVar[str] = "sums"
        block: ClassVar[int] = 2

        def examples(self, scorer):
            return [Example(f"{i}", f"{i}+1=", [str(i + 1)], meta={"even": i % 2 == 0}) for i in range(5)]

        def answer(self, scorer, examples):
            return [Record.of(e, e.references[0], True) for e in examples]

        def summarise(self, records):
            right = sum(record.score for record in records)
            return {"tables": {"all": [{"right": right, "even": sum(record.meta["even"] for record in records)}]}}

    return Sums()


@target
def result_files(folder, draw):
    """A damaged log of answers: the evaluation goes on to the same result, or is refused."""
    from mosaics.evaluation import evaluate

    right = evaluate(_sums(), SimpleNamespace(), folder)
    path = folder / "examples.jsonl"
    if draw(st.booleans()):
        lines = path.read_text().splitlines()
        place = draw(st.integers(0, len(lines) - 1))
        lines[place] = json_text(mutated_tree(draw, json.loads(lines[place]))).decode()
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_bytes(mutated(draw, path.read_bytes()))
    found = result_or_sentence(lambda: evaluate(_sums(), SimpleNamespace(), folder), folder)
    # What an answer says may have been changed by hand; what was asked may not.
    assert found is None or [e["id"] for e in found["examples"]] == [e["id"] for e in right["examples"]]


@target
def question_files(folder, draw):
    """Damaged files of questions."""
    from mosaics.cli.evaluate import make_suite

    csv = b'text,category\n"where is my card?",card\n"top up, now",top_up\nwhy,card\nhow,top_up\n'
    tsv = b"some text\t0\tid1\nother\t1\tid2\nmore\t0,1\tid3\nyet\t0\tid4\nthe\t1\tid5\n"
    instance = {"tokens": ["a", "b", "c"], "h": ["a", "Q1", [[0]]], "t": ["b", "Q2", [[1]]]}
    fewrel = json.dumps({"P1": [instance] * 9, "P2": [instance] * 9}).encode()
    kinds = {
        "banking77": {"banking77_train": csv, "banking77_test": csv},
        "goemotions": {"goemotions_train": tsv, "goemotions_test": tsv, "goemotions_labels": b"joy\nfear\n"},
        "fewrel": {"fewrel": fewrel},
        "babi": dict.fromkeys(("babi_train", "babi_test"), b"1 A ran.\n2 Who?\tA\t1\n3 B sat.\n4 Who?\tB\t3\n"),
    }
    kind = draw(st.sampled_from(list(kinds)))
    damaged = draw(st.sampled_from(list(kinds[kind])))
    words = []
    for name, data in kinds[kind].items():
        path = folder / f"{name}{'.json' if kind == 'fewrel' else '.csv'}"
        if name == damaged:
            if kind == "fewrel" and draw(st.booleans()):
                data = json_text(mutated_tree(draw, json.loads(data)))
            else:
                data = mutated(draw, data)
            if draw(st.integers(0, 4)) == 0:
                path = path.with_name(f"{path.name}.gz")
                data = draw(st.sampled_from([gzip.compress(data), data]))
        path.write_bytes(data)
        words.append(f"{name}={path}")
    suite = make_suite("in-context-learning", words, {"tasks": (kind,), "shots": (1,), "samples": 2})
    result_or_sentence(lambda: list(suite.examples(SimpleNamespace())), folder, kind)


# Requests


@target
def generate_options(folder, draw):
    """Odd requests on the command line."""
    number = st.sampled_from(["-1", "0", "1", "3", "1e9", "nan", "inf", "-inf", "1e-300", "x", "", "0.5", str(2**70)])
    prompt = draw(st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(["", "\0", "import " * 60]))
    words = [
        "generate",
        made.exported(),
        "--prompt",
        prompt,
        "--max-new-tokens",
        draw(st.sampled_from(["2", "-3", "0", "x"])),
    ]
    for option in draw(st.lists(st.sampled_from(["--temperature", "--top-p", "--seed"]), unique=True)):
        words += [option, draw(number)]
    said = command(*words)
    assert said is None or said.startswith(prompt) or not prompt.isprintable() or "<|" in prompt


@target
def generate_calls(folder, draw):
    """Odd arguments of `generate` and of the model's own call."""
    model = _model()
    ids = st.integers(0, 299) | st.sampled_from([-1, -(2**63), 300, 2**31, 2**63 - 1])
    rows = draw(st.integers(0, 2))
    inputs = torch.tensor(
        [draw(st.lists(ids, min_size=3, max_size=3)) for _ in range(rows)] or np.zeros((1, 0)).tolist(),
        dtype=torch.long,
    )
    right = inputs.numel() > 0 and 0 <= inputs.min() and inputs.max() < 300
    logits = result_or_sentence(lambda: model(inputs).logits)
    assert (logits is not None) == right
    assert logits is None or torch.isfinite(logits).all()
    options = {
        "max_new_tokens": [2, 2, 2, 0, -1],
        "temperature": [1.0, 0.0, -1.0, float("nan"), float("inf")],
        "top_p": [1.0, 0.5, 0.0, -1.0, 2.0, float("nan")],
        "num_beams": [1, 2],
        "do_sample": [True, False],
    }
    chosen = {name: draw(st.sampled_from(values)) for name, values in options.items()}
    tokens = result_or_sentence(lambda: model.generate(inputs, pad_token_id=2, **chosen))
    assert tokens is None or (right and tokens.min() >= 0 and tokens.max() < 300 and tokens.shape[1] <= 5)


@target
def loss_calls(folder, draw):
    """Odd labels, and inputs of odd kinds."""
    model, odd = _model(), st.sampled_from([-1, -100, -101, 0, 5, 299, 300, 2**31, -(2**63)])
    ids = torch.tensor(draw(st.lists(st.integers(0, 299), min_size=4, max_size=4)))[None]
    labels = torch.tensor(draw(st.lists(odd, min_size=4, max_size=4)))[None]
    kinds = [torch.int64, torch.int64, torch.int32, torch.float32, torch.bool, torch.complex64]
    kind = draw(st.sampled_from(kinds))
    asked = ids.to(draw(st.sampled_from(kinds[:4])))
    output = result_or_sentence(lambda: model(asked, labels=labels.to(kind), loss_only=draw(st.booleans())))
    counted = labels.to(kind)[:, 1:] if kind in kinds[:3] else None
    right = counted is not None and bool(((counted == -100) | ((counted >= 0) & (counted < 300))).all())
    assert (output is not None) == (right and not asked.is_floating_point())
    assert output is None or torch.isfinite(output.loss)


@target
def score_calls(folder, draw):
    """Odd questions to a scorer."""
    from mosaics.evaluation import Example, Scorer

    scorer = Scorer(_model(), _tokenizer(), limit=draw(st.sampled_from([None, 8, 64])))
    text = st.text(max_size=12)
    ids = st.integers(0, 299) | st.sampled_from([-1, -2, -100, 300, 2**31, -(2**63)])
    prompt = draw(text | st.lists(ids, max_size=4))
    choices = draw(st.lists(text | st.just(""), min_size=0, max_size=3))
    example = Example("odd", prompt, ["x"], choices=choices, prefix=draw(text) if isinstance(prompt, str) else "")
    result_or_sentence(lambda: scorer.best([example]))
    answers = result_or_sentence(lambda: scorer.complete([example], draw(st.sampled_from([0, 2, -1])), ["\n"]))
    assert answers is None or all(isinstance(answer, str) for answer in answers)


_LOADED: list = []


def _model():
    from mosaics.models.loading import load_exported

    if not _LOADED:
        _LOADED.extend(load_exported(made.exported()))
    return _LOADED[0]


def _tokenizer():
    _model()
    return _LOADED[1]
