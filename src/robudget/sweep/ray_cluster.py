"""The connection to a Ray cluster; where nothing, something else or another version answers, one line says so."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import robudget
from robudget.errors import InputError

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 15.0
# How a client begins to speak HTTP/2, as all of Ray does: its preface and empty settings (RFC 9113, 3.4 and 6.5). The
# server begins with its own settings, a frame of type 4.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_FRAME_TYPE, _SETTINGS = 3, 4


def connect(address: str) -> Any:
    """The module `ray`, connected. Raises InputError where it is not installed or no Ray of this version answers at
    `address`."""
    try:
        import ray
    except ImportError:
        raise InputError("ray is not installed (pip install 'robudget[ray]')") from None
    import ray.util.scheduling_strategies

    if ray.is_initialized():
        raise InputError("this process has a connection to Ray already (allowed: ray.shutdown() before the sweep)")
    if not address and os.environ.get("RAY_ADDRESS") not in (None, "", "auto", "local"):
        address = os.environ["RAY_ADDRESS"]  # Ray would wait for it for a minute
    if "://" in address:
        raise InputError(f"--on ray:{address} (allowed: ray:HOST:6379, from a machine of the cluster)")
    if address:
        _check_answer(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings = {name: value for name, value in os.environ.items() if name.startswith("ROBUDGET_")}
    source = Path(robudget.__file__).parent
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address or None,
            log_to_driver=False,
            include_dashboard=False,
            configure_logging=False,
            logging_level=logging.ERROR,
            runtime_env={"py_modules": [str(source)], "excludes": ["**/__pycache__"], "env_vars": settings},
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:  # Ray says version skew so
        ray.shutdown()  # what there is of a connection
        said = in_one_line(error)
        # With an explicit address Ray takes up no token, and of a missing one it says only "failed to connect".
        other = "RAY_AUTH_MODE" in os.environ or "Version mismatch" in said
        token = "" if other else " (where `ray start` enabled tokens: RAY_AUTH_MODE=token)"
        raise InputError(f"cannot use the Ray cluster at {address or 'this machine'!r}: {said}{token}") from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)  # Ray's own would end this process without a word
    return ray


def _check_answer(address: str) -> None:
    """Raises InputError where nothing listens at `address`, or nothing that speaks as Ray does: Ray itself would go on
    asking for ten minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(_PREFACE)
            with connection.makefile("rb") as answer:
                frame = answer.read(_FRAME_TYPE + 1)
            if frame[_FRAME_TYPE:] != bytes([_SETTINGS]):
                raise ConnectionError("what listens there is no Ray")
    except TimeoutError:
        why = "no answer"
    except (OSError, ValueError) as error:
        why = str(getattr(error, "strerror", None) or error)
    else:
        return
    raise InputError(f"no Ray cluster at {address!r}: {why} (allowed: ray:HOST:6379, ray)")


def in_one_line(error: object) -> str:
    """What an error of Ray's says, in 500 characters at most."""
    return " ".join(str(error).split())[:500] or type(error).__name__
