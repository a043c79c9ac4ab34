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

Two edges lead requests to that path. `mest_app.app` is a Flask application, for the development
server, tests and any WSGI server. `mest_app` itself is an ASGI application, for gunicorn: its event
loop waits for clients and takes predict routes and probes along the path itself; every other
request goes through the Flask application, in a thread.

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
import importlib.util
import inspect
import itertools
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
from contextvars import Context, ContextVar, copy_context
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from functools import cache, cached_property, partial, wraps
from http import HTTPMethod
from io import BytesIO
from pathlib import Path, PurePath
from queue import Empty, SimpleQueue
from threading import current_thread
from time import monotonic, sleep
from types import SimpleNamespace, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin
from urllib.parse import parse_qs, unquote_to_bytes
from uuid import UUID
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
        self,
        status: int,
        detail: str,
        headers: dict | None = None,
        **members: Any,
    ):
        super().__init__(detail)
        self.code, self.headers, self.members = status, headers or {}, members

    def get_body(self, environ=None, scope=None):
        body = {
            "type": "about:blank",
            "title": self.name,
            "status": self.code,
            "detail": self.description,
        }
        if exchange := EXCHANGE.get():
            body["request_id"] = exchange.id
        return json.dumps(body | self.members, default=str) + "\n"

    def get_headers(self, environ=None, scope=None):
        return [("Content-Type", "application/problem+json"), *self.headers.items()]


def as_problem(error):
    """Return the answer to any exception: the one place where errors become answers."""
    if not isinstance(error, HTTPException):  # a defect, of which clients are told the id alone
        exchange = EXCHANGE.get()
        asked = f"{exchange.method} {exchange.path}"
        exchange.service.logger.error("%s failed: %r", asked, error, exc_info=error)
        flask.got_request_exception.send(exchange.service.app, exception=error)
        return Problem(500, "The service failed. Its log says why, under this request_id.")
    status = error.code or 0
    if isinstance(error, Problem) or error.response or status < 400:
        return error
    headers = dict(error.get_headers())
    del headers["Content-Type"]
    return Problem(status, error.description or error.name, headers)


def report(error):
    """Return the message about a mistake, below the end of the traceback of the user's own code."""
    lines = []
    if error.__cause__:
        lines = traceback.format_exception(error.__cause__, limit=-3)
    return "".join([*lines, f"mest: {error}"])


def cause_of(error):
    """Return what went wrong in the user's code, in a line."""
    cure = f"; install it for {sys.executable}" if isinstance(error, ImportError) else ""
    return f"{type(error).__name__}: {error}{cure}"


# Configuration


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

    Args:
        service_name: names the logger, the documentation and the answers to pings.
        models_instances: models to load, GenericModels or others with `init(directory_path)`, in
            addition to those of predict routes.

    The other fields are described where they are declared.

    Raises:
        MestError: names the field, its value and what is allowed.
    """

    service_name: str
    listen_port: int = setting(8000, range(65536), "TCP port; 0 picks a free one")
    models_instances: Sequence[Any] = ()
    local_model_directory_path: str = setting("_models", str, "directory given to each init")
    _: dataclasses.KW_ONLY
    service_version: str = setting("", str, "version of the service, for its documentation")
    listen_host: str = setting("", str, "address; by default 127.0.0.1, under gunicorn 0.0.0.0")
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
    docs: bool = setting(True, bool, "whether there are /docs and /openapi.json")
    access_log: bool = setting(False, bool, "whether each request is logged")
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
            source, value = field.name, getattr(self, field.name)
            variable = f"MEST_{source.upper()}"
            if os.environ.get(variable):
                source, value = variable, os.environ[variable]
            setattr(self, field.name, self.convert(field, value, source))

    @classmethod
    def settings(cls):
        """Return the fields that the environment may set, with `allowed` and `meaning`."""
        return [field for field in dataclasses.fields(cls) if field.metadata]

    @staticmethod
    def convert(field, value, source):
        """Return what a value, or the text for it, means for a field, or raise a MestError."""
        allowed, text = field.metadata["allowed"], str(value)
        if field.name == "workers" and text == "auto":
            return available_cpus()
        if allowed is str:
            needed = "text"
            if isinstance(value, (str, Path)):
                return text
        elif isinstance(allowed, range):
            needed = f"an integer from {allowed[0]} to {allowed[-1]}"
            if re.fullmatch("[0-9]{1,18}", text) and int(text) in allowed:
                return int(text)
        else:
            options = {"1": True, "true": True, "0": False, "false": False}
            if allowed is not bool:
                options = {option.lower(): option for option in allowed}
            needed = " or ".join(options)
            if text.lower() in options:
                return options[text.lower()]
        raise MestError(
            f"{source} is {value!r}; it must be {needed} ({field.metadata['meaning']})"
        )


# Logging

#: What each record has; all else came with `extra`.
RECORD_MEMBERS = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def visible(text):
    """Return a text without what ends lines or drives terminals: no input may forge a line."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


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
            if name not in RECORD_MEMBERS:
                line[f"{name}_" if name in line else name] = value
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if not self.is_json:
            lines = [" ".join(map(str, line.values())), *trace.splitlines()]
            return "\n    ".join(map(visible, lines))
        if trace:
            line["traceback"] = trace
        try:
            return json.dumps(line, default=str, skipkeys=True, allow_nan=False)
        except (ValueError, RecursionError):  # what `extra` brought has no form in JSON
            return json.dumps({name: str(value) for name, value in line.items()})


def set_up_logging(config):
    """Return the logger of the service_name with its level and one handler, which are set anew."""
    logger = logging.getLogger(config.service_name)
    others = [h for h in logger.handlers if not isinstance(h.formatter, LogFormatter)]
    handler, formatter = logging.StreamHandler(sys.stdout), LogFormatter()
    is_terminal = config.log_format == "auto" and sys.stdout.isatty()
    formatter.is_json = config.log_format != "text" and not is_terminal
    handler.setFormatter(formatter)
    logger.handlers = [*others, handler]
    logger.propagate = False  # a line is written once, whatever else the process logs
    logger.setLevel(config.log_level)
    return logger


# JSON

#: Deeper documents serve nobody, and exhaust the stack of whatever handles them next.
MAX_DEPTH = 100


def refuse_constant(name):
    """Refuse NaN and Infinity, which Python would decode."""
    raise ValueError(f"{name} has no form in JSON")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def decode_object(body):
    """Return the JSON object (RFC 8259) in a body, which must be UTF-8 and free of NaN.

    Raises:
        Problem: 400, or 422 where it is JSON but no object, saying what is wrong.
    """
    try:
        text = body.decode("utf-8-sig")  # a byte order mark may be ignored: section 8.1
        value = DECODER.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails on a lone surrogate
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise Problem(
            422, "The body is JSON, but no object; send an object with the parameters."
        )
    return value


def are_finite(numbers):
    """Return whether all numbers can be floats that are neither infinite nor NaN."""
    try:
        return all(map(math.isfinite, numbers))
    except OverflowError:
        return False


def fault_of(value):
    """Return why a decoded value is unfit for use, its depth or a number not finite, or None."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        if not are_finite([item for item in level if type(item) in (int, float)]):
            return "contains a number that is not finite, or too large for a float"
        within = []
        for item in level:
            if type(item) is list:
                within += item
            elif type(item) is dict:
                within += item.values()
        if not within:
            return None
        level = within
    return f"is nested deeper than {MAX_DEPTH} levels"


#: What Python's types are in JSON.
FORMS: list = [
    (Enum, operator.attrgetter("value")),
    ((UUID, PurePath), str),
    (Decimal, float),
    (timedelta, operator.methodcaller("total_seconds")),
    ((date, time_of_day), operator.methodcaller("isoformat")),
]


def plain(value):
    """Return what stands for an object in JSON, or raise a TypeError: for the encoder."""
    for types, form in FORMS:
        if isinstance(value, types):
            if value != value:
                raise ValueError(f"{value} has no form in JSON")  # pandas's NaT
            return form(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    if kind == "M" and not hasattr(value, "to_list"):  # numpy's times, not pandas's
        if (value != value).any():
            raise ValueError("NaT has no form in JSON")
        return value.astype(str).tolist()
    for method in ("tolist", "item") if kind != "m" else ():  # of arrays and their scalars
        items = getattr(value, method, lambda: value)()
        if type(items) is not type(value):
            return items
    name, cure = type(value).__name__, "return a dictionary, list, number, text or array"
    raise TypeError(f"a {name} in the result has no form in JSON; {cure}")


ENCODER = json.JSONEncoder(
    default=plain, allow_nan=False, ensure_ascii=False, separators=(",", ":")
)


def encode(result):
    """Return a result as JSON, with arrays (of numpy, torch, pandas, …) as their `.tolist()`.

    Raises:
        ValueError: the result contains NaN or infinity, or text that is no Unicode.
        TypeError: something in it has no JSON form.
    """
    return ENCODER.encode(result).encode() + b"\n"


# Parameters

#: Cerberus's bookkeeping is quadratic in its errors, and nobody reads more.
MAX_ERRORS = 20
#: Fields of a form. More are a list, which belongs in JSON.
MAX_FIELDS = 1000
#: Methods of requests whose parameters are in the body, as a rule.
BODY_METHODS = {"POST", "PUT", "PATCH"}
FORM_TYPES = {"application/x-www-form-urlencoded", "multipart/form-data"}


class Received(NamedTuple):
    """What an endpoint needs of a request, whichever edge that came to."""

    method: str
    content_type: str
    query: bytes
    body: bytes
    variables: dict[str, Any]
    #: The fields of a form, which Werkzeug has parsed; files are bytes.
    form: dict[str, list] | None = None


def media_type_of(content_type):
    """Return the media type in a Content-Type, such as text/csv."""
    return content_type.partition(";")[0].strip().lower()


def decode(received):
    """Return the fields of the query or form, lists of text, and those of a JSON body.

    Raises:
        Problem: 400, 415 or 422, saying what to send instead.
    """
    media_type = media_type_of(received.content_type)
    is_json = media_type == "application/json" or media_type.endswith("+json")
    fields = {}
    if received.query:
        fields = parse_qs(received.query.decode("utf-8", "replace"), keep_blank_values=True)
    if received.form is not None:
        return {**fields, **received.form}, {}
    if not received.body and not (is_json and received.method in BODY_METHODS):
        return fields, {}
    if not is_json:
        cure = "send a JSON object as application/json, or a form"
        raise Problem(415, f"The body is of the Content-Type {media_type or 'none'!r}; {cure}.")
    return fields, decode_object(received.body)


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
    if not isinstance(text, str) or "string" in types:
        return text
    try:
        value = DECODER.decode(text.lower())
    except (ValueError, RecursionError):
        return text
    possible = {
        bool: {"boolean"},
        float: {"float", "number"},
        int: {"float", "number", "integer"},
    }
    if possible.get(type(value), set()) & types and are_finite([value]):
        return value
    return text


class Validator(cerberus.Validator):
    """Cerberus's validator for documents from strangers. It is not thread-safe: one a document."""

    def _error(self, *args):
        # A list of one number, so that child validators count down the same.
        left = self._config.get("errors_left", [MAX_ERRORS])
        if left[0] > 0 or not self._errors:  # one is enough for the verdict
            left[0] -= len(args) == 1  # a list of one; other calls end in this one
            super()._error(*args)

    def _normalize_default(self, mapping, schema, field):
        """{'nullable': True}"""  # for Cerberus: what a default may be
        mapping[field] = copy.deepcopy(schema[field]["default"])  # a handler may change it


