"""Requests that come, go and wait: each gets the answer that it has alone."""

import functools
import random
from collections import Counter

import pytest
import torch

from src.checkpoint.load import put
from src.generation import cache as cache_module
from src.generation import engine as engine_module
from src.generation import scheduler as scheduler_module
from src.generation.cache import PAGE, Cache, Chunk, pages_for
from src.generation.engine import Engine, Session, Stop
from src.generation.sampling import Sampling
from src.generation.scheduler import Pages, Request, Scheduler
from src.models.attention import Packed
from src.models.config import ModelConfig
from src.models.layout import tensor_table
from src.models.transformer import build

VOCABULARY, NEW, LONGEST = 61, 24, 120
STOPS = {7, 23}
SAMPLINGS = {
    "greedy": dict(temperature=0.0),
    "sampled": dict(temperature=1.0, seed=3),
    "cut off": dict(temperature=1.2, top_k=20, top_p=0.9, min_p=0.01, seed=4),
    "penalised": dict(temperature=1.0, repetition_penalty=1.3, min_new_tokens=4, seed=5),
}
RAGGED = [(i * 37 + 11) % 70 + 1 for i in range(20)]  # lengths of prompts


@functools.cache
@torch.no_grad()
def model_of(dtype=torch.float32, **changes):
    values = dict(n_layers=2, max_seq_len=256) | changes
    shape = dict(dim=16, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=24)
    config = ModelConfig(**shape, vocab_size=VOCABULARY, **values)
    model = build(config, 0, 1, dtype)
    model.stack_projections(torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for name, spec in tensor_table(config).items():
        shape = spec.local_shape(1)
        whole = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator)
        put(model, name, whole * (1.0 if len(shape) == 1 else 0.3), torch.device("cpu"))
    return model.eval().requires_grad_(False)


def prompt_of(i: int) -> list[int]:
    """Different beginnings, but for some: every third goes on from a common one, some are equal."""
    length, numbers = RAGGED[i], random.Random(i if i % 5 else 0)
    own = [numbers.randrange(VOCABULARY) for _ in range(length)]
    return ([5] * 20 + own[:50] if i % 3 == 0 else own)[:70]


def request_of(i: int) -> Request:
    return Request(prompt_of(i), 5 + (i * 13) % (NEW - 4), sample=i, name=i)


def text_of(tokens: list[int]) -> str:
    return "".join(f"<{token}>" for token in tokens)


def stop_of(strings: tuple[str, ...] = ()) -> Stop:
    return Stop(STOPS, strings, text_of)


def session_of(
    parallel, sampling, slots=4, pages=None, stop=None, delay=0, changes=(), **options
) -> Session:
    engine = Engine(model_of(**dict(changes)), parallel, slots, LONGEST)
    engine.delay = delay
    if pages is not None:
        engine.pages_that_fit = lambda wanted, least, besides: max(pages, least)
    drawn = Sampling(max_new_tokens=NEW, **sampling)
    return Session(engine, drawn, stop or stop_of(), slots, LONGEST, **options)


def answered(request: Request) -> tuple:
    return request.tokens, request.stop_reason


@pytest.fixture(scope="module")
def alone(parallel):
    """name of a sampling, request, strings → its answer in a session of its own."""

    @functools.cache
    def of(kind: str, i: int, strings: tuple[str, ...] = (), changes=()) -> Request:
        request = request_of(i)
        settings = dict(slots=1, stop=stop_of(strings), changes=changes)
        with session_of(parallel, SAMPLINGS[kind], **settings) as session:
            session.add(request)
            while not session.is_idle:
                session.step()
        return request

    return of


def assert_all_free(session: Session) -> None:
    """Every page and every slot came back, and no page is known any more."""
    scheduler = session.scheduler
    pages = scheduler.pages
    assert sorted(pages.free) == list(range(1, len(pages.users)))
    assert not any(pages.users) and not pages._known and not pages._keys
    assert sorted(scheduler.free_slots) == list(range(scheduler.slots))


def use_pages_of(tokens: int, monkeypatch) -> None:
    for module in (cache_module, scheduler_module):
        monkeypatch.setattr(module, "PAGE", tokens)


@pytest.mark.parametrize("part", range(10))
def test_random_schedules(parallel, alone, part, monkeypatch):
    """Arrivals, cancels, few slots, few pages, small budgets: 200 of them.

    In every twenty some have to wait for pages.
    """
    turns = range(20 * part, 20 * part + 20)
    assert sum(run_schedule(parallel, alone, turn, monkeypatch) for turn in turns) > 0


