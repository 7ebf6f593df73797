"""One whole iteration: the same at every division of the ranks, and right.

It is equal to transformers' models with the formulas
written out. Numbers in names: lines of docs/ppo.md."""

import math

import pytest
import torch
from pyarrow import parquet

from tests.ppo import worker
from tests.ppo.conftest import LAYOUTS
from tests.ppo.reference import Reference
from tests.ppo.worker import KL_COEF, MAX_GRAD_NORM, NUMBER, PTX_BATCH, PTX_ROWS, RUNS
from tests.trainer.tiny import apart, theirs

TOLERANCE = 1e-5
MAIN = ("iteration", "micro-batches")
TWICE = ("twice", "twice, in turn, offloaded")
# run: (the prompts that are kept, the rewards of their samples, the share of what was generated)
FILTERED = {
    "filter": ([1, 3, 0, 2], (0, 1, 0.5, 0, 1, 0, 0, 1), 8 / 16),
    "filter, one group": ([2], (1, 0), 2 / 8),
}
# run: (the places of the rollouts that have a reward and are kept, round by round; their groups)
SILENT = {
    "no opinion": ([[0, 2, 3, 6, 7]], [0, 1, 1, 3, 3]),
    "no opinion, no groups": ([[0, 2, 3, 6, 7]], None),
    "no opinion, filter": ([[2, 3], [0, 1, 6, 7]], [1, 1, 4, 4, 7, 7]),
}
CHECKED = [name for name in RUNS if name not in TWICE and name != "filter, nothing"]


def scored(run: str) -> tuple[list[float] | None, list[int] | None]:
    """The scores of a run's kept rollouts, where they are given, and their groups."""
    if run in FILTERED:
        return list(map(float, FILTERED[run][1])), None
    if run in SILENT:
        kept, groups = SILENT[run]
        return [
            float(worth[place]) for worth, places in zip(RUNS[run].worth, kept) for place in places
        ], groups
    return None, None


@pytest.fixture(scope="module")
def expected(folder, results):
    """A run's name → its Reference, by the rollouts and minibatches of one rank; computed once."""
    known = {}

    def of(name: str) -> Reference:
        if name not in known:
            got = results["one rank"][name]
            known[name] = Reference(
                folder, RUNS[name], got["rollouts"], got["minibatches"], got["ptx"], *scored(name)
            )
        return known[name]

    return of


DIVISIONS = {layout: [*map(int, file.split("-")[1:]), 1][:2] for layout, file in LAYOUTS.items()}
PLACES = [
    (layout, run) for layout in LAYOUTS for run in RUNS if worker.runs_at(run, *DIVISIONS[layout])
]


def everywhere(names=CHECKED):
    """Each of the runs at each division."""
    return pytest.mark.parametrize("layout, run", [place for place in PLACES if place[1] in names])


def close(got, want, what, tolerance=TOLERANCE):
    assert got == pytest.approx(want, rel=tolerance, abs=tolerance), what


# --- what is compared, and that it is worth comparing ---------------------------------------------


@everywhere([*CHECKED, *TWICE])
def test_line_27_every_division_draws_the_same_tokens(results, layout, run):
    for name in ("prompt", "response", "truncated", "place"):
        assert [r[name] for r in results[layout][run]["rollouts"]] == [
            r[name] for r in results["one rank"][run]["rollouts"]
        ]


def test_the_rollouts_are_worth_comparing(results):
    rows = results["one rank"]["iteration"]["rollouts"]
    assert [r["prompt"] for r in rows] == [p.tokens for p in worker.prompts()]
    assert {r["truncated"] for r in rows} == {True, False} and {r["rule"] for r in rows} == {
        0.0,
        1.0,
    }
    assert len({len(r["response"]) for r in rows}) > 3
    assert any(
        len(set(map(tuple, pair))) == 2
        for pair in zip(*[[r["response"] for r in rows[k::2]] for k in (0, 1)])
    )
    ends = results["one rank"]["first-token ends"]["rollouts"]
    assert {(len(r["response"]), r["truncated"]) for r in ends} >= {(1, False), (3, True)}, (
        "EOS first, and truncated"
    )
    for name in ("top_k", "top_p, min_new_tokens"):
        assert any(len(r["response"]) >= 3 for r in results["one rank"][name]["rollouts"])


