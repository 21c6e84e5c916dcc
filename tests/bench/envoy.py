"""Envoy's static configuration with what pillion does by default and by the benchmark's policy.

Pure: names, ports and paths in, a dictionary for a JSON file out. Invariants: each figure here has its counterpart in
`policy.py`; statistics stay on; access log and tracing stay off, as they are off in pillion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import policy
from .policy import Service
from .stage import HOST

TYPE = "type.googleapis.com/envoy."
EXT_PROC = "ext_proc"
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Features:
    """How two Envoys speak to each other, and whether deadlines span bodies (they do in Envoy, not in pillion).

    `ext_proc_port`: where a program on loopback is asked about the head of each request.
    """

    http2: bool = False
    deadlines: bool = True
    ext_proc_port: int = 0


def outbound(
    listen: int, services: Sequence[Service], identity: Path, caller: str, features: Features | None = None
) -> Json:
    """The caller's side: a virtual host for each service, retries, budgets, breakers, mutual TLS towards the mesh."""
    features = features or Features()
    return {
        "static_resources": {
            "listeners": [
                _listener(
                    listen,
                    _manager(
                        [_virtual_host(service, features) for service in services],
                        [_ext_proc()] if features.ext_proc_port else [],
                    ),
                )
            ],
            "clusters": [
                *(_cluster(service, features) for service in services),
                *([_ext_proc_cluster(features.ext_proc_port)] if features.ext_proc_port else []),
            ],
            "secrets": _secrets(identity),
        }
    }


def inbound(
    listen: int, app_port: int, identity: Path, service: str, callers: Sequence[str], http2: bool, grpc: bool = False
) -> Json:
    """The callee's side: mutual TLS, authorization by caller and method, the application on loopback."""
    rbac = {
        "name": "envoy.filters.http.rbac",
        "typed_config": {
            "@type": TYPE + "extensions.filters.http.rbac.v3.RBAC",
            "rules": {
                "action": "ALLOW",
                "policies": {
                    "allow": {
                        "permissions": [
                            {"header": {"name": ":method", "string_match": {"exact": method}}}
                            for method in policy.METHODS
                        ],
                        "principals": [
                            {"authenticated": {"principal_name": {"exact": policy.spiffe_id(caller)}}}
                            for caller in callers
                        ],
                    }
                },
            },
        },
    }
    app = Service(service, ((HOST, app_port),), mesh=False, grpc=grpc)
    features = Features(deadlines=False)
    manager = _manager([_virtual_host(app, features, retries=False)], [rbac])
    manager["forward_client_cert_details"] = "SANITIZE_SET"
    manager["set_current_client_cert_details"] = {"uri": True}
    tls = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": TYPE + "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": True,
            "common_tls_context": {
                **_tls_13(),
                "alpn_protocols": ["h2", "http/1.1"] if http2 else ["http/1.1"],
                "tls_certificate_sds_secret_configs": [{"name": "own"}],
                "validation_context_sds_secret_config": {"name": "roots"},
            },
        },
    }
    return {
        "static_resources": {
            "listeners": [_listener(listen, manager, tls)],
            "clusters": [_cluster(app, features)],
            "secrets": _secrets(identity),
        }
    }


def _ext_proc() -> Json:
    """Asks for the request's head only: the least that a filter on every request can do."""
    return {
        "name": "envoy.filters.http.ext_proc",
        "typed_config": {
            "@type": TYPE + "extensions.filters.http.ext_proc.v3.ExternalProcessor",
            "grpc_service": {"envoy_grpc": {"cluster_name": EXT_PROC}, "timeout": "5s"},
            "message_timeout": "5s",
            "processing_mode": {"request_header_mode": "SEND", "response_header_mode": "SKIP"},
        },
    }


def _ext_proc_cluster(port: int) -> Json:
    cluster = _cluster(Service(EXT_PROC, ((HOST, port),), mesh=False, grpc=True), Features())
    del cluster["outlier_detection"]  # it is a part of the proxy
    return cluster


def _listener(port: int, manager: Json, tls: Json | None = None) -> Json:
    chain: Json = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    if tls is not None:
        chain["transport_socket"] = tls
    return {"name": "in", "address": _address(HOST, port), "filter_chains": [chain]}


