"""Answers: extraction, exact match against hostile text, pass@k, bootstrap. About 25 s, much of it waiting
for limits to strike. Run: pytest tests/test_answers.py
"""
import itertools
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
import time
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from data import answers, bootstrap_interval, extract_answer, is_correct, pass_at_k


def boxed(answer):
    return f"So the answer is \\boxed{{{answer}}}."


@pytest.mark.parametrize("text, answer", [
    (r"\boxed{1} and then \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\left\{1\right.}", r"\left\{1\right."),  # an escaped brace has no partner to be balanced with
    (r"\boxed{1} then \boxed{2", "1"),  # cut off: the last complete box
    (r"{ \boxed{7", "7"),  # cut off, no complete box: the last number
    (r"\boxed{a \boxed{5}}", "5"),
    (r"\boxed{5} } } {", "5"),
    (r"\fbox{7} is 8", "7"),
    (r"$\boxed 5$", "5"),
    (r"\boxed 1,000, I think of 3", "1,000"),
    (r"\boxed {5}", "5"),
    (r"\\boxed{5}", "5"),
    (r"8 \boxed{}", ""),  # an empty box is an answer, and wrong
    (r"put it in \boxed, please: 4 apples", "4"),
    ("so it is $1{,}200$.", "1{,}200"), (r"about $12\,000$", r"12\,000"), ("16-3=13", "13"),
    ("16-3", "3"),
    ("x = -3", "-3"),
    ("costs $1,234.50.", "1,234.50"),
    ("it is -$18", "-$18"),
    ("about 3/4 of it", "3/4"),
    ("a 5% rise", "5%"),
    ("is .5", ".5"),
    ("1,1111", "1111"),
    ("1.5e-3", "1.5e-3"),
    ("12" * 600 + " end", "12" * 600),
    ("9" + " " * 5000, "9"),
    ("1,000" + "." * 96, "1,000"),  # stands across the edge of the tail that is searched first
    ("none", None),
    ("", None),
])
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("gold, guess", [
    ("18", "18.00"), ("18", "$18"), ("18", r"\$18"), ("18", "18."), ("$18$", "18"), ("18", r"\(18\)"),
    ("1000", "1,000"), ("1,000", "1000"), ("1000", "1{,}000"), ("1000", r"1\,000"), ("1000", r"1,\!000"),
    ("1000000", "1 000 000"), ("051283", "51283"), ("073", r"\textbf{(073)}"), ("0", "-0.0"), ("5", "+5"),
    ("-5", "\u22125"), (".5", "0.50"), ("3e8", r"3 \times 10^{8}"), ("3e8", "300000000"), ("1e-3", ".001"),
    ("4.5e33", r"4.5\cdot10^{33}"), (r"\boxed{7}", "7"),
    (r"\frac12", "1/2"), (r"\frac{3}{4}", "0.75"), (r"\dfrac{1}{2}", r"\frac{1}{2}"),
    ("2\\sqrt3", r"\sqrt{12}"), ("50%", "50"), ("50", r"50\%"), ("0.5", "50%"), ("x=5", "5"),
    ("3000", "x = 3,000"), ("x=3,000", "3000"), ("3000", r"C = \$3,000\text{ dollars}"),
    ("18", "Total cost = $18"), ("3000", r"\text{Total} = 3,000"), ("18", r"f(2) = 18"), ("-3", "x_1 = -3"),
    ("x = 3,000", "x=3000"),
    ("(1,2)", "(1, 2)"), ("[0,1)", "[0,\n1)"),
    (r"\{1,2\}", "2, 1"), (r"x^2+1", "1+x^2"), ("5", r"5\text{ cm}"), ("90", r"90^\circ"),
    ("18", "18 dollars"), ("18", "$18 dollars."), ("1000", r"1,000\text{ books}"),
    ("2.5", "2.50~miles per hour"), ("18 books", "18"), ("18 dollars", "$18"),
    ("3e8", r"3 \times 10^{8}\ \mathrm{pages}"), ("1.6e-19", r"1.6 \times 10^{-19} \text{ J}"),
    ("1.05", "1.05 eV"), ("9.8", r"9.8 \text{ m}/\text{s}^2"), ("9.8", r"9.8\ \mathrm{m\,s^{-2}}"),
    ("3000000", r"3\text{ million}"), ("3000000", "$3 million dollars"), ("18", "18 years old"),
    ("18", "\u20ac18"), ("18", "18 USD"),
    ("18", "USD 18"), ("1000", "US$1,000"), ("18", "**18**"), ("B", "**B**"), ("B", "**(B) Venus**"),
    (r"\frac12", "**1/2**"),
    ("C", r"\text{(C)}"), ("B", "B)"), ("B", "B."), ("B", "(B) Venus"), ("B", r"\text{B. Venus}"),
    ("B", r"\textbf{(B)}\ 5"), ("(B)", "B: 5"), ("Z", r"\mathrm{(Z)}"), ("B", r"\text{Option B}"),
    ("B", r"\textbf{B})"), ("B", r"(\text{B})."),
    ("even", r"\text{Even}"), ("Two Dogs", r"\textbf{two  dogs}"),
    (r"1.6 \times 10^{-19} \mathrm{J}", r"1.6e-19 \mathrm{J}"), ("5000000 dollars", "5 million dollars"),
    ("5 million", "5 million dollars"), ("10^6", "1,000,000"),
    ("B", "B) A thermometer"), ("C", "C) Vitamin C"), ("D", "D. Both A and B"), ("B", "(B) 5.0 N"),
    (r"1500\pi", r"1,500\pi"), (r"1,500\pi", r"1{,}500\pi"), ("1000/3", r"\frac{1{,}000}{3}"),
    ("1200x", "1,200x"), (r"\frac13", r"0.\overline{3}"), (r"1.\bar{3}", r"\frac43"),
    (r"\frac37", r"0.\overline{428571}"), (r"-2.1\overline{6}", r"-\frac{13}{6}"),
    (r"5\sqrt{2}", "5\u221a2"), ("3e8", "3 \u00d7 10^8"), ("1e-3", "10\u207b\u00b3"), ("x^2", "x\u00b2"),
    (r"[1,\infty)", "[1, \u221e)"), ("1.5", "1\u00bd"), ("12", "3\u00b74"), ("9", "9 cm\u00b2"),
    ("9", "9 m^2"), ("5", "5 km/h"), ("5", "5 m/s"), ("9.8", "9.8 m/s^2"), ("1:2:3", "2:4:6"),
    ("9:15", r"9{:}15"), ("1/2", "1:2"), (r"3:00\text{ p.m.}", "3:00 PM"), ("3:00", "3:00 p.m."),
    ("1 hour 30 minutes", r"1\text{ hr } 30\text{ min}"), ("5 feet, 6 inches", "5 ft and 6 in"),
    ("x=3, y=4", "(3,4)"),
    (r"10^3\text{ kg}", r"1000\ \mathrm{kg}"), (r"\sqrt{10}", "10^{1/2}"),
    ("5 km", r"5\text{ km}"), ("5 m", "5 meters"), ("5", r"5 \text{ m}"), ("5 kg", "5"),
    ("-1./3", "-1/3"), ("-3./2", "-1.5"), ("3/2", "1 1/2"), ("1.5", "1 1/2 hours"), ("18", r"\[18\]"),
    ("E_{1},E_{2}", "E_1, E_2"), (r"\frac13E_1+\frac23E_2", r"\frac{E_1+2E_2}{3}"), ("2516_8", "(2516)_8"),
    (r"\frac{1}{m} t", "t/m"), (r"\frac{1}{\sqrt{2}}c", r"\frac{c}{\sqrt2}"), ("2516_8", "2516"),
    ("y=x", "x=y"), (r"\frac{1}{m} t", r"\frac{1}{m} \, t"), ("50t", r"50t \text{ miles}"),
    ("5 meters", "5 m"), ("140", "140_{10}"), ("60\u00b0", r"60^\circ"), ("60\u00b0", "60"),
    ("10 s", "10"), ("1011_2", "01011_2"), ("18", "18\u00b0C"), ("25\u00b0C", "25"),
    ("25\u00b0C", r"25^\circ\text{C}"),
    (r"\frac{eE_0}{m}", r"\frac{e E_0}{m}"),
    (r"y^{\prime}+r y-r x(t)=0", "y'+ry-rx(t)=0"), (r"\frac12", r"\frac12 \text{ cm}"), ("3-2i", "-2i+3"),
])
def test_same_answer(gold, guess):
    assert is_correct(boxed(guess), gold)