def test_the_update_is_worth_comparing(expected):
    """Clipping bites, norms are clipped, and every tensor moves far more than the tolerance."""
    means = expected("iteration").means
    assert 0.05 < means["clipfrac"] < 0.95 and 0.05 < means["value_clipfrac"] < 0.95
    assert means["policy_grad_norm"] > MAX_GRAD_NORM
    assert min(expected("iteration").moved.values()) > 30 * TOLERANCE
    clips = expected("clips").means
    assert clips["bounded"] > 0.02 and clips["raised"] > 0.02, (
        "the dual clip and the upper range are both active"
    )


KNOBS = [
    (name, knob, value)
    for name, run in RUNS.items()
    if name in CHECKED
    for knob, value in run.settings.items()
]
KNOBS = [
    (name, knob)
    for name, knob, _ in KNOBS
    if not knob.startswith(("max_", "mini_", "ppo_", "samples_", "filter_"))
]


@pytest.mark.parametrize("name, knob", KNOBS)
def test_every_knob_changes_its_run(folder, results, expected, name, knob):
    """Without it the reference comes to other numbers.

    A knob that did nothing would be seen below.
    """
    from tests.ppo.reference import KNOBS as DEFAULTS

    got, want, plain = results["one rank"][name], expected(name), {knob: DEFAULTS[knob]}
    if knob == "advantage":
        plain |= {"advantage": "reinforce++" if want.knobs.advantage == "gae" else "gae"}
    if knob == "critic_warmup" and name != "critic_warmup":
        plain = {knob: NUMBER + 1}
    other = Reference(
        folder, RUNS[name], got["rollouts"], got["minibatches"], got["ptx"], *scored(name), **plain
    )
    pairs = [
        [getattr(each, role).state_dict() for each in (want, other)]
        for role in ("reference", "policy", "value")
    ]
    weights = max(apart(*pair) for pair in pairs)
    logged = max(
        (abs(want.means[name] - x) for name, x in other.means.items() if name in want.means),
        default=0.0,
    )
    assert max(weights, logged) > 10 * TOLERANCE


# --- against the reference ------------------------------------------------------------------------


@everywhere()
def test_lines_1_2_4_6_8_13_17_scores_logprobs_values_and_advantages_are_the_reference_s(
    results, expected, layout, run
):
    want, rows = expected(run), results[layout][run]["rollouts"]
    per_token = {
        "logprobs": want.old,
        "ref_logprobs": want.ref,
        "entropy": want.entropy,
        "rewards": want.rewards,
        "advantages": want.advantages,
    }
    if want.values is not None:
        per_token |= {"values": want.values, "returns": want.returns}
        per_token |= {"old_values": want.old_values, "value_targets": want.targets}
    for i, row in enumerate(rows):
        assert row["truncated"] == want.cut(i)
        for name, numbers in {
            "score": want.scores,
            "shaped": want.shaped,
            **want.components,
        }.items():
            close(row[name], numbers[i], name)
        for name, numbers in per_token.items():
            close(row[name], list(map(float, numbers[i])), name)
        assert ("values" in row) == (want.values is not None)


@everywhere()
def test_lines_13_16_19_losses_norms_and_weights_are_the_reference_s(
    results, expected, layout, run
):
    want, got = expected(run), results[layout][run]
    logged = {name: x for name, x in want.means.items() if name not in ("bounded", "raised")}
    if want.kl == "k1":
        logged.pop("kl_loss", None)
    for name, x in logged.items():
        assert got["stats"][name] == pytest.approx(x, rel=TOLERANCE, abs=1e-6), name
    for role in ("policy", "value"):
        if got[role] is not None:
            assert apart(got[role], getattr(want, role).state_dict()) < TOLERANCE, role
    assert apart(got["reference"], want.reference.state_dict()) < TOLERANCE
    assert (got["value"] is None) == (want.knobs.advantage != "gae")


