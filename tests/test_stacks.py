"""Models with an encoder, or that read images or sound: each stack has its own prefix."""

import json
from typing import Any

import pytest
import torch
import transformers
from tiny import ROWS, gradients_of, make_pair_tokenizer, tokens
from torch import Tensor

import foreword
from foreword import Prefix, PrefixConfig, attach, attention_sites
from foreword.errors import ConfigError, UnsupportedModelError
from foreword.initialization import initialize, noop_prefix, random_prefix
from foreword.reparameterization import Reparameterization

_BART = {
    "vocab_size": 260, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {"vocab_size": 260, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "pad_token_id": 1,
       "eos_token_id": 3, "decoder_start_token_id": 2}  # fmt: skip
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_IMAGE = _TOWER | {"image_size": 8, "patch_size": 4}
_TEXT = _TOWER | {
    "vocab_size": 260,
    "max_position_embeddings": 40,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 1,
}
_SOUND = _BART | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 40, "suppress_tokens": None,
                  "begin_suppress_tokens": None}  # fmt: skip
_WAV: Any = _TOWER | {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_conv_pos_embeddings": 4,
                      "num_conv_pos_embedding_groups": 2}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", _T5),
    "t5_wide": ("T5ForConditionalGeneration", _T5 | {"d_kv": 12, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", _BART),
    "marian": ("MarianMTModel", _BART),
    "whisper": ("WhisperForConditionalGeneration", {k: v for k, v in _SOUND.items() if k != "max_position_embeddings"}),
    "vit": ("ViTForImageClassification", _IMAGE),
    "clip": ("CLIPModel", {"text_config": _TEXT, "vision_config": _IMAGE, "projection_dim": 16}),
}
TRANSLATORS = ["t5", "t5_wide", "bart", "marian", "whisper"]
KINDS = {"encoder", "self", "cross"}


def make(family: str) -> Any:
    name, fields = MODELS[family]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**fields)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3)
    return model


def inputs_of(model: Any, rows: int) -> dict[str, Tensor]:
    """Different rows of what the model reads, and what its decoder has said so far."""
    noise = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    ids = tokens(rows, 9) % 200 + 10
    kind = type(model).__name__
    if kind == "ViTForImageClassification":
        return {"pixel_values": noise}
    if kind == "CLIPModel":
        return {"pixel_values": noise, "input_ids": ids}
    said = {"decoder_input_ids": tokens(rows, 6, seed=1) % 200 + 10}
    if kind.startswith("Whisper"):
        sound = torch.randn(rows, 8, 24, generator=torch.Generator().manual_seed(1)).double()
        return {"input_features": sound} | said
    return {"input_ids": ids} | said


