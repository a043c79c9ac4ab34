"""The tests of mest.py, in its order. Each name is a sentence about what a user can rely on."""
import asyncio
import contextlib
import contextvars
import copy
import dataclasses
import datetime
import decimal
import functools
import http.client
import importlib
import io
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor, wait
from enum import IntEnum
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, unquote_to_bytes

import cerberus
import flask
import pytest
from flask.views import MethodView
from werkzeug.datastructures import Headers
from werkzeug.exceptions import Gone, HTTPException

import mest
from mest import GenericModel, Mest, MestConfig, MestError, Problem, Router, validate_params

HERE = Path(__file__).resolve().parent
JSON = {"Content-Type": "application/json"}
LISTENS = r"(?:Running on|serves on) (?:http://)?[^\s:]+:(\d+)\b"
PATIENCE = 30  # seconds, for whatever is waited for
FORM, NAN = "application/x-www-form-urlencoded", float("nan")
SURE, N, F = {"required": True}, {"type": "integer"}, {"type": "float"}
X = {"x": {**F, **SURE}}


# Fixtures


class Doubler(GenericModel):
    def init(self, directory_path):
        self.model = 2

    def infer(self, x):
        return {"y": self.model * x}


def make(app=None, models=(), **fields):
    """A Mest whose name, and so its logger, no other test has."""
    name = f"t{uuid.uuid4().hex}"
    return Mest(MestConfig(name, 8000, list(models), **fields), app=app)


@pytest.fixture
def mest_app():
    return make()


@pytest.fixture
def router():
    return Router("v1")


def client_of(router, url="/", **fields):
    mest_app = make(**fields)
    mest_app.register_router(url, router)
    return mest_app.app.test_client()


def route(handler):
    """Serve a handler in a service of its own, and return how to ask it."""
    router = Router("v1")
    router.route("it", methods=["GET", "POST"], endpoint="it")(handler)
    client = client_of(router)
    return lambda query="", method="POST", **sent: client.open("/it" + query, method=method, **sent)


def ask(schema):
    """The same for a handler that returns its checked parameters."""
    return route(validate_params(schema)(lambda **params: params))


def wait_until(condition, about="it did not come true in time"):
    """Ask until the condition holds, and fail, with what this is about, if it never does."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, about
        time.sleep(0.01)
    return found


def log_of(source, having=""):
    """What a server or this process has logged, of the lines of JSON that have this in them."""
    text = source.output if isinstance(source, Server) else source.readouterr().out
    lines = re.findall(r'{"time": .*}', text)  # another process may print on the same line
    return [json.loads(line) for line in lines if having in line]


def environment(**more):
    ours = re.compile("MEST_|WERKZEUG_|GUNICORN|PROMETHEUS|.*_NUM_THREADS$")
    plain = {name: value for name, value in os.environ.items() if not ours.match(name)}
    return {**plain, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1", **more}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


class Project:
    """A folder in which files can be written and the mest command run."""

    def __init__(self, path):
        self.path = path

    def write(self, **files):
        for name, text in files.items():
            (self.path / f"{name}.py").write_text(text)

    def mest(self, *args, command=("-m", "mest"), stdin="", **env):
        return subprocess.run(
            [sys.executable, *command, *args], cwd=self.path, env=environment(**env), input=stdin,
            capture_output=True, text=True, timeout=PATIENCE,
        )

    @contextlib.contextmanager
    def serve(self, *args, command=("-m", "mest"), listens=LISTENS, **env):
        """Run a server on a free port, wait until it listens, and yield it."""
        port = "--port", free_port()
        head = list(itertools.takewhile(lambda arg: arg != "--", args))
        process = subprocess.Popen(
            [sys.executable, *command, *head, *port, *args[len(head) :]], cwd=self.path,
            env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )
        with contextlib.closing(Server(process)) as server:
            match = server.wait_for(listens)
            server.port = int(match[1]) if match.groups() else None
            yield server


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


class Server:
    """A process that serves, and what it has printed."""

    def __init__(self, process):
        self.process, self.lines = process, []
        self.reader = threading.Thread(target=self._collect, daemon=True)
        self.reader.start()

    def _collect(self):
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                self.lines += [line]

    @property
    def output(self):
        return "".join(self.lines)

    __str__ = output.fget

    def wait_for(self, pattern):
        """Return the match of a pattern in the output, once it is there."""
        wait_until(lambda: re.search(pattern, self.output) or not self.reader.is_alive(), self)
        match = re.search(pattern, self.output)
        assert match, f"no {pattern!r} in: {self.output}"
        return match

    def ask(self, path, body=None, method=None, headers=None):
        """Return status, body and headers of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            body = json.dumps(body).encode() if isinstance(body, dict) else body
            method = method or ("GET" if body is None else "POST")
            connection.request(method, path, body, JSON if headers is None else headers)
            response = connection.getresponse()
            return response.status, response.read(), response.headers

    def send(self, text):
        """Send bytes as they are, and return all that comes back."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as raw:
            raw.sendall(text)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while part := raw.recv(65536):
                    received += part
            return received

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        self.process.stdout.close()


APP = """
from mest import GenericModel, Mest, MestConfig, Router, validate_params

class Doubler(GenericModel):
    def init(self, directory_path):
        print("loading from", directory_path)
        self.model = 2

    def infer(self, x):
        return {"y": self.model * x}

doubler = Doubler()
mest_app = Mest(MestConfig("doubler", 8000, models_instances=[doubler])).setup()
router = Router("v1")
mest_app.register_router(url="/", router=router)
router.add_predict_route(doubler, {"x": {"type": "float", "required": True}}, example={"x": 1})
router.add_ping_route()

@router.route("echo")
@validate_params({"x": {"type": "list", "required": True}})
def echo(x):
    return {"x": x}

@router.route("fail", method="GET")
def fail():
    secret = "hunter2"
    raise KeyError(secret)
