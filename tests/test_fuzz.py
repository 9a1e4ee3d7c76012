"""Whatever is sent to the page, it answers with a result or one sentence, and touches nothing outside its runs.

FADING_SHORTCUTS_FUZZ=10000 sends so many requests instead of a few hundred, other ones each time.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from app.guard import UNUSABLE
from tests.conftest import ROOT
from tests.screenshot import free_port
from tests.tiny_pair import DECAYED, PAIR, PLAIN, write_pair

MANY = int(os.environ.get("FADING_SHORTCUTS_FUZZ", 0))
REQUESTS = MANY or 150
PATIENCE_S = 60.0  # of a request
START_S = 120.0
CANARY = "canary-5f0c2d9e"  # stands in every file that nobody may read
API = "/gradio_api"
JSON, FORM = {"Content-Type": "application/json"}, {"Content-Type": "application/x-www-form-urlencoded"}
pytestmark = pytest.mark.slow


# ------------------------------------------------------------------------------------------------------------ the page


@dataclass
class Answer:
    """What came back: the status of HTTP, and the body (of a stream: of its last event)."""

    status: int
    text: str
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Page:
    """A real page in a sandbox, and a connection to it."""

    sandbox: Path
    port: int
    process: subprocess.Popen

    @property
    def log(self) -> str:
        return (self.sandbox / "page.log").read_text(errors="replace")

    def exchange(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        """One request, its path as it stands: nobody resolves `..` on the way."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            endless = "event-stream" in response.getheader("Content-Type", "")
            text = "" if endless else response.read().decode(errors="replace")
            return Answer(response.status, text, dict(response.getheaders()))

    def stream(self, path: str, until: re.Pattern) -> Answer:
        """Read a stream of events until one matches."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            lines = []
            while line := response.readline().decode(errors="replace"):
                assert time.monotonic() < deadline, f"{path} takes longer than {PATIENCE_S} s"
                lines.append(line)
                if until.search("".join(lines[-2:])):
                    break
            return Answer(response.status, "".join(lines))

    @cached_property
    def named(self) -> dict[str, dict[str, str]]:
        """Endpoints for programs -> the types of their parameters, by name."""
        told = json.loads(self.exchange("GET", f"{API}/info").text)["named_endpoints"]
        return {
            name[1:]: {each["parameter_name"]: each["python_type"]["type"] for each in endpoint["parameters"]}
            for name, endpoint in told.items()
        }

    @cached_property
    def handlers(self) -> dict[int, list[Any]]:
        """Handlers of the widgets -> what a browser would send them at first."""
        config = json.loads(self.exchange("GET", "/config").text)
        values = {each["id"]: each["props"].get("value") for each in config["components"]}
        there = {each["id"]: [values.get(id) for id in each["inputs"]] for each in config["dependencies"] if each["backend_fn"]}
        return json.loads(re.sub("openmoji-(?:plain|decayed)", PLAIN, json.dumps(there)), object_hook=_int_keys)


def _int_keys(table: dict[str, Any]) -> dict[Any, Any]:
    return {int(key) if key.isdigit() else key: value for key, value in table.items()}


@contextlib.contextmanager
def page_in(sandbox: Path, *flags: str) -> Iterator[Page]:
    """Run `python -m app` with the working directory, home and caches inside `sandbox`; afterwards nothing of it runs."""
    for name in ("work", "home", "cache", "data", "outside"):
        (sandbox / name).mkdir(parents=True)
    write_pair(sandbox / "runs")
    shutil.copytree(sandbox / "runs" / "tiny-plain", sandbox / "outside" / "tiny-plain")
    for bait in ("secret.txt", "home/.bashrc", "outside/secret.png", "work/secret.json", "data/secret.txt", "outside/tiny-plain/x.txt"):
        (sandbox / bait).write_text(f'{{"{CANARY}": 1}}')
    caches = dict.fromkeys(("XDG_CACHE_HOME", "HF_HOME", "TMPDIR", "GRADIO_TEMP_DIR", "MPLCONFIGDIR"), str(sandbox / "cache"))
    environment = {**os.environ, **caches, "HOME": str(sandbox / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    port = free_port()
    command = [sys.executable, "-m", "app", "--runs", str(sandbox / "runs"), "--port", str(port), *flags]
    with (sandbox / "page.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=sandbox / "work", env=environment, stdout=log, stderr=subprocess.STDOUT)
    page = Page(sandbox, port, process)
    try:
        deadline = time.monotonic() + START_S
        while "is ready on" not in page.log:
            assert process.poll() is None and time.monotonic() < deadline, page.log
            time.sleep(0.1)
        yield page
    finally:
        for each in (*psutil.Process(process.pid).children(recursive=True), process):  # trainings too
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.wait()


def snapshot(sandbox: Path) -> dict[str, tuple[int, str]]:
    """Every file and folder that the page has no business with: when it was changed, and what it holds."""
    own = {sandbox / name for name in ("runs", "cache", "page.log")}
    files = (path for path in sandbox.rglob("*") if not own & {path, *path.parents})
    return {
        str(path.relative_to(sandbox)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in files
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Iterator[Page]:
    sandbox = tmp_path_factory.mktemp("fuzz") / "sandbox"
    with page_in(sandbox, "--data", str(sandbox / "data")) as started:
        shutil.copytree(image_folder, sandbox / "data" / "images")
        before = snapshot(sandbox)
        yield started
        assert snapshot(sandbox) == before, "something outside the runs was changed"


# ---------------------------------------------------------------------------------------------------------- what is sent


def hostile(sandbox: Path) -> st.SearchStrategy:
    """Values of every type of JSON, those that break programs among them."""
    paths = ["..", ".", "/", "../secret.txt", "../outside/tiny-plain", "runs/../../outside/tiny-plain", "~", "~/.bashrc", "a\\..\\b"]
    paths += ["....//....//secret.txt", "%2e%2e/secret.txt", "file:///etc/passwd", "/etc/passwd", "/proc/self/environ"]
    paths += [str(sandbox / name) for name in ("secret.txt", "outside/tiny-plain", "home/.bashrc", "outside/secret.png")]
    words = ["", " ", "\0", "x\0y", "\n", "\r\nx: y", "\ud800", "\u202e", "--help", "-1", "nan", "1e999", "{}"]
    words += ["<script>alert(1)</script>", "'; drop table votes; --", "${HOME}", "$(id)", "%s%n", "NaN", "None", "null", "COM1", "é" * 70]
    text = (
        st.sampled_from([*paths, *words])
        | st.builds(str.__mul__, st.just("x"), st.sampled_from([300, 100_000]))
        | st.text(st.characters(), max_size=20)
    )
    whole = st.sampled_from([0, -1, 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400]) | st.integers(-300, 300)
    number = whole | st.floats() | st.sampled_from([1e308, -0.0, 1e-320])
    file = st.fixed_dictionaries({"path": text, "meta": st.just({"_type": "gradio.FileData"})}, optional={"url": text, "orig_name": text})
    deep = st.sampled_from([nested(60), nested(400)])
    leaves = st.none() | st.booleans() | number | text | file | deep
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=8)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def sensible() -> dict[str, st.SearchStrategy]:
    """By the name of a parameter, values that get past the first check; by its type for those that are new."""
    flags = {"max_train_steps": st.sampled_from([1, 2]), "resolution": st.just(8), "patch_size": st.just(4), "train_batch_size": st.just(4)}
    data = {"train_data_dir": st.just("images"), "report_to": st.just("none"), "sample_steps": st.just(0)}
    return {
        "checkpoints": st.lists(st.sampled_from(PAIR), min_size=1, max_size=3),
        "checkpoint": st.sampled_from(PAIR),
        "label": st.sampled_from(["circles", "no label", "1"]),
        "num_images": st.integers(1, 3),
        "steps": st.integers(1, 4),
        "sampler": st.sampled_from(["own", "euler", "heun", "dpm++"]),
        "name": st.sampled_from(["run-1", "run-2", "tiny-plain"]),
        "options": st.fixed_dictionaries({**flags, **data}, optional={"alpha_min": st.floats(0, 2)}),
        "measure": st.sampled_from(["FD", "probes"]),
        "reference": st.sampled_from(["openmoji", "images"]),
        "num_samples": st.integers(2, 9),
        "int": st.integers(-1, 8),
        "float": st.floats(0, 5),
        "bool": st.booleans(),
        "str": st.sampled_from(PAIR),
    }


def changed(values: st.SearchStrategy, rubbish: st.SearchStrategy) -> st.SearchStrategy:
    """Lists of arguments with some of them replaced, too few or too many."""

    @st.composite
    def draw_one(draw: Any) -> list[Any]:
        arguments = list(draw(values))
        for i in draw(st.lists(st.integers(0, max(0, len(arguments) - 1)), max_size=3)):
            arguments[i : i + 1] = [draw(rubbish)]
        how_many = draw(st.sampled_from(["as they are"] * 8 + ["fewer", "more"]))
        if how_many == "fewer":
            del arguments[draw(st.integers(0, len(arguments))) :]
        return arguments + (draw(st.lists(rubbish, min_size=1, max_size=3)) if how_many == "more" else [])

    return draw_one()


@dataclass(frozen=True)
class Request:
    """One call of an endpoint.

    Attributes:
        how: "call" by its name, "run" directly, or "join" as browsers do, by its number.
        endpoint: name or number.
        data: the arguments; a JSON text as it stands where that is what is tried.
    """

    how: str
    endpoint: str | int
    data: Any


def requests(page: Page) -> st.SearchStrategy:
    """Calls of every endpoint for programs and of every handler of a widget."""
    rubbish, good = hostile(page.sandbox), sensible()
    odd_flags = ["preset", "vae", "init_from", "resolution", "output_dir", "learning_rate", "dataset_name", "x"]
    good["options"] |= st.dictionaries(st.sampled_from(odd_flags), rubbish)

    def called(name: str) -> st.SearchStrategy:
        arguments = st.tuples(*(good.get(parameter, good.get(kind, rubbish)) for parameter, kind in page.named[name].items()))
        return st.builds(Request, st.sampled_from(["call", "run"]), st.just(name), changed(arguments, rubbish))

    def handled(number: int) -> st.SearchStrategy:
        return st.builds(Request, st.just("join"), st.just(number), changed(st.just(page.handlers[number]), rubbish))

    bodies = st.sampled_from(["", "[", "null", "[]", '"x"', '{"data": {}}', '{"data": "x"}', '{"data": null}', "\x80", "{" * 99])
    bodies |= st.builds(str.__mul__, st.just("["), st.just(100_000)) | st.text(st.characters(codec="utf-8"), max_size=30)
    names = st.sampled_from([*page.named, "nonsense", "..", "0", "lambda_3"])
    broken = st.builds(Request, st.sampled_from(["call", "call/v2", "run"]), names, bodies)
    strange = st.builds(Request, st.just("join"), st.integers(-3, 10**6) | rubbish, st.lists(rubbish, max_size=3))
    kinds = {
        "named": st.sampled_from(sorted(page.named)).flatmap(called),
        "handlers": st.sampled_from(sorted(page.handlers)).flatmap(handled),
        "broken": broken | strange,
    }
    return st.sampled_from(["named", "named", "named", "handlers", "handlers", "broken"]).flatmap(kinds.__getitem__)


def send(page: Page, request: Request) -> Answer:
    """Send it and wait for the end of the answer."""
    if request.how == "join":
        visitor = secrets.token_hex(4)
        body = {"fn_index": request.endpoint, "data": request.data, "session_hash": visitor, "event_data": {"id": "x"}, "trigger_id": None}
        joined = page.exchange("POST", f"{API}/queue/join", json.dumps(body).encode(), JSON)
        if joined.status != 200:
            return joined
        events = page.stream(f"{API}/queue/data?session_hash={visitor}", re.compile(r'"msg": ?"(process_completed|unexpected_error)"'))
        return Answer(events.status, events.text.splitlines()[-1].removeprefix("data: "))
    body = request.data if isinstance(request.data, str) else json.dumps({"data": request.data})
    asked = page.exchange("POST", f"{API}/{request.how}/{request.endpoint}", body.encode(), JSON)
    if request.how == "run" or asked.status != 200:
        return asked
    event = json.loads(asked.text)["event_id"]
    events = page.stream(f"{API}/call/{request.endpoint}/{event}", re.compile(r"event: (complete|error)\ndata: .*\n"))
    kind, data = events.text.rpartition("event: ")[2].split("\ndata: ", 1)
    return Answer(200 if kind == "complete" else 500, data.strip())


def require_harmless(answer: Answer) -> None:
    """Raise AssertionError if it shows the inside of the page, or a file that nobody may read."""
    assert "Traceback" not in answer.text and "Internal Server Error" not in answer.text, answer
    assert CANARY not in answer.text and "root:x:0:0" not in answer.text, "a file was read that nobody may read"


def complaint(answer: Answer) -> str | None:
    """The sentence of an answer that is no result; None if it is one.

    Raises:
        AssertionError: it is neither.
    """
    require_harmless(answer)
    told = json.loads(answer.text)
    if isinstance(told, dict) and told.get("msg") == "process_completed":
        if told["success"]:
            return None
        told = told["output"]
    elif answer.status == 200:
        return None
    sentence = told.get("error") or told.get("detail")
    assert sentence, f"no reason is given: {answer}"
    sentence = sentence if isinstance(sentence, str) else "; ".join(each["msg"] for each in sentence)
    assert "\n" not in sentence and len(sentence) < 2000, answer
    return sentence


# ------------------------------------------------------------------------------------------------------------- the tests


def attempts(most: int) -> settings:
    """So many requests: always the same in CI."""
    quiet = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
    return settings(max_examples=most, derandomize=not MANY, **quiet)


@contextlib.contextmanager
def no_traceback_in(page: Page) -> Iterator[None]:
    begins = len(page.log)
    yield
    assert "Traceback" not in page.log[begins:], page.log[begins:]


def test_whatever_is_sent_is_answered_with_a_result_or_one_sentence(page: Page) -> None:
    told = {"results": 0, "sentences": 0}

    @attempts(REQUESTS)
    @given(requests(page))
    def attempt(request: Request) -> None:
        with no_traceback_in(page):
            sentence = complaint(send(page, request))
        told["results" if sentence is None else "sentences"] += 1
        if request.how != "join" and not isinstance(request.data, str) and "gradio.FileData" not in repr(request.data):
            assert UNUSABLE not in (sentence or ""), "endpoints for programs tell what was wrong; see the page's log"

    attempt()
    print(told)
    assert min(told.values()) > REQUESTS / 20, told
    assert complaint(send(page, Request("call", "sample", [DECAYED, "circles", 1, 1, 2, 1.0, "euler"]))) is None, "it is broken now"
    assert page.exchange("GET", "/").status == 200
    assert psutil.Process(page.process.pid).memory_info().rss < 2 * 2**30, "every request is a visitor; they must not pile up"


ROUTES = [f"{API}/file=", f"{API}/file/", "/file=", "/static/", "/assets/", "/svelte/", "/", f"{API}/proxy=", "/pwa_icon/", "/monitoring/"]
ROUTES += [f"{API}/custom_component/0/client/component/", f"{API}/stream/x/0/0/", f"{API}/deep_link?"]


def test_no_route_serves_files_that_are_not_the_pages(page: Page) -> None:
    places = ["secret.txt", "home/.bashrc", "outside/secret.png", "work/secret.json", "data/secret.txt"]
    absolute = st.sampled_from(
        [*(str(page.sandbox / place) for place in places), "/etc/passwd", "/proc/self/environ", str(ROOT / "LICENSE")]
    )
    above = st.builds(
        lambda steps, path: "/".join(steps) + path, st.lists(st.sampled_from(["..", "...", ".", "", "..;", "a/.."])), absolute
    )
    near = st.sampled_from(
        ["secret.json", "./secret.json", "../secret.txt", "runs/../../secret.txt", "~/.bashrc", "runs/tiny-plain/model_index.json"]
    )
    url = st.sampled_from([f"file://{page.sandbox}/secret.txt", f"http://127.0.0.1:{page.port}/config", f"http://localhost:{page.port}/"])
    wrapped = st.sampled_from([lambda path: path, quote, lambda path: quote(path, safe=""), lambda path: quote(quote(path, safe=""))])
    wrapped |= st.just(lambda path: quote(path).replace("/", "%5c")) | st.just(lambda path: quote(path) + "%00.png")
    paths = st.builds(
        lambda wrap, path: wrap(path), wrapped, absolute | above | near | url | st.text(st.characters(codec="utf-8"), max_size=40)
    )
    config = page.exchange("GET", "/config").text

    @attempts(max(100, MANY // 10))
    @given(st.sampled_from(ROUTES), paths)
    def attempt(route: str, path: str) -> None:
        with no_traceback_in(page):
            answer = page.exchange("GET", route + re.sub(r"[^!-~]", lambda match: quote(match[0]), path))
        require_harmless(answer)
        assert "MIT License" not in answer.text and config not in answer.text, "what the page alone can reach"
        assert answer.status < 500, answer

    attempt()


def test_uploads_stay_where_uploads_belong(page: Page) -> None:
    names = st.sampled_from(
        ["../../secret.txt", str(page.sandbox / "secret.txt"), "a/../../b.png", "..", "", "x" * 5000, "\0.png", "%2e%2e%2fx", "C:\\x"]
    )
    names |= st.text(st.characters(codec="utf-8", exclude_characters='\r\n"'), max_size=30)
    contents = st.binary(max_size=200) | st.just(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    cache = page.sandbox / "cache"

    @attempts(max(60, MANY // 20))
    @given(names, contents, st.sampled_from(["files", "x", ""]), st.booleans())
    def attempt(name: str, content: bytes, field: str, whole: bool) -> None:
        head = f'--b\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
        body = head.encode() + content + b"\r\n--b--\r\n" * whole
        with no_traceback_in(page):
            answer = page.exchange("POST", f"{API}/upload", body, {"Content-Type": "multipart/form-data; boundary=b"})
        require_harmless(answer)
        assert answer.status < 500, answer
        if answer.status == 200:
            assert all(Path(path).resolve().is_relative_to(cache) for path in json.loads(answer.text)), answer

    attempt()


# Routes of Gradio that ask for no login: the way in, the page's own looks, and what needs an id that only its owner knows.
OPEN = re.compile(
    r"/|/log(in|out)/?|/(svelte|static|assets)/.*|/(theme.css|favicon.ico|robots.txt|manifest.json)|/pwa_icon.*|/monitoring/\{key\}"
    rf"|{API}/((user|token|app_id|runs|reset)/?|theme.css|startup-events|cancel|custom_component/.*|stream/.*|heartbeat/.*|.*vibe-.*)"
)


def test_without_login_nothing_is_told_and_nothing_taken(tmp_path: Path) -> None:
    with page_in(tmp_path / "sandbox", "--auth", "me:secret") as page:
        before = snapshot(page.sandbox)
        routes = json.loads(page.exchange("GET", "/openapi.json").text)["paths"]
        assert {f"{API}/upload", f"{API}/call/{{api_name}}", f"{API}/file={{path_or_url}}"} <= routes.keys()
        for route, methods in routes.items():
            for method in methods:
                body, headers = (b'{"data": []}', JSON) if method == "post" else (None, {})
                answer = page.exchange(method.upper(), re.sub(r"\{[^}]*\}", "x", route), body, headers)
                require_harmless(answer)
                assert answer.status == 401 or OPEN.fullmatch(route), (method, route, answer)
                assert "tiny-plain" not in answer.text, (route, "tells of the page")
        for endpoint in ("checkpoints", "trainings", "start_training", "compare"):
            assert send(page, Request("call", endpoint, [])).status == send(page, Request("run", endpoint, [])).status == 401
        form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\nx\r\n--b--\r\n'
        multipart = {"Content-Type": "multipart/form-data; boundary=b"}
        model = quote(str(page.sandbox / "runs/tiny-plain/model_index.json"))
        assert page.exchange("POST", f"{API}/upload", form, multipart).status == 401
        assert page.exchange("GET", f"{API}/file={model}").status == 401
        assert snapshot(page.sandbox) == before and not [*(page.sandbox / "cache").rglob("x.png")]

        for password, status in (("wrong", 400), ("secret", 200)):
            entered = page.exchange("POST", "/login", f"username=me&password={password}".encode(), FORM)
            assert entered.status == status
        cookies = {"Cookie": "; ".join(re.findall(r"(access-token[^=]*=[^;]*)", entered.headers["set-cookie"]))}
        assert page.exchange("POST", f"{API}/upload", form, {**multipart, **cookies}).status == 200
        assert "tiny-plain" in page.exchange("GET", "/config", None, cookies).text
