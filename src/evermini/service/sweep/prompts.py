"""What a sweep says to the model.

The examples are there for small models: without them, half a billion parameters answer "is this negative?" with yes to
whatever sounds positive (docs/log.md).
"""

from __future__ import annotations

from evermini.service.sweep.asking import Messages
from evermini.service.sweep.forms import NONE

_ONE_EXAMPLES = (
    (
        "How many of the reviews are negative?",
        "Is this review negative or positive? | negative | positive",
    ),
    ("How many log entries are errors?", "Is this log entry an error? | yes | no"),
    (
        "Count the messages that were sent by a woman.",
        "Was this message sent by a woman or a man? | woman | man",
    ),
    (
        "List every email that complains about delivery.",
        "Does this email complain about delivery? | yes | no",
    ),
    ("Which tickets are about billing?", "Is this ticket about billing? | yes | no"),
    ("How many paragraphs mention a king?", "Does this paragraph mention a king? | yes | no"),
    (
        "Which comments are in favour of the plan?",
        "Is this comment in favour of or against the plan? | favour | against",
    ),
    (
        "How many of the functions have no docstring?",
        "Does this function have no docstring? | yes | no",
    ),
)
_CHECK_EXAMPLES = (
    ("The soup was cold when it came.", "Is this message about food?", "Yes"),
    ("My train leaves at nine.", "Is this message about food?", "No"),
    ("It broke after two days.", "Is this review positive?", "No"),
    ("Best purchase of the year!", "Is this review positive?", "Yes"),
    ("12:01 connection refused by host", "Is this entry an error?", "Yes"),
    ("12:02 user logged in", "Is this entry an error?", "No"),
    ("She smiled all day.", "Is this person unhappy?", "No"),
    ("He cried himself to sleep.", "Is this person unhappy?", "Yes"),
)
_COLLECT_EXAMPLES = (
    (
        "Anna flew from Paris to Rome. The food there was good, better than in Paris.",
        "List every city that is mentioned.",
        "- Paris\n- Rome\n",
    ),
    (
        "The meeting was moved to Tuesday because of the rain.",
        "List every city that is mentioned.",
        "none",
    ),
    (
        "My name is Tom Baker, and I sold the shop to Ms Lee in 1998.",
        "How many people are named?",
        "- Tom Baker\n- Ms Lee\n",
    ),
    ("Most of us never think about why this is so.", "Name all companies.", "none"),
)
_ITEM_EXAMPLES = (
    ("List every city that is mentioned.", "Is this a city?"),
    ("How many people are named?", "Is this the name of a person?"),
    ("Name all the companies the author talks about.", "Is this a company?"),
    ("List all reasons against the plan.", "Is this a reason against the plan?"),
    ("How many different dates are there?", "Is this a date?"),
)
NOTHING = "nothing"
"""How a note says that there is nothing to note."""


def about_one(question: str) -> Messages:
    """Ask to turn a question about many things into one about a single thing (`QuestionWithAnswers`)."""
    shown = [turn for pair in _ONE_EXAMPLES for turn in _turns(*pair)]
    return [
        _system(
            "Turn a question about many items into a question about one item, with its two possible answers."
        ),
        *shown,
        _user(question),
    ]


def check(text: str, question: str, answers: tuple[str, str]) -> Messages:
    """Ask which of two answers a question about one text has (`Choice`)."""
    if answers == ("yes", "no"):
        shown = [
            turn
            for sample, asked, answer in _CHECK_EXAMPLES
            for turn in _turns(f"Text: {sample}\n{asked}", answer)
        ]
        system = "You read one text at a time and answer a question about it with yes or no."
        return [_system(system), *shown, _user(f"Text: {text}\n{question}")]
    return [_user(f"{text}\n\n{question} Answer with one word.")]


def collect(text: str, question: str) -> Messages:
    """Ask for everything in a part of a text that belongs into a list (`Items`)."""
    shown = [
        turn
        for sample, asked, answer in _COLLECT_EXAMPLES
        for turn in _turns(f"Text:\n{sample}\n\nTask: {asked}", answer)
    ]
    system = (
        "You collect what a task asks for from one part of a text at a time: a name or a few words in a line, as they "
        f"stand in the part. If it has none, you write {NONE}."
    )
    return [_system(system), *shown, _user(f"Text:\n{text}\n\nTask: {question}")]


def about_item(question: str) -> Messages:
    """Ask for a question that tells whether something belongs into a list (`Question`)."""
    shown = [turn for pair in _ITEM_EXAMPLES for turn in _turns(*pair)]
    return [
        _system("Turn a task about a list into a question about one entry."),
        *shown,
        _user(question),
    ]


def note(text: str, question: str) -> Messages:
    """Ask for what a part of a text adds to the answer."""
    return [
        _system(
            "You read a long text part by part and take notes that answer a question about it."
        ),
        _user(
            f"Question about the whole text: {question}\n\nThis is one part of the text:\n\n{text}\n\n"
            "Write down in two to four short sentences what this part says that helps to answer the question. If it "
            f'says nothing about it, write only "{NOTHING}".'
        ),
    ]


def digest(text: str) -> Messages:
    """Ask for what a part of a text says. No examples: small models tell them as if they stood in the text."""
    return [
        _system("You sum up texts in your own words, shortly and exactly."),
        _user(
            f"Text:\n\n{text}\n\nWhat is the main point of this text, and what does it give as reasons or examples? "
            "Answer in two short sentences."
        ),
    ]


def condense(notes: str, question: str) -> Messages:
    """Ask to shorten notes."""
    return [
        _system("You shorten notes and keep what matters."),
        _user(
            f"Question about a long text: {question}\n\nNotes on consecutive parts of the text:\n\n{notes}\n\n"
            "Write these notes down again in at most half of the words. Keep names, numbers and what answers the "
            "question."
        ),
    ]


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _turns(asked: str, answer: str) -> tuple[dict[str, str], dict[str, str]]:
    return _user(asked), {"role": "assistant", "content": answer}
