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

The path of a request, through the sections Parameters, Models, Routes and JSON:

    bytes -> decode -> parameters -> check -> model or handler -> result -> encode -> bytes

Two edges lead to it. `mest_app.app` is a Flask application, for the development server, tests and
any WSGI server. `mest_app` itself is an ASGI application, for gunicorn: its event loop waits for
clients and takes predict routes and probes along it; all else goes through Flask, in threads.

Flask routes, Cerberus decides what a valid parameter is, gunicorn runs the processes, and Mest is
what stands between them. It is no model registry, feature store, API gateway or place to train.
Copy this file into your project, or `pip install` it. MIT License.
"""

from __future__ import annotations

import argparse
import asyncio
import code
import copy
import dataclasses
import gc
import hmac
import importlib
import inspect
import json
import logging
import math
import operator
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar, copy_context
from datetime import UTC, date, datetime
from functools import cache, cached_property, partial, wraps
from http import HTTPMethod
from io import BytesIO
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import get_ident
from time import monotonic, sleep
from types import SimpleNamespace, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin
from urllib.parse import parse_qs, unquote_to_bytes
from weakref import WeakSet

import cerberus
import flask
from flask import current_app, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import is_running_from_reloader, run_simple
from werkzeug.test import run_wsgi_app

__version__ = "0.2.0"
__all__ = [
    "GenericModel",
    "Mest",
    "MestConfig",
    "MestError",
    "MestModel",
    "Problem",
    "Router",
    "validate_params",
]

# Errors


class MestError(Exception):
    """A mistake in the use of Mest. The message says what is wrong, where, and what to do."""


class Problem(HTTPException):
    """An answer that reports an error, as problem details (RFC 9457). A handler may raise it.

    Args:
        status: the HTTP status, such as 422.
        detail: what went wrong, for the client to read.
        headers: further headers, such as {"Retry-After": "1"}.
        **members: further members of the answer, which are JSON, such as `errors` by field.
    """

    def __init__(
        self, status: int, detail: str, headers: dict | None = None, **members: Any
    ):
        super().__init__(detail)
        self.code = status
        self.headers = headers or {}
        self.members = members

    def get_body(self, environ=None, scope=None):
        body = {"title": self.name, "status": self.code, "detail": self.description}
        body |= self.members
        if exchange := EXCHANGE.get():
            body["request_id"] = exchange.id
        return json.dumps(body, default=str) + "\n"

    def get_headers(self, environ=None, scope=None):
        return [("Content-Type", "application/problem+json"), *self.headers.items()]


def as_problem(error):
    """Return the answer to any exception: the one place where errors become answers."""
    if not isinstance(error, HTTPException):  # a defect: clients are told its id alone
        exchange = EXCHANGE.get()
        asked = f"{exchange.method} {exchange.path}"
        exchange.service.logger.error("%s failed: %r", asked, error, exc_info=error)
        flask.got_request_exception.send(exchange.service.app, exception=error)
        return Problem(500, "The service failed. Its log says why, under this request_id.")
    status = error.code or 0
    if isinstance(error, Problem) or error.response or status < 400:
        return error
    headers = dict(error.get_headers())
    headers.pop("Content-Type", None)
    return Problem(status, error.description or error.name, headers)


def report(error):
    """Return the message about a mistake, below the end of the traceback of the user's own code."""
    lines = traceback.format_exception(error.__cause__, limit=-3) if error.__cause__ else []
    return "".join([*lines, f"mest: {error}"])


def cause_of(error):
    """Return what went wrong in the user's code, in a line."""
    cure = f"; install it for {sys.executable}" if isinstance(error, ModuleNotFoundError) else ""
    return f"{type(error).__name__}: {error}{cure}"


# Configuration

FLAG = True, False, 1, 0  # what a field may be that is true or false


def available_cpus():
    """Return how many CPUs this process may use: its container's quota, or all there are."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # there is no cgroup (version 2), or no limit
        return os.cpu_count() or 1


def setting(default, allowed, meaning, repr=True):
    """Return a field of the configuration: its default, what is allowed, and what it means."""
    metadata = {"allowed": allowed, "meaning": meaning}
    return dataclasses.field(default=default, metadata=metadata, repr=repr)


def require_instance(model, method, place):
    """Raise a MestError unless a model is an object with a method, and not a class."""
    if isinstance(model, type) or not callable(getattr(model, method, None)):
        cure = f"it must be an instance of GenericModel, or another object with {method}()"
        raise MestError(f"{place} has {model!r}; {cure}")


@dataclasses.dataclass
class MestConfig:
    """The configuration of a service. `MEST_<FIELD>` in the environment beats what is given here.

    `service_name` names the logger, the documentation and the answers to pings; `models_instances`
    are models to load, GenericModels or others with `init(directory_path)`, besides those of
    predict routes. A MestError names the field that is wrong, its value and what is allowed.
    """

    service_name: str
    listen_port: int = setting(8000, range(65536), "TCP port; 0 picks a free one")
    models_instances: Sequence[Any] = ()
    local_model_directory_path: str = setting("_models", str, "directory given to each init")
    _: dataclasses.KW_ONLY
    service_version: str = setting("", str, "version of the service, for its documentation")
    listen_host: str = setting(
        "", str, "address; by default 127.0.0.1, under gunicorn 0.0.0.0"
    )
    workers: int | Literal["auto"] = setting(
        1, range(1, 1025), "processes of gunicorn; auto is one for each CPU"
    )
    threads: int = setting(16, range(1, 1025), "handlers that run at once, in each process")
    max_body_bytes: int = setting(
        2**24, range(1, 2**40), "bytes, the largest body of a request"
    )
    max_queued_requests: int = setting(
        512, range(1, 10**6), "requests at a model, or at the threads, in each process"
    )
    request_timeout: int = setting(
        60, range(1, 86401), "seconds for a request's body, and for the model's answer to it"
    )
    liveness_timeout: int = setting(
        600, range(86401), "seconds that a model may be in one call; 0: for ever"
    )
    drain_seconds: int = setting(
        5, range(3601), "seconds of service, after SIGTERM, as not ready"
    )
    graceful_timeout: int = setting(
        30, range(1, 3601), "seconds, after that, for requests in progress"
    )
    api_key: str = setting(
        "", str, "keys, one of which clients must send, with commas between them", repr=False
    )
    docs: bool = setting(True, FLAG, "whether there are /docs and /openapi.json")
    access_log: bool = setting(False, FLAG, "whether each request is logged")
    log_level: str = setting(
        "INFO", ("DEBUG", "INFO", "WARNING", "ERROR"), "least level logged"
    )
    log_format: str = setting(
        "auto", ("auto", "json", "text"), "json, text; auto: text on a terminal"
    )

    def __new__(cls, *args, **fields):
        for name in fields.keys() - cls.__dataclass_fields__.keys():
            known = ", ".join(cls.__dataclass_fields__)
            raise MestError(f"MestConfig has no {name!r}; it has {known}")
        return super().__new__(cls)

    def __post_init__(self):
        if not isinstance(self.service_name, str) or not self.service_name.strip():
            raise MestError(f"service_name is {self.service_name!r}; it must be text")
        for model in self.models_instances:
            require_instance(model, "init", "models_instances")
        for field in self.settings():
            source = field.name
            value = getattr(self, field.name)
            variable = f"MEST_{source.upper()}"
            if os.environ.get(variable):
                source = variable
                value = os.environ[variable]
            setattr(self, field.name, self.convert(field, value, source))

    @classmethod
    def settings(cls):
        """Return the fields that the environment may set, with `allowed` and `meaning`."""
        return [field for field in dataclasses.fields(cls) if field.metadata]

    @staticmethod
    def convert(field, value, source):
        """Return what a value, or the text for it, means for a field, or raise a MestError."""
        allowed = field.metadata["allowed"]
        text = str(value)
        if allowed is str:
            needed = "text"
            if isinstance(value, (str, Path)):
                return text
        elif isinstance(allowed, range):
            needed = f"an integer from {allowed[0]} to {allowed[-1]}"
            if field.name == "workers" and text == "auto":
                return available_cpus()
            if re.fullmatch("[0-9]{1,18}", text) and int(text) in allowed:
                return int(text)
        else:
            needed = " or ".join(map(str, allowed))
            for option in allowed:
                if text.lower() == str(option).lower():
                    return type(field.default)(option)
        raise MestError(
            f"{source} is {value!r}; it must be {needed} ({field.metadata['meaning']})"
        )


# Logging

RECORD_MEMBERS = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class LogFormatter(logging.Formatter):
    """Formats a record as a JSON object in one line, or for people, with what `extra` added."""

    is_json = True

    def format(self, record):
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": at, "level": record.levelname, "logger": record.name}
        if exchange := EXCHANGE.get():
            line["request_id"] = exchange.id
        line["message"] = record.getMessage()
        for name, value in vars(record).items():
            if name not in RECORD_MEMBERS:  # it came with `extra`
                line[f"{name}_" if name in line else name] = value
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        if not self.is_json:  # what follows a line break is indented: no line is forged
            return "\n    ".join(" ".join(map(str, line.values())).splitlines())
        try:
            return json.dumps(line, default=str, skipkeys=True, allow_nan=False)
        except (ValueError, RecursionError):  # what `extra` brought has no form in JSON
            return json.dumps({name: str(value) for name, value in line.items()})


def set_up_logging(config):
    """Return the logger of the service_name with its level and one handler, which are set anew."""
    logger = logging.getLogger(config.service_name)
    others = [h for h in logger.handlers if not isinstance(h.formatter, LogFormatter)]
    handler = logging.StreamHandler(sys.stdout)
    formatter = LogFormatter()
    is_terminal = config.log_format == "auto" and sys.stdout.isatty()
    formatter.is_json = config.log_format != "text" and not is_terminal
    handler.setFormatter(formatter)
    logger.handlers = [*others, handler]
    logger.propagate = False  # a line is written once, whatever else the process logs
    logger.setLevel(config.log_level)
    return logger


# JSON

MAX_DEPTH = 100  # deeper documents exhaust the stack of whatever handles them next


def fault_of(value):
    """Return why a decoded value is unfit for use, its depth or a number not finite, or None."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        within = []
        for item in level:
            if type(item) in (int, float) and not abs(item) <= sys.float_info.max:
                return "contains a number that is not finite, or too large for a float"
            if type(item) is list:
                within += item
            elif type(item) is dict:
                within += item.values()
        if not within:
            return None
        level = within
    return f"is nested deeper than {MAX_DEPTH} levels"


