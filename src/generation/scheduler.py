"""Who runs: requests wait, have their prompts read in chunks, and run until they end.

No tensor, no device: decisions in plain numbers, the same on every rank of a model. The cache's
pages are given out here. When they run short, the youngest request gives its own back and waits;
what it has said so far stays, and is read again together with its prompt.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from torch import Tensor

from src.generation.cache import PAGE, pages_for

READ_ALONE = 16384  # tokens of prompts in one forward, when nobody waits for what runs
READ_BESIDE = {"cpu": 128, "cuda": 2048}  # and beside what somebody waits for, by device
# Tokens before it from which on a token takes about twice as long to read, three times at twice as
# many, and so on: its attention.
FAR = {"cpu": 1024, "cuda": 16384}
SHARE_TO_ADMIT = 16  # a forward for prompts is worth it once this part of the slots is free,
PATIENCE = 8  # or after so many steps


@dataclass(eq=False)
class Request:
    """A prompt that wants a response.

    limit: new tokens at most; sample: with the seed, fixes what is drawn; name: the caller's.
    """

    prompt: list[int]
    limit: int
    sample: int
    name: int = 0
    # The response so far, and in the end why it ended: "stop" or "length".
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    stop_reason: str = ""
    # While it runs: its slot; its pages, and how many tokens these hold once all is done that was
    # started; how many tokens it had when it got them; its place in the order of coming.
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    resumed_at: int = 0
    turn: int = -1
    # Those with the same text, which take over its pages when it has been read.
    followers: list["Request"] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        """What has to be read before the next token."""
        return self.prompt + self.tokens


class Pages:
    """Which pages of the cache are free, and who else has one. Page 0 is never given out.

    A page that holds a part of a text is known by the page before it and its own tokens, so that
    another text that begins alike finds it.
    """

    def __init__(self, n: int) -> None:
        self.free = list(range(n - 1, 0, -1))
        self.users = [0] * n
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}

    def take(self) -> int:
        page = self.free.pop()
        self.users[page] = 1
        return page

    def share(self, page: int) -> int:
        self.users[page] += 1
        return page

    def release(self, pages: list[int]) -> None:
        # The last first, so that a text's pages are given out again in their order.
        for page in reversed(pages):
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)
                if page in self._keys:
                    del self._known[self._keys.pop(page)]

    def found(self, text: list[int], root: int) -> list[int]:
        """The pages that hold the beginning of the text, but for its last token."""
        pages, before = [], root
        for start in range(0, len(text) - PAGE, PAGE):
            page = self._known.get((before, tuple(text[start : start + PAGE])))
            if page is None:
                break
            pages.append(page)
            before = page
        return pages

    def register(self, pages: list[int], text: list[int], first: int, root: int) -> None:
        """Make known the whole pages of the text, from the `first` on."""
        for i in range(first, len(text) // PAGE):
            key = pages[i - 1] if i else root, tuple(text[i * PAGE : (i + 1) * PAGE])
            if key not in self._known and pages[i] not in self._keys:
                self._known[key] = pages[i]
                self._keys[pages[i]] = key


@dataclass
class Reading:
    """One forward over prompts.

    pieces: (request, first token, token after the last); read: those whose text is then whole, each
    with the number of its piece, or of the one whose text is the same; copies: pages that are to be
    copied afterwards, (from, to).
    """

    pieces: list[tuple[Request, int, int]] = field(default_factory=list)
    read: list[tuple[Request, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class Scheduler:
    """The requests of one model, and the slots and pages that they have."""

    def __init__(
        self,
        slots: int,
        pages: int,
        device: str = "cpu",
        by_length: bool = False,
        whole: bool = False,
        in_a_hurry: bool = False,
    ) -> None:
        """by_length: what a page holds depends on the length of the prompt that it belongs to.

        whole: texts are read whole, each by itself, so that its numbers depend on nothing else;
        in_a_hurry: what runs is not to wait long for others' prompts.
        """
        self.whole = whole
        self.slots, self.free_slots = slots, list(range(slots - 1, -1, -1))
        self.pages, self.by_length = Pages(pages), by_length
        self.beside = READ_BESIDE[device] if in_a_hurry else READ_ALONE
        self.far = FAR[device]
        self.waiting: deque[Request] = deque()
        self.reading: list[Request] = []
        self.running: list[Request] = []  # in the order in which they came
        self.assigned: list[tuple[int, int, int]] = []  # (slot, place in its table, page), new ones
        self.preempted = 0  # how often a request had to give its pages back
        self._turns, self._waited = 0, 0

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.reading or self.running)

    def read(self) -> Reading:
        """What of the prompts to read now, within the budget; new requests get slots and pages."""
        reading = Reading()
        budget = self.beside if self.running else READ_ALONE
        whole: dict[tuple[int, ...], tuple[Request, int]] = {}  # texts that are whole after this
        for request in [*self.reading]:
            budget = self._read_on(request, budget, reading, whole)
        if self._is_time():
            while self.waiting and self.free_slots:
                request = self.waiting[0]
                leader = self._same_text(request, whole)
                # Who goes on from what another one reads costs nothing.
                if leader is None and budget <= 0 or not self._admit(request, leader):
                    break
                self.waiting.popleft()
                if leader is None:
                    budget = self._read_on(request, budget, reading, whole)
        for leader, piece in whole.values():
            self._share_out(leader, piece, reading)
        return reading

    def _is_time(self) -> bool:
        """Whether to take in more now: a few at a time, since what runs waits for them."""
        self._waited += bool(self.waiting and self.free_slots)
        enough = max(1, min(self.slots // SHARE_TO_ADMIT, len(self.waiting)))
        nothing_else = not self.running and not self.reading
        is_time = nothing_else or len(self.free_slots) >= enough or self._waited >= PATIENCE
        if is_time:
            self._waited = 0
        return is_time

    def _same_text(
        self, request: Request, whole: dict[tuple[int, ...], tuple[Request, int]]
    ) -> Request | None:
        """Who is being read now and has the same text."""
        text = request.text
        root = self._root(request)
        found = whole.get((root, *text))
        if found is not None:
            return found[0]
        return next((r for r in self.reading if r.text == text and self._root(r) == root), None)

    def _admit(self, request: Request, leader: Request | None) -> bool:
        """Give it a slot and the pages of its text, if there are so many."""
        text = request.text
        if leader is None:
            shared = [] if self.whole else self.pages.found(text, self._root(request))
            needed = pages_for(len(text)) - len(shared)
        else:
            shared, needed = [], int(len(text) % PAGE > 0)  # the last page, which it will write on
        # Those that have a slot may need a page each for their next token.
        reserve = self.slots - len(self.free_slots)
        if needed + reserve > len(self.pages.free):
            return False
        request.slot, request.turn = self.free_slots.pop(), self._turns
        request.resumed_at = len(request.tokens)
        self._turns += 1
        request.pages = [self.pages.share(page) for page in shared]
        request.pages += [self.pages.take() for _ in range(needed)]
        request.cached = len(shared) * PAGE
        if leader is None:
            self.reading.append(request)
            self._assign(request, 0)
        else:
            leader.followers.append(request)
        return True

    def _read_on(
        self,
        request: Request,
        budget: int,
        reading: Reading,
        whole: dict[tuple[int, ...], tuple[Request, int]],
    ) -> int:
        """The next piece of its text, if the budget allows; what is left of that."""
        text, start = request.text, request.cached
        if budget <= 0:
            return budget
        cost = 1 + start // self.far  # of a token
        stop = len(text) if self.whole else min(len(text), start + max(1, budget // cost))
        reading.pieces.append((request, start, stop))
        request.cached = stop
        self.pages.register(request.pages, text[:stop], start // PAGE, self._root(request))
        if stop == len(text):
            whole[(self._root(request), *text)] = request, len(reading.pieces) - 1
            self.reading.remove(request)
        return budget - (stop - start) * cost

    def _share_out(self, leader: Request, piece: int, reading: Reading) -> None:
        """The leader's pages to its followers, and all of them to what runs."""
        full = len(leader.text) // PAGE
        for request in leader.followers:
            last = request.pages  # of its own, for the rest of the text
            if last:
                reading.copies.append((leader.pages[full], last[0]))
            request.pages = [self.pages.share(page) for page in leader.pages[:full]] + last
            request.cached = leader.cached
            self._assign(request, 0)
        together = [leader, *leader.followers]
        leader.followers = []
        self.running += together
        self.running.sort(key=lambda request: request.turn)
        reading.read += [(request, piece) for request in together]

    def _root(self, request: Request) -> int:
        return -1 - len(request.prompt) if self.by_length else -1

    def _assign(self, request: Request, first: int) -> None:
        self.assigned += [
            (request.slot, i, request.pages[i]) for i in range(first, len(request.pages))
        ]

    def lacks_pages(self) -> bool:
        """Whether the next tokens of all that runs need more pages than are free."""
        return sum(map(self._needs_page, self.running)) > len(self.pages.free)

    def grow(self) -> None:
        """Room for the next token of all that runs."""
        for request in self.running:
            if self._needs_page(request):
                request.pages.append(self.pages.take())
                self._assign(request, len(request.pages) - 1)
            request.cached += not self._is_full(request)

    def _is_full(self, request: Request) -> bool:
        """Whether it has all its tokens, which the host may not have heard yet."""
        return request.cached == len(request.prompt) + request.limit

    def _needs_page(self, request: Request) -> bool:
        return request.cached == len(request.pages) * PAGE and not self._is_full(request)

    def youngest(self) -> Request:
        """Who came last of those that have a slot."""
        return max(self._admitted(), key=lambda request: request.turn)

    def preempt(self, youngest: Request) -> None:
        """The youngest gives back what it has, and waits to be read again."""
        self._withdraw(youngest)
        self.waiting.appendleft(youngest)
        self.preempted += 1

    def begun(self) -> Iterator[Request]:
        """All that have said something."""
        resumable = takewhile(lambda request: request.tokens, self.waiting)
        yield from (request for request in (*self._admitted(), *resumable) if request.tokens)

    def remove(self, request: Request) -> None:
        """A request that ended, or that nobody wants any more."""
        if request.slot < 0:
            self.waiting.remove(request)
            return
        self._withdraw(request)
        # Who waited for its pages begins anew.
        for follower in reversed(request.followers):
            self._withdraw(follower)
            self.waiting.appendleft(follower)
        request.followers = []

    def _admitted(self) -> Iterator[Request]:
        yield from self.running
        for request in self.reading:
            yield request
            yield from request.followers

    def _withdraw(self, request: Request) -> None:
        self.pages.release(request.pages)
        self.free_slots.append(request.slot)
        request.pages, request.slot, request.cached = [], -1, 0
        for requests in (self.running, self.reading):
            if request in requests:
                requests.remove(request)
        for leader in self.reading:
            if request in leader.followers:
                leader.followers.remove(request)
