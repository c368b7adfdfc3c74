"""Names, memory and limits of served models; nothing here needs weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evermini.config import Settings
from evermini.engine.engine import Engine
from evermini.engine.worker import EngineWorker
from evermini.errors import ConfigError, DownloadError, ModelNotFoundError
from evermini.models.batch import KVCache
from evermini.service import loading, machine, memory
from evermini.service.loading import what_to_serve
from evermini.service.model_info import ModelInfo
from evermini.service.runtime import Runtime, ServedModel, start_worker
from tests.fakes import TinyModel, tiny_config

BLOCK_BYTES = KVCache.bytes_per_block(tiny_config(), TinyModel().new_kv_cache(1).dtype)
WINDOW_BLOCKS = 8192 // 32


def served(model_id: str, *aliases: str) -> ServedModel:
    engine = Engine(TinyModel(), num_blocks=4, max_batch_tokens=64, max_num_seqs=2, max_waiting=2)
    worker = EngineWorker(engine)
    nothing: Any = None
    return ServedModel(
        ModelInfo(model_id, aliases, 0, 128, "fp_0"), worker, nothing, nothing, nothing
    )


class TestNames:
    def test_every_name_resolves(self) -> None:
        big, small = served("big-1", "big"), served("org/small")
        runtime = Runtime([big, small])
        assert runtime.resolve("big-1") is runtime.resolve("big") is runtime.default is big
        assert runtime.resolve("org/small") is small
        with pytest.raises(
            ModelNotFoundError, match=r"`huge` does not exist.*big-1, big, org/small"
        ):
            runtime.resolve("huge")

    def test_a_name_belongs_to_one_model(self) -> None:
        with pytest.raises(ConfigError, match="answer to the name x"):
            Runtime([served("a", "x"), served("x")])
        with pytest.raises(ConfigError, match="no model"):
            Runtime([])

    def test_what_a_name_loads(self) -> None:
        entry, source = what_to_serve("gpt-4.1-mini")
        assert entry is not None
        assert (entry.tier, source) == ("mini", "gpt-4.1-mini")
        assert what_to_serve("/models/x.gguf") == (None, "/models/x.gguf")
        assert what_to_serve("mini=/models/x.gguf") == (entry, "/models/x.gguf")
        assert what_to_serve("/odd=path/x.gguf") == (None, "/odd=path/x.gguf")

    def test_which_model_finds_passages(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def load(name: str, *_: object, **__: object) -> Any:
            if name == "absent":
                raise DownloadError("No network.")
            entry, source = what_to_serve(name)
            weights = entry.tier if entry else source
            return SimpleNamespace(
                entry=entry,
                checkpoint=SimpleNamespace(fingerprint=weights),
                model=name,
                tokenizer=name,
            )

        monkeypatch.setattr(loading, "load_checkpoint", load)

        def finder(answering: str, setting: str) -> Any:
            settings = Settings(home=tmp_path, recall_index=setting)
            return loading.load_indexer(load(answering), settings).model

        assert finder("nano", "auto") == "nano"
        assert finder("mini", "auto") == "mini"
        assert finder("full", "auto") == "mini"
        assert finder("/x.gguf", "auto") == "/x.gguf"
        assert finder("full", "own") == "full"
        assert finder("nano", "gpt-4.1-mini") == "gpt-4.1-mini"
        assert finder("mini", "gpt-4.1-mini") == "mini", "one model is not loaded twice"
        with pytest.raises(DownloadError, match=r"No network.*recall_index to own"):
            finder("nano", "absent")

    def test_closing_stops_the_engines(self) -> None:
        model = served("a")
        model.worker.start()
        with Runtime([model]) as runtime:
            assert runtime.is_ready
            assert runtime.engine_stats()["a"].running == 0
        assert not runtime.is_ready


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    state = SimpleNamespace(available=0)
    monkeypatch.setattr(memory, "memory", lambda: state)
    return state


class TestMachine:
    def test_a_containers_limit_counts_where_it_is_lower(self, tmp_path: Path) -> None:
        (tmp_path / "memory.max").write_text("1000000\n")
        (tmp_path / "memory.current").write_text("700000\n")
        (tmp_path / "memory.stat").write_text(
            "anon 400000\ninactive_file 200000\nactive_file 100000\n"
        )
        assert machine.memory(tmp_path) == machine.Memory(1_000_000, 600_000)
        (tmp_path / "memory.max").write_text("max\n")
        assert machine.memory(tmp_path).total > 1_000_000


class TestMemory:
    def blocks(self, **settings: Any) -> int:
        return memory.kv_blocks(TinyModel(), Settings(**settings))

    def test_auto_takes_a_share(self, free: SimpleNamespace) -> None:
        free.available = 8 * WINDOW_BLOCKS * BLOCK_BYTES
        assert self.blocks() == 2 * WINDOW_BLOCKS

    def test_auto_fits_one_window_if_it_can(self, free: SimpleNamespace) -> None:
        free.available = 2 * WINDOW_BLOCKS * BLOCK_BYTES
        assert self.blocks() == WINDOW_BLOCKS

    def test_auto_never_takes_almost_everything(
        self, free: SimpleNamespace, caplog: pytest.LogCaptureFixture
    ) -> None:
        free.available = WINDOW_BLOCKS * BLOCK_BYTES
        assert self.blocks() == int(0.8 * WINDOW_BLOCKS)
        assert "less than the model's window" in caplog.text

    def test_auto_takes_no_more_than_the_sequences_can_use(self, free: SimpleNamespace) -> None:
        free.available = 10**15
        assert self.blocks(max_num_seqs=2) == 2 * WINDOW_BLOCKS

    def test_a_given_size(self, free: SimpleNamespace) -> None:
        free.available = 10**9
        assert self.blocks(kv_memory=40 * BLOCK_BYTES + 1) == 40
        with pytest.raises(ConfigError, match="are free"):
            self.blocks(kv_memory=2 * 10**9)
        with pytest.raises(ConfigError, match="fewer than 512 tokens"):
            self.blocks(kv_memory=BLOCK_BYTES)

    def test_limits_that_contradict_each_other(self, free: SimpleNamespace) -> None:
        free.available = 10**9
        with pytest.raises(ConfigError, match="max_batch_tokens"):
            start_worker(TinyModel(), Settings(max_batch_tokens=64, max_num_seqs=64))
