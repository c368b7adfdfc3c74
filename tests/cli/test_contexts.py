"""``evermini ingest`` and ``contexts``: a folder of texts, by name, folder and digest."""

from __future__ import annotations

import re

import pytest

from tests.recall_fakes import fake_recall, filler

FILES = {f"lib/part{i % 3}/f{i}.py": filler(40 + i, seed=i) for i in range(9)}


@pytest.fixture
def ingested(tmp_path, monkeypatch):
    """Nine files of a folder, one of another, and a text without a name, in an index of their own."""
    from evermini.recall.segment import Segment

    home = tmp_path / "home"
    monkeypatch.setenv("EVERMINI_HOME", str(home))
    recall = fake_recall(home)
    named = [Segment(text, name) for name, text in FILES.items()]
    recall.ingest([*named, Segment(filler(50, 77), "notes.txt"), Segment("No name at all.")])
    return recall


def lines(result) -> list[str]:
    assert result.code == 0, result.err
    return result.out.splitlines()


def test_a_folder_is_one_line(evermini, ingested):
    listed = lines(evermini("contexts", "ls"))
    assert len(listed) == 3
    assert re.search(r"^ +9 texts .*tokens .* lib/$", evermini("contexts", "ls").out, re.MULTILINE)
    assert any(line.endswith("  notes.txt") for line in listed)
    assert any(line.endswith('"No name at all."') for line in listed)
    assert len(lines(evermini("contexts", "ls", "--all"))) == 11


def test_listing_by_name_folder_glob_and_digest(evermini, ingested):
    assert len(lines(evermini("contexts", "ls", "lib"))) == 9
    assert len(lines(evermini("contexts", "ls", "lib/part1/"))) == 3
    assert len(lines(evermini("contexts", "ls", "*.txt", "lib/part0/f0.py"))) == 2
    [line] = lines(evermini("contexts", "ls", "notes.txt"))
    digest = line.split()[0]
    assert lines(evermini("contexts", "ls", digest)) == [line]
    assert "name        notes.txt" in lines(evermini("contexts", "show", digest))
    assert evermini("contexts", "ls", digest[:3]).code == 1, "three digits may match by chance"


def test_removing_a_folder_leaves_the_rest(evermini, ingested):
    assert len(lines(evermini("contexts", "rm", "lib/part2"))) == 3
    left = evermini("contexts", "ls", "--all").out
    assert "part2" not in left
    assert "lib/part1/f1.py" in left
    missing = evermini("contexts", "rm", "lib/part2")
    assert missing.code == 1
    assert "No ingested text 'lib/part2'" in missing.err
    assert "8 checked, 0 damaged" in evermini("contexts", "verify").out
    assert len(lines(evermini("contexts", "rm", "all"))) == 8
    assert lines(evermini("contexts", "ls")) == []


def test_damage_is_told_by_name(evermini, ingested):
    from evermini.recall.segment import Segment

    digest = Segment(FILES["lib/part1/f4.py"]).digest
    path = ingested.store.folder / f"{digest}.keys"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    result = evermini("contexts", "verify")
    assert result.code == 1
    assert f"segment {digest[:12]}: chunk 0 damaged (lib/part1/f4.py)" in result.out
    assert "11 checked, 1 damaged parts" in result.out


def test_nothing_ingested_is_said_and_no_error(evermini, tmp_path, monkeypatch):
    monkeypatch.setenv("EVERMINI_HOME", str(tmp_path / "empty"))
    listed = evermini("contexts", "ls")
    assert (listed.code, listed.out) == (0, "")
    assert "Nothing is ingested" in listed.err
    for command in ("rm", "show"):
        assert evermini("contexts", command, "all").code == 0
        missing = evermini("contexts", command, "notes.txt")
        assert missing.code == 1
        assert "No ingested text 'notes.txt'" in missing.err
    assert "0 checked, 0 damaged" in evermini("contexts", "verify").out


@pytest.mark.parametrize("content", ["{}", None])
def test_an_index_of_another_version_is_listed_and_goes(evermini, ingested, content):
    folder = ingested.store.folder
    calibration = folder / "calibration.json"
    if content is None:  # as this version writes it, but of other windows: another fingerprint
        folder.rename(folder.with_name("0123456789abcdef"))
    else:
        calibration.write_text(content)
    assert len(lines(evermini("contexts", "ls", "--all"))) == 11
    assert "another version" in evermini("contexts", "show", "notes.txt").out
    verified = evermini("contexts", "verify")
    assert verified.code == 0
    assert "0 checked" in verified.out
    assert "11 of another version, not checked" in verified.out
    assert len(lines(evermini("contexts", "rm", "all"))) == 11
    assert lines(evermini("contexts", "ls")) == []
