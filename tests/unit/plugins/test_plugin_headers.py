"""The filter `headers`."""

import pytest

from sidecar.api import ConfigError
from sidecar.plugins.headers import HeaderEdit
from sidecar.testing import check_filter, make_request, make_response


def made(config: dict[str, object]) -> HeaderEdit:
    return HeaderEdit(HeaderEdit.decode(config))


def test_it_keeps_the_contract() -> None:
    check_filter(HeaderEdit)
    check_filter(HeaderEdit, {"request": {"set": {"x-a": "1"}}, "response": {"remove": ["server"]}})


def test_remove_comes_before_set_and_set_before_add() -> None:
    edit = {"set": {"x-a": "new"}, "add": {"x-a": "more", "x-b": "2"}, "remove": ["x-a", "x-c"]}
    request = make_request("GET", "/", [("x-a", "old"), ("x-a", "older"), ("x-c", "3"), ("x-d", "4")])
    made({"request": edit}).on_request(request)
    assert request.headers.items() == [("x-d", "4"), ("x-a", "new"), ("x-a", "more"), ("x-b", "2")]


def test_each_direction_has_its_own_edit() -> None:
    filter_ = made({"response": {"set": {"x-served-by": "pillion"}}})
    request, response = make_request(), make_response()
    filter_.on_request(request)
    filter_.on_response(request, response)
    assert "x-served-by" not in request.headers
    assert response.headers.get("x-served-by") == "pillion"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"set": {"content-length": "1"}}, "request: 'content-length' frames or routes"),
        ({"add": {"x-a": "b\nc"}}, "request: the value for 'x-a' holds a control character"),
        ({"remove": ["x-pillion-reason"]}, "request: 'x-pillion-reason' speaks for the mesh"),
        ({"drop": []}, "request.drop: unknown key"),
    ],
)
def test_what_may_not_be_written_is_refused_with_the_policy(edit: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made({"request": edit})
    assert says in str(caught.value)
