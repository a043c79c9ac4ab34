"""Mest turns one model into a realtime REST service. This file is all of it.

A whole service, which `mest run dev` serves here and `mest run gunicorn` in production:

    from mest import GenericModel, Mest

    class Doubler(GenericModel):
        def init(self, directory_path):
            self.model = 2
        def infer(self, x: float):
            return {"y": self.model * x}

    mest_app = Mest("doubler")
    mest_app.router.add_predict_route(Doubler())

The path of a request, through the sections JSON, Parameters, Models and Routes:

    bytes -> decode -> parameters -> check -> model or handler -> result -> encode -> bytes

Any WSGI server can serve `mest_app.app`, a Flask application. `mest_app` itself is an ASGI
application, for gunicorn: its event loop (The ASGI edge) waits for clients and goes this path
itself where nothing but a model is at its end; all else it hands to Flask, in threads.

Flask routes and serves, Cerberus decides what a valid parameter is, gunicorn runs the processes,
and Mest is what stands between them. It is no model registry, feature store, API gateway or place
to train: it answers requests with one model, and what runs your containers does the rest.

Copy this file into your project, or `pip install` it. MIT License.
"""
from __future__ import annotations

import argparse
import asyncio
import base64
import code
import contextlib
import copy
import faulthandler
import functools
import gc
import hashlib
import hmac
import importlib.util
import inspect
import ipaddress
import itertools
import json
import logging
import math
import mmap
import operator
import os
import platform
import random
import re
import signal
import socket
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError  # its own before Python 3.11
from contextvars import Context, ContextVar, copy_context
from datetime import datetime, timezone
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FunctionType, ModuleType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin
from urllib.parse import parse_qs, unquote_to_bytes

import cerberus
import flask
from cerberus.errors import FORBIDDEN_VALUE, SEQUENCE_SCHEMA, UNALLOWED_VALUE
from flask import current_app, request
from flask.blueprints import BlueprintSetupState
from flask.json.provider import DefaultJSONProvider
from flask.sessions import SecureCookieSessionInterface
from flask.testing import FlaskClient
from werkzeug.exceptions import HTTPException, MethodNotAllowed
from werkzeug.routing import AnyConverter, Map, Rule, UUIDConverter
from werkzeug.routing.converters import NumberConverter
from werkzeug.serving import is_running_from_reloader, run_simple
from werkzeug.wsgi import get_input_stream

__version__ = "0.1.0"
__all__ = [
    "GenericModel", "Mest", "MestConfig", "MestError", "MestModel", "Problem", "Router",
    "validate_params",
]


# Errors


class MestError(Exception):
    """A mistake in the use of Mest. The message says what is wrong, where, and what to do."""


class Problem(MestError, HTTPException):
    """An answer that reports an error, as problem details (RFC 9457). A handler may raise it.

    Args:
        status: the HTTP status, such as 422.
        detail: what went wrong, for the client to read.
        errors: Cerberus's errors, by field.
        headers: further headers, such as {"Retry-After": "1"}.
        **members: further members of the answer, which are JSON.
    """

    def __init__(
        self, status: int, detail: str, errors: dict | None = None, headers: dict | None = None,
        **members: Any,
    ):
        is_status = isinstance(status, int) and 400 <= status < 600
        if not is_status or not isinstance(detail, str):
            given, needed = f"{status!r} and {detail!r}", "an integer from 400 to 599, and text"
            raise TypeError(f"Problem(status, detail) got {given}; needs {needed}")
        HTTPException.__init__(self, detail)
        self.code, self.headers = int(status), headers or {}
        self.errors, self.members = errors, members

    def get_body(self, environ: Any = None, scope: Any = None) -> str:
        body = {"type": "about:blank", "title": self.name, "status": self.code}
        body |= {"detail": self.description, "errors": self.errors, "request_id": request_id()}
        body |= self.members
        return json.dumps({name: value for name, value in body.items() if value is not None}) + "\n"

    def get_headers(self, environ: Any = None, scope: Any = None) -> list[tuple[str, str]]:
        return [("Content-Type", "application/problem+json"), *self.headers.items()]


FAILED = "The service failed. Its log says why, under this request_id."


def as_problem(error: BaseException, service: Any, asked: str) -> HTTPException:
    """Return the answer to any exception: the one place where errors become answers.

    What Werkzeug and `flask.abort` raise keeps its status and headers. All else is a defect of the
    service, which has a `logger` and an `app`: it is logged with its traceback and what was asked,
    and the client is told nothing but the request's id, unless the service `is_in_development` and
    the client is on this machine.
    """
    if not isinstance(error, HTTPException):
        service.logger.error("%s failed: %r", asked, error, exc_info=error)
        flask.got_request_exception.send(service.app, exception=error)
        if not service.is_in_development or not is_local_request():
            return Problem(500, FAILED)
        lines = "".join(own_traceback(error)).splitlines()
        return Problem(500, lines[-1], traceback=lines)
    if isinstance(error, Problem) or error.response is not None or (error.code or 0) < 400:
        return error
    headers = {name: value for name, value in error.get_headers() if name != "Content-Type"}
    return Problem(error.code, error.description, headers=headers)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach what listens at an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def is_local_request() -> bool:
    """Return whether the Flask request is from this machine, and not through a proxy on it."""
    proxied = {"Forwarded", "X-Forwarded-For", "X-Real-Ip", "Via"}
    host = re.sub(r":\d+$", "", request.host).strip("[]")
    return is_loopback(host) and not any(name in request.headers for name in proxied)


#: The id of the request that a task of an event loop, or a thread that works for it, is about.
REQUEST_ID: ContextVar[str | None] = ContextVar("mest.request_id", default=None)


def request_id() -> str | None:
    """Return the id of the request that this is about, if any."""
    if REQUEST_ID.get() or not flask.has_request_context():
        return REQUEST_ID.get()
    sent = request.environ.get("HTTP_X_REQUEST_ID", "")
    return request.environ.setdefault("mest.request_id", sane_id(sent))


#: Not os.urandom, which lets other threads run, and so costs as much as the rest of a request.
IDS = random.Random()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=IDS.seed)


def sane_id(sent: str) -> str:
    """Return what a client has sent as X-Request-Id if that is sane, or a new id."""
    sane = sent and re.fullmatch(r"[A-Za-z0-9._:/+=@-]{1,128}", sent)
    return sent if sane else f"{IDS.getrandbits(128):032x}"


def own_traceback(error: BaseException) -> list[str]:
    """Return the traceback of a failure in the user's own code, from where that begins."""
    trace = error.__traceback__
    ours = re.compile(rf"{re.escape(__name__)}$|importlib\b")
    while trace and ours.match(trace.tb_frame.f_globals["__name__"]):
        trace = trace.tb_next
    return traceback.format_exception(type(error), error, trace)


def report(error: MestError) -> str:
    """Return the message about a failure, below the traceback if the user's own code raised it."""
    lines = own_traceback(error.__cause__) if error.__cause__ else []
    return "".join([*lines, f"mest: {error}"])


# Configuration


