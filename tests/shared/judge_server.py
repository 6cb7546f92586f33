"""A judge on the loopback address, whose replies the test decides: `with JudgeServer(reply) as server`.

`reply(prompt)` gives the text of a chat completion, or (status, body, headers) to send verbatim. `server.asked` holds
the requests that were answered with a completion.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class JudgeServer:
    def __init__(self, reply, delay=0.0):
        self.reply, self.delay = reply, delay
        self.asked, self.requests, self.headers = [], [], []
        self.now = self.most = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    outer.requests.append(body)
                    outer.headers.append((self.path, dict(self.headers)))
                time.sleep(outer.delay)
                said = outer.reply(body["messages"][0]["content"])
                with outer.lock:
                    outer.now -= 1
                    if isinstance(said, str):
                        outer.asked.append(body)
                if isinstance(said, str):
                    said = 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}), {}
                status, text, headers = said
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
