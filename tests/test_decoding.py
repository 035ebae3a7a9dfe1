"""Every way of decoding gives what the bare model gives with the prefix's text in context: tokens and logits."""

import pytest
import torch
from zoo import FAMILIES, make_model, tokens
from torch import Tensor
from transformers import StaticCache

from foreword import attach, text_prefix

OPTIONS = {
    "max_new_tokens": 6,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 259,
    "return_dict_in_generate": True,
    "output_logits": True,
}
WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {},
}
CONTEXT = tokens(5, seed=1)


def after_context(ids: Tensor) -> Tensor:
    return torch.cat([CONTEXT.expand(len(ids), -1), ids], 1)


@pytest.fixture
def prefix(model):
    return text_prefix(model, CONTEXT.tolist()).double()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_generate_with_the_text_in_context(family, way):
    model, ids, options = make_model(family), tokens(2, 6), OPTIONS | WAYS[way]
    if way in ("assisted", "prompt lookup"):  # Transformers runs these on one row
        ids = ids[:1]
    if way == "assisted":
        options["assistant_model"] = make_model(family, seed=1)
    prefix = text_prefix(model, CONTEXT.tolist()).double()
    torch.manual_seed(0)
    expected = model.generate(after_context(ids), **options)
    with attach(model, prefix):
        torch.manual_seed(0)
        found = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences[:, 5:])
    assert len(found.logits) == len(expected.logits)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_inputs_embeds(model, prefix):
    embed, ids = model.get_input_embeddings(), tokens(2, 6)
    expected = model.generate(inputs_embeds=embed(after_context(ids)), **OPTIONS)
    with attach(model, prefix):
        found = model.generate(inputs_embeds=embed(ids), **OPTIONS)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))


def test_second_turn_on_the_cache_of_the_first(model, prefix):
    ids, reply = tokens(2, 4), tokens(2, 3, seed=4)  # shorter than the sliding window, which the prefix never leaves
    with attach(model, prefix):
        first = model.generate(ids, **OPTIONS)
        turn = torch.cat([first.sequences, reply], 1)
        found = model.generate(turn, past_key_values=first.past_key_values, **(OPTIONS | {"max_new_tokens": 2}))
    expected = model.generate(after_context(turn), **(OPTIONS | {"max_new_tokens": 2}))
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))


def test_static_cache_filled_in_pieces(model, prefix):
    ids = tokens(2, 8)
    with torch.no_grad():
        expected = model(after_context(ids)).logits[:, 5:]
        with attach(model, prefix):
            cache = StaticCache(config=model.config, max_cache_len=20)
            found = [model(piece, past_key_values=cache).logits for piece in ids.split((3, 4, 1), 1)]
    torch.testing.assert_close(torch.cat(found, 1), expected)


def test_mixed_padded_rows_on_a_static_cache(model, prefix):
    ids = tokens(2, 6)
    padded = torch.cat([torch.full((2, 3), 259), ids], 1)
    options = OPTIONS | {"cache_implementation": "static"}
    with attach(model, [prefix, None]):
        found = model.generate(padded, attention_mask=(padded != 259).long(), **options)
    alone = [model.generate(after_context(ids[:1]), **OPTIONS), model.generate(ids[1:], **OPTIONS)]
    for row, expected in enumerate(alone):
        torch.testing.assert_close(
            torch.stack([step[row] for step in found.logits]), torch.stack([step[0] for step in expected.logits])
        )
