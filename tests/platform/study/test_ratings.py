"""Nobody rates twice, nothing is rated too often, items that nobody finishes go to others; in both databases."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from calumma.platform.study.items import make_items
from calumma.platform.study.judgement import InvalidJudgement, Judgement
from calumma.platform.study.store.ratings import NotYours, Ratings, StudyError
from calumma.platform.study.store.tables import Database, DatabaseUnusable

from .conftest import Clock, judgement

POSTGRES = shutil.which("postgres") and next(
    (str(folder) for folder in Path("/usr/lib/postgresql").glob("*/bin") if (folder / "initdb").exists()), None
)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server's database."""
    if not POSTGRES:
        pytest.skip("no PostgreSQL on this machine: apt install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="calumma-postgres-"))  # pytest's own folders are closed to other users
    as_user: dict[str, Any] = {}
    if os.getuid() == 0:  # the server refuses root
        import pwd

        found = pwd.getpwnam("postgres")
        as_user = {"user": found.pw_uid, "group": found.pw_gid, "extra_groups": []}
        os.chown(folder, found.pw_uid, found.pw_gid)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"
    run: dict[str, Any] = {"check": True, "capture_output": True, "cwd": folder, **as_user}
    subprocess.run([f"{POSTGRES}/initdb", "-D", data, "-A", "trust", "-U", "calumma", "--no-sync"], **run)
    options = f"-p {port} -c fsync=off -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    start = [f"{POSTGRES}/pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start"]
    subprocess.run(start, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **as_user)
    yield f"postgresql://calumma@127.0.0.1:{port}/postgres"
    subprocess.run([f"{POSTGRES}/pg_ctl", "-D", data, "-m", "immediate", "stop"], **run)
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ratings.db'}"
    address: str = request.getfixturevalue("postgres")
    return address


ITEMS = make_items([(f"p{n}", "story") for n in range(6)], ["ours", "rival"], "preference", 0, 3)


def opened(url: str, name: str, clock: Clock | None = None, seats: int = 3) -> Ratings:
    return Ratings(Database(url), name, ITEMS, seats, 60.0, clock or Clock())


def test_each_item_is_rated_by_three_people_whoever_comes_at_once(url: str) -> None:
    people = [f"ann{n}" for n in range(5)]
    ratings = opened(url, "at-once")
    for name in people:
        ratings.invite(name)
    twice: list[str] = []

    def work(name: str) -> int:
        own, done = opened(url, "at-once"), 0
        while (given := own.next(name)) is not None:
            assert own.next(name) == given or own.next(name) is not None
            if not own.rate(name, given.item, judgement()):
                twice.append(given.item)
            done += 1
        return done

    with ThreadPoolExecutor(len(people)) as pool:
        done = list(pool.map(work, people))
    everything = ratings.all()
    assert sum(done) == len(everything) == 18
    assert Counter(Counter(rating.item for rating in everything).values()) == {3: 6}
    assert max(Counter((rating.item, rating.annotator) for rating in everything).values()) == 1
    assert twice == []
    progress = ratings.progress()
    assert (progress.rated, progress.complete, progress.held) == (18, 6, 0)


def test_two_requests_of_one_person_get_one_item(url: str) -> None:
    ratings = opened(url, "one-person")
    ratings.invite("ann")
    barrier = threading.Barrier(4)

    def ask(_: int) -> str:
        barrier.wait()
        given = ratings.next("ann")
        assert given is not None
        return given.item

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ask, range(4)))) == 1


def test_a_double_click_is_kept_once_and_a_change_of_mind_is_refused(url: str) -> None:
    ratings = opened(url, "clicks")
    ratings.invite("ann")
    given = ratings.next("ann")
    assert given is not None
    barrier = threading.Barrier(2)

    def click(_: int) -> bool:
        barrier.wait()
        return ratings.rate("ann", given.item, judgement())

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(click, range(2))) == [False, True]
    with pytest.raises(NotYours, match="judged this one already"):
        ratings.rate("ann", given.item, judgement("right"))
    (kept,) = ratings.all()
    assert kept.judgement.preference == "left"
    assert kept.preferred == kept.systems[0]


def test_an_item_whose_time_is_up_goes_to_others_and_stays_while_nobody_wants_it(url: str, clock: Clock) -> None:
    ratings = opened(url, "expiry", clock, seats=1)
    for name in ("ann", "ben"):
        ratings.invite(name)
    first = ratings.next("ann")
    assert first is not None
    clock.now += 61
    assert ratings.rate("ann", first.item, judgement())  # late, but nobody came
    second = ratings.next("ann")
    assert second is not None
    clock.now += 61
    taken = set()
    while (given := ratings.next("ben")) is not None:
        taken.add(given.item)
        ratings.rate("ben", given.item, judgement("same"))
    assert second.item in taken
    with pytest.raises(NotYours, match="went to somebody else"):
        ratings.rate("ann", second.item, judgement())
    assert ratings.next("ann") is None
    assert ratings.left_for("ann") == (1, 0)