def plain(value):
    """Return what stands for an object in JSON, or raise a TypeError: for the encoder."""
    if isinstance(value, date) and value == value:  # unlike pandas's NaT
        return value.isoformat()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    if kind not in ("m", "M"):  # times, which would be integers
        for method in ("tolist", "item"):  # of arrays and their scalars
            items = getattr(value, method, lambda: value)()
            if type(items) is not type(value):
                return items
    name = type(value).__name__
    cure = "return a dictionary, list, number, text or array"
    raise TypeError(f"a {name} in the result has no form in JSON; {cure}")


ENCODER = json.JSONEncoder(
    default=plain, allow_nan=False, ensure_ascii=False, separators=(",", ":")
)


def encode(result):
    """Return a result as JSON, or raise an error: NaN, surrogates, or what has no form there."""
    return ENCODER.encode(result).encode() + b"\n"


# Parameters

MAX_ERRORS = 20  # Cerberus's bookkeeping is quadratic in them, and nobody reads more
NUMBERS = {int, float, bool}
#: Cerberus's types for which there is a check, and the types of Python that they accept.
CHECKED: dict[str, set] = {
    "boolean": {bool},
    "dict": {dict},
    "float": NUMBERS,
    "integer": {int, bool},
    "list": {list},
    "number": {int, float},
    "string": {str},
}
#: Cerberus's rules for which there is a check, and what makes it; if that raises, Cerberus decides.
MAKERS: dict[str, Callable] = {
    "allowed": lambda values: frozenset(values).__contains__,
    "max": lambda most: partial(operator.ge, most),
    "maxlength": lambda most: lambda value: len(value) <= most,
    "min": lambda least: partial(operator.le, least),
    "minlength": lambda least: lambda value: len(value) >= least,
    "regex": lambda pattern: re.compile(pattern + "$").match,
}
CERBERUS_TYPES = {
    bool: "boolean",
    bytes: "binary",
    dict: "dict",
    float: "number",
    int: "integer",
    list: "list",
    str: "string",
}
VARIABLE = re.compile(r"<(?:[^<>]*:)?(\w+)>")  # in an url of Flask's, such as <int:user>
FORM_TYPES = {"application/x-www-form-urlencoded", "multipart/form-data"}


class Received(NamedTuple):
    """What an endpoint needs of a request, whichever edge that came to."""

    content_type: str
    query: bytes
    body: bytes
    variables: dict[str, Any]
    form: dict[str, list] | None = None  # which Werkzeug has parsed; files are bytes


def media_type_of(content_type):
    """Return the media type in a Content-Type, such as text/csv."""
    return content_type.partition(";")[0].strip().lower()


def decode(received):
    """Return the fields of the query or form, lists of text, and those of a JSON body."""
    media_type = media_type_of(received.content_type)
    fields = {}
    if received.query:
        fields = parse_qs(received.query.decode("utf-8", "replace"), keep_blank_values=True)
    if received.form is not None:
        return {**fields, **received.form}, {}
    if not received.body:
        return fields, {}
    if media_type != "application/json" and not media_type.endswith("+json"):
        cure = "send a JSON object as application/json, or a form"
        raise Problem(
            415, f"The body is of the Content-Type {media_type or 'none'!r}; {cure}."
        )
    try:
        text = received.body.decode("utf-8-sig")  # RFC 8259, section 8.1
        values = json.loads(text)
        if "\\u" in text:
            json.dumps(values, ensure_ascii=False).encode()  # fails on a lone surrogate
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"The body is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise Problem(
            422, "The body is JSON, but no object; send an object with the parameters."
        )
    return fields, values


def resolved(rules):
    """Return a set of rules, or none if a schema gives only its name in Cerberus's registry."""
    return rules if isinstance(rules, Mapping) else {}


def types_of(rules):
    """Return the types that a set of rules allows, one or several, as a list."""
    types = resolved(rules).get("type", ())
    return [types] if isinstance(types, str) else [*types]


def convert_text(text, rules):
    """Return text from a query or form as the type of its rules; what does not convert stays."""
    types = {*types_of(rules)}
    asked = {
        bool: {"boolean"},
        float: {"float", "number"},
        int: {"float", "number", "integer"},
    }
    if isinstance(text, str) and "string" not in types:
        with suppress(ValueError, RecursionError):
            value = json.loads(text.lower())
            if asked.get(type(value), set()) & types:
                return value
    return text


class Validator(cerberus.Validator):
    """Cerberus's validator for documents from strangers. It is not thread-safe: one a document."""

    def _error(self, *args):
        left = self._config.get("errors_left", [MAX_ERRORS])  # a list, which children share
        if left[0] <= 0 and self._errors:
            return  # one is enough for the verdict
        if len(args) == 1:  # other calls end in one like this
            left[0] -= 1
        super()._error(*args)

    def _normalize_default(self, mapping, schema, field):
        """{'nullable': True}"""  # which Cerberus parses: a default may be None
        mapping[field] = copy.deepcopy(schema[field]["default"])  # a handler may change it


def value_check(rules):
    """Return a function that tells whether Cerberus surely accepts a value, or raise an error."""
    [name] = types_of(rules)
    types = CHECKED[name]
    used = rules.keys() - {"type", "required", "nullable", "meta", "schema"}
    tests = [MAKERS[rule](rules[rule]) for rule in used]
    if types <= NUMBERS:
        tests.append(math.isfinite)
    elif "schema" in rules:
        tests.append((dict_check if name == "dict" else list_check)(rules["schema"]))
    elif name != "string":
        tests.append(lambda value: not fault_of(value))
    is_nullable = bool(rules.get("nullable"))

    def check(value):
        if value is None:
            return is_nullable
        return type(value) in types and all(test(value) for test in tests)

    return check


def dict_check(schema):
    """Return such a function for a dictionary with these fields."""
    checks = {field: value_check(rules) for field, rules in schema.items()}
    required = {field for field, rules in schema.items() if rules.get("required")}

    def check(document):
        if not checks.keys() >= document.keys() >= required:
            return False
        return all(checks[field](value) for field, value in document.items())

    return check


def list_check(rules):
    """Return such a function for a list, of whose items each has these rules."""
    check_item = value_check(rules)
    types = CHECKED[types_of(rules)[0]]

    def check_numbers(items):
        is_finite = math.isfinite(math.hypot(*items))  # which raises if one is no number
        return is_finite and (types == NUMBERS or types.issuperset(map(type, items)))

    if types <= NUMBERS and rules.keys() <= {"type", "meta", "required"}:
        return check_numbers  # Optimization: 1,000 floats in 0.01 ms, and one by one in 0.3
    return lambda items: all(map(check_item, items))


class Parameters:
    """The parameters of an endpoint: a schema that is known to accept its defaults and example."""

    def __init__(self, schema, example, owner):
        self.example = example
        self.check_quickly = None
        self.defaults = {}
        try:
            validator = Validator(schema)
            self.schema = validator.schema
            if not validator.validate({}, update=True):
                raise ValueError(f"it refuses its own default: {validator.errors}")
            with suppress(AttributeError, LookupError, TypeError, ValueError):
                fields = {field: dict(rules) for field, rules in self.schema.items()}
                for field, rules in fields.items():
                    if "default" in rules:
                        self.defaults[field] = rules.pop("default")
                self.check_quickly = dict_check(fields)
        except Exception as error:  # Cerberus stumbles over some mistakes
            manual = "see https://docs.python-cerberus.org/validation-rules.html"
            raise MestError(f"{owner}: the schema is wrong: {error}; {manual}") from None
        try:
            if example is not None:
                self.check(copy.deepcopy(example))
        except Exception as error:
            refused = getattr(error, "members", {}).get("errors") or error
            raise MestError(f"{owner}: the schema refuses its example: {refused}") from None

    def read(self, received):
        """Return the checked parameters of a request, and the variables of its path."""
        return self.check(self.document(received)) | received.variables

    def document(self, received):
        """Return what is to be checked: the path beats JSON, which beats query and form."""
        fields, values = decode(received)
        names = received.variables.keys() & self.schema.keys()
        known = {name: [received.variables.pop(name)] for name in names}
        return self.from_text(fields) | values | self.from_text(known)

    def from_text(self, fields):
        """Return the fields of a query or form, converted from text to what their rules ask for."""
        document = {}
        for name, values in fields.items():
            rules = resolved(self.schema.get(name))
            is_list = "list" in types_of(rules)
            rules = rules.get("schema") if is_list else rules
            values = [convert_text(value, rules) for value in values]
            document[name] = values if is_list or len(values) > 1 else values[0]
        return document

    def quick(self, document):
        """Return the document with its defaults, or None if only Cerberus can tell."""
        if missing := self.defaults.keys() - document:
            own = {name: self.defaults[name] for name in missing}
            document = document | copy.deepcopy(own)
        with suppress(TypeError, ValueError, OverflowError):  # of a built-in
            if self.check_quickly and self.check_quickly(document):
                return self.in_order(document)
        return None

    def in_order(self, document):
        """Return a document in the order of the schema: rows of a table have equal columns."""
        return {name: document[name] for name in self.schema if name in document} | document

    def check(self, document):
        """Return the document as Cerberus normalizes it, or raise a Problem: 422 and its errors."""
        checked = self.quick(document)
        if checked is not None:
            return checked
        if fault := fault_of(document):
            raise Problem(400, f"The body {fault}.")
        validator = Validator(self.schema, errors_left=[MAX_ERRORS])
        try:
            is_valid = validator.validate(document)
        except Exception as error:
            *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
            if not innermost.f_globals["__name__"].startswith("cerberus"):
                raise  # a function in the schema: a defect of the service
            raise Problem(422, f"The parameters cannot be checked: {error}.") from None
        if not is_valid:
            raise Problem(422, "The parameters are not valid.", errors=validator.errors)
        if fault := fault_of(validator.document):  # coercion may have made it
            raise Problem(422, f"A parameter {fault}.")
        return self.in_order(validator.document)


