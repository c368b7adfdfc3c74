"""The rest of the command line: version, help, config, doctor, and how errors end a command."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from evermini import __version__
from evermini.cli import machine
from evermini.cli.doctor import examine
from evermini.config import Settings, flag_name, setting_fields
from evermini.models.catalogue import CATALOGUE
from evermini.service import machine as service_machine
from tests.upstream_fakes import fake_engine

COMMANDS = ("serve", "chat", "ask", "pull", "models", "rm", "doctor", "config")


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("EVERMINI_HOME", str(folder))
    return folder


def test_version(evermini):
    assert evermini("--version").out == f"evermini {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(evermini, command):
    assert command in evermini("--help").out
    result = evermini(command, "-h")
    assert result.code == 0
    assert "Usage:" in result.out


def test_serve_has_a_flag_for_every_setting(evermini, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    shown = evermini("serve", "--help").out
    missing = [
        name for name in setting_fields() if f"{flag_name(name)} " not in shown.replace("/", " ")
    ]
    assert missing == []


def test_config_shows_values_and_origins_and_masks_secrets(evermini, home, monkeypatch, tmp_path):
    (tmp_path / "evermini.toml").write_text('port = 1\nmax_waiting = 5\napi_key = "hunter2"\n')
    monkeypatch.setenv("EVERMINI_PORT", "2")
    report = json.loads(evermini("config", "--port", "3", "--json").out)
    assert report["file"] == str(tmp_path / "evermini.toml")
    assert report["settings"]["port"] == {"value": 3, "source": "flag --port"}
    assert report["settings"]["home"] == {"value": str(home), "source": "environment EVERMINI_HOME"}
    assert report["settings"]["max_waiting"]["value"] == 5
    assert report["settings"]["threads"] == {"value": None, "source": "default"}
    assert report["settings"].keys() == setting_fields().keys()
    plain = evermini("config")
    for text in (json.dumps(report), plain.out):
        assert "hunter2" not in text
        assert "********" in text
    assert "environment EVERMINI_PORT" in plain.out


def test_wrong_settings_end_with_2_and_failures_with_1(evermini, home, monkeypatch):
    monkeypatch.setenv("EVERMINI_PROT", "1")
    result = evermini("config")
    assert (result.code, result.out) == (2, "")
    assert (
        result.err
        == "Error: Unknown environment variable EVERMINI_PROT. Did you mean EVERMINI_PORT?\n"
    )
    monkeypatch.delenv("EVERMINI_PROT")
    result = evermini("rm", "absent")
    assert result.code == 1
    assert result.err.startswith("Error: No tier 'absent'.")


@pytest.mark.parametrize("command", ["keys ls", "usage", "tune ls", "gc", "pull nano"])
def test_a_home_that_is_no_folder_is_an_error_and_no_traceback(
    evermini, tmp_path, monkeypatch, command
):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EVERMINI_HOME", str(tmp_path / "file"))
    result = evermini(*command.split())
    assert (result.code, result.out) == (1, "")
    assert str(tmp_path / "file") in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("command", ["keys ls", "tune ls", "tune models", "contexts ls"])
@pytest.mark.usefixtures("home")
def test_an_empty_list_says_so(evermini, command):
    result = evermini(*command.split())
    assert (result.code, result.out) == (0, "")
    assert result.err


@pytest.mark.usefixtures("home")
def test_no_name_is_cut_in_the_list_of_models(evermini, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = evermini("models").out
    for entry in CATALOGUE:
        assert all(alias in shown for alias in entry.aliases)


def test_doctor_names_a_home_that_cannot_be_used(evermini, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EVERMINI_HOME", str(tmp_path / "file" / "home"))
    result = evermini("doctor")
    assert result.code == 1
    shown = " ".join(result.out.split())
    assert f"The database's folder {tmp_path}/file/home cannot be made" in shown
    lock = tmp_path / "home" / "evermini.db.lock"
    lock.mkdir(parents=True)  # what cannot be opened for writing, by whomever
    monkeypatch.setenv("EVERMINI_HOME", str(lock.parent))
    result = evermini("doctor")
    assert result.code == 1
    assert f"The database cannot be opened: {lock}" in " ".join(result.out.split())


def test_evaluations_ask_for_their_packages_before_they_begin(evermini, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "matplotlib" else real(name)
    )
    result = evermini("eval", "needle", "-m", "nano")
    assert result.code == 2
    assert "(matplotlib). Run: pip install 'evermini[evals]'" in result.err


def test_debug_shows_the_traceback(home):
    command = [sys.executable, "-m", "evermini", "--debug", "rm", "absent"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "ModelNotFoundError" in run.stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("evermini do", ["doctor"]),
        ("evermini ask -m m", ["mini"]),
        ("evermini serve --precision int", ["int8", "int6", "int5", "int4"]),
    ],
)
def test_shells_complete_commands_tiers_and_choices(words, offered):
    completion = {
        "_EVERMINI_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    run = subprocess.run(
        [sys.executable, "-c", "from evermini.cli import main; main()"],
        env={**os.environ, **completion},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == offered


def test_broken_pipes_are_quiet():
    command = f"{sys.executable} -m evermini config --json | head -c 1"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("{", "")


def test_doctor_tells_machine_and_tiers(evermini, home):
    result = evermini("doctor", "--json")
    report = json.loads(result.out)
    assert result.code == 0, report["problems"]
    assert report["cpu"]["usable_cores"] >= 1
    assert 0 < report["memory"]["available"] <= report["memory"]["total"]
    assert report["home"]["path"] == str(home)
    assert [tier["tier"] for tier in report["tiers"]] == ["nano", "mini", "full"]
    assert all(not tier["cached"] and tier["download"] > 0 for tier in report["tiers"])
    plain = evermini("doctor").out
    assert "SmolLM2-135M-Instruct: fetches 98.4 MB" in plain
    assert report["cpu"]["name"] in plain


def test_doctor_names_what_is_missing_and_the_remedy(evermini, home, monkeypatch):
    short = CATALOGUE[0].memory - 100_000_000
    monkeypatch.setattr(service_machine, "memory", lambda: service_machine.Memory(10**9, short))
    result = evermini("doctor")
    assert result.code == 1
    assert "lacks 100.0 MB of memory" in result.out
    assert "memory for the smallest tier" in result.out
    report = examine(Settings(home=home, device="cuda:0"))
    required = [problem["what"] for problem in report["problems"] if problem["required"]]
    if not report["gpus"]:
        assert "a GPU for device = cuda:0" in required


def test_doctor_asks_upstream_engines(evermini, home, monkeypatch):
    monkeypatch.setenv("EVERMINI_KERNELS", "0")  # nothing is compiled for this
    with fake_engine() as (engine, url):
        engine.models = [{"id": "org/q", "max_model_len": 32768}]
        result = evermini("doctor", "--model", f"nano,q={url}", "--json")
        assert result.code == 0
        told = json.loads(result.out)["upstreams"]
        assert told == [
            {"name": "q", "url": url, "model": "org/q", "window": 32768, "images": None}
        ]
        assert "runs org/q: window 32,768" in evermini("doctor", "--model", f"q={url}").out
    result = evermini("doctor", "--model", f"q={url}")
    assert result.code == 1
    assert "cannot be reached" in result.out
    assert "it has no name" in evermini("doctor", "--model", url).out


def test_doctor_names_missing_packages(evermini, home, monkeypatch):
    monkeypatch.setattr(
        machine.importlib.metadata, "requires", lambda _: ["no-such-package>=1", "rich>=99"]
    )
    result = evermini("doctor")
    assert result.code == 1
    assert "no-such-package>=1 (not installed)" in result.out
    assert "-m pip install 'rich>=99'" in result.out


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_cores_are_those_the_process_may_use():
    code = (
        "import os; os.sched_setaffinity(0, {0})\n"
        "from evermini.cli import machine; print(machine.cpu().usable_cores)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "1\n"
