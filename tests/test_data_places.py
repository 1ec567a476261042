"""Data from servers that fail: what is read is what was prepared, or an error that names the file."""
import http.server
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from data_pipeline import places
from data_pipeline.index import load_index, open_shard
from data_pipeline.packing import write_plan
from data_pipeline.places import Cache, is_remote
from data_pipeline.stream import TokenStream, documents
from data_pipeline.verification import Place
from serpent_scale.errors import UserError
from serpent_scale.parallel.ports import free_port
from unique_corpus import write_corpus

pytest.importorskip("fsspec")
SEQ_LEN, ROOM = 16, 1 << 30
NGINX = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    write_corpus(folder, 52, 900)
    write_plan(load_index(folder / "train"), SEQ_LEN)
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(places, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(places, "LONGEST_WAIT", 0.05)
    monkeypatch.setattr(places, "CHUNK", 1500)


@pytest.fixture
def server(tmp_path, data):
    """An HTTP server of a copy of the data. `faults` says what it does to a request by its number: None for nothing."""
    pytest.importorskip("aiohttp")
    shutil.copytree(data, tmp_path / "served" / "data")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are written apart: else each answer waits 40 ms

        def do_GET(self):
            server.requests[self.path] += 1
            server.total += 1
            fault = server.faults(server.total)
            path = server.folder / self.path.lstrip("/")
            if fault == "500":
                return self.reply(500, b"")
            if not path.is_file():
                return self.reply(404, b"")
            body, status, wanted = path.read_bytes(), 200, self.headers.get("Range")
            if wanted and server.ranges:
                begin, _, end = wanted.removeprefix("bytes=").partition("-")
                if int(begin) >= len(body):
                    return self.reply(416, b"")
                body, status = body[int(begin) : int(end) + 1 if end else None], 206
            self.reply(status, body, fault)

        do_HEAD = do_GET

        def reply(self, status, body, fault=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault == "reset":
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            elif fault == "hang":
                self.wfile.write(body[:3])
                self.wfile.flush()
                server.released.wait(20)
                self.close_connection = True
            elif fault == "slow":
                for at in range(0, len(body), 300):
                    self.wfile.write(body[at : at + 300])
                    self.wfile.flush()
                    time.sleep(0.002)
            elif fault == "flip":
                self.wfile.write(bytes([body[0] ^ 1]) + body[1:])
            else:
                self.wfile.write(body)

        def log_message(self, *args):
            pass

        def handle(self):
            try:
                super().handle()
            except (OSError, ValueError):  # of a connection that was cut on purpose
                pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folder, server.requests, server.total, server.ranges = tmp_path / "served", Counter(), 0, True
    server.faults, server.released = lambda number: None, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/data"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def opened(url, folder, limit=ROOM, **options) -> TokenStream:
    return TokenStream(url, "train", SEQ_LEN, 3, 30, cache=Cache(folder, limit), **options)


def of_all(stream) -> int:
    return stream.batch(0, 2 * stream.n_windows).digest


@pytest.fixture(scope="module")
def expected(data):
    return of_all(TokenStream(data, "train", SEQ_LEN, 3, 30))


def test_a_server_that_fails_in_every_way_gives_the_same_data(server, tmp_path, expected, monkeypatch):
    random.seed(1)
    faults = random.choices(["500", "reset", "slow", None], [1, 1, 1, 3], k=10_000)
    server.faults = lambda number: faults[number]
    assert of_all(opened(server.url, tmp_path / "cache")) == expected
    server.ranges, server.faults = False, lambda number: None
    assert of_all(opened(server.url + "/", tmp_path / "cache2")) == expected
    monkeypatch.setattr(places, "READ_SECONDS", 0.3)
    server.ranges, server.faults = True, lambda number: "hang" if number % 7 == 0 else None
    assert of_all(opened(server.url, tmp_path / "cache3", packing="best_fit")) == of_all(
        TokenStream(server.folder / "data", "train", SEQ_LEN, 3, 30, packing="best_fit"))  # fmt: skip


def test_a_server_that_never_answers_ends_the_run_even_where_damage_is_skipped(server, tmp_path, capfd):
    stream = opened(server.url, tmp_path / "cache", on_error="skip")
    server.faults = lambda number: "500"
    with pytest.raises(UserError, match=r"http://.*/train/shard-0000.*gave up after 8 attempts"):
        of_all(stream)
    assert stream.skipped == [] and "attempt 8 of 8" in capfd.readouterr().err
    with pytest.raises(UserError, match="tokenizer.json: gave up"):
        opened(server.url, tmp_path / "cache")


def test_damage_at_the_server_is_found_and_named(server, tmp_path, expected):
    path = server.folder / "data" / "train" / "shard-000002.tar"
    raw = path.read_bytes()
    for number, (damaged, words) in enumerate([
        (None, "no such file"), (raw[:5000], "cut at byte 5000"), (raw[:3000], "cut at byte 3000"), (b"", "cut at byte 0"),
        (raw[:-1], f"cut at byte {len(raw) - 1}"), (raw[:700] + b"x" + raw[701:], "its sha256 is"),
        (path.with_name("shard-000001.tar").read_bytes().ljust(len(raw), b"\0")[: len(raw)], "its sha256 is"),
    ]):  # fmt: skip
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{server.url}/train/shard-000002.tar: .*{words}"):
            of_all(opened(server.url, tmp_path / f"cache{number}"))
        assert not (tmp_path / f"cache{number}" / load_index(server.folder / "data" / "train", False).shards[2].sha256).exists()
    skipping = opened(server.url, tmp_path / "skipping", on_error="skip")
    assert of_all(skipping) != expected and skipping.skipped == [[0, 2]]
    path.write_bytes(raw)
    stream, flips = opened(server.url, tmp_path / "flipped"), iter([False, True])
    server.faults = lambda number: "flip" if next(flips, False) else None  # on the way, once
    assert of_all(stream) == expected and next(flips, None) is None


def test_a_bit_that_flips_in_the_cache_is_found_and_fetched_again(server, tmp_path, expected):
    cache = tmp_path / "cache"
    first = opened(server.url, cache)
    assert of_all(first) == expected
    path = cache / first.index.shards[1].sha256
    path.write_bytes(b"x" + path.read_bytes()[1:])
    before = server.requests.copy()
    assert of_all(opened(server.url, cache)) == expected
    fetched = {name for name, n in (server.requests - before).items() if "shard" in name}
    assert fetched == {"/data/train/shard-000001.tar"}


def test_the_cache_is_bounded_and_drops_what_was_used_longest_ago(server, tmp_path, expected, monkeypatch):
    from data_pipeline import windows

    shards = load_index(server.folder / "data" / "train").shards
    limit, folder, largest = max(s.bytes for s in shards) * 3, tmp_path / "cache", 0
    folder.mkdir()
    stale = folder / ("0" * 64 + ".partial")  # of a killed process
    stale.write_bytes(bytes(limit // 2))
    os.utime(stale, (1, 1))
    monkeypatch.setattr(windows, "OPEN_BYTES", 0)
    stream, total = opened(server.url, folder, limit), 0
    for g in range(2 * stream.n_windows):
        total += stream.batch(g, 1).digest
        held = sum(path.stat().st_size for path in list(folder.glob("?" * 64 + "*")) if path.suffix != ".lock")
        largest = max(largest, held)
    assert total % 2**128 == expected and limit / 2 < largest <= limit and not stale.exists()
    with pytest.raises(UserError, match="raise data.cache_gib"):
        of_all(opened(server.url, tmp_path / "small", 5000))
    cache, made = Cache(tmp_path / "lru", 30), []
    for name in "aab", "b", "c", "aab", "d":
        key = name[-1] * 64
        cache.get(key, 10, lambda path: made.append(path.name[0]) or path.write_bytes(bytes(10)))
        time.sleep(0.01)
    assert made == ["b", "c", "d"] and {path.name[0] for path in cache.folder.glob("?" * 64)} == set("bcd")
    cache.get("b" * 64, 10, lambda path: made.append("again"))
    time.sleep(0.01)
    cache.get("e" * 64, 10, lambda path: path.write_bytes(bytes(10)))
    assert {path.name[0] for path in cache.folder.glob("?" * 64)} == set("bde") and "again" not in made


READER = """
import sys
from pathlib import Path
from data_pipeline import places
places.FIRST_WAIT = 0.001
from data_pipeline.index import load_split, open_shard
index = load_split(sys.argv[1], "train", places.Cache(Path(sys.argv[2]), 1 << 30))
index.remote.prefetch(map(index.remote_file, range(len(index.shards))))
print(sum(int(open_shard(index, number).sum(dtype="u8")) for number in range(len(index.shards))))
"""


def test_processes_share_what_one_of_them_fetched(server, tmp_path):
    index = load_index(server.folder / "data" / "train")
    expected = sum(int(open_shard(index, number).sum(dtype="u8")) for number in range(len(index.shards)))
    command = [sys.executable, "-c", READER, server.url, str(tmp_path / "cache")]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [int(reader.communicate(timeout=60)[0]) for reader in readers] == [expected] * 3
    assert {n for name, n in server.requests.items() if "shard" in name} == {1}  # of one chunk each here


def test_shards_are_fetched_ahead_of_need(server, tmp_path):
    stream = opened(server.url, tmp_path / "cache")
    assert not [name for name in server.requests if "shard" in name]
    stream.sample(0)
    order, begins = stream.sources[0]._shard_order(0)
    soon = {order[place] for place in range(len(order)) if begins[place] < 60 * SEQ_LEN}
    assert 1 < len(soon) < len(order)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and len(list((tmp_path / "cache").glob("?" * 64))) < len(soon) + 1:
        time.sleep(0.01)
    have = {path.name for path in (tmp_path / "cache").glob("?" * 64)}
    assert {stream.index.shards[shard].sha256 for shard in soon} <= have and len(have) == len(soon) + 1  # and documents.npy


@pytest.mark.parametrize("url", ["pipe:cat /etc/hosts", " pipe:ls", "s3://a/b::http://c", "simplecache::s3://a/b", "file:///etc",
                                 "memory://x", "reference://x", "shell://ls", "zip://a::b", "gopen://x", "local://x", "github://a:b@/c"])  # fmt: skip
def test_urls_that_do_more_than_name_data_are_refused(url, tmp_path):
    with pytest.raises(UserError, match="refused|is none of"):
        opened(url, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_rewriting_environment_and_a_missing_cache_are_refused(tmp_path, data, monkeypatch):
    assert is_remote("S3://bucket/data") and not is_remote(data) and not is_remote("C:/data")
    with pytest.raises(UserError, match="set data.cache"):
        TokenStream("s3://bucket/data", "train", SEQ_LEN, 3, 30)
    monkeypatch.setenv("GOPEN_REWRITE", "x=pipe:y")
    with pytest.raises(UserError, match="GOPEN_REWRITE is set"):
        opened(data, tmp_path)


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx_with_errors_resets_and_slow_bytes(tmp_path, data, expected):
    pytest.importorskip("aiohttp")
    port = free_port()
    for name in ("body", "proxy", "fastcgi", "uwsgi", "scgi"):
        (tmp_path / name).mkdir()
    paths = "".join(f"{kind}_temp_path {tmp_path}/{name};" for kind, name in dict(
        client_body="body", proxy="proxy", fastcgi="fastcgi", uwsgi="uwsgi", scgi="scgi").items())  # fmt: skip
    user = "user root;" if os.geteuid() == 0 else ""
    (tmp_path / "nginx.conf").write_text(f"""
        {user} daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}
        http {{
            access_log {tmp_path}/access.log; {paths}
            split_clients $request_id $fault {{ 15% error; 15% reset; 20% slow; * none; }}
            map $fault $rate {{ slow 40k; default 0; }}
            server {{
                listen 127.0.0.1:{port}; root {data.parent}; limit_rate $rate;
                location / {{
                    if ($fault = error) {{ return 500; }}
                    if ($fault = reset) {{ return 444; }}
                }}
            }}
        }}""")
    nginx = subprocess.Popen([NGINX, "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "error.log"), "-p", str(tmp_path)])
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        assert of_all(opened(f"http://127.0.0.1:{port}/data", tmp_path / "cache")) == expected
        log = (tmp_path / "access.log").read_text()
        assert '" 500 ' in log and '" 444 ' in log and '" 206 ' in log
    finally:
        nginx.terminate()
        nginx.wait(10)


def test_s3(tmp_path, data, expected, monkeypatch):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        import boto3

        host, port = server.get_host_and_port()
        for key, value in dict(AWS_ENDPOINT_URL=f"http://{host}:{port}", AWS_ACCESS_KEY_ID="k", AWS_SECRET_ACCESS_KEY="s",
                               AWS_DEFAULT_REGION="us-east-1").items():  # fmt: skip
            monkeypatch.setenv(key, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in data.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "bucket", f"deep/data/{path.relative_to(data)}")
        assert of_all(opened("s3://bucket/deep/data", tmp_path / "cache")) == expected
        (tmp_path / "scratch").mkdir()
        place = Place("s3://bucket/deep/data", tmp_path / "scratch")
        assert place.splits() == ["train"] and not list(place.faults(["train"]))
        client.delete_object(Bucket="bucket", Key="deep/data/train/shard-000003.tar")
        client.put_object(Bucket="bucket", Key="deep/data/train/foreign.tar", Body=b"x")
        place = Place("s3://bucket/deep/data", tmp_path / "scratch")
        wrong = [fault.rpartition("/")[2].partition(":")[0] for fault in place.faults(["train"])]
        assert wrong == ["shard-000003.tar", "foreign.tar"]
        with pytest.raises(UserError, match="s3://bucket/deep/data/train/shard-000003.tar: no such file"):
            of_all(opened("s3://bucket/deep/data", tmp_path / "cache2"))
        with pytest.raises(UserError, match="s3://nowhere/data/tokenizer.json: no such file"):
            opened("s3://nowhere/data", tmp_path / "cache3")
    finally:
        server.stop()


def test_documents_are_read_from_a_place_as_from_a_folder(tmp_path, data, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(places, "SCHEMES", ("memory",))
    fsspec.filesystem("memory").put(str(data), "/place", recursive=True)
    remote = documents("memory://place", "train", Cache(tmp_path / "cache", ROOM))
    assert all((a == b).all() for a, b in zip(remote, documents(data, "train"), strict=True))
    assert sum(path.suffix == "" for path in (tmp_path / "cache").iterdir()) > 1, "they came through the cache"
