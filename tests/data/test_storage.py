"""Wherever the shards are: the same samples, copied once, and what cannot be fetched is one line."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from dehvf_ds.config import UserError
from dehvf_ds.data import storage
from dehvf_ds.data.index import ShardIndex
from dehvf_ds.data.shards import DamagedSample


@pytest.fixture
def directory(make_shards):
    return make_shards(12, 3)


@pytest.fixture
def remote(directory, tmp_path):
    """Shards moved away from their manifest."""
    place = tmp_path / "remote place"
    place.mkdir()
    for path in directory.glob("*.tar"):
        path.rename(place / path.name)
    return place


class Server(SimpleHTTPRequestHandler):
    """Files, and under other paths how servers fail: with a status, or in the middle of a file."""

    breaks = 0

    def do_GET(self):
        what = self.path.split("/")[1]
        if what.endswith(".tar"):
            return super().do_GET()
        if what.isdigit():
            return self.send_error(int(what))
        body = (Path(self.directory) / Path(self.path).name).read_bytes()
        self.send_response(200)
        if what != "short":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        is_cut = what in ("cut", "short") or (what == "breaking" and type(self).breaks > 0)
        type(self).breaks -= 1
        return self.wfile.write(body[:700] if is_cut else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def http(remote):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(remote))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://user:secret@127.0.0.1:{server.server_port}"
        server.shutdown()


def reads(index, rows=(5, 0, 11, 4, 3, 7, 5, 10, 0)):
    return [index.read(row)["__key__"] for row in rows] == [f"row{row}" for row in rows]


def test_every_place_gives_the_same_samples(directory, remote, http, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_PAUSE_S", 0.0)
    files = fsspec.filesystem("memory")
    for path in remote.glob("*.tar"):
        files.pipe(f"/bucket/{path.name}", path.read_bytes())
    for place in (str(remote), f"pipe:cat '{remote}'/{{}}", http, f"{http}/breaking", "memory://bucket"):
        for cache in (None, str(tmp_path / "cache")):
            # A transfer that breaks is resumed where it broke.
            monkeypatch.setattr(Server, "breaks", 2)
            index = ShardIndex(directory, location=place, cache_dir=cache)
            assert reads(index)
            assert pickle.loads(pickle.dumps(index)).read(7) == index.read(7)
            index.close()
            assert reads(index)
            index.close()


def test_few_files_stay_open(directory, monkeypatch):
    monkeypatch.setattr(storage, "MAX_OPEN_SHARDS", 2)
    index = ShardIndex(directory)
    assert reads(index)
    opened = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.exists()]
    assert sum(str(directory) in path and path.endswith(".tar") for path in opened) == 2


def test_streams_read_forward_once(make_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK_BYTES", 512)
    directory, log = make_shards(24, 12), tmp_path / "log"
    index = ShardIndex(directory, location=f"pipe:echo {{}} >> {log}; cat '{directory}'/{{}}")
    assert reads(index, (0, 2, 1, 0, 2, 12, 3, 0))
    assert log.read_text().split() == ["tiny-000000.tar", "tiny-000001.tar"]
    # A forked worker has streams of its own.
    child = os.fork()
    if child == 0:
        os._exit(0 if reads(index, range(24)) else 1)
    assert reads(index, range(24))
    assert os.waitpid(child, 0)[1] == 0
    index.close()


# aiohttp leaves answers for the collector to close.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("HTTP/404", "there is no such file; look at data.location"),
        ("HTTP/403", "HTTP 403: the server refuses it; look at login and permissions"),
        ("HTTP/500", "HTTP 500; look at data.location, the server and the network"),
        ("HTTP/cut", r"not completed"),
        ("HTTP/short", r"ended after 700 of \d+ bytes; copy it again"),
        ("http://me:secret@127.0.0.1:9", "Cannot connect to host .*; look at data.location"),
        ("pipe:echo first >&2; echo 'no such bucket' >&2; exit 3 # {}", "with code 3: no such bucket"),
        ("pipe:head -c 700 DIR/{}", r"ended after 700 of \d+ bytes; copy it again"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(
    directory, remote, http, tmp_path, monkeypatch, capfd, place, message, cached
):
    monkeypatch.setattr(storage, "RETRY_WITHIN_S", -1.0)
    place = place.replace("HTTP", http).replace("DIR", f"'{remote}'")
    index = ShardIndex(directory, location=place, cache_dir=str(tmp_path / "cache") if cached else None)
    with pytest.raises(DamagedSample, match=message) as caught:
        index.read(4)
    assert "\n" not in str(caught.value)
    assert "tiny-000001.tar" in str(caught.value)
    assert "secret" not in str(caught.value)
    index.close()
    assert list(tmp_path.glob("cache/*.part")) + list(tmp_path.glob("cache/.*.part")) == []
    assert capfd.readouterr().err == ""


def test_only_whole_and_right_copies_are_read(directory, tmp_path):
    cache = tmp_path / "cache"
    index = ShardIndex(directory, cache_dir=str(cache))
    hashes = [shard["sha256"] for shard in index.manifest["shards"]]
    cache.joinpath(f".{hashes[1]}.tar.part").write_bytes(b"half, of a killed copier")
    last = directory / "tiny-000003.tar"
    last.write_bytes(last.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedSample, match=r"tiny-000003.tar: .*do not have the manifest's sha256"):
        index.read(11)
    assert reads(index, range(9))
    index.close()
    copies = {path.name for path in cache.iterdir() if "lock" not in path.name}
    assert copies == {f"{sha256}.tar" for sha256 in hashes[:3]}
    for path in directory.glob("*.tar"):
        path.write_bytes(b"gone")
    assert reads(ShardIndex(directory, cache_dir=str(cache)), range(9))


def test_cache_stays_within_its_size_and_the_least_recently_used_leave(directory, tmp_path):
    size = (directory / "tiny-000000.tar").stat().st_size
    cache = tmp_path / "cache"
    index = ShardIndex(directory, cache_dir=str(cache), cache_gb=2.5 * size / 1e9)
    hashes = [shard["sha256"] for shard in index.manifest["shards"]]
    for row, expected in ((0, {0}), (3, {0, 1}), (6, {1, 2}), (0, {2, 0})):
        index.read(row)
        # A shard that is open counts from when it was opened.
        index.close()
        time.sleep(0.02)
        assert {path.stem for path in cache.glob("*.tar")} == {hashes[i] for i in expected}
    # One that left can still be read by a process that has it open.
    assert reads(ShardIndex(directory, cache_dir=str(cache), cache_gb=1.5 * size / 1e9))


def read_all_rows(directory, location, cache, results):
    index = ShardIndex(directory, location=location, cache_dir=cache)
    results.put(reads(index, range(12)))


def test_one_process_of_a_node_copies(directory, remote, tmp_path):
    log = tmp_path / "log"
    place = f"pipe:echo {{}} >> {log}; sleep 0.05; cat '{remote}'/{{}}"
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    job = (directory, place, str(tmp_path / "cache"), results)
    readers = [context.Process(target=read_all_rows, args=job) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [results.get() for _ in readers] == [True] * 4
    assert sorted(log.read_text().split()) == [f"tiny-00000{i}.tar" for i in range(4)]


def no_space(*args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("is_piped", [False, True])
def test_without_space_for_copies_shards_are_read_directly(
    directory, remote, tmp_path, monkeypatch, capfd, is_piped
):
    monkeypatch.setattr(os, "posix_fallocate", no_space)
    place = f"pipe:cat '{remote}'/{{}}" if is_piped else str(remote)
    index = ShardIndex(directory, location=place, cache_dir=str(tmp_path / "cache"))
    assert reads(index)
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: data.cache_dir {tmp_path}/cache: [Errno 28] No space left")
    # Copied as soon as there is space again.
    monkeypatch.undo()
    index.close()
    assert reads(index)
    assert len(list(tmp_path.glob("cache/*.tar"))) == 4
    assert capfd.readouterr().err == ""


def test_a_full_temporary_directory_is_no_damaged_sample(directory, remote, monkeypatch):
    index = ShardIndex(directory, location=f"pipe:cat '{remote}'/{{}}")
    monkeypatch.setattr(storage.tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("w+b"))  # noqa: SIM115
    with pytest.raises(OSError, match=f"No space left on device: '{tempfile.gettempdir()}'"):
        index.read(0)


def test_refused_settings(directory, tmp_path):
    (tmp_path / "file").write_text("")
    for message, settings in {
        r"data.location pipe:cat: needs \{\} where": {"location": "pipe:cat"},
        r"data.location .*absent: ": {"location": str(tmp_path / "absent")},
        r"data.location nosuch://x: Protocol not known": {"location": "nosuch://me:secret@x"},
        r"data.cache_gb 1e-06: less than the largest shard, tiny-00000": {
            **{"cache_dir": str(tmp_path / "cache"), "cache_gb": 1e-6}
        },
        r"data.cache_dir .*file/cache: ": {"cache_dir": str(tmp_path / "file" / "cache")},
    }.items():
        with pytest.raises(UserError, match=message):
            ShardIndex(directory, **settings)
