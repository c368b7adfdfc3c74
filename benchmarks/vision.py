"""Images and files through the API: receipts, photos, pages, annual reports, and where a receipt's time goes.

    python benchmarks/vision.py --data shared/data --model mini --out vision.json [receipts ...]

A server is started for it (`--base-url` takes a running one). Receipts (SROIE): company, date, address and total by a
strict JSON schema; beside it the same fields by rules from the recognised text alone, and how many of the words and
values text recognition got at all. Photos (ImageNet): the right label among the five of the description. Pages
(scikit-image): words. Reports (FinanceBench): two annual reports as PDF files; does the model get a page that the
question needs, and is the gist of the answer right. Latency: one receipt, split into reading, prompt and decoding.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx
import openai

from evermini.config import load_settings
from evermini.vision import Perception

PARTS = ("receipts", "photos", "pages", "reports", "latency")
FIELDS = {
    "company": "full name of the company at the top of the receipt",
    "date": "the date as it is printed, without the time of day",
    "address": "full address of the company: its lines below the name, all in one, from the street to the town",
    "total": "total amount to pay, only the number",
}
PATTERNS = {"date": r"^\d{1,4}[-/. ]\w{1,3}[-/. ]\d{2,4}$", "total": r"^\d+\.\d\d$"}
RECEIPT = "Copy the company's name, the date, the company's whole address and the total from this receipt."
GISTS = {
    "financebench_id_00799": r"improv.*0\.69|0\.69.*improv",
    "financebench_id_01079": r"Czech|medical device|Shanghai|New Zealand",
    "financebench_id_01148": r"packaging",
    "financebench_id_00684": r"^(?!\W*yes\b).*\b(no|not|declin\w*|decreas\w*|lower)\b",
    "financebench_id_00685": r"\b(yes|consistent)\b",
    "financebench_id_01077": r"Current Health|Yardbird",
    "financebench_id_01275": r"operating",
}
"""What the answer to a question about a report must match, whatever else it says."""
REPORT_KINDS = ("page_read", "page_cited", "page_named", "right")
"""A page that the question needs was read; an answer's words were found on it; the answer names a page; it is right."""
PAGE_TEXTS = {
    "page.png": "Region-based segmentation Let us first determine markers of the coins and the background. These "
    "markers are pixels that we can label unambiguously as either object or background. Here, the markers are found "
    "at the two extreme parts of the histogram of grey values: markers = np.zeros_like(coins)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--base-url", help="a running server, with /v1 at its end")
    parser.add_argument("--limit", type=int, default=25, help="receipts, photos")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("vision.json"))
    given = parser.parse_args()
    home = load_settings({}).settings.home
    found: dict[str, Any] = {"model": given.model}
    perception = Perception(home, threads=given.threads)
    if "photos" in given.parts:
        found["photos"] = photos(perception, given)
    if "pages" in given.parts:
        found["pages"] = pages(perception, given)
    if set(given.parts) & {"receipts", "reports", "latency"}:
        with server(given) as url:
            client = openai.OpenAI(base_url=url, api_key="none", timeout=7200, max_retries=0)
            for name, part in (("latency", latency), ("receipts", receipts), ("reports", reports)):
                if name in given.parts:
                    found[name] = part(client, perception, given)
    given.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, part in found.items():
        print(name, part["summary"] if isinstance(part, dict) else part)


