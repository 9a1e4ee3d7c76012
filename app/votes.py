"""Blind votes: which of two checkpoints drew better, asked without telling which is which.

They live in one SQLite file in the folder of the runs. The server draws the sides and keeps them; what a visitor holds before the
vote is a ballot's number and pictures.
"""

import csv
import hashlib
import io
import json
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from typing import Any

from filelock import FileLock

VOTES = "votes.sqlite"
LEFT, RIGHT, TIE, BOTH_BAD = CHOICES = ("left", "right", "tie", "both bad")
BUSY_S = 20.0  # how long a writer waits for the others
UNUSED_S = 24 * 3600.0  # a ballot without a vote is forgotten after that
MAX_NAME, MAX_RECIPE = 300, 4000  # characters
VERSION = 1  # of the tables
# `seed` and `label` have columns of their own because a voter is asked once for each; labels are JSON, as NULL equals nothing
TABLES = """
CREATE TABLE ballots (
    id TEXT PRIMARY KEY, created REAL NOT NULL, voter TEXT NOT NULL, shown_left TEXT NOT NULL, shown_right TEXT NOT NULL,
    seed INTEGER NOT NULL, label TEXT NOT NULL, recipe TEXT NOT NULL
);
CREATE INDEX ballots_created ON ballots (created);
CREATE TABLE votes (
    ballot TEXT PRIMARY KEY REFERENCES ballots (id), cast_at REAL NOT NULL, voter TEXT NOT NULL,
    first TEXT NOT NULL, second TEXT NOT NULL, seed INTEGER NOT NULL, label TEXT NOT NULL,
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'tie', 'both bad')), winner TEXT NOT NULL,
    CHECK (first < second), UNIQUE (voter, first, second, seed, label)
);
CREATE INDEX votes_pair ON votes (first, second);
"""
ASKED = "you have voted on these pictures; take another seed or label"
COLUMNS = ("cast_at", "first", "second", "winner", "choice", "shown_left", "shown_right", "seed", "label", "voter", "recipe")


@dataclass(frozen=True)
class Ballot:
    """A question to one voter. The visitor may see `id` and the pictures, in this order, and nothing else.

    Attributes:
        id: to vote with.
        left, right: which of the pair, 0 or 1, is shown there.
    """

    id: str
    left: int
    right: int


@dataclass(frozen=True)
class Vote:
    """A vote that was cast, and what it reveals.

    Attributes:
        choice: one of `CHOICES`.
        left, right: the names of the checkpoints.
        winner: the name of the better one; else "tie" or "both bad".
    """

    choice: str
    left: str
    right: str
    winner: str


