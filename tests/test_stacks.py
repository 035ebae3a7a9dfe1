"""Models with an encoder, or that read images or sound: each stack has its own prefix."""

import json
from typing import Any

import pytest
import torch
import transformers
from tiny import ROWS, make_pair_tokenizer
from zoo import inputs_of, make_model, named, said

import foreword
from foreword import Prefix, PrefixConfig, attach, attention_sites
from foreword.errors import ConfigError, UnsupportedModelError
from foreword.initialization import initialize, random_prefix
from foreword.reparameterization import Reparameterization

_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_WAV: Any = _TOWER | {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_conv_pos_embeddings": 4,
                      "num_conv_pos_embedding_groups": 2}  # fmt: skip
TRANSLATORS = named("encoder-decoder", "speech")
KINDS = {"encoder", "self", "cross"}


def random(model: Any, length: int | dict[str, int], seed: int = 0) -> Prefix:
    return random_prefix(model, length, seed).double()


@pytest.mark.parametrize("family", TRANSLATORS)
def test_an_encoder_decoder_has_three_independent_prefixes(family, tmp_path):
    model, inputs = make_model(family), inputs_of(make_model(family), 2)
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
            found.append(said(model, inputs))
    assert all(not torch.allclose(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("mlp", ["none", "mlp"])
def test_three_lengths_train_and_fold(tokenizer, mlp):
    model = make_model("t5")
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
    with attach(model, source), source.once():
        said(model, inputs_of(model, 2)).pow(2).sum().backward()
    for kind in start.lengths:
        mlps: Any = source.mlps
        trained = source.rows[kind] if mlps is None else mlps[kind][-1].weight
        assert float(trained.grad.abs().sum()) > 0


def test_what_an_encoder_decoder_cannot_do_says_why(llama, tokenizer):
    model = make_model("bart")
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
    make_model(family).float().save_pretrained(tmp_path / "base")
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
