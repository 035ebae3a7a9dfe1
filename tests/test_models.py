"""Every family, every feature: what docs/models.md shows. No family is named in the package."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import CACHE, ROWS, cache_of, checkpoint_activations, gradients_of, make_pair_tokenizer, make_tokenizer
from torch import Tensor
from zoo import KEPT_OUT, ZOO, Kind, inputs_of, make_model, named, row, said, tokens

import foreword
from foreword import Prefix, PrefixConfig, TrainConfig, attach, attention_sites, text_prefix, train
from foreword.errors import ConfigError, UnsupportedModelError
from foreword.fingerprint import digest
from foreword.initialization import noop_prefix, random_prefix

GENERATING: tuple[Kind, ...] = ("decoder", "hybrid", "encoder-decoder", "speech")
CONTEXT = tokens(5, seed=1)
feature = pytest.mark.feature


def families(*kinds: Kind) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", named(*kinds))


def kind_of(family: str) -> Kind:
    return (ZOO | KEPT_OUT)[family].kind


def random(model: Any, length: int, seed: int = 0) -> Prefix:
    return random_prefix(model, length, seed).to(model.dtype)


def close(found: Any, expected: Any, within: float = 1e-5) -> None:  # routers and linear attention use float32
    torch.testing.assert_close(found, expected, rtol=within, atol=within)


def after_context(given: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = given["input_ids"]
    return given | {"input_ids": torch.cat([CONTEXT.expand(len(ids), -1), ids], 1)}


def unless_transformers_cannot(call: Callable[[], Any]) -> Any:
    """What the bare model gives; if it cannot do this at all, the reason is what the matrix shows."""
    try:
        return call()
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError, ImportError) as error:
        message = " ".join(str(error).split())
        told = re.sub(r"\{(.*?)\}", lambda held: "{" + ", ".join(sorted(held[1].split(", "))) + "}", message)  # a set
        pytest.skip(f"without a prefix too: {type(error).__name__}: {told[:160]}")  # the same in each run


def gates(model: Any, within: float, length: int = 9, differentiable: bool = True) -> None:
    """A no-op start changes nothing, mixed rows equal rows alone, every tensor gets a gradient, detaching undoes all."""
    inputs, three, five = inputs_of(model, 3, length), random(model, 3), random(model, 5, seed=1)
    with torch.no_grad():
        base = said(model, inputs)
        with attach(model, noop_prefix(model, 4).to(model.dtype)) as attachment:
            close(said(model, inputs), base, within)
            attachment.use([None, three, five])
            mixed = said(model, inputs)
            attachment.use(three)
            alone_three = said(model, row(inputs, 1))
            attachment.use(five)
            alone_five = said(model, row(inputs, 2))
        assert torch.equal(said(model, inputs), base)
    close(mixed, torch.cat([base[:1], alone_three, alone_five]), within)
    assert not torch.allclose(mixed[1:], base[1:], rtol=1e-3, atol=1e-3)
    if differentiable:
        with attach(model, three):
            said(model, inputs).pow(2).sum().backward()
        assert all(gradient.abs().sum() > 0 for gradient in gradients_of(three))


# ------------------------------------------------------------------------------------------------------- exactness


@feature("any attention path")
@pytest.mark.parametrize("path", ["merged", "reference", "eager"])
@families()
def test_gates(family, path, monkeypatch):
    model = make_model(family)
    if path == "reference":
        monkeypatch.setattr("foreword.attachment.has_token_kernel", lambda *_: False)
    if path == "eager":
        unless_transformers_cannot(lambda: model.set_attn_implementation("eager"))
    gates(model, 1e-5, length=30)  # longer than the sliding windows


@feature("padding")
@families("decoder", "hybrid", "encoder", "encoder-decoder", "contrastive")
def test_padding_changes_nothing(family):
    model = make_model(family)
    inputs = inputs_of(model, 1, 7)
    sides = (
        ["left", "right"] if kind_of(family) in ("decoder", "hybrid") else ["right"]
    )  # the others' tokens have fixed places
    with torch.no_grad(), attach(model, random(model, 3)):
        expected = said(model, inputs)
        for side in sides:
            extra = torch.full((1, 4), model.config.get_text_config().pad_token_id)
            pieces = [extra, inputs["input_ids"]] if side == "left" else [inputs["input_ids"], extra]
            ids = torch.cat(pieces, 1)
            mask = torch.zeros_like(ids)
            mask[:, slice(4, None) if side == "left" else slice(0, 7)] = 1
            found = said(model, inputs | {"input_ids": ids, "attention_mask": mask})
            if found.shape != expected.shape:
                found = found[:, 4:] if side == "left" else found[:, :7]
            close(found, expected)


@feature("text as prefix")
@families("decoder")
def test_text_prefix_equals_text_in_context(family):
    model, inputs = make_model(family), inputs_of(make_model(family), 2, 12)
    with torch.no_grad():
        expected = said(model, after_context(inputs))[:, 5:]
        with attach(model, text_prefix(model, CONTEXT.tolist()).double()):
            close(said(model, inputs), expected)


@feature("packing")
@families("decoder")
def test_packed_documents_do_not_see_each_other(family):
    model, first, second = make_model(family), tokens(1, 5), tokens(1, 4, seed=1)
    together, positions = torch.cat([first, second], 1), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    with torch.no_grad():
        bare = model(together, position_ids=positions, use_cache=False).logits
        if not torch.allclose(bare, torch.cat([model(first).logits, model(second).logits], 1), atol=1e-4):
            pytest.skip("the bare model leaks across packed documents")
        with attach(model, random(model, 3)):
            packed = model(together, position_ids=positions, use_cache=False).logits
            close(packed, torch.cat([model(first).logits, model(second).logits], 1))


def weights_of(output: Any) -> list[Tensor]:
    """All attention weights that an output holds."""
    nested = [output[name] for name in ("text_model_output", "vision_model_output") if name in output]
    held = [value for each in (nested or [output]) for name, value in each.items() if name.endswith("attentions")]
    return [weights for layers in held for weights in layers if weights is not None]


@feature("outputs")
@families()
def test_hidden_states_and_attentions_have_the_prefix_first(family):
    """`output_attentions` has P more columns, the virtual tokens; hidden states are those of the real tokens."""
    model, inputs = make_model(family), inputs_of(make_model(family), 2)
    unless_transformers_cannot(lambda: model.set_attn_implementation("eager"))
    asked: Any = inputs | {"output_attentions": True, "output_hidden_states": True}
    prefix = text_prefix(model, CONTEXT.tolist()).double() if kind_of(family) == "decoder" else random(model, 5)
    with torch.no_grad():
        bare = model(**asked)
        if not weights_of(bare):
            pytest.skip("Transformers returns no attention weights of it")
        with attach(model, prefix):
            found = model(**asked)
    for one, other in zip(weights_of(found), weights_of(bare), strict=True):
        assert one.shape == (*other.shape[:-1], 5 + other.shape[-1])
        assert float(one.sum(-1).max()) < 1 + 1e-5
        assert one[..., :5].sum() > 0
    hidden = [name for name in found if name.endswith("hidden_states")]
    assert [len(found[name]) for name in hidden] == [len(bare[name]) for name in hidden]
    if kind_of(family) == "decoder":
        in_context = model(**after_context(asked))
        for one, other in zip(found.hidden_states, in_context.hidden_states, strict=True):
            close(one, other[:, 5:])
        for one, other in zip(found.attentions, in_context.attentions, strict=True):
            close(one, other[:, :, 5:])


@feature("saved and loaded")
@families()
def test_saved_and_loaded_prefix_says_the_same(family, tmp_path):
    model, inputs = make_model(family), inputs_of(make_model(family), 2)
    prefix = random_prefix(model, 3)
    with torch.no_grad(), attach(model, prefix) as attachment:
        expected = said(model, inputs)
        attachment.use(foreword.load(foreword.save(prefix, tmp_path / "p.safetensors")))
        assert torch.equal(said(model, inputs), expected)


# -------------------------------------------------------------------------------------------------------- decoding

OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True,
           "output_logits": True}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {},
    "static cache": {"cache_implementation": "static"},
    "offloaded cache": {"cache_implementation": "offloaded"},
}
GREEDY = {"chunked prefill", "prompt lookup", "assisted", "static cache", "offloaded cache"}  # give what greedy gives


def asked_of(model: Any, rows: int) -> dict[str, Tensor]:
    """What a model is asked before it has said anything."""
    return {name: value for name, value in inputs_of(model, rows, 6).items() if name != "decoder_input_ids"}


def generate(model: Any, given: dict[str, Tensor], options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    mixin: Any = transformers.GenerationMixin  # Whisper's own cuts long sound into windows
    pad = model.config.get_text_config().pad_token_id
    return mixin.generate(model, **given, pad_token_id=pad, **options)


def in_place(model: Any, ids: Tensor) -> None:
    """Skip a model that Transformers does not decode as it reads: a prefix from a text is made as it reads."""
    read = model(ids).logits[:, -1]
    if not torch.allclose(
        generate(model, {"input_ids": ids}, OPTIONS).logits[0], read.to(torch.float32), rtol=1e-3, atol=1e-3
    ):
        pytest.skip("Transformers decodes it at other positions than those its forward takes")


def equal(found: Any, expected: Any) -> None:
    """The same tokens for the same reasons."""
    new = len(expected.logits)
    assert torch.equal(found.sequences[:, -new:], expected.sequences[:, -new:])
    close(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("way", [pytest.param(way, marks=feature(way)) for way in WAYS])
@families(*GENERATING)
def test_generate(family, way):
    """As with the text in context; where no text stands for a prefix, as without a cache."""
    model = make_model(family)
    if way == "offloaded cache" and not torch.cuda.is_available():
        pytest.skip("offloads from a GPU; not run where there is none")
    given, options = asked_of(model, 2), OPTIONS | WAYS[way]
    if way in ("assisted", "prompt lookup"):  # Transformers runs these on one row
        given = row(given, 0)
    if way == "assisted":
        options["assistant_model"] = make_model(family, seed=1)
    unless_transformers_cannot(lambda: generate(model, given, options))
    if kind_of(family) == "decoder":
        in_place(model, tokens(2, 6))
        prefix = text_prefix(model, CONTEXT.tolist()).double()
        expected = generate(model, after_context(given), options)
    else:
        prefix = random(model, 3)
        with attach(model, prefix):
            expected = generate(model, given, (OPTIONS if way in GREEDY else options) | {"use_cache": False})
    with attach(model, prefix):
        equal(generate(model, given, options), expected)


@feature("mixed rows, beams")
@families(*GENERATING)
def test_mixed_rows_with_beams_equal_each_row_alone(family):
    model, options = make_model(family), OPTIONS | {"num_beams": 3, "output_scores": True}
    given, prefix = asked_of(model, 2), random(model, 3)
    bare = generate(model, row(given, 1), options)
    with attach(model, [prefix, None]) as attachment:
        mixed = generate(model, given, options)
        attachment.use(prefix)
        alone = generate(model, row(given, 0), options)
    assert torch.equal(mixed.sequences, torch.cat([alone.sequences, bare.sequences]))
    close(mixed.sequences_scores, torch.cat([alone.sequences_scores, bare.sequences_scores]))


@feature("static cache")
@families("decoder")
def test_mixed_padded_rows_on_a_static_cache(family):
    model = make_model(family).float()  # in float64 Gemma 2's own mask makes padded rows nan
    ids, options = tokens(2, 6) % 200 + 10, OPTIONS | {"cache_implementation": "static"}
    padded = torch.cat([torch.full((2, 3), model.config.pad_token_id), ids], 1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 6)], 1).long()
    in_place(model, ids)
    with attach(model, [text_prefix(model, CONTEXT.tolist()), None]):
        found = generate(model, {"input_ids": padded, "attention_mask": mask}, options)
    alone = [
        generate(model, after_context({"input_ids": ids[:1]}), OPTIONS),
        generate(model, {"input_ids": ids[1:]}, OPTIONS),
    ]
    expected = [torch.cat(step) for step in zip(*(a.logits for a in alone), strict=True)]
    close(torch.stack(found.logits), torch.stack(expected), 1e-3)


@feature("static cache")
@families("decoder")
def test_static_cache_filled_in_pieces(family):
    """Without a mask: the empty slots behind the tokens are not seen."""
    model, ids = make_model(family), tokens(2, 8)
    prefix = text_prefix(model, CONTEXT.tolist()).double()
    with torch.no_grad():
        expected = model(**after_context({"input_ids": ids})).logits[:, 5:]
        with attach(model, prefix):
            cache = {CACHE: transformers.StaticCache(config=model.config, max_cache_len=20)}
            found = [model(piece, **cache).logits for piece in ids.split((3, 4, 1), 1)]
    close(torch.cat(found, 1), expected)


@feature("manual steps")
@families(*GENERATING)
def test_manual_steps_on_a_cache_equal_one_pass(family):
    model, prefix = make_model(family), random(make_model(family), 3)
    inputs = inputs_of(model, 2)
    grows = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    with torch.no_grad(), attach(model, prefix):
        whole, found, past = model(**inputs).logits, [], {}
        for piece in inputs[grows].split([3, 2, *[1] * (inputs[grows].shape[1] - 5)], 1):
            output = model(**(inputs | {grows: piece}), use_cache=True, **past)
            found, past = [*found, output.logits], cache_of(output)
    close(torch.cat(found, 1), whole)


@feature("several turns")
@families("decoder", "hybrid")
def test_second_turn_on_the_cache_of_the_first(family):
    model, options = make_model(family), OPTIONS | {"max_new_tokens": 2}
    prefix = text_prefix(model, CONTEXT.tolist()).double()
    with attach(model, prefix):
        first = generate(model, asked_of(model, 2), options)
        turn = {"input_ids": torch.cat([first.sequences, tokens(2, 3, seed=4)], 1)}
        found = generate(model, turn, options | cache_of(first))
        again = generate(model, turn, options | {"use_cache": False})
    if kind_of(family) == "decoder":
        in_place(model, tokens(2, 6))
        again = generate(model, after_context(turn), options)
    equal(found, again)


@feature("inputs_embeds")
@families("decoder", "hybrid", "encoder-decoder")
def test_generate_from_embeddings(family):
    model, prefix = make_model(family), random(make_model(family), 3)
    given = asked_of(model, 2)
    embeds = {"inputs_embeds": embed(model, given["input_ids"])}
    bare = unless_transformers_cannot(lambda: generate(model, embeds, OPTIONS))
    equal(bare, generate(model, given, OPTIONS))
    with attach(model, prefix):
        equal(generate(model, embeds, OPTIONS), generate(model, given, OPTIONS))


def embed(model: Any, ids: Tensor) -> Tensor:
    """What the model would look up: some multiply it by a constant on the way."""
    table = model.get_input_embeddings()
    scale = getattr(model.get_encoder(), "embed_scale", 1.0) if model.config.is_encoder_decoder else 1.0
    return table(ids) * (1.0 if hasattr(table, "embed_scale") else scale)


@feature("quantized cache")
@families(*GENERATING)
@pytest.mark.filterwarnings("ignore")  # Quanto's own
def test_quantized_cache_is_close_to_a_whole_one(family):
    pytest.importorskip("optimum.quanto")
    model = make_model(family).float()
    given, quantized = asked_of(model, 2), OPTIONS | QUANTIZED
    bare = unless_transformers_cannot(lambda: generate(model, given, quantized))
    lost = error_of(bare, generate(model, given, OPTIONS))
    with attach(model, random(model, 3)):
        error = error_of(generate(model, given, quantized), generate(model, given, OPTIONS))
    assert 0 < error < max(3 * lost, 0.1)


QUANTIZED = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4, "residual_length": 2,
             "q_group_size": 8}}  # fmt: skip


def error_of(found: Any, expected: Any) -> float:
    """How far the second step's logits are off, relative to their size: the first that reads the cache."""
    return float((found.logits[1] - expected.logits[1]).norm() / expected.logits[1].norm())


