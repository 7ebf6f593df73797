"""The three public GSM8K rules, their known traps, real gold answers, and hostile responses."""

import json
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest

from src.errors import UserError
from src.evaluation.gsm8k import RULES, extract, gold_of, grade, numeric_answer
from src.evaluation.scoring import summarize
from src.evaluation.tasks import TASKS, find_task, read_labels

REAL = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
real_data = pytest.mark.skipif(
    not REAL.is_dir(), reason="the GSM8K files are not beside this checkout"
)


@pytest.mark.parametrize(
    "response, gold, official, strict, flexible, numeric",
    [
        ("#### 18", "18", True, True, True, True),
        ("so 18 eggs\n#### 18\n", "She has <<9*2=18>>18.\n#### 18", True, True, True, True),
        ("#### 19", "18", False, False, False, False),
        ("#### 1,234,567", "1234567", True, True, True, True),
        ("#### 1234567", "#### 1,234,567", True, True, True, True),
        ("#### 18.", "18", False, True, True, True),  # official compares strings: "18." is not "18"
        ("#### 18.00", "18", False, False, False, True),  # only by value
        ("#### $18", "18", False, False, True, True),  # the pattern allows no "$" after "#### "
        ("The answer is $18.", "18", False, False, True, True),
        ("The answer is $1,800.", "1,800", False, False, True, True),
        ("#### -5", "-5", True, True, True, True),
        ("#### 5", "-5", False, False, False, False),
        ("it is -5 degrees", "-5", False, False, True, True),
        ("#### 1", "18", False, False, False, False),  # cut by the token limit
        ("9*2=18\n####", "18", False, False, True, True),  # cut earlier
        ("####18", "18", False, False, True, True),  # the blank is part of the pattern
        # a number in an echoed question
        ("#### 18\n\nQuestion: Tom has 5 eggs", "18", True, True, False, True),
        ("Question: what is 5?\nAnswer: eighteen", "18", False, False, False, False),
        ("#### 18\n#### 20", "18", True, True, False, True),  # first match against last
        ("#### 18, all in all", "18", True, True, True, True),  # "18," loses its comma
        ("I paid 18 . . .", "18", False, False, True, True),  # a lone "." is no number
        # three of them are the harness' last "number"; by value they are none
        ("18 ...", "18", False, False, False, True),
        ("7", "7", False, False, True, True),  # one digit: the second group of the pattern
        ("", "18", False, False, False, False),
        ("no idea", "18", False, False, False, False),
        ("#### .5", "0.5", False, False, False, True),
    ],
)
def test_rules(response, gold, official, strict, flexible, numeric):
    assert grade(response, gold) == {
        "official": official,
        "strict_match": strict,
        "flexible_extract": flexible,
        "numeric": numeric,
    }


