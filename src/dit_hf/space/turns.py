"""Who generates next: turns go round the addresses, and round the sessions of each."""

from collections import deque
from collections.abc import Iterable, Iterator


# Sets of one session that wait at the same time; the page itself asks for one.
MAX_WAITING = 4


class Turn:
    """
    A set of images that waits for its turn, or has it.

    Args:
        address (`str`): Of the client.
        session (`str`): One page, or one program, of the client.
    """

    def __init__(self, address: str, session: str):
        self.address, self.session = address, session


class Turns:
    """
    A bounded queue that no client can hold: one set is generated at a time, and the next one is of another address, if
    one waits, and there of another session. Half of the places at most are one address's. Used by one thread.

    Args:
        size (`int`): Sets that may wait.
    """

    def __init__(self, size: int):
        self.size = size
        self._current: Turn | None = None
        # By address and session, in the order in which they are served next.
        self._waiting: dict[str, dict[str, deque[Turn]]] = {}
        # How many are generated before each; asked for much more often than it changes.
        self._places: dict[Turn, int] = {}

    def join(self, address: str, session: str) -> Turn:
        """
        Queues a set.

        Args:
            address, session (`str`): The client.

        Returns:
            `Turn`: to be given back with `leave`.

        Raises:
            ValueError: if too many sets wait, of this client or in all.
        """
        turn = Turn(address, session)
        if self._current is None:
            self._current = turn
            self._count()
            return turn
        if len(self._places) > self.size:
            raise ValueError("The queue is full; try again later.")
        sessions = self._waiting.get(address, {})
        if len(sessions.get(session, ())) >= MAX_WAITING:
            raise ValueError(f"{MAX_WAITING} of your sets wait already; wait for one, or cancel them.")
        if sum(map(len, sessions.values())) >= max(1, self.size // 2):
            raise ValueError("Too many sets of your address wait already; try again later.")
        self._waiting.setdefault(address, {}).setdefault(session, deque()).append(turn)
        self._postpone(self._current)
        self._count()
        return turn

    def before(self, turn: Turn) -> int:
        """
        The number of sets that are generated before this one.

        Args:
            turn (`Turn`): From `join`.

        Returns:
            `int`: 0 if it has its turn.
        """
        return self._places[turn]

    def leave(self, turn: Turn) -> None:
        """
        Gives up a turn, or the place in the queue.

        Args:
            turn (`Turn`): From `join`.
        """
        if turn not in self._places:
            return
        if turn is not self._current:
            self._remove(turn)
        elif (following := next((other for other, place in self._places.items() if place == 1), None)) is None:
            self._current = None
        else:
            self._current = following
            self._remove(following)
            self._postpone(following)
        self._count()

    def _count(self):
        waiting = alternate(list(alternate(sessions.values())) for sessions in self._waiting.values())
        current = [] if self._current is None else [self._current]
        self._places = {turn: place for place, turn in enumerate([*current, *waiting])}

    def _remove(self, turn):
        sessions = self._waiting[turn.address]
        sessions[turn.session].remove(turn)
        if not sessions[turn.session]:
            del sessions[turn.session]
        if not sessions:
            del self._waiting[turn.address]

    def _postpone(self, turn):
        """The client that has its turn comes last of those that wait."""
        if sessions := self._waiting.pop(turn.address, None):
            if queue := sessions.pop(turn.session, None):
                sessions[turn.session] = queue
            self._waiting[turn.address] = sessions


def alternate(queues: Iterable[Iterable[Turn]]) -> Iterator[Turn]:
    """One of each queue, then the second of each, and so on."""
    iterators = [iter(queue) for queue in queues]
    while iterators:
        for iterator in list(iterators):
            try:
                yield next(iterator)
            except StopIteration:
                iterators.remove(iterator)
