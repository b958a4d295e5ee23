"""Every claim is about what models can see, and every one of its checks can hold and can fail."""

import pytest
import torch

from mosaics import MosaicForCausalLM
from mosaics.data.worlds import World, world_tokenizer
from mosaics.experiments import claims, claims_v1, evidence
from mosaics.experiments.claims import ARRANGEMENTS
from mosaics.experiments.evidence import FAILS, HOLDS, judge
from mosaics.experiments.questions import WorldQuestions
from mosaics.experiments.trainings import Training
from mosaics.training.setup import build_config

ALL = claims.CLAIMS | claims_v1.CLAIMS | claims.PROOF | claims.REAL
CHECKS = [(claim, number) for claim in ALL.values() for number in range(len(claim.checks))]
POINTS = 8


def sides(check, good: bool) -> list[dict]:
    """Rows of three seeds that say clearly that a check holds, or that it does not."""
    up = good == (check.relation == ">=")
    found = []
    for term, higher in ((check.left, up), (check.right, not up)):
        if term is None or term.measure == "steps":
            continue
        values = [400.0 if higher else 0.0] * POINTS if term.measure == "value" else [0.0] * POINTS
        if term.measure == "fall" and higher:
            values[0] = 400.0
        if term.measure == "rise" and higher:
            values[-1] = 400.0
        if term.measure == "spread":
            values = [1.0, 9.0] * (POINTS // 2) if higher else [2.0] * POINTS
        about = {"arrangement": term.arrangement, "setting": term.setting, "evaluation": term.evaluation}
        same = next((r for r in found if about.items() <= r.items()), None)
        for seed in range(3):
            if same is None:
                found += [about | {"seed": seed, "x": x, "y": y} for x, y in enumerate(values)]
        if same is not None:  # two points of one curve
            for row in found:
                if row["x"] == term.at % POINTS:
                    row["y"] = values[term.at]
    return found


@pytest.mark.parametrize(("claim", "number"), CHECKS, ids=lambda v: getattr(v, "name", str(v)))
def test_every_check_can_hold_and_can_fail(claim, number, monkeypatch):
    monkeypatch.setattr(evidence, "RESAMPLES", 200)  # what is told apart here is far apart
    check = claim.checks[number].model_copy(update={"kind": "claim", "given": None})
    alone = claim.model_copy(update={"checks": (check,)})
    for good, expected in ((True, HOLDS), (False, FAILS)):
        models = []
        for term, few in (
            (check.left, good == (check.relation == "<=")),
            (check.right, good != (check.relation == "<=")),
        ):
            about = {} if term is None else {"arrangement": term.arrangement, "setting": term.setting, "trial": False}
            models += [
                about | {"seed": seed, "enough_at": 10 if few else None, "steps": 900} for seed in range(3) if about
            ]
        found = judge(alone, {"rows": sides(check, good), "models": models})
        assert found["verdict"] == expected, (check.says, found)


@pytest.mark.parametrize("claim", [c for c in ALL.values() if c.checks], ids=lambda claim: claim.name)
def test_a_claim_is_not_decided_by_premises_and_controls_alone(claim):
    assert any(check.kind == "claim" for check in claim.checks)


SETTINGS = claims.settings(samples=8)
ASKED = sorted(
    {
        (label, setting, evaluation.name)
        for claim in (claims.CLAIMS | claims.PROOF).values()
        for setting, name in claim.asks
        for label in claim.only.get(setting, claim.arrangements)
        for evaluation in SETTINGS[setting].evaluations
        if evaluation.name == name and evaluation.suite == "world" and not evaluation.without
    }
)


def seen(model, ids: list[int], places: list[int]) -> float:
    """How far the forecast at the end moves when the tokens at the places are replaced by another."""
    changed = torch.tensor([ids])
    changed[0, places] = 7
    with torch.no_grad():
        logits = [model(x, use_cache=False).logits[0, -1] for x in (torch.tensor([ids]), changed)]
    return (logits[0] - logits[1]).abs().max().item()


@pytest.mark.parametrize(("label", "name", "evaluation"), ASKED)
def test_all_that_are_compared_can_see_the_evidence(label, name, evaluation):
    """Replace the words that hold the answer, at the first point: the forecast of the answer must move, in a model as
    it starts, with weights so large that nothing drowns."""
    setting = SETTINGS[name]
    job = Training(ARRANGEMENTS[label], ARRANGEMENTS["memory-mosaics-v2"], setting, 0)
    torch.manual_seed(0)
    model = MosaicForCausalLM(build_config(job.recipe, world_tokenizer())).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    [asked] = [e for e in setting.evaluations if e.name == evaluation]
    options = asked.options | ({"shots": asked.options["shots"][:1]} if asked.options.get("shots") else {})
    options |= {"lengths": asked.options["lengths"][:1]} if asked.options.get("lengths") else {}
    moved = []
    for _, example in WorldQuestions(**options | {"samples": 4}).asked():
        ids, answer = example.prompt_ids, example.answer_id
        places = [place for place, token in enumerate(ids) if token == answer]
        if places:
            moved.append(seen(model, ids, places))
    # Persistent knowledge is not in the context: there nothing may be seen, and nothing is asked of it.
    if setting.name == "mixed" and "persistent" in evaluation:
        return
    assert moved and min(moved) > 1e-6


def test_the_evidence_is_not_seen_by_a_split_attention_that_reads_neither_near_nor_far():
    """As it was: window and delay in both halves, so that each read the same few pairs."""
    setting = SETTINGS["in-context-learning"]
    blind = ARRANGEMENTS["transformer-long-short"].model_copy(
        update={"overrides": {f"{half}.{k}": v for half in ("short_term", "long_term") for k, v in _BLIND.items()}}
    )
    job = Training(blind, ARRANGEMENTS["memory-mosaics-v2"], setting, 0)
    model = MosaicForCausalLM(build_config(job.recipe, world_tokenizer())).double().eval()
    example = next(World(0).examples("in-context-learning", 1, shots=4))
    ids = example.prompt_ids
    near = [place for place, token in enumerate(ids) if token == example.answer_id and len(ids) - place < 30]
    far = [place for place, token in enumerate(ids) if token == example.answer_id and place not in near]
    assert far and seen(model, ids, far) == 0


_BLIND = {"window": 16, "delay": 4}
