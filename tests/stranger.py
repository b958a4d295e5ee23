"""A program of somebody who has transformers, and perhaps not mosaics: loads saved models by `trust_remote_code=True`.

    python -I stranger.py without|with JOBS

With `without` nothing can import mosaics. JOBS is a JSON list of objects: the `folder` of a model, where to put what it
computes, `out`, and where to `save` it. `computed` is also what tests compute with the package itself.
"""

import json
import sys

import torch
from torch import Tensor

PROMPT, LENGTH = 9, 150  # tokens; the long rows need several tiles of the blockwise form


def given(model) -> tuple[Tensor, Tensor]:
    """Rows of tokens, and which of them are no padding."""
    rows = torch.randint(model.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(rows)
    mask[0, :40] = 0  # padding on the left
    mask[1, 60:70] = 0
    return rows, mask


def generated(model, **options) -> Tensor:
    """What a model goes on with."""
    rows, mask = given(model)
    options |= dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    return model.generate(input_ids=rows[:, :50], attention_mask=mask[:, :50], **options)


def computed(model) -> dict[str, Tensor]:
    """What a model computes in each way of using it, and the gradient of its loss."""
    rows, mask = given(model)
    ids = torch.arange(LENGTH).expand(2, LENGTH) // 61
    model.eval()
    with torch.no_grad():
        found = {"plain": model(rows).logits, "padded": model(rows, attention_mask=mask).logits}
        found["packed"] = model(rows, document_ids=ids).logits
        begun = model(rows[:, :PROMPT], use_cache=True)
        rest = model(rows[:, PROMPT:60], past_key_values=begun.past_key_values)
        last = model(rows[:, 60:61], past_key_values=rest.past_key_values)
        found["cached"] = torch.cat([begun.logits, rest.logits, last.logits], dim=1)
        found["greedy"] = generated(model)
        found["beams"] = generated(model, num_beams=3)
    model.train()
    torch.manual_seed(2)  # of dropout
    loss = model(rows, attention_mask=mask, labels=rows, draw=0.6).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    found["loss"] = loss.detach()
    for name, gradient in zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        found[f"gradient {name}"] = torch.zeros(()) if gradient is None else gradient
    optimizer, drawn = torch.optim.SGD(parameters, lr=0.0), []
    for _ in range(3):  # an optimizer's step draws anew
        torch.manual_seed(2)
        drawn.append(model(rows, labels=rows).loss.detach())
        optimizer.step()
    found["drawn"] = torch.stack(drawn)
    model.eval()
    return {name: x.contiguous().clone() for name, x in found.items()}


class Refused:
    """A finder of modules that finds no mosaics."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mosaics":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main() -> None:
    if sys.argv[1] == "without":
        sys.meta_path.insert(0, Refused())
    torch.set_num_threads(1)
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoModelForCausalLM

    kept = []
    for job in json.loads(sys.argv[2]):
        torch.manual_seed(3)  # of what is initialised
        model = AutoModelForCausalLM.from_pretrained(job["folder"], trust_remote_code=True)
        found = computed(model)
        if job.get("weights"):
            found = {name: x.clone() for name, x in model.state_dict().items()}
        save_file(found, job["out"])
        if "save" in job:
            model.save_pretrained(job["save"])
            base = AutoModel.from_pretrained(job["folder"], trust_remote_code=True)
            kept.append((model, base, found["greedy"]))
    for model, base, greedy in kept:  # the code of models loaded later does not change these
        assert torch.equal(generated(model), greedy)
        assert type(base).__name__ == "MosaicModel"
    print(json.dumps([type(model).__module__ for model, *_ in kept]))
    assert ("mosaics" in sys.modules) == (sys.argv[1] == "with"), "mosaics was imported, or never was"


if __name__ == "__main__":
    main()
