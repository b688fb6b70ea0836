r"""Is this answer right, and what do many verdicts say: exact match, pass@k, bootstrap intervals.

The answer of a text is its last \boxed{...} (balanced braces; or \fbox), else its last number; of a trace cut
off its box only. Plain decimals are compared here, exactly and in microseconds ("$1,000.00" is "1000",
"051283" is "51283", "3e8" is "3 \times 10^{8}"); so are identical strings, words ("\text{even}" is "Even")
and named numbers ("x = 3,000" is "3000", "x=1, y=2" is "y=2, x=1"), options ("B) Mars" is "B"), ratios and
times of day ("2:4:6" is "1:2:3"), compound amounts ("1 hour 30 minutes") and a number against one with a unit
("18 books" is "18"). Everything else (fractions, roots, tuples, intervals, percent, other units) goes to
math-verify, which reads LaTeX.

math-verify runs sympy on what a model wrote, and 9^{9^9} keeps sympy busy for years inside one C call, where
no Python timeout reaches. So it runs in one worker process under limits that the operating system enforces:
the worker dies, the verdict is False, the next question starts a new worker.

Left out: tolerance (0.33 is not 1/3; math-verify compares six decimals), conversion of units, proofs, code.
Try the worker: echo '["\\frac12", "0.5"]' | python data/answers.py    (replies: ready, 1)
"""
import atexit
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from decimal import Decimal
from functools import lru_cache
from operator import index
from unicodedata import normalize

MAX_TEXT = 1_000_000  # characters of a text that are searched, from its end
MAX_ANSWER = 1_000  # characters; longer is no final answer and never right
CPU_SECONDS = 2  # for one question to math-verify. CPU time: a busy machine must not change a verdict
WALL_SECONDS = 60  # and never longer than this, whatever the worker waits for
MEMORY = 2 << 30  # bytes of address space for the worker (Linux only)

# A brace or a box's start; groups: the box's brace, or its number if it has none ("\boxed 5"). A backslash
# escaped once too often ("\\boxed") is forgiven.
_BRACE = re.compile(r"\\\\?(?:boxed|fbox)(?:\s*(\{)|\s+(-?[0-9]+(?:[.,/][0-9]+)*))|\\.|[{}]", re.S)
_GROUPED = r"[0-9]{1,3}(?:(?:,|\{,\}|,?\\[,!])[0-9]{3})+(?![0-9])"  # with thousands separators
_NUMBER = re.compile(
    r"(?:(?<![\w)\]}])[-\u2212]\\?\$?)?"  # a minus after a letter, digit or bracket is a subtraction
    r"(?:(?:" + _GROUPED + r"|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][+-]?[0-9]{1,3}(?!\w)|/[0-9]+(?![0-9/]))?(?:\s?\\?%)?")
_DECIMAL = re.compile(
    r"([+-]?)\s*([0-9]{1,3}(?:(?:,(?:\\!)?|\{,\}|\\[,!;: ]|[ ~])[0-9]{3})+|[0-9]*)(?:\.([0-9]*))?"
    r"(?:(?:[eE]|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^)\s*(?:\{([+-]?[0-9]{1,3})\}|([+-]?[0-9]{1,3})))?")
_STYLED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
# "B", "(B)", "B) Vitamin C", "(B). Venus", "B: Venus", but not "B) or C)"
_LETTER = re.compile(
    r"(?:[Oo]ption )?\(?([A-Z])(?:[).:]{1,2}(?:[ \\](?!(?:or|and) )(?:(?!\b[A-Z]\)|\b[A-Z][.:] ).)+)?)?")
# Written without LaTeX: signs, roots, powers and fractions.
_SIGNS = str.maketrans({"\u2212": "-", "\u00d7": "\\times ", "\u00b7": "\\cdot ", "\u22c5": "\\cdot ",
                        "\u221e": "\\infty "})
_ROOT = re.compile(r"\u221a ?([0-9]+|[A-Za-z]|\([^()]*\))")
_POWER = re.compile("[\u00b2\u00b3\u00b9\u2070\u2074-\u2079\u207b]+")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
# Words behind a number that are more than its unit.
_CHANGES = (r"(?:percent\w*|half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten)ths?|pairs?|"
            r"dozens?|times|twice|squared|cubed|below|minus|plus|and|or|to)\b")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # powers of ten
