"""Blind votes: what a visitor may know, one vote each, the interval, and a file that many write and some kill."""

import csv
import io
import json
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
from scipy.stats import binomtest

from app.votes import BOTH_BAD, CHOICES, LEFT, MAX_RECIPE, RIGHT, TIE, UNUSED_S, VOTES, Tally, Votes, wilson
from tests.conftest import ROOT, script_environment

PAIR = "plain", "runs/decayed"


@pytest.fixture
def votes(tmp_path: Path) -> Votes:
    return Votes(tmp_path / "runs")


def ask(votes: Votes, seed: int = 0, voter: str = "anna", pair: tuple[str, str] = PAIR, **recipe: object):
    return votes.new_ballot(pair, {"seed": seed, "label": None, "sampler": "euler", "steps": 20, **recipe}, voter)


def cast_for(votes: Votes, winner: str, **recipe: object) -> None:
    """A vote for the checkpoint of that name, on whichever side it is."""
    ballot = ask(votes, **recipe)
    choice = {PAIR[ballot.left]: LEFT, PAIR[ballot.right]: RIGHT}.get(winner, winner)
    assert votes.vote(ballot.id, choice).winner == winner


def test_a_vote_reveals_what_was_on_which_side(votes: Votes) -> None:
    for seed, choice in enumerate(CHOICES):
        ballot = ask(votes, seed)
        assert {ballot.left, ballot.right} == {0, 1}
        vote = votes.vote(ballot.id, choice)
        assert (vote.left, vote.right) == (PAIR[ballot.left], PAIR[ballot.right])
        assert vote.winner == {LEFT: vote.left, RIGHT: vote.right}.get(choice, choice)


def test_sides_are_drawn_for_every_ballot_and_its_number_tells_nothing(votes: Votes) -> None:
    ballots = [ask(votes, seed) for seed in range(120)]
    assert 30 < sum(ballot.left for ballot in ballots) < 90  # a fair coin fails here once in 10^7
    assert len({ballot.id for ballot in ballots}) == 120
    assert not any(name in str(asdict(ballot)) for ballot in ballots for name in PAIR)


def test_a_double_click_is_one_vote_and_a_change_of_mind_none(votes: Votes) -> None:
    ballot = ask(votes)
    first = votes.vote(ballot.id, LEFT)
    assert votes.vote(ballot.id, LEFT) == first
    with pytest.raises(ValueError, match=r"vote is cast \(left\)"):
        votes.vote(ballot.id, RIGHT)
    assert [tally.decided for tally in votes.tallies()] == [1]


def test_a_voter_is_asked_once_about_the_same_pictures(votes: Votes) -> None:
    in_two_windows = [ask(votes, 1, label=3), ask(votes, 1, label=3, steps=50), ask(votes, 1, label=3, pair=PAIR[::-1])]
    votes.vote(in_two_windows[0].id, TIE)
    for ballot in in_two_windows[1:]:
        with pytest.raises(ValueError, match="you have voted on these pictures"):
            votes.vote(ballot.id, TIE)
    with pytest.raises(ValueError, match="you have voted on these pictures"):
        ask(votes, 1, label=3, pair=PAIR[::-1])
    votes.vote(ask(votes, 2).id, TIE)
    with pytest.raises(ValueError, match="you have voted"):  # no label is a label as any other
        ask(votes, 2)
    for other in (dict(voter="ben", label=3), dict(label="3"), dict(label=4), dict(pair=("plain", "third"), label=3)):
        votes.vote(ask(votes, 1, **other).id, TIE)
    assert sum(tally.ties for tally in votes.tallies()) == 6


def test_tallies_count_what_was_said_whichever_side_it_was_on(votes: Votes) -> None:
    assert votes.tallies() == [] and not votes.path.exists(), "looking made a file"
    outcomes = ["plain"] * 5 + ["runs/decayed"] * 9 + [TIE] * 4 + [BOTH_BAD] * 7
    for seed, winner in enumerate(outcomes):
        cast_for(votes, winner, seed=seed)
    votes.vote(ask(votes, pair=("other", "plain")).id, TIE)
    tally, other = votes.tallies()
    assert tally == Tally("plain", "runs/decayed", 5, 9, 4, 7)
    assert (other.first, other.second, other.ties) == ("other", "plain", 1)
    assert tally.win_rate == pytest.approx((5 + 2) / 18)
    assert Tally("a", "b").interval is None
    assert Tally("a", "b", both_bad=3).win_rate is None