def rules_of(annotation):
    """Return the rules that an annotation stands for, or raise an error if it is for none."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Literal:
        (name,) = {CERBERUS_TYPES[type(value)] for value in arguments}
        return {"type": name, "allowed": [*arguments]}
    if origin is list:
        return {"type": "list", "schema": rules_of(*arguments)}
    if origin in (Union, UnionType):
        (other,) = {*arguments} - {type(None)}
        return {**rules_of(other), "nullable": True}
    return {"type": CERBERUS_TYPES[annotation]}


def name_of(function):
    """Return the name of a function for messages."""
    return getattr(function, "__qualname__", repr(function)) + "()"


def schema_of(function):
    """Return the schema that a function's arguments and their annotations stand for."""
    schema = {}
    for name, argument in inspect.signature(function).parameters.items():
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            continue
        try:
            annotation = argument.annotation
            if isinstance(annotation, str):  # from __future__ import annotations
                annotation = eval(annotation, inspect.unwrap(function).__globals__)
            rules = rules_of(annotation)
        except Exception:  # annotations may be anything
            fault = f"{name_of(function)} has the argument {argument}"
            known = "bool, int, float, str, bytes, dict, list[…], Literal[…] or … | None"
            raise MestError(f"{fault}; annotate it with {known}, or give a schema") from None
        if argument.default is argument.empty:
            rules["required"] = True
        else:
            rules["default"] = argument.default
        if argument.default is None:
            rules["nullable"] = True
        schema[name] = rules
    return schema


def check_arguments(function, schema, variables):
    """Raise a MestError unless a function can take a schema's fields, and variables of its url."""
    rules = {field: resolved(own) for field, own in schema.items()}
    if {"rename", "rename_handler", "readonly", "excludes"} & set().union(*rules.values()):
        return  # what is given has other names, or none
    filled = {"default", "default_setter"}
    sure = [
        field for field, own in rules.items() if own.get("required") or own.keys() & filled
    ]
    for given in (rules, sure):
        try:
            signature = inspect.signature(function, follow_wrapped=False)
            signature.bind(**dict.fromkeys([*given, *variables]))
        except TypeError as error:
            cure = "match its arguments with the schema, what that requires, and the url"
            if not schema:
                cure = "is @validate_params missing below the route?"
            raise MestError(f"{name_of(function)} does not fit: {error}; {cure}") from None
        except ValueError:  # it is built in
            return


# Requests

IDS = random.Random()  # os.urandom would let other threads run first
EXCHANGE: ContextVar[Any] = ContextVar("mest.exchange", default=None)  # that a thread works for


class Exchange:
    """A request and its answer: its id, and where it is counted and logged, once."""

    def __init__(self, service, method, path, sent_id):
        self.service = service
        self.method = method
        self.path = path
        self.route = "other"
        is_sane = re.fullmatch("[!-~]{1,128}", sent_id)
        self.id = sent_id if is_sane else f"{os.getpid():08x}{IDS.getrandbits(96):024x}"
        self.began = monotonic()
        self.ended = threading.Lock()  # of which one caller of end() gets hold
        if counted := metrics():
            counted.in_progress.inc()

    def end(self, status):
        """Count the request, and log it if that is asked for."""
        if not self.ended.acquire(blocking=False):
            return  # its client has left, and a thread went on
        seconds = monotonic() - self.began
        if counted := metrics():
            is_known = self.method in HTTPMethod.__members__  # or a client made it up
            method = self.method if is_known else "other"
            counted.in_progress.dec()
            counted.requests.labels(self.route, method, status).inc()
            counted.seconds.labels(self.route).observe(seconds)
        if self.service.config.access_log:
            members = {"method": self.method, "path": self.path, "status": status}
            members["milliseconds"] = round(seconds * 1000, 3)
            self.service.logger.info("answered", extra=members)


@cache
def metrics():
    """Return the metrics of this process, or None where prometheus_client is not installed."""
    try:
        from prometheus_client import Counter, Gauge, Histogram
    except ImportError:
        return None
    sizes = [2**power for power in range(10)]
    return SimpleNamespace(
        requests=Counter(
            "mest_requests_total", "Requests answered.", ["route", "method", "status"]
        ),
        seconds=Histogram("mest_request_duration_seconds", "Arrival to answer.", ["route"]),
        in_progress=Gauge(
            "mest_requests_in_progress",
            "Requests not answered.",
            multiprocess_mode="livesum",
        ),
        batch_size=Histogram(
            "mest_batch_size", "Requests in a batch.", ["model"], buckets=sizes
        ),
    )


def metrics_page():
    """Counters of all processes, for Prometheus."""
    import prometheus_client
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = prometheus_client.REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = prometheus_client.CollectorRegistry()
        MultiProcessCollector(registry)
    page = prometheus_client.generate_latest(registry)
    return flask.Response(page, content_type=prometheus_client.CONTENT_TYPE_LATEST)


# Models


