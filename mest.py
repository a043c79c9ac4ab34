"""Mest turns one model into a realtime REST service. This file is all of it.

A whole service, which `mest run dev` serves here and `mest run gunicorn` in production:

    from mest import GenericModel, Mest, MestConfig, Router

    class Doubler(GenericModel):
        def init(self, directory_path):
            self.model = 2
        def infer(self, x):
            return {"y": self.model * x}

    doubler, router = Doubler(), Router("v1")
    router.add_predict_route(doubler, schema={"x": {"type": "float", "required": True}})
    mest_app = Mest(MestConfig("doubler", 8000, models_instances=[doubler])).setup()
    mest_app.register_router(url="/", router=router)

The path of a request, through the sections JSON, Parameters, Models and Routes:

    bytes -> decode -> parameters -> check -> model or handler -> result -> encode -> bytes

Flask routes and serves, Cerberus decides what a valid parameter is, gunicorn runs the processes,
and Mest is what stands between them. It is no model registry, feature store, API gateway or place
to train: it answers requests with one model, and what runs your containers does the rest.

Copy this file into your project, or `pip install` it. MIT License.
"""
from __future__ import annotations

import argparse
import code
import contextlib
import copy
import functools
import importlib
import inspect
import itertools
import json
import logging
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError  # its own before Python 3.11
from datetime import datetime, timezone
from pathlib import Path
from queue import Empty, SimpleQueue
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

import cerberus
import flask
from cerberus.errors import FORBIDDEN_VALUE, SEQUENCE_SCHEMA, UNALLOWED_VALUE
from flask import current_app, request
from flask.blueprints import BlueprintSetupState
from flask.json.provider import DefaultJSONProvider
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import HTTPException
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
    """

    def __init__(
        self, status: int, detail: str, errors: dict | None = None, headers: dict | None = None
    ):
        HTTPException.__init__(self, detail)
        self.code, self.errors, self.headers = status, errors, headers or {}

    def get_body(self, environ: Any = None, scope: Any = None) -> str:
        body = {"type": "about:blank", "title": self.name, "status": self.code}
        body |= {"detail": self.description, "errors": self.errors, "request_id": request_id()}
        return json.dumps({name: value for name, value in body.items() if value is not None}) + "\n"

    def get_headers(self, environ: Any = None, scope: Any = None) -> list[tuple[str, str]]:
        return [("Content-Type", "application/problem+json"), *self.headers.items()]


def as_problem(error: BaseException, logger: logging.Logger) -> HTTPException:
    """Return the answer to any exception: the one place where errors become answers.

    What Werkzeug and `flask.abort` raise keeps its status and headers. All else is a defect of the
    service: logged with its traceback, and the client is told nothing but the request's id.
    """
    if not isinstance(error, HTTPException):
        logger.error("%s %s failed: %r", request.method, request.path, error, exc_info=error)
        flask.got_request_exception.send(current_app._get_current_object(), exception=error)
        return Problem(500, "The service failed. Its log says why, under this request_id.")
    if isinstance(error, Problem) or error.response is not None or (error.code or 0) < 400:
        return error
    headers = {name: value for name, value in error.get_headers() if name != "Content-Type"}
    return Problem(error.code, error.description, headers=headers)


def request_id() -> str | None:
    """Return the id of the Flask request: its X-Request-Id where that is sane, or a new one."""
    if not flask.has_request_context():
        return None
    environ = request.environ
    if "mest.request_id" not in environ:
        sent = environ.get("HTTP_X_REQUEST_ID", "")
        sane = re.fullmatch(r"[A-Za-z0-9._:/+=@-]{1,128}", sent)
        environ["mest.request_id"] = sent if sane else os.urandom(16).hex()
    return environ["mest.request_id"]


def report(error: MestError) -> str:
    """Return the message about a failure, below the traceback if the user's own code raised it."""
    cause, lines = error.__cause__, []
    if cause:
        trace = cause.__traceback__
        ours = re.compile(rf"{re.escape(__name__)}$|importlib\b")
        while trace and ours.match(trace.tb_frame.f_globals["__name__"]):
            trace = trace.tb_next
        lines = traceback.format_exception(type(cause), cause, trace)
    return "".join([*lines, f"mest: {error}"])