@pytest.mark.parametrize("gold, guess", [
    ("18", "19"), ("18", ""), ("1", "1,0"), ("12345", "12"), ("12345678901234567890", "12345678901234567891"),
    ("1e-30", "2e-30"), ("3e8", "38"), ("1/3", "0.33"), ("(1,2)", "(2,1)"), ("[0,1)", "(0,1)"), ("5", "5, 6"),
    ("5", "x"), ("even", "odd"), ("listen", "silent"), ("", "18"), ("18", "18 or 19"), (".", "."),
    ("18", "19 books"), ("18", "-18 books"), ("18", "18 books and 3"), ("3", "3 Million"), ("3", "3 dozen"),
    ("1.6e-19", r"1.7 \times 10^{-19} \text{ J}"), ("0.0000001", r"0.0000004 \text{ m}"),
    ("2", r"2 \text{ hours } 30 \text{ minutes}"), ("5", r"5\text{ feet }6\text{ inches}"),
    ("7", r"7 \text{ dimes and } 3 \text{ nickels}"), ("18", r"18\text{ apples}, 25\text{ pears}"),
    ("3", r"3\text{ million}"), ("18", "< 18"), ("3", "x = 3,000"),
    ("3000", "x = 3,001"), ("3", "x = 3, y = 4"),
    ("3", "x = 3 or x = 4"), ("x = 3,000", "x = 3"), ("x = 3", "y = 3"), ("2000", "3000 = x"),
    ("18", r"\geq 18"), ("2", "2 x"),
    ("3", "3 quarters"), ("3", "3 tenths"), ("3 books", "3 pages"), ("3 books", "4"), ("5", "5 abcd x"),
    ("B", "C)"), ("B", "B) or C)"), ("B", "A) Venus, B) Mars"), ("B", "B or C"), ("B", "BC"),
    ("B", "(A) and (B)"), ("B", "B) or C"), ("B", "A. Venus B. Mars"), (r"1500\pi", r"1, 500\pi"),
    ("(1,200)", "1200"), (r"0.\overline{3}", r"0.\overline{6}"), ("0", r"0.\overline{12}"),
    ("1", r"1.\overline{3}"), ("5", "5\u221a2"), ("2", "2\u00b3"), ("1", "1\u00bd"), ("10", "10\u2076"),
    ("1:2:3", "1:3:2"), ("1:2:3", "1:2"), ("12:00", "6:00"), (r"3:00\text{ p.m.}", r"3:00\text{ a.m.}"),
    ("9:15", r"9{:}45"), ("9", r"9{:}45"),
    (r"1 \text{ hour } 30 \text{ minutes}", r"1 \text{ hour } 20 \text{ minutes}"),
    ("1 hour", "1 hour 20 minutes"), ("x=3, y=4", "(4,3)"), ("(3,2,1)", "a=1, b=2, c=3"),
    (r"\{x \mid x > 3\}", "3"), ("9 m", "9 m^2"),
    ("18", "USD 19"), ("18", "****"), ("8", "2**3 + 2**1"), ("10^{-20}", "10^{-19}"),
    (r"1.6 \times 10^{-19} \mathrm{J}", r"1.7 \times 10^{-19} \mathrm{J}"),
    (r"0.0000002 \text{ m}", r"0.0000001 \text{ m}"),
    ("5 km", "5 m"), ("12 kg", "12 m"), (r"5\text{ km}", r"5 \text{m}"), ("5 cm", "5 mm"),
    (r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}", "2"), ("2E_0", "2"), ("1", "1 1/2"),
    (r"a \equiv 3 \pmod 7", "7"), ("-1./3", "-1"), (r"\frac{1}{m} t", r"\frac{1}{m}"), ("3t", "3"),
    (r"\pi r^2 h", r"\pi r^2"), ("y''+y=0", "y'+y=0"), ("f'(x)", "f(x)"), (r"\gamma", "0.577216"),
    (r"(\gamma-1)mc^2", r"(\gamma-3)mc^2"), ("11", "11_2"), ("101_2", "101_3"), ("3", r"\neq 3"),
    (r"3t \text{ miles}", r"3 \text{ miles}"),
])
def test_other_answer(gold, guess):
    assert not is_correct(boxed(guess), gold)


