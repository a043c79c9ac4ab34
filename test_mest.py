"""The tests of mest.py, in its order. Each name is a sentence about what a user can rely on."""
import asyncio
import builtins
import concurrent.futures
import contextlib
import copy
import functools
import http.client
import io
import itertools
import json
import logging
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import timeit
import types
import unittest.mock
import uuid
import warnings
import zipfile
from pathlib import Path
from typing import Literal, Optional
from urllib.parse import unquote, unquote_to_bytes

import cerberus
import flask
import pytest
from werkzeug.datastructures import Headers
from werkzeug.test import EnvironBuilder

import mest
from mest import GenericModel, Mest, MestConfig, MestError, Problem, Router, validate_params

HERE = Path(__file__).resolve().parent
JSON = {"Content-Type": "application/json"}
LISTENS = r"(?:Running on|serves on) http://[^\s]+?:(\d+)\b"
PATIENCE = 30  # seconds, for whatever is waited for


# Fixtures


class Doubler(GenericModel):
    def init(self, directory_path):
        self.model = 2

    def infer(self, x):
        return {"y": self.model * x}


X = {"x": {"type": "float", "required": True}}
N = {"n": {"type": "integer", "required": True}}


def make(app=None, models=(), **fields):
    """A Mest whose name, and so its logger, no other test has."""
    return Mest(MestConfig(f"t{uuid.uuid4().hex}", 8000, list(models), environ={}, **fields), app=app)


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


@pytest.fixture
def route():
    """A function that serves a handler in a service of its own and returns how to ask it."""

    def declare(handler, **options):
        router = Router("v1")
        router.route("it", **{"methods": ["GET", "POST"], "endpoint": "it", **options})(handler)
        client = client_of(router)
        return lambda query="", method="POST", **sent: client.open("/it" + query, method=method, **sent)

    return declare


@pytest.fixture
def ask(route):
    """The same for a handler that returns its checked parameters."""
    return lambda schema, **options: route(validate_params(schema)(lambda **params: params), **options)


@pytest.fixture
def answer(route):
    """The response to a handler that returns this."""
    return lambda result: route(lambda: result)()