class GenericModel:
    """A model behind endpoints: subclass it with an `init`, and an `infer` or an `infer_batch`.

    `predict` runs the stages pre_process, infer and post_process. From stage to stage a dictionary
    is passed on as keyword arguments, a list as positional arguments, and anything else as one
    argument. The first and the last stage may run in several threads at once.
    """

    model: Any = None  # what `init` loads
    max_batch_size = 1  # requests that `infer_batch` is given at once, at most
    batch_timeout = 0.005  # seconds, at most, that a batch waits to be as large as the last
    max_concurrency = 1  # threads that may be in `infer` or `infer_batch` at once
    _initialised = False

    @property
    def is_loaded(self) -> bool:
        """Whether Mest has called `init`, or `model` has been set."""
        return self._initialised or self.model is not None

    def init(self, directory_path: str) -> None:
        """Load the model from the directory with its files, once in each process that serves."""

    def pre_process(self, **params: Any) -> Any:
        """Return the payload, what `infer` works on, of a request; by default its parameters."""
        return params

    def infer(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's result for a payload."""
        raise NotImplementedError(
            f"{type(self).__name__} has neither infer() nor infer_batch()"
        )

    def infer_batch(self, payloads: list) -> Sequence:
        """Return the results for the payloads of several requests, one each, in their order.

        An exception among them is the answer to that request. If this raises, or returns another
        number of results, the payloads are run one by one, so that only the faulty ones fail.
        """
        return [pass_on(payload, self.infer) for payload in payloads]

    def post_process(self, *args: Any, **kwargs: Any) -> Any:
        """Return the answer, given what `infer` returned; a model without one answers that."""

    def predict(self, **params: Any) -> Any:
        """Return the answer for parameters, or raise a Problem, 503, if too many requests wait."""
        result = self._batcher.run(self.pre_process(**params))
        return (
            pass_on(result, self.post_process) if own_stage(self, "post_process") else result
        )

    @property
    def _batcher(self):
        key = f"_batcher_{os.getpid()}"  # neither threads nor locks come through a fork
        if batcher := vars(self).get(key):
            return batcher
        run: Callable = partial(GenericModel.infer_batch, self)
        size = 1
        counted = metrics()
        if makes_batches(self):
            run = self.infer_batch
            size = self.max_batch_size
        sizes = counted and counted.batch_size.labels(type(self).__name__)
        work = partial(batch_outcomes, run)
        batcher = Batcher(work, self.max_concurrency, size, self.batch_timeout, sizes)
        return vars(self).setdefault(key, batcher)


def own_stage(model, name):
    """Return a stage if a model or its class has one of its own, or None."""
    stage = getattr(model, name, None)
    if getattr(stage, "__func__", None) is vars(GenericModel)[name]:
        return None
    return stage


def makes_batches(model):
    """Return whether a model's infer_batch is used: it has no infer, or takes several at once."""
    is_batched = model.max_batch_size > 1 or not own_stage(model, "infer")
    return own_stage(model, "infer_batch") and is_batched


def pass_on(value, stage):
    """Return what a stage returns for the value of the one before it."""
    if isinstance(value, dict):
        return stage(**value)
    if isinstance(value, list):
        return stage(*value)
    return stage(value)


def outcome_of(function, *args):
    """Return the result of a function, or the exception that it raised."""
    try:
        return function(*args)
    except Exception as error:
        return error
    except BaseException as error:  # sys.exit is no reason to end anything but the request
        return RuntimeError(repr(error))


def raised(outcome):
    """Return an outcome if it is a result, and raise it if it is an exception."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def batch_outcomes(infer_batch, payloads):
    """Return the result or the exception of each payload, none of which fails for another."""
    outcome = outcome_of(infer_batch, [*payloads])
    if isinstance(outcome, tuple) or hasattr(outcome, "tolist"):  # an array
        outcome = outcome_of(list, outcome)
    if isinstance(outcome, list) and len(outcome) == len(payloads):
        return outcome
    if len(payloads) > 1:
        return [batch_outcomes(infer_batch, [payload])[0] for payload in payloads]
    if isinstance(outcome, Exception):
        return [outcome]
    returned = f"infer_batch returned {type(outcome).__name__}"
    return [MestError(f"{returned}, not a list with a result for each payload")]


class Job:
    """A payload on its way through a batcher, and who is given the outcome."""

    def __init__(self, payload, give):
        self.payload = payload
        self.give = give
        self.exchange = EXCHANGE.get()
        self.is_abandoned = False


class Batcher:
    """A queue and the threads that empty it, in batches: in front of a model, or of Flask.

    A batch waits, `timeout` at most, for as many jobs as there were last time, in the batch and
    behind it. So a lone caller never waits, and a crowd fills the batches from the second one on.
    """

    def __init__(self, work, threads, size=1, timeout=0.0, sizes=None):
        self.work = work
        self.size = size
        self.timeout = timeout
        self.sizes = sizes
        self.queue: SimpleQueue = SimpleQueue()
        self.lock = threading.Lock()
        self.turns: Any = threading.Semaphore(threads) if threads > 1 else threading.Lock()
        self.max_threads = threads
        self.threads = 0  # that have been started
        self.waiting = 0  # jobs, those in work too
        self.busy_since: dict = {}  # by the threads that are at work, in time.monotonic()

    def run(self, payload):
        """Return the result of a payload, which this thread works out itself or waits for."""
        if get_ident() in self.busy_since:  # the model calls itself
            return raised(self.work([payload])[0])
        outcomes: SimpleQueue = SimpleQueue()  # a future, at a tenth of the cost
        job = Job(payload, outcomes.put)
        if self.waiting and self.size > 1:  # or there would be no batches
            self.submit(job)
        else:  # Optimization: no other thread is woken, for 1.3 times the requests/s
            self.count(job)
            with self.turns:
                self.finish([job])
        return raised(outcomes.get())

    def count(self, job):
        """Count a job among those that wait, or raise a Problem, 503, if they are too many."""
        with self.lock:
            if job.exchange and not job.exchange.ended.locked():  # else a stream goes on
                limit = job.exchange.service.config.max_queued_requests
                if self.waiting >= max(limit, self.max_threads):
                    raise Problem(503, "Too many requests wait.", {"Retry-After": "1"})
            self.waiting += 1

    def submit(self, job):
        """Have the outcome of a job given to it by a thread, or raise a Problem, 503."""
        self.count(job)
        self.queue.put(job)
        with self.lock:
            if self.threads < min(self.waiting, self.max_threads):
                threading.Thread(target=self.serve, daemon=True).start()
                self.threads += 1

    def busy_for(self):
        """Return for how many seconds the longest call has lasted by now."""
        now = monotonic()
        return now - min([*self.busy_since.values()], default=now)

    def serve(self):
        """Finish batch after batch, in a thread."""
        crowd = 1
        while True:
            idle_since = monotonic()
            batch = [self.queue.get()]
            if monotonic() - idle_since > 0.1:  # the crowd has gone
                crowd = 1
            with self.turns:
                crowd = min(crowd, self.size)
                end = monotonic() + self.timeout
                while len(batch) + self.queue.qsize() < crowd and monotonic() < end:
                    sleep(0.0003)  # as fast as being told
                with suppress(Empty):
                    while len(batch) < self.size:
                        batch.append(self.queue.get_nowait())
                crowd = self.finish(batch)

    def finish(self, batch):
        """Do a batch of jobs, give them their outcomes, and return the crowd: it and the queue."""
        jobs = [job for job in batch if not job.is_abandoned]
        EXCHANGE.set(jobs[0].exchange if len(jobs) == 1 else None)  # for what is logged
        self.busy_since[get_ident()] = monotonic()
        outcomes = self.work([job.payload for job in jobs]) if jobs else []
        del self.busy_since[get_ident()]
        with self.lock:
            self.waiting -= len(batch)
        if self.sizes and jobs:
            self.sizes.observe(len(jobs))
        crowd = len(batch) + self.queue.qsize()
        for job, outcome in zip(jobs, outcomes, strict=True):
            job.give(outcome)
        return crowd


# Routes


def validate_params(
    schema: dict, example: dict | None = None
) -> Callable[[Callable], Callable]:
    """Decorate a handler to receive the request's parameters, checked, as keyword arguments.

    They come from the query string, a JSON object or a form, and are what Cerberus makes of them;
    variables of the path are passed along. Stands below `route`. Outside a request the handler can
    be called as if it were not decorated. A MestError says what is wrong in schema or example.

    Args:
        schema: the fields and their rules, https://docs.python-cerberus.org/validation-rules.html
        example: parameters that the schema accepts, for the documentation.
    """

    def decorate(handler):
        parameters = Parameters(schema, example, f"validate_params of {name_of(handler)}")

        @wraps(handler)
        def validated(*args, **variables):
            if not flask.has_request_context():
                return handler(*args, **variables)
            return settled(handler(*args, **parameters.read(received_by_flask(variables))))

        vars(validated).update(parameters=parameters, outermost=validated)
        return validated

    return decorate


def settled(result):
    """Return what a handler has returned; an `async def` one runs in a loop of its own."""
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def body_limit(app):
    """Return the bytes that the body of a request to a Flask application may have."""
    service = app.extensions.get("mest")
    own = service.config.max_body_bytes if service else sys.maxsize
    return min(own, app.config["MAX_CONTENT_LENGTH"] or own)


def received_by_flask(variables):
    """Return the Flask request as what parameters are read from, or raise a Problem: 400, 413."""
    limit = body_limit(current_app)
    body = b""
    form = None
    if (request.content_length or 0) <= limit:
        request.max_content_length = limit + 1  # where Werkzeug stops, without a word
        try:
            body = request.get_data()
        except HTTPException:  # of the event loop
            raise
        except Exception:  # each server has exceptions of its own
            raise Problem(400, "The body is malformed or ended early.") from None
    if max(request.content_length or 0, len(body)) > limit:
        raise Problem(413, f"The body is longer than {limit} bytes.")
    content_type = request.content_type or ""
    if media_type_of(content_type) in FORM_TYPES:
        if body.lstrip().startswith(b"{"):
            cure = "send it with the header Content-Type: application/json"
            raise Problem(415, f"The body looks like JSON, but is not said to be; {cure}.")
        request.max_form_memory_size = None  # all of it is in memory
        form = request.form.to_dict(flat=False)
        for name, files in request.files.lists():
            form[name] = [file.read() for file in files]
        if body and not form:
            raise Problem(400, "The body is not a valid form.")
    return Received(content_type, request.query_string, body, variables, form)


def to_response(result):
    """Return what Flask takes for what a handler returned: data and text are encoded."""
    body, *rest = result if isinstance(result, tuple) else (result,)
    if rest and isinstance(rest[0], (int, float)) and rest[0] not in range(200, 600):
        raise TypeError(f"{rest[0]} is no status, which a tuple has; return a list")
    if isinstance(body, str):
        body = flask.Response(body, content_type="text/plain; charset=utf-8")
    elif not isinstance(body, (bytes, bytearray, Iterator)) and not callable(body):
        body = flask.Response(encode(body), content_type="application/json")
    return (body, *rest) if rest else body


def encode_prediction(result):
    """Return a model's result as the body of an answer and its content type."""
    if isinstance(result, (bytes, bytearray)):
        return bytes(result), "application/octet-stream"
    return encode(result), "application/json"


def admit(config, authorization, key):
    """Raise a Problem, 401, unless a request has one of the API keys, if there are any."""
    sent = key or authorization.partition(" ")[2]  # RFC 6750, section 2.1
    matches = 0  # of all keys, so that the time taken tells nothing
    for known in filter(None, map(str.strip, config.api_key.split(","))):
        matches += hmac.compare_digest(known.encode(), sent.strip().encode())
    if config.api_key and not matches:
        detail = "Send an API key, as Authorization: Bearer KEY or as X-API-Key: KEY."
        raise Problem(401, detail, {"WWW-Authenticate": "Bearer"})


class Endpoint:
    """A view of Flask's: a handler or a model. A probe answers at once, on an event loop too."""

    def __init__(self, handler, parameters=None, model=None, is_probe=False, needs_key=True):
        self.handler = handler
        self.model = model
        self.is_probe = is_probe
        self.parameters: Any = parameters or getattr(handler, "parameters", None)
        self.needs_key = needs_key and not is_probe
        self.__doc__ = inspect.getdoc(handler) if model is None else type(model).__doc__

    def __call__(self, **variables):
        """Answer the Flask request."""
        if self.needs_key:
            config = current_app.extensions["mest"].config
            sent = request.environ.get
            admit(config, sent("HTTP_AUTHORIZATION", ""), sent("HTTP_X_API_KEY", ""))
        if self.model is None:
            return to_response(settled(self.handler(**variables)))
        params = self.parameters.read(received_by_flask(variables))
        content, kind = self.predict(params)
        return flask.Response(content, content_type=kind)

    def predict(self, params):
        """Return the model's answer to checked parameters, and its content type."""
        self.require_model()
        return encode_prediction(self.model.predict(**params))

    def require_model(self):
        """Raise a MestError if the model has to be loaded and is not."""
        if not own_stage(self.model, "predict") and not self.model.is_loaded:
            raise MestError(f"{self.model!r} is not loaded; call mest_app.setup()")

    def check(self, variables):
        """Raise a MestError if the handler or model cannot take what requests will give it."""
        function = self.handler
        schema = {}
        if self.model is not None:
            function = first_stage(self.model)
            schema = self.parameters.schema
        elif getattr(function, "outermost", None) is function:  # nothing else decorates it
            function, schema = function.__wrapped__, self.parameters.schema  # type: ignore
        if function:
            check_arguments(function, schema, variables)


def first_stage(model):
    """Return the stage that takes the parameters by name, or None if `init` may make it."""
    stage = own_stage(model, "predict") or own_stage(model, "pre_process")
    return stage or (None if makes_batches(model) else own_stage(model, "infer"))


class Router:
    """Endpoints under one name, for `Mest.register_router`.

    The name has no dots; `flask.url_for` takes "name.handler".
    """

    def __init__(self, name: str):
        self.name = name
        self.routes: list = []  # urls relative to the router's, endpoints, options of Flask's
        self.registrations: list = []  # called with a route, now and whenever one is declared

    def route(self, url: str, method: str = "POST", **options: Any) -> Callable:
        """Decorate a handler, which comes back as it was, to answer requests to an url.

        Args:
            url: relative to the router's, as Flask has it: "predict" or "/users/<int:user>".
            method: the HTTP method; `methods=[…]` for several.
            **options: any other option of Flask's routes.
        """

        def decorate(handler):
            self._add(url, Endpoint(handler), **{"methods": [method], **options})
            return handler

        return decorate

    def add_predict_route(
        self,
        model: Any,
        schema: dict | None = None,
        url: str = "/predict",
        method: str = "POST",
        example: dict | None = None,
    ) -> None:
        """Answer requests to an url with `model.predict(**params)` of the checked parameters.

        Args:
            model: a GenericModel, which the Mest then loads, or another object with `predict`.
            schema: as in validate_params; without it, what the annotations of the model's first
                stage, `pre_process` or `infer`, stand for.
            url: relative to the router's; its variables are passed to `predict` too.
            method: the HTTP method.
            example: as in validate_params; each worker runs it once before it is ready.
        """
        owner = f"the predict route {url!r} of router {self.name!r}"
        require_instance(model, "predict", owner)
        if schema is None:
            stage = first_stage(model)
            if stage is None:
                raise MestError(
                    f"{owner} has no schema, and no stage of the model tells of one"
                )
            schema = schema_of(stage)
        endpoint = Endpoint(model.predict, Parameters(schema, example, owner), model)
        self._add(url, endpoint, methods=[method])

    def add_ping_route(self, url: str = "/ping", method: str = "GET") -> None:
        """Answer requests to an url with the name of the service, or 503 while it shuts down."""
        self._add(url, Endpoint(ping, is_probe=True), methods=[method])

    def _add(self, url, view, **options):
        name = getattr(view.handler, "__name__", "handler")
        options = {"methods": ["GET"], "endpoint": name, **options}
        self.routes.append(("/" + url.lstrip("/"), view, options))
        for register in self.registrations:
            register(*self.routes[-1])


def ping():
    """The name of the service, if that is up."""
    service = EXCHANGE.get().service
    if service.draining:
        raise Problem(503, f"{service.config.service_name} is shutting down.")
    return {"message": f"Pong from {service.config.service_name}!"}


def routes_of(app):
    """Yield the rules by which an application can be asked, with their views."""
    for rule in app.url_map.iter_rules():
        view = app.view_functions.get(rule.endpoint)
        if view:
            yield rule, view


# Documentation

BODY_METHODS = {"POST", "PUT", "PATCH"}  # parameters are in the body, as a rule
#: What JSON Schema calls Cerberus's types, where it has another word, and rules.
JSON_TYPES = {"binary": "string", "dict": "object", "float": "number", "list": "array"}
KEYWORDS = {"allowed": "enum", "default": "default", "max": "maximum", "min": "minimum"}
LENGTHS = {"maxlength": "maxLength", "minlength": "minLength"}
LIST_KEYWORDS = {"default": "default", "maxlength": "maxItems", "minlength": "minItems"}
#: Rules that change what is sent before it is checked, or let pass what others would refuse.
LENIENT = re.compile("(allow|purge)_unknown|coerce|default_setter|empty|keysrules|rename.*")


def json_schema(rules):
    """Return a JSON Schema (2020-12) that refuses nothing which Cerberus accepts by its rules."""
    rules = resolved(rules)
    schema = {**resolved(rules.get("meta"))}
    name, *others = types_of(rules) or [None]
    is_known = name in {*CHECKED, "binary"} and not others
    if is_known and not any(map(LENIENT.fullmatch, rules)):
        schema["type"] = JSON_TYPES.get(name, name)
        keywords = LIST_KEYWORDS if name == "list" else KEYWORDS | LENGTHS
        for rule in keywords.keys() & rules.keys():
            schema[keywords[rule]] = rules[rule]
        if name == "binary":
            schema["format"] = "binary"
        if name == "dict" and "schema" in rules:
            schema |= fields_schema(rules["schema"])
        if name == "list" and "schema" in rules:
            schema["items"] = json_schema(rules["schema"])
        if rules.get("nullable"):
            schema["type"] = [schema["type"], "null"]
            if "enum" in schema:
                schema["enum"] = [*schema["enum"], None]
    try:
        return json.loads(ENCODER.encode(schema))
    except (TypeError, ValueError):  # a limit or default that JSON cannot express
        return {}


def fields_schema(fields):
    """Return a Cerberus schema, or the name of one, as the JSON Schema of an object."""
    properties = {}
    required = []
    for field, rules in resolved(fields).items():
        own = resolved(rules)
        if not own.get("readonly"):
            properties[field] = json_schema(rules)
        if own.get("required") and "default" not in own:
            required.append(field)
    schema = {"type": "object", "properties": properties, "required": required}
    return {**schema, "additionalProperties": isinstance(fields, str)}


def openapi_json():
    """What this page says, for programs: OpenAPI 3.1, with urls relative to its own path."""
    config = current_app.extensions["mest"].config
    paths = {}  # type: ignore
    for rule, view in routes_of(current_app):
        if hasattr(view, "parameters") and not rule.endpoint.startswith("mest_docs"):
            operations = paths.setdefault(VARIABLE.sub(r"{\1}", rule.rule), {})
            for method in sorted(rule.methods - {"HEAD", "OPTIONS"}):
                needs_key = config.api_key and getattr(view, "needs_key", False)
                operations[method.lower()] = operation(rule, view, method, needs_key)
    document = {
        "openapi": "3.1.0",
        "info": {"title": config.service_name, "version": config.service_version or "0"},
        "servers": [{"url": os.path.relpath("/", os.path.dirname(request.path))}],
        "paths": paths,
        "components": {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }
    return flask.Response(json.dumps(document, default=str), content_type="application/json")


def operation(rule, view, method, needs_key):
    """Return what a route takes with a method, and what it answers."""
    fields = dict(view.parameters.schema if view.parameters else {})
    listed = []
    for name in VARIABLE.findall(rule.rule):
        own = json_schema(fields.pop(name, {"type": "string"}))
        listed.append({"name": name, "in": "path", "required": True, "schema": own})
    schema = fields_schema(fields)
    described: dict = {
        "operationId": "_".join(re.findall(r"\w+", f"{method.lower()}{rule.rule}")),
        "tags": [rule.endpoint.rpartition(".")[0] or "application"],
        "summary": inspect.getdoc(view) or "",
        "parameters": listed,
        "responses": {"200": {"description": "OK"}},
        "security": [{"bearer": []}] if needs_key else [],
    }
    if method not in BODY_METHODS:
        for name, own in schema["properties"].items():
            required = name in schema["required"]
            listed.append({"name": name, "in": "query", "required": required, "schema": own})
    elif fields:
        has_files = '"format": "binary"' in json.dumps(schema)
        kind = "multipart/form-data" if has_files else "application/json"
        body = {"schema": schema}
        if view.parameters.example:
            body["example"] = view.parameters.example
        described["requestBody"] = {
            "required": bool(schema["required"]),
            "content": {kind: body},
        }
    return described


def docs_page():
    """A page to read about the service and to try it."""
    return flask.Response(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})


# The ASGI edge

LARGE = 2**16  # bytes of a body that would hold up an event loop
MAX_READ = 2**26  # bytes to read of a body that is too long: clients send all, then listen


class Edge:
    """The ASGI application (versions 2 and 3) of a Mest in one event loop."""

    def __init__(self, service, loop):
        self.service = service
        self.loop = loop
        self.direct = service.direct_routes()
        self.max_body_bytes = body_limit(service.app)
        self.pool = Batcher(lambda calls: [*map(outcome_of, calls)], service.config.threads)
        self.outcomes: deque = deque()  # futures and outcomes from threads
        self.is_woken = False  # whether the loop knows of them
        self.deadlines: dict = {}  # by the tasks of requests, in time.monotonic()
        self.sweep()

    def sweep(self):
        """Cancel the tasks that are too late, once a second."""
        for task in filter(self.is_late, [*self.deadlines]):
            task.cancel()
        self.loop.call_later(1, self.sweep)

    def is_late(self, task):
        """Return whether a task has a deadline that has passed."""
        return monotonic() > self.deadlines.get(task, math.inf)

    async def http(self, scope, receive, send):
        """Answer a request."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        task = asyncio.current_task()
        sent_id = headers.get(b"x-request-id", "")
        exchange = Exchange(self.service, scope["method"], scope["path"], sent_id)
        EXCHANGE.set(exchange)
        self.deadlines[task] = exchange.began + self.service.config.request_timeout
        try:
            body = await self.body(task, receive)
            endpoint = self.direct.get((exchange.method, exchange.path))
            is_form = media_type_of(headers.get(b"content-type", "")) in FORM_TYPES
            if endpoint and not is_form and len(headers) == len(scope["headers"]):
                exchange.route = exchange.path
                content, kind = await self.answer(endpoint, scope, headers, body)
                length = str(len(content))
                response = 200, [("content-type", kind), ("content-length", length)], content
            else:
                del self.deadlines[task]  # a stream may last; now only a client that left cancels
                response = await self.through_flask(scope, send, body)
        except asyncio.CancelledError:
            if not self.is_late(task):  # the client has left
                exchange.end(499)
                raise
            response = self.refusal(Problem(504, "The model did not answer in time."))
        except Exception as error:
            response = self.refusal(error)
        finally:
            self.deadlines.pop(task, None)
        if response:
            status, answered, content = response
            exchange.end(status)
            await start(send, status, [*answered, ("x-request-id", exchange.id)])
            await send({"type": "http.response.body", "body": content})
        if scope["http_version"] == "1.0":
            raise asyncio.CancelledError  # ends the connection, which such a client may wait for

    def refusal(self, error):
        """Return status, headers and body of the answer to an exception."""
        response = as_problem(error).get_response({})
        return response.status_code, response.get_wsgi_headers({}), response.get_data()

    async def body(self, task, receive):
        """Return the body of a request, or the Problem that it is: 408 if it comes late, 413."""
        limit = self.max_body_bytes
        size = 0
        parts = []
        more = True
        try:
            while more and size <= max(MAX_READ, limit):
                message = await receive()
                if message["type"] == "http.disconnect" or self.is_late(task):
                    raise asyncio.CancelledError  # which Python 3.11's wait_for may have swallowed
                more = message.get("more_body", False)
                part = message.get("body", b"")
                size += len(part)
                if size <= limit:
                    parts.append(part)
        except asyncio.CancelledError:
            if not self.is_late(task):
                raise
            return Problem(408, "The body did not come in time.")
        if size > limit:
            return Problem(413, f"The body is longer than {limit} bytes.")
        return b"".join(parts)

    async def answer(self, endpoint, scope, headers, body):
        """Return the body and type of an answer; what the user has written runs in threads."""
        if isinstance(body, Problem):
            raise body
        if endpoint.is_probe:
            return encode_prediction(endpoint.handler())
        parameters = endpoint.parameters
        model = endpoint.model
        sent = headers.get
        admit(self.service.config, sent(b"authorization", ""), sent(b"x-api-key", ""))
        received = Received(sent(b"content-type", ""), scope["query_string"], body, {})
        if len(body) > LARGE:
            params = await self.call(parameters.read, received)
        else:
            document = parameters.document(received)
            params = parameters.quick(document)
            if params is None:  # Cerberus decides, which may take long
                params = await self.call(parameters.check, document)
        if own_stage(model, "predict"):
            return await self.call(endpoint.predict, params)
        endpoint.require_model()
        if own_stage(model, "pre_process"):
            params = await self.call(lambda: model.pre_process(**params))
        if not own_stage(model, "post_process"):
            return await self.outcome(model._batcher, params, encode_prediction)
        result = await self.outcome(model._batcher, params)
        return await self.call(
            lambda: encode_prediction(pass_on(result, model.post_process))
        )

    async def call(self, function, *args):
        """Return what a function returns in another thread."""
        return await self.outcome(self.pool, partial(function, *args))

    async def outcome(self, batcher, payload, convert=None):
        """Return or raise what a batcher, and in its thread `convert`, make of a payload."""
        future = self.loop.create_future()
        job = Job(payload, partial(self.give, future, convert))
        batcher.submit(job)
        try:
            return raised(await future)
        finally:
            job.is_abandoned = True  # or done

    def give(self, future, convert, outcome):
        """Hand an outcome over from another thread, which wakes the loop once for several."""
        if convert and not isinstance(outcome, Exception):
            outcome = outcome_of(convert, outcome)
        self.outcomes.append((future, outcome))
        if not self.is_woken:
            self.is_woken = True
            with suppress(RuntimeError):  # it is closed
                self.loop.call_soon_threadsafe(self.deliver)

    def deliver(self):
        """Let those go on whose outcomes are there."""
        self.is_woken = False
        while self.outcomes:
            future, outcome = self.outcomes.popleft()
            if not future.done():
                future.set_result(outcome)

    async def through_flask(self, scope, send, body):
        """Send Flask's answer, of which a thread makes one part after the other."""
        parts = flask_parts(self.service.app, environ_of(scope, body))
        run = partial(run_alone, threading.Lock(), copy_context())
        step = partial(run, next, parts, None)
        is_begun = False
        is_whole = False
        try:
            status, headers, is_whole, part = await self.outcome(self.pool, step)
            await start(send, status, headers)
            is_begun = True
            while not is_whole and part is not None:
                await send({"type": "http.response.body", "body": part, "more_body": True})
                part = await self.outcome(self.pool, step)
            await send({"type": "http.response.body", "body": part or b""})
        except Exception as error:
            if not is_begun:
                raise
            as_problem(error)
            raise asyncio.CancelledError from None  # ends the connection: the client shall know
        finally:
            if not is_whole:
                job = Job(partial(run, parts.close), lambda outcome: None)
                job.exchange = None  # so that it is not refused where too many wait
                self.pool.submit(job)


async def start(send, status, headers):
    """Begin a response."""
    pairs = [
        (k.lower().encode("latin-1"), v.encode("latin-1", "replace")) for k, v in headers
    ]
    if status == 408 or EXCHANGE.get().service.draining:
        pairs.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": pairs})


def run_alone(lock, context, function, *args):
    """Return what a function returns in a context, in which nothing else runs meanwhile."""
    with lock:
        return context.run(function, *args)


def flask_parts(app, environ):
    """Yield (status, headers, is_whole, part) of an answer; unless it is whole, then each part."""
    chunks, status, headers = run_wsgi_app(app, environ)
    head = int(status[:3]), headers.to_wsgi_list()
    try:
        part = next(chunks, None)  # type: ignore
        is_whole = part is None or headers.get("Content-Length") == str(len(part))
        if not is_whole:  # it stays open until the last part has been asked for, or it is closed
            yield *head, False, part
            yield from chunks
    finally:
        getattr(chunks, "close", lambda: None)()
    if is_whole:
        yield *head, True, part or b""


def environ_of(scope, body):
    """Return a request as WSGI has it (PEP 3333), with the bytes of the path as they were sent."""

    def read(*args):
        raise body

    host, port = scope.get("server") or ("localhost", None)
    path = scope["path"].encode()
    if sent := scope.get("raw_path"):
        path = unquote_to_bytes(sent)
    environ = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": "",
        "PATH_INFO": path.decode("latin-1"),
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "SERVER_NAME": host,
        "SERVER_PORT": str(port or 80),  # none is on a Unix socket
        "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
        "REMOTE_ADDR": (scope.get("client") or [""])[0],
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope.get("scheme", "http"),
        "wsgi.input_terminated": True,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "mest.exchange": EXCHANGE.get(),
    }
    for name, value in scope["headers"]:
        if b"_" in name:  # X_Y would pass for X-Y
            continue
        key = name.decode("latin-1").upper().replace("-", "_")
        text = value.decode("latin-1")
        key = key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
        joint = "; " if name == b"cookie" else ","
        environ[key] = f"{environ[key]}{joint}{text}" if key in environ else text
    if isinstance(body, Problem):  # who reads it finds out
        return {**environ, "wsgi.input": SimpleNamespace(read=read, readline=read)}
    return {**environ, "wsgi.input": BytesIO(body), "CONTENT_LENGTH": str(len(body))}


