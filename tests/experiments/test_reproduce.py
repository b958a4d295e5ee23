"""Claims are judged by every seed, and are about what is trained and asked."""

import json

import pytest
from tests.experiments.conftest import MICRO

from mosaics.experiments import claims_v1
from mosaics.experiments.claims import ARRANGEMENTS, CLAIMS, PROOF, REAL, settings, study_of
from mosaics.experiments.compare import TRIED_ON_TEXT, TUNING
from mosaics.experiments.real_tasks import real_tasks
from mosaics.experiments.records import read_record
from mosaics.experiments.reproduce import find_claims, plan_text, reproduce, write_summary
from mosaics.experiments.trainings import SPEED, Training, write_json
from mosaics.training.setup import build_config

PAIR = ("memory-mosaics-v2", "transformer")
TABLES, FIGURES = "1 2 9 10 3 4 12 13".split(), "1 3 4 5 8 12".split()


def test_claims_are_those_of_the_paper():
    assert set(CLAIMS) == {"abstract", *(f"table{n}" for n in TABLES), *(f"figure{n}" for n in FIGURES)}


V1_STUDIES = [claim for claim in claims_v1.CLAIMS.values() if claim.asks]


@pytest.mark.parametrize("claim", [*CLAIMS.values(), *V1_STUDIES], ids=lambda claim: claim.name)
def test_claim_is_about_what_it_asks(claim):
    known = settings(changes=MICRO) | claims_v1.settings(changes=MICRO)
    study = study_of((claim,), known, (0,), "")
    assert study.arrangements[0].label == ("memory-mosaics-v1" if claim in V1_STUDIES else "memory-mosaics-v2")
    assert tuple(a.label for a in study.arrangements) == claim.arrangements
    asked = {(s.shown_as, e.name): [a.label for a in study.members(s)] for s in study.settings for e in s.evaluations}
    assert set(asked) == set(claim.asks)
    assert claim.only.keys() <= {s.shown_as for s in study.settings}
    assert {one for labels in claim.only.values() for one in labels} <= set(claim.arrangements)
    assert {one for labels in asked.values() for one in labels} == set(claim.arrangements)
    for check in claim.checks:
        for one in (check.left, check.right, check.given and check.given.left):
            if one is not None:
                who = asked[one.setting, one.evaluation]
                assert one.arrangement in who or one.arrangement.startswith("baseline: ")
    assert "mosaics" in claim.full_scale and (claim in V1_STUDIES or "H100" in claim.full_scale)


def test_settings_of_several_claims_have_those_that_any_of_them_asks():
    def members(*names: str) -> dict[str, set[str]]:
        chosen = tuple((CLAIMS | PROOF)[name] for name in names)
        study = study_of(chosen, settings(changes=MICRO), (0,), "")
        return {setting.name: {one.label for one in study.members(setting)} for setting in study.settings}

    both = {"memory-mosaics-v2", "transformer"}
    alone, remedies = members("table3"), members("text-remedies")
    assert alone["text"] == both and alone["new-knowledge"] == set(CLAIMS["table3"].arrangements) > both
    assert not both & (remedies["text"] - {"memory-mosaics-v2"})
    together = members("table3", "text-remedies")
    assert together == alone | {"text": both | remedies["text"]}


@pytest.fixture
def real_files(tmp_path):
    """Small files of all real tasks, by name."""
    folder, files = tmp_path / "real", {}
    folder.mkdir()

    def write(name: str, text: str) -> None:
        files[name] = str(folder / name)
        (folder / name).write_text(text)

    for name in ("banking77_train", "banking77_test"):
        write(name, "text,category\n" + "my card is gone,lost card\nwhy a fee,fee\n" * 2)
    for name in ("goemotions_train", "goemotions_test"):
        write(name, "so glad\t0\ta\nhow awful\t1\tb\n" * 4)
    write("goemotions_labels", "joy\nfear\n")
    instance = {"tokens": ["Ann", "in", "York"], "h": ["ann", "Q1", [[0]]], "t": ["york", "Q2", [[2]]]}
    write("fewrel", json.dumps({"P1": [instance] * 5, "P2": [instance] * 5}))
    story = "1 Ann went to the kitchen.\n2 Where is Ann?\tkitchen\t1\n"
    for name in ("babi_train", "babi_test"):
        write(name, (story + story.replace("kitchen", "garden")) * 16)
    told = [f"{name} fell." + " There was nothing to be seen." * 20 for name in "abcdefghijklmnopqrstuvwxyz"]
    asked = {"id": "1", "question": "Who fell?", "answers": [{"text": "a", "answer_start": 0}]}
    paragraphs = [{"context": text, "qas": [asked]} for text in told]
    write("squad", json.dumps({"data": [{"title": "A", "paragraphs": paragraphs}]}))
    fallen = {"_id": "1", "question": "Who fell?", "answer": "a", "supporting_facts": [["0", 0]]}
    write("hotpotqa", json.dumps([fallen | {"context": [[str(n), [text]] for n, text in enumerate(told)]}]))
    return files