def log_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def environment(**more):
    ours = re.compile("MEST_|WERKZEUG_|GUNICORN|.*_(NUM|MAXIMUM)_THREADS$")
    plain = {name: value for name, value in os.environ.items() if not ours.match(name)}
    return {**plain, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1", **more}


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
    def serve(self, *args, command=("-m", "mest"), port=("--port", "0"), listens=LISTENS, **env):
        """Run a server on a free port, wait until it listens, and yield it."""
        head = list(itertools.takewhile(lambda arg: arg != "--", args))
        process = subprocess.Popen(
            [sys.executable, *command, *head, *port, *args[len(head) :]], cwd=self.path,
            env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )
        server = Server(process)
        try:
            server.wait_for(listens)
            yield server
        finally:
            server.kill()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


class Server:
    def __init__(self, process):
        self.process, self.lines, self.read = process, [], 0
        self.news = threading.Condition()
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self):
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                with self.news:
                    self.lines.append(line)
                    self.news.notify_all()
        with self.news:
            self.lines.append("")
            self.news.notify_all()

    @property
    def output(self):
        return "".join(self.lines)

    def wait_for(self, pattern):
        with self.news:
            found = self.news.wait_for(
                lambda: re.search(pattern, self.output) or self.lines[-1:] == [""], PATIENCE
            )
        match = re.search(pattern, self.output)
        assert match and found, f"no {pattern!r} in: {self.output}"
        if match.groups() and match.group(1).isdigit():
            self.port = int(match.group(1))
        return match

    def ask(self, path, body=None, method=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            body = json.dumps(body).encode() if isinstance(body, dict) else body
            method = method or ("GET" if body is None else "POST")
            connection.request(method, path, body, headers if headers is not None else JSON)
            response = connection.getresponse()
            return response.status, response.read(), response.headers
        finally:
            connection.close()

    def send(self, text, half_close=True):
        """Send bytes as they are, and return all that comes back."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE) as raw:
            raw.sendall(text)
            if half_close:
                raw.shutdown(socket.SHUT_WR)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while part := raw.recv(65536):
                    received += part
            return received

    def kill(self):
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


# Errors


def test_an_error_is_a_problem_details_object_with_the_id_of_its_request(ask):
    response = ask(X)(json={}, headers={"X-Request-Id": "abc-1"})
    assert response.status_code == 422
    assert response.content_type == "application/problem+json"
    assert response.json == {
        "type": "about:blank",
        "title": "Unprocessable Entity" if "Entity" in response.json["title"] else "Unprocessable Content",
        "status": 422,
        "detail": "The parameters are not valid.",
        "errors": {"x": ["required field"]},
        "request_id": "abc-1",
    }


def test_a_handler_may_raise_a_problem_with_headers_of_its_own(route):
    def handler():
        raise Problem(429, "Slow down.", headers={"Retry-After": "3"})

    response = route(handler)()
    assert (response.status_code, response.headers["Retry-After"]) == (429, "3")
    assert response.json["detail"] == "Slow down."


def test_abort_becomes_problem_details_and_keeps_its_headers(route):
    from werkzeug.exceptions import Unauthorized

    assert route(lambda: flask.abort(404, "no such user"))().json["detail"] == "no such user"
    from werkzeug.datastructures import WWWAuthenticate

    def handler():
        raise Unauthorized("who?", www_authenticate=WWWAuthenticate("basic"))

    assert route(handler)().headers["WWW-Authenticate"].strip() == "Basic"
    assert route(lambda: flask.abort(flask.Response("mine", 418)))().text == "mine"


def test_an_exception_in_a_handler_is_an_opaque_500_that_the_log_explains(route, capsys):
    def handler():
        raise KeyError("hunter2")

    response = route(handler)(headers={"X-Request-Id": "r-7"})
    assert response.status_code == 500
    assert "hunter2" not in response.text and "KeyError" not in response.text
    assert response.json["request_id"] == "r-7"
    (line,) = log_of(capsys)
    assert line["request_id"] == "r-7" and line["level"] == "ERROR"
    assert "POST" in line["message"] and "KeyError: 'hunter2'" in line["traceback"]


def test_an_exit_in_a_handler_is_a_500_and_not_the_end_of_the_service(route):
    assert route(lambda: sys.exit(3))().status_code == 500


def test_unknown_urls_and_wrong_methods_are_problem_details_where_mest_owns_the_application(router):
    router.route("it")(lambda: {})
    client = client_of(router)
    missing, wrong = client.get("/nowhere"), client.get("/it")
    assert (missing.status_code, missing.json["title"]) == (404, "Not Found")
    assert (wrong.status_code, set(wrong.headers["Allow"].split(", "))) == (405, {"OPTIONS", "POST"})
    for response in (missing, wrong):
        assert response.content_type == "application/problem+json"
        assert response.json["request_id"] == response.headers["X-Request-Id"]


@pytest.mark.parametrize("sent", ["", "x" * 129, "a b", "a\tb", "<script>", "é"])
def test_every_response_has_a_request_id_and_only_a_sane_one_is_taken_from_the_client(ask, sent):
    send = ask({})
    assert send(headers={"X-Request-Id": "job/7:3.a_b-c"}).headers["X-Request-Id"] == "job/7:3.a_b-c"
    new = send(headers={"X-Request-Id": sent}).headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", new)
    assert send().headers["X-Request-Id"] != new


# Configuration


def test_the_environment_beats_the_code():
    environ = {"MEST_LISTEN_PORT": "8080", "MEST_WORKERS": "3", "MEST_LOG_LEVEL": "DEBUG", "MEST_THREADS": ""}
    config = MestConfig("a", 8000, workers=2, environ=environ)
    assert (config.listen_port, config.workers, config.log_level, config.threads) == (8080, 3, "DEBUG", 16)
    assert config.local_model_directory_path == "_models"


@pytest.mark.parametrize("field", [name for name in MestConfig.FIELDS if "api_key" not in name])
def test_every_field_can_be_set_by_the_environment(field):
    default, allowed, _ = MestConfig.FIELDS[field]
    allowed = allowed[0] if isinstance(allowed, tuple) and isinstance(allowed[0], range) else allowed
    value = {str: "elsewhere", bool: not default}.get(allowed) if isinstance(allowed, type) else allowed[-1]
    config = MestConfig("a", 8000, environ={"MEST_" + field.upper(): str(value)}, api_key="k")
    assert getattr(config, field) == value != default


def test_a_switch_is_true_or_false_and_false_in_the_environment_is_not_true():
    for text, value in [("1", True), ("true", True), ("0", False), ("False", False)]:
        assert MestConfig("a", environ={"MEST_ACCESS_LOG": text}).access_log is value
    with pytest.raises(MestError, match="MEST_ACCESS_LOG is 'maybe'; it must be true or false .whether each"):
        MestConfig("a", environ={"MEST_ACCESS_LOG": "maybe"})


def test_workers_may_be_as_many_as_there_are_cpus():
    assert MestConfig("a", environ={"MEST_WORKERS": "auto"}).workers == mest.available_cpus()
    with pytest.raises(MestError, match="workers is 'many'; it must be an integer from 1 to 1024 or auto"):
        MestConfig("a", environ={}, workers="many")


@pytest.mark.parametrize(
    "files, quota",
    [
        ({"cpu.max": "100000 100000"}, 1), ({"cpu.max": "50000 100000"}, 1), ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1), ({}, None),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None), ({"cpu.max": "9900000 100000"}, None),
    ],
)
def test_the_cpus_are_those_that_the_container_may_use(tmp_path, files, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert mest.available_cpus(str(tmp_path)) == (quota or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    "fields, environ, message",
    [
        ({"listen_port": 70000}, {}, "listen_port is 70000; it must be an integer from 0 to 65535 (TCP port"),
        ({"listen_port": True}, {}, "listen_port is True"),
        ({"listen_port": 80.5}, {}, "listen_port is 80.5"),
        ({}, {"MEST_WORKERS": "two"}, "MEST_WORKERS is 'two'; it must be an integer from 1 to 1024"),
        ({}, {"MEST_LOG_LEVEL": "LOUD"}, "MEST_LOG_LEVEL is 'LOUD'; it must be DEBUG or INFO or WARNING"),
        ({"port": 1}, {}, "MestConfig has no 'port'; did you mean listen_port?"),
        ({"zzz": 1}, {}, "MestConfig has no 'zzz'; only listen_port, local_model_directory_path"),
        ({"protect_metrics": True}, {}, "protect_metrics is true, but there is no api_key that protects them"),
        ({"local_model_directory_path": 5}, {}, "local_model_directory_path is 5; it must be text"),
        ({"service_name": ""}, {}, "service_name is ''; it must be"),
        ({"service_name": "a\nb"}, {}, "service_name is 'a\\nb'; it must be"),
        ({"models_instances": Doubler}, {}, "it must be a list"),
        ({"models_instances": [Doubler]}, {}, "models_instances has <class"),
        ({"models_instances": [Doubler(), 5]}, {}, "models_instances has 5; it must be an instance of GenericModel"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field_and_what_is_allowed(fields, environ, message):
    with pytest.raises(MestError) as caught:
        MestConfig(**{"service_name": "a", "listen_port": 8000, **fields}, environ=environ)
    assert message in str(caught.value)


def test_a_word_may_be_written_in_small_letters():
    assert MestConfig("a", environ={"MEST_LOG_LEVEL": "debug"}).log_level == "DEBUG"


@pytest.mark.parametrize("name, message", [
    ("MEST_WORKER", "MEST_WORKER in the environment is no setting; did you mean MEST_WORKERS?"),
    ("MEST_PORT", "MEST_PORT in the environment is no setting; did you mean MEST_LISTEN_PORT?"),
    ("MEST_QQQQQQ", "MEST_QQQQQQ in the environment is no setting; it has no effect"),
    ("MEST_PORT_80_TCP", None), ("MEST_SERVICE_HOST", None), ("MEST_APP", None), ("OTHER", None),
])
def test_a_variable_that_looks_like_a_setting_and_is_none_is_reported(name, message, capsys):
    config = MestConfig(f"t{uuid.uuid4().hex}", environ={name: "5"})
    assert config.doubts == ([message] if message else [])
    Mest(config)
    assert [line["message"] for line in log_of(capsys)] == config.doubts
    assert MestConfig("a", environ={"MEST_PORT": "tcp://10.0.0.1:80"}).doubts == []  # of Kubernetes


def keys(environ=None, **fields):
    return MestConfig("a", environ=environ or {}, **fields).api_keys


def test_api_keys_come_from_the_code_the_environment_or_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("three , four\n")
    assert keys() == [] and keys(api_key="one,two") == [b"one", b"two"]
    assert keys(api_key_file=str(file)) == keys(api_key_file=file) == [b"three", b"four"]
    assert keys({"MEST_API_KEY": "five"}, api_key="one") == keys({"MEST_API_KEY": "five"}, api_key_file=file) == [b"five"]
    assert keys({"MEST_API_KEY_FILE": str(file)}, api_key="one") == [b"three", b"four"]


@pytest.mark.parametrize("text", ["", " ", ",", "a,,b", "a,", "a b", "schlüssel", "a\nb", None, 5])
def test_a_key_that_is_empty_or_unusable_is_refused_and_not_shown(text, tmp_path):
    with pytest.raises(MestError, match="^api_key (has an empty or unusable key|is unusable)") as caught:
        keys(api_key=text)
    assert "schl" not in str(caught.value) and "5" not in str(caught.value)
    if isinstance(text, str):
        file = tmp_path / "keys"
        file.write_text(text)
        for environ in ({"MEST_API_KEY": text}, {"MEST_API_KEY_FILE": str(file)}):
            with pytest.raises(MestError, match="^MEST_API_KEY(_FILE)? has an empty or unusable key; it must have"):
                keys(environ, api_key="right")


def test_a_file_of_keys_that_is_missing_and_keys_given_twice_are_refused(tmp_path):
    with pytest.raises(MestError, match="MEST_API_KEY_FILE names a file that cannot be read: No such file or directory$"):
        keys({"MEST_API_KEY_FILE": str(tmp_path / "keys")})
    for name in ("", "a\0b"):
        with pytest.raises(MestError, match="MEST_API_KEY_FILE names a file that cannot be read"):
            keys({"MEST_API_KEY_FILE": name})
    with pytest.raises(MestError, match="MEST_API_KEY and MEST_API_KEY_FILE are both given; give one of them"):
        keys({"MEST_API_KEY": "a", "MEST_API_KEY_FILE": "b"})


def test_a_configuration_does_not_show_its_keys():
    config = MestConfig("a", api_key="hunter2,hunter3")
    assert config.api_key == "" and "hunter" not in repr(config) + str(config)


# Logging


def test_the_logger_is_that_of_the_service_name_and_has_one_handler_however_often_it_is_set_up():
    config = MestConfig("one-logger", 8000, environ={})
    logger = Mest(config).logger
    assert Mest(config).logger is logger is logging.getLogger("one-logger")
    assert sum(isinstance(handler, mest.LogHandler) for handler in logger.handlers) == 1


def test_a_log_line_is_a_json_object_where_stdout_is_no_terminal(route, capsys):
    def handler():
        flask.current_app.logger.info("two\nlines %s", "é")
        return {}

    route(handler)(headers={"X-Request-Id": "r-1"})
    (line,) = log_of(capsys)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert line.pop("logger") in logging.root.manager.loggerDict
    assert line == {"level": "INFO", "request_id": "r-1", "message": "two\nlines é"}


def test_text_from_a_client_cannot_forge_a_line_or_drive_the_terminal(capsys):
    logger = make(log_format="text").logger
    try:
        raise ValueError("first\n2026-01-01 INFO forged")
    except ValueError:
        logger.exception("a\nb\r\x1b[31m\u2028c")
    first, *rest = capsys.readouterr().out.rstrip("\n").split("\n")
    assert first.endswith(r"a\nb\r\x1b[31m\u2028c") and " ERROR " in first
    assert rest and all(line.startswith("    ") for line in rest)


def test_a_record_that_cannot_be_formatted_is_logged_as_such(mest_app, capsys):
    class Mute:
        def __str__(self):
            raise RuntimeError("no text")

    (handler,) = [h for h in mest_app.logger.handlers if isinstance(h, mest.LogHandler)]
    for message, args in (("%d items", ("many",)), (Mute(), ())):
        handler.handle(logging.LogRecord("a", logging.INFO, __file__, 7, message, args, None))
    first, second = log_of(capsys)
    assert first["message"].startswith("unreadable record of") and "test_mest.py" in first["message"]
    assert "no text" in second["message"]


def test_the_log_level_is_configurable(capsys):
    make(log_level="WARNING").logger.info("silent")
    make(log_level="DEBUG").logger.debug("heard")
    assert [line["message"] for line in log_of(capsys)] == ["heard"]


# JSON


def test_a_request_is_decoded_strictly(ask):
    send = ask({"x": {"nullable": True}, "n": {"type": "list"}})
    for body, detail in {
        b"": "empty",
        b" ": "empty",
        b'{"x": 1': "not valid JSON",
        b"garbage": "not valid JSON",
        b'{"x": "\xff"}': "not valid JSON",
        b'{"x": NaN}': "NaN",
        b'{"x": [-Infinity]}': "-Infinity",
        b'{"n": [1, 1e999]}': "not finite",
        b'{"x": {"y": [-1e999]}}': "not finite",
        b'{"n": [1, ' + b"9" * 400 + b"]}": "too large for a float",
        b'{"x": ' + b"9" * 5000 + b"}": "not valid JSON",
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested deeper",
        b'{"x": ' + b"[" * 150 + b"]" * 150 + b"}": "nested deeper than 100 levels",
        b'{"x": ' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"}": "nested deeper than 100 levels",
        rb'{"x": "\ud800"}': "surrogate",
        rb'{"\udc00": 1}': "surrogate",
    }.items():
        response = send(data=body, headers=JSON)
        assert response.status_code == 400, (body[:40], response.json)
        assert detail in response.json["detail"], body[:40]
    for body in (b"null", b"[]", b'"x"', b"5", b"true"):
        response = send(data=body, headers=JSON)
        assert response.status_code == 422 and "send an object" in response.json["detail"]
    assert send(data=rb'{"x": "\ud83d\ude00"}', headers=JSON).json == {"x": "\U0001f600"}
    assert send(json={"x": 10**300}).json == {"x": 10**300}


@pytest.mark.parametrize(
    "result, text, content_type",
    [
        ({"b": 1, "a": [1.5, True, None]}, '{"b":1,"a":[1.5,true,null]}\n', "application/json"),
        ([1, "é"], '[1,"é"]\n', "application/json"),
        (3, "3\n", "application/json"),
        (0.5, "0.5\n", "application/json"),
        (False, "false\n", "application/json"),
        (None, "null\n", "application/json"),
        ('{"a": 1}', '{"a": 1}', "application/json"),
        (" [1]", " [1]", "application/json"),
        ("{not json", "{not json", "text/plain; charset=utf-8"),
        ("5", "5", "text/plain; charset=utf-8"),
        ("NaN", "NaN", "text/plain; charset=utf-8"),
        ("[Infinity War] is a film", "[Infinity War] is a film", "text/plain; charset=utf-8"),
        ('["NaN"]', '["NaN"]', "application/json"),
        ("<b>hi</b>", "<b>hi</b>", "text/plain; charset=utf-8"),
        (uuid.UUID(int=7), '"00000000-0000-0000-0000-000000000007"\n', "application/json"),
    ],
)
def test_data_is_answered_as_json_and_text_as_text(result, text, content_type, answer):
    result = {"id": result} if isinstance(result, uuid.UUID) else result
    text = f'{{"id":{text.strip()}}}\n' if "id" in str(result)[:5] else text
    response = answer(result)
    assert (response.status_code, response.text, response.content_type) == (200, text, content_type)


class Array:
    """What numpy, torch and pandas have in common."""

    def __init__(self, value):
        self.value = value

    def tolist(self):
        return self.value


class Scalar:
    def __init__(self, value):
        self.value = value

    def __hash__(self):
        return 1

    def item(self):
        return self.value


def test_arrays_and_their_scalars_are_converted_wherever_they_stand(answer):
    assert answer(Array([1, 2])).text == "[1,2]\n"
    assert answer(Scalar(3)).text == "3\n"
    nested = {"a": [Array([[0.5]]), (Scalar(2),)], Scalar(7): {Scalar(8): Array([1])}}
    assert answer(nested).text == '{"a":[[[0.5]],[2]],"7":{"8":[1]}}\n'


def test_numpy_is_converted(answer):
    numpy = pytest.importorskip("numpy")
    result = {"p": numpy.float32(0.5), "n": numpy.int64(3), "v": numpy.arange(2), numpy.int64(1): numpy.bool_(True)}
    assert answer(result).json == {"p": 0.5, "n": 3, "v": [0, 1], "1": True}


def test_responses_tuples_and_generators_pass_through_as_in_flask(answer):
    assert answer(({"a": 1}, 201, {"X-A": "b"})).headers["X-A"] == "b"
    assert answer(("text", 202)).status_code == 202
    assert answer((Array([1]), 202)).json == [1]
    assert answer(flask.Response("mine", mimetype="text/csv")).mimetype == "text/csv"
    assert answer(text for text in ("a", "b")).text == "ab"
    assert answer(b"raw").data == b"raw"


@pytest.mark.parametrize(
    "result, reason",
    [
        ({"p": float("nan")}, "NaN"),
        ([float("inf")], "NaN and infinity have no form"),
        (Array([float("nan")]), "NaN"),
        ('{"p": NaN}', "NaN has no form in JSON"),
        ({"s": {1, 2}}, "set"),
        ({1, 2}, "set"),
        (object(), "object"),
    ],
)
def test_what_json_cannot_express_is_a_500_that_the_log_explains(answer, capsys, result, reason):
    response = answer(result)
    assert response.status_code == 500 and response.content_type == "application/problem+json"
    (line,) = log_of(capsys)
    assert reason in line["traceback"]


# Parameters


def test_the_body_wins_over_the_query_and_the_path_is_passed_along(router):
    seen = {}

    @router.route("/<word>/<int:n>/<other>")
    @validate_params({"x": {"type": "integer"}, "y": {"type": "integer"}, "n": {"max": 9}, "word": {"type": "integer"}})
    def handler(**params):
        seen.update(params)

    client = client_of(router)
    assert client.post("/5/7/a?x=1&y=2", json={"x": 3, "n": 1}).status_code == 200
    assert seen == {"x": 3, "y": 2, "n": 7, "word": 5, "other": "a"}
    assert client.post("/5/10/a").json["errors"] == {"n": ["max value is 9"]}
    renamed = Router("v2")
    renamed.route("/<n>")(validate_params({"n": {"rename": "m"}, "m": {}})(lambda m: m))
    assert client_of(renamed).post("/5").text == "5"


def test_parameters_come_from_the_query(ask):
    schema = {
        "n": {"type": "integer"}, "f": {"type": "float"}, "b": {"type": "boolean"}, "s": {"type": "string"},
        "v": {"type": "list", "schema": {"type": "float"}}, "w": {"type": "list", "items": [{"type": "integer"}, {}]},
        "either": {"type": ["boolean", "number"]}, "any": {},
    }
    send = ask(schema)
    sent = send("?n=3&f=2.5e1&b=true&s=7&v=1&v=2.5&w=1&w=2&either=4&any=5", "GET")
    assert sent.json == {
        "n": 3, "f": 25.0, "b": True, "s": "7", "v": [1, 2.5], "w": [1, "2"], "either": 4, "any": "5"
    }
    assert send("?v=1", "GET").json == {"v": [1]}
    assert send("", "GET").json == {}
    for query, field in {"n=x": "n", "n=2.5": "n", "f=nan": "f", "f=1e999": "f", "b=maybe": "b", "v=1&v=x": "v",
                         "n=1&n=2": "n", "n=": "n", "n=1_0": "n", "w=1&w=2&w=3": "w", "f=inf": "f"}.items():
        response = send("?" + query, "GET")
        assert response.status_code == 422 and list(response.json["errors"]) == [field], query


def test_parameters_come_from_forms_and_files_arrive_as_bytes(ask):
    send = ask({"n": {"type": "integer"}, "image": {"type": "binary"}, "tags": {"type": "list"}})
    assert send(data={"n": "3", "tags": ["a", "b"]}).json == {"n": 3, "tags": ["a", "b"]}
    lengths = ask({"image": {"type": "binary", "coerce": len}, "n": {}})
    assert lengths(data={"image": (io.BytesIO(b"\x00\xff"), "a.png"), "n": "é"}).json["errors"]


def test_a_file_is_given_to_the_handler_as_bytes(route):
    handler = validate_params({"image": {"type": "binary", "required": True}, "n": {"type": "integer", "required": True}})(
        lambda image, n: {"bytes": list(image), "n": n}
    )
    sent = route(handler)(data={"image": (io.BytesIO(b"\x00\xff"), "a.png"), "n": "4"})
    assert sent.json == {"bytes": [0, 255], "n": 4}


def test_the_form_that_a_hook_has_parsed_is_not_lost():
    app = flask.Flask("host")
    app.before_request(lambda: flask.request.form.get("csrf") and None)
    host = make(app)
    router = Router("v1")
    router.route("it")(validate_params({"n": {"type": "integer"}, "f": {}})(lambda n=0, f="": [n, len(f)]))
    host.register_router("/", router)
    client = app.test_client()
    assert client.post("/it", data={"n": "3", "f": (io.BytesIO(b"abc"), "f")}).json == [3, 3]
    assert client.post("/it", json={"n": 3, "f": "ab"}).json == [3, 2]


def test_a_handler_may_read_the_body_again(route):
    handler = validate_params(N)(lambda n: flask.request.get_json())
    assert route(handler)(json={"n": 3}).json == {"n": 3}
    handler = validate_params(N)(lambda n: flask.request.form)
    assert route(handler)(data={"n": 3}).json == {"n": "3"}


@pytest.mark.parametrize(
    "sent, status, detail",
    [
        (dict(data=b"x", content_type="text/plain"), 415, "of type text/plain; send a JSON object"),
        (dict(data=b"x"), 415, "without a Content-Type; send a JSON object"),
        (dict(data=b"x", headers={**JSON, "Content-Encoding": "gzip"}), 415, "encoded with gzip; send it uncompressed"),
        (dict(data=b"x", content_type="multipart/form-data"), 400, "not a valid form"),
        (dict(data=b"x", content_type="multipart/form-data; boundary=b"), 400, "not a valid form"),
        (dict(data=b"a=1&" * 1001, content_type="application/x-www-form-urlencoded"), 413, "more than 1000 fields"),
        (dict(data=b"x" * 1001, headers=JSON), 413, "longer than 1000 bytes"),
    ],
)
def test_a_body_that_cannot_be_taken_is_refused_with_what_to_send(router, sent, status, detail):
    router.route("it")(validate_params(X)(lambda x: x))
    limit = {} if detail.startswith("more") else {"max_body_bytes": 1000}
    response = client_of(router, **limit).post("/it", **sent)
    assert response.status_code == status and detail in response.json["detail"]


def test_without_a_body_the_query_alone_gives_the_parameters(ask):
    send = ask(X)
    assert send("?x=3").json == {"x": 3}
    assert send().json["errors"] == {"x": ["required field"]}
    assert send("?x=3", "GET", headers=JSON).json == {"x": 3}


def test_json_may_have_a_type_of_its_own_and_a_charset(ask):
    send = ask(X)
    for kind in ("application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON"):
        assert send(data=b'{"x": 1}', content_type=kind).json == {"x": 1}


def test_the_handler_receives_what_cerberus_makes_of_the_parameters(ask):
    schema = {
        "a": {"rename": "b"},
        "b": {"type": "integer", "coerce": int},
        "c": {"default": 5},
        "d": {"type": "dict", "purge_unknown": True, "schema": {"e": {"type": "float", "default": 1.5}}},
        "n": {"nullable": True, "default": 1},
    }
    assert ask(schema)(json={"a": "3", "d": {"z": 1}, "n": None}).json == {"b": 3, "c": 5, "d": {"e": 1.5}, "n": None}


def test_a_default_is_not_shared_between_requests(route):
    def handler(v):
        v["seen"].append(1)
        return v

    for more in ({}, {"n": {"default": 1, "coerce": int}}):  # by the compiled check, and by Cerberus
        schema = {"v": {"type": "dict", "default": {"seen": []}}, **more}
        send = route(validate_params(schema)(lambda v, n=1: handler(v)))
        assert [send().json for _ in range(2)] == [{"seen": [1]}] * 2


def test_a_schema_that_its_owner_changes_later_is_not_affected(route):
    schema = {"n": {"type": "integer"}}
    send = route(validate_params(schema)(lambda n=0: n))
    schema["n"]["type"] = "string"
    assert send(json={"n": 3}).status_code == 200


@pytest.mark.parametrize(
    "schema, reason",
    [
        ([], "must be like"),
        ({"a": 5}, "must be like"),
        ({"a": None}, "must be like"),
        ({"a": {"tpye": "float"}}, "unknown rule"),
        ({"a": {"type": "flaot"}}, "Unsupported types: flaot"),
        ({"a": {"regex": "("}}, "'(' is no regular expression"),
        ({"a": {"type": "list", "schema": {"regex": "("}}}, "'(' is no regular expression"),
        ({"a": {"anyof": [{"regex": "("}]}}, "'(' is no regular expression"),
        ({"a": {"type": "float", "default": "x"}}, "the rules refuse 'x': ['must be of float type']"),
        ({"a": {"default": None}}, "the rules refuse None: ['null value not allowed']"),
        ({"a": {"type": "dict", "schema": {"b": {"max": 1, "default": 2}}}}, "['max value is 1']"),
        ({"a": {"type": "list", "schema": {"id": {"type": "integer"}}}}, "for a list it must be the rules of an item"),
        ({"a": {"type": "dict", "schema": {"type": "integer"}}}, "for a dict it must be fields with their rules"),
    ],
)
def test_a_mistake_in_a_schema_is_found_when_it_is_declared(schema, reason):
    def handler(a):
        pass

    for declare in (validate_params(schema), lambda handler: Router("v1").add_predict_route(Doubler(), schema)):
        with pytest.raises(MestError) as caught:
            declare(handler)
        assert reason in str(caught.value)
    with pytest.raises(MestError, match=r"handler\(\): the schema"):
        validate_params(schema)(handler)


def test_an_example_that_the_schema_refuses_is_a_mistake():
    with pytest.raises(MestError, match="the schema refuses its example: {'x': .'required field'.}"):
        validate_params(X, example={})(print)


    with pytest.raises(MestError, match="the example is .1.; it must be a dictionary"):
        validate_params(X, example=[1])(print)
    with pytest.raises(MestError, match=r"print\(\): write @validate_params"):
        validate_params(print)


def test_a_function_in_a_schema_stays_bound_to_its_object(ask):
    class Words:
        lock, known = threading.Lock(), []
        def check(self, field, value, error):
            value in self.known or error(field, "is unknown")

    words = Words()
    send = ask({"w": {"check_with": words.check}})
    words.known = ["a"]
    assert send(json={"w": "a"}).status_code == 200
    assert send(json={"w": "b"}).json["errors"] == {"w": ["is unknown"]}


def test_rules_may_be_given_by_name(ask):
    cerberus.rules_set_registry.add("numbers", {"type": "list", "schema": {"type": "integer"}})
    assert ask({"a": "numbers"})("?a=5&a=6", "GET").json == {"a": [5, 6]}


def test_all_that_cerberus_takes_for_a_schema_is_taken():
    cerberus.rules_set_registry.add("small", {"type": "integer", "max": 9})
    validate_params({"a": "small", "b": {"type": "list", "schema": "small"}})(print)
    validate_params({"a": {"default": 1, "required": True, "rename": "b"}, "b": {}})(print)
    validate_params({"a": {"anyof_type": ["string", "integer"], "coerce": str, "default": 5}})(print)


def test_errors_are_those_of_cerberus(ask):
    schema = {
        "a": {"type": "list", "schema": {"type": "dict", "schema": {"b": {"type": "integer", "required": True}}}},
        "c": {"anyof": [{"type": "string"}, {"type": "integer", "max": 3}]},
        "d": {"allowed": ["x"]},
    }
    document = {"a": [{"b": 1}, {}, {"b": "x", "e": 1}], "c": 9, "d": "y", "f": 1}
    validator = cerberus.Validator(copy.deepcopy(schema))
    assert not validator.validate(document)
    assert ask(schema)(json=document).json["errors"] == json.loads(json.dumps(validator.errors))


def leaves(errors):
    if isinstance(errors, str):
        return 1
    return sum(map(leaves, errors.values() if isinstance(errors, dict) else errors))


@pytest.mark.parametrize(
    "document",
    [
        {str(i): 1 for i in range(2000)},
        {str(i): 1 for i in range(90_000)},
        {"v": ["x"] * 200_000},
        {"rows": [{}] * 250_000},
        {"rows": [{"a": 1, **{str(i): 1 for i in range(90_000)}}]},
        {"filled": [{"b": "x"}] * 100_000},
        {"map": {str(i): "x" for i in range(2000)}},
        {"rows": [{str(j): 1 for j in range(30)} for _ in range(30)]},
    ],
)
def test_no_more_than_20_errors_are_reported_and_they_cost_little(ask, document):
    rows = {"type": "list", "schema": {"type": "dict", "schema": {"a": {"required": True}}}}
    filled = {"type": "list", "schema": {"type": "dict", "schema": {"a": {"default": 1}, "b": {"type": "float"}}}}
    schema = {"v": {"type": "list", "schema": {"type": "float"}}, "rows": rows, "filled": filled}
    parameters = mest.Parameters({**schema, "map": {"type": "dict", "valuesrules": {"type": "float"}}}, None, "it")
    body = json.dumps(document)
    with pytest.raises(Problem) as caught:
        parameters.check(document)
    assert leaves(caught.value.errors) == 20

    def refuse():
        with contextlib.suppress(Problem):
            parameters.check(document)

    decoding = min(timeit.repeat(lambda: json.loads(body), number=1, repeat=3))
    refusing = min(timeit.repeat(refuse, number=1, repeat=3))
    assert refusing < 15 * decoding + 0.5  # Cerberus alone takes seconds, or minutes


def test_errors_far_down_a_long_list_are_found_under_their_index(ask):
    rows = {"type": "list", "schema": {"type": "dict", "schema": {"a": {"type": "integer", "required": True}}}}
    send = ask({"v": {"type": "list", "maxlength": 9000, "schema": {"type": "float"}}, "rows": rows})
    document = {"v": [1.5] * 8000 + ["x"] + [2] * 500 + [None], "rows": [{"a": 1}] * 3000 + [{}]}
    assert send(json=document).json["errors"] == {
        "v": [{"8000": ["must be of float type"], "8501": ["null value not allowed"]}],
        "rows": [{"3000": [{"a": ["required field"]}]}],
    }
    assert send(json={"v": [1] * 9001}).json["errors"] == {"v": ["max length is 9000"]}


@pytest.mark.parametrize("rule", [{"forbidden": ["a"]}, {"allowed": {"a"}}, {"contains": ["a"]}])
def test_a_value_that_cerberus_stumbles_over_is_the_clients_mistake(ask, rule):
    response = ask({"a": {"type": "list", **rule}})(json={"a": [{}]})
    assert response.status_code == 422 and response.json["detail"]


def test_a_failure_of_a_function_in_the_schema_is_the_services_mistake(ask, capsys):
    def check(field, value, error):
        return 1 / 0

    assert ask({"a": {"check_with": check}})(json={"a": 1}).status_code == 500
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_coercion_cannot_smuggle_a_number_that_is_not_finite(ask):
    send = ask({"a": {"coerce": float}})
    assert send("?a=1.5").json == {"a": 1.5}
    response = send("?a=nan")
    assert response.status_code == 422 and "not finite" in response.json["detail"]


def test_threads_do_not_share_a_validator(ask):
    send = ask({"v": {"type": "list", "schema": {"type": "integer", "max": 9}}, "n": {"type": "integer"}})
    wrong = []

    def client(number):
        for _ in range(50):
            good, bad = send(json={"v": [number] * 5, "n": number}), send(json={"v": [10], "n": number})
            if good.json != {"v": [number] * 5, "n": number} or bad.status_code != 422:
                wrong.append((good.json, bad.json))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not wrong


def test_no_input_at_all_is_a_500(ask):
    schema = {
        "v": {"type": "list", "schema": {"type": "float"}, "forbidden": [1]}, "s": {"type": "string", "regex": "a+"},
        "d": {"type": "dict", "keysrules": {"regex": "a"}, "valuesrules": {"type": "number", "max": 3}}, "any": {},
        "i": {"type": "integer", "allowed": [1, 2]}, "o": {"anyof": [{"type": "float"}, {"items": [{}, {}]}]},
    }
    send, rng = ask(schema), random.Random(1)
    atoms = [None, True, 0, -1, 10**400, 1.5, -0.0, "", "a", "\x00", [], {}, [[]], {"a": {}}, [None], "\U0001f600"]

    def value(depth=3):
        kind = rng.randrange(4)
        if depth == 0 or kind < 2:
            return rng.choice(atoms)
        items = [value(depth - 1) for _ in range(rng.randrange(4))]
        return items if kind == 2 else {str(rng.choice(atoms)): item for item in items}

    kinds = ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b", "", "x/y", "\xff"]
    for _ in range(400):
        body = json.dumps({rng.choice([*schema, "z"]): value() for _ in range(3)}).encode()
        if rng.random() < 0.5:
            body = bytearray(body)
            for _ in range(rng.randrange(3)):
                body[rng.randrange(len(body))] = rng.randrange(256)
        query = "?" + "&".join(f"{rng.choice([*schema])}={rng.choice(['1', '%ff', 'a', '', '%ed%a0%80', 'nan'])}" for _ in range(2))
        response = send(query, data=bytes(body), headers={"Content-Type": rng.choice(kinds)})
        assert response.status_code in (200, 400, 413, 415, 422), (body, query, response.text)


# The compiled check, beside Cerberus


class Wild:
    """Random schemas, and documents that fit them more or less."""

    VALUES = [None, True, False, 0, 1, 2, -1, 1.5, -0.0, 10**400, "", "a", "b", "ab", "a\n", [], {}, [1], [None],
              [[]], {"a": 1}, b"a", b"", float("inf")]
    FITTING = {
        "float": [0.5, 1.5, 1, 2, True, 2.5, 0], "integer": [0, 1, 2, 3, True], "number": [0, 1, 2.5, 1.5],
        "boolean": [True, False], "string": ["a", "aa", "b", "ab", "", "abc"], "binary": [b"a", b"", b"abc"],
    }

    def __init__(self, seed):
        self.random = random.Random(seed)

    def perhaps(self, chance):
        return self.random.random() < chance

    def rules(self, depth):
        choose = self.random.choice
        kind = choose([*self.FITTING, "float", "integer", "list", "dict", "any", "several"] if depth else [*self.FITTING])
        rules = {"type": kind}
        if kind == "any":
            rules = {"allowed": [1, "a", True]} if self.perhaps(0.4) else {}
        elif kind == "several":
            rules = {"type": self.random.sample([*self.FITTING, "list", "dict", "date"], 2)}
        for rule, chance, constraints in [
            ("nullable", 0.15, [True, False]), ("required", 0.3, [True, True, False]), ("empty", 0.08, [True, False]),
            ("meta", 0.03, [{"x": 1}]),
        ]:
            if self.perhaps(chance):
                rules[rule] = choose(constraints)
        if kind in ("float", "integer", "number", "boolean", "several"):
            for rule, constraints in [("min", [0, -1.5, 1, 2]), ("max", [2, 1.5, 3, 10])]:
                if self.perhaps(0.3):
                    rules[rule] = choose(constraints)
        if kind in ("string", "list", "dict", "binary") and self.perhaps(0.3):
            rules[choose(["minlength", "maxlength"])] = choose([0, 1, 2, 3])
        if kind in ("string", "several") and self.perhaps(0.3):
            rules["regex"] = choose(["a+", "[ab]*$", "", "a|b"])
        if kind in ("string", "integer", "list", "float") and self.perhaps(0.15):
            rules[choose(["allowed", "forbidden"])] = self.random.sample([1, 2, "a", "b", True, 0, 1.5, "ab"], 3)
        if kind == "list" and self.perhaps(0.8):
            rules |= choose([{"schema": self.rules(depth - 1)}, {"items": [self.rules(depth - 1), self.rules(0)]}])
        if kind == "dict":
            if self.perhaps(0.7):
                rules["schema"] = self.schema(depth - 1)
            for rule, constraints in [
                ("allow_unknown", [True, False]), ("require_all", [True, False]), ("valuesrules", [self.rules(0)]),
                ("keysrules", [{"type": "string", "regex": "[a-c]+"}, {"maxlength": 1}]),
            ]:
                if self.perhaps(0.15):
                    rules[rule] = choose(constraints)
        if self.perhaps(0.2):
            rules["default"] = self.value(rules, 0)
        return rules

    def schema(self, depth=3):
        return {field: self.rules(depth) for field in self.random.sample("abcde", self.random.randrange(1, 5))}

    def value(self, rules, wildness):
        kind = rules.get("type", "any")
        kind = self.random.choice(kind) if isinstance(kind, list) else kind
        if self.perhaps(wildness):
            return self.random.choice(self.VALUES)
        if rules.get("nullable") and self.perhaps(0.2):
            return None
        if kind == "list":
            items = rules.get("items") or [rules.get("schema", {"type": "integer"})] * self.random.randrange(4)
            return [self.value(item, wildness / 2) for item in items]
        if kind == "dict":
            unknown = {"z": self.random.choice(self.VALUES)} if self.perhaps(0.1) else {}
            return self.document(rules.get("schema", {"a": rules.get("valuesrules", {})}), wildness) | unknown
        return self.random.choice(rules.get("allowed") or self.FITTING.get(kind) or self.VALUES)

    def document(self, schema, wildness):
        fields = [field for field in schema if self.perhaps(0.97 if schema[field].get("required") else 0.8)]
        self.random.shuffle(fields)
        unknown = {"unknown": 1} if self.perhaps(wildness / 2) else {}
        return {field: self.value(schema[field], wildness) for field in fields} | unknown


def typed(value):
    """A value with what == overlooks: types, the order of keys, the sign of 0."""
    if isinstance(value, dict):
        return [(key, typed(item)) for key, item in value.items()]
    return [type(value), *map(typed, value)] if isinstance(value, list) else (type(value), repr(value))


@pytest.mark.parametrize("seed", range(4))
def test_a_compiled_check_accepts_what_cerberus_accepts_and_makes_the_same_of_it(seed):
    wild, compiled, accepted, sure = Wild(seed), 0, 0, 0
    for _ in range(320):
        schema = wild.schema()
        if coerced := wild.perhaps(0.3):  # which only Cerberus can do
            schema["n"] = {"coerce": int}
        try:
            parameters = mest.Parameters(schema, None, "it")
        except MestError:
            continue  # a default that does not fit
        compiled += parameters.surely.function is not None
        for _ in range(6):
            document = wild.document(schema, wild.random.choice([0, 0, 0.1, 0.5]))
            document |= {"n": "1"} if coerced else {}
            validator = cerberus.Validator(copy.deepcopy(schema))
            try:
                valid = validator.validate(copy.deepcopy(document)) and not mest.fault_of(document)
            except (TypeError, RuntimeError):
                valid = False  # Cerberus stumbles over it
            sure += parameters.surely(copy.deepcopy(document)) is not None
            try:
                checked = parameters.check(copy.deepcopy(document))
            except Problem:
                assert not valid, (schema, document)
            else:
                assert valid and typed(checked) == typed(validator.document), (schema, document)
            accepted += valid
    assert compiled > 90 and accepted > 500 and sure > 0.4 * accepted


I = {"type": "integer"}
ROW = {"type": "dict", "schema": {"a": {**I, "default": 1}}}
LIST = {"type": "list", "schema": {"type": "dict", "schema": {"q": I}}}


@pytest.mark.parametrize(
    "schema, document",
    [
        ({"x": {"anyof": [{"type": "list", "schema": ROW}, {"type": "string"}]}}, {"x": [{}]}),
        ({"x": {"noneof": [{"type": "list", "schema": ROW}]}}, {"x": [{"a": "b"}]}),
        ({"x": {"oneof": [{"type": "list", "schema": ROW}, {"type": "list", "schema": {"schema": {"a": I, "b": I}}}]}},
         {"x": [{"b": 1}]}),
        ({"n": {"coerce": int}, "a": {"type": "dict", "require_all": True, "schema": {"l": LIST}}},
         {"n": "1", "a": {"l": [{}]}}),
        ({"n": {"coerce": int}, "a": {"type": "dict", "allow_unknown": True, "schema": {"l": LIST}}},
         {"n": "1", "a": {"l": [{"z": 1}, {"q": "x"}]}}),
        ({"l": {**LIST, "allow_unknown": True}}, {"l": [{"z": 1}]}),
        ({"o": {"type": "dict", "require_all": True, "schema": {"l": {**LIST, "require_all": False}}}}, {"o": {"l": [{}]}}),
        ({"x": {"type": "list", "schema": {**I, "default": 5}}}, {"x": [1, None]}),
        ({"x": {"type": "list", "schema": ROW}}, {"x": [{}, {"a": None}, {"a": 2}]}),
        ({"a": {"type": "dict", "require_all": True, "schema": {"b": {"type": "dict", "default": {}, "schema": {"c": I}}}}},
         {"a": {}}),
        ({"d": {"type": "dict", "purge_unknown": True, "schema": {name: {} for name in "hgfedcba"}}},
         {"d": {name: 1 for name in "hgfedcba"} | {str(i): i for i in range(30)}}),
        ({"x": {"type": "list", "items": []}}, {"x": [1]}),
        ({"x": {"type": "list", "schema": {"anyof": [I, {"type": "list", "schema": I}]}}}, {"x": [1, [2], ["a"]] * 3}),
    ],
)
def test_rules_next_to_each_other_mean_what_they_mean_to_cerberus(schema, document):
    validator = cerberus.Validator(copy.deepcopy(schema))
    valid = validator.validate(copy.deepcopy(document))
    parameters, given = mest.Parameters(schema, None, "it"), copy.deepcopy(document)
    try:
        assert typed(parameters.check(given)) == typed(validator.document) and valid
    except Problem as problem:
        assert not valid and problem.errors == validator.errors


@pytest.mark.parametrize("value", [float("inf"), 10**400])
@pytest.mark.parametrize("low, high", [(-float("inf"), float("inf")), (0, float("inf")), (0, 10**500)])
def test_numbers_are_finite_even_if_the_limits_are_not(value, low, high):
    rules = {"type": "float", "min": low, "max": high}
    for schema, document in [
        (rules, value), ({"type": "list", "schema": rules}, [value]), ({"type": "dict", "valuesrules": rules}, {"a": value}),
    ]:
        with pytest.raises(Problem, match="400 Bad Request: The body contains a number that is not finite"):
            mest.Parameters({"x": schema}, None, "it").check({"x": document})


F = {"type": "float"}
SCHEMAS = {
    "floats": ({"v": {"type": "list", "schema": F}}, {"v": [i / 7 for i in range(1000)]}),
    "image": ({"v": {"type": "list", "minlength": 28, "maxlength": 28, "schema": {
        "type": "list", "minlength": 28, "maxlength": 28, "schema": {**F, "min": 0, "max": 1}}}},
        {"v": [[i * j / 785 for i in range(28)] for j in range(28)]}),
    "mixed": (
        {f"{name}{i}": rules for i in range(5) for name, rules in {
            "age": {"type": "integer", "min": 0, "max": 150, "required": True}, "income": {**F, "min": 0},
            "country": {"type": "string", "allowed": ["DE", "FR"]}, "member": {"type": "boolean", "default": False},
        }.items()},
        {f"{name}{i}": value for i in range(5) for name, value in {
            "age": 20 + i, "income": 1e5 / (i + 3), "country": "FR", "member": True}.items()},
    ),
    "rows": ({"v": {"type": "list", "schema": {"type": "dict", "schema": {
        "a": {**F, "required": True}, "b": {"type": "string", "maxlength": 9}, "c": {"type": "integer", "min": 0}}}}},
        {"v": [{"a": i / 7, "b": "word", "c": i} for i in range(100)]}),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_compiled_check_is_far_faster_than_cerberus_and_about_as_fast_as_decoding(name):
    schema, document = SCHEMAS[name]
    parameters, body = mest.Parameters(schema, document, "it"), json.dumps(document)
    validator = cerberus.Validator(copy.deepcopy(schema))

    def fastest(function, times):
        return min(timeit.repeat(function, number=times, repeat=5)) / times

    check = fastest(lambda: parameters.surely(document), 50)
    assert check < fastest(lambda: validator.validate(document), 1) / 30
    assert check < 3 * fastest(lambda: json.loads(body), 50)


# Models


class Stages(GenericModel):
    def __init__(self, payload, result="same"):  # without super().__init__()
        self.payload, self.result = payload, result

    def pre_process(self, **params):
        return self.payload

    def infer(self, *args, **kwargs):
        return (args, kwargs) if self.result == "same" else self.result

    def post_process(self, *args, **kwargs):
        return args, kwargs


def test_between_the_stages_a_dictionary_is_keywords_and_a_list_is_positions():
    for value, passed in [
        ({"a": 1}, ((), {"a": 1})), ([1, 2], ((1, 2), {})), ((1, 2), (((1, 2),), {})), ("ab", (("ab",), {})),
        (None, ((None,), {})), ({}, ((), {})), ([], ((), {})),
    ]:
        assert Stages(value).predict() == ((passed,), {})
        assert Stages(1, value).predict() == passed


@pytest.mark.parametrize("result", [[1, 2], [1], [], {}, {1: 2}, (1,), None, 5, "ab"])
def test_without_post_process_the_result_is_the_answer(result):
    class Model(GenericModel):
        def infer(self, **params):
            return params["r"]

    assert Model().predict(r=result) == result


def test_a_model_is_loaded_once_init_has_been_carried_out_by_mest_or_by_hand():
    class Other(GenericModel):
        def init(self, directory_path):
            self.weights = directory_path

    by_mest, by_hand = Other(), Doubler()
    assert not by_mest.is_loaded and not by_hand.is_loaded
    by_hand.init("somewhere")
    make(models=[by_mest]).setup()
    assert by_mest.is_loaded and by_hand.is_loaded and by_hand.predict(x=2) == {"y": 4}
    assert mest.MestModel is GenericModel


def test_a_model_without_infer_says_so():
    with pytest.raises(NotImplementedError, match="Bare has neither infer.. nor infer_batch"):
        type("Bare", (GenericModel,), {})().predict()


class Batched(GenericModel):
    """Squares; what it is given in each batch is kept."""

    max_batch_size = 32

    def __init__(self, **attributes):
        self.batches = []
        vars(self).update(attributes)

    def infer_batch(self, payloads):
        self.batches.append([payload["x"] for payload in payloads])
        return [payload["x"] ** 2 for payload in payloads]


def together(model, values, **more):
    """What predict returns or raises for each value, all called while the model is busy with a 0."""
    held, let_go = threading.Event(), threading.Event()
    infer_batch = model.infer_batch

    def hold(payloads):
        if [payload["x"] for payload in payloads] == [0]:
            held.set(), let_go.wait(PATIENCE)
        return infer_batch(payloads)

    model.infer_batch = hold
    outcomes = {}

    def call(x):
        try:
            outcomes[x] = model.predict(x=x)
        except Exception as error:
            outcomes[x] = error

    threads = [threading.Thread(target=call, args=(x,)) for x in (0, *values)]
    threads[0].start()
    assert held.wait(PATIENCE)
    [thread.start() for thread in threads[1:]]
    until(lambda: model._turns.queue.qsize() + len(outcomes) == len(values))
    let_go.set()
    [thread.join(PATIENCE) for thread in threads]
    return [outcomes[x] for x in values]


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_concurrent_calls_are_answered_in_one_batch():
    model = Batched()
    assert together(model, [1, 2, 3]) == [1, 4, 9]
    assert sorted(model.batches[1]) == [1, 2, 3] and len(model.batches) == 2
    small = Batched(max_batch_size=2)
    assert together(small, [1, 2, 3]) == [1, 4, 9]
    assert sorted(map(len, small.batches)) == [1, 1, 2]


def test_a_crowd_fills_the_batches_and_a_lone_caller_does_not_wait():
    class Slow(Batched):
        def infer_batch(self, payloads):
            time.sleep(0.003)
            return super().infer_batch(payloads)

    model = Slow(batch_timeout=0.05)
    threads = [threading.Thread(target=lambda: [model.predict(x=1) for _ in range(30)]) for _ in range(32)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert 32 * 30 / len(model.batches) >= 16
    model.predict(x=1)
    start = time.perf_counter()
    [model.predict(x=1) for _ in range(20)]
    assert time.perf_counter() - start < 20 * 0.05  # each would wait as long for others


@pytest.mark.parametrize("size", [1, 32])
def test_infer_batch_alone_is_enough(size):
    model = Batched(max_batch_size=size)
    assert model.predict(x=3) == model.infer(x=3) == 9


def test_an_overridden_infer_may_call_the_one_that_it_overrides():
    class Both(Batched):
        def infer(self, x):
            return super().infer(x=x) + 1

    assert Both(max_batch_size=1).predict(x=3) == 10


def test_without_infer_batch_there_are_no_batches():
    model = Doubler()
    model.init("")
    model.max_batch_size = 32
    assert model.predict(x=2) == {"y": 4} and not model._turns.batching


class Faulty(Batched):
    def infer_batch(self, payloads):
        results = super().infer_batch(payloads)
        if any(payload["x"] == 13 for payload in payloads):
            raise ValueError("unlucky")
        if any(payload["x"] == 666 for payload in payloads):
            raise MemoryError
        if any(payload["x"] == 99 for payload in payloads):
            return results[:-1]
        return [KeyError(7) if payload["x"] == 7 else r for payload, r in zip(payloads, results)]


@pytest.mark.parametrize("size", [1, 32])
def test_who_fails_fails_alone(size):
    model = Faulty(max_batch_size=size)
    for x, kind, text in [(13, ValueError, "unlucky"), (7, KeyError, "7"), (99, MestError, "a list of 0, not a list with a result for each of 1")]:
        with pytest.raises(kind, match=text):
            model.predict(x=x)
    first, failed, last = together(model, [1, 13, 2]) if size > 1 else (1, ValueError("unlucky"), 4)
    assert (first, str(failed), last) == (1, "unlucky", 4)
    if size > 1:
        first, key, last = together(Faulty(), [1, 7, 2])
        assert (first, last, type(key)) == (1, 4, KeyError)
        first, short, last = together(Faulty(), [1, 99, 2])
        assert (first, last) == (1, 4) and "returned a list of 0, not a list with a result for each of 1" in str(short)


def test_a_failed_batch_is_run_one_by_one_once_but_not_after_a_memory_error():
    model = Faulty()
    together(model, [1, 13, 2])
    assert sorted(map(len, model.batches)) == [1, 1, 1, 1, 3]
    model = Faulty()
    outcomes = together(model, [1, 666, 2])
    assert all(isinstance(outcome, MemoryError) for outcome in outcomes) and len(model.batches) == 2


def test_the_other_stages_fail_only_their_request():
    class Stages(Batched):
        def pre_process(self, x):
            return {"x": int(x)}

        def post_process(self, result):
            return 100 // (result - 4)

    outcomes = together(Stages(), [1, "a", 2, 3])
    assert [outcomes[0], outcomes[3]] == [-34, 20]
    assert isinstance(outcomes[1], ValueError) and isinstance(outcomes[2], ZeroDivisionError)


class Stuck(Batched):
    """A model that stays in its first batch until it may go on."""

    def __init__(self, **attributes):
        super().__init__(**attributes)
        self.entered, self.go_on = threading.Event(), threading.Event()

    def infer_batch(self, payloads):
        self.entered.set(), self.go_on.wait(PATIENCE)
        return super().infer_batch(payloads)

    @contextlib.contextmanager
    def busy(self):
        def predict():
            with contextlib.suppress(Problem):  # it may take longer than is allowed
                self.predict(x=1)

        thread = threading.Thread(target=predict)
        thread.start()
        assert self.entered.wait(PATIENCE)
        try:
            yield
        finally:
            self.go_on.set()
            thread.join(PATIENCE)


@pytest.mark.parametrize("size", [1, 32])
def test_who_has_given_up_is_not_computed(size):
    model = Stuck(max_batch_size=size)
    with model.busy():
        model._limits = 512, 0.05
        with pytest.raises(Problem, match="504") as caught:
            model.predict(x=2)
    assert "in time" in caught.value.description
    model._limits = 512, PATIENCE
    assert model.predict(x=3) == 9 and model.batches == [[1], [3]]


@pytest.mark.parametrize("size", [1, 32])
def test_a_queue_that_is_too_long_refuses_at_once(size):
    model = Stuck(max_batch_size=size, _limits=(1, PATIENCE))
    with model.busy(), pytest.raises(MestError) as caught:
        model.predict(x=2)
    assert caught.value.code == 503 and caught.value.headers == {"Retry-After": "1"}
    until(lambda: not model._turns.waiting)
    assert model.predict(x=2) == 4


def test_the_limits_are_those_of_the_configuration(router):
    model = Batched()
    make(models=[model], max_queued_requests=7, request_timeout=9)
    assert model._limits == (7, 9)


def test_a_timeout_of_the_model_itself_is_its_own():
    class Late(Batched):
        def infer_batch(self, payloads):
            raise TimeoutError("of the database")

    with pytest.raises(TimeoutError, match="of the database"):
        Late().predict(x=1)


def test_a_model_that_exits_ends_its_request_and_nothing_else():
    class Exits(Batched):
        def infer_batch(self, payloads):
            if any(payload["x"] == 5 for payload in payloads):
                raise SystemExit("enough")
            return super().infer_batch(payloads)

    model = Exits(max_batch_size=2)
    one, ended, three = together(model, [1, 5, 3])
    assert (one, type(ended), three) == (1, RuntimeError, 9)
    with pytest.raises(RuntimeError, match="SystemExit.'enough'"):
        model.predict(x=5)
    assert model.predict(x=3) == 9
    assert model._turns.waiting == 0


def test_a_model_may_call_its_own_predict():
    class Recursive(Batched):
        def infer_batch(self, payloads):
            return [p["x"] if p["x"] < 1 else p["x"] + self.predict(x=p["x"] - 1) for p in payloads]

    for size in (1, 32):
        assert Recursive(max_batch_size=size).predict(x=3) == 6


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_no_more_threads_than_allowed_are_in_the_model(size, concurrency):
    lock, inside, most = threading.Lock(), [], []

    class Watched(Batched):
        def infer_batch(self, payloads):
            with lock:
                inside.append(1)
                most.append(len(inside))
            time.sleep(0.002)
            with lock:
                inside.pop()
            return super().infer_batch(payloads)

    model = Watched(max_batch_size=size, max_concurrency=concurrency)
    threads = [threading.Thread(target=lambda: [model.predict(x=1) for _ in range(10)]) for _ in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert max(most) == concurrency


def test_a_child_of_a_fork_starts_a_thread_of_its_own_and_nothing_hangs_at_exit(project):
    project.write(forks="""
import os, sys, mest
class Model(mest.GenericModel):
    max_batch_size = 8
    def infer_batch(self, payloads):
        return [payload["x"] + 1 for payload in payloads]
model = Model()
assert model.predict(x=1) == 2
child = os.fork()
assert model.predict(x=2) == 3
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert project.mest(command=("-W", "ignore", "forks.py")).returncode == 0


def test_a_batch_may_use_up_the_list_that_it_is_given():
    class Popping(Batched):
        def infer_batch(self, payloads):
            results = []
            while payloads:
                results.append(payloads.pop(0)["x"] ** 2)
            return results

    assert Popping().predict(x=3) == Popping(max_batch_size=1).predict(x=3) == 9


@pytest.mark.parametrize("results", [{"scores": [1]}, "a", None])
def test_results_that_are_no_list_are_refused(results):
    model = Batched(infer=GenericModel.infer)
    model.infer_batch = lambda payloads: results
    with pytest.raises((MestError, TypeError), match="infer_batch of Batched returned a (dict|str|NoneType), not a list with"):
        model.predict(x=1)


def test_a_data_frame_of_results_has_one_in_a_row():
    pandas = pytest.importorskip("pandas")
    model = Batched()
    model.infer_batch = lambda payloads: pandas.DataFrame({"a": [1.0] * len(payloads), "b": 2.0})
    assert model.predict(x=1).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("size", [1, 32])
@pytest.mark.parametrize("payload", [{"a": 1}, {}, [5], [[1, 2]], [], 7, None])
def test_infer_batch_is_given_what_pre_process_returned(size, payload):
    class Echo(Batched):
        def pre_process(self, **params):
            return payload

        def infer_batch(self, payloads):
            return payloads

    assert Echo(max_batch_size=size).predict() == payload


def test_a_thread_that_cannot_be_started_is_one_failure_not_the_end(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    model = Batched()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="start new thread"):
            model.predict(x=1)
    assert model.predict(x=3) == 9 and model._turns.waiting == 0


def test_a_model_can_be_copied_and_pickled_after_it_has_predicted():
    model = Batched(factor=1)
    model.predict(x=1)
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.predict(x=3) == 9 and other._turns is not model._turns


def test_the_limits_hold_for_a_model_that_has_predicted_before():
    model = Batched()
    model.predict(x=1)
    make(models=[model], max_queued_requests=1)
    model._turns.count(1)
    with pytest.raises(Problem, match="503"):
        model.predict(x=1)


@pytest.mark.parametrize("name", ["max_batch_size", "max_concurrency"])
def test_the_sizes_of_a_model_are_checked(name):
    with pytest.raises(MestError, match=f"{name} of .* is 0; it must be an integer of 1 or more"):
        make(models=[Batched(**{name: 0})])
    with pytest.raises(MestError, match="batch_timeout of .* is None; it must be seconds"):
        make(models=[Batched(batch_timeout=None)])
    with pytest.raises(MestError, match=f"{name} of .* is '8'; it must be an integer of 1 or more"):
        Router("v1").add_predict_route(Batched(**{name: "8"}), {"x": {}})


# Routes


def test_a_predict_route_answers_with_the_model(router):
    model = Doubler()
    router.add_predict_route(model, X, example={"x": 1})
    router.add_predict_route(model, X, url="again", method="GET")
    router.add_predict_route(model, X, url="again", method="PUT")
    mest_app = make(models=[model]).setup()
    mest_app.register_router("/", router)
    client = mest_app.app.test_client()
    assert client.post("/predict", json={"x": 1.5}).json == {"y": 3.0}
    assert client.get("/again?x=2").json == client.put("/again", json={"x": 2}).json == {"y": 4}
    assert client.post("/predict", json={"x": "a"}).json["errors"] == {"x": ["must be of float type"]}


def test_the_path_of_a_predict_route_gives_parameters_too(router):
    power = types.SimpleNamespace(predict=lambda x, n: x**n)
    router.add_predict_route(power, X, url="/power/<int:n>")
    assert client_of(router).post("/power/3", json={"x": 2}).json == 8


def test_a_model_that_is_not_loaded_is_a_500_and_the_log_says_what_to_call(router, capsys):
    router.add_predict_route(Doubler(), X)
    assert client_of(router).post("/predict", json={"x": 1}).status_code == 500
    assert "is not loaded; call mest_app.setup()" in log_of(capsys)[-1]["traceback"]


def test_anything_with_predict_can_be_behind_a_predict_route(router):
    router.add_predict_route(types.SimpleNamespace(predict=lambda x: -x), X)
    assert client_of(router).post("/predict", json={"x": 1}).json == -1
    with pytest.raises(MestError, match="the predict route '/predict' of router 'v1' has the model 5; it must be an object"):
        router.add_predict_route(5, X)
    with pytest.raises(MestError, match="it must be an object with predict"):
        router.add_predict_route(Doubler, X)


def test_ping_names_the_service_and_says_when_it_is_shutting_down(router):
    router.add_ping_route()
    router.add_ping_route("/health")
    mest_app = Mest(MestConfig("iris", 8000, environ={}))
    mest_app.register_router("/", router)
    client = mest_app.app.test_client()
    assert client.get("/ping").json == client.get("/health").json == {"message": "iris is up"}
    mest_app.draining = True
    response = client.get("/ping")
    assert (response.status_code, response.json["detail"]) == (503, "iris is shutting down.")


def test_a_decorated_handler_comes_back_as_it_was(router):
    def handler(a, b=2):
        return a + b

    assert router.route("/sum")(handler) is handler
    checked = validate_params(X)(lambda x: x + 1)
    assert router.route("/x", endpoint="x")(checked) is checked
    assert checked(x=1) == checked(1) == 2


def test_urls_are_relative_with_or_without_a_slash(router):
    router.route("a", "GET")(lambda: "a")
    router.route("/b/", "GET", endpoint="b")(lambda: "b")
    for url in ("/v1", "v1", "/v1/", "v1/"):
        client = client_of(router, url)
        assert client.get("/v1/a").text == "a" and client.get("/v1/b/").text == "b"


def test_route_takes_the_options_of_flask(router):
    router.route("a", methods=["GET", "PUT"], defaults={"n": 5}, endpoint="named")(lambda n: {"n": n})
    router.route("b", "DELETE", strict_slashes=False, endpoint="b")(lambda: flask.url_for("v1.named"))
    client = client_of(router)
    assert client.get("/a").json == client.put("/a").json == {"n": 5}
    assert client.post("/a").status_code == 405
    assert client.delete("/b/").text == "/a"


def test_one_handler_may_have_several_routes(router):
    @router.route("a")
    @router.route("b")
    def handler():
        return "here"

    client = client_of(router)
    assert client.post("/a").text == client.post("/b").text == "here"


def test_asynchronous_handlers_work_where_flask_can_run_them(router):
    pytest.importorskip("asgiref")

    @router.route("a")
    @validate_params(X)
    async def handler(x):
        return x

    assert client_of(router).post("/a", json={"x": 1}).json == 1


@pytest.mark.parametrize("name", ["", "a.b", None, 5])
def test_a_router_needs_a_name_that_flask_can_use(name):
    with pytest.raises(MestError, match="must be text without dots"):
        Router(name)


def test_route_needs_an_url(router):
    with pytest.raises(MestError, match="a route of router 'v1' has the url <function"):
        router.route(lambda: None)


def test_routes_added_after_the_registration_work_too(mest_app, router):
    mest_app.register_router(url="/", router=router)
    router.route("late")(lambda: "late")
    router.add_ping_route()
    assert mest_app.app.test_client().post("/late").text == "late"
    assert mest_app.app.test_client().get("/ping").status_code == 200


def test_a_router_may_be_registered_at_two_urls(mest_app, router):
    router.route("a")(lambda: "a")
    mest_app.register_router("/one", router)
    mest_app.register_router("/two", router)
    router.route("b", endpoint="b")(lambda: "b")
    client = mest_app.app.test_client()
    for url in ("/one", "/two"):
        assert client.post(url + "/a").text == "a" and client.post(url + "/b").text == "b"


def test_nothing_is_hidden_silently(mest_app, router):
    def predict():
        return 1

    router.route("predict")(predict)
    with pytest.raises(MestError, match="router 'v1' has two handlers named 'predict'; rename one"):
        router.route("other")(type(predict)(predict.__code__, globals(), "predict"))
    mest_app.register_router("/", router)
    with pytest.raises(MestError, match="POST /predict of router 'v1' is a route already, of the endpoint 'v1.predict'"):
        router.route("predict", endpoint="p2")(lambda: 2)
    with pytest.raises(MestError, match="there are two routers named 'v1'"):
        mest_app.register_router("/b", Router("v1"))
    other = Router("v2")
    mest_app.register_router("/", other)
    router.route("/<int:a>/x", endpoint="p3")(lambda a: 3)
    with pytest.raises(MestError, match="is a route already, of the endpoint 'v1.p3'"):
        other.route("/<int:b>/x")(lambda b: 2)
    with pytest.raises(MestError, match="is a route already"):
        mest_app.register_router("/", router)
    other.route("predict", "GET")(predict)
    other.route("/<c>/x", endpoint="text")(lambda c: 4)
    with pytest.raises(MestError, match="is a route already"):
        other.route("/<string:d>/x", endpoint="same")(lambda d: 5)
    other.route("/<c>/x", endpoint="elsewhere", subdomain="p")(lambda c: 6)
    client = mest_app.app.test_client()
    assert [client.post("/predict").json, client.get("/predict").json] == [1, 1]
    assert [client.post("/5/x").json, client.post("/b/x").json] == [3, 4]


def test_a_router_is_a_blueprint_for_an_application_without_mest(router, caplog):
    app = flask.Flask("plain")
    app.register_blueprint(router.blueprint, url_prefix="/v1")
    router.add_ping_route()
    router.add_predict_route(types.SimpleNamespace(predict=lambda x: 1 / x), X)
    client = app.test_client()
    assert client.get("/v1/ping").json == {"message": "plain is up"}
    assert client.post("/v1/predict", json={"x": 2}).json == 0.5
    assert client.post("/v1/predict", json={}).json["errors"] == {"x": ["required field"]}
    assert client.post("/v1/predict", json={"x": 1}).headers["X-Request-Id"]
    assert client.post("/v1/predict", json={"x": 0}).status_code == 500
    assert "division by zero" in caplog.text


def test_validate_params_works_on_a_plain_flask_route():
    app = flask.Flask("plain")
    app.post("/x")(validate_params(X)(lambda x: {"x": x}))
    client = app.test_client()
    assert client.post("/x", json={"x": 1}).json == {"x": 1}
    response = client.post("/x", json={})
    assert response.status_code == 422 and response.json["errors"] == {"x": ["required field"]}
    assert response.content_type == "application/problem+json"


# The ASGI edge


def over_asgi(mest_app, url="/predict", method="POST", parts=(b'{"x": 3}',), headers=None, leave=None, whole=True, **scope):
    """What the ASGI application answers: its status, headers by lower-case name, and body.

    The client leaves when the event `leave` is set, if any, and sends a part less if not `whole`.
    """
    path, _, query = url.partition("?")
    headers = {"Content-Type": "application/json", "X-Request-Id": "r1"} if headers is None else headers
    named = [(k.lower().encode(), v.encode("latin-1")) for k, v in (headers.items() if isinstance(headers, dict) else headers)]
    scope = {
        "type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": unquote(path),
        "raw_path": path.encode(), "query_string": query.encode(), "root_path": "", "headers": named,
        "client": ("1.2.3.4", 5), "server": ("127.0.0.1", 80), **scope,
    }
    sent, queue = [], [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if whole:
        queue[-1]["more_body"] = False

    async def receive():
        if queue:
            return queue.pop(0)
        while leave is None or not leave.is_set():
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append({**message, "at": time.monotonic()})

    asyncio.run(asyncio.wait_for(mest_app(scope, receive, send), PATIENCE))
    if not sent:
        return None
    start, *rest = sent
    headers = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
    assert len(headers) == len(start["headers"]) or "set-cookie" in headers
    body = b"".join(message["body"] for message in rest)
    return types.SimpleNamespace(status=start["status"], headers=headers, raw=start["headers"], body=body, sent=rest)


class Answering(GenericModel):
    def infer(self, **params):
        kind = params.get("kind")
        if kind == "abort":
            flask.abort(418)
        if kind == "problem":
            raise Problem(409, "no", headers={"Retry-After": "7"})
        if isinstance(kind, str) and hasattr(builtins, kind):
            raise getattr(builtins, kind)("hunter2")
        return {"nan": float("nan"), "text": "ü", "bytes": b"\x00", "none": None}.get(kind, params) if kind != "away" else flask.abort(flask.redirect("/é x"))


def answering(**fields):
    router, mest_app = Router("v1"), make(threads=2, **fields)
    schema = {"x": {"type": "float"}, "kind": {"type": "string"}, "n": {"type": "integer", "default": 5}, "z": {"type": "string"}}
    model = Answering()
    model.model = 1
    router.add_predict_route(model, schema)
    router.add_predict_route(model, schema, url="/at/<z>/<int:k>", method="GET")
    router.add_predict_route(model, {"x": {"type": "float", "check_with": lambda *_: None}}, url="/checked")
    mest_app.register_router("/", router)
    return mest_app


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    "sent",
    [
        {}, {"parts": [b'{"x"', b": 4}"]}, {"parts": [b'{"x": "a"}']}, {"parts": [b"{"]}, {"parts": [b""]}, {"parts": [b"[]"]},
        {"parts": [b'{"x": NaN}']}, {"parts": [b'{"x": 1e999}']}, {"parts": [b"{" + b" " * 2000 + b"}"]},
        {"parts": [b'{"x": 1, "y": 2}']}, {"parts": [b'{"n": ' + b"[" * 5000]}, {"url": "/predict?n=7&x=1"},
        {"url": "/predict?x=a"}, {"url": "/predict?x=1&x=2"}, {"headers": {"Content-Type": "text/csv"}},
        {"headers": {}}, {"headers": {"Content-Type": "application/json", "Content-Encoding": "gzip"}},
        {"headers": {"Content-Type": FORM}, "parts": [b"x=4&n=2"]}, {"headers": {"Content-Type": FORM}, "parts": [b"&&"]},
        {"headers": {"Content-Type": "application/vnd.api+json; charset=utf-8"}},
        {"headers": [("Content-Type", FORM), ("Content-Type", "application/json")]},
        {"parts": [b'{"kind": "nan"}']}, {"parts": [b'{"kind": "text"}']}, {"parts": [b'{"kind": "bytes"}']},
        {"parts": [b'{"kind": "none"}']}, {"parts": [b'{"kind": "abort"}']}, {"parts": [b'{"kind": "problem"}']},
        {"parts": [b'{"kind": "away"}']}, {"parts": [b'{"kind": "KeyError"}']}, {"parts": [b'{"kind": "StopIteration"}']}, {"parts": [b'{"kind": "SystemExit"}']},
        {"parts": [b'{"kind": "KeyboardInterrupt"}']}, {"url": "/at/a/5", "method": "GET"}, {"url": "/at/a%2Fb/5", "method": "GET"},
        {"url": "/at/%ff/5?x=2", "method": "GET"}, {"url": "/at/a/b", "method": "GET"}, {"url": "/checked"},
        {"url": "/checked", "parts": [b'{"x": "b"}']}, {"method": "GET"}, {"method": "HEAD", "url": "/at/a/5"},
        {"method": "OPTIONS"}, {"method": "BREW"}, {"url": "/predict/"}, {"url": "/predict//"}, {"url": "/none"},
        {"url": "/livez", "method": "GET"}, {"url": "/readyz", "method": "GET"}, {"url": "/livez"},
        {"parts": [b" " * 1100]},
    ],
)
def test_a_predict_route_answers_the_same_on_both_edges(sent, capsys):
    mest_app = answering(max_body_bytes=1000)
    given = {"headers": {"Content-Type": "application/json"}, "parts": [b'{"x": 3}'], **sent}
    headers = given.pop("headers")
    given["headers"] = [*(headers.items() if isinstance(headers, dict) else headers), ("X-Request-Id", "r1")]
    if given.get("method") == "GET":
        given["parts"] = [b""]
    asgi = over_asgi(mest_app, **given)
    body, own = b"".join(given.pop("parts")), Headers(given["headers"])
    if body and "Content-Length" not in own:
        own["Content-Length"] = str(len(body))
    client = mest_app.app.test_client()
    raw = given.get("url", "/predict").partition("?")
    path = unquote_to_bytes(raw[0]).decode("latin-1")
    environ = {"CONTENT_TYPE": ",".join(own.getlist("Content-Type")), "PATH_INFO": path, "wsgi.input": io.BytesIO(body)}
    builder = EnvironBuilder(method=given.get("method", "POST"), path="/", query_string=raw[2], headers=own)
    wsgi = client.open({**builder.get_environ(), **environ})
    assert (asgi.status, asgi.body) == (wsgi.status_code, wsgi.data)
    assert asgi.headers == {name.lower(): value for name, value in wsgi.headers}
    assert "hunter2" not in asgi.body.decode("utf-8", "replace")


def test_what_the_user_has_written_never_runs_in_the_event_loop():
    where = []

    def note(*args):
        where.append(threading.current_thread())
        return args[-1] if args else None

    class Model(Doubler):
        def pre_process(self, x):
            return note({"x": x})

        def infer(self, x):
            return note({"x": x})

        def post_process(self, x):
            return note(x)

    class Overridden(Doubler):
        def predict(self, x):
            return note(x)

    class Plain:
        predict = staticmethod(lambda x: note(x))

    mest_app, router = make(threads=2), Router("v1")
    checked = {"x": {"type": "float", "required": True, "coerce": lambda value: note(value)}}
    for url, model in [("/a", Model()), ("/b", Overridden()), ("/c", Plain()), ("/d", Doubler())]:
        model.model = 2
        router.add_predict_route(model, checked if url == "/d" else X, url=url)
    router.route("/e")(lambda: note("e"))
    mest_app.register_router("/", router)
    for url in "abcde":
        assert over_asgi(mest_app, "/" + url).status == 200
    assert len(where) == 7 and threading.main_thread() not in where


def test_json_of_megabytes_is_handled_in_a_thread(monkeypatch):
    where = {}

    def noting(name):
        function = getattr(mest, name)

        def noted(*args):
            where[name] = threading.current_thread() is threading.main_thread()
            return function(*args)

        monkeypatch.setattr(mest, name, noted)

    noting("decode_body"), noting("encode")
    mest_app, router = make(threads=2), Router("v1")
    model = Doubler()
    model.model = 1
    model.infer = lambda x: {"all": x}
    router.add_predict_route(model, {"x": {"type": "list", "required": True}})
    mest_app.register_router("/", router)
    for count, in_loop in [(3, True), (70_000, False)]:
        assert over_asgi(mest_app, parts=[json.dumps({"x": [1.5] * count}).encode()]).status == 200
        assert where == {"decode_body": in_loop, "encode": in_loop}


def protect():
    flask.abort(401)


def deny(function):
    return functools.wraps(function)(lambda *args, **kwargs: flask.abort(401))


HOOKS = {
    "the before_request hook protect": lambda app, router: app.before_request(protect),
    "the before_request hook protect ": lambda app, router: router.blueprint.before_request(protect),
    "the after_request hook": lambda app, router: app.after_request(lambda response: flask.Response("no", 401)),
    "the teardown_request hook": lambda app, router: app.teardown_request(lambda error: None),
    "the teardown_appcontext hook": lambda app, router: app.teardown_appcontext(lambda error: None),
    "a url_value_preprocessor": lambda app, router: app.url_value_preprocessor(lambda *args: flask.abort(401)),
    "the application has a wsgi_app of its own": lambda app, router: setattr(app, "wsgi_app", lambda *args: flask.Response("no", 401)(*args)),
    "the application has a dispatch_request of its own": lambda app, router: setattr(app, "dispatch_request", lambda: flask.Response("no", 401)),
    "it has a handler of its own": lambda app, router: app.view_functions.update({"v1.predict": deny(app.view_functions["v1.predict"])}),
    "request_started has receivers": lambda app, router: flask.request_started.connect(protect_signal, app),
    "the application has requests, responses or sessions of its own": lambda app, router: setattr(app, "request_class", Refusing),
    "its host matters": lambda app, router: app.config.update(TRUSTED_HOSTS=["elsewhere.test"]),
    "its url is of a kind of its own": lambda app, router: app.url_map.converters.update(own=object),
    "got_request_exception has receivers": lambda app, router: flask.got_request_exception.connect(protect_signal, app),
    "it has a handler of its own ": lambda app, router: app.view_functions.update({"v1.predict": Proxy(app.view_functions["v1.predict"])}),
}


def protect_signal(sender, **more):
    flask.abort(401)


STATUSES = {"teardown": 200, "its host": 400, "its url": 200, "got_request": 200}


class Refusing(flask.Request):
    @property
    def url_rule(self):
        flask.abort(401)

    url_rule = url_rule.setter(lambda *args: None)


class Proxy:
    """What forwards attributes, as wrapt's proxies do."""

    def __init__(self, view):
        self.view = view

    def __call__(self, **variables):
        flask.abort(401)

    def __getattr__(self, name):
        return getattr(self.view, name)


@pytest.mark.parametrize("why", HOOKS)
def test_whatever_stands_before_a_predict_route_in_flask_is_not_bypassed(why):
    host = flask.Flask("host")
    mest_app, router, model = make(app=host, threads=2), Router("v1"), Doubler()
    model.model = 2
    router.add_predict_route(model, X)
    before = why == "the before_request hook protect "
    if before:
        HOOKS[why](host, router)
    mest_app.register_router("/", router)
    if not before:
        assert "POST /predict directly" in mest.ways(host)
        HOOKS[why](host, router)
    (way,) = [way for way in mest.ways(host) if "/predict" in way]
    assert way.startswith("POST /predict through Flask: ") and why.strip() in way
    expected = [status for part, status in STATUSES.items() if part in why] or [401]
    assert [over_asgi(mest_app, headers={**JSON, "Host": "a.test"}).status] == expected


def test_a_hook_that_comes_too_late_is_refused_as_in_flask():
    mest_app = answering()
    assert over_asgi(mest_app).status == 200
    with pytest.raises(AssertionError, match="before_request"):
        mest_app.app.before_request(protect)


def test_a_model_never_sees_the_request_of_flask(router):
    class Curious(Doubler):
        model = 1

        def pre_process(self, x):
            return {"x": flask.has_request_context() or flask.has_app_context() or REQUEST()}

        def infer(self, x):
            return [x, flask.has_request_context() or REQUEST()]

    REQUEST = mest.request_id
    mest_app = make(threads=2)
    router.add_predict_route(Curious(), X)
    mest_app.register_router("/", router)
    for answer in (over_asgi(mest_app).body, mest_app.app.test_client().post("/predict", json={"x": 1}, headers={"X-Request-Id": "r1"}).data):
        assert answer == b'["r1","r1"]\n'


def test_a_problem_that_cannot_be_expressed_is_a_500_that_the_log_explains(capsys):
    wrong = [{"errors": {"x": object()}}, {"headers": {"X": "a\nb"}}, {"headers": {"X": "\u4e2d"}}]
    for number, arguments in enumerate(wrong, 1):
        model = Doubler()
        model.model, model.infer = 1, lambda x: (_ for _ in ()).throw(Problem(422, "wrong", **arguments))
        mest_app, router = make(threads=2), Router("v1")
        router.add_predict_route(model, X)
        mest_app.register_router("/", router)
        answer = over_asgi(mest_app)
        assert (answer.status, json.loads(answer.body)["request_id"], answer.headers["x-request-id"]) == (500, "r1", "r1")
    assert sum("POST /predict failed: " in line["message"] for line in log_of(capsys)) == 3


def test_a_caller_beside_the_event_loop_keeps_nobody_waiting():
    class Quick(Batched):
        def infer_batch(self, payloads):
            time.sleep(0.0005)
            return super().infer_batch(payloads)

    model, over = Quick(max_batch_size=1), threading.Event()
    mest_app, router = make(models=[model], request_timeout=5, threads=2), Router("v1")
    model._initialised = True
    router.add_predict_route(model, X)
    mest_app.register_router("/", router)
    others = [threading.Thread(target=lambda: [model.predict(x=1) for _ in iter(over.is_set, True)]) for _ in range(2)]
    [thread.start() for thread in others]
    assert {over_asgi(mest_app).status for _ in range(20)} == {200}
    over.set(), [thread.join(PATIENCE) for thread in others]


@pytest.mark.parametrize("size", [1, 32])
def test_those_who_have_left_make_room_in_a_full_queue(size):
    model = Stuck(max_batch_size=size, _limits=(3, PATIENCE))
    with model.busy():
        gone = [concurrent.futures.Future() for _ in range(2)]
        for future in gone:
            model._turns.submit({"x": 7}, future, print, None)
            future.cancel()
        answer = later(functools.partial(model.predict, x=2))
        until(lambda: model._turns.waiting == 2)
    assert answer() == 4 and model.batches == [[1], [2]]


def test_bodies_that_arrive_at_once_have_a_bound_together():
    mest_app, late = answering(max_body_bytes=1000), []

    async def ask(number):
        parts = iter([{"type": "http.request", "body": b"x" * 900, "more_body": True}])

        async def receive():
            return next(parts, None) or await asyncio.Event().wait()

        async def send(message):
            late.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/nope", "query_string": b"", "headers": headers}
        await mest_app(scope, receive, send)

    async def flood():
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*map(ask, range(20))), 0.5)

    async def one_by_one():
        for _ in range(40):
            parts = iter([{"type": "http.request", "body": b"{" + b" " * 900, "more_body": True}, {"type": "http.request", "body": b"}"}])

            async def receive():
                return next(parts)

            sent = []

            async def send(message):
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": [(b"content-type", b"application/json")]}
            await mest_app(scope, receive, send)
            assert sent[0]["status"] == 200

    asyncio.run(one_by_one())
    asyncio.run(flood())
    assert [message["status"] for message in late[::2]] == [503, 503, 503] and b"Too many bodies" in late[1]["body"]


