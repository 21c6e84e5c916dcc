"""Other proxies as one plain hop: nginx, HAProxy, Caddy and mitmproxy, each with one thread that does the work.

Each path is ready when its function returns. What they have of pillion's features they have on.
"""

from . import policy
from .backends import Target, nginx, ready
from .policy import CALLEE
from .stage import HOST, Stage, free_port


def nginx_plain(stage: Stage, app_port: int) -> Target:
    port = free_port()
    process = nginx(
        stage,
        "nginx",
        f"""
          upstream app {{ server {HOST}:{app_port}; keepalive 512; keepalive_requests 1000000000; }}
          server {{
            listen {HOST}:{port} backlog=4096;
            location / {{
              proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection "";
              proxy_set_header Host $host; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
              proxy_next_upstream error timeout http_503; proxy_next_upstream_tries 3; proxy_read_timeout 10s;
            }}
          }}
        """,
    )
    return ready(Target("nginx", port, CALLEE, (process,)))


def haproxy_plain(stage: Stage, app_port: int) -> Target:
    port = free_port()
    folder = stage.folder("haproxy-config")
    config = folder / "haproxy.cfg"
    config.write_text(
        f"""
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  timeout client 60s
  timeout server 10s
  timeout connect 5s
  timeout http-request 10s
  retries 2
  retry-on conn-failure empty-response 503
  option forwardfor
  http-reuse always
frontend in
  bind {HOST}:{port} backlog 4096
  unique-id-format %[uuid]
  unique-id-header x-request-id
  acl beta path_beg {policy.BETA_PATH}/
  use_backend beta if beta {{ req.hdr({policy.BETA_HEADER}) 1 }}
  default_backend app
backend beta
  server app {HOST}:{app_port} maxconn {policy.LIMIT}
backend app
  balance leastconn
  server app {HOST}:{app_port} maxconn {policy.LIMIT}
"""
    )
    process = stage.start("HAProxy", [stage.tools["haproxy"], "-db", "-f", str(config)])
    return ready(Target("HAProxy", port, CALLEE, (process,)))


def caddy_plain(stage: Stage, app_port: int) -> Target:
    port = free_port()
    folder = stage.folder("caddy-config")
    config = folder / "Caddyfile"
    config.write_text(
        f"""
{{
  admin off
  auto_https off
  persist_config off
  metrics
  log default {{
    level ERROR
  }}
}}
http://:{port} {{
  bind {HOST}
  @beta {{
    path {policy.BETA_PATH}/*
    header {policy.BETA_HEADER} 1
  }}
  reverse_proxy @beta {HOST}:{app_port} {{
    import app
  }}
  reverse_proxy {HOST}:{app_port} {{
    import app
  }}
}}
""".replace("    import app", CADDY_APP)
    )
    process = stage.start(
        "Caddy",
        [stage.tools["caddy"], "run", "--config", str(config), "--adapter", "caddyfile"],
        variables={
            "GOMAXPROCS": "1",
            "HOME": str(folder),
            "XDG_DATA_HOME": str(folder),
            "XDG_CONFIG_HOME": str(folder),
        },
    )
    return ready(Target("Caddy", port, CALLEE, (process,)))


CADDY_APP = f"""    lb_policy least_conn
    lb_retries {policy.RETRIES}
    fail_duration {policy.OPEN_S:g}s
    max_fails {policy.FAILURES}
    unhealthy_request_count {policy.LIMIT}
    transport http {{
      dial_timeout 5s
      response_header_timeout {policy.TRY_S:g}s
      keepalive_idle_conns_per_host 512
    }}"""


def mitmproxy_plain(stage: Stage, app_port: int) -> Target:
    """Another proxy in Python, for debugging rather than for traffic."""
    port = free_port()
    folder = stage.folder("mitmproxy")
    process = stage.start(
        "mitmproxy",
        [
            *(stage.tools["mitmdump"], "--quiet", "--mode", f"reverse:http://{HOST}:{app_port}"),
            *("--listen-host", HOST, "--listen-port", str(port)),
            *("--set", "keep_host_header=true", "--set", f"confdir={folder}"),
        ],
    )
    return ready(Target("mitmproxy", port, CALLEE, (process,)))
