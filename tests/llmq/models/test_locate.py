"""Hub ids, against a small server that speaks the hub's download API; every download in a process of its own."""

import hashlib
import importlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from commands import ENVIRONMENT, error_of
from forked import run_forked
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny import save_tiny

from llmq import QuantizeConfig, quantize
from llmq.core.errors import RequestError
from llmq.models.locate import locate
from llmq.models.safetensors_files import INDEX

REPO = "someone/tiny-llama"
# What a user may have set for the hub must not reach the test.
SETTINGS = re.compile("HF_|HUGGING|TRANSFORMERS_|.*_PROXY$", re.IGNORECASE)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one directory as the repository REPO. What goes wrong is set by the test.

    Attributes:
        cut: names of files whose connection breaks off midway -> how many times more.
        gone: names that are listed but not there.
        gated: nobody may download.
        asked: every request, as "METHOD path".
    """

    daemon_threads = True

    def __init__(self, directory):
        super().__init__(("127.0.0.1", 0), Answer)
        self.directory = directory
        self.cut, self.gone, self.gated, self.asked = {}, set(), False, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """The four kinds of requests that a download consists of: revision, tree, file metadata, file."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if path == f"/api/models/{REPO}/revision/main":
            self.send_json({"id": REPO, "sha": COMMIT, "siblings": []})
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            self.send_json([self.entry(file) for file in sorted(self.server.directory.iterdir())])
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            self.resolve(self.server.directory / path.rpartition("/")[2])
        elif path.startswith("/storage/"):
            self.send_file(self.server.directory / path.rpartition("/")[2])
        else:
            self.send(404, {"X-Error-Code": "RepoNotFound"})

    def entry(self, file):
        entry = {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": etag(file)}
        if file.suffix == ".safetensors":
            entry["lfs"] = {"oid": etag(file), "size": file.stat().st_size, "pointerSize": 134}
        return entry

    def resolve(self, file):
        if self.server.gated:
            self.send(403, {"X-Error-Code": "GatedRepo"})
        elif file.name in self.server.gone:
            self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif file.suffix == ".safetensors":  # large files live elsewhere
            linked = {"X-Linked-Etag": f'"{etag(file)}"', "X-Linked-Size": str(file.stat().st_size)}
            location = {"Location": f"{self.server.url}/storage/{file.name}"}
            self.send(302, {"X-Repo-Commit": COMMIT, **linked, **location})
        else:
            self.send_file(file)

    def send_json(self, content):
        self.send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def send_file(self, file):
        body = file.read_bytes()
        stays = len(body)
        if self.command == "GET" and self.server.cut.get(file.name, 0):
            self.server.cut[file.name] -= 1
            stays, self.close_connection = len(body) // 2, True
        self.send(200, {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT}, body, stays)

    def send(self, status, headers, body=b"", stays=None):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:stays])

    def log_message(self, *_):
        pass