def run_schedule(parallel, alone, turn, monkeypatch) -> int:
    """How often a request had to give its pages back."""
    draw = random.Random(turn)
    use_pages_of(draw.choice([2, 4, 16]), monkeypatch)
    kind = draw.choice([*SAMPLINGS])
    strings = draw.choice([(), ("<3><", "<11>")])
    changes = draw.choice([(), (), (("sliding_window", 12),)])
    monkeypatch.setattr(scheduler_module, "READ_ALONE", draw.choice([7, 64, 16384]))
    monkeypatch.setitem(scheduler_module.READ_BESIDE, "cpu", draw.choice([3, 16, 128]))
    settings = dict(
        slots=draw.choice([1, 2, 5, 20]),
        pages=draw.choice([None, 1, 1, pages_for(LONGEST) + 3]),  # 1: as many as the longest fills
        delay=draw.choice([0, 1, 2]),
        stop=stop_of(strings),
        changes=changes,
    )
    coming = [request_of(i) for i in draw.choices(range(20), k=draw.choice([3, 8, 14]))]
    wanted, cancelled, given = list(coming), [], []
    with session_of(parallel, SAMPLINGS[kind], **settings) as session:
        steps = Counter()
        while coming or not session.is_idle:
            for _ in range(min(len(coming), draw.choice([0, 0, 1, 3]))):
                given.append(coming.pop())
                session.add(given[-1])
            step = session.step()
            steps.update(id(request) for request in step.new)
            if given and draw.random() < 0.03:
                request = draw.choice(given)
                session.cancel(request)
                if request.stop_reason == "cancelled":
                    cancelled.append(request)
        assert_all_free(session)
    for request in wanted:
        answer = alone(kind, request.name, strings, changes)
        if request in cancelled:
            surplus = len(request.tokens) - len(answer.tokens)
            assert surplus < (engine_module.LOOK_EVERY if strings else 1)
            assert all(ours == its for ours, its in zip(request.tokens, answer.tokens))
            continue
        assert answered(request) == answered(answer)
        torch.testing.assert_close(
            torch.tensor(request.logprobs), torch.tensor(answer.logprobs), atol=1e-5, rtol=0
        )
        # a stop string may have come before the session looked
        surplus = steps[id(request)] - len(request.tokens)
        assert 0 <= surplus < (engine_module.LOOK_EVERY if strings else 1)
    return session.scheduler.preempted


def test_no_request_is_lost_when_pages_run_out(parallel, alone, monkeypatch):
    """384 slots, long limits, and pages for the longest alone: the youngest wait."""
    use_pages_of(4, monkeypatch)
    requests = [request_of(i) for i in range(20)]
    with session_of(parallel, SAMPLINGS["sampled"], slots=384, pages=1) as session:
        for request in requests:
            session.add(request)
        in_order = []
        while not session.is_idle:
            in_order += session.step().ended
        assert session.scheduler.preempted > 0
        assert_all_free(session)
    assert in_order[0] is requests[0] or in_order[0].turn <= 4  # the old go first
    for request in requests:
        assert answered(request) == answered(alone("sampled", request.name))


def test_generate_says_that_the_cache_was_full(parallel, caplog):
    engine = Engine(model_of(), parallel, 384, LONGEST, kv_cache_gb=10 * page_bytes() / 1e9)
    prompts = [prompt_of(i) for i in range(20)]
    sampling = Sampling(max_new_tokens=NEW, **SAMPLINGS["sampled"])
    little = engine.generate(prompts, sampling, STOPS)
    assert "The cache was full" in caplog.text
    enough = Engine(model_of(), parallel, 384, LONGEST).generate(prompts, sampling, STOPS)
    assert [c.tokens for c in little] == [c.tokens for c in enough]


def page_bytes() -> int:
    return Cache.page_bytes(model_of())


def test_memory_grows_with_what_is_used(parallel):
    """Samples of one prompt share its whole pages; a late one finds them, too."""
    prompt = [(7 * i) % VOCABULARY for i in range(4 * PAGE + 3)]
    settings = dict(slots=8, pages=100, stop=Stop(set()))
    with session_of(parallel, SAMPLINGS["sampled"], **settings) as session:
        pages = session.scheduler.pages
        for i in range(6):
            session.add(Request(prompt, NEW, i, i))
        session.step()
        assert 100 - len(pages.free) == 4 + 6  # the last of each is its own
        late = Request(prompt, NEW, 6, 6)
        session.add(late)
        session.step()
        assert 100 - len(pages.free) == 4 + 7
        assert late.cached == len(prompt) + 1
        while not session.is_idle:
            session.step()
        assert_all_free(session)