def value_check(rules):
    """Return a function that tells whether Cerberus surely accepts a value, by these rules."""
    [name] = types_of(rules)  # which fails, as all below, at rules that are left to Cerberus
    types, makers, _ = CHECKED[name]
    used = rules.keys() - {"type", "required", "nullable", "meta"}
    tests = [makers[rule](rules[rule]) for rule in used]
    if types <= NUMBERS:
        tests.append(math.isfinite)
    elif name in ("dict", "list") and "schema" not in used:
        tests.append(lambda value: not fault_of(value))
    is_nullable = bool(rules.get("nullable"))

    def check(value):
        if value is None:
            return is_nullable
        return type(value) in types and all(test(value) for test in tests)

    return check


def dict_check(schema):
    """Return the same for a dictionary with these fields."""
    fields = dict(schema)
    known = frozenset(fields)
    checks = [(field, value_check(rules)) for field, rules in fields.items()]
    required = {field for field, rules in fields.items() if rules.get("required")}

    def check(document):
        if not known.issuperset(document) or not required.issubset(document):
            return False
        for field, check_field in checks:
            if field in document and not check_field(document[field]):
                return False
        return True

    return check


def list_check(rules):
    """Return the same for a list, about each of its items."""
    check_item = value_check(rules)
    types = CHECKED[types_of(rules)[0]][0]

    def check_numbers(items):
        # hypot raises if one is no number, or too large
        if not math.isfinite(math.hypot(*items)):
            return False
        return types == NUMBERS or types.issuperset(map(type, items))

    if types <= NUMBERS and rules.keys() <= {"type", "meta", "required"}:
        return check_numbers  # Optimization: 1,000 floats in 0.01 ms, and one by one in 0.3
    return lambda items: all(map(check_item, items))


NUMBERS = {int, float, bool}
LENGTHS = {
    "minlength": lambda least: lambda value: len(value) >= least,
    "maxlength": lambda most: lambda value: len(value) <= most,
}
ALLOWED = {"allowed": lambda values: frozenset(values).__contains__}
LIMITS = {
    "min": lambda least: partial(operator.le, least),
    "max": lambda most: partial(operator.ge, most),
}
REGEX = {"regex": lambda pattern: re.compile(pattern + "$").match}
#: Cerberus's types: what Python calls them, the rules for which there is a check, and what JSON
#: Schema calls them.
CHECKED: dict = {
    "binary": ({bytes, bytearray}, {}, "string"),
    "boolean": ({bool}, {}, "boolean"),
    "dict": ({dict}, {"schema": dict_check}, "object"),
    "float": (NUMBERS, LIMITS | ALLOWED, "number"),
    "integer": ({int, bool}, LIMITS | ALLOWED, "integer"),
    "list": ({list}, LENGTHS | {"schema": list_check}, "array"),
    "number": ({int, float}, LIMITS | ALLOWED, "number"),
    "string": ({str}, LENGTHS | ALLOWED | REGEX, "string"),
}


class Parameters:
    """The parameters of an endpoint: a Cerberus schema that is known to be sound.

    Args:
        schema: the fields and their rules, https://docs.python-cerberus.org/validation-rules.html
        example: parameters that the schema accepts, or None.
        owner: whose parameters they are, for the messages about mistakes.

    Raises:
        MestError: the schema is wrong, or refuses a default of its own, or the example.
    """

    def __init__(self, schema, example, owner):
        self.example, self.check_quickly, self.defaults = example, None, {}
        try:
            validator = Validator(schema)
            self.schema = validator.schema
            self.names = [*self.schema]
            if not validator.validate({}, update=True):
                raise ValueError(f"it refuses its own default: {validator.errors}")
            with suppress(LookupError, TypeError, ValueError):  # Cerberus alone knows
                fields = {field: dict(resolved(own)) for field, own in self.schema.items()}
                for field, rules in fields.items():
                    if "default" in rules:
                        self.defaults[field] = rules.pop("default")
                self.check_quickly = dict_check(fields)
        except Exception as error:  # Cerberus stumbles over some mistakes
            manual = "see https://docs.python-cerberus.org/validation-rules.html"
            raise MestError(f"{owner}: the schema is wrong: {error}; {manual}") from None
        if example is not None:
            try:
                self.check(copy.deepcopy(example))
            except Exception as error:
                refused = getattr(error, "members", {}).get("errors") or error
                raise MestError(f"{owner}: the schema refuses its example: {refused}") from None

    def read(self, received):
        """Return the checked parameters of a request, and the variables of its path."""
        return self.check(self.document(received)) | received.variables

    def document(self, received):
        """Return what is to be checked: query or form, over that JSON, over that the path."""
        fields, values = decode(received)
        variables, known = received.variables, {}
        for name in variables.keys() & self.schema.keys():
            known[name] = [variables.pop(name)]
        return self.from_text(fields) | values | self.from_text(known)

    def from_text(self, fields):
        """Return the fields of a query or form, converted from text to what their rules ask for."""
        document = {}
        for name, values in fields.items():
            rules = resolved(self.schema.get(name))
            if "list" in types_of(rules):
                items = rules.get("schema")
                document[name] = [convert_text(value, items) for value in values]
            elif len(values) == 1:
                document[name] = convert_text(values[0], rules)
            else:
                document[name] = values
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
        return {name: document[name] for name in self.names if name in document} | document

    def check(self, document):
        """Return the document as Cerberus normalizes it: with defaults, coerced, renamed.

        Raises:
            Problem: 422 with Cerberus's errors, or 400 for numbers and depths that nobody can use.
        """
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
            raise Problem(
                422, f"The parameters cannot be checked: {error}.", errors={}
            ) from None
        if not is_valid:
            raise Problem(422, "The parameters are not valid.", errors=validator.errors)
        if fault := fault_of(validator.document):  # coercion may have made it
            raise Problem(422, f"A parameter {fault}.", errors={})
        return self.in_order(validator.document)


#: What Python's types are called in Cerberus's schemas.
PYTHON_TYPES = {
    bool: "boolean",
    bytes: "binary",
    dict: "dict",
    float: "number",
    int: "integer",
    list: "list",
    str: "string",
}


def rules_of(annotation):
    """Return the rules that an annotation stands for, or raise an error if it is for none."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        (name,) = {PYTHON_TYPES[type(value)] for value in arguments}
        return {"type": name, "allowed": [*arguments]}
    if origin is list:
        return {"type": "list", "schema": rules_of(*arguments)}
    if origin in (Union, UnionType):
        (other,) = {*arguments} - {type(None)}
        return {**rules_of(other), "nullable": True}
    return {"type": PYTHON_TYPES[annotation]}


def name_of(function):
    """Return the name of a function for messages."""
    return getattr(function, "__qualname__", repr(function)) + "()"


def schema_of(function):
    """Return the schema that a function's arguments and their annotations stand for.

    Raises:
        MestError: an argument has no annotation, or one that stands for no rules.
    """
    schema = {}
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception:  # annotations may be anything
        signature = inspect.signature(function)
    for name, argument in signature.parameters.items():
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            continue
        try:
            rules = rules_of(argument.annotation)
        except Exception:
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


#: A variable in an url of Flask's, such as <int:user>.
VARIABLE = re.compile(r"<(?:[^<>]*:)?(\w+)>")


def check_arguments(function, schema, url, defaults):
    """Raise a MestError unless a function can take a schema's fields, and what its url gives."""
    rules = {field: resolved(own) for field, own in schema.items()}
    used = set().union(*rules.values())
    if used & {"rename", "rename_handler", "readonly", "excludes"}:
        return  # what is given has other names, or none
    variables = {*VARIABLE.findall(url), *defaults}
    sure = [
        field
        for field, own in rules.items()
        if own.get("required") or own.keys() & {"default", "default_setter"}
    ]
    for given in ([*rules, *variables], [*sure, *variables]):
        try:
            signature = inspect.signature(function, follow_wrapped=False)
            signature.bind(**dict.fromkeys(given))
        except TypeError as error:
            cure = "match its arguments with the schema, what of that is required, and the url"
            if not schema:
                cure = "is @validate_params missing below the route?"
            fault = f"{name_of(function)} does not fit the route {url}: {error}"
            raise MestError(f"{fault}; {cure}") from None
        except ValueError:  # it is built in
            return