def etag(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A tiny model in shards, with files beside it that nobody asked for."""
    directory = save_tiny(tmp_path_factory.mktemp("sharded"), shard_size="200KB")
    (directory / "pytorch_model.bin").write_bytes(b"pickled")
    (directory / "consolidated.safetensors").write_bytes(b"the weights once more")
    (directory / "modeling_own.py").write_text("raise SystemExit('must not run')")
    return directory


@pytest.fixture
def hub(sharded, tmp_path):
    server = Hub(shutil.copytree(sharded, tmp_path / "served"))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def quantize_from(tmp_path):
    """Run the command in a process that knows no hub but this one; its cache lasts as long as the test."""

    def quantize_from(url, repo=REPO):
        environment = {key: value for key, value in ENVIRONMENT.items() if not SETTINGS.match(key)}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_ETAG_TIMEOUT": "3", "HF_HUB_DOWNLOAD_TIMEOUT": "3", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
        arguments = ("--model", repo, "--output", tmp_path / "out", "--method", "rtn", "--group-size", "32")
        # The hub's client reads its environment when it is imported.
        options = {"cwd": tmp_path, "env": environment, "preexec_fn": lambda: importlib.reload(constants)}
        return run_forked("llmq.quantize", *arguments, **options)

    return quantize_from


def test_a_sharded_model_quantizes_from_its_hub_id_as_from_its_directory(hub, sharded, quantize_from, tmp_path):
    result = quantize_from(hub.url)
    assert result.returncode == 0, result.stderr
    config = QuantizeConfig(str(sharded), tmp_path / "local", method="rtn", group_size=32)
    expected = load_file(quantize(config) / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(written[name].equal(expected[name]) for name in expected)
    fetched = {request.rpartition("/")[2] for request in hub.asked if request.startswith("GET /storage/")}
    assert fetched == {shard.name for shard in sharded.glob("model-*.safetensors")}
    assert len(fetched) > 2
    assert len(list((tmp_path / "hf").rglob("model-*.safetensors"))) == len(fetched)
    assert not [request for request in hub.asked if request.endswith((".bin", ".py"))]


def test_a_connection_that_breaks_off_once_does_not_stop_the_download(hub, sharded, quantize_from, tmp_path):
    shard = sorted(sharded.glob("model-*"))[1].name
    hub.cut[shard] = 1
    result = quantize_from(hub.url)
    assert result.returncode == 0, result.stderr
    assert hub.asked.count(f"GET /storage/{shard}") == 2
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_interrupted_download_fails_plainly_and_the_next_run_fetches_only_the_rest(
    hub, sharded, quantize_from, tmp_path
):
    first, broken = (path.name for path in sorted(sharded.glob("model-*"))[:2])
    hub.cut[broken] = 1000
    result = quantize_from(hub.url)
    assert result.returncode == 1
    assert f"downloading {REPO} failed" in error_of(result)
    assert "run the same command again" in error_of(result)
    assert not (tmp_path / "out").exists()

    hub.cut.clear()
    hub.asked.clear()
    result = quantize_from(hub.url)
    assert result.returncode == 0, result.stderr
    assert f"GET /storage/{broken}" in hub.asked
    assert f"GET /storage/{first}" not in hub.asked


def test_a_shard_that_the_repository_lacks_is_named(hub, quantize_from, tmp_path):
    shard = sorted(hub.directory.glob("model-*"))[1]
    shard.unlink()
    assert shard.name in (hub.directory / INDEX).read_text()
    result = quantize_from(hub.url)
    assert result.returncode == 1
    assert f"{shard.name} is missing; fetch the model again" in error_of(result)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_listed_but_gone_is_named(hub, quantize_from):
    shard = sorted(hub.directory.glob("model-*"))[0]
    hub.gone.add(shard.name)
    result = quantize_from(hub.url)
    assert result.returncode == 1
    assert shard.name in error_of(result)


def test_an_unknown_repository_is_a_wrong_request(hub, quantize_from):
    result = quantize_from(hub.url, "someone/tiny-lama")
    assert result.returncode == 2
    assert "no such model: 'someone/tiny-lama'" in error_of(result)


def test_a_gated_repository_says_how_to_get_in(hub, quantize_from):
    hub.gated = True
    result = quantize_from(hub.url)
    assert result.returncode == 2
    assert f"{REPO} is gated" in error_of(result)
    assert "hf auth login" in error_of(result)


def test_a_hub_out_of_reach_is_named_as_such(quantize_from):
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    result = quantize_from(url)
    assert result.returncode == 1
    assert "the hub cannot be reached" in error_of(result)


@pytest.mark.parametrize("spec", ["some one/model", "a/b/c", "./model", "../model", "org/", "", "m.gguf", "org/a--b"])
def test_what_cannot_be_a_hub_id_is_refused_without_asking_the_hub(spec):
    with pytest.raises(RequestError, match="no such model"):
        locate(spec)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(RequestError, match=r"neither a model directory nor a \.gguf file"):
        locate(str(tmp_path / "model.bin"))