@contextmanager
def server(given: argparse.Namespace) -> Iterator[str]:
    """Yield the URL of a server, started for the occasion unless one is named."""
    if given.base_url:
        yield given.base_url
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "evermini", "serve", "-m", given.model, "--port", str(port)]
    command += ["--prompt-disk", "0"]  # every image is to be computed
    if given.threads:
        command += ["--threads", str(given.threads)]
    with (
        tempfile.TemporaryDirectory() as folder,
        (Path(folder) / "log").open("wb") as log,
        subprocess.Popen(
            [*command, "--database-url", f"sqlite:///{folder}/db", "--blob-url", f"{folder}/blobs"],
            stdout=log,
            stderr=log,
            env=os.environ,
        ) as process,
    ):
        root = f"http://127.0.0.1:{port}"
        try:
            while True:
                try:
                    if httpx.get(f"{root}/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    if process.poll() is not None:
                        raise SystemExit((Path(folder) / "log").read_text()[-2000:]) from None
                time.sleep(0.5)
            yield f"{root}/v1"
        finally:
            process.terminate()


# Receipts


def receipts(client: openai.OpenAI, perception: Perception, given: argparse.Namespace) -> Any:
    rows = []
    for path in sorted((given.data / "sroie/img").glob("*.jpg"))[: given.limit]:
        data = path.read_bytes()
        gold = json.loads((given.data / f"sroie/key/{path.stem}.json").read_text(encoding="utf-8"))
        text, _ = perception.describe(data, "auto")
        answer = client.chat.completions.create(**receipt_request(given.model, data))
        by_model = json.loads(answer.choices[0].message.content or "{}")
        by_rules = rules(text)
        rows.append(
            {
                "receipt": path.stem,
                "words": word_recall(transcript(given.data / f"sroie/box/{path.stem}.csv"), text),
                "gold": gold,
                "model": by_model,
                "rules": by_rules,
                "right": {f: same(f, by_model.get(f, ""), gold[f]) for f in FIELDS},
                "right_by_rules": {f: same(f, by_rules[f], gold[f]) for f in FIELDS},
                "legible": {f: plain(gold[f]) in plain(text) for f in FIELDS},
            }
        )
        print(path.stem, rows[-1]["right"], rows[-1]["right_by_rules"], flush=True)
    summary = {
        "receipts": len(rows),
        "word_recall": round(mean(row["words"] for row in rows), 3),
        **{
            kind: {f: sum(row[kind][f] for row in rows) for f in FIELDS}
            for kind in ("right", "right_by_rules", "legible")
        },
    }
    return {"summary": summary, "rows": rows}


def receipt_request(model: str, data: bytes) -> dict[str, Any]:
    """Return the chat completion that reads a receipt."""
    properties = {name: {"type": "string", "description": what} for name, what in FIELDS.items()}
    for name, pattern in PATTERNS.items():
        properties[name]["pattern"] = pattern
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(FIELDS),
        "additionalProperties": False,
    }
    form = {"name": "receipt", "strict": True, "schema": schema}
    content = [image_part(data), {"type": "text", "text": RECEIPT}]
    return {
        "model": model,
        "temperature": 0,
        "max_completion_tokens": 300,
        "messages": [{"role": "user", "content": content}],
        "response_format": {"type": "json_schema", "json_schema": form},
    }


