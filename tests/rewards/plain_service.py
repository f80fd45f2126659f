"""A reward service in plain Python, as xomni_jax/rewards/README.md shows it: how many kilobytes the image's file has."""

import base64
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Service(BaseHTTPRequestHandler):
    def do_GET(self):  # /health
        self.answer({"schema": 2, "scorer": "kilobytes", "version": "1", "range": [0, 10000]})

    def do_POST(self):  # /score
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        files = [base64.b64decode(image) for image in request["images"]]
        same = {name: request[name] for name in ("schema", "id", "keys")} | {"scorer": "kilobytes", "version": "1"}
        scores = [len(file) / 1000 for file in files]
        self.answer(same | {"scores": scores, "errors": [None] * len(files), "details": [{}] * len(files)})

    def answer(self, message):
        body = json.dumps(message).encode()
        self.send_response(200)
        for header in (("Content-Type", "application/json"), ("Content-Length", str(len(body)))):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Service).serve_forever()
