"""Start and stop of the application on Ray Serve: the command `serve`.

with running(settings, ServeConfig(), port=8000) as url:
    ...
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from ray import serve

from animediffusion.models.bundle import verify
from animediffusion.platform.api_keys import Keys
from animediffusion.platform.cluster import cluster
from animediffusion.platform.cluster.ray_compat import last_line, serve_host
from animediffusion.platform.cluster.signals import StopSignals
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import BundleError, ClusterError, ConfigError
from animediffusion.platform.network import is_uri
from animediffusion.platform.registry.downloads import STARTER
from animediffusion.platform.storage.local_files import expanded
from animediffusion.serve.deployments import APP_NAME, ServeConfig, build_app, check_corrections, check_keys
from animediffusion.serve.protocol import ReplicaStatus
from animediffusion.serve.proxy import max_body_bytes
from animediffusion.serve.replica.model_source import ModelSource

READY_TIMEOUT_S = 120.0
NO_CHAMPION = "no version was promoted, so the starter model answers until one is"

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
    """Serve until SIGINT or SIGTERM; return 128 + the number of the signal.

    Args:
        settings: settings of the workspace and the registry.
        model: model to serve; None is the champion, which the server follows when the alias moves, or the starter
            model until a version is promoted.
        host: address to listen on: loopback, or any other address if an API key exists.
        port: HTTP port.
        announce: callback for status messages, one line each.
        options: further fields of ServeConfig.

    Raises:
        AnimeDiffusionError: the model does not exist or is damaged, the port is in use, or Ray cannot start.
    """
    config = app_config(settings, model, **options)
    with running(settings, config, host=host, port=port, report=announce) as url:
        # Ray installs its own handlers when it starts, and they end the process immediately; these replace Ray's.
        with StopSignals() as stop:
            where = config.request_log or "the logs of Ray"
            announce(f"serving at {url} (page /, API /docs); access log in {where}; Ctrl-C stops the server")
            number = stop.wait()
        announce("stopping")
    return 128 + number


@contextmanager
def running(
    settings: Settings,
    config: ServeConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    report: Callable[[str], object] = log.warning,
) -> Iterator[str]:
    """Start the application, wait until it is ready, and yield its URL; stop it at the end of the block.

    Args:
        settings: settings of the workspace and the registry.
        config: settings of the application.
        host: address to listen on.
        port: HTTP port.
        report: callback for messages: that the starter model answers, or which resources the cluster lacks while the
            start waits for them.
    """
    max_body_bytes()  # Raise here, where a person reads the error; the proxy would only log it and use the default.
    check_address(host, port, is_open=not Keys(config.settings().keys_uri).active())
    check_keys(for_host(config, host))
    corrections = check_corrections(config)
    if corrections is not None:
        report(f"answered requests are kept for 7 days, and corrections are taken: {corrections}")
    if check_model(settings, config.model) == STARTER and config.model is None:
        report(NO_CHAMPION)
    cluster.connect(settings)
    try:
        yield start(config, host=host, port=port, report=report)
    finally:
        if cluster.cluster_address() is not None:
            _ignoring_errors(lambda: serve.delete(APP_NAME))
        cluster.shutdown()


def start(
    config: ServeConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    report: Callable[[str], object] = log.warning,
) -> str:
    """Deploy on the connected Ray cluster, wait until a picture can be made, and return the URL.

    The arguments are those of `running`.

    Raises:
        ConfigError: Serve runs on this cluster already, at an address that is not loopback, but `host` is.
        ClusterError: the application does not become ready.
        BundleError: the model does not work.
    """
    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    url = f"http://{host}:{port}"
    with cluster.waits(report):
        _deploy(config, host, port)
        _wait_until_ready(url)
    return url


def _deploy(config: ServeConfig, host: str, port: int) -> None:
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    try:
        # The timeout is longer than the application's own limits, so that the proxy cuts off only a hanging ingress.
        patience = config.upload_timeout_s + config.timeout_s + 30
        http = {"host": host, "port": port, "request_timeout_s": patience}
        serve.start(http_options=http, logging_config=quiet)
        _check_proxy(host)
        serve.run(build_app(for_host(config, host)), name=APP_NAME, route_prefix="/", logging_config=quiet)
    except ConfigError:
        raise
    except Exception as error:
        raise ClusterError("serve", f"does not start ({last_line(error)})", "see `animediffusion doctor`") from error


def check_address(host: str, port: int, *, is_open: bool = True) -> None:
    """Raise ConfigError if the server cannot listen on the address, or may not.

    Args:
        host: address to listen on.
        port: HTTP port.
        is_open: whether the server has no active API key; such a server may listen on loopback only.
    """
    if not 1 <= port <= 65535:
        raise ConfigError("--port", str(port), "1 to 65535")
    if is_open and not _is_loopback(host):
        found = f"{host!r} is reachable from the network, and no API key exists"
        raise ConfigError("--host", found, "use 127.0.0.1, or make a key with `animediffusion keys create NAME`")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port}", "already in use", "choose another with --port")
    if error.errno == errno.EACCES:
        return ConfigError(f"port {port}", "this user may not listen on it", "choose port 1024 or higher with --port")
    return ConfigError(
        "--host", f"{host!r} ({error.strerror or error})", "an address of this machine, for example 0.0.0.0"
    )


def check_model(settings: Settings, model: str | None) -> str:
    """Return the version that will answer, before a replica is started.

    Raises:
        AnimeDiffusionError: the model does not exist or is damaged.
    """
    source = ModelSource(settings, model)
    version = source.resolve()
    verify(source.fetch(version), source.model)
    return version


def app_config(settings: Settings, model: str | None = None, **options: Any) -> ServeConfig:
    """Return the settings of the application that `serve` starts.

    Args:
        settings: settings of the workspace and the registry.
        model: the model, see serve_app().
        options: further fields of ServeConfig; None is a field's default.

    Raises:
        ConfigError: an option is wrong.
    """
    elsewhere = cluster.own_workspaces()
    given = {
        "model": _absolute(model),
        "workspace": None if elsewhere else settings.workspace,
        "model_name": settings.model_name,
        "keys": settings.keys_uri,
        "corrections": settings.corrections_uri,
        "request_log": None if elsewhere else _request_log(settings),
    }
    return ServeConfig.check({**given, **{key: value for key, value in options.items() if value is not None}})


def _request_log(settings: Settings) -> Path | None:
    """Return the access log in the workspace; None, which means Ray's logs, if the workspace is not writable."""
    file = settings.workspace / "logs" / "requests.jsonl"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError:
        return None
    return file


