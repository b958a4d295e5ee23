"""`mosaics compare` from the command line."""

from tests.experiments.conftest import OPTIONS

from mosaics.experiments.compare import study


def test_compare_writes_a_report(mosaics, tmp_path):
    words = ["--worlds", "recall", "--text", "none", "--seeds", "0", "--samples", "4"]
    code, output, said = mosaics("compare", "--output", tmp_path / "c", *words, *OPTIONS)
    assert code == 0 and "report.html" in output and "step 3/3" in said
    page = (tmp_path / "c" / "report.html").read_text(encoding="utf-8")
    assert "transformer" in page and "better than" in page or "told apart" in page


def test_compare_refuses_in_one_sentence(refused, tmp_path):
    to = ["--output", tmp_path]
    assert "--seeds is 'x'" in refused("compare", *to, "--seeds", "x")
    assert "transformer-tiny" in refused("compare", *to, "--arrangements", "transformer-tin")
    assert "no world 'recal'" in refused("compare", *to, "--worlds", "recal")
    assert "options only" in refused("compare", *to, "more")
    assert "'nosuch'" in refused("compare", *to, "--text", "nosuch", *OPTIONS)
    assert "'--samples'" in refused("compare", *to, "--samples", "0")
    assert "did you mean 'initializer_range'?" in refused("compare", *to, "--model.initialiser_range", "0.1")
    assert "no setting 'num_pairs'" in refused("compare", *to, "--systems", "gla,kda", "--model.num_pairs", "9")
    assert "no system 'glaa'" in refused("compare", *to, "--systems", "glaa")
    assert "--match says nothing" in refused("compare", *to, "--systems", "gla", "--match", "flops")
    assert "name its --systems" in refused("compare", *to, "--automata", "5")
    for key, value, says in (
        ("data.sittings", 3, "no key of the data; choose from loss, settings"),
        ("data.curriculum", 5, "--data.curriculum is 5: input should be"),
        ("data.world", "recall", "nothing that compare can change"),
    ):
        assert says in refused("compare", *to, f"--{key}", value)
    assert not list(tmp_path.iterdir())


def test_compare_hands_settings_to_the_episodes():
    (setting,) = study(worlds=("in-context-learning",), corpus=None, changes={"data.settings.noise": 0.1}).settings
    assert setting.data.settings == {"noise": 0.1} and setting.data.world == "in-context-learning"