# Requests

#: Not os.urandom, which lets other threads run, and so costs as much as the rest of a request.
IDS = random.Random()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=IDS.seed)


class Exchange:
    """A request and its answer: its id, its deadline, and where it is counted and logged, once."""

    def __init__(self, service, method, path, sent_id):
        self.service, self.method, self.path, self.route = service, method, path, "other"
        is_sane = re.fullmatch("[!-~]{1,128}", sent_id)
        self.id = sent_id if is_sane else f"{IDS.getrandbits(128):032x}"
        self.began = monotonic()
        self.deadline = self.began + service.config.request_timeout
        self.ended = threading.Lock()  # of which one caller of end() gets hold
        if counted := metrics():
            counted.in_progress.inc()

    def end(self, status):
        """Count the request, and log it if that is asked for."""
        if not self.ended.acquire(blocking=False):
            return  # its client has left, and a thread went on
        seconds = monotonic() - self.began
        if counted := metrics():
            # Clients may make up methods, which metrics do not list.
            method = self.method if self.method in HTTPMethod.__members__ else "other"
            counted.in_progress.dec()
            counted.requests.labels(self.route, method, status).inc()
            counted.seconds.labels(self.route).observe(seconds)
        if self.service.config.access_log:
            members = {
                "method": self.method,
                "path": self.path,
                "status": status,
                "milliseconds": round(seconds * 1000, 3),
            }
            self.service.logger.info("answered", extra=members)


#: The exchange that this thread, or this task of an event loop, works for.
EXCHANGE: ContextVar[Any] = ContextVar("mest.exchange", default=None)


@cache
def metrics():
    """Return the metrics of this process, or None where prometheus_client is not installed."""
    try:
        from prometheus_client import Counter, Gauge, Histogram
    except ImportError:
        return None
    sizes = [2**power for power in range(10)]
    seconds = [2**power / 1024 for power in range(17)]
    gauge = partial(Gauge, multiprocess_mode="livesum")
    labels = ["route", "method", "status"]
    return SimpleNamespace(
        requests=Counter("mest_requests_total", "Requests answered.", labels),
        seconds=Histogram(
            "mest_request_duration_seconds",
            "From arrival to answer.",
            ["route"],
            buckets=seconds,
        ),
        in_progress=gauge("mest_requests_in_progress", "Requests that have no answer yet."),
        queue_length=gauge(
            "mest_queue_length", "Requests at a model, in work or not.", ["model"]
        ),
        batch_size=Histogram(
            "mest_batch_size", "Requests in a batch.", ["model"], buckets=sizes
        ),
    )


def metrics_page():
    """Counters of all processes, for Prometheus."""
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        REGISTRY,
        CollectorRegistry,
        generate_latest,
    )
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    return flask.Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


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
        """Return the answer for the parameters of a request.

        Raises:
            Problem: in a request, 503 if `max_queued_requests` are at the model already, 504 after
                its `request_timeout`.
        """
        result = self._batcher.run(self.pre_process(**params))
        return pass_on(result, self.post_process) if own_stage(self, "post_process") else result

    @property
    def _batcher(self):
        key = f"_batcher_{os.getpid()}"  # neither threads nor locks come through a fork
        if batcher := vars(self).get(key):
            return batcher
        return vars(self).setdefault(key, model_batcher(self))


MestModel = GenericModel


def own_stage(model, name):
    """Return a stage if a model or its class has one of its own, or None."""
    stage = getattr(model, name, None)
    if getattr(stage, "__func__", None) is vars(GenericModel)[name]:
        return None
    return stage


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


def batch_results(infer_batch, payloads):
    """Return the results of a batch as a list, one for each payload."""
    results = infer_batch([*payloads])
    outcomes = []
    if isinstance(results, (list, tuple)) or hasattr(results, "tolist"):  # arrays
        outcomes = [*results]
    if len(outcomes) != len(payloads):
        returned = f"infer_batch returned {type(results).__name__}"
        raise MestError(f"{returned}, not a list with a result for each of {len(payloads)}")
    return outcomes


def batch_outcomes(infer_batch, payloads):
    """Return the result or the exception of each payload, none of which fails for another."""
    outcomes = outcome_of(batch_results, infer_batch, payloads)
    if isinstance(outcomes, list):
        return outcomes
    if len(payloads) == 1:
        return [outcomes]
    return [batch_outcomes(infer_batch, [payload])[0] for payload in payloads]


class Job:
    """A payload on its way through a batcher, and who is given the outcome."""

    def __init__(self, payload, give):
        self.payload, self.give, self.exchange = payload, give, EXCHANGE.get()
        self.is_waited_for = True


class Batcher:
    """A queue and the threads that empty it, in batches: in front of a model, or of Flask.

    A batch waits, `timeout` at most, for as many jobs as there were last time, in the batch and
    behind it. So a lone caller never waits, and a crowd fills the batches from the second one on.
    """

    def __init__(self, work, threads, size=1, timeout=0.0, name=""):
        self.work, self.max_threads, self.size, self.timeout = work, threads, size, timeout
        self.queue: SimpleQueue = SimpleQueue()
        self.lock = threading.Lock()
        #: Jobs that are queued or in work, and those of them that somebody waits for.
        self.unfinished = self.waiting = 0
        #: The threads, and since when each has been at work, by time.monotonic(), or 0.
        self.busy_since = {}
        counted = metrics() if name else None
        self.length = counted and counted.queue_length.labels(name)
        self.sizes = counted and counted.batch_size.labels(name)

    def run(self, payload):
        """Return the result of a payload; a thread waits for it, until its request is too late."""
        if current_thread() in self.busy_since:  # the model calls itself
            return raised(self.work([payload])[0])
        outcomes: SimpleQueue = SimpleQueue()  # a future, at a tenth of the cost
        job = Job(payload, outcomes.put)
        self.submit(job)
        left = None
        if job.exchange:
            left = max(0, job.exchange.deadline - monotonic())
        try:
            outcome = outcomes.get(timeout=left)
        except Empty:
            self.leave(job)
            raise Problem(504, LATE) from None
        return raised(outcome)

    def submit(self, job):
        """Have the outcome of a job given to it, or raise a Problem, 503, if too many wait."""
        with self.lock:
            if job.exchange and not job.exchange.ended.locked():  # a stream that began goes on
                limit = job.exchange.service.config.max_queued_requests
                if self.waiting >= max(limit, self.max_threads):
                    raise Problem(503, "Too many requests wait.", {"Retry-After": "1"})
            if self.unfinished >= len(self.busy_since) < self.max_threads:
                thread = threading.Thread(target=self.serve, daemon=True)
                thread.start()
                self.busy_since.setdefault(thread, 0.0)
            self.unfinished += 1
            self.waiting += 1
            if self.length:
                self.length.inc()
        self.queue.put(job)

    def leave(self, *jobs, finished=0):
        """Note that nobody waits for jobs any longer: those that have not begun are not done."""
        with self.lock:
            self.unfinished -= finished
            for job in jobs:
                if job.is_waited_for:
                    job.is_waited_for = False
                    self.waiting -= 1
                    if self.length:
                        self.length.dec()

    def busy_for(self):
        """Return for how many seconds the longest call has lasted by now."""
        since = [when for when in [*self.busy_since.values()] if when]
        return monotonic() - min(since) if since else 0.0

    def serve(self):
        """Do batch after batch, in a thread."""
        me, crowd = current_thread(), 1
        while True:
            batch = self.next_batch(crowd)
            jobs = [job for job in batch if job.is_waited_for]
            # What is logged in a batch is about no request, what a lone job logs about its own.
            EXCHANGE.set(jobs[0].exchange if len(jobs) == 1 else None)
            self.busy_since[me] = monotonic()
            outcomes = self.work([job.payload for job in jobs]) if jobs else []
            self.busy_since[me] = 0.0
            crowd = len(batch) + self.queue.qsize()
            self.leave(*jobs, finished=len(batch))
            if self.sizes and jobs:
                self.sizes.observe(len(jobs))
            for job, outcome in zip(jobs, outcomes, strict=True):
                job.give(outcome)

    def next_batch(self, crowd):
        """Return the jobs of a batch, after a wait for as many as there were."""
        if self.size == 1:
            return [self.queue.get()]
        try:
            batch = [self.queue.get(timeout=0.1)]
        except Empty:  # the crowd has gone
            batch, crowd = [self.queue.get()], 1
        crowd, end = min(crowd, self.size), monotonic() + self.timeout
        while len(batch) + self.queue.qsize() < crowd and monotonic() < end:
            sleep(0.0003)  # as fast as being told
        with suppress(Empty):
            while len(batch) < self.size:
                batch.append(self.queue.get_nowait())
        return batch


#: What a client reads whose answer comes too late.
LATE = "The model did not answer in time."


def model_batcher(model):
    """Return the batcher of a model, which has been loaded by now."""
    run, size = model.infer_batch, model.max_batch_size
    if own_stage(model, "infer") and (size == 1 or not own_stage(model, "infer_batch")):
        run, size = partial(GenericModel.infer_batch, model), 1
    work = partial(batch_outcomes, run)
    return Batcher(work, model.max_concurrency, size, model.batch_timeout, type(model).__name__)