@everywhere()
def test_line_26_what_is_logged(results, expected, layout, run):
    stats, rows, ref = (
        results[layout][run]["stats"],
        results[layout][run]["rollouts"],
        expected(run),
    )
    n, tokens = len(rows), sum(len(r["response"]) for r in rows)
    kl = [float((o - r).sum()) for o, r in zip(ref.old, ref.ref)]
    want = {
        "shaped_reward": sum(ref.shaped) / n,
        "kl": sum(kl) / n,
        "kl_max": max(float((o - r).max()) for o, r in zip(ref.old, ref.ref)),
        "entropy": sum(float(e.sum()) for e in ref.entropy) / tokens,
        "response_length": tokens / n,
        "truncated": sum(map(ref.cut, range(n))) / n,
        "kl_coef": KL_COEF,
    } | {name: x for name, x in ref.means.items() if name not in ("bounded", "raised")}
    if ref.policy_steps:
        want |= {"policy_skipped": 0.0, "policy_steps": ref.policy_steps}
    if ref.kl == "k1":
        want.pop("kl_loss", None)
    every = ref.scores
    if run in FILTERED or run in SILENT:
        rounds = 1 if run == "filter, one group" else 2
        every = [x for worth in RUNS[run].worth[:rounds] for x in worth]
        opinions = [x for x in every if not math.isnan(x)]
        mean = sum(opinions) / len(opinions)
        want |= {"reward": mean, "reward/worth": mean}
        if run in FILTERED:
            want["kept"] = FILTERED[run][2]
        if "filter" in run and run in SILENT:
            want["kept"] = n / len(every)
        if run in SILENT:
            silent = 1 - len(opinions) / len(every)
            want |= {"no_opinion": silent, "no_opinion/worth": silent}
    else:
        want |= {
            "reward": sum(ref.scores) / n,
            **{f"reward/{name}": sum(x) / n for name, x in ref.components.items()},
        }
    if RUNS[run].settings.get("samples_per_prompt") == 2:
        pairs = [{x for x in pair if not math.isnan(x)} for pair in zip(every[::2], every[1::2])]
        want["equal_groups"] = sum(len(pair) < 2 for pair in pairs) / len(pairs)
    timed = {f"seconds/{phase}" for phase in ("generate", "reward", "logprobs", "ref_logprobs")} | {
        "seconds",
        "memory_gb",
    }
    timed |= {f"memory_gb/{role}" for role in ("policy", "reference", "reward")}
    timed |= {"tokens_per_s/generate", "tokens_per_s/update"}
    timed |= {"seconds/update_policy"} if ref.policy_steps else set()
    if ref.values is not None:
        values, returns = torch.cat(ref.values).double(), torch.cat(ref.returns).double()
        want |= {
            "values": float(values.mean()),
            "returns": float(returns.mean()),
            "value_skipped": 0.0,
            "explained_variance": 1 - float((returns - values).var() / returns.var()),
            "value_steps": ref.value_steps,
        }
        timed |= {"seconds/values", "seconds/update_value", "memory_gb/value"}
    for name, value in want.items():
        assert stats[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-6), name
    assert all(stats[name] > 0 for name in timed)
    drift = set() if run == "whole softmax" else {"logprob_drift"}
    if RUNS[run].zero >= 2 and RUNS[run].offload and "DP" in layout:
        timed |= {"seconds/relayout", "gb/relayout"}  # the others' rollouts are remembered
    assert set(stats) == {*want, *timed, *drift}


@everywhere()
def test_line_30_decoding_with_the_cache_drifts_little_from_one_forward(results, layout, run):
    """With the kept tokens replayed, too.

    And it is not reported where sampling had another distribution.
    """
    got = results[layout][run]
    if run == "whole softmax":
        assert "logprob_drift" not in got["stats"]
        return
    drift = max(
        abs(a - b) for r in got["rollouts"] for a, b in zip(r["logprobs"], r["rollout_logprobs"])
    )
    assert got["stats"]["logprob_drift"] == pytest.approx(drift, abs=1e-9)
    assert drift < 2e-5 and (drift > 0 or run not in MAIN)


@everywhere()
def test_line_4_the_ratio_is_exactly_one_before_the_first_step(results, layout, run):
    """To the last bit, over whatever tokens were kept, in any micro-batches; and not after it."""
    if run != "critic_warmup":
        assert all(results[layout][run]["ratio starts at one"])


