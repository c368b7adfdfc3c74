"""Training on rows with images: the loss is that of `transformers` and peft on the whole vision-language model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from evermini.errors import EngineStoppedError
from evermini.models.checkpoint import Checkpoint, open_checkpoint
from evermini.text.chat import ChatTemplate
from evermini.text.tokenizer import Tokenizer
from evermini.tuning.data import Data, read_data
from evermini.tuning.examples import IGNORED, SupervisedExample
from evermini.tuning.images import ImageReader, ImageStore
from evermini.vision.tower import QwenTower
from tests.images import encoded, image_part
from tests.tuning_files import jsonl
from tests.unit.test_tuning_train import Reports, run, spec
from tests.vlm_checkpoints import FAMILIES, TinyVlm, picture, save_vlm

pytest.importorskip("trl")

PHOTO, TALL = picture(1), picture(2, (56, 140))
WINDOW = 1024
ANSWER = "a cat"


def row(*parts: str | Image.Image, answer: str = ANSWER) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else image_part(encoded(part))
        for part in parts
    ]
    user = {"role": "user", "content": content}
    return {"messages": [user, {"role": "assistant", "content": answer}]}


ROWS = [
    row("What is this?", PHOTO),
    row("No image here.", answer="none"),
    row(TALL, "and", PHOTO, "Which is taller?", answer="the first"),
    row(PHOTO, "What?", answer="b"),
]


@dataclass(frozen=True)
class Tiny:
    """A tiny checkpoint as the oracle and as ours."""

    oracle: TinyVlm
    checkpoint: Checkpoint

    def reader(self, store: ImageStore | None = None, **options: Any) -> ImageReader:
        tokenizer = Tokenizer(self.checkpoint.tokenizer)
        return ImageReader(self.checkpoint, tokenizer, precision="fp32", store=store, **options)

    def read(self, folder: Path, rows: list[Any], reader: ImageReader, method: Any) -> Data:
        path = folder / "rows.jsonl"
        path.write_bytes(jsonl(rows))
        template = ChatTemplate(Tokenizer(self.checkpoint.tokenizer))
        return read_data(path, method, template, WINDOW, min_examples=1, images=reader)

    def problems(self, folder: Path, row: Any, method: str = "supervised") -> list[Any]:
        data = self.read(folder, [row], self.reader(), method)
        return [(error.path, error.message) for error in data.errors]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp(request.param)
    return Tiny(save_vlm(request.param, folder), open_checkpoint(folder))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("qwen")
    return Tiny(save_vlm("qwen2_5_vl", folder), open_checkpoint(folder))


def oracle_with(tiny: Tiny, adapter: Path) -> Any:
    """The whole vision-language model with an adapter of ours, by peft."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = LoraConfig.from_pretrained(adapter)
    layers = r".*(language_model|text_model).*\.(q|k|v|o|gate|up|down)_proj"
    config.target_modules, config.task_type, config.inference_mode = layers, None, False
    model = get_peft_model(copy.deepcopy(tiny.oracle.model), config)
    part = "language_model" if tiny.oracle.family == "qwen2_5_vl" else "text_model"
    state = {
        name.replace("base_model.model.model.", f"base_model.model.model.{part}."): tensor
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }
    found = set_peft_model_state_dict(model, state)
    assert not found.unexpected_keys
    return model.train()


