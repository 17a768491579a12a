"""`models import`, through the command line."""

import json

import pytest
import torch

from animediffusion.cli import app as cli
from animediffusion.models.authors.weights import from_authors
from animediffusion.models.bundle import load_bundle


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """A function that imports a file into a folder, and returns exit code, stdout and stderr as lines."""
    monkeypatch.chdir(tmp_path)

    def command(file, folder="bundle", *words):
        code = cli.run(["models", "import", str(file), str(folder), *words])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return command


@pytest.fixture
def file(tmp_path, authors_checkpoint):
    torch.save(authors_checkpoint, tmp_path / "ep_4.model.pth")
    return tmp_path / "ep_4.model.pth"


def test_an_imported_checkpoint_is_a_bundle_with_its_weights(run, file, tmp_path, authors_checkpoint):
    code, out, err = run(file, "made/bundle", "--json")
    assert (code, err) == (0, [])
    bundle = load_bundle(tmp_path / "made/bundle")
    found = json.loads(out[-1])
    assert (found["sha256"], found["image_size"]) == (bundle.sha256, 256)
    assert found["num_parameters"] == sum(p.numel() for p in bundle.denoiser.parameters())
    _, weights = from_authors(authors_checkpoint)
    assert all(torch.equal(bundle.denoiser.state_dict()[name], value) for name, value in weights.items())
    assert bundle.config.provenance["file"] == "ep_4.model.pth"
    assert "| trained | elsewhere: the authors' code |" in (tmp_path / "made/bundle/card.md").read_text()


def test_importing_again_gives_the_same_bundle(run, file, tmp_path):
    _, out, _ = run(file)
    assert out == ["imported 3.3 M parameters: bundle"]
    first = load_bundle(tmp_path / "bundle").sha256
    (tmp_path / "empty").mkdir()
    assert [run(file)[0], run(file, "empty")[0]] == [0, 0]
    assert {load_bundle(tmp_path / name).sha256 for name in ("bundle", "empty")} == {first}


class Payload:
    """What a pickle could run."""

    def __reduce__(self):
        return print, ("this ran",)


def save_payload(path):
    torch.save({"denoise_fn.input.0.weight": Payload()}, path)


BAD_FILES = [
    (lambda _: None, "No such file or directory; give an existing .pth file"),
    (lambda path: path.mkdir(), "Is a directory; give"),
    (lambda path: path.write_bytes(b""), "is not a PyTorch checkpoint; give a model checkpoint"),
    (lambda path: path.write_bytes(b"\x89PNG\r\n" * 50), "is not a PyTorch checkpoint"),
    (lambda path: path.write_text("hello"), "is not a PyTorch checkpoint"),
    (save_payload, "is not a PyTorch checkpoint"),
    (lambda path: torch.save(torch.zeros(3), path), "holds a Tensor, not a state_dict of tensors; give a model"),
    (lambda path: torch.save({"optim_dict": {}}, path), "holds the state of an optimizer"),
    (lambda path: torch.save({"fc.weight": torch.zeros(3)}, path), "has no weights named denoise_fn.*"),
]


@pytest.mark.parametrize(("write", "message"), BAD_FILES)
def test_another_file_is_one_line_and_leaves_nothing(run, tmp_path, write, message):
    write(tmp_path / "bad.pth")
    code, out, err = run(tmp_path / "bad.pth")
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith(f"error: {tmp_path}/bad.pth: ")
    assert message in err[0]
    assert not (tmp_path / "bundle").exists()


def test_a_truncated_checkpoint_ends_with_2_and_one_line(run, file):
    file.write_bytes(file.read_bytes()[:-5000])
    code, _, err = run(file)
    assert (code, len(err)) == (2, 1)
    assert "is not a PyTorch checkpoint" in err[0]


def test_a_folder_with_something_else_is_not_written_over(run, file, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/drawing.png").write_bytes(b"mine")
    code, _, err = run(file)
    assert (code, err) == (2, ["error: bundle: exists and is not a bundle; give a new folder"])
    assert (tmp_path / "bundle/drawing.png").read_bytes() == b"mine"