# Routes


def validate_params(
    schema: dict, example: dict | None = None
) -> Callable[[Callable], Callable]:
    """Decorate a handler to receive the request's parameters, checked, as keyword arguments.

    They come from the query string, a JSON object or a form, and are what Cerberus makes of them;
    variables of the path are passed along. Stands below `route`. Outside a request the handler can
    be called as if it were not decorated. The arguments are those of Parameters.
    """

    def decorate(handler):
        parameters = Parameters(schema, example, f"validate_params of {name_of(handler)}")

        @wraps(handler)
        def validated(*args, **variables):
            if args or not flask.has_request_context():
                return handler(*args, **variables)
            return settled(handler(**parameters.read(received_by_flask(variables))))

        vars(validated).update(parameters=parameters, outermost=validated)
        return validated

    return decorate


def settled(result):
    """Return what a handler has returned; an `async def` one runs in a loop of its own."""
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def received_by_flask(variables):
    """Return the Flask request as what parameters are read from, or raise a Problem: 400, 413."""
    http = request._get_current_object()  # type: ignore # each use of a proxy costs a look-up
    body, form = read_body(http), None
    content_type = http.content_type or ""
    media_type = media_type_of(content_type)
    if media_type in FORM_TYPES:
        if media_type != "multipart/form-data":
            if body.lstrip().startswith(b"{"):
                cure = "send it with the header Content-Type: application/json"
                raise Problem(415, f"The body looks like JSON, but is not said to be; {cure}.")
            if body.count(b"&") >= MAX_FIELDS:
                raise Problem(
                    413, f"There are more than {MAX_FIELDS} fields; send JSON instead."
                )
        http.max_form_memory_size = None  # all of it is in memory
        form = http.form.to_dict(flat=False)
        for name, files in http.files.lists():
            form[name] = [file.read() for file in files]
        if body and not form:
            raise Problem(400, "The body is not a valid form.")
    return Received(http.method, content_type, http.query_string, body, variables, form)


def body_limit(app):
    """Return the bytes that the body of a request to a Flask application may have."""
    limits = [app.config["MAX_CONTENT_LENGTH"] or sys.maxsize]
    if "mest" in app.extensions:
        limits.append(app.extensions["mest"].config.max_body_bytes)
    return min(limits)


def read_body(http):
    """Return the body of a Flask request, or raise a Problem: 413 if it is too long, 400."""
    limit, length = body_limit(current_app), http.content_length or 0
    if length <= limit:
        http.max_content_length = limit + 1  # Werkzeug stops reading there, and says nothing
        try:
            body = http.get_data()
        except HTTPException:  # of the event loop
            raise
        except Exception:  # each server has exceptions of its own
            raise Problem(400, "The body is malformed or ended early.") from None
        if len(body) < length and "form" not in vars(http):  # which a hook has parsed
            raise Problem(400, f"The body ended after {len(body)} of {length} bytes.")
        if len(body) <= limit:
            return body
    raise Problem(413, f"The body is longer than {limit} bytes.")


def to_response(result):
    """Return what Flask takes for what a handler returned: data and text are encoded."""
    body, *rest = result if isinstance(result, tuple) else (result,)
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
    if not config.api_key:
        return
    scheme, _, token = authorization.partition(" ")  # RFC 6750, section 2.1
    sent = [key, token if scheme.lower() == "bearer" else ""]
    matches = 0
    for known, given in itertools.product(config.api_key.split(","), sent):  # all of them
        if known := known.strip().encode():
            matches += hmac.compare_digest(known, given.strip().encode())
    if not matches:
        detail = "Send an API key, as Authorization: Bearer KEY or as X-API-Key: KEY."
        raise Problem(401, detail, {"WWW-Authenticate": "Bearer"})


class Endpoint:
    """What answers at an url: a handler, or a model with its parameters. It is a view of Flask's.

    The handler of a probe answers soon, so that the event loop may call it, and needs no key.
    """

    def __init__(self, handler, parameters=None, model=None, is_probe=False, needs_key=True):
        self.handler, self.model, self.is_probe = handler, model, is_probe
        self.parameters: Any = parameters or getattr(handler, "parameters", None)
        self.needs_key = needs_key and not is_probe
        self.__doc__ = inspect.getdoc(handler) if model is None else type(model).__doc__

    def __call__(self, **variables):
        """Answer the Flask request."""
        service, environ = current_app.extensions["mest"], request.environ
        try:
            if self.needs_key:
                sent = environ.get
                admit(
                    service.config, sent("HTTP_AUTHORIZATION", ""), sent("HTTP_X_API_KEY", "")
                )
            if self.model is None:
                return to_response(settled(self.handler(**variables)))
            params = self.parameters.read(received_by_flask(variables))
            exchange = EXCHANGE.get()
            # Flask's request is out of sight for the model, as it is where the loop serves it.
            content, kind = Context().run(self.predict, params, exchange)
            return flask.Response(content, content_type=kind)
        except (Exception, SystemExit) as error:  # sys.exit would take the whole process along
            return as_problem(error).get_response(environ)

    def predict(self, params, exchange=None):
        """Return the model's answer to checked parameters, and its content type."""
        EXCHANGE.set(exchange)
        self.require_model()
        return encode_prediction(self.model.predict(**params))

    def require_model(self):
        """Raise a MestError if the model has to be loaded and is not."""
        if not own_stage(self.model, "predict") and not self.model.is_loaded:
            raise MestError(f"{self.model!r} is not loaded; call mest_app.setup()")

    def check(self, *given):
        """Raise a MestError if the handler or model cannot take what requests will give it."""
        function, schema = self.handler, {}
        if inspect.isasyncgenfunction(inspect.unwrap(function)):
            raise MestError(f"{name_of(function)} is an async generator; write def, and yield")
        if self.model is not None:
            function, schema = first_stage(self.model), self.parameters.schema
        elif getattr(function, "outermost", None) is function:  # nothing decorates it further
            function, schema = function.__wrapped__, self.parameters.schema  # type: ignore
        if function:
            check_arguments(function, schema, *given)


def first_stage(model):
    """Return the stage that takes the parameters by name, or None if `init` may make it."""
    for name in ("predict", "pre_process"):
        if stage := own_stage(model, name):
            return stage
    is_batched = own_stage(model, "infer_batch") and model.max_batch_size > 1
    return None if is_batched else own_stage(model, "infer")


class Router:
    """Endpoints under one name, for `Mest.register_router`.

    Args:
        name: unique, and without dots; `flask.url_for` takes "name.handler".
    """

    def __init__(self, name: str):
        self.name = name
        #: What was declared: urls relative to the router's, endpoints, and options of Flask's.
        self.routes: list = []
        #: Who serves it: called with a route, now and whenever one is declared.
        self.registrations: list = []

    def route(self, url: str, method: str = "POST", **options: Any) -> Callable:
        """Decorate a handler, which comes back as it was, to answer requests to an url.

        Args:
            url: relative to the router's, as Flask has it: "predict" or "/users/<int:user>".
            method: the HTTP method; `methods=[…]` for several.
            **options: any other option of Flask's routes.
        """

        def decorate(handler):
            name = getattr(handler, "__name__", "handler")
            named = {"methods": [method], "endpoint": name, **options}
            self._add(url, Endpoint(handler), named)
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
            schema: as in Parameters; without it, what the annotations of the model's first stage,
                `pre_process` or `infer`, stand for.
            url: relative to the router's; its variables are passed to `predict` too.
            method: the HTTP method.
            example: as in Parameters; it is run once before the service is ready.
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
        self._add_own(url, endpoint, method)

    def add_ping_route(self, url: str = "/ping", method: str = "GET") -> None:
        """Answer requests to an url with the name of the service, or 503 while it shuts down."""
        self._add_own(url, Endpoint(ping, is_probe=True), method)

    def _add_own(self, url, endpoint, method="GET"):
        name = re.sub(r"\W+", "_", url.strip("/")) or "index"
        self._add(url, endpoint, {"methods": [method], "endpoint": name})

    def _add(self, url, endpoint, options):
        names = [known["endpoint"] for _, _, known in self.routes]
        while options["endpoint"] in names:
            options["endpoint"] += "_2"  # Flask wants each to have a name of its own
        self.routes.append(("/" + url.lstrip("/"), endpoint, options))
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
        if view and rule.methods:
            yield rule, view


# Documentation

#: Cerberus's rules in JSON Schema, whose keywords are about values of their own types only.
KEYWORDS = {
    "allowed": "enum",
    "default": "default",
    "max": "maximum",
    "maxlength": "maxLength",
    "min": "minimum",
    "minlength": "minLength",
}
LIST_KEYWORDS = {"default": "default", "maxlength": "maxItems", "minlength": "minItems"}
#: Rules that change what is sent before it is checked, or let pass what others would refuse.
LENIENT = {
    "allow_unknown",
    "coerce",
    "default_setter",
    "empty",
    "keysrules",
    "purge_unknown",
    "rename",
    "rename_handler",
}


