"""PEFT's adapters and Transformers' caches: the same logits there as here, and a reason where that cannot be."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CACHE
from zoo import make_model, tokens

import foreword
from foreword import Prefix
from foreword.errors import EngineError, ForewordError, ModelMismatchError, PrefixFileError
from foreword.initialization import noop_prefix, random_prefix
from foreword.peft_format import export_peft, import_peft

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.{name}. is deprecated:FutureWarning")  # PEFT uses Transformers' old names
    for name in ("is_gradient_checkpointing", "past_key_values")
]

DECODERS = ["gpt2", "llama", "qwen3"]  # learned positions, grouped heads, head dim apart from the width


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def make_adapter(model: Any, kind: str, **options: Any) -> Any:
    config = {"prefix": peft.PrefixTuningConfig, "cartridge": peft.CartridgeConfig}[kind]
    torch.manual_seed(1)
    return peft.get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=5, **options)).eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("prefix", {}),
        ("prefix", {"prefix_projection": True, "encoder_hidden_size": 12}),
        ("cartridge", {"num_frozen_tokens": 2}),
    ],
    ids=["plain", "mlp", "cartridge"],
)
def test_imported_adapter_has_the_logits_of_peft(decoder, tmp_path, kind, options):
    adapter = make_adapter(decoder, kind, **options)
    ids = tokens(2, 7)
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    with torch.no_grad():
        plain, padded = adapter(ids).logits, adapter(ids, attention_mask=mask, position_ids=_placed(mask)).logits
    adapter.save_pretrained(tmp_path)
    prefix = import_peft(tmp_path, decoder)
    assert prefix.metadata["peft"]["peft_type"] == {"prefix": "PREFIX_TUNING"}.get(kind, "CARTRIDGE")
    foreword.save(prefix, tmp_path / "p.safetensors")
    with torch.no_grad(), foreword.attach(decoder, foreword.load(tmp_path / "p.safetensors")):
        torch.testing.assert_close(decoder(ids).logits, plain)
        torch.testing.assert_close(decoder(ids, attention_mask=mask).logits[mask == 1], padded[mask == 1])


def _placed(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


@pytest.mark.parametrize("peft_type", ["prefix_tuning", "cartridge"])
def test_exported_prefix_has_the_logits_of_foreword(decoder, tmp_path, peft_type):
    prefix, ids = foreword.text_prefix(decoder, [7, 8, 9, 10]).float(), tokens(2, 7)  # as PEFT keeps it
    with torch.no_grad(), foreword.attach(decoder, prefix):
        expected = decoder(ids).logits
    adapter = peft.PeftModel.from_pretrained(decoder, str(export_peft(prefix, tmp_path / "out", peft_type)))
    with torch.no_grad():
        torch.testing.assert_close(adapter(ids).logits, expected)
    if peft_type == "cartridge":
        config: Any = adapter.peft_config["default"]
        assert config.num_frozen_tokens == 1  # it starts with the sink of a text


def test_round_trip_keeps_the_numbers_and_the_template(decoder, tmp_path):
    prefix = random_prefix(decoder, 3)
    prefix.metadata["template"] = "{{ messages }} – ü"
    back = import_peft(export_peft(prefix, tmp_path / "out"), decoder)
    assert all(torch.equal(a, b) for a, b in zip(prefix.parameters(), back.parameters(), strict=True))
    assert back.metadata["template"] == prefix.metadata["template"]
    with pytest.raises(PrefixFileError, match="has a PEFT adapter already"):
        export_peft(prefix, tmp_path / "out")


def test_cache_has_the_logits_of_an_attached_prefix(decoder):
    prefix, ids = random_prefix(decoder, 4), tokens(2, 7)
    with torch.no_grad(), foreword.attach(decoder, prefix):
        expected = decoder(ids).logits
    with torch.no_grad():
        for mask in (None, torch.ones(2, 11)):
            output = decoder(ids, attention_mask=mask, **{CACHE: prefix.to_cache(decoder, batch_size=2)})
            torch.testing.assert_close(output.logits, expected)


def test_cache_is_not_made_for_another_model(llama):
    prefix = random_prefix(llama, 4)
    with pytest.raises(ModelMismatchError, match="other weights"):
        prefix.to_cache(make_model("llama", seed=5))
    nameless = Prefix(prefix.sites, prefix.tensors(), position_offset=4)
    with pytest.raises(ModelMismatchError, match=r"has no model.layers.0.self_attn"):
        nameless.to_cache(make_model("gpt2"))


def _other_positions(prefix: Prefix) -> Prefix:
    return Prefix(prefix.sites, prefix.tensors(), position_offset=1, base=prefix.base)


REFUSED = {
    "gated": (lambda: noop_prefix(make_model("llama"), 3), "have gates"),
    "unplaced": (lambda: _other_positions(random_prefix(make_model("llama"), 3)), "start at position 1"),
    "windows": (lambda: random_prefix(make_model("gemma3"), 3), r"sliding windows \(24 tokens\)"),
    "hybrid": (lambda: random_prefix(make_model("lfm2"), 3), r"keep a state .*\(model.layers.0, model.layers.2"),
    "latent": (lambda: random_prefix(make_model("deepseek_v3"), 3), "latent vector"),
    "encoder": (lambda: random_prefix(make_model("bert"), 3), "for encoder attention"),
    "pair": (lambda: random_prefix(make_model("t5"), 3), "for cross and encoder attention"),
    "head": (lambda: random_prefix(make_model("llama"), 3).with_head({"score.weight": torch.ones(2)}), "trained head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_cache_cannot_hold_is_refused_with_the_reason(tmp_path, case):
    make, reason = REFUSED[case]
    prefix = make()
    with pytest.raises(EngineError, match=f"PEFT cannot hold this prefix: .*{reason}"):
        export_peft(prefix, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(EngineError, match=f"A cache of Transformers cannot .*{reason}"):
        prefix.to_cache(make_model("llama"))


def damage(folder, change):
    """Change the adapter's config and tensors."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda c, t: c.update(peft_type="LORA"), EngineError, "of type LORA"),
        (lambda c, t: c.update(num_virtual_tokens=4), PrefixFileError, r"expected \[4"),
        (lambda c, t: c.update(num_transformer_submodules=2), EngineError, "encoder-decoder"),
        (lambda c, t: t.update({"score.weight": torch.ones(1)}), EngineError, "score.weight beside it"),
        (lambda c, t: t.pop("prompt_embeddings"), EngineError, "expected the one tensor prompt_embeddings"),
        (lambda c, t: t["prompt_embeddings"][0, :2].fill_(torch.nan), PrefixFileError, "2 of 288 numbers"),
        (
            lambda c, t: t.update(prompt_embeddings=t["prompt_embeddings"][:, :64].clone()),
            ModelMismatchError,
            "64 numbers a",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_named(llama, tmp_path, change, error, told):
    folder = export_peft(random_prefix(llama, 3), tmp_path / "out")
    damage(folder, change)
    with pytest.raises(error, match=told):
        import_peft(folder, llama)


def test_folders_without_a_whole_adapter_are_named(llama, tmp_path):
    with pytest.raises(PrefixFileError, match=r"adapter_config.json is missing"):
        import_peft(tmp_path, llama)
    folder = export_peft(random_prefix(llama, 3), tmp_path / "out")
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[:100])
    with pytest.raises(PrefixFileError, match="damaged PEFT adapter"):
        import_peft(folder, llama)
    with pytest.raises(ForewordError, match="sliding windows"):  # PEFT would let the prefix slide out of view
        import_peft(export_peft(random_prefix(llama, 3), tmp_path / "b"), make_model("mistral"))