"""
ASGI_SCOPE = {
    "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "root_path": "",
    "path": "/predict", "query_string": b"", "client": ("1.2.3.4", 5), "server": ("127.0.0.1", 80),
    "headers": [],
}


def messages_of(mest_app, receive, **scope):
    """What the ASGI application sends, to a server that gives it what `receive` returns."""
    sent = []

    async def send(message):
        sent.append(message)

    with contextlib.suppress(asyncio.CancelledError):
        call = mest_app({**ASGI_SCOPE, **scope}, receive, send)
        asyncio.run(asyncio.wait_for(call, PATIENCE))
    return sent


def over_asgi(
    mest_app, url="/predict", method="POST", parts=(b'{"x": 3}',), headers=None, whole=True, **scope
):
    """What the ASGI application answers: its status, headers by lower-case name, and body."""
    path, _, query = url.partition("?")
    headers = {**JSON, "X-Request-Id": "r1"} if headers is None else headers
    pairs = headers.items() if isinstance(headers, dict) else headers
    scope = {
        "method": method, "path": unquote(path), "raw_path": path.encode(),
        "query_string": query.encode(), **scope,
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in pairs],
    }
    queue = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    queue[-1]["more_body"] = not whole  # then a part is missing

    async def receive():
        return queue.pop(0) if queue else await asyncio.Event().wait()

    start, *rest = messages_of(mest_app, receive, **scope)
    named = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
    body = b"".join(message["body"] for message in rest)
    return types.SimpleNamespace(status=start["status"], headers=named, body=body, sent=rest)


# Errors


def test_an_error_is_a_problem_details_object_with_the_id_of_its_request():
    response = ask(X)(json={}, headers={"X-Request-Id": "abc-1"})
    assert (response.status_code, response.mimetype) == (422, "application/problem+json")
    title = response.json["title"]
    assert title.startswith("Unprocessable")
    assert response.json == {
        "title": title, "status": 422, "request_id": "abc-1",
        "detail": "The parameters are not valid.", "errors": {"x": ["required field"]},
    }


@pytest.mark.parametrize("number", [3, 1000, 100, 0.9])
def test_a_number_beside_an_answer_must_be_a_status(number, capsys):
    assert route(lambda: ("cat", number))().status_code == 500
    assert f"{number} is no status" in log_of(capsys)[0]["message"]


class Teapot(HTTPException):
    code = 418
    get_headers = lambda *_: [("X-Spout", "1")]  # noqa: E731


def test_an_http_exception_of_flasks_becomes_a_problem_with_its_headers():
    def handler():
        raise Teapot

    response = route(handler)()
    assert (response.json["status"], response.headers["X-Spout"]) == (418, "1")


def test_a_handler_may_raise_a_problem_with_headers_and_members_of_its_own():
    def handler():
        raise Problem(http.HTTPStatus.CONFLICT, "No.", headers={"Retry-After": "3"}, left={1})

    response = route(handler)()
    assert (response.status_code, response.headers["Retry-After"]) == (409, "3")
    given = {"status": 409, "detail": "No.", "left": "{1}"}  # what is no JSON is text
    assert response.json == {**response.json, **given}
    assert "errors" not in response.json


def test_an_exception_is_an_opaque_500_that_the_log_and_flasks_signal_explain(capsys):
    error = KeyError("hunter2")

    def handler():
        raise error

    heard, hear = [], lambda app, exception: heard.append(exception)
    with flask.got_request_exception.connected_to(hear):
        response = route(handler)(headers={"X-Request-Id": "r-7"})
    assert (response.status_code, response.json["request_id"]) == (500, "r-7")
    assert not re.search("hunter2|Error", response.json["detail"])
    assert heard == [error]
    (line,) = log_of(capsys)
    assert (line["request_id"], line["level"]) == ("r-7", "ERROR")
    assert line["message"].startswith("POST /it failed")
    assert "KeyError: 'hunter2" in line["traceback"]


# Configuration


def test_the_environment_beats_the_code_unless_it_is_empty_and_no_key_is_shown(monkeypatch):
    environ = {"LISTEN_PORT": "8080", "WORKERS": "3", "THREADS": "", "API_KEY": "hunter2, hunter3"}
    for name, value in environ.items():
        monkeypatch.setenv(f"MEST_{name}", value)
    config = MestConfig("a", 8000, workers=2, threads=5, api_key="other")
    assert (config.listen_port, config.workers, config.threads) == (8080, 3, 5)
    assert config.api_key == "hunter2, hunter3"
    assert "hunter" not in repr(config)


@pytest.mark.parametrize("field", MestConfig.settings(), ids=lambda field: field.name)
def test_every_setting_can_be_set_by_the_environment(field, monkeypatch):
    allowed = field.metadata["allowed"]
    values = ["elsewhere"] if allowed is str else [allowed[0], allowed[-1]]
    for value in values:
        monkeypatch.setenv("MEST_" + field.name.upper(), str(value))
        assert getattr(MestConfig("a"), field.name) == value
        assert type(getattr(MestConfig("a"), field.name)) is type(field.default)
    assert field.metadata["meaning"]


@pytest.mark.parametrize("name, value, message", [
    ("listen_port", 70000, "listen_port is 70000; it must be an integer from 0 to 65535 (TCP port"),
    ("listen_port", True, "True"), ("listen_port", 80.0, "80.0"), ("listen_port", -1, "-1"),
    ("listen_port", None, "None"), ("workers", "many", "'many'; it must be an integer from 1 to"),
    ("docs", None, "docs is None; it must be True or False or 1 or 0 (whether there"),
    ("MEST_WORKERS", "two", "MEST_WORKERS is 'two'; it must be an integer from 1 to 1024"),
    ("MEST_THREADS", "9" * 5000, "MEST_THREADS is '999"), ("MEST_THREADS", "٣", "'٣'"),
    ("MEST_DOCS", "maybe", "MEST_DOCS is 'maybe'; it must be True or False or 1 or 0"),
    ("MEST_LOG_LEVEL", "LOUD", "MEST_LOG_LEVEL is 'LOUD'; it must be DEBUG or INFO or"),
    ("port", 1, "MestConfig has no 'port'; it has service_name, listen_port"),
    ("local_model_directory_path", 5, "local_model_directory_path is 5; it must be text"),
    ("service_name", "", "service_name is ''"), ("service_name", " ", "service_name is ' '"),
    ("service_name", 5, "service_name is 5"), ("api_key", None, "api_key is"),
    ("api_key", 5, "api_key is"), ("models_instances", [Doubler], "models_instances has <class"),
    ("models_instances", [Doubler(), 5], "models_instances has 5; it must be an instance of"),
])
def test_a_wrong_value_is_refused_with_what_is_allowed(name, value, message, monkeypatch):
    fields = {"service_name": "a"}
    if name.startswith("MEST_"):
        monkeypatch.setenv(name, value)
    else:
        fields[name] = value
    with pytest.raises(MestError) as caught:
        MestConfig(**fields)
    assert message in str(caught.value)


# Logging


def test_the_logger_is_that_of_the_service_name_with_its_level_and_one_handler(capsys, mest_app):
    logger, other = logging.getLogger(mest_app.config.service_name), logging.NullHandler()
    logger.addHandler(other)
    mest_app.config.log_level = "WARNING"
    assert Mest(mest_app.config).logger is mest_app.logger is logger
    assert other in logger.handlers
    logger.info("silent")
    logger.warning("heard")
    assert [line["message"] for line in log_of(capsys)] == ["heard"]
    assert not logger.propagate


@pytest.mark.parametrize("extra, members", [
    ({"user": 5}, {"user": 5}), ({"user": "a\n\u2028é"}, {"user": "a\n\u2028é"}),
    ({"user": {"id": [5, None]}, "ok": True}, {"user": {"id": [5, None]}, "ok": True}),
    ({"at": datetime.date(2026, 1, 2)}, {"at": "2026-01-02"}), ({"it": print}, {"it": str(print)}),
    ({"map": {(1, 2): 3, "a": 1}}, {"map": {"a": 1}}), ({"request_id": "me"}, {"request_id": "me"}),
    ({"level": 1, "time": 2, "logger": 3}, {"level_": 1, "time_": 2, "logger_": 3}),
])
def test_what_is_given_as_extra_is_a_member_of_the_json_line(capsys, extra, members):
    logger = make().logger
    logger.info("hi", extra=extra)
    (line,) = log_of(capsys)
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "INFO", "logger": logger.name, "message": "hi", **members}


def test_a_log_line_is_a_json_object_with_the_id_of_its_request_and_the_traceback(capsys):
    def handler():
        extra = {"request_id": "mine", "traceback": "mine"}
        error = ValueError("its own")
        flask.current_app.logger.error("two\nlines %s", "é", exc_info=error, extra=extra)

    route(handler)(headers={"X-Request-Id": "r-1"})
    (line,) = log_of(capsys)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert line.pop("logger") in logging.root.manager.loggerDict
    assert line == {"level": "ERROR", "request_id": "r-1", "request_id_": "mine",
                    "message": "two\nlines é", "traceback": "ValueError: its own"}


@pytest.mark.parametrize("text, extra", [
    ("a\n2026 INFO forged", {}), ("a\r2026 INFO forged", {}), ("a\u20282026 INFO forged", {}),
    ("hi", {"user": 5, "bad": "a\n2026 INFO forged"}),
])
def test_text_from_a_client_cannot_forge_a_line(text, extra, capsys):
    error = ValueError("first\n2026-01-01 INFO forged")
    make(log_format="text").logger.error(text, exc_info=error, extra=extra)
    first, *rest = capsys.readouterr().out.rstrip("\n").split("\n")
    assert re.match(r"\d{4}-\d\d-\d\dT[\d:.+]+ ERROR \w+ ", first)
    assert [line[:4] for line in rest] == ["    "] * 2


# JSON

NINES, EITHER = b"9" * 400, {"type": ["integer", "string"]}
BOM, BODY = b"\xef\xbb\xbf", b'{"x": 3}'
ANY = {"x": {"nullable": True}, "n": {"type": "list"}, "i": {"type": "list", "schema": N}}


@pytest.mark.parametrize("body, detail", [
    (b" \n", "not valid JSON"), (b'{"x": 1', "not valid JSON"), (b"no", "not valid JSON"),
    (b"{'x': 2}", "double quotes"), (b'{"x": 1} 2', "not valid JSON"), (b'{"x": "\xff"}', "utf-8"),
    (b'{"x": NaN}', "not finite"), (b'{"x": [-Infinity]}', "not finite"),
    (b'{"n": [1, 1e999]}', "not finite"), (b'{"x": {"y": [-1e999]}}', "not finite"),
    (b'{"n": [1, %b]}' % NINES, "too large for a float"),
    (b'{"i": [%b, -%b]}' % (NINES, NINES), "too large"), (b'{"e": %b}' % NINES, "too large"),
    (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
    (b'{"x": ' + b"[" * 150 + b"]" * 150 + b"}", "nested deeper than 100 levels"),
    (b'{"x": ' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"}", "nested deeper than 100 levels"),
    (rb'{"x": "\ud800"}', "surrogate"), (rb'{"\udc00": 1}', "surrogate"),
    *((body, "not valid JSON") for body in [
        BOM, BOM + b" ", BOM + BOM + BODY, BODY + BOM, b" " + BOM + BODY, BOM[:2] + BODY,
        b"\xff\xfe", *map(BODY.decode().encode, ["utf-16", "utf-16-le", "utf-32"]),
    ]),
])
def test_a_request_is_decoded_strictly(body, detail):
    response = ask({**ANY, "e": EITHER})(data=body, headers=JSON)
    assert response.status_code == 400
    assert detail in response.json["detail"]


@pytest.mark.parametrize("body, x", [
    (rb'{"x": "\ud83d\ude00"}', "\U0001f600"), (b'{"x": 1%b}' % (b"0" * 300), 10**300),
    (rb'{"x": "\\ud800"}', r"\ud800"), (b'\r\n\t {"x": null} ', None),
    (b'{"x": ' + b"[" * 99 + b"]" * 99 + b"}", functools.reduce(lambda v, _: [v], range(98), [])),
    (BOM + BODY, 3), (BOM + b"\n " + BODY, 3),
])
def test_all_other_json_is_taken_if_it_is_an_object(body, x):
    assert ask(ANY)(data=body, headers=JSON).json == {"x": x}
    for wrong in (b"null", b'[{"x": 1}]', b'"x"', b"5", b"true", BOM + b"[]"):
        response = ask(ANY)(data=wrong, headers=JSON)
        assert response.status_code == 422
        assert "send an object" in response.json["detail"]


@pytest.mark.parametrize("result, text, kind", [
    ({"b": 1, "a": [1.5, True, None]}, '{"b":1,"a":[1.5,true,null]}\n', "application/json"),
    ([1, "é"], '[1,"é"]\n', "application/json"), (3, "3\n", "application/json"),
    (False, "false\n", "application/json"), (None, "null\n", "application/json"),
    *((text, text, "text/plain; charset=utf-8") for text in ["5", "<b>hi</b>", "", '{"a": 1}']),
])
def test_data_is_answered_as_json_and_text_as_text(result, text, kind):
    response = route(lambda: result)()
    assert (response.status_code, response.text, response.content_type) == (200, text, kind)


def typed(value):
    """A value with what == overlooks: types, the order of keys, the sign of 0."""
    if isinstance(value, dict):
        return [(key, typed(item)) for key, item in value.items()]
    return [list, *map(typed, value)] if type(value) is list else (type(value), repr(value))


class Array:
    """What numpy, torch and pandas have in common, and a scalar of theirs may have only `item`."""

    def __init__(self, value, method="tolist"):
        setattr(self, method, lambda: value)


Size = IntEnum("Size", {"BIG": 3})
Point = dataclasses.make_dataclass("Point", ["x", "y"])
Fixed = dataclasses.make_dataclass("Fixed", ["x"], frozen=True)
CIRCLE = []
CIRCLE.append(CIRCLE)
AT = "2024-01-02T03:04:05"


def value_of(source):
    """The value of an expression, which may be about packages that are not installed."""
    packages = {name: pytest.importorskip(name) for name in ("numpy", "pandas") if name in source}
    return eval(source, {**globals(), **vars(decimal), **vars(uuid), **vars(datetime), **packages})


@pytest.mark.parametrize("source, sent", [
    ("date(2024, 1, 2)", "2024-01-02"), ("datetime(2024, 1, 2, 3, 4, 5)", AT),
    ("datetime(2024, 1, 2, 3, 4, 5, 6, UTC)", f"{AT}.000006+00:00"),
    (f"pandas.Timestamp('{AT}')", AT), ("Size.BIG", 3), ("Array(3, 'item')", 3),
    (f"pandas.Timestamp('{AT}.123456789', tz='UTC')", f"{AT}.123456789+00:00"),
    ("numpy.float32(.5)", 0.5), ("numpy.int64(3)", 3), ("numpy.uint64(2**64 - 1)", 2**64 - 1),
    ("numpy.str_('é')", "é"), ("[Array([[0.5]]), (Array(2, 'item'),)]", [[[0.5]], [2]]),
    ("Point(Fixed(1), date(2024, 1, 2))", {"x": {"x": 1}, "y": "2024-01-02"}),
    ("{'p': numpy.float32(0.5), 1: numpy.bool_(True)}", {"p": 0.5, "1": True}),
    ("numpy.arange(6).reshape(2, 3)", [[0, 1, 2], [3, 4, 5]]), ("numpy.array(5)", 5),
    ("numpy.array([date(2024, 1, 2), 1], object)", ["2024-01-02", 1]),
    ("pandas.Series([1, 2])", [1, 2]),
])
def test_dates_are_sent_in_iso_8601_numbers_as_numbers_and_arrays_as_lists_of_them(source, sent):
    value = value_of(source)
    assert typed(json.loads(mest.encode(value))) == typed(sent)
    within = json.loads(mest.encode({"a": [value, (Point([value], 2),)], "b": Array([value])}))
    assert within == {"a": [sent, [{"x": [sent], "y": 2}]], "b": [sent]}


@pytest.mark.parametrize("source, reason", [
    ("{1, 2}", "a set in the result has no form in JSON; return a dictionary, list"),
    ("frozenset()", "a frozenset"), ("Array({1})", "a set"),
    ("1j", "a complex"), ("numpy.complex128(1j)", "a complex"), ("numpy.array([1j])", "a complex"),
    ("object()", "a object"), ("b'raw'", "a bytes"), ("numpy.bytes_(b'raw')", "a bytes"),
    ("range(3)", "a range"), ("Point", "a type"), ("pandas.DataFrame({'a': [1]})", "a DataFrame"),
    ("pandas.NA", "NAType"), ("numpy.array([1, numpy.nan])", "not JSON"), ("{NAN: 3}", "not JSON"),
    ("NAN", "not JSON compliant"), ("float('-inf')", "not JSON"), ("Array([NAN])", "not JSON"),
    ("pandas.NaT", "NaT"), ("numpy.datetime64('2024')", "a datetime64"), ("UUID(int=7)", "a UUID"),
    ("numpy.array(['2024', 'NaT'], 'M8[Y]')", "a ndarray"), ("Decimal(3)", "a Decimal"),
    ("pandas.to_datetime(['2024', None])", "a Datetime"), ("numpy.array([pandas.NaT])", "NaT"),
    ("numpy.timedelta64(1, 'ns')", "timedelta64"), ("numpy.array([1], 'm8[M]')", "a ndarray"),
    ("numpy.clongdouble(1j)", "a clongdouble"), ("numpy.array([1j], 'G')", "a clongdouble"),
    ("CIRCLE", "Circular reference"), ("'\\ud800'", "surrogates"), ("{(1, 2): 3}", "tuple"),
    ("{UUID(int=7): 1}", "keys must be"), ("{numpy.int64(1): 1}", "keys must be"),
])
def test_what_json_cannot_express_is_an_error_and_never_a_wrong_value(source, reason):
    value = value_of(source)
    for result in (value, {"a": [value]}):
        with pytest.raises((TypeError, ValueError), match=reason):
            mest.encode(result)


# Parameters


def test_the_body_wins_over_the_query_and_the_path_over_both(router):
    schema = {"x": N, "y": N, "n": {"max": 9}, "word": N}
    router.route("/<word>/<int:n>/<other>")(validate_params(schema)(lambda **params: params))
    renamed = validate_params({"n": {"rename": "m"}, "m": {}})(lambda m: m)
    router.route("/<n>", endpoint="renamed")(renamed)
    client = client_of(router)
    sent = client.post("/5/7/a?x=1&y=2&n=3", json={"x": 3, "n": 1, "word": 6})
    assert sent.json == {"x": 3, "y": 2, "n": 7, "word": 5, "other": "a"}
    assert client.post("/5/10/a").json["errors"] == {"n": ["max value is 9"]}
    assert client.post("/5").text == "5"


QUERY = {
    "n": N, "f": F, "b": {"type": "boolean"}, "s": {"type": "string"}, "any": {},
    "v": {"type": "list", "schema": F}, "either": {"type": ["boolean", "number"]},
}


@pytest.mark.parametrize("query, params", [
    ("n=3&f=2.5e1&b=True&s=7&either=4&any=5",
     {"n": 3, "f": 25.0, "b": True, "s": "7", "either": 4, "any": "5"}),
    ("v=1&v=2.5", {"v": [1, 2.5]}), ("v=1", {"v": [1]}), ("", {}), ("s=", {"s": ""}),
    ("s=%C3%A9+a%26", {"s": "é a&"}), ("any=1&any=2", {"any": ["1", "2"]}),
    *((query, query[0]) for query in [
        "n=x", "n=2.5", "f=nan", "f=inf", "b=maybe", "b=1", "v=1&v=x", "n=1&n=2", "n=",
        "n=1_0", "n=null", "z=1",
    ]),
])
def test_parameters_come_from_the_query(query, params):
    for method in ("GET", "POST"):
        response = ask(QUERY)(f"?{query}", method, headers=JSON if method == "GET" else {})
        answer = params if isinstance(params, dict) else [params]
        assert (list(response.json.get("errors", [])) or response.json) == answer


@pytest.mark.parametrize("sent, status, detail", [
    ({"data": b"x", "content_type": "text/plain"}, 415, "'text/plain'; send a JSON object"),
    ({"data": b"x"}, 415, "Content-Type 'none'; send a JSON object"),
    ({"data": b' {"x": 1}', "content_type": FORM}, 415, "Content-Type: application/json"),
    ({"data": b"x", "content_type": "multipart/form-data"}, 400, "not a valid form"),
    ({"data": b"x", "content_type": "multipart/form-data; boundary=b"}, 400, "not a valid form"),
    ({"data": b"x" * 1001, "headers": JSON}, 413, "longer than 1000 bytes"),
    ({}, 422, "not valid"), ({"headers": JSON}, 422, "not valid"),
    *(({"data": b'{"x": 1}', "content_type": kind}, 200, None) for kind in [
        "application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON ",
    ]),
    ({"json": {"x": 1}, "headers": {"Content-Encoding": "Identity"}}, 200, None),
])
def test_a_body_that_cannot_be_taken_is_refused_with_what_to_send(router, sent, status, detail):
    router.route("it")(validate_params(X)(lambda x: {"read": flask.request.get_json()}))
    response = client_of(router, max_body_bytes=1000).post("/it", **sent)
    assert response.status_code == status
    assert detail in response.json["detail"] if detail else response.json == {"read": {"x": 1}}


@pytest.mark.parametrize("schema, reason", [
    ({"a": 5}, "not iterable"), ({"a": {"type": "flaot"}}, "Unsupported types: flaot"),
    ({"a": {"tpye": "float"}}, "unknown rule"), ({"a": "nosuch"}, "must be of dict type"),
    ({"a": {"type": "string", "regex": "("}}, "unterminated"),
    ({"a": {"type": "list", "schema": {"type": "string", "regex": "("}}}, "unterminated"),
    ({"a": {**F, "default": "x"}}, "refuses its own default: {'a': ['must be of float type']}"),
    ({"a": {"default": None}}, "refuses its own default: {'a': ['null value not allowed']}"),
])
def test_a_mistake_in_a_schema_is_found_when_it_is_declared(router, schema, reason):
    for declare in (validate_params(schema), lambda it: router.add_predict_route(it, schema)):
        with pytest.raises(MestError, match="the schema is wrong: ") as caught:
            declare(Doubler())
        assert reason in str(caught.value)


class Words:
    known, lock = ["a"], threading.Lock()  # which cannot be copied

    def check(self, field, value, error):
        if value == "fail":
            raise ZeroDivisionError
        if value not in self.known:
            error(field, "is unknown")


@pytest.mark.parametrize("rules, sent, answer", [
    ({"coerce": int, "max": 9}, "3", 3), ({"default": 5}, ..., 5), ({"nullable": True}, None, None),
    ({"type": "dict", "purge_unknown": True, "schema": {"e": {"default": 1}}}, {"z": 1}, {"e": 1}),
    ({"check_with": Words().check}, "a", "a"), ({"check_with": Words().check}, "b", 422),
    ({"check_with": Words().check}, "fail", 500), ({"coerce": float}, "nan", 422),
    ({"type": "list", "forbidden": ["a"]}, [{}], 422), ({"allowed": {"a"}}, [{}], 422),
    ({"type": "list", "contains": ["a"]}, [{}], 422), ({"allowed": [1, "x"]}, "x", "x"),
])
def test_the_handler_receives_what_cerberus_makes_of_the_parameters(rules, sent, answer):
    response = ask({"a": rules})(json={} if sent is ... else {"a": sent})
    if answer in (422, 500):
        assert (response.status_code, response.json["status"]) == (answer, answer)
    else:
        assert response.json == {"a": answer}


NESTED = {
    "a": {"type": "list", "schema": {"type": "dict", "schema": {"b": {**N, **SURE}}}},
    "c": {"anyof": [{"type": "string"}, {**N, "max": 3}]}, "d": {"allowed": ["x"]},
    "v": {"type": "list", "maxlength": 900, "schema": F},
}


@pytest.mark.parametrize("document", [
    {"a": [{"b": 1}, {}, {"b": "x", "e": 1}], "c": 9, "d": "y", "f": 1}, {"v": [1] * 901},
    {"v": [1.5] * 800 + ["x"] + [2] * 50 + [None], "a": [{"b": 1}] * 300 + [{}]},
])
def test_errors_are_those_of_cerberus(document):
    validator = cerberus.Validator(copy.deepcopy(NESTED))
    assert not validator.validate(document)
    assert ask(NESTED)(json=document).json["errors"] == json.loads(json.dumps(validator.errors))


# The compiled check, beside Cerberus


class Wild(random.Random):
    """Random schemas, and documents that fit them more or less."""

    VALUES = [
        None, True, False, 0, 1, 2, -1, 1.5, -0.0, 10**400, -(10**400), "", "a", "b", "ab", "a\n",
        [], {}, [1], [None], [[]], {"a": 1}, [10**400, -(10**400)], b"a", b"", float("inf"),
    ]
    FITTING = {
        "float": [0.5, 1.5, 1, 2, True, 2.5, 0], "integer": [0, 1, 2, 3, True],
        "number": [0, 1, 2.5, 1.5], "boolean": [True, False], "binary": [b"a", b"", b"abc"],
        "string": ["a", "aa", "b", "ab", "", "abc"],
    }
    #: rules: of which types, with which chance, and which constraints
    RULES = [
        ("nullable", "", 0.15, [True, False]), ("required", "", 0.3, [True, True, False]),
        ("empty", "", 0.08, [True, False]), ("meta", "", 0.03, [{"x": 1}]),
        ("min", "float integer number boolean several", 0.3, [0, -1.5, 1, 2]),
        ("max", "float integer number boolean several", 0.3, [2, 1.5, 3, 10]),
        ("minlength", "string list dict binary", 0.15, [0, 1, 2, 3]),
        ("maxlength", "string list dict binary", 0.15, [0, 1, 2, 3]),
        ("regex", "string several", 0.3, ["a+", "[ab]*$", "", "a|b"]),
        ("allow_unknown", "dict", 0.15, [True, False]),
        ("require_all", "dict", 0.15, [True, False]),
        ("keysrules", "dict", 0.15, [{"type": "string", "regex": "[a-c]+"}, {"maxlength": 1}]),
    ]

    def perhaps(self, chance):
        return self.random() < chance

    def rules(self, depth):
        deep = ["float", "integer", "list", "dict", "any", "several"] if depth else []
        kind = self.choice([*self.FITTING, *deep])
        rules = {"type": kind}
        if kind == "any":
            rules = {"allowed": [1, "a", True]} if self.perhaps(0.4) else {}
        elif kind == "several":
            rules = {"type": self.sample([*self.FITTING, "list", "dict", "date"], 2)}
        for rule, kinds, chance, constraints in self.RULES:
            if (not kinds or kind in kinds.split()) and self.perhaps(chance):
                rules[rule] = self.choice(constraints)
        if kind in ("string", "integer", "list", "float") and self.perhaps(0.15):
            values = [1, 2, "a", "b", True, 0, 1.5, "ab"]
            rules[self.choice(["allowed", "forbidden"])] = self.sample(values, 3)
        if kind == "list" and self.perhaps(0.8):
            within = self.rules(depth - 1)
            rules |= self.choice([{"schema": within}, {"items": [within, self.rules(0)]}])
        if kind == "dict" and self.perhaps(0.7):
            rules["schema"] = self.schema(depth - 1)
        if kind == "dict" and self.perhaps(0.15):
            rules["valuesrules"] = self.rules(0)
        if self.perhaps(0.2):
            rules["default"] = self.value(rules, 0)
        return rules

    def schema(self, depth=3):
        fields = self.sample("abcde", self.randrange(1, 5))
        return {field: self.rules(depth) for field in fields}

    def value(self, rules, wildness):
        kind = rules.get("type", "any")
        kind = self.choice(kind) if isinstance(kind, list) else kind
        if self.perhaps(wildness):
            return self.choice(self.VALUES)
        if rules.get("nullable") and self.perhaps(0.2):
            return None
        if kind == "list":
            same = [rules.get("schema", N)] * self.randrange(4)
            return [self.value(item, wildness / 2) for item in rules.get("items") or same]
        if kind == "dict":
            schema = rules.get("schema", {"a": rules.get("valuesrules", {})})
            unknown = {"z": self.choice(self.VALUES)} if self.perhaps(0.1) else {}
            return self.document(schema, wildness) | unknown
        return self.choice(rules.get("allowed") or self.FITTING.get(kind) or self.VALUES)

    def document(self, schema, wildness):
        chances = {field: 0.97 if rules.get("required") else 0.8 for field, rules in schema.items()}
        fields = [field for field, chance in chances.items() if self.perhaps(chance)]
        self.shuffle(fields)
        unknown = {"unknown": 1} if self.perhaps(wildness / 2) else {}
        return {field: self.value(schema[field], wildness) for field in fields} | unknown


def compare(parameters, validator, document):
    """Check a document as Mest and as Cerberus do, and return whether that accepts it."""
    given = copy.deepcopy(document)
    try:
        is_valid = validator.validate(copy.deepcopy(document))
        is_valid = is_valid and not mest.fault_of([document, validator.document])
    except (TypeError, RuntimeError):
        is_valid = False  # Cerberus stumbles over it
    try:
        checked = parameters.check(given)
    except Problem:
        checked = None
    expected = validator.document if is_valid else None
    if is_valid:  # in the order of the schema
        known = {name: expected[name] for name in validator.schema if name in expected}
        expected = {**known, **expected}
    assert typed(checked) == typed(expected), (validator.schema, document)
    return is_valid


@pytest.mark.parametrize("seed", range(4))
def test_a_compiled_check_accepts_what_cerberus_accepts_and_makes_the_same_of_it(seed):
    wild, compiled, accepted, sure = Wild(seed), 0, 0, 0
    for _ in range(200):
        schema = wild.schema()
        if is_coerced := wild.perhaps(0.3):  # which only Cerberus can do
            schema["n"] = {"coerce": int}
        try:
            parameters = mest.Parameters(schema, None, "it")
        except MestError:
            continue  # a default that does not fit
        if mest.fault_of(schema):
            continue  # one that is not finite
        compiled += parameters.check_quickly is not None
        validator = cerberus.Validator(copy.deepcopy(schema))
        for _ in range(6):
            document = wild.document(schema, wild.choice([0, 0, 0.1, 0.5]))
            document |= {"n": "1"} if is_coerced else {}
            sure += parameters.quick(copy.deepcopy(document)) is not None
            accepted += compare(parameters, validator, document)
    assert compiled > 25
    assert accepted > 300
    assert sure > 0.2 * accepted


ROW = {"type": "dict", "schema": {"a": {**N, "default": 1}}}
ROWS = {"type": "list", "schema": {"type": "dict", "schema": {"q": N}}}
HUGE = 10**400


@pytest.mark.parametrize("schema, document", [
    ({"x": {"anyof": [{"type": "list", "schema": ROW}, {"type": "string"}]}}, {"x": [{}]}),
    ({"x": {"noneof": [{"type": "list", "schema": ROW}]}}, {"x": [{"a": "b"}]}),
    ({"n": {"coerce": int}, "a": {"type": "dict", "require_all": True, "schema": {"l": ROWS}}},
     {"n": "1", "a": {"l": [{}]}}),
    ({"a": {"type": "dict", "allow_unknown": True, "schema": {"l": ROWS}}},
     {"a": {"l": [{"z": 1}]}}), ({"l": {**ROWS, "allow_unknown": True}}, {"l": [{"z": 1}]}),
    ({name: {**N, "default": 1} for name in "cdab"}, {}),
    ({"x": {"type": "list", "schema": {**N, "default": 5}}}, {"x": [1, None]}),
    ({"x": {"type": "list", "schema": ROW}}, {"x": [{}, {"a": None}, {"a": 2}]}),
    ({"a": {"type": "dict", "schema": {"b": {**ROW, "default": {}}}}}, {"a": {}}),
    ({"x": {"type": "list", "items": []}}, {"x": [1]}),
    ({"x": {"type": "list", "schema": {"anyof": [N, {"type": "list"}]}}}, {"x": [1, [2], ["a"]]}),
    *(({"x": rules}, {"x": value}) for number in (float("inf"), HUGE) for high in (HUGE**2, 1e300)
      for rules, value in [({**F, "max": high}, number), ({"type": "list", "schema": F}, [number]),
                           ({"type": "dict", "valuesrules": {**F, "max": high}}, {"a": number})]),
    ({"x": {"type": "list", "schema": F}}, {"x": [HUGE, -HUGE]}), ({"x": EITHER}, {"x": HUGE}),
    ({"x": {**ROW, "minlength": 1}}, {"x": {}}), ({"x": {**ROW, "maxlength": 0}}, {"x": {}}),
])
def test_rules_next_to_each_other_mean_what_they_mean_to_cerberus(schema, document):
    compare(mest.Parameters(schema, None, "it"), cerberus.Validator(schema), document)


# Annotations and arguments


def annotated(a: int, b: bool, c: bytes, d: dict, f: list[list[int]],
              g: Literal["x", "y"], h: "str | None", i: str = "j", k: int | None = None, *s, **m,
              ) -> "numpy.ndarray":  # noqa: F821 # known to type checkers only
    pass


def test_annotations_make_a_schema():
    assert mest.schema_of(annotated) == {
        "a": {**N, **SURE}, "b": {"type": "boolean", **SURE}, "c": {"type": "binary", **SURE},
        "d": {"type": "dict", **SURE}, "i": {"type": "string", "default": "j"},
        "f": {"type": "list", "schema": {"type": "list", "schema": N}, **SURE},
        "g": {"type": "string", "allowed": ["x", "y"], **SURE},
        "h": {"type": "string", "nullable": True, **SURE},
        "k": {**N, "nullable": True, "default": None},
    }


@pytest.mark.parametrize("annotation", [
    "list[complex]", "int | str", "object", "Literal[None]", "nosuch", "5", "tuple[int]",
    "dict[str, int]", None, "list[int, str]", "Literal[1, 'a']",
])
def test_an_annotation_that_stands_for_no_rules_is_refused(annotation):
    def function(x):
        pass

    function.__annotations__ = {"x": annotation} if annotation else {}
    fault = re.escape(annotation) if annotation else "x"
    with pytest.raises(MestError, match=rf"has the argument .*{fault}.*; annotate it with bool"):
        mest.schema_of(function)


A, AB = {"a": {}}, {"a": SURE, "b": {}}
EXCLUDING = {"a": {**SURE, "excludes": "b"}, "b": {**SURE, "excludes": "a"}}


@pytest.mark.parametrize("schema, url, handler, fault", [
    (A, "", lambda b: 1, "required argument: 'b'; match its arguments with the schema"),
    (None, "", lambda a: 1, "required argument: 'a'; is @validate_params missing below the route"),
    (A, "<n>", lambda a=0: 1, "unexpected keyword argument 'n'"),
    (A, "", lambda: 1, "unexpected .*'a'"), (A, "", lambda a=0, /: 1, "positional"),
    (A, "", lambda a: 1, "'a'; .*what that requires"),
    (EXCLUDING, "", lambda a=0, b=0: 1, ""), (AB, "", lambda a, b=0: 1, ""),
    (AB, "<n>", lambda a, n, **others: 1, ""), (AB, "", lambda a, *, b=0: 1, ""),
    ({"a": {"default": 1}}, "", lambda a: 1, ""), (None, "<n>", lambda n: 1, ""),
    ({"a": {"default_setter": lambda document: 1}}, "", lambda a: 1, ""),
    ({"a": {"rename": "b"}}, "", lambda b: 1, ""), ({"a": {"readonly": True}}, "", lambda: 1, ""),
    (A, "", functools.wraps(lambda user, a=0: 1)(lambda **given: 1), ""),
    (None, "", functools.partial(lambda x: 1, 1), ""), (None, "", dict, ""),
])
def test_a_handler_must_be_able_to_take_what_it_will_be_given(router, schema, url, handler, fault):
    handler = handler if schema is None else validate_params(schema)(handler)
    router.route(f"it/{url}", endpoint="it")(handler)
    if fault:
        with pytest.raises(MestError, match=rf" does not fit: .*{fault}"):
            make().register_router("/", router)
    else:
        assert client_of(router).post(f"/it/{url and 5}", json={"a": 1}).status_code in (200, 422)


# Requests and metrics


def over_wsgi(mest_app, url="/predict", method="POST", parts=(b'{"x": 3}',), headers=None):
    """The same as over_asgi of a WSGI server, such as gunicorn's gthread worker."""
    body = b"".join(parts)
    headers = Headers({**JSON, "X-Request-Id": "r1"} if headers is None else headers)
    environ = {"PATH_INFO": unquote_to_bytes(url.partition("?")[0]).decode("latin-1")}
    environ["CONTENT_TYPE"] = ",".join(headers.getlist("Content-Type"))
    environ["wsgi.input_terminated"] = is_chunked = "Transfer-Encoding" in headers
    environ["CONTENT_LENGTH"] = "" if is_chunked else headers.get("Content-Length", str(len(body)))
    sent = {"headers": headers, "input_stream": io.BytesIO(body), "environ_overrides": environ}
    response = contextvars.Context().run(
        mest_app.app.test_client().open, url, method=method, **sent
    )
    named = {name.lower(): value for name, value in response.headers}
    return types.SimpleNamespace(status=response.status_code, headers=named, body=response.data)