# Application


def hooks_of(app):
    """Return what Flask calls for a request, besides the view."""
    hooks = [app.wsgi_app, app.config.get("TRUSTED_HOSTS"), *app.teardown_appcontext_funcs]
    scoped = app.before_request_funcs, app.after_request_funcs, app.teardown_request_funcs
    for scope in (*scoped, app.url_value_preprocessors, *app.error_handler_spec.values()):
        for functions in scope.values():
            hooks += functions.values() if isinstance(functions, dict) else functions
    begin_and_end = flask.request_started, flask.request_finished, flask.request_tearing_down
    signals = *begin_and_end, flask.got_request_exception
    return [*hooks, *(each.has_receivers_for(app) for each in signals)]


def in_fresh_thread(failure, function, *args):
    """Return what a user's function returns in a thread of its own, or raise a MestError."""
    try:
        with ThreadPoolExecutor(1) as thread:  # OpenMP hangs in the main thread of a fork
            return thread.submit(function, *args).result()
    except (Exception, SystemExit) as error:
        raise MestError(f"{failure}: {cause_of(error)}") from error


class Mest:
    """A service: a configuration, models and routes on one Flask application.

    Args:
        config: the configuration, or the service_name.
        app: a Flask application to live in, which keeps its logging, error handlers and routes as
            they are. Without it Mest makes one, and all errors of that are problem details.
        **fields: with the service_name, fields of MestConfig.
    """

    _run_by_command = False  # while that imports the application, to load and run it

    def __init__(
        self, config: MestConfig | str, app: flask.Flask | None = None, **fields: Any
    ):
        if isinstance(config, str):
            config = MestConfig(config, **fields)
        elif fields or not isinstance(config, MestConfig):
            raise MestError("Mest takes a MestConfig with all fields, or a name and fields")
        self.config = config
        name = config.service_name
        self.logger = logging.getLogger(name) if app else set_up_logging(config)
        self.app = app or flask.Flask(name, root_path=os.getcwd(), static_folder=None)
        if not app:
            self.app.logger = self.logger  # type: ignore
            self.app.config["MAX_CONTENT_LENGTH"] = config.max_body_bytes
            self.app.register_error_handler(
                Exception, lambda error: as_problem(error).get_response(request.environ)
            )
        self.app.extensions["mest"] = self
        self.app.wsgi_app = partial(self._wsgi, self.app.wsgi_app)  # type: ignore
        self._own_hooks = None if app else hooks_of(self.app)
        self._routed: list = []  # the models of predict routes
        self._loaded: set = set()  # ids of models
        self._edge: Edge | None = None
        self.draining = False  # whether it is about to stop, which probes tell
        self.probes = Router("mest")
        self.docs = Router("mest_docs")
        for probe in (self.livez, self.readyz):
            self.probes._add(probe.__name__, Endpoint(probe, is_probe=True))
        if metrics():
            self.probes._add("metrics", Endpoint(metrics_page, needs_key=False))
        if config.docs:
            self.docs._add("docs", Endpoint(docs_page, needs_key=False))
            self.docs._add("openapi.json", Endpoint(openapi_json, needs_key=False))
        if not app:
            self.register_router("/", self.probes)
            self.register_router("/", self.docs)

    @cached_property
    def router(self) -> Router:
        """A router at "/", for a service that needs no other."""
        router = Router("root")
        self.register_router("/", router)
        return router

    def _wsgi(self, application, environ, start_response):
        """Pass a request on to Flask's WSGI application, count it, and put its id on the answer."""
        exchange = environ.get("mest.exchange")
        if exchange is None:  # it does not come from the event loop
            method = environ["REQUEST_METHOD"]
            path = environ.get("PATH_INFO", "")
            exchange = Exchange(self, method, path, environ.get("HTTP_X_REQUEST_ID", ""))
        token = EXCHANGE.set(exchange)

        def start(status, headers, exc_info=None):
            rule = getattr(environ.get("werkzeug.request"), "url_rule", None)
            exchange.route = rule.rule if rule else "other"
            exchange.end(int(status[:3]))
            if not any(name.lower() == "x-request-id" for name, _ in headers):
                headers = [*headers, ("X-Request-Id", exchange.id)]
            return start_response(status, headers, exc_info)

        try:
            return application(environ, start)
        except BaseException:
            exchange.end(500)
            raise
        finally:
            EXCHANGE.reset(token)

    def direct_routes(self):
        """Return the endpoints that the event loop may serve without Flask, by method and path."""
        routes: dict = {}
        if self._own_hooks != hooks_of(self.app):
            return routes
        for rule, view in routes_of(self.app):
            if not isinstance(view, Endpoint) or rule.arguments:
                continue
            if view.is_probe or view.model is not None:
                for method in rule.methods - {"HEAD", "OPTIONS"}:
                    routes[method, rule.rule] = view
        return routes

    @property
    def models(self):
        """The models that it loads: of the configuration, and GenericModels of predict routes."""
        return [*self.config.models_instances, *self._routed]

    def livez(self):
        """Whether the process can serve: 503 if a model is in one call for liveness_timeout."""
        limit = self.config.liveness_timeout
        for model in self.models:
            is_initialised = getattr(model, "_initialised", False)
            if is_initialised and model._batcher.busy_for() > limit > 0:
                name = type(model).__name__
                raise Problem(503, f"{name} is in one call for over {limit} s.")
        return {"status": "alive"}

    def readyz(self):
        """Whether requests may come: the models are loaded, and the service is not stopping."""
        ping()
        for model in self.models:
            if id(model) not in self._loaded:
                raise Problem(503, f"The model {type(model).__name__} is not loaded.")
        return {"status": "ready"}

    def setup(self) -> Mest:
        """Load the models that it has not loaded yet, or raise a MestError, and return itself."""
        if not Mest._run_by_command:
            self.load_models()
        return self

    def load_models(self) -> None:
        """Do what `setup` does, even while the command imports the application."""
        directory = self.config.local_model_directory_path
        for model in self.models:
            if id(model) not in self._loaded:
                name = type(model).__name__
                began = monotonic()
                in_fresh_thread(f"model {name} could not be loaded", model.init, directory)
                self._loaded.add(id(model))
                self.logger.info("model %s loaded in %.3f s", name, monotonic() - began)
                if isinstance(model, GenericModel):
                    model._initialised = True

    def warm_up(self) -> None:
        """Load the models, and run the example of each predict route once: first calls are slow."""
        self.load_models()
        for rule, view in routes_of(self.app):
            if not isinstance(view, Endpoint) or view.model is None or rule.arguments:
                continue  # or it has variables, of which an example says nothing
            if view.parameters.example is not None:
                name = type(view.model).__name__
                failure = f"model {name} fails for the example of {rule.rule}"
                params = view.parameters.check(copy.deepcopy(view.parameters.example))
                in_fresh_thread(failure, view.predict, params)

    def register_router(self, url: str, router: Router) -> None:
        """Put the routes of a router, present and future ones, under an url, or several in turn."""
        register = partial(self._add_route, url.strip("/"), router.name)
        router.registrations.append(register)
        for route in router.routes:
            register(*route)

    def _add_route(self, prefix, name, url, endpoint, options):
        """Add a route to the Flask application, unless it would hide another."""
        url = f"/{prefix}{url}" if prefix else url
        methods = {*map(str.upper, options["methods"])} - {"OPTIONS"}
        for other, _ in routes_of(self.app):
            is_same = VARIABLE.sub("<>", other.rule) == VARIABLE.sub("<>", url)
            if is_same and other.methods & methods:
                clash = f"{' '.join(methods)} {url} is a route already"
                cure = f"of {other.endpoint!r}; give it another url in router {name!r}"
                raise MestError(f"{clash}, {cure}")
        if not self.app.url_value_preprocessors:  # which may take some away
            endpoint.check([*VARIABLE.findall(url), *(options.get("defaults") or ())])
        options = {**options, "endpoint": f"{name}.{options['endpoint']}"}
        while options["endpoint"] in self.app.view_functions:
            options["endpoint"] += "_2"  # Flask wants each to have a name of its own
        self.app.add_url_rule(url, view_func=endpoint, **options)
        if isinstance(endpoint.model, GenericModel):
            self._routed.append(endpoint.model)

    async def __call__(self, scope, receive, send):
        """Serve as an ASGI application, of gunicorn's own worker, uvicorn and others."""
        if scope["type"] != "http":  # WebSockets are refused
            await send({"type": "websocket.close"})
            return
        loop = asyncio.get_running_loop()
        if self._edge is None or self._edge.loop is not loop:
            self._edge = Edge(self, loop)
        await self._edge.http(scope, receive, send)

    def run(self, **options: Any) -> None:
        """Start the development server, on 127.0.0.1 if there is no `listen_host`, with the models.

        Options are those of werkzeug.serving.run_simple. Where the `mest` command loads the file it
        does nothing: the command runs the service.
        """
        if Mest._run_by_command:
            return
        if not options.get("use_reloader") or is_running_from_reloader():
            self.load_models()  # the reloader's parent only watches
        host = self.config.listen_host or "127.0.0.1"
        run_simple(host, self.config.listen_port, self.app, threaded=True, **options)


