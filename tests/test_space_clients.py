"""The Space and its clients: turns, clients that are gone, requests that no page sends."""

import ast
import asyncio
import json
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import tiny_transformer, tiny_vae
from gradio_client import Client
from testing_utils.space_server import serve

from dit_hf import DiTClassCondPipeline, make_scheduler
from dit_hf.command_line import run
from dit_hf.space import requests
from dit_hf.space.command import main
from dit_hf.space.generation import ImageGenerator, shown_names
from dit_hf.space.requests import MAX_BODY, MAX_EVENTS, MAX_SILENT, Clients, Gate, Refused, address_of
from dit_hf.space.settings import Settings
from dit_hf.space.turns import MAX_WAITING, Turns


JOIN = "/gradio_api/queue/join"
WEB = httpx.Client(timeout=60)
GENERATE = {"class_labels": "shark", "images": 8, "steps": 250, "sampler": "flow_heun", "api_name": "/generate"}
DATA = ["shark", 1, 0, False, 1, 1.0, 0.0, 1.0, "default", "", 0.5]
LONG = ["shark", 8, 0, False, 250, 4.0, 0.0, 1.0, "flow_heun", "", 0.5]
HOSTILE = [
    "fish\nimport os; os.abort()",
    "fish\r\n__import__('os').abort()",
    'it\'s "quoted" \\',
    '"""' + "'''",
    "</script><img src=x onerror=alert(1)>",
    "{{}} {0} %s $x",
    "__import__('os').abort()",
    "line\u2028separator\u2029\x85\x0b\x0c\x1c",
    "bidi \u202e)( \u2066x",
    "lone \ud800",
    "\x1b[31mred\x00\x07",
    "x" * 10_000,
    "",
    "   ",
    "same",
    "same",
    "same (15)",
]


def test_turns_go_round_addresses_and_sessions():
    turns = Turns(size=20)
    names = ["a1", "a1", "a1", "a2", "b1", "a1", "b1", "c1"]
    waiting = [(name, turns.join(name[0], name)) for name in names]
    served = []
    while waiting:
        assert [turns.before(turn) for _, turn in waiting].count(0) == 1
        current = next(pair for pair in waiting if not turns.before(pair[1]))
        served.append(current[0])
        waiting.remove(current)
        turns.leave(current[1])
    assert served == ["a1", "b1", "c1", "a2", "b1", "a1", "a1", "a1"]


def test_no_client_can_hold_the_queue():
    turns = Turns(size=2 * MAX_WAITING + 4)
    first = turns.join("a", "a0")
    mine = [turns.join("a", "a1") for _ in range(MAX_WAITING)]
    with pytest.raises(ValueError, match=f"{MAX_WAITING} of your sets wait already"):
        turns.join("a", "a1")
    others = [turns.join("a", f"a{index}") for index in (2, 3)]
    with pytest.raises(ValueError, match="Too many sets of your address"):
        turns.join("a", "a9")
    visitor = turns.join("b", "b1")
    assert turns.before(visitor) == 1  # the one that is generated
    for turn in (mine[0], first, others[0]):
        turns.leave(turn)
        turns.leave(turn)  # again, as its end and its client may
    assert turns.before(visitor) == 0
    for index in range(2 * MAX_WAITING + 4 - len(mine)):
        turns.join(f"c{index}", "c")
    with pytest.raises(ValueError, match="The queue is full"):
        turns.join("d", "d")


def test_places_in_a_long_queue_are_looked_up():
    turns = Turns(size=1000)
    waiting = [turns.join(f"{index}", "") for index in range(1001)]
    started = time.perf_counter()
    assert [turns.before(turn) for turn in waiting] == list(range(1001))
    assert time.perf_counter() - started < 0.05