@pytest.mark.parametrize("wins, number", [(0, 1), (1, 1), (5, 10), (7, 18), (40, 40), (313, 1000)])
def test_the_interval_is_wilsons(wins: int, number: int) -> None:
    expected = binomtest(wins, number).proportion_ci(method="wilson")
    assert wilson(wins / number, number) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert Tally("a", "b", wins, number - wins).interval == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_table_for_download(votes: Votes) -> None:
    nasty = 'a "class", =1+1\nof two lines'
    cast_for(votes, "plain", seed=3, label=nasty)
    cast_for(votes, TIE, seed=2**63 - 1, label="=HYPERLINK(1)")
    cast_for(votes, BOTH_BAD, seed=4)
    first, second, third = csv.DictReader(io.StringIO(votes.to_csv()))
    assert (first["winner"], first["label"], first["seed"]) == ("plain", nasty, "3")
    assert json.loads(first["recipe"]) == {"seed": 3, "label": nasty, "sampler": "euler", "steps": 20}
    assert {first["shown_left"], first["shown_right"]} == set(PAIR) and first["cast_at"].endswith("+00:00")
    assert (second["label"], second["seed"]) == ("'=HYPERLINK(1)", str(2**63 - 1)), "a spreadsheet would run it"
    assert third["label"] == "" and third["choice"] == BOTH_BAD
    assert "anna" not in votes.to_csv() and b"anna" not in votes.path.read_bytes(), "a session can be taken over"
    assert Votes(votes.path.parent / "none").to_csv().count("\n") == 1


CIRCLE: dict = {"seed": 1}
CIRCLE["self"] = CIRCLE


@pytest.mark.parametrize(
    "pair, recipe, voter",
    [
        ((("a", "a")), {"seed": 1}, "x"),
        (("a",), {"seed": 1}, "x"),
        ("ab", {"seed": 1}, "x"),
        (None, {"seed": 1}, "x"),
        (("a", None), {"seed": 1}, "x"),
        (("a", "b\0"), {"seed": 1}, "x"),
        (("a", ""), {"seed": 1}, "x"),
        (("a", "\ud800"), {"seed": 1}, "x"),
        (("a", "b" * 10_000), {"seed": 1}, "x"),
        (("a", "b"), None, "x"),
        (("a", "b"), {}, "x"),
        (("a", "b"), {"seed": -1}, "x"),
        (("a", "b"), {"seed": 2**63}, "x"),
        (("a", "b"), {"seed": True}, "x"),
        (("a", "b"), {"seed": "1; DROP TABLE votes"}, "x"),
        (("a", "b"), {"seed": 1.5}, "x"),
        (("a", "b"), {"seed": 1, "label": ["x"]}, "x"),
        (("a", "b"), {"seed": 1, "guidance_scale": float("nan")}, "x"),
        (("a", "b"), {"seed": 1, "path": Path()}, "x"),
        (("a", "b"), {"seed": 1, "more": "x" * MAX_RECIPE}, "x"),
        (("a", "b"), {"seed": 1, "more": 10**5000}, "x"),
        (("a", "b"), CIRCLE, "x"),
        (("a", "b"), {"seed": 1}, None),
        (("a", "b"), {"seed": 1}, ""),
        (("a", "b"), {"seed": 1}, "x" * 10_000),
    ],
)
def test_hostile_ballots_get_one_line(votes: Votes, pair: object, recipe: object, voter: object) -> None:
    with pytest.raises(ValueError) as error:
        votes.new_ballot(pair, recipe, voter)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert type(error.value) is ValueError


@pytest.mark.parametrize("choice", ["", "LEFT", "plain", None, 1, ["left"], "left\0"])
def test_hostile_choices_get_one_line(votes: Votes, choice: object) -> None:
    ballot = ask(votes)
    with pytest.raises(ValueError, match="a vote is one of left, right, tie, both bad"):
        votes.vote(ballot.id, choice)
    assert votes.tallies() == []


