"""The files in `deploy/` agree with the package: paths, extras, settings, flags, probes, and time enough to drain."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from evermini.api.middleware import PROBES
from evermini.cli.server import LAST_WORDS_SECONDS
from evermini.config import Settings, flag_name, load_settings, setting_fields

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SECRETS = {"EVERMINI_API_KEY": "sk-test", "POSTGRES_PASSWORD": "secret"}
NOT_SETTINGS = {"PATH", "PYTHONUNBUFFERED", "PIP_NO_CACHE_DIR", "PIP_DISABLE_PIP_VERSION_CHECK"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each on one line."""
    lines = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [
        (word.upper(), rest)
        for word, _, rest in (line.partition(" ") for line in lines if re.match(r"[A-Za-z]", line))
    ]


def all_of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def environment(values: dict[str, str]) -> Settings:
    """Load the settings as a process with these variables would; an unknown one is an error."""
    return load_settings(env=values, cwd=Path("/nonexistent")).settings


class TestDockerfile:
    def test_what_it_copies_exists_and_is_let_through(self) -> None:
        ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
        assert ignored[0] == "*"
        copied = [
            path
            for line in all_of("COPY")
            if not line.startswith("--from")
            for path in line.split()[:-1]
        ]
        assert copied
        for path in copied:
            assert (ROOT / path).exists()
            assert f"!{path}" in ignored

    def test_the_package_finds_what_its_build_needs(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        copied = " ".join(all_of("COPY")).split()
        for path in (project["readme"], *project["license-files"], "pyproject.toml"):
            assert path in copied
        [extras] = re.findall(r"/build\[([\w,]+)\]", " ".join(all_of("RUN")))
        assert set(extras.split(",")) <= set(project["optional-dependencies"])

    def test_its_python_is_supported(self) -> None:
        [version] = re.findall(r"PYTHON_IMAGE=python:3\.(\d+)-slim", " ".join(all_of("ARG")))
        assert int(version) >= 11

    def test_its_variables_are_settings(self) -> None:
        values = dict(item.split("=", 1) for line in all_of("ENV") for item in shlex.split(line))
        ours = {name: value for name, value in values.items() if name not in NOT_SETTINGS}
        settings = environment(ours)
        assert settings.home == Path(all_of("VOLUME")[0])
        assert str(settings.port) == all_of("EXPOSE")[0]
        assert (settings.host, settings.log_format) == ("0.0.0.0", "json")

    def test_it_runs_as_nobody_in_particular(self) -> None:
        uid = all_of("USER")[-1].split(":")[0]
        assert int(uid) > 0
        assert f"--uid {uid}" in " ".join(all_of("RUN"))
        assert json.loads(all_of("ENTRYPOINT")[0]) + json.loads(all_of("CMD")[0]) == [
            "evermini",
            "serve",
        ]

    def test_its_health_check_works(self, base_url_of_probe: str) -> None:
        [check] = all_of("HEALTHCHECK")
        command = json.loads(check[check.index("CMD ") + 4 :])
        assert command[0] == "python"
        [path] = re.findall(r"(/\w+)'", command[-1])
        assert path in PROBES
        for port, code in ((base_url_of_probe, 0), ("9", 1)):
            run = subprocess.run(
                [sys.executable, *command[1:]],
                env={"EVERMINI_PORT": port},
                capture_output=True,
                check=False,
            )
            assert run.returncode == code


@pytest.fixture
def base_url_of_probe() -> Any:
    """The port of something that answers probes."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in PROBES else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield str(server.server_address[1])
        server.shutdown()
        thread.join()


class TestCompose:
    @pytest.fixture
    def compose(self) -> dict[str, Any]:
        text = (DEPLOY / "compose.yaml").read_text()

        def given(match: re.Match[str]) -> str:
            return SECRETS.get(match[1]) or (match[2] or "").removeprefix(":-")

        loaded: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+)(:[-?][^}]*)?\}", given, text))
        return loaded

    def test_it_follows_the_specification(self) -> None:
        from compose_spec import compose_spec

        parsed = compose_spec.PyCompose.from_yaml((DEPLOY / "compose.yaml").read_text())
        parsed.validate()
        assert parsed.service_names() == ["server", "database"]

    def test_what_must_be_chosen_is_in_the_example(self) -> None:
        example = (DEPLOY / "example.env").read_text()
        asked = set(re.findall(r"\$\{(\w+)", (DEPLOY / "compose.yaml").read_text()))
        assert set(re.findall(r"^(\w+)=", example, re.MULTILINE)) == asked

    def test_its_variables_are_settings_that_reach_the_database(
        self, compose: dict[str, Any]
    ) -> None:
        from evermini.storage.database import database_url

        server, database = compose["services"]["server"], compose["services"]["database"]
        settings = environment(server["environment"])
        url = database_url(settings)
        assert url.host == "database"
        assert (url.username, url.password, url.database) == tuple(
            database["environment"][f"POSTGRES_{name}"] for name in ("USER", "PASSWORD", "DB")
        )
        grace = int(server["stop_grace_period"].removesuffix("s"))
        assert grace > settings.drain_timeout + LAST_WORDS_SECONDS

    def test_paths_and_volumes(self, compose: dict[str, Any]) -> None:
        server = compose["services"]["server"]
        context = DEPLOY / server["build"]["context"]
        assert (context / server["build"]["dockerfile"]).is_file()
        [home] = server["volumes"]
        assert home.split(":")[1] == all_of("VOLUME")[0]
        for service in compose["services"].values():
            for volume in service["volumes"]:
                assert volume.split(":")[0] in compose["volumes"]
        assert server["ports"] == [f"127.0.0.1:8000:{all_of('EXPOSE')[0]}"]
        assert server["depends_on"]["database"]["condition"] == "service_healthy"
        assert compose["services"]["database"]["healthcheck"]


class TestSystemd:
    @pytest.fixture
    def unit(self) -> configparser.ConfigParser:
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read(DEPLOY / "evermini.service")
        return parser

    def test_its_command_line_is_understood(self, unit: configparser.ConfigParser) -> None:
        service = unit["Service"]
        program, command, *flags = shlex.split(service["ExecStart"])
        assert (Path(program).name, command) == ("evermini", "serve")
        names = {flag_name(name): name for name in setting_fields()}
        given = {names[flags[at]]: flags[at + 1] for at in range(0, len(flags), 2)}
        settings = load_settings(given, env={}, cwd=Path("/nonexistent")).settings
        assert int(service["TimeoutStopSec"]) > settings.drain_timeout + LAST_WORDS_SECONDS
        values = dict(item.split("=", 1) for item in service["Environment"].split())
        home = environment({k: v for k, v in values.items() if k not in NOT_SETTINGS}).home
        assert home == Path("/var/lib") / service["StateDirectory"]

    def test_systemd_understands_it(self, tmp_path: Path) -> None:
        if shutil.which("systemd-analyze") is None:
            pytest.skip("systemd is not installed")
        text = (DEPLOY / "evermini.service").read_text()
        unit = tmp_path / "evermini.service"
        unit.write_text(text.replace("/opt/evermini/bin/evermini", "/bin/true"))
        run = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(unit)],
            capture_output=True,
            text=True,
            check=False,
        )
        about_it = [line for line in run.stderr.splitlines() if "evermini.service" in line]
        assert about_it == []
