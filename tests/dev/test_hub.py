"""Names on the Hugging Face hub, against a server here that speaks its protocol, and offline."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import SHORT, row

ROOT = Path(__file__).parents[2]
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


def lines(n, word):
    return "".join(json.dumps(row(prompt=f"{word} {i}?")) + "\n" for i in range(n)).encode()


REPOSITORIES = {
    ("datasets", "village/pairs"): {
        "main": {"data/train.jsonl": lines(9, "new"), "data/test.jsonl": lines(3, "test")},
        "v1": {"data/train.jsonl": lines(5, "old"), "data/test.jsonl": lines(3, "test")},
    },
    ("datasets", "village/sizes"): {
        "main": {
            f"round0/{n}k/{split}.jsonl": lines(n, "x")
            for n in (3, 33) for split in ("train", "test")
        }
    },
    ("datasets", "village/arrow"): {
        "main": {
            "data/train.arrow": b"arrow",
            "data/evil.pkl": b"pickle",
            "rows.jsonl": lines(40, "x"),
        }
    },
    ("models", "village/pickles"): {
        "main": {"a/config.json": b"{}", "a/pytorch_model.bin": b"pickle", "config.json": b"{}"}
    },
    ("models", "village/adapter"): {
        "main": {
            "adapter_config.json": b"{}",
            "adapter_model.safetensors": b"weights",
            "adapter_model.bin": b"pickle",
            "optimizer.pt": b"pickle",
        }
    },
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """GET and HEAD of what huggingface_hub asks for. What was asked is noted."""

    def do_GET(self, body=True):
        self.server.asked.append(self.path)
        status, headers, content = self.answer()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET(body=False)

    def log_message(self, *args):
        pass

    def answer(self):
        path = self.path.partition("?")[0]
        asks_info = re.fullmatch(r"/api/(\w+)/([^/]+/[^/]+)/(revision|tree)/([^/]+)(/.*)?", path)
        asks_file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if asks_info:
            kind, name, what, revision, _ = asks_info.groups()
        elif asks_file:
            kind, name, revision, file = asks_file.groups()
            kind = "datasets" if kind else "models"
        else:
            return 404, {}, b""
        revisions = self.server.repositories.get((kind, name))
        if revisions is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        revision = {commit: name for name, commit in COMMITS.items()}.get(revision, revision)
        if revision not in revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = revisions[revision]
        if asks_file:
            if file not in files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            etag = hashlib.sha1(files[file]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMITS[revision]}, files[file]
        if what == "tree":
            found = [
                {"type": "file", "path": path, "size": len(content), "oid": "0"}
                for path, content in files.items()
            ]
        else:
            found = {"id": name, "sha": COMMITS[revision], "siblings": [], "tags": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.repositories = [], dict(REPOSITORIES)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def environment(server, tmp_path_factory):
    """Of processes that know this hub alone, and a cache of their own."""
    return {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }


def call(command, environment, folder=ROOT):
    """(exit code, stdout, stderr) of a Python command line."""
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, text=True,
        capture_output=True,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


ASK = """
import sys
from lib import hub, records
for name in sys.argv[1:]:
    try:
        if name.startswith("model:"):
            print(sorted(p.name for p in hub.model_path(name[6:]).iterdir()))
        else:
            print([sum(1 for _ in split) for split in records.load(name).values()])
    except ValueError as e:
        print(e)