# Configuration


class MestConfig:
    """The configuration of a service. `MEST_<FIELD>` in the environment beats what is given here.

    Args:
        service_name: names the logger and the answers to pings.
        listen_port: the TCP port.
        models_instances: the models: GenericModels, or others with `init(directory_path)`.
        local_model_directory_path: the directory that each model's `init` is given.
        environ: where MEST_ variables are looked up; os.environ by default.
        **fields: any other of MestConfig.FIELDS.

    Raises:
        MestError: names the field, its value and what is allowed.
    """

    #: name: (default, what is allowed, what it is with its unit)
    FIELDS = {
        "listen_port": (8000, range(65536), "TCP port; 0 picks a free one"),
        "local_model_directory_path": ("_models", str, "directory given to each model's init"),
        "listen_host": ("", str, "address; by default 127.0.0.1, and 0.0.0.0 under gunicorn"),
        "workers": (1, range(1, 1025), "processes under gunicorn, each with its own models"),
        "threads": (40, range(1, 1025), "requests that each process answers at once"),
        "max_body_bytes": (2**24, range(1, 2**40), "bytes, the largest body of a request"),
        "max_queued_requests": (512, range(1, 10**6), "requests at a model, in each process"),
        "request_timeout": (60, range(1, 86401), "seconds that a request waits for the model"),
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
        if unknown := fields.keys() - self.FIELDS:
            raise MestError(f"MestConfig has no {unknown.pop()!r}, only {', '.join(self.FIELDS)}")
        if not isinstance(models_instances, (list, tuple)):
            raise MestError(f"models_instances is {models_instances!r}; it must be a list")
        for model in models_instances:
            if isinstance(model, type) or not callable(getattr(model, "init", None)):
                needed = "an instance of GenericModel, or another object with init(directory_path)"
                raise MestError(f"models_instances has {model!r}; it must be {needed}")
            for name in ("max_batch_size", "max_concurrency"):
                if type(count := getattr(model, name, 1)) is not int or count < 1:
                    raise MestError(f"{name} of {model!r} is {count!r}; it must be 1 or more")
            if not isinstance(seconds := getattr(model, "batch_timeout", 0), (int, float)):
                raise MestError(f"batch_timeout of {model!r} is {seconds!r}; it must be seconds")
        self.service_name, self.models_instances = service_name, models_instances
        fields["listen_port"] = listen_port
        fields["local_model_directory_path"] = local_model_directory_path
        for name, (default, _, _) in self.FIELDS.items():
            variable = "MEST_" + name.upper()
            source = variable if environ.get(variable) else name
            value = environ.get(variable) or fields.get(name, default)
            setattr(self, name, self.convert(name, value, source))

    @classmethod
    def convert(cls, name: str, value: Any, source: str) -> Any:
        """Return what a value, or the text for it, means for the field, or raise a MestError."""
        _, allowed, meaning = cls.FIELDS[name]
        if isinstance(allowed, range):
            if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
                value = int(value)
            fits = type(value) is int and value in allowed
            words = f"an integer from {allowed[0]} to {allowed[-1]}"
        elif allowed is str:
            fits, words = isinstance(value, (str, Path)), "text"
        else:
            fits, words = value in allowed, " or ".join(allowed)
        if not fits:
            raise MestError(f"{source} is {value!r}; it must be {words} ({meaning})")
        return value


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
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        if self.log_format == "json" or self.log_format == "auto" and not sys.stdout.isatty():
            return json.dumps({**line, "traceback": trace} if trace else line)
        lines = [" ".join(line.values()), *trace.splitlines()]
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
    return DefaultJSONProvider.default(value)


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
        if "\\u" in text:
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
#: Rules that Cerberus tries on a document as it is, without normalizing it.
LOGIC = {"allof", "anyof", "noneof", "oneof"}
#: What each type of a JSON value may stand for in a schema.
TYPES_OF_JSON = {int: {"integer", "number", "float"}, float: {"number", "float"}, bool: {"boolean"}}


def decode_body(method: str, content_type: str, coding: str, body: bytes) -> dict | None:
    """Return the parameters in a body, or None where they are a form, which is left to Werkzeug.

    Raises:
        Problem: 400, 413, 415 or 422, saying what to send instead.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    is_json = re.fullmatch(r"application/(.+\+)?json", media_type)
    if not body and not (is_json and method in ("POST", "PUT", "PATCH")):
        return {}
    if coding not in ("", "identity"):
        raise Problem(415, f"The body is encoded with {coding}; send it uncompressed.")
    if is_json:
        return decode_object(body)
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
            raise MestError(f"{owner}: the schema is {schema!r}; it must be like {form}")
        try:
            self.schema = Validator(_copied(schema)).schema
        except Exception as error:  # Cerberus stumbles over some mistakes
            raise MestError(f"{owner}: the schema is wrong: {error}") from None
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
        return result_of(self, kwargs or (args[0] if len(args) == 1 else list(args)))

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
        if type(self).post_process is GenericModel.post_process:
            return result
        return pass_on(result, self.post_process)

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self).items()  # a copy has turns of its own
        return {name: value for name, value in state if not name.startswith("_turns_")}

    @property
    def _turns(self) -> Turns:
        key = f"_turns_{os.getpid()}"  # neither threads nor locks come through a fork
        return vars(self).get(key) or vars(self).setdefault(key, Turns(self))


def pass_on(value: Any, stage: Callable) -> Any:
    """Return what a stage returns for the value of the one before it."""
    if isinstance(value, dict):
        return stage(**value)
    return stage(*value) if isinstance(value, list) else stage(value)


def results_of(model: GenericModel, payloads: list) -> list:
    """Return the result or the exception of each payload, none of which fails for another."""
    try:
        results = model.infer_batch(list(payloads))
        results = results.to_numpy() if hasattr(results, "to_numpy") else results
        kind = type(results).__name__
        results = [] if isinstance(results, (Mapping, str, bytes)) else list(results)
        if len(results) == len(payloads):
            return results
        what = f"a {kind} with {len(results)} results for {len(payloads)} payloads"
        raise MestError(f"infer_batch of {type(model).__name__} returned {what}")
    except Exception as error:
        if len(payloads) == 1 or isinstance(error, MemoryError):
            return [error] * len(payloads)
    return [results_of(model, [payload])[0] for payload in payloads]


def result_of(model: GenericModel, payload: Any) -> Any:
    """Return or raise the result of a batch of one."""
    (result,) = results_of(model, [payload])
    if isinstance(result, BaseException):
        raise result
    return result


class Turns:
    """Who uses a model when: callers in turn, or in batches that threads of its own carry out.

    A thread takes what is queued and waits, `batch_timeout` at most, for as many as there were when
    the last batch was done, in it and behind it. So a lone caller never waits and a crowd fills the
    batches; were it only as many as in the last batch, two half-full ones could alternate for ever.
    """

    def __init__(self, model: GenericModel):
        self.waiting = 0
        batches = type(model).infer_batch is not GenericModel.infer_batch
        self.batching = batches and model.max_batch_size > 1
        self.model, self.queue = model, SimpleQueue()
        self.free = threading.Semaphore(model.max_concurrency)
        self.inside: set[int] = set()  # ids of the threads that run the model
        self.threads: set[threading.Thread] = set()
        self.lock = threading.RLock()

    def run(self, payload: Any) -> Any:
        """Return the model's result for a payload, once its turn has come."""
        if threading.get_ident() in self.inside:  # the model calls itself
            return self.infer(payload)
        if not self.batching:
            return self.run_here(payload)
        future = self.submit(payload)
        try:
            return future.result(self.model._limits[1])
        except FutureTimeoutError:
            if future.done():
                raise  # the model itself has raised it
            future.cancel()
            raise Problem(504, "The model did not answer in time.") from None

    def infer(self, payload: Any) -> Any:
        """Run the model at once."""
        if type(self.model).infer is GenericModel.infer:
            return result_of(self.model, payload)
        return pass_on(payload, self.model.infer)

    def run_here(self, payload: Any) -> Any:
        """Run the model in the caller's thread, when it is free."""
        self.enter()
        try:
            if not self.free.acquire(timeout=self.model._limits[1]):
                raise Problem(504, "The model was not free in time.")
            self.inside.add(me := threading.get_ident())
            try:
                return self.infer(payload)
            finally:
                self.inside.discard(me)
                self.free.release()
        finally:
            self.leave()

    def submit(self, payload: Any) -> Future:
        """Return the future result for a payload. If it is cancelled in time, none is computed."""
        future: Future = Future()
        with self.lock:
            while len(self.threads) < self.model.max_concurrency:
                thread = threading.Thread(target=self.serve, daemon=True)
                thread.start()  # which may fail
                self.threads.add(thread)
            self.enter()
            future.add_done_callback(self.leave)
            self.queue.put((payload, future))
        return future

    def enter(self) -> None:
        """Take one of `max_queued_requests` places, which `leave` gives back."""
        with self.lock:
            if self.waiting >= self.model._limits[0]:
                raise Problem(503, "Too many requests wait.", headers={"Retry-After": "1"})
            self.waiting += 1

    def leave(self, future: Future | None = None) -> None:
        with self.lock:
            self.waiting -= 1

    def serve(self) -> None:
        """Carry out batches, in a thread, until the model ends it: by sys.exit, for one."""
        self.inside.add(me := threading.get_ident())
        batch: list[tuple[Any, Future]] = []
        crowd = 1
        try:
            while True:
                batch = []
                self.fill(batch, crowd)
                live = [item for item in batch if item[1].set_running_or_notify_cancel()]
                results = results_of(self.model, [payload for payload, _ in live]) if live else []
                crowd = len(batch) + self.queue.qsize()
                for (_, future), result in zip(live, results):
                    failed = isinstance(result, BaseException)
                    (future.set_exception if failed else future.set_result)(result)
        except BaseException as error:
            with self.lock:
                self.inside.discard(me)
                self.threads.discard(threading.current_thread())
                while not self.threads and not self.queue.empty():
                    batch.append(self.queue.get())
            ended = MestError(f"the thread of {type(self.model).__name__} has ended: {error!r}")
            for _, future in batch:
                with contextlib.suppress(InvalidStateError):  # it is done, or given up
                    future.set_exception(ended)

    def fill(self, batch: list[tuple[Any, Future]], crowd: int) -> None:
        """Put into a batch what is queued, after a wait for so many."""
        batch.append(self.queue.get())
        deadline = time.monotonic() + self.model.batch_timeout
        with contextlib.suppress(Empty):
            while len(batch) < self.model.max_batch_size:
                left = max(0.0, deadline - time.monotonic())
                batch.append(self.queue.get(len(batch) < crowd, left))


MestModel = GenericModel


# Routes


def service() -> Any:
    """Return the Mest of the Flask application, or what stands in for it under a mere blueprint."""
    if mest_app := current_app.extensions.get("mest"):
        return mest_app
    config = MestConfig(current_app.name, environ={})
    return SimpleNamespace(config=config, logger=current_app.logger, draining=False)


def validate_params(schema: dict, example: dict | None = None) -> Callable[[Callable], Callable]:
    """Decorate a handler to receive the request's parameters, checked, as keyword arguments.

    They come from the query string, a JSON object or a form, and are what Cerberus makes of them;
    variables of the path are passed along. Stands below `route`. Outside a request the handler can
    be called as if it were not decorated. The arguments are those of Parameters.
    """
    if callable(schema):
        raise MestError(f"{schema.__qualname__}(): write @validate_params({{…}}), with a schema")

    def decorate(handler: Callable) -> Callable:
        parameters = Parameters(schema, example, f"validate_params of {handler.__qualname__}()")
        call = as_sync(handler)

        @functools.wraps(handler)
        def validated(*args: Any, **variables: Any) -> Any:
            if args or not flask.has_request_context():
                return handler(*args, **variables)
            return call(**read_parameters(parameters, variables))

        return validated

    return decorate


def read_parameters(parameters: Parameters, variables: dict[str, Any]) -> dict[str, Any]:
    """Return the checked parameters of the Flask request, and the variables of its path.

    Variables go through the check where the schema names them.

    Raises:
        Problem: what is wrong with the request.
    """
    http, environ = request._get_current_object(), request.environ
    body = read_body(http, service().config.max_body_bytes)
    kind, coding = environ.get("CONTENT_TYPE", ""), environ.get("HTTP_CONTENT_ENCODING", "")
    values, fields = decode_body(http.method, kind, coding.lower(), body), {}
    if http.query_string:
        query = http.query_string.decode("utf-8", "replace")
        fields = MultiDict(parse_qsl(query, keep_blank_values=True)).to_dict(flat=False)
    if values is None or "form" in vars(http):  # a form, which a hook may have parsed already
        if body and values is None and not (http.form or http.files):
            raise Problem(400, "The body is not a valid form.")
        fields |= http.form.to_dict(flat=False)
        fields |= {name: [file.read() for file in files] for name, files in http.files.lists()}
    known = {name: [variables.pop(name)] for name in variables.keys() & parameters.schema.keys()}
    document = parameters.from_text(fields) | (values or {}) | parameters.from_text(known)
    return variables | parameters.check(document)


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
        rest = get_input_stream(http.environ)
        with contextlib.suppress(Exception):  # most clients send all before they read the answer
            any(not rest.read(2**16) for _ in range(2**10))
        raise Problem(413, f"The body is longer than {limit} bytes.")
    if len(body) < length and "form" not in vars(http):
        raise Problem(400, f"The body ended after {len(body)} of {length} bytes.")
    return body


def to_response(result: Any) -> Any:
    """Return Flask's response to what a handler returned; data, text and arrays are encoded."""
    body, *rest = result if isinstance(result, tuple) else (result,)
    plain = body is None or isinstance(body, (dict, list, str, int, float))
    if plain or hasattr(body, "tolist") or hasattr(body, "item"):
        content, content_type = encode(body)
        body = flask.Response(content, content_type=content_type)
        if not rest:
            return body  # which make_response would only look at
    return current_app.make_response((body, *rest) if rest else body)


def add_request_id(response: flask.Response) -> flask.Response:
    """Put the id of the request on its response, where a host has not done so."""
    if "X-Request-Id" not in response.headers:
        response.headers["X-Request-Id"] = request_id()
    return response


def as_sync(handler: Callable) -> Callable:
    """Return the handler itself or, if it is asynchronous, what Flask makes of it."""
    if not inspect.iscoroutinefunction(handler):
        return handler
    return lambda *args, **kwargs: current_app.ensure_sync(handler)(*args, **kwargs)


def as_view(handler: Callable) -> Callable:
    """Return a Flask view that answers with what the handler returns or raises."""
    call = as_sync(handler)

    @functools.wraps(handler)
    def view(**variables: Any) -> Any:
        try:
            return add_request_id(to_response(call(**variables)))
        except (Exception, SystemExit) as error:  # sys.exit would take the whole process along
            if current_app.debug and not isinstance(error, HTTPException):
                raise  # to the debugger
            return add_request_id(as_problem(error, service().logger).get_response(request.environ))

    return view


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
        if not isinstance(method, str):
            raise MestError(f"the route {url} has the method {method!r}; several are methods=[…]")

        def decorate(handler: Callable) -> Callable:
            name = options.get("endpoint") or getattr(handler, "__name__", type(handler).__name__)
            view = self._views.setdefault(name, as_view(handler))
            if view.__wrapped__ is not handler:
                mistake = f"router {self.name!r} has two handlers named {name!r}"
                raise MestError(f"{mistake}; rename one of them, or give it endpoint='…'")
            route = "/" + url.lstrip("/"), view, {"methods": [method], "endpoint": name, **options}
            self.routes.append(route)
            for registration in self._registrations:
                self._add(registration, *route)
            return handler

        return decorate

    def add_predict_route(
        self, model: Any, schema: dict, url: str = "/predict", method: str = "POST",
        example: dict | None = None,
    ) -> None:
        """Answer requests to an url with `model.predict(**params)` of the checked parameters.

        Args:
            model: a GenericModel, or another object with `predict`.
            url: relative to the router's; its variables are passed to `predict` too.
            method: the HTTP method.
            schema, example: as in Parameters.
        """
        owner = f"the predict route {url!r} of router {self.name!r}"
        if isinstance(model, type) or not callable(getattr(model, "predict", None)):
            raise MestError(f"{owner} has the model {model!r}; it must be an object with predict()")
        parameters = Parameters(schema, example, owner)

        def predict(**variables: Any) -> flask.Response:
            params = read_parameters(parameters, variables)
            if not getattr(model, "is_loaded", True):
                raise MestError(f"{model!r} is not loaded; call mest_app.setup() before serving")
            content, content_type = encode(model.predict(**params))
            return flask.Response(content, content_type=content_type)

        self._add_own(url, method, predict)

    def add_ping_route(self, url: str = "/ping", method: str = "GET") -> None:
        """Answer requests to an url with the name of the service, or 503 while it shuts down."""

        def ping() -> dict[str, str]:
            name = service().config.service_name
            if service().draining:
                raise Problem(503, f"{name} is shutting down.")
            return {"message": f"{name} is up"}

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
        for other in registration.app.url_map.iter_rules():
            taken = other.methods - ({"OPTIONS"} if other.provide_automatic_options else set())
            same = _shape(other.rule) == _shape(full)
            if same and methods & taken and (other.subdomain or "", other.host) == host:
                clash = f"{' '.join(methods & taken)} {full} of router {self.name!r}"
                raise MestError(f"{clash} is a route already, of the endpoint {other.endpoint!r}")
        registration.add_url_rule(url, view_func=view, **options)


def _shape(url: str) -> str:
    """Return an url without the names of its variables, which do not tell it from another."""
    return re.sub(r"<(?:string:)?(?:([^<>]*):)?\w+>", r"<\1>", url)


# Application


class Mest:
    """A service: a configuration, models and routes on one Flask application.

    Args:
        config: the configuration.
        app: a Flask application to live in, which keeps its logging, error handlers and routes as
            they are. Without it Mest makes one, and all errors of that are problem details.
    """

    #: Set by the command while it imports an application: `run()` is its business then, and models
    #: are loaded by the process that will serve.
    _run_by_command = False
    _setup_deferred = False

    def __init__(self, config: MestConfig, app: flask.Flask | None = None):
        if not isinstance(config, MestConfig):
            raise MestError(f"Mest was given the configuration {config!r}; it must be a MestConfig")
        if not isinstance(app, (flask.Flask, type(None))):
            raise MestError(f"Mest was given the application {app!r}; it must be a flask.Flask")
        self.config = config
        self.logger = logging.getLogger(config.service_name) if app else set_up_logging(config)
        self.app = app or self._flask()
        if self.app.extensions.setdefault("mest", self) is not self:
            raise MestError("the Flask application has a Mest already; add routers to that")
        for model in config.models_instances:
            if isinstance(model, GenericModel):
                model._limits = config.max_queued_requests, config.request_timeout
        #: Whether the process is about to stop: pings say so, and no more requests should come.
        self.draining = False
        self._loaded: set[int] = set()  # the models' ids

    def _flask(self) -> flask.Flask:
        name, here = self.config.service_name, os.getcwd()
        app = flask.Flask(name, root_path=here, instance_path=here, static_folder=None)
        app.logger = self.logger
        app.json.sort_keys = False
        app.config["MAX_CONTENT_LENGTH"] = self.config.max_body_bytes
        app.after_request(add_request_id)
        answer = lambda error: as_problem(error, self.logger).get_response(request.environ)
        app.register_error_handler(HTTPException, answer)
        return app

    def setup(self) -> Mest:
        """Load the models that are not loaded yet, and return the Mest itself.

        Raises:
            MestError: names the model whose `init` failed, and has that failure as its cause.
        """
        if not Mest._setup_deferred:
            self.load_models()
        return self

    def load_models(self) -> None:
        """Do what `setup` does, even while the command has deferred it."""
        directory = self.config.local_model_directory_path
        for model in self.config.models_instances:
            if id(model) in self._loaded:
                continue
            name, started = type(model).__name__, time.perf_counter()
            try:
                model.init(directory)
            except (Exception, SystemExit) as error:
                reason = f"model {name} could not be loaded: {type(error).__name__}: {error}"
                if not os.path.isdir(directory):
                    reason += f" (local_model_directory_path is {directory!r}: no directory)"
                raise MestError(reason) from error
            if isinstance(model, GenericModel):
                model._initialised = True
            self._loaded.add(id(model))
            self.logger.info("model %s loaded in %.3f s", name, time.perf_counter() - started)

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

    def run(self) -> None:
        """Start the development server on 127.0.0.1 and the `listen_port`, with the models loaded.

        In a file that the `mest` command has loaded it only logs that the command does so.
        """
        if Mest._run_by_command:
            self.logger.info("mest_app.run() does nothing here: the mest command runs the service")
            return
        self.load_models()
        host = self.config.listen_host or "127.0.0.1"
        run_simple(host, self.config.listen_port, self.app, threaded=True)


# Serving


def gunicorn_for(mest_app: Mest, bind: str, options: list[str]) -> Any:
    """Return gunicorn's application for a Mest, configured.

    The options beat GUNICORN_CMD_ARGS, that beats gunicorn.conf.py, and that the MestConfig.
    """
    from gunicorn.app.base import Application
    from gunicorn.errors import AppImportError
    from gunicorn.workers.gthread import ThreadWorker

    class Worker(ThreadWorker):
        def handle_exit(self, number: int, frame: Any) -> None:
            mest_app.draining = True
            super().handle_exit(number, frame)

    class Service(Application):
        def init(self, parser: Any, opts: Any, args: list[str]) -> dict[str, Any]:
            if args:
                parser.error(f"{args[0]} is no option; mest --app names the application")
            return {
                "bind": bind,
                "workers": mest_app.config.workers,
                "threads": mest_app.config.threads,
                "worker_class": Worker,
                "keepalive": 75,  # seconds; load balancers keep idle connections for 60
                "control_socket_disable": True,  # it writes to $HOME, which containers may lack
                "worker_tmp_dir": "/dev/shm" if os.access("/dev/shm", os.W_OK) else None,
            }

        def load_config(self) -> None:
            argv, sys.argv = sys.argv, ["mest run gunicorn --", *options]
            try:
                super().load_config()  # reads sys.argv, the environment and gunicorn.conf.py
            finally:
                sys.argv = argv

        def load(self) -> flask.Flask:
            try:
                mest_app.load_models()
            except MestError as error:
                raise AppImportError(report(error)) from None  # ends the master too
            return mest_app.app

    return Service()


def refuse_if_taken(settings: Any) -> None:
    """Raise a MestError if nobody can listen where gunicorn is to, which would try it for long."""
    try:
        for host, port in (place for place in settings.address if isinstance(place, tuple)):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MestError(f"cannot listen on {settings.bind}: {reason}; choose another") from None


# Command line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the `mest` command, and return its exit code: 1 for a failure, 2 for a wrong option."""
    parser = command_line()
    args = parser.parse_args(argv)
    try:
        for name in MestConfig.FIELDS.keys() & vars(args).keys():
            MestConfig.convert(name, getattr(args, name), "--" + name.removeprefix("listen_"))
            os.environ["MEST_" + name.upper()] = getattr(args, name)  # beats the code
    except MestError as error:
        parser.error(str(error))
    try:
        return args.run(args)
    except MestError as error:
        print(report(error), file=sys.stderr)
        return 1


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line; what it parses has the function to call as `run`."""
    app = argparse.ArgumentParser(add_help=False)
    app.add_argument("--app", default=argparse.SUPPRESS, metavar="FILE_OR_MODULE[:NAME]",
                     help="the application, and its Mest's name; default $MEST_APP or app.py")
    parser = argparse.ArgumentParser("mest", description=__doc__.split(" This ")[0], parents=[app])
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
    production.add_argument("options", nargs="*", metavar="-- OPTIONS", help="gunicorn's own")
    add(commands, "shell", run_shell)
    test = add(commands, "test", run_test, add_help=False, parents=[], prefix_chars="\0")
    test.add_argument("arguments", nargs="*")  # whatever they start with
    return parser


def run_dev(args: argparse.Namespace) -> int:
    """serve on this machine with Flask's server, reloading what changes"""
    watch, child, files = not args.no_reload, is_running_from_reloader(), []
    try:
        mest_app, module = load_app(args)
        app, files, config = mest_app.app, [module.__file__], mest_app.config
        host, port, app.debug = config.listen_host or "127.0.0.1", config.listen_port, args.debug
        if child or not watch:  # the reloader's parent serves nothing
            mest_app.load_models()
    except MestError as error:
        if not child:
            raise
        print(report(error), file=sys.stderr)
        app = Problem(503, "The application does not load; the terminal says why.")
        host, port = os.environ["MEST_LISTEN_HOST"], int(os.environ["MEST_LISTEN_PORT"])
    if args.debug and not re.match(r"localhost$|127\.|::1$", host):
        raise MestError(f"--debug lets whoever reaches {host} run code; use --host 127.0.0.1")
    os.environ |= {"MEST_LISTEN_HOST": host, "MEST_LISTEN_PORT": str(port)}
    options = {"use_reloader": watch, "use_debugger": args.debug, "extra_files": files}
    run_simple(host, port, app, threaded=True, **options)
    return 0


def run_gunicorn(args: argparse.Namespace) -> int:
    """serve in production with gunicorn, whose own options may follow a --"""
    need("gunicorn")
    from gunicorn.errors import AppImportError, HaltServer

    mest_app, _ = load_app(args)
    config, given = mest_app.config, vars(args)
    host = f"[{config.listen_host}]" if ":" in config.listen_host else config.listen_host
    bind = f"{host or '0.0.0.0'}:{config.listen_port}"
    options = [f"--{name}={given[name]}" for name in ("workers", "threads") if name in given]
    options += [f"--bind={bind}"] if {"listen_host", "listen_port"} & given.keys() else []
    server, master = gunicorn_for(mest_app, bind, options + args.options), os.getpid()
    inherited = {"GUNICORN_FD", "LISTEN_FDS"} & os.environ.keys()  # from a master, from systemd
    if not inherited and not server.cfg.reuse_port:
        refuse_if_taken(server.cfg)
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
    names = {"mest_app": mest_app, "app": mest_app.app, "client": mest_app.app.test_client()}
    models = set(map(id, mest_app.config.models_instances))
    names |= {name: value for name, value in vars(module).items() if id(value) in models}
    banner = f"{mest_app.config.service_name}, Mest {__version__}: {', '.join(names)}"
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


def run_test(args: argparse.Namespace) -> int:
    """run pytest on this directory, with its own arguments"""
    pytest = need("pytest")
    Mest._run_by_command = True
    sys.path.insert(0, os.getcwd())
    return int(pytest.main(args.arguments))


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
            raise MestError(f"there is no application {path} in {os.getcwd()}; {hint}")
        module_name, folder = file.stem, file.parent
        while (folder / "__init__.py").is_file():
            module_name, folder = f"{folder.name}.{module_name}", folder.parent
    sys.path.insert(0, str(folder))
    Mest._run_by_command = Mest._setup_deferred = True
    try:
        module = importlib.import_module(module_name)
    except MestError as error:
        frames = traceback.extract_tb(error.__traceback__)
        *_, place = (frame for frame in frames if frame.filename != __file__)
        raise MestError(f"{place.filename}, line {place.lineno}: {error}") from None
    except (Exception, SystemExit) as error:
        raise MestError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
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

if __name__ == "__main__":
    sys.exit(main())
