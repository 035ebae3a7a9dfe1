"""The file: round trips, and every way in which a file can be wrong."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import foreword
from foreword import Prefix, PrefixStore
from foreword.errors import ConfigError, PrefixFileError
from foreword.initialization import noop_prefix, random_prefix


@pytest.fixture
def file(llama, tmp_path):
    prefix = random_prefix(llama, 3)
    prefix.metadata["training"] = {"rows": 5, "held_out_loss": 0.25}
    return foreword.save(prefix, tmp_path / "p.safetensors")


def rewrite(file, change) -> None:
    """Change the file's tensors and header."""
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["foreword"])
    tensors = load_file(file)
    change(tensors, header)
    save_file(tensors, file, {"foreword": json.dumps(header)})


@pytest.mark.parametrize("make", [random_prefix, noop_prefix])
def test_round_trip_keeps_everything(llama, tmp_path, make):
    prefix = make(llama, 3)
    prefix.metadata["template"] = "{{ messages }} – ü"
    loaded = foreword.load(foreword.save(prefix, tmp_path / "p.safetensors"))
    assert loaded.sites == prefix.sites
    assert loaded.position_offset == prefix.position_offset
    assert loaded.base == prefix.base
    assert loaded.metadata == prefix.metadata
    for (name, ours), (other, theirs) in zip(prefix.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(ours, theirs)
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def change_nan(tensors, header):
    tensors["1.value"][2, 1, 0] = torch.nan


def change_version(tensors, header):
    header["version"] = 99


def change_missing(tensors, header):
    del tensors["2.key"]


def change_extra(tensors, header):
    tensors["7.key"] = torch.zeros(1)


def change_shape(tensors, header):
    tensors["0.key"] = torch.zeros(2, 2, 8)


def change_site(tensors, header):
    header["sites"][0]["colour"] = "red"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_nan, "1 of 48 numbers of tensor '1.value' are NaN"),
        (change_version, "format version 99; this Foreword reads version 1"),
        (change_missing, "2.key"),
        (change_extra, "belong to no site: 7.key"),
        (change_shape, r"key of model.layers.0.self_attn has shape \(2, 2, 8\), expected \(3, 2, 8\)|shape"),
        (change_site, "colour"),
    ],
)
def test_damage_is_named(file, change, told):
    rewrite(file, change)
    with pytest.raises(PrefixFileError, match=told):
        foreword.load(file)


@pytest.mark.parametrize("keep", [0, 5, 500, 0.5, 0.999])
def test_truncated_file_is_named(file, keep):
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(PrefixFileError, match="not a whole safetensors file"):
        foreword.load(file)


def test_other_files_are_no_prefix(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(PrefixFileError, match="not a prefix"):
        foreword.load(tmp_path / "model.safetensors")
    with pytest.raises(PrefixFileError, match="no such file"):
        foreword.load(tmp_path / "none.safetensors")
    with pytest.raises(PrefixFileError, match="a folder"):
        foreword.load(tmp_path)


def test_save_writes_whole_prefixes_or_nothing(llama, file, tmp_path):
    before = file.read_bytes()
    broken = random_prefix(llama, 3)
    broken.values[0].data[0, 0, 0] = torch.inf
    with pytest.raises(PrefixFileError, match="infinite"):
        foreword.save(broken, file)
    assert file.read_bytes() == before
    with pytest.raises(ConfigError, match=r"Use .*p.safetensors"):
        foreword.save(broken, tmp_path / "p.pt")
    with pytest.raises(ConfigError, match="does not exist"):
        foreword.save(broken, tmp_path / "none" / "p.safetensors")


def test_prefix_checks_its_shapes(file):
    prefix = foreword.load(file)
    tensors = prefix.tensors()
    with pytest.raises(ConfigError, match="expected"):
        Prefix(prefix.sites, [(t.key, t.value[:2]) for t in tensors], position_offset=3)
    with pytest.raises(ConfigError, match="3 and 2"):
        Prefix(prefix.sites, tensors[:2], position_offset=3)


def test_store_is_a_mapping(llama, tmp_path):
    store = PrefixStore(tmp_path)
    assert not store
    store["tickets"], store["a"] = random_prefix(llama, 3), random_prefix(llama, 5)
    assert list(store) == ["a", "tickets"]
    assert store["a"].num_virtual_tokens == 5
    assert "b" not in store
    with pytest.raises(KeyError):
        store["../tickets"]
    with pytest.raises(PrefixFileError, match="no such folder"):
        PrefixStore(tmp_path / "none")
