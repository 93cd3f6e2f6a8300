from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def http(remote):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(remote))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def keys(index, rows=(5, 0, 11, 4, 3, 7, 5, 10, 0)):
    return [index.read(row)["__key__"] for row in rows] == [f"row{row}" for row in rows]


def test_few_files_stay_open(directory, monkeypatch):
    monkeypatch.setattr(storage, "MAX_OPEN_SHARDS", 2)
    index = ShardIndex(directory)
    assert keys(index)
    assert len(index._storage._opened) == 2


def test_every_place_gives_the_same_samples(directory, remote, http, tmp_path):
    places = [str(remote), f"pipe:cat '{remote}'/{{}}", http]
    for place in places:
        for cache in (None, str(tmp_path / "cache")):
            index = ShardIndex(directory, location=place, cache_dir=cache)
            assert keys(index)
            assert pickle.loads(pickle.dumps(index)).read(7) == index.read(7)
            index.close()
            assert keys(index)
            index.close()


def test_cache_works_for_local_shards_and_is_read_alone(directory, tmp_path):
    cache = tmp_path / "cache"
    index = ShardIndex(directory, cache_dir=str(cache))
    assert keys(index)
    index.close()
    assert sorted(path.stem for path in cache.glob("*.tar")) == sorted(
        shard["sha256"] for shard in index.manifest["shards"]
    )
    for path in directory.glob("*.tar"):
        path.write_bytes(b"gone")
    assert keys(ShardIndex(directory, cache_dir=str(cache)))


def test_streams_read_forward_once(directory, remote, tmp_path):
    log = tmp_path / "log"
    index = ShardIndex(directory, location=f"pipe:echo {{}} >> {log}; cat '{remote}'/{{}}")
    assert keys(index, (0, 2, 1, 0, 2, 5, 3, 0))
    assert log.read_text().split() == ["tiny-000000.tar", "tiny-000001.tar"]
    index.close()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("command", ["pipe:exit 3 # {}", "pipe:head -c 700 {dir}/{}", "{http}/none"])
def test_what_cannot_be_fetched_is_one_line(directory, remote, http, tmp_path, command, cached):
    place = command.replace("{dir}", f"'{remote}'").replace("{http}", http)
    index = ShardIndex(directory, location=place, cache_dir=str(tmp_path / "cache") if cached else None)
    with pytest.raises(DamagedSample) as caught:
        index.read(4)
    assert "\n" not in str(caught.value)
    assert "tiny-000001.tar" in str(caught.value)
    index.close()
    assert list(tmp_path.glob("cache/*.part")) == []


class Failing(QuietHandler):
    """Answers as servers do that have no shard to give."""

    def do_GET(self):
        what = self.path.split("/")[1]
        body = (Path(self.directory) / Path(self.path).name).read_bytes()
        if what.isdigit():
            self.send_error(int(what))
        elif what == "login":
            self.send_response(302)
            self.send_header("Location", "/page")
            self.end_headers()
        elif what == "page":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"\n<!DOCTYPE html><html>Please log in</html>")
        else:
            self.send_response(200)
            if what == "cut":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:700])