on_both_edges = pytest.mark.parametrize("edge", [over_asgi, over_wsgi])
GET = {"method": "GET", "parts": [b""]}


class Ready(Doubler):
    """Doubles a number.

    Exactly.
    """

    model = 2  # so that there is nothing to load

    def __len__(self):
        return 0  # as models of containers may


def serving(model=None, schema=X, handler=None, **fields):
    """A Mest with the predict route of a model, and a handler at /it, say."""
    mest_app, router = make(threads=2, **fields), Router("v1")
    router.add_predict_route(Ready() if model is None else model, schema)
    if handler:
        router.route("it", methods=["GET", "POST"], endpoint="it")(handler)
    mest_app.register_router("/", router)
    return mest_app


def growth(name, **labels):
    """A function that tells by how much a metric of the process has grown since now."""
    registry = pytest.importorskip("prometheus_client").REGISTRY
    before = registry.get_sample_value(name, labels) or 0
    return lambda: (registry.get_sample_value(name, labels) or 0) - before


@on_both_edges
@pytest.mark.parametrize("sent, is_sane", [
    ("job/7:3.a_b-c+d@e=", True), ("x" * 128, True), ("x" * 129, False), ("", False),
    ("a b", False), ("a\tb", False), ("\x1b", False), ("é", False), ("a²", False),
])
def test_the_id_of_a_request_is_the_clients_unless_that_could_do_harm(edge, sent, is_sane):
    answers = [edge(serving(), headers={"X-Request-Id": sent}, parts=[b"{}"]) for _ in "12"]
    first, second = (answer.headers["x-request-id"] for answer in answers)
    assert json.loads(answers[0].body)["request_id"] == first
    assert (first == second == sent) == is_sane
    assert is_sane or re.fullmatch("[0-9a-f]{32}", first)
    assert is_sane or first != second
    serving().app.test_client().get("/livez")
    assert mest.EXCHANGE.get() is None  # afterwards


