"""Promises of the service's settings and command line: what is unsafe or wrong is refused before anything starts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from rxt_platform import cli_serve
from rxt_platform.cli import guarded, rxt
from rxt_platform.config.serving import ServiceConfig, ServingConfig, is_loopback
from rxt_platform.errors import ConfigError
from rxt_platform.serving import auth

TOKEN = "a-token-of-a-test-0123456789"


# ---- where it listens


def test_only_this_machine_reaches_it_unless_it_is_said() -> None:
    assert is_loopback(ServiceConfig().host)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert ServiceConfig(host=host).host == host
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ValidationError, match="expose: true"):
            ServiceConfig(host=host)
        assert ServiceConfig(host=host, expose=True).host == host


def test_fewer_replicas_at_most_than_at_least_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_replicas"):
        ServiceConfig(replicas=3, max_replicas=2)
    assert ServiceConfig(replicas=2, max_replicas=3).most_replicas == 3


def test_a_meaning_that_needs_a_model_gets_one() -> None:
    assert ServingConfig(meaning="encoder", reward_model="x").reward_model == "x"
    for wrong in ({"meaning": "tokens"}, {"meaning": "encoder"}, {"reward_model": "x"}):
        with pytest.raises(ValidationError, match="reward_model"):
            ServingConfig.model_validate(wrong)


# ---- the token


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RXT_SERVE_TOKEN", f" {TOKEN}\n")
    assert auth.read_token() == TOKEN
    (tmp_path / "token").write_text("another-token-of-a-test\n")
    assert auth.read_token(tmp_path / "token") == "another-token-of-a-test"


@pytest.mark.parametrize("text", ["", "   \n", "short", "has spaces in it, which is wrong", "ünïcödé-token-of-a-test"])
def test_no_token_or_a_weak_one_is_refused_with_the_fix(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RXT_SERVE_TOKEN", text)
    (tmp_path / "token").write_text(text)
    for path, place in ((None, "RXT_SERVE_TOKEN"), (tmp_path / "token", str(tmp_path / "token"))):
        with pytest.raises(ConfigError, match="token_urlsafe") as error:
            auth.read_token(path)
        assert place in str(error.value)
        assert not text.strip() or text not in str(error.value)
    with pytest.raises(ConfigError, match="No such file"):
        auth.read_token(tmp_path / "missing")


def test_only_the_very_token_as_a_bearer_is_allowed() -> None:
    right = auth.digest(TOKEN)
    assert auth.is_allowed(f"Bearer {TOKEN}", right)
    assert auth.is_allowed(f"bearer {TOKEN}", right)
    for header in (None, "", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {right}", "Bearer"):
        assert not auth.is_allowed(header, right)
    assert not auth.is_allowed(f"Bearer {TOKEN}", None)


# ---- the command line


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ServingConfig, str]]:
    """What would have been served."""
    found: list[tuple[ServingConfig, str]] = []
    monkeypatch.setattr(cli_serve, "run_service", lambda config, token: found.append((config, token)))
    monkeypatch.setenv("RXT_SERVE_TOKEN", TOKEN)
    return found


def test_options_win_over_the_file(started: list[tuple[ServingConfig, str]], tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("service: {port: 9000, max_rows: 77}\nrewards: {scale: 2.0}\nversions: a\n")
    options = ["--versions", "b", "--config", str(file), "--port", "9001", "--cpus", "0.5", "--replicas", "2"]
    done = CliRunner().invoke(rxt, ["serve", "critic", "model", *options])
    assert done.exit_code == 0, done.output
    (config, token), *_ = started
    assert token == TOKEN
    assert (config.model, config.versions, config.rewards.scale) == ("model", "b", 2.0)
    service = config.service
    assert (service.port, service.max_rows, service.cpus_per_replica, service.replicas) == (9001, 77, 0.5, 2)
    assert service.host == "127.0.0.1"
    CliRunner().invoke(rxt, ["serve", "critic", "model", "--reward-model", "x"])
    assert (started[1][0].meaning, started[1][0].reward_model) == ("tokens", "x")


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        ([], None, "nothing to serve"),
        (["model", "--host", "0.0.0.0"], None, "expose: true"),
        (
            ["model", "--config", "FILE"],
            "service: {max_row: 3}",
            "unknown key 'service.max_row'; nearest",
        ),
        (["model", "--config", "FILE"], "rewards: {weights: {bleu: 1.0}}", "sum to 1"),
        (["model", "--config", "FILE"], "[1, 2]", "not a mapping"),
        (["model", "--config", "FILE"], "a: [", "cannot be read"),
        (["model", "--config", "nowhere.yaml"], None, "nowhere.yaml: cannot be read"),
        (["model", "--token-file", "nowhere"], None, "token file nowhere: No such file"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_2(
    arguments: list[str],
    content: str | None,
    message: str,
    started: list[tuple[ServingConfig, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / "serve.yaml").write_text(content)
    given = [str(tmp_path / "serve.yaml") if one == "FILE" else one for one in arguments]
    assert guarded(lambda: rxt(["serve", "critic", *given], standalone_mode=False)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert started == []


def test_without_a_token_it_does_not_start(
    started: list[tuple[ServingConfig, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RXT_SERVE_TOKEN")
    assert guarded(lambda: rxt(["serve", "critic", "model"], standalone_mode=False)) == 2
    assert "RXT_SERVE_TOKEN: no token: set RXT_SERVE_TOKEN or give --token-file" in capsys.readouterr().err
    assert started == []


def test_the_settings_need_neither_torch_nor_ray() -> None:
    code = "import rxt_platform.config.serving, sys; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_job_script_takes_the_command_s_options(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[2] / "pipelines/serve_critic.py"
    done: Any = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--versions" in done.stdout
    assert len(script.read_text().splitlines()) < 100
