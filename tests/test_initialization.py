"""Where a prefix starts."""

import pytest
import torch
from tiny import ROWS, gradients_of
from zoo import make_model

from foreword import PrefixConfig, attach
from foreword.completion import completion_loss
from foreword.data import collate, encode, read_rows
from foreword.errors import ConfigError
from foreword.initialization import compact_prefix, demonstrate, initialize


@pytest.fixture
def examples(tokenizer):
    return encode(read_rows(ROWS)[0], tokenizer, tokenizer.chat_template, 256)[0]


def test_whole_demonstrations_equal_few_shot_prompting(model, tokenizer, examples):
    shown = demonstrate(examples, 2)
    config = PrefixConfig(num_virtual_tokens=len(shown), num_demonstrations=2)
    prefix = initialize(model, tokenizer, examples, config).double()
    assert prefix.metadata["demonstrations"] == shown
    ids = torch.tensor([examples[5].input_ids])
    with torch.no_grad():
        prompted = model(torch.cat([torch.tensor([shown]), ids], 1)).logits[:, len(shown) :]
        with attach(model, prefix):
            found = model(ids).logits
    if any(site.sliding_window for site in prefix.sites):  # the window hides old text, but never the prefix
        assert not torch.allclose(found, prompted)
    else:
        torch.testing.assert_close(found, prompted)


def test_demonstrations_are_compacted_and_help_more_than_random_numbers(model, tokenizer, examples):
    def distance(prefix) -> float:
        """From the outputs that the whole demonstrations give."""
        ids = torch.tensor([examples[7].input_ids])
        with torch.no_grad(), attach(model, whole):
            wanted = model(ids).logits
        with torch.no_grad(), attach(model, prefix.double()):
            return float((model(ids).logits - wanted).norm())

    shown = demonstrate(examples, 2)
    whole = initialize(model, tokenizer, examples, PrefixConfig(len(shown), num_demonstrations=2)).double()
    further = [(e.input_ids, e.prompt_length) for e in examples[2:20]]
    refitted = compact_prefix(model, shown, further, 16)
    assert refitted.num_virtual_tokens == 16
    random = initialize(model, tokenizer, examples, PrefixConfig(initialization="random"))
    assert distance(refitted) < distance(random)
    assert distance(refitted) < distance(compact_prefix(model, shown, further, 16, refit=False))


def test_compacted_keys_stand_at_the_first_positions(tokenizer, examples):
    """A text of equal tokens, seen by a first layer: each key depends on its position alone."""
    llama = make_model("llama", num_hidden_layers=1)
    further = [(e.input_ids, e.prompt_length) for e in examples[:4]]
    prefix = compact_prefix(llama, [7] * 30, further, 5, refit=False)
    whole = compact_prefix(llama, [7] * 30, further, 30)
    torch.testing.assert_close(prefix.keys[0], whole.keys[0][:5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("initialization", ["demonstrations", "text", "random", "noop"])
def test_every_start_can_be_trained_on(model, tokenizer, examples, initialization):
    text = "repeat the word" if initialization == "text" else None
    config = PrefixConfig(4, initialization=initialization, init_text=text)
    prefix = initialize(model, tokenizer, examples, config).double()
    assert prefix.num_virtual_tokens == 4
    with attach(model, prefix):
        loss = completion_loss(model, collate([examples[:3]]))
    loss.sum().backward()
    assert any(gradient.abs().sum() > 0 for gradient in gradients_of(prefix))


def test_learned_positions_cannot_be_moved_and_stay(tokenizer, examples):
    gpt2 = make_model("gpt2")
    further = [(e.input_ids, e.prompt_length) for e in examples[:4]]
    shown = demonstrate(examples, 2)
    few, whole = (compact_prefix(gpt2, shown, further, n, refit=False) for n in (6, len(shown)))
    for key, keys in zip(few.keys, whole.keys, strict=True):
        assert all(any(torch.equal(key[p, g], k) for k in keys[:, g]) for p in range(6) for g in range(key.shape[1]))


def test_text_shorter_than_the_prefix_is_an_error(llama, tokenizer, examples):
    with pytest.raises(ConfigError, match="at most 3 virtual tokens"):
        initialize(llama, tokenizer, examples, PrefixConfig(initialization="text", init_text="abc"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be at least 1"),
        ({"initialization": "text"}, "init_text"),
        ({"init_text": "hello"}, "init_text"),
        ({"num_virtual_tokens": 1, "initialization": "demonstrations"}, "nothing is left to train"),
    ],
)
def test_contradictions_are_errors(options, told):
    with pytest.raises(ConfigError, match=told):
        PrefixConfig(**options)
