"""What `pillion run` works out before it starts anything."""

from sidecar.run.command import environment, find_problem, reachable


def test_the_applications_calls_are_led_through_the_sidecar() -> None:
    child = environment({"PATH": "/bin", "http_proxy": "http://old.example:3128"}, "127.0.0.1:15001", 8000)
    assert child == {
        "PATH": "/bin",
        "PORT": "8000",
        "PILLION_OUTBOUND": "127.0.0.1:15001",
        "http_proxy": "http://127.0.0.1:15001",
        "HTTP_PROXY": "http://127.0.0.1:15001",
        "no_proxy": "localhost,127.0.0.1,::1",
        "NO_PROXY": "localhost,127.0.0.1,::1",
    }


def test_in_a_cgi_program_the_upper_case_name_is_not_set() -> None:
    child = environment({"REQUEST_METHOD": "GET", "HTTP_PROXY": "http://evil.example"}, "127.0.0.1:1", 8000)
    assert "HTTP_PROXY" not in child and child["http_proxy"] == "http://127.0.0.1:1"


def test_hosts_that_were_not_proxied_still_are_not() -> None:
    child = environment({"no_proxy": "db.example, ,127.0.0.1"}, "127.0.0.1:1", 8000)
    assert child["no_proxy"] == "db.example,127.0.0.1,localhost,::1"


def test_an_address_for_all_interfaces_is_called_on_loopback() -> None:
    assert [reachable(text) for text in ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "[::2]:1")] == [
        "127.0.0.1:1",
        "[::1]:1",
        "10.0.0.1:1",
        "[::2]:1",
    ]


def test_programs_that_exist_and_do_not() -> None:
    assert find_problem("sh") is None
    assert find_problem("/bin/sh") is None
    assert (find_problem("no-such-program-xyz") or (0, ""))[0] == 127
    assert (find_problem("/etc/passwd") or (0, ""))[0] == 126