def test_links_are_unguessable_kept_as_hashes_and_end(url: str, tmp_path: Path) -> None:
    ratings = opened(url, "links")
    token = ratings.invite("ann")
    assert len(token) >= 32
    found = ratings.person(token)
    assert found is not None
    assert (found.name, found.role) == ("ann", "annotator")
    assert ratings.person(token + "x") is None
    if url.startswith("sqlite"):
        files = b"".join(file.read_bytes() for file in tmp_path.glob("ratings.db*"))
        assert token.encode() not in files
    newer = ratings.invite("ann")
    assert ratings.person(token) is None
    held = ratings.next("ann")
    assert held is not None
    assert ratings.revoke("ann")
    assert not ratings.revoke("ann")
    assert ratings.person(newer) is None
    assert ratings.progress().held == 0
    ratings.invite("watcher", "owner")
    with pytest.raises(StudyError, match="there already, as owner"):
        ratings.invite("watcher")


def test_another_study_of_the_same_name_is_refused(url: str) -> None:
    opened(url, "same-name")
    opened(url, "same-name")
    others = make_items([("q", "story")], ["ours", "rival"], "preference", 0, 3)
    with pytest.raises(StudyError, match="holds a study 'same-name' with other prompts"):
        Ratings(Database(url), "same-name", others, 3, 60.0)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "is no database's URL"),
        ("postgre://calumma:secret@127.0.0.1/nothing", "is no database's URL"),
        ("sqlite:////nowhere/at/all.db", "cannot be used: unable to open"),
        ("postgresql://calumma:secret@127.0.0.1:1/nothing", "cannot be used"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_without_its_password(url: str, said: str) -> None:
    with pytest.raises(DatabaseUnusable, match=said) as told:
        Database(url)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (judgement(None), "preference must be"),
        (judgement(first=None), "answer 1: fulfils must be"),
        (Judgement(preference="left", answers=judgement().answers[:1]), "judges 1 answers"),
        (
            Judgement.model_validate(
                {"preference": "same", "answers": [{"fulfils": "fully", "issues": ["made up"]}, {"fulfils": "not"}]}
            ),
            "no issue of this study is called made up",
        ),
        (
            Judgement.model_validate(
                {"preference": "same", "answers": [{"fulfils": "fully", "label": "safe"}, {"fulfils": "not"}]}
            ),
            "label must be absent",
        ),
    ],
)
def test_a_judgement_must_say_all_that_is_asked_and_nothing_else(given: Judgement, said: str) -> None:
    with pytest.raises(InvalidJudgement, match=said):
        given.require("preference", ("an issue",))


class Study(RuleBasedStateMachine):
    """Whatever people do in whatever order, the invariants hold."""

    people = ("ann", "ben", "cleo", "dan")

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.ratings = Ratings(Database("sqlite://"), "machine", ITEMS[:3], 2, 60.0, self.clock)
        for name in self.people:
            self.ratings.invite(name)
        self.given: dict[str, set[str]] = {name: set() for name in self.people}
        self.kept: set[tuple[str, str]] = set()

    @rule(name=st.sampled_from(people))
    def asks(self, name: str) -> None:
        given = self.ratings.next(name)
        if given is not None:
            assert (given.item, name) not in self.kept
            self.given[name].add(given.item)

    @rule(name=st.sampled_from(people), data=st.data())
    def rates(self, name: str, data: st.DataObject) -> None:
        if not self.given[name]:
            return
        item = data.draw(st.sampled_from(sorted(self.given[name])))
        try:
            new = self.ratings.rate(name, item, judgement())
        except NotYours:
            assert (item, name) not in self.kept
            return
        assert new == ((item, name) not in self.kept)
        self.kept.add((item, name))

    @rule(seconds=st.sampled_from([1.0, 61.0]))
    def waits(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def nothing_is_lost_and_nothing_too_much(self) -> None:
        if not hasattr(self, "ratings"):
            return
        rated = [(rating.item, rating.annotator) for rating in self.ratings.all()]
        assert sorted(rated) == sorted(self.kept)
        assert all(count <= 2 for count in Counter(item for item, _ in rated).values())


Study.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestStudyMachine = Study.TestCase
