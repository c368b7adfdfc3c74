"""Files and uploads, as the official client sends and reads them, on a local folder and on S3."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from evermini.config import Settings
from evermini.service.runtime import Runtime
from evermini.storage.blobs import BlobStore
from evermini.storage.database import Database
from tests.serving import assert_error, make_client, serving

ROWS = b'{"custom_id": "a"}\n' * 1000


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def settings(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    if request.param == "folder":
        return Settings(home=tmp_path)
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
    bucket = f"evermini-{time.time_ns()}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    s3fs.S3FileSystem.clear_instance_cache()
    return Settings(home=tmp_path, blob_url=f"s3://{bucket}/files")


@pytest.fixture
def url(runtime: Runtime, settings: Settings) -> Iterator[str]:
    with Database.open(settings) as database, serving(runtime, settings, database) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with make_client(url) as client:
        yield client


@pytest.fixture
def local_url(runtime: Runtime, tmp_path: Path) -> Iterator[str]:
    with serving(runtime, Settings(home=tmp_path)) as url:
        yield url


@pytest.fixture
def local_client(local_url: str) -> Iterator[openai.OpenAI]:
    with make_client(local_url) as client:
        yield client


def blob_names(settings: Settings) -> list[str]:
    """Every blob there is, used or not."""
    return BlobStore.open(settings).orphans(lambda names: set(), grace=-60)


class TestFiles:
    def test_a_file_comes_back_as_it_was_sent(self, client: openai.OpenAI) -> None:
        sent = client.files.create(file=("rows.jsonl", ROWS), purpose="batch")
        assert re.fullmatch(r"file-\w{22}", sent.id)
        assert (sent.filename, sent.purpose, sent.bytes) == ("rows.jsonl", "batch", len(ROWS))
        assert sent.expires_at == sent.created_at + 30 * 86_400
        assert client.files.retrieve(sent.id) == sent
        assert client.files.content(sent.id).read() == ROWS

    def test_an_empty_file_and_every_byte_value(self, client: openai.OpenAI) -> None:
        for content in (b"", bytes(range(256)) * 5000, b"\r\n--x\r\n" * 3):
            sent = client.files.create(file=("data.bin", content), purpose="user_data")
            assert sent.bytes == len(content)
            assert client.files.content(sent.id).read() == content

    def test_deleting_takes_the_bytes_along(
        self, client: openai.OpenAI, settings: Settings
    ) -> None:
        sent = client.files.create(file=("a.txt", b"secret"), purpose="user_data")
        assert len(blob_names(settings)) == 1
        assert client.files.delete(sent.id).deleted
        assert blob_names(settings) == []
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                call(sent.id)

    def test_ranges(self, client: openai.OpenAI, url: str) -> None:
        sent = client.files.create(file=("a.txt", b"0123456789"), purpose="user_data")
        content = f"{url}/v1/files/{sent.id}/content"
        for wanted, got, said in [
            ("bytes=2-4", b"234", "bytes 2-4/10"),
            ("bytes=7-", b"789", "bytes 7-9/10"),
            ("bytes=-3", b"789", "bytes 7-9/10"),
            ("bytes=5-99", b"56789", "bytes 5-9/10"),
        ]:
            part = httpx.get(content, headers={"range": wanted})
            assert (part.status_code, part.content) == (206, got)
            assert part.headers["content-range"] == said
        whole = httpx.get(content, headers={"range": "lines=1-2"})
        assert (whole.status_code, whole.content) == (200, b"0123456789")
        assert_error(httpx.get(content, headers={"range": "bytes=10-"}), 416)


def test_listing_filters_and_pages(local_client: openai.OpenAI) -> None:
    files = [
        local_client.files.create(file=(f"{n}.txt", b"x"), purpose=purpose)
        for n, purpose in enumerate(["user_data", "vision", "user_data", "evals"])
    ]
    newest_first = [file.id for file in reversed(files)]
    assert [file.id for file in local_client.files.list()] == newest_first
    assert [file.id for file in local_client.files.list(limit=1, order="asc")] == newest_first[::-1]
    data = local_client.files.list(purpose="user_data").data
    assert [file.id for file in data] == [files[2].id, files[0].id]
    with pytest.raises(openai.NotFoundError, match="no object with id"):
        local_client.files.list(after="file-none")


def test_expired_files_are_gone(
    local_client: openai.OpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expires = {"anchor": "created_at", "seconds": 3600}
    sent = local_client.files.create(
        file=("a.txt", b"x"),
        purpose="user_data",
        expires_after=expires,  # type: ignore[arg-type]
    )
    assert sent.expires_at == sent.created_at + 3600
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 3601)
    monkeypatch.setattr("evermini.service.files.JUMP_PAUSE", 0)  # deleted at once all the same
    with pytest.raises(openai.NotFoundError):
        local_client.files.retrieve(sent.id)
    assert local_client.files.list().data == []
    local_client.files.create(file=("b.txt", b"y"), purpose="user_data")  # sweeps
    assert len(blob_names(Settings(home=tmp_path))) == 1


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("a\r\nx-evil: 1.txt", "ax-evil: 1.txt"),
        ("weiß 😀.txt", "weiß 😀.txt"),
    ],
)
def test_names_are_names_and_never_paths_or_headers(
    local_client: openai.OpenAI, local_url: str, tmp_path: Path, name: str, shown: str
) -> None:
    boundary = "b0undary"
    quoted = name.replace("\r", "%0D").replace("\n", "%0A")
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{quoted}"\r\n\r\nhi\r\n'
        f"--{boundary}--\r\n"
    ).encode()
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    answer = httpx.post(f"{local_url}/v1/files", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    stored = answer.json()
    assert stored["filename"] in (shown, quoted)
    content = httpx.get(f"{local_url}/v1/files/{stored['id']}/content")
    assert content.content == b"hi"
    assert "x-evil" not in content.headers
    for path in (tmp_path / "blobs").rglob("*"):
        assert re.fullmatch(r"[0-9a-f]+", path.name)


class TestRefusals:
    def test_purposes_and_names(self, local_client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="Supported values are"):
            local_client.files.create(file=("a.txt", b"x"), purpose="anything")  # type: ignore[arg-type]
        with pytest.raises(openai.BadRequestError, match=r"ends in \.jsonl|\.jsonl"):
            local_client.files.create(file=("a.txt", b"x"), purpose="fine-tune")
        with pytest.raises(openai.BadRequestError, match="above maximum"):
            local_client.files.create(
                file=("a.txt", b"x"),
                purpose="evals",
                expires_after={"anchor": "created_at", "seconds": 2_592_001},
            )

    def test_nothing_of_a_refused_file_stays(
        self, local_client: openai.OpenAI, tmp_path: Path
    ) -> None:
        with pytest.raises(openai.BadRequestError):
            local_client.files.create(file=("a.txt", b"x" * 3_000_000), purpose="batch")
        assert blob_names(Settings(home=tmp_path)) == []

    def test_forms_that_are_none(self, local_url: str) -> None:
        files = f"{local_url}/v1/files"
        assert_error(httpx.post(files, json={"purpose": "batch"}), 415)
        headers = {"content-type": "multipart/form-data; boundary=x"}
        error = assert_error(httpx.post(files, content=b"nonsense", headers=headers), 400)
        assert "could not parse the form" in error["message"]
        cut = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
        assert_error(httpx.post(files, content=cut, headers=headers), 400)
        error = assert_error(httpx.post(files, data={"a": "b"}, files={"other": b"x"}), 400)
        assert "Unexpected file" in error["message"]
        form = {"purpose": (None, "batch")}
        error = assert_error(httpx.post(files, files=form), 400)
        assert error["message"] == "Missing required parameter: 'file'."
        form = {"purpose": (None, "x" * 100_000), "file": ("a", b"")}
        assert "longer than" in assert_error(httpx.post(files, files=form), 400)["message"]

    def test_pages_of_other_origins_cannot_send_files(
        self, runtime: Runtime, tmp_path: Path
    ) -> None:
        form = {"purpose": (None, "user_data"), "file": ("a", b"x")}
        settings = Settings(home=tmp_path, cors_origins=("https://app.example",))
        with serving(runtime, settings) as url:
            for origin, status in [("https://evil.example", 403), ("https://app.example", 200)]:
                answer = httpx.post(f"{url}/v1/files", files=form, headers={"origin": origin})
                assert answer.status_code == status, answer.text

    def test_a_file_beyond_the_limit(
        self, local_client: openai.OpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("evermini.api.files.MAX_FILE_BYTES", 1_000_000)
        with pytest.raises(openai.APIStatusError, match="too large") as refused:
            local_client.files.create(file=("a.txt", b"x" * 4_000_000), purpose="user_data")
        assert refused.value.status_code == 413
        assert blob_names(Settings(home=tmp_path)) == []


def test_a_large_file_is_never_whole_in_memory(
    local_client: openai.OpenAI, local_url: str, tmp_path: Path
) -> None:
    size = 192 * 1024**2
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(size)
        file.write(os.urandom(1 << 20))
    process, peak, done = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, process.memory_info().rss)

    def chunks() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="large.bin"\r\n\r\n'
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                yield data
        yield b"\r\n--b--\r\n"

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        headers = {"content-type": "multipart/form-data; boundary=b"}
        sent = httpx.post(
            f"{local_url}/v1/files", content=chunks(), headers=headers, timeout=120
        ).json()
        digest = hashlib.sha256()
        with local_client.files.with_streaming_response.content(sent["id"]) as content:
            for data in content.iter_bytes(1 << 20):
                digest.update(data)
    finally:
        done.set()
        watcher.join()
    assert digest.digest() == hashlib.sha256(path.read_bytes()).digest()
    assert peak - before < 64 * 1024**2  # client and server together


class TestUploads:
    def test_the_client_uploads_in_parts(self, client: openai.OpenAI, settings: Settings) -> None:
        content = os.urandom(1_500_000)
        done = client.uploads.upload_file_chunked(
            file=content,
            filename="big.bin",
            bytes=len(content),
            mime_type="application/octet-stream",
            purpose="user_data",
            part_size=400_000,
            md5=hashlib.md5(content).hexdigest(),
        )
        assert done.status == "completed"
        assert done.file is not None
        assert done.file.filename == "big.bin"
        assert client.files.content(done.file.id).read() == content
        ranged = client.files.content(done.file.id, extra_headers={"range": "bytes=399990-400009"})
        assert ranged.read() == content[399_990:400_010]
        assert len(blob_names(settings)) == 4
        client.files.delete(done.file.id)
        assert blob_names(settings) == []

    def test_parts_sent_at_once_and_in_any_order(self, client: openai.OpenAI) -> None:
        pieces = [bytes([n]) * 1000 for n in range(8)]
        upload = announce(client, 8000)
        with ThreadPoolExecutor(8) as pool:
            parts = list(
                pool.map(lambda data: client.uploads.parts.create(upload.id, data=data), pieces)
            )
        done = client.uploads.complete(upload.id, part_ids=[part.id for part in parts])
        assert done.file is not None
        assert client.files.content(done.file.id).read() == b"".join(pieces)

    def test_unused_parts_are_deleted(self, client: openai.OpenAI, settings: Settings) -> None:
        upload = announce(client, 6)
        first = client.uploads.parts.create(upload.id, data=b"abc")
        client.uploads.parts.create(upload.id, data=b"xxx")
        with pytest.raises(openai.BadRequestError, match="3 bytes, but 6 were announced"):
            client.uploads.complete(upload.id, part_ids=[first.id])
        small = announce(client, 3)
        part = client.uploads.parts.create(small.id, data=b"abc")
        client.uploads.complete(small.id, part_ids=[part.id])
        assert client.uploads.cancel(upload.id).status == "cancelled"
        assert len(blob_names(settings)) == 1

    def test_what_does_not_fit_together_is_refused(self, local_client: openai.OpenAI) -> None:
        client = local_client
        upload = announce(client, 3)
        with pytest.raises(openai.BadRequestError, match="longer"):
            client.uploads.parts.create(upload.id, data=b"abcd")
        part = client.uploads.parts.create(upload.id, data=b"abc")
        with pytest.raises(openai.BadRequestError, match="not a part of this upload"):
            client.uploads.complete(upload.id, part_ids=[part.id, "part_no"])
        with pytest.raises(openai.BadRequestError, match="named twice"):
            client.uploads.complete(upload.id, part_ids=[part.id, part.id])
        with pytest.raises(openai.BadRequestError, match="MD5 checksum"):
            client.uploads.complete(upload.id, part_ids=[part.id], md5="0" * 32)
        client.uploads.complete(upload.id, part_ids=[part.id])
        with pytest.raises(openai.BadRequestError, match="is completed"):
            client.uploads.parts.create(upload.id, data=b"")
        with pytest.raises(openai.BadRequestError, match="is completed"):
            client.uploads.complete(upload.id, part_ids=[part.id])
        with pytest.raises(openai.NotFoundError, match="No such Upload"):
            client.uploads.cancel("upload_none")
        with pytest.raises(openai.BadRequestError, match="above maximum"):
            announce(client, 9 * 1024**3)

    def test_an_upload_expires(
        self, local_client: openai.OpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        upload = announce(local_client, 3)
        local_client.uploads.parts.create(upload.id, data=b"ab")
        now = time.time()
        monkeypatch.setattr("time.time", lambda: now + 3601)
        monkeypatch.setattr("evermini.service.files.JUMP_PAUSE", 0)  # deleted at once all the same
        with pytest.raises(openai.BadRequestError, match="is expired"):
            local_client.uploads.parts.create(upload.id, data=b"c")
        local_client.files.create(file=("b.txt", b"y"), purpose="user_data")
        assert len(blob_names(Settings(home=tmp_path))) == 1


def test_files_outlive_the_server(runtime: Runtime, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    ids = []
    for _ in range(2):
        with (
            Database.open(settings) as database,
            serving(runtime, settings, database) as url,
            make_client(url) as client,
        ):
            for file_id in ids:
                assert client.files.content(file_id).read() == ROWS
            ids.append(client.files.create(file=("r.jsonl", ROWS), purpose="batch").id)


def test_a_full_disk_loses_nothing_and_is_not_retried(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path)
    with (
        Database.open(settings) as database,
        serving(runtime, settings, database) as url,
        make_client(url, max_retries=3) as client,
    ):
        kept = client.files.create(file=("a.txt", b"kept"), purpose="user_data")
        full = OSError(28, "No space left on device")
        calls = []

        def write(self: object, data: bytes) -> None:
            calls.append(len(data))
            raise full

        from evermini.storage import blobs

        original = blobs.BlobWriter.write

        def failing(self: blobs.BlobWriter, data: bytes) -> None:
            with blobs._translated():
                write(self, data)

        monkeypatch.setattr(blobs.BlobWriter, "write", failing)
        with pytest.raises(openai.APIStatusError, match="disk is full") as refused:
            client.files.create(file=("b.txt", b"lost"), purpose="user_data")
        assert refused.value.status_code == 507
        assert len(calls) == 1
        monkeypatch.setattr(blobs.BlobWriter, "write", original)
        client.files.create(file=("b.txt", b"stored"), purpose="user_data")
        assert client.files.content(kept.id).read() == b"kept"
        assert len(blob_names(settings)) == 2
        assert sum(file.bytes for file in client.files.list().data) == 10


def announce(client: openai.OpenAI, num_bytes: int) -> openai.types.Upload:
    return client.uploads.create(
        bytes=num_bytes,
        filename="u.bin",
        mime_type="application/octet-stream",
        purpose="user_data",
    )