def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Everything the model says about each row, side by side."""
    output = model(**inputs)
    if hasattr(output, "image_embeds"):
        return torch.cat([output.image_embeds, output.text_embeds], 1)
    return output.logits


def random(model: Any, length: int | dict[str, int], seed: int = 0) -> Prefix:
    return random_prefix(model, length, seed).double()


def row(inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: value[i : i + 1] for name, value in inputs.items()}


@pytest.fixture(params=["merged", "reference", "eager"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr("foreword.attachment.has_token_kernel", lambda *_: False)
    return request.param


@pytest.mark.parametrize("family", MODELS)
def test_gates(family, path):
    model = make(family)
    if path == "eager":
        model.set_attn_implementation("eager")
    close = 1e-5 if path == "eager" else 1e-9
    exact: dict[str, Any] = {"rtol": close, "atol": close}
    inputs, three, five = inputs_of(model, 3), random(model, 3), random(model, 5, seed=1)
    with torch.no_grad():
        base = run(model, inputs)
        with attach(model, noop_prefix(model, 4).double()) as attachment:
            torch.testing.assert_close(run(model, inputs), base, **exact)
            attachment.use([None, three, five])
            mixed = run(model, inputs)
            attachment.use(three)
            alone_three = run(model, row(inputs, 1))
            attachment.use(five)
            alone_five = run(model, row(inputs, 2))
        assert torch.equal(run(model, inputs), base)
    torch.testing.assert_close(mixed, torch.cat([base[:1], alone_three, alone_five]), **exact)
    assert not torch.allclose(mixed[1:], base[1:])
    with attach(model, three):
        run(model, inputs).pow(2).sum().backward()
    assert all(gradient.abs().sum() > 0 for gradient in gradients_of(three))


@pytest.mark.parametrize("family", TRANSLATORS)
def test_an_encoder_decoder_has_three_independent_prefixes(family, tmp_path):
    model, inputs = make(family), inputs_of(make(family), 2)
    lengths = {"encoder": 2, "self": 3, "cross": 5}
    prefix = random(model, lengths)
    assert prefix.lengths == lengths
    assert {site.kind for site in attention_sites(model)} == KINDS
    file = foreword.save(prefix.float(), tmp_path / "p.safetensors")
    loaded = foreword.load(file).double()
    assert loaded.lengths == lengths
    singles = [random(model, {kind: 3}) for kind in KINDS]
    found = []
    with torch.no_grad(), attach(model, loaded) as attachment:
        for each in [loaded, *singles]:  # each kind alone is another function
            attachment.use(each)
            found.append(run(model, inputs))
    assert all(not torch.allclose(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", TRANSLATORS)
def test_generation_equals_stepping_without_a_cache(family, beams):
    """Mixed rows; the encoder runs once, before the rows are repeated for the beams."""
    model, prefix = make(family), random(make(family), 3)
    given = {name: value for name, value in inputs_of(model, 2).items() if name != "decoder_input_ids"}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "return_dict_in_generate": True,
                               "output_scores": True}  # fmt: skip
    with attach(model, [prefix, None]) as attachment:
        mixed = generate(model, given, options)
        uncached = generate(model, given, options | {"use_cache": False})
        attachment.use(prefix)
        alone = generate(model, row(given, 0), options)
    bare = generate(model, row(given, 1), options)
    assert torch.equal(mixed, uncached)
    width = max(alone.shape[1], bare.shape[1])
    both = [torch.nn.functional.pad(each, (0, width - each.shape[1]), value=1) for each in (alone, bare)]
    assert torch.equal(mixed, torch.cat(both))


def generate(model: Any, given: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    mixin: Any = transformers.GenerationMixin  # Whisper's own cuts long sound into windows
    return mixin.generate(model, **given, **options).sequences


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_padding_of_the_source_changes_nothing(family):
    model = make(family)
    inputs = inputs_of(model, 2)
    padded = {name: torch.cat([value, torch.ones_like(value[:, :3])], 1) for name, value in inputs.items()}
    mask = (padded["input_ids"] != 1).long()
    with torch.no_grad(), attach(model, random(model, 3)):
        found = model(**padded, attention_mask=mask).logits[:, :6]
        torch.testing.assert_close(found, model(**inputs).logits)


@pytest.mark.parametrize("mlp", ["none", "mlp"])
def test_three_lengths_train_and_fold(tokenizer, mlp):
    model = make("t5")
    config = PrefixConfig(
        num_virtual_tokens=3,
        num_encoder_virtual_tokens=2,
        num_cross_virtual_tokens=0,
        initialization="random",
        reparameterization=mlp,
        mlp_width=8,
    )
    start: Any = initialize(model, tokenizer, [], config)
    assert start.lengths == {"encoder": 2, "self": 3}
    source = Reparameterization(start, config).double()
    folded = source.fold()
    for one, other in zip(folded.tensors(), start.tensors(), strict=True):
        torch.testing.assert_close(one.key.float(), other.key.float())
        torch.testing.assert_close(one.value.float(), other.value.float())
    with attach(model, source), source.once(lambda gradient: gradient):
        run(model, inputs_of(model, 2)).pow(2).sum().backward()
    for kind in start.lengths:
        mlps: Any = source.mlps
        trained = source.rows[kind] if mlps is None else mlps[kind][-1].weight
        assert float(trained.grad.abs().sum()) > 0


def test_what_an_encoder_decoder_cannot_do_says_why(llama, tokenizer):
    model = make("bart")
    with pytest.raises(ConfigError, match="BartForConditionalGeneration cannot start from text"):
        foreword.text_prefix(model, [5, 6, 7])
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no encoder attention"):
        config = PrefixConfig(num_encoder_virtual_tokens=3, initialization="random")
        initialize(llama, tokenizer, [], config)
    wav2vec = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**_WAV))
    with pytest.raises(UnsupportedModelError, match="Wav2Vec2Model could not be probed with no inputs"):
        attention_sites(wav2vec)
    assert len(attention_sites(wav2vec, {"input_values": torch.randn(1, 64)})) == 2
    with attach(wav2vec, random_prefix(wav2vec, 3)):
        assert torch.isfinite(wav2vec(torch.randn(2, 80)).last_hidden_state).all()


@pytest.mark.feature("foreword train")
@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_text_to_text_is_trained_measured_and_answered(family, tmp_path, run):
    """The command, from rows to answers: the encoder reads the prompt, the decoder says the completion."""
    tokenizer = make_pair_tokenizer()
    tokenizer.eos_token = "<sep>"
    make(family).float().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[:8]))
    options = "--virtual-tokens 8 --cross-virtual-tokens 4 --steps 60 --learning-rate 0.3 --held-out rows.jsonl"
    result = run("train", *["--model", "base", "--data", "rows.jsonl", "--out", "twice.safetensors"], *options.split())
    assert result.code == 0, result.err
    losses = [json.loads(line)["loss"] for line in (tmp_path / "twice.run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.3
    assert foreword.load("twice.safetensors").lengths == {"encoder": 8, "self": 8, "cross": 4}
    result = run("evaluate", "twice.safetensors", "--data", "rows.jsonl", "--json")
    assert json.loads(result.out)["metrics"].keys() == {"prefix", "base"}
    base: Any = foreword.load_base("base")
    with attach(base.model, foreword.load("twice.safetensors")):
        for row in ROWS[:3]:
            ids = base.tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
            made = base.model.generate(ids, max_new_tokens=8, do_sample=False)[0]
            said = base.tokenizer.decode(made, skip_special_tokens=True).strip()
            answer = run("generate", row["prompt"], "--prefix", "twice.safetensors", "--max-new-tokens", 8)
            assert answer.out.strip() == said, answer.err