def oracle_inputs(tiny: Tiny, row: dict[str, Any], images: list[Image.Image]) -> dict[str, Any]:
    """What its processor makes of a row, with labels for the answer alone."""
    parts = [
        part if part["type"] == "text" else {"type": "image"}
        for part in row["messages"][0]["content"]
    ]
    inputs = tiny.oracle.inputs([{"role": "user", "content": parts}], images)
    text = row["messages"][1]["content"]
    is_qwen = tiny.oracle.family == "qwen2_5_vl"
    answer = f"{text}<|im_end|>" if is_qwen else f" {text}<end_of_utterance>"
    ids = tiny.oracle.tokenizer(answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
    prompt = inputs["input_ids"]
    inputs["input_ids"] = torch.cat([prompt, ids], 1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat(
            [inputs["mm_token_type_ids"], torch.zeros_like(ids).int()], 1
        )
    inputs["labels"] = torch.cat([torch.full_like(prompt, -100), ids], 1)
    return inputs


IMAGES: list[list[Image.Image]] = [[PHOTO], [], [TALL, PHOTO], [PHOTO]]


def trainer_of(
    tiny: Tiny, folder: Path, data: Data, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> Any:
    """The trainer of a job, about to train, with an adapter that is not zero."""
    from evermini.tuning import trainers
    from evermini.tuning.train import train

    captured: list[Any] = []

    class Stop(Exception):
        pass

    def look(trainer: Any, **_: Any) -> None:
        captured.append(trainer)
        raise Stop

    for kind in (trainers.Supervised, trainers.Preferences):
        monkeypatch.setattr(kind, "train", look)
    with pytest.raises(Stop):
        train(spec(**changes), folder, tiny.checkpoint, data, None, Reports(), lambda: False)  # type: ignore[arg-type]
    (trainer,) = captured
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B.default" in name:  # and not the reference of preferences
            parameter.data.normal_(std=0.02)
    trainer.model.save_pretrained(folder / "adapter")
    return trainer


def loss_of(trainer: Any) -> torch.Tensor:
    """The loss of all examples in one batch."""
    rows = [trainer.train_dataset[at] for at in range(len(trainer.train_dataset))]
    loss: torch.Tensor = trainer.compute_loss(trainer.model, dict(trainer.data_collator(rows)))
    return loss


@pytest.mark.filterwarnings("default")  # of trl and transformers, about each other
def test_the_loss_and_its_gradients_are_those_of_the_whole_model(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of rows with no, one and two images; an adapter that is not zero."""
    data = tiny.read(tmp_path, ROWS, tiny.reader(ImageStore(tmp_path / "images")), "supervised")
    assert not data.errors
    trainer = trainer_of(tiny, tmp_path, data, monkeypatch)
    loss = loss_of(trainer)
    loss.backward()

    oracle = oracle_with(tiny, tmp_path / "adapter")
    inputs = [oracle_inputs(tiny, *pair) for pair in zip(ROWS, IMAGES, strict=True)]
    learnt = [int((one["labels"] != -100).sum()) for one in inputs]
    assert data.num_learnt == sum(learnt)
    assert data.num_tokens == sum(one["input_ids"].shape[1] for one in inputs)
    assert data.num_images == 4
    expected = sum(
        oracle(**one).loss * count for one, count in zip(inputs, learnt, strict=True)
    ) / sum(learnt)
    expected.backward()
    print(
        f"{tiny.oracle.family}: loss {loss:.5f}, {abs(loss - expected).item():.1e} from the oracle"
    )
    assert abs(loss - expected).item() < 1e-4
    theirs = {
        name.replace(".language_model", "").replace(".text_model", ""): parameter.grad
        for name, parameter in oracle.named_parameters()
        if parameter.grad is not None
    }
    ours = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient is not None
        error = (gradient - theirs[name]).norm() / theirs[name].norm()
        assert error < 1e-3, name


PAIRS = [
    {
        "input": {"messages": row["messages"][:1]},
        "preferred_output": [{"role": "assistant", "content": better}],
        "non_preferred_output": [{"role": "assistant", "content": "no idea whatsoever"}],
    }
    for row, better in zip(ROWS, ("a cat", "none", "the first", "b"), strict=True)
]


def with_answer(pair: dict[str, Any], which: str) -> dict[str, Any]:
    return {"messages": [*pair["input"]["messages"], *pair[which]]}


@pytest.mark.filterwarnings("default")
def test_preferences_are_weighed_as_by_the_whole_model(
    qwen: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = qwen.read(tmp_path, PAIRS, qwen.reader(ImageStore(tmp_path / "images")), "dpo")
    assert not data.errors
    assert data.num_images == 4
    trainer = trainer_of(qwen, tmp_path, data, monkeypatch, method="dpo")
    oracle = oracle_with(qwen, tmp_path / "adapter")

    def log_probability(pair: dict[str, Any], which: str, images: list[Image.Image]) -> Any:
        inputs = oracle_inputs(qwen, with_answer(pair, which), images)
        return -oracle(**inputs).loss * (inputs["labels"] != -100).sum()

    losses = []
    with torch.no_grad():
        loss = loss_of(trainer)
        for pair, images in zip(PAIRS, IMAGES, strict=True):
            margin = 0.0
            for which, sign in (("preferred_output", 1), ("non_preferred_output", -1)):
                margin = margin + sign * log_probability(pair, which, images)
                with oracle.disable_adapter():
                    margin = margin - sign * log_probability(pair, which, images)
            losses.append(-torch.nn.functional.logsigmoid(0.1 * torch.as_tensor(margin)))
    expected = torch.stack(losses).mean()
    assert abs(loss - expected).item() < 1e-4
    assert abs(loss - 0.6931).item() > 1e-3  # that of an adapter that does nothing


@pytest.mark.filterwarnings("default")
def test_an_interrupted_training_goes_on_with_the_images_it_has(
    qwen: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(folder: Path) -> Data:
        folder.mkdir(exist_ok=True)
        reader = qwen.reader(ImageStore(folder / "images"))
        return qwen.read(folder, [*ROWS, *ROWS[:2]], reader, "supervised")

    whole = run(tmp_path / "whole", qwen.checkpoint.path, read(tmp_path / "whole"), Reports())
    parts = Reports()
    folder = tmp_path / "parts"
    run(folder, qwen.checkpoint.path, read(folder), parts, stop=lambda: len(parts.losses()) >= 2)
    assert parts.sent[-1]["type"] == "stopped"
    monkeypatch.setattr("evermini.tuning.images.load_tower", lambda *a, **k: pytest.fail("again"))
    # From here on activations are recomputed in the backward pass, which changes nothing.
    monkeypatch.setattr("evermini.tuning.train._needs_checkpointing", lambda *a: True)
    run(folder, qwen.checkpoint.path, read(folder), parts)
    assert parts.sent[-1]["type"] == "finished"
    assert parts.losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_each_image_is_computed_once(
    qwen: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    encode = QwenTower.encode
    monkeypatch.setattr(QwenTower, "encode", lambda *a: computed.append(1) or encode(*a))
    first = qwen.read(tmp_path, ROWS, qwen.reader(ImageStore(tmp_path / "images")), "supervised")
    assert len(computed) == 2  # of four in the file, two are different
    second = qwen.read(tmp_path, ROWS, qwen.reader(ImageStore(tmp_path / "images")), "supervised")
    assert len(computed) == 2
    for one, other in zip(first.examples, second.examples, strict=True):
        assert isinstance(one, SupervisedExample)
        assert isinstance(other, SupervisedExample)
        assert one.sequences[0].images == other.sequences[0].images
        assert one.sequences[0].ids.tolist() == other.sequences[0].ids.tolist()
    low = copy.deepcopy(ROWS)
    low[0]["messages"][0]["content"][1]["image_url"]["detail"] = "low"
    qwen.read(tmp_path, low, qwen.reader(ImageStore(tmp_path / "images")), "supervised")
    assert len(computed) == 3
    computed.clear()
    checked = qwen.reader()
    assert checked.seconds() == 0
    qwen.read(tmp_path, ROWS, checked, "supervised")
    assert not computed  # a file is checked without that, but for an estimate
    assert checked.seconds() > 0
    assert len(computed) == 1
    stopped = qwen.reader(ImageStore(tmp_path / "others"), is_told_to_stop=lambda: True)
    with pytest.raises(EngineStoppedError):
        qwen.read(tmp_path, ROWS, stopped, "supervised")


def test_answers_of_several_turns_see_the_images_before_them(qwen: Tiny, tmp_path: Path) -> None:
    first, second = row("Look.", PHOTO), row(TALL, "And this?", answer="two")
    turns = {"messages": [*first["messages"], *second["messages"]]}
    data = qwen.read(tmp_path, [turns], qwen.reader(), "supervised")
    (example,) = data.examples
    assert isinstance(example, SupervisedExample)
    (sequence,) = example.sequences
    token = qwen.oracle.model.config.image_token_id
    tokens = [image.grid[0] * image.grid[1] for image in sequence.images if image.grid]
    assert len(tokens) == 2
    assert int((sequence.ids == token).sum()) == sum(tokens)
    learnt = sequence.labels[sequence.labels != IGNORED].tolist()
    ends = qwen.oracle.tokenizer("a cat<|im_end|>two<|im_end|>", add_special_tokens=False)
    assert learnt == ends["input_ids"]


def image_row(data: bytes, **message: Any) -> dict[str, Any]:
    user = {"role": "user", "content": [image_part(data)]}
    return {"messages": [{**user, **message}, {"role": "assistant", "content": "x"}]}


PNG = encoded(PHOTO)
URL = "messages[0].content[0].image_url.url"
BAD: dict[str, tuple[Any, str, str]] = {
    "gif": (image_row(encoded(PHOTO, "GIF")), URL, "JPEG, PNG or WEBP, and this one is GIF"),
    "grey": (image_row(encoded(PHOTO.convert("L"))), URL, "RGB or RGBA, and this one's mode is L"),
    "damaged": (image_row(PNG[:200]), URL, "damaged"),
    "too large": (image_row(b"\0" * (10 * 1024**2 + 3)), URL, "more than 10,485,760"),
    "the system's": (image_row(PNG, role="system"), "messages[0].content[0].type", "'system'"),
    "several": (
        {"messages": [{"role": "user", "content": [image_part(PNG)] * 11},
                      {"role": "assistant", "content": "x"}]},
        "messages",
        "has 11 images. It may have 10",
    ),
    "the assistant's": (
        {"messages": [{"role": "user", "content": "Draw."},
                      {"role": "assistant", "content": [image_part(PNG)]}]},
        "messages[1].content[0].type",
        "'assistant'",
    ),
    "an uploaded one": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"file_id": "file-a"}}]},
                      {"role": "assistant", "content": "x"}]},
        "messages[0].content[0].image_url.file_id",
        "data URLs or addresses",
    ),
    "audio": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
                      {"role": "assistant", "content": "x"}]},
        "messages[0].content[0].type",
        "Training on audio is not supported",
    ),
    "too long": (
        {"messages": [{"role": "user", "content": [image_part(PNG), {"type": "text", "text": "word " * 250}]},
                      {"role": "assistant", "content": "x"}]},
        "messages",
        "of them in its images), more than the model's window of 1024",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(qwen: Tiny, tmp_path: Path, name: str) -> None:
    bad, path, words = BAD[name]
    found = qwen.problems(tmp_path, bad)
    assert [at for at, _ in found] == [path]
    assert words in found[0][1]


def test_images_of_addresses_are_fetched_if_that_is_allowed(qwen: Tiny, tmp_path: Path) -> None:
    asked: list[str] = []

    async def fetch(url: str, limit: int) -> bytes:
        asked.append(url)
        return PNG if url.endswith("a.png") else b"?"

    def remote(name: str) -> dict[str, Any]:
        address = {"type": "image_url", "image_url": {"url": f"https://example.com/{name}"}}
        user = {"role": "user", "content": [address]}
        return {"messages": [user, {"role": "assistant", "content": "x"}]}

    rows = [remote("a.png"), remote("b.png"), image_row(PNG)]
    data = qwen.read(tmp_path, rows, qwen.reader(fetch=fetch), "supervised")
    assert [(error.line, error.path) for error in data.errors] == [(2, URL)]
    here, there = (example.sequences[0].ids.tolist() for example in data.examples)  # type: ignore[union-attr]
    assert here == there
    store = ImageStore(tmp_path / "images")
    for _ in range(2):
        qwen.read(tmp_path, rows[:1], qwen.reader(store, fetch=fetch), "supervised")
    assert asked.count("https://example.com/a.png") == 2  # when it was checked, and once for good
    refused = qwen.read(tmp_path, rows[:1], qwen.reader(), "supervised")
    assert "--allow-remote-images" in refused.errors[0].message


def test_so_many_examples_may_have_images(
    qwen: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evermini.tuning.data.MAX_EXAMPLES", 2)
    rows = [image_row(PNG), row("None."), image_row(PNG), row("None."), image_row(PNG), row("No.")]
    (error,) = qwen.read(tmp_path, rows, qwen.reader(), "supervised").errors
    assert error.line == 5
    assert "More than 2 examples" in error.message
