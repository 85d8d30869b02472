"""MLflow's page, as the end of a run says to open it."""

import urllib.request
from pathlib import Path

import pytest

from tests.dist.services import free_port, service
from tests.support import BIN

pytestmark = pytest.mark.dist


def test_mlflow_page_opens_on_a_run(finished_pipeline: Path) -> None:
    port = free_port()
    command = [
        *(str(BIN / "mlflow"), "ui", "--backend-store-uri", f"sqlite:///{finished_pipeline / 'mlflow.db'}"),
        *("--port", str(port)),
    ]
    with service(command, f"http://127.0.0.1:{port}/health"):
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).read().decode()
    assert "<title>MLflow</title>" in page