"""


def ask(names, environment, folder=ROOT):
    code, out, err = call(["-c", ASK, *names], environment, folder)
    assert not code, err
    return out.splitlines()


def test_names_revisions_and_folders(server, environment, tmp_path):
    (tmp_path / "village").mkdir()
    names = ["village/pairs", "village/pairs@v1", "village/sizes", "village/sizes/round0/33k",
             "village/pairs/", "village/arrow/rows.jsonl", "village/pairs/data@v1"]  # fmt: skip
    said = ask(names, environment)
    main, old = (f"village/pairs of the Hugging Face hub, revision {COMMITS[r]}" for r in COMMITS)
    assert said[:4] == [f"village/pairs: {main}", "[9, 3]", f"village/pairs@v1: {old}", "[5, 3]"]
    assert "once more, or another size of the same set" in said[5]
    assert said[7] == "[33, 33]" and said[9] == "[9, 3]" and said[13] == "[5, 3]"
    assert sum(map(int, said[11].strip("[]").split(","))) == 40
    adapter = ask(["model:village/adapter"], environment)[-1]
    assert adapter == "['adapter_config.json', 'adapter_model.safetensors']"
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    server.asked.clear()
    assert ask(names, offline) == said and not server.asked
    unreachable = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert ask(names[:2], unreachable) == said[:4]
    (tmp_path / "village" / "pairs").mkdir()
    for split, n in (("train", 2), ("test", 1)):
        (tmp_path / "village" / "pairs" / f"{split}.jsonl").write_bytes(lines(n, "here"))
    assert ask(names[:1], environment, tmp_path) == ["[2, 1]"], "what lies here comes first"


def test_what_the_hub_does_not_have(server, environment):
    server.asked.clear()
    said = ask(
        [
            "village/nothing", "village/pairs@v9", "model:village/pickles", "nothing",
            "some/where.jsonl", "model:a/b", "village/arrow/data/", "village/arrow/data/evil.pkl",
            "village/arrow/*", "village/pairs/nowhere", "model:village/pickles/a/",
        ],
        environment,
    )  # fmt: skip
    assert "village/nothing: no such file or folder here, and not to be had from" in said[0]
    assert "RepositoryNotFoundError" in said[0] and "RevisionNotFoundError" in said[1]
    assert "has no model*.safetensors there" in said[2] and "hf download village/pickles" in said[2]
    assert not any(
        f"{name}" in path
        for name in ("pytorch_model", "evil", "arrow/resolve")
        for path in server.asked
    ), "nothing else is fetched"
    assert all("no such file or folder; --data takes" in line for line in said[3:5])
    assert "RepositoryNotFoundError" in said[5]
    assert (
        "village/arrow/data/: the Hugging Face hub has no file of rows there; expected" in said[6]
    )
    assert "village/arrow/data/evil.pkl: the Hugging Face hub has no file of rows there" in said[7]
    assert "no such file or folder; --data takes" in said[8]
    assert "village/pairs/nowhere: the Hugging Face hub has no file of rows there" in said[9]
    assert "has no model*.safetensors there" in said[10]
    assert not any("where" in path for path in server.asked)


def test_a_run_from_names_alone_online_and_off(server, environment, finished, tmp_path):
    """Weights, tokenizer and pairs come by name; from then on no network is needed."""
    export = tmp_path / "model"
    code, _, err = call(["eval.py", finished, "--export", export], environment)
    assert not code, err
    (export / "consolidated.safetensors").write_bytes(b"the same weights once more")
    (export / "onnx").mkdir()
    (export / "onnx" / "model.safetensors").write_bytes(b"the same weights once more")
    server.repositories["models", "village/model"] = {
        "main": {
            str(path.relative_to(export)): path.read_bytes()
            for path in export.rglob("*") if path.is_file()
        }
    }  # fmt: skip
    flags = [*SHORT, "--init_from", "village/model", "--data", "village/pairs"]
    policies = []
    for name, more in (("online", {}), ("offline", {"HF_HUB_OFFLINE": "1"})):
        server.asked.clear()
        out = ["--out_dir", tmp_path / name]
        code, out, err = call(["train.py", *flags, *out], {**environment, **more})
        assert not code, err
        assert f"revision {COMMITS['main']}" in out and "9 train, 3 test rows" in out
        policies.append((tmp_path / name / "policy.pt").read_bytes())
        assert bool(server.asked) == (name == "online")
        assert not any("consolidated" in path or "onnx" in path for path in server.asked)
    assert policies[0] == policies[1]
