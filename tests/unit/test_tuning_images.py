"""Training on rows with images: the loss is that of `transformers` and peft on the whole vision-language model."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from evermini.models.checkpoint import Checkpoint, open_checkpoint
from evermini.text.chat import ChatTemplate
from evermini.text.tokenizer import Tokenizer
from evermini.tuning.data import Data, read_data
from evermini.tuning.images import ImageReader, ImageStore
from tests.images import encoded, image_part
from tests.tuning_files import jsonl
from tests.unit.test_tuning_train import Reports, spec
from tests.vlm_checkpoints import FAMILIES, TinyVlm, picture, save_vlm

trl = pytest.importorskip("trl")

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


def language_part(model: Any) -> Any:
    inner = model.model
    return inner.language_model if hasattr(inner, "language_model") else inner.text_model


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


@pytest.mark.filterwarnings("default")  # of trl and transformers, about each other
def test_the_loss_and_its_gradients_are_those_of_the_whole_model(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of rows with no, one and two images; an adapter that is not zero."""
    from evermini.tuning import train as training

    captured: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def look(trainer: Any, **_: Any) -> None:
        captured["trainer"] = trainer
        raise Stop

    monkeypatch.setattr("evermini.tuning.trainers.Supervised.train", look)
    data = tiny.read(tmp_path, ROWS, tiny.reader(ImageStore(tmp_path / "images")), "supervised")
    assert not data.errors
    with pytest.raises(Stop):
        training.train(
            spec(),
            tmp_path,
            tiny.checkpoint,
            data,
            None,
            Reports(),
            lambda: False,  # type: ignore[arg-type]
        )
    trainer = captured["trainer"]
    model = trainer.model
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    batch = trainer.data_collator([trainer.train_dataset[at] for at in range(len(ROWS))])
    loss = trainer.compute_loss(model, dict(batch))
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
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient is not None
        error = (gradient - theirs[name]).norm() / theirs[name].norm()
        assert error < 1e-3, name
