"""Generation: greedy is transformers' greedy; samples depend on the seed alone and follow the softmax."""

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
VOCABULARY, NEW, SAMPLED = (
    97,
    64,
    12,
)  # two and four ranks divide neither the vocabulary, nor the heads, nor the ffn
PROMPT_LENGTHS = [5, 1, 23, 9, 14, 2, 40, 9]
PROMPTS = [
    [
        1,
        *torch.randint(
            3, VOCABULARY, (n - 1,), generator=torch.Generator().manual_seed(n + i)
        ).tolist(),
    ]
    for i, n in enumerate(PROMPT_LENGTHS)
]
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
CHOICE_LOGITS = torch.linspace(-2.5, 2.5, 32)[
    torch.randperm(32, generator=torch.Generator().manual_seed(1))
].tolist()
DRAWS = 20000
FAMILIES = [
    "llama",
    "llama-tied",
    "llama3",
    "llama-yarn",
    "llama-linear",
    "mistral-odd",
    "mixtral-odd",
    "qwen2-odd",
    "qwen3-odd",
    "qwen3-moe",
    "qwen3-moe-odd",
]
FAMILY_RUNS = [(n, name) for n in DEGREES for name in (FAMILIES if n < 4 else ["qwen3-odd"])]
FAMILY_PROMPTS = [
    [token % 96 for token in PROMPTS[i]] for i in (0, 6)
]  # 5 and 40 tokens: windows are crossed in both
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


