import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from animediffusion.cli.app import run
from animediffusion.platform.cluster import node_report
from animediffusion.platform.cluster.node_report import Listener, NodeReport
from animediffusion.platform.config import Settings


def report(node: str, **values) -> NodeReport:
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    defaults = {
        "node": node,
        "versions": versions,
        "device": "cpu",
        "store": "",
        "mlflow": None,
        "mlflow_uri": "http://m:5000",
    }
    return NodeReport(**{**defaults, **values})


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A dashboard that answers everybody the same."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.ray
@pytest.mark.parametrize("answers", [True, False])
def test_a_node_asks_the_mlflow_server_of_its_own_variables(
    ray_cluster: None, moto_server: str, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    url = moto_server if answers else "http://127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    found = node_report.report("a", lambda: "cpu", None)
    assert found.mlflow_uri == url
    assert node_report.check_mlflow([found], False)[1] is answers


@pytest.mark.ray
def test_every_node_of_a_cluster_answers(ray_cluster: None, moto_server: str, tmp_path: Path) -> None:
    found = node_report.checks(Settings(workspace=tmp_path), lambda: "cpu; attention sdpa", "s3://bucket/probe")
    by_name = {name: (ok, detail) for name, ok, detail in found}
    assert by_name["nodes"][0]
    assert by_name["nodes"][1].startswith("1 answer; all with python 3.")
    assert by_name["devices"][1].startswith("cpu; attention sdpa")
    assert by_name["node store"] == (True, "s3://bucket/probe can be written and read by 1 nodes")
    assert by_name["node mlflow"][0]
    assert by_name["ray auth"] == (True, "no dashboard, so no jobs API")


def test_a_store_that_a_node_cannot_write_is_named_by_doctor(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    assert run(["doctor", "--workspace", str(tmp_path), "--storage", "/proc/nowhere"]) == 1
    assert re.search(r"^NO  node store +/proc/nowhere: ", capsys.readouterr().out, flags=re.MULTILINE)


def test_what_was_written_to_a_store_is_not_left_there(tmp_path: Path) -> None:
    assert node_report.write_and_read(str(tmp_path)) is None
    assert list(tmp_path.iterdir()) == []


def test_a_node_with_another_version_is_named() -> None:
    odd = report("10.0.0.3", versions={"python": "3.11.7", "torch": "2.12.0"})
    name, ok, detail = node_report.check_versions([report("10.0.0.1"), report("10.0.0.2"), odd], [])
    assert (name, ok) == ("nodes", False)
    assert detail == "3 answer; torch differs: 2.13.0 (10.0.0.1 10.0.0.2), 2.12.0 (10.0.0.3)"


def test_a_node_that_does_not_answer_is_named() -> None:
    _, ok, detail = node_report.check_versions([report("10.0.0.1")], ["10.0.0.2 does not answer"])
    assert not ok
    assert "10.0.0.2 does not answer" in detail


def test_a_node_without_the_store_is_named() -> None:
    _, ok, detail = node_report.check_store(
        [report("a"), report("b", store="access denied; check the keys")], "s3://runs"
    )
    assert not ok
    assert detail == "s3://runs: access denied; check the keys (b)"


def test_a_local_folder_is_not_a_store_for_several_nodes() -> None:
    assert node_report.check_store([report("a"), report("b")], "/runs")[1] is False
    assert node_report.check_store([report("a")], "/runs")[1] is True


def test_nodes_with_different_mlflow_servers_or_without_a_shared_one_are_reported() -> None:
    assert (
        "differs: http://m:5000 (a), none (b)"
        in node_report.check_mlflow([report("a"), report("b", mlflow_uri="")], False)[2]
    )
    alone = [report("a", mlflow_uri=""), report("b", mlflow_uri="")]
    assert node_report.check_mlflow(alone, True)[1:] == (
        False, "embedded, which only one node can see; set MLFLOW_TRACKING_URI to a server"
    )  # fmt: skip


@pytest.mark.parametrize(("status", "well"), [(401, True), (403, True), (200, False)])
def test_a_dashboard_that_lets_everybody_in_is_found(status: int, well: bool) -> None:
    with answering(status) as address:
        ok, detail = node_report.requires_token(address)
    assert ok is well
    assert address in detail


def test_an_open_port_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200) as address:
        monkeypatch.setattr(node_report, "dashboard_address", lambda: address)
        auth, ports = node_report.check_ports([report("a", listeners=[Listener("gcs", "0.0.0.0", 6379)]), report("b")])
    assert auth[1] is False
    assert ports == ("ray ports", False, "1 ports can be reached from outside: gcs 0.0.0.0:6379 (a)")