def test_real_tasks_are_asked_of_the_models_of_text(texts, real_files, tmp_path):
    claim, known = REAL["real-tasks"], settings(str(texts), samples=20, changes=MICRO, files=real_files)
    assert {("text", e.name) for e in known["text"].evaluations} >= set(claim.asks)
    found = reproduce(claim, known, (0,), tmp_path / "real", tmp_path / "cache")
    asked = {(row["arrangement"], row["evaluation"]) for row in found["rows"]}
    assert asked == {(label, name) for label in claim.arrangements for _, name in claim.asks}
    assert all(check["left"] is not None for check in found["verdict"]["checks"])
    assert all(len(row["scores"]) == 1 for row in found["rows"])
    beside = {(row["evaluation"], row["x"]): row for row in found["baselines"]}
    assert beside["babi, anonymous", 16]["chance"] == beside["fewrel, semantic", 4]["chance"] == 50
    assert beside["banking77, semantic", 1]["naive_bayes"] == 100  # the same texts are asked
    page = (tmp_path / "real" / "report.html").read_text(encoding="utf-8")
    for words in ("as RULER has it", "so many of every class", "naive bayes", "nearest text", "16 shots"):
        assert words in page


def test_real_tasks_refuse_files_before_anything_is_trained(real_files, tmp_path):
    assert [e.name for e in real_tasks({"squad": real_files["squad"]}, 500)] == ["squad"]
    with pytest.raises(ValueError, match="needs all of --data babi_train=PATH, babi_test=PATH"):
        real_tasks({"babi_test": real_files["babi_test"]}, 500)
    with pytest.raises(ValueError, match="--data tacred=… is no file of real tasks"):
        real_tasks({"tacred": real_files["squad"]}, 500)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        real_tasks({"squad": str(tmp_path / "none")}, 500)
    for name in ("squad", "fewrel", "babi_train", "banking77_test"):
        files = {one: path for one, path in real_files.items() if one.split("_")[0] == name.split("_")[0]}
        (tmp_path / name).write_text("not what was asked for")
        with pytest.raises(ValueError, match=name):
            real_tasks(files | {name: str(tmp_path / name)}, 500)
    with pytest.raises(ValueError, match="asks about files of yours"):
        study_of((REAL["real-tasks"],), settings(changes=MICRO), (0,), "")


def test_trials_are_not_longer_than_the_training():
    for changes in (None, {"training.steps": 3}):
        for setting in settings(changes=changes).values():
            assert setting.tuning_steps is None or setting.tuning_steps <= setting.training["steps"], setting.name


def test_claims_share_trained_models():
    known = settings(changes=MICRO)
    trained = {}
    for name in ("table3", "table13", "figure12"):
        study = study_of((CLAIMS[name],), known, (0,), "")
        twin = next(a for a in study.arrangements if a.label == "transformer")
        setting = next(s for s in study.settings if s.name == "new-knowledge")
        trained[name] = Training(twin, study.arrangements[0], setting, 0).digest
    assert len(set(trained.values())) == 1


def test_fixed_delay_is_that_of_evaluation():
    setting = settings(changes=MICRO)["new-knowledge"]
    first, fixed = ARRANGEMENTS["memory-mosaics-v2"], ARRANGEMENTS["v2, fixed delay"]
    jobs = [Training(arrangement, first, setting, 0) for arrangement in (first, fixed)]
    assert [job.recipe.model.overrides()["long_term.train_delay"] for job in jobs] == [[4, 8], [4, 4]]