@everywhere()
def test_line_14_advantages_are_whitened_over_all_ranks_rollouts(results, expected, layout, run):
    every = torch.tensor([a for r in results[layout][run]["rollouts"] for a in r["advantages"]])
    if expected(run).whitens:
        assert float(every.mean()) == pytest.approx(0, abs=1e-6)
        assert float(every.std(correction=0)) == pytest.approx(1, rel=1e-5)


@everywhere(MAIN)
def test_line_21_every_epoch_takes_all_minibatches_reshuffled(results, layout, run):
    """Each rollout once an epoch, the same minibatches at any division, drawn as the seed says."""
    got = results[layout][run]
    assert got["steps"] == got["stats"]["policy_steps"] == got["stats"]["value_steps"] == 2 * 2
    plan, everyone = got["minibatches"], list(range(8))
    assert [sorted(a + b) for a, b in zip(plan[::2], plan[1::2])] == [everyone, everyone]
    assert plan[:2] != plan[2:]
    assert plan[0] != everyone[:4], "not shuffled"


@everywhere()
def test_line_13_minibatches_are_the_same_at_any_division(results, layout, run):
    assert results[layout][run]["minibatches"] == results["one rank"][run]["minibatches"]


# --- single knobs ---------------------------------------------------------------------------------


@everywhere(["reward_norm"])
def test_line_22_the_rewards_moments_go_on_from_the_last_run_and_are_saved(
    results, expected, layout, run
):
    """With the settings of the reward, so that a run with others can say so."""
    state = results[layout][run]["state"]
    close(state["policy"]["reward_moments"], expected(run).reward_moments, "reward_moments")
    flags = {"reward_norm": True, "reward_scale": 1.5, "reward_bias": 0.1, "reward_clip": 1.0}
    assert state["policy"].items() >= flags.items() and state["value"] == {}


@everywhere(["value_norm"])
def test_line_23_the_returns_moments_go_on_from_the_last_run_and_are_saved(
    results, expected, layout, run
):
    state = results[layout][run]["state"]
    close(state["value"]["value_moments"], expected(run).value_moments, "value_moments")
    assert "reward_moments" not in state["policy"]


@everywhere(["target_kl"])
def test_target_kl_ends_the_policy_s_steps_and_not_the_value_s(results, expected, layout, run):
    stats = results[layout][run]["stats"]
    assert stats["policy_steps"] == expected(run).policy_steps == results[layout][run]["steps"]
    assert 1 < stats["policy_steps"] < stats["value_steps"] == 4
    assert max(expected(run).logged["approxkl"]) < 2 * RUNS[run].settings["target_kl"], (
        "barely above: the bound itself decides"
    )


@everywhere(["critic_warmup"])
def test_line_25_in_the_critic_s_warmup_the_policy_stays(folder, results, layout, run):
    got = results[layout][run]
    assert got["steps"] == 0 and "policy_loss" not in got["stats"]
    assert apart(got["policy"], theirs(folder / "policy").state_dict()) == 0.0
    assert apart(got["value"], theirs(folder / "value").state_dict()) > 0.001
    assert results[layout]["after critic_warmup"]["steps"] == 2


def test_line_2_without_replay_log_probabilities_are_over_the_whole_vocabulary(results):
    """Of the same tokens: sampling is the same, and what was left out has a probability again."""
    masked, whole = (
        results["one rank"]["top_k"]["rollouts"],
        results["one rank"]["whole softmax"]["rollouts"],
    )
    assert [r["response"] for r in masked] == [r["response"] for r in whole]
    pairs = [(a, b) for m, w in zip(masked, whole) for a, b in zip(m["logprobs"], w["logprobs"])]
    assert all(a > b for a, b in pairs)
    assert [r["rollout_logprobs"] for r in masked] == [r["rollout_logprobs"] for r in whole]


def test_every_row_of_the_pretraining_mix_is_taken_once_a_pass(results, layout):
    batches = results[layout]["ptx"]["ptx"]
    assert [len(rows) for rows in batches] == [PTX_BATCH] * 2 and sorted(
        set(sum(batches, []))
    ) == list(range(PTX_ROWS))
    assert batches == results["one rank"]["ptx"]["ptx"]


