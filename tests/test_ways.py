"""Ways of training that are the same for every model: accumulation, several processes, what the model then holds."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from zoo import make_model, tokens

from foreword import Prefix, attach
from foreword.fingerprint import digest
from foreword.initialization import random_prefix


def fit(folder: Path, **options: Any) -> tuple[Prefix, list[float]]:
    """Train a prefix with Transformers' own trainer; the prefix, and the losses."""
    model = make_model("llama").float().requires_grad_(False)
    prefix, before = random_prefix(model, 4), digest(model)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 12)]
    arguments = transformers.TrainingArguments(
        str(folder), learning_rate=0.1, max_steps=6, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1,
        use_cpu=True, **options,
    )  # fmt: skip
    with attach(model, prefix):
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
        trainer.train()
    assert digest(model) == before
    return prefix, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_accumulation_and_checkpointing_give_the_same_prefix(tmp_path):
    name = (
        "activation_checkpointing"
        if hasattr(transformers.TrainingArguments, "activation_checkpointing")
        else "gradient_checkpointing"
    )
    whole, losses = fit(tmp_path, per_device_train_batch_size=4)
    cut, _ = fit(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        **{name: True, f"{name}_kwargs": {"use_reentrant": False}},
    )  # fmt: skip
    assert losses[-1] < losses[0]
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


_TWO = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from zoo import make_model, tokens
from foreword import attach
from foreword.initialization import random_prefix

ids = tokens(4, 9)
def loss(model, rows): return torch.nn.functional.cross_entropy(model(rows).logits.flatten(0, 1), rows.flatten())
def prepared():
    model = make_model("llama").requires_grad_(False)
    return model, random_prefix(model, 4).double()

model, prefix = prepared()
with attach(model, prefix):
    loss(model, ids).backward()
expected = [parameter.grad for parameter in prefix.parameters()]
dist.init_process_group("gloo")
own = ids.chunk(2)[dist.get_rank()]

model, prefix = prepared()
with attach(model, prefix):
    spread = DistributedDataParallel(model)
    loss(spread, own).backward()
for parameter, gradient in zip(prefix.parameters(), expected, strict=True):
    torch.testing.assert_close(parameter.grad, gradient)

model, prefix = prepared()
with attach(model, prefix):
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    loss(model, own).backward()
    for (name, parameter), gradient in zip(model.foreword_prefix.named_parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient)
dist.destroy_process_group()
"""


def test_two_processes_give_the_gradient_of_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_prefix_is_part_of_the_model_only_while_attached(llama):
    prefix, other = random_prefix(llama, 3), random_prefix(llama, 3, seed=1)
    own = set(llama.state_dict())
    with attach(llama, prefix) as attachment:
        assert {n.partition(".")[0] for n in set(llama.state_dict()) - own} == {"foreword_prefix"}
        attachment.use(other)
        assert llama.foreword_prefix is other
        attachment.use([prefix, other])
        assert set(llama.state_dict()) == own
    assert set(llama.state_dict()) == own
