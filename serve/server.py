"""Starts the application on Ray Serve and keeps it up: the command `serve`.

with running(settings, ServeConfig(), port=8000) as url:
    ...
"""

from __future__ import annotations

import ipaddress
import logging
import queue
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from ray import serve
from ray.serve.context import _get_global_client

from animediffusion.models.bundle import verify
from animediffusion.platform.api_keys import Keys
from animediffusion.platform.cluster import connect as cluster
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError, ClusterError, ConfigError
from animediffusion.platform.network import is_uri
from animediffusion.serve.deployments import APP_NAME, ServeConfig, build_app, check_keys
from animediffusion.serve.proxy import max_body_bytes
from animediffusion.serve.replica.model_source import ModelSource

READY_TIMEOUT_S = 120.0

log = logging.getLogger(__name__)


def serve_app(
    settings: Settings,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    announce: Callable[[str], None] = print,
    **options: Any,
) -> int:
    """Serve until SIGINT or SIGTERM; returns 128 + the signal's number.

    Args:
        settings: workspace and registry.
        model: None is the champion, followed when it changes.
        host: loopback, or any other where an API key exists.
        port: of HTTP.
        announce: is told, line by line, where the page is and that the server stops.
        options: further fields of ServeConfig.

    Raises:
        AnimeDiffusionError: no such model, a damaged one, the port in use, or Ray cannot start.
    """
    config = _config(settings, model, options)
    with running(settings, config, host=host, port=port, tell=announce) as url:
        # Only now: Ray puts handlers of its own into place when it starts, and they end the process at once.
        with _signals() as received:
            where = config.request_log or "the logs of Ray"
            announce(f"serving at {url} (page /, API /docs), requests in {where}; Ctrl-C stops it")
            number = received.get()
        announce("stopping")
    return 128 + number


@contextmanager
def _signals() -> Iterator[queue.SimpleQueue[int]]:
    """SIGINT and SIGTERM, as numbers in a queue."""
    received: queue.SimpleQueue[int] = queue.SimpleQueue()

    def put(number: int, _: FrameType | None) -> None:
        received.put(number)

    before = {number: signal.signal(number, put) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def running(
    settings: Settings,
    config: ServeConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tell: Callable[[str], object] = log.warning,
) -> Iterator[str]:
    """The URL of an application that is up and has its model; it and Serve end with the block.

    Args:
        settings: workspace and registry.
        config: of the application.
        host: where to listen.
        port: of HTTP.
        tell: gets a line on the resources that the cluster has no room for, while the start waits for them.
    """
    max_body_bytes()  # raises here, where a person reads it; the proxy would go on with the default
    check_address(host, port, is_open=not Keys(config.settings().keys_uri).active())
    check_keys(_for_host(config, host))
    check_model(settings, config.model)
    cluster.connect(settings)
    try:
        yield start(config, host=host, port=port, tell=tell)
    finally:
        if cluster.cluster_address() is not None:
            _quietly(lambda: serve.delete(APP_NAME))
        cluster.shutdown()


def start(
    config: ServeConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tell: Callable[[str], object] = log.warning,
) -> str:
    """Deploy on the Ray that is connected, wait until a picture can be made, and return the URL.

    Arguments are those of `running`.

    Raises:
        ClusterError: the application does not come up.
        BundleError: the model does not work.
    """
    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    url = f"http://{host}:{port}"
    with cluster.waits(tell):
        _deploy(config, host, port)
        _wait_until_ready(url)
    return url


def _deploy(config: ServeConfig, host: str, port: int) -> None:
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    try:
        # Longer than the application's own limits: only an ingress that hangs is cut off by the proxy.
        patience = config.upload_timeout_s + config.timeout_s + 30
        http = {"host": host, "port": port, "request_timeout_s": patience}
        serve.start(http_options=http, logging_config=quiet)
        _check_proxy(host)
        serve.run(build_app(_for_host(config, host)), name=APP_NAME, route_prefix="/", logging_config=quiet)
    except ConfigError:
        raise
    except Exception as error:
        raise ClusterError("serve", f"does not start ({_last_line(error)})", "see `animediffusion doctor`") from error


def check_address(host: str, port: int, *, is_open: bool = True) -> None:
    """Raise ConfigError if the server may not, or cannot, listen there; an open one, without keys, may on loopback."""
    if not 1 <= port <= 65535:
        raise ConfigError("--port", str(port), "1 to 65535")
    if is_open and not _is_loopback(host):
        found = f"{host!r} would let the whole network in"
        raise ConfigError("--host", found, "127.0.0.1, or make a key first with `animediffusion keys create NAME`")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"port {port}", "already in use", "choose another with --port") from error