def greedy_tokens(model, prompt: list[int]) -> list[int]:
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def greedy(hf) -> list[list[int]]:
    """transformers' own greedy continuations, 64 tokens each."""
    return [greedy_tokens(hf, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def stop_id(greedy) -> int:
    """A token that ends some of the prompts' continuations early, and others not at all."""
    first = lambda token: [row.index(token) if token in row else NEW for row in greedy]
    early = lambda token: sum(0 < at < NEW - 1 for at in first(token))
    return max((t for t in range(VOCABULARY) if NEW in first(t)), key=early)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict:
    """Models of the other families and where they lie; Qwen v1's with a context that most prompts exceed."""
    root, made = tmp_path_factory.mktemp("families"), {}
    for name in (*FAMILIES, "qwen"):
        made[name] = families.build(name), root / name
        families.save(
            name,
            made[name][0],
            root / name,
            **({"seq_length": QWEN_CONTEXT} if name == "qwen" else {}),
        )
    return made


@pytest.fixture(scope="module")
def output(folder, others, stop_id, tmp_path_factory):
    root = tmp_path_factory.mktemp("generation-out")
    greedily = dict(temperature=0.0, max_new_tokens=NEW)
    recipes = {
        "greedy": dict(slots=3, sampling=greedily),
        "greedy, a slot each": dict(slots=16, sampling=greedily),
        "stop": dict(slots=3, sampling=greedily, stop_ids=[stop_id]),
        "limits": dict(slots=2, sampling=greedily, max_seq_len=23),
        "short": dict(slots=3, sampling=dict(max_new_tokens=1)),
        "bf16": dict(
            slots=3,
            sampling=dict(max_new_tokens=SAMPLED, temperature=1.0, seed=3),
            dtype="bfloat16",
        ),
        "bf16 greedy": dict(
            slots=3, sampling=dict(max_new_tokens=SAMPLED, temperature=0.0), dtype="bfloat16"
        ),
        "other seed": dict(
            slots=16, sampling=dict(max_new_tokens=SAMPLED, seed=8, **KINDS["plain"])
        ),
        "one prompt, five slots": dict(
            slots=5, order=[0] * 5, sampling=dict(max_new_tokens=SAMPLED, seed=7, **KINDS["plain"])
        ),
        "one prompt, two slots": dict(
            slots=2, order=[0] * 5, sampling=dict(max_new_tokens=SAMPLED, seed=7, **KINDS["plain"])
        ),
        "little memory": dict(slots=16, kv_cache_gb=4e-5, sampling=greedily),
        "stop string": dict(slots=3, sampling=greedily, stop_strings=[f"{stop_id}>", "nowhere"]),
        "repetition": dict(slots=3, sampling=dict(repetition_penalty=1.4, **greedily)),
        "not yet": dict(slots=3, sampling=dict(min_new_tokens=20, **greedily), stop_ids=[stop_id]),
        "one prompt": dict(
            slots=1, order=[0] * 5, sampling=dict(max_new_tokens=SAMPLED, seed=7, **KINDS["plain"])
        ),
    }
    for kind, settings in KINDS.items():
        for way, served in WAYS.items():
            recipes[f"{kind}, {way}"] = dict(
                served, sampling=dict(max_new_tokens=SAMPLED, seed=7, **settings)
            )
    choices = {
        f"{kind} by {'step' if by_step else 'sample'}": dict(
            logits=CHOICE_LOGITS,
            draws=DRAWS,
            by_step=by_step,
            sampling=dict(seed=5 + by_step, **settings),
        )
        for kind, settings in KINDS.items()
        for by_step in (False, True)
    }
    given = {
        "prompts": PROMPTS,
        "recipes": recipes,
        "choices": choices,
        "sharded": ["greedy, a slot each", "top_p, a slot each"],
        "relaid": dict(max_new_tokens=SAMPLED, seed=7, **KINDS["plain"]),
        "beams": BEAMS,
        "beam stops": [stop_id, (stop_id + 40) % VOCABULARY],
        "kept": {
            kind: dict(max_new_tokens=5, seed=2, **KINDS[kind]) for kind in KINDS if kind != "plain"
        },
        "families": {name: str(where) for name, (_, where) in others.items()},
        "families at four ranks": ["qwen3-odd", "qwen"],
        "family": dict(
            prompts=FAMILY_PROMPTS, sampling=greedily, whole=[30, 30], prefilled=[3, 12]
        ),
    }
    (root / "recipes.json").write_text(json.dumps(given))

    @once
    def run(n: int) -> dict:
        launch(
            n,
            "tests/generation/generation_worker.py",
            str(folder),
            str(root / "recipes.json"),
            str(root / f"{n}.json"),
        )
        return json.loads((root / f"{n}.json").read_text())

    return run


@pytest.fixture(scope="module", params=DEGREES)
def made(request, output) -> dict:
    return output(request.param)


def kept_logprobs(
    logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """Log-probabilities after temperature, top-k, top-p and min-p, token by token; −inf for what is left out. [V]"""
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
def test_greedy_is_transformers(made, greedy, recipe):
    assert made[recipe]["tokens"] == greedy
    assert set(made[recipe]["stop_reason"]) == {"length"}


@pytest.fixture(scope="module")
def continued(others):
    """name → transformers' own greedy continuations of the other families' prompts."""
    return once(lambda name: [greedy_tokens(others[name][0], prompt) for prompt in FAMILY_PROMPTS])


@pytest.mark.parametrize("n, name", FAMILY_RUNS)
def test_greedy_is_transformers_in_every_family(output, others, continued, n, name):
    made = output(n)[f"family {name}"]
    assert made["tokens"] == continued(name)
    assert made["step by step"] <= 1e-5
    for prompt, tokens, logprobs in zip(FAMILY_PROMPTS, made["tokens"], made["logprobs"]):
        with torch.no_grad():
            rows = (
                others[name][0](torch.tensor([prompt + tokens]))
                .logits[0, len(prompt) - 1 : -1]
                .log_softmax(-1)
            )
        np.testing.assert_allclose(logprobs, rows[torch.arange(NEW), tokens], atol=1e-4, rtol=0)


@torch.no_grad()
def beyond_the_context(
    model, prompt: list[int], logn: bool = True, ntk: bool = True
) -> tuple[list[int], list[float]]:
    """Greedy tokens of a Qwen2 model with Qwen v1's extrapolation put into it from outside; no cache."""
    d, base = model.config.head_dim, model.config.rope_parameters["rope_theta"]
    alpha = max(1, 2 ** math.ceil(math.log2(len(prompt) / QWEN_CONTEXT) + 1) - 1) if ntk else 1
    before, exponents = model.model.rotary_emb.inv_freq, torch.arange(0, d, 2) / d
    model.model.rotary_emb.inv_freq = 1 / (base * alpha ** (d / (d - 2))) ** exponents

    def scaled(_, __, queries):
        places = torch.arange(1, queries.size(1) + 1)
        return (
            queries * (places.log() / math.log(QWEN_CONTEXT)).clamp_min(1)[:, None]
            if logn
            else queries
        )

    hooks = [layer.self_attn.q_proj.register_forward_hook(scaled) for layer in model.model.layers]
    ids, logprobs = list(prompt), []
    for _ in range(NEW):
        logprob, token = (
            model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1).max(-1)
        )
        ids.append(token.item())
        logprobs.append(logprob.item())
    for hook in hooks:
        hook.remove()
    model.model.rotary_emb.inv_freq = before
    return ids[len(prompt) :], logprobs


@pytest.fixture(scope="module")
def extrapolated(others):
    return [beyond_the_context(others["qwen"][0], prompt) for prompt in FAMILY_PROMPTS]


def test_qwen_beyond_its_context(made, extrapolated):
    found = made["family qwen"]
    assert found["tokens"] == [tokens for tokens, _ in extrapolated]
    np.testing.assert_allclose(
        found["logprobs"], [logprobs for _, logprobs in extrapolated], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("off", ("logn", "ntk"))
def test_qwen_beyond_its_context_is_not_what_it_is_without(others, extrapolated, off):
    assert (
        beyond_the_context(others["qwen"][0], FAMILY_PROMPTS[1], **{off: False})[0]
        != extrapolated[1][0]
    )


def test_greedy_and_samples_shared_among_two_models(output, greedy):
    made = output(4)
    assert made["sharded greedy, a slot each"]["tokens"] == greedy
    assert made["sharded top_p, a slot each"]["tokens"] == made["top_p, a slot each"]["tokens"]


def test_stop_token_is_kept_as_the_last(made, greedy, stop_id):
    stopped = 0
    for tokens, reason, whole in zip(made["stop"]["tokens"], made["stop"]["stop_reason"], greedy):
        if stop_id in whole:
            stopped += 1
            assert reason == "stop" and tokens == whole[: whole.index(stop_id) + 1]
        else:
            assert reason == "length" and tokens == whole
    assert 0 < stopped < len(greedy)


def steps_needed(lengths: list[int], slots: int) -> int:
    """Forwards until all are done, when a free slot is filled, the longest prompt first, before anything is decoded."""
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


def test_a_finished_slot_takes_the_next_prompt_at_once(made):
    for recipe, slots in (("stop", 3), ("greedy", 3), ("greedy, a slot each", 16)):
        assert made[recipe]["steps"] == steps_needed(
            [len(tokens) for tokens in made[recipe]["tokens"]], slots
        )
    for recipe in ("stop", "greedy", "limits"):
        assert made[recipe]["told"][1] == sum(map(len, made[recipe]["tokens"])), (
            "every new token is told once"
        )
    assert made["stop"]["told"][0] == len(PROMPTS)


def test_prompt_and_response_stay_within_max_seq_len(made, greedy):
    for prompt, tokens, reason, whole in zip(
        PROMPTS, made["limits"]["tokens"], made["limits"]["stop_reason"], greedy
    ):
        assert reason == "length" and tokens == whole[: max(0, 23 - len(prompt))]
    assert all(len(tokens) == 1 for tokens in made["short"]["tokens"])


@pytest.mark.parametrize("kind", KINDS)
def test_samples_depend_on_the_seed_alone(made, output, kind):
    wanted = output(1)[f"{kind}, a slot each"]["tokens"]
    for way, served in WAYS.items():
        order = served.get("order", range(len(PROMPTS)))
        assert made[f"{kind}, {way}"]["tokens"] == [wanted[i] for i in order], way
    assert all(len(tokens) == SAMPLED for tokens in wanted)


def test_samples_differ_with_the_seed_and_among_one_prompts(made):
    assert made["other seed"]["tokens"] != made["plain, a slot each"]["tokens"]
    assert len(set(map(tuple, made["one prompt"]["tokens"]))) == 5
    assert made["one prompt"]["tokens"][0] == made["plain, a slot each"]["tokens"][0], (
        "sample 0 of prompt 0 either way"
    )


def test_samples_of_one_prompt_share_its_prefill(made):
    """A step that prefills tells one token for each sample; with as many slots as samples there is one such step."""
    for slots in ("five slots", "two slots"):
        assert made[f"one prompt, {slots}"]["tokens"] == made["one prompt"]["tokens"]
    assert made["one prompt, five slots"]["steps"] == SAMPLED


def test_another_degree_for_generation_changes_no_sample(output):
    """Trained at 2 or 4 ranks per model, also as two models of 2, generated at fewer; with an adapter too."""
    plain, adapted = (
        output(1)["plain, a slot each"]["tokens"],
        output(1)["relaid"]["with an adapter"],
    )
    assert plain != adapted
    found = {
        **{f"2: {k}": v for k, v in output(2)["relaid"].items()},
        **{f"4: {k}": v for k, v in output(4)["relaid"].items()},
        **{f"2 x 2: {k}": v for k, v in output(4)["relaid, two models"].items()},
    }
    assert {key.split(": ")[1] for key in found} == {
        "1",
        "2",
        "1, with an adapter",
        "2, with an adapter",
        "with an adapter",
    }
    for key, tokens in found.items():
        assert tokens == (adapted if "adapter" in key else plain), key


@pytest.mark.parametrize("beams, penalty", BEAMS)
def test_beam_search_is_transformers(made, hf, stop_id, beams, penalty):
    """Two stop tokens, so that beams end at different lengths."""
    stops = [stop_id, (stop_id + 40) % VOCABULARY]
    lengths = set()
    for prompt, tokens in zip(PROMPTS, made[f"{beams} beams, {penalty}"]):
        hf.generation_config.eos_token_id = None
        out = hf.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=30,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=stops,
            num_beams=beams,
            length_penalty=penalty,
            early_stopping=False,
        )
        theirs = out[0, len(prompt) :].tolist()
        while theirs and theirs[-1] == 0 and len(theirs) > len(tokens):
            theirs.pop()  # padding
        assert tokens == theirs
        lengths.add(len(tokens))
    assert len(lengths) > 1 or penalty == 2.0  # which favours the longest


def test_a_small_cache_serves_fewer_at_a_time(made, greedy):
    assert made["little memory"]["tokens"] == greedy
    assert made["little memory"]["steps"] > 2 * made["greedy, a slot each"]["steps"]


def test_a_stop_string_ends_a_response(made, greedy, stop_id):
    """The text of token i is <i>."""
    for tokens, reason, whole in zip(
        made["stop string"]["tokens"], made["stop string"]["stop_reason"], greedy
    ):
        ends = [at for at, token in enumerate(whole) if str(token).endswith(str(stop_id))]
        assert (reason, tokens) == (("stop", whole[: ends[0] + 1]) if ends else ("length", whole))


def settled(hf, **more) -> list[list[int]]:
    """transformers' greedy continuations under its own logits processors."""
    rows = []
    for prompt in PROMPTS:
        hf.generation_config.eos_token_id = None
        out = hf.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            **more,
        )
        rows.append(out[0, len(prompt) :].tolist())
    return rows


def test_repetition_penalty_is_transformers(made, greedy, hf):
    assert made["repetition"]["tokens"] == settled(hf, repetition_penalty=1.4) != greedy


def test_no_stop_before_the_least_number_of_tokens(made, hf, stop_id):
    assert made["not yet"]["tokens"] == settled(hf, min_new_tokens=20, eos_token_id=stop_id)
    assert made["not yet"]["tokens"] != made["stop"]["tokens"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_the_kept_set_comes_back(made, hf, kind):
    kept, tokens, logprobs = made["kept"][kind]
    for prompt, sets, row_tokens, row_logprobs in zip(PROMPTS, kept, tokens, logprobs):
        with torch.no_grad():
            rows = hf(torch.tensor([prompt + row_tokens])).logits[0, len(prompt) - 1 : -1].numpy()
        for row, chosen, token, logprob in zip(rows, sets, row_tokens, row_logprobs):
            wanted = kept_logprobs(row, **KINDS[kind])
            assert chosen == np.isfinite(wanted).nonzero()[0].tolist() and token in chosen
            assert abs(wanted[token] - logprob) <= 1e-4


@pytest.mark.parametrize(
    "recipe", ("greedy", "stop", "plain, three slots", "plain, the other way round")
)
def test_logprobs_are_the_full_forwards(made, recipe):
    for ours, scored in zip(made[recipe]["logprobs"], made[recipe]["scored"]):
        np.testing.assert_allclose(ours, scored, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_lie_in_the_kept_set_with_their_logprobs(made, hf, kind):
    """Against transformers' logits and an independent cut."""
    recipe = made[f"{kind}, three slots"]
    cut = 0
    for prompt, tokens, logprobs in zip(PROMPTS, recipe["tokens"], recipe["logprobs"]):
        with torch.no_grad():
            rows = hf(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].numpy()
        for row, token, logprob in zip(rows, tokens, logprobs):
            kept = kept_logprobs(row, **KINDS[kind])
            cut += np.isinf(kept).sum()
            assert abs(kept[token] - logprob) <= 1e-4
    assert (cut > 0) == (kind != "plain")


def test_bf16(made):
    for recipe in ("bf16", "bf16 greedy"):
        assert all(
            len(tokens) == SAMPLED and max(tokens) < VOCABULARY and min(tokens) >= 0
            for tokens in made[recipe]["tokens"]
        )
        logprobs = np.array(made[recipe]["logprobs"])
        assert np.isfinite(logprobs).all() and (logprobs <= 1e-3).all()
        np.testing.assert_allclose(logprobs, made[recipe]["scored"], atol=0.25)


@pytest.mark.parametrize("by", ("sample", "step"))
@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_the_softmax(made, kind, by):
    tokens, logprobs = made["choices"][f"{kind} by {by}"]
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
def test_draws_are_the_same_at_every_degree(made, output, kind):
    for by in ("sample", "step"):
        assert made["choices"][f"{kind} by {by}"][0] == output(1)["choices"][f"{kind} by {by}"][0]


def test_uniforms_are_uniform_and_independent():
    """Successive steps of one sample, and one step of successive samples and seeds, fill the square evenly."""
    n, bins = 60000, 8
    numbers, zero = torch.arange(n), torch.zeros(n, dtype=torch.long)
    pairs = {
        "steps": (uniforms(1, zero, numbers), uniforms(1, zero, numbers + 1)),
        "samples": (uniforms(1, numbers, zero), uniforms(1, numbers + 1, zero)),
        "sample and step": (uniforms(1, numbers, numbers), uniforms(1, numbers + 1, numbers)),
        "seeds": (uniforms(1, numbers, zero), uniforms(2, numbers, zero)),
    }
    for what, (x, y) in pairs.items():
        assert x.min() >= 0 and x.max() < 1
        cells = torch.bincount(
            (x * bins).long() * bins + (y * bins).long(), minlength=bins * bins
        ).double()
        chi_square = ((cells - n / bins**2) ** 2 / (n / bins**2)).sum().item()
        assert chi_square < 63 + 4 * math.sqrt(2 * 63), what


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
    (root / "rows.jsonl").write_text(
        "".join(json.dumps(dict(instruction=q, output=a)) + "\n" for q, a in SCORED)
    )
    launch(
        1,
        "dataset/start.py",
        "--train_file",
        str(root / "train.json"),
        "--save_dir",
        str(root / "model"),
        "--vocab_size",
        "480",
        "--dim",
        "64",
        "--n_heads",
        "4",
        "--n_kv_heads",
        "2",
    )
    return root


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("ranks", (1, 2))
def test_solver_score_is_transformers(small, tmp_path, ranks):
    launch(
        ranks,
        "solver_score.py",
        "--ckpt_dir",
        str(small / "model"),
        "--input_file",
        str(small / "rows.jsonl"),
        "--output_file",
        str(tmp_path / "out.jsonl"),
        "--max_batch_size",
        "2",
    )
    found = read_lines(tmp_path / "out.jsonl")
    model = AutoModelForCausalLM.from_pretrained(
        small / "model", attn_implementation="eager"
    ).eval()
    pieces = SentencePieceProcessor(model_file=str(small / "model" / "tokenizer.model"))
    assert len(found) == len(SCORED)
    for (instruction, output), row in zip(SCORED, found):
        prompt, response = [1, *pieces.encode(instruction)], [*pieces.encode(output), 2]
        assert row["prompt_tokens"] == prompt and row["tokens"] == response
        with torch.no_grad():
            logs = (
                model(torch.tensor([prompt + response]))
                .logits[0, len(prompt) - 1 : -1]
                .double()
                .log_softmax(-1)
            )
        wanted = logs[torch.arange(len(response)), response]
        np.testing.assert_allclose(row["logprobs"], wanted, atol=1e-4, rtol=0)
        assert abs(row["sum"] - wanted.sum().item()) <= 1e-3


def test_solver_generate_rows(small, tmp_path):
    """Two models of a rank each; every row's samples in the input's order, and one's own logprobs are what it scores."""
    launch(
        2,
        "solver_generate.py",
        "--ckpt_dir",
        str(small / "model"),
        "--input_file",
        str(small / "rows.jsonl"),
        "--output_file",
        str(tmp_path / "out.jsonl"),
        "--num_samples",
        "3",
        "--temperature",
        "0.9",
        "--max_new_tokens",
        "10",
        "--max_batch_size",
        "4",
        "--seed",
        "5",
        "--model_parallel_size",
        "1",
    )
    found = read_lines(tmp_path / "out.jsonl")
    assert [(row["index"], row["instruction"]) for row in found] == [
        (i, q) for i, (q, _) in enumerate(SCORED) for _ in range(3)
    ]
    for i in range(len(SCORED)):
        assert len({tuple(row["tokens"]) for row in found[3 * i : 3 * i + 3]}) == 3
    model = AutoModelForCausalLM.from_pretrained(
        small / "model", attn_implementation="eager"
    ).eval()
    pieces = SentencePieceProcessor(model_file=str(small / "model" / "tokenizer.model"))
    for row in found:
        assert row["stop_reason"] == ("stop" if row["tokens"][-1] == 2 else "length")
        assert row["output"] == pieces.decode(
            [token for token in row["tokens"] if token not in (1, 2)]
        )
        prompt = [1, *pieces.encode(row["instruction"])]
        with torch.no_grad():
            rows = model(torch.tensor([prompt + row["tokens"]])).logits[0, len(prompt) - 1 : -1]
        wanted = (rows.double() / 0.9).log_softmax(-1)[
            torch.arange(len(row["tokens"])), row["tokens"]
        ]
        np.testing.assert_allclose(row["logprobs"], wanted, atol=1e-4, rtol=0)