@pytest.mark.parametrize("number", ["unknown", "", "x" * 10_000, None, 7, b"x", "' OR 1=1 --", "\ud800"])
def test_hostile_numbers_of_ballots_get_one_line(votes: Votes, number: object) -> None:
    ask(votes)
    with pytest.raises(ValueError, match="ballot"):
        votes.vote(number, LEFT)
    assert votes.tallies() == []


def test_old_ballots_without_a_vote_are_forgotten(votes: Votes) -> None:
    used, unused = ask(votes, 1), ask(votes, 2)
    votes.vote(used.id, TIE)
    with sqlite3.connect(votes.path) as base:
        base.execute("UPDATE ballots SET created = created - ?", (UNUSED_S + 1,))
    base.close()
    ask(votes, 3)
    with pytest.raises(ValueError, match="older than a day"):
        votes.vote(unused.id, TIE)
    assert votes.vote(used.id, TIE).winner == TIE and votes.to_csv().count("\n") == 2


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0" + b"x" * 5000])
def test_a_damaged_file_is_told_in_one_line(votes: Votes, content: bytes) -> None:
    votes.path.parent.mkdir()
    votes.path.write_bytes(content)
    for use in (lambda: ask(votes), votes.tallies, votes.to_csv, lambda: votes.vote("x", LEFT)):
        with pytest.raises(ValueError, match=f"{VOTES} cannot be read"):
            use()


def test_a_file_of_another_version_stays_untouched(votes: Votes) -> None:
    ask(votes)
    with sqlite3.connect(votes.path) as base:
        base.execute("PRAGMA user_version = 2")
    base.close()
    with pytest.raises(ValueError, match="another version"):
        ask(votes)


def test_threads_that_click_at_once_cast_one_vote(votes: Votes) -> None:
    ballots = [ask(votes, seed) for seed in range(3)]
    rivals = [ask(votes, 9) for _ in range(8)]  # the same pictures in eight windows

    def click(ballot_id: str) -> bool:
        try:
            votes.vote(ballot_id, LEFT)
            return True
        except ValueError as error:
            assert "you have voted" in str(error)
            return False

    with ThreadPoolExecutor(8) as pool:
        clicks = list(pool.map(click, [ballot.id for ballot in ballots] * 8))
        windows = list(pool.map(click, [ballot.id for ballot in rivals]))
    assert all(clicks) and windows.count(True) == 1
    assert sum(tally.decided for tally in votes.tallies()) == 4


PROCESS = """
import sys
from pathlib import Path
from app.votes import Votes
votes, voter = Votes(Path(sys.argv[1])), sys.argv[2]
for seed in range(int(sys.argv[3])):
    ballot = votes.new_ballot(("plain", "runs/decayed"), {"seed": seed}, voter)
    votes.vote(ballot.id, "tie")
    print(seed, flush=True)
"""


def vote_in_process(votes: Votes, voter: str, times: int) -> subprocess.Popen:
    command = [sys.executable, "-c", PROCESS, votes.path.parent, voter, times]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*map(str, command)], cwd=ROOT, env=script_environment(), **pipes)


def test_processes_that_begin_at_once_lose_no_vote(votes: Votes) -> None:
    processes = [vote_in_process(votes, f"voter {i}", 20) for i in range(6)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert [tally.ties for tally in votes.tallies()] == [120]
    with sqlite3.connect(votes.path) as base:
        assert base.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    base.close()


def test_killing_a_voter_loses_no_vote_that_was_answered(votes: Votes) -> None:
    process = vote_in_process(votes, "doomed", 100_000)
    answered = [process.stdout.readline() for _ in range(10)]
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    answered += process.stdout.readlines()
    process.communicate()
    assert 0 <= sum(tally.ties for tally in votes.tallies()) - len(answered) <= 1  # the last one may have been kept, but not yet told
    votes.vote(ask(votes, voter="next").id, LEFT)
    with sqlite3.connect(votes.path) as base:
        assert base.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    base.close()