WRITTEN = [
    # in a formula, in bold, in a sentence, with signs of money and units
    (r"Adding up gives $\boxed{18}$.", "18"), (r"it is $18$, i.e. \$18 ($$).", "18"),
    (r"\(18\).", "18"), (r"\[ 18 \]", "18"), ("$$18$$", "18"), ("18, $.", "18"), ("**18**", "18"),
    ("**$18**.", "18"), ("_18_", "18"), ("= 18", "18"), ("18%", "18"), (r"18\%", "18"),
    (r"\text{18}", "18"), (r"\mathbf{18}", "18"), (r"\boxed{18\text{ dollars}}", "18"),
    (r"\boxed{x = 18}", "18"), (r"\boxed{\$18.00}", "18"), ("She pays 18 dollars", "18"),
    ("18 cm^2", "18"), ("18 m^{2}.", "18"), ("18m", "18"), ("x_1 = 18", "18"),
    ("€18", "18"), ("18€", "18"),
    ("US$18", "18"), ("Rs18", "18"), ("18/day", "18"), ("```\n18\n```", "18"), ("18", "18.0"),
    ("<<9*2=18>>18", "18"), (r"\boxed{\text{eighteen}}, 18", "18"), (r"\boxed{18", "18"),
    # the box before the last number, the mark before the box
    (r"\boxed{18}, for 3 days", "18"), ("#### 18\n\\boxed{3}", "18"), ("#### **18** of 20", "18"),
    ("#### $18\nI used 3 steps", "18"), (r"#### \boxed{18} of 20", "18"), ("####18 of 20", "18"),
    ("#### Final Answer\n18 eggs", "18"),
    # thousands, points, fractions
    (r"\$1,800", "1800"), ("1{,}800", "1800"), (r"1\,800", "1800"), (r"1,\!800", "1800"),
    ("1 800", "1800"), ("1\u202f800", "1800"), ("1’800", "1800"), ("1,800.00", "1800"),
    ("10 000 000", "10000000"), (r"\boxed{1{,}800}", "1800"), (r"\frac{36}{2}", "18"),
    (r"\boxed{\dfrac{36}{2}}", "18"), ("36/2", "18"), ("1/2", "0.5"), ("3 1/2", "3.5"),
    # signs
    ("−5", "-5"), ("it is −5 degrees", "-5"), ("–5", "-5"), ("-$5", "-5"), (r"-\$5", "-5"),
    ("$-5$", "-5"), ("x=-5", "-5"), ("(−5)", "-5"), (r"\boxed{−5}", "-5"), ("#### −5", "-5"),
    (r"-\frac{1}{2}", "-0.5"), ("10-5", "5"), ("2–5", "5"), ("5 - 3", "3"),
]  # fmt: skip
ANOTHER = [
    ("1/2", "2"), ("1/2", "1"), ("10-5", "-5"), ("18 cm^2", "2"), ("x_18", "18"), ("1 800", "800"),
    ("1,800", "800"), ("−5", "5"), ("-$5", "5"), (r"\boxed{19}, not 18", "18"), ("1/0", "1"),
    ("#### 19, not 18", "18"), ("10^18", "18"), ("eighteen", "18"), ("1e18", "1000"), ("$", "0"),
    ("9" * 40, "9" * 18), (r"\frac{18}{0}", "18"),
]  # fmt: skip


@pytest.mark.parametrize(
    "response, gold, right",
    [(*pair, True) for pair in WRITTEN] + [(*pair, False) for pair in ANOTHER],
)
def test_numeric_takes_a_number_however_people_write_it(response, gold, right):
    assert grade(response, gold)["numeric"] is right
    assert grade(f"First 7 and 12.5.\nSo: {response}\n", gold)["numeric"] is right


