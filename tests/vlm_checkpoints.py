"""Tiny random vision-language checkpoints, written with `transformers` as published ones are, tokenizer and all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2VLImageProcessorPil

FAMILIES = ("qwen2_5_vl", "idefics3", "smolvlm")
_HIDDEN = 64
_TEXT: dict[str, Any] = {
    "hidden_size": _HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "pad_token_id": None,
}
_QWEN_SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]
_IDEFICS_SPECIAL = [
    *("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
]
# As the published checkpoints have them.
_QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyVlm:
    """A checkpoint and the same model in `transformers`, the oracle."""

    family: str
    path: Path
    model: Any
    tokenizer: Any
    processor: Any
    template: str

    def inputs(
        self, messages: list[dict[str, Any]], images: list[Image.Image], **options: Any
    ) -> dict[str, Any]:
        """Return what `transformers` computes for a conversation, as its processors put it together.

        Args:
            messages: The conversation.
            images: Its images.
            options: For the processor of a family that cuts images into tiles.
        """
        text = self.rendered(messages)
        if not images:
            ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            return {"input_ids": ids}
        if self.family == "qwen2_5_vl":
            found = self.processor(images=images, return_tensors="pt")
            counts = iter((found["image_grid_thw"].prod(-1) // 4).tolist())
            text = "".join(
                part if part != "<|image_pad|>" else part * next(counts)
                for part in _split(text, "<|image_pad|>")
            )
            ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            kinds = (ids == self.model.config.image_token_id).int()
            return {**found, "input_ids": ids, "mm_token_type_ids": kinds}
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        found = self.processor(
            images=[images], return_tensors="pt", return_row_col_info=True, **options
        )
        shapes = zip(found.pop("rows")[0], found.pop("cols")[0], strict=True)
        names = ("<fake_token_around_image>", "<image>", "<global-img>")
        shown = (get_image_prompt_string(*shape, 4, *names) for shape in shapes)
        text = "".join(
            next(shown) if part == "<image>" else part for part in _split(text, "<image>")
        )
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        return {**found, "input_ids": ids}

    def rendered(self, messages: list[dict[str, Any]]) -> str:
        """Return the conversation as the template writes it, with one token for each image."""
        text: str = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        return text

    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.model(**inputs).logits[0]
        return logits

    def greedy(self, inputs: dict[str, Any], num_tokens: int) -> list[int]:
        mask = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            ids = self.model.generate(
                **inputs, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens
            )
        new: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
        return new


def _split(text: str, token: str) -> list[str]:
    parts = text.split(token)
    return [piece for part in parts[:-1] for piece in (part, token)] + [parts[-1]]


def picture(seed: int, size: tuple[int, int] = (112, 84)) -> Image.Image:
    """An image of random blocks: the same seed, the same image."""
    blocks = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def save_vlm(family: str, folder: Path) -> TinyVlm:
    """Write a checkpoint into ``folder``."""
    torch.manual_seed(7)
    is_qwen = family == "qwen2_5_vl"
    special = _QWEN_SPECIAL if is_qwen else _IDEFICS_SPECIAL
    template = _QWEN_TEMPLATE if is_qwen else _IDEFICS_TEMPLATE
    end = "<|im_end|>" if is_qwen else "<end_of_utterance>"
    tokenizer = _tokenizer(special)
    vocab_size = tokenizer.get_vocab_size()
    ids = {name: tokenizer.token_to_id(name) for name in special}
    text = _TEXT | {"vocab_size": vocab_size, "eos_token_id": ids[end]}
    if is_qwen:
        sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        config = transformers.Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": sections},
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": _HIDDEN,
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=True,
        )
        model: Any = transformers.Qwen2_5_VLForConditionalGeneration(config)
        processor: Any = Qwen2VLImageProcessorPil(
            size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 40}
        )
    else:
        kind = "Idefics3" if family == "idefics3" else "SmolVLM"
        config = getattr(transformers, f"{kind}Config")(
            text_config=text | {"model_type": "llama"},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 56,
                "patch_size": 14,
            },
            image_token_id=ids["<image>"],
            scale_factor=2,
        )
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        processor = getattr(transformers, f"{kind}ImageProcessorPil")(
            size={"longest_edge": 112}, max_image_size={"longest_edge": 56}
        )
    model.eval()
    with torch.no_grad():  # as initialised, what it says hardly depends on what it sees
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(10.0 if "embed_tokens" in name or "lm_head" in name else 8.0)
    model.generation_config.eos_token_id = ids[end]
    model.generation_config.pad_token_id = ids[end]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": end, "chat_template": template})
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)
    return TinyVlm(family, folder, model, fast, processor, template)


def _tokenizer(special: list[str]) -> Tokenizer:
    """Return one of bytes, and nothing but bytes, beside the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return tokenizer
