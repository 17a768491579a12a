"""Export a model as a folder that colors drawings without an installation of this package.

    export(settings, "3", Path("model"))
    $ python model/colorize.py SKETCH REFERENCE OUT.png       torch, safetensors, numpy and pillow are enough

The folder holds the bundle and unchanged copies of the modules that coloring needs, so it gives the same images.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from animediffusion.models.bundle import FILES
from animediffusion.pipelines.release.checks import check_bundle
from animediffusion.platform.config import Settings
from animediffusion.platform.errors import ConfigError
from animediffusion.platform.registry import code_archive
from animediffusion.platform.registry.client import Registry
from animediffusion.platform.storage.storage import explained

SCRIPT = '''"""Color a drawing like a reference image: python colorize.py SKETCH REFERENCE OUT.png

requirements.txt in the same folder lists the packages that it needs. --help lists the options.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # its own modules, whatever else is installed

from animediffusion.serve.standalone import main  # noqa: E402

sys.exit(main(HERE, sys.argv[1:]))
'''


@dataclass(frozen=True)
class ExportedModel:
    """An exported folder, as `models export --json` prints it."""

    model: str
    folder: str
    sha256: str
    num_files: int
    bytes: int
    command: str
    """Shell command that colors a drawing with the folder."""


def export(settings: Settings, model: str, folder: Path) -> ExportedModel:
    """Write the folder atomically.

    Args:
        settings: names the registry.
        model: a version number, an alias, `models:/...`, or a bundle folder or URI.
        folder: a new or empty folder.

    Raises:
        ConfigError: the folder exists and is not empty.
        BundleError, RegistryError, StorageError: the model is missing, unreachable or damaged.
    """
    with explained(str(folder)):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(str(folder), "exists and is not empty", "give a new folder")
    target = folder.resolve()  # an empty folder is replaced, not a link to it
    if target == Path.cwd():
        raise ConfigError(str(folder), "is the folder in which the command runs", "give a new folder")
    registry = Registry(settings)
    source = registry.fetch(registry.reference(model))
    bundle = check_bundle(source)
    with explained(str(folder)):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".export.", dir=target.parent)
    with temporary as name:
        whole = Path(name) / "whole"
        whole.mkdir()
        for file in (*FILES, "checksums.json"):
            shutil.copyfile(source / file, whole / file)
        code_archive.copy_modules(whole)
        (whole / "colorize.py").write_text(SCRIPT)
        (whole / "requirements.txt").write_text(code_archive.requirements())
        with explained(str(folder)):
            whole.replace(target)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return ExportedModel(
        model=model,
        folder=str(folder),
        sha256=bundle.sha256,
        num_files=len(files),
        bytes=sum(path.stat().st_size for path in files),
        command=f"python {shlex.quote(str(folder / 'colorize.py'))} SKETCH REFERENCE OUT.png",
    )