def test_pages_of_prompts_that_begin_alike():
    pages = Pages(10)
    text = list(range(3 * PAGE))
    first = [pages.take() for _ in range(3)]
    pages.register(first, text, 0, root=-1)
    assert pages.found(text, root=-1) == first[:2]  # its last token has to be read in any case
    assert pages.found(text + [1], root=-1) == first
    assert pages.found(text[:PAGE] + [99] * PAGE + [1], root=-1) == first[:1]
    assert pages.found(text, root=-5) == []
    shared = [pages.share(page) for page in pages.found(text, root=-1)]
    pages.release(first)
    assert pages.found(text + [1], root=-1) == shared  # still known: somebody has them
    pages.release(shared)
    assert pages.found(text + [1], root=-1) == [] and len(pages.free) == 9


def test_dynamic_ntk_shares_no_pages_among_lengths(parallel):
    """A Qwen v1 key depends on how long its prompt is, past the context."""
    scheduler = Scheduler(4, 50, by_length=True)
    beginning = [3] * (2 * PAGE)
    for i, prompt in enumerate((beginning + [1], beginning + [2], beginning + [1, 2])):
        scheduler.waiting.append(Request(prompt, 4, i, i))
    scheduler.read()
    one, same_length, longer = scheduler.running
    assert one.pages[:2] == same_length.pages[:2]
    assert not set(longer.pages) & set(one.pages)


def test_dynamic_ntk_tells_equal_texts_of_other_prompts_apart():
    """What had to wait is read with its response: the same text as another's prompt alone."""
    scheduler = Scheduler(4, 50, by_length=True)
    text = list(range(40))
    resumed = Request(text[:38], 9, 0, tokens=text[38:])
    for request in (resumed, Request(text, 9, 1)):
        scheduler.waiting.append(request)
    assert [stop - start for _, start, stop in scheduler.read().pieces] == [40, 40]


def test_a_step_too_many_stays_in_its_own_pages():
    """The host may hear late that a response is full; its table has no place beyond its limit."""
    scheduler = Scheduler(2, 50)
    request = Request([1] * (2 * PAGE - 2), 2, 0)
    scheduler.waiting.append(request)
    scheduler.read()
    for _ in range(4):
        assert not scheduler.lacks_pages()
        scheduler.grow()
    assert request.cached == 2 * PAGE and len(request.pages) == 2


@pytest.mark.parametrize("budget", (1, 5, 16, 33))
def test_reading_in_chunks_gives_the_whole_prompts_logits(parallel, budget):
    """Windows, prefixes in pages, several prompts in one chunk."""
    model, lengths = model_of(sliding_window=12), [50, 3, 33]
    rows = [[(5 * i + 3 * n) % VOCABULARY for i in range(n)] for n in lengths]
    tokens = torch.tensor([token for row in rows for token in row])
    with torch.no_grad():
        wanted = model.logits(model(tokens, Packed(lengths))).split(lengths)
    width = pages_for(max(lengths))
    cache = Cache(model, len(rows) * width)
    for store in (*cache.keys, *cache.values):
        store.fill_(torch.nan)
    pages = torch.randperm(len(rows) * width).view(len(rows), width).tolist()
    done = [0] * len(rows)
    while any(n < length for n, length in zip(done, lengths)):
        places = [i for i, length in enumerate(lengths) if done[i] < length]
        new = [min(budget, lengths[i] - done[i]) for i in places]
        layout = Chunk(
            cache, new, [done[i] for i in places], [pages[i] for i in places], new, "cpu"
        )
        chunk = [t for i, n in zip(places, new) for t in rows[i][done[i] : done[i] + n]]
        with torch.no_grad():
            logits = model.logits(model(torch.tensor(chunk), layout)).split(new)
        for i, n, part in zip(places, new, logits):
            torch.testing.assert_close(part, wanted[i][done[i] : done[i] + n], atol=2e-5, rtol=1e-5)
            done[i] += n


def test_long_prompts_are_read_beside_what_runs(parallel, monkeypatch):
    """No step reads more than its budget while others run, and they get a token each step."""
    monkeypatch.setitem(scheduler_module.READ_BESIDE, "cpu", 8)
    with session_of(parallel, SAMPLINGS["greedy"], slots=4, stop=Stop(set())) as session:
        short, long = Request([1, 2], NEW, 0), Request([3] * 70, 5, 1)
        session.add(short)
        session.step()
        session.add(long)
        sizes, read = [], session.runner.read
        session.runner.read = lambda reading: (
            sizes.append(sum(stop - start for _, start, stop in reading.pieces)),
            read(reading),
        )[1]
        while not long.tokens:
            before = len(short.tokens)
            session.step()
            assert len(short.tokens) == before + 1
        assert sizes == [8] * 8 + [6]