def test_hooks_of_other_routes_leave_a_predict_route_alone():
    mest_app = answering()
    other = Router("other")
    other.blueprint.before_request(protect)
    mest_app.register_router("/other", other)
    assert "POST /predict directly" in mest.ways(mest_app.app) and over_asgi(mest_app).status == 200


def flask_app_of(handler, **fields):
    mest_app, router = make(threads=2, **fields), Router("v1")
    router.route("it", methods=["GET", "POST"], endpoint="it")(handler)
    mest_app.register_router("/", router)
    return mest_app


def test_flask_gets_the_request_as_it_was_sent():
    def seen():
        http = flask.request
        return {
            "cookies": http.cookies, "path": http.path, "query": http.args, "ip": http.remote_addr, "form": http.form,
            "files": {name: file.read().decode() for name, file in http.files.items()}, "url": http.url,
            "headers": {name: value for name, value in http.headers.items() if name[:1] in "XP"}, "root": http.root_path,
            "length": http.content_length, "chunked": "chunked" in http.headers.get("Transfer-Encoding", ""),
        }

    mest_app = flask_app_of(seen)
    body = b'--b\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\nfile\r\n--b\r\nContent-Disposition: form-data; name="g"\r\n\r\n5\r\n--b--\r\n'
    headers = [
        ("Host", "mest.test"), ("Cookie", "a=1"), ("Cookie", "b=2"), ("X-Two", "1"), ("X-Two", "2"), ("Proxy", "evil"),
        ("X_Two", "evil"), ("Transfer-Encoding", "chunked"), ("Content-Type", "multipart/form-data; boundary=b"),
    ]
    answer = json.loads(over_asgi(mest_app, "/it?q=%C3%BC", parts=[body[:50], body[50:]], headers=headers, client=None, server=("/", "t")).body)
    assert answer == {
        "cookies": {"a": "1", "b": "2"}, "path": "/it", "query": {"q": "ü"}, "ip": "", "form": {"g": "5"}, "files": {"f": "file"},
        "url": "http://mest.test/it?q=ü", "headers": {"X-Two": "1,2"}, "root": "", "length": len(body), "chunked": False,
    }
    for url, raw, root in [("/it", b"http://mest.test/it", ""), ("/pre/it", b"/pre/it", "/pre")]:
        answer = json.loads(over_asgi(mest_app, url, "GET", [b""], raw_path=raw, root_path=root).body)
        assert (answer["path"], answer["root"]) == ("/it", root)


