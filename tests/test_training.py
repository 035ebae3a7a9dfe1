"""Training: what is learned, what is left alone, and what survives an interruption."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny import HEAD_ROWS, ROWS, Largest, gradients_of
from torch.nn.functional import cross_entropy
from zoo import make_model

import foreword
from foreword import Job, PrefixConfig, TrainConfig, attach, train, train_many
from foreword.completion import completion_loss
from foreword.data import collate, encode, read_rows
from foreword.errors import ConfigError, DataError
from foreword.fingerprint import digest
from foreword.initialization import random_prefix
from foreword.loop import Run, Trainer
from foreword.memory import StepMemory
from foreword.reparameterization import Reparameterization
from foreword.tasks import TASKS

QUICK = TrainConfig(steps=6, batch_size=4, evaluate_every=2, checkpoint_every=2)
SMALL = PrefixConfig(num_virtual_tokens=4)


def same(one: foreword.Prefix, other: foreword.Prefix) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_training_lowers_the_loss_and_leaves_the_base_alone(model, tokenizer):
    before, losses, rows = digest(model), [], ROWS[:3]
    config = TrainConfig(steps=40, learning_rate=0.3, held_out_fraction=0.0)
    prefix = train(model, tokenizer, rows, SMALL, config, on_step=lambda p: losses.append(p.loss))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert digest(model) == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert prefix.metadata["template"] == tokenizer.chat_template
    assert prefix.metadata["training"]["rows"] == len(rows)
    curve = prefix.metadata["training"]["curve"]
    assert [entry["step"] for entry in curve] == list(range(1, 41))
    assert curve[-1]["loss"] == pytest.approx(losses[-1], abs=1e-4)


def test_loss_is_that_of_the_completion_tokens_alone(model, tokenizer):
    examples, _ = encode(read_rows(ROWS)[0][:4], tokenizer, tokenizer.chat_template, 256)
    summed = sum(
        cross_entropy(model(torch.tensor([e.input_ids])).logits[0, e.prompt_length - 1 : -1], torch.tensor(e.input_ids[e.prompt_length :]), reduction="sum")
        for e in examples
    )  # fmt: skip
    torch.testing.assert_close(completion_loss(model, collate([examples])).sum(), summed)


def test_first_virtual_token_from_text_stays_and_the_others_move(llama, tokenizer):
    prefix = train(llama, tokenizer, ROWS, SMALL, QUICK)
    free = train(llama, tokenizer, ROWS, PrefixConfig(4, freeze_first=False), QUICK)
    for frozen, moved in zip(prefix.keys, free.keys, strict=True):
        assert not torch.equal(frozen[0], moved[0])
        assert not torch.equal(frozen[1], moved[1])
    again = train(llama, tokenizer, ROWS, SMALL, TrainConfig(steps=1, batch_size=4, learning_rate=1e-9))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(prefix.keys, again.keys, strict=True))
    assert not any(torch.equal(a[1], b[1]) for a, b in zip(prefix.keys, again.keys, strict=True))


def test_micro_batches_change_nothing(llama, tokenizer):
    whole, split = (
        train(llama, tokenizer, ROWS, SMALL, TrainConfig(steps=3, batch_size=6, micro_batches=n)) for n in (1, 3)
    )
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_reparameterization_starts_at_the_start_and_is_folded(llama, tokenizer):
    config = PrefixConfig(4, reparameterization="mlp", mlp_width=8)
    losses = {"none": [], "mlp": []}
    for name, prefix_config in (("none", SMALL), ("mlp", config)):
        train(llama, tokenizer, ROWS, prefix_config, QUICK, on_step=lambda p, n=name: losses[n].append(p.loss))
    assert losses["mlp"][0] == pytest.approx(losses["none"][0])
    assert losses["mlp"][-1] != losses["mlp"][0]
    prefix = train(llama, tokenizer, ROWS, config, QUICK)
    assert prefix.num_parameters == 4 * len(prefix.sites) * 2 * 2 * 8
    with attach(llama, prefix):
        pass


def test_best_prefix_is_kept_and_training_stops_early(llama, tokenizer):
    seen = []
    config = TrainConfig(steps=200, batch_size=4, learning_rate=3.0, evaluate_every=1, patience=3)
    prefix = train(llama, tokenizer, ROWS, SMALL, config, on_step=lambda p: seen.append(p.held_out_loss))
    training = prefix.metadata["training"]
    assert len(seen) == training["steps"] < 200
    assert training["held_out_loss"] == min(seen)
    assert training["best_step"] == seen.index(min(seen)) + 1
    assert training["steps"] - training["best_step"] == 3


def test_run_folder_holds_metrics_and_a_picture(llama, tokenizer, tmp_path):
    train(llama, tokenizer, ROWS, SMALL, QUICK, run=tmp_path / "a.run")
    metrics = [json.loads(line) for line in (tmp_path / "a.run/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert [m["step"] for m in metrics if "held_out_loss" in m] == [2, 4, 6]
    assert all({"loss", "learning_rate", "tokens_per_second"} <= m.keys() for m in metrics)
    assert (tmp_path / "a.run/loss.png").read_bytes().startswith(b"\x89PNG")


def test_run_is_never_overwritten_or_mixed_up(llama, tokenizer, tmp_path):
    run = tmp_path / "a.run"
    with pytest.raises(ConfigError, match="no run to resume"):
        train(llama, tokenizer, ROWS, SMALL, QUICK, run=run, resume=True)
    first = train(llama, tokenizer, ROWS, SMALL, QUICK, run=run)
    with pytest.raises(ConfigError, match="holds an earlier run"):
        train(llama, tokenizer, ROWS, SMALL, QUICK, run=run)
    with pytest.raises(ConfigError, match="started differently: train"):
        train(llama, tokenizer, ROWS, SMALL, TrainConfig(steps=7), run=run, resume=True)
    with pytest.raises(ConfigError, match="started differently: data"):
        train(llama, tokenizer, ROWS[1:], SMALL, QUICK, run=run, resume=True)
    assert same(train(llama, tokenizer, ROWS, SMALL, QUICK, run=run, resume=True), first)
    assert same(train(llama, tokenizer, ROWS, SMALL, QUICK, run=run, overwrite=True), first)


@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_interrupted_run_resumes_to_the_same_prefix(llama, tokenizer, tmp_path, reparameterization):
    config = PrefixConfig(4, reparameterization=reparameterization, mlp_width=8)
    whole = train(llama, tokenizer, ROWS, config, QUICK, run=tmp_path / "whole.run")

    def interrupt(progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(llama, tokenizer, ROWS, config, QUICK, run=tmp_path / "cut.run", on_step=interrupt)
    torch.manual_seed(12345)
    resumed = train(llama, tokenizer, ROWS, config, QUICK, run=tmp_path / "cut.run", resume=True)
    assert same(whole, resumed)
    whole_losses, losses = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole.run", "cut.run")
    )
    assert losses == whole_losses


def test_killed_run_resumes_to_the_same_prefix(model_folder, rows_file, tmp_path):
    def command(out: str, *more: str) -> list[str]:
        flags = (
            "--virtual-tokens 4 --steps 12 --batch-size 4 --evaluate-every 4 --checkpoint-every 2 --precision float32"
        )
        where = ["--model", str(model_folder), "--data", str(rows_file), "--out", str(tmp_path / out)]
        return [sys.executable, "-m", "foreword.cli", "train", *where, *flags.split(), *more]

    subprocess.run(command("whole.safetensors"), check=True, capture_output=True)
    running = subprocess.Popen(command("cut.safetensors"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    assert any("step 4/12" in line for line in running.stderr)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    running.stderr.close()
    assert not (tmp_path / "cut.safetensors").exists()
    subprocess.run(command("cut.safetensors", "--resume"), check=True, capture_output=True)
    whole, resumed = (foreword.load(tmp_path / name) for name in ("whole.safetensors", "cut.safetensors"))
    assert same(whole, resumed)


def test_run_cut_off_before_its_first_checkpoint_tells_each_step_once(llama, tokenizer, tmp_path):
    config = replace(QUICK, checkpoint_every=100)

    def cut(progress: foreword.loop.Progress) -> None:
        if progress.step == 3:
            raise RuntimeError("the machine went down")

    with pytest.raises(RuntimeError, match="went down"):
        train(llama, tokenizer, ROWS, SMALL, config, run=tmp_path / "a.run", on_step=cut)
    train(llama, tokenizer, ROWS, SMALL, config, run=tmp_path / "a.run", resume=True)
    told = [json.loads(line)["step"] for line in (tmp_path / "a.run/metrics.jsonl").read_text().splitlines()]
    assert told == [1, 2, 3, 4, 5, 6]


def test_rows_of_all_runs_are_read_before_a_folder_is_touched(llama, tokenizer, tmp_path):
    first = train(llama, tokenizer, ROWS, SMALL, QUICK, run=tmp_path / "a.run")
    jobs = [
        Job(rows, SMALL, QUICK, run=tmp_path / name) for rows, name in ((ROWS, "a.run"), ([{"prompt": "x"}], "b.run"))
    ]
    with pytest.raises(DataError, match="completion"):
        train_many(llama, tokenizer, jobs, overwrite=True)
    assert same(train(llama, tokenizer, ROWS, SMALL, QUICK, run=tmp_path / "a.run", resume=True), first)
    assert not (tmp_path / "b.run").exists()
    with pytest.raises(ConfigError, match="Two runs would write .*a.run"):
        train_many(llama, tokenizer, [jobs[0], jobs[0]])


def test_runs_with_dropout_are_those_of_each_alone(tokenizer):
    model = make_model("gpt2", resid_pdrop=0.3)
    jobs = [Job(ROWS, SMALL, replace(QUICK, dropout=dropout)) for dropout in (False, True)]
    for one, job in zip(train_many(model, tokenizer, jobs), jobs, strict=True):
        assert same(one, train(model, tokenizer, ROWS, SMALL, job.config))
    assert not same(*train_many(model, tokenizer, jobs))


@pytest.mark.parametrize(("held_out", "what"), [(0.2, "held-out loss"), (0.0, "prefix")])
def test_prefix_that_is_no_number_after_the_last_step_is_an_error(held_out, what, llama, tokenizer, tmp_path):
    config = TrainConfig(steps=1, averaging=0.0, held_out_fraction=held_out)
    start = torch.optim.AdamW.step

    def overflow(self, *arguments):
        start(self, *arguments)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(torch.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", overflow)
        with pytest.raises(ConfigError, match=rf"a.run: The {what} became nan at step 1. Lower the learning rate"):
            train(llama, tokenizer, ROWS, SMALL, config, run=tmp_path / "a.run")


def test_held_out_rows_can_be_given(llama, tokenizer):
    prefix = train(llama, tokenizer, ROWS[:20], SMALL, QUICK, held_out=ROWS[20:])
    assert (prefix.metadata["training"]["rows"], prefix.metadata["training"]["held_out_rows"]) == (20, 4)
    last = train(llama, tokenizer, ROWS, SMALL, TrainConfig(steps=2, held_out_fraction=0.0))
    assert last.metadata["training"]["held_out_loss"] is None


def test_mistakes_are_found_before_training(llama, tokenizer, tmp_path):
    with pytest.raises(DataError, match="row 2: 40[0-9] tokens, more than max_length=256"):
        gpt2 = make_model("gpt2", n_positions=260)
        train(gpt2, tokenizer, [ROWS[0], {"prompt": "x" * 380, "completion": "y"}], SMALL)
    with pytest.raises(ConfigError, match="tracker 'nosuch'"):
        train(llama, tokenizer, ROWS, SMALL, TrainConfig(tracker="nosuch"))
    with pytest.raises(ConfigError, match="learning_rate must be positive"):
        TrainConfig(learning_rate=0.0)
    misspelt = replace(SMALL)
    object.__setattr__(misspelt, "initialization", "randm")  # as it comes where types are not checked
    with pytest.raises(ConfigError, match="initialization must be one of demonstrations, .*, got 'randm'"):
        misspelt.__post_init__()
    with pytest.raises(ConfigError, match="nothing is left to train"):
        train(llama, tokenizer, ROWS, PrefixConfig(1))
    with pytest.raises(ConfigError, match="'tensorboard' writes into the run folder"):
        train(llama, tokenizer, ROWS, SMALL, TrainConfig(tracker="tensorboard"))
    with pytest.raises(ConfigError, match="jobs is empty"):
        train_many(llama, tokenizer, [])
    with torch.no_grad():
        llama.lm_head.weight[0] = torch.nan
    with pytest.raises(ConfigError, match="The loss became nan at step 1. Lower the learning rate"):
        train(llama, tokenizer, ROWS, SMALL, QUICK)


def test_tracker_gets_the_metrics(llama, tokenizer, tmp_path):
    train(llama, tokenizer, ROWS, SMALL, TrainConfig(steps=2, tracker="tensorboard"), run=tmp_path / "a.run")
    assert list(Path(tmp_path / "a.run").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("task", ["completion", "classification"])
def test_base_that_lets_no_gradient_through_is_an_error(task, tokenizer):
    """Also where a head would learn alone."""
    head = None if task == "completion" else "ForSequenceClassification"
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}} if head else {}
    model = make_model("llama", head=head, **labels)
    model.model.register_forward_hook(
        lambda _, __, output: output.__setitem__("last_hidden_state", output[0].detach() + 0 * output[0])
    )
    rows = ROWS[:8] if task == "completion" else HEAD_ROWS[task]
    with pytest.raises(ConfigError, match="No gradient reaches the prefix through Llama"):
        train(model, tokenizer, rows, SMALL, TrainConfig(task=task, steps=2, held_out_fraction=0.0))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layers", [1, None])
def test_batch_without_a_mask_is_causal_in_every_layer(layers, packed, llama, tokenizer):
    """With a prefix or without one. Rows of one length, and on a GPU rows end to end too."""
    gpu = torch.cuda.is_available()
    if packed and not gpu:
        pytest.skip("packed rows need a GPU")
    device, precision, near = ("cuda", torch.bfloat16, 0.1) if gpu else ("cpu", torch.float32, 1e-4)
    examples, _ = encode(read_rows(ROWS)[0], tokenizer, tokenizer.chat_template, 256)
    model = llama.to(device, precision)
    rows = [replace(example, input_ids=example.input_ids[: 40 + packed * i]) for i, example in enumerate(examples[:3])]
    whole = random_prefix(llama, 4)
    prefix = foreword.Prefix(whole.sites[:layers], whole.tensors()[:layers], position_offset=4).to(device)
    seen: list[tuple[float, list[torch.Tensor]]] = []
    for maskless in (False, True):
        prefix.zero_grad()
        batch = collate([rows], packed and maskless, maskless).to(torch.device(device))
        with attach(model, prefix):
            loss = completion_loss(model, batch).sum()
            loss.backward()
        seen.append((float(loss.detach()), gradients_of(prefix)))
    (loss, gradients), (other, others) = seen
    assert other == pytest.approx(loss, rel=near)
    for one, two in zip(gradients, others, strict=True):
        assert (one - two).norm() < near * one.norm()


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_runs_that_share_batches_are_those_of_each_alone(device, llama, tokenizer):
    """Of other lengths, seeds, learning rates and ends, with a queue."""
    llama.to(device)
    examples, _ = encode(read_rows(ROWS)[0], tokenizer, tokenizer.chat_template, 256)

    def runs() -> list[Run]:
        made = []
        for number, (length, steps) in enumerate([(3, 7), (5, 4), (4, 9)]):
            config = TrainConfig(steps=steps, seed=number, learning_rate=0.1 / (1 + number), evaluate_every=3)
            start = random_prefix(llama, length, seed=number)
            own = Reparameterization(start, PrefixConfig(length, initialization="random"))
            made.append(Run(own.to(device), config, examples[number:], examples[:5]))
        return made

    def losses(run: Run) -> list[tuple[float, float | None]]:
        kept: list[tuple[float, float | None]] = []
        run.on_step = lambda progress: kept.append((progress.loss, progress.held_out_loss))
        return kept

    together, alone = runs(), runs()
    found, expected = [losses(run) for run in together], [losses(run) for run in alone]
    llama.requires_grad_(False)
    Trainer(llama, TASKS["completion"], together, Accelerator(cpu=device == "cpu"), at_once=2).run()
    for run in alone:
        Trainer(llama, TASKS["completion"], [run], Accelerator(cpu=device == "cpu")).run()
    for mine, theirs, one, other in zip(found, expected, together, alone, strict=True):
        assert len(mine) == one.config.steps
        for (loss, held_out), (right, right_held_out) in zip(mine, theirs, strict=True):
            assert loss == pytest.approx(right, rel=1e-4)
            assert (held_out or 0) == pytest.approx(right_held_out or 0, rel=1e-4)
        assert one.best_step == other.best_step
        for a, b in zip(one.folded().parameters(), other.folded().parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_what_is_kept_is_the_average_of_the_steps(llama, tokenizer):
    """And what is trained goes on from the step itself."""
    examples, _ = encode(read_rows(ROWS)[0], tokenizer, tokenizer.chat_template, 256)
    llama.requires_grad_(False)
    config = replace(QUICK, steps=3, evaluate_every=1, learning_rate=0.3)
    start = random_prefix(llama, 4, seed=0)
    each, averaged = (
        Run(Reparameterization(start, SMALL), replace(config, averaging=share), examples, examples[:3])
        for share in (0.0, 0.6)
    )
    steps, kept = list[torch.Tensor](), list[torch.Tensor]()
    each.keep = lambda loss: steps.append(each.prefix.vector().detach().clone())
    averaged.keep = lambda loss: kept.append(averaged.prefix.vector().detach().clone())
    for run in (each, averaged):
        Trainer(llama, TASKS["completion"], [run], Accelerator(cpu=True)).run()
    expected = Reparameterization(start, SMALL).vector().detach()
    for number, (step, found) in enumerate(zip(steps, kept, strict=True), 1):
        expected = expected.lerp(step, 1 - min(0.6, number / (number + 5)))
        torch.testing.assert_close(found, expected)
    assert torch.equal(averaged.prefix.vector(), steps[-1])


def test_attached_prefix_is_seen_as_the_optimizer_leaves_it(llama, tokenizer):
    """A fused optimizer writes into parameters without a word, and a CUDA graph runs without a forward pass of Python."""
    examples, _ = encode(read_rows(ROWS)[0], tokenizer, tokenizer.chat_template, 256)
    prefix = Reparameterization(random_prefix(llama, 4, seed=0), SMALL)
    run = Run(prefix, replace(QUICK, learning_rate=1.0), examples)
    batch = collate([examples[:2]])
    with attach(llama, prefix), torch.no_grad():
        before = completion_loss(llama, batch)
        for parameter in run.own:
            parameter.grad = torch.ones_like(parameter)
        run.update()
        assert not torch.equal(completion_loss(llama, batch), before)


def test_checkpointing_changes_nothing_but_memory(llama, tokenizer):
    """With runs that share batches, and in parts."""
    examples, _ = encode(read_rows(ROWS)[0], tokenizer, tokenizer.chat_template, 256)
    llama.requires_grad_(False)

    def trained(checkpointing: bool) -> tuple[list[list[float]], list[foreword.Prefix], int]:
        made = list[Run]()
        for length in (3, 5):
            config = TrainConfig(steps=3, micro_batches=2, learning_rate=0.1, gradient_checkpointing=checkpointing)
            start = Reparameterization(random_prefix(llama, length), PrefixConfig(length, initialization="random"))
            made.append(Run(start, config, examples))
        trainer = Trainer(llama, TASKS["completion"], made, Accelerator(cpu=True), at_once=2)
        losses = []
        with StepMemory(torch.device("cpu")) as memory, trainer:
            for _ in range(3):
                losses.append(trainer.step(made).read()[1:])
                memory()
        assert memory.peak is not None
        return losses, [run.prefix.fold(run.prefix.snapshot()) for run in made], memory.peak

    losses, prefixes, much = trained(False)
    again, others, little = trained(True)
    assert again == losses
    assert all(same(a, b) for a, b in zip(prefixes, others, strict=True))
    assert little < 0.75 * much


@pytest.mark.parametrize("mixed", [False, True])
def test_no_step_makes_a_tensor_that_holds_a_prefix_for_each_row(mixed, llama):
    """Forward and backward pass, and decoding."""
    llama.requires_grad_(False)
    rows, length = 16, 200
    prefixes = [random_prefix(llama, length, seed).to(llama.dtype) for seed in range(2)]
    site = prefixes[0].sites[0]
    for_each_row = rows * length * site.num_kv_heads * site.key_dim
    ids = torch.arange(rows)[:, None] + torch.arange(3)
    with attach(llama, prefixes * (rows // 2) if mixed else prefixes[0]), Largest() as largest:
        llama(ids).logits.sum().backward()
        assert largest.numbers < for_each_row
        llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, pad_token_id=259)
    assert rows * site.num_kv_heads * length <= largest.numbers < for_each_row  # scores
