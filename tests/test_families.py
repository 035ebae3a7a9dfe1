"""The gates for many more families, with the attention that each model chooses. None is named in the package."""

import pytest
import torch
import transformers
from tiny import ENCODERS, FURTHER, HYBRIDS, gradients_of, make_encoder, make_model, tokens
from torch import Tensor

from foreword import Prefix, attach, attention_sites, text_prefix
from foreword.initialization import noop_prefix, random_prefix


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # routers and linear attention use float32


def random(model: transformers.PreTrainedModel, length: int, seed: int = 0) -> Prefix:
    return random_prefix(model, length, seed).double()


@pytest.mark.parametrize("family", FURTHER)
def test_text_prefix_equals_text_in_context(family):
    model, context, ids = make_model(family), tokens(5, seed=1), tokens(2, 30)  # longer than the sliding windows
    prefix = text_prefix(model, context.tolist()).double()
    together = torch.cat([context.expand(2, -1), ids[:, :12]], 1)
    with torch.no_grad():
        expected = model(together).logits[:, 5:]
        with attach(model, prefix):
            close(model(ids[:, :12]).logits, expected)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 259}
    for beams in (1, 3):
        expected = model.generate(together, num_beams=beams, **options)[:, 5:]
        with attach(model, prefix):
            assert torch.equal(model.generate(ids[:, :12], num_beams=beams, **options), expected)


@pytest.mark.parametrize("family", FURTHER + HYBRIDS)
def test_decoder_passes_the_gates(family):
    model, ids = make_model(family), tokens(3, 30)
    base, three, five = model(ids).logits.detach(), random(model, 3), random(model, 5, seed=1)
    with torch.no_grad(), attach(model, noop_prefix(model, 4).double()) as attachment:
        close(model(ids).logits, base)
        attachment.use([None, three, five])
        mixed = model(ids).logits
        close(mixed[0], base[0])
        attachment.use(three)
        close(mixed[1], model(ids[1:2]).logits[0])
        attachment.use(five)
        alone = model(ids[2:]).logits
        close(mixed[2], alone[0])
        padded = torch.cat([torch.full((1, 4), 259), ids[2:]], 1)
        mask = (padded != 259).long()
        close(model(padded, attention_mask=mask).logits[:, 4:], alone)
        first = model(ids[2:, :20], use_cache=True)
        second = model(ids[2:, 20:], past_key_values=first.past_key_values, use_cache=True)
        close(torch.cat([first.logits, second.logits], 1), alone)
    torch.testing.assert_close(model(ids).logits, base)
    with attach(model, three):
        model(ids).logits.pow(2).mean().backward()
    assert all(gradient.abs().sum() > 0 for gradient in gradients_of(three))


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_without_attention_get_no_site(family):
    model = make_model(family)
    kinds = model.config.layer_types if family != "falcon_h1" else ["full_attention"] * 3
    wanted = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    assert [int(site.name.split(".")[2]) for site in attention_sites(model)] == wanted


@pytest.mark.parametrize(
    "head", ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
)
@pytest.mark.parametrize("family", ENCODERS)
def test_encoder_passes_the_gates(family, head):
    model = make_encoder(family, head)
    ids, prefix = tokens(2, 9) % 200 + 10, random(model, 3)
    assert {site.kind for site in attention_sites(model)} == {"encoder"}
    assert prefix.position_offset == 0
    padded = torch.cat([ids, torch.ones(2, 3, dtype=torch.long)], 1)
    with torch.no_grad():
        base = model(ids)[0]
        with attach(model, noop_prefix(model, 3).double()) as attachment:
            torch.testing.assert_close(model(ids)[0], base)
            attachment.use(prefix)
            changed = model(ids)[0]
            found = model(padded, attention_mask=(padded != 1).long())[0]
            attachment.use([prefix, None])
            mixed = model(ids)[0]
    assert not torch.allclose(changed, base)
    torch.testing.assert_close(found if found.shape == changed.shape else found[:, :9], changed)
    torch.testing.assert_close(mixed, torch.stack([changed[0], base[1]]))
    with attach(model, prefix):
        model(ids)[0].pow(2).sum().backward()
    assert all(gradient.abs().sum() > 0 for gradient in gradients_of(prefix))