def json_schema(rules):
    """Return a JSON Schema (2020-12) that refuses nothing which Cerberus accepts by its rules."""
    rules = resolved(rules)
    schema = {**resolved(rules.get("meta"))}
    name, *others = types_of(rules) or [None]
    if name in CHECKED and not others and not any(map(rules.get, LENIENT)):
        schema["type"] = CHECKED[name][2]
        keywords = LIST_KEYWORDS if name == "list" else KEYWORDS
        for rule in keywords.keys() & rules.keys():
            schema[keywords[rule]] = rules[rule]
        if name == "binary":
            schema["format"] = "binary"
        if name == "dict" and "schema" in rules:
            schema |= fields_schema(rules["schema"])
        if name == "list" and "schema" in rules:
            schema["items"] = json_schema(rules["schema"])
        if rules.get("nullable") or "default" in rules:  # which replaces null
            schema["type"] = [schema["type"], "null"]
            if "enum" in schema:
                schema["enum"] = [*schema["enum"], None]
    try:
        return json.loads(ENCODER.encode(schema))
    except (TypeError, ValueError):  # a limit or default that JSON cannot express
        return {}


def fields_schema(fields):
    """Return a Cerberus schema, or the name of one, as the JSON Schema of an object."""
    properties, required = {}, []
    for field, rules in resolved(fields).items():
        own = resolved(rules)
        if not own.get("readonly"):
            properties[field] = json_schema(rules)
        if own.get("required") and "default" not in own:
            required.append(field)
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": isinstance(fields, str),
    }


def openapi(mest_app, path):
    """Return the OpenAPI 3.1 description of a service, with urls relative to its own path."""
    config = mest_app.config
    paths: dict = {}
    for rule, view in routes_of(mest_app.app):
        if hasattr(view, "parameters") and not rule.endpoint.startswith("mest_docs"):
            operations = paths.setdefault(VARIABLE.sub(r"{\1}", rule.rule), {})
            for method in sorted(rule.methods - {"HEAD", "OPTIONS"}):
                operations[method.lower()] = operation(rule, view, method)
                if config.api_key and getattr(view, "needs_key", False):
                    operations[method.lower()]["security"] = [{"bearer": []}]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": config.service_name,
            "version": config.service_version or "0",
        },
        "servers": [{"url": os.path.relpath("/", os.path.dirname(path))}],
        "paths": paths,
        "components": {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


def operation(rule, view, method):
    """Return what a route takes with a method, and what it answers."""
    fields, listed = dict(view.parameters.schema if view.parameters else {}), []
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
        "security": [],
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
        required = bool(schema["required"])
        described["requestBody"] = {"required": required, "content": {kind: body}}
    return described


def openapi_json():
    """What this page says, for programs."""
    document = openapi(current_app.extensions["mest"], flask.request.path)
    return flask.Response(json.dumps(document, default=str), content_type="application/json")


def docs_page():
    """A page to read about the service and to try it."""
    return flask.Response(PAGE, headers={"Content-Security-Policy": PAGE_POLICY})


# The ASGI edge

#: bytes of a body that would hold up an event loop
LARGE = 2**16
#: bytes of a body, too long or not, that are read: most clients send all before they read
MAX_READ = 2**26


class Edge:
    """The ASGI application of a Mest in one event loop, which waits for clients instead of threads.

    https://asgi.readthedocs.io/en/stable/specs/www.html, for servers that speak version 2 or 3.
    """

    def __init__(self, service, loop):
        self.service, self.config, self.loop = service, service.config, loop
        self.direct, self.max_body_bytes = service.direct_routes(), body_limit(service.app)

        def work(functions):
            return [outcome_of(function) for function in functions]

        #: for Flask, which may be slow, and for what is soon done
        self.flask, self.pool = (Batcher(work, self.config.threads) for _ in range(2))
        #: futures and outcomes from threads, and whether the loop knows that there are some
        self.outcomes: deque = deque()
        self.is_woken = False
        #: by the tasks of requests, in time.monotonic(); those that the sweep cancelled are missing
        self.deadlines = {}
        self.sweep()

    def sweep(self):
        """Cancel, once a second, the tasks that are too late: they find themselves missing here."""
        now = monotonic()
        for task, deadline in [*self.deadlines.items()]:
            if now > deadline:
                del self.deadlines[task]
                task.cancel()
        self.loop.call_later(1, self.sweep)

    async def http(self, scope, receive, send):
        """Answer a request."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        task: Any = asyncio.current_task()
        sent_id = headers.get(b"x-request-id", "")
        exchange = Exchange(self.service, scope["method"], scope["path"], sent_id)
        EXCHANGE.set(exchange)
        self.deadlines[task] = exchange.deadline
        try:
            body = await self.body(task, headers, receive)
            endpoint = self.direct.get((exchange.method, exchange.path))
            media_type = media_type_of(headers.get(b"content-type", ""))
            if (
                endpoint
                and media_type not in FORM_TYPES
                and len(headers) == len(scope["headers"])
            ):
                exchange.route = exchange.path
                if isinstance(body, Problem):
                    raise body
                response = await self.answer(endpoint, scope, headers, body)
            else:
                self.deadlines[task] = math.inf  # a stream may last
                response = await self.through_flask(scope, send, body)
        except asyncio.CancelledError:
            if not self.was_swept(task):  # the client has left
                exchange.end(499)
                raise
            response = self.refusal(Problem(504, LATE))
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
        problem = as_problem(error)
        try:
            response = problem.get_response({})
            headers = response.get_wsgi_headers({})
            str(headers).encode("latin-1")
        except ValueError as fault:  # a Problem with a header that HTTP cannot express
            return self.refusal(RuntimeError(f"{problem!r} cannot be sent: {fault}"))
        return response.status_code, headers, response.get_data()

    def was_swept(self, task):
        """Return whether the deadline has cancelled a task, and only that: then it may go on."""
        return task not in self.deadlines and not task.uncancel()

    async def body(self, task, headers, receive):
        """Return the body of a request, or the Problem that it is: 408 if it comes late, 413."""
        length = headers.get(b"content-length", "0")
        known, size, parts, more = int(length[:18]), 0, [], True
        try:
            while more and size <= max(MAX_READ, self.max_body_bytes):
                message = await receive()
                # Python 3.11's wait_for may have swallowed the cancellation by the sweep.
                if message["type"] == "http.disconnect" or task not in self.deadlines:
                    raise asyncio.CancelledError
                more = message.get("more_body", False)
                part = message.get("body", b"")
                size += len(part)
                known = max(known, size)
                if known <= self.max_body_bytes:
                    parts.append(part)
        except asyncio.CancelledError:
            if not self.was_swept(task):
                raise
            return Problem(408, "The body did not come in time.")
        if known > self.max_body_bytes:
            return Problem(413, f"The body is longer than {self.max_body_bytes} bytes.")
        return b"".join(parts)

    async def answer(self, endpoint, scope, headers, body):
        """Return status, headers and body of a probe's answer, or a model's."""
        if endpoint.is_probe:
            content, kind = encode_prediction(endpoint.handler())
        else:
            sent = headers.get
            admit(self.config, sent(b"authorization", ""), sent(b"x-api-key", ""))
            kind, query = sent(b"content-type", ""), scope["query_string"]
            received = Received(scope["method"], kind, query, body, {})
            content, kind = await self.predict(endpoint, received)
        length = str(len(content))
        return 200, [("content-type", kind), ("content-length", length)], content

    async def predict(self, endpoint, received):
        """Return a model's answer and its type; what the user has written runs in threads."""
        parameters, model = endpoint.parameters, endpoint.model
        if len(received.body) > LARGE:
            params = await self.call(parameters.read, received)
        else:
            document = parameters.document(received)
            params = parameters.quick(document)
            if params is None:  # Cerberus decides, which may take long and call the user's code
                params = await self.call(parameters.check, document)
        if own_stage(model, "predict"):
            return await self.call(endpoint.predict, params, EXCHANGE.get())
        endpoint.require_model()
        if own_stage(model, "pre_process"):
            params = await self.call(lambda: model.pre_process(**params))
        if not own_stage(model, "post_process"):
            return await self.outcome(model._batcher, params, encode_prediction)
        result = await self.outcome(model._batcher, params)
        return await self.call(lambda: encode_prediction(pass_on(result, model.post_process)))

    async def call(self, function, *args):
        """Return what a function returns in another thread."""
        return await self.outcome(self.pool, partial(function, *args))

    async def outcome(self, batcher, payload, finish=None):
        """Return or raise what a batcher, and in its thread `finish`, make of a payload."""
        future = self.loop.create_future()
        job = Job(payload, partial(self.give, future, finish))
        batcher.submit(job)
        try:
            return raised(await future)
        except asyncio.CancelledError:
            batcher.leave(job)
            raise

    def give(self, future, finish, outcome):
        """Hand an outcome over from another thread, which wakes the loop once for several."""
        if finish and not isinstance(outcome, Exception):
            outcome = outcome_of(finish, outcome)
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
        step, is_begun, is_whole = partial(run, next, parts, None), False, False
        try:
            status, headers, is_whole, part = await self.outcome(self.flask, step)
            await start(send, status, headers)
            is_begun = True
            while not is_whole and part is not None:
                await send({"type": "http.response.body", "body": part, "more_body": True})
                part = await self.outcome(self.flask, step)
            await send({"type": "http.response.body", "body": part or b""})
        except Exception as error:
            if not is_begun:
                raise
            self.refusal(error)
            raise asyncio.CancelledError from None  # ends the connection: the client shall know
        finally:
            if not is_whole:
                job = Job(partial(run, parts.close), lambda outcome: None)
                job.exchange = None  # so that it is not refused where too many wait
                self.flask.submit(job)


async def start(send, status, headers):
    """Begin a response."""
    pairs = []
    for name, value in headers:
        pairs.append((name.lower().encode("latin-1"), value.encode("latin-1")))
    if status == 408 or EXCHANGE.get().service.draining:
        pairs.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": pairs})


def run_alone(lock, context, function, *args):
    """Return what a function returns in a context, in which nothing else runs meanwhile."""
    with lock:
        return context.run(function, *args)


def flask_parts(app, environ):
    """Yield status, headers, whether that is all, and first part of an answer, then its parts."""
    chunks, status, headers = run_wsgi_app(app, environ)
    head = int(status[:3]), headers.to_wsgi_list()
    try:
        part = next(chunks, None)  # type: ignore
        is_whole = part is None or headers.get("Content-Length") == str(len(part))
        if not is_whole:  # then somebody asks for more, or closes this
            yield *head, False, part
            yield from chunks
    finally:
        getattr(chunks, "close", lambda: None)()
    if is_whole:
        yield *head, True, part or b""


def environ_of(scope, body):
    """Return a request as WSGI has it (PEP 3333), with the bytes of the path as they were sent."""
    sent, prefix = scope.get("raw_path") or scope["path"], scope.get("root_path", "")
    path = unquote_to_bytes(sent).decode("latin-1")
    if f"{path}/".startswith(f"{prefix}/"):  # which servers may leave there
        path = path.removeprefix(prefix)

    def read(*args):
        raise body

    if isinstance(body, Problem):
        stream: Any = SimpleNamespace(read=read, readline=read)  # who reads it finds out why
    else:
        stream = BytesIO(body)
    host, port = scope.get("server") or ("localhost", None)
    environ = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": prefix,
        "PATH_INFO": path,
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "SERVER_NAME": host,
        "SERVER_PORT": str(port or 80),  # none is on a Unix socket
        "SERVER_PROTOCOL": f"HTTP/{scope['http_version']}",
        "REMOTE_ADDR": (scope.get("client") or [""])[0],
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scope.get("scheme", "http"),
        "wsgi.input": stream,
        "wsgi.input_terminated": True,
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
        "mest.exchange": EXCHANGE.get(),
    }
    for name, value in scope["headers"]:
        if name in (b"transfer-encoding", b"proxy") or b"_" in name:  # httpoxy.org
            continue
        text = value.decode("latin-1")
        key = name.decode("latin-1").upper().replace("-", "_")
        key = key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
        joint = "; " if name == b"cookie" else ","
        environ[key] = f"{environ[key]}{joint}{text}" if key in environ else text
    if not isinstance(body, Problem):
        environ["CONTENT_LENGTH"] = str(len(body))
    return environ


