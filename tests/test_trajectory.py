"""The weights after some steps of ``fit`` against a few lines of plain torch and transformers."""

import hashlib

import pytest
import torch
from helpers import plain_losses
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from slzo.datamodule import TaskDataModule
from slzo.lightning.trainer import ZOTrainer
from slzo.module import ZOModule

pytestmark = pytest.mark.fast

LAYER, SEED, STEPS, EPS = 2, 5, 3, 1e-2
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
}


class Batches(Callback):
    """Notes the rows of each step."""

    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append([row.encoded for row in batch.rows])


def plain_direction(parameter, step, query, name):
    key = f"{SEED}/{step}/{query}/{name}".encode()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1)
    return torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def plain_training(folder, batches, make_optimizer, num_queries):
    """MeZO on one layer: every candidate a forward pass of the whole model, z kept, the weights put back from a copy."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().requires_grad_(False)
    tuned = {name: p for name, p in model.named_parameters() if name.startswith(f"model.layers.{LAYER}.")}
    weights = {name: torch.nn.Parameter(p.clone()) for name, p in tuned.items()}
    optimizer = make_optimizer(weights.values())
    for step, rows in enumerate(batches):
        gradient = {name: torch.zeros_like(p) for name, p in tuned.items()}
        for query in range(num_queries):
            z = {name: plain_direction(p, step, query, name) for name, p in tuned.items()}
            losses = []
            for scale in (EPS, -EPS):
                for name, p in tuned.items():
                    p.copy_(weights[name] + scale * z[name])
                losses.append(float(plain_losses(model, rows)[0]))
            for name in tuned:
                gradient[name] += (losses[0] - losses[1]) / (2 * EPS) / num_queries * z[name]
        for name, weight in weights.items():
            weight.grad = gradient[name]
        optimizer.step()
    return weights


@pytest.mark.parametrize(
    ("num_queries", "optimizer"),
    [(1, "SGD"), (3, "AdamW"), *(pytest.param(*own, marks=pytest.mark.slow) for own in ((1, "AdamW"), (3, "SGD")))],
)
def test_fit_takes_the_steps_of_plain_mezo(model_dir, data_dir, tmp_path, optimizer, num_queries):
    module = ZOModule(
        str(model_dir), LAYER, eps=EPS, optimizer=OPTIMIZERS[optimizer], seed=SEED, num_queries=num_queries
    )
    rows = TaskDataModule("sst2", str(model_dir), str(data_dir), num_train=20, num_dev=4, batch_size=6, seed=0)
    batches = Batches()
    options = {"max_steps": STEPS, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False}
    trainer = ZOTrainer(accelerator="cpu", callbacks=[batches], default_root_dir=tmp_path, **options)
    trainer.fit(module, datamodule=rows)
    assert len(batches.rows) == STEPS
    before = dict(AutoModelForCausalLM.from_pretrained(model_dir).named_parameters())
    expected = plain_training(model_dir, batches.rows, OPTIMIZERS[optimizer], num_queries)
    found = module.state_dict()
    assert set(found) == set(expected)
    for name, weight in expected.items():
        moved = (weight - before[name]).detach()
        assert moved.norm() > 0
        assert (found[name] - weight).norm() < 2e-3 * moved.norm(), name