# Serving


def hear_signals_apart(signals):
    """Let processes that a model forks hear signals themselves, and not the worker's loop."""
    block = partial(signal.pthread_sigmask, signal.SIG_BLOCK, signals)
    unblock = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, signals)

    def forget():
        globals().update(metrics=lambda: None)  # another thread may have held their locks
        signal.set_wakeup_fd(-1)
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=forget)


def close_idle(worker):
    """Close idle connections, again and again: gunicorn waits for them as for requests."""
    for connection in [*worker.connections]:
        if not getattr(connection, "_current_request", None):
            connection.transport.close()
    worker.loop.call_later(0.5, close_idle, worker)


def worker_for(service):
    """Return gunicorn's class of ASGI workers, with a drain, and an end to idle connections."""
    import resource

    from gunicorn.workers import gasgi

    room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200  # files that the model may open

    class Connection(gasgi.ASGIProtocol):
        def connection_made(self, transport):
            super().connection_made(transport)
            self.worker.connections.add(self)
            count = self.worker.nr_conns
            if count > self.worker.cfg.worker_connections or count > room > 0:
                transport.abort()

    class Worker(gasgi.ASGIWorker):
        def init_process(self):
            self.connections: WeakSet = WeakSet()
            gasgi.ASGIProtocol = Connection
            super().init_process()

        def init_signals(self):  # while the models load, they end the worker at once
            for number in self.SIGNALS:
                signal.signal(number, signal.SIG_DFL)

        def run(self):
            super().init_signals()
            hear_signals_apart(self.SIGNALS)
            super().run()

        def handle_exit_signal(self):  # SIGTERM, which a process group may get twice
            if not service.draining:
                service.draining = True
                service.logger.info("stops in %d s, not ready", service.config.drain_seconds)
                self.loop.call_later(service.config.drain_seconds, self.finish)

        def finish(self):
            self.cfg.set("graceful_timeout", service.config.graceful_timeout)
            for listener in [each for server in self.servers for each in server.sockets]:
                self.loop.remove_reader(listener)  # close() drops what was just accepted
            super().handle_exit_signal()
            self.loop.call_later(0.5, close_idle, self)

    return Worker


