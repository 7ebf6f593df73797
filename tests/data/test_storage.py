"""Files at URLs: a store that answers as S3 does, and a server whose connections break."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto import settings as moto_settings
from moto.server import ThreadedMotoServer

from src import storage
from src.checkpoint.manifest import MANIFEST
from src.checkpoint.mirror import bring, bring_back
from src.checkpoint.steps import list_steps, number_of
from src.data.rows import read_solver_rows
from src.data.sources import files_of
from src.errors import UserError
from src.identity import held, held_rows
from src.logs import RunLog
from src.remote import local
from src.settings.declaration import build
from src.settings.scripts import SolverTrainSettings
from src.storage import names_in
from src.trainer.saving import Saving
from tests.launch import launch

ROWS = [{"instruction": f"question {i}", "output": "x" * 50} for i in range(2000)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint, monkeypatch):
    """A client of the store, which has a bucket."""
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.__class__.clear_instance_cache()
    store.makedirs("bucket", exist_ok=True)
    yield store
    store.rm("bucket", recursive=True)
    store.__class__.clear_instance_cache()


class Breaking(BaseHTTPRequestHandler):
    """Gives parts of files, breaks off in the middle of some of them, and refuses others."""

    files: dict[str, bytes] = {}
    asked: Counter[str] = Counter()
    breaks = 0  # so many more answers end in the middle

    def do_HEAD(self):
        self._answer(None)

    def do_GET(self):
        self._answer(self.files.get(self.path.partition("?")[0]))

    def _answer(self, body):
        cls, name = type(self), self.path.partition("?")[0]
        whole = self.files.get(name)
        if whole is None:
            code = {"/secret": 403, "/broken": 503}.get(name, 404)
            self.send_response(code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = whole[int(first) : int(last) + 1 if last else None]
        is_part = "Range" in self.headers and name != "/whole.jsonl"
        if name == "/whole.jsonl":
            part = whole
        self.send_response(206 if is_part else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes" if name != "/whole.jsonl" else "none")
        self.send_header("ETag", f'"{hash(whole)}"')
        if is_part:
            start = int(first)
            span = f"bytes {start}-{start + len(part) - 1}/{len(whole)}"
            self.send_header("Content-Range", span)
        self.end_headers()
        if body is None:
            return
        cls.asked[name] += len(part)
        if cls.breaks and len(part) > 100:
            cls.breaks -= 1
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    """The address of such a server; its class says what it has and how it breaks."""
    Breaking.files, Breaking.asked, Breaking.breaks = {}, Counter(), 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Breaking)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def refusal(action, *arguments) -> str:
    with pytest.raises(UserError) as error:
        action(*arguments)
    return str(error.value)


# --- rows -----------------------------------------------------------------------------------------


def test_rows_are_read_from_files_folders_and_patterns_of_a_store(s3, tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet", row_group_size=700)
    s3.pipe_file("bucket/data/a.jsonl", TEXT)
    s3.put_file(str(tmp_path / "b.parquet"), "bucket/data/deep/b.parquet")
    s3.pipe_file("bucket/data/README.md", b"none")
    expected = [row | {"outputs": [row["output"]]} for row in ROWS]
    rows = read_solver_rows("s3://bucket/data/a.jsonl")
    assert rows == expected and rows.places[1] == "s3://bucket/data/a.jsonl:2"
    assert read_solver_rows("s3://bucket/data/deep/b.parquet") == expected
    assert files_of("s3://bucket/data") == ["s3://bucket/data/a.jsonl"]
    both = ["s3://bucket/data/a.jsonl", "s3://bucket/data/deep/b.parquet"]
    assert files_of("s3://bucket/**/*.[jp]*") == both
    assert files_of(f"{both[1]},{both[0]}") == both[::-1]
    s3.pipe_file("bucket/data/a.jsonl", TEXT + b"{}\n")
    assert "s3://bucket/data/a.jsonl:2001: " in refusal(read_solver_rows, both[0])


def test_what_a_remote_file_holds_is_part_of_a_run_s_identity(s3):
    s3.pipe_file("bucket/a.jsonl", TEXT)
    before = held_rows("s3://bucket/a.jsonl")
    assert held_rows("s3://bucket/a.jsonl") == before
    s3.pipe_file("bucket/a.jsonl", TEXT.replace(b"question 7", b"Question 7"))
    assert held_rows("s3://bucket/a.jsonl") != before


def test_a_store_that_tells_no_version_is_read_for_it(monkeypatch):
    store = fsspec.filesystem("memory")
    info = store.info
    monkeypatch.setattr(
        store, "info", lambda path: {k: v for k, v in info(path).items() if k != "created"}
    )
    found = []
    for text in (TEXT, TEXT.replace(b"question 7", b"Question 7"), TEXT):
        store.pipe_file("/v/a.jsonl", text)
        found.append(held_rows("memory://v/a.jsonl"))
    assert found[0] == found[2] != found[1]


def test_the_memory_protocol_is_a_url_like_others():
    store = fsspec.filesystem("memory")
    store.pipe_file("/d/a.jsonl", TEXT)
    assert (
        len(read_solver_rows("memory://d/a.jsonl")) == len(read_solver_rows("memory://d")) == 2000
    )
    assert storage.fetched("memory://d/a.jsonl").read_bytes() == TEXT


# --- connections that break -----------------------------------------------------------------------


@pytest.mark.parametrize("breaks", [0, 1, 5])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(web, monkeypatch, breaks):
    monkeypatch.setattr(storage, "BLOCK", 10_000)
    Breaking.files = {"/a.jsonl": TEXT}
    Breaking.breaks = breaks
    rows = read_solver_rows(f"{web}/a.jsonl?download=true")
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in ROWS]
    assert Breaking.breaks == 0
    assert len(TEXT) <= Breaking.asked["/a.jsonl"] <= len(TEXT) + breaks * 10_000


def test_a_connection_that_always_breaks_is_given_up(web):
    Breaking.files, Breaking.breaks = {"/a.jsonl": TEXT}, 10**9
    assert f"{web}/a.jsonl: cannot be reached" in refusal(read_solver_rows, f"{web}/a.jsonl")


def test_a_fetch_that_was_cut_off_goes_on(web, monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "BLOCK", 10_000)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    Breaking.files = {"/a.bin": TEXT}
    read, calls = storage.read_range, []

    def stop_at_the_fifth(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise UserError("the plug is pulled")
        return read(*arguments)

    monkeypatch.setattr(storage, "read_range", stop_at_the_fifth)
    assert "plug" in refusal(storage.fetched, f"{web}/a.bin")
    assert not list(tmp_path.glob("cache/fetched/*/a.bin")), "nothing half stands for the whole"
    assert storage.fetched(f"{web}/a.bin").read_bytes() == TEXT
    assert Breaking.asked["/a.bin"] == len(TEXT), "no block came twice"
    assert storage.fetched(f"{web}/a.bin").read_bytes() == TEXT
    assert Breaking.asked["/a.bin"] == len(TEXT), "the cache has it"


def test_of_several_processes_one_fetches(web):
    Breaking.files = {"/a.bin": TEXT * 20}
    code = f"from src import storage; print(storage.fetched({web + '/a.bin'!r}))"
    command = [sys.executable, "-c", code]
    options = dict(stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    processes = [subprocess.Popen(command, **options) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(paths) == 1 and Path(paths.pop()).read_bytes() == TEXT * 20
    assert Breaking.asked["/a.bin"] == len(TEXT) * 20


# --- what is wrong --------------------------------------------------------------------------------


def test_what_is_wrong_with_a_store_is_one_message_each(s3, endpoint, monkeypatch):
    s3.pipe_file("bucket/a.jsonl", TEXT)
    said = {
        "s3://bucket/b.jsonl": "s3://bucket/b.jsonl: is not there",
        "s3://gone/a.jsonl": "s3://gone/a.jsonl: there is no bucket gone",
        "s3://bucket/*.csv": "s3://bucket/*.csv: no file is called so",
        "gs://bucket/a.jsonl": "cannot be opened: Please install gcsfs",
        "what://bucket/a.jsonl": "cannot be opened: Protocol not known: what",
    }
    for url, words in said.items():
        for read in (read_solver_rows, storage.fetched):
            if "*" not in url:
                assert words in refusal(read, url)
    assert said["s3://bucket/*.csv"] in refusal(read_solver_rows, "s3://bucket/*.csv")
    assert "there is no bucket gone" in refusal(storage.check_writable, "s3://gone/out")
    # Credentials that the store does not know, and none at all.
    monkeypatch.setattr(moto_settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    for action in (read_solver_rows, storage.fetched, storage.check_writable):
        message = refusal(action, "s3://bucket/a.jsonl")
        assert "s3://bucket/a.jsonl: is refused: " in message and "credentials" in message
    s3.__class__.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert "Unable to locate credentials" in refusal(read_solver_rows, "s3://bucket/a.jsonl")
    monkeypatch.setattr(moto_settings, "INITIAL_NO_AUTH_ACTION_COUNT", float("inf"))


def test_what_is_wrong_with_a_web_address(web):
    Breaking.files = {"/whole.jsonl": TEXT}
    said = {
        f"{web}/secret": "is refused: 403",
        f"{web}/broken": "cannot be reached: 503",
        f"{web}/gone.jsonl": "is not there",
        "http://127.0.0.1:9/a.jsonl": "cannot be reached: Cannot connect to host",
    }
    for url, words in said.items():
        assert f"{url}: {words}" in refusal(storage.opened, url)


# --- folders --------------------------------------------------------------------------------------


def test_a_folder_is_fetched_whole_and_anew_when_it_changes(s3):
    for name in ("config.json", "model.safetensors", "adapter/adapter_config.json"):
        s3.pipe_file(f"bucket/models/x/{name}", name.encode())
    folder = storage.fetched("s3://bucket/models/x/")
    assert folder.name == "x" and (folder / "adapter/adapter_config.json").is_file()
    assert storage.fetched("s3://bucket/models/x") == folder
    s3.pipe_file("bucket/models/x/config.json", b"another")
    other = storage.fetched("s3://bucket/models/x")
    assert other != folder and (other / "config.json").read_bytes() == b"another"
    assert (folder / "config.json").read_bytes() == b"config.json"
    single = storage.fetched("s3://bucket/models/x/config.json", ["model.safetensors", "none"])
    assert sorted(os.listdir(single.parent)) == ["config.json", "model.safetensors"]


def test_a_key_that_leads_out_of_its_folder_is_refused(tmp_path, monkeypatch):
    store = fsspec.filesystem("memory")
    store.pipe_file("/m/x/a.json", b"a")
    find = store.find

    def with_another(path, **options):
        return find(path, **options) | {f"{path}/../../../../b.json": store.info("/m/x/a.json")}

    monkeypatch.setattr(store, "find", with_another)
    with pytest.raises(UserError, match=r"memory://m/x: holds .*b.json, which would be kept out"):
        storage.fetched("memory://m/x")


def test_a_folder_is_uploaded_in_place_of_another_and_its_manifest_last(s3, tmp_path, monkeypatch):
    for name in ("a/1.pth", "manifest.json", "z.json"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(name)
    for name in ("manifest.json", "stale.pth"):
        s3.pipe_file(f"bucket/out/{name}", b"old")
    seen = []
    put = storage._put

    def watched(fs, source, path, url):
        s3.invalidate_cache()
        seen.append((source.name, s3.exists("bucket/out/manifest.json")))
        put(fs, source, path, url)

    monkeypatch.setattr(storage, "_put", watched)
    storage.upload(tmp_path / "out", "s3://bucket/out/")
    assert seen == [("1.pth", False), ("z.json", False), ("manifest.json", False)]
    s3.invalidate_cache()
    found = {name.removeprefix("bucket/out/") for name in s3.find("bucket/out")}
    assert found == {"a/1.pth", "manifest.json", "z.json"}
    assert s3.cat_file("bucket/out/manifest.json") == b"manifest.json"
    storage.check_writable("s3://bucket/new/out")
    assert not s3.exists("bucket/new")


# --- settings -------------------------------------------------------------------------------------


def settings_of(**values) -> SolverTrainSettings:
    return build(SolverTrainSettings, {"train_file": "s3://bucket/a.jsonl", **values})


def test_settings_with_urls_become_local_paths_and_are_logged_as_given(s3, tmp_path):
    for name in ("models/x/config.json", "models/x/tokenizer.model", "tokenizer_config.json"):
        s3.pipe_file(f"bucket/{name}", name.encode())
    s3.pipe_file("bucket/tokenizer.json", b"{}")
    s3.pipe_file("bucket/my_rows.py", b"def f(row):\n    return row\n")
    given = settings_of(
        ckpt_dir="s3://bucket/models/x",
        tokenizer_file="s3://bucket/tokenizer.json",
        map="s3://bucket/my_rows.py:f",
        save_dir="s3://bucket/out/",
        log_dir=str(tmp_path / "logs"),
    )
    with local(given) as settings:
        assert (Path(settings.model.ckpt_dir) / "tokenizer.model").is_file()
        beside = Path(settings.model.tokenizer_file).parent
        assert sorted(os.listdir(beside)) == ["tokenizer.json", "tokenizer_config.json"]
        file, _, function = settings.data.map.rpartition(":")
        assert Path(file).is_file() and function == "f"
        assert settings.data.train_file == "s3://bucket/a.jsonl"
        assert settings.saving.log_dir == given.saving.log_dir
        out = Path(settings.saving.save_dir)
        assert out.name == "out" and out.is_relative_to(storage.cache_dir())
        with RunLog(str(tmp_path / "logs"), "test", settings, 0):
            pass
        for name in ("out/model", "out-logs/log", "out-best/model", "out-state/step"):
            (out.parent / name).parent.mkdir()
            (out.parent / name).write_text(name)
    text = (tmp_path / "logs" / "settings.yaml").read_text()
    assert "ckpt_dir: s3://bucket/models/x" in text and str(tmp_path / "cache") not in text
    s3.invalidate_cache()
    assert s3.find("bucket/out") == ["bucket/out/model"]
    assert s3.exists("bucket/out-logs/log") and s3.exists("bucket/out-best/model")
    assert not s3.exists("bucket/out-state"), "steps stay where the run is"
    # Nothing was written since: nothing is uploaded.
    os.utime(out / "model", (0, 0))
    os.utime(out, (0, 0))
    s3.rm("bucket/out", recursive=True)
    with local(given):
        pass
    s3.invalidate_cache()
    assert not s3.exists("bucket/out")


def test_a_url_that_is_wrong_names_its_setting(s3):
    for name, url, words in (
        ("ckpt_dir", "s3://bucket/gone", "is not there"),
        ("save_dir", "s3://gone/out", "there is no bucket gone"),
    ):
        given = {"ckpt_dir": "x", "save_dir": "y"} | {name: url}
        message = refusal(local(settings_of(**given)).__enter__)
        assert message == f"--{name} {url}: {words}" + ", or none for these credentials" * (
            name == "save_dir"
        )


def test_fetched_weights_are_known_on_every_machine(s3, monkeypatch, tmp_path):
    """Without a manifest they are known by names, sizes and times of change."""
    s3.pipe_file("bucket/x/model.safetensors", b"weights")
    s3.pipe_file("bucket/x/config.json", b"{}")
    known = set()
    for machine in "ab":
        monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / machine))
        known.add(held(str(storage.fetched("s3://bucket/x"))))
    assert len(known) == 1
    s3.pipe_file("bucket/x/model.safetensors", b"Weights")
    assert held(str(storage.fetched("s3://bucket/x"))) not in known


def test_a_run_at_urls_is_the_run_at_local_paths(s3, tmp_path, monkeypatch):
    """Two ranks: a start, training, a look at the result, all in the bucket; another machine."""
    s3.pipe_file("bucket/rows.jsonl", TEXT)
    (tmp_path / "rows.jsonl").write_bytes(TEXT)
    tiny = {"vocab_size": 390, "dim": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}
    begin = {"train_file": "s3://bucket/rows.jsonl", "save_dir": "s3://bucket/start", **tiny}
    how = {"max_batch_size": 500, "lr": 1e-2, "max_seq_len": 64, "model_parallel_size": 2}
    how |= {"ckpt_dir": "s3://bucket/start", "save_every": 3}

    def trained(place):
        files = {"train_file": f"{place}/*.jsonl", "save_dir": f"{place}/out"}
        yield "solver_train.py", files | how
        yield "checkpoint_verify.py", {"ckpt_dir": f"{place}/out"}

    def run(*chain):
        commands = [[script, *(f"--{k}={v}" for k, v in flags.items())] for script, flags in chain]
        (tmp_path / "commands.json").write_text(json.dumps(commands))
        launch(2, "tests/script_chain.py", str(tmp_path / "commands.json"))
        s3.invalidate_cache()
        for file in (tmp_path / "out").iterdir():
            if file.name != MANIFEST:
                assert s3.cat_file(f"bucket/out/{file.name}") == file.read_bytes(), file.name
        assert len(s3.ls("bucket/out")) == len(os.listdir(tmp_path / "out")) > 3
        assert names_in("s3://bucket/out-state") == ["step-00000003/"]
        return s3.cat_file("bucket/out-logs/solver_train.log").decode()

    log = run(("dataset/start.py", begin), *trained("s3://bucket"), *trained(tmp_path))
    assert "goes on after" not in log
    monkeypatch.setenv(storage.CACHE_VARIABLE, str(tmp_path / "another machine's"))
    s3.rm("bucket/out", recursive=True)
    assert "goes on after step 3" in run(*trained("s3://bucket"))


def step_of(folder, number, text):
    """A folder that looks like a step."""
    step = folder / f"step-{number:08d}"
    step.mkdir(parents=True)
    (step / "policy.safetensors").write_text(text)
    (step / MANIFEST).write_text(json.dumps({"step": number, "text": text}))
    return step


def test_steps_at_a_url_are_those_of_the_folder(s3, tmp_path):
    folder, other, url = tmp_path / "a-state", tmp_path / "b-state", "s3://bucket/a-state"
    bring_back(other, url)
    assert not other.exists(), "there is nothing yet"
    for number in (1, 2):
        step_of(folder, number, "old")
    bring(folder, url)
    shutil.rmtree(folder / "step-00000001")
    (folder / "step-00000002").rename(tmp_path / "aside")
    step_of(folder, 2, "of another run")
    step_of(folder, 3, "new")
    bring(folder, url)
    assert names_in(url) == ["step-00000002/", "step-00000003/"]
    assert json.loads(s3.cat_file("bucket/a-state/step-00000002/manifest.json"))["text"] == (
        "of another run"
    )
    # One whose upload was cut off is none.
    s3.pipe_file("bucket/a-state/step-00000004/policy.safetensors", b"half")
    for _ in range(2):
        bring_back(other, url)
    assert [step.name for step in list_steps(other)] == ["step-00000003"]
    for name in ("policy.safetensors", MANIFEST):
        written = (folder / "step-00000003" / name).read_bytes()
        assert (other / "step-00000003" / name).read_bytes() == written
    # What is newer here stays.
    step_of(other, 5, "newer")
    bring_back(other, url)
    assert [number_of(step) for step in list_steps(other)] == [3, 5]


def test_an_upload_that_fails_is_a_warning_and_made_up_for(s3, tmp_path):
    said = []
    earlier = SimpleNamespace(folder=tmp_path / "a-state", url="s3://no-bucket/a-state")
    saving = SimpleNamespace(earlier=earlier, log=SimpleNamespace(warning=said.append))
    step_of(earlier.folder, 1, "first")
    Saving._mirror(saving)
    assert len(said) == 1 and "no-bucket" in said[0] and "after the next one" in said[0]
    step_of(earlier.folder, 2, "second")
    earlier.url = "s3://bucket/a-state"
    Saving._mirror(saving)
    assert len(said) == 1 and names_in(earlier.url) == ["step-00000001/", "step-00000002/"]
