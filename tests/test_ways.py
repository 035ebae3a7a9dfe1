"""Every way of training: whatever trains a Transformers model trains an attached prefix, and nothing but the prefix."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import ROWS, gradients_of
from zoo import make_model, tokens
from torch import Tensor

import foreword
from foreword import attach, text_prefix
from foreword.errors import ConfigError
from foreword.fingerprint import digest
from foreword.initialization import random_prefix

CONTEXT = tokens(5, seed=1)


def rows_of(count: int, length: int = 12) -> list[dict[str, Tensor]]:
    ids = tokens(count, length)
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    defaults: dict[str, Any] = {
        "learning_rate": 0.1,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "use_cpu": True,
        "seed": 1,
    }
    return transformers.TrainingArguments(str(folder), **(defaults | options))


def fit(family: str, folder: Path, **options: Any) -> tuple[foreword.Prefix, list[float]]:
    """Train a prefix with Transformers' own trainer; the prefix, and the losses."""
    model = make_model(family).float().requires_grad_(False)
    prefix, before = random_prefix(model, 4), digest(model)
    with attach(model, prefix):
        trainer = transformers.Trainer(model, arguments(folder, **options), train_dataset=rows_of(8))  # type: ignore[arg-type]
        trainer.train()
    assert digest(model) == before
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return prefix, losses


@pytest.mark.feature("Trainer")
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3"])
def test_trainer_trains_an_attached_prefix(family, tmp_path):
    prefix, losses = fit(family, tmp_path)
    assert losses[-1] < losses[0]
    start = random_prefix(make_model(family).float(), 4)
    assert not any(torch.equal(a, b) for a, b in zip(prefix.parameters(), start.parameters(), strict=True))


@pytest.mark.feature("gradient checkpointing")
@pytest.mark.parametrize("family", ["llama"])
def test_trainer_with_checkpointing_and_accumulation_gives_the_same_prefix(family, tmp_path):
    whole, _ = fit(family, tmp_path, per_device_train_batch_size=4, max_steps=3)
    cut, _ = fit(
        family,
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.feature("gradient checkpointing")
@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_reentrant_checkpointing_is_refused_rather_than_training_nothing(llama, when):
    def switch() -> None:
        llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        llama.train()

    if when == "before attach":
        switch()
    with attach(llama.requires_grad_(False), random_prefix(llama, 3).double()):
        if when == "after attach":
            switch()
        with pytest.raises(ConfigError, match="use_reentrant': False"):
            llama(tokens(2, 6), use_cache=False)


@pytest.mark.feature("bf16 autocast")
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3"])
def test_autocast_gives_nearly_the_gradients_of_float32(family):
    model = make_model(family).float().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.mul_(0.25 if parameter.dim() == 2 else 1)  # logits that bfloat16 can hold
    found = []
    for autocast in (False, True):
        prefix = random_prefix(model, 4)
        with attach(model, prefix), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
        found.append(torch.cat([gradient.flatten() for gradient in gradients_of(prefix)]))
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.99


@pytest.mark.feature("SFTTrainer")
@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_sft_trainer_trains_an_attached_prefix(family, tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = make_model(family).float().requires_grad_(False)
    prefix, before = random_prefix(model, 4), digest(model)
    options = {"learning_rate": 0.1, "max_steps": 6, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
               "logging_steps": 1, "use_cpu": True, "max_length": 64, "bf16": False}  # fmt: skip
    with attach(model, prefix):
        trainer = trl.SFTTrainer(model, trl.SFTConfig(str(tmp_path), **options), processing_class=tokenizer,
                                 train_dataset=datasets.Dataset.from_list(ROWS))  # fmt: skip
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert digest(model) == before


@pytest.mark.feature("LoRA together")
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.filterwarnings("ignore")  # PEFT's own, on GPT-2's transposed layers
def test_lora_and_a_prefix_together(family):
    peft = pytest.importorskip("peft")
    model = make_model(family).requires_grad_(False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted = adapted.double()
    ids = tokens(2, 8)
    with torch.no_grad():
        expected = adapted(torch.cat([CONTEXT.expand(2, -1), ids], 1)).logits[:, 5:]
    prefix = text_prefix(adapted.get_base_model(), CONTEXT.tolist()).double()
    with attach(adapted, prefix):
        found = adapted(ids).logits
        found.pow(2).mean().backward()
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-6)
    assert all(gradient.abs().sum() > 0 for gradient in gradients_of(prefix))
    lora = [p for name, p in adapted.named_parameters() if "lora_" in name]
    assert sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in lora) >= len(lora) - 1  # tied or unused


@pytest.mark.feature("8-bit base")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_base_in_8_bit(family, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    make_model(family).float().save_pretrained(tmp_path)
    quantization = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, dtype=torch.float32
    ).eval()
    assert "Int8" in type(model.model.layers[0].self_attn.q_proj.weight).__name__ + str(
        model.model.layers[0].self_attn.q_proj.weight
    )
    ids = tokens(2, 8)
    with torch.no_grad():
        expected = model(torch.cat([CONTEXT.expand(2, -1), ids], 1)).logits[:, 5:]
    prefix = text_prefix(model, CONTEXT.tolist())
    with attach(model, prefix):
        found = model(ids).logits
        found.pow(2).mean().backward()
    torch.testing.assert_close(found.detach(), expected, rtol=1e-3, atol=1e-3)
    assert all(gradient.abs().sum() > 0 for gradient in gradients_of(prefix))
    file = foreword.save(prefix, tmp_path / "p.safetensors")
    with attach(model, foreword.load(file)):
        torch.testing.assert_close(model(ids).logits, found)


@pytest.mark.feature("device_map")
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3"])
def test_base_spread_by_a_device_map(family, tmp_path):
    """Here the weights of every layer lie on the disk; on machines with several devices the same hooks move them."""
    make_model(family).float().save_pretrained(tmp_path / "base")
    cls: Any = type(make_model(family))
    whole: Any = cls.from_pretrained(tmp_path / "base").eval()
    names = [name for name, _ in whole.named_children()]
    spread: Any = cls.from_pretrained(
        tmp_path / "base", device_map={name: "disk" if name != "lm_head" else "cpu" for name in names},
        offload_folder=tmp_path / "offload",
    ).eval()  # fmt: skip
    assert any(parameter.is_meta for parameter in spread.parameters())
    ids, prefix = tokens(2, 8), text_prefix(whole, CONTEXT.tolist())
    found = []
    for model in (whole.requires_grad_(False), spread):
        with attach(model, prefix):
            logits = model(ids).logits
            made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=259)
            logits.pow(2).mean().backward()
        found.append((logits.detach(), made, gradients_of(prefix)))
        prefix.zero_grad()
    torch.testing.assert_close(found[0], found[1])
    again = text_prefix(spread, CONTEXT.tolist())
    torch.testing.assert_close(list(again.parameters()), list(prefix.parameters()))


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
    loss(DistributedDataParallel(model), own).backward()
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


@pytest.mark.feature("DDP and FSDP2")
def test_two_processes_give_the_gradient_of_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr[-3000:]


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}


@pytest.mark.feature("DDP and FSDP2")
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
