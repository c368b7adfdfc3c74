"""The index on disk survives kills and damage, keeps its cap, and never depends on how it came about."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from evermini.errors import RecallDiskError
from evermini.recall.recall import Recall
from evermini.recall.segment import Segment
from evermini.recall.store import SegmentStore
from tests.recall_fakes import fake_calibration, fake_recall, filler

TEXT = filler(3000)


def files(home: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted((home / "recall").glob("*/*.*"))
        if path.suffix != ".lock"
    }


@pytest.fixture
def undisturbed(tmp_path) -> dict[str, bytes]:
    fake_recall(tmp_path / "undisturbed").ingest([Segment(TEXT)])
    return files(tmp_path / "undisturbed")


def test_same_text_is_computed_once_ever(tmp_path):
    recall = fake_recall(tmp_path)
    first = recall.ingest([Segment(TEXT, "a"), Segment(TEXT, "b")])
    assert first.num_new_tokens == first.num_tokens > 3000
    assert recall.ingest([Segment(TEXT)]).num_new_tokens == 0
    again = fake_recall(tmp_path)  # another process would see the same
    assert again.missing_tokens([Segment(TEXT)]) == 0
    assert again.ingest([Segment(TEXT)]).num_new_tokens == 0
    assert again._model.passes == []
    assert again.missing_tokens([Segment("never seen")]) is None


def test_progress_counts_up_to_the_total(tmp_path):
    seen = []
    report = fake_recall(tmp_path).ingest([Segment(TEXT), Segment("short")], progress=seen.append)
    assert [p.done_tokens for p in seen] == sorted(p.done_tokens for p in seen)
    assert seen[-1].done_tokens == seen[-1].total_tokens == report.num_tokens
    assert seen[-1].eta == 0


@pytest.mark.parametrize("torn", [0, 1, 63, 64, 5000])
def test_a_torn_record_is_dropped_and_written_again(tmp_path, undisturbed, torn):
    recall = fake_recall(tmp_path)
    chunks = iter([False] * 20 + [True])
    recall.ingest([Segment(TEXT)], cancelled=lambda: next(chunks))
    path = next((tmp_path / "recall").glob("*/*.keys"))
    complete = undisturbed[path.name]
    with path.open("ab") as file:
        file.write(complete[path.stat().st_size :][:torn])
    resumed = fake_recall(tmp_path)
    report = resumed.ingest([Segment(TEXT)])
    assert report.num_new_tokens == report.num_tokens - 20 * 64
    assert {k: v for k, v in files(tmp_path).items() if k in undisturbed} == undisturbed


KILLED = """
import sys, time
from pathlib import Path
from evermini.recall.segment import Segment
from tests.recall_fakes import fake_recall, filler
recall = fake_recall(Path(sys.argv[1]))
recall.ingest([Segment(filler(3000))], progress=lambda p: (print(p.done_tokens, flush=True), time.sleep(0.005)))
"""


def test_killed_at_random_it_resumes(tmp_path, undisturbed):
    home = tmp_path / "killed"
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
    done = 0
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(home)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        )
        with process:
            for _ in range(3 + 4 * attempt):
                line = process.stdout.readline()
                assert line, "it ended before it was killed"
                assert int(line) > done, "what was done is not done again"
                done = int(line)
            time.sleep(0.002 * attempt)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    recall = fake_recall(home)
    assert 0 < recall.ingest([Segment(TEXT)]).num_new_tokens <= 3000 * 2
    assert recall.verify() == []
    assert files(home) == undisturbed


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


@pytest.mark.parametrize("offset", [0, 9, 13, 17, 64, 5000])
def test_a_damaged_chunk_is_named_and_rebuilt(tmp_path, undisturbed, offset):
    fake_recall(tmp_path).ingest([Segment(TEXT)])
    path = next((tmp_path / "recall").glob("*/*.keys"))
    record = 64 + 64 * 2 * (64 + 4)
    flip(path, 3 * record + offset)
    recall = fake_recall(tmp_path)
    (damage,) = recall.verify()
    assert (damage.digest, damage.chunk) == (path.stem, 3)
    assert path.stem[:12] in str(damage)
    assert "chunk 3" in str(damage)
    assert recall.verify(repair=True) == [damage]
    assert recall.verify() == []
    assert {k: v for k, v in files(tmp_path).items() if k in undisturbed} == undisturbed


def test_damage_is_found_without_being_asked_for(tmp_path, undisturbed, caplog):
    fake_recall(tmp_path).ingest([Segment(TEXT)])
    path = next((tmp_path / "recall").glob("*/*.keys"))
    flip(path, 100)
    recall = fake_recall(tmp_path)
    assert recall.ingest([Segment(TEXT)]).num_repaired_chunks == 1
    assert "chunk 0" in caplog.text
    assert {k: v for k, v in files(tmp_path).items() if k in undisturbed} == undisturbed


def test_several_segments_are_checked_at_once(tmp_path, caplog):
    texts = [Segment(filler(400, seed)) for seed in range(7)]
    first = fake_recall(tmp_path)
    first.ingest(texts)
    before = files(tmp_path)
    for number in (2, 5):
        flip(first.store.folder / f"{texts[number].digest}.keys", 300)
    recall = fake_recall(tmp_path)
    recall._tokenizer = first._tokenizer
    assert recall.missing_tokens(texts) == 0
    assert recall.ingest(texts).num_repaired_chunks == 2
    assert all(texts[number].digest[:12] in caplog.text for number in (2, 5))
    assert files(tmp_path) == before
    assert recall.ingest(texts).num_repaired_chunks == 0


def test_damaged_tokens_are_made_again(tmp_path, undisturbed):
    fake_recall(tmp_path).ingest([Segment(TEXT)])
    path = next((tmp_path / "recall").glob("*/*.tokens"))
    flip(path, 700)
    recall = fake_recall(tmp_path)
    (damage,) = recall.verify(repair=True)
    assert damage.chunk is None
    assert recall.verify() == []
    recall.ingest([Segment(TEXT)])
    assert {k: v for k, v in files(tmp_path).items() if k in undisturbed} == undisturbed


def test_two_writers_do_the_work_once(tmp_path):
    recalls = [fake_recall(tmp_path) for _ in range(2)]
    # One vocabulary, as two processes with the same tokenizer have.
    recalls[1]._tokenizer = recalls[0]._tokenizer
    threads = [threading.Thread(target=r.ingest, args=([Segment(TEXT)],)) for r in recalls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    chunks = recalls[0].calibration.windows.num_chunks(
        len(recalls[0].store.open(Segment(TEXT).digest).ids)
    )
    assert sum(len(r._model.passes) for r in recalls) == chunks
    assert recalls[0].verify() == []


def test_least_recently_used_goes_first(tmp_path):
    texts = [filler(600, seed) for seed in range(4)]
    recall = fake_recall(tmp_path)
    recall.ingest([Segment(texts[0])])
    one = sum(info.num_bytes for info in recall.store.list_all())
    for index, text in enumerate(texts[1:3], start=1):
        recall.ingest([Segment(text)])
        stamp = time.time() - 100 + index
        os.utime(recall.store.folder / f"{Segment(text).digest}.tokens", (stamp, stamp))
    recall.ingest([Segment(texts[0])])  # used just now
    capped = Recall(
        recall._model, recall._tokenizer, SegmentStore(tmp_path, recall.calibration, int(3.2 * one))
    )
    capped.ingest([Segment(texts[3])])
    left = {info.digest for info in capped.store.list_all()}
    assert left == {Segment(texts[i]).digest for i in (0, 2, 3)}
    assert sum(info.num_bytes for info in capped.store.list_all()) <= 3.2 * one


def test_what_cannot_fit_is_refused_before_work(tmp_path):
    recall = fake_recall(tmp_path, max_bytes=10_000)
    with pytest.raises(RecallDiskError, match="10,000 bytes"):
        recall.ingest([Segment(TEXT)])
    assert recall._model.passes == []


def test_segments_of_one_context_do_not_evict_each_other(tmp_path):
    texts = [filler(600, seed) for seed in range(4)]
    probe = fake_recall(tmp_path / "probe")
    probe.ingest([Segment(texts[0])])
    one = sum(info.num_bytes for info in probe.store.list_all())
    recall = fake_recall(tmp_path / "all", max_bytes=3 * one)
    with pytest.raises(RecallDiskError):
        recall.ingest([Segment(text) for text in texts])


def test_another_calibration_is_another_index():
    assert fake_calibration().fingerprint != fake_calibration(chunk=128).fingerprint
    assert fake_calibration().fingerprint == fake_calibration().fingerprint


def test_an_evicted_segment_is_made_again(tmp_path):
    recall = fake_recall(tmp_path)
    context = [Segment(TEXT + "\nthe zebra password is tulip\n")]
    before = recall.ask(context, "zebra password")
    assert recall.store.remove(recall.calibration.fingerprint, context[0].digest)
    assert recall.ask(context, "zebra password").spans == before.spans
    assert recall.verify() == []
    assert fake_recall(tmp_path).missing_tokens(context) == 0


def test_a_segment_in_use_stays_readable_when_it_is_evicted(tmp_path):
    recall = fake_recall(tmp_path)
    segment = Segment(TEXT)
    recall.ingest([segment])
    opened = recall.store.open(segment.digest)
    keys = [keys.clone() for keys, _ in opened.chunk_keys(0)]
    recall.store.remove(recall.calibration.fingerprint, segment.digest)
    assert all(torch.equal(a, b) for a, (b, _) in zip(keys, opened.chunk_keys(0), strict=True))


def test_asking_and_ingesting_at_once(tmp_path):
    """Threads share one recall: each gets the answer it would get alone."""
    recall = fake_recall(tmp_path)
    contexts = [
        [Segment(filler(900, seed) + f"\nthe zebra{seed} password is tulip")] for seed in range(6)
    ]
    recall._tokenizer.encode(" ".join(context[0].text for context in contexts) + " zebra password")
    found = {}

    def ask(i: int) -> None:
        found[i] = recall.ask(contexts[i % 6], f"the zebra{i % 6} password")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, selection in found.items():
        assert selection.spans == recall.ask(contexts[i % 6], f"the zebra{i % 6} password").spans
    assert len(found) == 12
    assert recall.verify() == []
