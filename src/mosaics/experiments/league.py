"""`compare --systems`: one memory after the other in the same place, on equal terms, a task for all before the next.

What is known can be shown at any time; what was not run is listed as such.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mosaics.experiments.claims import ENOUGH
from mosaics.experiments.claims_v1 import regbench_setting
from mosaics.experiments.compare import (
    TRIED_ON_TEXT,
    arrangements,
    check_changes,
    text_setting,
    tried,
    world_evaluation,
    world_setting,
)
from mosaics.experiments.studies import Plan, run_study, some_examples
from mosaics.experiments.study import Arrangement, Probe, Setting, Study

NAME = "league"
NEEDLE = "needle"
# What the papers of the systems claim, at their own size.
CLAIMED = {
    "memory-mosaics-v2": "equals Transformers in trained knowledge, beats them clearly in new knowledge and in context",
    "memory-mosaics-v1": "equals GPT-2 on stories and needs fewer examples of a new language",
    "transformer": "the baseline of all of them",
    "linear-attention": "like softmax attention, and up to 4000 times faster in generating very long sequences",
    "retention": "competitive with Transformers, with decoding at a cost that does not grow",
    "gla": "competitive with a Llama at 1.3 B parameters; trained at 2k it extrapolates beyond 20k",
    "mamba2": "as good as Mamba and Transformers of equal size, 2 to 8 times faster than Mamba's layer",
    "deltanet": "better than Mamba and GLA in perplexity and recall at 1.3 B parameters",
    "gated-deltanet": "better than Mamba-2 and DeltaNet in language, retrieval in context and length extrapolation",
    "kda": "hybrids with it beat full attention under the same recipe, with a quarter of its cache",
    "ttt-linear": "matches Transformers and Mamba from 125 M to 1.3 B parameters; goes on falling beyond 16k tokens",
    "ttt-mlp": "as TTT-Linear, and more promising in long contexts",
    "mom": "better than Gated DeltaNet in recall, near a Transformer at 1.3 B parameters",
    "gam": "trains faster than a Transformer and Mamba, and reaches a lower perplexity on small texts",
    "titans-lmm": "beats Transformers and linear recurrent models; finds needles in more than 2 M tokens",
    "lla": "better than softmax attention and linear recurrent models in associative recall and regression in context",
    "parallax": "lower perplexity than Transformers at 0.6 B and 1.7 B parameters with Muon, hardly with AdamW",
    "lattice": "lower perplexity than Transformers and linear recurrent models, the more so the longer the context",
    "omeganet": "lower perplexity than Titans and Transformers at 760 M; the window and polynomials matter most",
    "atlas": "beats Titans and Transformers in language; keeps 80 % on BABILong at 10 M tokens",
    "atlas-plus": "as Atlas, with a gated network inside: the best average accuracy of the three at 760 M",
    "dla": "linear attention with a deep memory; at 1.3 B short of Titans (arXiv 2602.24281)",
    "swla": "linear attention that writes the last two tokens at once; no figure of it is known here",
    "deep-transformer": "a strict generalisation of softmax attention without its sum; no figure of it is known here",
    "swdt": "a DeepTransformer that writes a window of tokens at once; no figure of it is known here",
    "dot": "a DeepTransformer that learns by the squared error of a window; no figure of it is known here",
    **dict.fromkeys(
        ("moneta", "yaad", "memora"),
        "beats Transformers and linear recurrent models in language, common sense and recall, each in some tasks",
    ),
    "rmt": "as good as Transformer-XL with a far smaller memory, perfect on copying over nine segments",
    "titans-mac": "better than Titans' memory alone, by the most where contexts are long",
    "titans-mag": "better than Titans' memory alone, and the best of the three blocks in perplexity",
    "titans-mal": "better than Titans' memory alone in perplexity and where contexts are long",
}


def systems(names: Sequence[str]) -> list[str]:
    """Presets by name, with or without their size; `all` stands for every one that is `tiny` and may be asked at any
    length: without learned positions.

    Raises:
        ValueError: there is no such preset.
    """
    from mosaics.models import PRESETS

    tiny = [name for name in PRESETS if name.endswith("-tiny") and "long-short" not in name]
    found: list[str] = []
    for name in names:
        if name == "all":
            any_length = [preset for preset in tiny if PRESETS[preset].get("learned_positions") is None]
            found += [preset for preset in any_length if preset not in found]
            continue
        preset = name if name in PRESETS else f"{name}-tiny"
        if preset not in PRESETS:
            near = get_close_matches(preset, tiny, 1)
            raise ValueError(
                f"there is no system {name!r}; "
                + (f"did you mean {near[0].removesuffix('-tiny')}?" if near else "mosaics info lists the presets")
            )
        found.append(preset)
    return found


def league(
    presets: Sequence[str],
    worlds: Sequence[str],
    corpus: str | None,
    *,
    automata: int | None = None,
    field: str = "text",
    seeds: Sequence[int] = (0, 1),
    learning_rates: Sequence[float] = (),
    tune: bool = False,
    samples: int = 200,
    changes: dict[str, Any] | None = None,
) -> Study:
    """All systems, the first of which the others are matched to, and the tasks in their order. Who has learnt facts of
    the context is also asked for one fact in a long text.

    Args:
        presets: of the systems.
        worlds: tasks of the synthetic worlds; training ends when they are learnt.
        corpus: text; None for none.
        automata: of RegBench, as many to learn from; None: without.
        field: of .jsonl records.
        seeds: of the trainings.
        learning_rates: the tuning trials of every system in every task.
        tune: try both initial values and rotary bases of attention, too, and rates on beyond the edge.
        samples: questions for each length or number of shots.
        changes: values by dotted key for all trainings.
    """
    more: dict[str, Any] = {"changes": changes, "samples": samples} | tried(learning_rates, tune, TRIED_ON_TEXT)
    found: list[Setting] = []
    for world in worlds:
        setting = world_setting(world, probe=Probe(every=25, enough=ENOUGH), **more)
        if world == "new-knowledge":
            length = setting.training["context_length"]
            one = {"name": NEEDLE, "title": "One fact in a long text", "options": {"settings": {"facts": 1}}}
            needle = world_evaluation(world, length, samples, **one)
            setting = setting.model_copy(update={"evaluations": (*setting.evaluations, needle)})
        found.append(setting)
    if automata is not None:
        found.append(regbench_setting(automata, **more))
    if corpus is not None:
        probe = Probe(every=100, rows=32)
        found.append(text_setting(corpus, field=field, probe=probe, **more | {"samples": max(1, samples // 8)}))
    if not found:
        raise ValueError("there is nothing to train on; name --worlds, --automata or --text")
    taking_part = arrangements(presets, tune=tune)
    check_changes(changes, taking_part)
    return Study(
        title="Memories in the same place",
        arrangements=taking_part,
        settings=tuple(found),
        seeds=tuple(seeds),
    )


def run_league(
    study: Study, cache: Path, jobs: int = 1, kept: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Do what the cache does not hold yet, a task for all systems before the next.

    Args:
        study: as `league` gives it.
        cache: of trained models and answers; an interrupted league goes on from there.
        jobs: processes that train side by side.
        kept: is told the results so far after every system in every task.

    Returns:
        As `run_study`, with `costs`: for each system and task the bytes of its decoding state at 1 and 8 times the
        training length.

    Raises:
        ValueError: a system or a setting is impossible; nothing was trained then.
        OSError: there is no such text.
    """
    Plan(study, cache)
    first = study.arrangements[0]
    results: dict[str, Any] = {"study": study.model_dump(mode="json")}
    results |= {"models": [], "rows": [], "baselines": [], "costs": []}
    for setting in study.settings:
        for arrangement in study.arrangements:
            both = (first,) if arrangement is first else (first, arrangement)
            part = run_study(study.model_copy(update={"arrangements": both, "settings": (setting,)}), cache, jobs)
            for key in ("models", "rows"):
                results[key] += [entry for entry in part[key] if entry["arrangement"] == arrangement.label]
            if arrangement is first:
                results["baselines"] += part["baselines"]
            results["costs"].append(_cost(study, arrangement, setting, cache))
            results["machine"] = part["machine"]
            if kept is not None:
                kept(results)
    results["examples"] = some_examples(Plan(study, cache), cache)
    return results


def _cost(study: Study, arrangement: Arrangement, setting: Setting, cache: Path) -> dict[str, Any]:
    from mosaics.training.setup import build_config, build_model

    recipe = Plan(study, cache).job(arrangement, setting, study.seeds[0]).recipe
    model, length = build_model(build_config(recipe), meta=True), recipe.training.context_length
    state = [model.describe(times * length)["state_bytes"] for times in (1, 8)]
    return {"setting": setting.name, "arrangement": arrangement.label, "state_bytes": state}