def check_model(settings: Settings, model: str | None) -> None:
    """Raise an AnimeDiffusionError if there is no such model here or it is damaged: better now than in a replica."""
    source = ModelSource(settings, model)
    folder = source.fetch(source.wanted())
    try:
        verify(folder)
    except ValueError as error:
        raise BundleError(source.model, str(error), "give a folder as training wrote it") from error


def _config(settings: Settings, model: str | None, options: dict[str, Any]) -> ServeConfig:
    elsewhere = cluster.own_workspaces()
    given = {
        "model": _absolute(model),
        "workspace": None if elsewhere else settings.workspace,
        "model_name": settings.model_name,
        "keys": settings.keys_uri,
        "request_log": None if elsewhere else _request_log(settings),
    }
    return ServeConfig.check({**given, **{key: value for key, value in options.items() if value is not None}})


def _request_log(settings: Settings) -> Path | None:
    """The request log in the workspace; None, which means Ray's logs, where the workspace cannot be written."""
    file = settings.workspace / "logs" / "requests.jsonl"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError:
        return None
    return file


def _for_host(config: ServeConfig, host: str) -> ServeConfig:
    """Who reaches a loopback address is on this machine already: no key is needed while none was ever made.

    Looked up here: an ingress on a node that does not have the file would take it for no key at all.
    """
    is_open = config.allow_anonymous or (_is_loopback(host) and not Keys(config.settings().keys_uri).entries())
    return config.model_copy(update={"allow_anonymous": is_open})


def _check_proxy(host: str) -> None:
    """A Serve that was running already keeps its own address: what is open to all must not go behind that one."""
    running_at = _get_global_client().http_config.host
    if _is_loopback(host) and not _is_loopback(running_at):
        raise ConfigError("--host", f"Serve runs on this cluster already, at {running_at}", "use `serve deploy` there")


def _absolute(model: str | None) -> str | None:
    """A folder by its full path: replicas have another working directory."""
    is_folder = model is not None and not model.startswith("models:") and not is_uri(model)
    return str(Path(str(model)).expanduser().absolute()) if is_folder else model


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _wait_until_ready(url: str) -> None:
    end, problem = time.monotonic() + READY_TIMEOUT_S, ""
    with httpx.Client(base_url=url, timeout=10, trust_env=False) as client:
        while time.monotonic() < end:
            try:
                if client.get("/readyz").status_code == 200:
                    return
                replicas = _replicas()
                problem = next((one["error"] for one in replicas if one["error"]), problem)
            except httpx.HTTPError as error:
                problem = str(error)
            else:
                if replicas and all(one["state"] == "failed" for one in replicas):
                    raise BundleError("model", problem, "serve another version, or train it again")
            time.sleep(0.2)
    raise ClusterError("serve", f"not ready after {READY_TIMEOUT_S:.0f} s ({problem})", "see `animediffusion doctor`")


def _replicas() -> list[dict[str, Any]]:
    """What the engines say of themselves, asked without HTTP and so without a key; none while none answers."""
    try:
        found = serve.get_deployment_handle("engine", APP_NAME).broadcast("describe").results(timeout_s=5)
    except Exception:  # still starting, or one died just now
        return []
    return [one["replica"] for one in found]


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _quietly(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # Ray may be gone already; nothing is left to stop then
        log.debug("while stopping: %s", error)
