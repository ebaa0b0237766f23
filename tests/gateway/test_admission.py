"""Permits: what they count, for whom, and that all of it comes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import Overloaded
from serve.gateway.admission import Admission, client_of


def test_admission_limits_items_and_bytes_and_permit_returns_them():
    admission = Admission(3, 100)
    with admission.permit() as permit:
        permit.grow(items=2, nbytes=60)
        with admission.permit() as other, pytest.raises(Overloaded, match="3"):
            other.grow(items=2)
        with admission.permit() as other, pytest.raises(Overloaded, match="41"):
            other.grow(nbytes=41)
        assert (admission.items, admission.bytes) == (2, 60)
        permit.shrink(items=1, nbytes=10)
        assert (admission.items, admission.bytes) == (1, 50)
    permit.release()
    assert (admission.items, admission.bytes) == (0, 0)
    with pytest.raises(KeyError), admission.permit() as permit:
        permit.grow(items=1, nbytes=100)
        raise KeyError
    assert (admission.items, admission.bytes) == (0, 0)


def test_one_client_holds_its_share_and_another_is_admitted_beside_it():
    admission = Admission(8, 1000, client_share=0.75)
    with admission.permit("greedy") as first, admission.permit("greedy") as second:
        first.grow(items=6, nbytes=500)
        with pytest.raises(Overloaded):
            second.grow(items=1)
        with pytest.raises(Overloaded):
            second.grow(nbytes=251)
        second.grow(nbytes=250)
        with admission.permit("other") as other:
            other.grow(items=2, nbytes=250)
            assert (admission.items, admission.bytes) == (8, 1000)
            with pytest.raises(Overloaded):
                other.grow(items=1)
    assert (admission.items, admission.bytes) == (0, 0) and not admission._clients


def test_an_answer_is_held_in_place_of_its_request():
    admission = Admission(2, 100)
    with admission.permit("a") as permit:
        permit.grow(items=2, nbytes=60)
        permit.exchange(90)
        assert (admission.items, admission.bytes) == (0, 90)
    with admission.permit("a") as permit:
        permit.grow(items=1, nbytes=60)
        with pytest.raises(Overloaded):
            permit.exchange(101)
        assert (admission.items, admission.bytes) == (1, 60)
        permit.exchange(0)
        assert (admission.items, admission.bytes) == (0, 0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 5), st.integers(0, 60), st.integers(0, 3)
        )
    )
)
def test_admission_never_exceeds_its_limits_and_ends_at_zero(steps):
    admission = Admission(9, 100, client_share=0.7)
    permits = [[admission.permit(client) for _ in range(4)] for client in "ab"]
    for client, which, items, nbytes, action in steps:
        permit = permits["ab".index(client)][which]
        try:
            if action == 0:
                permit.grow(items=items, nbytes=nbytes)
            elif action == 1:
                permit.shrink(items=items, nbytes=nbytes)
            elif action == 2:
                permit.exchange(nbytes)
            else:
                permit.release()
        except Overloaded:
            pass
        every = [each for row in permits for each in row]
        assert 0 <= admission.items == sum(each.items for each in every) <= 9
        assert 0 <= admission.bytes == sum(each.bytes for each in every) <= 100
        for row in permits:
            assert sum(each.items for each in row) <= 7 and sum(each.bytes for each in row) <= 70
    for row in permits:
        for permit in row:
            permit.release()
    assert (admission.items, admission.bytes) == (0, 0) and not admission._clients


@pytest.mark.parametrize(
    ("client", "name"),
    [
        (("192.0.2.7", 1234), "192.0.2.7"),
        (("2001:db8:1:2:3::4", 1), "2001:db8:1:2::/64"),
        (("2001:db8:1:2:ffff::9", 2), "2001:db8:1:2::/64"),
        (("fe80::1%eth0", 2), "fe80::/64"),
        (None, ""),
        (("not:an:address", 1), "not:an:address"),
    ],
)
def test_a_client_without_a_key_is_its_address_or_its_ipv6_network(client, name):
    assert client_of({"client": client}) == name


def test_model_beyond_its_share_leaves_room_for_the_others():
    admission = Admission(16, 1600)
    admission.count_models = lambda: 2
    flood = admission.permit("one")
    flood.model = "busy"
    with flood:
        while True:
            try:
                flood.grow(items=1)
            except Overloaded:
                break
        assert flood.items == 12  # beyond its half, up to where half a share is left
        other = admission.permit("two")
        other.model = "quiet"
        with other:
            other.grow(items=4)
            with pytest.raises(Overloaded):
                other.grow(items=1)  # the limit in total
    assert admission.held_for("busy").items == admission.items == 0


def test_single_model_may_hold_all_of_the_limits():
    admission = Admission(16, 1600)
    permit = admission.permit("one")
    permit.model = "only"
    with permit:
        permit.grow(items=16, nbytes=1600)
