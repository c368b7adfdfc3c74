"""Settings: precedence, validation, and that one declaration feeds flags, environment, file and docs."""

from pathlib import Path

import pytest

from evermini.config import (
    Settings,
    env_name,
    flag_name,
    load_settings,
    parse_bytes,
    setting_fields,
    shown_default,
)
from evermini.errors import ConfigError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def load(home: Path, flags=None, env=None, **kwargs):
    env = {"EVERMINI_HOME": str(home), **(env or {})}
    return load_settings(flags, env=env, cwd=kwargs.pop("cwd", home), **kwargs)


def test_flag_beats_environment_beats_file_beats_default(home: Path):
    (home / "config.toml").write_text("port = 1001\nmax_waiting = 7\nhost = 'localhost'\n")
    loaded = load(home, {"port": "1003"}, {"EVERMINI_PORT": "1002", "EVERMINI_MAX_WAITING": "8"})

    assert loaded.settings.port == 1003
    assert loaded.settings.max_waiting == 8
    assert loaded.settings.host == "localhost"
    assert loaded.settings.max_num_seqs == Settings().max_num_seqs
    assert loaded.sources["port"] == "flag --port"
    assert loaded.sources["max_waiting"] == "environment EVERMINI_MAX_WAITING"
    assert loaded.sources["host"] == f"file {home / 'config.toml'}"
    assert loaded.sources["max_num_seqs"] == "default"


def test_defaults_alone_equal_the_declaration(home: Path):
    assert load(home).settings == Settings(home=home)


def test_file_in_the_working_directory_is_read_instead_of_the_home_one(home: Path, tmp_path: Path):
    (home / "config.toml").write_text("port = 1\n")
    (tmp_path / "evermini.toml").write_text("max_waiting = 3\n")
    loaded = load(home, cwd=tmp_path)
    assert (loaded.settings.port, loaded.settings.max_waiting) == (8000, 3)
    assert loaded.file == tmp_path / "evermini.toml"


def test_config_flag_and_variable_name_the_file(home: Path, tmp_path: Path):
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text("port = 1\n")
    two.write_text("port = 2\n")
    env = {"EVERMINI_CONFIG": str(two)}
    assert load(home, env=env).settings.port == 2
    assert load(home, env=env, config=one).settings.port == 1
    with pytest.raises(ConfigError, match=r"absent\.toml does not exist"):
        load(home, config=tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("flags", "env", "toml", "message"),
    [
        ({}, {"EVERMINI_PROT": "1"}, "", "EVERMINI_PROT. Did you mean EVERMINI_PORT"),
        ({}, {}, "max_wating = 1", "max_wating. Did you mean max_waiting"),
        ({"portt": "1"}, {}, "", "Did you mean port"),
        ({}, {}, "port = ", "cannot be read"),
        ({}, {"EVERMINI_PORT": "abc"}, "", "'abc' (from environment EVERMINI_PORT)"),
        ({"port": "65536"}, {}, "", "from flag --port"),
        ({"device": "gpu"}, {}, "", "expected auto, cpu, cuda or cuda:N"),
        ({"precision": "int3"}, {}, "", "'auto', 'int8'"),
        ({"kv_memory": "4 apples"}, {}, "", '512MiB or 4GiB, or "auto"'),
        ({"threads": "0"}, {}, "", "greater than or equal to 1"),
        ({"drain_timeout": "nan"}, {}, "", "drain_timeout = 'nan'"),
        ({}, {}, "cors_origins = [1]", "list of strings"),
    ],
)
def test_mistakes_are_errors_that_say_where_and_what(home: Path, flags, env, toml, message):
    (home / "config.toml").write_text(toml)
    with pytest.raises(ConfigError) as caught:
        load(home, flags, env)
    assert message in caught.value.message


def test_secrets_are_shown_neither_in_repr_nor_in_errors(home: Path):
    assert "hunter2" not in repr(Settings(api_key="hunter2"))
    (home / "config.toml").write_text("api_key = ['hunter2']\n")
    with pytest.raises(ConfigError) as caught:
        load(home)
    assert "hunter2" not in caught.value.message


def test_empty_variables_count_as_unset_and_test_variables_are_ignored(home: Path):
    loaded = load(home, env={"EVERMINI_API_KEY": "", "EVERMINI_TEST_DATA": "/x"})
    assert loaded.settings.api_key is None


def test_lists_come_from_commas_or_arrays(home: Path):
    settings = load(home, {"model": "nano, mini", "cors_origins": "http://a,http://b"}).settings
    assert settings.models == ("nano", "mini")
    assert settings.cors_origins == ("http://a", "http://b")
    (home / "config.toml").write_text('cors_origins = ["http://c"]\napi_key = "k1,k2"\n')
    settings = load(home).settings
    assert settings.cors_origins == ("http://c",)
    assert settings.api_keys == ("k1", "k2")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("1k", 1024),
        ("512MiB", 512 * 2**20),
        ("4G", 4 * 2**30),
        ("1.5 GB", 1_500_000_000),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1e9", "4 X", True, None])
def test_what_is_not_a_size(text):
    with pytest.raises(ValueError, match="expected a size"):
        parse_bytes(text)


@pytest.mark.parametrize("name", setting_fields())
def test_every_setting_has_help_names_and_a_machine_independent_default(name: str):
    item = setting_fields()[name]
    assert item.metadata["help"].endswith(".")
    assert item.metadata["group"]
    assert flag_name(name).startswith("--")
    assert env_name(name) == f"EVERMINI_{name.upper()}"
    assert str(Path.home()) not in shown_default(item)


def test_every_setting_is_used_somewhere():
    package = Path(__file__).parents[2] / "src" / "evermini"
    paths = [path for path in package.rglob("*.py") if path.parent.name != "config"]
    code = "\n".join(path.read_text() for path in paths)
    derived = {"model": "models", "api_key": "api_keys"}
    unused = [n for n in setting_fields() if f"settings.{derived.get(n, n)}" not in code]
    assert unused == []