# text, and the number that it means or None
MEANT = [
    # the marked text is read as a whole: fractions, mixed numbers, thousands, signs, multipliers
    ("#### 1/2", "0.5"), ("#### 36/2", "18"), ("#### 2 1/2", "2.5"), (r"#### 2\frac12", "2.5"),
    ("#### 1½", "1.5"), ("#### 1 000", "1000"), ("#### 1e6", "1000000"), ("#### 1'800", "1800"),
    ("#### 1.2 million", "1200000"), ("#### 5 thousand", "5000"), ("#### - 5", "-5"),
    ("#### - $5", "-5"), ("#### −5", "-5"), ("#### １８", "18"), ("#### 18 dollars", "18"),
    ("#### x = 18", "18"), ("#### 9 * 2 = 18", "18"), ("#### 18-hour", "18"), ("#### 18%", "18"),
    ("#### 18 in 3 days", "18"), ("#### 18, since 9 times 2", "18"), ("#### 18 (2 * 9)", "18"),
    ("#### **18 dollars**", "18"), ("#### 18 km/h", "18"), ("#### 18 m/s^2", "18"),
    ("#### 18 m²", "18"),
    *((f"#### {text}", None) for text in (
        "18k", "18^2", "18!", "18x", "18 x", "18e5x", "18*2", "18 * 2", "18 + 2", "18 - 2", "18-2",
        "18 or 20", "18, 20", "18,5", "18 20", "18:30", "18 : 2", "18.5.2", "(17, 18)", "18/x",
        "x/18", "18(2)", "18_9", "0x18", "18²", "18π", r"18\pi", r"18\sqrt{2}", r"\sqrt{18}", "√18",
        r"18\cdot 2", r"18\div 2", "18 ÷ 2", "18 times 2", "18 squared", "18 and a half", "18/0",
        "2x = 18", "x + 2 = 18", "x^2 = 18", "x > 18", r"x \ne 18", "±18", "|-18|", "3 36/2",
        "18 hundred thousand", "3 dozen", "18 eggs and 20 hens", "2 eggs * 9 = 18", "--18", "1e400",
        "18 hours 30 minutes", "18 feet 6 inches", "18 hours and 30 minutes", "18⁹", "18₈", "10¹⁸",
        "18 lakh", "18 crore", "18 mil", "1.8M", "18M", "18 bn", "18 gross",
    )),
    ("#### 18⅓", "55/3"), ("#### ⅔", "2/3"), ("#### 18 ml", "18"), ("#### 18mL", "18"),
    # the last box that holds something, or what a broken one still says
    (r"\boxed{18 \text{ eggs in 3 days}}", "18"), (r"\boxed{18~\text{cm}^2}", "18"),
    (r"\boxed{\text{Total cost} = \$18}", "18"), (r"\boxed{- 18}", "-18"), (r"\boxed{1e3}", "1000"),
    (r"\boxed{\frac12}", "0.5"), (r"\boxed{18}, then \boxed{}", "18"), (r"it is \boxed{18", "18"),
    (r"Put it in \boxed{}. 9 eggs at 2 are 18", "18"), (r"\boxed{\boxed{18}}", "18"),
    *((rf"It is \boxed{{{text}}}.", None) for text in (
        "36-18", r"2\cdot 18", r"2 \times 18", "x/18", r"\sqrt{18}", "18^2", "18!", "18k", "18x",
        "17-18", "(17, 18)", r"x \ne 18", "x > 18", "2,18", r"17 \text{ or } 18", r"\log 18",
        r"\text{not } 18", "18_{9}", "1{8}", r"\frac{1}{x} 18", r"18\frac{36}{2}", r"17 \quad 18",
        r"\frac{36}{2}x", r"18\times10^3", r"x=17 \text{ or } x=18", "{2 \\over 18}", "2:18",
        r"\text{cannot be determined}",
    )),
    (r"\boxed{}18", None), (r"\boxed{36-18", None), (r"\boxed{\text{unknown}}, 18", None),
    # a heading is no mark, and what was only thought no answer
    ("#### 1. Understand\n#### 2. Compute\n9*2\n\n\\boxed{18}", "18"),
    ("#### 1) First\n9*2=18.\n#### 2) Then\nThe answer is 18.", "18"),
    ("#### Step 1: 2 eggs\n2 * 9 = 18\n#### Answer\n18", "18"),
    ("#### **1. Understand**\n#### 18", "18"), ("#### 1 - Understand\n#### 18", "18"),
    ("<think>\nThe format is #### 12? No.\n</think>\n#### 18", "18"),
    (r"<think>\boxed{12}</think>The answer is 18.", "18"),
    # what is said to be the answer, before the last number
    ("The answer is 18, since 9 times 2.", "18"), ("The answer is **18** (9*2).", "18"),
    ("Final Answer: 18\n\nI hope it is correct for problem 3.", "18"),
    ("The answer is 9*2=18. I used 2 steps.", "18"), ("The answer is found in 2 steps: 18", "18"),
    ("Answer: 16 - 3 - 4 = 9 eggs. She makes 9 * 2 = $18.", "18"),
    ("The answer is 17? No, 18", "18"), ("The answer is 18 - 2.", None),
    ("The answer is not 18.", None), ("The answer is (17, 18).", None),
    ("The answer is twice 18", None), ("The answer is 2x. She has 18", None),
    # the last number of a sentence, unless it is a part of something else
    ("18 eggs, which is $18", "18"), ("It costs 18!", "18"), ("**$18**.", "18"), ("10pm", "10"),
    ("| total | 18 |", "18"), ("- 18", "18"), ("− 18", "-18"), ("18 degrees", "18"),
    (r"\begin{align*} x &= 9*2 \\ &= 18 \end{align*}", "18"), ("１８", "18"),
    ("18 million", "18000000"), ("so it is 18⅓.", "55/3"), ("after 2 days she has 18 eggs", "18"),
    ("In 2 hours, 18 eggs", "18"), ("In 7 days 84 eggs are laid.", "84"),
    ("After 2 weeks 14 remain", "14"),
    ("So after 5 hours 300 miles were driven.", "300"), ("He pays $10 and 10 remain", "10"),
    ("He buys 2 pounds and 3 apples", "3"), ("#### 20 gross income", "20"),
    ("#### 18 repeating patterns", "18"), ("#### 12 (plus 3 free ones)", "12"),
    ("the sum of them is 18", "18"),
    *((text, None) for text in (
        "= 18!", "18k", "18x", "x/18", r"\sqrt{18}", "18^2", "18**2", "18e5x", "2 × 18", "18²",
        "2 x 18", r"2\div 18", "18, 000", "$18, 000$", "1,00,018", "0,18", "18:30", "2 : 18",
        "1·018", "minus 18", "It isn't 18", "f(18)", "1 18", "x > 18", "between 17 and 18",
        "2 + 18", "It takes 2 hours and 18 minutes", "5 weeks and 18 days", "5 ft 18 in", "10¹⁸",
        "half of 18", "double 18", "the sum of 10 and 18", "the product of 2 and 18.",
        "18_9", "CO18",
    )),
    # decimals that repeat
    (r"#### 33.\overline{3}", "100/3"), (r"\boxed{33.\bar{3}}", "100/3"), (r"33.\bar3", "100/3"),
    (r"#### 33.\dot{3}", "100/3"), (r"#### -0.1\dot{2}3\dot4", "-1233/9990"),
    (r"#### 1,234.5\overline{6}", "37037/30"), (r"so it is .\overline{18}", "2/11"),
    *((text, None) for text in (
        "#### 33.(3)", "#### 33.3\u0305", "#### 33.3 repeating", r"#### 33.\overline{x}",
        r"#### 33.{\overline{3}}", "#### 33.3 (repeating)", r"#### 33.\mathring{3}",
        r"\boxed{18\overline{3}}",
    )),
    # a number and its power of ten
    (r"#### 1.8\times10^1", "18"), (r"\boxed{1.8 \times 10^{3}}", "1800"), ("1.8 x 10^3", "1800"),
    ("#### 1.8 × 10³", "1800"), ("#### 2*10**3", "2000"), (r"-1.8 \cdot 10^{-1}", "-0.18"),
    (r"#### 1.8\times10^3\text{ cm}", "1800"), (r"#### 1.8 \times 10^1 = 18", "18"),
    ("#### 1.8e3 dollars", "1800"), ("The answer is $2.5 \\times 10^2$.", "250"),
    *((text, None) for text in (
        "#### 10^3", "#### 3 + 2*10^3", r"#### x^2\times10^3", "6/2*10^2", r"1.8\times10^3x",
        r"#### 1.8\times10^x", r"18\times10^3", "#### 12*10^2",
    )),
    # ordinals, sets of one, money of any country
    ("#### 18^{th}", "18"), (r"\boxed{18^{\text{th}}}", "18"), ("#### 18^th", "18"),
    ("#### 22nd", "22"), (r"#### \{18\}", "18"), (r"\boxed{\left\{18\right\}}", "18"),
    (r"\boxed{\{17, 18\}}", None), (r"\boxed{18^{t}}", None),
    *((f"#### {text}", "18") for text in (
        "C$18", "A$18", "NZ$ 18", r"C\$18", "$18USD", "18USD", "$18 USD", "USD 18", "CAD18",
        "EUR 18.00", "18 GBP", "₱18", "Can$18", "18Rs", r"18\textsuperscript{th}",
        r"\lbrace 18 \rbrace", r"1.8\times{10}^1",
    )),
    ("It costs C$18", "18"), ("she paid 18EUR.", "18"), ("#### -C$18", "-18"),
    ("#### 18USDT", None),
    # two units, a remainder, parts, and what comes on top
    *((form.format(text), None) for form in ("#### {}", r"It is \boxed{{{}}}.", "The answer is {}")
      for text in (
        "18 ft 6 in", "18 ft. 6 in.", "18 lbs 6 oz", "18 lb 6 oz", "18 hr 30 min", "18 h 30 min",
        "18h 30m", "18 hrs. 30 min.", "18 m 50 cm", "18 kg 500 g", "18 km 200 m", "18 yd 2 ft",
        "18 yards 2 feet", "18 gallons 2 quarts", "18 degrees 30 minutes", "18 wks 2 days",
        r"18\text{ ft }6\text{ in}", "18 feet six inches", "18 hours and thirty minutes",
        "18 hours, thirty-five minutes", "18 dollars and fifty cents", "18 hours and a half",
        "18 remainder 2", "18 with a remainder of 2", "18 and two thirds", "18 and one half",
        "18 and three-quarters", "18 and 2/3", "18 plus tax", "18 dollars plus tip", "18 plus",
        "18 percent of 50", "18% of 50", r"18\% of \$50", "18 minus two", "18 times x",
        "18m30s", "18min30s", "18 ft. & 6 in.", "$18 and fifty cents", "18 one-half",
        "18 (remainder 2)", "18, remainder 2", "18 (plus tax)", "18, plus tax", "18 times two",
        "18 to the power of 2", "18 to the third power", "18 per cent of 50",
    )),
    *((text, None) for text in (
        "It takes 5 hrs 18 min", "$5 and 18 cents", "5 yards and 18 inches",
        "an hour and 18 minutes", "It takes two hours 18 minutes", "20% of 18", "two thirds of 18",
        "a quarter of the 18", "it is 5 remainder 18", "5 kg 18 g",
    )),
    *((text, "18") for text in (
        "#### 18 percent of students", "#### 18 times a day",
        "#### 18 shirts and half as many hats",
        "#### 18 minutes to get to the 10th", "so $5 an hour and 18 hours", "70 times one is 18",
        "#### 18% of the eggs", "#### 18 hours one-way", "#### 18 m", "#### 18 cm",
        "The remainder is 18", "It takes a day. She has 18",
    )),
    # more digits than a float has
    ("#### 0.3333333333333333", "0.3333333333333333"), (f"#### 1{'0' * 21}", f"1{'0' * 21}"),
    ("so 3.14159265358979", "3.14159265358979"), ("9" * 1000, "9" * 1000), ("9" * 1001, None),
]  # fmt: skip


