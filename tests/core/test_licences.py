"""What a file was made of and under which licence: found, told, unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from onestep.core.errors import OneStepError
from onestep.core.families import FAMILIES
from onestep.core.licence_files import license_in, sources_of
from onestep.core.licences import (
    BASE,
    BASE_LORA,
    COMMON,
    INITIAL,
    KEY,
    Source,
    license_header,
    license_line,
    one_line,
    sources_in,
    told_licenses,
)
from onestep.core.tensor_file import write_tensors


def a_file(path: Path, **metadata: str) -> Path:
    write_tensors(path, {"x": torch.zeros(1)}, metadata)
    return path


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.license": "CreativeML Open RAIL++-M", "license": "other"}, "CreativeML Open RAIL++-M"),
        ({"license": "apache-2.0"}, "apache-2.0"),
        ({"ss_license": " cc-by-nc-sa-4.0 \n"}, "cc-by-nc-sa-4.0"),
        ({"modelspec.license": "  ", "license": "mit"}, "mit"),
        ({"modelspec.license": "a" * 5000}, "a" * 200),
        ({"modelspec.author": "somebody"}, None),
        ({}, None),
    ],
)
def test_a_header_names_its_licence(tmp_path: Path, metadata: dict[str, str], expected: str | None) -> None:
    assert license_in(a_file(tmp_path / "file.safetensors", **metadata)) == expected


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: openrail++\ntags: [x]\n---\n# A model\nlicense: not this\n", "openrail++"),
        ("---\nlicense: other\nlicense_name: flux-1-dev\n---\n", "flux-1-dev"),
        ("---\nlicense: 'apache-2.0'\n---", "apache-2.0"),
        ("# A model\nlicense: mit\n", None),
        ("---\n", None),
        ("---\ntags: x\n---\nlicense: mit", None),
    ],
)
def test_a_folders_model_card_names_it(tmp_path: Path, card: str, expected: str | None) -> None:
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert license_in(tmp_path) == expected


def test_what_cannot_be_read_tells_nothing(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no header")
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---")
    assert license_in(broken) is None
    assert license_in(tmp_path / "absent.safetensors") is None
    assert license_in(tmp_path / "old.ckpt") is None
    assert license_in(tmp_path / "nowhere") is None
    assert license_in(tmp_path / "card")  # not text, but no reason to fail


def test_what_a_person_tells_goes_before_a_file_and_the_rest_is_unknown(tmp_path: Path) -> None:
    base = a_file(tmp_path / "base.safetensors", license="openrail++")
    donor = a_file(tmp_path / "donor.safetensors", license="mit")
    parts = [(BASE, "base", base), (BASE_LORA, "plugged", None), (INITIAL, "donor", donor)]
    found = sources_of(parts, "initial_lora = CC BY-NC-SA 4.0 ;")
    assert found == [
        Source(BASE, "base", "openrail++", "file"),
        Source(BASE_LORA, "plugged", "unknown", ""),
        Source(INITIAL, "donor", "CC BY-NC-SA 4.0", "told"),
    ]
    line = license_line(found)
    assert "base base (licence openrail++)" in line and "base LoRA plugged (licence unknown)" in line
    assert "\n" not in line and license_line([]) == ""


def test_a_base_of_which_nothing_is_known_has_its_familys(tmp_path: Path) -> None:
    """Said beside it, in the line and in the file: it is no licence of this base."""
    parts = [(BASE, "base", None), (INITIAL, "donor", None)]
    found = sources_of(parts, "", "Krea: free below a revenue")
    assert [each.usual for each in found] == ["Krea: free below a revenue", ""]
    assert "base base (licence unknown; usual: Krea: free below a revenue)" in license_line(found)
    header = license_header(found)
    assert sources_in(header) == found and COMMON not in header
    told = sources_of(parts, "base=mit", "Krea: free below a revenue")
    assert told[0] == Source(BASE, "base", "mit", "told")
    older = json.loads(header[KEY])
    del older[0]["usual"]
    assert sources_in({KEY: json.dumps(older)})[0] == Source(BASE, "base")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_its_models_are_published_under(family: str) -> None:
    """In a line that a header gives back whole."""
    assert FAMILIES[family].license == one_line(FAMILIES[family].license) != ""


def test_a_header_gives_its_sources_back_and_a_child_inherits_them(tmp_path: Path) -> None:
    found = [Source(BASE, "a", "x", "file"), Source(INITIAL, "b")]
    header = license_header(found)
    assert sources_in(header) == found and json.loads(header[KEY])[1]["license"] == "unknown"
    assert header[COMMON] == "x + unknown"
    parent = a_file(tmp_path / "parent.safetensors", **header)
    assert sources_of([(INITIAL, "parent", parent)], "")[0].license == "x + unknown"
    assert COMMON not in license_header([Source(BASE, "a")]) and license_header([]) == {}


@pytest.mark.parametrize("text", ["", "[", "{}", "[1]", '[{"part": "base"}]', "[[[[", "null", '"text"'])
def test_a_damaged_entry_tells_of_nothing(text: str) -> None:
    assert sources_in({KEY: text}) == []


@pytest.mark.parametrize("text", ["openrail++", "bass=mit", "base=", "=mit", "base=mit, initial_lora"])
def test_what_is_no_such_text_is_refused_with_the_parts(text: str) -> None:
    if text == "base=mit, initial_lora":
        assert told_licenses(text) == {BASE: "mit, initial_lora"}
        return
    with pytest.raises(OneStepError, match="licenses has .* parts are base, base_lora, initial_lora"):
        told_licenses(text)