_EXPONENT = r"(?: ?\^ ?\{? ?-?[0-9]\}?)"
_SYMBOLS = r"[kMG]?eV|AU|[kM]?pc|kg|[kMG]?Hz|k?Pa|USD|EUR|[cmk]m"  # of units, written bare
# A number, perhaps "million", and its unit: "18 books", "3 million", "1.6e-19 ' J", "9.8 ' m / ' s ^2" (a
# quote stands for \text). Bare units have four letters or are well known: "3 m" may be a product.
_UNIT = re.compile(
    r"(.*?[0-9.}])(?:[ ~']|\\[,;: ])+(?!.*\b" + _CHANGES + r")(?:(" + "|".join(_SCALES) + r")s?\b ?)?"
    r"([a-z]{4,}(?: [a-z]{2,}){0,3}|"
    r"(?-i:" + _SYMBOLS + "|ergs?|[cmk]?m(?:" + _EXPONENT + "|/(?:s|h|min)" + _EXPONENT + r"?))|"
    r"(?<=')[^0-9%]*(?:\^ ?\{? ?-?[0-9][^0-9%]*)*|(?<=ion)|(?<=dred)|(?<=sand))", re.I)
_SYMBOL = re.compile(r"[0-9.}](?:[ ~']|\\[,;: ])+(" + _SYMBOLS + r"|m)[ ']*\Z")
_MIXED = re.compile(r"[0-9.}](?:[ ~']|\\[,;: ])+(?!times\b)[A-Za-z]{3,}[^0-9]*[0-9]")  # 2 hours 30 minutes
# What stands for one number or several, each with its unit, in a form that math-verify misreads.
_THOUSANDS = re.compile(r"(?<![0-9.,])" + _GROUPED)
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar) ?(?:\{([0-9]+)\}|([0-9]))")
_RATIO = re.compile(r"([0-9.]+(?: ?: ?[0-9.]+)+)(?:[ '~\\]*([ap])\.? ?m\.?)?", re.I)
_AMOUNT = r"([0-9]+(?:\.[0-9]+)?) ?(?!(?:and|or|times)\b)([a-z])[a-z]+\.?(?:,| and)? ?"
_RELATION = re.compile(r"[<>\u2260\u2264\u2265]|\\(?:[lg](?:t|eq?|eqslant)|ll|gg|neq?|not)\b")
_VARIABLES = re.compile(r"(?<![A-Za-z\\])[A-Za-z]")  # letters that are no command's
# A last letter that is a factor, perhaps before a unit; "10 s" may be seconds.
_LAST = re.compile(r"(?<![A-Za-z\\,;=])(?<!(?<!\\)[,;] )(?<!= )([A-Za-hj-z])"
                   r"(?= ?(?:\\(?:text|mathrm) ?\{[^{}]*\})?$)")
_SECONDS = re.compile(r"[-0-9.,/]+ [A-Za-z]")
_WORDS = re.compile(r"[A-Za-z][A-Za-z ]{3,}")  # four letters and more: "abc" may be a product


def extract_answer(text: str) -> str | None:
    r"""The content of the last complete \boxed{...} ("" if empty), else the last number, else None."""
    box = last_box(text)
    if box is not None:
        return box
    numbers = [number[0] for number in _NUMBER.finditer(text[-MAX_TEXT:])]
    return numbers[-1] if numbers else None


def last_box(text: str) -> str | None:
    r"""The content of the \boxed{...} that starts last among those that are closed."""
    text, found, opened = text[-MAX_TEXT:], None, []  # opened: per open brace, where its box's content starts
    for token in _BRACE.finditer(text):
        if token[2]:
            found = token.span(2)
        elif token[1]:
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(-1)  # no box's
        elif token[0] == "}" and opened:
            begin = opened.pop()
            if begin >= 0 and (found is None or begin > found[0]):
                found = begin, token.start()
    return text[slice(*found)].strip() if found else None