def _manager(virtual_hosts: list[Json], filters: list[Json]) -> Json:
    return {
        "@type": TYPE + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "codec_type": "AUTO",
        "http_protocol_options": {"enable_trailers": True},  # so that gRPC can cross HTTP/1.1 between the two
        "use_remote_address": True,
        "normalize_path": True,
        "request_headers_timeout": "10s",
        "stream_idle_timeout": policy.seconds(policy.IDLE_S),
        "route_config": {"virtual_hosts": virtual_hosts},
        "http_filters": [
            *filters,
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": TYPE + "extensions.filters.http.router.v3.Router"},
            },
        ],
    }


def _virtual_host(service: Service, features: Features, retries: bool = True) -> Json:
    retry = {
        "retry_on": "connect-failure,refused-stream,reset,retriable-status-codes"
        + (",unavailable" if service.grpc else ""),
        "retriable_status_codes": [503],
        "num_retries": policy.RETRIES,
        "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.250s"},
    }
    action: Json = {"cluster": service.name, "timeout": policy.seconds(policy.TOTAL_S) if features.deadlines else "0s"}

    def acting(try_s: float) -> Json:
        if not retries:
            return action
        limit = {"per_try_timeout": policy.seconds(try_s)} if features.deadlines else {}
        return {**action, "retry_policy": {**retry, **limit}}

    beta = {
        "name": "beta",
        "match": {
            "path_separated_prefix": policy.BETA_PATH,
            "headers": [{"name": policy.BETA_HEADER, "string_match": {"exact": "1"}}],
        },
        "route": acting(policy.BETA_TRY_S),
    }
    return {
        "name": service.name,
        "domains": [service.name, f"{service.name}.mesh"],
        "routes": [
            beta,
            *(
                {"name": f"path-{number}", "match": _path_match(path), "route": acting(policy.TRY_S)}
                for number, path in enumerate(service.paths)
            ),
            {"name": "main", "match": {"prefix": "/"}, "route": acting(policy.TRY_S)},
        ],
    }


def _path_match(path: str) -> Json:
    return {"path_separated_prefix": path.removesuffix("/**")} if path.endswith("/**") else {"path": path}


def _cluster(service: Service, features: Features) -> Json:
    http2 = features.http2 if service.mesh else service.grpc
    http: Json = {"http2_protocol_options": {}} if http2 else {"http_protocol_options": {"enable_trailers": True}}
    cluster: Json = {
        "name": service.name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "lb_policy": "LEAST_REQUEST",
        "load_assignment": {
            "cluster_name": service.name,
            "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": _address(host, port)}} for host, port in service.endpoints]}
            ],
        },
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": policy.LIMIT,
                    "max_pending_requests": policy.LIMIT,
                    "max_requests": policy.LIMIT,
                    "retry_budget": {
                        "budget_percent": {"value": policy.BUDGET_PERCENT},
                        "min_retry_concurrency": policy.BUDGET_MIN,
                    },
                }
            ]
        },
        "outlier_detection": {
            "consecutive_5xx": policy.FAILURES,
            "interval": "1s",
            "base_ejection_time": policy.seconds(policy.OPEN_S),
            "max_ejection_time": policy.seconds(policy.OPEN_MAX_S),
            "max_ejection_percent": 100,
            "enforcing_success_rate": 0,
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": TYPE + "extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": http,
                "common_http_protocol_options": {"idle_timeout": policy.seconds(policy.IDLE_S)},
            }
        },
    }
    if service.mesh:
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": TYPE + "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "sni": f"{policy.PORT_NAME}.{service.name}.mesh",
                "common_tls_context": {
                    **_tls_13(),
                    "alpn_protocols": ["h2" if features.http2 else "http/1.1"],
                    "tls_certificate_sds_secret_configs": [{"name": "own"}],
                    "combined_validation_context": {
                        "default_validation_context": {
                            "match_typed_subject_alt_names": [
                                {"san_type": "URI", "matcher": {"exact": policy.spiffe_id(service.name)}}
                            ]
                        },
                        "validation_context_sds_secret_config": {"name": "roots"},
                    },
                },
            },
        }
    return cluster


def _tls_13() -> Json:
    return {
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
            "ecdh_curves": ["P-256"],
        }
    }


def _secrets(identity: Path) -> list[Json]:
    """The certificate and the roots, once, whatever the number of clusters."""
    return [
        {
            "name": "own",
            "tls_certificate": {
                "certificate_chain": {"filename": str(identity / "cert.pem")},
                "private_key": {"filename": str(identity / "key.pem")},
            },
        },
        {"name": "roots", "validation_context": {"trusted_ca": {"filename": str(identity / "bundle.pem")}}},
    ]


def _address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}