def test_sessions_that_never_listen_are_bounded_and_forgotten(monkeypatch):
    left = []
    clients = Clients(left.append)
    for index in range(MAX_SILENT):
        clients.ask(f"s{index}", "1.1.1.1")
    with pytest.raises(Refused):
        clients.ask("other", "1.1.1.1")
    clients.ask("other", "2.2.2.2")
    monkeypatch.setattr(requests, "PATIENCE", 0.0)
    with clients.listening("other"):
        assert clients.is_gone("s1")
        assert not clients.is_gone("other")
        clients.ask("new", "1.1.1.1")
        assert len(left) == MAX_SILENT
    assert "other" in clients  # it was the server that ended the stream
    with clients.listening("other") as closed:
        closed()
    assert left[-1] == "other"
    assert "other" not in clients


def test_an_old_streams_end_does_not_end_what_was_asked_for_since():
    left = []
    clients = Clients(left.append)
    clients.ask("mine", "1.1.1.1")
    with clients.listening("mine") as closed:
        clients.ask("mine", "1.1.1.1")
        closed()
    assert not clients.is_gone("mine")
    with clients.listening("mine") as closed:
        closed()
    assert left == ["mine"]


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        ([], "session"),
        (["unknown, 10.0.0.1"], "session"),
        (["8.8.8.8"], "8.8.8.8"),
        (["1.1.1.1, 8.8.8.8"], "8.8.8.8"),  # the first may be the client's own invention
        (["1.1.1.1", "2606:4700::1111, 10.16.3.80"], "2606:4700::1111"),
    ],
)
def test_visitors_of_the_hub_are_told_apart(monkeypatch, tmp_path, forwarded, address):
    seen = []

    async def app(scope, receive, send):
        seen.append(address_of(scope, "session"))

    headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "client": ("10.16.3.80", 1)}
    for variable in (None, "me/space"):
        if variable:
            monkeypatch.setenv("SPACE_ID", variable)
        asyncio.run(Gate(app, None, Clients(seen.append), tmp_path)(scope, None, None))
    assert seen == ["10.16.3.80", address]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    transformer = tiny_transformer(num_classes=3, learn_sigma=False, num_layers=24)
    scheduler = make_scheduler("flow_euler", shift=3.0)
    names = {0: "tench, Tinca tinca", 1: "goldfish", 2: "shark"}
    DiTClassCondPipeline(transformer, scheduler, tiny_vae(), names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The server's temporary files; another one, which was killed, has left some."""
    folder = tmp_path_factory.mktemp("temporary")
    with subprocess.Popen(["true"]) as ended:
        pass
    for name in (f".dit_hf-partial-{platform.node()}-{ended.pid}-1-left", "dit_hf-mine"):
        (folder / name / "images").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def log():
    return []


@pytest.fixture(scope="module")
def address(model, folder, log, hangup):
    """A server as on the Hub; it ends with its terminal, and leaves nothing."""
    variables = {"SPACE_ID": "me/space", "GRADIO_SHARE": "True"}
    with serve(model, folder, "--queue_size", "12", app=None, log=log, end=signal.SIGHUP, **variables) as address:
        images(address)  # until then it may still log that it has started
        yield address
    assert [path.name for path in folder.iterdir()] == ["dit_hf-mine"]


def join(address, session, data=DATA, client=""):
    """What a browser sends, as if through the proxy of a client with this address."""
    body = {"data": data, "fn_index": 0, "session_hash": session}
    return WEB.post(f"{address}{JOIN}", json=body, headers={"X-Forwarded-For": client})


@contextmanager
def listen(address, session):
    """The lines of a session's stream, as a private Space's page asks for it; at the end the connection is dropped."""
    query = {"session_hash": session, "__sign": "eyJ.eyJ.x"}
    with WEB.stream("GET", f"{address}/gradio_api/queue/data", params=query) as stream:
        yield stream.iter_lines()


def outcome(lines, until):
    """The first line that holds a text."""
    for line in lines:
        if until in line:
            return line
    raise AssertionError(f"{until!r} did not come")


def images(address, session="quick", client=""):
    """Seconds until a small set was there."""
    started = time.perf_counter()
    assert join(address, session, client=client).status_code == 200
    with listen(address, session) as stream:
        outcome(stream, "Images: 1")
    return time.perf_counter() - started


def test_work_for_a_client_that_is_gone_stops(address):
    """A dropped connection, before its turn and in it; the set would take half a minute."""
    for session in ("gone-1", "gone-2"):
        join(address, session, LONG)
    with listen(address, "gone-1") as running, listen(address, "gone-2") as waiting:
        outcome(running, "Call ")
        outcome(waiting, "Waiting: 1 before")
    assert images(address) < 6


def test_work_that_nobody_listens_to_stops(address):
    """As many wait as have no address, which are told apart by their sessions."""
    for index in range(8):
        join(address, f"silent{index}", LONG)
    with listen(address, "silent7") as stream:
        outcome(stream, "Waiting: 7 before")
    assert images(address) < requests.PATIENCE + 6


def test_one_client_does_not_hold_the_queue(address):
    """Sets of one visitor wait, and another's comes after the one that is generated; cancelling ends all of them."""
    client = Client(address, verbose=False)
    quick = GENERATE | {"images": 2, "steps": 12}
    jobs = [client.submit(**GENERATE)]
    until(lambda: any("Call" in (output[1] or "") for output in jobs[0].outputs()))
    jobs += [client.submit(**quick) for _ in range(MAX_WAITING)]
    until(lambda: any("Waiting: 4" in (output[1] or "") for job in jobs for output in job.outputs()))
    assert f"{MAX_WAITING} of your sets wait" in str(client.submit(**quick).exception(timeout=30))
    join(address, "visitor", client="8.8.8.8")
    with listen(address, "visitor") as stream:
        outcome(stream, "Waiting: 1 before")  # not 5
        assert client.predict(api_name="/cancel") == "Cancelled."
        outcome(stream, "Images: 1")
    assert {job.result(timeout=30)[1] for job in jobs} == {"Cancelled."}


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_cancelled_set_leaves_the_pipeline_in_order(model):
    """The next set, by each sampler, is that of a fresh page to the bit."""
    fresh, used = ImageGenerator(str(model)), ImageGenerator(str(model))
    for sampler in used.samplers:
        mixed = {"mix_with": "shark", "mix_share": 0.5}
        long = Settings(["goldfish"], images=2, steps=40, sampler=sampler, guidance_end=0.5, **mixed)
        stop = threading.Event()
        for _ in used.generate(long, stop):
            stop.set()
        short = Settings(["goldfish"], images=2, steps=3, seed=4, sampler=sampler)
        here, there = (list(one.generate(short, threading.Event()))[-1].images for one in (used, fresh))
        assert all(np.array_equal(*pair) for pair in zip(here, there, strict=True))


def raw(address, path, body, kind="application/json"):
    return WEB.post(f"{address}{path}", content=body, headers={"content-type": kind})


POSTS = [(JOIN, body) for body in (b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"data": [' + b"9" * 9999 + b"]}")]
POSTS += [
    (JOIN, json.dumps({"data": DATA, "fn_index": 0, "session_hash": "a"} | changed).encode())
    for changed in (
        {"session_hash": "\ud800"},  # Gradio's statistics fail with it for ever after
        {"session_hash": ""},
        {"session_hash": None},
        {"session_hash": ["a"]},
        {"session_hash": "a" * 65},
        {"session_hash": "a/../b"},
        {"fn_index": -1},
        {"fn_index": 999},
        {"fn_index": True},
        {"fn_index": "0"},
        {"data": []},
        {"data": None},
        {"data": [*DATA, 1]},
        {"data": [json.loads("[" * 900 + "]" * 900), *DATA[1:]]},
        {"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, *DATA[1:]]},
    )
]
POSTS += [(path, b'{"data": ["a", 0], "fn_index": 4}') for path in ("/gradio_api/run/predict", "/gradio_api/run/x")]
POSTS += [
    (f"/gradio_api/{route}", json.dumps({"data": DATA, "fn_index": 0, "component_id": 1, "fn_name": "x"}).encode())
    for route in ("component_server", "upload", "process_recording", "vibe-edit", "stream/x", "call/v2/generate")
]
GETS = ["/monitoring", "/gradio_api/deep_link", "/gradio_api/dev/reload", "/gradio_api/proxy=http://127.0.0.1:1/"]
GETS += ["/gradio_api/upload_progress?upload_id=x", "/static/" + "a" * 3000, "/assets/..%2f..%2f..%2froutes.py"]
GETS += ["/gradio_api/call/generate/abc", "/gradio_api/queue/data", "/gradio_api/queue/data?session_hash=unknown"]
GETS += ["/gradio_api/queue/data?session_hash=%00", "/gradio_api/heartbeat/%ed%a0%80"]


def test_other_requests_than_the_pages_are_refused_in_a_line(address, log):
    before = len(log)
    answers = [raw(address, *post) for post in POSTS]
    answers += [raw(address, JOIN, json.dumps({"data": DATA}).encode(), kind) for kind in ("text/plain", "image/png")]
    answers += [WEB.get(address + path) for path in GETS]
    assert raw(address, JOIN, b'{"data": "' + b"a" * MAX_BODY + b'"}').status_code == 413
    for answer in answers:
        assert 400 <= answer.status_code < 500, answer.url
        assert len(answer.text) < 300
    for index in range(300):
        assert WEB.get(f"{address}/gradio_api/queue/data?session_hash=none{index}").status_code == 404
    images(address)
    assert log[before:] == []


def test_values_out_of_bounds_are_answered_and_not_logged(address, log):
    """Values that JSON can't have, or a page never sends, reach the handler and come back as an error."""
    before = len(log)
    values = ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 300, '"x"', "null", "[]", "[[[]]]", "true", "-1"]
    for place in (1, 2, 4, 5, 6):
        session = f"place{place}"
        for value in values[: MAX_EVENTS - 1]:
            given = [json.dumps(entry) for entry in DATA]
            given[place] = value
            body = f'{{"data": [{", ".join(given)}], "fn_index": 0, "session_hash": "{session}"}}'
            assert raw(address, JOIN, body.encode()).status_code == 200
        with listen(address, session) as stream:
            ends = [line for line in stream if "process_completed" in line]
        errors = [json.loads(line.removeprefix("data: "))["output"]["error"] for line in ends]
        assert len(errors) == len(values)
        assert all(re.search(r"must be a (whole )?number", error) and len(error) < 100 for error in errors), errors
    thousand = json.dumps({"data": [["shark"] * 1000, *DATA[1:]], "fn_index": 0, "session_hash": "many"})
    raw(address, JOIN, thousand.encode())
    with listen(address, "many") as stream:
        assert "at most 32 classes" in outcome(stream, "process_completed")
    assert log[before:] == []


def test_only_images_that_the_page_has_made_are_served(address, tmp_path):
    join(address, "file")
    with listen(address, "file") as stream:
        path = Path(re.search(r'file=(/[^"]+\.png)', outcome(stream, "Images: 1"))[1])

    def status(name):
        return WEB.get(f"{address}/gradio_api/file={name}").status_code

    assert status(path) == 200
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    (path.parent / "link.png").symlink_to(secret)
    (path.parent / "linked").symlink_to(tmp_path)
    (path.parent / "notes.txt").write_text("secret")
    names = [
        "link.png",
        "linked/secret.png",
        "notes.txt",
        "",
        "..%2fimages%2f" + path.name,
        "a" * 300 + ".png",
        "%00.png",
    ]
    for name in [*(f"{path.parent}/{name}" for name in names), "/etc/passwd", secret, "http://127.0.0.1:1/a.png", "~"]:
        assert status(name) == 404, name
    for page in ("/", "/config", "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/startup-events"):
        found = re.findall(
            rf"{re.escape(str(Path.home()))}/|{re.escape(sys.prefix)}|{tmp_path.parent}", page_of(address, page)
        )
        assert not found


def page_of(address, path):
    return WEB.get(address + path).text


def test_names_stay_out_of_the_snippets_code(tmp_path, monkeypatch):
    """Whatever classes and model are called, the code is that of harmless names, and its images are the page's."""
    monkeypatch.chdir(tmp_path)
    transformer = tiny_transformer(num_classes=len(HOSTILE), learn_sigma=False, in_channels=3)
    folder = tmp_path / "a'b\"); import os #\n{x}"
    DiTClassCondPipeline(transformer, make_scheduler("flow_euler"), None, {0: "x"}).save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": dict(enumerate(HOSTILE))}))
    generator = ImageGenerator(str(folder))
    assert len(set(generator.classes)) == len(HOSTILE)
    for index, name in enumerate(generator.classes):
        assert name.encode().decode().isprintable()
        assert 0 < len(name) < 250
        settings = Settings([name], steps=1, sampler="flow_heun", mix_with=generator.classes[0], mix_share=0.5)
        code = generator.snippet(settings)
        assert len(code) < 2000
        plain = re.sub(r"  # .*", "", code)
        assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(plain))
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
        pipe = next(call for call in calls if getattr(call.func, "id", "") == "pipe")
        assert ast.literal_eval(pipe.args[0]) == [index]
        load = next(call for call in calls if getattr(call.func, "attr", "") == "from_pretrained")
        assert ast.literal_eval(load.args[0]) == folder.name
    found = {}
    exec(code, found)
    (shown,) = list(generator.generate(settings, threading.Event()))[-1].images
    assert np.array_equal(shown, found["images"][0])


def test_sixty_thousand_names_are_shown_quickly():
    names = [f"thing {index % 50_000}" for index in range(60_000)]
    started = time.perf_counter()
    shown = shown_names(names)
    assert time.perf_counter() - started < 2
    assert len(set(shown)) == 60_000
    assert shown[0] == "thing 0 (0)"
    assert shown[20_000] == "thing 20000"


@pytest.mark.parametrize(
    ("flags", "variables", "message"),
    [
        (["--port", "65536"], {}, "argument --port: '65536' is not a whole number"),
        (["--port", "x"], {}, "argument --port: 'x'"),
        ([], {"GRADIO_SERVER_PORT": "x"}, "argument --port: 'x'"),
        (["--queue_size", "0"], {}, "argument --queue_size: '0'"),
        (["--max_minutes", "nan"], {}, "argument --max_minutes: 'nan' is not a finite number"),
        (["--max_minutes", "-1"], {}, "argument --max_minutes: '-1'"),
        (["--host", "no.such.host.invalid"], {}, "can't listen on --host no.such.host.invalid --port 7860"),
        (["--port", "BUSY"], {}, ": Address already in use. Choose another one."),
    ],
)
def test_a_bad_flag_is_one_line(monkeypatch, capsys, flags, variables, message):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        flags = ["--port", str(taken.getsockname()[1])] if "BUSY" in flags else flags
        monkeypatch.setattr(sys, "argv", ["dit-hf space", *flags])
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            run(main)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_folder_that_is_no_pipeline_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(lambda: ImageGenerator(str(tmp_path)))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path) in line


def test_what_a_killed_server_left_is_removed_by_the_next(address, folder, log):
    own, *others = sorted(folder.iterdir())
    assert own.name.startswith(f".dit_hf-partial-{platform.node()}-")
    assert "-left" not in own.name
    assert [path.name for path in others] == ["dit_hf-mine"]
    assert log[0] == "Ignored, as this page takes its settings from flags: GRADIO_SHARE.\n"
