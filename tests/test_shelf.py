"""A folder of prefixes for vLLM: what may be used, with what content, and which heads each rank takes. vLLM is not needed."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from zoo import make_model

import foreword
from foreword.errors import EngineError, ModelMismatchError, PrefixFileError
from foreword.initialization import noop_prefix, random_prefix
from foreword.shelf import Shelf, checkpoint_folder, file_digest, own_heads


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A checkpoint, and a folder with prefixes that fit it and others."""
    folder = tmp_path_factory.mktemp("shelf")
    model = make_model("llama").float()
    model.save_pretrained(folder / "model")
    store = folder / "store"
    store.mkdir()
    for name, prefix in {
        "tickets": random_prefix(model, 5),
        "other-weights": random_prefix(make_model("llama", seed=5), 5),
        "other-shape": random_prefix(make_model("gpt2"), 5),
        "gated": noop_prefix(model, 5),
        "headed": random_prefix(model, 5).with_head({"score.weight": torch.ones(2)}),
        "windows": random_prefix(make_model("gemma3"), 5),
        "hybrid": random_prefix(make_model("lfm2"), 5),
        "latent": random_prefix(make_model("deepseek_v3"), 5),
    }.items():
        foreword.save(prefix, store / f"{name}.safetensors")
    content = (store / "tickets.safetensors").read_bytes()
    (store / "truncated.safetensors").write_bytes(content[:-100])
    with safe_open(store / "tickets.safetensors", "pt") as file:
        header = json.loads(file.metadata()["foreword"])
    del header["base"]["fingerprint"]
    save_file(
        load_file(store / "tickets.safetensors"), store / "nameless.safetensors", {"foreword": json.dumps(header)}
    )
    (folder / "tickets.safetensors").write_bytes(content)  # beside the store: no name reaches it
    return Shelf(store, model.config, folder / "model")


def test_prefix_is_found_by_name_with_its_content(served):
    path = served._store.path("tickets")
    assert served.find("tickets") == (found := served.find("tickets"))
    assert (found.path, found.virtual_tokens, found.digest) == (path, 5, file_digest(path))


@pytest.mark.parametrize(
    ("name", "error", "told"),
    [
        ("missing", PrefixFileError, "No prefix 'missing' in .*tickets"),
        ("../tickets", PrefixFileError, "No prefix '../tickets'"),
        ("../store/tickets", PrefixFileError, "No prefix"),
        ("/etc/passwd", PrefixFileError, "No prefix"),
        ("", PrefixFileError, "No prefix ''"),
        ("truncated", PrefixFileError, "truncated"),
        ("other-weights", ModelMismatchError, "other weights"),
        ("other-shape", ModelMismatchError, "GPT2"),
        ("nameless", EngineError, "does not say which base"),
        ("gated", EngineError, "vLLM cannot hold this prefix: .*gates"),
        ("headed", EngineError, "trained head"),
        ("windows", EngineError, "sliding windows"),
        ("hybrid", EngineError, "keep a state"),
        ("latent", EngineError, "latent vector"),
    ],
)
def test_what_vllm_must_not_answer_with_is_named(served, name, error, told):
    with pytest.raises(error, match=told):
        served.find(name)


def test_file_that_is_replaced_is_another_content(served, tmp_path):
    path = tmp_path / "changing.safetensors"
    shelf = Shelf(tmp_path, served._config, served._weights)
    path.write_bytes(served._store.path("tickets").read_bytes())
    old = shelf.find("changing")
    prefix = old.load()
    prefix.values[0].data[0] += 1
    path.unlink()
    foreword.save(prefix, path)
    with pytest.raises(PrefixFileError, match="changed since the request was accepted"):
        old.load()
    assert shelf.find("changing").digest == file_digest(path) != old.digest
    path.unlink()
    with pytest.raises(PrefixFileError, match="No prefix 'changing'"):
        shelf.find("changing")


def test_model_whose_weights_are_not_here_is_not_taken_on_trust(served, tmp_path):
    assert checkpoint_folder("nobody/nothing") is None
    for weights in (None, tmp_path):
        with pytest.raises(EngineError, match="none of the weights .*, so vLLM's model may be another"):
            Shelf(served._store.folder, served._config, weights).find("tickets")


@pytest.mark.parametrize(("ranks", "heads"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_share_the_heads(ranks, heads):
    tensor = torch.arange(3 * 4 * 2.0).view(3, 4, 2)
    parts = [own_heads(tensor, rank, ranks, heads) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts, 1), tensor)


def test_ranks_beyond_the_heads_repeat_them():
    """As vLLM repeats the heads of its key and value projections: rank by rank, in their order."""
    tensor = torch.arange(3 * 2 * 2.0).view(3, 2, 2)
    parts = [own_heads(tensor, rank, 8, 1) for rank in range(8)]
    assert [int(part[0, 0, 0]) for part in parts] == [0, 0, 0, 0, 2, 2, 2, 2]
    with pytest.raises(EngineError, match="2 key/value heads cannot be split into 3 ranks of 1"):
        own_heads(tensor, 0, 3, 1)
