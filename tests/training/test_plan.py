"""What a run would cost."""

import pytest

from mosaics.training.plan import GPUS, plan
from mosaics.training.recipe import load_recipe

distributed = pytest.importorskip("torch.distributed")


@pytest.fixture(scope="module")
def small():
    return load_recipe("memory-mosaics-v2-small", {"model.num_hidden_layers": 3})


def test_plan_shards_the_model_on_the_meta_device(small):
    whole, parts = plan(small), plan(small, gpus=64)
    for kind in ("parameters", "gradients", "optimizer"):
        share = parts["memory_bytes"][kind] * 64 / whole["memory_bytes"][kind]
        assert 1 <= share < 1.02, kind  # a row more where 64 don't divide them
    for kind in ("activations", "logits"):  # one sequence at a time in both
        assert parts["memory_bytes"][kind] == whole["memory_bytes"][kind]
    assert "gathered" not in whole["memory_bytes"]
    deeper = plan(load_recipe("memory-mosaics-v2-small", {"model.num_hidden_layers": 5}), gpus=64)
    assert deeper["memory_bytes"]["gathered"] == parts["memory_bytes"]["gathered"] > 0
    assert (whole["micro_batches"], parts["micro_batches"]) == (1024, 16)
    assert not distributed.is_initialized()


def test_plan_time_is_work_by_peak_count_and_utilisation(small):
    planned = plan(small, gpu="H100", gpus=64, utilisation=0.25)
    assert planned["seconds"] == pytest.approx(planned["training_flops"] / (64 * 989e12 * 0.25))
    assert planned["gpu_memory_bytes"] == GPUS["h100"].memory == 80e9
    assert any("25% of the 989 TFLOP/s" in assumption for assumption in planned["assumptions"])
    assert "seconds" not in plan(small)


def test_plan_gathers_linear_maps_in_the_precision_of_the_products():
    def gathered(precision, tied):
        changes = {"model.num_hidden_layers": 2, "model.tie_word_embeddings": tied, "training.precision": precision}
        return plan(load_recipe("memory-mosaics-v2-small", changes), gpus=2)["memory_bytes"]["gathered"]

    memories = gathered("float32", True) - gathered("bfloat16", True)  # tied: the embedding stays in float32
    assert memories > 0
    assert gathered("float32", False) - gathered("bfloat16", False) > memories  # and the classifier


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu": "tpu"}, "--gpu tpu is not known; choose one of a100, h100"),
        ({"gpus": 3}, "1024, which 3 processes can't share equally"),
        ({"gpus": 0}, "--gpus is 0"),
        ({"gpu": "h100", "utilisation": 1.5}, "--utilisation is 1.5"),
    ],
)
def test_plan_refuses_and_says_why(small, options, said):
    with pytest.raises(ValueError) as error:
        plan(small, **options)
    assert said in str(error.value)
