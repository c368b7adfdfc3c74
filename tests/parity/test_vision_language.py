"""Vision-language checkpoints against `transformers`: the same logits, however an image's rows come to be computed."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from evermini.engine.engine import Engine
from evermini.engine.request import Embedded, SamplingParams
from evermini.errors import (
    DamagedCheckpointError,
    EngineStoppedError,
    UnsupportedArchitectureError,
    UnsupportedQuantizationError,
)
from evermini.models.batch import BLOCK_SIZE, AdapterRows, EmbeddedRows, ForwardBatch, Model
from evermini.models.checkpoint import Checkpoint, open_checkpoint
from evermini.models.decoder import Decoder
from evermini.models.load import load_model
from evermini.models.merge import MergedCheckpoint
from evermini.service.sight import Sight, place
from evermini.text.chat import IMAGE_MARK, ChatTemplate
from evermini.text.tokenizer import Tokenizer
from evermini.vision.tower import load_tower
from tests.adapters import random_lora
from tests.batches import make_batch
from tests.fakes import Outcome
from tests.images import encoded
from tests.vlm_checkpoints import FAMILIES, TinyVlm, picture, save_vlm

Prompt = tuple[list[int], Embedded | None]
WIDE, TALL = picture(1), picture(2, (56, 140))
TOLERANCE = 1e-3
CONVERSATIONS: dict[str, list[str | Image.Image]] = {
    "one": ["What is this?", WIDE],
    "two": [WIDE, " and then, at some length, so that it crosses a block or two: ", TALL, "Which?"],
    "none": ["Hello! Nothing to see here."],
}


@dataclass(frozen=True)
class Loaded:
    """A tiny checkpoint as the oracle and as ours."""

    oracle: TinyVlm
    checkpoint: Checkpoint
    sight: Sight
    template: ChatTemplate

    def prompt(self, parts: list[str | Image.Image]) -> Prompt:
        async def build() -> Prompt:
            text = "".join(part if isinstance(part, str) else IMAGE_MARK for part in parts)
            ids = self.template.encode_chat([{"role": "user", "content": text}])
            images = [encoded(part) for part in parts if isinstance(part, Image.Image)]
            seen = [await self.sight.look(image, "auto") for image in images]
            ids, places = place(ids, self.sight.image_token_id, seen)
            return ids, await self.sight.embed(ids, places) if places else None

        return asyncio.run(build())

    def inputs(self, parts: list[str | Image.Image]) -> dict[str, Any]:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in parts
        ]
        images = [part for part in parts if isinstance(part, Image.Image)]
        return self.oracle.inputs([{"role": "user", "content": content}], images)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = save_vlm(request.param, folder)
    checkpoint = open_checkpoint(folder)
    tower = load_tower(checkpoint, precision="fp32")
    assert tower is not None
    tokenizer = Tokenizer(checkpoint.tokenizer)
    return Loaded(oracle, checkpoint, Sight(tower, tokenizer, window=1024), ChatTemplate(tokenizer))


def whole_batch(ids: list[int], embedded: Embedded | None) -> ForwardBatch:
    """One sequence at once, with all its logits, built without the engine."""
    blocks = list(range(-(-len(ids) // BLOCK_SIZE)))
    batch = make_batch([(ids, 0, blocks)], all_rows=True)
    if embedded is None:
        return batch
    rows = torch.cat([torch.arange(run.start, run.end) for run in embedded.runs])
    values = torch.cat([run.values for run in embedded.runs])
    axes = None if embedded.axes is None else torch.from_numpy(embedded.axes)
    return replace(batch, embedded=EmbeddedRows(rows, values), axes=axes)


def logits_of(model: Model, ids: list[int], embedded: Embedded | None) -> torch.Tensor:
    return model.forward(whole_batch(ids, embedded), model.new_kv_cache(8))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_logits_match(loaded: Loaded, name: str) -> None:
    inputs = loaded.inputs(CONVERSATIONS[name])
    ids, embedded = loaded.prompt(CONVERSATIONS[name])
    assert ids == inputs["input_ids"][0].tolist()
    logits = logits_of(Decoder(loaded.checkpoint), ids, embedded)
    difference = (logits - loaded.oracle.logits(inputs)).abs().max().item()
    print(f"{loaded.oracle.family} {name}: {difference:.2e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_native_kernels_follow_the_oracle(loaded: Loaded, name: str) -> None:
    ids, embedded = loaded.prompt(CONVERSATIONS[name])
    expected = logits_of(Decoder(loaded.checkpoint), ids, embedded)
    native = load_model(loaded.checkpoint, device="cpu", precision="int8")
    logits = logits_of(native, ids, embedded)
    error = ((logits - expected).norm() / expected.norm()).item()
    print(f"{loaded.oracle.family} {name}: {error:.3f}")
    assert error < 0.1  # int8 noise of random weights; a wrong path is off by 1


def test_another_image_of_the_same_size_gives_other_logits(loaded: Loaded) -> None:
    model = Decoder(loaded.checkpoint)
    ids, embedded = loaded.prompt([WIDE, "What?"])
    other_ids, other = loaded.prompt([picture(9), "What?"])
    assert ids == other_ids
    difference = logits_of(model, ids, embedded)[-1] - logits_of(model, ids, other)[-1]
    assert difference.abs().max().item() > 100 * TOLERANCE


def run(engine: Engine, prompts: dict[str, Prompt], count: int) -> dict[str, Outcome]:
    outcomes = {name: Outcome() for name in prompts}
    for name, (ids, embedded) in prompts.items():
        engine.add(name, ids, SamplingParams(max_tokens=count, temperature=0.0), embedded=embedded)
    while engine.has_work:
        for name, event in engine.step():
            outcomes[name].add(event)
    engine.check_integrity()
    return outcomes


def engine_of(loaded: Loaded, precision: str, **options: Any) -> Engine:
    model = load_model(loaded.checkpoint, device="cpu", precision=precision)  # type: ignore[arg-type]
    limits = {"num_blocks": 32, "max_batch_tokens": 256, "max_num_seqs": 4, "max_waiting": 8}
    return Engine(model, **{**limits, **options})


OPTIONS = {"whole": {}, "chunks": {"max_batch_tokens": 7}, "preempted": {"num_blocks": 13}}


@pytest.mark.parametrize("option", OPTIONS)
def test_greedy_answers_match(loaded: Loaded, option: str) -> None:
    """All conversations in one batch; chunks that cut images; memory for too few of them."""
    prompts = {name: loaded.prompt(parts) for name, parts in CONVERSATIONS.items()}
    engine = engine_of(loaded, "fp32", **OPTIONS[option])
    outcomes = run(engine, prompts, 60)
    assert (engine.stats().preemptions > 0) == (option == "preempted")
    for name, parts in CONVERSATIONS.items():
        assert outcomes[name].tokens == loaded.oracle.greedy(loaded.inputs(parts), 60), name


def test_native_answers_do_not_depend_on_batches_or_the_cache(loaded: Loaded) -> None:
    prompts = {name: loaded.prompt(parts) for name, parts in CONVERSATIONS.items()}
    alone = {
        name: run(engine_of(loaded, "int8", max_batch_tokens=11), {name: prompt}, 24)[name].tokens
        for name, prompt in prompts.items()
    }
    engine = engine_of(loaded, "int8")
    for _ in range(2):  # the second time from the cache
        outcomes = run(engine, prompts, 24)
        assert {name: outcome.tokens for name, outcome in outcomes.items()} == alone


def test_the_cache_tells_images_apart(loaded: Loaded) -> None:
    parts: list[str | Image.Image] = [WIDE, " and a text that fills a block of thirty-two tokens."]
    other: list[str | Image.Image] = [picture(9), *parts[1:]]
    engine = engine_of(loaded, "fp32")
    fresh = run(engine, {"a": loaded.prompt(parts)}, 8)["a"]
    again = run(engine, {"b": loaded.prompt(parts)}, 8)["b"]
    foreign = run(engine, {"c": loaded.prompt(other)}, 8)["c"]
    assert fresh.prompt
    assert again.prompt
    assert foreign.prompt
    assert fresh.prompt.cached_tokens == 0
    assert again.prompt.cached_tokens >= len(loaded.prompt(parts)[0]) - BLOCK_SIZE
    # What stands before the image is shared (Qwen's system message), and nothing from the image on.
    embedded = loaded.prompt(other)[1]
    assert embedded is not None
    assert foreign.prompt.cached_tokens <= embedded.runs[0].start
    assert again.tokens == fresh.tokens
    alone = run(engine_of(loaded, "fp32"), {"d": loaded.prompt(other)}, 8)["d"]
    assert foreign.tokens == alone.tokens


def test_images_are_computed_once_and_again_when_forgotten(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = load_tower(loaded.checkpoint)
    assert tower is not None
    computed = []
    encode = tower.encode
    monkeypatch.setattr(tower, "encode", lambda *args: computed.append(1) or encode(*args))
    tokenizer = Tokenizer(loaded.checkpoint.tokenizer)
    data = encoded(WIDE)

    async def values(sight: Sight) -> torch.Tensor:
        seen = await sight.look(data, "auto")
        ids, places = place([sight.image_token_id], sight.image_token_id, [seen])
        return torch.cat([run.values for run in (await sight.embed(ids, places)).runs])

    async def twice(sight: Sight) -> list[torch.Tensor]:
        return await asyncio.gather(values(sight), values(sight))

    keeping = Sight(tower, tokenizer, window=1024)
    first, second = asyncio.run(twice(keeping))
    assert len(computed) == 1
    assert torch.equal(first, second)
    forgetful = Sight(tower, tokenizer, window=1024, max_bytes=1)
    for again in asyncio.run(twice(forgetful)):
        assert torch.equal(first, again)
    assert len(computed) == 3
    for sight in (keeping, forgetful):
        sight.close()
    with pytest.raises(EngineStoppedError):
        asyncio.run(values(keeping))


def test_an_image_that_nobody_waits_for_ends_after_the_layer_in_work(loaded: Loaded) -> None:
    tower = load_tower(loaded.checkpoint, precision="fp32")
    assert tower is not None
    answers = iter([False, True])
    with pytest.raises(EngineStoppedError):
        tower.encode(tower.prepare(WIDE), lambda: next(answers))
    assert next(answers, None) is None  # asked before each of its two layers
    assert tower.encode(tower.prepare(WIDE)).isfinite().all()


def test_adapters_answer_to_images(loaded: Loaded, tmp_path: Path) -> None:
    """Against the oracle with the adapter added to its weights."""
    lora = random_lora(tmp_path, loaded.checkpoint.config)
    ids, embedded = loaded.prompt(CONVERSATIONS["two"])
    model = Decoder(loaded.checkpoint)
    plain = whole_batch(ids, embedded)
    batch = replace(plain, adapters=(AdapterRows(model.load_adapter(lora), 0, len(ids)),))
    logits = model.forward(batch, model.new_kv_cache(8))
    oracle = copy.deepcopy(loaded.oracle)
    inner = oracle.model.model
    layers = (inner.language_model if hasattr(inner, "language_model") else inner.text_model).layers
    for (index, target), factors in lora.factors.items():
        module = layers[index].get_submodule(target)
        module.weight.data += (factors.b @ factors.a) * factors.scale
    expected = oracle.logits(loaded.inputs(CONVERSATIONS["two"]))
    assert (logits - expected).abs().max().item() <= TOLERANCE
    without = model.forward(plain, model.new_kv_cache(8))
    assert (logits - without).abs().max().item() > 100 * TOLERANCE


def test_the_language_model_can_be_trained_and_not_merged(loaded: Loaded, tmp_path: Path) -> None:
    """Adapters are trained on text; a merged model would have lost its eyes without a word."""
    pytest.importorskip("accelerate")
    from evermini.tuning.base import load_base

    ids, _ = loaded.prompt(CONVERSATIONS["none"])
    with torch.no_grad():
        base = load_base(loaded.checkpoint, device=torch.device("cpu"), dtype=torch.float32)
        expected = base(torch.tensor([ids])).logits[0]
    logits = logits_of(Decoder(loaded.checkpoint), ids, None)
    assert (logits - expected).abs().max().item() <= TOLERANCE
    with pytest.raises(UnsupportedArchitectureError, match="Export the adapter as peft"):
        MergedCheckpoint(loaded.checkpoint, random_lora(tmp_path, loaded.checkpoint.config))


def test_what_newer_versions_of_transformers_name_otherwise_is_found(
    loaded: Loaded, tmp_path: Path
) -> None:
    """Qwen2.5-VL's parameters are published as `model.*` and `visual.*`, or as parts of one model."""
    if loaded.oracle.family != "qwen2_5_vl":
        pytest.skip("the others have one form")
    for file in loaded.oracle.path.iterdir():
        shutil.copy(file, tmp_path)
    state = {name: tensor.clone() for name, tensor in loaded.oracle.model.state_dict().items()}
    assert "model.language_model.norm.weight" in state
    del state["lm_head.weight"]  # tied
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")  # published ones spread it over the whole
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config |= {k: v for k, v in text.items() if k != "model_type"}
    config |= {"rope_scaling": scaling, "rope_theta": rope["rope_theta"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    renamed = open_checkpoint(tmp_path)
    ids, embedded = loaded.prompt(CONVERSATIONS["two"])
    assert torch.equal(
        logits_of(Decoder(renamed), ids, embedded),
        logits_of(Decoder(loaded.checkpoint), ids, embedded),
    )
    tower, other = (load_tower(c, precision="fp32") for c in (loaded.checkpoint, renamed))
    assert tower is not None
    assert other is not None
    assert torch.equal(tower.encode(tower.prepare(WIDE)), other.encode(other.prepare(WIDE)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, UnsupportedArchitectureError, "SmolVLMFor"),
        ({"image_token_id": None}, DamagedCheckpointError, "image_token_id"),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedQuantizationError, "awq"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_said_when_it_is_opened(
    loaded: Loaded, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    for file in loaded.oracle.path.iterdir():
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path)


def test_weights_that_are_not_the_towers_are_damage(loaded: Loaded, tmp_path: Path) -> None:
    for file in loaded.oracle.path.iterdir():
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedCheckpointError, match="vision tower"):
        load_tower(open_checkpoint(tmp_path))