def is_correct(text: str, answer: str, finished: bool = True) -> bool:
    """Whether the answer of `text` (a trace) is the reference `answer` (bare, or boxed itself). Texts cannot
    make it hang or raise: what cannot be read, or not compared within the limits above, is not correct.

    A trace cut off (not `finished`) must have boxed its answer: its last number is where it stopped."""
    guess = extract_answer(text) if finished else last_box(text)
    gold = extract_answer(answer) if "\\boxed" in answer else answer
    guess, gold = _clean(guess or ""), _clean(gold or "")
    if guess == gold or not guess or not gold:
        return guess == gold != ""
    if max(len(guess), len(gold)) > MAX_ANSWER:
        return False
    (name, value), (other, asked) = _assigned(guess), _assigned(gold)
    if name == other or "" in (name, other):
        guess, gold = value, asked
    for read in (_decimal, _letter, _words, _named, _based):
        ours, theirs = read(gold), read(guess)
        if ours is not None and theirs is not None:
            return ours == theirs
    ours, theirs = _ratio(gold), _ratio(guess)
    if ours and theirs:
        return _same_ratio(*ours, *theirs)
    ours, theirs = _amounts(gold), _amounts(guess)
    if ours or theirs:  # math-verify would drop all but the first
        return ours == theirs
    for one, other in ((gold, guess), (guess, gold)):
        named, values = _named(one), _tuple(other)
        if named and values:
            return values in ([*named.values()], [named[name] for name in sorted(named)])
    for one, other in ((gold, guess), (guess, gold)):  # one names its unit, the other does not
        ours, theirs = _decimal(one), _measured(other)
        if ours is not None and theirs is not None:
            return ours == theirs[0]
        if ours is not None and _MIXED.search(_quoted(other)):
            return False  # as above
    ours, theirs = _measured(gold), _measured(guess)
    if ours is not None and theirs is not None:
        (number, unit), (other, named) = ours, theirs
        if number != other or unit == named or "" in (unit, named):
            return number == other  # else the same number, its units written differently
    ours, theirs = _SYMBOL.search(_quoted(gold)), _SYMBOL.search(_quoted(guess))
    if ours and theirs and ours[1] != theirs[1]:  # math-verify would drop km and m alike
        return False
    if _is_relation(gold) != _is_relation(guess):
        return False
    if (based := _based(guess)) and based[1] != "10" and _decimal(gold) is not None:
        return False
    gold, guess = _for_math_verify(gold), _for_math_verify(guess)
    if not (ours or _measured(gold) or _SECONDS.fullmatch(gold)) and _VARIABLES.search(_STYLED.sub("", gold)):
        # math-verify takes a last letter for a unit and drops it: the t of gt, too. Braced it stays
        gold, guess = (_LAST.sub(r"{\1}", one) for one in (gold, guess))
    return _math_equal(gold, guess)


def _clean(answer: str) -> str:
    r"""Without currency and math mode's dollars, outer \( \), ** ** or \text{}, extra spaces, a final full
    stop; signs as LaTeX writes them."""
    answer = re.sub(r"\\?[$\u00a3\u20ac\u00a5]", "", answer)
    answer = re.sub("\u00b0 ?([CFK])?", lambda m: f"\\text{{ {m[0]}}}" if m[1] else "^{\\circ}", answer)
    answer = _ROOT.sub(r"\\sqrt{\1}", _POWER.sub(lambda m: f"^{{{normalize('NFKC', m[0])}}}", answer))
    answer = _VULGAR.sub(lambda m: "\\frac{%s}{%s}" % (*normalize("NFKC", m[0]).split("\u2044"),), answer)
    answer = " ".join(answer.translate(_SIGNS).replace("{:}", ":").split())
    for opens, closes in (("\\(", "\\)"), ("\\[", "\\]"), ("**", "**")):
        if answer.startswith(opens) and answer.endswith(closes) and len(answer) > 4:
            answer = answer[2:-2].strip()
    answer = re.sub(r"^(?:US|USD|EUR|GBP) ?(?=[0-9.])", "", answer)
    styled = _STYLED.fullmatch(answer)
    return (styled[1] if styled else answer).rstrip(".").strip()


def _decimal(answer: str) -> Decimal | None:
    """Exact value of a plain decimal number with thousands separators and a power of ten, else None."""
    number = _DECIMAL.fullmatch(re.sub(r"^([+-]?)10 ?(?=\^)", r"\g<1>1 x 10", answer))
    if number is None or not (number[2] or number[3]):
        return None
    whole = re.sub("[^0-9]", "", number[2])
    return Decimal(f"{number[1]}{whole or 0}.{number[3] or 0}e{number[4] or number[5] or 0}")


def _decimals(answers: list[str]) -> list[Decimal] | None:
    values = [_decimal(answer.strip()) for answer in answers]
    return None if None in values else values


def _quoted(answer: str) -> str:
    return " ".join(_STYLED.sub(r" ' \1 ", answer).split())


def _measured(answer: str) -> tuple[Decimal, str] | None:
    """A number and the unit behind it. (To math-verify "18 books" is a product with b, o, o, k and s, and
    1.6e-19 J equals 1.7e-19 J.)"""
    measured = _UNIT.fullmatch(_quoted(answer))
    number = _decimal(measured[1].strip()) if measured else None
    if number is None:
        return None
    return number.scaleb(_SCALES[measured[2].lower()] if measured[2] else 0), measured[3].strip()


