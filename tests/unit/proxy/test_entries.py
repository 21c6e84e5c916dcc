"""The two ways in: which service and route a request follows, what is added, what cannot be forged."""

from typing import Any

import pytest
import trio
import trio.testing
from support.memory_net import Net, Peer, memory_world

from sidecar.model.snapshot import (
    AuthzLevel,
    EndpointSpec,
    Level,
    Match,
    Mtls,
    Port,
    Retry,
    Route,
    Rule,
    Service,
    Snapshot,
    Tls,
)
from sidecar.proxy.downstream import Downstream
from sidecar.proxy.entries import Outbound

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def service(name: str, **options: Any) -> Service:
    specs = (EndpointSpec(f"10.0.{len(name)}.1", 1, tls=Tls.MESH),)
    options.setdefault("routes", (Route("default"),))
    return Service(name, endpoints=specs, **options)


def network(*services: Service, **own: Any) -> Any:
    own.setdefault("routes", (Route("default"),))
    return memory_world(Snapshot({s.name: s for s in (Service("web", **own), *services)}))


def request(target: bytes = b"/", host: bytes = b"shop", method: bytes = b"GET", fields: bytes = b"") -> bytes:
    return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b\r\n" % (method, target, host, fields)


async def led(net: Net, peer: Peer, data: bytes) -> Peer:
    """The server that the request reached."""
    peer.send(data)
    server = await net.accepted()
    await trio.testing.wait_all_tasks_blocked()
    return server


def refused(peer: Peer, data: bytes) -> bytes:
    peer.send(data)
    answer = peer.read()
    assert b"\r\nx-pillion-reason: " in answer, answer
    return answer


# Outbound


@pytest.mark.parametrize("host", [b"shop", b"shop.mesh", b"SHOP", b"shop.", b"shop:8080", b"http.shop.mesh"])
async def test_by_host(autojump_clock, host):
    async with network(service("shop")) as net:
        server = await led(net, net.caller(), request(host=host))
        assert server.endpoint.sni == "http.shop.mesh"
        server.send(OK)


async def test_an_absolute_target_wins_over_host(autojump_clock):
    async with network(service("shop"), service("other")) as net:
        server = await led(net, net.caller(), request(b"http://shop/x?y", b"other"))
        assert server.endpoint.sni == "http.shop.mesh"
        assert server.read().startswith(b"GET /x?y HTTP/1.1\r\nhost: shop\r\n")
        server.send(OK)


async def test_an_unknown_host_names_what_is_known(autojump_clock):
    async with network(service("shop")) as net:
        answer = refused(net.caller(), request(host=b"shpo"))
        assert answer.startswith(b"HTTP/1.1 404 ") and b"no_route" in answer and b"known: shop, web" in answer


async def test_an_ordinary_proxy_request_elsewhere_is_passed_through(autojump_clock):
    async with network(service("shop")) as net:
        server = await led(net, net.caller(), request(b"http://www.example:81/x", b"www.example:81"))
        assert server.endpoint.address == ("www.example", 81) and server.endpoint.tls is Tls.PLAIN
        assert server.read().startswith(b"GET /x HTTP/1.1\r\nhost: www.example:81\r\n")
        server.send(OK)


async def test_not_where_strictness_is_asked_for(autojump_clock):
    async with network(service("shop")) as net:
        net.world.strict = True
        assert b"no_route" in refused(net.caller(), request(b"http://www.example/x", b"www.example"))


@pytest.mark.parametrize("side", ["out", "in"])
async def test_connect_is_not_served(autojump_clock, side):
    async with network(service("shop")) as net:
        peer = net.caller() if side == "out" else net.mesh_caller()
        assert refused(peer, request(b"shop:80", b"shop:80", b"CONNECT")).startswith(b"HTTP/1.1 501 ")


@pytest.mark.parametrize(("keep_host", "told"), [(False, b"shop"), (True, b"anything.example")])
async def test_a_local_port_always_leads_to_its_service(autojump_clock, keep_host, told):
    async with network(service("shop"), service("other")) as net:
        entry = Outbound(net.world, ("shop", "http"), keep_host=keep_host)
        app = Peer(net)
        net.call(Downstream(net.world, entry, "", "127.0.0.1").begin, app)
        server = await led(net, app, request(host=b"anything.example"))
        assert server.endpoint.sni == "http.shop.mesh" and b"\r\nhost: " + told + b"\r\n" in server.read()
        server.send(OK)


async def test_routes_by_method_path_and_header(autojump_clock):
    routes = (Route("w", Match(methods=frozenset({"POST"}))), Route("x", Match(path="/x/**")))
    async with network(service("shop", routes=routes)) as net:
        app = net.caller()
        assert b"no_route" in refused(app, request(b"/y"))
        server = await led(net, app, request(b"/x/y"))
        server.send(OK)
        assert app.read() == OK and net.records[-1][2] == "x"


@pytest.mark.parametrize("target", [b"/a/../../b", b"/a%2Fb", b"/%00", b"/%zz", b"/a\\b"])
async def test_ambiguous_paths_are_refused_where_paths_matter(autojump_clock, target):
    async with network(service("shop", routes=(Route("x", Match(path="/x/**")), Route("default")))) as net:
        answer = refused(net.caller(), request(target))
        assert answer.startswith(b"HTTP/1.1 400 ") and b"bad_request" in answer