@on_both_edges
@pytest.mark.parametrize("sent, route, method, status", [
    ({}, "/predict", "POST", 200), ({"parts": [b"{"]}, "/predict", "POST", 400),
    ({"parts": [b" " * 101]}, "/predict", "POST", 413),
    ({"url": "/it?a=1"}, "/it", "POST", 200), ({"url": "/it", **GET}, "/it", "GET", 200),
    ({"url": "/livez", **GET}, "/livez", "GET", 200), ({"url": "/hunter2"}, "other", "POST", 404),
    ({"method": "HUNTER2"}, "other", "other", 405),
])
def test_an_answer_is_counted_under_what_clients_cannot_make_up(edge, sent, route, method, status):
    in_progress = growth("mest_requests_in_progress")
    mest_app = serving(handler=lambda: str(in_progress()), max_body_bytes=100)
    counted = growth("mest_requests_total", route=route, method=method, status=str(status))
    timed = growth("mest_request_duration_seconds_count", route=route)
    answer = edge(mest_app, **sent)
    assert answer.status == status
    assert route != "/it" or answer.body == b"1.0"
    assert [counted(), timed(), in_progress()] == [1, 1, 0]


@on_both_edges
def test_without_prometheus_client_there_are_no_metrics_and_all_else_works(edge, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert mest.metrics.__wrapped__() is None
    monkeypatch.setattr(mest, "metrics", lambda: None)
    mest_app = serving(Squares())
    assert edge(mest_app).body == b"9\n"
    assert edge(mest_app, "/metrics", **GET).status == 404


@on_both_edges
@pytest.mark.parametrize("access_log", [True, False])
def test_answers_are_logged_where_that_is_asked_for(edge, access_log, capsys):
    edge(serving(access_log=access_log), "/a%0Ab?secret", method="GET")
    lines = [[line["path"], line["status"], line["request_id"]] for line in log_of(capsys)]
    assert lines == [["/a\nb", 404, "r1"]] * access_log


# Models


@pytest.mark.parametrize("value, args, kwargs", [
    ({"a": 1}, (), {"a": 1}), ([1, 2], (1, 2), {}), ((1, 2), ((1, 2),), {}), ([], (), {}),
    ("ab", ("ab",), {}), (None, (None,), {}), ({}, (), {}),
])
def test_between_the_stages_a_dictionary_is_keywords_and_a_list_is_positions(value, args, kwargs):
    model = GenericModel()
    model.pre_process, model.infer = lambda x: value, lambda *args, **kwargs: (args, kwargs)
    assert model.predict(x=1) == (args, kwargs)
    model.infer, model.post_process = lambda *args, **kwargs: value, model.infer
    assert model.predict(x=1) == (args, kwargs)


class Squares(GenericModel):
    """Squares. It keeps its batches, and one with a 0 lasts until it may go on."""

    model, max_batch_size = "squares", 32

    def __init__(self, **attributes):
        self.batches, self.entered, self.go_on = [], threading.Event(), threading.Event()
        vars(self).update(attributes)

    def infer_batch(self, payloads):
        values = [payload["x"] for payload in payloads]
        self.batches.append(values)
        if 0 in values:
            self.entered.set()
            assert self.go_on.wait(PATIENCE)
        return [x**2 for x in values]

    @contextlib.contextmanager
    def busy(self):
        """Keep it busy with a 0 meanwhile."""
        caller = threading.Thread(target=self.predict, kwargs={"x": 0}, daemon=True)
        caller.start()
        assert self.entered.wait(PATIENCE)
        try:
            yield
        finally:
            self.go_on.set()
            caller.join(PATIENCE)


def at_once(calls):
    """What functions return or raise that are called in a thread each."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
    return [future.exception() or future.result() for future in futures]


def together(model, values):
    """What predict returns or raises for values that come together, while the model is busy."""

    def go_on():
        wait_until(lambda: model._batcher.waiting == 1 + len(values))
        model.go_on.set()

    with model.busy():
        calls = [functools.partial(model.predict, x=x) for x in values]
        *outcomes, _ = at_once([*calls, go_on])
    return outcomes


def in_request(mest_app, model, x):
    """What a model predicts in a request to a service."""
    context = contextvars.Context()
    context.run(mest.EXCHANGE.set, mest.Exchange(mest_app, "POST", "/", ""))
    return context.run(model.predict, x=x)


@pytest.mark.parametrize("size, sizes", [(1, [1, 1, 1, 1]), (2, [1, 1, 2]), (32, [1, 3])])
def test_concurrent_calls_are_answered_in_batches_of_a_size_at_most(size, sizes):
    model = Squares(max_batch_size=size)
    assert together(model, [1, 2, 3]) == [1, 4, 9]
    assert sorted(map(len, model.batches)) == sizes


def test_a_lone_request_never_waits_for_others_and_one_at_most_for_a_crowd_that_has_gone():
    model = Squares(batch_timeout=0.5)
    began = time.monotonic()
    assert [model.predict(x=x) for x in range(1, 20)] == [x**2 for x in range(1, 20)]
    assert time.monotonic() - began < 0.5
    assert together(model, [1, 2, 3]) == [1, 4, 9]
    model.predict(x=1)
    began = time.monotonic()
    assert [model.predict(x=x) for x in (2, 3, 4)] == [4, 9, 16]
    assert time.monotonic() - began < 0.5


class Faulty(Squares):
    def infer_batch(self, payloads):
        results = super().infer_batch(payloads)
        values = self.batches[-1]
        for x, error in [(13, ValueError("unlucky")), (5, SystemExit(3))]:
            if x in values:
                raise error
        if 99 in values:
            return results[:-1]
        if 98 in values:
            return dict(enumerate(results))
        return [KeyError(7) if x == 7 else x**2 for x in values]


@pytest.mark.parametrize("size", [1, 32])
@pytest.mark.parametrize("x, kind, text, calls", [
    (13, ValueError, "unlucky", 3), (7, KeyError, "7", 0), (5, RuntimeError, "SystemExit.3", 3),
    (99, MestError, "infer_batch returned list, not .* result for each", 3),
    (98, MestError, "infer_batch returned dict, not .* result for each", 3),
])
def test_who_fails_fails_alone_after_one_more_try(size, x, kind, text, calls):
    model = Faulty(max_batch_size=size)
    with pytest.raises(kind, match=text):
        model.predict(x=x)
    assert model._batcher.waiting == 0
    first, failed, last = together(model, [1, x, 2])
    assert [first, type(failed), last] == [1, kind, 4]
    assert re.search(text, str(failed))
    assert len(model.batches) == (5 if size == 1 else 3 + calls)


@pytest.mark.parametrize("size, concurrency", [(1, 1), (1, 3), (4, 1), (4, 3)])
def test_nothing_is_lost_or_mixed_up_however_threads_take_turns(size, concurrency, request):
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-5)
    model = Squares(max_batch_size=size, max_concurrency=concurrency, batch_timeout=0.001)
    model.pre_process = lambda x: time.sleep(x % 3 / 5000) or {"x": x}
    mest_app = make(max_queued_requests=6)

    def ask(x):
        try:
            return in_request(mest_app, model, x)
        except Problem as problem:
            return -problem.code

    calls = [lambda at=at: [(x, ask(x)) for x in range(at, at + 60)] for at in range(1, 1441, 60)]
    outcomes = [*itertools.chain(*at_once(calls))]
    assert [(x, got) for x, got in outcomes if got not in (x**2, -503)] == []
    assert -503 in {got for _, got in outcomes}
    wait_until(lambda: model._batcher.waiting == 0)
    assert model._batcher.threads <= concurrency
    assert model.predict(x=3) == 9


def test_a_child_of_a_fork_has_threads_and_ids_of_its_own_and_ends(project):
    project.write(forks="""
import os, mest
class Model(mest.GenericModel):
    max_batch_size = 8
    def infer_batch(self, payloads):
        return [payload["x"] + 1 for payload in payloads]
model, service = Model(), mest.Mest("a")
assert model.predict(x=1) == 2
child = os.fork()
line = f"{model.predict(x=2)} {mest.Exchange(service, 'GET', '/', '').id}\\n"
os.write(1, line.encode())  # at once: both write to the same pipe
assert child == 0 or os.waitpid(child, 0)[1] == 0
""")
    done = project.mest(command=("-W", "ignore", "forks.py"))
    assert done.returncode == 0
    assert [*map(len, done.stdout.split())] == [1, 32] * 2
    assert len({*done.stdout.split()}) == 3


# Routes


def test_a_predict_route_answers_with_the_model(router):
    model = Doubler()
    router.add_predict_route(model, X, example={"x": 1})
    router.add_predict_route(model, X, url="again", method="GET")
    power = types.SimpleNamespace(predict=lambda x, n: x**n if n else b"\xff")
    router.add_predict_route(power, X, url="/power/<int:n>")
    mest_app = make(models=[model]).setup()
    mest_app.register_router("/", router)
    client = mest_app.app.test_client()
    assert client.post("/predict", json={"x": 1.5}).json == {"y": 3.0}
    assert client.get("/again?x=2").json == {"y": 4}
    assert client.post("/power/3", json={"x": 2}).data == b"8\n"
    assert client.post("/power/0", json={"x": 2}).data == b"\xff"


def test_a_model_that_is_not_loaded_is_a_500_that_the_log_explains_and_not_ready(capsys):
    mest_app = serving(Doubler())
    client = mest_app.app.test_client()
    assert over_asgi(mest_app).status == 500
    assert "is not loaded; call mest_app.setup()" in log_of(capsys)[-1]["message"]
    assert client.get("/readyz").json["detail"] == "The model Doubler is not loaded."
    mest_app.load_models()
    assert client.get("/readyz").json == {"status": "ready"}


def test_ping_names_the_service_and_says_with_the_closed_connection_when_it_is_shutting_down():
    mest_app = Mest("iris")
    mest_app.router.add_ping_route("/health")
    before = over_asgi(mest_app, "/health", **GET)
    mest_app.draining = True
    after = over_asgi(mest_app, "/health", **GET)
    assert json.loads(before.body) == {"message": "Pong from iris!"}
    assert [after.status, json.loads(after.body)["detail"]] == [503, "iris is shutting down."]
    assert [before.headers.get("connection"), after.headers.get("connection")] == [None, "close"]


@on_both_edges
@pytest.mark.parametrize("is_checked", [False, True])
@pytest.mark.parametrize("error, status", [(None, 200), (Problem(409, "a"), 409), (OSError(), 500)])
def test_asynchronous_handlers_need_no_asgiref(edge, is_checked, error, status, monkeypatch):
    monkeypatch.setitem(sys.modules, "asgiref.sync", None)

    async def handler(x=3):
        await asyncio.sleep(0)
        if error:
            raise error
        return {flask.request.path: x}

    mest_app = serving(handler=validate_params(X)(handler) if is_checked else handler)
    answer = edge(mest_app, "/it")
    assert answer.status == status
    assert error or answer.body == b'{"/it":3}\n'
    assert edge(mest_app, "/it", parts=[b'{"x": "a"}']).status == (422 if is_checked else status)


@pytest.mark.parametrize("fault, call", [
    ("an instance of GenericModel", lambda r, _: r.add_predict_route(Doubler, X)),
    ("Mest takes a MestConfig with all fields", lambda *_: Mest(MestConfig("a"), workers=2)),
])
def test_mistakes_about_routes_are_explained(mest_app, router, fault, call):
    mest_app.register_router("/", router)
    with pytest.raises(MestError, match=fault):
        call(router, mest_app)


def test_a_router_may_be_registered_at_two_urls_and_get_routes_later(mest_app, router):
    mest_app.register_router("/one", router)
    mest_app.register_router("two/", router)
    router.route("a")(router.route("/b/")(lambda: flask.request.path))
    for url in ("/one/a", "/two/a", "/two/b/"):
        assert mest_app.app.test_client().post(url).text == url


@pytest.mark.parametrize("first", ["/x", "/<int:a>/x", "/<a>/x", "/x/<a>"])
def test_a_route_that_would_hide_another_is_refused(mest_app, router, first):
    router.route(first, endpoint="first")(lambda a=1: "first")
    mest_app.register_router("/", router)
    with pytest.raises(MestError, match="POST .* is a route already, of 'v1.first'"):
        router.route(first.replace("int:", "string:"), endpoint="second")(lambda a=1: a)
    router.route(first, "GET", endpoint="other")(lambda a=1: "other")
    assert mest_app.app.test_client().get(first.replace("<int:a>", "5")).text == "other"


def test_validate_params_works_on_a_plain_flask_route():
    app, handler = flask.Flask("plain"), validate_params(X)(lambda x: {"x": x})
    assert app.post("/x")(handler) is handler
    assert [handler(x=1), handler(1)] == [{"x": 1}, {"x": 1}]
    assert app.test_client().post("/x", json={"x": 1}).json == {"x": 1}
    assert app.test_client().post("/x", json={}).status_code == 422


def test_validate_params_checks_what_a_method_of_a_view_is_given():
    class View(MethodView):
        @validate_params(X)
        def post(self, x):
            return {"x": x, "of": type(self).__name__}

    app = flask.Flask("plain")
    app.add_url_rule("/x", view_func=View.as_view("x"))
    assert app.test_client().post("/x", json={"x": 1}).json == {"x": 1, "of": "View"}
    assert app.test_client().post("/x", json={"x": "a"}).status_code == 422


UPLOAD = (
    b'--b\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\n\x00file\r\n'
    b'--b\r\nContent-Disposition: form-data; name="g"\r\n\r\n5\r\n--b--\r\n'
)
MULTIPART = {"Content-Type": "multipart/form-data; boundary=b"}


@on_both_edges
@pytest.mark.parametrize("headers", [{}, {"Transfer-Encoding": "chunked"}])
@pytest.mark.parametrize("url", ["/predict", "/it"])
def test_uploads_are_bytes_beside_the_fields_of_their_form(edge, headers, url):
    schema = {"f": {"type": "binary", "required": True}, "g": {"type": "integer", "required": True}}
    model = types.SimpleNamespace(predict=lambda f, g: [f.hex(), g])
    mest_app = serving(model, schema, validate_params(schema)(model.predict))
    answer = edge(mest_app, url, parts=[UPLOAD[:50], UPLOAD[50:]], headers=MULTIPART | headers)
    assert json.loads(answer.body) == [b"\x00file".hex(), 5]
    assert edge(mest_app, url, parts=[b"--b--\r\n"], headers=MULTIPART).status == 400


@on_both_edges
@pytest.mark.parametrize("url", ["/predict", "/it"])
@pytest.mark.parametrize("headers, status", [
    ({}, 401), ({"Authorization": "Bearer"}, 401), ({"X-API-Key": ""}, 401),
    ({"X-API-Key": "on"}, 401), ({"Authorization": "Bearer on"}, 401),
    ({"X-API-Key": "one, two-three"}, 401), ({"X-API-Key": "öne"}, 401), ({"X-API-Key": ","}, 401),
    ({"Authorization": "Bearer one"}, 200), ({"X-API-Key": "one"}, 200),
    ({"Authorization": "bearer  two-three "}, 200),
])
def test_without_a_key_there_is_no_answer_on_either_edge(edge, url, headers, status, capsys):
    mest_app = serving(handler=lambda: "mine", api_key="one, two-three", access_log=True)
    answer = edge(mest_app, url, headers=JSON | headers)
    assert answer.status == status
    assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    assert "two-three" not in capsys.readouterr().out
    mest_app.config.api_key = " ,"  # keys that are all empty
    assert edge(mest_app, url, headers=JSON | headers).status == 401


# Documentation


@pytest.mark.parametrize("rules, schema", [
    ({"type": "date"}, {}), ({**F, "coerce": int}, {}), ({}, {}), ({**F, "min": float("-inf")}, {}),
    ({**F, "min": 0}, {"type": "number", "minimum": 0}),
    ({**F, "default": 1}, {"type": "number", "default": 1}),
    ({"type": ["string", "list"], "maxlength": 2}, {}),
    ({"type": "string", "allowed": ["a"], "nullable": True},
     {"type": ["string", "null"], "enum": ["a", None]}),
    ({"type": "string", "allowed": ["a", "b"]}, {"type": "string", "enum": ["a", "b"]}),
    ({"type": "binary"}, {"type": "string", "format": "binary"}),
    ({"type": "list", "schema": F, "minlength": 2},
     {"type": "array", "items": {"type": "number"}, "minItems": 2}),
    ({"type": "dict", "schema": {"a": SURE, "b": {"readonly": True}}},
     mest.fields_schema({"a": SURE})),
    ({"meta": {"description": "in cm"}}, {"description": "in cm"}),
])
def test_the_rules_of_cerberus_become_json_schema(rules, schema):
    parameters = mest.Parameters({"a": rules}, None, "test")
    assert mest.fields_schema(parameters.schema)["properties"]["a"] == schema


def test_a_predict_route_is_described_with_all_that_it_takes_and_answers(router):
    router.add_predict_route(Ready(), X, example={"x": 4})
    document = client_of(router, service_version="2.1").get("/openapi.json").json
    assert [document["info"]["version"], document["servers"]] == ["2.1", [{"url": "."}]]
    predict = document["paths"]["/predict"]["post"]
    content = {"schema": mest.fields_schema(X), "example": {"x": 4}}
    assert predict["requestBody"]["content"] == {"application/json": content}
    assert [predict["operationId"], predict["tags"]] == ["post_predict", ["v1"]]
    assert predict["summary"] == "Doubles a number.\n\nExactly."
    assert predict["responses"].keys() == {"200"}


def test_a_handler_is_described_with_its_path_query_and_files(router):
    @router.route("/users/<int:user>/<name>", methods=["GET", "DELETE"])
    @validate_params({"name": {"type": "string", "maxlength": 9}, "most": {"type": "integer"}})
    def users(user, name, most=5):
        """Who they are."""

    files = {"image": {"type": "binary", "required": True}}
    router.route("up")(validate_params(files)(lambda image: len(image)))
    paths = client_of(router, "/api/").get("/openapi.json").json["paths"]
    item = paths["/api/users/{user}/{name}"]
    assert item.keys() == {"get", "delete"}
    parameters = {p["name"]: (p["in"], p["required"]) for p in item["get"]["parameters"]}
    assert parameters == {"user": ("path", True), "name": ("path", True), "most": ("query", False)}
    content = paths["/api/up"]["post"]["requestBody"]["content"]
    assert content == {"multipart/form-data": {"schema": mest.fields_schema(files)}}


def test_the_page_allows_nothing_but_itself_and_can_be_switched_off():
    page = make().app.test_client().get("/docs")
    policy = page.headers["Content-Security-Policy"]
    assert re.match("default-src 'none'; .*connect-src 'self'", policy)
    assert not re.search("innerHTML|insertAdjacent|document.write|https?://", page.text)
    assert make(docs=False).app.test_client().get("/docs").status_code == 404


class Browser(Server):
    """A headless Chromium, driven through https://www.w3.org/TR/webdriver2/"""

    def __init__(self):
        there = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        command = ["chromedriver", f"--port={free_port()}"]
        super().__init__(subprocess.Popen(command, text=True, **there))
        self.port = int(self.wait_for(r"successfully on port (\d+)")[1])

    def start(self, folder):
        flags = "headless=new no-sandbox no-first-run disable-background-networking "
        flags += f"disable-component-update disable-dev-shm-usage user-data-dir={folder}"
        options = {"args": flags.split(), "binary": shutil.which("chromium")}
        logs, self.session = {"browser": "ALL", "performance": "ALL"}, ""
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        session = self("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self.session = "/" + session["sessionId"]
        self.log("performance")  # of its own first page

    def __call__(self, method, path, body=None):
        status, answer, _ = self.ask(f"/session{self.session}{path}", body, method)
        assert status == 200, answer
        return json.loads(answer)["value"]

    def open(self, server):
        self("POST", "/url", {"url": f"http://127.0.0.1:{server.port}/docs"})
        wait_until(lambda: self.text("h1") == "doubler")
        self.run("document.querySelectorAll('details').forEach(each => each.open = true)")

    def run(self, script, *arguments):
        return self("POST", "/execute/sync", {"script": script, "args": arguments})

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def fill(self, selector, text):
        found = self("POST", "/element", {"using": "css selector", "value": selector})
        element = f"/element/{[*found.values()][0]}"
        if "file" not in selector:
            self("POST", element + "/clear", {})
        self("POST", element + "/value", {"text": text})

    def send(self, operation):
        """Press the Send button of an operation, and return the status and the answer."""
        status = f"#{operation} output"
        self.run("document.querySelector(arguments[0]).textContent = ''", status)
        self.run("document.querySelector(arguments[0]).click()", f"#{operation} button")
        return wait_until(lambda: self.text(status))[:4] + self.text(f"#{operation} pre").strip()

    def log(self, kind):
        return self("POST", "/se/log", {"type": kind})


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver")
    with contextlib.closing(Browser()) as browser:
        browser.start(tmp_path_factory.mktemp("browser"))
        yield browser


PAGE_APP = APP + """
router.route("/users/<name>", method="GET")(
    validate_params({"n": {"type": "integer", "required": True}})(lambda name, n: {name: n}))

@router.route("/picture")
@validate_params({"image": {"type": "binary", "required": True}})
def picture(image):
    "A picture <img src=x onerror=alert(1)> & more."
    return {"bytes": len(image)}
"""


def test_the_page_sends_what_a_form_holds_and_shows_the_answer_and_a_command(project, browser):
    project.write(app=PAGE_APP)
    (project.path / "a.png").write_bytes(b"12345")
    with project.serve("run", "gunicorn", MEST_API_KEY="s3cret") as server:
        browser.open(server)
        assert browser.text("h2:last-of-type") == "mest"
        assert browser.send("post_predict").startswith("401 ")
        browser.fill("label input", "s3cret")
        assert browser.send("post_predict") == '200 {"y":2}'
        browser.fill("#post_predict textarea", '{"x": "it\'s", "y": 2}')
        answer = browser.send("post_predict")
        errors = {"x": ["must be of float type"], "y": ["unknown field"]}
        assert [answer[:4], json.loads(answer[4:])["errors"]] == ["422 ", errors]
        curl = browser.text("#post_predict pre:nth-of-type(2)")
        assert """-raw '{"x": "it'\\''s", "y": 2}' -H "Auth""" in curl and "s3cret" not in curl
        url = browser.run("return document.querySelector('#get_users_name input').value")
        assert url == "/users/{name}?n=0"
        browser.fill("#get_users_name input", "/users/b c?n=5")
        assert browser.send("get_users_name") == '200 {"b c":5}'
        browser.fill("#post_picture input[type=file]", str(project.path / "a.png"))
        assert browser.send("post_picture") == '200 {"bytes":5}'
        assert "<img src=x onerror=alert(1)> & more." in browser.text("#post_picture summary")
        events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        ours = (f"http://127.0.0.1:{server.port}/", "data:", "chrome:")
        assert not [each for each in sent if not each["request"]["url"].startswith(ours)]
        complaints = [e["message"] for e in browser.log("browser") if e["level"] == "SEVERE"]
        assert not [text for text in complaints if "status of 4" not in text]


def test_the_page_can_be_used_with_the_keyboard_and_on_a_phone(project, browser):
    project.write(app=PAGE_APP)
    with project.serve("run", "gunicorn") as server:
        browser("POST", "/window/rect", {"width": 500, "height": 800})
        browser.open(server)
        assert browser.run("return document.querySelector('label').hidden")
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        browser.fill("#post_predict textarea", '{"x": 4}\ue004\ue007')  # Tab and Enter
        wait_until(lambda: browser.text("#post_predict pre") == '{"y":8}\n')
        fields = "[...document.querySelectorAll('input, textarea')]"
        assert browser.run(f"return {fields}.every(e => e.labels.length)")


# The ASGI edge


class Answering(GenericModel):
    """What it answers or raises is what it is asked for."""

    model = "answering"
    kinds = {
        "nan": float("nan"), "text": "ü", "bytes": b"\x00", "none": None, "gone": Gone("long ago"),
        "abort": HTTPException(response=flask.Response("no", 418)), "key": KeyError("hunter2"),
        "stop": StopIteration("hunter2"), "exit": SystemExit("hunter2"), "end": KeyboardInterrupt(),
        "problem": Problem(409, "no", {"x": ["y"]}, more=1),
    }

    def infer(self, kind=None, **params):
        outcome = self.kinds.get(kind, params)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


AS_FORM = {"Content-Type": FORM}
BODIES = [
    b'{"x": "a"}', b"{", b"", b"[]", b'{"x": NaN}', b'{"x": 1e999}', b"{" + b" " * 2000 + b"}",
    b'{"x": 1, "y": 2}', b'{"n": ' + b"[" * 900, b" " * 900, b"\xef\xbb\xbf{}", b'{"z": "\xff"}',
    *(f'{{"kind": "{kind}"}}'.encode() for kind in Answering.kinds),
]
HEADERS = [
    {"Content-Type": "text/csv"}, {}, {**JSON, "Content-Encoding": "gzip"}, AS_FORM,
    {"Content-Type": "application/vnd.api+json; charset=utf-8"}, {**JSON, "X-API-Key": "é"},
    [*AS_FORM.items(), *JSON.items()],
]
REQUESTS = [
    *({"parts": [body]} for body in BODIES), *({"headers": headers} for headers in HEADERS),
    {}, {"parts": [b'{"x"', b": 4}"]}, GET, {"method": "OPTIONS"}, {"method": "BREW"},
    {"url": "/predict?n=7&x=1"}, {"url": "/predict?x=a"}, {"url": "/predict?x=1&x=2"},
    {"headers": AS_FORM, "parts": [b"x=4&n=2"]}, {"headers": AS_FORM, "parts": [b"&&"]},
    {"url": "/at/a/5", **GET}, {"url": "/at/a%2Fb/5", **GET}, {"url": "/at/%ff/5?x=2", **GET},
    {"url": "/at/a/b", **GET}, {"url": "/at/a/5", **GET, "method": "HEAD"}, {"url": "/checked"},
    {"url": "/checked", "parts": [b'{"x": "b"}']}, {"url": "/predict/"}, {"url": "/predict//"},
    {"url": "/none"}, {"url": "/livez", **GET}, {"url": "/readyz", **GET}, {"url": "/livez"},
]


@pytest.mark.parametrize("sent", REQUESTS)
def test_a_request_is_answered_the_same_on_both_edges(sent):
    text, number = {"type": "string"}, {"type": "integer", "default": 5}
    schema, model = {"x": {"type": "float"}, "kind": text, "n": number, "z": text}, Answering()
    mest_app = serving(model, schema, max_body_bytes=1000)
    mest_app.router.add_predict_route(model, schema, url="/at/<z>/<int:k>", method="GET")
    rules = {"type": "float", "check_with": lambda field, value, error: error(field, "never")}
    mest_app.router.add_predict_route(model, {"x": rules}, url="/checked")
    headers = sent.get("headers", JSON)
    pairs = [*(headers.items() if isinstance(headers, dict) else headers), ("X-Request-Id", "r1")]
    asgi, wsgi = (edge(mest_app, **{**sent, "headers": pairs}) for edge in (over_asgi, over_wsgi))
    assert asgi.status == wsgi.status
    assert asgi.body == wsgi.body
    assert asgi.headers == wsgi.headers
    assert b"hunter2" not in asgi.body


def test_what_the_user_has_written_never_runs_in_the_event_loop():
    where = []

    def note(x=""):
        where.append(threading.current_thread())
        return x

    model = Ready()
    model.pre_process, model.infer, model.post_process = note, note, note
    mest_app = serving(model, handler=note)
    mest_app.router.add_predict_route(types.SimpleNamespace(predict=note), X, url="/b")
    mest_app.router.add_predict_route(Ready(), {"x": {"required": True, "coerce": note}}, url="/c")
    urls = ["/predict", "/it", "/b", "/c"]
    assert [over_asgi(mest_app, url).status for url in urls] == [200] * 4
    assert len(where) == 6
    assert threading.main_thread() not in where


def refuse(*args, **more):
    flask.abort(401)


@pytest.mark.parametrize("add, status", [
    (lambda app: app.before_request(refuse), 401),
    (lambda app: app.after_request(lambda response: flask.Response("no", 401)), 401),
    (lambda app: app.teardown_request(print), 200),
    (lambda app: app.teardown_appcontext(print), 200),
    (lambda app: app.url_value_preprocessor(refuse), 401),
    (lambda app: app.register_error_handler(404, refuse), 200),
    (lambda app: app.config.update(TRUSTED_HOSTS=["elsewhere.test"]), 400),
    (lambda app: setattr(app, "wsgi_app", flask.Response("no", 401)), 401),
    (lambda app: flask.request_started.connect(refuse, app), 401),
    (lambda app: flask.got_request_exception.connect(print, app), 200),
    (lambda app: app.view_functions.update({"v1.predict": refuse}), 401),
])
def test_what_stands_before_a_predict_route_in_flask_is_not_bypassed(add, status):
    mest_app = serving()
    assert ("POST", "/predict") in mest_app.direct_routes()
    add(mest_app.app)
    assert ("POST", "/predict") not in mest_app.direct_routes()
    assert over_asgi(mest_app, headers={**JSON, "Host": "a.test"}).status == status


def with_cors(**fields):
    """A service whose hook sets a header, with routes that read a body in different ways."""
    http = flask.request
    mest_app = serving(handler=lambda: getattr(http, http.args["reads"])(), **fields)
    mest_app.router.route("checked")(validate_params(X)(lambda x: {"x": x}))

    @mest_app.app.after_request
    def allow(response):
        response.headers["Access-Control-Allow-Origin"] = "*"
        return response

    return mest_app


READING = ["/predict", "/checked", "/it?reads=get_data", "/it?reads=get_json"]
UNREAD = "/it?reads=__repr__"


@on_both_edges
@pytest.mark.parametrize("url", READING)
@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("length, status", [(100, 200), (101, 413), (70_000, 413)])
def test_a_hook_sees_that_a_body_is_too_long(edge, url, is_chunked, length, status):
    if [edge, is_chunked, status] == [over_wsgi, True, 413] and "reads" in url:
        status = 200  # Werkzeug cuts such a body short, and says nothing
    how = {"Transfer-Encoding": "chunked"} if is_chunked else {"Content-Length": str(length)}
    parts = [b'{"x": ', b"3}" + b" " * (length - 8)]
    answer = edge(with_cors(max_body_bytes=100), url, parts=parts, headers=JSON | how)
    assert answer.status == status
    assert answer.headers["access-control-allow-origin"] == "*"


def test_a_body_that_does_not_come_is_408_if_anybody_reads_it_and_a_hook_sees_that():
    def ask(url, make=with_cors):
        return over_asgi(make(request_timeout=1), url, parts=[b"{"], whole=False)

    calls = [functools.partial(ask, url) for url in [*READING, UNREAD]]
    *answers, unhooked = at_once([*calls, lambda: ask("/predict", serving)])
    assert [answer.status for answer in answers] == [408, 408, 408, 408, 200]
    assert [answer.headers.get("connection") for answer in answers] == [*["close"] * 4, None]
    assert [answer.headers["access-control-allow-origin"] for answer in answers] == ["*"] * 5
    assert unhooked.status == 408
    assert b"did not come in time" in unhooked.body


def test_a_deadline_is_kept_by_servers_that_swallow_a_cancellation():
    async def receive():  # as asyncio.wait_for may do on Python 3.11
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b" ", "more_body": True}

    assert messages_of(serving(request_timeout=1), receive)[0]["status"] == 408


def test_websockets_are_refused():
    assert messages_of(serving(), None, type="websocket") == [{"type": "websocket.close"}]


def test_flask_gets_the_request_as_it_was_sent():
    def seen(name):
        http = flask.request
        headers = {name: value for name, value in http.headers.items() if name[0] == "X"}
        more = [http.remote_addr, http.host, http.content_length, http.environ["PATH_INFO"]]
        return [http.cookies, http.args, http.form, [*http.files], headers, *more]

    headers = [
        ("Host", "mest.test"), ("Cookie", "a=1"), ("Cookie", "b=2"), ("X-Two", "1"),
        ("X-Two", "2"), ("X_Two", "evil"), ("Transfer-Encoding", "chunked"),
        *MULTIPART.items(),
    ]
    mest_app = make(threads=2)
    mest_app.router.route("<name>/it")(seen)
    more = {"headers": headers, "query_string": b"q=%C3%BC", "client": None, "server": ("/s", None)}
    parts = [UPLOAD[:50], UPLOAD[50:]]
    answer = over_asgi(mest_app, parts=parts, raw_path=b"/%ff%20/it", **more)
    assert json.loads(answer.body) == [
        {"a": "1", "b": "2"}, {"q": "ü"}, {"g": "5"}, ["f"], {"X-Two": "1,2"}, "", "mest.test",
        None, "/\xff /it",
    ]
    answer = over_asgi(mest_app, "/100%2541/it", parts=parts, raw_path=None, **more)
    assert json.loads(answer.body)[-1] == "/100%41/it"


@pytest.mark.parametrize("url", ["/predict", "/it"])
def test_what_latin_1_cannot_express_is_replaced_in_a_header(url):
    def predict(x=0):
        raise Problem(409, "no", headers={"X-Reason": "\u4e2d"})

    answer = over_asgi(serving(types.SimpleNamespace(predict=predict), handler=predict), url)
    assert [answer.status, answer.headers["x-reason"]] == [409, "?"]


@pytest.mark.parametrize("failure", [None, KeyError("hunter2")])
def test_a_stream_is_sent_part_by_part_and_cut_short_by_a_failure(failure, capsys):
    def produce():
        yield from "012"
        if failure:
            raise failure

    *sent, last = over_asgi(serving(handler=produce), "/it", **GET).sent
    assert [message["body"] for message in [*sent, last][:3]] == [b"0", b"1", b"2"]
    assert last.get("more_body", False) is bool(failure)  # else it would look complete
    assert [line["level"] for line in log_of(capsys)] == ["ERROR"] * bool(failure)


def refusal(edge, size, limit):
    """How a request is refused while a model is busy that may have so many."""
    model = Squares(max_batch_size=size)
    mest_app = serving(model, request_timeout=1, max_queued_requests=limit)
    with model.busy():
        refused = edge(mest_app)
    wait_until(lambda: model._batcher.waiting == 0)
    assert edge(mest_app).body == b"9\n"
    assert model.batches == [[0], [3]]
    return refused.status, refused.headers.get("retry-after"), json.loads(refused.body)["detail"]


@pytest.mark.parametrize("edge, limit, refused", [
    (over_asgi, 2, (504, None, "The model did not answer in time.")),
    (over_asgi, 1, (503, "1", "Too many requests wait.")),
    (over_wsgi, 1, (503, "1", "Too many requests wait.")),
])
def test_too_late_is_504_and_too_many_is_503_and_neither_is_computed(edge, limit, refused):
    ways = [functools.partial(refusal, edge, size, limit) for size in (1, 32)]
    assert at_once(ways) == [refused] * 2


# Application


def test_mest_in_an_existing_application_leaves_that_as_it_was(router, caplog):
    app = flask.Flask(f"t{uuid.uuid4().hex}")
    app.register_error_handler(404, lambda error: ("no page", 404))
    app.get("/own")(lambda: flask.Response("own", headers={"x-request-id": "mine"}))
    app.logger.setLevel("DEBUG")
    before = {**app.config}, {**vars(app.logger)}
    mest_app = Mest(app.name, app=app)
    router.route("/none", "GET")(lambda: flask.abort(404, "nothing"))
    router.add_predict_route(Ready(), X)
    mest_app.register_router("/ml", router)
    client = app.test_client()
    assert [client.get("/own").text, client.get("/nowhere").text] == ["own", "no page"]
    assert client.get("/own").headers.getlist("X-Request-Id") == ["mine"]
    assert client.get("/livez").headers["X-Request-Id"]  # a page that is not found
    assert client.get("/ml/none").text == "no page"
    assert client.post("/ml/predict", json={}).json["errors"] == {"x": ["required field"]}
    assert mest_app.direct_routes() == {}
    assert ({**app.config}, {**vars(app.logger)}) == before
    mest_app.logger.debug("to the host")
    assert "to the host" in caplog.text


class Loading(GenericModel):
    def __init__(self, failure=None):
        self.failure, self.loaded = failure, []

    def init(self, directory_path):
        if self.failure:
            raise self.failure
        self.loaded.append((directory_path, threading.current_thread().name == "MainThread"))


def test_the_warm_up_runs_examples_but_those_that_say_nothing_about_the_path(mest_app):
    model = Squares()
    mest_app.router.add_predict_route(model, X, example={"x": 3})
    mest_app.router.add_predict_route(model, X, "/squares/<power>", example={"x": 4})
    mest_app.warm_up()
    assert model.batches == [[3]]


@pytest.mark.parametrize("limit, status", [(0, 200), (5, 503), (7000, 200)])
def test_liveness_is_that_no_model_is_in_one_call_for_too_long(limit, status):
    model = Loading()
    model._batcher.busy_since[threading.current_thread()] = time.monotonic() - 1000
    mest_app = make(models=[model], liveness_timeout=limit).setup()
    client = mest_app.app.test_client()
    assert client.get("/livez").status_code == status


def test_setup_loads_every_model_once_in_a_thread_and_logs_how_long_it_took(router, capsys):
    listed, routed, late = Loading(), Loading(), Loading()
    mest_app = make(models=[listed, listed], local_model_directory_path="somewhere")
    router.add_predict_route(routed, {}, url="/a")
    mest_app.register_router("/", router)
    assert mest_app.setup().setup() is mest_app
    router.add_predict_route(late, {}, url="/b")
    mest_app.setup()
    assert listed.loaded == routed.loaded == late.loaded == [("somewhere", False)]
    assert [model.is_loaded for model in (late, Loading())] == [True, False]
    words = [line["message"].split() for line in log_of(capsys)]
    assert [" ".join(each[:4]) for each in words] == ["model Loading loaded in"] * 3


@pytest.mark.parametrize("failure, cure", [
    (SystemExit(3), "3$"), (ModuleNotFoundError(), sys.executable), (ImportError("a"), "a$"),
])
def test_a_model_that_cannot_be_loaded_stops_the_setup_with_its_name(failure, cure):
    reason = f"^model Loading could not be loaded: {type(failure).__name__}.*{cure}"
    with pytest.raises(MestError, match=reason) as caught:
        make(models=[Loading(failure)], local_model_directory_path="nowhere").setup()
    assert caught.value.__cause__ is failure


# The module


def test_the_documented_import_paths_lead_to_the_same_objects():
    lines = [
        "from mest.app.api import Router, validate_params", "from mest.app import Mest, MestConfig",
        "import mest, mest.app.api, mest.models, sys", "from mest.models import GenericModel",
        "assert mest.app.api.Router is mest.Router is Router",
        "assert mest.models.GenericModel is mest.GenericModel is GenericModel",
        "assert 'gunicorn' not in sys.modules",
    ]
    source = [sys.executable, "-W", "error", "-c", "\n".join(lines)]
    done = subprocess.run(source, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("command, target, server", [
    (["mest.py"], "app.py", "gunicorn"), (["-m", "service.mest"], "service.packaged", "dev"),
    (["-m", "service.mest"], "service.relative:mest_app", "gunicorn"),
])
def test_a_copy_works_in_a_project_and_in_a_package_of_it(project, command, target, server):
    (project.path / "service").mkdir()
    for folder in (project.path, project.path / "service"):
        shutil.copy(HERE / "mest.py", folder)
    packaged = APP.replace("from mest import", "from service.mest import")
    packaged += "from service.mest.app.api import Router as Other\nassert Other is Router\n"
    relative = APP.replace("from mest import", "from .mest import")
    project.write(app=APP, **{"service/packaged": packaged, "service/relative": relative})
    with project.serve("run", server, "--app", target, command=command, PYTHONPATH="") as running:
        assert running.ask("/predict", {"x": 3})[1] == b'{"y":6}\n'


# Serving


@pytest.mark.parametrize("server", ["dev", "gunicorn", "gunicorn -- -k gthread --threads 4"])
def test_a_server_loads_the_model_once_predicts_and_logs_failures_as_json(project, server):
    project.write(app=APP)
    with project.serve("run", *server.split()) as running:
        sent = {**JSON, "X-Request-Id": "r1"}
        status, body, headers = running.ask("/predict", {"x": 3}, headers=sent)
        assert (status, body, headers["X-Request-Id"]) == (200, b'{"y":6}\n', "r1")
        assert running.output.count("loading from _models") == 1
        assert running.output.count("model Doubler loaded in") == 1
        status, body, headers = running.ask("/fail")
        assert status == 500
        assert b"hunter2" not in body
        running.wait_for(headers["X-Request-Id"] + ".*\n")
        (line,) = log_of(running, headers["X-Request-Id"])
        assert "KeyError: 'hunter2'" in line["traceback"]


def framed(body, *headers, url="/echo", length=None):
    headers = *headers, f"Content-Length: {len(body) if length is None else length}"
    lines = [f"POST {url} HTTP/1.1", "Host: a", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


@contextlib.contextmanager
def connected(server, count=1, sent=b""):
    """Clients that have sent something."""
    with contextlib.ExitStack() as stack:
        address = "127.0.0.1", server.port
        clients = [socket.create_connection(address, timeout=PATIENCE) for _ in range(count)]
        for client in clients:
            stack.enter_context(client).sendall(sent)
        yield clients


def test_the_development_server_reloads_and_waits_while_the_application_is_broken(project):
    project.write(app=APP)
    steps = [("1 / 0", 503, "ZeroDivisionError"), ("self.model = 5", 200, "loaded in")]
    with project.serve("run", "dev") as server:
        assert server.ask("/predict", {"x": 3})[1] == b'{"y":6}\n'
        for number, (loads, status, seen) in enumerate(steps, 1):
            project.write(app=APP.replace("self.model = 2", loads))
            os.utime(project.path / "app.py", (time.time() + number * 5,) * 2)
            server.wait_for("(?s)" + "reloading.*" * number + seen)
            assert server.ask("/predict", {"x": 3})[0] == status
        assert server.ask("/predict", {"x": 3})[1] == b'{"y":15}\n'


@pytest.fixture
def command(project, monkeypatch, capsys):
    """A function that runs the command, as Project.mest, but in this process, which is fast."""
    monkeypatch.chdir(project.path)
    mest.metrics()  # before the command says that they are those of several processes

    def run(*args, stdin="", **env):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", environment(**env))
            patch.setattr(sys, "path", [*sys.path])
            patch.setattr(sys, "modules", sys.modules.copy())
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            importlib.invalidate_caches()
            try:
                code = mest.main(args)
            except SystemExit as end:
                code = end.code
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("before, after, options, message", [
    ("self.model = 2", "exit(0)", ["--workers", "2"], "model .* could not be loaded: SystemExit"),
    ("self.model = 2", "1 / 0", ["--preload"], "model .* could not be loaded: ZeroDivisionError"),
    ("return {", "x / 0; return {", [], "model Doubler fails for the example of /predict: ZeroDiv"),
    ("from mest", "import torch\nfrom mest", ["--preload"], "CUDA does not survive the fork"),
])
def test_gunicorn_ends_if_a_model_fails_or_uses_cuda(project, before, after, options, message):
    cuda = "class cuda:\n    is_initialized = staticmethod(lambda: True)\n"
    project.write(torch=cuda, app=APP.replace(before, after, 1))
    done = project.mest("run", "gunicorn", "--port", "0", *options)
    assert done.returncode in ([1] if "--preload" in options else [1, 4])  # 4 is gunicorn's own
    assert re.search(f"^mest: {message}", done.stderr, re.MULTILINE)
    assert after in done.stderr or "CUDA" in message
    assert "AppImportError" not in done.stderr


LAB = """
import os, time
import flask
from mest import GenericModel, Mest, validate_params

class Lab(GenericModel):
    def init(self, directory_path):
        self.model = os.getpid()

    def infer(self, x: float = 0, seconds: float = 0, source: str = "result = self.model"):
        print("infers", x, flush=True)
        time.sleep(seconds)
        names = {"self": self}
        exec(source, names)
        return names["result"]

mest_app = Mest("lab")
router = mest_app.router
router.add_predict_route(Lab(), example={"x": -1})
router.add_ping_route()

@router.route("count/<int:end>", methods=["GET", "POST"])
@validate_params({"seconds": {"type": "float", "default": 0}})
def count(end, seconds):
    def numbers():
        try:
            for number in range(end):
                yield f"{number}\\n"
                time.sleep(0.01)
        finally:
            print("closed after", number, "of", end, flush=True)
    time.sleep(seconds)
    return flask.Response(numbers())
"""


def start(folder, *args, drain="0", **env):
    """Serve LAB with such options and settings."""
    project = Project(folder)
    project.write(app=LAB)
    return project.serve("run", "gunicorn", *args, MEST_DRAIN_SECONDS=drain, **env)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """LAB, for all tests that leave it as it was. A drain of it would be seen."""
    folder, env = tmp_path_factory.mktemp("lab"), {"MEST_LIVENESS_TIMEOUT": "6"}
    with start(folder, drain="600", MEST_ACCESS_LOG="1", **env) as server:
        yield server


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """LAB on two workers, for tests after which there are two again."""
    options = "--workers", "2", "--host", "127.0.0.1", "--", "--log-level", "info"
    with start(tmp_path_factory.mktemp("pair"), *options, drain="1") as server:
        server.wait_for("(?s)serves on.*serves on.*\n")
        yield server


def metric(server, name):
    """The sum of a metric's samples."""
    pytest.importorskip("prometheus_client")
    text = server.ask("/metrics")[1].decode()
    return sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))


def pid_of(server):
    return json.loads(server.ask("/predict", {"x": 1})[1])


POOL = ThreadPoolExecutor(32)
ANSWERED = 'mest_requests_total{.*route="/predict",status="200"}'


@contextlib.contextmanager
def load(choose, clients=4):
    """Clients that ask servers again and again, until they have had 50 more answers at the end."""
    answers, failures, over = [], [], threading.Event()

    def ask():
        while not over.is_set():
            try:
                status, body, _ = choose().ask("/predict", {"x": 1})
                (answers if status == 200 else failures).append(json.loads(body))
            except (OSError, http.client.HTTPException) as error:
                failures.append(error)

    asking = [POOL.submit(ask) for _ in range(clients)]
    try:
        wait_until(lambda: len(answers) >= 20)
        yield answers, failures
        count = len(answers)
        wait_until(lambda: len(answers) >= count + 50)
    finally:
        over.set()
        wait(asking, PATIENCE)


def test_each_worker_runs_the_example_once_and_says_in_one_line_what_it_serves(pair):
    first, second = (line["message"] for line in log_of(pair, "serves on"))
    assert first == second
    where, routes = first.split("; without Flask: ")
    assert where == f"serves on 127.0.0.1:{pair.port}"
    assert routes.split(", ")[-2:] == ["POST /predict", "GET /ping"]
    assert pair.output.count("infers -1") == 2


def test_a_killed_worker_is_replaced_and_the_metrics_lose_no_count(pair):
    before = metric(pair, ANSWERED)
    with load(lambda: pair) as (answers, failures):
        os.kill(answers[-1], signal.SIGKILL)
        pair.wait_for("(?s)(serves on.*){3}")
    assert len(failures) <= 4
    assert 0 <= metric(pair, ANSWERED) - before - len(answers) <= 4
    assert metric(pair, "mest_requests_in_progress") == 1


def test_a_reload_loses_no_request_and_no_count_of_any_worker(pair):
    counted = metric(pair, ANSWERED)
    with load(lambda: pair) as (answers, failures):
        before = wait_until(lambda: len({*answers}) == 2 and {*answers})
        pair.process.send_signal(signal.SIGHUP)
        wait_until(lambda: before.isdisjoint(answers[-20:]))
    assert failures == []
    assert metric(pair, ANSWERED) == counted + len(answers)


def test_sigterm_makes_it_unready_and_the_end_comes_after_the_drain(tmp_path):
    idle = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    with start(tmp_path, drain="1") as server, connected(server, 50, idle):
        answer = POOL.submit(server.ask, "/predict", {"x": 5, "seconds": 1.5})
        server.wait_for("infers 5")
        began = time.monotonic()
        os.killpg(server.process.pid, signal.SIGTERM)  # so the worker has it twice
        server.wait_for("stops in 1 s, not ready")
        status, body, _ = server.ask("/readyz")
        assert (status, json.loads(body)["detail"]) == (503, "lab is shutting down.")
        assert answer.result(PATIENCE)[0] == 200
        assert server.process.wait(PATIENCE) == 0
        assert 1.5 <= time.monotonic() - began < 1 + 2 + 3
        assert server.output.count("stops in") == 1
        assert "ERROR" not in server.output


def test_a_second_sigterm_does_not_skip_the_drain_and_sigint_does(tmp_path):
    with start(tmp_path, "--", "--log-level", "info", drain="600") as server:
        for _ in range(3):
            assert server.ask("/predict", {"x": 1})[0] == 200
            os.killpg(server.process.pid, signal.SIGTERM)
            server.wait_for("stops in 600 s")
        server.wait_for("Handling signal: term")  # else gunicorn forgets what comes at once with it
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 0


def test_the_restart_of_one_of_two_instances_loses_no_request(tmp_path):
    with start(tmp_path, drain="1") as old, start(tmp_path) as new, contextlib.ExitStack() as stack:
        servers = [old, new]

        def choose():
            for server in random.sample(servers, len(servers)):
                with contextlib.suppress(OSError, http.client.HTTPException):
                    if server.ask("/readyz")[0] == 200:
                        return server
            raise OSError("nobody is ready")

        with load(choose) as (answers, failures):
            old.process.send_signal(signal.SIGTERM)
            servers.append(stack.enter_context(start(tmp_path)))
            assert old.process.wait(PATIENCE) == 0
        assert failures == []
        assert len({*answers}) == 3


def test_stalled_clients_delay_nobody_and_their_bodies_have_a_deadline(tmp_path):
    body = framed(b"{", url="/predict", length=9)
    with (
        start(tmp_path, MEST_REQUEST_TIMEOUT="1") as server,
        connected(server, 40, body[:60]), connected(server, 40, body) as bodies,
    ):
        began = time.monotonic()
        for _ in range(20):
            assert server.ask("/livez")[0] == 200
            assert server.ask("/predict", {"x": 1})[0] == 200
        assert time.monotonic() - began < 2
        assert {client.recv(65536)[:12] for client in bodies} == {b"HTTP/1.1 408"}


LIMITED = """import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {}))
os.execv(sys.executable, [sys.executable, "-m", "mest", *sys.argv[1:]])"""


@pytest.mark.parametrize("hard, least", [(4096, 8), (256, 1)])
def test_connections_beyond_the_limit_of_open_files_write_no_flood_of_lines(project, hard, least):
    project.write(app=LAB)
    with project.serve("run", "gunicorn", command=("-c", LIMITED.format(hard))) as server:
        before, clients, answers = len(server.lines), [], []
        with contextlib.ExitStack() as stack:
            for _ in range(8):
                clients += stack.enter_context(connected(server, 40))
                with contextlib.suppress(OSError):
                    answers += [server.ask("/livez")[0]]
            assert answers.count(200) >= least
            clients[0].settimeout(0.5)
            with pytest.raises(TimeoutError):  # there is time for lines to come
                clients[0].recv(1)
        probe = b"GET /livez HTTP/1.0\r\n\r\n"
        assert wait_until(lambda: server.send(probe)).endswith(b'"alive"}\n')
        assert len(server.lines) <= before + 5


def mutated(chance, request):
    """A request with an end, some of whose bytes noise replaces, others of its own, or brackets."""
    for _ in range(chance.randrange(4)):
        at, size = chance.randrange(len(request)), chance.randrange(1, 9)
        noise = bytes(chance.randrange(256) for _ in range(size))
        part = chance.choice([noise, request[:size], request[-size:], b"[" * size, b"9" * size])
        request = request[:at] + part + request[at + size :]
    return request + b"\r\n\r\n"  # else a server waits for the end of the headers


def test_both_edges_answer_mutated_requests_with_the_same_status_and_never_with_500(project):
    project.write(app=APP.replace("list", "float").replace('{"x": x}', '{"y": 2 * x}'))
    chance, chunks = random.Random(7), b'4\r\n{"x"\r\n3\r\n: 2\r\n1\r\n}\r\n0\r\n\r\n'
    sources = [
        framed(b'{"x": 1.5}'), framed(b'{"x": 1, "y": [1, {"a": null}]}'),
        framed(b"x=1&x=2").replace(b"application/json", FORM.encode()),
        framed(chunks).replace(b"Content-Length: 28", b"Transfer-Encoding: chunked"),
        framed(b"", url="/echo?x=1&%ff=%zz"),
    ]

    def status(request):
        with connected(server, 1, request) as (client,):
            return client.recv(65536)[9:12].decode()

    with project.serve("run", "gunicorn", MEST_REQUEST_TIMEOUT="2") as server:
        requests = [mutated(chance, chance.choice(sources)) for _ in range(1000)]
        both = [*requests, *(each.replace(b"/echo", b"/predict") for each in requests)]
        answers = [*POOL.map(status, both)]
        assert server.ask("/predict", {"x": 3})[1] == b'{"y":6}\n'
    pairs = zip(answers[:1000], answers[1000:], requests, strict=True)
    assert [pair for pair in pairs if pair[0] != pair[1]] == []
    assert {*answers} >= {"200", "400", "415", "422"}
    assert {*answers} <= {"200", "400", "404", "405", "408", "415", "422", "501"}


def test_a_client_that_leaves_is_logged_and_counted_once_with_499(lab):
    model, handler, body = (f"X-Request-Id: leaves-{what}" for what in ("model", "handler", "body"))
    with (
        connected(lab, 3, framed(b'{"x": 7, "seconds": 0.5}', model, url="/predict")),
        connected(lab, 3, framed(b'{"seconds": 0.5}', handler, url="/count/1")),
        connected(lab, 3, framed(b'{"x":', body, url="/predict", length=50)),
    ):
        assert lab.ask("/count/1?seconds=0.3")[0] == 200
    wait_until(lambda: len(log_of(lab, "leaves-")) >= 9)
    assert lab.ask("/predict", {"seconds": 0.3})[0] == 200  # by now all have ended
    left = sorted((line["request_id"], line["status"]) for line in log_of(lab, "leaves-"))
    assert left == [(f"leaves-{what}", 499) for what in ("body", "handler", "model") for _ in "123"]
    for route, count in [("/predict", 3), ("other", 6)]:  # nobody else leaves
        assert metric(lab, ANSWERED.replace("200", "499").replace("/predict", route)) == count


def test_a_stream_is_sent_as_it_is_produced_and_closed_when_its_client_leaves(lab):
    with connected(lab, 1, b"GET /count/9999 HTTP/1.1\r\nHost: a\r\n\r\n") as (client,):
        received = b""
        while b"7\n" not in received:
            received += client.recv(65536)
        assert "of 9999" not in lab.output
    lab.wait_for(r"closed after \d{1,3} of 9999")


@pytest.mark.parametrize("http, end", [("1.0", b"\r\n\r\n0\n1\n"), ("1.1", b"1\n\r\n0\r\n\r\n")])
def test_the_end_of_a_stream_is_seen_in_each_version_of_http(lab, http, end):
    wanted = "keep-alive" if http == "1.0" else "close"
    request = f"GET /count/2 HTTP/{http}\r\nHost: a\r\nConnection: {wanted}\r\n\r\n"
    assert lab.send(request.encode()).endswith(end)  # sent by then, or for ever


@pytest.mark.parametrize("length, status", [(8000, b"200"), (9000, b"414")])
def test_a_query_may_be_as_long_as_gunicorn_allows(lab, length, status):
    received = lab.send(b"GET /ping?q=%s HTTP/1.0\r\n\r\n" % (b"a" * length))
    assert received[9:12] == status


SHELL = "import subprocess; result = subprocess.run(['sh', '-c', {!r}]).returncode"
BEGIN = """import os, signal, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pool, Process
child = Process(target=time.sleep, args=(60,))
"""
END = "; child.join(20); result = child.exitcode"
COUNTING = """import mest
model = type("Printing", (mest.GenericModel,), {"infer": print})()
child = Process(target=model.predict)
with mest.metrics().batch_size._lock: child.start()
pass"""


@pytest.mark.parametrize("source, result", [
    (SHELL.format("exit 7"), 7), (SHELL.format("kill $$"), -15), (BEGIN + COUNTING + END, 0),
    (BEGIN + "child.start(); child.terminate()" + END, -15),
    (BEGIN + "child.start(); time.sleep(0.1); os.kill(child.pid, signal.SIGINT)" + END, -2),
    (BEGIN + "with Pool(2) as pool:\n pool.apply_async(time.sleep, (60,))\n"
     " result = pool.map(abs, [-1])", [1]),
    (BEGIN + "with ProcessPoolExecutor(2) as pool:\n result = list(pool.map(abs, [-2]))", [2]),
    ("import ctypes; result = ctypes.PyDLL(None).usleep(2_000_000)", 0),  # it holds the interpreter
])
def test_processes_and_calls_of_a_model_within_liveness_timeout_are_let_be(lab, source, result):
    pid = pid_of(lab)
    status, body, _ = lab.ask("/predict", {"source": source})
    assert (status, json.loads(body)) == (200, result)
    assert lab.ask("/readyz")[0] == 200
    assert pid_of(lab) == pid


FIT = """from sklearn.cluster import KMeans
data, kmeans = [[float(i)] for i in range(1000)], KMeans(2, n_init=1)
kmeans.fit(data)
import numpy
ones = numpy.ones((400, 400))
ones @ ones
"""


def test_what_has_run_with_openmp_before_the_fork_can_be_used_in_init(project):
    pytest.importorskip("sklearn")
    init = "kmeans.predict(data); kmeans.fit(data); ones @ ones; self.model = 2"
    project.write(app=FIT + APP.replace("self.model = 2", init))
    with project.serve("run", "gunicorn", OMP_NUM_THREADS="2") as server:
        assert server.ask("/predict", {"x": 3})[1] == b'{"y":6}\n'


def test_preloaded_models_are_loaded_once(project):
    project.write(app=LAB)
    args = "run", "gunicorn", "--preload", "--workers", "2", "--", "--log-level", "info"
    with project.serve(*args, listens=r"Listening at: http://\S+:(\d+)") as server:
        assert pid_of(server) == server.process.pid  # where init was
        assert server.output.count("model Lab loaded in") == 1


@pytest.mark.parametrize("args, env, threads", [
    (["--workers", "1"], {}, mest.available_cpus()), (["--workers", "auto"], {}, 1),
    ([], {"MEST_WORKERS": "99"}, 1), (["--workers", "1"], {"OMP_NUM_THREADS": "77"}, 77),
])
def test_linear_algebra_gets_the_cpus_of_its_worker(project, command, args, env, threads):
    project.write(app="import os\nprint('has', os.environ['OMP_NUM_THREADS'], '.')\n" + APP)
    done = command("run", "gunicorn", *args, "--", "--check-config", **env)
    assert f"has {threads} ." in done.stdout


# Command line


@pytest.mark.parametrize("before, after, message", [
    ("self.model = 2", "open(directory_path + '/w')", "No such file or directory: '_models/w'"),
    ("self.model = 2", "import nosuch", "Doubler could not be loaded: .*; install it for /"),
    ("from mest", "import nosuch\nfrom mest", "app.py cannot be imported: Module.*; install"),
    ("from mest", "exit(0)\nfrom mest", "app.py cannot be imported: SystemExit: 0"),
    ("8000", "70000", "listen_port is 70000; it must be an integer from 0"),
    (APP, "x = 1", "app.py has no Mest named mest_app"),
])
def test_a_mistake_is_one_message_that_names_the_cure(project, command, before, after, message):
    assert before in APP
    project.write(app=APP.replace(before, after, 1))
    done = command("shell")
    assert done.returncode == 1
    *above, last = done.stderr.splitlines()
    assert re.match(f"mest: .*{message}", last)
    assert "mest.py" not in "".join(above)
    assert command("test").returncode == 1


@pytest.mark.parametrize("args, env, code, message", [
    (["--version"], {}, 0, f"mest {mest.__version__}"), ([], {}, 2, "are required: COMMAND"),
    (["fly"], {}, 2, "invalid choice: 'fly'"), (["run"], {}, 2, "required: SERVER"),
    (["run", "gunicorn", "--bind", "a"], {}, 2, "unrecognized arguments: --bind"),
    (["run", "gunicorn", "--", "app:app"], {}, 2, "app:app is no option; --app names"),
    (["run", "dev", "--port", "x"], {}, 1, "MEST_LISTEN_PORT is 'x'; it must be an integer"),
    (["run", "gunicorn"], {"MEST_WORKERS": "x"}, 1, "mest: MEST_WORKERS is 'x'; it must be an"),
    (["shell", "--app", "app.py:other"], {}, 1, "has no Mest named other, but ['mest_app']"),
    (["shell", "--app", "other.py"], {}, 1, "mest: there is no application other.py in /"),
])
def test_a_wrong_command_line_is_refused(project, command, args, env, code, message):
    project.write(app=APP)
    done = command(*args, **env)
    assert done.returncode == code
    assert message in (done.stdout + done.stderr).splitlines()[-1]


@pytest.mark.parametrize("package, args", [("gunicorn", ["run", "gunicorn"]), ("pytest", ["test"])])
def test_a_package_that_is_not_installed_is_named(project, command, monkeypatch, package, args):
    monkeypatch.setitem(sys.modules, package, None)
    done = command(*args)
    assert done.returncode == 1
    assert re.fullmatch(f"mest: .*{package}.*; install it for {sys.executable}\n", done.stderr)


@pytest.mark.parametrize("app", ["service.py", "service", "app.py:first", "pack.web:mest_app"])
def test_the_application_is_found_by_file_module_and_name(project, command, app):
    (project.path / "pack").mkdir()
    two = APP + "first, second = mest_app, Mest('second')\ndel mest_app\n"
    project.write(service=APP.replace("mest_app", "only"), app=two)
    project.write(**{"pack/__init__": "", "pack/web": "from . import __name__ as _\n" + APP})
    lines = "print('name', mest_app.config.service_name)\n"
    assert "name doubler" in command("shell", "--app", app, stdin=lines).stdout
    assert "name doubler" in command("shell", stdin=lines, MEST_APP=app).stdout


def test_the_shell_has_the_service_at_hand(project, command):
    project.write(app=APP + "mest_app.run()\n")
    lines = "print(doubler.predict(x=4), mest_app.app.name, mest_app.config.workers)\n"
    done = command("shell", "--workers", "3", stdin=lines)
    assert "{'y': 8} doubler 3" in done.stdout
    assert done.stderr.startswith("Here is what")


TESTS = {"test_a": "def test_one(): pass\ndef test_two(): assert 0\n"}
FAILING = APP + """
class Failing(Doubler):
    def infer(self, image: bytes):
        raise ValueError(image)
router.add_predict_route(Failing(), example={"image": b"1"}, url="/fails")
"""


@pytest.mark.parametrize("files, options, code, said", [
    ({"app": FAILING}, "", 1, "model Failing fails for the example of /fails: ValueError: b'1'"),
    ({"app": APP}, "", 5, "no tests ran"), (TESTS, "", 1, "assert 0"),
    ({"app": APP, **TESTS}, "-- -k one -v", 0, "test_one"), (TESTS, "-- -k nothing", 5, "2 desel"),
])
def test_mest_test_runs_the_examples_and_then_pytest_as_told(project, files, options, code, said):
    project.write(**files)
    done = project.mest("test", *options.split())
    assert done.returncode == code
    assert said in done.stdout + done.stderr


# The project's files

README = (HERE / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_works(project):
    with project.serve("run", "gunicorn", "--app", str(HERE / "example_app.py")) as example:
        assert b'"setosa"' in example.ask("/predict", {"flower": [5.1, 3.5, 1.4, 0.2]})[1][:30]
        assert example.ask("/species/setosa?decimals=0")[1].startswith(b'{"weights":[-0.0,2.0,')


def test_the_first_service_of_the_readme_and_of_the_module_serve(project):
    in_module = re.search(r"\n\n((?:    .*\n|\n)+?)\nThe path", mest.__doc__).group(1)
    asked = re.search(r"8000(\S+) -H '.*' -d '(.*)'\s+# (.*)", README).groups()
    for source in (blocks("python")[0], re.sub("^    ", "", in_module, flags=re.MULTILINE)):
        project.write(app=source)
        assert len(source.splitlines()) <= 12
        with project.serve("run", "dev", "--no-reload") as server:
            url, body, answer = asked
            assert server.ask(url, body.encode())[:2] == (200, answer.encode() + b"\n")
            assert server.ask(url, {"x": "a"})[0] == 422


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """What all of the README's Python defines, with its Mests, after one another, in `services`."""
    names = {name: getattr(mest, name) for name in mest.__all__} | {"__name__": "readme"}
    names |= {"flask": flask, "io": io, "json": json, "pytest": pytest, "Path": Path}
    optional, services = {"joblib", "numpy", "onnxruntime", "pandas", "torch"}, []
    for package in optional:
        with contextlib.suppress(ImportError):
            names[package] = importlib.import_module(package)
    for block in blocks("python"):
        try:
            exec(compile(block, "README.md", "exec", dont_inherit=True), names)
        except (ImportError, NameError) as error:
            assert error.name in optional
        services += [names["mest_app"]] * (names["mest_app"] not in services)
    folder = tmp_path_factory.mktemp("_models")
    (folder / "words.json").write_text('{"good": 2, "bad": -1}')
    for service in services:
        service.config.local_model_directory_path = str(folder)
        service.warm_up()
    return {**names, "services": services}


@pytest.mark.parametrize("url, sent, answer", [
    ("/sentiment", {"text": "Good bad"}, {"sentiment": "good", "score": 1}),
    ("/words/bad?default=3", None, {"score": -1}), ("/double", {"x": 2}, {"y": 4}),
    ("/orders", {"count": 2}, {"ordered": 2}), ("/readyz", None, {"status": "ready"}),
])
def test_the_services_of_the_readme_answer(readme, url, sent, answer):
    method, clients = "POST" if sent else "GET", [s.app.test_client() for s in readme["services"]]
    answers = (client.open(url, json=sent, method=method) for client in clients)
    found = [response.json for response in answers if response.status_code != 404]
    assert (found or pytest.skip(f"there is no {url}"))[0] == answer


def test_the_readmes_model_of_scikit_learn_works(readme, tmp_path):
    linear = pytest.importorskip("sklearn.linear_model")
    fitted = linear.LogisticRegression().fit([[0.0, 0, 0, 0], [1, 2, 3, 4]], [0, 1])
    readme["joblib"].dump(fitted, tmp_path / "flowers.joblib")
    mest_app = make(local_model_directory_path=str(tmp_path))
    mest_app.router.add_predict_route(readme["Flowers"](), {"x": {"type": "list"}})
    answer = mest_app.setup().app.test_client().post("/predict", json={"x": [1.0, 2, 3, 4]})
    assert answer.json[1] > 0.5


def test_the_dockerfile_of_the_readme_serves_as_an_unprivileged_user(project):
    steps = [line.partition(" ")[::2] for line in blocks("dockerfile")[0].splitlines()]
    copied = {name for step, rest in steps if step == "COPY" for name in rest.split()[:-1]}
    assert copied == {"requirements.txt", "mest.py", "app.py", "_models"}
    assert {("USER", "10001"), ("ENV", "PYTHONUNBUFFERED=1")} <= {*steps}
    shutil.copy(HERE / "mest.py", project.path / "mest.py")
    project.write(app=blocks("python")[0])
    command = json.loads(dict(steps)["CMD"])  # the exec form, so that signals arrive
    with project.serve(command=command[1:], PYTHONPATH="") as server:
        assert server.ask("/predict", {"x": 3})[1] == b'{"y":6}\n'


def test_the_manifests_of_the_readme_agree_with_the_code():
    container = pytest.importorskip("yaml").safe_load(blocks("yaml")[0])
    variables = {f"MEST_{field.name.upper()}" for field in MestConfig.settings()}
    assert {variable["name"] for variable in container["env"]} <= variables
    assert container["ports"] == [{"name": "http", "containerPort": MestConfig.listen_port}]
    for kind, path in (("startup", "/readyz"), ("readiness", "/readyz"), ("liveness", "/livez")):
        assert container[f"{kind}Probe"]["httpGet"] == {"path": path, "port": "http"}
    readiness = container["readinessProbe"]
    assert readiness["periodSeconds"] * readiness["failureThreshold"] < MestConfig.drain_seconds
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["securityContext"]["runAsNonRoot"] is True


def test_the_configuration_table_of_the_readme_is_that_of_the_code():
    rows = re.findall(r"\n\| `(\w+)` \| `?(.*?)`? ?\| (.*) \|", README)
    fields = [(f.name, str(f.default), f.metadata["meaning"]) for f in MestConfig.settings()]
    assert rows == fields


def test_the_wheel_holds_the_module_and_nothing_else(tmp_path):
    for name in ("mest.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HERE / name, tmp_path / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, tmp_path]
    subprocess.run(build, check=True, capture_output=True)
    info = f"mest-{mest.__version__}.dist-info"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert [name for name in wheel.namelist() if not name.startswith(info)] == ["mest.py"]
        assert "mest = mest:main" in wheel.read(f"{info}/entry_points.txt").decode()
        needed = re.findall(r"Dist: (\w+)(?!.*extra)", wheel.read(f"{info}/METADATA").decode())
    assert {*map(str.lower, needed)} == {"cerberus", "flask", "gunicorn"}


@pytest.mark.parametrize("name, most", [
    ("mest.py", 2200), ("README.md", 260), ("example_app.py", 60),
])
def test_the_files_are_short(name, most):
    lines = (HERE / name).read_text().splitlines()
    assert len(lines) <= most
    assert max(map(len, lines)) <= 100
