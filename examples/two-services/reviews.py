"""A service that knows nothing of a mesh. It answers who the sidecar said was calling."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Reviews(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together

    def do_GET(self):
        caller = self.headers.get("x-forwarded-client-cert", "nobody knows whom").rpartition("URI=")[2]
        tenant = self.headers.get("x-tenant", "none")
        body = f"review {self.path.rpartition('/')[2]}, asked for by {caller}, tenant {tenant}\n".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", 8000), Reviews).serve_forever()
