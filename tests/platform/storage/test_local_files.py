"""A folder's files: each once, whatever links, names and permissions are in it."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from animediffusion.platform.errors import StorageError
from animediffusion.platform.storage.local_files import list_folder
from animediffusion.platform.storage.storage import list_files, list_sizes, read_bytes, survey, write_bytes


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.mark.parametrize(
    "links",
    [
        {"sub/loop": ".."},
        {"sub/loop": "."},
        {"x/up": "../..", "z": "sub"},
        {"a": "b", "b": "a"},
        {"a": "sub", "zz": "a"},
    ],
    ids=str,
)
def test_links_inside_a_tree_add_nothing(links: dict[str, str], tmp_path: Path) -> None:
    fill(tmp_path, "beside.png")
    root = fill(tmp_path / "root", "a.png", "sub/b.png", "x/c.png")
    for link, target in links.items():
        (root / link).symlink_to(target)

    files = [name for name in list_files(str(root)) if name not in links]

    assert files == ["a.png", "sub/b.png", "x/c.png"]


def test_a_folder_outside_is_entered_once_through_the_first_link(tmp_path: Path) -> None:
    fill(tmp_path / "disk", "a.png", "deep/b.png")
    root = fill(tmp_path / "root", "c.png")
    for name, target in (("train", "../disk"), ("again", "../disk/deep"), ("one.png", "../disk/a.png")):
        (root / name).symlink_to(target)

    assert list_files(str(root)) == ["again/b.png", "c.png", "one.png", "train/a.png"]


def test_a_name_that_is_not_utf8_is_a_fault_of_its_own(tmp_path: Path) -> None:
    fill(tmp_path, "ok.png", "a\nb.png", "\N{HIRAGANA LETTER KA}.png", "-.png", "dot.", "\N{GRINNING FACE}.png")
    (Path(os.fsdecode(bytes(tmp_path) + b"/\x90\xfc"))).mkdir()
    Path(os.fsdecode(bytes(tmp_path) + b"/\x90\xfc/\x89\xe6.png")).write_bytes(b"x")

    sizes, faults = survey(str(tmp_path))

    assert len(sizes) == 6
    assert faults == {r"\x90\xfc/\x89\xe6.png": "its name is not UTF-8"}
    with pytest.raises(StorageError, match="its name is not UTF-8"):
        list_sizes(str(tmp_path))


def test_pipes_and_sockets_are_no_files_and_links_to_nothing_fail_when_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to("nothing.png")
    (tmp_path / "self.png").symlink_to("self.png")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        server.bind("socket.png")

        assert list_sizes(str(tmp_path)) == {"a.png": 5, "gone.png": 0, "self.png": 0}
    with pytest.raises(StorageError, match=r"gone\.png: is a broken link"):
        read_bytes(str(tmp_path / "gone.png"))
    with pytest.raises(StorageError, match=r"self\.png: too many levels of symbolic links"):
        read_bytes(str(tmp_path / "self.png"))


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder of a user without rights on other users' files."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        os.chmod(name, 0o755)
        before = os.geteuid()
        if before == 0:
            os.chown(name, 65534, 65534)
            os.seteuid(65534)
        yield Path(name)
        os.seteuid(before)


def test_a_folder_that_cannot_be_opened_is_listed_as_a_fault(nobody: Path) -> None:
    fill(nobody, "a.png", "locked/b.png")
    (nobody / "locked").chmod(0)

    found = list_folder(str(nobody))

    (nobody / "locked").chmod(0o700)
    assert found.sizes == {"a.png": 5}
    assert found.faults == {"locked/": "permission denied"}


def test_a_name_of_255_bytes_is_written_and_a_longer_one_is_quoted_as_given(tmp_path: Path) -> None:
    longest = "\N{HIRAGANA LETTER KA}" * 84 + "ABC"

    write_bytes(str(tmp_path / longest), b"x")

    assert list_sizes(str(tmp_path)) == {longest: 1}
    with pytest.raises(StorageError, match=f"Folder/{longest}D: file name too long"):
        write_bytes(str(tmp_path / "Folder" / f"{longest}D"), b"x")


def test_an_error_is_one_line_that_shows_what_no_line_can_hold(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        read_bytes(str(tmp_path / "A\nB\udc90.PNG"))

    assert str(caught.value) == rf"{tmp_path}/A\nB\x90.PNG: its name is not UTF-8; rename it"