def test_a_path_that_is_not_utf_8_arrives_as_it_was_sent():
    mest_app, router = make(threads=2), Router("v1")
    router.route("<name>", "GET")(lambda name: flask.request.environ["PATH_INFO"].encode("latin-1").hex())
    mest_app.register_router("/", router)
    assert bytes.fromhex(over_asgi(mest_app, "/a%ff%20b", "GET", [b""]).body.decode()) == b"/a\xff b"


def test_flask_answers_with_cookies_redirects_files_and_nothing(tmp_path):
    (tmp_path / "f").write_bytes(b"0123456789")
    answers = {
        "cookies": lambda: flask.Response("a", headers=[("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]),
        "redirect": lambda: flask.redirect("/there"),
        "file": lambda: flask.send_file(tmp_path / "f", conditional=True), "nothing": lambda: ("", 204),
        "status": lambda: flask.Response("odd", status="299"), "latin": lambda: flask.Response("x", headers={"X-Name": "é"}),
    }
    mest_app = flask_app_of(lambda: answers[flask.request.args["a"]]())
    got = {name: over_asgi(mest_app, f"/it?a={name}", "GET", [b""]) for name in answers}
    assert [value for name, value in got["cookies"].raw if name == b"set-cookie"] == [b"a=1", b"b=2"]
    assert (got["redirect"].status, got["redirect"].headers["location"]) == (302, "/there")
    assert (got["file"].status, got["file"].body) == (200, b"0123456789") and got["nothing"].status == 204
    assert got["status"].status == 299 and got["latin"].headers["x-name"] == "é"
    part = over_asgi(mest_app, "/it?a=file", "GET", [b""], headers={"Range": "bytes=2-4"})
    assert (part.status, part.body) == (206, b"234")
    assert over_asgi(mest_app, "/it?a=file", "HEAD", [b""]).body == b""


def test_a_stream_is_sent_as_it_is_produced_and_closed_at_its_end():
    go_on, closed = threading.Event(), threading.Event()

    def produce():
        try:
            yield "first"
            assert go_on.wait(PATIENCE)
            yield "second"
        finally:
            closed.set()

    mest_app = flask_app_of(produce)
    arrived = []

    async def ask():
        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False} if not arrived else await asyncio.Event().wait()

        async def send(message):
            arrived.append(message)
            if message.get("body") == b"first":
                go_on.set()

        scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": "/it", "query_string": b"", "headers": []}
        await mest_app(scope, receive, send)

    asyncio.run(ask())
    assert [message.get("body") for message in arrived] == [None, b"first", b"second", b""] and closed.is_set()


def test_a_stream_ends_when_its_client_leaves():
    leave, closed = threading.Event(), threading.Event()

    def produce():
        try:
            for _ in range(100_000):
                yield b"more"
                leave.set()
        finally:
            closed.set()

    assert over_asgi(flask_app_of(produce), "/it", "GET", [b""], leave=leave).sent[-1]["more_body"]
    assert closed.wait(PATIENCE)


def test_a_stream_that_fails_is_logged_and_cut_short(capsys):
    def produce():
        yield b"first"
        raise KeyError("hunter2")

    with pytest.raises(asyncio.CancelledError):  # so that the server ends the connection
        over_asgi(flask_app_of(produce), "/it", "GET", [b""])
    (line,) = [line for line in log_of(capsys) if "stream" in line["message"]]
    assert line["message"].startswith("the stream of /it failed: KeyError") and "hunter2" in line["traceback"]


@pytest.mark.parametrize("size", [1, 32])
def test_who_leaves_is_not_computed_and_nothing_is_logged(size, capsys):
    model = Stuck(max_batch_size=size)
    mest_app, router, leave = make(threads=2, models=[model]), Router("v1"), threading.Event()
    model._initialised = True
    router.add_predict_route(model, X)
    mest_app.register_router("/", router)
    with model.busy():
        leave.set()
        assert over_asgi(mest_app, parts=[b'{"x": 7}'], leave=leave) is None
    assert model.predict(x=3) == 9 and model.batches == [[1], [3]]
    until(lambda: model._turns.waiting == 0)
    assert not [line for line in log_of(capsys) if line["level"] == "ERROR"]


@pytest.mark.parametrize("size", [1, 32])
def test_over_asgi_too_late_is_504_and_too_many_is_503_and_what_runs_keeps_its_place(size):
    model = Stuck(max_batch_size=size)
    mest_app, router = make(threads=2, models=[model], request_timeout=1, max_queued_requests=2), Router("v1")
    model._initialised = True
    router.add_predict_route(model, X)
    mest_app.register_router("/", router)
    with model.busy():
        assert (late := over_asgi(mest_app)).status == 504 and b"did not answer in time" in late.body
        assert model._turns.waiting == 2  # the one that runs, and the one that is still in the queue
        model._limits = 1, 1
        assert (busy := over_asgi(mest_app)).status == 503 and busy.headers["retry-after"] == "1"
    until(lambda: model._turns.waiting == 0)
    assert over_asgi(mest_app).body == b"9\n" and model.batches == [[1], [3]]


def test_a_body_that_does_not_come_is_408():
    answer = over_asgi(answering(request_body_timeout=1), parts=[b"{"], whole=False)
    assert answer.status == 408 and b"The body did not come in time." in answer.body


def test_a_length_of_any_size_is_413():
    for digits in (9, 30, 5000):
        assert over_asgi(answering(), headers={"Content-Length": "9" * digits}).status == 413


def test_requests_at_once_fill_batches_over_asgi():
    model = Batched()
    mest_app, router = make(models=[model]), Router("v1")
    model._initialised = True
    router.add_predict_route(model, X)
    mest_app.register_router("/", router)
    body = [{"type": "http.request", "body": b'{"x": %d}' % x} for x in range(64)]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": [(b"content-type", b"application/json")]}

    async def ask(x):
        sent = []
        receive, send = iter([body[x]]), sent.append

        async def once():
            return next(receive)

        async def keep(message):
            send(message)

        await mest_app(scope, once, keep)
        return sent[1]["body"]

    async def all_at_once():
        return await asyncio.gather(*map(ask, range(64)))

    assert asyncio.run(all_at_once()) == [b"%d\n" % (x * x) for x in range(64)]
    assert len(model.batches) < 16


def test_metrics_are_in_the_format_of_prometheus_and_clients_cannot_add_to_them():
    mest_app = answering()
    client = mest_app.app.test_client()
    for sent in ({}, {"parts": [b"{"]}, {"url": "/hunter2"}, {"method": "HUNTER2"}, {"url": '/at/hunter2"/5', "method": "GET", "parts": [b""]}):
        over_asgi(mest_app, **sent)
        url, body = sent.get("url", "/predict"), sent.get("parts", [b'{"x": 3}'])[0]
        client.open(url, method=sent.get("method", "POST"), data=body, content_type="application/json")
    for text in (over_asgi(mest_app, "/metrics", "GET", [b""]).body.decode(), client.get("/metrics").text):
        assert "unter2" not in text and 'mest_build_info{version="%s",' % mest.__version__ in text
        for line in text.splitlines():
            assert re.fullmatch(r'# (HELP|TYPE) mest_\w+ .+|mest_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [\d.e+-]+', line), line
        samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        assert samples['mest_requests_total{route="/predict",method="POST",status="200"}'] == "2"
        assert samples['mest_requests_total{route="/predict",method="POST",status="400"}'] == "2"
        assert samples['mest_requests_total{route="other",method="POST",status="404"}'] == "2"
        assert samples['mest_requests_total{route="other",method="other",status="405"}'] == "2"
        assert samples['mest_requests_total{route="/at/<z>/<int:k>",method="GET",status="200"}'] == "2"
        assert samples['mest_request_duration_seconds_count{route="/predict"}'] == "4"
        assert samples['mest_request_duration_seconds_bucket{route="/predict",le="+Inf"}'] == "4"
    types = dict(re.findall(r"# TYPE (\w+) (\w+)", text))
    assert types["mest_requests_total"] == "counter" and types["mest_batch_size"] == "histogram"


def test_a_full_slot_of_metrics_takes_no_more_and_harms_nothing():
    metrics = mest.Metrics(slots=2)
    for number in range(5000):
        metrics.add(1, "mest_requests_total", f"/{number}", "GET", 200)
    metrics.observe(0.1, "mest_request_duration_seconds", "/late")
    metrics.begin(1)
    metrics.add(1, "mest_requests_total", '/a"\n\\', "GET", 200)
    text = metrics.text()
    assert 'route="/0",method="GET",status="200"} 1\n' in text and "/4999" not in text and "/late" not in text
    assert r'{route="/a\"\n\\",method="GET",status="200"} 1' in text


def test_the_lifespan_loads_the_models_or_says_why_it_cannot():
    class Broken(Doubler):
        def init(self, directory_path):
            raise OSError("no weights")

    async def live(mest_app):
        sent, events = [], iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

        async def receive():
            return next(events)

        async def send(message):
            sent.append(message)

        await mest_app({"type": "lifespan"}, receive, send)
        return sent

    model = Doubler()
    sent = asyncio.run(live(make(models=[model])))
    assert [m["type"] for m in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"] and model.is_loaded
    (failed,) = asyncio.run(live(make(models=[Broken()])))
    assert failed["type"] == "lifespan.startup.failed" and "mest: model Broken could not be loaded: OSError: no weights" in failed["message"]


# The API key


def locked(**fields):
    mest_app, router = make(api_key="one,two-three", **fields), Router("v1")
    model = Doubler()
    model.model = 2
    router.add_ping_route()
    router.add_predict_route(model, X)
    router.route("/mine", method="GET")(lambda: "mine")
    mest_app.register_router("/", router)
    return mest_app


@pytest.mark.parametrize("headers, detail", [
    ({}, "An API key is needed; send one, as Authorization: Bearer KEY or as X-API-Key: KEY."),
    ({"Authorization": "Bearer"}, "An API key is needed"), ({"Authorization": "Basic one"}, "An API key is needed"),
    ({"Authorization": "Bearer on"}, "The API key is wrong"), ({"X-API-Key": "one,two-three"}, "The API key is wrong"),
    ({"X-API-Key": "öne"}, "The API key is wrong"), ({"X-API-Key": ""}, "An API key is needed"),
    ({"Authorization": "Bearer one"}, None), ({"Authorization": "bearer  two-three "}, None), ({"X-API-Key": "one"}, None),
])
@pytest.mark.parametrize("url", ["/predict", "/mine", "/metrics"])
def test_without_a_key_there_is_no_answer_on_either_edge(url, headers, detail, capsys):
    mest_app = locked(protect_metrics=True)
    method, sent = ("POST", {"json": {"x": 2}}) if url == "/predict" else ("GET", {})
    wsgi = mest_app.app.test_client().open(url, method=method, headers=headers, **sent)
    parts = [b'{"x": 2}'] if sent else [b""]
    asgi = over_asgi(mest_app, url, method=method, headers=[*JSON.items(), *headers.items()], parts=parts)
    assert wsgi.status_code == asgi.status == (401 if detail else 200)
    if detail:
        assert wsgi.json["detail"].startswith(detail) and json.loads(asgi.body)["detail"].startswith(detail)
        challenge = "Bearer" if "needed" in detail else 'Bearer error="invalid_token"'
        assert wsgi.headers["WWW-Authenticate"] == asgi.headers["www-authenticate"] == challenge
        assert wsgi.content_type == asgi.headers["content-type"] == "application/problem+json"
    assert "one" not in capsys.readouterr().out


def test_probes_and_documentation_need_no_key_and_metrics_only_where_that_is_asked_for():
    mest_app = locked()
    for url in ("/livez", "/readyz", "/ping", "/docs", "/openapi.json", "/metrics"):
        assert mest_app.app.test_client().get(url).status_code == 200
        assert over_asgi(mest_app, url, method="GET", parts=[b""]).status == 200


def test_a_service_without_keys_asks_for_none(route):
    assert route(lambda: "yes")(headers={"Authorization": "Basic whatever"}).text == "yes"


# Documentation


@pytest.mark.parametrize("rules, schema", [
    ({"type": "float", "min": 0, "max": 5.5}, {"type": "number", "minimum": 0, "maximum": 5.5}),
    ({"type": "integer", "nullable": True}, {"type": ["integer", "null"]}),
    ({"type": "integer", "default": 3}, {"type": ["integer", "null"], "default": 3}),
    ({"type": "string", "minlength": 1, "maxlength": 9}, {"type": "string", "minLength": 1, "maxLength": 9}),
    ({"type": "string", "empty": False}, {"type": "string", "minLength": 1}),
    ({"type": "string", "regex": "a|b$"}, {"type": "string", "pattern": "^(?:a|b$)"}),
    ({"type": "string", "regex": "(?i)a"}, {"type": "string"}),
    ({"type": "string", "allowed": ["a", "b"]}, {"type": "string", "enum": ["a", "b"]}),
    ({"type": "string", "allowed": ["a"], "nullable": True}, {"anyOf": [{"type": "string", "enum": ["a"]}, {"type": "null"}]}),
    ({"type": "string", "forbidden": ["a"]}, {"type": "string", "not": {"enum": ["a"]}}),
    ({"type": ["string", "integer"], "min": 2}, {"type": ["string", "integer"], "minimum": 2}),
    ({"type": "boolean"}, {"type": "boolean"}),
    ({"type": "binary"}, {"type": "string", "format": "binary"}),
    ({"type": "date"}, {"type": "string", "format": "date"}),
    ({"type": "list"}, {"type": "array", "items": {}}),
    ({"type": "list", "schema": {"type": "float"}, "minlength": 2}, {"type": "array", "items": {"type": "number"}, "minItems": 2}),
    ({"type": "list", "allowed": ["a"]}, {"type": "array", "items": {"enum": ["a"]}}),
    ({"type": "list", "items": [{"type": "float"}, {"type": "string"}]},
     {"type": "array", "prefixItems": [{"type": "number"}, {"type": "string"}], "items": False, "minItems": 2}),
    ({"type": "dict", "schema": {"a": {"type": "float", "required": True}, "b": {"type": "string", "readonly": True}}},
     {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"], "additionalProperties": False}),
    ({"type": "dict", "allow_unknown": True, "require_all": True, "schema": {"a": {"type": "float"}}},
     {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"], "additionalProperties": True}),
    ({"type": "dict", "keysrules": {"type": "string", "maxlength": 2}, "valuesrules": {"type": "float"}},
     {"type": "object", "propertyNames": {"type": "string", "maxLength": 2}, "additionalProperties": {"type": "number"}}),
    ({"type": "integer", "anyof": [{"min": 5}, {"max": 1}]},
     {"type": "integer", "anyOf": [{"type": "integer", "minimum": 5}, {"type": "integer", "maximum": 1}]}),
    ({"anyof_type": ["float", "string"]}, {"type": ["string", "number", "boolean", "object", "array"],
                                           "anyOf": [{"type": "number"}, {"type": "string"}]}),
    ({"type": "integer", "noneof": [{"min": 5}]}, {"type": "integer", "not": {"anyOf": [{"type": "integer", "minimum": 5}]}}),
    ({"coerce": int, "type": "integer", "min": 3}, {}),
    ({"type": "float", "meta": {"description": "in cm"}}, {"type": "number", "description": "in cm"}),
    ({"type": "float", "min": float("-inf")}, {"type": "number"}),
    ({}, {"type": ["string", "number", "boolean", "object", "array"]}),
    ({"type": "dict", "nullable": True, "schema": {}},
     {"type": ["object", "null"], "properties": {}, "required": [], "additionalProperties": False}),
    ({"type": "integer", "nullable": True, "forbidden": [3]},
     {"anyOf": [{"type": "integer", "not": {"enum": [3]}}, {"type": "null"}]}),
    ({"type": ["string", "list"], "allowed": ["a"]}, {"type": ["string", "array"]}),
    ({"type": "list", "schema": {"type": "string"}, "forbidden": ["a"]},
     {"type": "array", "items": {"allOf": [{"not": {"enum": ["a"]}}, {"type": "string"}]}}),
    ({"type": "string", "empty": True, "minlength": 3}, {"anyOf": [
        {"type": "string", "minLength": 3}, {"type": ["string"], "maxLength": 0, "maxItems": 0, "maxProperties": 0}]}),
    ({"type": "integer", "max": 10**400}, {"type": "integer"}),
    ({"type": "float", "allowed": [1.0, float("inf"), object]}, {"type": "number", "enum": [1.0]}),
    ({"type": "string", "regex": r"\-[]a]|\N{BULLET}"}, {"type": "string"}),
])
def test_the_rules_of_cerberus_become_json_schema(rules, schema):
    parameters = mest.Parameters({"a": rules}, None, "test")
    assert mest.fields_schema(parameters.schema)["properties"]["a"] == schema


def test_what_must_not_be_sent_is_not_required():
    schema = {
        "a": {"required": True, "excludes": "b"}, "b": {"required": True}, "c": {"rename": "d"}, "d": {"required": True},
        "e": {"readonly": True}, "f": {"required": True, "default": 5}, "g": {"required": True},
    }
    described = mest.fields_schema(mest.Parameters(schema, None, "test").schema)
    assert described["required"] == ["g"] and described["properties"].keys() == {*"abcdfg"}


def test_rules_within_themselves_are_described_once():
    cerberus.rules_set_registry.add("tree", {"type": "list", "schema": "tree"})
    cerberus.schema_registry.add("node", {"next": {"type": "dict", "schema": "node"}})
    schema = {"t": "tree", "n": {"type": "dict", "schema": "node"}}
    properties = mest.fields_schema(mest.Parameters(schema, None, "test").schema)["properties"]
    assert properties["t"] == {"type": "array", "items": {}}
    assert properties["n"]["properties"]["next"] == {"type": "object"}


def test_rules_by_name_become_json_schema_too():
    cerberus.rules_set_registry.add("percent", {"type": "integer", "max": 100})
    cerberus.schema_registry.add("point", {"x": "percent"})
    parameters = mest.Parameters({"p": {"type": "dict", "schema": "point"}, "q": "percent"}, None, "test")
    properties = mest.fields_schema(parameters.schema)["properties"]
    assert properties["q"] == properties["p"]["properties"]["x"] == {"type": "integer", "maximum": 100}


class Described(Doubler):
    """Doubles a number.

    Exactly.
    """


def openapi_of(router, url="/", **fields):
    return client_of(router, url, **fields).get("/openapi.json").json


def test_a_predict_route_is_described_with_all_that_it_takes_and_answers(router):
    router.add_predict_route(Described(), X, example={"x": 4})
    document = openapi_of(router, service_version="2.1")
    assert document["openapi"] == "3.1.0"
    assert document["info"]["version"] == "2.1" and document["info"]["x-models"] == ["Described"]
    predict = document["paths"]["/predict"]["post"]
    assert (predict["operationId"], predict["tags"]) == ("post_predict", ["v1"])
    assert (predict["summary"], predict["description"]) == ("Doubles a number.", "Exactly.")
    schema = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"], "additionalProperties": False}
    content = {"application/json": {"schema": schema, "example": {"x": 4}}}
    assert predict["requestBody"] == {"required": True, "content": content}
    assert {*predict["responses"]} == {"200", "400", "408", "413", "415", "422", "500", "503", "504"}
    reference = predict["responses"]["422"]["$ref"].split("/")[1:]
    assert functools.reduce(dict.get, reference, document)["content"].keys() == {"application/problem+json"}
    assert {"/livez", "/readyz", "/metrics", "/predict"} == document["paths"].keys()
    assert "security" not in document


def test_a_handler_is_described_with_its_path_query_and_docstring(router):
    @router.route("/users/<int:user>/<any(a, b):kind>/<name>", methods=["GET", "DELETE"])
    @validate_params({"name": {"type": "string", "maxlength": 9}, "most": {"type": "integer", "default": 5}})
    def users(user, kind, name, most):
        """Who they are."""

    item = openapi_of(router, "/api/")["paths"]["/api/users/{user}/{kind}/{name}"]
    assert item.keys() == {"get", "delete"} and item["get"]["summary"] == "Who they are."
    assert "requestBody" not in item["get"]
    parameters = {p["name"]: (p["in"], p["required"], p["schema"]) for p in item["get"]["parameters"]}
    assert parameters == {
        "user": ("path", True, {"type": "integer", "minimum": 0}),
        "kind": ("path", True, {"type": "string", "minLength": 1, "enum": unordered("a", "b")}),
        "name": ("path", True, {"type": "string", "minLength": 1, "maxLength": 9}),
        "most": ("query", False, {"type": ["integer", "null"], "default": 5}),
    }
    assert {"404", "422", "default"} < item["get"]["responses"].keys()


class unordered(list):
    def __init__(self, *items):
        super().__init__(items)

    def __eq__(self, other):
        return sorted(self) == sorted(other)


def test_a_file_is_described_as_a_form(router):
    router.route("up")(validate_params({"image": {"type": "binary", "required": True}})(lambda image: len(image)))
    body = openapi_of(router)["paths"]["/up"]["post"]["requestBody"]["content"]
    assert body["multipart/form-data"]["schema"]["properties"] == {"image": {"type": "string", "format": "binary"}}


def test_urls_are_relative_to_the_description_so_that_a_prefix_does_no_harm():
    app = flask.Flask("host")
    host = make(app)
    host.register_router("/ml/v1", host.docs)
    app.get("/own")(lambda: "own")
    app.post("/checked", endpoint="checked")(validate_params(X)(lambda x: x))
    assert app.test_client().get("/docs").status_code == 404
    assert app.test_client().get("/ml/v1/openapi.json").json["servers"] == [{"url": "../.."}]
    assert make().app.test_client().get("/openapi.json").json["servers"] == [{"url": "."}]
    paths = app.test_client().get("/ml/v1/openapi.json").json["paths"]
    assert paths.keys() == {"/checked"}  # what is known of, and nothing of the host's own


def test_two_rules_of_one_path_are_described_once_and_ids_are_unique(router):
    router.route("/<int:n>", method="GET", endpoint="a")(lambda n: n)
    router.route("/<name>", method="GET", endpoint="b")(lambda name: name)
    router.route("/a/b", endpoint="c")(lambda: 1)
    router.route("/a_b", endpoint="d")(lambda: 1)
    paths = openapi_of(router)["paths"]
    ids = [operation["operationId"] for item in paths.values() for operation in item.values()]
    assert len(set(ids)) == len(ids) and "post_a_b" in ids


def test_the_key_is_described_where_there_is_one():
    document = locked().app.test_client().get("/openapi.json").json
    assert document["security"] == [{"bearer": []}, {"header": []}]
    assert document["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    paths = document["paths"]
    assert "security" not in paths["/predict"]["post"] and "401" in paths["/predict"]["post"]["responses"]
    for url in ("/livez", "/readyz", "/metrics", "/ping"):
        assert paths[url]["get"]["security"] == [] and "401" not in paths[url]["get"]["responses"]


def test_documentation_can_be_switched_off():
    client = make(docs=False).app.test_client()
    assert {client.get(url).status_code for url in ("/docs", "/openapi.json")} == {404}
    assert "/docs" not in client.get("/docs").json["detail"].replace("at /docs", "")
    host = Mest(MestConfig("host", environ={"MEST_DOCS": "0"}), app=flask.Flask("host"))
    host.register_router("/", host.docs)
    assert host.app.test_client().get("/docs").status_code == 404


def test_the_page_is_small_and_allows_nothing_but_itself():
    page = make().app.test_client().get("/docs")
    assert len(page.data) < 20_000 and page.content_type == "text/html; charset=utf-8"
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'") and "unsafe" not in policy
    assert not re.search("innerHTML|insertAdjacent|document.write|https?://|<[^>]+ on[a-z]+=", page.text)


# The page, in a browser


class Browser:
    """A headless Chromium, driven through https://www.w3.org/TR/webdriver2/"""

    def __init__(self, folder):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.driver = subprocess.Popen(["chromedriver", f"--port={self.port}"], **quiet, start_new_session=True)
        until(lambda: self.listens())
        flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        flags += "disable-component-update disable-sync disable-dev-shm-usage"
        arguments = [*("--" + flag for flag in flags.split()), f"--user-data-dir={folder}"]
        options = {"args": arguments, "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.session = ""
        self.session = "/" + self("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def listens(self):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port)).close()
            return True

    def __call__(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        sent = json.dumps(body) if method == "POST" else None
        connection.request(method, f"/session{self.session}{path}", sent, JSON)
        value = json.loads(connection.getresponse().read())["value"]
        connection.close()
        assert not isinstance(value, dict) or "error" not in value, value
        return value

    def run(self, script, *arguments):
        return self("POST", "/execute/sync", {"script": script, "args": arguments})

    def find(self, selector):
        found = self("POST", "/element", {"using": "css selector", "value": selector})
        return f"/element/{[*found.values()][0]}"

    def text(self, selector):
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def fill(self, selector, text):
        element = self.find(selector)
        if "file" != self.run("return document.querySelector(arguments[0]).type", selector):
            self("POST", element + "/clear", {})
        self("POST", element + "/value", {"text": text})

    def send(self, operation):
        """Press the Send button of an operation, and return the status line of the answer."""
        status = f"#{operation} [role=status]"
        self.run("document.querySelector(arguments[0]).textContent = ''", status)
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", f"#{operation} button")
        self("POST", self.find(f"#{operation} button") + "/click", {})
        until(lambda: self.text(status))
        return self.text(status)

    def log(self, kind):
        return self("POST", "/se/log", {"type": kind})

    def quit(self):
        with contextlib.suppress(OSError):
            self("DELETE", "")
        os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait(PATIENCE)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.quit()


PAGE_APP = APP + """
router.route("/users/<name>", method="GET")(validate_params({"n": {"type": "integer", "default": 3}})(
    lambda name, n: {"name": name, "n": n}))

router.add_predict_route(doubler, {"x": {"type": "float", "required": True}}, url="/first:double")

@router.route("/picture")
@validate_params({"image": {"type": "binary", "required": True}, "note": {"type": "string"}})
def picture(image, note="none"):
    "A picture <img src=x onerror=alert(1)> & more."
    return {"bytes": len(image), "note": note}
"""


def test_the_page_sends_predictions_and_shows_errors_at_their_fields(project, browser):
    project.write(app=PAGE_APP)
    (project.path / "a.png").write_bytes(b"12345")
    with project.serve("run", "gunicorn", MEST_API_KEY="s3cret") as server:
        home = f"http://127.0.0.1:{server.port}"
        browser.log("performance")  # of the browser's own first page
        browser("POST", "/url", {"url": home + "/docs"})
        until(lambda: "ready" in browser.text("#state"))
        assert browser.text("#state") == f"ready · models: Doubler · Mest {mest.__version__}"
        assert browser.run("return document.querySelector('#post_predict').open")

        assert browser.send("post_predict").startswith("401 ")
        browser.fill("#key input", "s3cret")
        assert re.match(r"200 OK in \d+\.\d ms", browser.send("post_predict"))
        assert json.loads(browser.text("#post_predict pre")) == {"y": 2}
        curl = browser.text("#post_predict pre:last-of-type")
        assert curl == (
            f"""curl '{home}/predict' -H "Authorization: Bearer $API_KEY" """
            """-H 'Content-Type: application/json' --data-raw '{ "x": 1 }'"""
        )
        if shutil.which("curl"):
            done = subprocess.run(["sh", "-c", curl], env={**os.environ, "API_KEY": "s3cret"}, capture_output=True)
            assert done.stdout == b'{"y":2}\n'

        browser.fill("#post_predict textarea", '{"x": "it\'s", "y": 2}')
        assert browser.send("post_predict").startswith("422 ")
        assert browser.text("#post_predict-x-error") == "must be of float type"
        assert browser.text("#post_predict-others") == "y: unknown field\n"
        assert browser.text("#post_predict pre:last-of-type").endswith("""--data-raw '{"x": "it'\\''s", "y": 2}'""")
        assert browser.send("post_predict") and browser.text("#post_predict-others") == "y: unknown field\n"

        browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
        browser.fill("#get_users_name input", "a/b c")
        assert browser.send("get_users_name").startswith("404 ")  # as a path may not have a slash
        browser.fill("#get_users_name input", "b c")
        browser.fill("#get_users_name tr:last-of-type input", "x")
        assert browser.send("get_users_name").startswith("422 ")
        assert browser.text("#get_users_name-n-error") == "must be of integer type"
        browser.fill("#get_users_name tr:last-of-type input", "5")
        assert browser.send("get_users_name").startswith("200 ")
        assert json.loads(browser.text("#get_users_name pre")) == {"name": "b c", "n": 5}

        assert browser.send("post_first_double").startswith("200 ")
        browser.fill("#post_picture input[type=file]", str(project.path / "a.png"))
        assert browser.send("post_picture").startswith("200 ")
        assert json.loads(browser.text("#post_picture pre")) == {"bytes": 5, "note": "none"}
        assert browser.text("#post_picture pre:last-of-type").endswith("""-F 'image=@"a.png"'""")
        assert "<img src=x onerror=alert(1)> & more." in browser.text("#post_picture summary")

        events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
        urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
        assert {url for url in urls if not url.startswith((home, "data:", "chrome:"))} == set()
        severe = [entry["message"] for entry in browser.log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        assert all("status of 4" in message for message in severe)  # which Chromium says of each such answer


def test_the_page_can_be_used_with_the_keyboard_and_on_a_phone(project, browser):
    project.write(app=PAGE_APP)
    with project.serve("run", "gunicorn") as server:
        browser("POST", "/window/rect", {"width": 500, "height": 800})
        browser("POST", "/url", {"url": f"http://127.0.0.1:{server.port}/docs"})
        until(lambda: "ready" in browser.text("#state"))
        assert browser.run("return document.querySelector('#key').hidden")
        browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        browser.fill("#post_predict textarea", '{"x": 4}\ue009\ue007')  # Control and Enter
        until(lambda: browser.text("#post_predict [role=status]"))
        assert browser.text("#post_predict pre") == '{"y":8}\n'
        named = "return [...document.querySelectorAll('input, textarea')].every(e => e.ariaLabel || e.labels.length)"
        assert browser.run(named)


# Application


def test_mest_in_an_existing_application_leaves_that_as_it_was(router, capsys):
    host = logging.getLogger("host-app")
    host.addHandler(logging.NullHandler())
    app = flask.Flask("host-app")
    app.register_error_handler(404, lambda error: ("no page", 404))
    app.get("/own")(lambda: "own")
    app.get("/broken", endpoint="broken")(lambda: 1 / 0)
    before = dict(app.config), list(host.handlers), host.level, logging.root.level
    mest_app = make(app)
    router.route("/none", "GET")(lambda: flask.abort(404, "nothing"))
    mest_app.register_router("/ml", router)
    client = app.test_client()
    assert mest_app.app is app
    assert client.get("/own").text == "own" and "X-Request-Id" not in client.get("/own").headers
    assert client.get("/nowhere").text == "no page"
    assert client.get("/broken").content_type.startswith("text/html")
    response = client.get("/ml/none")
    assert response.json["detail"] == "nothing" and response.headers["X-Request-Id"]
    assert before == (dict(app.config), list(host.handlers), host.level, logging.root.level)


def test_embedded_the_logging_of_the_host_is_used(caplog):
    app = flask.Flask(f"t{uuid.uuid4().hex}")
    app.logger.setLevel("DEBUG")
    before = vars(app.logger).copy()
    logger = Mest(MestConfig(app.name, 8000, environ={}), app=app).logger
    assert logger is app.logger and vars(logger) == before
    logger.debug("to the host")
    assert "to the host" in caplog.text


def test_embedded_the_smaller_limit_of_the_body_holds(router):
    app = flask.Flask("host")
    app.config["MAX_CONTENT_LENGTH"] = 100
    router.route("it")(validate_params(X)(lambda x: x))
    make(app).register_router("/", router)
    response = app.test_client().post("/it", data=b" " * 101, headers=JSON)
    assert response.status_code == 413 and "longer than 100 bytes" in response.json["detail"]


def test_an_application_has_one_mest():
    app = flask.Flask("host")
    make(app)
    with pytest.raises(MestError, match="has a Mest already"):
        make(app)
    with pytest.raises(MestError, match="it must be a MestConfig"):
        Mest(5)
    with pytest.raises(MestError, match="the application 'app'; it must be a flask.Flask"):
        make("app")
    with pytest.raises(MestError, match="register_router takes url and router"):
        make().register_router(Router("v1"), "/")


def test_setup_loads_every_model_once_and_logs_how_long_it_took(capsys):
    loaded = []

    class Model(GenericModel):
        def init(self, directory_path):
            loaded.append((self, directory_path))

    first, second = Model(), Model()
    mest_app = make(models=[first, second, first], local_model_directory_path="somewhere")
    assert mest_app.setup() is mest_app.setup() is mest_app
    assert loaded == [(first, "somewhere"), (second, "somewhere")]
    messages = [line["message"] for line in log_of(capsys)]
    assert re.fullmatch(r"model Model loaded in \d+\.\d{3} s", messages[0])
    assert re.fullmatch(r"model Model-2 loaded in \d+\.\d{3} s", messages[1]) and len(messages) == 2


@pytest.mark.parametrize("failure", [FileNotFoundError("weights.bin"), SystemExit(3)])
def test_a_model_that_cannot_be_loaded_stops_the_setup_with_its_name(failure, tmp_path):
    class Broken(GenericModel):
        def init(self, directory_path):
            raise failure

    with pytest.raises(MestError) as caught:
        make(models=[Broken()], local_model_directory_path="nowhere").setup()
    assert str(caught.value).startswith(f"model Broken could not be loaded: {type(failure).__name__}: {failure}")
    nowhere = "local_model_directory_path is 'nowhere', and there is no directory " + os.path.abspath("nowhere")
    assert (nowhere in str(caught.value)) == isinstance(failure, OSError)
    assert caught.value.__cause__ is failure
    with pytest.raises(MestError) as caught:
        make(models=[Broken()], local_model_directory_path=str(tmp_path)).setup()
    assert "no directory" not in str(caught.value)


# The module


def test_the_documented_import_paths_lead_to_the_same_objects(project):
    lines = [
        "from mest.app.api import Router, validate_params", "from mest.app import Mest, MestConfig",
        "from mest.models import GenericModel", "import mest.app, mest.app.api, mest.models",
        "import mest, sys; assert mest.app.api.Router is mest.Router is Router and mest.app.Mest is Mest",
        "assert mest.models.GenericModel is GenericModel is mest.GenericModel and 'gunicorn' not in sys.modules",
    ]
    for order in (lines, lines[1:] + lines[:1], lines[3:4] + lines):
        source = "\n".join(sorted(order, key=lambda line: "assert" in line))
        done = subprocess.run([sys.executable, "-W", "error", "-c", source], capture_output=True, text=True, env=environment())
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_copy_works_in_a_project_and_in_a_package_of_it(project):
    (project.path / "service").mkdir()
    for copied in ("mest.py", "service/mest.py"):
        shutil.copy(HERE / "mest.py", project.path / copied)
    project.write(app=APP)
    (project.path / "service/__init__.py").touch()
    packaged = APP.replace("from mest import", "from service.mest import")
    packaged += "from service.mest.app.api import Router as R; assert R is Router\n"
    (project.path / "service/app.py").write_text(packaged)
    relative = APP.replace("from mest import", "from .mest import")
    (project.path / "service/relative.py").write_text(relative)
    package = ["-m", "service.mest"]
    for server, command, target in [
        ("dev", ["mest.py"], "app.py"), ("gunicorn", ["mest.py"], "app.py"), ("dev", package, "service/app.py"),
        ("gunicorn", package, "service.app"), ("dev", ["service/mest.py"], "service/relative.py"),
        ("gunicorn", package, "service.relative:mest_app"),
    ]:
        with project.serve("--app", target, "run", server, command=command, PYTHONPATH="") as running:
            assert running.ask("/predict", {"x": 3})[1] == b'{"y":6}\n', (command, target)


# Serving


@pytest.fixture(scope="module", params=["dev", "gunicorn", "gunicorn -- -k gthread --threads 4"])
def running(request, tmp_path_factory):
    """APP on a real server, the same one for all tests that only ask it something."""
    project = Project(tmp_path_factory.mktemp("running"))
    project.write(app=APP)
    with project.serve("run", *request.param.split(), MEST_MAX_BODY_BYTES="1000000") as server:
        yield server


def test_a_server_predicts(running):
    status, body, headers = running.ask("/predict", {"x": 3}, headers={**JSON, "X-Request-Id": "r1"})
    assert (status, body, headers["X-Request-Id"]) == (200, b'{"y":6}\n', "r1")
    assert running.ask("/ping")[0] == 200


def test_a_model_is_loaded_once_however_it_is_served(running):
    running.ask("/ping")
    assert running.output.count("loading from _models") == 1
    assert running.output.count("model Doubler loaded in") == 1


def test_a_server_logs_failures_as_json_and_says_nothing_to_the_client(running, request):
    status, body, headers = running.ask("/fail")
    assert status == 500 and (b"hunter2" in body) == ("[dev" in request.node.name)
    found = running.wait_for(r'(\{.*"request_id": "%s".*\})' % headers["X-Request-Id"])
    assert "hunter2" in json.loads(found.group(1))["traceback"]


def framed(body, *headers, length=None):
    length = len(body) if length is None else length
    lines = ["POST /echo HTTP/1.1", "Host: a", "Content-Type: application/json", "Connection: close", *headers]
    return "\r\n".join([*lines, *([f"Content-Length: {length}"] if length >= 0 else []), "", ""]).encode() + body


def chunked(*chunks):
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


def test_a_body_in_chunks_is_read_whole(running):
    request = framed(chunked(b'{"x": [1', b", 2]}"), "Transfer-Encoding: chunked", length=-1)
    received = running.send(request, half_close=False)
    assert received.startswith(b"HTTP/1.1 200") and received.endswith(b'{"x":[1,2]}\n')


@pytest.mark.parametrize(
    "sent, status, detail",
    [
        (framed(b"zz\r\n{}\r\n", "Transfer-Encoding: chunked", length=-1), 400, b""),
        (framed(b'{"x": [' + b" " * 1_000_000 + b"]}"), 413, b"longer than 1000000 bytes"),
        (framed(chunked(b'{"x": []}', b" " * 999_999, b"]"), "Transfer-Encoding: chunked", length=-1), 413, b"longer"),
        (framed(chunked(*[b" " * 9999] * 99, b'{"x": []}' + b" " * 9990), "Transfer-Encoding: chunked", length=-1), 200, b""),
    ],
)
def test_a_body_of_a_wrong_length_is_refused(running, sent, status, detail):
    received = running.send(sent, half_close=False)
    assert received.startswith(b"HTTP/1.1 %d" % status) and detail in received, received[:300]


@pytest.mark.parametrize(
    "sent, detail",
    [
        (framed(b'{"x": [1]}', length=50), b"ended"), (framed(b'{"x": [1]} ', length=12), b"ended"),
        (framed(b"5\r\n{zz\r\n", "Transfer-Encoding: chunked", length=-1), b""),
    ],
)
def test_a_body_that_ends_early_is_refused_unless_its_client_counts_as_gone(running, sent, detail):
    received = running.send(sent)
    assert not received or received.startswith(b"HTTP/1.1 400") and detail in received


def test_a_client_that_sends_far_too_much_reads_the_answer(running):
    status, body, _ = running.ask("/echo", b"x" * 8_000_000)
    assert (status, json.loads(body)["title"][:7]) == (413, "Request")


def test_the_development_server_reloads_and_waits_while_the_application_is_broken(project):
    project.write(app=APP)
    with project.serve("run", "dev") as server:
        assert server.ask("/predict", {"x": 3})[1] == b'{"y":6}\n'
        steps = [("x +", 503, "SyntaxError"), (APP.replace("self.model = 2", "1 / 0"), 503, "ZeroDivision"),
                 (APP.replace("self.model = 2", "self.model = 5"), 200, "loaded in")]
        for number, (text, status, seen) in enumerate(steps, 1):
            project.write(app=text)
            os.utime(project.path / "app.py", (time.time() + number * 5,) * 2)
            server.wait_for("(?s)" + "reloading.*" * number + seen)
            assert server.ask("/predict", {"x": 3})[0] == status
        assert server.ask("/predict", {"x": 3})[1] == b'{"y":15}\n'


def test_the_development_server_says_where_to_click_and_shows_what_failed(project):
    project.write(app=APP)
    (project.path / "_models").mkdir()
    (project.path / "_models" / "weights").write_text("1")
    with project.serve("run", "dev") as server:
        server.wait_for(rf"try it in a browser: http://127.0.0.1:{server.port}/docs")
        problem = json.loads(server.ask("/fail")[1])
        assert problem["detail"] == "KeyError: 'hunter2'" and problem["traceback"][-1] == "KeyError: 'hunter2'"
        assert "app.py" in problem["traceback"][1] and "mest.py" not in " ".join(problem["traceback"])
        server.wait_for(r"KeyError: 'hunter2'")
        assert server.output.count("try it in a browser") == 1
        os.utime(project.path / "_models" / "weights", (time.time() + 5,) * 2)
        server.wait_for("(?s)reloading.*loaded in.*try it in a browser")  # with what the model is now


def test_the_debugger_needs_the_option_and_a_loopback_address(project):
    project.write(app=APP)
    for host in ("0.0.0.0", "192.0.2.1"):
        done = project.mest("run", "dev", "--debug", "--no-reload", "--host", host)
        assert done.returncode == 1 and f"--debug lets whoever reaches {host} run code" in done.stderr
    with project.serve("run", "dev", "--debug", "--no-reload") as server:
        assert b"hunter2" in server.ask("/fail")[1]
    with project.serve("run", "dev", "--no-reload", "--host", "0.0.0.0") as server:
        assert b"hunter2" not in server.ask("/fail")[1]


def test_the_file_itself_serves_on_loopback_when_it_ends_in_run(project):
    project.write(app=APP + "mest_app.run()\n")
    with project.serve(command=["app.py"], port=(), MEST_LISTEN_PORT="0") as server:
        assert server.ask("/predict", {"x": 3})[1] == b'{"y":6}\n'
        assert "http://127.0.0.1:" in server.output


def test_a_file_that_ends_in_run_works_with_every_command(project):
    project.write(app=APP + "mest_app.run()\n", test_it="from app import mest_app\ndef test_it(): assert mest_app\n")
    for server in ("dev", "gunicorn"):
        with project.serve("run", server) as running:
            assert running.ask("/predict", {"x": 3})[1] == b'{"y":6}\n'
            running.wait_for("the mest command runs the service")
    assert "True" in project.mest("shell", stdin="doubler.is_loaded\n").stdout
    assert "1 passed" in project.mest("test").stdout


def test_gunicorn_takes_its_settings_from_the_code_the_environment_and_the_command_line(project):
    project.write(app=APP.replace("8000,", "8000, workers=2, threads=3,"))
    show = "--", "--print-config", "--check-config"

    def settings(*args, **env):
        text = project.mest("run", "gunicorn", *args, **env).stdout
        return {name: value for name, value in re.findall(r"^(\w+) += (.*)$", text, re.M)}

    shown = settings(*show)
    assert (shown["bind"], shown["workers"], shown["worker_class"]) == ("['0.0.0.0:8000']", "2", "<worker_for.<locals>.Worker()>")
    assert settings("--preload", *show, "-k", "gthread")["threads"] == "3"
    assert settings("--preload", *show, "-k", "gthread", "--threads", "5")["threads"] == "5"
    shown = settings(*show, MEST_WORKERS="4", MEST_LISTEN_PORT="9", MEST_LISTEN_HOST="::1")
    assert (shown["bind"], shown["workers"]) == ("['[::1]:9']", "4")
    (project.path / "gunicorn.conf.py").write_text("workers = 5\nbacklog = 77\nbind = '127.0.0.1:1'\n")
    shown = settings(*show, MEST_WORKERS="4")
    assert (shown["bind"], shown["workers"], shown["backlog"]) == ("['127.0.0.1:1']", "5", "77")
    shown = settings(*show, GUNICORN_CMD_ARGS="--workers 6")
    assert shown["workers"] == "6"
    shown = settings("--workers", "7", "--port", "8", *show, GUNICORN_CMD_ARGS="--workers 6")
    assert (shown["bind"], shown["workers"], shown["preload_app"]) == ("['0.0.0.0:8']", "7", "False")
    assert settings("--preload", *show)["preload_app"] == "True"
    assert settings("--workers", "7", *show, "--workers", "8")["workers"] == "8"
    wrong = project.mest("run", "gunicorn", "--", "app:app")
    assert wrong.returncode == 2 and "app:app is no option; mest --app names the application" in wrong.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("failure", ["raise FileNotFoundError('weights.bin')", "raise SystemExit(1)"])
@pytest.mark.parametrize("options", [(), ("--", "--preload")])
def test_a_model_that_cannot_be_loaded_ends_gunicorn(project, workers, failure, options):
    project.write(app=APP.replace("self.model = 2", failure))
    done = project.mest("run", "gunicorn", "--port", "0", "--workers", workers, *options)
    assert done.returncode == 1
    lines = re.findall("^mest: model Doubler could not be loaded: .*", done.stderr, re.M)
    assert 1 <= len(lines) <= int(workers)
    assert failure in done.stderr and "mest.py" not in done.stderr


SLOW = """
import os, sys, threading, time
from mest import GenericModel, Mest, MestConfig, Router

class Slow(GenericModel):
    max_batch_size = 4

    def init(self, directory_path):
        self.model = os.getpid()

    def infer_batch(self, payloads):
        print("batch", sorted(payload["x"] for payload in payloads), flush=True)
        time.sleep(max(payload["seconds"] for payload in payloads))
        return [{"x": payload["x"], "pid": self.model} for payload in payloads]

slow = Slow()
mest_app = Mest(MestConfig("slow", models_instances=[slow])).setup()
router = Router("v1")
mest_app.register_router("/", router)
router.add_predict_route(slow, {"x": {"type": "float"}, "seconds": {"type": "float", "default": 0.0}})
router.add_ping_route()
"""


@pytest.fixture
def slow(project):
    """A function that serves SLOW with such options and settings."""
    project.write(app=SLOW)
    return lambda *args, **env: project.serve("run", "gunicorn", *args, **{"MEST_DRAIN_SECONDS": "1", **env})


class Load(contextlib.AbstractContextManager):
    """Clients that ask servers again and again; what came of it is kept."""

    def __init__(self, choose, clients=4):
        self.choose, self.over = choose, threading.Event()
        self.answers, self.failures = [], []
        self.threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self):
        while not self.over.is_set():
            server = self.choose()
            try:
                status, body, _ = server.ask("/predict", {"x": 1})
                (self.answers if status == 200 else self.failures).append(json.loads(body))
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(error)

    def __enter__(self):
        [thread.start() for thread in self.threads]
        self.go_on()
        return self

    def go_on(self, answers=20):
        target = len(self.answers) + answers
        until(lambda: len(self.answers) >= target)

    def __exit__(self, *error):
        self.over.set()
        [thread.join(PATIENCE) for thread in self.threads]


@contextlib.contextmanager
def idle(server, count, path="/livez"):
    """Connections that have been used, and are kept open."""
    connections = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE) for _ in range(count)]
    for connection in connections:
        connection.request("GET", path)
        connection.getresponse().read()
    yield connections
    for connection in connections:
        connection.close()


def later(function, *args):
    """Call a function in a thread; the result is a function that waits for what it returns."""
    with contextlib.ExitStack():
        pool = concurrent.futures.ThreadPoolExecutor(1)
        future = pool.submit(function, *args)
        pool.shutdown(wait=False)
    return lambda: future.result(PATIENCE)


def test_the_first_sigterm_makes_it_unready_and_the_end_comes_after_the_drain(slow):
    with slow() as server, idle(server, 50):
        answer = later(server.ask, "/predict", {"x": 5, "seconds": 2})
        server.wait_for(r"batch .5\b")
        began = time.monotonic()
        os.killpg(server.process.pid, signal.SIGTERM)  # as systemd does; only the master heeds it
        server.wait_for("stops in 1 s, and is not ready from now on")
        for path in ("/readyz", "/ping"):
            status, body, headers = server.ask(path)
            assert (status, json.loads(body)["detail"], headers["Connection"]) == (503, "slow is shutting down.", "close")
        assert server.ask("/livez")[0] == 200
        assert answer()[0] == 200 and time.monotonic() - began >= 1
        assert server.process.wait(PATIENCE) == 0
        assert time.monotonic() - began < 1 + 2 + 3  # the drain, the request, and what is promised
        assert "rror" not in server.output and server.output.count("model Slow loaded") == 1


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_stops_at_once_but_not_what_is_in_progress(slow, second):
    with slow(MEST_DRAIN_SECONDS="600") as server, idle(server, 50):
        answer = later(server.ask, "/predict", {"x": 5, "seconds": 1})
        server.wait_for(r"batch .5\b")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stops in 600 s")
        began = time.monotonic()
        os.killpg(server.process.pid, second) if second == signal.SIGINT else server.process.send_signal(second)
        assert answer()[0] == 200 and server.process.wait(PATIENCE) == 0
        assert time.monotonic() - began < 3 + 1


def test_a_rolling_restart_of_two_instances_loses_no_request(slow):
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(slow()) for _ in range(2)]
        ready, over = list(servers), threading.Event()

        def check():  # what a balancer does
            while not over.wait(0.05):
                for server in servers:
                    is_ready = False
                    with contextlib.suppress(OSError, http.client.HTTPException):
                        is_ready = server.ask("/readyz")[0] == 200
                    if is_ready != (server in ready):
                        (ready.append if is_ready else ready.remove)(server)

        checks = threading.Thread(target=check)
        checks.start()
        with Load(lambda: random.choice(ready)) as load:
            for old in servers[:]:
                old.process.send_signal(signal.SIGTERM)
                assert old.process.wait(PATIENCE) == 0
                servers.append(new := stack.enter_context(slow()))
                until(lambda: new in ready)
                load.go_on()
        over.set(), checks.join(PATIENCE)
        assert load.failures == [] and len({answer["pid"] for answer in load.answers}) == 4


def metric(server, name):
    """The sum of a metric's samples."""
    _, text, _ = server.ask("/metrics")
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text.decode(), re.M))


def test_a_killed_worker_loses_what_was_in_it_a_reload_nothing_and_the_metrics_no_count(slow, project):
    with slow("--workers", "2") as server:
        until(lambda: metric(server, "mest_workers_ready") == 2)
        with Load(lambda: server) as load:
            victim = load.answers[-1]["pid"]
            os.kill(victim, signal.SIGKILL)
            until(lambda: metric(server, "mest_workers_started_total") == 3)
            load.go_on()
        assert len(load.failures) <= 4
        counted = metric(server, 'mest_requests_total{route="/predict",method="POST",status="200"}')
        assert len(load.answers) <= counted <= len(load.answers) + 4
        before = {answer["pid"] for answer in load.answers}
        with Load(lambda: server) as load:
            server.process.send_signal(signal.SIGHUP)
            until(lambda: load.answers[-1]["pid"] not in before and metric(server, "mest_workers_started_total") == 5)
            until(lambda: metric(server, "mest_workers_ready") == 2)
            load.go_on(50)
        assert load.failures == []
        assert metric(server, 'mest_requests_total{route="/predict",method="POST",status="200"}') == counted + len(load.answers)
        assert metric(server, "mest_queue_length") == 0 and metric(server, "mest_requests_in_progress") == 1
        server.process.send_signal(signal.SIGTTOU)  # one worker less
        until(lambda: metric(server, "mest_workers_ready") == 1)


def test_a_reload_that_fails_leaves_the_old_workers(project):
    project.write(app=APP.replace("self.model = 2", "self.model = open('weights') and 2"))
    (project.path / "weights").touch()
    with project.serve("run", "gunicorn") as server:
        (project.path / "weights").unlink()
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("mest: model Doubler could not be loaded: FileNotFoundError")
        server.wait_for("a worker could not load its models; 1 go on with theirs")
        assert server.ask("/predict", {"x": 3})[0] == 200
        (project.path / "weights").touch()
        server.process.send_signal(signal.SIGHUP)
        until(lambda: metric(server, "mest_workers_started_total") == 3)
        assert server.ask("/predict", {"x": 3})[0] == 200


def test_a_replacement_that_cannot_load_is_not_attempted_endlessly(project):
    project.write(app=SLOW.replace("self.model = os", "open('weights').close(); self.model = os"))
    (project.path / "weights").touch()
    with project.serve("run", "gunicorn", "--workers", "2") as server:
        until(lambda: metric(server, "mest_workers_ready") == 2)
        (project.path / "weights").unlink()
        os.kill(json.loads(server.ask("/predict", {"x": 1})[1])["pid"], signal.SIGKILL)
        server.wait_for("a worker could not load its models; 1 go on with theirs")
        server.process.send_signal(signal.SIGUSR1)  # wakes the master, which looks after the workers
        assert server.ask("/predict", {"x": 1})[0] == 200
        (project.path / "weights").touch()
        server.process.send_signal(signal.SIGHUP)
        until(lambda: metric(server, "mest_workers_ready") == 2)
        assert server.output.count("could not load its models;") == 1


def test_the_example_runs_once_in_each_worker_and_may_take_its_time(project):
    slow = "print('inferring'); __import__('time').sleep(1.5); return {\"y\""
    project.write(app=APP.replace("return {\"y\"", slow))
    with project.serve("run", "gunicorn", "--workers", "2", MEST_REQUEST_TIMEOUT="1") as server:
        until(lambda: metric(server, "mest_workers_ready") == 2)
        assert server.output.count("inferring") == 2
        assert server.ask("/predict", {"x": 1})[0] == 504


def test_old_workers_serve_while_the_new_ones_load(project):
    wait = "time.sleep(2 if os.path.exists('again') else 0); self.model = os"
    project.write(app=SLOW.replace("self.model = os", wait))
    with project.serve("run", "gunicorn") as server:
        old = json.loads(server.ask("/predict", {"x": 1})[1])["pid"]
        (project.path / "again").touch()
        server.process.send_signal(signal.SIGHUP)
        longest, pid = 0, old
        while pid == old:
            began = time.monotonic()
            pid = json.loads(server.ask("/predict", {"x": 1})[1])["pid"]
            longest = max(longest, time.monotonic() - began)
        assert longest < 1


@pytest.mark.parametrize(
    "init, env, message",
    [
        ("import os; os.kill(os.getpid(), 9)", {}, "was sent SIGKILL! Perhaps out of memory"),
        ("import os; os._exit(0)", {}, "a worker could not load its models; 0 go on"),
        ("import time; time.sleep(600)", {"MEST_STARTUP_TIMEOUT": "1"},
         "mest: model Doubler could not be loaded: TimeoutError: it was not done within the startup_timeout of 1 s"),
    ],
)
def test_a_worker_that_dies_or_hangs_while_it_loads_ends_gunicorn(project, init, env, message):
    project.write(app=APP.replace("self.model = 2", init))
    done = project.mest("run", "gunicorn", "--port", "0", **env)
    assert done.returncode == 1 and message in done.stderr + done.stdout
    if env:
        assert "time.sleep(600)" in done.stderr  # where it hangs
        done = project.mest("run", "gunicorn", "--port", "0", "--preload", **env)
        assert done.returncode == 1 and message in done.stderr


def test_a_model_that_fails_for_its_example_ends_gunicorn(project):
    project.write(app=APP.replace("return {\"y\"", "x / 0; return {\"y\""))
    done = project.mest("run", "gunicorn", "--port", "0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "mest: model Doubler fails for the example of /predict: ZeroDivisionError: division by zero"
    assert "x / 0" in done.stderr and "mest.py" not in done.stderr


def test_stalled_clients_delay_nobody_and_are_closed(slow):
    with slow(MEST_HEADER_TIMEOUT="2", MEST_REQUEST_BODY_TIMEOUT="2") as server, contextlib.ExitStack() as stack:
        head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        stalled = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)) for _ in range(200)]
        for number, client in enumerate(stalled):
            client.sendall(head + b"Content-Length: 9\r\n\r\n{" if number % 2 else head)
        until(lambda: metric(server, "mest_requests_in_progress") == 101)
        began = time.monotonic()
        for _ in range(20):
            assert server.ask("/livez")[0] == server.ask("/predict", {"x": 1})[0] == 200
        assert time.monotonic() - began < 2
        (used,) = stack.enter_context(idle(server, 1))
        used = used.sock
        used.sendall(head)  # the headers of a later request
        for number, client in enumerate([*stalled, used]):
            received = client.recv(65536)
            assert received.startswith(b"HTTP/1.1 408") and b"did not come in time" in received if number % 2 else received == b""


def test_connections_are_limited_and_a_flood_of_requests_does_not_fill_the_memory(slow):
    with slow(MEST_MAX_CONNECTIONS="3") as server:
        pid = json.loads(server.ask("/predict", {"x": 1})[1])["pid"]
        with idle(server, 3):
            assert server.ask("/livez")[0] == 503
        until(lambda: server.ask("/livez")[0] == 200)
        resident = lambda: int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()).group(1)) / 1024  # MB
        before = resident()
        with socket.create_connection(("127.0.0.1", server.port)) as flood:
            flood.setblocking(False)
            many, end, sent = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n" * 2000, time.monotonic() + 1, 0
            while time.monotonic() < end:  # and no answer is read
                with contextlib.suppress(BlockingIOError):
                    sent += flood.send(many)
        assert sent > 100_000 and resident() < before + 10
        until(lambda: server.ask("/livez")[0] == 200)


def test_too_many_requests_are_refused_at_once_and_late_ones_are_not_computed(slow):
    with slow(MEST_MAX_QUEUED_REQUESTS="6", MEST_REQUEST_TIMEOUT="1") as server:
        held = [later(server.ask, "/predict", {"x": 0, "seconds": 2})]
        server.wait_for(r"batch .0\b")
        held += [later(server.ask, "/predict", {"x": x}) for x in range(1, 12)]
        statuses = sorted(answer()[0] for answer in held)
        assert statuses == [503] * 6 + [504] * 6
        until(lambda: metric(server, "mest_queue_length") == 0)
        assert server.ask("/predict", {"x": 99})[0] == 200
        assert server.output.count("batch") == 2


def test_a_client_that_leaves_is_forgotten(slow):
    with slow() as server:
        held = later(server.ask, "/predict", {"x": 0, "seconds": 1})
        server.wait_for(r"batch .0\b")
        gone = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(3)]
        for connection in gone:
            connection.request("POST", "/predict", b'{"x": 7}', JSON)
        until(lambda: metric(server, "mest_queue_length") == 4)
        [connection.close() for connection in gone]
        assert held()[0] == 200 and server.ask("/predict", {"x": 1})[0] == 200
        server.wait_for(r"batch .1\b")
        assert re.findall("batch (.*)", server.output) == ["[0]", "[1]"]
        assert "rror" not in server.output


def test_a_worker_whose_model_is_stuck_says_so_and_is_replaced(slow):
    with slow("--", "--timeout", "2", MEST_LIVENESS_TIMEOUT="1", MEST_REQUEST_TIMEOUT="1") as server:
        pid = json.loads(server.ask("/predict", {"x": 1})[1])["pid"]
        assert server.ask("/predict", {"x": 2, "seconds": 600})[0] == 504
        until(lambda: server.ask("/livez")[0] == 503)
        assert b"The model Slow has been in one call for more than 1 s." in server.ask("/livez")[1]
        server.wait_for("WORKER TIMEOUT")
        until(lambda: metric(server, "mest_workers_started_total") == 2)
        assert json.loads(server.ask("/predict", {"x": 1})[1])["pid"] != pid


def test_preloaded_models_share_their_memory(project):
    project.write(app=APP.replace("self.model = 2", "self.model, self.big = 2, b'x' * 100_000_000"))

    def proportional(*options):
        with project.serve("run", "gunicorn", "--workers", "2", *options) as server:
            until(lambda: metric(server, "mest_workers_ready") == 2)
            assert server.ask("/predict", {"x": 1})[0] == 200
            master = server.process.pid
            pids = [master, *Path(f"/proc/{master}/task/{master}/children").read_text().split()]
            rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
            return sum(int(re.search(r"^Pss: +(\d+)", text, re.M).group(1)) for text in rollups) / 1000  # MB

    assert proportional() > 200 > 160 > proportional("--preload")


def test_preload_is_refused_with_cuda_and_warns_of_threads(project):
    project.write(app=APP, torch="class cuda:\n    is_initialized = staticmethod(lambda: True)\n")
    project.write(app="import torch\n" + APP)
    done = project.mest("run", "gunicorn", "--port", "0", "--preload")
    assert done.returncode == 1 and "mest: CUDA has been initialised, and does not survive the fork of --preload" in done.stderr
    project.write(app="import threading\nthreading.Thread(target=threading.Event().wait, name='mine', daemon=True).start()\n" + APP)
    with project.serve("run", "gunicorn", "--preload") as server:
        assert "these threads will not run in the workers that --preload forks: mine" in server.output


def test_signals_while_the_models_load_are_heeded_by_the_master_alone(project):
    project.write(app=SLOW.replace("self.model = os", "print('loading', flush=True); time.sleep(1); self.model = os"))
    with project.serve("run", "gunicorn", listens="loading", MEST_DRAIN_SECONDS="0") as server:
        os.killpg(server.process.pid, signal.SIGUSR1)
        server.wait_for(LISTENS)
        for count in (2, 3, 4):
            server.process.send_signal(signal.SIGHUP)
            until(lambda: metric(server, "mest_workers_started_total") == count)
        until(lambda: server.output.count("model Slow loaded") == 2)  # of the first, and of the last
        assert server.ask("/predict", {"x": 1})[0] == 200
        server.process.send_signal(signal.SIGHUP)
        until(lambda: metric(server, "mest_workers_started_total") == 5)
        os.killpg(server.process.pid, signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    "options, env, message",
    [
        (["--certfile", "app.py", "--keyfile", "app.py"], {}, "mest: the certfile or keyfile of gunicorn cannot be used: "),
        (["--reload"], {}, "mest: gunicorn's --reload would not load changed code here; use mest run dev"),
        ([], {"MEST_WORKERS": "some"}, "mest: MEST_WORKERS is 'some'; it must be an integer from 1 to 1024 or auto (processes"),
    ],
)
def test_settings_with_which_gunicorn_would_go_on_wrongly_are_refused(project, options, env, message):
    project.write(app=APP)
    done = project.mest("run", "gunicorn", "--port", "0", "--", *options, **env)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(message) and "Traceback" not in done.stderr


def test_linear_algebra_gets_the_cpus_of_its_worker(project):
    project.write(app="import os\nprint('threads', os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])\n" + APP)
    show, cpus = ("--", "--check-config"), mest.available_cpus()
    for args, env, shown in [
        (["--workers", "1"], {"OMP_NUM_THREADS": "77"}, f"threads 77 {cpus}"), (["--workers", "1"], {}, f"threads {cpus} {cpus}"),
        (["--workers", "auto"], {}, "threads 1 1"), ([], {"MEST_WORKERS": "99"}, "threads 1 1"),
    ]:
        assert shown in project.mest("run", "gunicorn", *args, *show, **env).stdout.splitlines()
    project.write(app=APP.replace("8000,", "8000, workers=99,"))
    done = project.mest("run", "gunicorn", *show)
    assert "shared out to 1 workers before it was known that there are 99: set MEST_WORKERS, or --workers" in done.stdout


def test_one_line_at_the_start_tells_what_is_served_and_how(project):
    project.write(app=APP)
    with project.serve("run", "gunicorn", "--workers", "2", "--threads", "3", "--host", "127.0.0.1") as server:
        until(lambda: metric(server, "mest_workers_ready") == 2)
        lines = [json.loads(line)["message"] for line in server.output.splitlines() if "serves on" in line]
        assert len(lines) == 1
        assert re.fullmatch(
            r"serves on http://127.0.0.1:\d+, 2 workers of 3 threads; model Doubler \(0.\d\d\d s\); GET /livez directly; "
            r"GET /readyz directly; GET /metrics directly; .*; POST /predict directly; "
            r"GET /ping through Flask: it has a handler of its own; .*", lines[0],
        )


@pytest.mark.parametrize("options", [(), ("--", "-k", "gthread")])
def test_the_access_log_has_a_line_for_each_request_that_nobody_can_forge(project, options):
    project.write(app=APP)
    with project.serve("run", "gunicorn", "--access-log", *options) as server:
        server.ask("/predict?x=5678", {"x": 3}, headers={**JSON, "X-Request-Id": "r1"})
        server.ask("/a%0A%7B%22status%22:200%7D%1b", headers={"X-Request-Id": "r2"})
        server.wait_for('"r2"')
        lines = [json.loads(line) for line in server.output.splitlines() if '"answered"' in line]
    (first, second) = [{k: v for k, v in line.items() if k not in ("time", "level", "logger", "milliseconds")} for line in lines]
    assert first == {"message": "answered", "request_id": "r1", "method": "POST", "path": "/predict", "status": 200}
    assert second["path"] == '/a\n{"status":200}\x1b' and second["status"] == 404
    assert 0 < lines[0]["milliseconds"] < 10_000 and "5678" not in server.output


def test_a_unix_socket_serves_too(project, tmp_path):
    project.write(app=APP)
    path = str(tmp_path / "s")
    with project.serve("run", "gunicorn", "--", "-b", f"unix:{path}", port=(), listens=r"serves on unix:") as server:
        for url in (b"/ping", b"/readyz"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.sendall(b"GET " + url + b" HTTP/1.0\r\n\r\n")
                assert client.recv(1000).startswith(b"HTTP/1.0 200") or client.recv(1) is None


def test_gunicorn_has_all_that_the_worker_overrides_and_without_it_serves_plainly(project):
    from gunicorn.asgi.protocol import ASGIProtocol
    from gunicorn.workers.gasgi import ASGIWorker

    assert mest.missing_in(ASGIProtocol, ASGIWorker) == []
    less = "import gunicorn.asgi.protocol as p\ndel p.ASGIProtocol._keepalive_timeout\n"
    project.write(app=less + APP)
    with project.serve("run", "gunicorn") as server:
        assert server.output.count("this gunicorn has no ASGIProtocol._keepalive_timeout: slow clients") == 1
        assert server.ask("/predict", {"x": 3})[1] == b'{"y":6}\n'


# Command line


def test_the_version_is_shown():
    done = subprocess.run([sys.executable, HERE / "mest.py", "--version"], capture_output=True, text=True)
    assert done.stdout == f"mest {mest.__version__}\n"


FIRST = """
from mest import GenericModel, Mest, MestConfig, Router, validate_params

class Doubler(GenericModel):
    def init(self, directory_path):
        self.model = 2

    def infer(self, x):
        return {"y": self.model * x}

X = {"x": {"type": "float", "required": True}}
doubler, router, mest_app = Doubler(), Router("v1"), Mest(MestConfig("doubler", environ={}))
router.add_predict_route(doubler, X)
mest_app.register_router(url="/", router=router)
"""
HANDLER = """
@router.route("double")
@validate_params(X)
def double(x):
    return 2 * x
"""


@pytest.mark.parametrize("before, after, message", [
    ("mest_app.register_router(", "(dict)(", r"the routes of router 'v1' are not served; call mest_app.register_router\("
     r'url="/", router=router\)$'),
    ("self.model = 2", "self.model = open(directory_path + '/w')", r"model Doubler could not be loaded: FileNotFoundError: "
     r".*; local_model_directory_path is '_models', and there is no directory /\S+/_models$"),
    ("self.model = 2", "import nosuchpackage", r"model Doubler could not be loaded: .* No module named 'nosuchpackage'; "
     r"install it for /\S*python\S*$"),
    ("from mest", "import nosuchpackage\nfrom mest", r"\S+ cannot be imported: ModuleNotFoundError: No module named "
     r"'nosuchpackage'; is it installed for /\S*python\S*$"),
    ("infer(self, x)", "infer(self, x, z)", r"the route /predict: Doubler.infer\(\) in app\d+.py, line 8, takes 'z', which is "
     "neither in the schema nor in the url; add it to one of them$"),
    ("infer(self, x)", "infer(self)", r"the route /predict: Doubler.infer\(\) in app\d+.py, line 8, does not take 'x', which is "
     "in the schema; add it to the arguments$"),
    (', "required": True', "", r"the route /predict: Doubler.infer\(\) in app\d+.py, line 8, needs 'x', which requests may lack; "
     "make it required, or give it a default$"),
    ("(doubler, X)", "(doubler)", r"\S+, line 13: x of Doubler.infer\(\) in app\d+.py, line 8 has no annotation; it may be "
     "bool, int, float, .*, or give a schema$"),
    ("def infer(", "def inferr(", r"the route /predict: the model Doubler has neither infer\(\) "
     r"nor infer_batch\(\)$"),
    ("(doubler, X)", "(Doubler, X)", r"\S+, line 13: .* has the model <class 'app\d+.Doubler'>; it must be an object with "
     r"predict\(\), an instance and not a class$"),
    ("def double(x)", "def double()", r"the route /double: double\(\) in app\d+.py, line 16, does not take 'x'"),
    ("@validate_params(X)\n", "", r"the route /double: double\(\) in \S+, line 16, takes 'x', .*; is @validate_params missing "
     "below the route\\?$"),
    ('@router.route("double")\n@validate_params(X)', '@validate_params(X)\n@router.route("double")', r"the "
     r"route /double: .* is @validate_params missing below the route\?$"),
    ("@validate_params(X)", "@validate_params", r"\S+, line 1\d: double\(\): write @validate_params\({…}\), with a schema$"),
    ("@validate_params(X)", "@validate_params({'x': {'tpye': 'float'}})", r"\S+, line 1\d: .*: the schema is wrong: .*; did you "
     r"mean 'type'\?$"),
    ("@validate_params(X)", "@validate_params({'x': {'type': 'int'}})", r".*Unsupported types: int.*; did you mean 'integer'\?$"),
    ('route("double")', 'route("predict")', r"\S+, line 1\d: POST /predict of router 'v1' is a route already, of the endpoint "
     "'v1.predict'; give one of them another url$"),
    ('route("double")', 'route("docs", method="GET")', r"\S+, line 1\d: GET /docs .* another url, or set docs=False$"),
    ('MestConfig("doubler"', 'MestConfig("doubler", port=5', r"\S+, line 12: MestConfig has no 'port'; did you mean listen_port\?"),
    ('MestConfig("doubler"', 'MestConfig("doubler", models_instances=[Doubler]', r"\S+, line 12: .* it must be an instance"),
    ("@router.route", "second = Mest('second')\n@router.route", r"\S+: its instances of Mest are mest_app, second; make one "
     r"named mest_app, or name one: --app \S+:NAME$"),
    ("mest_app", "mest_app_", None),
])
def test_a_mistake_at_the_start_is_one_line_that_names_the_cure(before, after, message, project, monkeypatch):
    name = f"app{next(COUNT)}"
    assert before in FIRST + HANDLER
    project.write(**{name: (FIRST + HANDLER).replace(before, after)})
    monkeypatch.chdir(project.path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    load = lambda: mest.load_app(types.SimpleNamespace(app=name + ".py"))[0].load_models()
    try:
        if message is None:
            return load()
        if "instances of Mest" in message:
            (project.path / f"{name}.py").write_text((FIRST + HANDLER).replace("mest_app", "first") + "second = Mest('second')\n")
            message = message.replace("mest_app, second", "first, second")
        with pytest.raises(MestError) as caught:
            load()
        assert re.match(f"mest: {message}", mest.report(caught.value).splitlines()[-1])
    finally:
        Mest._run_by_command = False
        sys.modules.pop(name, None)


COUNT = itertools.count()


class Late(GenericModel):
    def init(self, directory_path):
        self.model = {"f": lambda x: {"late": x}}

    @property
    def infer(self):
        return self.model["f"]


class Wrapped(GenericModel):
    def plain(function):
        def wrapper(*args: object, **kwargs: object):
            return function(*args, **kwargs)

        return wrapper

    @plain
    def infer(this, x: float):
        return x


def test_a_stage_may_be_what_init_loads(router):
    class Assigned(GenericModel):
        def init(self, directory_path):
            self.infer = lambda x: {"assigned": x}

    router.add_predict_route(Late(), X), router.add_predict_route(Assigned(), X, url="/assigned")
    client = checked(router).setup().app.test_client()
    assert client.post("/predict", json={"x": 1}).json == {"late": 1}
    assert client.post("/assigned", json={"x": 1}).json == {"assigned": 1}


def test_a_stage_that_takes_anything_leaves_the_schema_to_the_next(router):
    class Logging(Typed):
        def predict(self, **params):
            return super().predict(**params)

    router.add_predict_route(Logging())
    assert checked(router).setup().app.test_client().post("/predict", json={"x": 1}).json == [1, [], None]


def test_a_model_that_has_been_loaded_by_hand_is_not_loaded_again(router):
    class Once(Doubler):
        def init(self, directory_path):
            assert directory_path == "mine"
            super().init(directory_path)

    model = Once()
    model.init("mine")
    router.add_predict_route(model, X)
    app = checked(router).setup().app
    assert app.test_client().post("/predict", json={"x": 1}).json == {"y": 2}
    assert app.test_client().get("/readyz").status_code == 200


def test_the_model_of_a_blueprint_that_was_there_before_is_loaded_too(router):
    app = flask.Flask("host")
    router.add_predict_route(Doubler(), X)
    app.register_blueprint(router.blueprint)
    make(app).setup()
    assert app.test_client().post("/predict", json={"x": 1}).json == {"y": 2}


def test_tracebacks_are_for_clients_on_this_machine_alone(route, router):
    mest_app = make()
    router.route("fail")(lambda: 1 / 0)
    mest_app.register_router("/", router)
    mest_app.is_in_development = True
    client = mest_app.app.test_client()
    assert client.post("/fail").json["detail"] == "ZeroDivisionError: division by zero"
    for headers in ({"Host": "shop.example"}, {"X-Forwarded-For": "8.8.8.8"}, {"Via": "1.1 a"}, {"Host": "127.evil.com:80"}):
        assert client.post("/fail", headers=headers).json["detail"] == mest.FAILED
    assert client.post("/fail", headers={"Host": "[::1]:8000"}).json["traceback"][-1].startswith("ZeroDivisionError")


def test_a_status_of_the_standard_library_is_a_status(route):
    def handler():
        raise Problem(http.HTTPStatus.CONFLICT, "no")

    assert route(handler)().json["status"] == 409


def checked(router, **fields):
    mest_app = make(**fields)
    mest_app.register_router("/", router)
    mest.check_routes(mest_app.app)
    return mest_app


def test_what_handlers_can_take_is_not_refused(router):
    class Helped(Batched):
        def infer(self, payload):
            return payload

    class Loose(GenericModel):
        def predict(self, x, **others):
            return x

    class Object:
        parameters = "its own"

        def __call__(self, x=1):
            return x

        def method(self, n):
            return n

    def injected(function):
        return functools.wraps(function)(lambda **given: function(user=1, **given))

    sure = {"required": True}
    router.add_predict_route(Helped(max_batch_size=8), X, url="/a")
    router.add_predict_route(Loose(), {**X, "y": {}}, url="/b")
    router.route("/c", endpoint="c")(Object())
    router.route("/d/<int:n>")(Object().method), router.route("/e", endpoint="e")(functools.partial(lambda x: x, 1))
    one = Object()
    router.route("/f/<n>", endpoint="m")(one.method), router.route("/g/<n>", endpoint="m")(one.method)
    router.route("/h", endpoint="h")(validate_params({**X, "id": {"readonly": True}})(lambda x: x))
    router.route("/i", endpoint="i")(validate_params({"a": {**sure, "dependencies": "b"}, "b": {}})(lambda a, b: a))
    router.route("/j", endpoint="j")(injected(validate_params(X)(lambda user, x: x)))
    router.route("/k", endpoint="k")(validate_params(X)(injected(lambda user, x: x)))
    router.route("/l/<n>", endpoint="l")(validate_params({"n": {"rename": "m"}})(lambda m: m))
    router.route("/i2", endpoint="i2")(validate_params({"a": {**sure, "dependencies": "b"}, "b": {"dependencies": ["c"]}, "c": {}})(
        lambda a, b, c: a))
    router.route("/old/<x>", endpoint="old", redirect_to="/a")(lambda: 1)
    router.add_predict_route(Late(), X, url="/late"), router.add_predict_route(Wrapped(), X, url="/wrapped")
    router.add_predict_route(unittest.mock.create_autospec(Doubler, instance=True), X, url="/mock")
    router.route("/m/<n>", endpoint="o", defaults={"p": 1})(validate_params(X)(lambda n, p, x: x))
    app = checked(router).app
    assert app.test_client().post("/j", json={"x": 3}).json == 3


@pytest.mark.parametrize("kind", ["url_value_preprocessor", "before_request"])
def test_a_hook_of_the_host_may_change_what_handlers_are_given(router, kind):
    app = flask.Flask("host")
    make(app).register_router("/<lang>", router)
    router.route("hi", method="GET")(lambda: "hi")
    getattr(app, kind)(lambda *given: flask.request.view_args.pop("lang", None) and None)
    mest.check_routes(app)
    assert app.test_client().get("/en/hi").text == "hi"


def test_other_rules_of_the_host_do_not_disturb(router):
    app = flask.Flask("host")
    rules = [flask.Flask.url_rule_class("/x", endpoint="x"), flask.Flask.url_rule_class("/old", redirect_to="new")]
    app.url_map.add(rules[0]), app.add_url_rule("/y", endpoint="external", build_only=True)
    host = make(app)
    router.route("y", method="GET")(lambda: "y")
    host.register_router("/", router), host.register_router("/", host.docs)
    app.url_map.add(rules[1])
    mest.ways(app), mest.check_routers(host, "host", {}), mest.check_routes(app)
    client = app.test_client()
    assert client.get("/y").text == "y" and "/y" in client.get("/openapi.json").json["paths"]


def test_a_field_that_excludes_another_is_not_sure(router):
    schema = {"a": {"required": True, "excludes": "b"}, "b": {"required": True, "excludes": "a"}}
    router.route("/a", endpoint="a")(validate_params(schema)(lambda a=0, b=0: [a, b]))
    assert checked(router).app.test_client().post("/a", json={"b": 1}).json == [0, 1]
    other = Router("v2")
    other.route("/b", endpoint="b")(validate_params(schema)(lambda a, b: a))
    with pytest.raises(MestError, match="the route /b: .* needs 'b', which requests may lack"):
        checked(other)


@pytest.mark.parametrize("source, message", [
    ("def infer(x: float): pass", "has no self; write def infer.self, …"), ("def infer(): pass", "has no self"),
    ("async def infer(self, x): pass", "is async; models run in threads: write def infer"),
])
def test_a_model_that_cannot_work_is_refused(router, source, message):
    names = {}
    exec(source, names)
    model = type("Model", (GenericModel,), {"infer": names["infer"]})()
    with pytest.raises(MestError, match=f"Model.*infer|infer.*{message}"):
        router.add_predict_route(model, X)
    with pytest.raises(MestError, match=message):
        make(models=[model])


def test_what_is_passed_from_stage_to_stage_is_explained_when_it_does_not_fit():
    class Words(GenericModel):
        def pre_process(self, text):
            return text.split()

        def infer(self, words):
            return {"count": len(words)}

        def post_process(self, n):
            raise TypeError("its own")

    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given; the items of a list, .* return .* to pass one"):
        Words().predict(text="a b")
    with pytest.raises(TypeError, match="unexpected keyword argument 'count'; the items of a list, and those of a dictionary"):
        Words().predict(text="a")
    Words.post_process = lambda self, count: int([])
    with pytest.raises(TypeError, match="int.. argument must be .*list'$"):
        Words().predict(text="a")


@pytest.mark.parametrize("arguments", [("no", 404), (42, "no"), ("404", "no"), (200, "fine"), (404, None)])
def test_a_problem_with_its_arguments_in_the_wrong_order_is_an_error_of_the_service(route, arguments, capsys):
    def handler():
        raise Problem(*arguments)

    assert route(handler)().status_code == 500
    assert "needs an integer from 400 to 599, and text" in log_of(capsys)[-1]["message"]


def test_probable_mistakes_in_a_model_are_warnings(capsys):
    class Returning(Doubler):
        max_batch_size = 4

        def init(self, directory_path):
            return 2

    class Initial(Doubler):
        def init(self):
            pass

    make(models=[Returning()]).setup()
    warnings = [line["message"] for line in log_of(capsys) if line["level"] == "WARNING"]
    assert warnings == [
        "model Returning makes no batches: it has no infer_batch()",
        "init of model Returning returned something: set self.model to it",
    ]
    with pytest.raises(MestError, match="were given; write def init.self, directory_path.$"):
        make(models=[Initial()]).setup()


def test_a_service_without_routes_is_a_warning(project):
    project.write(app="from mest import Mest\nmest_app = Mest('a', workers=2)\nassert mest_app.config.workers == 2")
    first = json.loads(project.mest("shell").stdout.splitlines()[0])
    assert first["message"] == "the service has no routes yet; call mest_app.router.add_predict_route(…)"
    with pytest.raises(MestError, match="Mest was given .*; it must be a MestConfig with all fields, or a name"):
        Mest(MestConfig("a"), workers=2)


@pytest.mark.parametrize("host, is_loopback", [
    ("localhost", True), ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("127.evil.com", False), ("0.0.0.0", False),
])
def test_only_this_machine_reaches_a_loopback_address(host, is_loopback):
    assert mest.is_loopback(host) == is_loopback


def test_a_router_that_is_forgotten_beside_others_is_a_warning(project):
    project.write(app=APP + "\nother = Router('v2')\nother.add_ping_route()\n")
    warning = "the routes of router 'v2' are not served; call mest_app.register_router(url=\"/\", router=other)"
    assert warning in json.loads(project.mest("shell").stdout.splitlines()[0])["message"]


@pytest.mark.parametrize("method, url, sent, status, detail", [
    ("POST", "/predict", {"data": '{"x": 2}', "content_type": FORM}, 415, "The body looks like JSON and is declared to be a "
     "form; send it with the header Content-Type: application/json."),
    ("POST", "/predict", {"data": "{'x': 2}", "headers": JSON}, 400, "The body is not valid JSON: Expecting property name "
     "enclosed in double quotes: line 1 column 2 (char 1)."),
    ("POST", "/predict", {"data": '{"x": 2}'}, 415, "The body is without a Content-Type; send a JSON object as "
     "application/json, or a form."),
    ("GET", "/predict", {"json": {"x": 2}}, 405, "/predict takes POST, not GET. /docs shows what there is."),
    ("POST", "/predcit", {"json": {"x": 2}}, 404, "There is nothing at /predcit. Did you mean /predict? /docs shows what "
     "there is."),
    ("GET", "/", {}, 404, "There is nothing at /. /docs shows what there is."),
])
def test_a_mistake_in_a_request_is_answered_with_the_cure(method, url, sent, status, detail, router):
    router.add_predict_route(Doubler(), X)
    response = client_of(router).open(url, method=method, **sent)
    assert (response.status_code, response.json["detail"]) == (status, detail)


def test_without_documentation_nobody_is_sent_there(router):
    assert client_of(router, docs=False).get("/x").json["detail"] == "There is nothing at /x."


def test_a_set_in_the_answer_is_an_error_that_names_the_cure(answer, capsys):
    assert answer({"found": {1, 2}}).status_code == 500
    (line,) = log_of(capsys)
    text = "a set in the result has no form in JSON; return a dictionary, list, number, text or array"
    assert text in line["message"]


def test_a_batching_model_without_a_size_is_a_warning(router, capsys):
    class Model(GenericModel):
        def infer_batch(self, payloads):
            return payloads

    make(models=[Model()]).setup()
    assert log_of(capsys)[-1]["message"] == "model Model gets no batches: set its max_batch_size"


BROKEN = "import nosuchpackage\n"
TWO = APP + "second = Mest(MestConfig('second', 8001))\ndel mest_app\n".replace("del mest_app", "first = mest_app; del mest_app")


@pytest.mark.parametrize("command", [("run", "dev"), ("run", "gunicorn"), ("shell",)])
def test_a_failure_is_the_same_message_whatever_the_command(project, command):
    project.write(app=BROKEN)
    done = project.mest(*command)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("mest: app.py cannot be imported: ModuleNotFoundError: No module")


@pytest.mark.parametrize(
    "files, args, message",
    [
        ({}, [], r"mest: there is no application app.py in \S+; name it with --app or MEST_APP"),
        ({}, ["--app", "nosuch.module"], r"mest: nosuch.module cannot be imported: ModuleNotFoundError: No module named"),
        ({"app": BROKEN}, [], r"mest: app.py cannot be imported: ModuleNotFoundError: No module named 'nosuchpackage'"),
        ({"app": "raise SystemExit(0)"}, [], r"mest: app.py cannot be imported: SystemExit: 0"),
        ({"app": "x +"}, [], r"mest: app.py cannot be imported: SyntaxError: invalid syntax"),
        ({"app": "x = 1"}, [], r"mest: app.py: it has no Mest; make one named mest_app"),
        ({"app": TWO}, [], r"mest: app.py: its instances of Mest are second, first; .* --app app.py:NAME"),
        ({"main": APP, "utils": ""}, [], r"mest: there is no application app.py in \S+, which has main.py, utils.py; name it"),
        ({"app": APP}, ["--app", "app.py:other"], r"mest: app.py: its instances of Mest are mest_app; "),
        ({"app": APP.replace("8000", "70000")}, [], r"mest: \S+/app.py, line 13: listen_port is 70000"),
    ],
)
def test_every_failure_is_one_clear_message(project, files, args, message):
    project.write(**files)
    done = project.mest(*args, "shell")
    assert done.returncode == 1 and done.stdout == ""
    assert re.match(message, done.stderr.splitlines()[-1])
    user_raised = "cannot be imported" in message and files
    assert ("Traceback" in done.stderr or "SyntaxError" in done.stderr) == bool(user_raised)
    assert "mest.py" not in done.stderr and "importlib" not in done.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (["fly"], "invalid choice: 'fly'"), ([], "the following arguments are required: COMMAND"),
        (["run"], "required: SERVER"), (["run", "dev", "--hots", "a"], "unrecognized arguments: --hots a"),
        (["run", "dev", "--workers", "2"], "unrecognized arguments: --workers"),
        (["shell", "--por", "1"], "unrecognized arguments"),
        (["run", "dev", "main.py"], "unrecognized arguments: main.py; the application is named with --app"),
        (["run", "main.py"], "; the application is named with --app"),
        (["run", "gunicorn", "--bind", "a"], "unrecognized arguments: --bind; gunicorn's own options follow a --"),
    ],
)
def test_a_wrong_command_line_is_refused(args, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mest", *args])
    with pytest.raises(SystemExit) as end:
        mest.main(args)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_wrong_option_names_itself(project):
    project.write(app=APP)
    done = project.mest("run", "dev", "--port", "70000")
    assert done.returncode == 2
    assert done.stderr.endswith("mest: error: --port is 70000; it must be an integer from 0 to 65535 (TCP port; 0 picks a free one)\n")


def test_a_port_in_use_is_said(project):
    project.write(app=APP)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        dev = project.mest("run", "dev", "--port", port)
        assert dev.returncode == 1 and f"Port {port} is in use by another program" in dev.stderr
        gunicorn = project.mest("run", "gunicorn", "--host", "127.0.0.1", "--port", port)
        assert gunicorn.returncode == 1 and f"cannot listen on 127.0.0.1:{port}: Address already in use" in gunicorn.stderr
        assert "choose another with --port or MEST_LISTEN_PORT" in gunicorn.stderr


@pytest.mark.parametrize("package, command", [("gunicorn", ["run", "gunicorn"]), ("pytest", ["test"])])
def test_a_package_that_is_not_installed_is_named(project, package, command):
    project.write(app=APP, **{package: "raise ImportError('not installed')"})
    done = project.mest(*command)
    assert (done.returncode, done.stderr) == (1, f"mest: {package} is not installed: pip install {package}\n")


def test_the_application_is_found_by_file_module_and_name(project):
    project.write(service=APP.replace("mest_app", "only"), app=TWO)
    (project.path / "pack").mkdir()
    (project.path / "pack/__init__.py").touch()
    (project.path / "pack/web.py").write_text("from . import __name__ as name; assert name == 'pack'\n" + APP)
    for args, env in [
        (["--app", "service"], {}), ([], {"MEST_APP": "service.py"}),
        (["--app", str(project.path / "service.py")], {}), (["--app", "app.py:first"], {"MEST_APP": "nosuch.py"}),
        (["--app", "pack/web.py"], {}), (["--app", "pack.web:mest_app"], {}),
    ]:
        done = project.mest(*args, "shell", stdin="print('name', mest_app.config.service_name)\n", **env)
        assert "name doubler" in done.stdout, (args, done.stderr)
    after = project.mest("shell", "--app", "service.py", stdin="1\n")
    assert after.returncode == 0


def test_the_shell_has_the_service_at_hand(project):
    project.write(app=APP, startup="started = 'yes'\n")
    lines = "print(doubler.predict(x=4), started)\nprint(client.get('/ping').json, app.name)\n"
    lines += "import flask; print(flask.current_app.name, mest_app.config.listen_port)\n"
    lines += "print(client.post('/predict', json={'x': 1}).json)\n"
    done = project.mest("shell", stdin=lines, PYTHONSTARTUP=str(project.path / "startup.py"), MEST_API_KEY="a")
    assert done.returncode == 0
    for text in ("{'y': 8} yes", "{'message': 'doubler is up'} doubler", "doubler 8000", "{'y': 2}"):
        assert text in done.stdout
    assert done.stderr.startswith(
        "doubler\n  mest_app, app, client: the service, its Flask application, a client to test it\n"
        "  doubler: model Doubler, loaded\n  client.post('/predict', json={'x': 1})\n"
    )


def test_mest_test_runs_pytest_with_its_arguments_and_exit_code(project):
    project.write(test_a="def test_one(): pass\ndef test_two(): assert 0\n")
    assert project.mest("test").returncode == 1
    done = project.mest("test", "-k", "one", "-v")
    assert done.returncode == 0 and "test_one PASSED" in done.stdout and "1 deselected" in done.stdout
    assert project.mest("test", "-k", "nothing").returncode == 5
    assert project.mest("test", "--nosuch").returncode == 4


EXAMPLES = APP + """
router.add_predict_route(doubler, {"x": {"type": "float", "required": True}}, url="/at/<x>", method="GET", example={"x": 3})

@router.route("/size/<name>", method="PUT")
@validate_params({"image": {"type": "binary", "required": True}, "n": {"type": "list"}}, example={"image": b"123", "n": [1, 2]})
def size(name, image, n=()):
    return {}

@router.route("/set/<any(a, b):k>")
@validate_params({"s": {}, "k": {}}, example={"s": {1}, "k": "a"})
def sets(k, s=()):
    return "never"

@router.route("/images")
@validate_params({"images": {"type": "list", "schema": {"type": "binary"}}}, example={"images": [b"1", b"22"]})
def images(images=()):
    return [len(image) for image in images]

@router.route("/length")
@validate_params({"image": {"type": "binary", "required": True}, "n": {"type": "list"}}, example={"image": b"123", "n": [1, 2]})
def length(image, n=()):
    return {"length": len(image), "n": n}, len(image) * 67
"""


def test_mest_test_first_sends_each_example(project):
    project.write(app=EXAMPLES)
    done = project.mest("test", MEST_API_KEY="a,b")
    assert done.returncode == 1, done.stdout
    lines = [line for line in done.stdout.splitlines() if re.match("GET|POST|PUT", line)]
    sent = [re.fullmatch(r"(\w+ \S+): (.*) in \d+\.\d ms(.*)", line).groups() for line in lines]
    assert sorted(sent) == [
        ("GET /at/3", "200", ""), ("POST /images", "200", ""), ("POST /length", "201", ""), ("POST /predict", "200", ""),
        ("POST /set/a", "not sent", " it cannot be sent: Object of type set is not JSON serializable"),
    ]
    assert "4 of 5 examples are answered" in done.stdout
    project.write(app=FIRST)
    done = project.mest("test")
    assert done.returncode == 0
    assert "0 of 0 examples are answered: give routes an example={…}, and it is sent here" in done.stdout
    project.write(app=EXAMPLES.replace('{"y":', 'x and {"y":').replace("return x and", "1 / 0; return"))
    project.write(test_it="def test_that(): pass\n")
    done = project.mest("test")
    assert done.returncode == 1 and "1 passed" in done.stdout
    assert re.search(r"^POST /predict: 500 in \S+ ms ZeroDivisionError: division by zero$", done.stdout, re.M)


def test_mest_test_says_why_the_application_cannot_be_tested_and_goes_on(project):
    project.write(app="import mest\n" + BROKEN, test_it="import sys\ndef test_that(): assert 'app' not in sys.modules\n")
    done = project.mest("test")
    assert done.returncode == 1 and "1 passed" in done.stdout
    assert "mest: app.py cannot be imported: ModuleNotFoundError" in done.stderr


def test_a_mest_named_after_a_service_has_a_router_and_loads_the_models_of_its_routes(capsys):
    mest_app = Mest("doubler")
    mest_app.router.add_predict_route(Typed())
    client = mest_app.app.test_client()
    assert client.get("/readyz").json["detail"] == "The model Typed is not loaded."
    mest_app.setup()
    assert client.get("/readyz").status_code == 200
    assert client.post("/predict", json={"x": 2}).json == [2, [], None]
    late = Typed()
    mest_app = Mest("late").setup()
    mest_app.router.add_predict_route(late)
    assert late.is_loaded and mest_app.models == [late]
    mest_app.router.add_predict_route(late, url="again")
    assert mest_app.models == [late]


class Typed(GenericModel):
    def infer(self, x: float, tags: list[str] = [], name: Optional[str] = None):
        return [x, tags, name]


def f(a: int, b: bool, c: bytes, d: dict, e: dict[str, float], f: list[list[int]], g: Literal["x", 1], h: "str | None", i: str = "j"):
    pass


def test_annotations_make_a_schema():
    sure = {"required": True}
    assert mest.schema_of(f) == {
        "a": {"type": "integer", **sure}, "b": {"type": "boolean", **sure}, "c": {"type": "binary", **sure},
        "d": {"type": "dict", **sure}, "e": {"type": "dict", "valuesrules": {"type": "number"}, **sure},
        "f": {"type": "list", "schema": {"type": "list", "schema": {"type": "integer"}}, **sure},
        "g": {"type": ["integer", "string"], "allowed": ["x", 1], **sure}, "h": {"type": "string", "nullable": True, **sure},
        "i": {"type": "string", "default": "j"},
    }
    assert mest.schema_of(Typed().infer)["name"] == {"type": "string", "nullable": True, "default": None}
    assert mest.schema_of(lambda *x, **y: x) == {}
    for wrong in (lambda x: x, lambda *, x: x):
        with pytest.raises(MestError, match="^x of .*, line .* has no annotation; it may be bool, int, .*, or give a schema$"):
            mest.schema_of(wrong)


@pytest.mark.parametrize("annotation", ["list[complex]", "int | str", "object", "list[int, str]", "Literal[None]", "nosuch"])
def test_an_annotation_that_stands_for_no_rules_is_refused(annotation):
    def function(x):
        pass

    function.__annotations__ = {"x": annotation}
    with pytest.raises(MestError, match="^x of .*, line .* has an unusable annotation, .*; it may be bool"):
        mest.schema_of(function)


def test_a_stage_before_infer_gives_the_schema(router):
    class Model(Typed):
        def pre_process(self, text: str):
            return [len(text)]

    router.add_predict_route(Model())
    client = client_of(router)
    assert client.post("/predict", json={"x": 3}).json["errors"] == {"text": ["required field"], "x": ["unknown field"]}
    with pytest.raises(MestError, match="has no schema, and no stage of the model tells of one"):
        router.add_predict_route(Batched(), url="/b")


# The project's files

README = (HERE / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_example_works(project):
    with project.serve("--app", str(HERE / "example_app.py"), "run", "gunicorn") as example:
        status, body, _ = example.ask("/predict", {"flower": [5.1, 3.5, 1.4, 0.2]})
        assert (status, json.loads(body)["species"]) == (200, "setosa")
        assert json.loads(example.ask("/predict", {"flower": ["a", 3.5, 1.4, 0.2]})[1])["errors"].keys() == {"flower"}
        assert example.ask("/species/setosa?decimals=1")[1] == b'{"weights":[-0.4,2.1,-4.3,-2.0,14.3]}\n'
        assert example.ask("/species/rose")[0] == 404 and example.ask("/ping")[0] == 200


def test_the_first_service_of_the_readme_and_of_the_module_serve(project):
    in_module = re.search(r"\n\n((?:    .*\n|\n)+?)\nThe path", mest.__doc__).group(1).replace("\n    ", "\n")
    url, header, body, answer = re.search(r"8000(\S+) -H '(.*)' -d '(.*)'  # (.*)", blocks("sh")[0]).groups()
    for source in (blocks("python")[0], in_module.replace("    from", "from", 1)):
        project.write(app=source)
        assert len(source.splitlines()) <= 12
        with project.serve("run", "dev") as server:
            sent = server.ask(url, body.encode(), headers=dict([header.split(": ")]))
            assert sent[:2] == (200, answer.encode() + b"\n")
            assert server.ask(url, {"x": "a"})[0] == server.ask(url, {})[0] == server.ask(url, {"x": 1, "y": 2})[0] == 422


def readme(number, **names):
    """What a block of the README's Python defines."""
    names = {**vars(mest), "json": json, "io": io, "flask": flask, "Path": Path, "pytest": pytest, **names, "__name__": "readme"}
    exec(compile(blocks("python")[number], "README.md", "exec", dont_inherit=True), names)
    return names


def test_the_other_code_of_the_readme_works(tmp_path, monkeypatch):
    (tmp_path / "_models").mkdir()
    (tmp_path / "_models" / "words.json").write_text('{"good": 2, "bad": -1}')
    monkeypatch.chdir(tmp_path)
    mest_app = make().setup()
    names = readme(3, **readme(1), mest_app=mest_app)
    client = mest_app.app.test_client()
    assert client.post("/sentiment", json={"text": "Good bad"}).json == {"sentiment": "good", "score": 1}
    assert client.get("/words/bad?default=3").json == {"score": -1} and client.get("/ping").status_code == 200
    readme(5, mest_app=mest_app)
    app = readme(6, Doubler=readme(0)["Doubler"])["app"]
    app.register_blueprint(names["router"].blueprint, url_prefix="/ml")
    client = app.test_client()
    assert client.post("/orders", json={"count": 2}).json == {"ordered": 2}
    assert client.post("/double", json={"x": 2}).json == {"y": 4}
    assert {client.get(url).status_code for url in ("/readyz", "/ml/docs", "/ml/words/good")} == {200}


FOUR = {"x": {"type": "list", "required": True, "schema": {"type": "float"}, "minlength": 4, "maxlength": 4}}


def predictions(model, path):
    mest_app, router = make(local_model_directory_path=str(path)), Router("v1")
    router.add_predict_route(model, FOUR)
    mest_app.setup().register_router("/", router)
    return mest_app.app.test_client().post("/predict", json={"x": [1.0, 2.0, 3.0, 4.0]}).json


def test_the_readmes_model_of_scikit_learn_works(tmp_path):
    pytest.importorskip("sklearn")
    import joblib
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression().fit([[0.0, 0, 0, 0], [1, 2, 3, 4]], [0, 1])
    joblib.dump(fitted, tmp_path / "flowers.joblib")
    assert predictions(readme(2, joblib=joblib)["Flowers"](), tmp_path)[1] > 0.5


def test_the_readmes_model_of_torch_works(tmp_path):
    torch = pytest.importorskip("torch")
    linear = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.ones_(linear.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(linear).save(str(tmp_path / "net.pt"))
        assert predictions(readme(2, torch=torch)["Net"](), tmp_path) == [10.0]


def test_the_readmes_model_of_onnx_works(tmp_path):
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    import numpy

    kind = onnx.TensorProto.FLOAT
    sides = [onnx.helper.make_tensor_value_info(name, kind, ["n", 4]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", sides[:1], sides[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "net.onnx"))
    model = readme(2, onnxruntime=onnxruntime, numpy=numpy)["Onnx"]()
    assert predictions(model, tmp_path) == [-1.0, -2.0, -3.0, -4.0]


def test_the_readmes_files_and_streams_work():
    Image, numpy = pytest.importorskip("PIL.Image"), pytest.importorskip("numpy")
    mest_app, router = make().setup(), Router("v1")
    mest_app.register_router("/", router)
    readme(4, Image=Image, numpy=numpy, router=router)
    picture = io.BytesIO()
    Image.new("L", (50, 50), 7).save(picture, "PNG")
    client = mest_app.app.test_client()
    answer = client.post("/picture", data={"image": (io.BytesIO(picture.getvalue()), "cat.png")})
    assert answer.json == {"brightness": 7.0}
    assert client.get("/count/3").text == "0\n1\n2\n"


def test_the_dockerfile_of_the_readme_serves_as_an_unprivileged_user(project):
    (lines,) = blocks("dockerfile")
    steps = [line.partition(" ")[::2] for line in lines.splitlines()]
    copied = {name for step, rest in steps if step == "COPY" for name in rest.split()[:-1]}
    assert copied == {"requirements.txt", "mest.py", "app.py", "_models"}
    assert ("USER", "10001") in steps and steps[0][1].endswith("-slim")
    shutil.copy(HERE / "mest.py", project.path / "mest.py")
    project.write(app=blocks("python")[0])
    ((_, command),) = [step for step in steps if step[0] == "CMD"]
    python, *command = json.loads(command)  # the exec form, so that signals arrive
    assert python == "python"
    with project.serve(command=command, PYTHONPATH="") as server:
        assert server.ask("/predict", {"x": 3})[1] == b'{"y":6}\n'


def yaml(text):
    """The data in a document of the part of YAML that the README needs."""
    lines = [re.sub(r"(^|\s)#.*", "", line).rstrip() for line in text.splitlines()]
    lines = [line for line in lines if line]

    def flow(tokens):
        token = tokens.pop(0)
        if token == "{":
            found = {}
            while tokens[0] != "}":
                key, colon = flow(tokens), tokens.pop(0)
                assert colon == ":"
                found[key] = flow(tokens)
                del tokens[: tokens[0] == ","]
        elif token == "[":
            found = []
            while tokens[0] != "]":
                found.append(flow(tokens))
                del tokens[: tokens[0] == ","]
        else:
            plain = int(token) if token.isdigit() else {"true": True, "false": False}.get(token, token)
            return token[1:-1] if token[0] == '"' else plain
        tokens.pop(0)
        return found

    def inline(text):
        return flow(re.findall(r'"[^"]*"|[][{},]|:(?= )|(?:[^][{},":\s]|:(?! ))+', text))

    def block(depth):
        found = None
        while lines and len(lines[0]) - len(lines[0].lstrip()) == depth:
            line = lines[0].strip()
            if line.startswith("- "):
                found = found or []
                if line[2:].startswith("{"):
                    lines.pop(0)
                    found.append(inline(line[2:]))
                else:
                    lines[0] = " " * (depth + 2) + line[2:]
                    found.append(block(depth + 2))
                continue
            lines.pop(0)
            if line.startswith("{"):
                return inline(line)
            key, _, value = line.partition(":")
            found = found or {}
            value = value.strip()
            found[key] = inline(value) if value else block(len(lines[0]) - len(lines[0].lstrip()))
        return found

    return block(0)


def test_the_manifests_of_the_readme_agree_with_the_code():
    deployment, service, scaler = documents = [*map(yaml, blocks("yaml")[0].split("---\n"))]
    with contextlib.suppress(ImportError):
        import yaml as library

        assert [*library.safe_load_all(blocks("yaml")[0])] == documents
    template = deployment["spec"]["template"]
    (container,) = template["spec"]["containers"]
    environ = {variable["name"]: variable.get("value", "key") for variable in container["env"]}
    config = MestConfig("doubler", environ=environ)
    assert all(name in {f"MEST_{field.upper()}" for field in MestConfig.FIELDS} for name in environ) and config.api_keys
    assert template["spec"]["terminationGracePeriodSeconds"] >= config.drain_seconds + config.graceful_timeout + 5
    (port,) = container["ports"]
    assert port == {"name": "http", "containerPort": config.listen_port}
    routes = {rule.rule for rule in make().app.url_map.iter_rules()}
    for kind, path in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
        assert container[kind]["httpGet"] == {"path": path, "port": "http"} and path in routes
    startup, readiness = container["startupProbe"], container["readinessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == config.startup_timeout
    assert readiness["periodSeconds"] * readiness["failureThreshold"] < config.drain_seconds
    resources = container["resources"]
    assert resources["limits"] == resources["requests"] and int(resources["limits"]["cpu"]) == config.workers
    assert container["securityContext"]["runAsNonRoot"] is True
    labels = template["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert service["spec"]["ports"] == [{"port": 80, "targetPort": "http"}]
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == (deployment["kind"], deployment["metadata"]["name"])
    assert [document["apiVersion"] for document in (deployment, service, scaler)] == ["apps/v1", "v1", "autoscaling/v2"]
    assert 1 < scaler["spec"]["minReplicas"] < scaler["spec"]["maxReplicas"]
    assert scaler["spec"]["metrics"][0]["resource"]["target"] == {"type": "Utilization", "averageUtilization": 70}


def test_the_queries_of_the_readme_are_of_metrics_that_there_are():
    named = set(re.findall(r"\bmest_[a-z_]+\b", README)) - {"mest_app"}
    suffixes = "", "_bucket"
    assert named and named <= {name + suffix for name in mest.Metrics.FAMILIES for suffix in suffixes}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 350


def test_the_configuration_table_of_the_readme_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| `?(.*?)`? ?\| (.*) \|$", README.split("## Configuration")[1], re.M)
    fields = {name: (str(default), text) for name, (default, _, text) in MestConfig.FIELDS.items()}
    assert {name: (default, text) for name, default, text in rows} == fields


def test_the_wheel_holds_the_module_and_nothing_else(tmp_path):
    for name in ("mest.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE", "test_mest.py", "example_app.py"):
        shutil.copy(HERE / name, tmp_path / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "wheel", tmp_path]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = archive.read(f"{info}/METADATA").decode()
        commands = archive.read(f"{info}/entry_points.txt").decode()
    assert [name for name in names if not name.startswith(info)] == ["mest.py"]
    assert info == f"mest-{mest.__version__}.dist-info" and "mest = mest:main" in commands
    needed = re.findall(r"^Requires-Dist: ([a-z]+)(?!.*extra)", metadata, re.M | re.I)
    assert sorted(needed) == ["cerberus", "flask", "gunicorn"]


def test_the_example_is_short():
    assert len((HERE / "example_app.py").read_text().splitlines()) <= 60