def test_command_writes_and_reads_adapters(run, model_folder):
    prefix = random_prefix(make_model("llama").float(), 3)
    foreword.save(prefix, "p.safetensors")
    for peft_type in ("prefix_tuning", "cartridge"):
        done = run(
            "export", "p.safetensors", "--format", "peft", "--peft-type", peft_type, "--out", peft_type, "--json"
        )
        assert (done.code, json.loads(done.out)["peft_type"]) == (0, peft_type)
        done = run(
            "import", peft_type, "--format", "peft", "--model", model_folder, "--out", f"{peft_type}.safetensors"
        )
        assert f"3 virtual tokens of a {peft_type.upper()} adapter, 288 parameters" in done.out, done.err
        back = foreword.load(f"{peft_type}.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(prefix.parameters(), back.parameters(), strict=True))
    foreword.save(noop_prefix(make_model("llama").float(), 3), "gated.safetensors")
    refused = run("export", "gated.safetensors", "--format", "peft", "--out", "gated")
    assert (refused.code, Path("gated").exists()) == (1, False)
    assert "PEFT cannot hold this prefix" in refused.err
    refused = run("export", "p.safetensors", "--format", "peft", "--sample", "s.bin", "--out", "other")
    assert "--sample and --model belong to --format llamacpp" in refused.err
