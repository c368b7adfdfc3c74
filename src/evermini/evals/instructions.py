"""IFEval's 25 kinds of verifiable instructions.

Definitions are those of the benchmark, quirks included, so that figures compare: keywords are regular expressions found
inside words, and a text whose language cannot be told counts as right. Two things differ: sentences and words in
capitals are found by the rules below instead of NLTK's models, which concerns 52 and 25 of 834 instructions, and
language detection is made repeatable.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from evermini.errors import ConfigError, InvalidRequestError

Check = Callable[..., bool]
_CHECKS: dict[str, Check] = {}


def is_followed(name: str, arguments: Mapping[str, Any], text: str) -> bool:
    """Return whether ``text`` follows an instruction.

    Args:
        name: Such as ``"punctuation:no_comma"``.
        arguments: The instruction's, by name.
        text: The answer.

    Raises:
        InvalidRequestError: There is no such instruction.
    """
    check = _CHECKS.get(name)
    if check is None:
        raise InvalidRequestError(f"{name!r} is none of IFEval's instructions.")
    return check(text, **arguments)


def _instruction(name: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        _CHECKS[name] = check
        return check

    return register


def _compare(number: int, relation: str, bound: int) -> bool:
    return number < bound if relation == "less than" else number >= bound


@_instruction("keywords:existence")
def _existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


@_instruction("keywords:frequency")
def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(len(re.findall(keyword.strip(), text, re.IGNORECASE)), relation, frequency)


@_instruction("keywords:forbidden_words")
def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


@_instruction("keywords:letter_frequency")
def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.lower()), let_relation, let_frequency)


@_instruction("language:response_language")
def _language(text: str, language: str) -> bool:
    return _detected(text) in (language, None)


@_instruction("length_constraints:number_sentences")
def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(count_sentences(text), relation, num_sentences)


@_instruction("length_constraints:number_words")
def _words(text: str, num_words: int, relation: str) -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


@_instruction("length_constraints:number_paragraphs")
def _paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs are divided by ``***``; only the first and the last may be empty, and do not count then."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


@_instruction("length_constraints:nth_paragraph_first_word")
def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    number = sum(bool(part.strip()) for part in parts)
    if number != num_paragraphs or nth_paragraph > number:
        return False
    words = parts[nth_paragraph - 1].split()
    if not words:
        return False
    word = re.match(r"""[^.,?!'"]*""", words[0].lstrip("'").lstrip('"'))
    return word is not None and word[0].lower() == first_word.lower()


@_instruction("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


@_instruction("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = patterns.get(postscript_marker, postscript_marker.lower().strip())
    return re.search(pattern, text.lower()) is not None


@_instruction("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*].*|-.*)$", text, re.MULTILINE)) == num_bullets


@_instruction("detectable_format:constrained_response")
def _one_of(text: str) -> bool:
    return any(f"My answer is {answer}." in text for answer in ("yes", "no", "maybe"))


@_instruction("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    found = [*re.findall(r"\*[^\n*]*\*", text), *re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(bool(item.strip("*").strip()) for item in found) >= num_highlights


@_instruction("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) >= num_sections


@_instruction("detectable_format:json_format")
def _json(text: str) -> bool:
    body = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```")
    try:
        json.loads(body.strip())
    except ValueError:
        return False
    return True


@_instruction("detectable_format:title")
def _title(text: str) -> bool:
    return any(title.strip("<>").strip() for title in re.findall(r"<<[^\n]+>>", text))


@_instruction("combination:two_responses")
def _two_responses(text: str) -> bool:
    """Two different answers, divided by six asterisks; nothing else between dividers."""
    parts = [part.strip() for part in text.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


@_instruction("combination:repeat_prompt")
def _repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_instruction("startend:end_checker")
def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_instruction("startend:quotation")
def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@_instruction("change_case:capital_word_frequency")
def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"\w+(?:[-.&/]\w+)*", text)  # hyphenated words count as one
    return _compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


@_instruction("change_case:english_capital")
def _capital(text: str) -> bool:
    return text.isupper() and _detected(text) in ("en", None)


@_instruction("change_case:english_lowercase")
def _lowercase(text: str) -> bool:
    return text.islower() and _detected(text) in ("en", None)


@_instruction("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text


_ABBREVIATIONS = re.compile(
    r"(?:^|[\s(\"'])(?:mr|mrs|ms|dr|prof|st|sr|jr|vs|etc|e\.g|i\.e|inc|ltd|co|corp|no|fig|approx|dept|est|[a-z])$",
    re.IGNORECASE,
)


def count_sentences(text: str) -> int:
    """Return the number of sentences of an English text.

    One ends at ``.``, ``?`` or ``!`` (and closing quotes or brackets), followed by white space or the end. A full stop
    after an abbreviation or an initial, or before a lower-case letter, ends none.
    """
    count, start = 0, 0
    for match in re.finditer(r"([.?!]+)[\"')\]*_\u201d\u2019]*(?=\s|$)", text):
        before, after = text[start : match.start()], text[match.end() :].lstrip()
        if match[1].strip(".") == "" and (_ABBREVIATIONS.search(before) or after[:1].islower()):
            continue
        count += bool(before.strip())
        start = match.end()
    return count + bool(text[start:].strip())


def _detected(text: str) -> str | None:
    """Return the language's code; ``None`` if it cannot be told.

    Raises:
        ConfigError: langdetect is not installed.
    """
    try:
        import langdetect
    except ImportError as error:
        raise ConfigError(
            "Telling languages apart needs the package langdetect. Run: pip install 'evermini[evals]'"
        ) from error
    langdetect.DetectorFactory.seed = 0
    try:
        code: str = langdetect.detect(text)
    except langdetect.LangDetectException:
        return None
    return code
