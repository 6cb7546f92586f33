"""A judge on the loopback address, whose replies the test decides: `with JudgeServer(reply) as server`.

`reply(prompt)` gives the text of a chat completion, or (status, body, headers) to send verbatim. `server.asked` holds
the requests that were answered with a completion. `server.models` is what /v1/models lists (None: status 404), and
`server.probe` the answer to a question that finds out which model answers; these are counted in `server.probes` alone.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bessemer.addons.r1.judge_replies import PROBES


class JudgeServer:
    def __init__(self, reply, delay=0.0, models=None, probe="as always"):
        self.reply, self.delay, self.models, self.probe, self.probes = reply, delay, models, probe, []
        self.asked, self.requests, self.headers = [], [], []
        self.now = self.most = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if (question := body["messages"][0]["content"]) in PROBES:
                    outer.probes.append(body)
                    text = outer.probe(question) if callable(outer.probe) else outer.probe
                    return self.send(200, json.dumps({"choices": [{"message": {"content": text}}]}), {})
                with outer.lock:
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    outer.requests.append(body)
                    outer.headers.append((self.path, dict(self.headers)))
                time.sleep(outer.delay)
                text = outer.reply(body["messages"][0]["content"])
                with outer.lock:
                    outer.now -= 1
                    if isinstance(text, str):
                        outer.asked.append(body)
                if isinstance(text, str):
                    text = 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}), {}
                self.send(*text)

            def do_GET(self):
                listed = json.dumps({"object": "list", "data": outer.models})
                self.send(*((404, "", {}) if outer.models is None else (200, listed, {})))

            def send(self, status, text, headers):
                content = text if isinstance(text, bytes) else text.encode()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):
                """A client that gives up is part of the test."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
