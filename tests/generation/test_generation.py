"""Greedy generation is transformers'; samples depend on the seed alone and follow the softmax."""

import json
import math

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from src.errors import UserError
from src.generation.sampling import Sampling, uniforms
from tests.launch import launch, once
from tests.models import families

DEGREES = (1, 2, 4)
VOCABULARY = 97  # two and four ranks divide neither this, nor the heads, nor the ffn
NEW, SAMPLED = 64, 12
PROMPT_LENGTHS = [5, 1, 23, 9, 14, 2, 40, 9]


def drawn_prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [1, *torch.randint(3, VOCABULARY, (length - 1,), generator=generator).tolist()]


PROMPTS = [drawn_prompt(n, n + i) for i, n in enumerate(PROMPT_LENGTHS)]
REVERSED = list(reversed(range(len(PROMPTS))))
KINDS = {
    "plain": dict(temperature=1.3),
    "top_k": dict(temperature=1.1, top_k=7),
    "top_p": dict(temperature=1.6, top_p=0.7),
    "top_k_top_p": dict(temperature=1.6, top_k=12, top_p=0.8),
    "min_p": dict(temperature=1.6, min_p=0.1),
    "all": dict(temperature=2.0, top_k=20, top_p=0.9, min_p=0.02),
}
BEAMS = [(2, 1.0), (4, 0.6), (5, 2.0)]
WAYS = {  # the same samples, served differently
    "a slot each": dict(slots=16),
    "three slots": dict(slots=3),
    "the other way round": dict(slots=5, order=REVERSED, samples=REVERSED),
}
SHUFFLED = torch.randperm(32, generator=torch.Generator().manual_seed(1))
CHOICE_LOGITS = torch.linspace(-2.5, 2.5, 32)[SHUFFLED].tolist()
DRAWS = 20000
FAMILIES = ["llama", "llama-tied", "llama3", "llama-yarn", "llama-linear"]
FAMILIES += ["mistral-odd", "mixtral-odd", "qwen2-odd", "qwen3-odd", "qwen3-moe", "qwen3-moe-odd"]
FAMILY_RUNS = [(n, name) for n in DEGREES for name in (FAMILIES if n < 4 else ["qwen3-odd"])]
# 5 and 40 tokens: windows are crossed in both
FAMILY_PROMPTS = [[token % 96 for token in PROMPTS[i]] for i in (0, 6)]
QWEN_CONTEXT = 16


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = LlamaConfig(
        hidden_size=66,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=50,
        vocab_size=VOCABULARY,
        num_hidden_layers=2,
        initializer_range=0.2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("generation") / "hf"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def hf(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def greedy_tokens(model, prompt: list[int], **settings) -> list[int]:
    """transformers' continuation of a prompt, greedy unless `settings` say otherwise."""
    model.generation_config.eos_token_id = None
    out = model.generate(  # [1, prompt and continuation]
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        pad_token_id=0,
        **{"max_new_tokens": NEW, **settings},
    )
    return out[0, len(prompt) :].tolist()


def next_logits(model, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The logits that `tokens` were chosen from, by a full forward: [tokens, vocabulary]."""
    with torch.no_grad():
        return model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]


@pytest.fixture(scope="module")
def greedy(hf) -> list[list[int]]:
    """transformers' own greedy continuations, 64 tokens each."""
    return [greedy_tokens(hf, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def stop_id(greedy) -> int:
    """A token that ends some of the prompts' continuations early, and others not at all."""

    def first(token: int) -> list[int]:
        return [row.index(token) if token in row else NEW for row in greedy]

    def early(token: int) -> int:
        return sum(0 < place < NEW - 1 for place in first(token))

    return max((token for token in range(VOCABULARY) if NEW in first(token)), key=early)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict:
    """Models of the other families and where they lie.

    Qwen v1's has a context that most prompts exceed.
    """
    root, models = tmp_path_factory.mktemp("families"), {}
    for name in (*FAMILIES, "qwen"):
        models[name] = families.build(name), root / name
        context = {"seq_length": QWEN_CONTEXT} if name == "qwen" else {}
        families.save(name, models[name][0], root / name, **context)
    return models


@pytest.fixture(scope="module")
def output(folder, others, stop_id, tmp_path_factory):
    root = tmp_path_factory.mktemp("generation-out")
    greedily = dict(temperature=0.0, max_new_tokens=NEW)
    plain = dict(max_new_tokens=SAMPLED, seed=7, **KINDS["plain"])
    sampled = dict(max_new_tokens=SAMPLED)
    recipes = {
        "greedy": dict(slots=3, sampling=greedily),
        "greedy, a slot each": dict(slots=16, sampling=greedily),
        "stop": dict(slots=3, sampling=greedily, stop_ids=[stop_id]),
        "limits": dict(slots=2, sampling=greedily, max_seq_len=23),
        "short": dict(slots=3, sampling=dict(max_new_tokens=1)),
        "bf16": dict(slots=3, sampling=dict(sampled, temperature=1.0, seed=3), dtype="bfloat16"),
        "bf16 greedy": dict(slots=3, sampling=dict(sampled, temperature=0.0), dtype="bfloat16"),
        "other seed": dict(slots=16, sampling=dict(plain, seed=8)),
        "one prompt, five slots": dict(slots=5, order=[0] * 5, sampling=plain),
        "one prompt, two slots": dict(slots=2, order=[0] * 5, sampling=plain),
        "little memory": dict(slots=16, kv_cache_gb=4e-5, sampling=greedily),
        "stop string": dict(slots=3, sampling=greedily, stop_strings=[f"{stop_id}>", "nowhere"]),
        "repetition": dict(slots=3, sampling=dict(repetition_penalty=1.4, **greedily)),
        "not yet": dict(slots=3, sampling=dict(min_new_tokens=20, **greedily), stop_ids=[stop_id]),
        "one prompt": dict(slots=1, order=[0] * 5, sampling=plain),
    }
    choices, drawn = {}, dict(logits=CHOICE_LOGITS, draws=DRAWS)
    for kind, settings in KINDS.items():
        for way, served in WAYS.items():
            recipes[f"{kind}, {way}"] = dict(served, sampling=dict(sampled, seed=7, **settings))
        for by_step in (False, True):
            sampling = dict(seed=5 + by_step, **settings)
            name = f"{kind} by {'step' if by_step else 'sample'}"
            choices[name] = dict(drawn, by_step=by_step, sampling=sampling)
    tasks = {
        "prompts": PROMPTS,
        "recipes": recipes,
        "choices": choices,
        "sharded": ["greedy, a slot each", "top_p, a slot each"],
        "relaid": plain,
        "beams": BEAMS,
        "beam stops": [stop_id, (stop_id + 40) % VOCABULARY],
        "kept": {
            kind: dict(max_new_tokens=5, seed=2, **KINDS[kind]) for kind in KINDS if kind != "plain"
        },
        "families": {name: str(path) for name, (_, path) in others.items()},
        "families at four ranks": ["qwen3-odd", "qwen"],
        "family": dict(
            prompts=FAMILY_PROMPTS, sampling=greedily, whole=[30, 30], prefilled=[3, 12]
        ),
    }
    (root / "recipes.json").write_text(json.dumps(tasks))

    @once
    def run(n: int) -> dict:
        out, worker = root / f"{n}.json", "tests/generation/generation_worker.py"
        launch(n, worker, str(folder), str(root / "recipes.json"), str(out))
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="module", params=DEGREES)
def results(request, output) -> dict:
    return output(request.param)


def kept_logprobs(
    logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """Log-probabilities after temperature, top-k, top-p and min-p, token by token: [V].

    −inf for what is left out.
    """
    z = logits.astype(np.float64) / temperature
    order = sorted(range(len(z)), key=lambda i: -z[i])[: top_k or None]
    weights = np.exp(z[order] - z[order[0]])
    weights /= weights.sum()
    kept, mass = [], 0.0
    for token, weight in zip(order, weights):
        if mass >= top_p or weight < min_p * weights[0]:
            break
        kept.append(token)
        mass += weight
    result = np.full(len(z), -np.inf)
    result[kept] = z[kept] - np.log(np.exp(z[kept] - z[order[0]]).sum()) - z[order[0]]
    return result


@pytest.mark.parametrize("recipe", ("greedy", "greedy, a slot each"))
def test_greedy_is_transformers(results, greedy, recipe):
    assert results[recipe]["tokens"] == greedy
    assert set(results[recipe]["stop_reason"]) == {"length"}


@pytest.fixture(scope="module")
def continued(others):
    """name → transformers' own greedy continuations of the other families' prompts."""
    return once(lambda name: [greedy_tokens(others[name][0], prompt) for prompt in FAMILY_PROMPTS])


@pytest.mark.parametrize("n, name", FAMILY_RUNS)
def test_greedy_is_transformers_in_every_family(output, others, continued, n, name):
    results = output(n)[f"family {name}"]
    assert results["tokens"] == continued(name)
    assert results["step by step"] <= 1e-5
    for prompt, tokens, logprobs in zip(FAMILY_PROMPTS, results["tokens"], results["logprobs"]):
        rows = next_logits(others[name][0], prompt, tokens).log_softmax(-1)
        np.testing.assert_allclose(logprobs, rows[torch.arange(NEW), tokens], atol=1e-4, rtol=0)


@torch.no_grad()
def beyond_the_context(
    model, prompt: list[int], logn: bool = True, ntk: bool = True
) -> tuple[list[int], list[float]]:
    """Greedy tokens of a Qwen2 model with Qwen v1's extrapolation put into it; no cache."""
    d, base = model.config.head_dim, model.config.rope_parameters["rope_theta"]
    alpha = max(1, 2 ** math.ceil(math.log2(len(prompt) / QWEN_CONTEXT) + 1) - 1) if ntk else 1
    before, exponents = model.model.rotary_emb.inv_freq, torch.arange(0, d, 2) / d
    model.model.rotary_emb.inv_freq = 1 / (base * alpha ** (d / (d - 2))) ** exponents

    def scaled(_, __, queries):  # [1, t, heads · head_dim]
        places = torch.arange(1, queries.size(1) + 1)
        scale = (places.log() / math.log(QWEN_CONTEXT)).clamp_min(1)  # [t]
        return queries * scale[:, None] if logn else queries

    hooks = [layer.self_attn.q_proj.register_forward_hook(scaled) for layer in model.model.layers]
    ids, logprobs = list(prompt), []
    for _ in range(NEW):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]  # [vocabulary]
        logprob, token = logits.log_softmax(-1).max(-1)
        ids.append(token.item())
        logprobs.append(logprob.item())
    for hook in hooks:
        hook.remove()
    model.model.rotary_emb.inv_freq = before
    return ids[len(prompt) :], logprobs


@pytest.fixture(scope="module")
def extrapolated(others):
    return [beyond_the_context(others["qwen"][0], prompt) for prompt in FAMILY_PROMPTS]


def test_qwen_beyond_its_context(results, extrapolated):
    ours = results["family qwen"]
    assert ours["tokens"] == [tokens for tokens, _ in extrapolated]
    wanted = [logprobs for _, logprobs in extrapolated]
    np.testing.assert_allclose(ours["logprobs"], wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("off", ("logn", "ntk"))
def test_qwen_beyond_its_context_is_not_what_it_is_without(others, extrapolated, off):
    tokens, _ = beyond_the_context(others["qwen"][0], FAMILY_PROMPTS[1], **{off: False})
    assert tokens != extrapolated[1][0]


def test_greedy_and_samples_shared_among_two_models(output, greedy):
    results = output(4)
    assert results["sharded greedy, a slot each"]["tokens"] == greedy
    unsharded = results["top_p, a slot each"]["tokens"]
    assert results["sharded top_p, a slot each"]["tokens"] == unsharded


def test_stop_token_is_kept_as_the_last(results, greedy, stop_id):
    stopped, ours = 0, results["stop"]
    for tokens, reason, whole in zip(ours["tokens"], ours["stop_reason"], greedy):
        if stop_id in whole:
            stopped += 1
            assert reason == "stop" and tokens == whole[: whole.index(stop_id) + 1]
        else:
            assert reason == "length" and tokens == whole
    assert 0 < stopped < len(greedy)


def steps_needed(lengths: list[int], slots: int) -> int:
    """Forwards until all are done, when a free slot is filled before anything is decoded.

    The longest prompt goes first.
    """
    waiting = sorted(range(len(lengths)), key=lambda i: -PROMPT_LENGTHS[i])
    left, steps = [], 0
    while waiting or left:
        steps += 1
        if waiting and len(left) < slots:
            news, waiting = waiting[: slots - len(left)], waiting[slots - len(left) :]
            left += [lengths[i] - 1 for i in news]
        else:
            left = [n - 1 for n in left]
        left = [n for n in left if n > 0]
    return steps


def test_a_finished_slot_takes_the_next_prompt_at_once(results):
    for recipe, slots in (("stop", 3), ("greedy", 3), ("greedy, a slot each", 16)):
        lengths = [len(tokens) for tokens in results[recipe]["tokens"]]
        assert results[recipe]["steps"] == steps_needed(lengths, slots)
    for recipe in ("stop", "greedy", "limits"):
        length = sum(map(len, results[recipe]["tokens"]))
        assert results[recipe]["told"][1] == length, "every new token is told once"
    assert results["stop"]["told"][0] == len(PROMPTS)


def test_prompt_and_response_stay_within_max_seq_len(results, greedy):
    ours = results["limits"]
    columns = (PROMPTS, ours["tokens"], ours["stop_reason"], greedy)
    for prompt, tokens, reason, whole in zip(*columns):
        assert reason == "length" and tokens == whole[: max(0, 23 - len(prompt))]
    assert all(len(tokens) == 1 for tokens in results["short"]["tokens"])


@pytest.mark.parametrize("kind", KINDS)
def test_samples_depend_on_the_seed_alone(results, output, kind):
    wanted = output(1)[f"{kind}, a slot each"]["tokens"]
    for way, served in WAYS.items():
        order = served.get("order", range(len(PROMPTS)))
        assert results[f"{kind}, {way}"]["tokens"] == [wanted[i] for i in order], way
    assert all(len(tokens) == SAMPLED for tokens in wanted)


def test_samples_differ_with_the_seed_and_among_one_prompts(results):
    assert results["other seed"]["tokens"] != results["plain, a slot each"]["tokens"]
    assert len(set(map(tuple, results["one prompt"]["tokens"]))) == 5
    # sample 0 of prompt 0 either way
    assert results["one prompt"]["tokens"][0] == results["plain, a slot each"]["tokens"][0]


def test_samples_of_one_prompt_share_its_prefill(results):
    """A step that prefills tells one token for each sample.

    With as many slots as samples there is one such step.
    """
    for slots in ("five slots", "two slots"):
        assert results[f"one prompt, {slots}"]["tokens"] == results["one prompt"]["tokens"]
    assert results["one prompt, five slots"]["steps"] == SAMPLED


def test_another_degree_for_generation_changes_no_sample(output):
    """Trained at 2 or 4 ranks per model, also as two models of 2, generated at fewer.

    With an adapter too.
    """
    plain = output(1)["plain, a slot each"]["tokens"]
    adapted = output(1)["relaid"]["with an adapter"]
    assert plain != adapted
    relaid = {
        **{f"2: {k}": v for k, v in output(2)["relaid"].items()},
        **{f"4: {k}": v for k, v in output(4)["relaid"].items()},
        **{f"2 x 2: {k}": v for k, v in output(4)["relaid, two models"].items()},
    }
    names = {"1", "2", "1, with an adapter", "2, with an adapter", "with an adapter"}
    assert {key.split(": ")[1] for key in relaid} == names
    for key, tokens in relaid.items():
        assert tokens == (adapted if "adapter" in key else plain), key


@pytest.mark.parametrize("beams, penalty", BEAMS)
def test_beam_search_is_transformers(results, hf, stop_id, beams, penalty):
    """Two stop tokens, so that beams end at different lengths."""
    stops = [stop_id, (stop_id + 40) % VOCABULARY]
    search = dict(num_beams=beams, length_penalty=penalty, early_stopping=False)
    lengths = set()
    for prompt, tokens in zip(PROMPTS, results[f"{beams} beams, {penalty}"]):
        theirs = greedy_tokens(hf, prompt, max_new_tokens=30, eos_token_id=stops, **search)
        while theirs and theirs[-1] == 0 and len(theirs) > len(tokens):
            theirs.pop()  # padding
        assert tokens == theirs
        lengths.add(len(tokens))
    assert len(lengths) > 1 or penalty == 2.0  # which favours the longest


def test_a_small_cache_serves_fewer_at_a_time(results, greedy):
    assert results["little memory"]["tokens"] == greedy
    assert results["little memory"]["steps"] > 2 * results["greedy, a slot each"]["steps"]


def test_a_stop_string_ends_a_response(results, greedy, stop_id):
    """The text of token i is <i>."""
    ours = results["stop string"]
    for tokens, reason, whole in zip(ours["tokens"], ours["stop_reason"], greedy):
        ends = [i for i, token in enumerate(whole) if str(token).endswith(str(stop_id))]
        assert (reason, tokens) == (("stop", whole[: ends[0] + 1]) if ends else ("length", whole))


def settled(hf, **more) -> list[list[int]]:
    """transformers' greedy continuations under its own logits processors."""
    return [greedy_tokens(hf, prompt, **more) for prompt in PROMPTS]


def test_repetition_penalty_is_transformers(results, greedy, hf):
    assert results["repetition"]["tokens"] == settled(hf, repetition_penalty=1.4) != greedy


def test_no_stop_before_the_least_number_of_tokens(results, hf, stop_id):
    assert results["not yet"]["tokens"] == settled(hf, min_new_tokens=20, eos_token_id=stop_id)
    assert results["not yet"]["tokens"] != results["stop"]["tokens"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_the_kept_set_comes_back(results, hf, kind):
    kept, tokens, logprobs = results["kept"][kind]
    for prompt, sets, row_tokens, row_logprobs in zip(PROMPTS, kept, tokens, logprobs):
        rows = next_logits(hf, prompt, row_tokens).numpy()
        for row, chosen, token, logprob in zip(rows, sets, row_tokens, row_logprobs):
            wanted = kept_logprobs(row, **KINDS[kind])
            assert chosen == np.isfinite(wanted).nonzero()[0].tolist() and token in chosen
            assert abs(wanted[token] - logprob) <= 1e-4


@pytest.mark.parametrize(
    "recipe", ("greedy", "stop", "plain, three slots", "plain, the other way round")
)
def test_logprobs_are_the_full_forwards(results, recipe):
    for ours, scored in zip(results[recipe]["logprobs"], results[recipe]["scored"]):
        np.testing.assert_allclose(ours, scored, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_lie_in_the_kept_set_with_their_logprobs(results, hf, kind):
    """Against transformers' logits and an independent cut."""
    recipe = results[f"{kind}, three slots"]
    cut = 0
    for prompt, tokens, logprobs in zip(PROMPTS, recipe["tokens"], recipe["logprobs"]):
        rows = next_logits(hf, prompt, tokens).numpy()
        for row, token, logprob in zip(rows, tokens, logprobs):
            kept = kept_logprobs(row, **KINDS[kind])
            cut += np.isinf(kept).sum()
            assert abs(kept[token] - logprob) <= 1e-4
    assert (cut > 0) == (kind != "plain")


def test_bf16(results):
    for recipe in ("bf16", "bf16 greedy"):
        for tokens in results[recipe]["tokens"]:
            assert len(tokens) == SAMPLED
            assert max(tokens) < VOCABULARY and min(tokens) >= 0
        logprobs = np.array(results[recipe]["logprobs"])
        assert np.isfinite(logprobs).all() and (logprobs <= 1e-3).all()
        np.testing.assert_allclose(logprobs, results[recipe]["scored"], atol=0.25)


@pytest.mark.parametrize("by", ("sample", "step"))
@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_softmax(results, kind, by):
    tokens, logprobs = results["choices"][f"{kind} by {by}"]
    wanted = kept_logprobs(np.array(CHOICE_LOGITS, dtype=np.float32), **KINDS[kind])
    counts = np.bincount(tokens, minlength=32)
    inside = np.isfinite(wanted)
    assert not counts[~inside].any()
    np.testing.assert_allclose(logprobs, wanted[tokens], atol=1e-5)
    expected = DRAWS * np.exp(wanted[inside])
    freedom = inside.sum() - 1
    chi_square = ((counts[inside] - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_the_same_at_every_degree(results, output, kind):
    for by in ("sample", "step"):
        name = f"{kind} by {by}"
        assert results["choices"][name][0] == output(1)["choices"][name][0]


def test_uniforms_are_uniform_and_independent():
    """Successive steps, samples and seeds fill the square evenly.

    The steps are of one sample; the samples and seeds are at one step.
    """
    n, bins = 60000, 8
    numbers, zero = torch.arange(n), torch.zeros(n, dtype=torch.long)
    pairs = {
        "steps": (uniforms(1, zero, numbers), uniforms(1, zero, numbers + 1)),
        "samples": (uniforms(1, numbers, zero), uniforms(1, numbers + 1, zero)),
        "sample and step": (uniforms(1, numbers, numbers), uniforms(1, numbers + 1, numbers)),
        "seeds": (uniforms(1, numbers, zero), uniforms(2, numbers, zero)),
    }
    for name, (x, y) in pairs.items():
        assert x.min() >= 0 and x.max() < 1
        places = (x * bins).long() * bins + (y * bins).long()  # [n]
        cells = torch.bincount(places, minlength=bins * bins).double()  # [bins²]
        chi_square = ((cells - n / bins**2) ** 2 / (n / bins**2)).sum().item()
        assert chi_square < 63 + 4 * math.sqrt(2 * 63), name


@pytest.mark.parametrize(
    "wrong",
    (
        dict(temperature=-0.1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(top_k=-1),
        dict(max_new_tokens=0),
        dict(min_p=1.5),
        dict(repetition_penalty=0.0),
        dict(min_new_tokens=-1),
    ),
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))} {next(iter(wrong.values()))}"):
        Sampling(**wrong)


# --- the scripts, on a model and tokenizer made by dataset/start.py

SCORED = [
    ("Add 3 and 4.", "3+4=7\n#### 7"),
    ("Name a colour that you like very much, please.", "blue"),
    ("2*5?", "2*5=<<2*5=10>>10"),
    ("Count", "one two three four five six seven"),
    ("2*5?", "é☃"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A solver with its tokenizer, and rows to score."""
    root = tmp_path_factory.mktemp("scripts")
    rows = [{"instruction": f"{q} ({i})", "output": a} for i in range(8) for q, a in SCORED]
    (root / "train.json").write_text(json.dumps(rows))
    lines = [json.dumps(dict(instruction=q, output=a)) + "\n" for q, a in SCORED]
    (root / "rows.jsonl").write_text("".join(lines))
    sizes = dict(vocab_size=480, dim=64, n_heads=4, n_kv_heads=2)
    settings = flags(train_file=root / "train.json", save_dir=root / "model", **sizes)
    launch(1, "dataset/start.py", *settings)
    return root


def flags(**settings) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def pieces_and_model(folder):
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return pieces, model.eval()


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("ranks", (1, 2))
def test_solver_score_is_transformers(small, tmp_path, ranks):
    files = dict(input_file=small / "rows.jsonl", output_file=tmp_path / "out.jsonl")
    settings = flags(ckpt_dir=small / "model", max_batch_size=2, **files)
    launch(ranks, "solver_score.py", *settings)
    scored = read_lines(tmp_path / "out.jsonl")
    pieces, model = pieces_and_model(small / "model")
    assert len(scored) == len(SCORED)
    for (instruction, output), row in zip(SCORED, scored):
        prompt, response = [1, *pieces.encode(instruction)], [*pieces.encode(output), 2]
        assert row["prompt_tokens"] == prompt and row["tokens"] == response
        logs = next_logits(model, prompt, response).double().log_softmax(-1)
        wanted = logs[torch.arange(len(response)), response]
        np.testing.assert_allclose(row["logprobs"], wanted, atol=1e-4, rtol=0)
        assert abs(row["sum"] - wanted.sum().item()) <= 1e-3


def test_solver_generate_rows(small, tmp_path):
    """Two models of a rank each; every row's samples come in the input's order.

    One's own logprobs are what it scores.
    """
    files = dict(input_file=small / "rows.jsonl", output_file=tmp_path / "out.jsonl")
    sampling = dict(num_samples=3, temperature=0.9, max_new_tokens=10, max_batch_size=4, seed=5)
    settings = flags(ckpt_dir=small / "model", model_parallel_size=1, **files, **sampling)
    launch(2, "solver_generate.py", *settings)
    samples = read_lines(tmp_path / "out.jsonl")
    assert [(row["index"], row["instruction"]) for row in samples] == [
        (i, q) for i, (q, _) in enumerate(SCORED) for _ in range(3)
    ]
    for i in range(len(SCORED)):
        assert len({tuple(row["tokens"]) for row in samples[3 * i : 3 * i + 3]}) == 3
    pieces, model = pieces_and_model(small / "model")
    for row in samples:
        tokens = row["tokens"]
        assert row["stop_reason"] == ("stop" if tokens[-1] == 2 else "length")
        assert row["output"] == pieces.decode([token for token in tokens if token not in (0, 1, 2)])
        logits = next_logits(model, [1, *pieces.encode(row["instruction"])], tokens)
        logprobs = (logits.double() / 0.9).log_softmax(-1)  # [tokens, vocabulary]
        wanted = logprobs[torch.arange(len(tokens)), tokens]
        np.testing.assert_allclose(row["logprobs"], wanted, atol=1e-4, rtol=0)