@pytest.mark.parametrize("text, meant", MEANT, ids=lambda value: str(value)[:40])
def test_numeric_reads_the_whole_of_an_answer_or_refuses_it(text, meant):
    assert numeric_answer(text) == (None if meant is None else Fraction(meant))


@pytest.mark.parametrize("gold, right, wrong", [
    ("x\n#### 1/2", "#### 0.5", "#### 1"), ("x\n#### 1 000", "#### 1000", "#### 1"),
    ("0.3333333333333333", "#### 0.3333333333333333", "#### 0.3333333333333334"),
    (f"1{'0' * 21}", f"1{'0' * 21}", f"1{'0' * 20}"),
    ("3.14159265358979", "3.14159265358979", "3.14159265359"),
    ("so #### 3 #### 4", "#### 3", "#### 4"), ("-5", "#### - 5", "#### 5"),
    ("x\n#### 1.8 x 10^3", "#### 1800", "#### 1.8"), ("x\n#### 18^{th}", "18", "1"),
    ("x\n#### 3.\\bar{3}", "#### 10/3", "#### 3"),
])  # fmt: skip
def test_numeric_reads_golds_as_it_reads_answers(gold, right, wrong):
    assert grade(right, gold)["numeric"] and not grade(wrong, gold)["numeric"]