def settings_for(service):
    """Return the settings of gunicorn that a Mest asks for."""
    config = service.config
    host = config.listen_host or "0.0.0.0"
    if ":" in host:
        host = f"[{host}]"

    def child_exit(server, worker):
        if metrics():
            from prometheus_client.multiprocess import mark_process_dead

            mark_process_dead(worker.pid)

    return {
        "bind": f"{host}:{config.listen_port}",
        "workers": config.workers,
        "worker_class": worker_for(service),
        "timeout": config.liveness_timeout,  # of a loop: code that holds the GIL blocks it
        "graceful_timeout": config.drain_seconds + config.graceful_timeout + 2,
        "asgi_lifespan": "off",
        "asgi_disconnect_grace_period": 0,  # who has left is not waited for
        "keepalive": 75,  # seconds; load balancers keep idle connections for 60
        "limit_request_line": 8190,  # bytes, the most that gunicorn takes
        "loglevel": "warning",
        "control_socket_disable": True,  # it writes to $HOME, which containers may lack
        "child_exit": child_exit,
    }


def gunicorn_for(service, options):
    """Return gunicorn's application for a Mest; options beat the environment, which beats files."""
    from gunicorn.app.base import Application
    from gunicorn.errors import AppImportError

    class Service(Application):
        def init(self, parser, opts, args):
            if args:
                parser.error(f"{args[0]} is no option; --app names the application")
            return settings_for(service)

        def load_config(self):
            argv = sys.argv
            sys.argv = ["mest run gunicorn --", *options]
            try:
                super().load_config()  # reads sys.argv, the environment and gunicorn.conf.py
            finally:
                sys.argv = argv

        def load(self):  # in a worker, or in the master with --preload
            try:
                if self.cfg.preload_app:
                    service.load_models()
                    torch = sys.modules.get("torch")
                    if torch and torch.cuda.is_initialized():
                        raise MestError("CUDA does not survive the fork of --preload")
                else:
                    service.warm_up()
            except MestError as error:
                raise AppImportError(report(error)) from None  # ends the master too
            gc.freeze()  # or full collections stop the service, for 0.05 s with scikit-learn
            sys.setswitchinterval(0.0005)  # seconds that the model may hold up the loop
            where = ", ".join(self.cfg.bind)
            routes = ", ".join(" ".join(route) for route in service.direct_routes())
            service.logger.info("serves on %s; without Flask: %s", where, routes)
            is_ours = hasattr(self.cfg.worker_class, "finish")  # others speak WSGI
            return service if is_ours else service.app

    return Service()