def test_find_claims_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean table3"):
        find_claims("tabel3")


def test_find_claims_of_a_group_are_those_of_one_paper():
    assert [claim.name for claim in find_claims("all")] == list(CLAIMS)
    assert [claim.name for claim in find_claims("v1")] == ["three-moons", "regbench", "babistories", "v1-figure1"]
    assert [claim.name for claim in find_claims("regbench")] == ["regbench"]
    assert not {"text-code"} & {claim.name for claim in find_claims("proof")}  # that has a text of its own
    assert [claim.name for claim in find_claims("text-code")] == ["text-code"]
    everything = [claim.name for claim in find_claims("everything")]
    assert everything[0] == "learning" and len(everything) == len(set(everything))
    assert set(everything) == {claim.name for group in ("all", "v1", "proof") for claim in find_claims(group)}


@pytest.mark.slow
def test_reproduce_regbench_learns_from_ever_more_automata(tmp_path):
    names = ("memory-mosaics-v1", "transformer")
    claim = claims_v1.CLAIMS["regbench"].model_copy(update={"arrangements": names})
    known = claims_v1.settings(samples=2, changes=MICRO | {"model.num_pairs": 64}, automata=(8, 4))
    found = reproduce(claim, known, (0,), tmp_path / "regbench", tmp_path / "cache")
    for evaluation in ("accuracy", "total variation"):
        points = {
            name: {row["x"] for row in found["rows"] if (row["arrangement"], row["evaluation"]) == (name, evaluation)}
            for name in names
        }
        assert points == dict.fromkeys(names, {4, 8})
    sizes = {m["parameters"] for m in found["models"]}
    assert max(sizes) < 1.01 * min(sizes) and len(found["models"]) == 4
    assert len({m["tokens"] for m in found["models"]}) == 1  # whatever the number of automata
    page = (tmp_path / "regbench" / "report.html").read_text(encoding="utf-8")
    for words in ("sequences of 4 automata", "sequences of 8 automata", "transformer, published", "budgets differ"):
        assert words in page
    assert (tmp_path / "regbench" / "regbench-accuracy.png").is_file()
    # The first of the checks is about the fewest automata.
    left = found["verdict"]["checks"][0]["left"]
    (row,) = [r for r in found["rows"] if (r["arrangement"], r["evaluation"], r["x"]) == (names[0], "accuracy", 4)]
    assert left == row["y"]


def test_reproduce_of_v1_on_text_looks_where_it_reads(texts, tmp_path):
    known = claims_v1.settings(str(texts), samples=4, changes=MICRO | {"model.num_pairs": 64})
    found = reproduce(claims_v1.CLAIMS["v1-figure1"], known, (0,), tmp_path / "figure", tmp_path / "cache")
    sizes = {m["arrangement"]: m["parameters"] for m in found["models"]}
    assert sizes["transformer"] == pytest.approx(sizes["memory-mosaics-v1"], rel=0.01)
    for name in sizes:
        shown = [row["y"] for row in found["rows"] if row["arrangement"] == name]
        assert len(shown) == 16 and min(shown) >= 0 < max(shown)


def test_published_curves_of_regbench_are_shown_and_decide_nothing():
    setting = claims_v1.regbench_setting(100)
    asked = setting.evaluations[0]
    assert asked.beside["memory-mosaics-v1, published"][0] == (100, 92.5)
    assert asked.beside["transformer, published"][-1] == (40000, 95.3)
    assert setting.data.digest() == claims_v1.regbench_setting(100, samples=3).data.digest()
    assert setting.data.digest() != claims_v1.regbench_setting(500).data.digest()


