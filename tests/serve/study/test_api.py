"""What the study's server refuses, and what it says to whom."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from calumma.platform.study.folder import Study
from calumma.platform.study.store.tables import Database
from calumma.serve.http.access.hosts import HostSettings
from calumma.serve.study.app import MOST_BYTES, create_app
from calumma.serve.study.server import pages_of


@pytest.fixture
def client(study: Study, database: Database) -> Iterator[TestClient]:
    with TestClient(create_app(pages_of(study, database, HostSettings())), base_url="http://127.0.0.1") as client:
        yield client


def as_person(study: Study, database: Database, name: str = "ann", role: Any = "annotator") -> dict[str, str]:
    return {"Authorization": f"Bearer {study.ratings(database).invite(name, role)}"}


RATED = {"preference": "left", "answers": [{"fulfils": "fully"}, {"fulfils": "not"}]}


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer "}]
)
def test_without_a_link_of_the_study_nothing_is_said(client: TestClient, headers: dict[str, str]) -> None:
    for path in ("/api/welcome", "/api/progress"):
        assert client.get(path, headers=headers).status_code == 401
    for path in ("/api/next", "/api/rate"):
        answer = client.post(path, headers=headers, json={})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unknown_link")


def test_a_link_in_a_cookie_or_the_address_opens_nothing(client: TestClient, study: Study, database: Database) -> None:
    """What a page of another site could have a browser send."""
    token = study.ratings(database).invite("ann")
    client.cookies.set("token", token)
    assert client.post(f"/api/next?token={token}", json={}).status_code == 401


def test_annotators_do_not_watch_and_owners_do_not_judge(client: TestClient, study: Study, database: Database) -> None:
    ann, olga = as_person(study, database), as_person(study, database, "olga", "owner")
    assert client.get("/api/progress", headers=ann).status_code == 403
    assert client.post("/api/next", headers=olga, json={}).status_code == 403
    seen = client.get("/api/progress", headers=olga).json()
    assert (seen["seats"], seen["rated"], [one["name"] for one in seen["work"]]) == (12, 0, ["ann"])


def test_the_answers_name_no_system(client: TestClient, study: Study, database: Database) -> None:
    ann = as_person(study, database)
    task = client.post("/api/next", headers=ann, json={})
    assert "ours" not in task.text
    assert "rival" not in task.text
    assert set(task.json()) == {"item", "prompt", "answers", "rated", "left", "waiting"}
    assert task.headers["cache-control"] == "no-store"
    assert client.post("/api/next", headers=ann, json={}).json()["item"] == task.json()["item"]


@pytest.mark.parametrize(
    ("judgement", "said"),
    [
        ({**RATED, "preference": "both"}, "judgement.preference"),
        ({**RATED, "preference": None}, "preference must be"),
        ({**RATED, "answers": RATED["answers"][:1]}, "judges 1 answers"),
        ({**RATED, "winner": "ours"}, "judgement.winner"),
        ({**RATED, "note": "x" * 5000}, "judgement.note"),
        ({**RATED, "answers": [{"fulfils": "fully", "issues": ["<script>"]}, {"fulfils": "not"}]}, "no issue of this"),
    ],
)
def test_what_is_no_judgement_of_the_study_is_refused(
    client: TestClient, study: Study, database: Database, judgement: dict[str, Any], said: str
) -> None:
    ann = as_person(study, database)
    item = client.post("/api/next", headers=ann, json={}).json()["item"]
    answer = client.post("/api/rate", headers=ann, json={"item": item, "judgement": judgement})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert study.ratings(database).all() == []


def test_an_item_is_judged_by_whom_it_was_given_to(client: TestClient, study: Study, database: Database) -> None:
    ann, ben = as_person(study, database), as_person(study, database, "ben")
    item = client.post("/api/next", headers=ann, json={}).json()["item"]
    for headers, given in ((ben, item), (ann, "unknown")):
        answer = client.post("/api/rate", headers=headers, json={"item": given, "judgement": RATED})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_yours")
    for new in (True, False):
        answer = client.post("/api/rate", headers=ann, json={"item": item, "judgement": RATED})
        assert answer.json() == {"new": new}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Origin": "https://evil.example", "Content-Type": "text/plain"}, 403),
        ({"Content-Length": str(MOST_BYTES + 1)}, 413),
    ],
)
def test_other_names_other_sites_forms_and_huge_bodies_are_refused(
    client: TestClient, study: Study, database: Database, headers: dict[str, str], status: int
) -> None:
    ann = as_person(study, database)
    assert client.post("/api/next", headers={**ann, **headers}, content=b"{}").status_code == status


def test_a_body_without_a_length_is_counted_as_it_comes(client: TestClient, study: Study, database: Database) -> None:
    ann = as_person(study, database)
    chunks = (b"x" * 2**20 for _ in range(MOST_BYTES // 2**20 + 2))
    assert client.post("/api/rate", headers=ann, content=chunks).status_code == 413


def test_the_page_may_load_and_run_nothing_but_its_own(client: TestClient) -> None:
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


def test_a_revoked_link_ends_at_once(client: TestClient, study: Study, database: Database) -> None:
    ann = as_person(study, database)
    assert client.get("/api/welcome", headers=ann).status_code == 200
    study.ratings(database).revoke("ann")
    assert client.get("/api/welcome", headers=ann).status_code == 401