# -------------------------------------------------------------------------------------------------------- training


@feature("foreword train")
@families("decoder", "hybrid", "encoder-decoder")
def test_foreword_train(family, tmp_path):
    model, tokenizer = make_model(family).float(), make_tokenizer()
    if kind_of(family) == "encoder-decoder":
        tokenizer = make_pair_tokenizer()
        tokenizer.eos_token = "<sep>"
    before, losses = digest(model), []
    config = TrainConfig(steps=10, learning_rate=0.1, held_out_fraction=0.0)
    prefix = train(
        model, tokenizer, ROWS[:8], PrefixConfig(num_virtual_tokens=4), config, on_step=lambda p: losses.append(p.loss)
    )
    assert min(losses[-3:]) < losses[0]
    assert digest(model) == before
    loaded = foreword.load(foreword.save(prefix, tmp_path / "p.safetensors"))
    with torch.no_grad(), attach(model, prefix) as attachment:
        inputs = inputs_of(model, 2)
        expected = said(model, inputs)
        attachment.use(loaded)
        assert torch.equal(said(model, inputs), expected)


def without_dropout(model: Any) -> Any:
    """In training mode, but with the same result each time."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def labelled(family: str) -> tuple[Any, dict[str, Any]]:
    """A model that computes its own loss, in float32, and its inputs with labels."""
    kind = kind_of(family)
    model = make_model(family, head="ForSequenceClassification" if kind == "encoder" else None).float()
    inputs: dict[str, Any] = inputs_of(model, 4)
    if kind in ("decoder", "hybrid"):
        inputs["labels"] = inputs["input_ids"]
    elif kind in ("encoder", "vision"):
        inputs["labels"] = torch.tensor([0, 1, 1, 0])
    elif kind == "contrastive":
        inputs["return_loss"] = True
    else:
        inputs["labels"] = inputs.pop("decoder_input_ids")
    return without_dropout(model.requires_grad_(False)), inputs


@feature("Trainer")
@families()
def test_trainer_trains_an_attached_prefix(family, tmp_path):
    model, inputs = labelled(family)
    rows = [
        {name: value[i] if isinstance(value, Tensor) else value for name, value in inputs.items()} for i in range(4)
    ]

    def collate(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        return {k: torch.stack([r[k] for r in chosen]) if isinstance(v, Tensor) else v for k, v in chosen[0].items()}

    arguments = transformers.TrainingArguments(
        str(tmp_path), learning_rate=0.01, max_steps=6, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        disable_tqdm=True, logging_steps=1, use_cpu=True,
    )  # fmt: skip
    prefix, before = random(model, 4), digest(model)
    start = [parameter.clone() for parameter in prefix.parameters()]
    with attach(model, prefix):
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(losses[-2:]) < losses[0]
    assert digest(model) == before
    assert not any(torch.equal(a, b) for a, b in zip(prefix.parameters(), start, strict=True))


@feature("SFTTrainer")
@families("decoder", "hybrid")
@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_sft_trainer_trains_an_attached_prefix(family, tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = without_dropout(make_model(family).float().requires_grad_(False))
    prefix, before = random(model, 4), digest(model)
    config = trl.SFTConfig(
        str(tmp_path), learning_rate=0.03, max_steps=6, per_device_train_batch_size=8, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_steps=1, use_cpu=True, max_length=64, bf16=False,
    )  # fmt: skip
    with attach(model, prefix):
        trainer = trl.SFTTrainer(
            model, config, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(ROWS[:8])
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(losses[-2:]) < losses[0]
    assert digest(model) == before


def gradients(model: Any, prefix: Prefix, inputs: dict[str, Any]) -> list[Tensor]:
    prefix.zero_grad()
    with attach(model, prefix):
        output = said(model, inputs)
        generator = torch.Generator().manual_seed(5)
        (
            output * torch.randn(output.shape, generator=generator)
        ).mean().backward()  # squares have no gradient behind a norm
    return gradients_of(prefix)


@feature("gradient checkpointing")
@families()
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # PyTorch, of re-entrant checkpointing
def test_checkpointed_gradients_are_the_same_and_reentrant_ones_refused(family):
    model = without_dropout(make_model(family).requires_grad_(False))
    inputs, prefix = inputs_of(model, 2), random(model, 3)
    expected = gradients(model, prefix, inputs)
    unless_transformers_cannot(lambda: checkpoint_activations(model, reentrant=False))
    close(gradients(model, prefix, inputs), expected)
    checkpoint_activations(model, reentrant=True)
    with pytest.raises(ConfigError, match="use_reentrant': False"):
        gradients(model, prefix, inputs)
    with attach(model, prefix):  # switched on while attached, as trainers do
        checkpoint_activations(model, reentrant=True)
        with pytest.raises(ConfigError, match="use_reentrant': False"):
            said(model, inputs)


@feature("bf16 autocast")
@families()
def test_autocast_gives_nearly_the_gradients_of_float32(family):
    model = make_model(family).float().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.mul_(0.25 if parameter.dim() == 2 else 1)  # logits that bfloat16 can hold
    inputs, prefix = inputs_of(model, 2), random(model, 4)
    expected = torch.cat([gradient.flatten() for gradient in gradients(model, prefix, inputs)])
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.cat([gradient.flatten() for gradient in gradients(model, prefix, inputs)])
    assert torch.cosine_similarity(found, expected, dim=0) > 0.98


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> dict[str, str]:
    """What compiled.py prints of each family, in a fresh interpreter: the tests' shape checks cannot be compiled."""
    script = Path(__file__).with_name("compiled.py")
    items: Any = request.session.items
    chosen = {item.callspec.params["family"] for item in items if "compiled" in getattr(item, "fixturenames", ())}
    done = subprocess.run([sys.executable, str(script), *chosen], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@feature("compiled layers")
@families()
def test_layers_compile_without_graph_breaks(family, compiled):
    assert compiled[f"{family} layers"] == "same"


@pytest.mark.parametrize("family", ["llama"])
def test_one_compiled_graph_serves_all_layers(family, compiled):
    assert compiled[f"{family} one graph"] == "same"


@pytest.mark.parametrize("family", ["llama"])
def test_compiled_layers_are_checkpointed(family, compiled):
    assert compiled[f"{family} checkpointed layers"] == "same"


@feature("compiled static cache")
@families("decoder", "hybrid")
def test_static_cache_compiles(family, compiled):
    outcome = compiled[f"{family} static cache"]
    if outcome.startswith("without a prefix too"):
        pytest.skip(outcome)
    assert outcome == "same"


@feature("LoRA together")
@families()
@pytest.mark.filterwarnings("ignore")  # PEFT's own, on GPT-2's transposed layers
def test_lora_and_a_prefix_together(family):
    peft = pytest.importorskip("peft")
    model = make_model(family).requires_grad_(False)
    inputs = inputs_of(model, 2)
    bare = said(model, inputs)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = unless_transformers_cannot(lambda: peft.get_peft_model(model, config).double())
    base = said(adapted, inputs).detach()
    assert not torch.allclose(base, bare)
    inner, prefix = adapted.get_base_model(), random(adapted.get_base_model(), 3)
    with attach(adapted, noop_prefix(inner, 3).double()) as attachment:
        close(said(adapted, inputs), base)
        attachment.use([prefix, None])
        mixed = said(adapted, inputs)
        attachment.use(prefix)
        found = said(adapted, inputs)
        close(mixed, torch.stack([found[0], base[1]]))
        found.pow(2).mean().backward()
    if kind_of(family) == "decoder":
        expected = said(adapted, after_context(inputs))[:, 5:]
        with attach(adapted, text_prefix(inner, CONTEXT.tolist()).double()):
            close(said(adapted, inputs), expected)
    assert all(gradient.abs().sum() > 0 for gradient in gradients_of(prefix))
    lora = [p for name, p in adapted.named_parameters() if "lora_" in name and p.grad is not None]
    assert lora
    assert sum(bool(p.grad.abs().sum() > 0) for p in lora if p.grad is not None) > 0.5 * len(lora)  # experts may idle


def quantized(whole: Any, folder: Path, **options: Any) -> Any:
    """The same weights, loaded by bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    whole.save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(**options)
    model = type(whole).from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()
    if not any(type(parameter).__name__ in ("Int8Params", "Params4bit") for parameter in model.parameters()):
        pytest.skip("has no linear layers that bitsandbytes quantizes")
    return model


@feature("8-bit base")
@families()
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes itself
def test_base_in_8_bit(family, tmp_path):
    whole = make_model(family).float()
    # Without outliers in a precision of their own, which are chosen by what else is in the batch.
    model = unless_transformers_cannot(lambda: quantized(whole, tmp_path, load_in_8bit=True, llm_int8_threshold=0.0))
    unless_transformers_cannot(lambda: said(model, inputs_of(model, 2)))
    gates(model, 2e-3)
    prefix = foreword.load(foreword.save(random(model, 3), tmp_path / "p.safetensors"))
    with attach(whole, prefix), attach(model, prefix):  # of one base, in two precisions
        pass


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes itself
def test_base_in_4_bit(tmp_path):
    """Training it is test_quantized's: bitsandbytes' kernels for newer CPUs let no gradient through by themselves."""
    whole = make_model("llama", hidden_size=128, intermediate_size=128, head_dim=32).float()  # blocks of 64 weights
    gates(quantized(whole, tmp_path, load_in_4bit=True), 1e-3, differentiable=False)


@feature("device_map")
@families()
@pytest.mark.filterwarnings("ignore:The following device_map keys")  # a parameter beside the submodules
def test_base_spread_by_a_device_map(family, tmp_path):
    """Here the layers' weights lie on the disk; on machines with several devices the same hooks move them."""
    whole = make_model(family).float()
    whole.save_pretrained(tmp_path / "base")
    spread: Any = unless_transformers_cannot(
        lambda: type(whole).from_pretrained(
            tmp_path / "base", device_map=layers_on_disk(whole), offload_folder=tmp_path / "offload"
        )
    ).eval()
    assert any(parameter.is_meta for parameter in spread.parameters())
    gates(spread, 1e-4)
    inputs, prefix = inputs_of(spread, 2), random(spread, 3)
    with attach(whole, prefix), attach(spread, prefix):
        close(said(spread, inputs), said(whole, inputs), 1e-4)


def layers_on_disk(model: Any) -> dict[str, str]:
    def places(module: torch.nn.Module, name: str) -> dict[str, str]:
        inner = [
            (n, child)
            for n, child in module.named_children()
            if any(isinstance(m, torch.nn.ModuleList) for m in child.modules())
        ]
        if isinstance(module, torch.nn.ModuleList) or not inner:
            return {name: "disk" if isinstance(module, torch.nn.ModuleList) else "cpu"}
        found = dict.fromkeys([f"{name}.{n}" if name else n for n in (*module._parameters, *module._buffers)], "cpu")
        for n, child in module.named_children():
            found |= places(child, f"{name}.{n}" if name else n)
        return found

    return places(model, "")


# ------------------------------------------------------------------------------------------------ heads, and the rest


@pytest.mark.parametrize(
    "head",
    [
        pytest.param("ForSequenceClassification", marks=feature("classification head")),
        pytest.param("ForTokenClassification", marks=feature("token classification head")),
        pytest.param("ForQuestionAnswering", marks=feature("question answering head")),
    ],
)
@families("decoder", "hybrid", "encoder", "encoder-decoder")
def test_model_with_a_head_passes_the_gates(family, head):
    stem = (ZOO | KEPT_OUT)[family].stem
    if not hasattr(transformers, stem + head):
        pytest.skip("Transformers has no such class")
    model = make_model(family, head=head)
    if model.config.is_encoder_decoder:
        pytest.skip("heads on encoder-decoders are not trained by Foreword")
    gates(model, 1e-5)


@pytest.mark.parametrize("family", named("hybrid"))
def test_layers_without_attention_get_no_site_and_are_named(family, tmp_path, run):
    model = make_model(family)
    kinds = model.config.layer_types if family != "falcon_h1" else ["full_attention"] * 3
    wanted = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    assert [int(site.name.split(".")[2]) for site in attention_sites(model)] == wanted
    others = [f"model.layers.{i}" for i in range(len(kinds)) if i not in wanted]
    file = foreword.save(random(model, 3), tmp_path / "p.safetensors")
    shown = run("show", file).out
    assert all(name in shown for name in others)
    assert ("no attention there" in shown) == bool(others)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # of Transformers, in its DeBERTa
@pytest.mark.parametrize(
    ("stem", "fields"),
    [
        ("Bloom", {"vocab_size": 99, "hidden_size": 32, "n_layer": 1, "n_head": 2}),
        ("Falcon", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}),
        ("DebertaV2", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}),
    ],
)
def test_model_outside_the_registry_is_refused_by_name(stem, fields):
    model = getattr(transformers, f"{stem}Model")(getattr(transformers, f"{stem}Config")(**fields)).eval()
    with pytest.raises(UnsupportedModelError, match=f"{stem}Model does not call its attention through"):
        random_prefix(model, 3)
