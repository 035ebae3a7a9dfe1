"""The correctness gates, for each family, on the merged and on the reference path."""

import copy

import pytest
import torch
from tiny import cache_of, gradients_of
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    GenerationConfig,
    PreTrainedModel,
)
from zoo import make_model, tokens

import foreword
from foreword import Prefix, attach, attention_sites, text_prefix
from foreword.errors import ConfigError, ModelMismatchError, PositionError, UnsupportedModelError
from foreword.initialization import noop_prefix, random_prefix

pytestmark = pytest.mark.usefixtures("path")
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(params=["merged", "reference", "eager"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Merged kernels; concatenation in front of sdpa; concatenation in front of the model's own eager attention."""
    if request.param == "reference":
        monkeypatch.setattr("foreword.attachment.has_token_kernel", lambda *_: False)
    return request.param


@pytest.fixture
def model(model: PreTrainedModel, path: str) -> PreTrainedModel:
    if path == "eager":
        model.set_attn_implementation("eager")
    return model


@pytest.fixture
def exact(path: str) -> dict[str, float]:
    """Eager attention takes its softmax in float32."""
    return {"rtol": 1e-5, "atol": 1e-5} if path == "eager" else TIGHT


def double(prefix: Prefix) -> Prefix:
    return prefix.double()


def random(model: PreTrainedModel, length: int, seed: int = 0) -> Prefix:
    return double(random_prefix(model, length, seed))


def logits(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def test_detached_model_is_itself_again(model):
    ids, before = tokens(2, 7), copy.deepcopy(model.state_dict())
    expected = logits(model, ids)
    attachment = attach(model, random(model, 4))
    assert not torch.equal(logits(model, ids), expected)
    attachment.detach()
    attachment.detach()
    assert torch.equal(logits(model, ids), expected)
    with attach(model, random(model, 4)):
        pass
    assert torch.equal(logits(model, ids), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_text_prefix_equals_text_in_context(model, exact):
    context, ids = tokens(5, seed=1), tokens(2, 9)
    together = torch.cat([context.expand(2, -1), ids], 1)
    with attach(model, double(text_prefix(model, context.tolist()))):
        found = logits(model, ids)
    torch.testing.assert_close(found, logits(model, together)[:, 5:], **exact)


def test_noop_equals_base(model, exact):
    ids = tokens(2, 7)
    with attach(model, double(noop_prefix(model, 3))):
        torch.testing.assert_close(logits(model, ids), logits_without(model, ids), **exact)


def logits_without(model: PreTrainedModel, ids: Tensor) -> Tensor:
    bare = copy.deepcopy(model)
    for module in bare.modules():
        module.__dict__.pop("_foreword_handler", None)
    return logits(bare, ids)


def test_every_tensor_of_every_site_gets_a_gradient(model):
    for prefix in (random(model, 3), double(noop_prefix(model, 3))):
        with attach(model, prefix):
            model(input_ids=tokens(2, 7), labels=tokens(2, 7)).loss.backward()
        named = dict(prefix.named_parameters())
        wanted = named if prefix.gates is None else {n: p for n, p in named.items() if n.startswith("gates")}
        assert len(prefix.keys) == len(attention_sites(model))
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wanted.values())


def test_cached_decoding_equals_full_forward(model, exact):
    ids = tokens(2, 8)
    with attach(model, random(model, 3)):
        full = logits(model, ids)
        with torch.no_grad():
            first = model(input_ids=ids[:, :5], use_cache=True)
            second = model(input_ids=ids[:, 5:7], **cache_of(first), use_cache=True)
            third = model(input_ids=ids[:, 7:], **cache_of(second), use_cache=True)
    stepwise = torch.cat([first.logits, second.logits, third.logits], 1)
    torch.testing.assert_close(stepwise, full, **exact)


def test_mixed_rows_with_beams_equal_each_row_alone(model, exact):
    context, ids = tokens(5, seed=1), tokens(2, 6)
    options = {
        "max_new_tokens": 6,
        "num_beams": 3,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 259,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    in_context = model.generate(torch.cat([context[None], ids[:1]], 1), **options)
    bare = model.generate(ids[1:], **options)
    with attach(model, [double(text_prefix(model, context.tolist())), None]):
        mixed = model.generate(ids, **options)
    assert torch.equal(mixed.sequences, torch.cat([in_context.sequences[:, 5:], bare.sequences]))
    expected = torch.cat([in_context.sequences_scores, bare.sequences_scores])
    torch.testing.assert_close(mixed.sequences_scores, expected, **exact)


def test_padding_changes_nothing(model, exact):
    short, long = tokens(1, 4), tokens(1, 9, seed=1)
    pad = torch.full((1, 5), 259)
    with attach(model, random(model, 3)):
        alone = logits(model, short)
        left = logits(
            model,
            torch.cat([torch.cat([pad, short], 1), long]),
            attention_mask=torch.tensor([[0] * 5 + [1] * 4, [1] * 9]),
        )
        right = logits(
            model,
            torch.cat([torch.cat([short, pad], 1), long]),
            attention_mask=torch.tensor([[1] * 4 + [0] * 5, [1] * 9]),
        )
        unmasked = logits(model, torch.cat([torch.cat([short, pad], 1), long]))
    for found in (left[:1, 5:], right[:1, :4], unmasked[:1, :4]):
        torch.testing.assert_close(found, alone, **exact)
    torch.testing.assert_close(left[1], right[1], **exact)


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_sliding_windows_never_lose_the_prefix(family):
    """A text longer than the window: its last token still sees, and trains, every virtual token at every site."""
    model, prefix = make_model(family), random(make_model(family), 6)
    with attach(model, prefix):
        model(input_ids=tokens(1, 60)).logits[:, -1].pow(2).sum().backward()
    assert all(bool((gradient.flatten(1).abs().sum(1) > 0).all()) for gradient in gradients_of(prefix))


def test_packed_rows_equal_separate_rows(model, exact):
    first, second = tokens(1, 5), tokens(1, 4, seed=1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    with attach(model, random(model, 3)):
        packed = logits(model, torch.cat([first, second], 1), position_ids=positions, use_cache=False)
        separate = torch.cat([logits(model, first), logits(model, second)], 1)
    torch.testing.assert_close(packed, separate, **exact)


def test_mixed_rows_equal_each_row_alone(model, exact):
    ids, three, five = tokens(4, 7), random(model, 3), random(model, 5, seed=1)
    rows = [None, three, five, three]
    with attach(model, rows) as attachment:
        mixed = logits(model, ids)
        for i, prefix in enumerate(rows):
            if prefix is not None:
                attachment.use(prefix)
                torch.testing.assert_close(mixed[i], logits(model, ids[i : i + 1])[0], **exact)
    torch.testing.assert_close(mixed[0], logits(model, ids[:1])[0], **exact)


def test_choice_is_used_again_with_what_it_put_on_the_device(model):
    """Which a captured CUDA graph goes on reading."""
    ids, prefix = tokens(2, 7), random(model, 3)
    with attach(model, prefix) as attachment:
        mixed = attachment.use([prefix, None])
        expected, before = logits(model, ids), list(map(id, mixed.assigned.values()))
        attachment.use(prefix)
        logits(model, ids)
        attachment.use(mixed)
        assert torch.equal(logits(model, ids), expected)
        assert list(map(id, mixed.assigned.values())) == before != []


def test_mixed_rows_get_the_gradients_of_each_row_alone(model, exact):
    ids, three, five = tokens(3, 7), random(model, 3), random(model, 5, seed=1)

    def gradients(run) -> list[Tensor]:
        three.zero_grad()
        five.zero_grad()
        run()
        return gradients_of(three) + gradients_of(five)

    with attach(model, [three, five, three]) as attachment:
        mixed = gradients(lambda: model(input_ids=ids).logits.pow(2).sum().backward())

        def alone() -> None:
            for i, prefix in enumerate([three, five, three]):
                attachment.use(prefix)
                model(input_ids=ids[i : i + 1]).logits.pow(2).sum().backward()

        apart = gradients(alone)
    for one, other in zip(mixed, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=exact["atol"] * float(other.abs().max()))


def test_saved_and_loaded_prefix_gives_the_same_logits(model, tmp_path):
    ids, prefix = tokens(2, 7), random_prefix(model, 3)
    with attach(model, prefix) as attachment:
        expected = logits(model, ids)
        foreword.save(prefix, tmp_path / "p.safetensors")
        attachment.use(foreword.load(tmp_path / "p.safetensors"))
        assert torch.equal(logits(model, ids), expected)


def test_wrong_base_is_named(path):
    prefix = random_prefix(make_model("llama"), 3)
    for other, told in (
        (make_model("llama", seed=1), "other weights"),
        (make_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_parameters"),
        (make_model("llama", num_hidden_layers=2), "no such site"),
        (make_model("llama", num_key_value_heads=1), "num_kv_heads=1"),
        (make_model("gpt2"), "no such site"),
    ):
        with pytest.raises(ModelMismatchError, match=told):
            attach(other, prefix)
    attach(make_model("llama").float(), prefix).detach()  # another precision is the same base


def test_sites_are_discovered():
    sites = attention_sites(make_model("gemma3"))
    assert [site.sliding_window for site in sites] == [24, None, 24]
    assert {(s.kind, s.num_kv_heads, s.key_dim, s.value_dim) for s in sites} == {("self", 2, 8, 8)}
    encoder = BertModel(BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    assert {site.kind for site in attention_sites(encoder)} == {"encoder"}


def test_what_cannot_be_attached_says_why(llama):
    prefix = random_prefix(llama, 3)
    with pytest.raises(UnsupportedModelError, match="got DataParallel. Attach the prefix to the model itself"):
        attach(torch.nn.DataParallel(llama), prefix)
    with attach(llama, prefix), pytest.raises(ConfigError, match="already"):
        attach(llama, prefix)
    with attach(llama, [prefix, None]), pytest.raises(ConfigError, match="2 prefixes for a batch of 3 rows"):
        llama(tokens(3, 4))
    llama.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="sdpa"):
        attach(llama, prefix)


def test_pages_of_continuous_batching_hold_no_prefix(llama):
    """Transformers shares their pages by token ids alone, so that one prefix would be taken for another."""
    prefix, options = random_prefix(llama, 3), GenerationConfig(max_new_tokens=2, do_sample=False)
    with attach(llama, prefix), pytest.raises(ValueError, match="foreword_.* is not supported for continuous batching"):
        llama.generate_batch([[5, 6, 7]], generation_config=options, progress_bar=False)
    llama.config._attn_implementation_internal = "paged|sdpa"
    with pytest.raises(UnsupportedModelError, match=r"paged\|sdpa"):
        attach(llama, prefix)


def test_learned_positions_that_run_out_are_an_error():
    gpt2 = make_model("gpt2", n_positions=16)
    with attach(gpt2, random_prefix(gpt2, 6).double()):
        gpt2(tokens(1, 10))
        with pytest.raises(PositionError, match="Shorten the text to 10 tokens"):
            gpt2(tokens(1, 11))
