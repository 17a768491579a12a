import pickle
import re
from pathlib import Path

import pytest

from animediffusion.platform import errors
from animediffusion.platform.errors import AnimeDiffusionError, ImageError, ServeError

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("platform", "models", "pipelines", "serve") for path in (ROOT / folder).rglob("*.py")]


def tree(kind: type, depth: int = 0) -> list[tuple[int, str]]:
    return [(depth, kind.__name__), *(line for child in kind.__subclasses__() for line in tree(child, depth + 1))]


TREE = tree(AnimeDiffusionError) + tree(ServeError)
CLASSES = [name for _, name in TREE]


def test_the_tree_at_the_top_shows_every_class_and_its_base():
    lines = re.findall(r"^( *)(\w+Error|Interrupted) {2,}\S", errors.__doc__ or "", re.MULTILINE)
    assert sorted((len(indent) // 4, name) for indent, name in lines) == sorted(TREE)


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_defined_here_and_used_elsewhere(name: str) -> None:
    assert hasattr(errors, name)
    used = [path for path in SOURCES if re.search(rf"\b{name}\b", path.read_text()) and path.name != "errors.py"]
    assert used


def test_an_error_crosses_a_process_with_all_it_holds():
    error = pickle.loads(pickle.dumps(ImageError("a.png", "is empty", "give an image file", reason="empty")))
    assert (error.thing, error.found, error.allowed, error.reason, error.exit_code) == (
        "a.png", "is empty", "give an image file", "empty", 2
    )  # fmt: skip
    assert str(error) == "a.png: is empty; give an image file"
