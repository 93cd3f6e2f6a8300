"""The tool as a user calls it, and pictures to build from."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dehvf_ds.config import UserError
from dehvf_ds.data.building.__main__ import main


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str, str]]:
    """Calls the tool in this process: exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        if "--num-workers" not in arguments:
            arguments = (*arguments, "--num-workers", 1)
        try:
            code, error = main([str(argument) for argument in arguments]), ""
        except UserError as raised:
            code, error = 2, f"error: {' '.join(str(raised).split())}\n"
        captured = capsys.readouterr()
        return code, captured.out, captured.err + error

    return call


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    def call(colour: tuple[int, int, int] = (9, 9, 9), kind: str = "JPEG", size=(8, 8)) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", size, colour).save(file, kind)
        return file.getvalue()

    return call


@pytest.fixture
def images(tmp_path, encoded) -> Path:
    """Good pictures, one cut off, one empty, one of an unknown kind."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.jpg").write_bytes(encoded((ord(name), 0, 0)).ljust(1000, b"\0"))
    (folder / "cut.jpg").write_bytes(encoded()[:200])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "odd.heic").write_bytes(b"x")
    return folder


@pytest.fixture
def table(tmp_path, images) -> list[object]:
    """A build of the four good pictures, by three in a shard; it lacks --output alone."""
    path = tmp_path / "t.csv"
    path.write_text("image,caption\n" + "".join(f"{name}.jpg,Text {name}.\n" for name in "abcd"))
    return ["csv", "--captions", path, "--images", images, "--samples-per-shard", 3]