def available_cpus(cgroups: str = "/sys/fs/cgroup") -> int:
    """Return how many CPUs this process may use: its container's quota, or its own CPU set."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quotas = [("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")]  # of v2 and v1
    for names in quotas:
        with contextlib.suppress(OSError, ValueError):  # it is not there, or "max"
            texts = [Path(cgroups, name).read_text().split() for name in names]
            quota, period = map(int, itertools.chain(*texts))
            cpus = min(cpus, max(1, quota // period)) if quota > 0 else cpus
    return cpus


#: What is allowed for most times: up to a day.
SECONDS = range(1, 86401)


class MestConfig:
    """The configuration of a service. `MEST_<FIELD>` in the environment beats what is given here.

    Args:
        service_name: names the logger, the documentation and the answers to pings.
        models_instances: models to load, GenericModels or others with `init(directory_path)`, in
            addition to those of predict routes.
        environ: where MEST_ variables are looked up; os.environ by default.
        **fields: any of MestConfig.FIELDS, with listen_port and local_model_directory_path.

    Raises:
        MestError: names the field, its value and what is allowed.
    """

    #: name: (default, what is allowed, what it is with its unit)
    FIELDS = {
        "listen_port": (8000, range(65536), "TCP port; 0 picks a free one"),
        "local_model_directory_path": ("_models", str, "directory given to each model's init"),
        "service_version": ("", str, "version of the service, shown in its documentation"),
        "listen_host": ("", str, "address; by default 127.0.0.1, and 0.0.0.0 under gunicorn"),
        "workers": (1, (range(1, 1025), "auto"), "processes of gunicorn; auto is one for each CPU"),
        "threads": (16, range(1, 1025), "handlers that run at once, in each process"),
        "max_connections": (1000, range(1, 10**6), "open connections, in each process"),
        "max_body_bytes": (2**24, range(1, 2**40), "bytes, the largest body of a request"),
        "max_queued_requests": (512, range(1, 10**6), "requests at a model, in each process"),
        "request_timeout": (60, SECONDS, "seconds that a request waits for the model"),
        "header_timeout": (10, SECONDS, "seconds that the headers of a request may take"),
        "request_body_timeout": (30, SECONDS, "seconds that the body of a request may take"),
        "startup_timeout": (600, SECONDS, "seconds that the models may take to load"),
        "liveness_timeout": (600, range(86401), "seconds a model may take at once; 0: for ever"),
        "drain_seconds": (5, range(3601), "seconds of service, after SIGTERM, as not ready"),
        "graceful_timeout": (30, range(1, 3601), "seconds, after that, for requests to finish"),
        "api_key": ("", str, "keys, one of which clients must send, with commas between them"),
        "api_key_file": ("", str, "file that has the keys instead, such as a mounted secret"),
        "protect_metrics": (False, bool, "whether /metrics needs a key, too"),
        "docs": (True, bool, "whether there are /docs and /openapi.json"),
        "access_log": (False, bool, "whether each request is logged"),
        "log_level": ("INFO", ("DEBUG", "INFO", "WARNING", "ERROR"), "least severity logged"),
        "log_format": ("auto", ("auto", "json", "text"), "auto is text on a terminal, else json"),
    }

    def __init__(
        self, service_name: str, listen_port: int = 8000, models_instances: Sequence[Any] = (),
        local_model_directory_path: str = "_models", *,
        environ: Mapping[str, str] = os.environ, **fields: Any,
    ):
        if not isinstance(service_name, str) or not re.fullmatch(r".*\S.*", service_name):
            raise MestError(f"service_name is {service_name!r}; it must be a line of text")
        for name in fields.keys() - self.FIELDS:
            close = get_close_matches(name, self.FIELDS, 1, 0.5)
            meant = f"did you mean {close[0]}?" if close else f"only {', '.join(self.FIELDS)}"
            raise MestError(f"MestConfig has no {name!r}; {meant}")
        if not isinstance(models_instances, (list, tuple)):
            raise MestError(f"models_instances is {models_instances!r}; it must be a list")
        for model in models_instances:
            if isinstance(model, type) or not callable(getattr(model, "init", None)):
                needed = "an instance of GenericModel, or another object with init(directory_path)"
                raise MestError(f"models_instances has {model!r}; it must be {needed}")
        self.service_name, self.models_instances = service_name, models_instances
        fields["listen_port"] = listen_port
        fields["local_model_directory_path"] = local_model_directory_path
        for name, (default, _, _) in self.FIELDS.items():
            variable = "MEST_" + name.upper()
            source = variable if environ.get(variable) else name
            value = environ.get(variable) or fields.get(name, default)
            setattr(self, name, self.convert(name, value, source))
        if self.workers == "auto":
            self.workers = available_cpus()
        #: one of them a request must have, if there are any
        self.api_keys = read_keys(environ, "MEST_API_KEY", "MEST_API_KEY_FILE")
        self.api_keys = self.api_keys or read_keys(fields, "api_key", "api_key_file")
        if self.protect_metrics and not self.api_keys:
            raise MestError("protect_metrics is true, but there is no api_key that protects them")
        self.api_key = ""  # so that nothing that shows a configuration shows keys
        #: what may be wrong
        self.doubts = list(self._doubts(environ))

    @classmethod
    def _doubts(cls, environ: Mapping[str, str]) -> Iterator[str]:
        """Yield a message about each variable that looks like a setting and is none."""
        known = ["MEST_APP", *(f"MEST_{name.upper()}" for name in cls.FIELDS)]
        for name in environ.keys() - {*known}:
            # Kubernetes sets such variables for a service that is named mest.
            foreign = re.match("MEST_(SERVICE|PORT)_", name) or environ[name].startswith("tcp://")
            if name.startswith("MEST_") and not foreign:
                close = get_close_matches(name, known, 1)
                meant = f"did you mean {close[0]}?" if close else "it has no effect"
                yield f"{name} in the environment is no setting; {meant}"

    @classmethod
    def convert(cls, name: str, value: Any, source: str) -> Any:
        """Return what a value, or the text for it, means for the field, or raise a MestError."""
        _, allowed, meaning = cls.FIELDS[name]
        words = []
        for option in allowed if isinstance(allowed, tuple) else (allowed,):
            if isinstance(option, range):
                if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
                    value = int(value)
                if type(value) is int and value in option:
                    return value
                words.append(f"an integer from {option[0]} to {option[-1]}")
            elif option is bool:
                switch = {"1": True, "true": True, "0": False, "false": False}
                if (text := str(value).lower()) in switch:
                    return switch[text]
                words.append("true or false")
            elif option is str and isinstance(value, (str, Path)):
                return value
            elif str(value).lower() == str(option).lower():
                return option
            else:
                words.append("text" if option is str else option)
        shown = "unusable" if name == "api_key" else repr(value)
        raise MestError(f"{source} is {shown}; it must be {' or '.join(words)} ({meaning})")


def read_keys(given: Mapping[str, Any], name: str, file_name: str) -> list[bytes]:
    """Return the API keys that are given under a name, or in a file that is.

    Raises:
        MestError: there is no key where there should be: that must not mean that none is needed.
    """
    names = {name, file_name} & given.keys()
    if len(names) > 1:
        raise MestError(f"{' and '.join(sorted(names))} are both given; give one of them")
    for source in names:
        value = given[source]
        try:
            text = str(value) if source == name else Path(value).read_text("latin-1")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no path"
            raise MestError(f"{source} names a file that cannot be read: {reason}") from None
        keys = [key.strip(" \t\r\n") for key in text.split(",")]
        if not all(re.fullmatch("[!-~]+", key) for key in keys):
            needed = "keys of visible ASCII characters, with commas between them"
            raise MestError(f"{source} has an empty or unusable key; it must have {needed}")
        return [key.encode() for key in keys]
    return []


# Logging

#: Characters that end lines or drive terminals, and what is written for them: nobody's input may
#: forge a line.
CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}


class LogHandler(logging.StreamHandler):
    """Writes each record to stdout: as a JSON object in one line, or as text for people.

    The traceback is a member of the JSON object; in text its lines follow, indented.
    """

    def __init__(self, log_format: str):
        logging.Handler.__init__(self)
        self.log_format = log_format

    @property
    def stream(self) -> Any:
        return sys.stdout  # looked up each time, since test runners and notebooks exchange it

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": at, "level": record.levelname, "logger": record.name}
        if request_id():
            line["request_id"] = request_id()
        try:
            line["message"] = record.getMessage()
        except Exception as error:  # its arguments do not fit, or have no text
            line["message"] = f"unreadable record of {record.pathname}:{record.lineno}: {error!r}"
        line |= getattr(record, "fields", {})
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        if self.log_format == "json" or self.log_format == "auto" and not sys.stdout.isatty():
            return json.dumps({**line, "traceback": trace} if trace else line)
        lines = [" ".join(map(str, line.values())), *trace.splitlines()]
        text = "\n    ".join(text.translate(CONTROLS) for text in lines)
        encoding = sys.stdout.encoding or "utf-8"
        return text.encode(encoding, "backslashreplace").decode(encoding)


def set_up_logging(config: MestConfig) -> logging.Logger:
    """Return `logging.getLogger(service_name)` with its level and one handler, which are set anew.

    It does not propagate, so that a line is written once whatever else the process logs.
    """
    logger = logging.getLogger(config.service_name)
    others = [handler for handler in logger.handlers if not isinstance(handler, LogHandler)]
    logger.handlers = [*others, LogHandler(config.log_format)]
    logger.propagate = False
    logger.setLevel(config.log_level)
    return logger


# JSON

#: Deeper documents serve nobody, and exhaust the stack of whatever handles them next.
MAX_DEPTH = 100


def _refuse_constant(name: str) -> None:
    raise ArithmeticError(f"{name} has no form in JSON")


def _plain(value: Any) -> Any:
    for method in ("tolist", "item"):
        if hasattr(value, method):
            return getattr(value, method)()
    try:
        return DefaultJSONProvider.default(value)
    except TypeError:
        kind, cure = type(value).__name__, "return a dictionary, list, number, text or array"
        raise TypeError(f"a {kind} in the result has no form in JSON; {cure}") from None


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
ENCODER = json.JSONEncoder(
    default=_plain, allow_nan=False, ensure_ascii=False, separators=(",", ":")
)


def decode_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object (RFC 8259) in a body, which must be UTF-8 and free of NaN.

    Raises:
        Problem: 400, or 422 where it is JSON but no object, saying what is wrong.
    """
    if not body.strip():
        raise Problem(400, "The body is empty; send a JSON object with the parameters.")
    try:
        text = body.decode()
        value = DECODER.decode(text)
        if "\\" in text and "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails on a lone surrogate
    except RecursionError:
        raise Problem(400, f"The body is nested deeper than {MAX_DEPTH} levels.") from None
    except (ValueError, ArithmeticError) as error:
        raise Problem(400, f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise Problem(422, "The body is JSON, but no object; send an object with the parameters.")
    return value


def are_finite(numbers: Iterable) -> bool:
    """Return whether all numbers can be floats that are neither infinite nor NaN."""
    try:
        return all(map(math.isfinite, numbers))
    except OverflowError:
        return False


def fault_of(value: Any) -> str | None:
    """Return why a decoded value is unfit for use, its depth or a number not finite, or None."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        types = set(map(type, level))
        if not are_finite([item for item in level if type(item) in (int, float)]):
            return "contains a number that is not finite, or too large for a float"
        if not types & {dict, list}:
            return None
        lists = (item for item in level if type(item) is list)
        dicts = (item for item in level if type(item) is dict)
        level = list(itertools.chain(*lists, *map(dict.values, dicts)))
    return f"is nested deeper than {MAX_DEPTH} levels"


def encode(result: Any) -> tuple[bytes, str]:
    """Return a result as the body of an answer and its content type.

    Bytes are sent as they are, and text as text, unless it is a JSON object or array. All else is
    JSON, with arrays (of numpy, torch, pandas, …) as their `.tolist()` or `.item()`.

    Raises:
        ArithmeticError: the result contains NaN or infinity.
        TypeError: something in it has no JSON form.
    """
    if isinstance(result, (bytes, bytearray)):
        return bytes(result), "application/octet-stream"
    if isinstance(result, str):
        kind = "application/json" if _is_json(result) else "text/plain; charset=utf-8"
        return result.encode(), kind
    try:
        try:
            text = ENCODER.encode(result)
        except TypeError:  # perhaps for its keys, which the encoder does not convert
            text = ENCODER.encode(_with_plain_keys(result))
    except ValueError as error:
        raise ArithmeticError(f"{error}; NaN and infinity have no form in JSON") from None
    return text.encode() + b"\n", "application/json"


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    if "NaN" in text or "Infinity" in text:
        DECODER.decode(text)  # raises if they stand outside strings
    return True


def _with_plain_keys(value: Any) -> Any:
    if isinstance(value, dict):
        plain = (str, int, float, type(None))
        keys = [key if isinstance(key, plain) else _plain(key) for key in value]
        return dict(zip(keys, map(_with_plain_keys, value.values())))
    return list(map(_with_plain_keys, value)) if isinstance(value, (list, tuple)) else value


# Parameters

#: Cerberus's bookkeeping is quadratic in its errors, and nobody reads more.
MAX_ERRORS = 20
#: Fields of a form. More are a list, which belongs in JSON.
MAX_FIELDS = 1000
#: Methods of requests whose parameters are in the body, as a rule.
BODY_METHODS = {"POST", "PUT", "PATCH"}
#: Rules that Cerberus tries on a document as it is, without normalizing it.
LOGIC = {"allof", "anyof", "noneof", "oneof"}
#: What each type of a JSON value may stand for in a schema.
TYPES_OF_JSON = {int: {"integer", "number", "float"}, float: {"number", "float"}, bool: {"boolean"}}


@functools.lru_cache(64)
def media_type_of(content_type: str) -> tuple[str, bool]:
    """Return the media type that a Content-Type names, and whether that is JSON."""
    media_type = content_type.partition(";")[0].strip().lower()
    return media_type, bool(re.fullmatch(r"application/(.+\+)?json", media_type))


def decode_body(method: str, content_type: str, coding: str, body: bytes) -> dict | None:
    """Return the parameters in a body, or None where they are a form, which is left to Werkzeug.

    Raises:
        Problem: 400, 413, 415 or 422, saying what to send instead.
    """
    media_type, is_json = media_type_of(content_type)
    if not body and not (is_json and method in BODY_METHODS):
        return {}
    if coding not in ("", "identity"):
        raise Problem(415, f"The body is encoded with {coding}; send it uncompressed.")
    if is_json:
        return decode_object(body)
    if media_type == "application/x-www-form-urlencoded" and body.lstrip().startswith(b"{"):
        cure = "send it with the header Content-Type: application/json"
        raise Problem(415, f"The body looks like JSON and is declared to be a form; {cure}.")
    if media_type == "application/x-www-form-urlencoded" and body.count(b"&") >= MAX_FIELDS:
        raise Problem(413, f"There are more than {MAX_FIELDS} fields; send JSON instead.")
    if media_type in ("application/x-www-form-urlencoded", "multipart/form-data"):
        return None
    sent = f"of type {media_type}" if media_type else "without a Content-Type"
    raise Problem(415, f"The body is {sent}; send a JSON object as application/json, or a form.")


def convert_text(text: Any, rules: Any) -> Any:
    """Return text from a query or form as the type that Cerberus's rules ask for.

    What does not convert stays text, for Cerberus to refuse, and so does all where text is allowed.
    """
    types = types_of(rules)
    if not isinstance(text, str) or "string" in types:
        return text
    try:
        value = DECODER.decode(text.lower())
    except (ValueError, RecursionError):
        return text
    fits = TYPES_OF_JSON.get(type(value), set()).intersection(types) and are_finite([value])
    return value if fits else text


def resolved(rules: Any) -> Mapping:
    """Return a set of rules, which a schema may give by its name in Cerberus's registry, or not."""
    return (cerberus.rules_set_registry.get(rules) if isinstance(rules, str) else rules) or {}


def as_list(value: Any) -> list:
    """Return what may be given as one or as several as a list."""
    return [*value] if isinstance(value, (list, tuple, set, frozenset, dict)) else [value]


def types_of(rules: Any) -> Sequence[str]:
    """Return the types that a set of rules allows."""
    types = resolved(rules).get("type", ())
    return (types,) if isinstance(types, str) else types


class Validator(cerberus.Validator):
    """Cerberus's validator for documents from strangers. It is not thread-safe: one a document."""

    _valid_schemas: set = set()  # Cerberus's own would hold schemas that passed without our checks

    def validate(self, document: Any, *args: Any, **kwargs: Any) -> bool:
        return super().validate(self._trimmed(document), *args, **kwargs)

    __call__ = validate

    def normalized(self, document: Any, *args: Any, **kwargs: Any) -> Any:
        return super().normalized(self._trimmed(document), *args, **kwargs)

    def _trimmed(self, document: Any) -> Any:
        """Return the document with no more unknown fields than are reported."""
        if self.allow_unknown or not isinstance(self.schema, Mapping):
            return document
        surplus = {*[*document.keys() - self.schema.keys()][MAX_ERRORS:]}
        return {k: v for k, v in document.items() if k not in surplus} if surplus else document

    def _check_of(self, rules: Any) -> Check:
        """Return the check of a list of items with such rules, which all requests share."""
        checks = self._config.setdefault("checks", {})
        flags = self.allow_unknown, self.require_all
        key = id(rules), *(flag if isinstance(flag, bool) else None for flag in flags)
        if key not in checks:  # kept with the rules, whose id no others can have then
            items = {"items": {"type": "list", "schema": rules}}
            checks[key] = rules, Check(items, *flags)
        return checks[key][1]

    def _doubtful(self, check: Check, items: list) -> Iterator[tuple[int, Any]]:
        """Yield the items, after their indexes, that their check is not sure of."""
        for start in range(0, len(items), 1000):
            part = items[start : start + 1000]
            if check({"items": part}) is None:
                for index, item in enumerate(part, start):
                    if check({"items": [item]}) is None:
                        yield index, item

    def _validate_schema(self, schema: Any, field: str, value: Any) -> None:
        """{'type': ['dict', 'string'],
        'anyof': [{'check_with': 'schema'}, {'check_with': 'bulk_schema'}]}"""  # as Cerberus's own
        check = self._check_of(schema) if isinstance(value, list) else None
        if not check or not check.function or check.fills and LOGIC.intersection(self.schema_path):
            return super()._validate_schema(schema, field, value)
        doubtful, found = self._doubtful(check, value), 0
        while found < MAX_ERRORS and (items := dict(itertools.islice(doubtful, MAX_ERRORS))):
            rules = dict.fromkeys(items, schema)
            crumbs = {"document_crumb": field, "schema_crumb": (field, "schema")}
            within = self._get_child_validator(**crumbs, schema=rules)
            if within(items, update=self.update, normalize=check.fills):
                for index, item in within.document.items():
                    value[index] = item
            else:
                self._drop_nodes_from_errorpaths(within._errors, [], [2])
                self._error(field, SEQUENCE_SCHEMA, within._errors)
                found += len(within._errors)

    def _BareValidator__normalize_sequence_per_schema(self, field: str, *args: Any) -> None:
        *_, schema = args  # where there is a check, it fills the defaults in, while it validates
        if not self._check_of(schema[field]["schema"]).function:
            super()._BareValidator__normalize_sequence_per_schema(field, *args)

    def _error(self, *args: Any) -> None:
        if len(self._errors) >= MAX_ERRORS:
            return  # the verdict stands
        for error in args[0] if len(args) == 1 else ():
            if error.code not in (UNALLOWED_VALUE.code, FORBIDDEN_VALUE.code):
                error.value = None  # the message does without it, and copies of it would be dear
            if error.info and type(error.info[0]) is tuple:  # the unallowed values
                error.info = (error.info[0][:MAX_ERRORS],)
        super()._error(*args)

    def _normalize_default(self, mapping: dict, schema: Mapping, field: str) -> None:
        """{'nullable': True}"""  # for Cerberus: what a default may be
        mapping[field] = copy.deepcopy(schema[field]["default"])  # a handler may change it


def _check_regex(rule: str, pattern: Any, error: Callable) -> None:
    try:
        re.compile(pattern)
    except re.error as reason:
        error(rule, f"{pattern!r} is no regular expression: {reason}")


def _check_default(rule: str, default: Any, error: Callable) -> None:
    rules = error.__self__.document.items()  # those that the default stands among
    others = ("default", "readonly", "rename", "rename_handler", "dependencies", "excludes")
    validator = Validator({"it": {rule: value for rule, value in rules if rule not in others}})
    if not validator.validate({"it": default}) or fault_of(default):
        error(rule, f"the rules refuse {default!r}: {validator.errors.get('it') or 'not finite'}")


def _check_schema(rule: str, schema: Any, error: Callable) -> None:
    types = types_of(error.__self__.document)
    fields = isinstance(schema, dict) and all(isinstance(rules, dict) for rules in schema.values())
    if types == ("list",) and fields and schema.keys() - Validator.rules.keys():
        error(rule, "for a list it must be the rules of an item: {'type': 'dict', 'schema': …}")
    if types == ("dict",) and not fields and isinstance(schema, dict):
        error(rule, "for a dict it must be fields with their rules; valuesrules are for any field")


# What Cerberus would find out only when a document meets the rule.
Validator.rules["regex"]["check_with"] = _check_regex
Validator.rules["default"]["check_with"] = _check_default
Validator.rules["schema"]["check_with"] = _check_schema


#: What Cerberus's types are in JSON and in forms.
NUMBERS, BINARY = {int, float, bool}, {bytes, bytearray}
TYPES = {
    "binary": BINARY, "boolean": {bool}, "dict": {dict}, "float": NUMBERS, "integer": {int, bool},
    "list": {list}, "number": {int, float}, "string": {str},
}
#: What a value {v} is if a rule with the constraint {c} refuses it. Where many are checked at once
#: they are {each}, from {low} to {high}.
REFUSED = {
    "empty": "not {v}", "minlength": "len({v}) < {c}", "maxlength": "len({v}) > {c}",
    "regex": "not {c}.match({v})", "min": "{low} < {c}", "max": "{high} > {c}",
    "allowed": "not {c}.issuperset({each})", "forbidden": "not {c}.isdisjoint({each})",
}
SIZES, SETS, RANGE = {"empty", "minlength", "maxlength"}, {"allowed", "forbidden"}, {"min", "max"}
NEUTRAL = {"type", "required", "nullable", "default", "meta"}
#: The other rules that a check can be written for, by the types of what they are about.
CHECKED = [
    ({dict}, SIZES | {"keysrules", "valuesrules"}), ({list}, SIZES | SETS | {"schema", "items"}),
    ({str}, SIZES | SETS | RANGE | {"regex"}), (NUMBERS, SETS | RANGE), (BINARY, SIZES),
    (NUMBERS | {str}, SETS),
]


class Uncheckable(Exception):
    """A schema that is left to Cerberus."""


class Check:
    """A schema as a Python function of a document, made of built-ins that run in C.

    It returns the normalized document, or None where it is not sure that Cerberus would accept it.
    The methods write its statements, indented so deep, about what is in a variable. They hand down
    what Cerberus does: whether unknown fields are allowed, and all known ones required.
    """

    def __init__(self, schema: Mapping, unknown: Any = False, required: Any = False):
        self.lines = ["def check(document):", " defaults = []"]
        #: Whether it may fill defaults into the document.
        self.fills = False
        self.names = {"deepcopy": copy.deepcopy, "fault_of": fault_of, "isfinite": math.isfinite}
        self.names |= {"MISSING": object(), "check": None}
        try:
            self.fields(1, "document", schema, unknown, required)
            self.write(1, "for place, key, value in defaults: place[key] = deepcopy(value)")
            self.write(1, "return document")
            exec("\n".join(self.lines), self.names)
        except (Uncheckable, TypeError, SyntaxError):  # SyntaxError: nested too deep for Python
            self.names["check"] = None
        self.function = self.names["check"]

    def __call__(self, document: dict) -> dict | None:
        try:
            return self.function and self.function(document)
        except (TypeError, OverflowError):  # of a built-in
            return None

    def name(self, constant: Any = None) -> str:
        """Return a new name, for a constant or else for a variable."""
        self.names[name := f"_{len(self.names)}"] = constant
        return name

    def write(self, depth: int, line: str) -> None:
        """Add a statement, so deep."""
        self.lines.append(" " * depth + line)

    def refuse(self, depth: int, rules: Mapping, v: str, low: str, high: str, each: str) -> None:
        """Write about the rules that REFUSED has."""
        for rule in [rule for rule in REFUSED if rule in rules]:
            c = re.compile(rules[rule].removesuffix("$") + "$") if rule == "regex" else rules[rule]
            c = self.name(frozenset(c) if rule in SETS else c)
            condition = REFUSED[rule].format(c=c, v=v, low=low, high=high, each=each)
            self.write(depth, f"if {condition}: return")

    def fields(self, depth: int, place: str, schema: Any, unknown: Any, required: Any) -> None:
        """Write about the fields of a dictionary."""
        if not isinstance(schema, Mapping) or not isinstance(unknown, bool):
            raise Uncheckable
        known = self.name(frozenset(schema))
        others = f"fault_of([{place}[key] for key in {place}.keys() - {known}])"
        condition = others if unknown else f"not {known}.issuperset({place})"
        self.write(depth, f"if {condition}: return")
        for field, rules in schema.items():
            self.types(rules)  # no set of rules that can be looked into: Uncheckable
            key, value = self.name(field), self.name()
            self.write(depth, f"{value} = {place}.get({key}, MISSING)")
            if "default" in rules:
                if (unknown or required) and isinstance(rules["default"], (dict, list)):
                    raise Uncheckable  # what it has within would be checked otherwise than alone
                filled = Validator({field: {**rules, "required": False}}).normalized({})[field]
                filled = f"defaults.append(({place}, {key}, {self.name(filled)}))"
                self.write(depth, f"if {value} is MISSING: {filled}")
            elif rules.get("required", required) is True:
                self.write(depth, f"if {value} is MISSING: return")
            self.write(depth, f"if {value} is not MISSING:")
            self.value(depth + 1, value, rules, unknown, required)

    def types(self, rules: Any) -> tuple[set, set]:
        """Return the types that a set of rules allows, and its rules that are not neutral."""
        if not isinstance(rules, Mapping) or not TYPES.keys() >= set(types_of(rules)):
            raise Uncheckable
        others = rules.keys() - NEUTRAL
        self.fills |= "default" in rules
        kinds = types_of(rules) or (("float", "string") if others else TYPES)
        return set().union(*map(TYPES.get, kinds)), others

    def bounded(self, rules: Mapping) -> bool:
        """Return whether what is within the limits is finite."""
        return are_finite(rules.get(rule, math.inf) for rule in RANGE)

    def value(self, depth: int, value: str, rules: Any, *inherited: Any) -> None:
        """Write about one value."""
        types, others = self.types(rules)
        if rules.get("nullable"):
            self.write(depth, f"if {value} is not None:")
            depth += 1
        self.write(depth, f"if type({value}) not in {self.name(types)}: return")
        if types == {dict} and "schema" in others <= {"schema", "allow_unknown", "require_all"}:
            own = zip(("allow_unknown", "require_all"), inherited)
            self.fields(depth, value, rules["schema"], *(rules.get(*pair) for pair in own))
            return
        checked = next((checked for kinds, checked in CHECKED if types <= kinds), set())
        if others - checked or {"schema", "items"} <= others:
            raise Uncheckable
        self.refuse(depth, rules, value, value, value, value if types == {list} else f"({value},)")
        if types <= NUMBERS:
            if types & {int, float} and not self.bounded(rules):
                self.write(depth, f"if not isfinite({value}): return")
        elif types & {dict, list, *NUMBERS} and not others & {"items", "schema", "valuesrules"}:
            self.write(depth, f"if fault_of({value}): return")
        if "items" in others:
            self.write(depth, f"if len({value}) != {len(rules['items'])}: return")
        for index, item_rules in enumerate(rules.get("items", ())):
            self.write(depth, f"{(item := self.name())} = {value}[{index}]")
            self.value(depth, item, item_rules, *inherited)
        parts = {"schema": value, "keysrules": f"[*{value}]", "valuesrules": f"[*{value}.values()]"}
        for rule in others & parts.keys():
            self.write(depth, f"{(items := self.name())} = {parts[rule]}")
            self.each(depth, items, rules[rule], *inherited)

    def each(self, depth: int, items: str, rules: Any, *inherited: Any) -> None:
        """Write about every item of a list."""
        types, others = self.types(rules)
        plain = others <= SETS | RANGE and (types <= NUMBERS or types == {str})
        if not plain or rules.get("nullable"):
            self.write(depth, f"for {(item := self.name())} in {items}:")
            self.value(depth + 1, item, rules, *inherited)
            return
        self.write(depth, f"if {items}:")
        finite = types <= NUMBERS and not self.bounded(rules)
        if finite:
            self.write(depth + 1, f"if not isfinite(sum({items})): return")
        if not finite or types < NUMBERS:  # a sum has shown that they are numbers
            kinds = f"{self.name(types)}.issuperset(map(type, {items}))"
            self.write(depth + 1, f"if not {kinds}: return")
        self.refuse(depth + 1, rules, items, f"min({items})", f"max({items})", items)


class Parameters:
    """The parameters of an endpoint: a Cerberus schema that is known to be sound.

    Args:
        schema: the fields and their rules, https://docs.python-cerberus.org/validation-rules.html
        example: parameters that the schema accepts, or None.
        owner: whose parameters they are, for the messages about mistakes.

    Raises:
        MestError: the schema is wrong, or refuses a default of its own, or the example.
    """

    def __init__(self, schema: dict, example: dict | None, owner: str):
        rule_sets = schema.values() if isinstance(schema, dict) else [None]
        if not all(isinstance(rules, (dict, str)) for rules in rule_sets):
            form = "{'field': {'type': 'float', 'required': True}}"
            form += "; is it the url? write url=…" if isinstance(schema, str) else ""
            raise MestError(f"{owner}: the schema is {schema!r}; it must be like {form}")
        try:
            self.schema = Validator(_copied(schema)).schema
        except Exception as error:  # Cerberus stumbles over some mistakes
            raise MestError(f"{owner}: the schema is wrong: {error}{_meant(str(error))}") from None
        self.surely = Check(self.schema)
        self._checks: dict = {}  # of lists within, as they are needed
        if not isinstance(example, (dict, type(None))):
            raise MestError(f"{owner}: the example is {example!r}; it must be a dictionary")
        self.example = example
        try:
            self.check(copy.deepcopy(example)) if example is not None else None
        except Problem as problem:
            refused = problem.errors or problem.description
            raise MestError(f"{owner}: the schema refuses its example: {refused}") from None

    def from_text(self, fields: dict[str, list]) -> dict[str, Any]:
        """Return the fields of a query or form, converted from text to what their rules ask for."""
        document = {}
        for name, values in fields.items():
            rules = resolved(self.schema.get(name))
            if "list" in types_of(rules):
                rest = itertools.repeat(rules.get("schema"))
                items = itertools.chain(rules.get("items", ()), rest)
                document[name] = list(map(convert_text, values, items))
            else:
                document[name] = convert_text(values[0], rules) if len(values) == 1 else values
        return document

    def document(self, fields: dict[str, list], values: dict, variables: dict) -> dict[str, Any]:
        """Return what is to be checked: query or form, over that JSON, over that the path.

        Of the variables of the path those that the schema names, which are taken out of them.
        """
        if not fields and not variables:
            return values
        known = {name: [variables.pop(name)] for name in variables.keys() & self.schema.keys()}
        return self.from_text(fields) | values | self.from_text(known)

    def check(self, document: dict[str, Any]) -> dict[str, Any]:
        """Return the document as Cerberus normalizes it: with defaults, coerced, renamed.

        Raises:
            Problem: 422 with Cerberus's errors, or 400 for numbers and depths that nobody can use.
        """
        if (checked := self.surely(document)) is not None:
            return checked
        if fault := fault_of(document):
            raise Problem(400, f"The body {fault}.")
        validator = Validator(self.schema, checks=self._checks)
        try:
            valid = validator.validate(document)
        except Exception as error:
            *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
            if not innermost.f_globals["__name__"].startswith("cerberus"):
                raise  # a function in the schema: a defect of the service
            raise Problem(422, f"The parameters cannot be checked: {error}.", errors={}) from None
        if not valid:
            listed = _at_most(validator.errors, [MAX_ERRORS])
            raise Problem(422, "The parameters are not valid.", errors=listed)
        if fault := fault_of(validator.document):  # coercion may have made it
            raise Problem(422, f"A parameter {fault}.", errors={})
        return validator.document


#: What Python's types are called in Cerberus's schemas.
PYTHON_TYPES = {
    bool: "boolean", bytes: "binary", dict: "dict", float: "number", int: "integer", list: "list",
    str: "string",
}


ANNOTATIONS = "bool, int, float, str, bytes, list[…], dict[str, …], Literal[…] or … | None"


def rules_of(annotation: Any) -> dict[str, Any]:
    """Return the rules that an annotation stands for, or raise a TypeError if it is for none."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in PYTHON_TYPES:
        return {"type": PYTHON_TYPES[annotation]}
    if origin is Literal:
        values = [value for value in arguments if value is not None]
        if not values:
            raise TypeError(annotation)
        rules = {"type": sorted({PYTHON_TYPES[type(value)] for value in values}), "allowed": values}
        return {**rules, "nullable": True} if len(values) < len(arguments) else rules
    if origin is list:
        return {"type": "list", "schema": rules_of(*arguments)}
    if origin is dict:
        return {"type": "dict", "valuesrules": rules_of(arguments[1])}
    if origin in (Union, UnionType) and type(None) in arguments:
        (other,) = set(arguments) - {type(None)}
        return {**rules_of(other), "nullable": True}
    raise TypeError(f"the annotation {annotation} stands for no rules")


def name_of(function: Callable) -> str:
    """Return the name of a function for messages, with where it is, if that can be known."""
    name = getattr(function, "__qualname__", None) or repr(function)
    source = getattr(inspect.unwrap(function), "__code__", None)
    where = f" in {os.path.basename(source.co_filename)}" if source else ""
    return f"{name}(){where}, line {source.co_firstlineno}" if source else name


def named_arguments(function: Callable) -> dict[str, inspect.Parameter] | None:
    """Return a function's arguments without *args and **kwargs, or None if it has only these."""
    arguments = inspect.signature(function).parameters
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    named = {name: own for name, own in arguments.items() if own.kind not in variadic}
    return named if named or not arguments else None


def schema_of(function: Callable) -> dict[str, dict]:
    """Return the schema that a function's arguments and their annotations stand for.

    Raises:
        MestError: an argument has no annotation, or none of these: bool, int, float, str, bytes,
            list[…], dict[str, …], Literal[…], and any of them or None.
    """
    names, schema = getattr(inspect.unwrap(function), "__globals__", {}), {}
    for name, argument in (named_arguments(function) or {}).items():
        annotation = argument.annotation
        try:
            if isinstance(annotation, str):
                annotation = eval(annotation, names)
            schema[name] = rules_of(annotation)
        except Exception:  # annotations may be anything
            none = annotation is argument.empty
            fault = "has no annotation" if none else f"has an unusable annotation, {annotation}"
            cure = f"it may be {ANNOTATIONS}, or give a schema"
            raise MestError(f"{name} of {name_of(function)} {fault}; {cure}") from None
        if argument.default is argument.empty:
            schema[name]["required"] = True
        else:
            schema[name]["default"] = argument.default
            schema[name] |= {"nullable": True} if argument.default is None else {}
    return schema


def sure_fields(schema: Mapping, variables: set[str]) -> set[str]:
    """Return the fields that a handler of checked parameters is given in any case."""
    excluded = {other for own in schema.values() for other in as_list(own.get("excludes", []))}
    sure = {
        field for field, own in schema.items()
        if field in variables or own.keys() & {"default", "default_setter"}
        or own.get("required") and "excludes" not in own and field not in excluded
    }
    fields = [*sure]
    for field in fields:  # they would be refused without those that they depend on
        others = {*as_list(schema[field].get("dependencies", []))} & schema.keys() - sure
        sure |= others
        fields += others
    return sure


def check_fit(function: Callable, schema: Mapping, variables: set[str]) -> None:
    """Raise a MestError unless a function can take the fields of a schema and an url's variables.

    Otherwise a request would find it out, and get an answer with the status 500.
    """
    try:
        arguments = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # it is built in
        return
    rules = {field: resolved(own) for field, own in schema.items()}
    if any("rename_handler" in own for own in rules.values()):
        return
    certain = sure_fields(rules, variables)
    sure = {rules[field].get("rename", field) for field in certain}
    names = {
        own.get("rename", field) for field, own in rules.items()
        if not own.get("readonly") or field in certain
    }
    given = names | variables - rules.keys()
    taken = {a.name for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)}
    needed = {a.name for a in arguments if a.name in taken and a.default is a.empty}
    takes_any, fault = any(a.kind is a.VAR_KEYWORD for a in arguments), ""
    for name in sorted(given - taken if not takes_any else ()):
        place = "schema" if name in names else "url"
        fault = f"does not take {name!r}, which is in the {place}; add it to the arguments"
    for name in sorted(needed & given - sure - variables):
        fault = f"needs {name!r}, which requests may lack; make it required, or give it a default"
    for name in sorted(needed - given):
        cure = "add it to one of them" if schema else "is @validate_params missing below the route?"
        fault = f"takes {name!r}, which is neither in the schema nor in the url; {cure}"
    if fault:
        raise MestError(f"{name_of(function)}, {fault}")


