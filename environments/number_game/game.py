"""The rules of the number game, as a pure state machine: a state, a guess, the next state."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

WIN_SHARE = 0.5
"""Of the reward; the rest is for narrowing the range down."""
_GUESS = re.compile(r"-?[0-9]{1,9}")


@dataclass(frozen=True)
class Game:
    """What is hidden, and what the player can know of it: low <= secret <= high."""

    secret: int
    largest: int
    max_guesses: int
    low: int
    high: int
    guesses: int = 0
    status: Literal["open", "won", "lost"] = "open"


@dataclass(frozen=True)
class Turn:
    """What a guess leads to."""

    game: Game
    answer: str
    """For the player to read; empty when the game is over."""
    reward: float
    """Of this guess. Those of a whole game add up to at most 1."""


def new_game(secret: int, largest: int, max_guesses: int) -> Game:
    """Nothing is guessed yet.

    Args:
        secret: from 1 to largest.
    """
    return Game(secret, largest, max_guesses, low=1, high=largest)


def play(game: Game, text: str) -> Turn:
    """The turn that a reply makes; the last number in it is the guess. A reply without a number costs a guess too."""
    guess = read_guess(text)
    after = replace(_narrowed(game, guess), guesses=game.guesses + 1)
    if guess == game.secret:
        after = replace(after, status="won")
    elif after.guesses == game.max_guesses:
        after = replace(after, status="lost")
    return Turn(after, _answer(after, guess), _progress(game, after) + WIN_SHARE * (after.status == "won"))


def read_guess(text: str) -> int | None:
    """The last whole number of a text; None when there is none."""
    numbers = _GUESS.findall(text)
    return int(numbers[-1]) if numbers else None


def _narrowed(game: Game, guess: int | None) -> Game:
    if guess is None:
        return game
    if guess == game.secret:
        return replace(game, low=guess, high=guess)
    if guess < game.secret:
        return replace(game, low=max(game.low, guess + 1))
    return replace(game, high=min(game.high, guess - 1))


def _progress(before: Game, after: Game) -> float:
    """Share of the bits of the whole range that the guess has told."""
    if before.largest == 1:
        return 0.0
    bits = math.log2((before.high - before.low + 1) / (after.high - after.low + 1))
    return (1 - WIN_SHARE) * bits / math.log2(before.largest)


def _answer(after: Game, guess: int | None) -> str:
    if after.status != "open":
        return ""
    hint = "That is no number." if guess is None else "Higher." if guess < after.secret else "Lower."
    left = after.max_guesses - after.guesses
    return f"{hint} {left} {'guess' if left == 1 else 'guesses'} left."