@everywhere(list(FILTERED))
def test_groups_with_equal_rewards_are_replaced_by_others(results, layout, run):
    """In the order in which they came, and no more are asked for than are needed."""
    got, each, (kept, worth, _) = results[layout][run], worker.prompts()[::2], FILTERED[run]
    assert [r["prompt"] for r in got["rollouts"]] == [
        each[i].tokens for i in kept for _ in range(2)
    ]
    assert [r["score"] for r in got["rollouts"]] == list(map(float, worth))
    assert [r["place"] for r in got["rollouts"]] == list(range(2 * len(kept)))
    assert got["rounds left"] == len(RUNS[run].worth) - {"filter": 2, "filter, one group": 1}[run]


@everywhere(list(SILENT))
def test_rollouts_without_a_reward_are_left_out(results, layout, run):
    rows, each = results[layout][run]["rollouts"], [p.tokens for p in worker.prompts()]
    kept, groups = SILENT[run]
    assert [r["prompt"] for r in rows] == [each[place] for places in kept for place in places]
    assert [r["score"] for r in rows] == scored(run)[0]
    assert [r["place"] for r in rows] == list(range(len(rows)))
    alone = [i for i, group in enumerate(groups or []) if groups.count(group) == 1]
    assert all(set(rows[i]["advantages"]) == {0.0} for i in alone)
    assert len(alone) == {"no opinion": 1}.get(run, 0)


def test_samples_of_a_prompt_stay_on_one_rank_and_a_rank_may_have_none(results):
    rows = {name: got["filter, one group"]["rows of each rank"] for name, got in results.items()}
    assert (
        sorted(rows["DP 2"]) == [0, 2]
        and sorted(rows["TP 2, DP 2"]) == [0, 0, 2, 2]
        and rows["TP 4"] == [2] * 4
    )


def test_where_no_group_differs_nothing_is_learned(folder, results, layout):
    got = results[layout]["filter, nothing"]
    assert got["steps"] == 0 and got["stats"]["kept"] == 0.0 and got["stats"]["reward"] == 0.5
    assert not {"policy_loss", "response_length", "kl"} & set(got["stats"])
    assert apart(got["policy"], theirs(folder / "policy").state_dict()) == 0.0
    assert apart(got["value"], theirs(folder / "value").state_dict()) == 0.0


def test_offload_and_in_turn_give_the_same_bits(results, layout):
    """Of the weights and of the optimizers' state, on every rank, after two iterations.

    State went away and came back.
    """
    plain, moved = (results[layout][name] for name in TWICE)
    assert moved["digests"] == plain["digests"]
    assert plain["digests"] != results[layout]["iteration"]["digests"]
    names = ("policy_loss", "value_loss", "kl", "policy_grad_norm", "value_grad_norm")
    assert [moved["stats"][name] for name in names] == [plain["stats"][name] for name in names]
    for role in ("policy", "value"):
        assert apart(plain[role], results["one rank"]["twice"][role]) < TOLERANCE


def test_the_dump_has_a_row_for_every_rollout_in_the_order_of_their_places(folder, results, layout):
    files = list((folder / f"dump {LAYOUTS[layout]}").iterdir())
    assert [file.name for file in files] == [f"iteration-{NUMBER + 1:06d}.parquet"]
    table, rows = parquet.read_table(files[0]).to_pylist(), results[layout]["iteration"]["rollouts"]
    assert len(table) == len(rows) == 8
    for i, (row, want, prompt) in enumerate(zip(table, rows, worker.prompts())):
        words = {"prompt": want["prompt"], "response": want["response"]}
        assert row == {
            "iteration": NUMBER + 1,
            "place": i,
            "gold": prompt.gold,
            "prompt_tokens": want["prompt"],
            "tokens": want["response"],
            **{name: " ".join(map(str, ids)) for name, ids in words.items()},
            "stop_reason": "length" if want["truncated"] else "stop",
            "score": want["score"],
            "shaped_score": want["shaped"],
            "score_verifier": want["verifier"],
            "score_rule": want["rule"],
            **{
                name: want[name]
                for name in (
                    "rollout_logprobs",
                    "logprobs",
                    "ref_logprobs",
                    "entropy",
                    "values",
                    "rewards",
                    "advantages",
                    "returns",
                )
            },
        }
