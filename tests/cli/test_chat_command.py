"""``evermini chat``: the conversation, its commands, a real terminal, and a server to talk to."""

import json
import os
import signal
import sys

import pexpect
import pytest

from tests.cli.conftest import subprocess_environment

CAPITAL = "What is the capital of France?"


@pytest.fixture
def chat(evermini, loaded_nano):
    def run(*lines: str, arguments=()):
        return evermini("chat", "--temperature", "0", *arguments, stdin="\n".join(lines))

    return run


def saved(tmp_path):
    return [
        json.loads(line)["messages"] for line in (tmp_path / "talk.jsonl").read_text().splitlines()
    ]


def test_a_conversation_remembers_and_is_saved_as_training_data(chat, tmp_path):
    result = chat(CAPITAL, "", "And of Italy?", "/save talk.jsonl")
    assert result.code == 0, result.err
    assert "Paris" in result.out
    [messages] = saved(tmp_path)
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == CAPITAL
    assert "Paris" in messages[1]["content"]


def test_reset_forgets_and_system_stays(chat, tmp_path):
    chat("/system Be brief.", "Hi.", "/reset", "/save talk.jsonl", "/system", "/save talk.jsonl")
    assert saved(tmp_path) == [[{"role": "system", "content": "Be brief."}], []]


def test_exit_ends_and_unknown_commands_are_told(chat):
    result = chat("/help", "/nope", "/save", "/exit", "Never asked.")
    assert result.code == 0
    assert "/reset" in result.out
    assert "No command /nope" in result.err
    assert "Say where: /save FILE" in result.err


def test_a_failed_message_leaves_the_conversation_as_it_was(chat, tmp_path):
    result = chat("word " * 1_100_000, "/save talk.jsonl", arguments=["--max-tokens", "5"])
    assert result.code == 0
    assert "maximum context length" in result.err
    assert saved(tmp_path) == [[]]


def test_a_path_is_a_message_not_a_command(chat, tmp_path):
    chat("/etc/hosts is a", "/save talk.jsonl", arguments=["--max-tokens", "1"])
    assert saved(tmp_path)[0][0]["content"] == "/etc/hosts is a"


def test_talks_to_a_running_server(evermini, base_url):
    result = evermini("chat", "--url", base_url, "--temperature", "0", stdin=CAPITAL)
    assert result.code == 0, result.err
    assert "Paris" in result.out


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("", ["-m", "gpt-9"], "answers 404: The model `gpt-9` does not exist"),
        ("/wrong", [], "answers 404: Invalid URL"),
    ],
)
def test_a_servers_refusal_is_told(evermini, base_url, path, arguments, message):
    result = evermini("chat", "--url", base_url + path, *arguments, stdin="Hi.")
    assert message in result.err


def test_no_server_is_told_with_the_remedy(evermini):
    result = evermini("chat", "--url", "http://127.0.0.1:9/v1", stdin="Hi.")
    assert result.code == 1
    assert "Start a server with `evermini serve`" in result.err


def test_terminal_ctrl_c_stops_the_answer_and_history_is_kept(base_url, tmp_path):
    environment = {**subprocess_environment(), "EVERMINI_HOME": str(tmp_path), "TERM": "dumb"}
    arguments = ["-m", "evermini", "chat", "--url", base_url, "--temperature", "0"]
    terminal = pexpect.spawn(
        sys.executable,
        arguments,
        env=environment,
        encoding="utf-8",
        timeout=30,
        # A background job ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    terminal.expect("/help lists the commands")
    terminal.expect("> ")
    terminal.send(
        "Write a long story about a lighthouse keeper.\r"
    )  # it goes on for thousands of tokens
    terminal.expect("lighthouse keeper[^.]")  # not the echo
    terminal.sendintr()
    terminal.expect(r"\[stopped\]")
    terminal.expect("> ")
    terminal.send(f"{CAPITAL}\r")
    terminal.expect("Paris")
    terminal.expect("> ")
    terminal.send("/exit\r")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert CAPITAL in (tmp_path / "chat_history").read_text()
    assert os.listdir(tmp_path) == ["chat_history"]