@dataclass(frozen=True)
class Tally:
    """The votes on a pair.

    Attributes:
        first, second: names of the checkpoints.
        first_wins, second_wins, ties, both_bad: how many votes said so.
    """

    first: str
    second: str
    first_wins: int = 0
    second_wins: int = 0
    ties: int = 0
    both_bad: int = 0

    @property
    def decided(self) -> int:
        """Votes that the win rate rests on: all but "both bad"."""
        return self.first_wins + self.second_wins + self.ties

    @property
    def win_rate(self) -> float | None:
        """Share of the votes for the first; a tie counts as half a vote for each, "both bad" is left out. None without votes."""
        return (self.first_wins + self.ties / 2) / self.decided if self.decided else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Wilson interval of the win rate; ties as halves vary less than it assumes, so it is rather too wide."""
        return None if self.win_rate is None else wilson(self.win_rate, self.decided)


def wilson(share: float, number: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a binomial share of `number` > 0 draws (Wilson, JASA 22, 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = share + z * z / (2 * number)
    half = z * ((share * (1 - share) + z * z / (4 * number)) / number) ** 0.5
    scale = 1 + z * z / number
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


class Votes:
    """The votes in a folder of runs. Any number of threads and processes may use it at once."""

    def __init__(self, runs: Path) -> None:
        self.path = runs / VOTES

    def new_ballot(self, pair: tuple[str, str], recipe: dict[str, Any], voter: str) -> Ballot:
        """Ask a voter about a pair; the sides are drawn here.

        Args:
            pair: names of two checkpoints, as they shall stand in the results: one that goes on training needs its step in the name.
            recipe: what the pictures are made of, for the export; its "seed" and "label" (or none) say which pictures they are.
            voter: id of the session; kept as a hash.

        Raises:
            ValueError: input that does not fit, or this voter has voted on the pair with that seed and label.
        """
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError("a ballot needs two checkpoints")
        names = [_text("the name of a checkpoint", name) for name in pair]
        first, second = sorted(names)
        if first == second:
            raise ValueError(f"{first} cannot be compared with itself; choose two checkpoints")
        seed, label, recipe_json = _recipe(recipe)
        voter = _hash(voter)
        left = secrets.randbelow(2)
        ballot = Ballot(secrets.token_urlsafe(16), left, 1 - left)
        with self._transaction() as base:
            known = "SELECT 1 FROM votes WHERE (voter, first, second, seed, label) = (?, ?, ?, ?, ?)"
            if base.execute(known, (voter, first, second, seed, label)).fetchone():
                raise ValueError(ASKED)
            unused = "DELETE FROM ballots WHERE created < ? AND id NOT IN (SELECT ballot FROM votes)"
            base.execute(unused, (time.time() - UNUSED_S,))
            row = (ballot.id, time.time(), voter, names[left], names[1 - left], seed, label, recipe_json)
            base.execute("INSERT INTO ballots VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        return ballot

    def vote(self, ballot_id: str, choice: str) -> Vote:
        """Cast the vote of a ballot. The same once more (a double click) is still one vote, and gets the same answer.

        Raises:
            ValueError: there is no such ballot or choice, the ballot's vote was another, or this voter has voted on these pictures.
        """
        if not isinstance(choice, str) or choice not in CHOICES:
            raise ValueError(f"a vote is one of {', '.join(CHOICES)}")
        ballot_id = _text("the number of a ballot", ballot_id)
        with self._transaction() as base:
            question = "SELECT voter, shown_left, shown_right, seed, label FROM ballots WHERE id = ?"
            ballot = base.execute(question, (ballot_id,)).fetchone()
            if ballot is None:
                raise ValueError("there is no such ballot, or it is older than a day; ask for a new one")
            voter, left, right, seed, label = ballot
            winner = {LEFT: left, RIGHT: right}.get(choice, choice)
            first, second = sorted((left, right))
            row = (ballot_id, time.time(), voter, first, second, seed, label, choice, winner)
            try:
                base.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            except sqlite3.IntegrityError:
                cast = base.execute("SELECT choice FROM votes WHERE ballot = ?", (ballot_id,)).fetchone()
                if cast is None:
                    raise ValueError(ASKED) from None
                if cast[0] != choice:
                    raise ValueError(f"this ballot's vote is cast ({cast[0]}); ask for a new one") from None
        return Vote(choice, left, right, winner)

    def tallies(self) -> list[Tally]:
        """All pairs that were voted on, most votes first; the names of each in alphabetical order."""
        counts = ", ".join(f"SUM(winner = {winner})" for winner in ("first", "second", "'tie'", "'both bad'"))
        return [Tally(*row) for row in self._rows(f"SELECT first, second, {counts} FROM votes GROUP BY 1, 2 ORDER BY COUNT(*) DESC, 1, 2")]

    def to_csv(self) -> str:
        """All votes, oldest first, with a line of titles; times are UTC."""
        table = io.StringIO(newline="")
        lines = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        lines.writeheader()
        joined = "votes JOIN (SELECT id, shown_left, shown_right, recipe FROM ballots) ON id = ballot"
        for values in self._rows(f"SELECT {', '.join(COLUMNS)} FROM {joined} ORDER BY cast_at, id"):
            row = dict(zip(COLUMNS, values, strict=True))
            label = json.loads(row["label"])
            row |= {"cast_at": datetime.fromtimestamp(row["cast_at"], UTC).isoformat(), "label": "" if label is None else label}
            lines.writerow({name: _harmless(value) for name, value in row.items()})
        return table.getvalue()

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        if not self.path.is_file():  # looking makes no file
            return []
        with self._connection() as base:
            return base.execute(query).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection that may write; what the block did is kept if it ends well, else nothing of it."""
        with self._connection() as base:
            base.execute("BEGIN IMMEDIATE")  # a reader that turns writer would not wait for others
            with base:
                yield base

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(self._connect()) as base:
                yield base
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"the votes in {self.path} cannot be read or written ({error}); see that it is whole and writable") from error

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        base = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        try:
            base.execute("PRAGMA foreign_keys = ON")
            version = _version(base)
            if version == 0:
                # the switch to WAL does not wait for others by itself
                with FileLock(f"{self.path}.lock", timeout=BUSY_S):
                    if (version := _version(base)) == 0:
                        base.execute("PRAGMA journal_mode = WAL")
                        base.executescript(f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
                        version = VERSION
            if version != VERSION:
                raise ValueError(f"{self.path} was written by another version of the page ({version}, this one is {VERSION}); move it away")
        except BaseException:
            base.close()
            raise
        return base


def _version(base: sqlite3.Connection) -> int:
    return base.execute("PRAGMA user_version").fetchone()[0]


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME or not value.isprintable():
        raise ValueError(f"{what} must be printable text of 1 to {MAX_NAME} characters")
    return value


def _recipe(recipe: Any) -> tuple[int, str, str]:
    """Seed, label and the whole as JSON."""
    if not isinstance(recipe, dict):
        raise ValueError("a recipe must be a table with at least a seed")
    seed, label = recipe.get("seed"), recipe.get("label")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError("the seed of a recipe must be a whole number from 0 to 2^63 - 1")
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise ValueError("the label of a recipe must be a name, a number or none")
    try:
        text = json.dumps(recipe, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("a recipe must be made of names, numbers and lists of them") from None
    if len(text) > MAX_RECIPE:
        raise ValueError(f"a recipe must have at most {MAX_RECIPE:,} characters; this one has {len(text):,}")
    return seed, json.dumps(label), text


def _hash(voter: Any) -> str:
    """Tells voters apart, and opens no session to who reads the file."""
    return hashlib.sha256(_text("the id of a voter", voter).encode()).hexdigest()[:16]


def _harmless(value: Any) -> Any:
    """Spreadsheets run text that begins like a formula; an apostrophe stops them."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