def _meant(error: str) -> str:
    """Return what a misspelt rule or type in Cerberus's error about a schema may have meant."""
    wrong = re.search(r"'(\w+)': \['unknown rule'\]|Unsupported types: (\w+)", error)
    known = (Validator.rules, Validator.types_mapping)[bool(wrong and wrong[2])]
    close = get_close_matches(wrong[1] or wrong[2], known) if wrong else []
    manual = "see https://docs.python-cerberus.org/validation-rules.html"
    return f"; did you mean {close[0]!r}?" if close else f"; {manual}"


def _copied(schema: Any) -> Any:
    """Return a schema that its owner cannot change, with his functions and objects themselves."""
    if isinstance(schema, dict):
        return {key: _copied(value) for key, value in schema.items()}
    return [_copied(value) for value in schema] if isinstance(schema, list) else schema


def _at_most(errors: Any, left: list[int]) -> Any:
    """Return Cerberus's errors without those beyond the number left, which this counts down."""
    if isinstance(errors, dict):
        return {name: _at_most(some, left) for name, some in errors.items() if left[0] > 0}
    if isinstance(errors, list):
        return [_at_most(some, left) for some in errors if left[0] > 0]
    left[0] -= 1
    return errors


# Metrics


class Metrics:
    """Counters, gauges and histograms of all processes of a service, in memory that they share.

    Each process writes into a slot of its own, in which a worker goes on where its predecessor
    ended. A slot is an array of doubles: how many are in use, and then records of so many values,
    the bytes of their key, the key in JSON, and the values. A key is a family and its labels.
    """

    #: doubles in a slot; memory that nobody has written to costs nothing
    SLOT = 2**14
    #: upper bounds, in seconds and in requests
    SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
    SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    #: name: (type, bounds of a histogram's buckets, labels, help)
    FAMILIES = {
        "mest_requests_total": ("counter", (), ("route", "method", "status"), "Requests answered."),
        "mest_request_duration_seconds": (
            "histogram", SECONDS, ("route",), "Time from a request's arrival to its answer."
        ),
        "mest_requests_in_progress": ("gauge", (), (), "Requests that have no answer yet."),
        "mest_queue_length": ("gauge", (), ("model",), "Requests at a model, running or waiting."),
        "mest_batch_size": ("histogram", SIZES, ("model",), "Requests that a model took at once."),
        "mest_model_load_seconds": ("gauge", (), ("model",), "What init took, at the longest."),
        "mest_workers_ready": ("gauge", (), (), "Processes that have loaded their models."),
        "mest_workers_started_total": ("counter", (), (), "Processes started, replacements too."),
    }

    def __init__(self, slots: int = 1):
        self.slots, self.lock = slots, threading.Lock()
        self.memory = mmap.mmap(-1, slots * self.SLOT * 8)  # a fork shares it
        self.values = memoryview(self.memory).cast("d")
        self.begin(0)

    def begin(self, slot: int) -> None:
        """Write into this slot from now on, as does a child forked from this process."""
        self.slot, self.start = slot, slot * self.SLOT
        self.places = {key: place for key, place, _ in self.records(slot)}

    def records(self, slot: int) -> Iterator[tuple[tuple, int, int]]:
        """Yield the keys in a slot, with the place and the number of their values."""
        place = slot * self.SLOT + 1
        end = place + int(self.values[place - 1])
        while place < end:
            count, length = int(self.values[place]), int(self.values[place + 1])
            first = (place + 2) * 8
            key = tuple(json.loads(self.memory[first : first + length]))
            place += 2 + -(-length // 8)
            yield key, place, count
            place += count

    def place(self, key: tuple) -> int:
        """Return where the values of a new key go, or room that is not read if the slot is full."""
        bounds, text = self.FAMILIES[key[0]][1], json.dumps(key).encode()
        count, length = len(bounds) + 2 if bounds else 1, -(-len(text) // 8)
        with self.lock:
            free = self.start + 1 + int(self.values[self.start])
            place, spare = free + 2 + length, self.start + self.SLOT - len(self.SECONDS) - 2
            if key not in self.places and place + count <= spare:
                self.values[free], self.values[free + 1] = count, len(text)
                self.memory[(free + 2) * 8 : (free + 2) * 8 + len(text)] = text
                self.values[self.start] += place + count - free  # now it is there for readers
                self.places[key] = place
            return self.places.setdefault(key, spare)

    def add(self, amount: float, *key: Any) -> None:
        """Add to a counter or gauge."""
        place = self.places.get(key) or self.place(key)
        with self.lock:
            self.values[place] += amount

    def set(self, value: float, *key: Any) -> None:
        """Set a gauge, which one thread at a time may do."""
        self.values[self.places.get(key) or self.place(key)] = value

    def observe(self, value: float, *key: Any) -> None:
        """Put a value into a histogram."""
        place, bounds = self.places.get(key) or self.place(key), self.FAMILIES[key[0]][1]
        with self.lock:
            self.values[place + bisect_left(bounds, value)] += 1
            self.values[place + len(bounds) + 1] += value

    def retire(self, slot: int) -> None:
        """Set the gauges of a process that has ended to zero."""
        for (family, *_), place, _ in self.records(slot):
            if self.FAMILIES[family][0] == "gauge":
                self.values[place] = 0

    def is_ready(self, slot: int) -> bool:
        """Return whether the process that writes into a slot has loaded its models."""
        return any(
            key == ("mest_workers_ready",) and self.values[place]
            for key, place, _ in self.records(slot)
        )

    def totals(self) -> dict[tuple, list[float]]:
        """Return the values of each key: their sums over the slots, or the longest load."""
        totals: dict[tuple, list[float]] = {}
        for slot in range(self.slots):
            for key, place, count in self.records(slot):
                values, before = self.values[place : place + count], totals.get(key, [0.0] * count)
                merge = max if key[0] == "mest_model_load_seconds" else operator.add
                totals[key] = list(map(merge, before, values))
        return totals

    def text(self) -> str:
        """Return all, in the text format 0.0.4 of Prometheus.

        https://prometheus.io/docs/instrumenting/exposition_formats/
        """
        lines, totals = [], sorted(self.totals().items(), key=lambda item: list(map(str, item[0])))
        for name, (kind, bounds, labels, meaning) in self.FAMILIES.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            for key, values in totals:
                if key[0] != name:
                    continue
                own = [*zip(labels, key[1:])]
                if kind != "histogram":
                    lines.append(sample(name, own, values[0]))
                    continue
                *counts, total = values
                for bound, count in zip([*bounds, "+Inf"], itertools.accumulate(counts)):
                    lines.append(sample(f"{name}_bucket", [*own, ("le", bound)], count))
                lines.append(sample(f"{name}_sum", own, total))
                lines.append(sample(f"{name}_count", own, sum(counts)))
        build = [("version", __version__), ("python", platform.python_version())]
        lines += ["# TYPE mest_build_info gauge", sample("mest_build_info", build, 1)]
        return "\n".join(lines) + "\n"


def sample(name: str, labels: list[tuple[str, Any]], value: float) -> str:
    """Return a line of Prometheus's text format."""
    escapes = {"\\": r"\\", '"': r"\"", "\n": r"\n"}
    escaped = (f'{label}="{str(text).translate(str.maketrans(escapes))}"' for label, text in labels)
    inner = ",".join(escaped)
    return f"{name}{{{inner}}} {value:.15g}" if inner else f"{name} {value:.15g}"


# Models


class GenericModel:
    """A model behind endpoints: subclass it with an `init`, and an `infer` or an `infer_batch`.

    `predict` runs the stages pre_process, infer and post_process. From stage to stage a dictionary
    is passed on as keyword arguments, a list as positional arguments, and anything else as one
    argument. The first and the last stage may run in several threads at once.
    """

    #: A place for what `init` loads.
    model: Any = None
    #: How many requests `infer_batch` is given at once.
    max_batch_size = 1
    #: Seconds, at most, that a batch waits for the crowd that was there before it.
    batch_timeout = 0.005
    #: How many threads may be in `infer` or `infer_batch` at once.
    max_concurrency = 1
    _initialised = False
    _metrics: tuple[Metrics, str] | None = None  # with the model's label
    _limits = MestConfig.FIELDS["max_queued_requests"][0], MestConfig.FIELDS["request_timeout"][0]

    @property
    def is_loaded(self) -> bool:
        """Whether `init` has been carried out, by Mest or by hand."""
        return self._initialised or self.model is not None

    def init(self, directory_path: str) -> None:
        """Load the model from the directory with its files, once in each process that serves."""

    def pre_process(self, **params: Any) -> Any:
        """Return the payload, what `infer` works on, of a request; by default its parameters."""
        return params

    def infer(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's result for a payload; by default that of a batch of one."""
        payload = kwargs or (args[0] if len(args) == 1 else list(args))
        return raised(results_of(self, [payload])[0])

    def infer_batch(self, payloads: list) -> Sequence:
        """Return the results for the payloads of several requests, one each, in their order.

        An exception among them is the answer to that request. If this raises, or returns another
        number of results, the payloads are run one by one, so that only the faulty ones fail.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither infer() nor infer_batch()")

    def post_process(self, *args: Any, **kwargs: Any) -> Any:
        """Return the answer, given what `infer` returned; by default just that."""

    def predict(self, **params: Any) -> Any:
        """Return the answer for the parameters of a request.

        Raises:
            Problem: 503 if `max_queued_requests` wait already, 504 after `request_timeout`.
        """
        result = self._turns.run(self.pre_process(**params))
        return pass_on(result, self.post_process) if own_stage(self, "post_process") else result

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self).items()  # a copy has turns of its own
        own = "_turns_", "_metrics"
        return {name: value for name, value in state if not name.startswith(own)}

    @property
    def _turns(self) -> Turns:
        key = f"_turns_{os.getpid()}"  # neither threads nor locks come through a fork
        return vars(self).get(key) or vars(self).setdefault(key, Turns(self))


def own_stage(model: Any, name: str) -> Callable | None:
    """Return a stage if a model or its class has one of its own, or None."""
    stage = getattr(model, name, None)
    return None if getattr(stage, "__func__", None) is vars(GenericModel)[name] else stage


def first_stage(model: Any) -> Callable | None:
    """Return the stage that takes the parameters, or None where `infer_batch` takes them as one."""
    stages = [own_stage(model, name) for name in ("predict", "pre_process", "infer")]
    if stages[:2] == [None, None] and own_stage(model, "infer_batch") and model.max_batch_size > 1:
        return None
    return next(filter(None, stages), None)


#: The methods of a GenericModel that a user may write.
STAGES = "init", "predict", "pre_process", "infer", "infer_batch", "post_process"


def is_generic(model: Any) -> bool:
    """Return whether a model is a GenericModel, and not something that says so in a test."""
    return issubclass(type(model), GenericModel)


def has_late_stage(model: Any, *names: str) -> bool:
    """Return whether one of these stages is a property, which may need what `init` loads."""
    late = property, functools.cached_property
    return any(isinstance(inspect.getattr_static(type(model), n, None), late) for n in names)


def lacks_self(function: Callable) -> bool:
    """Return whether a method's first argument is none, or one that is plainly a parameter."""
    arguments = inspect.signature(function, follow_wrapped=False).parameters.values()
    first = next(iter(arguments), None)
    kinds = [*PYTHON_TYPES, *(kind.__name__ for kind in PYTHON_TYPES)]  # annotations may be text
    return not first or first.kind is first.KEYWORD_ONLY or first.annotation in kinds


def check_model(model: GenericModel) -> None:
    """Raise a MestError if a model cannot work."""
    name = type(model).__name__
    for option in ("max_batch_size", "max_concurrency"):
        if type(count := getattr(model, option)) is not int or count < 1:
            raise MestError(f"{option} of {name} is {count!r}; it must be an integer of 1 or more")
    if not isinstance(seconds := model.batch_timeout, (int, float)) or seconds < 0:
        raise MestError(f"batch_timeout of {name} is {seconds!r}; it must be seconds, 0 or more")
    for stage in STAGES:
        if has_late_stage(model, stage) or not (own := own_stage(model, stage)):
            continue
        if inspect.iscoroutinefunction(own):
            raise MestError(f"{name_of(own)}, is async; models run in threads: write def {stage}")
        if inspect.ismethod(own) and is_generic(own.__self__) and lacks_self(own.__func__):
            raise MestError(f"{name_of(own)}, has no self; write def {stage}(self, …)")


def pass_on(value: Any, stage: Callable) -> Any:
    """Return what a stage returns for the value of the one before it."""
    try:
        if isinstance(value, dict):
            return stage(**value)
        return stage(*value) if isinstance(value, list) else stage(value)
    except TypeError as error:
        if error.__traceback__.tb_next:  # the stage did begin
            raise
        passed = "the items of a list, and those of a dictionary by name, are passed to it as such"
        raise TypeError(f"{error}; {passed}: return [[…]] to pass one list") from None


def results_of(model: GenericModel, payloads: list) -> list:
    """Return the result or the exception of each payload, none of which fails for another."""
    try:
        results = model.infer_batch(list(payloads))
        results = results.to_numpy() if hasattr(results, "to_numpy") else results
        what, count = f"a {type(results).__name__}", len(payloads)
        is_sequence = isinstance(results, Iterable) or hasattr(results, "__getitem__")
        if is_sequence and not isinstance(results, (Mapping, str, bytes)):
            results = list(results)
            if len(results) == count:
                return results
            what += f" of {len(results)}"
        needed = f"a list with a result for each of {count}"
        raise MestError(f"infer_batch of {type(model).__name__} returned {what}, not {needed}")
    except BaseException as error:  # sys.exit is no reason to end anything but the request
        if len(payloads) == 1 or isinstance(error, MemoryError):
            return [error] * len(payloads)
    return [results_of(model, [payload])[0] for payload in payloads]


def raised(outcome: Any) -> Any:
    """Return an outcome if it is a result, and raise it if it is an exception."""
    if isinstance(outcome, BaseException):
        if not isinstance(outcome, Exception):  # it would end more than the request
            raise RuntimeError(repr(outcome)) from outcome
        raise outcome
    return outcome


TOO_LATE = "The model did not answer in time."


class Awaited:
    """An outcome that a thread waits for: a concurrent.futures.Future, at a tenth of the cost."""

    def __init__(self) -> None:
        self.given, self.is_cancelled = threading.Lock(), False
        self.given.acquire()

    def give(self, outcome: Any, more: bool) -> None:
        self.value = outcome
        self.given.release()

    def cancelled(self) -> bool:
        return self.is_cancelled

    def outcome(self, seconds: float | None) -> Any:
        if self.given.acquire(timeout=-1 if seconds is None else seconds):
            return self.value
        self.is_cancelled = True
        raise Problem(504, TOO_LATE)


class Turns:
    """Who uses a model when: callers queue, and threads of its own carry out what they ask for.

    A thread takes what is queued and waits, `batch_timeout` at most, for as many as there were when
    the last batch was done, in it and behind it. So a lone caller never waits and a crowd fills the
    batches; were it only as many as in the last batch, two half-full ones could alternate for ever.
    """

    def __init__(self, model: GenericModel):
        self.batching = bool(own_stage(model, "infer_batch")) and model.max_batch_size > 1
        self.model, self.queue = model, SimpleQueue()
        #: How many requests are in the queue or in the model.
        self.waiting = 0
        #: How many a thread waits for, and what tells it that they are there.
        self.wanted, self.enough = 0, SimpleQueue()
        #: The threads, and since when each has been in the model, by time.monotonic(), or 0.
        self.busy_since: dict[threading.Thread, float] = {}
        self.lock = threading.RLock()

    def run(self, payload: Any) -> Any:
        """Return the model's result for a payload, once its turn has come."""
        if threading.current_thread() in self.busy_since:  # the model calls itself
            return raised(self.outcomes([payload])[0])
        awaited = Awaited()
        self.submit(payload, awaited, awaited.give, request_id())
        return raised(awaited.outcome(self.model._limits[1]))

    def submit(
        self, payload: Any, future: Any, give: Callable[[Any, bool], Any], known_as: str | None
    ) -> None:
        """Have a payload's result, or the exception instead of it, given in another thread.

        Unless the future, which only tells that, is cancelled before its turn. The second thing
        given is whether more will be, within a millisecond or so. What is logged meanwhile has the
        request's id.
        """
        with self.lock:
            if self.waiting >= self.model._limits[0]:
                self.forget()
            if self.waiting >= self.model._limits[0]:
                raise Problem(503, "Too many requests wait.", headers={"Retry-After": "1"})
            if self.waiting >= len(self.busy_since) < self.model.max_concurrency:
                thread = threading.Thread(target=self.serve, daemon=True)
                thread.start()
                self.busy_since.setdefault(thread, 0.0)  # it may be in the model by now
            self.count(1)
            self.queue.put((payload, future, give, known_as))
            if 0 < self.wanted <= self.queue.qsize():
                self.wanted = 0
                self.enough.put(None)

    def forget(self) -> None:
        """Remove from the queue what nobody waits for any longer."""
        entries = []
        with contextlib.suppress(Empty):
            while True:
                entries.append(self.queue.get_nowait())
        live = [entry for entry in entries if not entry[1].cancelled()]
        for entry in live:
            self.queue.put(entry)
        self.count(len(live) - len(entries))

    def count(self, change: int) -> None:
        """Note that there are more or fewer requests."""
        with self.lock:
            self.waiting += change
            if self.model._metrics:
                metrics, label = self.model._metrics
                metrics.set(self.waiting, "mest_queue_length", label)

    def busy_for(self) -> float:
        """Return for how many seconds the model has been in its longest call by now."""
        since = [when for when in [*self.busy_since.values()] if when]
        return time.monotonic() - min(since) if since else 0.0

    def serve(self) -> None:
        """Carry out batches, in a thread."""
        me, crowd = threading.current_thread(), 1
        while True:
            batch = self.next_batch(crowd)
            live = [entry for entry in batch if not entry[1].cancelled()]
            self.busy_since[me] = began = time.monotonic()
            outcomes = self.carry_out(live) if live else []
            self.busy_since[me] = 0.0
            behind = self.queue.qsize()
            crowd = len(batch) + behind
            self.count(-len(batch))
            soon = behind > 0 and time.monotonic() - began < 0.001
            for left, (_, _, give, _), outcome in zip(range(len(live))[::-1], live, outcomes):
                give(outcome, left > 0 or soon)

    def next_batch(self, crowd: int) -> list[tuple]:
        """Return what is queued, after a wait for so many."""
        batch = [self.queue.get()]
        most = self.model.max_batch_size if self.batching else 1
        if min(crowd, most) > 1:
            self.await_others(min(crowd, most) - 1)
        with contextlib.suppress(Empty):
            while len(batch) < most:
                batch.append(self.queue.get_nowait())
        return batch

    def await_others(self, count: int) -> None:
        """Wait until so many are queued, `batch_timeout` at most, unless another thread does that.

        To wait for each of them in turn would be simpler, but each would cost a change of threads.
        """
        with self.lock:
            if self.wanted or self.queue.qsize() >= count:
                return
            self.wanted, self.enough = count, SimpleQueue()
        with contextlib.suppress(Empty):
            self.enough.get(timeout=self.model.batch_timeout)
        self.wanted = 0

    def carry_out(self, batch: list[tuple]) -> list:
        """Return the outcomes of a batch; what is logged meanwhile has the id of a lone request."""
        REQUEST_ID.set(batch[0][3] if len(batch) == 1 else None)
        if self.batching and self.model._metrics:
            metrics, label = self.model._metrics
            metrics.observe(len(batch), "mest_batch_size", label)
        return self.outcomes([payload for payload, _, _, _ in batch])

    def outcomes(self, payloads: list) -> list:
        """Return the result or the exception of each payload, from the model."""
        if self.batching or not own_stage(self.model, "infer"):
            return results_of(self.model, payloads)
        try:
            return [pass_on(payload, self.model.infer) for payload in payloads]
        except BaseException as error:
            return [error]


MestModel = GenericModel


# Routes


def service() -> Mest:
    """Return the Mest of the Flask application, which gets one where it has a mere blueprint."""
    app = current_app._get_current_object()
    if "mest" not in app.extensions:
        with contextlib.suppress(MestError):  # another thread has just given it one
            Mest(MestConfig(app.name, environ={}), app=app)
    return app.extensions["mest"]


def validate_params(schema: dict, example: dict | None = None) -> Callable[[Callable], Callable]:
    """Decorate a handler to receive the request's parameters, checked, as keyword arguments.

    They come from the query string, a JSON object or a form, and are what Cerberus makes of them;
    variables of the path are passed along. Stands below `route`. Outside a request the handler can
    be called as if it were not decorated. The arguments are those of Parameters.
    """
    if callable(schema):
        raise MestError(f"{schema.__qualname__}(): write @validate_params({{…}}), with a schema")

    def decorate(handler: Callable) -> Callable:
        name = getattr(handler, "__qualname__", repr(handler))
        parameters = Parameters(schema, example, f"validate_params of {name}()")

        @functools.wraps(handler)
        def validated(*args: Any, **variables: Any) -> Any:
            if args or not flask.has_request_context():
                return handler(*args, **variables)
            params = read_parameters(parameters, variables)
            return current_app.ensure_sync(handler)(**params)

        validated.parameters = parameters  # for documentation
        return validated

    return decorate


def read_parameters(parameters: Parameters, variables: dict[str, Any]) -> dict[str, Any]:
    """Return the checked parameters of the Flask request, and the variables of its path.

    Raises:
        Problem: what is wrong with the request.
    """
    http, environ = request._get_current_object(), request.environ
    body = read_body(http, service().config.max_body_bytes)
    kind, coding = environ.get("CONTENT_TYPE", ""), environ.get("HTTP_CONTENT_ENCODING", "")
    values = decode_body(http.method, kind, coding.lower(), body)
    fields = query_of(http.query_string)
    if values is None or "form" in vars(http):  # a form, which a hook may have parsed already
        if body and values is None and not (http.form or http.files):
            raise Problem(400, "The body is not a valid form.")
        fields |= http.form.to_dict(flat=False)
        fields |= {name: [file.read() for file in files] for name, files in http.files.lists()}
    document = parameters.document(fields, values or {}, variables)
    return variables | parameters.check(document)


def query_of(query: bytes) -> dict[str, list[str]]:
    """Return the fields of a query string."""
    return parse_qs(query.decode("utf-8", "replace"), keep_blank_values=True) if query else {}


def read_body(http: flask.Request, limit: int) -> bytes:
    """Return the body of a request, which may have so many bytes.

    Raises:
        Problem: 413 if it is longer, 400 if it ends early or the server can make no sense of it.
    """
    length, body = http.content_length or 0, b""
    limit = min(limit, http.max_content_length or limit)
    if length <= limit:
        http.max_form_memory_size = limit
        http.max_content_length = limit + 1  # Werkzeug stops reading there, and says nothing
        try:
            body = http.get_data(cache=True)
        except Exception:  # each server has exceptions of its own
            raise Problem(400, "The body is malformed or ended early.") from None
    if max(length, len(body)) > limit:
        skip_body(http.environ)
        raise Problem(413, f"The body is longer than {limit} bytes.")
    if len(body) < length and "form" not in vars(http):
        raise Problem(400, f"The body ended after {len(body)} of {length} bytes.")
    return body


def skip_body(environ: dict[str, Any]) -> None:
    """Read the body of a request, within bounds: most clients send all before they read."""
    rest = get_input_stream(environ)
    with contextlib.suppress(Exception):
        any(not rest.read(2**16) for _ in range(2**10))


def to_response(result: Any) -> Any:
    """Return Flask's response to what a handler returned; data, text and arrays are encoded."""
    body, *rest = result if isinstance(result, tuple) else (result,)
    plain = body is None or isinstance(body, (dict, list, str, int, float))
    if plain or hasattr(body, "tolist") or hasattr(body, "item"):
        content, content_type = encode(body)
        body = flask.Response(content, content_type=content_type)
    return current_app.make_response((body, *rest) if rest else body)


def begin_request() -> None:
    """Note, once, that the Flask request has begun."""
    if "mest.began" not in request.environ:
        request.environ["mest.began"] = time.perf_counter()
        request.environ["mest.in_progress"] = service().metrics
        service().metrics.add(1, "mest_requests_in_progress")


def finish_request(response: flask.Response) -> flask.Response:
    """Put the id of the request on its response, where a host has not done so, and count it."""
    if "X-Request-Id" not in response.headers:
        response.headers["X-Request-Id"] = request_id()
    if began := request.environ.pop("mest.began", None):
        route = request.url_rule.rule if request.url_rule else None
        service().answered(route, request.method, request.path, response.status_code, began)
    return response


def end_request(error: BaseException | None = None) -> None:
    """Note that the Flask request has come to its end."""
    if metrics := request.environ.pop("mest.in_progress", None):
        metrics.add(-1, "mest_requests_in_progress")


def admit(config: MestConfig, authorization: str, key: str) -> None:
    """Raise a Problem, 401, unless a request has one of the API keys.

    It is sent as a bearer token (RFC 6750, section 2.1) in Authorization, or in X-API-Key.
    """
    scheme, _, token = authorization.partition(" ")
    sent = [key.strip(" \t"), token.strip(" \t") if scheme.lower() == "bearer" else ""]
    pairs = itertools.product(config.api_keys, [text.encode("latin-1", "replace") for text in sent])
    if not any([hmac.compare_digest(*pair) for pair in pairs]):
        cure = "send one, as Authorization: Bearer KEY or as X-API-Key: KEY"
        what = "The API key is wrong" if any(sent) else "An API key is needed"
        error = ' error="invalid_token"' if any(sent) else ""
        raise Problem(401, f"{what}; {cure}.", headers={"WWW-Authenticate": f"Bearer{error}"})


def admit_request() -> None:
    """Do the same for the Flask request."""
    sent = request.headers
    try:
        admit(service().config, sent.get("Authorization", ""), sent.get("X-API-Key", ""))
    except Problem:
        skip_body(request.environ)
        raise


def as_view(handler: Callable) -> Callable:
    """Return a Flask view that answers with what the handler returns or raises."""
    needs_key = getattr(handler, "needs_key", True) is not False

    @functools.wraps(handler)
    def view(**variables: Any) -> Any:
        begin_request()
        try:
            if needs_key and service().config.api_keys:
                admit_request()
            result = current_app.ensure_sync(handler)(**variables)
            return finish_request(to_response(result))
        except (Exception, SystemExit) as error:  # sys.exit would take the whole process along
            if current_app.debug and not isinstance(error, HTTPException):
                raise  # to the debugger
            problem = as_problem(error, service(), f"{request.method} {request.path}")
            return finish_request(problem.get_response(request.environ))
        finally:
            end_request()

    view.needs_key, view.itself = needs_key, view  # who wraps it copies these
    return view


class Prediction:
    """The handler of a predict route, which needs nothing of Flask but the request's values."""

    needs_key = True

    def __init__(self, model: Any, parameters: Parameters):
        self.model, self.parameters = model, parameters
        name = type(model).__name__
        self.__doc__ = vars(type(model)).get("__doc__") or f"A prediction of {name}."

    def __call__(self, **variables: Any) -> flask.Response:
        """Answer the Flask request."""
        params = read_parameters(self.parameters, variables)
        content, content_type = Context().run(self.answer, params, request_id())
        return flask.Response(content, content_type=content_type)

    def answer(self, params: dict[str, Any], known_as: str | None = None) -> tuple[bytes, str]:
        """Return the answer to checked parameters, and its content type.

        Flask's request is out of sight for the model, as it is where that is not served by Flask.
        """
        REQUEST_ID.set(known_as)
        self.require_model()
        return encode(self.model.predict(**params))

    def require_stages(self) -> bool:
        """Return whether the model's stages are known, or raise a MestError if it has too few."""
        model, name = self.model, type(self.model).__name__
        if has_late_stage(model, *STAGES):
            return False
        enough = any(own_stage(model, stage) for stage in ("predict", "infer", "infer_batch"))
        if not enough and model.is_loaded:  # until then, init may add some
            raise MestError(f"the model {name} has neither infer() nor infer_batch()")
        return enough

    def require_model(self) -> None:
        if not getattr(self.model, "is_loaded", True):
            raise MestError(f"{self.model!r} is not loaded; call mest_app.setup()")


class Probe:
    """The handler of a route that tells of the service itself: it needs nothing of the request."""

    def __init__(
        self, answer: Callable[[], tuple[bytes, str]], needs_key: bool = False,
        media_type: str = "application/json",
    ):
        self.answer, self.needs_key, self.media_type = answer, needs_key, media_type
        self.__doc__ = answer.__doc__

    def __call__(self) -> flask.Response:
        content, content_type = self.answer()
        return flask.Response(content, content_type=content_type)


def views_of(app: flask.Flask) -> Iterator[tuple[Rule, Any]]:
    """Yield the rules by which an application can be asked, with their views."""
    for rule in app.url_map.iter_rules():
        view = app.view_functions.get(rule.endpoint)
        if view and rule.methods and not rule.build_only:
            yield rule, view


def parameters_of(view: Any) -> Parameters | None:
    """Return the parameters that a view or a handler checks, if any."""
    parameters = getattr(view, "parameters", None)
    return parameters if isinstance(parameters, Parameters) else None


class Router:
    """Endpoints under one name, for `Mest.register_router`.

    Args:
        name: unique, and without dots; `flask.url_for` takes "name.handler".
    """

    def __init__(self, name: str):
        if not isinstance(name, str) or not name or "." in name:
            raise MestError(f"a router is named {name!r}; it must be text without dots")
        self.name = name
        #: What was declared: urls relative to the router's, views, and options of Flask's routes.
        self.routes: list[tuple[str, Callable, dict[str, Any]]] = []
        self._views: dict[str, Callable] = {}
        self._registrations: list[BlueprintSetupState] = []

    def route(self, url: str, method: str = "POST", **options: Any) -> Callable:
        """Decorate a handler, which comes back as it was, to answer requests to an url.

        Args:
            url: relative to the router's, as Flask has it: "predict" or "/users/<int:user>".
            method: the HTTP method; `methods=[…]` for several.
            **options: any other option of Flask's routes.
        """
        if not isinstance(url, str):
            raise MestError(f"a route of router {self.name!r} has the url {url!r}; it must be text")
        if "methods" in options and isinstance(options["methods"], (str, type(None))):
            methods = options["methods"]
            raise MestError(f"the route {url} has methods={methods!r}; it must be a list")
        if not isinstance(method, str):
            raise MestError(f"the route {url} has the method {method!r}; several are methods=[…]")

        def decorate(handler: Callable) -> Callable:
            name = options.get("endpoint") or getattr(handler, "__name__", type(handler).__name__)
            view = self._views.setdefault(name, as_view(handler))
            if view.__wrapped__ != handler:
                mistake = f"router {self.name!r} has two handlers named {name!r}"
                raise MestError(f"{mistake}; rename one of them, or give it endpoint='…'")
            route = "/" + url.lstrip("/"), view, {"methods": [method], "endpoint": name, **options}
            self.routes.append(route)
            for registration in self._registrations:
                self._add(registration, *route)
            return handler

        return decorate

    def add_predict_route(
        self, model: Any, schema: dict | None = None, url: str = "/predict", method: str = "POST",
        example: dict | None = None,
    ) -> None:
        """Answer requests to an url with `model.predict(**params)` of the checked parameters.

        Args:
            model: a GenericModel, which the Mest then loads, or another object with `predict`.
            schema: as in Parameters; without it, what the annotations of the model's first stage,
                `pre_process` or `infer`, stand for.
            url: relative to the router's; its variables are passed to `predict` too.
            method: the HTTP method.
            example: as in Parameters.
        """
        owner = f"the predict route {url!r} of router {self.name!r}"
        if isinstance(model, type) or not callable(getattr(model, "predict", None)):
            cure = "it must be an object with predict(), an instance and not a class"
            raise MestError(f"{owner} has the model {model!r}; {cure}")
        if is_generic(model):
            check_model(model)
        if schema is None:
            stages = [own_stage(model, name) for name in ("predict", "pre_process", "infer")]
            telling = [one for one in stages if one and named_arguments(one) is not None]
            if not telling:
                raise MestError(f"{owner} has no schema, and no stage of the model tells of one")
            schema = schema_of(telling[0])
        self._add_own(url, method, Prediction(model, Parameters(schema, example, owner)))

    def add_ping_route(self, url: str = "/ping", method: str = "GET") -> None:
        """Answer requests to an url with the name of the service, or 503 while it shuts down."""

        def ping() -> dict[str, str]:
            """The name of the service, if that is up."""
            name = service().config.service_name
            if service().draining:
                raise Problem(503, f"{name} is shutting down.")
            return {"message": f"{name} is up"}

        ping.needs_key = False  # it is a probe
        self._add_own(url, method, ping)

    def _add_own(self, url: str, method: str, handler: Callable) -> None:
        name = re.sub(r"\W+", "_", url.strip("/")) or "index"
        name = f"{name}_{method.lower()}" if name in self._views else name
        self.route(url, method, endpoint=name)(handler)

    @functools.cached_property
    def blueprint(self) -> flask.Blueprint:
        """The routes as a Flask blueprint, for an application without Mest; later ones join it."""
        blueprint = flask.Blueprint(self.name, __name__)
        blueprint.record(self._register)
        return blueprint

    def _register(self, registration: BlueprintSetupState) -> None:
        self._registrations.append(registration)
        for route in self.routes:
            self._add(registration, *route)

    def _add(self, registration: BlueprintSetupState, url: str, view: Callable, options: dict):
        full = (registration.url_prefix or "").rstrip("/") + url
        host = options.get("subdomain", registration.subdomain) or "", options.get("host")
        methods = {method.upper() for method in options["methods"]}
        for other, _ in views_of(registration.app):
            automatic = getattr(other, "provide_automatic_options", False)
            taken = other.methods - ({"OPTIONS"} if automatic else set())
            same = _shape(other.rule) == _shape(full)
            if same and methods & taken and (other.subdomain or "", other.host) == host:
                clash = f"{' '.join(methods & taken)} {full} of router {self.name!r}"
                owner = f"of the endpoint {other.endpoint!r}; give one of them another url"
                owner += ", or set docs=False" if other.endpoint.startswith("mest_docs.") else ""
                raise MestError(f"{clash} is a route already, {owner}")
        registration.add_url_rule(url, view_func=view, **options)
        handler, mest_app = view.__wrapped__, registration.app.extensions.get("mest")
        if mest_app and isinstance(handler, Prediction):
            mest_app.adopt(handler.model)


def check_routes(app: flask.Flask) -> None:
    """Raise a MestError if requests to a route would fail for what its handler can take."""
    hooks = {*itertools.chain(*app.before_request_funcs.values())} - {begin_request}
    hooks |= {*itertools.chain(*app.url_value_preprocessors.values())}
    for rule, view in views_of(app):
        handler = handler_of(app, rule)
        # Others than Mest's own views, and hooks, may change what a handler is given.
        if getattr(view, "itself", None) is not view or hooks or rule.redirect_to is not None:
            continue
        try:
            check_handler(handler, rule.arguments)
        except MestError as error:
            raise MestError(f"the route {rule.rule}: {error}") from None


def check_handler(handler: Any, variables: set[str]) -> None:
    """Raise a MestError if a handler cannot take what it would be given."""
    parameters, inner = parameters_of(handler), getattr(handler, "__wrapped__", None)
    if isinstance(handler, Prediction):
        if handler.require_stages() and (first := first_stage(handler.model)):
            check_fit(first, parameters.schema, variables)
    elif parameters and not parameters_of(inner):  # or else it is decorated once more
        check_fit(inner, parameters.schema, variables)
    else:
        check_fit(handler, {}, variables)


#: A variable in an url of Flask's, such as <int:user>.
VARIABLE = re.compile(r"<(?:[^<>]*:)?(\w+)>")


def _shape(url: str) -> str:
    """Return an url without the names of its variables, which do not tell it from another."""
    return re.sub(r"<(?:string:)?(?:([^<>]*):)?\w+>", r"<\1>", url)


def handler_of(app: flask.Flask, rule: Rule) -> Any:
    """Return the handler that a Mest router has put behind a rule, and nothing else around it."""
    view = app.view_functions.get(rule.endpoint)
    return getattr(view, "__wrapped__", None) if isinstance(view, FunctionType) else None


# The ASGI edge

#: bytes of JSON, or values in a result, that would hold up an event loop
LARGE = 2**16
#: methods that Flask answers for all routes
FLASK_METHODS = {"HEAD", "OPTIONS"}
#: what a request passes in Flask, and what a host may have replaced
FLASK_STAGES = (
    "__call__", "wsgi_app", "request_context", "create_url_adapter", "full_dispatch_request",
    "preprocess_request", "dispatch_request", "finalize_request", "make_response",
    "process_response", "handle_exception", "do_teardown_request",
)
FLASK_SIGNALS = (
    "request_started", "request_finished", "request_tearing_down", "got_request_exception",
)


def why_through_flask(app: flask.Flask, rule: Rule) -> str:
    """Return why requests to a rule must go through Flask, or "" where they need not."""
    if not isinstance(handler_of(app, rule), (Prediction, Probe)):
        return "it has a handler of its own"
    if app.url_map.host_matching or app.subdomain_matching or app.config.get("TRUSTED_HOSTS"):
        return "its host matters"
    if rule.subdomain or rule.redirect_to or app.url_map.converters != Map().converters:
        return "its url is of a kind of its own"
    kinds = app.request_class, app.response_class, type(app.session_interface)
    if kinds != (flask.Request, flask.Response, SecureCookieSessionInterface):
        return "the application has requests, responses or sessions of its own"
    for name in FLASK_STAGES:
        if getattr(getattr(app, name), "__func__", None) is not getattr(flask.Flask, name):
            return f"the application has a {name} of its own"
    names = rule.endpoint.split(".")[:-1]
    scopes = [None, *(".".join(names[: count + 1]) for count in range(len(names)))]
    for kind in ("before_request", "after_request", "teardown_request", "teardown_appcontext"):
        hooks = getattr(app, f"{kind}_funcs")
        found = hooks if isinstance(hooks, list) else sum((hooks.get(s, []) for s in scopes), [])
        if others := [hook for hook in found if getattr(hook, "__module__", None) != __name__]:
            return f"the {kind} hook {getattr(others[0], '__qualname__', others[0])} applies to it"
    if any(app.url_value_preprocessors.get(scope) for scope in scopes):
        return "a url_value_preprocessor applies to it"
    heard = [name for name in FLASK_SIGNALS if getattr(flask, name).has_receivers_for(app)]
    return f"{heard[0]} has receivers" if heard else ""


def ways(app: flask.Flask) -> list[str]:
    """Return which way the requests to each route go, and why."""
    lines = []
    for rule, _ in views_of(app):
        why = why_through_flask(app, rule)
        methods = "|".join(sorted(rule.methods - FLASK_METHODS)) or "OPTIONS"
        lines.append(f"{methods} {rule.rule} " + (f"through Flask: {why}" if why else "directly"))
    return lines


def weight(value: Any) -> int:
    """Return about how many values are in a result; for what is no plain data it is LARGE."""
    if type(value) is dict:
        return sum(map(weight, value.values()))
    if type(value) in (list, tuple):
        is_flat = {int, float, bool}.issuperset(map(type, value))
        return len(value) if is_flat else sum(map(weight, value))
    if type(value) in (str, bytes):
        return len(value) // 8
    return 1 if value is None or type(value) in (int, float, bool) else LARGE


class Calls(GenericModel):
    """Threads for what an event loop must not wait for: a model whose payloads are functions."""

    def infer(self, call: Callable[[], Any]) -> Any:
        return call()


class Gone(OSError):
    """The client has left, or does not read what it is sent."""


class Patience:
    """How long a request is waited for and worked on: some seconds, and while its client is there.

    Then what the task does in it is cancelled. Most requests need only a timer that never fires.
    """

    def __init__(self, receive: Callable):
        self.receive, self.watch, self.is_late, self.end = receive, None, False, None

    def __enter__(self) -> Patience:
        self.loop, self.task = asyncio.get_running_loop(), asyncio.current_task()
        self.timer = self.loop.call_later(0.1, self.look_up)
        return self

    def allow(self, seconds: float, *problem: Any, body_is_read: bool = True) -> None:
        """Answer with a problem, a status and a detail, unless the task is done in so many seconds.

        Once the body has been read, all that is still received is that the client has left.
        """
        self.deadline, self.problem = time.monotonic() + seconds, problem
        self.body_is_read = body_is_read
        if self.is_late:
            self.look_up()

    def look_up(self) -> None:
        self.is_late = True
        self.timer.cancel()
        left = self.deadline - time.monotonic()
        if left < math.inf:
            self.timer = self.loop.call_later(left, self.expire)
        if self.body_is_read and not self.watch:
            self.watch = self.loop.create_task(self.receive())
            self.watch.add_done_callback(self.left)

    def left(self, watch: asyncio.Task) -> None:
        if not watch.cancelled() and not watch.exception():
            self.cut_short(Gone())

    def expire(self) -> None:
        self.cut_short(Problem(*self.problem))

    def cut_short(self, end: Exception) -> None:
        self.end = end
        self.task.cancel()

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.timer.cancel()
        if self.watch:
            self.watch.cancel()
        if self.end and kind is asyncio.CancelledError:
            getattr(self.task, "uncancel", int)()  # Python 3.11 counts
            raise self.end from None


class Threads:
    """The way from an event loop to the threads of models, and back: with few changes between them.

    Waking the loop, or a thread, costs more than a small model does. So what is asked for in one
    round of the loop is submitted together, and the loop is woken once for several outcomes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.asked: list[tuple[Turns, Any, asyncio.Future, str | None]] = []
        self.given: deque[tuple[asyncio.Future, Any]] = deque()
        self.awaited, self.woken, self.polls = 0, False, None

    async def outcome(self, turns: Turns, payload: Any) -> Any:
        """Return or raise what a model makes of a payload."""
        future = self.loop.create_future()
        self.asked.append((turns, payload, future, REQUEST_ID.get()))
        if len(self.asked) == 1:
            self.loop.call_soon(self.ask)
        self.awaited += 1
        if self.awaited > 1 and not self.polls:
            self.polls = self.loop.call_later(0.002, self.poll)
        try:
            return raised(await future)
        finally:
            self.awaited -= 1

    def ask(self) -> None:
        asked, self.asked = self.asked, []
        for turns, payload, future, known_as in asked:
            if not future.cancelled():
                try:
                    turns.submit(payload, future, functools.partial(self.give, future), known_as)
                except Exception as error:
                    future.set_result(error)

    def give(self, future: asyncio.Future, outcome: Any, more: bool) -> None:
        """Hand an outcome over, in another thread; the loop is not woken if it will see it soon."""
        self.given.append((future, outcome))
        if not self.woken and not (more and self.polls):
            self.woken = True
            with contextlib.suppress(RuntimeError):  # it is closed
                self.loop.call_soon_threadsafe(self.deliver)

    def deliver(self) -> None:
        self.woken = False
        while self.given:
            future, outcome = self.given.popleft()
            if not future.done():
                future.set_result(outcome)

    def poll(self) -> None:
        """Deliver every 2 ms, from when several outcomes are awaited until none is."""
        self.deliver()
        self.polls = self.loop.call_later(0.002, self.poll) if self.awaited else None


class Direct:
    """A route that the edge answers itself: what there is to know of it."""

    def __init__(self, rule: Rule, handler: Any, keys: bool):
        self.rule, self.route, self.handler = rule, rule.rule, handler
        self.needs_key = keys and handler.needs_key
        self.is_probe = isinstance(handler, Probe)
        stages = "predict", "pre_process", "post_process"
        #: the stages that the model or its class has of its own; all, if it is no GenericModel
        self.own = set() if self.is_probe else {s for s in stages if own_stage(handler.model, s)}


class Edge:
    """The ASGI application of a Mest in one event loop, which waits for clients instead of threads.

    https://asgi.readthedocs.io/en/stable/specs/www.html, for servers that speak version 2 or 3.
    """

    def __init__(self, mest_app: Any, loop: asyncio.AbstractEventLoop):
        self.service, self.config, self.loop = mest_app, mest_app.config, loop
        self.threads = Threads(loop)
        #: for Flask, which clients can keep waiting, and for what is soon done
        self.flask_calls, self.calls = Calls(), Calls()
        for calls in (self.flask_calls, self.calls):
            calls.max_concurrency = self.config.threads
            calls._limits = self.config.max_queued_requests + self.config.threads, None
        self.in_progress = 0
        self.held = 0  # bytes of bodies that are not complete
        self.fixed: dict[tuple[str, str], Direct] | None = None

    def open(self) -> None:
        """Find the direct routes, when all routes and hooks have been declared."""
        app = self.service.app
        app._got_first_request = True  # so that Flask refuses later ones, as it does when it serves
        rules = [rule for rule, _ in views_of(app) if not why_through_flask(app, rule)]
        keys = bool(self.config.api_keys)
        self.direct = [Direct(rule, handler_of(app, rule), keys) for rule in rules]
        self.fixed = {
            (method, direct.route): direct
            for direct in self.direct if not direct.rule.arguments
            for method in direct.rule.methods - FLASK_METHODS
        }
        self.adapter = app.url_map.bind("localhost")
        sizes = self.config.max_body_bytes, app.config["MAX_CONTENT_LENGTH"] or sys.maxsize
        self.max_body_bytes = min(sizes)

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "http":
            if self.fixed is None:
                self.open()
            await self.http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self.lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def lifespan(self, receive: Callable, send: Callable) -> None:
        """Load the models, where that has not been done, before the server starts to serve."""
        await receive()
        try:
            self.service.warm_up()
        except MestError as error:
            return await send({"type": "lifespan.startup.failed", "message": report(error)})
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def http(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Answer a request."""
        began, method, path = time.perf_counter(), scope["method"], scope["path"]
        headers = dict(scope["headers"])
        REQUEST_ID.set(sane_id(headers.get(b"x-request-id", b"").decode("latin-1")))
        direct, variables = self.find(method, path.removeprefix(scope.get("root_path") or ""))
        if len(headers) < len(scope["headers"]):
            direct = None  # what several headers of a name mean is for Flask to know
        self.count(1)
        try:
            with Patience(receive) as patience:
                body = await self.body(headers.get(b"content-length", b"0"), receive, patience)
                patience.allow(self.config.request_timeout, 504, TOO_LATE)
                answer = None
                if direct:
                    answer = await self.answer(direct, scope, headers, body, variables)
                if answer is None:
                    patience.allow(math.inf)
                    return await Passage(self, scope, send, body, began).take()
            status, (content, content_type) = 200, answer
            sent = [("content-type", content_type), ("content-length", str(len(content)))]
        except Gone:
            return
        except Exception as error:
            status, sent, content = self.refusal(error, f"{method} {path}")
        finally:
            self.count(-1)
        if not any(name == "x-request-id" for name, _ in sent):
            sent.append(("x-request-id", REQUEST_ID.get()))
        self.service.answered(direct and direct.route, method, path, status, began)
        await self.start(send, status, sent)
        await send({"type": "http.response.body", "body": content if method != "HEAD" else b""})

    def refusal(self, error: Exception, asked: str) -> tuple[int, list[tuple[str, str]], bytes]:
        """Return the status, headers and body of the answer to an exception."""
        try:
            response = as_problem(error, self.service, asked).get_response({})
            headers = [(name.lower(), value) for name, value in response.get_wsgi_headers({})]
            "".join(map("".join, headers)).encode("latin-1")
        except Exception as another:  # a Problem with what JSON or HTTP cannot express
            self.service.logger.exception("%s failed: %r", asked, another)
            return self.refusal(Problem(500, FAILED), asked)
        has_body = "content-length" in dict(headers)
        return response.status_code, headers, response.get_data() if has_body else b""

    def count(self, change: int) -> None:
        """Note that there are more or fewer requests."""
        self.in_progress += change
        self.service.metrics.set(self.in_progress, "mest_requests_in_progress")

    def find(self, method: str, path: str) -> tuple[Direct | None, dict[str, Any]]:
        """Return the direct route that a path has, if any, and the variables in the path."""
        if direct := self.fixed.get((method, path)):
            return direct, dict(direct.rule.defaults or {})
        if method not in FLASK_METHODS and any(direct.rule.arguments for direct in self.direct):
            with contextlib.suppress(HTTPException):
                rule, variables = self.adapter.match(path, method, return_rule=True)
                found = (direct for direct in self.direct if direct.rule is rule)
                return next(found, None), dict(variables)
        return None, {}

    async def body(self, length: bytes, receive: Callable, patience: Patience) -> bytes:
        """Return the body of a request, or raise a Problem: 408 or 413."""
        late = 408, "The body did not come in time."
        patience.allow(self.config.request_body_timeout, *late, body_is_read=False)
        size, parts = 0, []
        more = is_short = int(length[:18]) <= self.max_body_bytes
        try:
            while more and is_short:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Problem(*late)
                more = message.get("more_body", False)
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                self.held += len(parts[-1])
                is_short = size <= self.max_body_bytes
                if more and self.held > 16 * self.max_body_bytes:
                    again = {"Retry-After": "1"}
                    raise Problem(503, "Too many bodies are arriving.", headers=again)
        finally:
            self.held -= size
        if is_short:
            return parts[0] if len(parts) == 1 else b"".join(parts)
        too_long = 413, f"The body is longer than {self.max_body_bytes} bytes."
        patience.allow(5, *too_long, body_is_read=False)  # most read the answer after sending all
        while size < 2**26 and (more or not size):
            message = await receive()
            size += len(message.get("body", b"")) or 1
            more = message.get("more_body", False)
        raise Problem(*too_long)

    async def start(self, send: Callable, status: int, headers: list[tuple[str, str]]) -> None:
        """Begin a response."""
        if self.service.draining:
            headers = [*headers, ("connection", "close")]  # the next request goes elsewhere
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        await send({"type": "http.response.start", "status": status, "headers": encoded})

    async def answer(
        self, direct: Direct, scope: dict, headers: dict, body: bytes, variables: dict
    ) -> tuple[bytes, str] | None:
        """Return what a direct route answers and its type, or None if only Flask can tell."""
        if direct.needs_key:
            sent = (headers.get(name, b"") for name in (b"authorization", b"x-api-key"))
            admit(self.config, *(value.decode("latin-1") for value in sent))
        if direct.is_probe:
            return direct.handler.answer()
        kind = headers.get(b"content-type", b"").decode("latin-1")
        coding = headers.get(b"content-encoding", b"").decode("latin-1").lower()
        large, sent = len(body) > LARGE, (scope["method"], kind, coding, body)
        values = await self.call(decode_body, *sent) if large else decode_body(*sent)
        if values is None:  # a form
            return None
        parameters = direct.handler.parameters
        document = parameters.document(query_of(scope["query_string"]), values, variables)
        params = None if large else parameters.surely(document)
        if params is None:  # Cerberus decides, which may take long and call the user's code
            params = await self.call(parameters.check, document)
        return await self.predict(direct, {**variables, **params})

    async def predict(self, direct: Direct, params: dict[str, Any]) -> tuple[bytes, str]:
        """Return the model's answer; what the user has written runs in threads."""
        handler, model = direct.handler, direct.handler.model
        if "predict" in direct.own:
            return await self.call(handler.answer, params, REQUEST_ID.get())
        handler.require_model()
        payload = params
        if "pre_process" in direct.own:
            payload = await self.call(lambda: model.pre_process(**params))
        result = await self.threads.outcome(model._turns, payload)
        if "post_process" in direct.own:
            return await self.call(lambda: encode(pass_on(result, model.post_process)))
        return await self.call(encode, result) if weight(result) >= LARGE else encode(result)

    async def call(self, function: Callable, *args: Any) -> Any:
        """Return what a function returns in another thread."""
        return await self.threads.outcome(self.calls._turns, lambda: function(*args))


class Passage:
    """The way of a request through the Flask application, in a thread, and of its answer back.

    It is a WSGI server (PEP 3333) of one request.
    """

    def __init__(self, edge: Edge, scope: dict, send: Callable, body: bytes, began: float):
        self.edge, self.scope, self.send, self.body, self.began = edge, scope, send, body, began
        self.status, self.headers, self.started = 0, [], False
        self.gone, self.sending = threading.Event(), None

    async def take(self) -> None:
        """Answer the request."""
        try:
            run = functools.partial(copy_context().run, self.run)
            whole = await self.edge.threads.outcome(self.edge.flask_calls._turns, run)
        except Exception as error:
            if not self.started:
                raise
            if not isinstance(error, Gone):
                as_problem(error, self.edge.service, f"the stream of {self.scope['path']}")
            raise asyncio.CancelledError from None  # ends the connection, so that the client knows
        finally:
            self.gone.set()
            if self.sending:
                self.sending.cancel()
        if not self.started:
            await self.edge.start(self.send, self.status, self.headers)
        await self.send({"type": "http.response.body", "body": whole})

    def run(self) -> bytes:
        """Call Flask and return the body, or the rest of it: what is streamed is sent at once."""
        chunks = self.edge.service.app(self.environ(), self.start_response)
        try:
            for chunk in filter(None, chunks):
                if not self.started and str(len(chunk)) == dict(self.headers).get("content-length"):
                    return chunk
                self.write(chunk)
            return b""
        finally:
            getattr(chunks, "close", lambda: None)()

    def start_response(self, status: str, headers: list, exc_info: Any = None) -> Callable:
        if exc_info and self.started:
            raise exc_info[1].with_traceback(exc_info[2])
        self.status = int(status.split()[0])
        self.headers = [(name.lower(), value) for name, value in headers]
        return self.write

    def write(self, chunk: bytes) -> None:
        """Send a part of the body, and wait until it is sent."""
        if not self.started:
            self.started = True
            self.wait_for(self.edge.start(self.send, self.status, self.headers))
        self.wait_for(self.send({"type": "http.response.body", "body": chunk, "more_body": True}))

    def wait_for(self, sending: Any) -> None:
        self.sending = asyncio.run_coroutine_threadsafe(sending, self.edge.loop)
        if self.gone.is_set():
            self.sending.cancel()
        try:
            self.sending.result(30)  # seconds for a client to read
        except (CancelledError, FutureTimeoutError):
            self.sending.cancel()
            raise Gone from None

    def environ(self) -> dict[str, Any]:
        """Return the request as WSGI has it, with the bytes of the path as they were sent."""
        scope, root = self.scope, self.scope.get("root_path") or ""
        raw = scope.get("raw_path") or scope["path"].encode()
        if not raw.startswith(b"/"):  # http://host/path, for proxies (RFC 9112, section 3.2.2)
            raw = b"/" + raw.partition(b"://")[2].partition(b"/")[2]
        path, root = unquote_to_bytes(raw).decode("latin-1"), root.encode().decode("latin-1")
        host, port = scope.get("server") or ("localhost", 80)
        client, client_port = scope.get("client") or ("", 0)
        environ = {
            "REQUEST_METHOD": scope["method"], "SCRIPT_NAME": root.rstrip("/"),
            "PATH_INFO": path.removeprefix(root.rstrip("/")),
            "QUERY_STRING": scope["query_string"].decode("latin-1"), "SERVER_NAME": host,
            "SERVER_PORT": str(port if isinstance(port, int) else 80),  # none is on a Unix socket
            "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}", "REMOTE_ADDR": client,
            "REMOTE_PORT": str(client_port),
            "wsgi.version": (1, 0), "wsgi.url_scheme": scope.get("scheme", "http"),
            "wsgi.input": BytesIO(self.body), "wsgi.input_terminated": True,
            "wsgi.errors": sys.stderr, "wsgi.multithread": True, "wsgi.multiprocess": True,
            "wsgi.run_once": False, "mest.began": self.began,
        }
        if self.body:
            environ["CONTENT_LENGTH"] = str(len(self.body))
        unused = b"content-length", b"transfer-encoding", b"proxy"  # httpoxy.org
        for name, value in scope["headers"]:
            if name in unused or b"_" in name:  # which could pass for another's
                continue
            key = name.decode("latin-1").upper().replace("-", "_")
            key = key if key == "CONTENT_TYPE" else f"HTTP_{key}"
            joint = "; " if name == b"cookie" else ","
            text = value.decode("latin-1")
            environ[key] = f"{environ[key]}{joint}{text}" if key in environ else text
        return environ


# Documentation

#: What Cerberus's types are in JSON.
JSON_TYPES = {
    "binary": "string", "boolean": "boolean", "date": "string", "datetime": "string",
    "dict": "object", "float": "number", "integer": "integer", "list": "array", "number": "number",
    "set": "array", "string": "string",
}
KINDS = ["string", "number", "boolean", "object", "array"]
FORMATS = {"binary": "binary", "date": "date", "datetime": "date-time"}
#: What Cerberus's limits are called in JSON Schema, for each type that they limit.
NUMERIC = {"min": "minimum", "max": "maximum"}
LIMITS = {
    "number": NUMERIC, "integer": NUMERIC,
    "string": {"minlength": "minLength", "maxlength": "maxLength"},
    "array": {"minlength": "minItems", "maxlength": "maxItems"},
    "object": {"minlength": "minProperties", "maxlength": "maxProperties"},
}
#: Parts of Python's regular expressions that other languages lack, or read otherwise.
PYTHONIC = re.compile(
    r"\(\?[^:=!]|[+*?}]\+|\[\^?\]|\{,|\\[^dDwWsSbBnrtfv.*+?()|{}^$/\\\[\]]|[\ud800-\udfff]"
)
SIZED = {"string", "array", "object"}


def as_json(value: Any) -> list:
    """Return a list of the value as it is in JSON, or an empty list if it cannot be."""
    try:
        return [json.loads(ENCODER.encode(value))]
    except (TypeError, ValueError, RecursionError):
        return []


def json_schema(
    rules: Any, unknown: Any = False, required: Any = False, names: tuple = ()
) -> dict[str, Any]:
    """Return what a value must be by Cerberus's rules, as a JSON Schema (draft 2020-12).

    It says what that can say, and nothing of a value that the service converts first. Dictionaries
    hand down whether unknown fields are allowed and known ones required, and the names of rules
    that are being described, since those may be within themselves.
    """
    if isinstance(rules, str) and rules in names:
        return {}
    names = (*names, rules) if isinstance(rules, str) else names
    rules, about = resolved(rules), {}
    if "default" in rules:
        about |= {"default": default for default in as_json(rules["default"])}
    if isinstance(rules.get("meta"), dict) and "description" in rules["meta"]:
        about["description"] = str(rules["meta"]["description"])
    if "coerce" in rules or not JSON_TYPES.keys() >= set(types_of(rules)):
        return about
    schema = _value_schema(rules, unknown, required, names)
    types = as_list(schema["type"])
    if rules.get("empty") and SIZED & {*types}:  # then Cerberus asks no more of an empty value
        empty = {"type": sorted(SIZED & {*types}), "maxLength": 0, "maxItems": 0}
        schema = {"anyOf": [schema, {**empty, "maxProperties": 0}]}
    if rules.get("nullable") or rules.keys() & {"default", "default_setter"}:  # which replace null
        if schema.keys() & {"enum", "not", "allOf", "anyOf", "oneOf"}:
            schema = {"anyOf": [schema, {"type": "null"}]}
        else:
            schema["type"] = [*types, "null"]
    return {**schema, **about}


def _value_schema(rules: Mapping, *inherited: Any) -> dict[str, Any]:
    """Return what rules say about a value that is neither null nor converted."""
    kinds = [*dict.fromkeys(JSON_TYPES[kind] for kind in types_of(rules))] or [*KINDS]
    schema: dict[str, Any] = {"type": kinds if len(kinds) > 1 else kinds[0]}
    schema |= {"format": FORMATS[kind] for kind in types_of(rules) if kind in FORMATS}
    least = {} if rules.get("empty", True) else {"minlength": max(1, rules.get("minlength", 1))}
    for rule, keyword in itertools.chain(*(LIMITS.get(kind, {}).items() for kind in kinds)):
        bound = {**rules, **least}.get(rule)
        counts_defaults = keyword.endswith("Properties") and "schema" in rules
        if type(bound) in (int, float) and are_finite([bound]) and not counts_defaults:
            schema[keyword] = bound
    if "string" in kinds and "regex" in rules and not PYTHONIC.search(rules["regex"]):
        schema["pattern"] = f"^(?:{rules['regex'].removesuffix('$')}$)"
    if kinds == ["object"]:
        schema |= _object_schema(rules, *inherited)
    said, of_items = [], []
    for rule in ("allowed", "forbidden"):
        if isinstance(rules.get(rule), Iterable):
            values = {"enum": [known for value in rules[rule] for known in as_json(value)]}
            if kinds == ["array"]:  # of a list it is said of the items
                of_items.append(values if rule == "allowed" else {"not": values})
            elif not {"array", "object"} & {*kinds}:
                said.append(values if rule == "allowed" else {"not": values})
    if kinds == ["array"]:
        of_items += [json_schema(rules["schema"], *inherited)] if "schema" in rules else []
        schema["items"] = {"allOf": of_items} if len(of_items) > 1 else [*of_items, {}][0]
        if "items" in rules:
            schema["prefixItems"] = [json_schema(item, *inherited) for item in rules["items"]]
            schema |= {"items": False, "minItems": len(rules["items"])}
    for rule in sorted(LOGIC & rules.keys()):
        shared = {name: rules[name] for name in ("type", "allow_unknown") if name in rules}
        each = [json_schema({**shared, **resolved(one)}, *inherited) for one in rules[rule]]
        said.append({"not": {"anyOf": each}} if rule == "noneof" else {rule[:-2] + "Of": each})
    return {**schema, **said[0]} if len(said) == 1 else schema | ({"allOf": said} if said else {})


def _object_schema(rules: Mapping, unknown: Any, required: Any, names: tuple) -> dict[str, Any]:
    """Return what the rules of a dictionary say about its fields."""
    schema: dict[str, Any] = {}
    inherited = rules.get("allow_unknown", unknown), rules.get("require_all", required), names
    if "schema" in rules:
        schema |= fields_schema(rules["schema"], *inherited)
    elif "valuesrules" in rules:
        schema["additionalProperties"] = json_schema(rules["valuesrules"], *inherited)
    if "keysrules" in rules:
        schema["propertyNames"] = json_schema(rules["keysrules"])
    return schema


def fields_schema(
    fields: Any, unknown: Any = False, required: Any = False, names: tuple = ()
) -> dict[str, Any]:
    """Return a Cerberus schema as the JSON Schema of an object."""
    if isinstance(fields, str):
        if fields in names:
            return {"type": "object"}
        fields, names = cerberus.schema_registry.get(fields) or {}, (*names, fields)
    rules = {str(field): resolved(own) for field, own in fields.items()}
    known = {field: own for field, own in rules.items() if not own.get("readonly")}
    optional = {
        other for field, own in known.items()
        for other in (*as_list(own.get("excludes", [])), own.get("rename"))
    }
    optional |= {*known} if any("rename_handler" in own for own in known.values()) else set()
    replaced = {"default", "default_setter", "excludes", "rename"}
    needed = [
        field for field, own in known.items()
        if own.get("required", required) and not replaced & own.keys() and field not in optional
    ]
    properties = {f: json_schema(fields[f], unknown, required, names) for f in known if f in fields}
    others = unknown if isinstance(unknown, bool) else json_schema(unknown)
    schema = {"type": "object", "properties": properties, "required": needed}
    return {**schema, "additionalProperties": others}


#: What the answers to requests that fail mean. They are problem details.
PROBLEMS = {
    400: "The body cannot be read.", 401: "The API key is missing or wrong.",
    404: "There is no such thing.", 408: "The body came too slowly.", 413: "The body is too long.",
    415: "The body is of a type that is not taken.", 422: "The parameters are not valid.",
    500: "The service failed.", 503: "The service is not ready, or has too much to do.",
    504: "The model did not answer in time.",
}
PROBLEM_SCHEMA = {
    "type": "object", "required": ["type", "title", "status"],
    "properties": {
        "type": {"type": "string"}, "title": {"type": "string"}, "status": {"type": "integer"},
        "detail": {"type": "string"}, "request_id": {"type": "string"},
        "errors": {"type": "object", "description": "what is wrong, by field"},
    },
}
#: How a request shows its key.
KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def openapi(mest_app: Any, place: str) -> dict[str, Any]:
    """Return the description of a service for whoever asks for it at a path.

    It is OpenAPI 3.1, https://spec.openapis.org/oas/v3.1.1, of all routes that routers have
    declared or `validate_params` checks. Urls in it are relative to its own.
    """
    config, paths = mest_app.config, {}
    for path, method, described in operations(mest_app):
        paths.setdefault(path, {}).setdefault(method.lower(), described)
    problem = {"schema": {"$ref": "#/components/schemas/Problem"}}
    responses = {
        str(status): {"description": text, "content": {"application/problem+json": problem}}
        for status, text in PROBLEMS.items()
    }
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": config.service_name, "version": config.service_version or "0",
            "x-mest": __version__, "x-models": [name for _, name in mest_app._labelled()],
        },
        "servers": [{"url": "/".join([".."] * (place.count("/") - 1)) or "."}],
        "paths": paths,
        "components": {"responses": responses, "schemas": {"Problem": PROBLEM_SCHEMA}},
    }
    if config.api_keys:
        document["security"] = [{name: []} for name in KEY_SCHEMES]
        document["components"]["securitySchemes"] = KEY_SCHEMES
    return document


def operations(mest_app: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield path, method and description of what can be asked, but for the documentation itself."""
    ids = set()
    for rule, view in views_of(mest_app.app):
        known = hasattr(view, "needs_key") or parameters_of(view)
        if not known or re.match(r"mest_docs(_\d+)?\.", rule.endpoint):
            continue
        literal = rule.rule.replace("{", "%7B").replace("}", "%7D")
        path = VARIABLE.sub(r"{\1}", literal)
        summary, _, description = (inspect.getdoc(view) or "").partition("\n")
        for method in sorted(rule.methods & {"GET", "PUT", "POST", "DELETE", "PATCH", "TRACE"}):
            name = re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_")
            while name in ids:
                name += "_"
            ids.add(name)
            described = {
                "operationId": name, "tags": [rule.endpoint.rpartition(".")[0] or "application"],
                "summary": summary, "description": description.strip(),
                **request_of(rule, method, parameters_of(view)),
                "responses": responses_of(rule, view, bool(mest_app.config.api_keys)),
            }
            if mest_app.config.api_keys and not getattr(view, "needs_key", False):
                described["security"] = []
            yield path, method, described


def request_of(rule: Rule, method: str, parameters: Parameters | None) -> dict[str, Any]:
    """Return what a route takes: parameters of the path, and of the query or the body."""
    given = rule.defaults or {}
    schema, example = (parameters.schema, parameters.example or {}) if parameters else ({}, {})
    fields = {field: rules for field, rules in schema.items() if field not in given}
    example = {k: v for k in example for v in as_json(example[k])}  # files are no part of it
    listed: list[dict[str, Any]] = []

    def add(place: str, name: str, required: bool, schema: dict) -> None:
        shown = {"example": example.pop(name)} if name in example else {}
        listed.append({"name": name, "in": place, "required": required, "schema": schema, **shown})

    for name in VARIABLE.findall(rule.rule):
        own = json_schema(fields.pop(name)) if name in fields else {}
        add("path", name, True, {**variable_schema(rule, name), **own})
    schema = fields_schema(fields)
    if method not in BODY_METHODS:
        for name, field in schema["properties"].items():
            add("query", name, name in schema["required"], field)
    if method not in BODY_METHODS or not fields:
        return {"parameters": listed}
    has_files = '"format": "binary"' in json.dumps(schema, default=str)
    media_type = "multipart/form-data" if has_files else "application/json"
    content = {media_type: {"schema": schema, **({"example": example} if example else {})}}
    body = {"required": bool(schema["required"]), "content": content}
    return {"parameters": listed, "requestBody": body}


def responses_of(rule: Rule, view: Callable, has_keys: bool) -> dict[str, Any]:
    """Return what a route answers."""
    handler, needs_key = getattr(view, "__wrapped__", None), getattr(view, "needs_key", False)
    is_probe = isinstance(handler, Probe) or hasattr(view, "needs_key") and not needs_key
    statuses = {503} if is_probe else {408, 413, 500, 503, 504}
    statuses |= {400, 415, 422} if parameters_of(view) else set()
    statuses |= {404} if rule.arguments else set()
    statuses |= {401} if has_keys and needs_key else set()
    responses = {str(s): {"$ref": f"#/components/responses/{s}"} for s in sorted(statuses)}
    kind = getattr(handler, "media_type", "application/json")
    if not is_probe and not isinstance(handler, Prediction):  # who knows what it answers
        responses["default"], kind = {"description": "Another answer."}, "*/*"
    return {"200": {"description": "The answer.", "content": {kind: {}}}, **responses}


def variable_schema(rule: Rule, name: str) -> dict[str, Any]:
    """Return what a variable of a rule's url must be, as a JSON Schema."""
    converter = getattr(rule, "_converters", {}).get(name)
    schema: dict[str, Any] = {"type": "string", "minLength": 1}
    if isinstance(converter, NumberConverter):
        schema = {"type": "integer" if converter.num_convert is int else "number"}
        least = converter.min if converter.min is not None or converter.signed else 0
        bounds = {"minimum": least, "maximum": converter.max}
        schema |= {keyword: bound for keyword, bound in bounds.items() if bound is not None}
    elif isinstance(converter, UUIDConverter):
        schema |= {"format": "uuid"}
    elif isinstance(converter, AnyConverter):
        schema |= {"enum": [*converter.items]}
    return schema


def openapi_json() -> flask.Response:
    """What this page says, for programs."""
    document = openapi(service(), request.path)
    text = json.dumps(document, default=str)
    return flask.Response(text, content_type="application/json")


def docs() -> flask.Response:
    """A page to read about the service and to try it."""
    policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
    policy += "form-action 'none'; frame-ancestors 'none'"
    for tag in ("script", "style"):
        inline = re.search(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)[1].encode()
        digest = base64.b64encode(hashlib.sha256(inline).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    return flask.Response(PAGE, headers=headers, content_type="text/html; charset=utf-8")


openapi_json.needs_key = docs.needs_key = False


# Application

#: Those of RFC 9110, and PATCH of RFC 5789. Clients may make up others, which metrics do not list.
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}


def is_among(models: Iterable, model: Any) -> bool:
    """Return whether a model itself is among these, whatever it may be equal to."""
    return any(model is other for other in models)


def cure_of(error: BaseException, directory: str) -> str:
    """Return what to do when a model's `init` has failed, if that can be told."""
    if isinstance(error, ImportError):
        return f"; install it for {sys.executable}"
    if isinstance(error, TypeError) and not error.__traceback__.tb_next:  # init did not begin
        return "; write def init(self, directory_path)"
    if isinstance(error, OSError) and not os.path.isdir(directory):
        missing = f"there is no directory {os.path.abspath(directory)}"
        return f"; local_model_directory_path is {directory!r}, and {missing}"
    return ""


class Mest:
    """A service: a configuration, models and routes on one Flask application.

    Args:
        config: the configuration, or the service_name.
        app: a Flask application to live in, which keeps its logging, error handlers and routes as
            they are. Without it Mest makes one, and all errors of that are problem details.
        **fields: with the service_name, fields of MestConfig.
    """

    #: Set by the command while it imports an application: `run()` is its business then, and models
    #: are loaded by the process that will serve.
    _run_by_command = False
    _setup_deferred = False

    def __init__(self, config: MestConfig | str, app: flask.Flask | None = None, **fields: Any):
        if isinstance(config, str):
            config, fields = MestConfig(config, **fields), {}
        if not isinstance(config, MestConfig) or fields:
            needed = 'a MestConfig with all fields, or a name: Mest("shop", workers=2, app=app)'
            raise MestError(f"Mest was given {config!r}; it must be {needed}")
        if not isinstance(app, (flask.Flask, type(None))):
            raise MestError(f"Mest was given the application {app!r}; it must be a flask.Flask")
        if app and "mest" in app.extensions:
            raise MestError("the Flask application has a Mest already; add routers to that")
        self.config = config
        self.logger = logging.getLogger(config.service_name) if app else set_up_logging(config)
        self.app = app or self._flask()
        self._draining = mmap.mmap(-1, 1)  # a byte that processes share across forks
        self._loaded: dict[int, float] = {}  # seconds that it took, by the models' ids
        self._edge: Edge | None = None
        self._is_warm = self._is_set_up = False
        #: Whether who asks is who develops, and may see tracebacks.
        self.is_in_development = False
        #: The models that it loads.
        self.models: list[Any] = []
        self.share_metrics(Metrics())
        for model in config.models_instances:
            self.adopt(model)
        for doubt in config.doubts:
            self.logger.warning(doubt)
        #: /livez, /readyz and /metrics, and /docs and /openapi.json. An application that Mest lives
        #: in may register them.
        self.probes, self.docs = Router("mest"), Router("mest_docs")
        self._declare_own()
        self.app.extensions.setdefault("mest", self)
        if not app:
            self.register_router("/", self.probes)
            self.register_router("/", self.docs)
        for rule, _ in views_of(self.app):  # of blueprints that were there before
            if isinstance(handler := handler_of(self.app, rule), Prediction):
                self.adopt(handler.model)

    def _declare_own(self) -> None:
        metrics = Probe(self.metrics_text, self.config.protect_metrics, "text/plain")
        self.probes._add_own("livez", "GET", Probe(self.livez))
        self.probes._add_own("readyz", "GET", Probe(self.readyz))
        self.probes._add_own("metrics", "GET", metrics)
        if self.config.docs:
            self.docs._add_own("docs", "GET", docs)
            self.docs._add_own("openapi.json", "GET", openapi_json)

    @functools.cached_property
    def router(self) -> Router:
        """A router at "/", for a service that needs no other."""
        router = Router("root")
        self.register_router("/", router)
        return router

    def _flask(self) -> flask.Flask:
        name, here = self.config.service_name, os.getcwd()
        app = flask.Flask(name, root_path=here, instance_path=here, static_folder=None)
        app.logger = self.logger
        app.json.sort_keys = False
        app.config["MAX_CONTENT_LENGTH"] = self.config.max_body_bytes
        app.before_request(begin_request)
        app.after_request(finish_request)
        app.teardown_request(end_request)
        app.register_error_handler(HTTPException, self.refuse)
        return app

    def refuse(self, error: HTTPException) -> Any:
        """Return the response to an error, which says where to go if an url or method is wrong."""
        if error is request.routing_exception and error.code in (404, 405):
            text = f"There is nothing at {request.path}."
            if isinstance(error, MethodNotAllowed):
                methods = sorted(set(error.valid_methods or ()) - FLASK_METHODS)
                instead = " or ".join(methods) or "OPTIONS"
                text = f"{request.path} takes {instead}, not {request.method}."
            rules = map(str, self.app.url_map.iter_rules() if self.config.docs else ())
            if error.code == 404 and (close := get_close_matches(request.path, rules)):
                text += f" Did you mean {close[0]}?"
            error.description = text + (" /docs shows what there is." if self.config.docs else "")
        problem = as_problem(error, self, f"{request.method} {request.path}")
        return problem.get_response(request.environ)

    def share_metrics(self, metrics: Metrics) -> None:
        """Count there from now on, and tell the models so, and what their limits are."""
        self.metrics = metrics
        for model, label in self._labelled():
            if is_generic(model):
                model._limits = self.config.max_queued_requests, self.config.request_timeout
                model._metrics = metrics, label

    def _labelled(self) -> Iterator[tuple[Any, str]]:
        """Yield each model with its class's name, and a number from the second of a class on."""
        seen: dict[str, int] = {}
        for model in self.models:
            name = type(model).__name__
            seen[name] = seen.get(name, 0) + 1
            yield model, name if seen[name] == 1 else f"{name}-{seen[name]}"

    @property
    def draining(self) -> bool:
        """Whether the service is about to stop: probes and pings say so, to get no more requests.

        All processes share it that have been forked since the Mest was made.
        """
        return bool(self._draining[0])

    @draining.setter
    def draining(self, value: bool) -> None:
        self._draining[0] = value

    def livez(self) -> tuple[bytes, str]:
        """Whether the process can serve.

        It answers 503 if a model has been busy with one call for longer than liveness_timeout.
        """
        limit = self.config.liveness_timeout
        for model, name in self._labelled():
            if limit and is_generic(model) and model._turns.busy_for() > limit:
                stuck = f"{name} has been in one call for more than {limit} s"
                raise Problem(503, f"The model {stuck}.")
        return encode({"status": "alive"})

    def readyz(self) -> tuple[bytes, str]:
        """Whether requests may come: the models are loaded, and the service is not stopping."""
        if self.draining:
            raise Problem(503, f"{self.config.service_name} is shutting down.")
        for model in self.models:
            if id(model) not in self._loaded and not getattr(model, "is_loaded", False):
                raise Problem(503, f"The model {type(model).__name__} is not loaded.")
        return encode({"status": "ready"})

    def metrics_text(self) -> tuple[bytes, str]:
        """Counters of all processes, for Prometheus."""
        return self.metrics.text().encode(), "text/plain; version=0.0.4; charset=utf-8"

    def answered(
        self, route: str | None, method: str, path: str, status: int, began: float
    ) -> None:
        """Count, and log if that is asked for, a request that began at a time.perf_counter()."""
        seconds = time.perf_counter() - began
        route, verb = route or "other", method if method in METHODS else "other"
        self.metrics.add(1, "mest_requests_total", route, verb, status)
        self.metrics.observe(seconds, "mest_request_duration_seconds", route)
        if self.config.access_log:
            fields = {"method": method, "path": path, "status": status}
            fields["milliseconds"] = round(seconds * 1000, 3)
            self.logger.info("answered", extra={"fields": fields})

    def setup(self) -> Mest:
        """Load the models that are not loaded yet, and return the Mest itself.

        Raises:
            MestError: names the model whose `init` failed, and has that failure as its cause.
        """
        self._is_set_up = True
        if not Mest._setup_deferred:
            self.load_models()
        return self

    def adopt(self, model: Any) -> None:
        """Take care of a model of the configuration, or of a predict route."""
        if is_among(self.models, model):
            return
        if not is_generic(model) and not is_among(self.config.models_instances, model):
            return  # nothing is known of how to load it
        if is_generic(model):
            check_model(model)
        self.models.append(model)
        self.share_metrics(self.metrics)
        if self._is_set_up:
            self.setup()

    def load_models(self) -> None:
        """Do what `setup` does, even while the command has deferred it."""
        check_routes(self.app)
        directory = self.config.local_model_directory_path
        for model, name in self._labelled():
            by_hand = is_generic(model) and vars(model).get("model") is not None
            if by_hand and not is_among(self.config.models_instances, model):
                self._loaded.setdefault(id(model), 0.0)
            if id(model) in self._loaded:
                continue
            started = time.perf_counter()
            try:
                returned = model.init(directory)
            except (Exception, SystemExit) as error:
                reason = f"model {name} could not be loaded: {type(error).__name__}: {error}"
                raise MestError(reason + cure_of(error, directory)) from error
            seconds = self._loaded[id(model)] = time.perf_counter() - started
            self.metrics.set(seconds, "mest_model_load_seconds", name)
            self.logger.info("model %s loaded in %.3f s", name, seconds)
            if is_generic(model):
                model._initialised = True
                self._doubt(model, name, returned)
        check_routes(self.app)  # once more, since init may make stages

    def _doubt(self, model: GenericModel, name: str, returned: Any) -> None:
        """Warn of what is probably a mistake in a model that has been loaded."""
        batches = own_stage(model, "infer_batch")
        if batches and model.max_batch_size == 1:
            self.logger.warning("model %s gets no batches: set its max_batch_size", name)
        if not batches and model.max_batch_size > 1:
            self.logger.warning("model %s makes no batches: it has no infer_batch()", name)
        if returned is not None and model.model is None:
            self.logger.warning("init of model %s returned something: set self.model to it", name)

    def warm_up(self) -> None:
        """Load the models, and run the example of each predict route once: first calls are slow.

        Raises:
            MestError: a model cannot be loaded, or fails for an example.
        """
        self.load_models()
        if self._is_warm:
            return
        self._is_warm = True
        for model in self.models:
            if is_generic(model):  # the first call may take as long as it needs
                model._limits = self.config.max_queued_requests, None
        for rule, _ in views_of(self.app):
            prediction = handler_of(self.app, rule)
            if isinstance(prediction, Prediction) and prediction.parameters.example is not None:
                params = prediction.parameters.check(copy.deepcopy(prediction.parameters.example))
                try:
                    prediction.answer(params)
                except (Exception, SystemExit) as error:
                    name, what = type(prediction.model).__name__, f"{type(error).__name__}: {error}"
                    reason = f"model {name} fails for the example of {rule.rule}: {what}"
                    raise MestError(reason) from error
        self.share_metrics(self.metrics)

    def register_router(self, url: str, router: Router) -> None:
        """Put the routes of a router, present and future ones, under an url or several in turn.

        Raises:
            MestError: another router has its name, or another route one of its urls.
        """
        if not isinstance(url, str) or not isinstance(router, Router):
            raise MestError(f"register_router takes url and router, not {url!r} and {router!r}")
        same = [other for other in self.app.blueprints.values() if other.name == router.name]
        if any(other is not router.blueprint for other in same):
            raise MestError(f"there are two routers named {router.name!r}; rename one of them")
        name = f"{router.name}_{len(same) + 1}" if same else router.name
        self.app.register_blueprint(router.blueprint, url_prefix="/" + url.strip("/"), name=name)

    def announce(self, place: str) -> None:
        """Note that this process serves; the first of several workers logs what, where and how."""
        self.metrics.set(1, "mest_workers_ready")
        if self.metrics.slot > 1:
            return
        loaded = ((name, self._loaded[id(model)]) for model, name in self._labelled())
        models = ", ".join(f"model {name} ({seconds:.3f} s)" for name, seconds in loaded)
        parts = [f"serves on {place} of {self.config.threads} threads", models, *ways(self.app)]
        self.logger.info("; ".join(filter(None, parts)))

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """Serve as an ASGI application, of gunicorn's own worker, uvicorn and others."""
        loop = asyncio.get_running_loop()
        if self._edge is None or self._edge.loop is not loop:
            self._edge = Edge(self, loop)
        await self._edge(scope, receive, send)

    def run(self) -> None:
        """Start the development server on 127.0.0.1 and the `listen_port`, with the models loaded.

        In a file that the `mest` command has loaded it only logs that the command does so.
        """
        if Mest._run_by_command:
            self.logger.info("mest_app.run() does nothing here: the mest command runs the service")
            return
        self.load_models()
        self.develop(self.config.listen_host or "127.0.0.1", self.config.listen_port)

    def develop(self, host: str, port: int, **options: Any) -> None:
        """Serve with Flask's server, which shows failures if only this machine can reach it."""
        self.is_in_development = is_loopback(host)
        starts_another = options.get("use_reloader") and not is_running_from_reloader()
        if "mest_docs" in self.app.blueprints and not starts_another:
            place = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # all are this one, too
            place = f"[{place}]" if ":" in place else place
            self.logger.info("try it in a browser: http://%s:%d/docs", place, port)
        run_simple(host, port, self.app, threaded=True, **options)


# Serving


#: What worker_for and protocol_for override or call of gunicorn's that is not public.
PRIVATE = {
    "ASGIProtocol": (
        "_callback_parser", "_close_transport", "_closed", "_current_request", "_is_buffer_full",
        "_keepalive_timeout", "_on_headers_complete", "_resume_reading", "_send_error_response",
    ),
    "ASGIWorker": ("_setup_event_loop", "_shutdown"),
}


def missing_in(*classes: type) -> list[str]:
    """Return which of PRIVATE these classes of gunicorn do not have."""
    return [
        f"{cls.__name__}.{name}" for cls in classes for name in PRIVATE[cls.__name__]
        if not hasattr(cls, name) and name not in cls.__init__.__code__.co_names
    ]


#: What the master sends to workers instead of SIGTERM, since nobody else does. Not on Windows.
DISMISS = getattr(signal, "SIGUSR2", None)


def protocol_for(mest_app: Mest) -> type:
    """Return gunicorn's class of connections, with what it lacks."""
    from gunicorn.asgi.protocol import ASGIProtocol

    class Protocol(ASGIProtocol):
        due: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.worker.protocols.add(self)
            self.expect_headers()
            if self.worker.nr_conns > self.worker.worker_connections:  # gunicorn takes any number
                self._send_error_response(503, "Too many connections.", [("Retry-After", "1")])
                self._close_transport()

        def expect_headers(self) -> None:
            if self._callback_parser and not self._closed:  # HTTP/1; gunicorn would wait for ever
                seconds = mest_app.config.header_timeout
                self.due = self.worker.loop.call_later(seconds, self._keepalive_timeout)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._current_request is None and not self.due:  # those of a later request
                self.expect_headers()

        def _on_headers_complete(self) -> Any:
            self.due = self.due and self.due.cancel()
            return super()._on_headers_complete()

        def _resume_reading(self) -> None:
            if not self._is_buffer_full():  # gunicorn lets pipelined requests fill the memory
                super()._resume_reading()

        def connection_lost(self, error: Exception | None) -> None:
            self.due = self.due and self.due.cancel()
            self.worker.protocols.discard(self)
            super().connection_lost(error)

    return Protocol


def worker_for(mest_app: Mest) -> type:
    """Return gunicorn's class of asynchronous workers, with what it lacks."""
    from gunicorn.asgi.protocol import ASGIProtocol
    from gunicorn.workers.gasgi import ASGIWorker

    if missing := missing_in(ASGIProtocol, ASGIWorker):
        text = "this gunicorn has no %s: slow clients, idle connections and floods cost more"
        mest_app.logger.warning(text, ", ".join(missing))
        return ASGIWorker

    protocol = protocol_for(mest_app)

    class Worker(ASGIWorker):
        def _setup_event_loop(self) -> None:
            super()._setup_event_loop()
            self.protocols: set[ASGIProtocol] = set()
            listen, size = self.loop.create_server, self.cfg.backlog  # asyncio makes that 100
            self.loop.create_server = lambda _, **rest: listen(
                lambda: protocol(self), backlog=size, **rest
            )

        def init_signals(self) -> None:
            """Heed two alone: a signal to the whole process group is the master's business."""
            heeded = DISMISS, signal.SIGABRT  # which a stuck worker gets
            for number in self.SIGNALS:
                signal.signal(number, signal.SIG_DFL if number in heeded else signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {DISMISS})

        def run(self) -> None:
            """Serve, with handlers of signals that would not have run while the models loaded."""
            for number, handler in ((DISMISS, self.handle_exit_signal),
                                    (signal.SIGQUIT, self.handle_quit_signal),
                                    (signal.SIGUSR1, self.handle_usr1_signal)):
                self.loop.add_signal_handler(number, handler)
            super().run()

        def notify(self) -> None:
            try:
                mest_app.livez()
                super().notify()
            except Problem as stuck:  # the master misses the sign of life, and will replace this
                mest_app.logger.error(stuck.description)

        async def _shutdown(self) -> None:  # gunicorn would wait for idle connections, too
            seconds = self.cfg.graceful_timeout  # after which the master kills
            self.cfg.set("graceful_timeout", max(seconds - 2, seconds // 2))
            self.loop.call_later(0.5, self.close_idle)  # till then they may have a request
            await super()._shutdown()

        def close_idle(self) -> None:
            for connection in [*self.protocols]:
                if connection._current_request is None and connection._callback_parser:
                    connection._keepalive_timeout()

    return Worker


def master_for(mest_app: Mest) -> type:
    """Return gunicorn's class of the process that supervises the workers, with what it lacks."""
    from gunicorn.arbiter import Arbiter
    from gunicorn.errors import HaltServer

    class Master(Arbiter):
        stops_at = retry_at = math.inf

        def handle_term(self) -> None:
            """Drain, so that balancers notice before the end; or stop, if that is under way."""
            seconds = mest_app.config.drain_seconds
            if not seconds or mest_app.draining:
                self.handle_int()
            mest_app.draining, self.stops_at = True, time.monotonic() + seconds
            mest_app.logger.info("stops in %d s, and is not ready from now on", seconds)

        def handle_int(self) -> None:
            mest_app.draining = True
            mest_app.logger.info("stops, when the requests in progress are answered")
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # in gunicorn a second one cuts them off
            raise StopIteration  # gunicorn's word for a graceful stop

        def handle_hup(self) -> None:
            """Start new workers; manage_workers stops the old ones when those are ready."""
            same = ", but those have the same models: --preload" if self.cfg.preload_app else ""
            mest_app.logger.info("starts new workers, and then stops the old ones%s", same)
            for pid, worker in [*self.WORKERS.items()]:
                if not self.is_ready(worker):  # of a reload before this, perhaps
                    self.kill_worker(pid, signal.SIGTERM)
            self.app.reload()
            self.setup(self.app)
            self.log.reopen_files()
            self.cfg.on_reload(self)
            for _ in range(self.num_workers):
                self.spawn_worker()

        def wait_for_signals(self, timeout: float = 1.0) -> list:
            left = self.stops_at - time.monotonic()
            if left <= 0:
                self.handle_int()
            return super().wait_for_signals(timeout=min(timeout, left))

        def spawn_worker(self) -> int:
            self.app.address = ", ".join(map(str, self.LISTENERS or self.cfg.bind))
            used = {worker.slot for worker in self.WORKERS.values()}
            last = mest_app.metrics.slots - 1
            slot = next((slot for slot in range(1, last) if slot not in used), last)
            mest_app.metrics.begin(slot)
            mest_app.metrics.add(1, "mest_workers_started_total")
            signal.pthread_sigmask(signal.SIG_BLOCK, {DISMISS})  # until the child can heed it
            pid = super().spawn_worker()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {DISMISS})
            self.WORKERS[pid].slot, self.WORKERS[pid].dismissed = slot, False
            return pid

        def is_ready(self, worker: Any) -> bool:
            return mest_app.metrics.is_ready(worker.slot)

        def manage_workers(self) -> None:
            if time.monotonic() > self.retry_at:
                self.num_workers, self.retry_at = self.cfg.workers, math.inf
            newest = sorted(self.WORKERS.values(), key=lambda worker: -worker.age)
            enough = all(map(self.is_ready, newest[: self.num_workers]))
            if enough or len(newest) <= self.num_workers:
                super().manage_workers()

        def kill_worker(self, pid: int, number: int) -> None:
            if number != signal.SIGUSR1 and pid in self.WORKERS:
                self.WORKERS[pid].dismissed = True
            ours = number == signal.SIGTERM and hasattr(self.worker_class, "close_idle")
            super().kill_worker(pid, DISMISS if ours else number)

        def reap_workers(self) -> None:
            """Go on without workers that could not start, as long as there are others."""
            before = dict(self.WORKERS)
            with contextlib.suppress(HaltServer):
                super().reap_workers()
            lost = [before[pid] for pid in before.keys() - self.WORKERS.keys()]
            failed = any(not self.is_ready(worker) and not worker.dismissed for worker in lost)
            for worker in lost:
                mest_app.metrics.retire(worker.slot)
            if failed:
                ready = sum(map(self.is_ready, self.WORKERS.values()))
                text = "a worker could not load its models; %d go on with theirs"
                mest_app.logger.error(text, ready)
                if not ready:
                    raise HaltServer("no worker has its models", self.WORKER_BOOT_ERROR)
                if ready < self.num_workers:
                    self.num_workers, self.retry_at = ready, time.monotonic() + 60

    return Master


def settings_for(mest_app: Mest, bind: str) -> dict[str, Any]:
    """Return the settings of gunicorn that a Mest asks for."""
    from gunicorn.glogging import Logger

    class Log(Logger):
        def setup(self, cfg: Any) -> None:
            super().setup(cfg)
            own = cfg.logconfig or cfg.logconfig_dict or cfg.logconfig_json
            if cfg.errorlog == "-" and not own:
                self.error_log.handlers = [LogHandler(mest_app.config.log_format)]

    return {
        "bind": bind,
        "workers": mest_app.config.workers,
        "worker_class": worker_for(mest_app),
        "worker_connections": mest_app.config.max_connections,
        "graceful_timeout": mest_app.config.graceful_timeout + 2,  # of which workers leave 2
        "asgi_lifespan": "on",
        "asgi_disconnect_grace_period": 0,  # who has left is not waited for
        "keepalive": 75,  # seconds; load balancers keep idle connections for 60
        "loglevel": "warning",
        "logger_class": Log,
        "control_socket_disable": True,  # it writes to $HOME, which containers may lack
        "worker_tmp_dir": "/dev/shm" if os.access("/dev/shm", os.W_OK) else None,
    }


def gunicorn_for(mest_app: Mest, bind: str, options: list[str]) -> Any:
    """Return gunicorn's application for a Mest, configured.

    The options beat GUNICORN_CMD_ARGS, that beats gunicorn.conf.py, and that the MestConfig.
    """
    from gunicorn.app.base import Application, BaseApplication
    from gunicorn.errors import AppImportError
    from gunicorn.workers.gasgi import ASGIWorker

    config = mest_app.config

    class Run(BaseApplication):
        def run(self) -> None:
            self.master = os.getpid()  # which --daemon has changed
            master_for(mest_app)(self).run()

    class Service(Application, Run):  # so that Application.run() ends in Run's
        master = os.getpid()

        def init(self, parser: Any, opts: Any, args: list[str]) -> dict[str, Any]:
            if args:
                parser.error(f"{args[0]} is no option; mest --app names the application")
            return settings_for(mest_app, bind)

        def load_config(self) -> None:
            argv, sys.argv = sys.argv, ["mest run gunicorn --", *options]
            try:
                super().load_config()  # reads sys.argv, the environment and gunicorn.conf.py
            finally:
                sys.argv = argv
            if not self.is_asgi and self.cfg.threads == 1:
                self.cfg.set("threads", config.threads)

        @property
        def is_asgi(self) -> bool:
            cls = self.cfg.worker_class
            return issubclass(cls, ASGIWorker) or "uvicorn" in cls.__module__

        def load(self) -> Any:
            """Load the models, in a worker, or in the master with --preload."""
            faulthandler.enable()  # native code of models may crash, or not come back
            try:
                if os.getpid() == self.master:
                    with alarm(config.startup_timeout):
                        mest_app.load_models()
                    prepare_fork(mest_app)
                    return
                with alarm(config.startup_timeout):
                    mest_app.warm_up()
            except MestError as error:
                raise AppImportError(report(error)) from None  # ends the master too
            gc.collect()
            gc.freeze()  # or full collections stop the service, for 0.05 s with scikit-learn
            sys.setswitchinterval(0.0005)  # seconds that the model may hold up the loop
            count = "1 worker" if self.cfg.workers == 1 else f"{self.cfg.workers} workers"
            mest_app.announce(f"{self.address}, {count}")
            return mest_app if self.is_asgi else mest_app.app

    service = Service()
    mest_app.share_metrics(Metrics(slots=4 * service.cfg.workers + 64))
    return service


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError in what the main thread does, if that takes longer."""

    def ring(number: int, frame: Any) -> None:
        raise TimeoutError(f"it was not done within the startup_timeout of {seconds} s")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(seconds + 5, exit=True)  # for code that hears no alarm
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()


def prepare_fork(mest_app: Mest) -> None:
    """Make loaded models ready to be shared by workers, or raise a MestError if they cannot be."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        raise MestError("CUDA has been initialised, and does not survive the fork of --preload")
    threads = [thread.name for thread in threading.enumerate() if thread.name != "MainThread"]
    if threads:
        text = "these threads will not run in the workers that --preload forks: %s"
        mest_app.logger.warning(text, ", ".join(threads))
    gc.collect()
    gc.freeze()  # what is collected later would be copied for each worker


def check_settings(settings: Any) -> None:
    """Raise a MestError about settings of gunicorn with which it would go on as if they were right.

    It would try for long to listen where nobody can, and serve without TLS if the key is wrong.
    """
    from gunicorn.sock import ssl_context

    if settings.reload:
        raise MestError("gunicorn's --reload would not load changed code here; use mest run dev")
    try:
        if settings.is_ssl:
            ssl_context(settings)
    except OSError as error:
        raise MestError(f"the certfile or keyfile of gunicorn cannot be used: {error}") from None
    inherited = {"GUNICORN_FD", "LISTEN_FDS"} & os.environ.keys()  # from a master, from systemd
    places = [] if inherited or settings.reuse_port else settings.address
    try:
        for host, port in (place for place in places if isinstance(place, tuple)):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        places, cure = ", ".join(settings.bind), "choose another with --port or MEST_LISTEN_PORT"
        raise MestError(f"cannot listen on {places}: {reason}; {cure}") from None


# Command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `mest` command, and return its exit code: 1 for a failure, 2 for a wrong option."""
    parser = command_line()
    args = parser.parse_args(argv)
    try:
        for name in MestConfig.FIELDS.keys() & vars(args).keys():
            option = "--" + name.removeprefix("listen_")
            MestConfig.convert(name, getattr(args, name), option)
            os.environ["MEST_" + name.upper()] = getattr(args, name)  # beats the code
    except MestError as error:
        parser.error(str(error))
    try:
        return args.run(args)
    except MestError as error:
        print(report(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as shells have it


class CommandLine(argparse.ArgumentParser):
    """A parser whose complaints say what was probably meant."""

    def error(self, message: str) -> NoReturn:
        if re.search(r"\.py\b", message):
            message += "; the application is named with --app"
        elif "unrecognized" in message and "gunicorn" in sys.argv:
            message += "; gunicorn's own options follow a --"
        super().error(message)


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line; what it parses has the function to call as `run`."""
    app = argparse.ArgumentParser(add_help=False)
    app.add_argument("--app", default=argparse.SUPPRESS, metavar="FILE_OR_MODULE[:NAME]",
                     help="the application, and its Mest's name; default $MEST_APP or app.py")
    parser = CommandLine("mest", description=__doc__.split(" This ")[0], parents=[app])
    parser.add_argument("--version", action="version", version=f"mest {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    servers = commands.add_parser("run", help="serve the application", parents=[app])
    servers = servers.add_subparsers(required=True, metavar="SERVER")

    def add(group: Any, name: str, run: Callable, *fields: str, **options: Any) -> Any:
        options = {"parents": [app], "allow_abbrev": False, **options}
        command = group.add_parser(name, help=run.__doc__, description=run.__doc__, **options)
        command.set_defaults(run=run)
        for field in fields:
            option, help = field.removeprefix("listen_"), MestConfig.FIELDS[field][2]
            shown = {"default": argparse.SUPPRESS, "metavar": option.upper(), "help": help}
            command.add_argument(f"--{option}", dest=field, **shown)
        return command

    dev = add(servers, "dev", run_dev, "listen_host", "listen_port")
    dev.add_argument("--no-reload", action="store_true", help="do not watch the files")
    dev.add_argument("--debug", action="store_true", help="show tracebacks in the browser")
    fields = "listen_host", "listen_port", "workers", "threads"
    production = add(servers, "gunicorn", run_gunicorn, *fields)
    production.add_argument("--preload", action="store_true", help="load the models before forking")
    production.add_argument("--access-log", action="store_const", const="1",
                            default=argparse.SUPPRESS, help="log each request")
    production.add_argument("options", nargs="*", metavar="-- OPTIONS", help="gunicorn's own")
    add(commands, "shell", run_shell)
    test = add(commands, "test", run_test, add_help=False, parents=[], prefix_chars="\0")
    test.add_argument("arguments", nargs="*")  # whatever they start with
    return parser


def files_of_models(directory: str) -> list[str]:
    """Return the files of models, 1000 at most, without those that a model may write itself."""
    found = map(str, itertools.islice(Path(directory).rglob("*"), 1000))
    written = re.compile(r"/\.|cache|\.(lock|log|db|sqlite)")
    return [path for path in found if not written.search(path)]


def run_dev(args: argparse.Namespace) -> int:
    """serve on this machine with Flask's server, reloading what changes"""
    watch, child, files = not args.no_reload, is_running_from_reloader(), []
    options = {"use_reloader": watch, "use_debugger": args.debug, "extra_files": files}
    try:
        mest_app, module = load_app(args)
        config, mest_app.app.debug = mest_app.config, args.debug
        host, port = config.listen_host or "127.0.0.1", config.listen_port
        files += [module.__file__, *files_of_models(config.local_model_directory_path)]
        if child or not watch:  # the reloader's parent serves nothing
            mest_app.load_models()
    except MestError as error:
        if not child:
            raise
        print(report(error), file=sys.stderr)
        problem = Problem(503, "The application does not load; the terminal says why.")
        host, port = os.environ["MEST_LISTEN_HOST"], int(os.environ["MEST_LISTEN_PORT"])
        run_simple(host, port, problem, **options)
        return 1
    if args.debug and not is_loopback(host):
        raise MestError(f"--debug lets whoever reaches {host} run code; use --host 127.0.0.1")
    if not port:  # a free one, which a reload keeps
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as free:
            os.environ.setdefault("_MEST_PORT", str(free.getsockname()[1]))
        port = int(os.environ["_MEST_PORT"])
    os.environ |= {"MEST_LISTEN_HOST": host, "MEST_LISTEN_PORT": str(port)}
    mest_app.develop(host, port, **options)
    return 0


def share_cpus(workers: int) -> None:
    """Let linear algebra use no more threads than a worker has CPUs, unless the user has said so.

    Its libraries read that when they are imported.
    """
    threads = str(max(1, available_cpus() // workers))
    for library in ("OMP", "OPENBLAS", "MKL", "BLIS", "VECLIB", "NUMEXPR"):
        kind = "MAXIMUM" if library == "VECLIB" else "NUM"
        os.environ.setdefault(f"{library}_{kind}_THREADS", threads)


def run_gunicorn(args: argparse.Namespace) -> int:
    """serve in production with gunicorn, whose own options may follow a --"""
    need("gunicorn")
    if not hasattr(os, "fork"):
        raise MestError("gunicorn does not run on Windows; use mest run dev, or a container")
    from gunicorn.errors import AppImportError, HaltServer

    workers = MestConfig("mest").workers  # unless the application says otherwise
    share_cpus(workers)
    mest_app, _ = load_app(args)
    config, given = mest_app.config, vars(args)
    host = f"[{config.listen_host}]" if ":" in config.listen_host else config.listen_host
    bind = f"{host or '0.0.0.0'}:{config.listen_port}"
    options = [f"--workers={config.workers}"] if "workers" in given else []
    options += ["--preload"] if args.preload else []
    bound = any(option.startswith(("-b", "--bind")) for option in args.options)
    if {"listen_host", "listen_port"} & given.keys() and not bound:
        options.append(f"--bind={bind}")
    server, master = gunicorn_for(mest_app, bind, options + args.options), os.getpid()
    if server.cfg.workers > workers:
        text = "the CPUs were shared out to %d workers before it was known that there are %d: %s"
        mest_app.logger.warning(text, workers, server.cfg.workers, "set MEST_WORKERS, or --workers")
    check_settings(server.cfg)
    try:
        server.run()
    except AppImportError as error:  # with --preload
        print(error, file=sys.stderr)
        return 1
    except HaltServer:  # a second worker failed while all stopped for the first
        return 1
    except SystemExit as stop:
        if os.getpid() == master and stop.code in (3, 4):  # a worker could not load the models
            return 1
        raise


def run_shell(args: argparse.Namespace) -> int:
    """start a Python prompt with the models loaded, IPython's where that is installed"""
    mest_app, module = load_app(args)
    mest_app.load_models()
    names = {"mest_app": mest_app, "app": mest_app.app, "client": client_of(mest_app)}
    models = set(map(id, mest_app.models))
    names |= {name: value for name, value in vars(module).items() if id(value) in models}
    banner = summary(mest_app, names)
    with mest_app.app.app_context(), contextlib.suppress(ImportError):
        if sys.stdin and sys.stdin.isatty():
            from IPython import start_ipython

            print(banner)
            return start_ipython(["--no-banner"], user_ns=names) or 0
    with mest_app.app.app_context():
        console = code.InteractiveConsole(names)
        if os.path.isfile(startup := os.environ.get("PYTHONSTARTUP", "")):
            console.runsource(Path(startup).read_text("utf-8", "replace"), startup, "exec")
        console.interact(banner, exitmsg="")
    return 0


def client_of(mest_app: Mest) -> FlaskClient:
    """Return a client of Flask's to test a service, which has a key if one is needed."""
    client = mest_app.app.test_client()
    for key in mest_app.config.api_keys[:1]:
        client.environ_base["HTTP_X_API_KEY"] = key.decode()
    return client


def summary(mest_app: Mest, names: Mapping[str, Any]) -> str:
    """Return what there is to try in a service at a prompt where things have names."""
    lines = [f"{mest_app.config.service_name} {mest_app.config.service_version}".strip()]
    lines += ["  mest_app, app, client: the service, its Flask application, a client to test it"]
    for index, (model, label) in enumerate(mest_app._labelled()):
        named = (name for name, value in names.items() if value is model)
        lines.append(f"  {next(named, f'mest_app.models[{index}]')}: model {label}, loaded")
    for method, url, sent in examples(mest_app):
        rest = "".join(f", {name}={value!r}" for name, value in sent.items())
        lines.append(f"  client.{method.lower()}({url!r}{rest})")
    return "\n".join(lines)


def run_test(args: argparse.Namespace) -> int:
    """send each example to the application, if there is one, and run pytest with its arguments"""
    Mest._run_by_command = True
    has_app = hasattr(args, "app") or "MEST_APP" in os.environ
    if not has_app and os.path.isfile("app.py"):
        has_app = b"mest" in Path("app.py").read_bytes()  # or else it is another application
    failed = in_child(lambda: send_examples(load_app(args)[0])) if has_app else 0
    if has_app and not args.arguments and not importlib.util.find_spec("pytest"):
        return failed
    pytest = need("pytest")
    sys.path.insert(0, os.getcwd())
    code = int(pytest.main(args.arguments))
    has_no_tests = code == pytest.ExitCode.NO_TESTS_COLLECTED and not args.arguments
    return failed if has_app and has_no_tests else code or failed


def in_child(function: Callable[[], int]) -> int:
    """Return what a function returns in a forked process, whose imports this one does not share."""
    if not hasattr(os, "fork"):
        return function()
    sys.stdout.flush()
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        code = function()
    except MestError as error:
        print(report(error), file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def send_examples(mest_app: Mest) -> int:
    """Send each example to the service, say how it went, and return 1 if one is not answered."""
    mest_app.load_models()
    mest_app.is_in_development = True  # answers say what failed
    client, failed, sent = client_of(mest_app), 0, 0
    for method, url, request in examples(mest_app):
        began, why = time.perf_counter(), ""
        try:
            response = client.open(url, method=method, **request)
            status = response.status_code
            if status >= 300:
                problem = response.get_json(silent=True)
                why = problem.get("detail", "") if isinstance(problem, dict) else ""
        except Exception as error:  # it has no form in JSON, for instance
            status, why = 0, f"it cannot be sent: {error}"
        sent, failed = sent + 1, failed + (not 200 <= status < 300)
        took = (time.perf_counter() - began) * 1000
        print(f"{method} {url}: {status or 'not sent'} in {took:.1f} ms {why}".rstrip())
    hint = "" if sent else ": give routes an example={…}, and it is sent here"
    print(f"{sent - failed} of {sent} examples are answered{hint}")
    return min(failed, 1)


def examples(mest_app: Mest) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield method and url of a request with each example, and the rest for Flask's client."""
    for rule, view in views_of(mest_app.app):
        parameters = parameters_of(view)
        example = parameters.example if parameters else None
        values = {**(example or {}), **(rule.defaults or {})}
        if example is None or rule.arguments - values.keys():
            continue  # there is none, or it says nothing about the path
        try:
            _, url = rule.build(values, append_unknown=False) or ("", "")
        except ValueError as error:
            url = f"{rule.rule}: {error}"
        rest = {name: example[name] for name in example if name not in rule.arguments}
        files = {name: content for name in rest if (content := file_of(name, rest[name]))}
        for method in sorted(rule.methods - FLASK_METHODS):
            if method not in BODY_METHODS:
                yield method, url, {"query_string": rest}
            elif files:  # forms cannot say null
                sent = {name: value for name, value in rest.items() if value is not None}
                yield method, url, {"data": {**sent, **files}}
            else:
                yield method, url, {"json": rest}


def file_of(name: str, value: Any) -> list:
    """Return bytes, or several, as Flask's client takes files, or an empty list."""
    are_files = all(isinstance(part, (bytes, bytearray)) for part in as_list(value))
    return [(BytesIO(part), name) for part in as_list(value)] if are_files else []


def need(package: str) -> ModuleType:
    """Return a package that only some commands need, or raise a MestError if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MestError(f"{package} is not installed: pip install {package}") from None


def load_app(args: argparse.Namespace) -> tuple[Mest, ModuleType]:
    """Import the application that --app or MEST_APP names, and return its Mest and its module.

    Raises:
        MestError: it does not exist, cannot be imported, or has no Mest or several.
    """
    target = getattr(args, "app", None) or os.environ.get("MEST_APP") or "app.py"
    path, _, name = target.partition(":")
    module_name, folder = path, Path.cwd()
    if path.endswith(".py"):
        file = Path(path).resolve()
        if not file.is_file():
            hint = "name it with --app or MEST_APP, or change to its directory"
            others = ", ".join(sorted(map(str, Path().glob("*.py")))[:5])
            here = f"{os.getcwd()}, which has {others}" if others else os.getcwd()
            raise MestError(f"there is no application {path} in {here}; {hint}")
        module_name, folder = file.stem, file.parent
        while (folder / "__init__.py").is_file():
            module_name, folder = f"{folder.name}.{module_name}", folder.parent
    sys.path.insert(0, str(folder))
    Mest._run_by_command = Mest._setup_deferred = True
    try:
        module = importlib.import_module(module_name)
    except MestError as error:
        frames, flasks = traceback.extract_tb(error.__traceback__), os.path.dirname(flask.__file__)
        *_, place = (f for f in frames if not f.filename.startswith((__file__, flasks)))
        raise MestError(f"{place.filename}, line {place.lineno}: {error}") from None
    except (Exception, SystemExit) as error:
        reason = f"{path} cannot be imported: {type(error).__name__}: {error}"
        cure = f"; is it installed for {sys.executable}?" if isinstance(error, ImportError) else ""
        raise MestError(reason + cure) from error
    finally:
        Mest._setup_deferred = False
    if path.endswith(".py") and Path(getattr(module, "__file__", None) or "").resolve() != file:
        raise MestError(f"{path} cannot be imported: {module} has its name; rename the file")
    found = {key: value for key, value in vars(module).items() if isinstance(value, Mest)}
    if not name and len(set(map(id, found.values()))) == 1:
        name = min(found)
    name = name or "mest_app"
    if name not in found:
        have = f"its instances of Mest are {', '.join(found)}" if found else "it has no Mest"
        raise MestError(f"{path}: {have}; make one named mest_app, or name one: --app {path}:NAME")
    check_routers(found[name], name, vars(module))
    return found[name], module


def check_routers(mest_app: Mest, name: str, declared: Mapping[str, Any]) -> None:
    """Warn of routers among what is declared whose routes nobody can ask, or raise a MestError.

    It is an error if there is no other route.
    """
    ours, rules = {"mest", "mest_docs"}, views_of(mest_app.app)
    serves_anything = any(rule.endpoint.split(".")[0] not in ours for rule, _ in rules)
    if not serves_anything:
        cure = f"call {name}.router.add_predict_route(…)"
        mest_app.logger.warning("the service has no routes yet; %s", cure)
    for variable, router in declared.items():
        if isinstance(router, Router) and router.routes and not router._registrations:
            cure = f'call {name}.register_router(url="/", router={variable})'
            text = f"the routes of router {router.name!r} are not served; {cure}"
            if not serves_anything:
                raise MestError(text)
            mest_app.logger.warning(text)


# The documented import paths, mest.app, mest.app.api and mest.models, are this module under further
# names. Where it runs as the command, as `python mest.py`, the application that imports it gets
# that same module, not a second one with other classes.
app = api = models = _this = sys.modules[__name__]
_main = sys.modules["__main__"]
if os.path.realpath(getattr(_main, "__file__", None) or "") == os.path.realpath(__file__):
    _this = sys.modules[__name__] = _main
for _path in ("app", "app.api", "models"):
    sys.modules[f"{__name__}.{_path}"] = _this


# The page at /docs. It asks nobody but this service, and inserts nothing as HTML.
PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Documentation</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --line: #8886; --soft: #8881; --accent: #0a58ca; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --accent: #7ab7ff; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1rem }
h1 { margin: 0 } h2 { margin: 1.5rem 0 .5rem; font-size: 1rem; opacity: .75 }
code, pre, textarea, td input { font: 14px/1.5 ui-monospace, monospace }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0 }
summary { padding: .6rem .8rem; cursor: pointer; overflow-wrap: anywhere }
details > div { padding: 0 .8rem .8rem }
summary b { color: var(--accent); margin-right: .4rem }
.about { white-space: pre-wrap }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0 }
tr { border-bottom: 1px solid var(--line) }
textarea, input { width: 100%; padding: .4rem; border: 1px solid var(--line); border-radius: 4px }
#key input { max-width: 20rem; display: block }
button { padding: .4rem 1rem; margin: .5rem .5rem .5rem 0; font: inherit; cursor: pointer }
pre { background: var(--soft); padding: .6rem; margin: .3rem 0; white-space: pre-wrap }
pre { overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; border-radius: 4px }
.error { color: var(--bad); margin: 0 } .error:empty { display: none }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px }
</style>
<header>
<h1 id="title"></h1>
<p id="state" role="status">loading…</p>
<p id="key" hidden><label>API key <input type="password" autocomplete="off"></label></p>
</header>
<main id="routes"></main>
<noscript>This page needs JavaScript; <a href="openapi.json">openapi.json</a> does not.</noscript>
<script>
"use strict";
const byId = id => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};
const list = value => value === undefined ? [] : [].concat(value);
const show = value => JSON.stringify(value);
const isFile = schema => (schema.items || schema).format === "binary";

// What a schema allows, in words.
function kind(schema) {
  const choices = schema.anyOf || schema.oneOf, items = schema.prefixItems;
  let text = (choices ? choices.map(kind) : list(schema.type)).join(" or ");
  if (isFile(schema)) text = text.replace("string", "file");
  else if (schema.format) text += ` (${schema.format})`;
  if (items) text += ` of ${items.length}: ${[...new Set(items.map(kind))].join("; ")}`;
  else if (schema.items && Object.keys(schema.items).length) text += ` of ${kind(schema.items)}`;
  const within = Object.entries(schema.properties || {});
  const fields = within.map(([name, its]) => `${name}: ${kind(its)}`);
  if (fields.length) text += ` {${fields.join("; ")}}`;
  const words = {
    minimum: "at least", maximum: "at most", minLength: "length from", maxLength: "length to",
    minItems: "items from", maxItems: "items to", pattern: "matches",
  };
  const limits = Object.entries(words).filter(([name]) => name in schema && !items)
    .map(([name, word]) => `${word} ${schema[name]}`);
  if (schema.enum) limits.push(`one of ${schema.enum.map(show).join(", ")}`);
  if ("default" in schema) limits.push(`default ${show(schema.default)}`);
  return [text, ...limits].filter(Boolean).join(", ");
}

// A value that a schema allows, as far as can be told.
function sample(schema) {
  if (schema.default !== undefined) return schema.default;
  if (schema.enum) return schema.enum[0];
  const choice = list(schema.anyOf || schema.oneOf || schema.allOf)[0];
  const type = list(schema.type)[0] || list((choice || {}).type)[0];
  if (choice) return sample({ ...choice, type });
  if (type === "object") {
    const all = Object.entries(schema.properties || {});
    const needed = all.filter(([name]) => (schema.required || []).includes(name));
    const shown = needed.length ? needed : all;
    return Object.fromEntries(shown.map(([name, field]) => [name, sample(field)]));
  }
  if (type === "array") {
    if (schema.prefixItems) return schema.prefixItems.map(sample);
    const count = Math.min(schema.minItems || 1, 4096);
    return Array(count).fill(null).map(() => sample(schema.items || {}));
  }
  if (type === "integer") return Math.ceil(schema.minimum ?? Math.min(1, schema.maximum ?? 1));
  if (type === "number") return schema.minimum ?? Math.min(1, schema.maximum ?? 1);
  if (type === "boolean") return true;
  if (type === "null") return null;
  const least = Math.min(schema.minLength || 0, 4096);
  return "text".padEnd(least, "x").slice(0, schema.maxLength ?? 4096);
}

// Cerberus's errors in one line: a list of messages, or of what is wrong within.
function words(errors) {
  const within = error => Object.entries(error).map(([name, its]) => `${name}: ${words(its)}`);
  const isWithin = error => error && typeof error === "object";
  return list(errors).flatMap(error => isWithin(error) ? within(error) : `${error}`).join("; ");
}

const quote = text => `'${text.replaceAll("'", "'\\''")}'`;

// One route: a form whose fields are what it takes.
function route(path, method, operation, server, key) {
  const fields = [], content = (operation.requestBody || {}).content || {};
  const [type, body] = Object.entries(content)[0] || [];
  const isForm = type === "multipart/form-data", schema = (body || {}).schema || {};
  const given = new Map(Object.entries(isForm && body.example || {}));
  const rows = [...operation.parameters];
  for (const [name, field] of Object.entries(schema.properties || {})) {
    const required = schema.required.includes(name), example = given.get(name);
    rows.push({ name, in: isForm ? "form" : "body", schema: field, required, example });
  }
  const id = name => `${operation.operationId}-${name}`;
  const table = make("tbody");
  for (const row of rows) {
    const error = make("p", { className: "error", id: id(`${row.name}-error`) });
    const cell = make("td");
    if (row.in !== "body") {
      const value = row.example ?? row.schema.default ?? (row.required ? sample(row.schema) : "");
      const isObject = typeof value === "object" && !Array.isArray(value);
      const shown = { value: isObject ? show(value) : list(value).join(",") };
      row.input = make("input", isFile(row.schema) ? { type: "file" } : shown);
      row.input.multiple = isFile(row.schema) && row.schema.type === "array";
      row.input.setAttribute("aria-label", row.name);
      row.input.setAttribute("aria-describedby", error.id);
      cell.append(row.input);
    }
    const name = make("th", { scope: "row" }, make("code", { textContent: row.name }));
    const what = row.required ? `${kind(row.schema)}, required` : kind(row.schema);
    const about = [what, row.schema.description].filter(Boolean).join(": ");
    cell.append(error);
    table.append(make("tr", {}, name, make("td", { textContent: about }), cell));
    fields.push({ ...row, error });
  }
  const others = make("p", { className: "error", id: id("others") });
  const text = type === "application/json" && make("textarea", {
    value: JSON.stringify(body.example || sample(schema), null, 1).replace(/\n */g, " "),
    rows: 4, spellcheck: false,
  });
  const curl = make("pre", { tabIndex: 0 }), answer = make("pre", { tabIndex: 0, hidden: true });
  const outcome = make("p", { role: "status" });

  // The request as the form has it now.
  function request() {
    let url = path, data = null;
    const query = new URLSearchParams(), headers = {}, form = [];
    for (const { name, in: place, input, schema } of fields) {
      if (!input) continue;
      const values = isFile(schema) ? [...input.files]
        : list(schema.type).includes("array") ? input.value.split(",") : [input.value];
      const encoded = encodeURIComponent(input.value) || "%20";
      if (place === "path") url = url.replace(`{${name}}`, encoded);
      else if (isFile(schema) || input.value !== "") {
        for (const value of values) {
          place === "query" ? query.append(name, value) : form.push([name, value]);
        }
      }
    }
    if (text) [data, headers["Content-Type"]] = [text.value, "application/json"];
    url = new URL(`.${url}`, server);
    url.search = query;
    return { url, headers, data, form };
  }
  function showCurl() {
    const { url, headers, data, form } = request(), parts = ["curl"];
    const implied = data !== null || form.length ? "POST" : "GET";
    if (method !== implied) parts.push("-X", method);
    parts.push(quote(url.href));
    if (key) parts.push('-H "Authorization: Bearer $API_KEY"');
    for (const name in headers) parts.push("-H", quote(`${name}: ${headers[name]}`));
    if (data !== null) parts.push("--data-raw", quote(data));
    for (const [name, value] of form) {
      if (value.name) parts.push("-F", quote(`${name}=@${show(value.name)}`));
      else parts.push("--form-string", quote(`${name}=${value}`));
    }
    curl.textContent = parts.join(" ");
  }
  async function send(event) {
    event.preventDefault();
    const { url, headers, data, form } = request();
    let sent = data;
    if (isForm) form.forEach(([name, value]) => (sent ||= new FormData()).append(name, value));
    if (key && key.value) headers.Authorization = `Bearer ${key.value}`;
    for (const { error } of fields) error.textContent = "";
    others.textContent = outcome.textContent = "";
    if (text) text.ariaInvalid = "false";
    try {
      const began = performance.now();
      const response = await fetch(url, { method, headers, body: sent });
      const blob = await response.blob(), took = performance.now() - began;
      const plain = /^text\/|[/+](json|xml)\b/.test(blob.type) || !blob.size;
      const shown = plain ? await blob.text() : `${blob.size} bytes of ${blob.type}`;
      answer.textContent = shown.length > 1e5 ? `${shown.slice(0, 1e5)}… (cut)` : shown;
      outcome.textContent = `${response.status} ${response.statusText} in ${took.toFixed(1)} ms`;
      answer.hidden = false;
      if (!response.ok) explain(shown);
    } catch (failure) {
      outcome.textContent = `No answer: ${failure.message}`;
      answer.hidden = true;
    }
  }
  function explain(problem) {
    let errors = {};
    try { errors = Object(JSON.parse(problem).errors); } catch { return; }
    if (text) text.ariaInvalid = "true";
    for (const [name, wrong] of Object.entries(errors)) {
      const field = fields.find(field => field.name === name);
      if (field) field.error.textContent = words(wrong);
      else others.textContent += `${name}: ${words(wrong)}\n`;
    }
  }
  async function copy() {
    getSelection().selectAllChildren(curl);
    if (navigator.clipboard) await navigator.clipboard.writeText(curl.textContent);
  }

  const form = make("form", { onsubmit: send, oninput: showCurl });
  const about = make("p", { className: "about", textContent: operation.description });
  if (operation.description) form.append(about);
  if (rows.length) form.append(make("div", { className: "scroll" }, make("table", {}, table)));
  if (text) {
    text.setAttribute("aria-label", "body");
    text.setAttribute("aria-describedby", others.id);
    text.onkeydown = event => {
      if ((event.ctrlKey || event.metaKey) && event.key === "Enter") form.requestSubmit();
    };
    form.append(make("p", {}, text));
  }
  form.append(others, make("button", { textContent: "Send" }));
  form.append(make("button", { type: "button", textContent: "Copy curl", onclick: copy }));
  form.append(outcome, answer, curl);
  showCurl();
  const title = make("summary", {}, make("b", { textContent: method }));
  title.append(make("code", { textContent: path }), ` ${operation.summary}`);
  return make("details", { id: operation.operationId }, title, make("div", {}, form));
}

async function start() {
  const place = new URL("openapi.json", location);
  const service = await (await fetch(place)).json(), { info } = service;
  document.title = byId("title").textContent = info.title;
  const key = service.security && byId("key").querySelector("input");
  byId("key").hidden = !key;
  const server = new URL(`${service.servers[0].url}/`, place), groups = new Map();
  for (const [path, item] of Object.entries(service.paths)) {
    for (const [method, operation] of Object.entries(item)) {
      const needed = key && !(operation.security && !operation.security.length) && key;
      const [tag] = operation.tags;
      const form = route(path, method.toUpperCase(), operation, server, needed);
      groups.set(tag, [...(groups.get(tag) || []), form]);
    }
  }
  for (const [tag, routes] of [...groups].sort(([a], [b]) => (a === "mest") - (b === "mest"))) {
    byId("routes").append(make("h2", { textContent: tag }), ...routes);
  }
  const first = byId("routes").querySelector("details:has(tr)");
  const chosen = location.hash ? byId(decodeURIComponent(location.hash.slice(1))) : first;
  if (chosen) chosen.open = true;
  const ready = await fetch("readyz"), known = info["x-models"].join(", ");
  const said = await ready.json().catch(() => ({})); // a proxy or a host may answer instead
  const problem = said.status === 503 && `not ready: ${said.detail}`;
  const state = said.status === "ready" ? "ready" : problem;
  const version = info.version !== "0" && `version ${info.version}`;
  const parts = [state, version, known && `models: ${known}`, `Mest ${info["x-mest"]}`];
  byId("state").textContent = parts.filter(Boolean).join(" · ");
}
start().catch(error => byId("state").textContent = `This page cannot be shown: ${error.message}`);
</script>
"""

if __name__ == "__main__":
    sys.exit(main())