def for_host(config: ServeConfig, host: str) -> ServeConfig:
    """Return the config that allows requests without a key if the address is loopback and no key was ever made.

    The key file is read here and not in the ingress, whose node may lack the file, which would look like no keys at
    all.
    """
    is_open = config.allow_anonymous or (_is_loopback(host) and not Keys(config.settings().keys_uri).entries())
    return config.model_copy(update={"allow_anonymous": is_open})


def _check_proxy(host: str) -> None:
    """Reject a loopback host if Serve already runs at a public address: Serve would keep that address."""
    running_at = serve_host()
    if _is_loopback(host) and not _is_loopback(running_at):
        raise ConfigError("--host", f"Serve already runs on this cluster, at {running_at}", "use `serve deploy`")


def _absolute(model: str | None) -> str | None:
    """Return a bundle folder as an absolute path, because replicas have another working directory."""
    is_folder = model not in (None, STARTER) and not str(model).startswith("models:") and not is_uri(str(model))
    return str(expanded(str(model)).absolute()) if is_folder else model


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
                problem = next((replica.error for replica in replicas if replica.error), problem)
            except httpx.HTTPError as error:
                problem = str(error)
            else:
                if replicas and all(replica.state == "failed" for replica in replicas):
                    raise BundleError("model", problem, "serve another version, or train it again")
            time.sleep(0.2)
    raise ClusterError("serve", f"not ready after {READY_TIMEOUT_S:.0f} s ({problem})", "see `animediffusion doctor`")


def _replicas() -> list[ReplicaStatus]:
    """Return the states of the engines, requested without HTTP and therefore without a key; empty if none responds."""
    try:
        found = serve.get_deployment_handle("engine", APP_NAME).broadcast("describe").results(timeout_s=5)
    except Exception:  # The engines are still starting, or one has died.
        return []
    return [state.replica for state in found]


def _ignoring_errors(action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as error:  # If Ray has stopped already, there is nothing left to stop.
        log.debug("an error while stopping: %s", error)