def image_part(data: bytes) -> dict[str, Any]:
    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def transcript(path: Path) -> str:
    """Return all words that a receipt's annotation lists."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(line.split(",", 8)[8] for line in lines if line.count(",") >= 8)


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[a-z0-9]+(?:[.,:/&'-][a-z0-9]+)*", text.lower()))


def word_recall(gold: str, found: str) -> float:
    """Return the share of words that were found, each as often as it is there."""
    wanted = words(gold)
    return (wanted & words(found)).total() / max(1, wanted.total())


def plain(value: str) -> str:
    """Return a value without case, spaces and punctuation, but for the decimal point between digits."""
    return re.sub(r"(?<!\d)\.|\.(?!\d)|[^a-z0-9.]", "", value.lower())


def same(field: str, found: str, gold: str) -> bool:
    if field == "total":
        numbers = [re.sub(r"[^\d.]", "", value).strip(".") for value in (found, gold)]
        return numbers[0] != "" and float(
            numbers[0].replace(".", "", numbers[0].count(".") - 1)
        ) == float(numbers[1])
    return plain(found) == plain(gold)


def rules(text: str) -> dict[str, str]:
    """Return the fields as rules find them in the recognised text: what needs no model."""
    lines = [line.replace(" | ", " ") for line in text.split("\n")[2:] if line.strip()]
    firm = next(
        (line for line in lines[:5] if re.search(r"SDN|BHD|ENTERPRISE|TRADING", line, re.I)), None
    )
    company = firm or (lines[0] if lines else "")
    day = re.search(r"\b\d{1,2}[/.-](?:\d{1,2}|[A-Z]{3})[/.-]\d{2,4}", text, re.I)
    totals = [
        amounts[-1]
        for line in lines
        if re.search(r"\btotal", line, re.I)
        and not re.search(r"sub|qty|item|tax|gst", line, re.I)
        and (amounts := re.findall(r"\d[\d,]*\.\d\d", line))
    ]
    start = lines.index(company) + 1 if company in lines else 0
    address = []
    for line in lines[start : start + 7]:
        if re.search(r"\b(tel|fax|phone|gst|date|invoice|receipt|document)\b", line, re.I):
            break
        if address or re.search(r"\b(no|lot|jalan|jln|lorong)\b|^\d", line, re.I):
            address.append(line)
    return {
        "company": company,
        "date": day[0] if day else "",
        "address": " ".join(address),
        "total": totals[-1] if totals else "",
    }


# Photos and pages


def photos(perception: Perception, given: argparse.Namespace) -> Any:
    rows = []
    for path in sorted((given.data / "imagenet100").glob("*.JPEG"))[: given.limit]:
        label = path.stem.partition("_")[2].replace("_", " ").lower()
        text, _ = perception.describe(path.read_bytes(), "auto")
        listed = re.findall(r"(?:: |; )([^;:]+?) \(\d+%\)", text)
        ranked = [label in name.lower().split(", ") for name in listed]
        rows.append(
            {"label": label, "listed": listed, "first": ranked[:1] == [True], "any": any(ranked)}
        )
    summary = {
        "photos": len(rows),
        "first": sum(row["first"] for row in rows),
        "top5": sum(row["any"] for row in rows),
    }
    return {"summary": summary, "rows": rows}


def pages(perception: Perception, given: argparse.Namespace) -> Any:
    rows = []
    for name, gold in PAGE_TEXTS.items():
        text, _ = perception.describe((given.data / "skimage" / name).read_bytes(), "auto")
        rows.append({"page": name, "word_recall": round(word_recall(gold, text), 3), "text": text})
    return {"summary": {row["page"]: row["word_recall"] for row in rows}, "rows": rows}


# Reports


def reports(client: openai.OpenAI, perception: Perception, given: argparse.Namespace) -> Any:
    folder, rows = given.data / "financebench", []
    listed = (folder / "financebench_open_source.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in listed]
    for path in sorted((folder / "pdfs").glob("*.pdf")):
        with path.open("rb") as file:
            uploaded = client.files.create(file=(path.name, file), purpose="user_data")
        for item in (item for item in questions if item["doc_name"] == path.stem):
            began = time.monotonic()
            content = [
                {"type": "file", "file": {"file_id": uploaded.id}},
                {"type": "text", "text": item["question"]},
            ]
            answer = client.chat.completions.create(
                model=given.model,
                temperature=0,
                max_completion_tokens=160,
                messages=[
                    {"role": "system", "content": "Answer in a sentence or two and name the page."},
                    {"role": "user", "content": content},
                ],
                extra_body={"x_evermini": {"why": True, "reading": "recall"}},
            )
            said = answer.choices[0].message.content or ""
            why: Any = answer.to_dict()["x_evermini"]
            read = pages_of(span for span in why["recall"]["spans"] if span["included"])
            cited = pages_of(why["citations"])
            gold = {evidence["evidence_page_num"] + 1 for evidence in item["evidence"]}
            named = {int(n) for n in re.findall(r"pages?\s+(\d+)", said, re.I)}
            rows.append(
                {
                    "id": item["financebench_id"],
                    "question": item["question"],
                    "gold": item["answer"],
                    "said": said,
                    "pages_needed": sorted(gold),
                    "pages_read": sorted(read),
                    "pages_cited": sorted(cited),
                    "page_read": bool(gold & read),
                    "page_cited": bool(gold & cited),
                    "page_named": bool(named & read),
                    "right": bool(re.search(GISTS[item["financebench_id"]], said, re.I | re.S)),
                    "tokens": answer.usage.prompt_tokens if answer.usage else 0,
                    "seconds": round(time.monotonic() - began, 1),
                }
            )
            print(rows[-1], flush=True)
    summary = {
        "questions": len(rows),
        **{kind: sum(row[kind] for row in rows) for kind in REPORT_KINDS},
    }
    return {"summary": summary, "rows": rows}


def pages_of(places: Iterable[dict[str, Any]]) -> set[int]:
    """Return the pages of passages or citations."""
    return {page for at in places for page in range(at["pages"][0], at["pages"][1] + 1)}


# Latency


def latency(client: openai.OpenAI, perception: Perception, given: argparse.Namespace) -> Any:
    path = sorted((given.data / "sroie/img").glob("*.jpg"))[0]
    data = path.read_bytes()
    client.chat.completions.create(**receipt_request(given.model, other_bytes(data, b"warm-up")))
    runs = []
    for _ in range(5):
        fresh = receipt_request(given.model, other_bytes(data, b"%d" % time.time_ns()))
        # The prefix cache knows the picture's text, but not after another beginning.
        whole = timed(client, begun_otherwise(fresh))
        known_image = begun_otherwise(fresh)
        prompt = timed(client, known_image)
        again = timed(client, known_image)
        runs.append(
            {
                "text_recognition_s": whole["first_token"] - prompt["first_token"],
                "prompt_s": prompt["first_token"],
                "decode_s": whole["decode"],
                "same_request_again_first_token_s": again["first_token"],
            }
        )
    summary = {name: round(median(run[name] for run in runs), 3) for name in runs[0]}
    return {"summary": {**summary, "decoded_tokens": whole["tokens"]}, "runs": runs}


def begun_otherwise(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request with a first message that was never sent."""
    first = {"role": "system", "content": f"Case {time.time_ns()}."}
    return {**request, "messages": [first, *request["messages"]]}


def other_bytes(jpeg: bytes, comment: bytes) -> bytes:
    """Return the same picture with other bytes, which no cache knows: with a comment after the first marker."""
    return jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]


def timed(client: openai.OpenAI, request: dict[str, Any]) -> dict[str, float]:
    began, first, tokens = time.perf_counter(), 0.0, 0
    for chunk in client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    ):
        if chunk.choices and chunk.choices[0].delta.content and not first:
            first = time.perf_counter() - began
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    return {"first_token": first, "decode": time.perf_counter() - began - first, "tokens": tokens}


if __name__ == "__main__":
    main()