async def test_the_path_that_was_judged_is_forwarded(autojump_clock):
    async with network(service("shop", routes=(Route("x", Match(path="/x/**")),))) as net:
        server = await led(net, net.caller(), request(b"/y/../%78/z"))
        assert server.read().startswith(b"GET /x/z HTTP/1.1\r\n")
        server.send(OK)


# Inbound


@pytest.mark.parametrize("host", [b"web", b"web.mesh", b"http.web.mesh", b"127.0.0.1:8000", b"www.example"])
async def test_what_is_not_anothers_is_ours(autojump_clock, host):
    async with network(service("shop")) as net:
        peer = net.mesh_caller("front")
        inside = await led(net, peer, request(host=host))
        assert b"\r\nhost: " + host + b"\r\n" in inside.read()
        inside.send(OK)
        assert peer.read() == OK


async def test_a_port_that_is_no_more(autojump_clock):
    async with network() as net:
        assert refused(net.mesh_caller(port="gone"), request(host=b"web")).startswith(b"HTTP/1.1 421 ")


SPELLINGS = [b"x-forwarded-client-cert", b"X-Forwarded-Client-Cert", b"x_forwarded_client_cert"]


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("caller", ["front", ""])
async def test_nobody_names_itself(autojump_clock, name, caller):
    async with network(mtls=Mtls.PERMISSIVE) as net:
        forged = name + b": By=me;URI=spiffe://mesh.local/service/admin\r\n"
        inside = await led(net, net.mesh_caller(caller), request(host=b"web", fields=forged))
        head = inside.read()
        assert b"service/admin" not in head
        assert (b"URI=spiffe://mesh.local/service/front\r\n" in head) == bool(caller)
        inside.send(OK)


@pytest.mark.parametrize(("caller", "passed"), [("front", True), ("", False)])
async def test_forwarding_fields_are_believed_only_from_the_mesh(autojump_clock, caller, passed):
    async with network(mtls=Mtls.PERMISSIVE) as net:
        inside = await led(net, net.mesh_caller(caller), request(host=b"web", fields=b"x-forwarded-for: 1.2.3.4\r\n"))
        assert (b"x-forwarded-for: 1.2.3.4" in inside.read()) == passed
        inside.send(OK)


async def test_attempts_are_believed_only_from_the_mesh(autojump_clock):
    trace = b"4bf92f3577b34da6a3ce929d0e0e4736"
    fields = b"x-pillion-attempt: 3\r\ntraceparent: 00-" + trace + b"-00f067aa0ba902b7-01\r\n"
    async with network(mtls=Mtls.PERMISSIVE) as net:
        for caller, attempt in (("front", 3), ("", 0)):
            peer = net.mesh_caller(caller)
            peer.send(request(host=b"web", fields=fields))
            assert net.world.memory.lookup(trace)[1] == attempt
            peer.reset()


async def test_refusals_say_why_in_the_log_and_not_to_the_caller(autojump_clock):
    rule = Rule("services.web.authz.allow[0]", callers=("admin",))
    levels = (AuthzLevel(Level.SERVICE, allow=(rule,), default="deny"),)
    async with network(routes=(Route("default", authz=levels),)) as net:
        answer = refused(net.mesh_caller("front"), request(host=b"web"))
        assert answer.startswith(b"HTTP/1.1 403 ") and b"allow[0]" not in answer and b"admin" not in answer
        assert net.log == [(403, "denied")] and net.records[0][4]
        inside = await led(net, net.mesh_caller("admin"), request(host=b"web"))
        inside.send(OK)


@pytest.mark.parametrize(
    ("fields", "methods", "again"),
    [(b"", None, False), (b"idempotency-key: 1\r\n", None, True), (b"", frozenset({"any"}), True)],
)
async def test_a_post_meets_a_dead_connection_of_the_application(autojump_clock, fields, methods, again):
    """Sent once more where that is safe, by the request or by the policy."""
    async with network(routes=(Route("default", retry=Retry(methods=methods)),), ports=(Port("http", 8000),)) as net:
        peer = net.mesh_caller("front")
        inside = await led(net, peer, request(host=b"web"))
        inside.send(OK)
        peer.read()
        peer.send(request(host=b"web", method=b"POST", fields=fields + b"content-length: 0\r\n"))
        inside.close()
        await trio.testing.wait_all_tasks_blocked()
        if again:
            inside = await net.accepted()
            await trio.testing.wait_all_tasks_blocked()
            inside.send(OK)
            assert peer.read() == OK
        else:
            assert b"upstream_reset" in peer.read()


async def test_trace_and_error_name_the_same_request(autojump_clock):
    fields = b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n"
    async with network(Service("shop", routes=(Route("default"),))) as net:
        app = net.caller()
        assert b'"request_id": "4bf92f3577b34da6a3ce929d0e0e4736"' in refused(app, request(fields=fields))
        assert b'"request_id": "' in refused(app, request())