# Application


def hooks_of(app):
    """Return what Flask calls for a request, besides the view."""
    hooks = [app.wsgi_app, app.config.get("TRUSTED_HOSTS"), *app.teardown_appcontext_funcs]
    scoped = app.before_request_funcs, app.after_request_funcs, app.teardown_request_funcs
    for scope in (*scoped, app.url_value_preprocessors, *app.error_handler_spec.values()):
        for functions in scope.values():
            hooks += functions.values() if isinstance(functions, dict) else functions
    signals = flask.request_started, flask.request_finished, flask.request_tearing_down
    for signal_of_flask in (*signals, flask.got_request_exception):
        hooks.append(signal_of_flask.has_receivers_for(app))
    return hooks


class Mest:
    """A service: a configuration, models and routes on one Flask application.

    Args:
        config: the configuration, or the service_name.
        app: a Flask application to live in, which keeps its logging, error handlers and routes as
            they are. Without it Mest makes one, and all errors of that are problem details.
        **fields: with the service_name, fields of MestConfig.
    """

    #: Whether the command imports an application: then `run()` and loading are its business.
    _run_by_command = False

    def __init__(self, config: MestConfig | str, app: flask.Flask | None = None, **fields: Any):
        if isinstance(config, str):
            config = MestConfig(config, **fields)
        elif fields or not isinstance(config, MestConfig):
            raise MestError("Mest takes a MestConfig with all fields, or a name and fields")
        self.config = config
        self.logger = logging.getLogger(config.service_name) if app else set_up_logging(config)
        self.app = app or self._flask()
        if self.app.extensions.setdefault("mest", self) is not self:
            raise MestError("the Flask application has a Mest already; add routers to that")
        self.app.wsgi_app = partial(self._wsgi, self.app.wsgi_app)  # type: ignore
        self._own_hooks = None if app else hooks_of(self.app)
        self._routers: dict = {}
        self._loaded: set = set()  # ids of models
        self._edge: Edge | None = None
        self._is_set_up = False
        #: Whether the service is about to stop: probes say so, so that no more requests come.
        self.draining = False
        #: /livez, /readyz and /metrics, and /docs and /openapi.json. An application that Mest lives
        #: in may register them.
        self.probes, self.docs = Router("mest"), Router("mest_docs")
        for probe in (self.livez, self.readyz):
            self.probes._add_own(probe.__name__, Endpoint(probe, is_probe=True))
        if metrics():
            self.probes._add_own("metrics", Endpoint(metrics_page, needs_key=False))
        if config.docs:
            self.docs._add_own("docs", Endpoint(docs_page, needs_key=False))
            self.docs._add_own("openapi.json", Endpoint(openapi_json, needs_key=False))
        if not app:
            self.register_router("/", self.probes)
            self.register_router("/", self.docs)

    @cached_property
    def router(self) -> Router:
        """A router at "/", for a service that needs no other."""
        router = Router("root")
        self.register_router("/", router)
        return router

    def _flask(self):
        name, here = self.config.service_name, os.getcwd()
        app = flask.Flask(name, root_path=here, instance_path=here, static_folder=None)
        app.logger = self.logger  # type: ignore
        app.config["MAX_CONTENT_LENGTH"] = self.config.max_body_bytes

        def refuse(error):
            return as_problem(error).get_response(request.environ)

        app.register_error_handler(HTTPException, refuse)
        return app

    def _wsgi(self, application, environ, start_response):
        """Pass a request on to Flask's WSGI application, count it, and put its id on the answer."""
        exchange = environ.get("mest.exchange")
        if exchange is None:  # it does not come from the event loop
            sent_id = environ.get("HTTP_X_REQUEST_ID", "")
            method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
            exchange = environ["mest.exchange"] = Exchange(self, method, path, sent_id)
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
        models = {id(model): model for model in self.config.models_instances}
        for _, view in routes_of(self.app):
            if isinstance(view, Endpoint) and isinstance(view.model, GenericModel):
                models[id(view.model)] = view.model
        return [*models.values()]

    def livez(self):
        """Whether the process can serve.

        It answers 503 if a model has been busy with one call for longer than liveness_timeout.
        """
        limit = self.config.liveness_timeout
        for model in self.models:
            if getattr(model, "_initialised", False) and model._batcher.busy_for() > limit > 0:
                raise Problem(503, f"{type(model).__name__} is in one call for over {limit} s.")
        return {"status": "alive"}

    def readyz(self):
        """Whether requests may come: the models are loaded, and the service is not stopping."""
        ping()
        for model in self.models:
            if id(model) not in self._loaded:
                raise Problem(503, f"The model {type(model).__name__} is not loaded.")
        return {"status": "ready"}

    def setup(self) -> Mest:
        """Load the models that are not loaded yet, and return the Mest itself.

        Raises:
            MestError: names the model whose `init` failed, and has that failure as its cause.
        """
        self._is_set_up = True  # so that those of later routes are loaded, too
        if not Mest._run_by_command:
            self.load_models()
        return self

    def load_models(self) -> None:
        """Do what `setup` does, even while the command imports the application."""
        directory = self.config.local_model_directory_path
        for model in self.models:
            if id(model) in self._loaded:
                continue
            name, began = type(model).__name__, monotonic()
            try:
                in_fresh_thread(model.init, directory)
            except (Exception, SystemExit) as error:
                reason = f"model {name} could not be loaded: {cause_of(error)}"
                raise MestError(reason) from error
            self._loaded.add(id(model))
            self.logger.info("model %s loaded in %.3f s", name, monotonic() - began)
            if isinstance(model, GenericModel):
                model._initialised = True

    def warm_up(self) -> None:
        """Load the models, and run the example of each predict route once: first calls are slow.

        Raises:
            MestError: a model cannot be loaded, or fails for an example.
        """
        self.load_models()
        for rule, view in routes_of(self.app):
            parameters: Any = getattr(view, "parameters", None)
            if getattr(view, "model", None) is None or parameters.example is None:
                continue
            if rule.arguments:  # of which the example says nothing
                continue
            try:
                in_fresh_thread(
                    view.predict, parameters.check(copy.deepcopy(parameters.example))
                )
            except (Exception, SystemExit) as error:
                failed = (
                    f"model {type(view.model).__name__} fails for the example of {rule.rule}"
                )
                raise MestError(f"{failed}: {cause_of(error)}") from error

    def register_router(self, url: str, router: Router) -> None:
        """Put the routes of a router, present and future ones, under an url or several in turn.

        Raises:
            MestError: another router has its name, or another route one of its urls.
        """
        name = router.name
        while name in self._routers:
            if self._routers[name] is not router:
                raise MestError(f"there are two routers named {name!r}; rename one of them")
            name += "_2"
        self._routers[name] = router
        register = partial(self._add_route, url.strip("/"), name)
        router.registrations.append(register)
        for route in router.routes:
            register(*route)

    def _add_route(self, prefix, name, url, endpoint, options):
        """Add a route to the Flask application, unless it would hide another."""
        url = f"/{prefix}{url}" if prefix else url
        methods = {*map(str.upper, options["methods"])} - {"OPTIONS"}
        for other, _ in routes_of(self.app):
            is_same = VARIABLE.sub("<>", other.rule) == VARIABLE.sub("<>", url)
            taken = other.methods & methods
            if is_same and taken:
                clash = f"{' '.join(taken)} {url} is a route already, of {other.endpoint!r}"
                raise MestError(f"{clash}; give it another url in router {name!r}")
        if not self.app.url_value_preprocessors:  # which may take some away
            endpoint.check(url, options.get("defaults") or ())
        named = {**options, "endpoint": f"{name}.{options['endpoint']}"}
        self.app.add_url_rule(url, view_func=endpoint, **named)
        if self._is_set_up:
            self.setup()

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

        In a file that the `mest` command loads it does nothing: the command runs the service.
        Options are those of werkzeug.serving.run_simple.
        """
        if Mest._run_by_command:
            return
        if not options.get("use_reloader") or is_running_from_reloader():
            self.load_models()  # the reloader's parent only watches
        host = self.config.listen_host or "127.0.0.1"
        run_simple(host, self.config.listen_port, self.app, threaded=True, **options)


def in_fresh_thread(function, *args):
    """Return what a function returns in a thread of its own."""
    with ThreadPoolExecutor(1) as thread:  # OpenMP hangs in the main thread of a fork
        return thread.submit(function, *args).result()


# Serving


def hear_signals_apart(signals):
    """Let processes that a model forks hear signals themselves, and not the worker's loop."""
    block = partial(signal.pthread_sigmask, signal.SIG_BLOCK, signals)
    unblock = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, signals)

    def forget():
        globals().update(metrics=lambda: None)  # another thread may have held a lock of theirs
        signal.set_wakeup_fd(-1)
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
        unblock()

    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=forget)


