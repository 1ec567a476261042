"""launch/verify.py: what is whole passes, each fault is a line that names the file, and says so by its exit code and in JSON."""
import http.server
import importlib.util
import json
import shutil
import tempfile
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from data_pipeline.index import load_index
from data_pipeline.packing import write_plan
from serpent_scale.checkpoint import store
from unique_corpus import write_corpus

SCRIPT = Path(__file__).parents[1] / "launch" / "verify.py"


@pytest.fixture
def verify(capsys):
    """(exit code, the JSON it prints, its lines on standard error) of a call."""
    spec = importlib.util.spec_from_file_location("verify", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*arguments):
        capsys.readouterr()
        code = 0
        try:
            module.main([*map(str, arguments), "--json"])
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return code, json.loads(printed.out or "null"), [line for line in printed.err.splitlines() if "shards/s" not in line]

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "data"
    write_corpus(data, 39, 700)
    shutil.copytree(data / "train", data / "validation")
    for split in ("train", "validation"):
        path = data / split / "index.json"
        fields = json.loads(path.read_text()) | {"split": split}
        del fields["fields_sha256"]
        path.write_text(json.dumps(fields))
        write_plan(load_index(data / split), 16)
    return data


def flip(path, at=-1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "train/shard-000001.tar": lambda path: flip(path, 600),
    "validation/shard-000003.tar": lambda path: path.write_bytes(path.read_bytes()[:1024]),
    "train/shard-000002.tar": lambda path: path.unlink(),
    "train/foreign.tar": lambda path: path.write_bytes(b"x"),
    "train/best_fit-16.pieces": lambda path: flip(path, 0),
}


def test_data(made, verify, tmp_path):
    shutil.copytree(made, tmp_path / "data")
    code, report, lines = verify(tmp_path / "data")
    assert (code, report["whole"], report["checked"], lines) == (0, True, ["train", "validation"], [])
    for name, damage in DAMAGE.items():
        damage(tmp_path / "data" / name)
    code, report, lines = verify(tmp_path / "data")
    assert code == 1 and not report["whole"] and report["faults"] == lines and len(lines) == len(DAMAGE)
    for name in DAMAGE:
        assert sum(line.startswith(f"{tmp_path / 'data' / name}:") for line in lines) == 1, (name, lines)
    code, report, _ = verify(tmp_path / "data", "--split", "validation")
    assert code == 1 and len(report["faults"]) == 1
    flip(tmp_path / "data" / "tokenizer.json")
    (tmp_path / "data" / "validation" / "index.json").unlink()
    code, report, _ = verify(tmp_path / "data")
    assert code == 1 and "not the tokenizer" in report["faults"][0] and "not finished" in report["faults"][1]


@pytest.fixture(params=[True, False])
def served(request, tmp_path):
    """(folder, URL) of a server that lists its files, or does not."""
    pytest.importorskip("aiohttp")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def list_directory(self, path):
            return super().list_directory(path) if request.param else self.send_error(403)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "served")) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield tmp_path / "served" / "data", f"http://127.0.0.1:{server.server_port}/data", request.param
        server.shutdown()


def test_data_at_a_url_has_the_faults_of_the_folder(made, served, verify, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.places.FIRST_WAIT", 0.001)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, url, lists = served
    shutil.copytree(made, folder)
    assert verify(url) == (0, {"path": url, "kind": "data", "whole": True, "checked": ["train", "validation"], "faults": []}, [])
    for name, damage in DAMAGE.items():
        damage(folder / name)
    code, report, lines = verify(url)
    local = verify(folder)[2]
    assert code == 1 and report["faults"] == lines
    beginnings = {line.replace(str(folder), "URL").partition(":")[0] for line in local if lists or "shard-" in line}
    # A cut or missing file is told by the server; a flipped one is fetched, and its fault found in it.
    assert {line.replace(url, "URL").partition(":")[0] for line in lines} == beginnings
    flipped = next(line for line in local if "000001" in line)
    assert flipped.replace(str(folder), url) in lines
    (folder / "train" / "index.json").write_text("{}")
    (folder / "validation" / "index.json").unlink()
    code, report, lines = verify(url, "--split", "train", "--split", "validation")
    assert code == 1 and f"{url}/train/index.json: missing key" in lines[0]
    assert ("not finished" if lists else "no such file") in lines[1] and lines[1].startswith(f"{url}/validation")
    shutil.rmtree(folder)
    code, report, lines = verify(url)
    assert code == 2 and report is None and len(lines) == 1 and lines[0].startswith(f"error: {url}")
    assert [path.name for path in tmp_path.iterdir()] == ["served"], "nothing is left behind"


def test_checkpoints(verify, tmp_path):
    for step in (1, 2):
        store.save_parameters(tmp_path / f"run/checkpoints/step-{step:08d}", {"w": torch.ones(3)}, {"config.yaml": "a: 1\n"})
    code, report, _ = verify(tmp_path / "run")
    assert code == 0 and report["kind"] == "checkpoint" and len(report["checked"]) == 2
    newest = tmp_path / "run/checkpoints/step-00000002"
    flip(newest / "model.safetensors")
    assert verify(tmp_path / "run/checkpoints/step-00000001")[0] == 0
    for path in (tmp_path / "run", newest):
        code, report, lines = verify(path)
        assert code == 1 and report["faults"] == lines and len(lines) == 1
        assert lines[0].startswith(f"{newest / 'model.safetensors'}: damaged")
    (newest / "manifest.json").unlink()
    assert verify(newest)[0] == 1


def test_what_is_neither(verify, tmp_path):
    for path in (tmp_path, tmp_path / "none", "pipe:echo", "http://127.0.0.1:9/a::b"):
        code, report, lines = verify(path)
        assert code == 2 and report is None and len(lines) == 1 and lines[0].startswith("error: ")