@pytest.mark.parametrize("gold", ["12.05.2020", "1,2", "x\n#### 18^2", "x\n#### 3, 4", "9" * 1001])
def test_a_gold_without_a_value_is_refused_where_numeric_counts(gold, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "q", "answer": answer} for answer in ("18", gold)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert len(read_labels("GSM8K", str(path)).golds) == 2
    with pytest.raises(UserError, match=r"rows.jsonl:2: gold .* has no value"):
        read_labels("GSM8K", str(path), "numeric")


@pytest.mark.parametrize("piece", [
    "<", "<1", "<<", "#### (", "#### 1. ", "####\n1", r"\boxed{}", r"\boxed{.", r"\boxed{1}",
    r"\text{", r"\frac{1}{", "1 000 ", "1/", "1e", "½", "１", "answer is 1 ", "Answer: 1",
    "answer is ", "-", "− ", "x=", "*", "1*", "_1", "^1", "not ", "not a ", "1 and ", "1, ", "=",
    "the ", "million", r"\dot3", r"1.\bar", r"0.\overline{3", "1.8 x 10^", "1e1", "2*10", "USD",
    "C$", "1 ft ", "1 hour and ", "1 and a ", r"\{", "^{th", "one ",
])  # fmt: skip
def test_hostile_numbers_take_no_time(piece, a_moment):
    long = piece * (1_000_000 // len(piece))
    for text in (long, f"#### {long}", rf"\boxed{{{long}", f"the answer is {long}", f"{long}18"):
        fastest = float("inf")
        for _ in range(5):
            start = time.process_time()
            numeric_answer(text)
            fastest = min(fastest, time.process_time() - start)
            if fastest < a_moment:
                break
        assert fastest < a_moment, text[:30]


def test_extract_gives_the_compared_form_or_none():
    text = "9 + 9 = 18\n#### 1,018. or $7."
    assert [extract(rule, text) for rule in RULES] == ["1018.", "1018", "7"]
    assert [extract(rule, "none") for rule in RULES] == [None] * 3


def score(responses, golds, truncated=None):
    verdicts = [grade(response, gold) for response, gold in zip(responses, golds)]
    return summarize(verdicts, [extract("official", text) for text in responses], truncated)


def harness(response: str, gold: str, pattern: str, which: int) -> bool:
    """The task file of lm-evaluation-harness in its own words.

    These are findall, group, regexes_to_ignore, ignore_case.
    """
    matches = re.findall(pattern, response)
    answer = matches[which] if matches else "[invalid]"
    if isinstance(answer, tuple):
        answer = [group for group in answer if group][0]
    sides = [answer.strip(), gold]
    for ignored in (",", r"\$", "(?s).*#### ", r"\.$"):
        sides = [re.sub(ignored, "", side) for side in sides]
    return sides[0].lower() == sides[1].lower()


def test_harness_rules_agree_with_its_regular_expressions_on_random_texts():
    import random

    rng, seen = random.Random(0), set()
    pieces = ["#### ", "18", "1,8", "-", "$", ".", ",", " "]
    pieces += ["\n", "####", "eggs", "0", "Question: "]
    strict, flexible = r"#### (\-?[0-9\.\,]+)", r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
    for _ in range(4000):
        response = "".join(rng.choices(pieces, k=rng.randint(1, 9)))
        gold = f"<<9*2=18>>18\n#### {rng.choice(['18', '1,818', '-18', '0'])}"
        got = grade(response, gold)
        assert got["strict_match"] == harness(response, gold, strict, 0), response
        assert got["flexible_extract"] == harness(response, gold, flexible, -1), response
        seen.add((got["strict_match"], got["flexible_extract"]))
    assert len(seen) == 4  # the texts were not all of one kind


@real_data
@pytest.mark.parametrize("part, n", [("train", 7473), ("test", 1319)])
def test_real_gold_answers_are_right_by_every_rule(part, n):
    rows = [json.loads(line) for line in (REAL / f"{part}.jsonl").read_text().splitlines()]
    answers = [row["answer"] for row in rows]
    labels = [extract("official", answer) for answer in answers]
    for golds in (list(map(gold_of, rows)), labels):
        summary, per_row = score(answers, golds)
        right = {"official": 1.0, "strict_match": 1.0, "flexible_extract": 1.0, "numeric": 1.0}
        assert summary == {"n": n, "unparsed": 0, "truncated": 0} | right
        assert [row["answer"] for row in per_row] == labels


@pytest.mark.parametrize(
    "text",
    [
        "#### " + "9" * 5_000_000,
        "9" * 5_000_000,
        "#" * 5_000_000,
        "#### -" * 1_000_000,
        "1 " * 2_000_000,
        "-" * 5_000_000,
        "$.," * 2_000_000,
        "#### 1e3000000",
        "1e3000000",
        "#### " + "(" * 2_000_000,
        "((((9**9)**9)**9)**9)",
        "#### 9**9**9**9",
        "." * 3_000_000 + "!",
        "-$" * 2_000_000,
        "٣" * 2_000_000,
        "#### __import__('os').abort()",
        "\0" * 1_000_000,
        "\ud800#### 18" * 300_000,
    ],
    ids=lambda text: f"{text[:12]!r} x{len(text)}",
)
def test_hostile_responses_take_no_time(text, a_moment):
    def seconds():
        start = time.process_time()
        grade(text, "18")
        return time.process_time() - start

    # this process's time, the fastest of five: other processes are not the grader's fault
    assert min(seconds() for _ in range(5)) < a_moment


def test_the_answer_at_either_end_of_a_very_long_response_is_found():
    assert grade("#### 18" + " x" * 500_000, "18")["official"]
    assert grade("x " * 500_000 + "18", "18")["flexible_extract"]


def test_scores_keep_every_response_in_the_denominator():
    responses = ["#### 18", "18", "", "#### 7"]
    summary, rows = score(responses, ["18"] * 4, truncated=[False, True, True, False])
    shares = {"official": 0.25, "strict_match": 0.25, "flexible_extract": 0.5, "numeric": 0.5}
    assert summary == {"n": 4, "unparsed": 2, "truncated": 2} | shares
    assert [row["official"] for row in rows] == [True, False, False, False]
    assert [row["answer"] for row in rows] == ["18", None, None, "7"]


def test_score_refuses_what_cannot_be_scored():
    with pytest.raises(UserError, match="0 responses"):
        score([], [])
    with pytest.raises(ValueError, match="1 verdicts, 2 answers"):
        summarize([{"official": True}], ["1", "2"])
    with pytest.raises(ValueError, match="2 truncation flags"):
        score(["a"], ["1"], [True, False])


@pytest.mark.parametrize(
    "row, gold",
    [
        ({"label": "18", "output": "#### 19"}, "18"),
        ({"label": 18}, "18"),
        ({"label": 18.0}, "18"),
        ({"label": 0.5}, "0.5"),
        ({"label": 1e-7}, "0.0000001"),
        ({"label": -2.5e-5}, "-0.000025"),
        ({"label": 1e23}, "1" + "0" * 23),
        ({"label": -0.0}, "0"),
        ({"label": 2**70}, "1180591620717411303424"),
        ({"label": None, "answer": "5"}, "5"),
        ({"label": " ", "answer": [], "final_answer": "5"}, "5"),
        ({"label": None, "answer": "", "output": ["#### 4"]}, "#### 4"),
        ({"question": "q", "answer": "a\n#### 3"}, "a\n#### 3"),
        ({"output": ["#### 4"]}, "#### 4"),
        ({"question": "q", "answer": 3}, "3"),
        ({"problem": "q", "final_answer": "3"}, "3"),
        ({"Problem": "q", "Answer": 3.0}, "3"),
    ],
)
def test_gold_of_a_row(row, gold):
    assert gold_of(row) == gold


def test_a_row_or_gold_without_an_answer_is_refused():
    with pytest.raises(UserError, match="instruction"):
        gold_of({"instruction": "x"})
    for gold in ("Paris", "18 apples", "", "####", "...", "the answer is #### ", "x\n#### .,"):
        with pytest.raises(UserError, match="gold answer"):
            grade("#### 18", gold)


def test_gold_label_may_be_written_with_a_dollar():
    assert all(grade("#### 18", " $18 ").values())


def test_tasks_are_data_and_an_unknown_one_names_the_nearest():
    task = find_task("GSM8K")
    assert task is TASKS["GSM8K"] and task.metric in task.grade("#### 1", "1")
    assert task.rules == (*RULES, "numeric") == tuple(task.verdicts("#### 1", "1"))
    with pytest.raises(UserError, match="did you mean 'GSM8K'"):
        find_task("gsm8")


def test_another_rule_may_be_the_headline():
    task = find_task("GSM8K", "numeric")
    assert not find_task("GSM8K").is_right("it is $18$", "18") and task.is_right("it is $18$", "18")
    with pytest.raises(UserError, match="--rule symbolic: GSM8K has official, .*numeric"):
        find_task("GSM8K", "symbolic")
