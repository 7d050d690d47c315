"""An engine host without an engine: it speaks the protocol, and does what a request's last message tells it to.

`slow`: a stream that goes on until it is closed. `stall`: no answer. `die`: the process dies in the middle of a
stream, or before an answer. `full`: 429. Anything else is repeated, in chunks if streamed. An adapter of step 13
is broken. Files in the folder `$SCRIPT` change what a host does: `refuse` (it can't load), `late` (it stays
loading while that file is there). What it was asked is written to `asked.jsonl` in its work folder.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HELLO = json.loads(sys.stdin.readline())
SCRIPT = Path(os.environ["SCRIPT"])
in_flight = 0
used = time.monotonic()
draining = False
closed_early = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        global in_flight, closed_early, used
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with Path(HELLO["work_dir"], "asked.jsonl").open("a") as log:
            log.write(json.dumps({"path": self.path, "body": body, "headers": headers}) + "\n")
        if headers.get("authorization") != f"Bearer {HELLO['token']}":
            return self.fail(401, "not the token", "invalid_api_key")
        if draining:
            return self.fail(503, "this engine is leaving", "engine_leaving")
        in_flight += 1
        used = time.monotonic()
        try:
            self.answer(body, headers)
        except OSError:
            closed_early += 1
        finally:
            in_flight -= 1
            used = time.monotonic()

    def answer(self, body: dict[str, Any], headers: dict[str, str]) -> None:
        text = str(body["messages"][-1].get("content", "") if "messages" in body else body["prompt"])
        if text == "stall":
            time.sleep(30)
        if text == "die" and not body.get("stream"):
            os._exit(9)
        if "/step-13." in headers.get("x-flash-adapter-manifest", ""):
            self.fail(422, "the adapter does not fit", "model")
        elif text == "full":
            self.fail(429, "the queue is full", "rate_limit_exceeded", **{"Retry-After": "7"})
        elif body.get("stream"):
            self.stream(text)
        else:
            self.whole(text, body)

    def whole(self, text: str, body: dict[str, Any]) -> None:
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", "index": 0}
        if body.get("logprobs"):
            said["logprobs"] = {"content": [{"token": "x", "logprob": -0.5}]}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        self.send({"id": "x", "object": "chat.completion", "model": body["model"], "choices": [said], "usage": usage})

    def stream(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        endless = text in ("slow", "die")
        for number, piece in enumerate(["tick "] * 10**6 if endless else text.split()):
            choice = {"index": 0, "delta": {"content": piece}}
            chunk = {"id": "x", "object": "chat.completion.chunk", "choices": [choice]}
            self.piece(f"data: {json.dumps(chunk)}\n\n")
            if text == "die" and number == 3:
                os._exit(9)
            if endless:
                time.sleep(0.02)
        self.piece("data: [DONE]\n\n")
        self.piece("")

    def piece(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def fail(self, status: int, message: str, code: str, **headers: str) -> None:
        error = {"message": message, "type": "server_error", "param": None, "code": code}
        self.send({"error": error}, status, **headers)

    def send(self, value: dict[str, Any], status: int = 200, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512


def beat(state: str, **values: Any) -> str:
    """One heartbeat; what the plane wants of us. The process ends when it wants nothing more."""
    stats = {"requests_total": 1.0, "closed_early": float(closed_early)}
    idle_s = 0.0 if in_flight else time.monotonic() - used
    report = {"state": state, "pid": os.getpid(), "in_flight": in_flight, "idle_s": idle_s, "stats": stats, **values}
    request = urllib.request.Request(
        f"{HELLO['plane_url']}/worker/engines/{HELLO['engine_id']}/heartbeat",
        data=json.dumps(report).encode(),
        headers={"Authorization": f"Bearer {HELLO['token']}", "Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as answer:
        return str(json.load(answer)["desired"])


def main() -> None:
    global draining
    server = Server(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    if (SCRIPT / "refuse").exists():
        error = {"code": "model", "message": "the weights are not there", "remedy": None, "detail": None}
        beat("failed", error=error)
        return
    while (SCRIPT / "late").exists():
        beat("loading")
        time.sleep(HELLO["heartbeat_s"])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    heard = time.monotonic()
    while time.monotonic() - heard < HELLO["lease_s"]:
        try:
            desired = beat("leaving" if draining else "ready", url=url)
            heard = time.monotonic()
        except urllib.error.HTTPError:
            return  # no longer wanted
        except OSError:  # the plane is away
            desired = "serve"
        draining = draining or desired == "drain"
        if draining and not in_flight:
            return
        time.sleep(HELLO["heartbeat_s"])


main()