@settings(max_examples=200)
@given(st.decimals(-10**6, 10**6, places=4), st.decimals(-10**6, 10**6, places=4))
def test_decimals_agree_with_math_verify(a, b):
    assert answers._math_equal(f"{a:f}", f"{a:,.6f}")
    assert is_correct(boxed(f"{b:,f}"), f"{a:f}") == (a == b) == answers._math_equal(f"{a:f}", f"{b:f}")


def slow_last_box(text):
    """The definition: from the last box's start to the first, the first that is closed."""
    for start in reversed([match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]):
        depth = 1
        for token in re.finditer(r"\\.|[{}]", text[start:], re.S):
            depth += {"{": 1, "}": -1}.get(token[0], 0)
            if depth == 0:
                return text[start:start + token.start()].strip()
    return None


PIECES = ["\\boxed{", "\\fbox{", "\\boxed", "{", "}", "}", "\\", "\\\\", "\\{", "\\}", "\\frac", "x", "7"]


@settings(max_examples=500)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_last_box_is_as_defined(text):
    assert answers.last_box(text) == slow_last_box(text)


@settings(max_examples=100)
@given(st.text(st.sampled_from("\\{}()[]0123456789.,-$%/^_! \nabx\0\ud800\u0663"), max_size=60))
def test_any_text_gets_a_verdict(text):
    assert extract_answer(text + boxed("42")) == "42"
    assert is_correct(text, "42") in (False, True) and is_correct(boxed(text), "42") in (False, True)
    assert is_correct(boxed("42"), text) in (False, True)


