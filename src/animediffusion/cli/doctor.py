"""The command `doctor`: check what is installed and reachable, and which attention will run."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from animediffusion.cli import common

if TYPE_CHECKING:
    from animediffusion.platform.doctor import Check


def doctor(
    storage: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder or s3:// URI in which to test writing and reading, from all nodes."),
    ] = None,
) -> int:
    """Check what is installed and reachable.

    The checks also show which attention will run. On a cluster (RAY_ADDRESS), they also run on every node.
    """
    from animediffusion.platform.doctor import checks, report

    console = common.console()
    settings = common.settings()
    common.use_attention(settings)
    found = checks(settings, [check_torch, check_starter], _device, storage)
    lines = [f"{'ok' if check.ok else 'NO':3} {check.name:10} {check.detail}" for check in found]
    made = report(found)
    console.result(asdict(made), "\n".join(lines))
    return 0 if made.ok else 1


def check_torch() -> Check:
    """Check whether torch uses this machine's GPU, if there is one."""
    from animediffusion.platform.doctor import Check

    return Check("torch", _unused_gpu() is None, _device())


def check_starter() -> Check:
    """Check whether the files of the starter model are whole."""
    from animediffusion.models.bundle import verify
    from animediffusion.platform.doctor import Check
    from animediffusion.platform.registry.downloads import STARTER, STARTER_FOLDER

    sha256 = verify(STARTER_FOLDER, "the starter model")
    return Check(STARTER, True, f"sha256 {sha256[:12]}, answers while no version was promoted")


def _device() -> str:
    """Describe this process's device and the attention that will run on it; `doctor` calls this on every node."""
    import torch

    from animediffusion.models.network.attention import explain_attention

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = f"{count} x {torch.cuda.get_device_name()}" if count else f"cpu, {torch.get_num_threads()} threads"
    unused = _unused_gpu()
    return f"{device}; attention {explain_attention()}" + (f"; {unused}" if unused else "")


def _unused_gpu() -> str | None:
    """Explain why torch does not use this machine's GPU; None if it uses the GPU or there is none."""
    import torch

    from animediffusion.platform.gpu import why_unused

    return None if torch.cuda.is_available() else why_unused(str(torch.__version__), torch.version.cuda)