@pytest.mark.slow
def test_reproduce_goes_on_from_a_trained_model_and_reports(texts, tmp_path):
    known = settings(str(texts), samples=2, changes=MICRO)
    record = tmp_path / "results" / "figure8.json", "mosaics reproduce figure8"
    found = reproduce(CLAIMS["figure8"], known, (0,), tmp_path / "figure8", tmp_path / "cache", record=record)
    steps = {(m["setting"], m["arrangement"]): m["steps"] for m in found["models"]}
    assert steps["one long mini-batch", "transformer"] == 1 and steps["long fine-tuning", "transformer"] == 100
    loss = {m["setting"]: m["curve"][0][1] for m in found["models"] if m["arrangement"] == "memory-mosaics-v2"}
    assert loss["one long mini-batch"] == loss["long fine-tuning"]  # the same model, the same rows
    summary = write_summary(tmp_path).read_text(encoding="utf-8").splitlines()
    assert len(summary) == 3 and summary[2].startswith("| figure8 | ") and summary[2].endswith(" | 0 |")
    page = (tmp_path / "figure8" / "report.html").read_text(encoding="utf-8")
    assert "At full scale" in page and "can&#39;t be told" in page and "<span>premise</span>" in page
    kept = read_record(record[0])
    assert kept["rows"] == found["rows"] and kept["verdict"] == found["verdict"] and kept["command"] == record[1]
    assert all(key in kept for key in ("commit", "machine", "baselines", "study"))
    assert len(kept["models"]) == len(found["models"]) and record[0].stat().st_size < 200_000


def test_plan_text_counts_what_claims_share_once(tmp_path):
    known = settings(changes=MICRO)
    chosen = [CLAIMS[name] for name in ("table3", "table13", "figure5")]
    counts = {line.split()[0]: line.split()[1:] for line in plan_text(chosen, known, (0, 1), tmp_path).splitlines()[1:]}
    assert [counts[name][1] for name in ("table3", "table13", "figure5")] == ["14", "0", "6"]
    for number, seconds in enumerate((10.0, 20.0, 1e6)):  # ten times as fast as where nothing was trained yet
        done = {"flops_per_token": 1e3, "tokens": 1e6, "seconds": seconds}
        write_json(tmp_path / "done" / "models" / str(number) / "training.json", done)
    slow, fast = (
        float(plan_text([CLAIMS["abstract"]], settings(), (0,), folder).split()[-1])
        for folder in (tmp_path, tmp_path / "done")
    )
    assert fast == pytest.approx(slow * SPEED / (3e9 / 20), rel=0.05)
    tuned = settings(changes=MICRO, tuning={"training.learning_rate": (1e-3, 2e-3, 4e-3)}, beyond=3)
    more = plan_text([CLAIMS["table13"]], tuned, (0, 1), tmp_path).splitlines()[1].split()
    assert more[1:3] == ["8", "4"]  # 3 rates; for the Transformer 2 rotary bases more


def test_trials_of_v1_are_short_and_of_what_is_tried_on_text() -> None:
    known = claims_v1.settings(tuning=TUNING, automata=(8,))
    assert {setting.tuning_steps for setting in known.values()} == {200}
    assert {key for setting in known.values() for key in setting.tuning} == set(TRIED_ON_TEXT)
    assert {s.tuning_steps for s in claims_v1.settings(changes=MICRO, automata=(8,)).values()} == {
        MICRO["training.steps"]
    }


@pytest.mark.parametrize("label", ARRANGEMENTS)
def test_changes_reach_options_that_a_preset_leaves_as_they_are(label):
    """Also those whose value no preset gives: they were left out silently before."""
    setting = settings(changes=MICRO | {"model.initializer_range": 0.5})["new-knowledge"]
    job = Training(ARRANGEMENTS[label], ARRANGEMENTS["memory-mosaics-v2"], setting, 0)
    blocks = build_config(job.recipe).block_steps()
    assert {memory["options"]["initializer_range"] for step in blocks[0] for memory in step} == {0.5}


def test_changes_of_what_v2_sets_leave_the_transformer_alone():
    setting = settings(changes=MICRO | {"model.window": 4, "model.train_delay": [2, 4]})["new-knowledge"]
    first, other = (Training(ARRANGEMENTS[name], ARRANGEMENTS["memory-mosaics-v2"], setting, 0) for name in PAIR)
    assert build_config(first.recipe).window == 4
    attention = build_config(other.recipe).block_steps()[0][0][0]["options"]
    assert not {"window", "delay", "train_delay"} & attention.keys()