@settings(max_examples=100)
@given(st.integers(), st.text(max_size=200))
def test_the_last_box_wins(number, before):
    assert is_correct(before + boxed(number), str(number))
    assert not is_correct(before + boxed(number), str(number + 1))


HOSTILE = {  # each is slow, deep or large for sympy or for a regular expression
    "power": "10^10^10", "zero": "1/0", "exponent": "1e9999999999", "nul": "\0", "surrogate": "\ud800",
    "deep": r"\frac{1}{" * 10_000 + "1" + "}" * 10_000, "unclosed": r"\frac{" * 10_000,
    "digits": "7" * 3_000_000, "commas": "111," * 1_000_000, "minuses": "-" * 3_000_000,
    "backslashes": "\\" * 3_000_000, "boxes": r"\boxed{" * 300_000, "spaces": "\\boxed" + " " * 3_000_000,
    "braces": "{" * 2_000_000 + "}" * 999_999, "powers": r"5 \text{ cm}" + "^2 " * 300 + "+ 1",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text(name, capfd):
    assert is_correct(boxed(HOSTILE[name]), "42") is False
    assert is_correct(HOSTILE[name], "42") is False
    assert is_correct(boxed("42"), HOSTILE[name]) is False
    assert is_correct(HOSTILE[name] + boxed(r"\frac{84}{2}"), "42")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("endless", ["9^{9^{9^9}}", "(" * 990])  # inside one C call; in Python
def test_limit_ends_the_worker(endless, capfd):
    assert is_correct(boxed(r"\frac{84}{2}"), "42")
    worker, start = answers._worker, time.monotonic()
    assert is_correct(boxed(endless), "42") is False
    assert worker.poll() is not None and time.monotonic() - start < answers.WALL_SECONDS + 20
    assert is_correct(boxed(r"\frac{126}{3}"), "42")  # by a new one
    assert capfd.readouterr() == ("", "")


def test_a_verdict_is_asked_once(monkeypatch):
    assert is_correct(boxed(r"\sqrt{49}"), "7")
    monkeypatch.setattr(answers, "_start_worker", None)
    monkeypatch.setattr(answers, "_worker", None)
    assert is_correct(boxed(r"\sqrt{49}"), "7")


def test_worker_that_died_between_questions_is_replaced():
    assert is_correct(boxed(r"\frac{1}{3}"), r"\frac{2}{6}")
    answers._worker.kill()
    answers._worker.wait()
    assert is_correct(boxed(r"\frac{1}{3}"), r"\frac{3}{9}")


def test_interrupted_question_leaves_no_reply_behind(monkeypatch):
    is_correct(boxed(r"\frac{1}{3}"), r"\frac{2}{6}")

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt
    monkeypatch.setattr(answers._worker, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        is_correct(boxed(r"\frac{1}{7}"), r"\frac{2}{14}")
    assert not is_correct(boxed(r"\frac{1}{7}"), r"\frac{3}{14}")  # the reply left behind would say yes


def test_without_math_verify_it_stops(monkeypatch):
    monkeypatch.setattr(answers, "_worker", None)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="math-verify"):
        is_correct(boxed(r"\frac{1}{9}"), r"\frac{4}{36}")


def _fractions(offset):
    """Twelve questions for the worker, every second one wrong: was each verdict right?"""
    return [is_correct(boxed(f"{i}/{i + 1}"), f"{3 * i}/{3 * (i + 1 + i % 2)}") == (i % 2 == 0)
            for i in range(offset, offset + 12)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method):
    assert all(_fractions(100))  # our own worker runs
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert all(itertools.chain(*pool.map(_fractions, [200, 300])))
    assert all(_fractions(400))


def test_threads():
    right = []
    threads = [threading.Thread(target=lambda i=i: right.extend(_fractions(500 + 20 * i))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 48 and all(right)


@pytest.mark.parametrize("shell", ["exec <&- >&- 2>&-", "trap '' ALRM PROF"])
def test_closed_streams_and_ignored_signals(shell, tmp_path):
    """A worker inherits both; and none is left when the program ends."""
    code = ("import data, data.answers\n"
            "ok = data.is_correct('\\\\boxed{1/2}', '0.5')\n"
            "ok = ok and not data.is_correct('\\\\boxed{9^{9^{9^9}}}', '2')\n"
            "data.is_correct('\\\\boxed{1/3}', '2/6')\n"
            "open('out', 'w').write(f'{ok} {data.answers._worker.pid}')")
    subprocess.run(["sh", "-c", f'{shell}; exec "$@"', "sh", sys.executable, "-c", code], check=True,
                   cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=300)
    ok, pid = (tmp_path / "out").read_text().split()
    assert ok == "True"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_import_is_light():
    code = ("import sys, data\n"
            "heavy = 'torch transformers sympy math_verify pyarrow huggingface_hub numpy'\n"
            "assert not set(heavy.split()) & set(sys.modules)\n"
            "assert data.is_correct('\\\\boxed{051283}', '51283') and data.answers._worker is None")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pass_at_k_counts_subsets():
    """Against its definition: the share of all k-subsets of n samples that hold a right one."""
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_range(nck):
    n, c, k = nck
    value = pass_at_k(n, c, k)
    assert 0 <= value <= 1 and (value == 0) == (c == 0) and pass_at_k(n, c, 1) == pytest.approx(c / n)
    assert type(pass_at_k(np.int64(n), np.int64(c), np.int64(k))) is float


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


def test_pass_at_k_refuses_fractions():
    with pytest.raises(TypeError):
        pass_at_k(4, 0.5, 1)


def test_bootstrap_interval():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval(values) == bootstrap_interval(list(values))
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    low, high = bootstrap_interval([0, 1] * 200)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.005)  # the normal approximation at 400 problems
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.005)
    narrow = bootstrap_interval([0, 1] * 200, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval([0.25]) == (0.25, 0.25)
    assert bootstrap_interval(np.ones(3_000_000), resamples=3) == (1, 1)  # one resample at a time


@pytest.mark.parametrize("bad", [dict(values=[]), dict(values=[[1, 2]]), dict(values=[1, float("nan")]),
                                 dict(values=[1], level=1), dict(values=[1], resamples=0)])
def test_bootstrap_interval_refuses(bad):
    with pytest.raises(ValueError):
        bootstrap_interval(**bad)


def test_bootstrap_interval_covers():
    """On made-up data the 95% interval holds the true mean about 95% of the time."""
    rng = random.Random(0)
    inside = 0
    for _ in range(200):
        low, high = bootstrap_interval([rng.random() < 0.3 for _ in range(100)], resamples=400)
        inside += low <= 0.3 <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_a_trace_cut_off_has_its_answer_in_a_box_or_nowhere():
    assert is_correct("so 42", "42") and not is_correct("so 42", "42", finished=False)
    assert is_correct(f"so {boxed(42)}. Check: 6 x", "42", finished=False)
    assert not is_correct("so \\boxed{42", "42", finished=False)


def test_long_texts_are_searched_from_the_end():
    assert is_correct("x" * 5_000_000 + boxed(42), "42")
    assert not is_correct(boxed("1" * 2000 + "+1"), "1" * 2000 + "+2")
    assert Decimal("42") == answers._decimal("42")
