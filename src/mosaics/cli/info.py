"""`mosaics info`: parameters, work and decoding state of a model, or what this machine has."""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

EXAMPLE = "mosaics info memory-mosaics-v2-large --context 256 --without long_term"


def info(
    source: Annotated[str | None, Argument(metavar="[PRESET|CHECKPOINT|RUN|RECIPE]", help="What to look at.")] = None,
    context: Annotated[int | None, Option(help="Context in tokens; the training context if not given.")] = None,
    without: Annotated[list[str] | None, Option(metavar="MEMORY", help="Leave out, as long_term.")] = None,
    state_dtype: Annotated[
        str | None, Option(help="How the pairs of the context are kept: bfloat16 or int8; else as they are computed.")
    ] = None,
    tensors: Annotated[bool, Option("--tensors", help="List every tensor and its shape.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
    system: Annotated[
        bool, Option("--system", help="Print versions, devices and which forms of the ops run here and why.")
    ] = False,
) -> None:
    """Print parameters by kind of memory, FLOPs per token and bytes of decoding state at a context length."""
    if system:
        if source is not None or context is not None or without or state_dtype or tensors:
            raise ValueError("--system is about this machine; leave out the model and what is asked of it")
        _show_system(as_json)
        return
    if source is None:
        raise ValueError("name a preset, checkpoint, run or recipe, or give --system for this machine")
    from mosaics.training.setup import build_model

    config = find_config(source)
    length = context if context is not None else config.max_position_embeddings
    if length < 1:
        raise ValueError(f"--context is {length}; it must be at least 1")
    config.state_dtype = state_dtype or config.state_dtype
    model = build_model(config, meta=True)
    for kind in without or ():
        model.remove_memories(kind)
    described = {"model": source, "context_length": length} | model.describe(context_length=length)
    if tensors:
        described["tensors"] = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if as_json:
        print(json.dumps(described, indent=2))
        return
    from mosaics.cli.tables import amount, show_table, size

    parameters = described["parameters"]
    show_table(
        f"{source} without {', '.join(without)}" if without else source,
        [
            ("parameters", f"{parameters['total']:,} ({amount(parameters['total'])})"),
            *((f"  {kind}", f"{count:,}") for kind, count in parameters["by_kind"].items()),
            (f"FLOPs per token at {length:,}", f"{described['flops_per_token'] / 1e9:.4g} GFLOPs"),
            (f"decoding state at {length:,}", size(described["state_bytes"])),
        ],
    )
    if tensors:
        show_table("tensors", [(name, "x".join(map(str, shape))) for name, shape in described["tensors"].items()])


def _show_system(as_json: bool) -> None:
    from mosaics.cli.tables import show_table
    from mosaics.system import describe

    found = describe()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    machine, compiler = found["machine"], found["compiler"]
    show_table("versions", [(name, version or "not installed") for name, version in found["versions"].items()], "<")
    rows = [
        ("platform", machine["platform"]),
        ("processor", f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads used"),
        ("vectors", f"torch uses {machine['vectors']}"),
    ]
    for name, about in found["devices"].items():
        taken = " (taken by default)" if name == found["default_device"] else ""
        rows.append((name, about["about"] + taken if about["there"] else f"no: {about['about']}"))
    show_table("machine", rows, "<")
    rows = [("command", compiler["command"] or "none"), ("version", compiler["version"] or "")]
    rows += [("options", " ".join(compiler["options"])), ("kept in", compiler["cache"] or "nowhere")]
    rows += [(name, compiler[name]) for name in compiler if name.isupper() and compiler[name] is not None]
    if compiler["trouble"]:
        rows.append(("trouble", compiler["trouble"]))
    show_table("C++ compiler", [(name, value) for name, value in rows if value], "<")
    for device, ops in found["forms"].items():
        rows = [(f"{op}, {use}", form) for op, uses in ops.items() for use, form in uses.items()]
        show_table(f"forms on {device}", rows, "<")
    rows = [(f"{op}, {form}", why) for op, forms in found["why"].items() for form, why in forms.items()]
    show_table("forms that not every machine has", rows, "<")


def find_config(source: str):
    """The model configuration of a preset, a recipe, a run, a checkpoint or an exported model.

    Raises:
        ValueError: it is none of them.
    """
    import mosaics
    from mosaics.models.loading import load_config
    from mosaics.models.presets import PRESETS
    from mosaics.training.recipe import load_recipe, shipped_recipes
    from mosaics.training.setup import build_config, start_source

    path = Path(source)
    if path.is_dir():
        if (path / "config.json").is_file():
            config = load_config(path)
            if not isinstance(config, mosaics.MosaicConfig):
                raise ValueError(f"{source} holds a {config.model_type}, not a mosaic")
            return config
        if (path / "recipe.yaml").is_file():
            return _of_run(path)
        raise ValueError(f"{source} is neither a model (config.json) nor a run (recipe.yaml)")
    if source in PRESETS:
        return mosaics.MosaicConfig.from_preset(source)
    if path.is_file() or source in shipped_recipes():
        recipe = load_recipe(source)
        return build_config(recipe, source=start_source(recipe))
    return mosaics.MosaicConfig.from_preset(source)  # refused, with the nearest name


def _of_run(run: Path):
    """The config of a run, which need not have a checkpoint yet."""
    from mosaics.data import PreparedCorpus
    from mosaics.training.checkpoint import checkpoint_steps
    from mosaics.training.recipe import data_of, open_recipe
    from mosaics.training.setup import build_config, start_source
    from mosaics.training.sources import find_source

    if checkpoint_steps(run / "checkpoints") or (run / "export").is_dir():
        return find_source(run).config()
    recipe = open_recipe(run)
    return build_config(recipe, PreparedCorpus(data_of(run, recipe)).tokenizer(), start_source(recipe))