def _ratio(answer: str) -> tuple[list[Decimal], str] | None:
    """A ratio or a time of day: the numbers between colons, and "a" or "p" for a.m. or p.m."""
    found = _RATIO.fullmatch(_quoted(answer))
    numbers = found and _decimals(found[1].split(":"))
    return numbers and (numbers, (found[2] or "").lower())


def _same_ratio(a: list[Decimal], day: str, b: list[Decimal], other: str) -> bool:
    if day or other or 0 in a + b:  # a time, or as good as one
        return a == b and (day == other or "" in (day, other))
    return len(a) == len(b) and all(x * b[0] == y * a[0] for x, y in zip(a, b))


def _amounts(answer: str) -> list[tuple[Decimal, str]] | None:
    """"1 hour 30 min" -> [(1, "h"), (30, "m")]: two or more numbers, each with a unit; else None."""
    text = " ".join(re.sub(r"['~]|\\[,;: ]", " ", _quoted(answer)).split())
    if not re.fullmatch(f"(?:{_AMOUNT}){{2,}}", text, re.I):
        return None
    return [(Decimal(number), unit.lower()) for number, unit in re.findall(_AMOUNT, text, re.I)]


def _assigned(answer: str) -> tuple[str, str]:
    """A lone name and the number it is set to, which may have a unit: "x = 3,000" is ("x", "3,000"), where
    math-verify would read the 3. Other answers have no name, and stay as they are."""
    found = re.fullmatch(r"([A-Za-z][\w ]*|\\(?:text|mathrm)\{[^{}]*\} ?)= ?([^=]+)", answer)
    if found and (_decimal(found[2]) is not None or _measured(found[2])):
        return found[1].strip(), found[2]
    return "", answer


def _based(answer: str) -> tuple[str, str] | None:
    """"1011_2" or "(1011)_{2}" -> ("1011", "2"): to math-verify all bases are the same."""
    found = re.fullmatch(r"\(?([0-9A-F]+)\)? ?_ ?\{?([0-9]+)\}?", answer)
    return found and (found[1].lstrip("0"), found[2])


def _letter(answer: str) -> str | None:
    """The letter of an option, which may stand before its text; a bare capital, too."""
    option = _LETTER.fullmatch(_STYLED.sub(r"\1", answer).strip())
    return option and option[1]


def _words(answer: str) -> str | None:
    """Words are compared as such (to math-verify "silent" is a product of symbols, equal to "listen")."""
    return " ".join(answer.split()).casefold() if _WORDS.fullmatch(answer) else None


def _named(answer: str) -> dict | None:
    """"x = 1, y=2" -> {"x": 1, "y": 2}: named plain decimals, in any order, two or more; else None."""
    entries = [entry.partition("=") for entry in re.split(r"[,;](?!\d{3})", answer)]
    named = {name.strip(): _decimal(value.strip()) for name, _, value in entries}
    sound = 1 < len(named) == len(entries) and all(map(str.isidentifier, named))
    return named if sound and None not in named.values() else None


def _tuple(answer: str) -> list[Decimal] | None:
    """The plain decimals of "(1, 2)" or "\\left(1, 2\\right)"; else None."""
    found = re.fullmatch(r"(?:\\left ?)?\(([^()\\]*)(?:\\right ?)?\)", answer)
    return found and _decimals(found[1].split(","))


def _is_relation(answer: str) -> bool:
    """Does it begin as a relation, or is it a set of what fulfils one?"""
    return bool((_RELATION.search if answer.startswith("\\{") else _RELATION.match)(answer))


def _for_math_verify(answer: str) -> str:
    r"""Without what it misreads: 1,500\pi (as a list), 0.\overline{3} (as 0), -1./3 (as -1), 1 1/2 (as 1),
    primes (it drops them), \gamma (as Euler's constant) and E_1 (as no LaTeX)."""
    joined = _THOUSANDS.sub(lambda m: re.sub("[^0-9]", "", m[0]), answer)
    if "," not in joined and not answer.startswith(("(", "[", "\\{", "\\left")):
        answer = joined

    def fraction(found):
        whole, fixed, period = found[1], found[2], found[3] or found[4]
        over = int(whole + fixed + period) - int(whole + fixed or "0")
        return f"\\frac{{{over}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}}"

    answer = _REPEATING.sub(fraction, answer)
    answer = re.sub(r"([0-9])\.(?=/)", r"\1", answer)
    answer = re.sub(r"(?<![0-9.,/])([0-9]+)(?: |\\ )([0-9]+)/([0-9]+)(?![0-9.,/])", r"\1\\frac{\2}{\3}",
                    answer)
    answer = re.sub(r"(?<=[A-Za-z)}])'+", lambda m: "^{" + "\\prime" * len(m[0]) + "}", answer)
    answer = re.sub(r"\\gamma(?![A-Za-z])", r"\\upsilon ", answer)
    return re.sub(r"(?<![A-Z\\])E(?=_)", r"\\mathcal{E}", answer)


