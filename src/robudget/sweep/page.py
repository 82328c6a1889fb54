"""How the sweeps of a store stand as a page that refreshes, served on this machine only."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from robudget.errors import InputError, RobudgetError
from robudget.sweep.status import STATES, StoreStatus, status

REFRESH_SECONDS = 5
_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #8884; vertical-align: top }
progress { width: 12rem }
"""


def page(now: StoreStatus) -> str:
    """One HTML document without scripts or other files."""
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in (run.run, run.state, run.last, run.owner))
        + "</tr>"
        for run in now.runs
        if run.state != "done"
    )
    drivers = ""
    for driver in now.drivers:
        data = driver.data
        live = "" if driver in now.live else f", ended: {data.get('last') or 'without a word'}"
        left = data.get("seconds_left")
        time = "" if left is None or live else f", about {left / 60:.0f} min left"
        text = (
            f"{driver.title} on {driver.on}, {driver.owner['host']}: {data['done']} of {data['runs']} runs{live}{time}"
        )
        drivers += (
            f"<p><progress value='{data['done']}' max='{max(data['runs'], 1)}'></progress> {html.escape(text)}</p>"
        )
    counts = ", ".join(f"{now.count(state)} {state}" for state in STATES)
    head = "<tr><th>run</th><th>state</th><th>last</th><th>owner</th></tr>"
    title = html.escape(f"{now.store}: {counts}, {now.waiting} not begun")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=refresh content={REFRESH_SECONDS}>"
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>{drivers}<table>{head}{rows}</table></html>"
    )


def server(root: Path, port: int) -> ThreadingHTTPServer:
    """A server at 127.0.0.1 with the page at / and the same as JSON at /status.json. Raises InputError where the port
    is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                now = status(root)
                kind, text = "text/html; charset=utf-8", page(now)
                if self.path == "/status.json":
                    kind, text = "application/json", json.dumps(now.to_dict())
                code = 200 if self.path in ("/", "/status.json") else 404
            except (RobudgetError, OSError) as error:  # the store is away for now
                code, kind, text = 503, "text/plain; charset=utf-8", str(error)
            data = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror} (allowed: a free port; 0 = any)") from None


def serve(root: Path, port: int, tell: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; `tell` gets the address."""
    with server(root, port) as http:
        tell(f"http://127.0.0.1:{http.server_port}/")
        http.serve_forever()
