"""A training loop of Accelerate's tutorial: `accelerate launch accelerated.py MODEL ROWS OUTPUT`."""

import json
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import mosaics  # noqa: F401

model, rows, output = sys.argv[1:]
set_seed(0)
accelerator = Accelerator(cpu=True)
model = AutoModelForCausalLM.from_pretrained(model)
data = DataLoader(torch.tensor(json.loads(rows)), batch_size=4 // accelerator.num_processes)
model, optimizer, data = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01), data)
model.train()
losses = []
for _ in range(3):
    for ids in data:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
if accelerator.is_main_process:
    with open(output, "w") as file:
        json.dump({"processes": accelerator.num_processes, "losses": losses}, file)