@lru_cache(maxsize=16384)  # a group's traces give the same answers again and again
def _math_equal(gold: str, guess: str) -> bool:
    """math-verify's verdict, from the worker; False when the worker hits a limit."""
    global _worker
    request = json.dumps([gold, guess]).encode() + b"\n"  # a few KB: fits into the pipe, cannot block
    with _lock:
        # Taken out while it works: after an interrupt the next question must not read this one's reply.
        worker, _worker = _worker, None
        if worker is None or worker.poll() is not None:
            worker = _start_worker()
        try:
            worker.stdin.write(request)
            reply = worker.stdout.readline()
        except BrokenPipeError:
            reply = b""
        if reply:
            _worker = worker
        else:
            _kill(worker)
        return reply == b"1\n"


_worker: subprocess.Popen | None = None
_lock = threading.RLock()


def _start_worker() -> subprocess.Popen:
    # Detached from the terminal: Ctrl-C is the trainer's to handle. Hash seed: sympy must not vary by run.
    command = [sys.executable, os.path.abspath(__file__)]
    worker = subprocess.Popen(
        command, bufsize=0, start_new_session=True, env={**os.environ, "PYTHONHASHSEED": "0"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if worker.stdout.readline() != b"ready\n":
        _kill(worker)
        raise RuntimeError("math-verify does not start, so answers cannot be compared. To see why: "
                           f"echo '[\"1\", \"2\"]' | {' '.join(command)}")
    return worker


def _kill(worker: subprocess.Popen) -> None:
    with worker:  # closes the pipes and waits
        worker.kill()


def _forget_worker() -> None:
    """After a fork: the worker is the parent's. Two processes would read each other's replies."""
    global _worker, _lock
    _worker, _lock = None, threading.RLock()


atexit.register(lambda: _worker and _kill(_worker))
os.register_at_fork(after_in_child=_forget_worker)


def _serve() -> None:
    """The worker: a JSON line [gold, guess] in, a line 1 or 0 out, until its input closes."""
    import resource
    for stop in (signal.SIGALRM, signal.SIGPROF):  # the default action ends the process even inside a C call
        signal.signal(stop, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGALRM, signal.SIGPROF))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ValueError, OSError):
        pass  # a lower limit is in force already, or this is a Mac
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a stray print must not be read as a verdict
    from math_verify import LatexExtractionConfig, parse, verify
    latex = [LatexExtractionConfig()]  # by default what is no LaTeX to it is the number in it: "2 E_0" is 2
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.alarm(WALL_SECONDS)
        try:  # math-verify's own timeouts are off: they use the same signal and need the main thread
            gold, guess = json.loads(line)
            equal = verify(parse(f"${gold}$", latex, parsing_timeout=None),
                           parse(f"${guess}$", parsing_timeout=None), timeout_seconds=None)
        except Exception:  # sympy raises about everything on garbage; garbage is not correct
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        replies.write(b"1\n" if equal else b"0\n")


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is right, from n samples of which c are:
    1 - C(n-c, k) / C(n, k) (arXiv 2107.03374), as a product that stays in [0, 1] for any n."""
    n, c, k = index(n), index(c), index(k)
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def bootstrap_interval(values, seed: int = 0, level: float = 0.95, resamples: int = 10_000) -> tuple:
    """(low, high): the percentile bootstrap interval of the mean of `values`, one value per problem."""
    import numpy as np
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"needs a list of finite numbers, got shape {values.shape}: {values}")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"needs 0 < level < 1 and resamples >= 1, got {level} and {resamples}")
    rng = np.random.default_rng(seed)
    rows = max(1, 1_000_000 // values.size)  # resamples at once: 8 MB, whatever the number of problems
    draws = (rng.integers(values.size, size=(min(rows, resamples - done), values.size))
             for done in range(0, resamples, rows))
    means = np.concatenate([values[draw].mean(axis=1) for draw in draws])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


if __name__ == "__main__":
    _serve()
