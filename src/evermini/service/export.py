"""A fine-tuned model as files that other programs read: peft's folder, or merged into its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal
from uuid import uuid4

from evermini.errors import InvalidRequestError
from evermini.models.checkpoint import Checkpoint
from evermini.models.lora import CONFIG_FILE, WEIGHTS_FILE, read_peft
from evermini.models.merge import MergedCheckpoint, write_gguf, write_safetensors
from evermini.text.tokenizer import Tokenizer

Format = Literal["peft", "safetensors", "gguf"]


def export(adapter: Path, base: Checkpoint, form: Format, out: Path, name: str) -> Path:
    """Write a fine-tuned model; what is written appears when it is whole.

    Args:
        adapter: Folder of the adapter, as peft wrote it.
        base: The model that it was trained on.
        form: ``peft``: the adapter alone; ``safetensors``: a Hugging Face folder of the merged model; ``gguf``: one
            file of the merged model, in ``out``.
        out: A folder that is not there yet, or empty.
        name: What the model is called.

    Returns:
        The folder or, for ``gguf``, the file.

    Raises:
        InvalidRequestError: ``out`` holds something.
        AdapterError: The adapter does not fit the base, or no GGUF file can be made from it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidRequestError(f"{out} is there already. Give a new folder.", param="out")
    work = out.with_name(f"{out.name}.{uuid4().hex[:8]}")
    work.mkdir(parents=True)
    try:
        found = _write(adapter, base, form, work, name)
        if out.exists():
            out.rmdir()
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out / found.relative_to(work)


def _write(adapter: Path, base: Checkpoint, form: Format, work: Path, name: str) -> Path:
    if form == "peft":
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(adapter / file, work / file)
        return work
    lora = read_peft(adapter)
    if form == "gguf":
        path = work / f"{name.replace(':', '-')}.gguf"
        write_gguf(base, lora, path, name)
        return path
    write_safetensors(MergedCheckpoint(base, lora), work)
    _write_tokenizer(base, work)
    return work


def _write_tokenizer(base: Checkpoint, folder: Path) -> None:
    """Write the tokenizer: the base's own files, or for GGUF what they amount to."""
    source = base.tokenizer
    if source.tokenizer_json is not None:
        for path in base.path.iterdir():
            if path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.startswith(
                ("config.", "model.", "pytorch_model.")
            ):
                shutil.copyfile(path, folder / path.name)
        return
    tokenizer = Tokenizer(source)
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": base.config.max_position,
        "add_bos_token": tokenizer.add_bos,
        **tokenizer.named_tokens,
    }
    _dump(folder / "tokenizer_config.json", settings)
    _dump(folder / "generation_config.json", {"eos_token_id": sorted(tokenizer.eos_ids)})
    if source.chat_template:
        (folder / "chat_template.jinja").write_text(source.chat_template, encoding="utf-8")


def _dump(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