def test_admission_in_batches(parallel):
    """With 32 slots one that is free waits for a second, but no more than some steps."""
    scheduler = Scheduler(32, 500)
    for i in range(40):
        scheduler.waiting.append(Request([i, 1], 4, i, i))
    assert len(scheduler.read().read) == 32
    scheduler.remove(scheduler.running[3])
    counts = []
    for _ in range(scheduler_module.PATIENCE):
        counts.append(len(scheduler.read().pieces))
    assert counts == [0] * (scheduler_module.PATIENCE - 1) + [1]
    for request in scheduler.running[:2]:
        scheduler.remove(request)
    assert len(scheduler.read().pieces) == 2


@pytest.mark.parametrize("delay", (0, 1))
@pytest.mark.parametrize("every", (1, 4, 7))
def test_stop_strings_cut_exactly(parallel, alone, monkeypatch, delay, every):
    """However seldom one looks, and across the tokens between two looks."""
    plain = [alone("sampled", i) for i in range(20)]
    strings = tuple({text_of(r.tokens[4:6])[1:-1] for r in plain if len(r.tokens) > 8})
    monkeypatch.setattr(engine_module, "LOOK_EVERY", every)
    cut = 0
    with session_of(
        parallel, SAMPLINGS["sampled"], slots=6, stop=stop_of(strings), delay=delay
    ) as session:
        requests = [request_of(i) for i in range(20)]
        for request in requests:
            session.add(request)
        while not session.is_idle:
            session.step()
    for request, whole in zip(requests, plain):
        ends = [
            n
            for n in range(1, len(whole.tokens) + 1)
            if any(string in text_of(whole.tokens[:n]) for string in strings)
        ]
        if ends:
            cut += 1
            assert answered(request) == (whole.tokens[: ends[0]], "stop")
        else:
            assert answered(request) == answered(whole)
    assert cut > 5


def test_masks_survive_a_wait(parallel, monkeypatch):
    """The bits of what each choice was among, also of those that had to give their slot back."""
    use_pages_of(4, monkeypatch)
    sampling = SAMPLINGS["cut off"]

    def run(pages: int | None) -> tuple[list[Request], int]:
        requests = [request_of(i) for i in range(20)]
        settings = dict(pages=pages, stop=Stop(set()), keep_masks=True)
        with session_of(parallel, sampling, 20, **settings) as session:
            for request in requests:
                session.add(request)
            while not session.is_idle:
                session.step()
            return requests, session.scheduler.preempted

    (plenty, never), (few, often) = run(None), run(1)
    assert never == 0 and often > 0
    for a, b in zip(plenty, few):
        assert a.tokens == b.tokens and torch.equal(torch.cat(a.kept), torch.cat(b.kept))


def test_cancelling_a_prompt_that_others_wait_for(parallel, alone, monkeypatch):
    """Samples of a prompt that is still being read begin anew when the first is cancelled."""
    monkeypatch.setattr(scheduler_module, "READ_ALONE", 4)
    prompt = request_of(1).prompt
    with session_of(parallel, SAMPLINGS["sampled"], slots=4) as session:
        first, second = Request(prompt, 9, 0), Request(prompt, 9, 1)
        session.add(first)
        session.add(second)
        session.step()
        assert second in first.followers
        session.cancel(first)
        while not session.is_idle:
            session.step()
        assert_all_free(session)
        assert second.stop_reason and not first.tokens
    with session_of(parallel, SAMPLINGS["sampled"], slots=4) as session:
        again = Request(prompt, 9, 1)
        session.add(again)
        while not session.is_idle:
            session.step()
    assert again.tokens == second.tokens


def test_a_request_without_room_is_refused(parallel):
    with session_of(parallel, SAMPLINGS["greedy"]) as session:
        for prompt, limit in (([], 3), ([1], 0), ([1] * 100, LONGEST - 99)):
            with pytest.raises(ValueError, match=f"at most {LONGEST} together"):
                session.add(Request(prompt, limit, 0))


def test_buffers_stay_where_they_are(parallel):
    """A graph holds their addresses."""
    with session_of(parallel, SAMPLINGS["penalised"], slots=4, keep_masks=True) as session:
        runner = session.runner
        stores = [runner.state, runner.table, runner.rows, runner.seen, *runner.cache.keys]
        before = [store.data_ptr() for store in stores]
        for i in range(9):
            session.add(request_of(i))
        while not session.is_idle:
            session.step()
        stores = [runner.state, runner.table, runner.rows, runner.seen, *runner.cache.keys]
        assert [store.data_ptr() for store in stores] == before