def file_limit(cfg):
    """Return how many connections there may be, with the limit of open files as high as it can."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    spare = most - 200 if most > 0 else sys.maxsize  # 200 for the model; -1 is infinity
    return max(1, min(cfg.worker_connections, spare))


def connection_class():
    """Return gunicorn's class of connections, which the worker knows and may refuse."""
    from gunicorn.asgi.protocol import ASGIProtocol

    class Connection(ASGIProtocol):
        def connection_made(self, transport):
            super().connection_made(transport)
            self.worker.connections.add(self)
            if self.worker.nr_conns > self.worker.worker_connections:
                transport.abort()

    return Connection


def close_idle(worker):
    """Close connections without a request, for which gunicorn would wait, too."""
    for connection in [*worker.connections]:
        if not getattr(connection, "_current_request", None):
            connection.transport.close()
    worker.loop.call_later(0.5, close_idle, worker)


def worker_for(service):
    """Return gunicorn's class of ASGI workers, with a drain, and an end to idle connections."""
    from gunicorn.workers import gasgi

    class Worker(gasgi.ASGIWorker):
        def init_process(self):
            self.connections: WeakSet = WeakSet()
            self.explained = 0.0
            self.worker_connections = file_limit(self.cfg)
            gasgi.ASGIProtocol = connection_class()
            super().init_process()

        def init_signals(self):  # while the models load, they end the worker at once
            for number in self.SIGNALS:
                signal.signal(number, signal.SIG_DFL)

        def run(self):
            super().init_signals()
            hear_signals_apart(self.SIGNALS)
            self.loop.set_exception_handler(self.explain)
            super().run()

        def explain(self, loop, context):  # asyncio logs each connection that it must refuse
            if "out of system resource" not in context["message"]:
                loop.default_exception_handler(context)
            elif monotonic() - self.explained > 1:
                self.explained = monotonic()
                service.logger.error("too many files are open: connections have to wait")

        def handle_exit_signal(self):  # SIGTERM, which a process group may get twice
            if not service.draining:
                service.draining = True
                service.logger.info(
                    "stops in %d s, and is not ready", service.config.drain_seconds
                )
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
        "graceful_timeout": config.drain_seconds + config.graceful_timeout + 2,  # since SIGTERM
        "asgi_lifespan": "off",
        "asgi_disconnect_grace_period": 0,  # who has left is not waited for
        "keepalive": 75,  # seconds; load balancers keep idle connections for 60
        "limit_request_line": 8190,  # bytes, the most that gunicorn takes
        "loglevel": "warning",
        "control_socket_disable": True,  # it writes to $HOME, which containers may lack
        "child_exit": child_exit,
    }


def gunicorn_for(service, options):
    """Return gunicorn's application for a Mest; options beat the environment, that files."""
    from gunicorn.app.base import Application
    from gunicorn.errors import AppImportError

    class Service(Application):
        def init(self, parser, opts, args):
            if args:
                parser.error(f"{args[0]} is no option; --app names the application")
            return settings_for(service)

        def load_config(self):
            argv, sys.argv = sys.argv, ["mest run gunicorn --", *options]
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
            routes = ", ".join(" ".join(route) for route in service.direct_routes())
            text = f"serves on {', '.join(self.cfg.bind)}; without Flask: {routes}"
            service.logger.info(text)
            # ours, or another, which speaks WSGI
            return service if hasattr(self.cfg.worker_class, "finish") else service.app

    return Service()


# Command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `mest` command, and return its exit code: 1 for a failure, 2 for a wrong option."""
    args = command_line().parse_args(argv)
    try:
        for field in MestConfig.settings():
            if value := getattr(args, field.name, None):
                os.environ[f"MEST_{field.name.upper()}"] = value
        return args.run(args)
    except MestError as error:
        print(report(error), file=sys.stderr)
        return 1


def command_line():
    """Return the parser of the command line; what it parses has the function to call as `run`."""
    parser = argparse.ArgumentParser("mest", description="Serve a model.")
    parser.add_argument("--version", action="version", version=f"mest {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="serve the application")
    servers = run.add_subparsers(required=True, metavar="SERVER")

    def add(group, name, run, *fields):
        command = group.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run, options=[])
        about = "the application, and its Mest's name; default $MEST_APP or app.py"
        command.add_argument("--app", metavar="FILE_OR_MODULE[:NAME]", help=about)
        for field in MestConfig.settings():
            if field.name in fields:
                option = "--" + field.name.removeprefix("listen_")
                command.add_argument(option, dest=field.name, help=field.metadata["meaning"])
        return command

    dev = add(servers, "dev", run_dev, "listen_host", "listen_port")
    dev.add_argument("--no-reload", dest="reload", action="store_false")
    fields = "listen_host", "listen_port", "workers", "threads"
    production = add(servers, "gunicorn", run_gunicorn, *fields)
    production.add_argument(
        "--preload", action="store_true", help="load the models before forking"
    )
    production.add_argument("options", nargs="*", metavar="-- OPTIONS", help="gunicorn's own")
    add(commands, "shell", run_shell)
    test = add(commands, "test", run_test)
    test.add_argument("options", nargs="*", metavar="-- OPTIONS", help="pytest's own")
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
        run_simple("127.0.0.1", 0, problem, use_reloader=True)  # listens where the parent does
    return 0