# Command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `mest` command, and return its exit code: 1 for a failure, 2 for a wrong option."""
    args = command_line().parse_args(argv)
    for field in MestConfig.settings():
        if value := getattr(args, field.name, None):
            os.environ[f"MEST_{field.name.upper()}"] = value
    try:
        return args.run(args)
    except ImportError as error:  # gunicorn or pytest
        fault = MestError(cause_of(error))
    except MestError as error:
        fault = error
    print(report(fault), file=sys.stderr)
    return 1


def command_line():
    """Return the parser of the command line; what it parses has the function to call as `run`."""
    parser = argparse.ArgumentParser("mest")
    parser.add_argument("--version", action="version", version=f"mest {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="serve the application")
    servers = run.add_subparsers(required=True, metavar="SERVER")

    def add(group, name, run):
        command = group.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        about = "the application, and its Mest's name; default $MEST_APP or app.py"
        command.add_argument("--app", metavar="FILE_OR_MODULE[:NAME]", help=about)
        for field in MestConfig.settings():
            option = field.name.removeprefix("listen_").replace("_", "-")
            command.add_argument(
                f"--{option}", dest=field.name, help=field.metadata["meaning"]
            )
        return command.add_argument

    dev = add(servers, "dev", run_dev)
    gunicorn = add(servers, "gunicorn", run_gunicorn)
    test = add(commands, "test", run_test)
    add(commands, "shell", run_shell)
    dev("--no-reload", dest="reload", action="store_false")
    gunicorn("--preload", action="store_true", help="load the models before forking")
    gunicorn("options", nargs="*", metavar="-- OPTIONS", help="gunicorn's own")
    test("options", nargs="*", metavar="-- OPTIONS", help="pytest's own")
    return parser


def run_dev(args):
    """serve on this machine with Flask's server, reloading what changes"""
    try:
        service, _ = load_app(args)
        service.run(use_reloader=args.reload)
    except MestError as error:
        if not is_running_from_reloader():
            raise
        print(report(error), file=sys.stderr)
        problem = Problem(503, "The application does not load; the terminal says why.")
        run_simple("127.0.0.1", 0, problem, use_reloader=True)  # where the parent listens
    return 0


def run_gunicorn(args):
    """serve in production with gunicorn, whose own options may follow a --"""
    import resource

    from gunicorn.errors import AppImportError, HaltServer

    cpus = max(1, available_cpus() // int(MestConfig("mest").workers))
    for library in ("OMP", "OPENBLAS", "MKL", "BLIS", "NUMEXPR"):  # read at their import
        os.environ.setdefault(f"{library}_NUM_THREADS", str(cpus))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError):  # each connection is an open file
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    directory = tempfile.mkdtemp(prefix="mest-")
    master = os.getpid()
    os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", directory)  # it is read at import, too
    try:
        service, _ = load_app(args)
        options = ["--preload", *args.options] if args.preload else args.options
        gunicorn_for(service, options).run()
        return 0
    except (AppImportError, HaltServer) as error:  # a model, or a second worker that failed
        print(error, file=sys.stderr)
        return 1
    finally:
        if os.getpid() == master:  # workers end here, too
            shutil.rmtree(directory, ignore_errors=True)


def run_shell(args):
    """start a Python prompt with the models loaded"""
    service, module = load_app(args)
    service.load_models()
    names = {**vars(module), "mest_app": service}
    with service.app.app_context():
        code.interact("Here is what the application has.", local=names)
    return 0


def run_test(args):
    """run the example of each predict route, if there is an application, then run pytest"""
    import pytest

    if args.app or "MEST_APP" in os.environ or os.path.isfile("app.py"):
        load_app(args)[0].warm_up()
    sys.path.insert(0, os.getcwd())
    return int(pytest.main([*args.options]))  # which adds options of its own


def load_app(args):
    """Import the application that --app or MEST_APP names, and return its Mest and its module."""
    target = args.app or os.environ.get("MEST_APP") or "app.py"
    path, _, name = target.partition(":")
    folder = os.getcwd()
    module_name = path
    if path.endswith(".py"):
        if not os.path.isfile(path):
            cure = "name it with --app or MEST_APP, or change to its directory"
            raise MestError(f"there is no application {path} in {folder}; {cure}")
        folder, module_name = os.path.split(os.path.realpath(path)[:-3])
    sys.path.insert(0, folder)
    Mest._run_by_command = True
    try:
        module = importlib.import_module(module_name)
    except MestError:
        raise
    except (Exception, SystemExit) as error:
        raise MestError(f"{path} cannot be imported: {cause_of(error)}") from error
    finally:
        Mest._run_by_command = False
    found = {key: value for key, value in vars(module).items() if isinstance(value, Mest)}
    name = name or next(iter(found), "mest_app")
    if name not in found:
        raise MestError(
            f"{path} has no Mest named {name}, but {[*found]}; make one, or name it"
        )
    return found[name], module


# The documented import paths are this module under further names. Where it runs as the command, as
# `python mest.py`, an application that imports it gets that same module, with the same classes.
MestModel = GenericModel
app = api = models = _this = sys.modules[__name__]
_main = sys.modules["__main__"]
if os.path.realpath(getattr(_main, "__file__", None) or "") == os.path.realpath(__file__):
    _this = sys.modules[__name__] = _main
for _path in ("app", "app.api", "models"):
    sys.modules[f"{__name__}.{_path}"] = _this


PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; form-action 'none'; frame-ancestors 'none'"
)

#: The page at /docs. It asks nobody but this service, and inserts nothing as HTML.
PAGE = r"""<!doctype html><html lang="en"><meta name="viewport" content="width=device-width">
<title>Documentation</title><link rel="icon" href="data:,"><style>
html { font: 1rem/1.5 system-ui; color-scheme: light dark; max-width: 52rem; margin: auto }
form :is(label, input, textarea) { display: block; box-sizing: border-box; width: 100% }
summary, pre { background: #8882; margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere }
</style><h1>openapi.json is not loaded</h1>
<label hidden>API key <input type="password" autocomplete="off"></label><script type="module">
const [title, keyLabel, key] = document.querySelectorAll("h1, label, input");
const quote = text => `'${text.replaceAll("'", "'\\''")}'`; // for a shell
function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
const sample = ({ type, items, properties = {}, ...own }) => "default" in own ? own.default
  : own.enum?.[0] ?? own.minimum ?? { integer: 0, number: 0, boolean: true,
    array: items ? Array(Math.min(own.minItems ?? 1, 999)).fill(sample(items)) : [],
    object: Object.fromEntries(Object.entries(properties).map(([name, it]) => [name, sample(it)])),
  }[[type].flat()[0]] ?? "text";
function show({ method, path, operationId: id, summary, parameters, requestBody, security }) {
  const [[type, { schema = {}, example } = {}] = []] = Object.entries(requestBody?.content ?? {});
  const query = parameters.filter(it => it.required ? it.in === "query" : "default" in it.schema)
    .flatMap(it => [sample(it.schema) ?? []].flat().map(value => [it.name, value]));
  const url = make("input", { value: `${path}?${new URLSearchParams(query)}`.replace(/\?$/, "") });
  const text = make("textarea", { rows: 5, value: JSON.stringify(example ?? sample(schema)) });
  const isJson = type === "application/json", inputs = isJson ? [["Body", text]]
    : Object.entries(schema.properties ?? {}).map(([name, { items, format = items?.format }]) =>
      [name, make("input", { name, multiple: items, type: format === "binary" ? "file" : "" })]);
  const labels = [["URL", url], ...inputs].map(([name, input]) => make("label", {}, name, input));
  const form = make("form", { method: "dialog" }, ...labels, make("button", {}, "Send"));
  const [status, answer, curl] = ["output", "pre", "pre"].map(tag => make(tag));
  keyLabel.hidden &&= !security.length;
  function update(event) { // the command; and when the form is submitted, the answer
    const to = new URL(servers[0].url + url.value, location), data = new FormData(form);
    for (const [name, value] of [...data]) if (!(value.name ?? value)) data.delete(name);
    const words = Array.from(data, ([name, value]) => `-F ${quote(
      `${name}=${value.name ? "@" : ""}"${(value.name ?? value).replace(/["\\]/g, "\\$&")}"`)}`);
    const body = isJson ? new Blob([text.value], { type }) : words.length ? data : null;
    const headers = security.map(() => ["Authorization", `Bearer ${key.value}`]);
    if (isJson) words.push(`-H 'Content-Type: ${type}' --data-raw ${quote(text.value)}`);
    if (security.length) words.push('-H "Authorization: Bearer $API_KEY"');
    curl.textContent = ["curl -g -X", method, quote(to.href), ...words].join(" "); // -g: no globs
    if (event.type !== "submit") return;
    status.textContent = answer.textContent = "";
    fetch(to, { method, headers, body }).then(async response => {
      const blob = await response.blob(), size = `${blob.size} bytes of ${blob.type}`;
      answer.textContent = / text|json| $/.test(size) ? await blob.slice(0, 1e5).text() : size;
      status.textContent = `${response.status} ${response.statusText}`;
    }).catch(error => { status.textContent = `No answer: ${error.message}`; });
  }
  return make("details", { id, oninput: update, onsubmit: update, ontoggle: update },
    make("summary", {}, `${method} ${path} ${summary}`), form, status, answer, curl,
    make("pre", {}, JSON.stringify({ parameters, requestBody }, null, 2)));
}
const { info, paths, servers } = await (await fetch("openapi.json")).json();
const operations = Object.entries(paths).flatMap(([path, item]) => Object.entries(item).map(
  ([method, operation]) => ({ ...operation, path, method: method.toUpperCase() })));
const { mest, ...others } = Object.groupBy(operations, ({ tags }) => tags[0]);
for (const [tag, group] of Object.entries({ ...others, mest }))
  document.body.append(make("h2", {}, tag), ...group.map(show));
document.title = title.textContent = info.title;
</script>"""

if __name__ == "__main__":
    sys.exit(main())
