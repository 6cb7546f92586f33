"""What in a text belongs to no language (the hook `notation` of `tasks/language.py`).

Notation is code between backticks and in fences, LaTeX, functions, units after numbers, and names of points such as
ABC. Prose inside code or formulas is none: words of \\text that are no units, a run of words that no operator
separates, and commands that LaTeX does not have.
"""

import re

_SPAN = re.compile(r"```[\w+#-]*\n(?P<block>.*?)(?:```|\Z)|`(?P<span>[^`\n]*)`", re.DOTALL)
_DELIMITER = re.compile(r"\\[()\[\]]|(?<!\\)\$\$?|\\(?:begin|end)\{[a-z]{1,12}\*?\}")
_CLOSING = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
_LONGEST = 2_000
"""Maximum characters of a formula."""
_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]{1,12}\*?\}|\\([A-Za-z]+)")
_INSIDE = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mbox|operatorname|mathbf|mathit|mathsf|mathtt|textrm)\*? ?\{([^{}]*)\}"
)
_ALGEBRA = re.compile(r"(?<=[0-9^_=+*])[A-Za-z]{2,3}(?![A-Za-z])|(?<![A-Za-z])[A-Za-z]{2,3}(?=[0-9^_=+*])")
_POINTS = re.compile(r"(?<![A-Za-z])(?<![A-Z][A-Z] )[A-Z]{2,6}(?:'|′|_?[0-9])?(?![A-Za-z]| [A-Z]{2})")
_RUN = re.compile(r"[A-Za-z]{2,}(?: +[A-Za-z]{2,})+|[A-Za-z]*[a-z][A-Za-z]*")
_FUNCTION_NAMES = """sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp lim max min sup inf gcd
    lcm mod det dim deg arg dx dy dt"""
_FUNCTION = re.compile(rf"(?<![A-Za-z])(?:{'|'.join(_FUNCTION_NAMES.split())})(?![A-Za-z])")
_UNITS = re.compile(
    r"(?<=[0-9}$）)])[ \t]*(?:km/h|m/s|[kcmdμ]?m|[kmμ]?g|m?[lL]|min|hr?|sec|cm|mm|kg|ml|ft|in|mph|kW|kJ|[kM]?Hz"
    r"|mol|[kM]?Pa|rad)(?![A-Za-z])"
)
_COMMAND_NAMES = """
    alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi omicron pi varpi rho
    sigma varsigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega frac
    dfrac tfrac cfrac sqrt binom dbinom tbinom sum prod int iint oint lim limsup liminf sup inf max min log ln lg exp
    sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh det dim ker deg gcd lcm arg mod bmod pmod operatorname
    cdot times div pm mp ast star circ bullet oplus otimes le leq leqslant ge geq geqslant ne neq lt gt approx sim
    simeq cong equiv propto parallel perp nparallel mid nmid in notin ni subset subseteq supset supseteq cup cap
    setminus emptyset varnothing forall exists nexists neg lnot land lor wedge vee to gets mapsto rightarrow leftarrow
    Rightarrow Leftarrow leftrightarrow Leftrightarrow longrightarrow Longrightarrow implies impliedby iff uparrow
    downarrow xrightarrow therefore because infty partial nabla prime angle triangle square degree ell hbar Re Im aleph
    dots ldots cdots vdots ddots quad qquad hspace vspace left right big Big bigg Bigg bigl bigr Bigl Bigr middle
    langle rangle lfloor rfloor lceil rceil lvert rvert lVert rVert vert Vert lbrace rbrace overline underline
    overrightarrow overleftarrow overset underset underbrace overbrace widehat widetilde hat bar vec tilde dot ddot
    boxed fbox text textbf textit textrm textnormal mathrm mathbf mathbb mathcal mathit mathsf mathfrak mathtt
    boldsymbol bm mbox rm bf displaystyle textstyle limits nolimits stackrel substack not cancel begin end hline tag
    label color phantom odot triangleq complement backslash lim arcctan S P Q
"""
_LATEX = frozenset(_COMMAND_NAMES.split())
_QUOTED = re.compile(r"'[^'\n]{0,30}'|\"[^\"\n]{0,30}\"")
_KEYWORDS = frozenset(["and", "else", "for", "if", "in", "is", "lambda", "not", "or"])
_HAN_OR_WORD = re.compile("[A-Za-z]{2,}|[\u3400-\u4dbf\u4e00-\u9fff]")
_FOUR_WORDS = re.compile("(?<![A-Za-z])(?:[A-Za-z]{2,}+[,.]? ++){3,}[A-Za-z]{2,}+")


def without_notation(text: str) -> str:
    """The words of a text: without code, formulas, commands of LaTeX, functions, algebra, units and names of points."""
    text = _INSIDE.sub(_text_words, _without_formulas(_SPAN.sub(_code_words, text)))
    text = _COMMAND.sub(_unknown_command, _UNITS.sub(" ", text))
    return _FUNCTION.sub(" ", _ALGEBRA.sub(" ", _POINTS.sub(" ", text)))


def _without_formulas(text: str) -> str:
    """The text with each formula replaced by the prose in it. One pass: what closes nothing is text."""
    parts, done, opened = [], 0, None
    for mark in _DELIMITER.finditer(text):
        name = mark[0]
        if opened is not None:
            begin = opened[0].end()
            inside = text[begin : mark.start()] if mark.start() - begin <= _LONGEST else None
            if inside is None or (opened[1] == "$" and "\n" in inside):
                opened = None
            elif name == opened[1]:
                parts += [text[done : opened[0].start()], _formula_words(inside)]
                done, opened = mark.end(), None
                continue
        if opened is None and (name in _CLOSING or name.startswith("\\begin")):
            opened = (mark, _CLOSING.get(name, name.replace("begin", "end")))
    return "".join([*parts, text[done:]])


def _formula_words(inside: str) -> str:
    """The prose in a formula: runs of words, words of four letters or more, what \\text and unknown commands say."""
    prose = [_text_words(match) for match in _INSIDE.finditer(inside)]
    inside = _INSIDE.sub(" , ", inside)
    prose += [_unknown_command(match) for match in _COMMAND.finditer(inside)]
    runs = _RUN.findall(_POINTS.sub(",", _COMMAND.sub(",", inside)))
    prose += [run for run in runs if " " in run or len(run) > 3]
    return f" {' '.join(prose)} "


def _text_words(match: re.Match[str]) -> str:
    """The words of \\text{...}, unless it is a unit or a name of up to three letters."""
    words = _HAN_OR_WORD.findall(match[1])
    return " " if len(words) == 1 and len(words[0]) < 4 and words[0].isascii() else f" {' '.join(words)} "


def _unknown_command(match: re.Match[str]) -> str:
    return " " if match[1] is None or match[1] in _LATEX else f" {match[1]} "


def _code_words(match: re.Match[str]) -> str:
    """The prose in code: words that are neither Python's keywords nor in a string; in a fence, four in a row."""
    if match["span"] is not None:
        return _prose(match["span"])
    return " ".join(_FOUR_WORDS.findall(match["block"]))


def _prose(span: str) -> str:
    """The prose in a span between backticks: words that are neither Python's keywords nor in a string."""
    parts = (part.strip(",.;:!?") for part in _QUOTED.sub(" ", span).split())
    return f" {' '.join(part for part in parts if len(part) > 1 and part.isalpha() and part not in _KEYWORDS)} "
