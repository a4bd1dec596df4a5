"""A vLLM server as far as its starter asks, started in no time: ``quick_server.py FOLDER ...``.

The folder's file ``behaviour`` says what it does at its start (``end``, ``mute``, or else
``serve``), ``described.json`` what it says of its model; it writes what it was started with to
``started_N.json``.
"""

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

folder, options = Path(sys.argv[1]), sys.argv[2:]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        described = json.loads((folder / "described.json").read_text())
        self._answer(json.dumps({"results": [described]}).encode())

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
number = len(list(folder.glob("started_*.json"))) + 1
started = {"options": options, "environment": dict(os.environ), "pids": [os.getpid(), child.pid]}
partial = folder / "started"
partial.write_text(json.dumps(started))
partial.rename(folder / f"started_{number}.json")
print(f"start {number}", flush=True)
behaviour = (folder / "behaviour").read_text()
if behaviour == "end":
    print("out of memory", flush=True)
    sys.exit(3)
if behaviour == "mute":
    time.sleep(3600)
address = options[options.index("--host") + 1], int(options[options.index("--port") + 1])
ThreadingHTTPServer(address, Handler).serve_forever()