@pytest.fixture
def failing(remote):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Failing, directory=str(remote))) as server:
        (remote / "page").write_bytes(b"")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://user:secret@127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("404", r"/404/tiny-000001\.tar: HTTP 404: there is no such file; look at data\.location"),
        ("403", r"HTTP 403: the server refuses it; look at permissions"),
        ("401", r"HTTP 401: the server wants a login"),
        ("500", r"HTTP 500: the server fails; try again later"),
        ("login", r"sends a web page, not a shard .*; open it in a browser"),
        ("cut", r"ended early; try again|ended after 700 of \d+ bytes"),
        ("short", r"ended after 700 of \d+ bytes; copy it again"),
    ],
)
def test_what_a_server_refuses_is_one_line(directory, failing, tmp_path, monkeypatch, path, message, cached):
    monkeypatch.setattr(storage, "RETRY_WITHIN_S", -1.0)
    place = f"{failing}/{path}"
    index = ShardIndex(directory, location=place, cache_dir=str(tmp_path / "cache") if cached else None)
    with pytest.raises(DamagedSample, match=message) as caught:
        index.read(4)
    assert "\n" not in str(caught.value)
    assert "tiny-000001.tar" in str(caught.value)
    assert "Popen" not in str(caught.value)
    assert "secret" not in str(caught.value)
    index.close()
    assert list(tmp_path.glob("cache/*.part")) == []


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("http://127.0.0.1:9", "the server cannot be reached; look at data.location"),
        ("http://no-such-server.invalid", "the server's name is unknown|proxy"),
        ("pipe:echo first >&2; echo 'no such bucket' >&2; exit 3 # {}", "with code 3: no such bucket"),
        ("pipe:no-such-program {}", "with code 127: .*not found"),
    ],
)
def test_what_cannot_be_reached_is_one_line(directory, remote, monkeypatch, capfd, place, message):
    monkeypatch.setattr(storage, "RETRY_WITHIN_S", -1.0)
    index = ShardIndex(directory, location=place)
    with pytest.raises(DamagedSample, match=message) as caught:
        index.read(4)
    assert "\n" not in str(caught.value)
    index.close()
    assert capfd.readouterr().err == ""


def test_a_changed_copy_is_refused(directory, remote, tmp_path):
    path = remote / "tiny-000002.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    index = ShardIndex(directory, location=str(remote), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DamagedSample, match=r"tiny-000002.tar: its bytes do not have the manifest's sha256"):
        index.read(7)
    assert list(tmp_path.glob("cache/*.part")) == []


def test_cache_stays_within_its_size_and_the_longest_unused_leave(directory, tmp_path):
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


def test_an_evicted_shard_is_still_read_by_who_has_it_open(directory, tmp_path):
    size = (directory / "tiny-000000.tar").stat().st_size
    index = ShardIndex(directory, cache_dir=str(tmp_path / "cache"), cache_gb=1.5 * size / 1e9)
    assert keys(index)


def test_a_killed_copier_leaves_nothing_in_the_way(directory, tmp_path):
    cache = tmp_path / "cache"
    index = ShardIndex(directory, cache_dir=str(cache))
    shard = index.manifest["shards"][1]
    (cache / f".{shard['sha256']}.tar.part").write_bytes(b"half")
    assert keys(index)
    assert list(cache.glob("*.part")) == []


def read_all_rows(directory, location, cache, results):
    index = ShardIndex(directory, location=location, cache_dir=cache)
    results.put(keys(index, range(12)))


def test_one_process_of_a_node_copies(directory, remote, tmp_path):
    log = tmp_path / "log"
    place = f"pipe:echo {{}} >> {log}; sleep 0.05; cat '{remote}'/{{}}"
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    readers = [
        context.Process(target=read_all_rows, args=(directory, place, str(tmp_path / "cache"), results))
        for _ in range(4)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [results.get() for _ in readers] == [True] * 4
    assert sorted(log.read_text().split()) == [f"tiny-00000{i}.tar" for i in range(4)]


def test_forked_worker_does_not_share_a_stream(directory, remote):
    index = ShardIndex(directory, location=f"pipe:cat '{remote}'/{{}}")
    index.read(0)
    child = os.fork()
    if child == 0:
        os._exit(0 if keys(index) else 1)
    assert keys(index)
    assert os.waitpid(child, 0)[1] == 0
    index.close()


def test_refused_settings(directory, tmp_path):
    with pytest.raises(UserError, match=r"data.location pipe:cat: needs \{\} where"):
        ShardIndex(directory, location="pipe:cat")
    with pytest.raises(UserError, match=r"data.cache_gb 1e-06: less than the largest shard, tiny-00000"):
        ShardIndex(directory, cache_dir=str(tmp_path / "cache"), cache_gb=1e-6)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir .*file/cache: "):
        ShardIndex(directory, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"data.location .*absent: "):
        ShardIndex(directory, location=str(tmp_path / "absent"))


def test_full_disk_is_named(directory, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    index = ShardIndex(directory, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"data.cache_dir .*: \[Errno 28\] No space left") as caught:
        index.read(0)
    assert not isinstance(caught.value, DamagedSample)