def run_gunicorn(args):
    """serve in production with gunicorn, whose own options may follow a --"""
    need("gunicorn")
    from gunicorn.errors import AppImportError, HaltServer

    # Libraries of linear algebra read that when they are imported: a worker has so many CPUs.
    workers = int(MestConfig("mest").workers)
    cpus = max(1, available_cpus() // workers)
    for library in ("OMP", "OPENBLAS", "MKL", "BLIS", "NUMEXPR"):
        os.environ.setdefault(f"{library}_NUM_THREADS", str(cpus))
    directory, master = "", os.getpid()
    if importlib.util.find_spec("prometheus_client"):  # it reads that at its import, too
        directory = tempfile.mkdtemp(prefix="mest-")
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", directory)
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
    names = {"mest_app": service, "app": service.app, "client": client_of(service)}
    with service.app.app_context():
        code.interact(f"There are {', '.join(names)}.", local=vars(module) | names, exitmsg="")
    return 0


def client_of(service):
    """Return a client of Flask's to test a service, which has a key if one is needed."""
    client = service.app.test_client()
    client.environ_base["HTTP_X_API_KEY"] = service.config.api_key.partition(",")[0]
    return client


def run_test(args):
    """send each example to the application, if there is one, then run pytest"""
    failed = 0
    if args.app or "MEST_APP" in os.environ or os.path.isfile("app.py"):
        service, _ = load_app(args)
        service.load_models()
        failed = send_examples(service)
    pytest = need("pytest")
    sys.path.insert(0, os.getcwd())
    status = int(pytest.main([*args.options]))  # which adds options of its own
    has_no_tests = status == pytest.ExitCode.NO_TESTS_COLLECTED and not args.options
    return failed if has_no_tests else status or failed


def send_examples(service):
    """Send each example to the service, say how it went, and return 1 if one is not answered."""
    client, failed = client_of(service), 0
    for rule, view in routes_of(service.app):
        example = getattr(getattr(view, "parameters", None), "example", None)
        if example is None or rule.arguments:  # of which the example says nothing
            continue
        files = {}
        for name, value in example.items():
            if isinstance(value, bytes):
                files[name] = BytesIO(value), name
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            sent = {"data": {**example, **files}} if files else {"json": example}
            if method not in BODY_METHODS:
                sent = {"query_string": example}
            response = client.open(rule.rule, method=method, **sent)
            print(f"{method} {rule.rule}: {response.status_code}")
            if response.status_code >= 300:
                print(response.text)
                failed = 1
    return failed


def need(package):
    """Return a package that only some commands need, or raise a MestError if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MestError(f"{package} is not installed: pip install {package}") from None


def load_app(args):
    """Import the application that --app or MEST_APP names, and return its Mest and its module.

    Raises:
        MestError: it does not exist, cannot be imported, or has no Mest.
    """
    target = args.app or os.environ.get("MEST_APP") or "app.py"
    path, _, name = target.partition(":")
    folder, module_name = os.getcwd(), path
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


# The documented import paths, mest.app, mest.app.api and mest.models, are this module under further
# names. Where it runs as the command, as `python mest.py`, the application that imports it gets
# that same module, not a second one with other classes.
app = api = models = _this = sys.modules[__name__]
_main = sys.modules["__main__"]
if os.path.realpath(getattr(_main, "__file__", None) or "") == os.path.realpath(__file__):
    _this = sys.modules[__name__] = _main
for _path in ("app", "app.api", "models"):
    sys.modules[f"{__name__}.{_path}"] = _this


#: What the page may do: https://www.w3.org/TR/CSP3/
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; form-action 'none'; frame-ancestors 'none'"
)

#: The page at /docs. It asks nobody but this service, and inserts nothing as HTML.
PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Documentation</title><link rel="icon" href="data:,">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1rem }
code, pre, td input, textarea { font: 14px/1.5 ui-monospace, monospace } h2 { font-size: 1.1rem }
details { border: 1px solid #8886; border-radius: 6px; margin: .5rem 0; padding: .6rem }
summary b, summary code { color: light-dark(#0a58ca, #7ab7ff); overflow-wrap: anywhere }
table, td input, textarea { box-sizing: border-box; width: 100%; min-width: 8rem; padding: .3rem }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0 }
pre, .error { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4rem 0 }
pre, details { overflow: auto } pre { background: #8881; padding: .6rem; max-height: 24rem }
.error { color: light-dark(#b3261e, #ff8a80) } :is(pre, .error):empty { display: none }
</style>
<h1 id="title"></h1><p id="state" role="status">loading…</p>
<p id="key" hidden><label>API key <input type="password" autocomplete="off"></label></p>
<main id="routes"></main><template id="group"><section><h2></h2></section></template>
<template id="field"><tr><th scope="row"><code></code><td><td><input><p class="error"></template>
<template id="route"><details><summary><b></b> <code></code> <span></span></summary><form>
<table></table>
<textarea aria-label="body" rows="4" spellcheck="false"></textarea><p class="error"></p>
<button>Send</button> <button type="button">Copy curl</button><p role="status"></p>
<pre tabindex="0"></pre><pre tabindex="0"></pre></form></details></template>
<script>"use strict";
const { entries } = Object, byId = id => document.getElementById(id);
const join = (texts, between) => texts.filter(Boolean).join(between);
const show = value => typeof value === "string" ? value : JSON.stringify(value);
const parse = text => { try { return JSON.parse(text) ?? {}; } catch { return {}; } };
const quote = text => `'${text.replaceAll("'", "'\\''")}'`;
const typeOf = schema => [].concat(schema.type ?? "")[0]; // the others are null, as a rule
const inLine = errors => [].concat(errors).flatMap(error => error instanceof Object
  ? entries(error).map(([name, its]) => `${name}: ${inLine(its)}`) : error).join("; ");
const LIMITS = { minimum: "at least", maximum: "at most", minLength: "length from",
  maxLength: "length to", minItems: "items from", maxItems: "items to", enum: "one of",
  default: "default" };
function kind(schema) { // in words
  const { type = [], format, items, properties = {} } = schema;
  const words = [format ? "file" : [].concat(type).join(" or ")];
  for (const name in LIMITS) words.push(name in schema && `${LIMITS[name]} ${show(schema[name])}`);
  const fields = entries(properties).map(([name, field]) => `${name}: ${kind(field)}`);
  words.push(items && `of ${kind(items)}`, fields.length && `{${fields.join("; ")}}`);
  return join(words, ", ").replace(/(\w+) from (\d+), \1 to \2\b/, "$1 exactly $2");
}
function sample(schema) { // a value that it allows, as far as can be told
  if ("default" in schema) return schema.default;
  const { items = {}, minItems, properties = {}, required = [], ...own } = schema;
  const names = required.length ? required : Object.keys(properties), type = typeOf(schema);
  if (own.enum) return own.enum[0];
  if (type === "array") return Array(Math.min(minItems || 1, 4096)).fill(items).map(sample);
  if (type === "object") return Object.fromEntries(names.map(n => [n, sample(properties[n])]));
  if (type === "boolean") return true;
  if (/integer|number/.test(type)) return own.minimum ?? Math.min(1, own.maximum ?? 1);
  return "text".padEnd(own.minLength, "x").slice(0, own.maxLength);
}
function copy(template, texts) {
  const node = byId(template).content.firstElementChild.cloneNode(true);
  for (const name in texts) node.querySelector(name).textContent = texts[name];
  return node;
}
function route(path, method, operation, server, key) { // a form for what it takes
  const { operationId: id, summary, requestBody = { content: {} } } = operation;
  const [[type, body] = []] = entries(requestBody.content), fields = [...operation.parameters];
  const isJson = type === "application/json", { properties = {}, required } = body?.schema || {};
  for (const [name, schema] of entries(properties))
    fields.push({ name, in: isJson ? "body" : "form", schema, required: required.includes(name) });
  const node = copy("route", { b: method, code: path, span: summary });
  const [form, table, text, others, copier, outcome, answer, curl] = node.querySelectorAll(
    "form, table, textarea, .error, [type=button], [role=status], pre");
  [node.id, others.id, text.hidden] = [id, `${id}-others`, !isJson];
  for (const field of fields) {
    const { name, schema, required } = field, isList = typeOf(schema) === "array";
    const about = join([kind(schema), required && "required"], ", ");
    const row = copy("field", { code: name, td: join([about, schema.description], ": ") });
    const [input, error] = row.querySelectorAll("input, .error");
    const value = schema.default ?? (required ? sample(schema) : "");
    error.id = `${id}-${name}-error`;
    input.setAttribute("aria-describedby", error.id);
    Object.assign(input, { ariaLabel: name, hidden: field.in === "body", multiple: isList });
    if ((schema.items || schema).format) input.type = "file";
    else input.value = isList ? value : show(value);
    field.values = () => input.files || input.value.match(isList ? /[^,]+/g : /.+/) || [];
    table.append(row);
  }
  const example = isJson ? body.example || sample(body.schema) : "";
  text.value = JSON.stringify(example, null, 1).replace(/\n */g, " ");
  function request() { // as the form is now; shown as a command, too
    const valueOf = name => fields.find(field => field.name === name).values();
    const to = path.replace(/{(\w+)}/g, (_, name) => encodeURIComponent(valueOf(name)));
    const url = new URL(`.${to}`, server), into = { query: url.searchParams, form: new FormData() };
    for (const { name, in: place, values } of fields)
      for (const value of values()) into[place]?.append(name, value);
    const parts = isJson ? [`-H 'Content-Type: ${type}' --data-raw ${quote(text.value)}`]
      : Array.from(into.form, ([name, value]) => value.name
        ? `-F ${quote(`${name}=@"${value.name}"`)}` : `--form-string ${quote(`${name}=${value}`)}`);
    const verb = method !== (parts.length ? "POST" : "GET") && `-X ${method}`;
    const bearer = key && '-H "Authorization: Bearer $API_KEY"';
    curl.textContent = join(["curl", verb, quote(url.href), bearer, ...parts], " ");
    const headers = isJson ? { "Content-Type": type } : {};
    if (key?.value) headers.Authorization = `Bearer ${key.value}`;
    return [url, { method, headers, body: isJson ? text.value : parts.length ? into.form : null }];
  }
  async function send(event) {
    event.preventDefault();
    for (const old of [answer, outcome, ...node.querySelectorAll(".error")]) old.textContent = "";
    const began = performance.now(), response = await fetch(...request());
    const blob = await response.blob(), took = (performance.now() - began).toFixed(1);
    const isText = /^$|^text|json|xml/.test(blob.type), size = `${blob.size} bytes of ${blob.type}`;
    answer.textContent = isText ? (await blob.text()).slice(0, 1e5) : size;
    const { errors } = /problem/.test(blob.type) ? parse(answer.textContent) : {};
    for (const [name, wrong] of entries(errors || {})) {
      const own = byId(`${id}-${name}-error`);
      (own || others).append(own ? inLine(wrong) : `${name}: ${inLine(wrong)}\n`);
    }
    outcome.textContent = `${response.status} ${response.statusText} in ${took} ms`;
  }
  form.onsubmit = event => send(event).catch(error => outcome.textContent = `No answer: ${error}`);
  text.onkeydown = e => { (e.ctrlKey || e.metaKey) && e.key === "Enter" && form.requestSubmit(); };
  copier.onclick = () => [getSelection().selectAllChildren(curl), document.execCommand("copy")];
  form.oninput = request;
  request();
  return node;
}
async function start() {
  const place = new URL("openapi.json", location), groups = {};
  const { info, paths, servers } = await (await fetch(place)).json();
  const server = new URL(`${servers[0].url}/`, place), key = byId("key").querySelector("input");
  document.title = byId("title").textContent = info.title;
  for (const [path, item] of entries(paths)) for (const [method, operation] of entries(item)) {
    const [tag] = operation.tags, needed = operation.security.length && key;
    if (needed) byId("key").hidden = false;
    groups[tag] ||= copy("group", { h2: tag });
    groups[tag].append(route(path, method.toUpperCase(), operation, server, needed));
  }
  byId("routes").append(...Object.values(groups), groups.mest || "");
  const chosen = byId(decodeURIComponent(location.hash.slice(1)));
  (chosen || document.querySelector("details:has(tr)") || {}).open = true;
  const said = parse(await (await fetch("readyz")).text());
  const state = { ready: "ready", 503: `not ready: ${said.detail}` }[said.status];
  byId("state").textContent = join([state, info.version !== "0" && `version ${info.version}`],
    " · ");
}
start().catch(error => byId("state").textContent = `This page cannot be shown: ${error.message}`);
</script>
"""

if __name__ == "__main__":
    sys.exit(main())
